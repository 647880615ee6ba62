//! How to reach a fleet: its control plane, whom to trust, and who one is.

use std::path::{Path, PathBuf};

use miette::{IntoDiagnostic, Report};
use selvage_certs::Identity;
use selvage_config::Invalid;
use selvage_config::node::CONTROL_PLANES_MAX;
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
    /// `https://host:port` of the control plane; of several with one state, a list: one that can't be reached is passed by.
    pub(crate) control_plane: ControlPlanes,
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

/// One control plane, or several with one state.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
pub(crate) enum ControlPlanes {
    One(String),
    Several(Vec<String>),
}

impl From<Vec<String>> for ControlPlanes {
    fn from(mut all: Vec<String>) -> Self {
        match all.len() {
            1 => Self::One(all.remove(0)),
            _ => Self::Several(all),
        }
    }
}

impl ControlPlanes {
    /// All of them, at least one, each `host:port` or, of one that is alone, what else stands behind `https://`.
    fn places(&self) -> Result<Vec<&str>, String> {
        let all = match self {
            Self::One(one) => std::slice::from_ref(one),
            Self::Several(several) => several,
        };
        if all.is_empty() || all.len() > CONTROL_PLANES_MAX {
            return Err(format!("control_plane names 1 to {CONTROL_PLANES_MAX} control planes"));
        }
        let needs_port = all.len() > 1;
        let mut places = Vec::new();
        for url in all {
            let read = place(url, needs_port);
            places.push(read.ok_or_else(|| format!("control_plane: {url:?} is not https://host:port"))?);
        }
        Ok(places)
    }
}

/// What stands behind `https://`.
fn place(url: &str, needs_port: bool) -> Option<&str> {
    let place = url.strip_prefix("https://")?;
    let place = place.strip_suffix('/').unwrap_or(place);
    let (host, port) = place.rsplit_once(':').unwrap_or((place, ""));
    (!host.is_empty() && (!needs_port || port.parse::<u16>().is_ok())).then_some(place)
}

impl Context {
    /// The control planes, without `https://`.
    pub(crate) fn control_planes(&self) -> Vec<&str> {
        self.control_plane.places().unwrap_or_default()
    }

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
        if let Err(wrong_place) = context.control_plane.places() {
            return Err(wrong(format!("{}: {wrong_place}", path.display()), None));
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_control_plane_or_several_are_named_by_their_urls() {
        let read = |text: &str| {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("context.toml");
            std::fs::write(&path, format!("control_plane = {text}\nroots = \"ca.pem\"\n")).unwrap();
            Context::load(&path)
                .map(|context| context.control_planes().iter().map(|p| (*p).to_owned()).collect::<Vec<_>>())
        };
        assert_eq!(read("'https://cp.example:7400/'").unwrap(), ["cp.example:7400"]);
        assert_eq!(read("'https://cp.example'").unwrap(), ["cp.example"]);
        assert_eq!(read("['https://a:1', 'https://[::1]:2']").unwrap(), ["a:1", "[::1]:2"]);
        for bad in ["'http://a:1'", "'https://'", "[]", "['https://a:1', 'b:2']", "['https://a:1', 'https://b']"] {
            let told = format!("{:?}", read(bad).unwrap_err());
            assert!(told.contains("control_plane"), "{bad}: {told}");
        }
        assert!(read(&format!("[{}]", "'https://a:1', ".repeat(9))).is_err());
    }
}
