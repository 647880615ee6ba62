//! The JSON documents of the API, as they go over the wire in both directions.

use std::collections::BTreeMap;

use selvage_config::oci::Repository;
use selvage_config::plan::Status;
use selvage_config::release::{Release, ReleaseId};
use selvage_config::snapshot::Revoked;
use selvage_config::{AppName, NodeName, Region};
use serde::{Deserialize, Serialize};

/// Stands for the value of a variable wherever a release is shown: the value itself goes to nodes alone.
pub const HIDDEN: &str = "***";

/// The body of `POST /api/v1/apps/{app}/releases`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseRequest {
    /// Where the manifest lies in the registry.
    pub repository: Repository,
    /// Its digest, or a tag that is resolved now and never again.
    pub reference: String,
    /// Values of the app's variables.
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
}

/// The body of `POST /api/v1/apps/{app}/rollback`; an empty body means the same as `{}`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RollbackRequest {
    /// Which release to go back to. Without it: the one before the current.
    #[serde(default)]
    pub to: Option<u32>,
}

/// The answer to a release or a rollback.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Released {
    /// The release that is current now; values of variables are [`HIDDEN`].
    pub release: Release,
    /// The generation of the plans that name it.
    pub generation: u64,
}

/// The answer to a removal.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    /// The generation of the plans without what was removed.
    pub generation: u64,
}

/// An app, in the answer to `GET /api/v1/apps`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AppAnswer {
    /// Which.
    pub app: AppName,
    /// Its current release; values of variables are [`HIDDEN`].
    pub release: Release,
    /// The hosts that it claims besides `<app>.<domain of the node>`.
    pub hosts: Vec<String>,
    /// Numbers of all releases that are kept.
    pub releases: Vec<u32>,
}

/// A node, in the answer to `GET /api/v1/nodes`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeAnswer {
    /// What it last told.
    pub status: Status,
    /// How long ago, milliseconds. Absent when it has told nothing since the control plane started.
    pub seen_ms_ago: Option<u64>,
    /// Whether that is recent enough to count on it.
    pub alive: bool,
}

/// How far a release has come: the answer to `GET /api/v1/apps/{app}/rollout`. Nodes that are not alive do not count.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Rollout {
    /// Which release.
    pub release: ReleaseId,
    /// Nodes that serve it.
    pub serving: usize,
    /// Nodes that have said nothing of it yet.
    pub pending: usize,
    /// Nodes that will not serve it.
    pub refused: usize,
    /// Each node.
    pub nodes: Vec<NodeRollout>,
}

/// How far a release has come on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct NodeRollout {
    /// Which.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// How far.
    #[serde(flatten)]
    pub state: RolloutState,
}

/// What a node makes of a release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "state", rename_all = "snake_case")]
pub enum RolloutState {
    /// It serves it.
    Serving,
    /// It has said nothing of it yet.
    Pending,
    /// It will not serve it.
    Refused {
        /// A stable word.
        cause: String,
        /// What was wrong, for people.
        reason: String,
    },
}

/// Every error of the API.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Problem {
    /// What is wrong.
    pub error: String,
    /// What to do about it.
    pub hint: Option<String>,
}

/// `release` without the values of its variables.
#[must_use]
pub fn hidden(release: &Release) -> Release {
    let variables = release.variables.keys().map(|name| (name.clone(), HIDDEN.to_owned())).collect();
    Release { variables, ..release.clone() }
}

/// The answer to a revocation.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revocation {
    /// What is revoked now.
    pub revoked: Revoked,
    /// The generation of plans that says so.
    pub generation: u64,
}
