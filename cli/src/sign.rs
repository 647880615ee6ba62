//! `selvage sign`: a signature that cosign 3 verifies, as a Sigstore bundle beside the artifact; on request also one that
//! cosign 2 verifies, under a tag.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use miette::Report;
use selvage_config::Digest;
use selvage_config::oci::{
    BUNDLE, COSIGN_SIGNATURE, Descriptor, EMPTY, IMAGE_CONFIG, MANIFEST, Manifest, Repository, SIMPLE_SIGNING,
};
use selvage_config::signature::{
    Bundle, Critical, CriticalImage, Envelope, EnvelopeSignature, PAYLOAD_TYPE, PREDICATE_SIGN, SIMPLE_SIGNING_TYPE,
    SimpleSigning, Statement, pre_authentication_encoding,
};

use crate::client::Client;
use crate::context::ContextArguments;
use crate::key::{PasswordArguments, SigningKey};
use crate::output::{Output, failure};
use crate::registry::{Reference, push_blob, push_manifest, resolve, tagged};

/// The config of a manifest that has none.
const EMPTY_CONFIG: &[u8] = b"{}";

/// `selvage sign`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  COSIGN_PASSWORD=… selvage sign hello@sha256:… --key cosign.key\n\ncosign 3 verifies it; with --legacy, cosign 2 does too:\n  cosign verify --key cosign.pub --insecure-ignore-tlog=true REGISTRY/hello@sha256:…"
)]
pub(crate) struct Arguments {
    /// What to sign: repository@digest, or repository:tag (resolved once, now).
    reference: Reference,

    /// The private key, as `selvage key` or `cosign generate-key-pair` made it.
    #[arg(long, default_value = "cosign.key")]
    key: PathBuf,

    /// Also write the tag that cosign 2 looks for. Nodes ignore it unless their `legacy_signatures` is on.
    #[arg(long)]
    legacy: bool,

    #[command(flatten)]
    password: PasswordArguments,

    #[command(flatten)]
    context: ContextArguments,
}

/// Signs a pushed artifact.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let key = SigningKey::load(&arguments.key, &arguments.password.password)?;
    let client = Client::of(&arguments.context.context)?;
    let repository = &arguments.reference.repository;
    let (digest, size) = resolve(&client, &arguments.reference).await?;
    let signature = sign(&client, repository, digest, size, &key).await?;
    if arguments.legacy {
        sign_legacy(&client, repository, digest, &key).await?;
    }
    let answer = serde_json::json!({ "repository": repository, "manifest": digest, "signature": signature });
    output.answer(&answer, format_args!("signed {repository}@{digest}"));
    Ok(ExitCode::SUCCESS)
}

/// Signs the artifact whose manifest has `digest` and `size` bytes; returns the signature manifest's digest.
pub(crate) async fn sign(
    client: &Client,
    repository: &Repository,
    digest: Digest,
    size: u64,
    key: &SigningKey,
) -> Result<Digest, Report> {
    let bundle = Bytes::from(bundle_of(digest, key)?);
    let config = Bytes::from_static(EMPTY_CONFIG);
    let annotations = [
        ("dev.sigstore.bundle.content".to_owned(), "dsse-envelope".to_owned()),
        ("dev.sigstore.bundle.predicateType".to_owned(), PREDICATE_SIGN.to_owned()),
    ];
    let subject =
        Descriptor { media_type: MANIFEST.to_owned(), digest, size, artifact_type: None, annotations: BTreeMap::new() };
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        artifact_type: Some(BUNDLE.to_owned()),
        config: Descriptor::of(EMPTY, &config),
        layers: vec![Descriptor::of(BUNDLE, &bundle)],
        subject: Some(subject),
        annotations: annotations.into(),
    };
    push_blob(client, repository, config).await?;
    push_blob(client, repository, bundle).await?;
    push_manifest(client, repository, &manifest, None).await
}

/// Adds a signature in the form of cosign 2 to those under the artifact's `.sig` tag.
async fn sign_legacy(client: &Client, repository: &Repository, digest: Digest, key: &SigningKey) -> Result<(), Report> {
    let json = |error| failure("write the signature", &error as &serde_json::Error, None);
    let critical = Critical {
        identity: serde_json::json!({ "docker-reference": repository }),
        image: CriticalImage { digest },
        kind: SIMPLE_SIGNING_TYPE.to_owned(),
    };
    let payload = Bytes::from(serde_json::to_vec(&SimpleSigning { critical, optional: None }).map_err(json)?);
    let mut layer = Descriptor::of(SIMPLE_SIGNING, &payload);
    layer.annotations.insert(COSIGN_SIGNATURE.to_owned(), STANDARD.encode(key.sign(&payload)?));
    push_blob(client, repository, payload).await?;

    let tag = format!("sha256-{}.sig", digest.hex());
    let mut layers = tagged(client, repository, &tag).await?.map_or(Vec::new(), |manifest| manifest.layers);
    layers.push(layer);
    let digests: Vec<String> = layers.iter().map(|layer| layer.digest.to_string()).collect();
    // cosign reads the manifest as a container image: its config lists the layers.
    let config = serde_json::json!({
        "architecture": "", "os": "", "config": {}, "rootfs": { "type": "layers", "diff_ids": digests }
    });
    let config = Bytes::from(serde_json::to_vec(&config).map_err(json)?);
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of(IMAGE_CONFIG, &config),
        layers,
        subject: None,
        annotations: BTreeMap::new(),
    };
    push_blob(client, repository, config).await?;
    push_manifest(client, repository, &manifest, Some(&tag)).await.map(drop)
}

/// The bundle of a signature by `key` over the artifact with `digest`.
fn bundle_of(digest: Digest, key: &SigningKey) -> Result<Vec<u8>, Report> {
    let json = |error| failure("write the bundle", &error as &serde_json::Error, None);
    let payload = serde_json::to_vec(&Statement::signature_of(digest)).map_err(json)?;
    let sig = key.sign(&pre_authentication_encoding(PAYLOAD_TYPE, &payload))?;
    let signatures = vec![EnvelopeSignature { sig, keyid: String::new() }];
    let envelope = Envelope { payload, payload_type: PAYLOAD_TYPE.to_owned(), signatures };
    serde_json::to_vec(&Bundle::of_key(&key.spki(), envelope)).map_err(json)
}
