//! Catch-up: both sides of giving a peer what it lacks.
//!
//! The sender scans its index by origin, from where the peer is to the end, also beyond its own vector: an entry
//! there may be what superseded one below. At the end it says what the receiver now has. That claim holds since
//! of every write it covers, either the entry was sent, or the one that superseded it was, or the peer had it. So
//! gaps that overwritten entries left in the index do not hold the receiver's vector back, and no vector ever
//! covers a write whose effect has not arrived.

use std::collections::BTreeSet;

use selvage_config::NodeName;

use super::peer::{CatchUp, Stream};
use super::{Action, Draft, Notice, Replica};
use crate::engine::{Batch, Corrupt, EngineError};
use crate::entry::{Dot, Entry, Origin};
use crate::layout;
use crate::read::{self, ReadError};
use crate::stamp::Stamp;
use crate::vector::VersionVector;
use crate::wire::{self, Message};

/// Rows of the index read at once.
const SCAN_ROWS: usize = 256;

/// What a row of the index led to.
enum Found {
    Entry(Entry),
    Superseded,
    Unreadable,
}

impl Replica {
    /// Sends the next batches of a running catch-up, as many as the window takes.
    pub(super) fn pump(&mut self, name: &NodeName, actions: &mut Vec<Action>) -> Result<(), EngineError> {
        loop {
            let Some(peer) = self.peers.get_mut(name) else { return Ok(()) };
            if peer.queued.bytes >= self.limits.window_bytes {
                return Ok(());
            }
            let Stream::CatchUp(catch_up) = &mut peer.stream else { return Ok(()) };
            let mut catch_up = std::mem::take(catch_up);
            let (entries, complete) = self.next_batch(&mut catch_up)?;
            let peer = self.peers.get_mut(name).expect("looked up above");
            peer.stream = if complete.is_some() { Stream::Live } else { Stream::CatchUp(catch_up) };
            let frame = wire::encode(&Message::Batch { entries, complete });
            actions.push(peer.send(name, frame));
        }
    }

    /// The next entries, and at the end the claim.
    fn next_batch(&self, catch_up: &mut CatchUp) -> Result<(Vec<Entry>, Option<VersionVector>), EngineError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for origin in &self.origins {
            let mut after = catch_up.cursors.get(origin).copied().unwrap_or(0);
            loop {
                let from = layout::index(&Dot { origin: origin.clone(), seq: after.saturating_add(1) });
                let rows = self.engine.scan(&layout::indices(origin), &from, SCAN_ROWS)?;
                let ended = rows.len() < SCAN_ROWS;
                for row in rows {
                    let Some(seq) = layout::index_seq(&row.key) else { continue };
                    let found = match &row.value {
                        Ok(key) => self.find(key, &Dot { origin: origin.clone(), seq })?,
                        Err(Corrupt) => Found::Unreadable,
                    };
                    match found {
                        Found::Entry(entry) => {
                            bytes += size(&entry);
                            entries.push(entry);
                        }
                        Found::Superseded => {}
                        Found::Unreadable => {
                            catch_up.caps.entry(origin.clone()).or_insert(seq - 1);
                        }
                    }
                    after = seq;
                    if bytes >= self.limits.batch_bytes || entries.len() >= self.limits.batch_entries {
                        catch_up.cursors.insert(origin.clone(), after);
                        return Ok((entries, None));
                    }
                }
                catch_up.cursors.insert(origin.clone(), after);
                if ended {
                    break;
                }
            }
        }
        let mut claim = self.vector.clone();
        for (origin, cap) in &catch_up.caps {
            claim.cap(origin, *cap);
        }
        Ok((entries, Some(claim)))
    }

    fn find(&self, row: &[u8], dot: &Dot) -> Result<Found, EngineError> {
        match read::record_at(self.engine.as_ref(), row) {
            Ok(record) => Ok(record.entry(dot).cloned().map_or(Found::Superseded, Found::Entry)),
            Err(ReadError::Corrupt(_)) => Ok(Found::Unreadable),
            Err(ReadError::Engine(error)) => Err(error),
        }
    }

    /// Takes a peer's message.
    pub(super) fn received(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        message: Message,
    ) -> Result<Vec<Action>, EngineError> {
        let peer = self.peers.get_mut(name).expect("the caller looked it up");
        let mut actions = Vec::new();
        match (message, peer.greeted()) {
            (Message::Hello { versions, node, vector }, false) => {
                if versions.agree(wire::VERSIONS).is_none() {
                    return Ok(self.close(name, "no common version"));
                }
                if node != *name {
                    return Ok(self.close(name, "its hello names another node than its certificate"));
                }
                peer.vector = vector;
                peer.catch_up();
                self.check_rewound(now_ms, name, &mut actions);
                self.pump(name, &mut actions)?;
            }
            (Message::Announce { vector }, true) => {
                peer.reported(now_ms, vector, &self.settled);
                self.check_rewound(now_ms, name, &mut actions);
                self.pump(name, &mut actions)?;
            }
            (Message::Batch { entries, complete }, true) => {
                return self.batch(now_ms, name, entries, complete);
            }
            (Message::Hello { .. }, true) | (_, false) => return Ok(self.close(name, "hello out of place")),
        }
        Ok(actions)
    }

    fn close(&mut self, name: &NodeName, why: &'static str) -> Vec<Action> {
        let closed = self.peers.remove(name);
        closed.map(|peer| Action::Close { peer: name.clone(), session: peer.session, why }).into_iter().collect()
    }

    fn batch(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        entries: Vec<Entry>,
        complete: Option<VersionVector>,
    ) -> Result<Vec<Action>, EngineError> {
        let mut actions = Vec::new();
        let written = self.vector.get(&self.origin);
        if entries.iter().map(|entry| &entry.version.dot).any(|dot| dot.origin == self.origin && dot.seq > written) {
            self.renew(now_ms, name, &mut actions);
        }
        let mut draft = Draft::default();
        let mut dots = Vec::new();
        let mut refused = 0;
        for entry in entries {
            if self.clock.observe(now_ms, entry.version.stamp).is_err() {
                refused += 1;
                continue;
            }
            dots.push(entry.version.dot.clone());
            self.merge(&mut draft, entry)?;
        }
        // Nothing fails from here on, so an error above has left the vector as it was.
        let mut lifted: BTreeSet<Origin> = BTreeSet::new();
        for dot in dots {
            if self.vector.advance(&dot) {
                lifted.insert(dot.origin);
            }
        }
        let peer = self.peers.get_mut(name).expect("the caller looked it up");
        peer.refused |= refused > 0;
        let ended = complete.is_some();
        if let Some(claim) = complete {
            // A claim after refused entries is not true for us. The next catch-up gets another chance.
            if !std::mem::take(&mut peer.refused) {
                lifted.extend(self.claim(&claim));
            }
        }
        actions.extend(self.finish(draft, lifted));
        if refused > 0 {
            actions.push(Action::Notify(Notice::Refused { peer: name.clone(), entries: refused }));
        }
        if ended {
            self.announce(name, false, &mut actions);
        }
        Ok(actions)
    }

    /// Takes a claim, but for our own origin: of that only we know what there is.
    fn claim(&mut self, claim: &VersionVector) -> Vec<Origin> {
        let mut lifted = Vec::new();
        for (origin, seq) in claim.iter().filter(|(origin, _)| **origin != self.origin) {
            if self.vector.lift(origin, seq) {
                lifted.push(origin.clone());
            }
        }
        lifted
    }

    fn check_rewound(&mut self, now_ms: u64, name: &NodeName, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get(name) else { return };
        if peer.vector.get(&self.origin) > self.vector.get(&self.origin) {
            self.renew(now_ms, name, actions);
        }
    }

    /// A peer has more of our writes than we have made: this directory is an old copy, and new writes would take
    /// numbers that others have seen. So we become a new incarnation, and take the old one's writes from the
    /// peers from the start. What was written here since the copy was put back stays on this node until it is
    /// written again.
    fn renew(&mut self, now_ms: u64, name: &NodeName, actions: &mut Vec<Action>) {
        let old = self.origin.clone();
        self.vector.cap(&old, 0);
        self.recent.cap(&old, 0);
        self.settled.cap(&old, 0);
        self.origin.incarnation = Stamp::at_ms(now_ms).0.max(old.incarnation.saturating_add(1));
        let incarnation = self.origin.incarnation;
        let mut batch = Batch::default();
        batch.put(layout::INCARNATION.to_vec(), incarnation.to_be_bytes().to_vec());
        batch.put(layout::vector(&old), 0_u64.to_be_bytes().to_vec());
        batch.put(layout::vector(&self.origin), 0_u64.to_be_bytes().to_vec());
        actions.push(Action::Commit(batch));
        actions.push(Action::Notify(Notice::Rewound { peer: name.clone(), incarnation }));
        let names: Vec<NodeName> = self.peers.keys().cloned().collect();
        for name in names {
            self.announce(&name, true, actions);
        }
    }
}

fn size(entry: &Entry) -> usize {
    let value = match &entry.content {
        crate::entry::Content::Value(value) => value.len(),
        _ => 0,
    };
    // Names, numbers and the checksum of an entry, about; only the order of magnitude matters.
    value + entry.key.name.len() + 256
}
