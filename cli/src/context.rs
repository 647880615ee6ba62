//! How to reach a fleet: its control plane, whom to trust, and who one is.

use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, Report};
use selvage_certs::Identity;
use selvage_config::Invalid;
use serde::{Deserialize, Serialize};

use crate::output::{failure, wrong};

/// The flags of every command that talks to a fleet.
#[derive(Debug, Clone, clap::Args)]
pub(crate) struct ContextArguments {
    /// File that says how to reach the fleet (`selvage certs operator` and `selvage demo` write one).
    #[arg(long, env = "SELVAGE_CONTEXT", default_value = "selvage-context.toml", value_name = "FILE")]
    pub(crate) context: PathBuf,
}

/// A context file. Relative paths are relative to its directory.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Context {
    /// `https://host:port` of the control plane.
    pub(crate) control_plane: String,
    /// The fleet's authority, PEM.
    pub(crate) roots: PathBuf,
    /// The operator's certificate and key, PEM. Needed for `kv`; elsewhere a token does too.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) certificate: Option<PathBuf>,
    /// Its key.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) key: Option<PathBuf>,
    /// A file with the operator's token.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub(crate) token_file: Option<PathBuf>,
}

impl Context {
    /// Reads a context file; paths become absolute or relative to the working directory.
    pub(crate) fn load(path: &Path) -> Result<Self, Report> {
        let hint = "name one with --context or SELVAGE_CONTEXT; `selvage demo` prints the path of its own";
        let text = std::fs::read_to_string(path)
            .map_err(|error| wrong(format!("read {}: {error}", path.display()), Some(hint)))?;
        let mut context: Self = toml::from_str(&text).map_err(|e| Invalid::of_toml(path, &text, &e))?;
        let base = path.parent().unwrap_or(Path::new(""));
        context.roots = base.join(&context.roots);
        for path in [&mut context.certificate, &mut context.key, &mut context.token_file].into_iter().flatten() {
            *path = base.join(&path);
        }
        if !context.control_plane.starts_with("https://") {
            return Err(wrong(format!("{}: control_plane must start with https://", path.display()), None));
        }
        Ok(context)
    }

    /// Writes a context file.
    pub(crate) fn save(&self, path: &Path) -> Result<(), Report> {
        let text = toml::to_string(self).into_diagnostic()?;
        std::fs::write(path, text).map_err(|error| failure(&format!("write {}", path.display()), &error, None))
    }

    /// The operator's certificate, if there is one.
    pub(crate) fn identity(&self) -> Result<Option<Identity>, Report> {
        let (Some(certificate), Some(key)) = (&self.certificate, &self.key) else { return Ok(None) };
        let identity = Identity::load(certificate, key);
        identity.map(Some).map_err(|error| failure("load the operator's identity", &error, None))
    }

    /// The operator's token, if there is one.
    pub(crate) fn token(&self) -> Result<Option<String>, Report> {
        let Some(path) = &self.token_file else { return Ok(None) };
        let text = std::fs::read_to_string(path)
            .map_err(|error| failure(&format!("read {}", path.display()), &error, None))?;
        Ok(Some(text.trim().to_owned()))
    }
}
