//! What one event changes, before it is committed: records, their index, and what the sketches know of them.

use std::collections::{BTreeMap, BTreeSet};

use super::{Action, BEYOND_MAX, Notice, Replica};
use crate::engine::{Batch, EngineError};
use crate::entry::{Content, Dot, Entry, Key, Origin};
use crate::layout;
use crate::planted::{self, Bug};
use crate::read::{self, ReadError};
use crate::record::Record;
use crate::sketch::{Span, item};

/// Changes of one event.
#[derive(Default)]
pub(super) struct Draft {
    pub(super) records: BTreeMap<Key, Record>,
    pub(super) batch: Batch,
    /// What is in a record now.
    pub(super) added: Vec<Entry>,
    /// What no longer is.
    pub(super) gone: Vec<Entry>,
    pub(super) notices: Vec<Notice>,
    /// What is in the index though its record could not be read: the sketches have it already.
    known: BTreeSet<Dot>,
    corrupt: BTreeSet<Key>,
}

impl Draft {
    /// With what is to be stored anyway.
    pub(super) fn of(batch: Batch) -> Self {
        Self { batch, ..Self::default() }
    }
}

impl Replica {
    /// Reads a key's record into the draft. Says whether it could be read: a corrupt record counts as empty, and
    /// what replaces it heals it.
    pub(super) fn load(&self, draft: &mut Draft, key: &Key) -> Result<bool, EngineError> {
        if draft.records.contains_key(key) {
            return Ok(true);
        }
        let (record, readable) = match read::record(self.engine.as_ref(), key) {
            Ok(record) => (record, true),
            Err(ReadError::Corrupt(_)) => {
                draft.notices.push(Notice::Corrupt { key: key.clone() });
                draft.corrupt.insert(key.clone());
                (Record::default(), false)
            }
            Err(ReadError::Engine(error)) => return Err(error),
        };
        draft.records.insert(key.clone(), record);
        Ok(readable)
    }

    /// Merges an entry into the draft.
    pub(super) fn merge(&mut self, draft: &mut Draft, entry: Entry) -> Result<(), EngineError> {
        self.load(draft, &entry.key)?;
        let record = draft.records.get_mut(&entry.key).expect("loaded above");
        let before = record.register().map(|register| (register.version.clone(), register.prev));
        let arrived = (matches!(entry.content, Content::Tombstone | Content::Value(_))).then(|| entry.clone());
        let healing = draft.corrupt.contains(&entry.key).then(|| layout::index(&entry.version.dot));
        if let Some(index) = healing
            && self.engine.get(&index)?.is_some()
        {
            draft.known.insert(entry.version.dot.clone());
        }
        let change = record.merge(entry);
        if let (Some(arrived), Some((version, prev))) = (arrived, before) {
            let (winner, loser) = if change.is_none() {
                ((&version.dot, prev), &arrived.version.dot)
            } else {
                ((&arrived.version.dot, arrived.prev), &version.dot)
            };
            self.count_conflict(winner.0, winner.1, loser);
        }
        draft.added.extend(change.added);
        draft.gone.extend(change.superseded);
        Ok(())
    }

    /// A write that lost is counted if the winner's writer had not seen it: by the winner's writer when it arrives
    /// there, by the loser's when the winner does. Other nodes can't tell and don't count.
    fn count_conflict(&mut self, winner: &Dot, winner_prev: u32, loser: &Dot) {
        let own = &self.origin.node;
        let linked = winner.origin.node == loser.origin.node || winner_prev == loser.mark();
        if !linked && (winner.origin.node == *own || loser.origin.node == *own) {
            self.counts.conflicts += 1;
        }
    }

    /// Counts writes that were merged. Says of which origins the vector advanced.
    pub(super) fn advance(&mut self, dots: impl IntoIterator<Item = Dot>) -> BTreeSet<Origin> {
        let mut lifted = BTreeSet::new();
        for dot in dots {
            if planted::is(Bug::VectorGap) && self.vector.lift(&dot.origin, dot.seq) {
                lifted.insert(dot.origin);
                continue;
            }
            if self.vector.advance(&dot) {
                self.close_gap(&dot.origin);
                lifted.insert(dot.origin);
            } else if !self.vector.covers(&dot) {
                let beyond = self.beyond.entry(dot.origin).or_default();
                if beyond.len() < BEYOND_MAX {
                    beyond.insert(dot.seq);
                }
            }
        }
        lifted
    }

    /// Counts what was applied beyond a gap that has closed.
    pub(super) fn close_gap(&mut self, origin: &Origin) {
        let Some(beyond) = self.beyond.get_mut(origin) else { return };
        while let Some(seq) = beyond.pop_first() {
            if seq > self.vector.get(origin) && !self.vector.advance(&Dot { origin: origin.clone(), seq }) {
                beyond.insert(seq);
                return;
            }
        }
        self.beyond.remove(origin);
    }

    /// Makes the draft a commit, with the rows of the vector of `lifted` origins.
    pub(super) fn finish(&mut self, draft: Draft, lifted: impl IntoIterator<Item = Origin>) -> Vec<Action> {
        let Draft { records, mut batch, added, gone, notices, known, .. } = draft;
        let mut origins: BTreeSet<Origin> = lifted.into_iter().collect();
        for entry in &added {
            // An origin's first row makes it known, though nothing of it may be complete yet.
            if self.origins.insert(entry.version.dot.origin.clone()) {
                origins.insert(entry.version.dot.origin.clone());
            }
        }
        let dots: Vec<Dot> = added.iter().map(|entry| entry.version.dot.clone()).collect();
        self.index(&mut batch, &added, &gone, &known);
        for (key, record) in records {
            if record == Record::default() {
                batch.remove(layout::record(&key));
            } else {
                batch.put(layout::record(&key), record.encode());
            }
        }
        for origin in origins {
            batch.put(layout::vector(&origin), self.vector.get(&origin).to_be_bytes().to_vec());
            self.origins.insert(origin);
        }
        if let Some(high_water) = self.clock.high_water() {
            batch.put(layout::CLOCK.to_vec(), high_water.0.to_be_bytes().to_vec());
        }
        for peer in self.peers.values_mut() {
            peer.revisit(&dots);
        }
        let mut actions: Vec<Action> = notices.into_iter().map(Action::Notify).collect();
        if !batch.is_empty() {
            actions.push(Action::Commit(batch));
        }
        actions
    }

    /// Keeps index, ends and sketches as the records are. What was added and superseded in one draft cancels out.
    fn index(&mut self, batch: &mut Batch, added: &[Entry], gone: &[Entry], known: &BTreeSet<Dot>) {
        for entry in added {
            let row = layout::record(&entry.key);
            let index = layout::index(&entry.version.dot);
            if self.is_sketched(&index) && !known.contains(&entry.version.dot) {
                self.sketches.toggle(item(entry), Span::of(entry), 1);
            }
            if let Some(mortal_ms) = entry.mortal_ms() {
                batch.put(layout::end(mortal_ms, &entry.version.dot), row.clone());
            }
            batch.put(index, layout::index_value(entry, &row));
        }
        for entry in gone {
            let index = layout::index(&entry.version.dot);
            if self.is_sketched(&index) && !planted::is(Bug::Sketch) {
                self.sketches.toggle(item(entry), Span::of(entry), -1);
            }
            if let Some(mortal_ms) = entry.mortal_ms() {
                batch.remove(layout::end(mortal_ms, &entry.version.dot));
            }
            batch.remove(index);
        }
    }

    /// Whether the sketches have come to this row of the index.
    fn is_sketched(&self, index: &[u8]) -> bool {
        self.sketched.as_ref().is_none_or(|place| index <= place.as_slice())
    }
}
