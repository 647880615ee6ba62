//! Push: what was just written goes out at once, and by whom (docs/sync.md, Push).
//!
//! To each peer of its own region a node pushes itself, and so to all in a small fleet. To another region it pushes to
//! [`RELAYS`] peers, which pass it on to the others there. So a write leaves its region twice for each other one
//! instead of once for each node, and everybody there gets it by two ways: what is lost on one of them came by the other.
//!
//! A frame has two hops at most: what was passed on is never passed on again, and of each origin's writes a relay passes
//! on only what comes after those it has passed on already. It says them as they were said to it, with the warrants that
//! prove them and the origin's cut: whoever gets them takes what it would have taken of the origin.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use selvage_config::{NodeName, Region};

use super::Replica;
use super::peer::{Limits, Peer};
use crate::engine::EngineError;
use crate::entry::{Dot, Entry, fold, mix};
use crate::planted::{self, Bug};
use crate::replica::Action;
use crate::stamp::Stamp;
use crate::warrant::Warrant;
use crate::wire::{self, Message, Reason};

/// Peers of each large region that pass a node's writes on: one may be dead for as long as it takes to notice.
const RELAYS: usize = 2;

/// Nodes of a fleet in which everybody pushes to everybody: a hop more would save next to nothing.
pub(super) const FLEET_NODES: usize = 8;

/// Nodes of a region to each of which others push themselves. Already where there are two, each is a second way to the other.
pub(super) const REGION_NODES: usize = 1;

/// The part of a peer's queue that waits at one that is busy: another passes on then.
const BUSY_PART: usize = 64;

/// How this node's writes reach a peer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Way {
    /// By a push. It is of this node's region, so what relays bring from others is passed on to it too.
    Near,
    /// By a push.
    Far,
    /// Through two peers of this region, of which it may be one.
    Through(Region),
}

/// Where the nodes of the roster are.
#[derive(Debug, Default)]
pub(super) struct Regions {
    of: BTreeMap<NodeName, Region>,
    /// How many are in each.
    nodes: BTreeMap<Region, usize>,
}

impl Regions {
    pub(super) fn of(members: BTreeMap<NodeName, Region>) -> Self {
        let mut nodes = BTreeMap::new();
        members.values().for_each(|region| *nodes.entry(region.clone()).or_default() += 1);
        Self { of: members, nodes }
    }

    /// How a write of one node reaches another.
    pub(super) fn way(&self, from: &NodeName, to: &NodeName, limits: &Limits) -> Way {
        match (self.of.get(from), self.of.get(to)) {
            (Some(here), Some(there)) if here == there => Way::Near,
            (Some(_), Some(there)) if self.is_large(there, limits) => Way::Through(there.clone()),
            _ => Way::Far,
        }
    }

    fn is_large(&self, region: &Region, limits: &Limits) -> bool {
        let nodes = self.nodes.get(region).copied().unwrap_or(0);
        self.of.len() > limits.fleet_nodes && nodes > limits.region_nodes
    }
}

/// How much a node likes a peer as its relay: each likes others, so the work is spread, and which it likes does not change
/// when others come and go (rendezvous hashing).
pub(super) fn rank(own: &NodeName, peer: &NodeName) -> u64 {
    mix(fold(own.as_str().as_bytes()) ^ fold(peer.as_str().as_bytes()).rotate_left(32))
}

impl Replica {
    /// Sends the local writes since the last time to the peers that have all before them and shall get them of this node.
    /// The others get them by a relay or by their catch-up. The caller does this when it has handled all events that wait,
    /// so that these share a frame.
    pub fn push(&mut self) -> Vec<Action> {
        let mut actions = Vec::new();
        let (entries, warrants) = (std::mem::take(&mut self.outbox), std::mem::take(&mut self.fresh));
        debug_assert_eq!(self.signed, entries.len(), "what is pushed was signed before");
        self.signed = 0;
        if entries.is_empty() || !self.peers.values().any(Peer::is_live) {
            return actions;
        }
        let cut = self.frontier.cut();
        let mut message = Message::Batch { reason: Reason::Push, cut, entries, warrants, complete: None };
        let frame = wire::encode(&message);
        let last = Dot { origin: self.origin.clone(), seq: self.vector.get(&self.origin) };
        let relays = self.relays(frame.len());
        if let (false, Message::Batch { reason, .. }) = (relays.is_empty(), &mut message) {
            *reason = Reason::Relay;
        }
        let relayed = if relays.is_empty() { Bytes::new() } else { wire::encode(&message) };
        for (name, peer) in &mut self.peers {
            match peer.through() {
                None => actions.extend(peer.push(name, &frame, &last, &self.limits)),
                Some(_) if relays.contains(name) => actions.extend(peer.push(name, &relayed, &last, &self.limits)),
                Some(_) => {}
            }
        }
        actions
    }

    /// Who passes the next frame on: of each large region two peers that have room for it, and rather those that have not
    /// much to do already.
    fn relays(&self, bytes: usize) -> BTreeSet<NodeName> {
        let mut best: BTreeMap<&Region, Vec<(bool, u64, &NodeName)>> = BTreeMap::new();
        for (name, peer) in &self.peers {
            let Some(region) = peer.through() else { continue };
            if peer.is_live() && peer.queued.has_room(&self.limits, bytes) {
                let best = best.entry(region).or_default();
                best.push((peer.queued.frames > self.limits.queue_frames / BUSY_PART, peer.rank, name));
                best.sort_unstable();
                best.truncate(RELAYS);
            }
        }
        best.into_values().flatten().map(|(_, _, name)| name.clone()).collect()
    }

    /// Passes on to the others of this region what a peer wrote and wants passed on, if that was not done yet.
    pub(super) fn pass_on(
        &mut self,
        from: &NodeName,
        cut: Stamp,
        (entries, warrants): (&[Entry], &[Warrant]),
        actions: &mut Vec<Action>,
    ) -> Result<(), EngineError> {
        let (Some(peer), Some(last)) = (self.peers.get_mut(from), entries.iter().map(|entry| &entry.version.dot).max())
        else {
            return Ok(());
        };
        let passed = |entry: &Entry| peer.passed_on.as_ref().is_some_and(|passed| *passed >= entry.version.dot);
        if entries.iter().any(passed) && !planted::is(Bug::RelayLoop) {
            return Ok(());
        }
        let last = last.clone();
        peer.passed_on = Some(last.clone());
        let warrants: &[Warrant] = if planted::is(Bug::RelayUnproved) { &[] } else { warrants };
        let message = Message::Batch {
            reason: Reason::Relayed,
            cut,
            entries: entries.to_vec(),
            warrants: warrants.to_vec(),
            complete: None,
        };
        let frame = wire::encode(&message);
        let takes = |(name, peer): &(&NodeName, &Peer)| *name != from && peer.is_live() && peer.takes_relayed();
        let names: Vec<NodeName> = self.peers.iter().filter(takes).map(|(name, _)| name.clone()).collect();
        for name in names {
            self.introduce(&name, entries.iter().map(|entry| entry.version.dot.origin.clone()), actions)?;
            let peer = self.peers.get_mut(&name).expect("listed above");
            actions.extend(peer.push(&name, &frame, &last, &self.limits));
        }
        Ok(())
    }
}
