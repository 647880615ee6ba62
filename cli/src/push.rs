//! `selvage push`: an app and all its files become one OCI artifact.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;

use bytes::Bytes;
use miette::Report;
use selvage_config::bundle::Bundle;
use selvage_config::oci::{APP_FILE, Descriptor, Manifest, Repository, TITLE, WASM, is_tag};
use selvage_config::{AppName, Digest};
use serde::Serialize;

use crate::client::Client;
use crate::context::ContextArguments;
use crate::output::{Output, wrong};
use crate::registry::{push_blob, push_manifest};

/// `selvage push`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  selvage push -f examples/hello/spin.toml --tag v1\n\nThen sign and deploy what it prints:\n  selvage sign hello@sha256:… --key cosign.key\n  selvage deploy hello@sha256:…"
)]
pub(crate) struct Arguments {
    /// A spin.toml, a directory with one, or a .wasm file.
    #[arg(short, long = "from", visible_alias = "file", default_value = "spin.toml", value_name = "PATH")]
    from: PathBuf,

    /// The repository. Default: the app's name.
    #[arg(long)]
    repository: Option<Repository>,

    /// A tag for people; nodes only ever see digests.
    #[arg(long, default_value = "latest")]
    tag: String,

    #[command(flatten)]
    context: ContextArguments,
}

/// What was pushed.
#[derive(Debug, Serialize)]
pub(crate) struct Pushed {
    /// The app.
    pub(crate) app: AppName,
    /// Where it lies.
    pub(crate) repository: Repository,
    /// Its manifest.
    pub(crate) manifest: Digest,
    /// Blobs that had to be sent, and those that the registry had.
    pub(crate) blobs_sent: usize,
    pub(crate) blobs_known: usize,
}

/// Pushes an app.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    if !is_tag(&arguments.tag) {
        return Err(wrong(format!("{:?} is no tag", arguments.tag), None));
    }
    let bundle = Bundle::load(&arguments.from)?;
    let client = Client::of(&arguments.context.context)?;
    let pushed = push(&client, &bundle, arguments.repository, &arguments.tag, output).await?;
    let text = format!(
        "pushed {}@{} ({} blobs sent, {} known)",
        pushed.repository, pushed.manifest, pushed.blobs_sent, pushed.blobs_known
    );
    output.answer(&pushed, text);
    Ok(ExitCode::SUCCESS)
}

/// Pushes `bundle`. Every blob before the manifest: a registry never names what it lacks.
pub(crate) async fn push(
    client: &Client,
    bundle: &Bundle,
    repository: Option<Repository>,
    tag: &str,
    output: Output,
) -> Result<Pushed, Report> {
    let app = bundle.app.name.clone();
    let repository = match repository {
        Some(repository) => repository,
        None => app.as_str().parse().map_err(|error| wrong(format!("{error}"), Some("give --repository")))?,
    };
    let config = Bytes::from(bundle.app.to_json());
    let manifest = manifest_of(bundle, &config);
    let (mut blobs_sent, mut blobs_known) = (0, 0);
    for blob in bundle.blobs.values().chain([&config]) {
        output.progress(format_args!("  {} {:>10} bytes", Digest::of(blob).short(), blob.len()));
        if push_blob(client, &repository, blob.clone()).await? {
            blobs_sent += 1;
        } else {
            blobs_known += 1;
        }
    }
    let manifest = push_manifest(client, &repository, &manifest, Some(tag)).await?;
    Ok(Pushed { app, repository, manifest, blobs_sent, blobs_known })
}

/// The manifest of an app. The same app gives the same bytes, so pushing twice gives one digest.
fn manifest_of(bundle: &Bundle, config: &[u8]) -> Manifest {
    let mut layers: BTreeMap<Digest, Descriptor> = BTreeMap::new();
    let mut add = |digest: Digest, media_type: &str, title: &str| {
        let Some(blob) = bundle.blobs.get(&digest) else { return };
        let descriptor = layers.entry(digest).or_insert_with(|| Descriptor::of(media_type, blob));
        descriptor.annotations.entry(TITLE.to_owned()).or_insert_with(|| title.to_owned());
    };
    for (name, component) in &bundle.app.components {
        add(component.digest, WASM, &format!("{name}.wasm"));
        for (path, digest) in &component.files {
            add(*digest, APP_FILE, path);
        }
    }
    Manifest::of_app(config, layers.into_values())
}

#[cfg(test)]
mod tests {
    use selvage_config::app::App;

    use super::*;

    #[test]
    fn a_manifest_names_every_blob_once_and_is_the_same_each_time() {
        let wasm = Bytes::from_static(b"\0asm");
        let digest = Digest::of(&wasm);
        let app = App::of_component("a".parse().unwrap(), "c".parse().unwrap(), digest);
        let bundle = Bundle { app, blobs: [(digest, wasm)].into() };
        let manifest = manifest_of(&bundle, b"{}");
        assert_eq!(manifest.layers.len(), 1);
        assert_eq!(manifest.layers[0].digest, digest);
        assert_eq!(manifest, manifest_of(&bundle, b"{}"));
    }
}
