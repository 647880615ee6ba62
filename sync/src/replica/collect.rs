//! Promises, and the collection of what ended for everybody (sync.md, Collection).

use std::collections::BTreeSet;

use selvage_config::NodeName;

use super::merge::Draft;
use super::peer::Stream;
use super::{Action, Notice, Replica};
use crate::engine::{Batch, EngineError, Row};
use crate::frontier::{Row as Said, floor_of};
use crate::layout;
use crate::read::{self, ReadError};
use crate::stamp::Stamp;

/// Ends that are looked at in one tick, at most.
const ENDS_MAX: usize = 1024;

/// Rows of the index that are sketched in one tick, after a start.
const SKETCH_ROWS: usize = 16_384;

impl Replica {
    /// What this node says of itself; nothing before its first promise.
    pub(super) fn own_row(&self) -> Option<Said> {
        self.frontier.rows().find(|row| row.origin.node == self.origin.node).cloned()
    }

    /// Promises to write nothing older than now, and tells how far this node has come. What is promised is durable
    /// before it is said.
    pub(super) fn promise(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        let fleet_ms = self.offsets.correct(now_ms);
        if self.bootstrap.is_some() || self.clock.is_ahead(fleet_ms) {
            return;
        }
        let promise = self.clock.promise(now_ms.min(fleet_ms));
        self.frontier.update(&self.origin.node, promise, &self.vector);
        let rest = self.frontier.rest(&self.origin, &self.vector);
        self.frontier.learn(Said {
            origin: self.origin.clone(),
            promise,
            seq: self.vector.get(&self.origin),
            cut: self.frontier.level(),
            rest,
        });
        let mut batch = Batch::default();
        if let Some(high_water) = self.clock.high_water() {
            batch.put(layout::CLOCK.to_vec(), high_water.0.to_be_bytes().to_vec());
        }
        batch.put(layout::CUT.to_vec(), self.frontier.cut().0.to_be_bytes().to_vec());
        actions.push(Action::Commit(batch));
        actions.push(Action::Flush);
    }

    /// Raises the floor if the frontier allows, and drops what is below: a part of it in each tick.
    pub(super) fn collect(&mut self, now_ms: u64) -> Result<Vec<Action>, EngineError> {
        // Whoever takes a snapshot of us takes our floor with the first part of it.
        let taken = self.peers.values().any(|peer| matches!(peer.stream, Stream::Snapshot(_)));
        if self.bootstrap.is_some() || taken {
            return Ok(Vec::new());
        }
        let alive: BTreeSet<NodeName> = self.peers.keys().cloned().collect();
        let rest = self.frontier.rest(&self.origin, &self.vector);
        let fleet_ms = self.offsets.correct(now_ms).min(now_ms);
        let frontier = self.frontier.get(&self.origin.node, rest, &alive).unwrap_or_default();
        let floor = floor_of(frontier, fleet_ms, self.limits.grace_ms, self.limits.epoch_ms).max(self.frontier.floor());
        if floor == Stamp::default() {
            return Ok(Vec::new());
        }
        let mut draft = Draft::default();
        for Row { key: end, value } in self.engine.scan(layout::ENDS, layout::ENDS, ENDS_MAX)? {
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
    pub(super) fn discard(&mut self, draft: &mut Draft, entry: crate::entry::Entry) {
        self.counts.stale += 1;
        draft.notices.push(Notice::Discarded { entry: Box::new(entry) });
    }
}
