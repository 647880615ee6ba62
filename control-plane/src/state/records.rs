//! What is remembered: apps with their releases and rollouts, nodes, and who may join.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::sync::Arc;

use selvage_config::operator::Operators;
use selvage_config::plan::{Peer, Status};
use selvage_config::release::Release;
use selvage_config::rollout::{Gate, SplitKey, Wave};
use selvage_config::snapshot::Revoked;
use selvage_config::{AppName, Digest, NodeName, Region};
use serde::{Deserialize, Serialize};

use crate::fleet::{Homes, Placements};

/// All that plans are made from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Records {
    /// Grows with every change of any plan.
    pub(crate) generation: u64,
    pub(crate) apps: BTreeMap<AppName, Arc<AppRecord>>,
    pub(crate) nodes: BTreeMap<NodeName, Arc<NodeRecord>>,
    pub(crate) members: BTreeMap<NodeName, Arc<MemberRecord>>,
    pub(crate) joins: BTreeMap<String, Arc<JoinRecord>>,
    /// What must not run any more. It only grows: nodes take nothing back.
    pub(crate) revoked: Arc<Revoked>,
    /// The operators whom nodes let in. None where plans are not signed.
    pub(crate) operators: Option<Arc<Operators>>,
    /// Stores that have a home. It only grows: nodes that were told of one never forget it.
    pub(crate) homes: Arc<Homes>,
    /// Which regions hold the stores that not all do. A store that was placed stays where it is.
    pub(crate) placements: Arc<Placements>,
}

/// One app's releases. An app that was removed keeps its record, so that a number never names two releases.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct AppRecord {
    /// The highest number ever given.
    pub(crate) last: u32,
    /// The release that plans name.
    pub(crate) current: Option<u32>,
    /// Those that can be gone back to.
    pub(crate) releases: BTreeMap<u32, ReleaseRecord>,
    /// A second release that serves beside the current one.
    #[serde(default)]
    pub(crate) split: Option<SplitRecord>,
    /// The last rollout, whatever became of it.
    #[serde(default)]
    pub(crate) rollout: Option<RolloutRecord>,
    /// Values of variables that are kept here and not in releases.
    #[serde(default)]
    pub(crate) secrets: BTreeMap<String, String>,
}

/// A release, and what must be known of it without reading its manifest again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ReleaseRecord {
    pub(crate) release: Release,
    /// The hosts that the app document claims.
    pub(crate) hosts: Vec<String>,
    /// The variables that the app document declares: a secret is delivered only to releases that have a use for it.
    #[serde(default)]
    pub(crate) declared: BTreeSet<String>,
}

/// A second release of an app, for a part of the visitors.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SplitRecord {
    pub(crate) release: u32,
    pub(crate) percent: u8,
    pub(crate) key: SplitKey,
    #[serde(default)]
    pub(crate) named: bool,
}

/// A move from one release to another, wave by wave.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct RolloutRecord {
    pub(crate) to: u32,
    pub(crate) waves: Vec<Wave>,
    pub(crate) gate: Gate,
    /// The wave that is under way.
    pub(crate) wave: usize,
    /// When it began, milliseconds since 1970.
    pub(crate) since_ms: u64,
    /// Since when all of its nodes serve.
    pub(crate) serving_ms: Option<u64>,
    /// The nodes that were given the release. None leaves again: whoever was moved is not moved back by a node that
    /// comes or goes.
    pub(crate) taken: BTreeSet<NodeName>,
    pub(crate) state: Stage,
}

/// How far a rollout is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Stage {
    Running,
    Done,
    Halted { reason: String },
}

/// What a node last told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    pub(crate) status: Status,
    /// Where its peers reach it, if it replicates.
    pub(crate) replication: Option<SocketAddr>,
    /// The same of its admin listener.
    #[serde(default)]
    pub(crate) admin: Option<SocketAddr>,
}

/// What operators say of a node, whatever it tells itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct MemberRecord {
    /// Where the token that it joined with let it stand.
    pub(crate) region: Option<Region>,
    /// Labels of that token, or set since. They go before those that the node tells.
    pub(crate) labels: BTreeMap<String, String>,
    /// The releases that it keeps whatever others get, if it is cordoned.
    pub(crate) cordon: Option<BTreeMap<AppName, u32>>,
    /// Whether it shall be sent no requests.
    pub(crate) drain: bool,
    /// Whether its certificates are worth nothing any more.
    pub(crate) revoked: bool,
    /// When it joined by a token, milliseconds since 1970.
    pub(crate) joined_ms: Option<u64>,
}

/// A token that lets one node join, once. The token itself is not kept.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct JoinRecord {
    pub(crate) digest: Digest,
    pub(crate) region: Region,
    /// The only name that it may be used for, if it is for one.
    pub(crate) node: Option<NodeName>,
    pub(crate) labels: BTreeMap<String, String>,
    pub(crate) ends_ms: u64,
    pub(crate) created_by: String,
}

impl AppRecord {
    /// The release that plans name.
    pub(crate) fn current(&self) -> Option<&ReleaseRecord> {
        self.releases.get(&self.current?)
    }

    /// The rollout that is under way.
    pub(crate) fn running(&self) -> Option<&RolloutRecord> {
        self.rollout.as_ref().filter(|rollout| rollout.state == Stage::Running)
    }

    /// Numbers of the releases that some plan may name.
    pub(crate) fn in_plans(&self) -> BTreeSet<u32> {
        let split = self.split.as_ref().map(|split| split.release);
        let rollout = self.running().map(|rollout| rollout.to);
        self.current.into_iter().chain(split).chain(rollout).collect()
    }

    /// A release as a node gets it: with the secrets that its app declares.
    pub(crate) fn delivered(&self, record: &ReleaseRecord) -> Release {
        let mut release = record.release.clone();
        let declared = self.secrets.iter().filter(|(name, _)| record.declared.contains(*name));
        release.variables.extend(declared.map(|(name, value)| (name.clone(), value.clone())));
        release
    }

    /// Whether plans say the same of this app as of `other`.
    pub(crate) fn plans_as(&self, other: &Self) -> bool {
        let says = |app: &Self| {
            let releases: Vec<Release> =
                app.in_plans().iter().filter_map(|n| app.releases.get(n)).map(|r| app.delivered(r)).collect();
            let running = app.running().map(|rollout| (rollout.to, rollout.taken.clone()));
            (app.current, releases, app.split.clone(), running)
        };
        says(self) == says(other)
    }
}

impl NodeRecord {
    /// Whether its peers reach it where `other` says.
    pub(crate) fn is_same_peer(&self, other: &Self) -> bool {
        let of = |record: &Self| (record.replication, record.admin);
        of(self) == of(other) && self.status.region == other.status.region
    }
}

impl Records {
    /// Every release that some plan may name.
    pub(crate) fn planned(&self) -> impl Iterator<Item = &ReleaseRecord> {
        self.apps.values().flat_map(|app| app.in_plans().into_iter().filter_map(|n| app.releases.get(&n)))
    }

    /// Every release that the plan of some node may name, those included that cordoned nodes keep.
    pub(crate) fn nameable(&self) -> impl Iterator<Item = &Release> {
        let cordons = self.members.values().filter_map(|member| member.cordon.as_ref()).flatten();
        let kept = cordons.filter_map(|(app, number)| self.apps.get(app)?.releases.get(number));
        self.planned().chain(kept).map(|record| &record.release)
    }

    /// The nodes that replicate.
    pub(crate) fn peers(&self) -> impl Iterator<Item = Peer> {
        let trusted = self.nodes.values().filter(|node| !self.is_revoked(&node.status.node));
        trusted.filter_map(|node| {
            let (name, region) = (node.status.node.clone(), node.status.region.clone());
            node.replication.map(|address| Peer { node: name, region, address, admin: node.admin })
        })
    }

    /// Whether a node's certificates are worth nothing any more.
    pub(crate) fn is_revoked(&self, node: &NodeName) -> bool {
        self.members.get(node).is_some_and(|member| member.revoked)
    }

    /// The labels of a node: what operators say goes before what it tells.
    pub(crate) fn labels(&self, node: &NodeName) -> BTreeMap<String, String> {
        let told = self.nodes.get(node).map(|record| record.status.labels.clone()).unwrap_or_default();
        let said = self.members.get(node).map(|member| member.labels.clone()).unwrap_or_default();
        told.into_iter().chain(said).collect()
    }

    /// The newest generation that any node says to have taken in.
    pub(crate) fn told_generation(&self) -> u64 {
        self.nodes.values().map(|node| node.status.generation).max().unwrap_or(0)
    }
}
