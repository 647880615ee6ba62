//! What must hold on the way and at the end.

use std::collections::BTreeSet;
use std::sync::Arc;

use bytes::Bytes;

use super::world::{Node, World};
use crate::engine::Engine;
use crate::entry::{Dot, Entry, Key};
use crate::layout;
use crate::read;
use crate::record::Record;
use crate::sketch::Sketches;
use crate::wire::{Message, Reason};

impl World {
    /// All writes of a key that `seen` lets through, merged.
    pub(super) fn reference(&self, key: &Key, seen: impl Fn(&Entry) -> bool) -> Record {
        let mut record = Record::default();
        for entry in self.written.values().filter(|entry| entry.key == *key && seen(entry)) {
            record.merge(entry.clone());
        }
        record
    }

    pub(super) fn keys(&self) -> BTreeSet<Key> {
        self.written.values().map(|entry| entry.key.clone()).collect()
    }

    /// sync.md invariant K4: what a vector covers is here, or what superseded it is, or it was collected.
    pub(super) fn check_vectors(&self) {
        for node in &self.nodes {
            let Some(replica) = &node.replica else { continue };
            let floor = replica.reach().floor.ms();
            for key in self.keys() {
                let covered = |entry: &Entry| {
                    replica.vector().covers(&entry.version.dot) && !self.lost.contains(&entry.version.dot)
                };
                let mut wanted = self.reference(&key, covered);
                wanted.collect(floor);
                let all = self.reference(&key, |entry| !self.lost.contains(&entry.version.dot));
                let held = read::record(node.disk.as_ref(), &key).unwrap();
                for entry in wanted.entries() {
                    let has = held.clone().merge(entry.clone()).is_none();
                    let superseded = all.entries().all(|one| one.version.dot != entry.version.dot);
                    assert!(has || superseded, "K4: {} covers {entry:?} and holds {held:?}", node.name);
                }
            }
        }
    }

    /// sync.md invariant K12: what waits for a peer is bounded.
    pub(super) fn check_queues(&self, of: usize, bytes_max: usize) {
        let Some(replica) = &self.nodes[of].replica else { return };
        for peer in replica.health() {
            assert!(peer.queued_bytes <= bytes_max, "K12: {} bytes wait for {}", peer.queued_bytes, peer.node);
        }
    }

    /// sync.md, Push: nobody says the same write twice on a link as new, so what is passed on comes to an end.
    pub(super) fn check_pushed(&mut self, link: u64, to: usize, message: &Message) {
        let Message::Batch { reason, entries, .. } = message else { return };
        // Who lies also says other numbers.
        if self.nodes.iter().any(|node| node.has_lied) {
            return;
        }
        match reason {
            Reason::Relayed => self.met("passed on"),
            Reason::Push | Reason::Relay => {}
            Reason::CatchUp | Reason::Repair => return,
        }
        for entry in entries {
            let first = self.pushed.insert((link, to, entry.version.dot.clone()));
            assert!(first, "K16: {:?} was pushed twice to {}", entry.version.dot, self.nodes[to].name);
        }
    }

    /// Whether another node's disk has a write, or what covers it.
    fn is_held(node: &Node, dot: &Dot) -> bool {
        let row = node.disk.get(&layout::index(dot)).unwrap();
        let vector = node.disk.get(&layout::vector(&dot.origin)).unwrap();
        row.is_some() || vector.and_then(|bytes| layout::number(&bytes)).is_some_and(|seq| seq >= dot.seq)
    }

    /// Takes note also of what was written and never acknowledged: it may be there or not.
    pub(super) fn maybe_wrote(&mut self, of: usize) {
        let disk = Arc::clone(&self.nodes[of].disk);
        for row in disk.scan(crate::layout::INDEX, crate::layout::INDEX, usize::MAX).unwrap() {
            let (row, value) = (row.key, row.value.unwrap());
            let Some(record) = crate::layout::index_row(&value) else { continue };
            let record = read::record_at(disk.as_ref(), record).unwrap();
            for entry in record.entries() {
                if crate::layout::index(&entry.version.dot) == row.as_ref()
                    && !self.written.contains_key(&entry.version.dot)
                {
                    let own = entry.version.dot.origin.node == self.nodes[of].name;
                    assert!(own, "a foreign write that nobody made: {entry:?}");
                    self.written.insert(entry.version.dot.clone(), entry.clone());
                }
            }
        }
    }

    pub(super) fn maybe_wrote_one(&mut self, of: usize, dot: &Dot) {
        let disk = &self.nodes[of].disk;
        let value = disk.get(&crate::layout::index(dot)).unwrap().expect("looked up");
        let Some(row) = crate::layout::index_row(&value) else { return };
        if let Some(entry) = read::record_at(disk.as_ref(), row).unwrap().entry(dot) {
            self.written.insert(dot.clone(), entry.clone());
        }
    }

    /// Writes that no disk has any more may be gone. All others may not (sync.md invariant K2).
    pub(super) fn note_lost(&mut self) {
        let gone: Vec<Dot> = self
            .written
            .keys()
            .filter(|dot| !self.nodes.iter().any(|node| Self::is_held(node, dot)))
            .filter(|dot| self.applied.get(*dot).is_none_or(BTreeSet::is_empty))
            .cloned()
            .collect();
        self.lost.extend(gone);
    }

    /// A node gave a write up. It is lost, and with it what it had superseded, unless that was somewhere else too: there
    /// it still is, or was superseded by something else, or collected.
    pub(super) fn give_up(&mut self, of: usize, entry: &Entry) {
        if let Some(disks) = self.applied.get_mut(&entry.version.dot) {
            disks.remove(&of);
        }
        let superseded = |known: &Entry| {
            let mut record = Record::default();
            record.merge(known.clone());
            record.merge(entry.clone());
            record.entry(&known.version.dot).is_none()
        };
        let held = |known: &Entry| {
            let dot = &known.version.dot;
            let applied = |at: usize| self.applied.get(dot).is_some_and(|disks| disks.contains(&at));
            let wrote = |node: &Node| node.name == dot.origin.node && Self::is_held(node, dot);
            self.nodes.iter().enumerate().any(|(at, node)| at != of && (applied(at) || wrote(node)))
        };
        let under =
            self.written.values().filter(|known| known.key == entry.key && known.version.dot != entry.version.dot);
        let mut gone: Vec<Dot> =
            under.filter(|known| superseded(known) && !held(known)).map(|known| known.version.dot.clone()).collect();
        gone.extend(Some(entry).filter(|entry| !held(entry)).map(|entry| entry.version.dot.clone()));
        self.lost.extend(gone);
    }

    pub(super) fn converged(&self) -> bool {
        self.behind().is_none() && self.mismatch().is_none()
    }

    /// What still has to happen until all nodes have everything.
    fn behind(&self) -> Option<String> {
        let (mut floors, mut vectors) = (BTreeSet::new(), BTreeSet::new());
        for node in &self.nodes {
            let Some(replica) = &node.replica else { return Some(format!("{} is down", node.name)) };
            floors.insert(replica.reach().floor);
            if replica.health().len() + 1 != self.nodes.len() {
                return Some(format!("{} has only {} links", node.name, replica.health().len()));
            }
            let vector = replica.vector().iter().filter(|(_, seq)| *seq > 0);
            vectors.insert(vector.map(|(origin, seq)| (origin.clone(), seq)).collect::<Vec<_>>());
            if vectors.len() > 1 {
                return Some(format!("{} has another vector: {}", node.name, replica.describe()));
            }
            if !replica.is_level() {
                return Some(format!("{} is not level: {}", node.name, replica.describe()));
            }
        }
        // Collection goes on: what ended before all was mended is over everywhere.
        let least = floors.first().copied().unwrap_or_default();
        (least.ms() < self.mended_ms).then(|| format!("collection stands still: floors are {floors:?}"))
    }

    pub(super) fn check_end(&self) {
        if let Some(what) = self.mismatch() {
            panic!("K1, K2, K3, K8: {what}");
        }
        if let Some(what) = self.behind() {
            panic!("K1 vectors: {what}");
        }
        let count = Key { store: "app/default".parse().unwrap(), name: "count".into() };
        let value = read::record(self.nodes[0].disk.as_ref(), &count).unwrap().value(self.now_ms);
        let value = value.map_or(0, |bytes| i64::from_le_bytes(bytes.as_ref().try_into().unwrap()));
        let lost = self.lost.iter().any(|dot| self.written.get(dot).is_some_and(|entry| entry.key == count));
        let least = if lost { 0 } else { self.counted.0 };
        assert!((least..=self.counted.1).contains(&value), "K7: counted {value} of {:?}", self.counted);
        self.check_sketches();
    }

    /// What differs from what all writes give, or between two nodes.
    fn mismatch(&self) -> Option<String> {
        let rows = |node: &Node| node.disk.scan(layout::RECORDS, layout::RECORDS, usize::MAX).unwrap();
        let floor = self.nodes.iter().filter_map(|node| Some(node.replica.as_ref()?.reach().floor.ms())).max()?;
        for key in self.keys() {
            for node in &self.nodes {
                let mut held = read::record(node.disk.as_ref(), &key).unwrap();
                let here: BTreeSet<Dot> = held.entries().map(|entry| entry.version.dot.clone()).collect();
                let mut wanted = self.reference(&key, |entry| {
                    !self.lost.contains(&entry.version.dot) || here.contains(&entry.version.dot)
                });
                // How far each has collected differs by a moment.
                held.collect(floor);
                wanted.collect(floor);
                if held != wanted {
                    return Some(format!("{key:?} at {} is {held:?}, all writes give {wanted:?}", node.name));
                }
            }
        }
        let known: BTreeSet<Bytes> = self.keys().iter().map(|key| layout::record(key).into()).collect();
        for node in &self.nodes {
            if let Some(row) = rows(node).iter().find(|row| !known.contains(&row.key)) {
                return Some(format!("nobody wrote {row:?}"));
            }
        }
        None
    }

    /// Sketches are what the rows say, and equal on all nodes but for what was collected (sync.md invariant K14).
    fn check_sketches(&self) {
        let floor =
            self.nodes.iter().filter_map(|node| Some(node.replica.as_ref()?.reach().floor.ms())).max().unwrap_or(0);
        let mut first = None;
        for node in &self.nodes {
            let Some(known) = node.replica.as_ref().and_then(crate::Replica::sketches) else { continue };
            let mut rebuilt = Sketches::default();
            for row in node.disk.scan(layout::INDEX, layout::INDEX, usize::MAX).unwrap() {
                let (item, span) = layout::index_item(&row.key, &row.value.unwrap()).unwrap();
                rebuilt.toggle(item, span, 1);
            }
            assert!(known.shards.digests() == rebuilt.shards.digests(), "K14: sketch of {}", node.name);
            assert!(known.span_digests(0) == rebuilt.span_digests(0), "K14: sketch of what ends of {}", node.name);
            let digests = (known.shards.digests(), known.span_digests(floor));
            let (known_as, first) = first.get_or_insert((node, digests.clone()));
            assert!(*first == digests, "K14: digests of {} and {}: {}", node.name, known_as.name, only(known_as, node));
        }
    }
}

/// Rows of the index that only one of two nodes has.
fn only(one: &Node, other: &Node) -> String {
    let rows = |node: &Node| -> BTreeSet<_> {
        let rows = node.disk.scan(layout::INDEX, layout::INDEX, usize::MAX).unwrap();
        rows.into_iter().map(|row| (row.key, row.value.unwrap())).collect()
    };
    let (one, other) = (rows(one), rows(other));
    format!("{:?}", one.symmetric_difference(&other).collect::<Vec<_>>())
}
