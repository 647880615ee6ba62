//! Nodes that stop, lose their disks, leave, come back, and lie.

use std::collections::BTreeMap;
use std::sync::Arc;

use bytes::Bytes;
use rand::Rng;
use selvage_config::{NodeName, Region};

use super::disk::Disk;
use super::world::{Due, LIMITS, World, ordered};
use crate::engine::Engine;
use crate::entry::{Content, Dot, Entry, Key, Version};
use crate::replica::{Event, Replica, TICK_MS};
use crate::stamp::Stamp;
use crate::trust::{Keyring, Named};
use crate::wire::{self, Message, Reason};

impl World {
    pub(super) fn stop(&mut self, of: usize) -> bool {
        if self.nodes[of].replica.take().is_none() {
            return false;
        }
        let pairs: Vec<_> = self.links.keys().copied().filter(|pair| pair.0 == of || pair.1 == of).collect();
        pairs.into_iter().for_each(|pair| self.disconnect(pair));
        let mut rng = self.rng.clone();
        let disk = Arc::clone(&self.nodes[of].disk);
        let has = |dot: &Dot| disk.get(&crate::layout::index(dot)).unwrap().is_some();
        let had: Vec<Dot> = self.applied.keys().filter(|dot| has(dot)).cloned().collect();
        disk.crash(&mut rng);
        self.rng = rng;
        // What was not flushed it never had.
        for dot in had.iter().filter(|dot| !has(dot)) {
            self.applied.entry(dot.clone()).or_default().remove(&of);
        }
        true
    }

    pub(super) fn crash(&mut self, of: usize, for_ms: u64) {
        if self.stop(of) {
            self.met("crash");
            self.after(1, for_ms, Due::Start { of });
        }
    }

    /// Stops a node and starts it on another disk.
    pub(super) fn replace(&mut self, of: usize, what: &'static str, disk: impl FnOnce(&mut Self) -> Option<Disk>) {
        if !self.can_spare(of) {
            return;
        }
        let Some(disk) = disk(self) else { return };
        let stopped = self.stop(of);
        self.maybe_wrote(of);
        self.met(what);
        self.nodes[of].disk = Arc::new(disk);
        for disks in self.applied.values_mut() {
            disks.remove(&of);
        }
        self.nodes[of].was_away = true;
        self.nodes[of].veteran = false;
        self.next += 1;
        self.nodes[of].place = self.next;
        self.note_lost();
        if stopped {
            self.after(1, 2_000, Due::Start { of });
        }
    }

    pub(super) fn start(&mut self, of: usize) {
        if self.nodes[of].replica.is_some() {
            return;
        }
        self.maybe_wrote(of);
        let disk: Arc<dyn Engine> = Arc::clone(&self.nodes[of].disk) as Arc<dyn Engine>;
        let (chance, wall_ms) = (self.rng.random(), self.wall_ms(of));
        let place = self.nodes[of].place.to_be_bytes();
        let keyring = Keyring { trust: Arc::new(Named(self.nodes[of].name.clone())), chance };
        let replica = Replica::open(disk, self.nodes[of].name.clone(), &place, wall_ms, keyring).unwrap();
        self.nodes[of].replica = Some(replica.with_limits(LIMITS));
        self.nodes[of].life += 1;
        let life = self.nodes[of].life;
        self.after(0, TICK_MS, Due::Tick { of, life });
        self.after(0, 200, Due::Roster { of });
        self.connect_all(of);
    }

    pub(super) fn members(&self) -> BTreeMap<NodeName, Region> {
        let listed = self.nodes.iter().enumerate().filter(|(of, _)| !self.evicted.contains(of));
        listed.map(|(_, node)| (node.name.clone(), node.region.clone())).collect()
    }

    /// Whether another node of the roster has everything. Where no such node is left, nobody knows any more what was
    /// deleted: rosters that follow each other must share one (docs/sync.md, Collection).
    fn can_spare(&self, of: usize) -> bool {
        let spare =
            |(other, node): (usize, &super::world::Node)| other != of && node.veteran && !self.evicted.contains(&other);
        self.nodes.iter().enumerate().any(spare)
    }

    /// Nodes that came back and have what the veterans have are veterans again.
    pub(super) fn note_veterans(&mut self) {
        let known: Vec<_> =
            self.nodes.iter().filter(|node| node.veteran).filter_map(|node| node.replica.as_ref()).collect();
        let floor = known.iter().map(|replica| replica.reach().floor).max().unwrap_or_default();
        let again = |(of, node): (usize, &super::world::Node)| {
            let replica = node.replica.as_ref()?;
            let whole = replica.is_level() && replica.reach().cut >= floor && !self.evicted.contains(&of);
            let has_all = known.iter().all(|other| !replica.vector().lacks(other.vector()));
            (whole && has_all && !known.is_empty()).then_some(of)
        };
        let back: Vec<usize> = self.nodes.iter().enumerate().filter_map(again).collect();
        back.into_iter().for_each(|of| self.nodes[of].veteran = true);
    }

    pub(super) fn evict(&mut self, of: usize, for_ms: u64) {
        if self.evicted.contains(&of) || !self.can_spare(of) {
            return;
        }
        self.evicted.insert(of);
        self.met("evict");
        self.nodes[of].was_away = true;
        self.nodes[of].veteran = false;
        let pairs: Vec<_> = self.links.keys().copied().filter(|pair| pair.0 == of || pair.1 == of).collect();
        pairs.into_iter().for_each(|pair| self.disconnect(pair));
        self.tell_roster();
        self.after(for_ms, for_ms, Due::Admit { of });
    }

    pub(super) fn admit(&mut self, of: usize) {
        self.evicted.remove(&of);
        self.tell_roster();
    }

    /// The control plane tells every node, each at its time, what the roster is by then.
    pub(super) fn tell_roster(&mut self) {
        (0..self.nodes.len()).for_each(|of| self.after(0, 500, Due::Roster { of }));
    }

    /// Alters what others wrote in a frame of a lying node, or what shall prove it.
    pub(super) fn lie(&mut self, of: usize, frame: Bytes) -> Bytes {
        let mut message = wire::decode(frame.slice(wire::LENGTH_BYTES..)).unwrap().unwrap();
        let (Message::Batch { entries, warrants, .. } | Message::Snapshot { entries, warrants, .. }) = &mut message
        else {
            return frame;
        };
        let own = self.nodes[of].name.clone();
        let foreign = entries.iter_mut().find(|entry| entry.version.dot.origin.node != own);
        let Some(entry) = foreign else { return frame };
        let origin = entry.version.dot.origin.clone();
        let warrant = warrants.iter_mut().find(|warrant| warrant.run.origin == origin);
        match (self.rng.random_range(0..5), warrant) {
            (0, _) => entry.content = Content::Value(Bytes::from_static(b"forged")),
            (1, _) => entry.version.stamp = Stamp(entry.version.stamp.0 + 1),
            (2, _) => entry.version.dot.seq += 1,
            (3, Some(warrant)) => warrant.signature[0] ^= 1,
            (_, _) => warrants.clear(),
        }
        self.nodes[of].has_lied = true;
        wire::encode(&message)
    }

    pub(super) fn forge(&mut self, by: usize, to: usize, as_of: usize) {
        let Some(link) = self.links.get(&ordered((by, to))).map(|link| link.id) else { return };
        let Some(victim) = &self.nodes[as_of].replica else { return };
        let dot = Dot { origin: victim.origin().clone(), seq: victim.vector().get(victim.origin()) + 1 };
        let entry = Entry {
            key: Key { store: "app/default".parse().unwrap(), name: "k0".into() },
            version: Version { stamp: Stamp::at_ms(self.now_ms), dot },
            prev: 0,
            expires_ms: None,
            content: Content::Value(Bytes::from_static(b"forged")),
        };
        let cut = Stamp::at_ms(self.now_ms);
        let message =
            Message::Batch { reason: Reason::Push, cut, entries: vec![entry], warrants: Vec::new(), complete: None };
        self.met("forge");
        let peer = self.nodes[by].name.clone();
        self.handle(to, Event::Received { peer, session: link, message });
    }
}
