//! The configuration of a control plane: a TOML file that its operator writes.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::Digest;
use crate::invalid::{Invalid, Problems};
use crate::node::IdentityFiles;

/// A control plane's configuration. Relative paths are relative to the file's directory.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ControlPlaneConfig {
    /// Registry, API and plans, over TLS: nodes show their identity, people a token.
    pub listen: SocketAddr,
    /// Everything that must survive a restart.
    pub state_dir: PathBuf,
    /// Who it is to nodes, and whom it takes nodes from.
    pub identity: IdentityFiles,
    /// Who may change things.
    #[serde(default)]
    pub operators: Vec<Operator>,
}

/// Someone who may change things, by token. An operator certificate of the same authority does as well.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// For the audit log, and the user name of registry clients.
    pub name: String,
    /// `sha256:` of the token: the token itself is nowhere at rest.
    pub token_digest: Digest,
}

impl ControlPlaneConfig {
    /// Reads the text of `file`; paths become absolute.
    ///
    /// # Errors
    /// Every mistake with its place.
    pub fn parse(file: &Path, text: &str) -> Result<Self, Invalid> {
        let mut config: Self = toml::from_str(text).map_err(|e| Invalid::of_toml(file, text, &e))?;
        let base = file.parent().unwrap_or(Path::new(""));
        let identity = &mut config.identity;
        for path in [&mut identity.certificate, &mut identity.key, &mut identity.roots, &mut config.state_dir] {
            *path = base.join(&path);
        }
        let mut problems = Problems::default();
        for (index, operator) in config.operators.iter().enumerate() {
            let field = format!("operators[{index}].name");
            if operator.name.is_empty() || operator.name.contains(':') || operator.name.chars().any(char::is_control) {
                problems.add(None, field, "must not be empty and have no ':' or control character", None);
            } else if config.operators[..index].iter().any(|o| o.name == operator.name) {
                problems.add(None, field, format!("{:?} is there twice", operator.name), None);
            }
        }
        problems.settle(file, text, Some(config))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_operator_has_a_name_of_its_own() {
        let digest = Digest::of(b"token");
        let text = format!(
            "listen='127.0.0.1:0'\nstate_dir='s'\nidentity={{certificate='c',key='k',roots='r'}}\n\
             operators=[{{name='ops',token_digest='{digest}'}},{{name='ops',token_digest='{digest}'}}]\n"
        );
        let error = ControlPlaneConfig::parse(Path::new("/cp.toml"), &text).unwrap_err();
        assert!(error.to_string().contains("twice"), "{error}");
    }
}
