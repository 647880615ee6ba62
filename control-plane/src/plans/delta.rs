//! What changed in a node's plan: computed once for all nodes as far as it is the same, and of what changed alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use selvage_config::plan::{Peer, PlanDelta, SnapshotDelta};
use selvage_config::{AppName, NodeName};

use super::{Reader, Signed, Signer};
use crate::state::Records;

/// What changed between the records of two generations, whichever node asks.
#[derive(Debug)]
pub(crate) struct Changes {
    base: Arc<Records>,
    now: Arc<Records>,
    /// Apps whose records are not the same.
    apps: BTreeSet<AppName>,
    /// Apps that have a second release or a rollout now.
    moving: Vec<AppName>,
    peers: Vec<Peer>,
    left: Vec<NodeName>,
    snapshot: Option<SnapshotDelta>,
}

impl Changes {
    /// What leads from `base` to `now`, whose snapshot is `signed`.
    pub(crate) fn between(base: Arc<Records>, now: Arc<Records>, signer: Option<(&Signer, &Signed)>) -> Self {
        let names: BTreeSet<&AppName> = base.apps.keys().chain(now.apps.keys()).collect();
        let is_same = |app: &AppName| match (base.apps.get(app), now.apps.get(app)) {
            (Some(before), Some(after)) => Arc::ptr_eq(before, after),
            _ => false,
        };
        let apps = names.into_iter().filter(|app| !is_same(app)).cloned().collect();
        let is_moving = now.apps.iter().filter(|(_, record)| record.split.is_some() || record.running().is_some());
        let moving = is_moving.map(|(name, _)| name.clone()).collect();
        let before: BTreeMap<NodeName, Peer> = base.peers().map(|peer| (peer.node.clone(), peer)).collect();
        let after: BTreeMap<NodeName, Peer> = now.peers().map(|peer| (peer.node.clone(), peer)).collect();
        let left = before.keys().filter(|node| !after.contains_key(*node)).cloned().collect();
        let peers = after.into_values().filter(|peer| before.get(&peer.node) != Some(peer)).collect();
        let snapshot = signer.map(|(signer, signed)| {
            let before = signer.content(&base, signed.snapshot.issued_ms);
            SnapshotDelta::between(&before, &signed.snapshot, &signed.envelope)
        });
        Self { base, now, apps, moving, peers, left, snapshot }
    }

    /// Whether this is what leads from one generation to the other, under the same signature.
    pub(crate) fn is_of(&self, base: u64, now: u64, signed: Option<&Signed>) -> bool {
        let issued = self.snapshot.as_ref().map(|snapshot| snapshot.issued_ms);
        (self.base.generation, self.now.generation) == (base, now)
            && issued == signed.map(|signed| signed.snapshot.issued_ms)
    }

    /// What it means for `node`.
    pub(crate) fn of(&self, node: &NodeName) -> PlanDelta {
        let members = (self.base.members.get(node), self.now.members.get(node));
        let is_same = match members {
            (None, None) => true,
            (Some(before), Some(after)) => Arc::ptr_eq(before, after) || before == after,
            _ => false,
        };
        // What operators say of the node may change where it stands with every app.
        let all: BTreeSet<AppName>;
        let apps = if is_same {
            &self.apps
        } else {
            all = self.base.apps.keys().chain(self.now.apps.keys()).cloned().collect();
            &all
        };
        let mut delta = PlanDelta {
            node: node.clone(),
            base: self.base.generation,
            generation: self.now.generation,
            releases: Vec::new(),
            gone: Vec::new(),
            peers: self.peers.iter().filter(|peer| peer.node != *node).cloned().collect(),
            left: self.left.iter().filter(|left| *left != node).cloned().collect(),
            candidates: Vec::new(),
            watched: Vec::new(),
            drain: members.1.is_some_and(|member| member.drain),
            snapshot: self.snapshot.clone(),
            placements: (self.base.placements != self.now.placements)
                .then(|| self.now.placements.values().cloned().collect()),
            homes: (self.base.homes != self.now.homes).then(|| self.now.homes.values().cloned().collect()),
        };
        for app in apps {
            let before = self.base.release_on(node, app);
            match self.now.release_on(node, app) {
                Some(after) if before.as_ref() != Some(&after) => delta.releases.push(after),
                None if before.is_some() => delta.gone.push(app.clone()),
                _ => {}
            }
        }
        for app in &self.moving {
            let Some((record, placed)) = self.now.placed_on(node, app) else { continue };
            delta.candidates.extend(record.beside(&placed, Reader::Node));
            if record.is_watched(&placed) {
                delta.watched.push(app.clone());
            }
        }
        delta
    }
}
