//! The replica: what a node does with a write, a peer and a peer's message.
//!
//! A state machine of (state, now, event). It reads its engine and changes it only through [`Action::Commit`],
//! which the caller applies before the next event. It sends only through [`Action::Send`], which the caller does
//! after what was committed with it is durable: a peer must never know of a write that a crash can take back,
//! since its number would be given twice.
//!
//! The promise (sync.md invariant K4): of every origin, all writes up to `vector[origin]` were applied here, or
//! what superseded them was.

mod bootstrap;
mod catch_up;
mod collect;
mod event;
mod merge;
mod peer;
mod prove;
mod push;
mod warrants;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use selvage_config::{NodeName, Region};

use self::bootstrap::Bootstrap;
use self::collect::Apart;
use self::merge::Draft;
use self::push::Regions;
use crate::engine::{Batch, Engine, EngineError};
use crate::entry::{CONTEXT_MAX, Content, Dot, Entry, Key, Origin, Version};
use crate::frontier::Frontier;
use crate::layout;
use crate::offset::{OFFSET_MS_MAX, Offsets, Ping};
use crate::planted::{self, Bug};
use crate::session::Token;
use crate::sketch::Sketches;
use crate::stamp::{Clock, Stamp};
use crate::trust::{Keyring, PublicKey, Signer, Voucher};
use crate::vector::VersionVector;
use crate::warrant::Warrant;
use crate::wire::{self, Message, Reach};

pub use event::{Action, Counts, Event, Notice, Write, WriteError, Written};
pub(crate) use peer::Limits;
use peer::Peer;
pub use peer::{Health, PEER_QUEUE_BYTES_MAX, PEER_QUEUE_FRAMES_MAX};

/// How often the caller shall send [`Event::Tick`], milliseconds.
pub const TICK_MS: u64 = 250;

/// Ticks between two looks at the vector. A peer that lacks what was here two looks ago did not get it by a push.
const SETTLE_TICKS: u64 = 4;

/// Ticks in which a node waits for the first peer that greets it, before it takes itself for the only one that runs.
const GREET_TICKS_MAX: u64 = 20;

/// Ticks after which a node that was never level takes traffic all the same: a minute.
const CATCH_UP_TICKS_MAX: u64 = 240;

/// Writes of one origin that are remembered beyond a gap, at most. What is beyond comes again by a catch-up.
const BEYOND_MAX: usize = 4096;

/// Why a link ends at once whose other end the roster does not have.
const NOT_IN_ROSTER: &str = "it is not in the roster";

/// Why one ends when its peer, or another that bears its name, has made a newer one.
const REPLACED: &str = "a newer one takes its place";

/// Rows of the version vector read at once at the start.
const VECTOR_ROWS: usize = 1024;

/// The replicated state of one node.
pub struct Replica {
    engine: Arc<dyn Engine>,
    origin: Origin,
    clock: Clock,
    offsets: Offsets,
    frontier: Frontier,
    vector: VersionVector,
    /// Of every origin, writes that were applied beyond a gap.
    beyond: BTreeMap<Origin, BTreeSet<u64>>,
    /// Entries from the future, by when they are due.
    future: BTreeMap<(Stamp, Dot), Entry>,
    /// All origins that have rows, also those whose first write is still missing.
    origins: BTreeSet<Origin>,
    sketches: Sketches,
    /// The last row of the index that the sketches know; none once they know all.
    sketched: Option<Vec<u8>>,
    bootstrap: Option<Bootstrap>,
    /// The vector at the last look, and at the one before.
    recent: VersionVector,
    settled: VersionVector,
    ticks: u64,
    was_level: bool,
    /// Local writes that are not pushed yet.
    outbox: Vec<Entry>,
    /// How many of them are signed, and by what.
    signed: usize,
    fresh: Vec<Warrant>,
    keyring: Keyring,
    signer: Signer,
    /// Keys of origins that were proved here once.
    keys: BTreeMap<Origin, PublicKey>,
    /// The mark of the identity that vouched for this node's own ones.
    vouched_as: u64,
    /// The last row of warrants that was looked at, and how many were stored since.
    swept: Vec<u8>,
    stored: usize,
    /// Members that keep this node from collecting.
    apart: BTreeMap<NodeName, Apart>,
    /// Peers that passed on a forged write, and at which tick the last one.
    forgers: BTreeMap<NodeName, u64>,
    peers: BTreeMap<NodeName, Peer>,
    regions: Regions,
    limits: Limits,
    counts: Counts,
}

impl Replica {
    /// The replica of `node` as the engine has it. In an empty engine, or in one that was begun at another `place`
    /// (it is a copy then), or that can't tell how far it has written, it begins a new incarnation, which the keyring's
    /// chance tells apart from one begun in the same millisecond.
    pub fn open(
        engine: Arc<dyn Engine>,
        node: NodeName,
        place: &[u8],
        now_ms: u64,
        keyring: Keyring,
    ) -> Result<Self, EngineError> {
        let vector = stored_vector(engine.as_ref())?;
        let stored = stored_incarnation(engine.as_ref(), &node, place)?;
        let found = fact(engine.as_ref(), layout::LAYOUT)?;
        let is_new = stored == Stored::After(0) && engine.scan(layout::RECORDS, layout::RECORDS, 1)?.is_empty();
        if !is_new && found != Some(layout::VERSION) {
            return Err(EngineError::new("open", LayoutError { found: found.unwrap_or(1) }));
        }
        let origin = match stored {
            Stored::GoOn(incarnation) => Origin { node, incarnation },
            Stored::After(last) => {
                let salt = u16::from_be_bytes([keyring.chance[0], keyring.chance[1]]);
                let incarnation = (Stamp::at_ms(now_ms).0 | u64::from(salt)).max(last.saturating_add(1));
                begin(engine.as_ref(), Origin { node, incarnation }, place, &keyring)?
            }
        };
        let signer = stored_signer(engine.as_ref())?.expect("who goes on has one, and who begins has made one");
        let mut keys = warrants::stored_keys(engine.as_ref())?;
        keys.insert(origin.clone(), signer.public());
        let stamp = |row| Ok::<_, EngineError>(Stamp(fact(engine.as_ref(), row)?.unwrap_or(0)));
        let empty = engine.scan(layout::INDEX, layout::INDEX, 1)?.is_empty();
        let mut replica = Self {
            origin,
            clock: Clock::resume(stamp(layout::CLOCK)?),
            offsets: Offsets::default(),
            frontier: Frontier::resume(stamp(layout::CUT)?, stamp(layout::FLOOR)?),
            origins: vector.iter().map(|(origin, _)| origin.clone()).collect(),
            beyond: BTreeMap::new(),
            future: BTreeMap::new(),
            sketches: Sketches::default(),
            sketched: (!empty).then(Vec::new),
            bootstrap: Bootstrap::resume(engine.as_ref())?,
            recent: vector.clone(),
            settled: vector.clone(),
            vector,
            ticks: 0,
            was_level: false,
            outbox: Vec::new(),
            signed: 0,
            fresh: Vec::new(),
            keyring,
            signer,
            keys,
            vouched_as: 0,
            swept: Vec::new(),
            stored: 0,
            apart: BTreeMap::new(),
            forgers: BTreeMap::new(),
            peers: BTreeMap::new(),
            regions: Regions::default(),
            limits: Limits::default(),
            counts: Counts::default(),
            engine,
        };
        replica.sign_rest()?;
        let (vouchers, _) = replica.vouch(now_ms);
        replica.engine.commit(vouchers)?;
        Ok(replica)
    }

    /// Takes one event, returns what to do. Any order of events may be replayed in a test. After an error nothing
    /// of the event was done; a link whose message it was must be closed.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> Result<Vec<Action>, EngineError> {
        match event {
            Event::Write { ticket, key, write } => self.write(now_ms, ticket, key, write),
            Event::Connected { peer, session } => self.connected(now_ms, peer, session),
            Event::Disconnected { peer, session } => {
                if self.session(&peer, session).is_some() {
                    self.gone(&peer);
                }
                Ok(Vec::new())
            }
            Event::Received { peer, session, message } => match self.session(&peer, session) {
                Some(known) => {
                    known.heard_ms = now_ms;
                    self.received(now_ms, &peer, message)
                }
                None => Ok(Vec::new()),
            },
            Event::Sent { peer, session, frames, bytes } => {
                let mut actions = Vec::new();
                if let Some(known) = self.session(&peer, session) {
                    known.queued.take(frames, bytes);
                    self.pump(&peer, &mut actions)?;
                }
                Ok(actions)
            }
            Event::Roster(members) => Ok(self.enrol(members)),
            Event::Heal(key) => Ok(self.heal(key)),
            Event::Tick => self.tick(now_ms),
        }
    }

    /// The same replica with small limits, which a few writes reach.
    #[cfg(test)]
    pub(crate) fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// The sketches, once they know all rows.
    #[cfg(test)]
    pub(crate) fn sketches(&self) -> Option<&Sketches> {
        self.sketched.is_none().then_some(&self.sketches)
    }

    /// How far it and its links have come, for a failure's report.
    #[cfg(test)]
    pub(crate) fn describe(&self) -> String {
        let links = self.peers.iter().map(|(name, peer)| format!(" {name}: {:?} {:?}", peer.reach, peer.stream));
        format!(
            "{:?}, bootstrap {:?}, {:?}, beyond {:?}, future {:?},{}",
            self.reach(),
            self.bootstrap,
            self.vector,
            self.beyond,
            self.future,
            links.collect::<String>()
        )
    }

    /// Who this node is among origins.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What this node has.
    pub fn vector(&self) -> &VersionVector {
        &self.vector
    }

    /// Whether this node has all that a session saw.
    pub fn has(&self, token: &Token) -> bool {
        token.is_in(&self.vector) || planted::is(Bug::Token)
    }

    /// What was counted since the start.
    pub fn counts(&self) -> Counts {
        self.counts
    }

    /// How far this node has come with what is collected.
    pub fn reach(&self) -> Reach {
        Reach { cut: self.frontier.cut(), floor: self.frontier.floor() }
    }

    /// How far the fleet's time is ahead of this clock, milliseconds.
    pub fn ahead_ms(&self) -> i64 {
        self.offsets.fleet()
    }

    /// Whether all that the connected peers had a second ago is here, and no snapshot is being taken.
    pub fn is_level(&self) -> bool {
        let lacks = |peer: &Peer| peer.settled.iter().any(|(origin, seq)| seq > self.vector.get(origin));
        self.bootstrap.is_none() && !self.peers.values().any(lacks)
    }

    /// Whether this node was level once since its start, and takes no snapshot now. What a peer has and can't read
    /// must not keep all others waiting for ever, so it is enough to have tried for a while.
    pub fn is_caught_up(&self) -> bool {
        self.bootstrap.is_none() && (self.was_level || self.ticks > CATCH_UP_TICKS_MAX)
    }

    /// Members that keep this node from collecting, and since when, milliseconds since the Unix epoch.
    pub fn apart(&self) -> BTreeMap<NodeName, u64> {
        self.apart.iter().map(|(node, apart)| (node.clone(), apart.since_ms)).collect()
    }

    /// How the links stand, by peer.
    pub fn health(&self) -> Vec<Health> {
        let written = self.vector.get(&self.origin);
        self.peers
            .iter()
            .map(|(node, peer)| Health {
                node: node.clone(),
                queued_bytes: peer.queued.bytes,
                lag: written.saturating_sub(peer.vector.get(&self.origin)),
                heard_ms: peer.heard_ms,
                ahead_ms: self.offsets.of(node),
            })
            .collect()
    }

    fn enrol(&mut self, members: BTreeMap<NodeName, Region>) -> Vec<Action> {
        self.frontier.set_members(members.keys().cloned().collect());
        self.regions = Regions::of(members);
        for (name, peer) in &mut self.peers {
            peer.way = self.regions.way(&self.origin.node, name, &self.limits);
        }
        let left: Vec<NodeName> = self.peers.keys().filter(|name| !self.frontier.admits(name)).cloned().collect();
        left.iter().flat_map(|name| self.close(name, NOT_IN_ROSTER)).collect()
    }

    fn session(&mut self, peer: &NodeName, session: u64) -> Option<&mut Peer> {
        self.peers.get_mut(peer).filter(|known| known.session == session)
    }

    fn gone(&mut self, name: &NodeName) -> Option<Peer> {
        self.offsets.forget(name);
        if let Some(bootstrap) = &mut self.bootstrap {
            bootstrap.left(name);
        }
        self.peers.remove(name)
    }

    fn write(&mut self, now_ms: u64, ticket: u64, key: Key, write: Write) -> Result<Vec<Action>, EngineError> {
        let ahead_ms = self.offsets.fleet();
        let fleet_ms = self.offsets.correct(now_ms);
        let unsafe_clock = ahead_ms.unsigned_abs() > OFFSET_MS_MAX || self.clock.is_ahead(fleet_ms);
        if unsafe_clock && !planted::is(Bug::WallClock) {
            return Ok(vec![Action::Done { ticket, result: Err(WriteError::ClockUnsafe { ahead_ms }) }]);
        }
        let mut draft = Draft::default();
        let corrupt = !self.load(&mut draft, &key)?;
        let mut clock = self.clock.clone();
        let mut seq = self.vector.get(&self.origin);
        let mut next = || {
            seq += 1;
            Version { stamp: clock.tick(now_ms), dot: Dot { origin: self.origin.clone(), seq } }
        };
        let record = &draft.records[&key];
        let on_top = matches!(write, Write::Increment { .. } | Write::Beside { .. });
        if corrupt && on_top {
            return Ok(vec![Action::Done { ticket, result: Err(WriteError::Corrupt) }]);
        }
        let prev = record.base().map_or(0, |base| base.dot.mark());
        let mut entries = Vec::new();
        let mut record = record.clone();
        if on_top && record.needs_tombstone(now_ms) {
            let tombstone =
                Entry { key: key.clone(), version: next(), prev, expires_ms: None, content: Content::Tombstone };
            record.merge(tombstone.clone());
            entries.push(tombstone);
        }
        let (mut counted, floor) = (None, self.frontier.floor());
        let (content, expires_ms, prev) = match write {
            Write::Set { value, expires_ms } => (Content::Value(value), expires_ms, prev),
            Write::Delete => (Content::Tombstone, None, prev),
            Write::Increment { delta, expires_ms } => match record.increment(&self.origin, delta, now_ms, floor) {
                Ok((content, own, sum)) => {
                    counted = Some(sum);
                    (content, own.or(expires_ms), 0)
                }
                Err(error) => return Ok(vec![Action::Done { ticket, result: Err(error.into()) }]),
            },
            Write::Beside { value, expires_ms } => (record.sibling(value, floor), expires_ms, 0),
        };
        if matches!(&content, Content::Sibling { context, .. } if context.len() > CONTEXT_MAX) {
            return Ok(vec![Action::Done { ticket, result: Err(WriteError::Crowded) }]);
        }
        let version = next();
        let dot = version.dot.clone();
        entries.push(Entry { key, version, prev, expires_ms, content });
        for entry in entries.clone() {
            self.merge(&mut draft, entry)?;
        }
        self.clock = clock;
        self.vector.lift(&self.origin, dot.seq);
        self.outbox.extend(entries);
        let mut actions = self.finish(draft, [self.origin.clone()]);
        actions.push(Action::Done { ticket, result: Ok(Written { dot, counted }) });
        Ok(actions)
    }

    fn connected(&mut self, now_ms: u64, name: NodeName, session: u64) -> Result<Vec<Action>, EngineError> {
        // Its other end may well be alive (a copy of that node, say), and would take it for a link for ever.
        let mut actions = self.close(&name, REPLACED);
        // What it brings is in no promise that this roster's frontier counts on (sync.md, Collection).
        if !self.frontier.admits(&name) {
            actions.push(Action::Close { peer: name, session, why: NOT_IN_ROSTER });
            return Ok(actions);
        }
        let mut peer = Peer::new(session, now_ms);
        peer.way = self.regions.way(&self.origin.node, &name, &self.limits);
        peer.rank = push::rank(&self.origin.node, &name);
        let hello = Message::Hello {
            versions: wire::VERSIONS,
            node: self.origin.node.clone(),
            vector: self.vector.clone(),
            reach: self.reach(),
        };
        peer.announced = self.vector.clone();
        actions.push(peer.send(&name, wire::encode(&hello)));
        self.peers.insert(name.clone(), peer);
        // Its writes may come at any time from now on.
        self.introduce(&name, [self.origin.clone()], &mut actions)?;
        Ok(actions)
    }

    fn tick(&mut self, now_ms: u64) -> Result<Vec<Action>, EngineError> {
        self.ticks += 1;
        let look = self.ticks.is_multiple_of(SETTLE_TICKS);
        if look {
            self.settled = std::mem::replace(&mut self.recent, self.vector.clone());
            self.peers.values_mut().for_each(|peer| peer.look(now_ms));
        }
        let greeted = self.peers.values().any(Peer::greeted);
        let waits = self.frontier.has_others(&self.origin.node) && !greeted && self.ticks < GREET_TICKS_MAX;
        self.was_level |= !waits && self.is_level();
        // What reads the engine comes before what changes it, since the engine has that only after this event. For the
        // same reason one tick makes one change.
        let mut actions = Vec::new();
        self.sketch_more()?;
        let swept = self.sweep()?;
        let names: Vec<NodeName> = self.peers.keys().cloned().collect();
        actions.extend(self.wait_for_source());
        for name in &names {
            self.consider_bootstrap(name, &mut actions);
            self.prove(name, &mut actions);
            self.release(name);
            self.offer_beyond(name);
            self.refill(name);
            self.pump(name, &mut actions)?;
        }
        let due = self.due(now_ms)?;
        actions.extend(if due.is_empty() { self.collect(now_ms)? } else { due });
        let promised = self.ticks.is_multiple_of(self.limits.promise_ticks);
        if promised {
            self.promise(now_ms, &mut actions)?;
        }
        self.vouch_again(now_ms, &mut actions);
        if !swept.is_empty() {
            actions.push(Action::Commit(swept));
        }
        let all_rows = self.ticks.is_multiple_of(self.limits.rows_ticks);
        for name in &names {
            self.announce(now_ms, name, look || promised, all_rows, &mut actions);
        }
        Ok(actions)
    }

    /// Tells a peer what we have, if that changed or `always`, and what we know of promises.
    fn announce(&mut self, now_ms: u64, name: &NodeName, always: bool, all_rows: bool, actions: &mut Vec<Action>) {
        let own = self.own_row();
        let reach = self.reach();
        let Some(peer) = self.peers.get_mut(name).filter(|peer| peer.greeted()) else { return };
        let changed = self.vector.since(&peer.announced);
        if !always && changed.is_empty() {
            return;
        }
        let (echo_ms, held_ms) = peer.ping.map_or((0, 0), |(theirs, ours)| (theirs, now_ms.saturating_sub(ours)));
        let mut rows: Vec<_> = own.into_iter().collect();
        if all_rows {
            rows.extend(self.frontier.rows().filter(|row| row.origin.node != self.origin.node).cloned());
        }
        let ping = Ping { sent_ms: now_ms, echo_ms, held_ms };
        let frame = wire::encode(&Message::Announce { changed, reach, ping, rows });
        if peer.queued.has_room(&self.limits, frame.len()) {
            peer.announced = self.vector.clone();
            actions.push(peer.send(name, frame));
        }
    }
}

/// A number among the node's own facts; none also if it can't be read.
fn fact(engine: &dyn Engine, row: &[u8]) -> Result<Option<u64>, EngineError> {
    match engine.get(row) {
        Ok(bytes) => Ok(bytes.and_then(|bytes| layout::number(&bytes))),
        Err(error) if error.is_corrupt() => Ok(None),
        Err(error) => Err(error),
    }
}

/// What the engine says of the incarnation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stored {
    /// To go on as this one.
    GoOn(u64),
    /// To begin one after this, 0 if none is known: how far it has written can't be read, and it would give numbers
    /// twice (sync.md invariant K5).
    After(u64),
}

fn stored_incarnation(engine: &dyn Engine, node: &NodeName, place: &[u8]) -> Result<Stored, EngineError> {
    let Some(incarnation) = fact(engine, layout::INCARNATION)? else { return Ok(Stored::After(0)) };
    if planted::is(Bug::Incarnation) {
        return Ok(Stored::GoOn(incarnation));
    }
    let same = match engine.get(layout::PLACE) {
        Ok(known) => known.is_some_and(|known| known == place),
        Err(error) if error.is_corrupt() => false,
        Err(error) => return Err(error),
    };
    if !same {
        return Ok(Stored::After(incarnation));
    }
    let origin = Origin { node: node.clone(), incarnation };
    let signs = stored_signer(engine)?.is_some();
    let written = fact(engine, &layout::vector(&origin))?.filter(|_| signs);
    let Some(written) = written else { return Ok(Stored::After(incarnation)) };
    let beyond = layout::index(&Dot { origin: origin.clone(), seq: written.saturating_add(1) });
    let known = engine.scan(&layout::indices(&origin), &beyond, 1)?.is_empty();
    Ok(if known { Stored::GoOn(incarnation) } else { Stored::After(incarnation) })
}

/// Rows of a layout that this program does not read.
#[derive(Debug, Clone, Copy, thiserror::Error)]
#[error(
    "the rows are of layout {found}, this program reads {}: move the directory away, and the node fills a new one from \
     its peers",
    layout::VERSION
)]
struct LayoutError {
    found: u64,
}

/// Begins an incarnation, on disk before it is used.
fn begin(engine: &dyn Engine, origin: Origin, place: &[u8], keyring: &Keyring) -> Result<Origin, EngineError> {
    let mut batch = Batch::default();
    let seed = keyring.seed(&origin);
    batch.put(layout::SIGNER.to_vec(), seed.to_vec());
    if let Some(signer) = Signer::of(&seed) {
        warrants::put_key(&mut batch, &Voucher::bare(&origin, signer.public()));
    }
    batch.put(layout::LAYOUT.to_vec(), layout::VERSION.to_be_bytes().to_vec());
    batch.put(layout::INCARNATION.to_vec(), origin.incarnation.to_be_bytes().to_vec());
    batch.put(layout::PLACE.to_vec(), place.to_vec());
    batch.put(layout::vector(&origin), 0_u64.to_be_bytes().to_vec());
    engine.commit(batch)?;
    Ok(origin)
}

/// What this incarnation signs with; none if it can't be read.
fn stored_signer(engine: &dyn Engine) -> Result<Option<Signer>, EngineError> {
    match engine.get(layout::SIGNER) {
        Ok(seed) => Ok(seed.and_then(|seed| Signer::of(&seed))),
        Err(error) if error.is_corrupt() => Ok(None),
        Err(error) => Err(error),
    }
}

fn stored_vector(engine: &dyn Engine) -> Result<VersionVector, EngineError> {
    let mut pairs = Vec::new();
    let mut from = layout::VECTOR.to_vec();
    loop {
        let rows = engine.scan(layout::VECTOR, &from, VECTOR_ROWS)?;
        let ended = rows.len() < VECTOR_ROWS;
        for row in rows {
            // A row that can't be read counts as zero: the peers then send that origin once more.
            if let Some(origin) = layout::vector_origin(&row.key) {
                pairs.push((origin, row.value.ok().and_then(|value| layout::number(&value)).unwrap_or(0)));
            }
            from = [&row.key, &[0][..]].concat();
        }
        if ended {
            return Ok(pairs.into_iter().collect());
        }
    }
}

#[cfg(test)]
mod tests;
