//! `selvage check`: everything that can be found wrong without starting anything.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::Report;
use selvage_config::bundle::Bundle;

use crate::output::{Output, failure, wrong};
use crate::up::CacheArguments;
use crate::{control_plane, node};

/// `selvage check`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage check spin.toml            the manifest, its files, and what each component imports\n  selvage check /etc/selvage/node.toml"
)]
pub(crate) struct Arguments {
    /// A spin.toml, a .wasm file, a node's or a control plane's configuration.
    #[arg(default_value = "spin.toml")]
    path: PathBuf,

    #[command(flatten)]
    cache: CacheArguments,
}

/// What kind of document a file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    App,
    Node,
    ControlPlane,
}

/// Checks one document.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let path = &arguments.path;
    let kind = kind(path)?;
    let what = match kind {
        Kind::App => app(path, &arguments.cache).await?,
        Kind::Node => {
            let config = node::load(path)?;
            format!("node {} in {}", config.name, config.region)
        }
        Kind::ControlPlane => format!("control plane at {}", control_plane::load(path)?.listen),
    };
    output.answer(&serde_json::json!({ "file": path, "ok": true, "what": what }), format_args!("ok: {what}"));
    Ok(ExitCode::SUCCESS)
}

async fn app(path: &Path, cache: &CacheArguments) -> Result<String, Report> {
    let bundle = Bundle::load(path)?;
    let app = bundle.app.clone();
    let checked = selvage_node::node::check(bundle, cache.directory()).await;
    checked.map_err(|error| failure("check the components", &error, None))?;
    Ok(format!("app {}, {} routes, {} components", app.name, app.routes.len(), app.components.len()))
}

fn kind(path: &Path) -> Result<Kind, Report> {
    if path.is_dir() || path.extension().is_some_and(|extension| extension == "wasm") {
        return Ok(Kind::App);
    }
    let text = std::fs::read_to_string(path)
        .map_err(|error| wrong(format!("read {}: {error}", path.display()), Some("give the file to check")))?;
    Ok(kind_of(&text))
}

/// A key that only one kind of document has decides, also where the rest can't be parsed.
fn kind_of(text: &str) -> Kind {
    let has = |key: &str| {
        text.lines()
            .any(|line| line.trim_start().strip_prefix(key).is_some_and(|rest| rest.trim_start().starts_with('=')))
    };
    if has("region") {
        Kind::Node
    } else if has("state_dir") && !has("spin_manifest_version") {
        Kind::ControlPlane
    } else {
        Kind::App
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kind_of_a_document_shows_in_its_keys() {
        assert_eq!(kind_of("spin_manifest_version = 2"), Kind::App);
        assert_eq!(kind_of("name = 'a'\nregion='fra'\nstate_dir = 's'"), Kind::Node);
        assert_eq!(kind_of("listen = 'x'\nstate_dir = 's'"), Kind::ControlPlane);
    }
}
