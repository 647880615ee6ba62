//! The configuration of a control plane: a TOML file that its operator writes.

mod nats;
mod registry;
mod stores;

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use serde::Deserialize;

pub use crate::operator::OperatorRole;
pub use nats::NatsConfig;
pub use registry::{RegistryConfig, RepositoryRule, Upstream};
pub use stores::{PlacementRule, StoreRule};

use crate::invalid::{Invalid, Problems};
use crate::node::IdentityFiles;
use crate::operator::{OPERATORS_MAX, OperatorRights};
use crate::{AppName, Digest, PlacementName, StoreName};

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
    /// How plans are signed. Without it they are not, and nodes with a root take none.
    pub plans: Option<PlanSigning>,
    /// The directory of the fleet's authority, as `selvage certs` makes it. With it nodes join by token and renew their
    /// certificates; without it certificates are made by hand.
    #[serde(default)]
    pub authority: Option<PathBuf>,
    /// The file of the key that values of variables are sealed with on the disk; made where there is none. Default
    /// `sealing.key` in `state_dir`. Who copies the state without this key has no secrets.
    #[serde(default)]
    pub sealing_key: Option<PathBuf>,
    /// What the registry keeps, refuses and mirrors.
    #[serde(default)]
    pub registry: RegistryConfig,
    /// Where it has one state with other control planes. Without it, its state is its own.
    #[serde(default)]
    pub nats: Option<NatsConfig>,
    /// Stores with rules of their own, by name: `[stores."app/label"]`.
    #[serde(default)]
    pub stores: BTreeMap<StoreName, StoreRule>,
    /// Regions that hold stores which not all nodes shall hold, by a name that stores' rules use: `[placements.eu]`.
    #[serde(default)]
    pub placements: BTreeMap<PlacementName, PlacementRule>,
}

/// How plans are signed.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanSigning {
    /// The plans' private key, as `selvage key --plain` makes it. The newest root must name its public half.
    pub key: PathBuf,
    /// The fleet's roots, oldest first: from the one that the oldest node was set up with to the newest.
    pub roots: Vec<PathBuf>,
    /// For how long a signature on a plan holds, seconds. A node that hears nothing newer for so long complains.
    /// Default 86,400, a day.
    #[serde(default = "lifetime_s")]
    pub lifetime_s: u64,
}

/// Shortest and longest time that a signature on a plan may hold, seconds.
pub const LIFETIME_S: std::ops::RangeInclusive<u64> = 2..=31_536_000;

fn lifetime_s() -> u64 {
    86_400
}

/// Someone who may look or change things, by token or by an operator certificate of the same name. A certificate whose
/// name is not here opens nothing.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Operator {
    /// For the audit log, and the user name of registry clients.
    pub name: String,
    /// `sha256:` of the token: the token itself is nowhere at rest. Without it only a certificate proves who it is.
    #[serde(default)]
    pub token_digest: Option<Digest>,
    /// What the operator may do. Default `admin`.
    #[serde(default)]
    pub role: OperatorRole,
    /// The only apps it is about, and the only repositories: those whose last part is the name of one. Default: all.
    /// Who is limited to apps may do nothing that concerns the whole fleet, but look at it.
    #[serde(default)]
    pub apps: Option<BTreeSet<AppName>>,
}

impl Operator {
    /// What the operator may do.
    pub fn rights(&self) -> OperatorRights {
        OperatorRights { role: self.role, apps: self.apps.clone() }
    }
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
        for path in [&mut config.authority, &mut config.sealing_key].into_iter().flatten() {
            *path = base.join(&path);
        }
        let mut problems = Problems::default();
        if let Some(plans) = &mut config.plans {
            for path in std::iter::once(&mut plans.key).chain(&mut plans.roots) {
                *path = base.join(&path);
            }
            if plans.roots.is_empty() {
                problems.add(None, "plans.roots", "there is no root", Some("add what `selvage root` made"));
            }
            if !LIFETIME_S.contains(&plans.lifetime_s) {
                let message = format!("must be from {} to {}", LIFETIME_S.start(), LIFETIME_S.end());
                problems.add(None, "plans.lifetime_s", message, None);
            }
        }
        for (index, operator) in config.operators.iter().enumerate() {
            let field = format!("operators[{index}].name");
            if operator.name.is_empty() || operator.name.contains(':') || operator.name.chars().any(char::is_control) {
                problems.add(None, field, "must not be empty and have no ':' or control character", None);
            } else if config.operators[..index].iter().any(|o| o.name == operator.name) {
                problems.add(None, field, format!("{:?} is there twice", operator.name), None);
            }
        }
        if config.operators.len() > OPERATORS_MAX {
            let message = format!("{} operators, the most is {OPERATORS_MAX}", config.operators.len());
            problems.add(None, "operators", message, None);
        }
        stores::settle(&config.stores, &config.placements, &mut problems);
        config.registry.settle(base, &mut problems);
        if let Some(nats) = &mut config.nats {
            nats.settle(base, &mut problems);
        }
        problems.locate(text);
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

    #[test]
    fn how_plans_are_signed_is_checked() {
        let with = |plans: &str| {
            let text = format!(
                "listen='127.0.0.1:0'\nstate_dir='s'\nidentity={{certificate='c',key='k',roots='r'}}\nplans={{{plans}}}\n"
            );
            ControlPlaneConfig::parse(Path::new("/etc/cp.toml"), &text)
        };
        let plans = with("key='plan.key',roots=['root-1.json']").unwrap().plans.unwrap();
        assert_eq!((plans.key.as_path(), plans.lifetime_s), (Path::new("/etc/plan.key"), 86_400));
        assert_eq!(plans.roots, [Path::new("/etc/root-1.json")]);
        for (bad, field) in [("roots=[]", "plans.roots"), ("roots=['r'],lifetime_s=1", "plans.lifetime_s")] {
            assert_eq!(with(&format!("key='k',{bad}")).unwrap_err().places()[0].field, field);
        }
    }
}
