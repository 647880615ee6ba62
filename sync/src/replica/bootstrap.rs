//! Bootstrap: taking another node's whole state, in the order of keys.
//!
//! A node needs this when it has nothing and a peer has much, or when a peer collected what this node has not seen the
//! end of: a node that comes back after it was left out of the roster, or on an old copy of its directory. Of what is
//! older than the peer's floor it keeps only what the peer has: the rest was deleted meanwhile. Its floor is the peer's
//! from the first moment, and its cut at the end, so until then it is no source for others and they refuse what it
//! would bring back.
//!
//! The place and what is claimed are on disk, so it goes on after a restart, also with another peer: at the end it has
//! what every one of them had when it began.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Buf, BufMut, Bytes};
use selvage_config::NodeName;

use super::catch_up::size;
use super::merge::Draft;
use super::peer::{Snapshot, Stream};
use super::warrants::Proved;
use super::{Action, Notice, Replica};
use crate::engine::{Batch, Engine, EngineError, Row};
use crate::entry::{Base, Dot, Entry, Fields, Key, put_origin};
use crate::layout;
use crate::read::{self, ReadError};
use crate::stamp::Stamp;
use crate::vector::VersionVector;
use crate::wire::{self, Message, Reach};

/// Records read at once.
const SCAN_ROWS: usize = 256;

/// A snapshot that is being taken.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub(super) struct Bootstrap {
    /// From whom at the moment.
    from: Option<NodeName>,
    /// The last row that was taken.
    place: Vec<u8>,
    /// What all sources so far had when they began, and their least cut.
    claim: Option<(VersionVector, Stamp)>,
    /// Whether the source at the moment is counted in the claim.
    counted: bool,
    /// Ticks since the source was asked or sent something that could be taken.
    silent_ticks: u64,
    /// A part could not be taken, so those that follow it are not either.
    paused: bool,
}

impl Bootstrap {
    /// As it was when this was stored.
    pub(super) fn resume(engine: &dyn Engine) -> Result<Option<Self>, EngineError> {
        match engine.get(layout::BOOTSTRAP) {
            Ok(stored) => Ok(stored.map(|bytes| Self::decode(bytes).unwrap_or_default())),
            Err(error) if error.is_corrupt() => Ok(Some(Self::default())),
            Err(error) => Err(error),
        }
    }

    pub(super) fn left(&mut self, peer: &NodeName) {
        if self.from.as_ref() == Some(peer) {
            self.from = None;
        }
    }

    fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        out.put_u32(u32::try_from(self.place.len()).unwrap_or(0));
        out.put_slice(&self.place);
        if let Some((vector, cut)) = &self.claim {
            out.put_u64(cut.0);
            for (origin, seq) in vector.iter() {
                put_origin(&mut out, origin);
                out.put_u64(seq);
            }
        }
        out
    }

    /// None if these bytes are not what was stored: it then begins anew.
    fn decode(mut bytes: Bytes) -> Option<Self> {
        let length = usize::try_from(bytes.try_get_u32().ok()?).ok()?;
        let mut fields = Fields::of(bytes);
        let place = fields.take(length).ok()?.to_vec();
        let mut claim = None;
        if !fields.is_empty() {
            let cut = Stamp(fields.u64().ok()?);
            let mut pairs = Vec::new();
            while !fields.is_empty() {
                pairs.push((fields.origin().ok()?, fields.u64().ok()?));
            }
            claim = Some((pairs.into_iter().collect(), cut));
        }
        Some(Self { place, claim, ..Self::default() })
    }
}

/// What a part of a snapshot says of what lives.
struct Sent {
    floor: Stamp,
    dots: BTreeSet<Dot>,
    /// Of every key with something on top of nothing, the least floor at which it was written.
    bare: BTreeMap<Key, Stamp>,
}

impl Sent {
    fn of(entries: &[Entry], floor: Stamp) -> Self {
        let mut bare: BTreeMap<Key, Stamp> = BTreeMap::new();
        for entry in entries {
            if let Some(Base::None { floor }) = entry.content.base() {
                let least = bare.entry(entry.key.clone()).or_insert(*floor);
                *least = (*least).min(*floor);
            }
        }
        // A tombstone that is implied is not sent by itself.
        let implied = entries.iter().filter_map(Entry::implied).map(|below| below.version.dot);
        Self { floor, dots: entries.iter().map(|entry| entry.version.dot.clone()).chain(implied).collect(), bare }
    }

    /// Whether an entry lives, as far as the source can know: it has it, or the entry is newer than its floor and so is
    /// what it was written on top of, or that lives too. A newer register may have been collected otherwise.
    fn confirms(&self, entry: &Entry) -> bool {
        let stands = || match entry.content.base() {
            None => true,
            Some(Base::None { floor }) => {
                *floor >= self.floor || self.bare.get(&entry.key).is_some_and(|least| least <= floor)
            }
            Some(Base::Value(base) | Base::Tombstone { version: base, .. }) => {
                base.stamp > self.floor || self.dots.contains(&base.dot)
            }
        };
        self.dots.contains(&entry.version.dot) || entry.version.stamp > self.floor && stands()
    }
}

/// Whether a node must take a snapshot of another rather than catch up from it. Both compute this alike.
fn must_bootstrap(vector: &VersionVector, reach: Reach, source: (&VersionVector, Reach), writes: u64) -> bool {
    let whole = source.1.cut >= source.1.floor;
    whole && (source.1.floor > reach.cut || vector.total() == 0 && source.0.total() >= writes)
}

impl Replica {
    /// Looks whether all of this peer's state must be taken, and asks for it if so.
    pub(super) fn consider_bootstrap(&mut self, name: &NodeName, actions: &mut Vec<Action>) {
        let own = self.reach();
        let Some(peer) = self.peers.get_mut(name).filter(|peer| peer.greeted()) else { return };
        let source = (&peer.vector, peer.reach);
        if self.bootstrap.is_none() {
            if !must_bootstrap(&self.vector, own, source, self.limits.snapshot_writes) {
                return;
            }
            self.bootstrap = Some(Bootstrap::default());
            self.frontier.raise_floor(peer.reach.floor);
            let mut batch = Batch::default();
            batch.put(layout::BOOTSTRAP.to_vec(), Bootstrap::default().encode());
            batch.put(layout::FLOOR.to_vec(), self.frontier.floor().0.to_be_bytes().to_vec());
            actions.push(Action::Commit(batch));
            actions.push(Action::Flush);
        }
        let floor = self.frontier.floor();
        let Some(bootstrap) = self.bootstrap.as_mut().filter(|bootstrap| bootstrap.from.is_none()) else { return };
        // One that passed on a forged write is asked again when others had their turn.
        let forged = self.forgers.get(name).is_some_and(|at| self.ticks < at + self.limits.forger_ticks);
        if peer.reach.cut >= floor.max(peer.reach.floor) && !forged {
            bootstrap.from = Some(name.clone());
            bootstrap.counted = false;
            bootstrap.silent_ticks = 0;
            bootstrap.paused = false;
            let after = Bytes::copy_from_slice(&bootstrap.place);
            actions.push(peer.send(name, wire::encode(&Message::Ask { after })));
        }
    }

    /// A tick passed: a source that sends nothing to take (it may need a snapshot itself by now, or one of the clocks is
    /// wrong) is left, and it or another is asked. The link ends with it, so that what it sent late is not taken for an
    /// answer.
    pub(super) fn wait_for_source(&mut self) -> Vec<Action> {
        let Some(bootstrap) = &mut self.bootstrap else { return Vec::new() };
        bootstrap.silent_ticks += 1;
        match bootstrap.from.clone().filter(|_| bootstrap.silent_ticks > self.limits.silent_ticks) {
            Some(source) => self.close(&source, "it sends no snapshot"),
            None => Vec::new(),
        }
    }

    /// Begins to send a peer what it lacks, unless it or this node must take a snapshot first.
    pub(super) fn release(&mut self, name: &NodeName) {
        let source = (&self.vector, Reach { cut: self.frontier.cut(), floor: self.frontier.floor() });
        let Some(peer) = self.peers.get_mut(name).filter(|peer| matches!(peer.stream, Stream::Held)) else { return };
        let held =
            self.bootstrap.is_some() || must_bootstrap(&peer.vector, peer.reach, source, self.limits.snapshot_writes);
        if !held {
            peer.catch_up();
        }
    }

    /// A peer asks for all we have.
    pub(super) fn asked(&mut self, name: &NodeName, after: &[u8]) {
        let reach = self.reach();
        let Some(peer) = self.peers.get_mut(name) else { return };
        if self.bootstrap.is_none() && reach.cut >= reach.floor {
            let allowance = self.limits.snapshot_bytes;
            let vector = self.vector.clone();
            peer.stream = Stream::Snapshot(Snapshot { place: after.to_vec(), vector, reach, allowance });
        }
    }

    /// A tick passed: a snapshot may be sent on.
    pub(super) fn refill(&mut self, name: &NodeName) {
        if let Some(Stream::Snapshot(snapshot)) = self.peers.get_mut(name).map(|peer| &mut peer.stream) {
            snapshot.allowance = self.limits.snapshot_bytes;
        }
    }

    /// Sends the next parts of a snapshot, as many as the window and the allowance take.
    pub(super) fn pump_snapshot(&mut self, name: &NodeName, actions: &mut Vec<Action>) -> Result<(), EngineError> {
        loop {
            let Some(peer) = self.peers.get_mut(name) else { return Ok(()) };
            let full = peer.queued.bytes >= self.limits.window_bytes;
            let Stream::Snapshot(snapshot) = &mut peer.stream else { return Ok(()) };
            if full || snapshot.allowance == 0 {
                return Ok(());
            }
            let mut snapshot = std::mem::take(snapshot);
            let (entries, bytes, ended) = self.next_part(&mut snapshot.place)?;
            let Proved { entries, warrants, lacking } = self.attest(entries)?;
            self.heal_lacking(&lacking, actions);
            self.introduce(name, entries.iter().map(|entry| entry.version.dot.origin.clone()), actions)?;
            let peer = self.peers.get_mut(name).expect("looked up above");
            snapshot.allowance = snapshot.allowance.saturating_sub(bytes);
            let upto = (!ended).then(|| Bytes::copy_from_slice(&snapshot.place));
            let (reach, vector) = (snapshot.reach, snapshot.vector.clone());
            let frame = wire::encode(&Message::Snapshot { reach, vector, entries, warrants, upto });
            actions.push(peer.send(name, frame));
            if ended {
                // What came while it was sent follows once it said what it has: the first parts may be of another source.
                peer.stream = Stream::Held;
                return Ok(());
            }
            peer.stream = Stream::Snapshot(snapshot);
        }
    }

    fn next_part(&self, place: &mut Vec<u8>) -> Result<(Vec<Entry>, usize, bool), EngineError> {
        let (mut entries, mut bytes) = (Vec::new(), 0);
        loop {
            let from = if place.is_empty() { layout::RECORDS.to_vec() } else { [place.as_slice(), &[0]].concat() };
            let rows = self.engine.scan(layout::RECORDS, &from, SCAN_ROWS)?;
            let ended = rows.len() < SCAN_ROWS;
            for Row { key: row, .. } in rows {
                // A record that can't be read is not sent, and the proof finds what is missing.
                match read::record_at(self.engine.as_ref(), &row) {
                    Ok(record) => entries.extend(record.entries().cloned()),
                    Err(ReadError::Corrupt(_)) => {}
                    Err(ReadError::Engine(error)) => return Err(error),
                }
                bytes = entries.iter().map(size).sum();
                *place = row.to_vec();
                if bytes >= self.limits.batch_bytes || entries.len() >= self.limits.batch_entries {
                    return Ok((entries, bytes, false));
                }
            }
            if ended {
                return Ok((entries, bytes, true));
            }
        }
    }

    /// Takes a part of a snapshot.
    pub(super) fn snapshot(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        (reach, vector): (Reach, &VersionVector),
        (entries, proved): (Vec<Entry>, Batch),
        upto: Option<Bytes>,
    ) -> Result<Vec<Action>, EngineError> {
        let fleet_ms = self.offsets.correct(now_ms);
        let future = entries.iter().filter(|entry| !self.clock.is_due(fleet_ms, entry.version.stamp)).count();
        let Some(known) = self.bootstrap.as_mut().filter(|known| known.from.as_ref() == Some(name) && !known.paused)
        else {
            return Ok(Vec::new());
        };
        if future > 0 {
            known.paused = true;
            return Ok(vec![Action::Notify(Notice::Future { peer: name.clone(), entries: future })]);
        }
        let mut bootstrap = known.clone();
        let floor = reach.floor;
        self.frontier.raise_floor(floor);
        bootstrap.silent_ticks = 0;
        let sent = Sent::of(&entries, floor);
        // What is given up goes first: it may have superseded here what lives at the source.
        let mut draft = Draft::of(proved);
        let dropped = self.drop_between(&mut draft, &bootstrap.place, upto.as_deref(), &sent, vector)?;
        // What is not here is covered by no vector (sync.md invariant K4). Of the own origin a vector covers all, so that
        // becomes an earlier one: of its writes the peers send what they have.
        for dot in &dropped {
            self.vector.cap(&dot.origin, dot.seq - 1);
        }
        // A catch-up that is under way began where the vector was, so its claim would cover what was dropped.
        if !dropped.is_empty() {
            let others = self.peers.iter_mut().filter(|(peer, _)| *peer != name);
            others.for_each(|(_, peer)| peer.refused = true);
        }
        let mut actions = Vec::new();
        if dropped.iter().any(|dot| dot.origin == self.origin) {
            self.renew(now_ms, name, &mut actions);
        }
        let (mut draft, lifted, refused) = self.take(now_ms, name, reach.cut, entries, false, draft)?;
        if !bootstrap.counted {
            bootstrap.counted = true;
            let (claim, cut) = bootstrap.claim.take().unwrap_or_else(|| (vector.clone(), reach.cut));
            bootstrap.claim = Some((claim.meet(vector), cut.min(reach.cut)));
        }
        draft.batch.put(layout::FLOOR.to_vec(), self.frontier.floor().0.to_be_bytes().to_vec());
        let mut lifted = lifted;
        lifted.extend(dropped.into_iter().map(|dot| dot.origin));
        let ended = upto.is_none();
        if let (true, false, Some((claim, cut))) = (ended, refused, &bootstrap.claim) {
            lifted.extend(self.claim(claim));
            self.frontier.adopt_cut(*cut);
            draft.batch.remove(layout::BOOTSTRAP.to_vec());
            draft.batch.put(layout::CUT.to_vec(), self.frontier.cut().0.to_be_bytes().to_vec());
            draft.notices.push(Notice::Bootstrapped { peer: name.clone() });
            self.bootstrap = None;
        } else if ended {
            // Some entries could not be taken: once more, from the start.
            self.bootstrap = Some(Bootstrap::default());
        } else {
            bootstrap.place = upto.map(|place| place.to_vec()).unwrap_or_default();
            draft.batch.put(layout::BOOTSTRAP.to_vec(), bootstrap.encode());
            self.bootstrap = Some(bootstrap);
        }
        actions.extend(self.finish(draft, lifted));
        if self.bootstrap.is_none() {
            actions.push(Action::Flush);
            let names: Vec<NodeName> = self.peers.keys().cloned().collect();
            // What they lack they are sent from the next tick on, when the engine has it.
            for name in names {
                self.announce(now_ms, &name, true, false, &mut actions);
            }
        }
        Ok(actions)
    }

    /// Drops what is here between two places and may be dead for all that the source says. Of what stays nothing is
    /// kept in memory. Returns the dots that the source never had.
    fn drop_between(
        &mut self,
        draft: &mut Draft,
        after: &[u8],
        upto: Option<&[u8]>,
        sent: &Sent,
        vector: &VersionVector,
    ) -> Result<Vec<Dot>, EngineError> {
        let mut unknown = Vec::new();
        let mut from = if after.is_empty() { layout::RECORDS.to_vec() } else { [after, &[0]].concat() };
        loop {
            let rows = self.engine.scan(layout::RECORDS, &from, SCAN_ROWS)?;
            for Row { key: row, .. } in &rows {
                if upto.is_some_and(|upto| row.as_ref() > upto) {
                    return Ok(unknown);
                }
                let Some(key) = layout::key(row) else { continue };
                let fresh = !draft.records.contains_key(&key);
                self.load(draft, &key)?;
                let record = draft.records.get_mut(&key).expect("loaded above");
                let dropped = record.drop_if(|entry| !sent.confirms(entry));
                if fresh && dropped.is_empty() {
                    draft.records.remove(&key);
                }
                for entry in dropped {
                    draft.gone.push(entry.clone());
                    if !vector.covers(&entry.version.dot) {
                        unknown.push(entry.version.dot.clone());
                        self.discard(draft, entry);
                    }
                }
            }
            let Some(last) = rows.last().filter(|_| rows.len() == SCAN_ROWS) else { return Ok(unknown) };
            from = [last.key.as_ref(), &[0]].concat();
        }
    }
}
