//! `selvage sign`: a signature that cosign 3 verifies, as a Sigstore bundle beside the artifact.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use bytes::Bytes;
use miette::Report;
use selvage_config::Digest;
use selvage_config::oci::{BUNDLE, Descriptor, EMPTY, MANIFEST, Manifest, Repository};
use selvage_config::signature::{
    Bundle, Envelope, EnvelopeSignature, PAYLOAD_TYPE, PREDICATE_SIGN, Statement, pre_authentication_encoding,
};

use crate::client::Client;
use crate::context::ContextArguments;
use crate::key::{PasswordArguments, SigningKey};
use crate::output::{Output, failure};
use crate::registry::{Reference, push_blob, push_manifest, resolve};

/// The config of a manifest that has none.
const EMPTY_CONFIG: &[u8] = b"{}";

/// `selvage sign`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  COSIGN_PASSWORD=… selvage sign hello@sha256:… --key cosign.key\n\ncosign sees the same signature:\n  cosign verify --key cosign.pub --insecure-ignore-tlog=true REGISTRY/hello@sha256:…"
)]
pub(crate) struct Arguments {
    /// What to sign: repository@digest, or repository:tag (resolved once, now).
    reference: Reference,

    /// The private key, as `selvage key` or `cosign generate-key-pair` made it.
    #[arg(long, default_value = "cosign.key")]
    key: PathBuf,

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

/// The bundle of a signature by `key` over the artifact with `digest`.
fn bundle_of(digest: Digest, key: &SigningKey) -> Result<Vec<u8>, Report> {
    let json = |error| failure("write the bundle", &error as &serde_json::Error, None);
    let payload = serde_json::to_vec(&Statement::signature_of(digest)).map_err(json)?;
    let sig = key.sign(&pre_authentication_encoding(PAYLOAD_TYPE, &payload))?;
    let signatures = vec![EnvelopeSignature { sig, keyid: String::new() }];
    let envelope = Envelope { payload, payload_type: PAYLOAD_TYPE.to_owned(), signatures };
    serde_json::to_vec(&Bundle::of_key(&key.spki(), envelope)).map_err(json)
}
