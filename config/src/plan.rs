//! A plan: what one node shall run now; and a status: what it says to run.

mod delta;
mod home;
mod load;
mod placement;
mod status_delta;

use std::collections::BTreeMap;
use std::net::SocketAddr;

use serde::{Deserialize, Serialize};

pub use delta::{DeltaError, News, PlanDelta, SnapshotDelta, Told};
pub use home::{FORMER_MAX, Former, HOMES_MAX, Home};
pub use load::{BUCKETS, ReleaseLoad, bucket_end, bucket_of};
pub use placement::{CACHE_MS_MAX, PLACEMENTS_MAX, Placement, REGIONS_MAX};
pub use status_delta::{StatusDelta, StatusDeltaError};

use crate::release::{Release, ReleaseId};
use crate::rollout::SplitKey;
use crate::signature::Envelope;
use crate::{AppName, Digest, NodeName, Region};

/// Largest plan or status document, bytes.
pub const PLAN_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Longest that the control plane holds a long poll, milliseconds.
pub const POLL_MS_MAX: u64 = 30_000;
/// How often a node tells its status when nothing happens, milliseconds.
pub const STATUS_MS: u64 = 5_000;
/// The same while the plan watches an app, milliseconds.
pub const WATCHED_MS: u64 = 1_000;
/// After this long without a status a node counts as gone, milliseconds.
pub const SILENT_MS: u64 = 15_000;
/// The control plane's path of a node's plan: `GET {PLAN_PATH}/{node}?after={generation}&wait_ms={ms}`. 200 with a
/// [`Plan`] newer than `after`, or 304 when there was none in time; with `&nonce={nonce}` it is [`News`]. `after` is what a
/// node has taken in (its ACK); what became of each app stands in its [`Status`] (a NACK is a [`Refusal`]).
pub const PLAN_PATH: &str = "/api/v1/plans";
/// The header field by which a request chooses among the releases that a plan has of an app: a number, or `app@number`.
pub const RELEASE_FIELD: &str = "selvage-release";
/// The control plane's path of nodes: `PUT {NODES_PATH}/{node}` with a [`Status`] tells what a node runs, `PATCH` with a
/// [`StatusDelta`] what changed of that; 412 asks for the whole.
pub const NODES_PATH: &str = "/api/v1/nodes";

/// What one node shall run now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Plan {
    /// For which node.
    pub node: NodeName,
    /// Grows with every change. A node never goes back.
    pub generation: u64,
    /// One release for each app.
    pub releases: Vec<Release>,
    /// The other nodes that replicate KV.
    pub peers: Vec<Peer>,
    /// What a plan of this generation may name, signed: a [`Snapshot`](crate::snapshot::Snapshot). A node with a root
    /// takes no plan without.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot: Option<Envelope>,
    /// Second releases of some of the apps, which serve a part of the requests.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub candidates: Vec<Candidate>,
    /// The apps whose load the node shall tell: those that are being rolled out.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub watched: Vec<AppName>,
    /// Whether the node shall tell load balancers to send nothing more.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub drain: bool,
    /// The stores that have a home. A store that is not among them, and never was, is decided wherever it is written.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub homes: Vec<Home>,
    /// Which regions hold the stores that not all do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub placements: Vec<Placement>,
}

impl Plan {
    /// A plan without second releases, of a node that takes requests.
    pub fn new(node: NodeName, generation: u64, releases: Vec<Release>, peers: Vec<Peer>) -> Self {
        let (candidates, watched, homes, placements) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let (snapshot, drain) = (None, false);
        Self { node, generation, releases, peers, snapshot, candidates, watched, drain, homes, placements }
    }
}

/// A release that serves beside the one of the plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Candidate {
    /// The release, of an app that the plan has.
    pub release: Release,
    /// How many of a hundred visitors it serves. With 0 it is reached by the header field alone.
    pub percent: u8,
    /// What keeps a visitor at one release.
    pub key: SplitKey,
    /// Whether a request may choose its release by [`RELEASE_FIELD`] although this one has visitors of its own.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub named: bool,
}

/// Another node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Peer {
    /// Its name.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// Where its replication listens (UDP).
    pub address: SocketAddr,
    /// Where its admin listener is (TCP): its neighbours may have releases from there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub admin: Option<SocketAddr>,
}

/// What a node tells the control plane: who it is, which generation it took (ACK), and what became of each release.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Status {
    /// Who.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// The program's version.
    pub version: String,
    /// The newest plan that it has taken in.
    pub generation: u64,
    /// Where its replication listens, if it replicates.
    pub replication: Option<SocketAddr>,
    /// Where its front listens.
    pub front: Option<SocketAddr>,
    /// Where its admin listener is.
    pub admin: Option<SocketAddr>,
    /// What became of each app of the plan.
    pub apps: Vec<AppStatus>,
    /// How fresh its plans are. None: the node takes unsigned plans.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub plan: Option<PlanStatus>,
    /// How releases of the apps that are watched do.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub load: Vec<ReleaseLoad>,
    /// What the node's own configuration says of it.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub labels: BTreeMap<String, String>,
}

/// How fresh a node's plans are, by what it verified itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanStatus {
    /// The root's version.
    pub root: u64,
    /// Whether the root is past its end: a newer one should be signed.
    pub root_expired: bool,
    /// The highest snapshot that was ever taken. 0: none yet.
    pub version: u64,
    /// Until when that one holds, milliseconds since 1970.
    pub expires_ms: u64,
    /// Whether it is past its end: somebody or something keeps news from this node. It goes on serving.
    pub expired: bool,
    /// Why the newest plan that was offered is not taken.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub refused: Option<PlanRefusal>,
}

/// A plan that a node would not take.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanRefusal {
    /// A stable word for the cause: `unsigned`, `untrusted`, `malformed`, `namespace`, `expired`, `rollback`, `fork`,
    /// `mixed`.
    pub cause: String,
    /// What was wrong, for people.
    pub reason: String,
}

/// What became of one app on one node.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct AppStatus {
    /// Which.
    pub app: AppName,
    /// What it serves, if anything: with a refusal this is the last good release.
    pub serving: Option<Serving>,
    /// The release of the plan that it refused (NACK).
    pub refused: Option<Refusal>,
    /// What serves beside it, if the plan says so.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub candidate: Option<Serving>,
}

/// What serves.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Serving {
    /// Which release.
    pub release: ReleaseId,
    /// Its manifest.
    pub manifest: Digest,
}

/// A release that a node would not run.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Refusal {
    /// Which.
    pub release: ReleaseId,
    /// A stable word for the cause: `unsigned`, `untrusted`, `digest`, `fetch`, `app`, `compile`, `grant`, `activate`,
    /// `unlisted`, `revoked`, `quarantined`.
    pub cause: String,
    /// What was wrong, for people.
    pub reason: String,
}
