//! The JSON documents of the API, as they go over the wire in both directions.

use std::collections::BTreeMap;

use selvage_config::oci::Repository;
use selvage_config::plan::Status;
use selvage_config::release::{Release, ReleaseId};
use selvage_config::rollout::{Gate, SplitKey, Wave};
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
    /// How it comes into use. Default: at once.
    #[serde(default)]
    pub rollout: RolloutRequest,
}

/// How a release comes into use.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum RolloutRequest {
    /// On every node, for every request, now.
    #[default]
    AtOnce,
    /// On some nodes, then on more, as long as it does well.
    Waves {
        /// The waves; one that takes everybody is added at the end where it is missing.
        waves: Vec<Wave>,
        /// What halts it.
        #[serde(default)]
        gate: Gate,
    },
    /// On every node, for a part of the visitors, until somebody says more.
    Split(Share),
}

/// A part of the visitors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Share {
    /// How many of a hundred. With 0 it is reached by the header field alone.
    pub percent: u8,
    /// What keeps a visitor at one release.
    #[serde(default)]
    pub key: SplitKey,
    /// Whether a request may choose its release by the header field, although this one has visitors of its own.
    #[serde(default)]
    pub named: bool,
}

/// The body of `PUT /api/v1/apps/{app}/secrets/{name}`.
#[derive(Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SecretRequest {
    /// The value.
    pub value: String,
}

/// The body of `POST /api/v1/join-tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinTokenRequest {
    /// Where the node stands.
    pub region: Region,
    /// The only name that it may take. Needed for a name that was there before.
    #[serde(default)]
    pub node: Option<NodeName>,
    /// Labels that it gets.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// For how long the token is good, seconds. Default an hour, most a week.
    #[serde(default)]
    pub ttl_seconds: Option<u64>,
}

/// The answer to it: the only time that the token is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenAnswer {
    /// By what it is taken back: `DELETE /api/v1/join-tokens/{id}`.
    pub id: String,
    /// The token.
    pub token: String,
    /// When it ends, milliseconds since 1970.
    pub ends_ms: u64,
}

/// A join token that waits to be used, in the answer to `GET /api/v1/join-tokens`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct JoinTokenState {
    /// By what it is taken back.
    pub id: String,
    /// Where it lets a node stand.
    pub region: Region,
    /// The only name that it is for.
    pub node: Option<NodeName>,
    /// Labels that it gives.
    pub labels: BTreeMap<String, String>,
    /// When it ends, milliseconds since 1970.
    pub ends_ms: u64,
    /// Who made it.
    pub created_by: String,
}

/// What a wave or a node that may be changed is told to be: the body of `POST /api/v1/nodes/{node}`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", deny_unknown_fields)]
pub enum NodeRequest {
    /// It keeps what it has, and rollouts pass it by.
    Cordon,
    /// The contrary.
    Uncordon,
    /// It shall be sent no requests.
    Drain,
    /// The contrary.
    Undrain,
    /// Its certificates are worth nothing any more.
    Revoke,
    /// Its labels, all of them.
    Labels(BTreeMap<String, String>),
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
    /// What it is for, by its token, by operators and by its own configuration.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether it keeps what it has, and rollouts pass it by.
    #[serde(default)]
    pub cordoned: bool,
    /// Whether it shall be sent no requests.
    #[serde(default)]
    pub draining: bool,
    /// Whether its certificates are worth nothing any more.
    #[serde(default)]
    pub revoked: bool,
    /// Whether it believes the authorities that the fleet has now. Absent: it has not told, or certificates are made by
    /// hand.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub believes_authorities: Option<bool>,
    /// Whether its certificate is by the authority that issues now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate_is_current: Option<bool>,
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
    /// The wave that is under way, or was the last one, if it comes in waves.
    #[serde(default)]
    pub wave: Option<WaveAnswer>,
}

/// Where a rollout in waves stands.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WaveAnswer {
    /// Which wave, from 1.
    pub number: usize,
    /// How many there are.
    pub count: usize,
    /// Which nodes it takes.
    pub nodes: String,
    /// The nodes that all waves so far took.
    pub taken: Vec<NodeName>,
    /// How it goes.
    pub stage: WaveStage,
    /// Why it was halted.
    pub reason: Option<String>,
}

/// How a rollout in waves goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WaveStage {
    /// It goes on.
    Running,
    /// Every wave did well: the release is the current one.
    Done,
    /// Something spoke against it, and it was taken back.
    Halted,
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
