//! `selvage verify`: what a node's policy says of an artifact, by the node's own code.
//!
//! With bundles in files nothing is asked of anybody: no registry, no log, no update of trust roots.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use bytes::Bytes;
use miette::Report;
use reqwest::header::ACCEPT;
use reqwest::{Method, StatusCode};
use selvage_config::oci::{BUNDLE, Descriptor, INDEX, Index, MANIFEST, MANIFEST_BYTES_MAX, Manifest, SIMPLE_SIGNING};
use selvage_config::signature::BUNDLE_BYTES_MAX;
use selvage_config::{AppName, Digest};
use selvage_node::release::fetch::Candidate;
use selvage_node::release::verify::{Judge, Policy, Terms, Verdict, VerifyError};
use serde_json::json;

use crate::client::Client;
use crate::context::ContextArguments;
use crate::output::{Output, failed, failure, wrong};
use crate::registry::{Reference, resolve, tagged};

/// How the media type of a bundle begins, whatever its version.
const BUNDLE_PREFIX: &str = "application/vnd.dev.sigstore.bundle";

/// `selvage verify`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage verify acme/hello@sha256:… --policy policy.toml\n  selvage verify acme/hello:v1 --key release.pub --app hello\n  selvage verify --bundle hello.sigstore.json --digest sha256:… --policy policy.toml -o json      offline\n\nExit codes: 0 accepted; 1 refused, the reason says why; 2 the arguments or the policy are wrong."
)]
pub(crate) struct Arguments {
    /// A pushed artifact: repository@digest or repository:tag.
    #[arg(required_unless_present = "bundle", conflicts_with = "bundle")]
    reference: Option<Reference>,

    /// A file with a Sigstore bundle. May be repeated. Needs --digest.
    #[arg(long, requires = "digest", value_name = "FILE")]
    bundle: Vec<PathBuf>,

    /// What the bundles must be about: the digest of the artifact's manifest.
    #[arg(long, requires = "bundle")]
    digest: Option<Digest>,

    /// The policy: the same file that a node has.
    #[arg(long, required_unless_present = "key", conflicts_with = "key", value_name = "FILE")]
    policy: Option<PathBuf>,

    /// A public key whose signature suffices, instead of a policy. May be repeated.
    #[arg(long, value_name = "FILE")]
    key: Vec<PathBuf>,

    /// Which app it is to the policy. Default: the repository's last part.
    #[arg(long)]
    app: Option<AppName>,

    /// Which repository it is in, to the policy. Default: the reference's, or none.
    #[arg(long, requires = "bundle")]
    repository: Option<String>,

    #[command(flatten)]
    context: ContextArguments,
}

/// Tells the verdict.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let policy = match &arguments.policy {
        Some(path) => Policy::load(path),
        None => Policy::of_key_files(&arguments.key, false),
    };
    let terms = Terms::from(policy.map_err(|error| wrong_policy(&error))?);
    let reference = arguments.reference.as_ref();
    let repository = reference.map(|r| r.repository.to_string()).or(arguments.repository).unwrap_or_default();
    let name = repository.rsplit('/').next().unwrap_or_default();
    let app = match arguments.app {
        Some(app) => app,
        None => name.parse().map_err(|_| wrong(format!("{name:?} is no app's name"), Some("name it with --app")))?,
    };
    let (digest, verdict) = match (reference, arguments.digest) {
        (Some(reference), _) => {
            let client = Client::of(&arguments.context.context)?;
            let (digest, _) = resolve(&client, reference).await?;
            match Judge::new(&terms, &app, &repository, digest) {
                Ok(mut judge) => {
                    search(&client, reference, digest, &mut judge).await?;
                    (digest, judge.verdict())
                }
                Err(error) => (digest, Err(error)),
            }
        }
        (None, Some(digest)) => (digest, of_files(&terms, &app, &repository, digest, &arguments.bundle)?),
        (None, None) => return Err(wrong("nothing to verify", Some("name a reference, or --bundle and --digest"))),
    };
    Ok(told(digest, &app, &repository, verdict, output))
}

fn wrong_policy(error: &dyn std::error::Error) -> Report {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text = format!("{text}: {cause}");
        source = cause.source();
    }
    wrong(text, Some("`selvage check` tells every mistake of a policy"))
}

fn of_files(
    terms: &Terms,
    app: &AppName,
    repository: &str,
    digest: Digest,
    bundles: &[PathBuf],
) -> Result<Result<Verdict, VerifyError>, Report> {
    let mut judge = match Judge::new(terms, app, repository, digest) {
        Ok(judge) => judge,
        Err(error) => return Ok(Err(error)),
    };
    for path in bundles {
        judge.offer(&file(path)?);
    }
    Ok(judge.verdict())
}

fn file(path: &Path) -> Result<Candidate, Report> {
    let bytes = std::fs::read(path).map_err(|error| failure(&format!("read {}", path.display()), &error, None))?;
    Ok(Candidate { layer: Descriptor::of(BUNDLE, &bytes), bytes: bytes.into() })
}

/// Offers what the registry has until the policy is met.
async fn search(client: &Client, reference: &Reference, digest: Digest, judge: &mut Judge<'_>) -> Result<(), Report> {
    let repository = &reference.repository;
    let tag = format!("sha256-{}", digest.hex());
    let mut listed = Vec::new();
    for path in [format!("referrers/{digest}"), format!("manifests/{tag}")] {
        if listed.is_empty()
            && let Some(bytes) = get(client, &format!("/v2/{repository}/{path}"), INDEX).await?
        {
            listed = serde_json::from_slice::<Index>(&bytes).map(|index| index.manifests).unwrap_or_default();
        }
    }
    for referrer in listed {
        let path = format!("/v2/{repository}/manifests/{}", referrer.digest);
        let Some(bytes) = get(client, &path, MANIFEST).await? else { continue };
        let Ok(Manifest { layers, .. }) = serde_json::from_slice(&bytes) else { continue };
        let layers = layers.into_iter().filter(|layer| layer.media_type.starts_with(BUNDLE_PREFIX));
        if offer(client, reference, layers.collect(), judge).await? {
            return Ok(());
        }
    }
    if judge.wants_legacy()
        && let Some(image) = tagged(client, repository, &format!("{tag}.sig")).await?
    {
        let layers = image.layers.into_iter().filter(|layer| layer.media_type == SIMPLE_SIGNING);
        offer(client, reference, layers.collect(), judge).await?;
    }
    Ok(())
}

async fn offer(
    client: &Client,
    reference: &Reference,
    layers: Vec<Descriptor>,
    judge: &mut Judge<'_>,
) -> Result<bool, Report> {
    for layer in layers.into_iter().filter(|layer| layer.size <= BUNDLE_BYTES_MAX as u64) {
        let path = format!("/v2/{}/blobs/{}", reference.repository, layer.digest);
        let Some(bytes) = get(client, &path, "*/*").await? else { continue };
        if Digest::of(&bytes) == layer.digest && judge.offer(&Candidate { layer, bytes }) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// A small thing of the registry's, if it is there.
async fn get(client: &Client, path: &str, accept: &str) -> Result<Option<Bytes>, Report> {
    let tried = |error: reqwest::Error| failure("ask the registry", &error, None);
    let mut response = client.request(Method::GET, path).header(ACCEPT, accept).send().await.map_err(tried)?;
    if response.status() == StatusCode::NOT_FOUND {
        return Ok(None);
    }
    if !response.status().is_success() {
        return Err(failed(format!("{path} is answered {}", response.status()), None));
    }
    let mut bytes = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(tried)? {
        bytes.extend_from_slice(&chunk);
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(failed(format!("{path} has more than {MANIFEST_BYTES_MAX} bytes"), None));
        }
    }
    Ok(Some(bytes.into()))
}

fn told(
    digest: Digest,
    app: &AppName,
    repository: &str,
    verdict: Result<Verdict, VerifyError>,
    output: Output,
) -> ExitCode {
    let artifact = json!({ "digest": digest, "app": app, "repository": repository });
    match verdict {
        Ok(verdict) => {
            let line = |proof: &selvage_node::release::verify::Proof| {
                let log = if proof.log { ", in a log" } else { "" };
                let at = proof.signed_at.as_ref().map_or(String::new(), |at| format!(", {at}"));
                format!("\n  {} by {}{log}{at}", proof.predicate_type, proof.signers.join(", "))
            };
            let text = format!("accepted: {digest}{}", verdict.proofs.iter().map(line).collect::<String>());
            let answer =
                json!({ "accepted": true, "artifact": artifact, "rule": verdict.rule, "proofs": verdict.proofs });
            output.answer(&answer, text);
            ExitCode::SUCCESS
        }
        Err(error) => {
            let why = match &error {
                VerifyError::Untrusted { why, .. } | VerifyError::Short { why, .. } => Some(why),
                _ => None,
            };
            let rejected: Vec<_> = why.iter().flat_map(|why| why.iter()).collect();
            let lines = rejected.iter().map(|(bundle, why)| format!("\n  {}: {why}", bundle.short()));
            let text = format!("refused: {digest}: {error}{}", lines.collect::<String>());
            let rejected = rejected
                .iter()
                .map(|(bundle, why)| json!({ "bundle": bundle, "cause": why.cause(), "reason": why.to_string() }));
            let answer = json!({
                "accepted": false, "artifact": artifact, "cause": error.cause(), "reason": error.to_string(),
                "rejected": rejected.collect::<Vec<_>>(),
            });
            output.answer(&answer, text);
            ExitCode::FAILURE
        }
    }
}
