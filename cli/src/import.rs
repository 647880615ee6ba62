//! `selvage import`: an app that `spin registry push` pushed becomes one of ours, in the same repository.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use bytes::Bytes;
use miette::Report;
use reqwest::Method;
use reqwest::header::ACCEPT;
use selvage_config::app::{APP_BYTES_MAX, App};
use selvage_config::oci::{APP_FILE, Descriptor, MANIFEST, Manifest, Repository, SPIN_LOCK, TITLE, WASM, is_tag};
use selvage_config::spin_lock::{self, SpinApp};
use selvage_config::{AppName, Digest};

use crate::client::{Client, send};
use crate::context::ContextArguments;
use crate::key::{PasswordArguments, SigningKey};
use crate::output::{Output, failed, failure, wrong};
use crate::registry::{Reference, push_blob, push_manifest, resolve};
use crate::sign::sign;

/// Files that Spin packs together when there are very many.
const SPIN_ARCHIVE: &str = "application/vnd.wasm.content.bundle.v1.tar+gzip";

/// `selvage import`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  spin registry push cp.example:7400/hello-spin:v1\n  selvage import hello-spin:v1 --key cosign.key\n  selvage deploy hello-spin:selvage --app hello-spin"
)]
pub(crate) struct Arguments {
    /// What Spin pushed: repository:tag or repository@digest.
    reference: Reference,

    /// The app's name here. Default: its own.
    #[arg(long)]
    app: Option<AppName>,

    /// The tag of what is made.
    #[arg(long, default_value = "selvage")]
    tag: String,

    /// Sign it with this key.
    #[arg(long)]
    key: Option<PathBuf>,

    #[command(flatten)]
    password: PasswordArguments,

    #[command(flatten)]
    context: ContextArguments,
}

/// Imports an app.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    if !is_tag(&arguments.tag) {
        return Err(wrong(format!("{:?} is no tag", arguments.tag), None));
    }
    let client = Client::of(&arguments.context.context)?;
    let key = arguments.key.as_deref().map(|path| SigningKey::load(path, &arguments.password.password)).transpose()?;
    let Reference { repository, .. } = &arguments.reference;
    let source = manifest(&client, &arguments.reference).await?;
    let lock = std::iter::once(&source.config).chain(&source.layers).find(|blob| blob.media_type == SPIN_LOCK);
    let hint = "`spin registry push` makes such an artifact; `selvage push` takes a spin.toml";
    let lock = lock.ok_or_else(|| failed(format!("{} has no locked app of Spin", arguments.reference), Some(hint)))?;
    if source.layers.iter().any(|layer| layer.media_type == SPIN_ARCHIVE) {
        return Err(failed("its files are packed in an archive", Some("push it with fewer files, or `selvage push`")));
    }
    let document = blob(&client, repository, lock).await?;
    let imported = spin_lock::read(&document, arguments.app.as_ref());
    let SpinApp { app, inline } = imported.map_err(|error| failure("read the locked app", &error, None))?;
    for bytes in inline.values() {
        push_blob(&client, repository, bytes.clone()).await?;
    }
    let config = Bytes::from(app.to_json());
    push_blob(&client, repository, config.clone()).await?;
    let made = manifest_of(&app, &config, &source, &inline)?;
    let digest = push_manifest(&client, repository, &made, Some(&arguments.tag)).await?;
    if let Some(key) = &key {
        let reference = Reference { repository: repository.clone(), reference: digest.to_string() };
        let (digest, size) = resolve(&client, &reference).await?;
        sign(&client, repository, digest, size, key).await?;
    }
    let answer = serde_json::json!({ "app": app.name, "repository": repository, "manifest": digest });
    output.answer(&answer, format_args!("imported {}@{digest} as app {}", repository, app.name));
    Ok(ExitCode::SUCCESS)
}

async fn manifest(client: &Client, reference: &Reference) -> Result<Manifest, Report> {
    let path = format!("/v2/{}/manifests/{}", reference.repository, reference.reference);
    let answer =
        send(client.request(Method::GET, &path).header(ACCEPT, MANIFEST), &format!("look up {reference}")).await?;
    answer.json().await.map_err(|error| failure("read the manifest", &error, None))
}

/// A small blob, by own hash.
async fn blob(client: &Client, repository: &Repository, descriptor: &Descriptor) -> Result<Bytes, Report> {
    if descriptor.size > APP_BYTES_MAX as u64 {
        return Err(failed(format!("the locked app has {} bytes, the most is {APP_BYTES_MAX}", descriptor.size), None));
    }
    let path = format!("/v2/{repository}/blobs/{}", descriptor.digest);
    let answer = send(client.request(Method::GET, &path), "read the locked app").await?;
    let bytes = answer.bytes().await.map_err(|error| failure("read the locked app", &error, None))?;
    if Digest::of(&bytes) == descriptor.digest { Ok(bytes) } else { Err(failed("the registry gave other bytes", None)) }
}

/// The manifest of the app: layers that Spin pushed, by our media types, and what stood in its document.
fn manifest_of(
    app: &App,
    config: &[u8],
    source: &Manifest,
    inline: &BTreeMap<Digest, Bytes>,
) -> Result<Manifest, Report> {
    let mut layers: BTreeMap<Digest, Descriptor> = BTreeMap::new();
    let mut add = |digest: Digest, media_type: &str, title: &str| {
        let pushed = source.layers.iter().find(|layer| layer.digest == digest).map(|layer| layer.size);
        let size = pushed.or_else(|| inline.get(&digest).map(|bytes| bytes.len() as u64));
        let size = size.ok_or_else(|| failed(format!("the artifact lacks {digest} ({title})"), None))?;
        let media_type = media_type.to_owned();
        let annotations = [(TITLE.to_owned(), title.to_owned())].into();
        layers.entry(digest).or_insert(Descriptor { media_type, digest, size, artifact_type: None, annotations });
        Ok::<_, Report>(())
    };
    for (name, component) in &app.components {
        add(component.digest, WASM, &format!("{name}.wasm"))?;
        for (path, digest) in &component.files {
            add(*digest, APP_FILE, path)?;
        }
    }
    Ok(Manifest::of_app(config, layers.into_values()))
}
