//! Promises, and the collection of what ended for everybody (sync.md, Collection).

use std::collections::BTreeSet;

use selvage_config::NodeName;

use super::merge::Draft;
use super::peer::Stream;
use super::{Action, Notice, Replica};
use crate::engine::{Batch, EngineError, Row};
use crate::entry::{Dot, Entry};
use crate::frontier::{Beyond, Row as Said, floor_of};
use crate::layout;
use crate::read::{self, ReadError};
use crate::stamp::Stamp;

/// Ends that are looked at in one tick, at most.
const ENDS_MAX: usize = 1024;

/// How long a node may keep this one from collecting before that is told, milliseconds: a catch-up is over by then.
const APART_MS_MAX: u64 = 300_000;

/// A node that keeps this one from collecting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Apart {
    pub(super) since_ms: u64,
    told: bool,
}

/// Writes beyond a gap of origins that promise nothing that are told apart, at most.
const BEYOND_ROWS: usize = 1024;

/// Rows of the index that are sketched in one tick, after a start.
const SKETCH_ROWS: usize = 16_384;

impl Replica {
    /// What this node says of itself; nothing before its first promise.
    pub(super) fn own_row(&self) -> Option<Said> {
        self.frontier.rows().find(|row| row.origin.node == self.origin.node).cloned()
    }

    /// Promises to write nothing older than now, and tells how far this node has come. What is promised is durable
    /// before it is said.
    pub(super) fn promise(&mut self, now_ms: u64, actions: &mut Vec<Action>) -> Result<(), EngineError> {
        let fleet_ms = self.offsets.correct(now_ms);
        if self.bootstrap.is_some() || self.clock.is_ahead(fleet_ms) {
            return Ok(());
        }
        let promise = self.clock.promise(now_ms.min(fleet_ms));
        self.frontier.update(&self.origin.node, promise, &self.vector);
        let (beyond, floor) = (self.beyond_gaps()?, self.frontier.floor());
        let rest = |floor| self.frontier.rest(&self.origin, &self.vector, &beyond, floor);
        let (apart, rest) = (self.frontier.apart(&self.origin.node, rest), rest(floor));
        self.note_apart(now_ms, &apart, actions);
        self.frontier.learn(Said {
            origin: self.origin.clone(),
            promise,
            seq: self.vector.get(&self.origin),
            cut: self.frontier.level(),
            rest,
            floor,
        });
        let mut batch = Batch::default();
        if let Some(high_water) = self.clock.high_water() {
            batch.put(layout::CLOCK.to_vec(), high_water.0.to_be_bytes().to_vec());
        }
        batch.put(layout::CUT.to_vec(), self.frontier.cut().0.to_be_bytes().to_vec());
        actions.push(Action::Commit(batch));
        actions.push(Action::Flush);
        Ok(())
    }

    /// Remembers since when nodes keep this one from collecting, and tells of each once when it has been long.
    fn note_apart(&mut self, now_ms: u64, apart: &BTreeSet<NodeName>, actions: &mut Vec<Action>) {
        self.apart.retain(|node, _| apart.contains(node));
        for node in apart {
            let known = self.apart.entry(node.clone()).or_insert(Apart { since_ms: now_ms, told: false });
            if !known.told && now_ms.saturating_sub(known.since_ms) >= APART_MS_MAX {
                known.told = true;
                actions.push(Action::Notify(Notice::Apart { node: node.clone(), since_ms: known.since_ms }));
            }
        }
    }

    /// What is here beyond gaps of origins that promise nothing. Where that is more than can be looked at, a catch-up is
    /// under way, and no other node says the same.
    fn beyond_gaps(&self) -> Result<Vec<Beyond>, EngineError> {
        let mut beyond = Vec::new();
        for origin in self.origins.iter().filter(|origin| !self.frontier.promises(&self.origin, origin)) {
            let from = layout::index(&Dot { origin: origin.clone(), seq: self.vector.get(origin).saturating_add(1) });
            for row in self.engine.scan(&layout::indices(origin), &from, BEYOND_ROWS)? {
                let dot = Dot { origin: origin.clone(), seq: layout::index_seq(&row.key).unwrap_or_default() };
                let record = row.value.ok().and_then(|value| layout::index_row(&value).map(<[u8]>::to_vec));
                let mortal_ms = match record.map(|record| read::record_at(self.engine.as_ref(), &record)) {
                    Some(Ok(record)) => record.entry(&dot).and_then(Entry::mortal_ms),
                    Some(Err(ReadError::Engine(error))) => return Err(error),
                    Some(Err(ReadError::Corrupt(_))) | None => None,
                };
                beyond.push(Beyond { dot, mortal_ms });
            }
            if beyond.len() >= BEYOND_ROWS {
                beyond.push(Beyond { dot: Dot { origin: self.origin.clone(), seq: 0 }, mortal_ms: None });
                break;
            }
        }
        Ok(beyond)
    }

    /// Whether all others of the roster have the same of origins that promise nothing.
    fn agrees(&self, alive: &BTreeSet<NodeName>) -> Result<bool, EngineError> {
        let beyond = self.beyond_gaps()?;
        let rest = |floor| self.frontier.rest(&self.origin, &self.vector, &beyond, floor);
        Ok(self.frontier.agrees(&self.origin.node, rest, alive))
    }

    /// A peer that does not have the same of origins that promise nothing may lack what no vector tells: writes beyond a
    /// gap that stays, since what was in it was given up. Now and then it is sent all beyond its vector.
    pub(super) fn offer_beyond(&mut self, name: &NodeName) {
        let due = self.ticks.is_multiple_of(self.limits.prove_ticks) && self.bootstrap.is_none();
        let row = |node: &NodeName| self.frontier.rows().find(|row| row.origin.node == *node).map(|row| row.rest);
        let differs = row(name).is_some_and(|rest| Some(rest) != row(&self.origin.node));
        let Some(peer) = self.peers.get_mut(name).filter(|peer| peer.is_live()) else { return };
        if due && differs {
            peer.catch_up();
        }
    }

    /// Raises the floor if the frontier allows, and drops what is below: a part of it in each tick.
    pub(super) fn collect(&mut self, now_ms: u64) -> Result<Vec<Action>, EngineError> {
        // Whoever takes a snapshot of us takes our floor with the first part of it.
        let taken = self.peers.values().any(|peer| matches!(peer.stream, Stream::Snapshot(_)));
        if self.bootstrap.is_some() || taken {
            return Ok(Vec::new());
        }
        let alive: BTreeSet<NodeName> = self.peers.keys().cloned().collect();
        let fleet_ms = self.offsets.correct(now_ms).min(now_ms);
        let frontier = self.frontier.get(&self.origin.node, &alive).unwrap_or_default();
        let floor = floor_of(frontier, fleet_ms, self.limits.grace_ms, self.limits.epoch_ms);
        let ends = self.engine.scan(layout::ENDS, layout::ENDS, ENDS_MAX)?;
        let first_ms = ends.first().and_then(|end| layout::end_ms(&end.key));
        let idle = floor == self.frontier.floor() && first_ms.is_none_or(|ms| ms >= floor.ms());
        // The floor may be another's, and what arrived since may be below it: also that must be everywhere first.
        if floor == Stamp::default() || floor < self.frontier.floor() || idle || !self.agrees(&alive)? {
            return Ok(Vec::new());
        }
        let mut draft = Draft::default();
        for Row { key: end, value } in ends {
            if layout::end_ms(&end).is_none_or(|ms| ms >= floor.ms()) {
                break;
            }
            // Where something lives on top, the tombstone below it does too, and goes with what is on top.
            draft.batch.remove(end.to_vec());
            let Ok(row) = value else { continue };
            let Some(key) = layout::key(&row).filter(|key| !draft.records.contains_key(key)) else { continue };
            let mut record = match read::record_at(self.engine.as_ref(), &row) {
                Ok(record) => record,
                Err(ReadError::Corrupt(_)) => continue,
                Err(ReadError::Engine(error)) => return Err(error),
            };
            let dropped = record.collect(floor.ms());
            if !dropped.is_empty() {
                self.counts.collected += dropped.len() as u64;
                draft.gone.extend(dropped);
                draft.records.insert(key, record);
            }
        }
        if floor > self.frontier.floor() {
            self.frontier.raise_floor(floor);
            draft.batch.put(layout::FLOOR.to_vec(), floor.0.to_be_bytes().to_vec());
        }
        Ok(self.finish(draft, []))
    }

    /// Applies entries from the future that are due.
    pub(super) fn due(&mut self, now_ms: u64) -> Result<Vec<Action>, EngineError> {
        let fleet_ms = self.offsets.correct(now_ms);
        let mut draft = Draft::default();
        let mut dots = Vec::new();
        let due: Vec<_> =
            self.future.keys().take_while(|(stamp, _)| self.clock.is_due(fleet_ms, *stamp)).cloned().collect();
        for at in &due {
            let entry = self.future[at].clone();
            dots.push(entry.version.dot.clone());
            self.merge(&mut draft, entry)?;
        }
        for at in due {
            let _refused = self.clock.observe(fleet_ms, at.0);
            self.future.remove(&at);
        }
        let lifted = self.advance(dots);
        Ok(self.finish(draft, lifted))
    }

    /// Reads on in the index until the sketches know all of it.
    pub(super) fn sketch_more(&mut self) -> Result<(), EngineError> {
        let Some(place) = &self.sketched else { return Ok(()) };
        let from = if place.is_empty() { layout::INDEX.to_vec() } else { [place.as_slice(), &[0]].concat() };
        let rows = self.engine.scan(layout::INDEX, &from, SKETCH_ROWS)?;
        for row in &rows {
            if let Some((item, span)) = row.value.as_ref().ok().and_then(|value| layout::index_item(&row.key, value)) {
                self.sketches.toggle(item, span, 1);
            }
        }
        self.sketched = rows.last().filter(|_| rows.len() == SKETCH_ROWS).map(|row| row.key.to_vec());
        Ok(())
    }

    /// Gives up an own write that everybody else's floor has passed.
    pub(super) fn discard(&mut self, draft: &mut Draft, entry: Entry) {
        self.counts.stale += 1;
        draft.notices.push(Notice::Discarded { entry: Box::new(entry) });
    }
}
