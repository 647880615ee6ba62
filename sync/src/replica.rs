//! The replica: what a node does with a write, a peer and a peer's message.
//!
//! A state machine of (state, now, event). It reads its engine and changes it only through [`Action::Commit`],
//! which the caller applies before the next event. It sends only through [`Action::Send`], which the caller does
//! after what was committed with it is durable: a peer must never know of a write that a crash can take back,
//! since its number would be given twice.
//!
//! The promise (sync.md invariant K4): of every origin, all writes up to `vector[origin]` were applied here, or
//! what superseded them was.

mod catch_up;
mod peer;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use selvage_config::NodeName;

use crate::engine::{Batch, Engine, EngineError};
use crate::entry::{Content, Dot, Entry, Key, Origin, Version};
use crate::layout;
use crate::read::{self, ReadError};
use crate::record::{Merge, NotCounter, Record};
use crate::stamp::{Clock, Stamp};
use crate::vector::VersionVector;
use crate::wire::{self, Message};

pub(crate) use peer::Limits;
use peer::Peer;
pub use peer::{Health, PEER_QUEUE_BYTES_MAX, PEER_QUEUE_FRAMES_MAX};

/// How often the caller shall send [`Event::Tick`], milliseconds.
pub const TICK_MS: u64 = 250;

/// Ticks between two looks at the vector. A peer that lacks what was here two looks ago did not get it by a push.
const SETTLE_TICKS: u64 = 4;

/// Rows of the version vector read at once at the start.
const VECTOR_ROWS: usize = 1024;

/// A local write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// The key has this value from now on.
    Set(Bytes),
    /// The key does not exist from now on.
    Delete,
    /// The counter is changed by this.
    Increment(i64),
}

/// What happened.
#[derive(Debug)]
pub enum Event {
    /// This node writes.
    Write {
        /// Comes back in [`Action::Done`].
        ticket: u64,
        /// Where.
        key: Key,
        /// What.
        write: Write,
    },
    /// A link to a peer stands. It replaces an older one.
    Connected {
        /// Who.
        peer: NodeName,
        /// Which link; never used twice.
        session: u64,
    },
    /// A link ended.
    Disconnected {
        /// Who.
        peer: NodeName,
        /// Which link.
        session: u64,
    },
    /// A frame came in.
    Received {
        /// From whom.
        peer: NodeName,
        /// On which link.
        session: u64,
        /// What it says.
        message: Message,
    },
    /// Frames left the queue of a link.
    Sent {
        /// To whom.
        peer: NodeName,
        /// On which link.
        session: u64,
        /// How many.
        frames: usize,
        /// How long they were together.
        bytes: usize,
    },
    /// [`TICK_MS`] passed.
    Tick,
}

/// What shall be done, in this order.
#[derive(Debug)]
pub enum Action {
    /// Apply this before the next event.
    Commit(Batch),
    /// The write is done, once what was committed is durable. An increment tells the counter's value.
    Done {
        /// Of which write.
        ticket: u64,
        /// How it went.
        result: Result<Option<i64>, WriteError>,
    },
    /// Send this once what was committed is durable.
    Send {
        /// To whom.
        peer: NodeName,
        /// On which link.
        session: u64,
        /// The whole frame.
        frame: Bytes,
    },
    /// End this link.
    Close {
        /// To whom.
        peer: NodeName,
        /// Which.
        session: u64,
        /// Why, for the log.
        why: &'static str,
    },
    /// Tell somebody.
    Notify(Notice),
}

/// Why a local write was not made.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum WriteError {
    /// It can't be counted with.
    #[error(transparent)]
    NotCounter(#[from] NotCounter),
    /// What is there can't be read, so nothing can be added to it.
    #[error("the record is corrupt")]
    Corrupt,
}

/// What an operator may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A record failed its checksum.
    Corrupt {
        /// Where.
        key: Key,
    },
    /// Entries with stamps from the future were refused. They come again.
    Refused {
        /// Who sent them.
        peer: NodeName,
        /// How many.
        entries: usize,
    },
    /// A peer has more of our writes than we: our directory is an old copy. We go on as a new incarnation.
    Rewound {
        /// Who told us.
        peer: NodeName,
        /// Who we are now.
        incarnation: u64,
    },
}

/// The replicated state of one node.
pub struct Replica {
    engine: Arc<dyn Engine>,
    origin: Origin,
    clock: Clock,
    vector: VersionVector,
    /// All origins that have rows, also those whose first write is still missing.
    origins: BTreeSet<Origin>,
    /// The vector at the last look, and at the one before.
    recent: VersionVector,
    settled: VersionVector,
    ticks: u64,
    peers: BTreeMap<NodeName, Peer>,
    limits: Limits,
}

/// Changes of one event, before they are committed.
#[derive(Default)]
struct Draft {
    records: BTreeMap<Key, Record>,
    batch: Batch,
    /// Dots that are in a record now.
    kept: Vec<Dot>,
    notices: Vec<Notice>,
}

impl Replica {
    /// The replica of `node` as the engine has it. In an empty engine it begins a new incarnation, which `salt`
    /// tells apart from one begun in the same millisecond.
    pub fn open(engine: Arc<dyn Engine>, node: NodeName, now_ms: u64, salt: u16) -> Result<Self, EngineError> {
        let vector = stored_vector(engine.as_ref())?;
        let incarnation = match stored_incarnation(engine.as_ref(), &node)? {
            Stored::GoOn(incarnation) => incarnation,
            Stored::After(last) => {
                let incarnation = (Stamp::at_ms(now_ms).0 | u64::from(salt)).max(last.saturating_add(1));
                let mut batch = Batch::default();
                batch.put(layout::INCARNATION.to_vec(), incarnation.to_be_bytes().to_vec());
                let origin = Origin { node: node.clone(), incarnation };
                batch.put(layout::vector(&origin), 0_u64.to_be_bytes().to_vec());
                engine.apply(batch)?;
                engine.flush()?;
                incarnation
            }
        };
        let high_water = fact(engine.as_ref(), layout::CLOCK)?.unwrap_or(0);
        Ok(Self {
            engine,
            origin: Origin { node, incarnation },
            clock: Clock::resume(Stamp(high_water)),
            origins: vector.iter().map(|(origin, _)| origin.clone()).collect(),
            recent: vector.clone(),
            settled: vector.clone(),
            vector,
            ticks: 0,
            peers: BTreeMap::new(),
            limits: Limits::default(),
        })
    }

    /// Takes one event, returns what to do. Any order of events may be replayed in a test. After an error nothing
    /// of the event was done; a link whose message it was must be closed.
    pub fn handle(&mut self, now_ms: u64, event: Event) -> Result<Vec<Action>, EngineError> {
        match event {
            Event::Write { ticket, key, write } => self.write(now_ms, ticket, key, write),
            Event::Connected { peer, session } => Ok(self.connected(now_ms, peer, session)),
            Event::Disconnected { peer, session } => {
                if self.peers.get(&peer).is_some_and(|known| known.session == session) {
                    self.peers.remove(&peer);
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
            Event::Tick => self.tick(),
        }
    }

    /// The same replica with small limits, which a few writes reach.
    #[cfg(test)]
    pub(crate) fn with_limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Who this node is among origins.
    pub fn origin(&self) -> &Origin {
        &self.origin
    }

    /// What this node has.
    pub fn vector(&self) -> &VersionVector {
        &self.vector
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
            })
            .collect()
    }

    fn session(&mut self, peer: &NodeName, session: u64) -> Option<&mut Peer> {
        self.peers.get_mut(peer).filter(|known| known.session == session)
    }

    fn write(&mut self, now_ms: u64, ticket: u64, key: Key, write: Write) -> Result<Vec<Action>, EngineError> {
        let (content, counted) = match write {
            Write::Set(value) => (Content::Value(value), None),
            Write::Delete => (Content::Tombstone, None),
            Write::Increment(delta) => match self.increment(&key, delta)? {
                Ok((content, value)) => (content, Some(value)),
                Err(error) => return Ok(vec![Action::Done { ticket, result: Err(error) }]),
            },
        };
        let stamp = self.clock.tick(now_ms);
        let seq = self.vector.get(&self.origin) + 1;
        let version = Version { stamp, dot: Dot { origin: self.origin.clone(), seq } };
        let entry = Entry { key, version, content };
        let mut draft = Draft::default();
        self.merge(&mut draft, entry.clone())?;
        self.vector.lift(&self.origin, seq);
        let mut actions = self.finish(draft, [self.origin.clone()]);
        actions.push(Action::Done { ticket, result: Ok(counted) });
        self.push(entry, &mut actions);
        Ok(actions)
    }

    fn increment(&self, key: &Key, delta: i64) -> Result<Result<(Content, i64), WriteError>, EngineError> {
        match read::record(self.engine.as_ref(), key) {
            Ok(record) => Ok(record.increment(&self.origin, delta).map_err(WriteError::from)),
            Err(ReadError::Corrupt(_)) => Ok(Err(WriteError::Corrupt)),
            Err(ReadError::Engine(error)) => Err(error),
        }
    }

    /// Merges an entry into the draft. A corrupt record counts as empty: what replaces it heals it.
    fn merge(&self, draft: &mut Draft, entry: Entry) -> Result<(), EngineError> {
        if !draft.records.contains_key(&entry.key) {
            let record = match read::record(self.engine.as_ref(), &entry.key) {
                Ok(record) => record,
                Err(ReadError::Corrupt(_)) => {
                    draft.notices.push(Notice::Corrupt { key: entry.key.clone() });
                    Record::default()
                }
                Err(ReadError::Engine(error)) => return Err(error),
            };
            draft.records.insert(entry.key.clone(), record);
        }
        let record = draft.records.get_mut(&entry.key).expect("inserted above");
        let dot = entry.version.dot.clone();
        let row = layout::record(&entry.key);
        if let Merge::Kept(superseded) = record.merge(entry) {
            for old in superseded {
                draft.batch.remove(layout::index(&old));
            }
            draft.batch.put(layout::index(&dot), row);
            draft.kept.push(dot);
        }
        Ok(())
    }

    /// Makes the draft a commit, with the rows of the vector of `lifted` origins.
    fn finish(&mut self, draft: Draft, lifted: impl IntoIterator<Item = Origin>) -> Vec<Action> {
        let Draft { records, mut batch, kept, notices } = draft;
        let mut origins: BTreeSet<Origin> = lifted.into_iter().collect();
        for dot in &kept {
            // An origin's first row makes it known, though nothing of it may be complete yet.
            if self.origins.insert(dot.origin.clone()) {
                origins.insert(dot.origin.clone());
            }
        }
        for (key, record) in records {
            if record != Record::default() {
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
            peer.revisit(&kept);
        }
        let mut actions: Vec<Action> = notices.into_iter().map(Action::Notify).collect();
        if !batch.is_empty() {
            actions.push(Action::Commit(batch));
        }
        actions
    }

    /// Sends a local write to every peer that has all before it. The others get it by their catch-up.
    fn push(&mut self, entry: Entry, actions: &mut Vec<Action>) {
        if !self.peers.values().any(Peer::is_live) {
            return;
        }
        let frame = wire::encode(&Message::Batch { entries: vec![entry], complete: None });
        for (name, peer) in &mut self.peers {
            if !peer.is_live() {
                continue;
            }
            if peer.queued.has_room(&self.limits, frame.len()) {
                actions.push(peer.send(name, frame.clone()));
            } else {
                // Bounded memory: the queue is not fed any more, and the peer catches up when it has drained.
                peer.catch_up();
            }
        }
    }

    fn connected(&mut self, now_ms: u64, name: NodeName, session: u64) -> Vec<Action> {
        let mut peer = Peer::new(session, now_ms);
        let hello =
            Message::Hello { versions: wire::VERSIONS, node: self.origin.node.clone(), vector: self.vector.clone() };
        let action = peer.send(&name, wire::encode(&hello));
        self.peers.insert(name, peer);
        vec![action]
    }

    fn tick(&mut self) -> Result<Vec<Action>, EngineError> {
        self.ticks += 1;
        let look = self.ticks.is_multiple_of(SETTLE_TICKS);
        if look {
            self.settled = std::mem::replace(&mut self.recent, self.vector.clone());
        }
        let mut actions = Vec::new();
        let names: Vec<NodeName> = self.peers.keys().cloned().collect();
        for name in names {
            self.announce(&name, look, &mut actions);
            self.pump(&name, &mut actions)?;
        }
        Ok(actions)
    }

    /// Tells a peer what we have, if that changed or `always`.
    fn announce(&mut self, name: &NodeName, always: bool, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get_mut(name).filter(|peer| peer.greeted()) else { return };
        if !always && peer.announced.as_ref() == Some(&self.vector) {
            return;
        }
        let frame = wire::encode(&Message::Announce { vector: self.vector.clone() });
        if peer.queued.has_room(&self.limits, frame.len()) {
            peer.announced = Some(self.vector.clone());
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
enum Stored {
    /// To go on as this one.
    GoOn(u64),
    /// To begin one after this, 0 if none is known: how far it has written can't be read, and it would give numbers
    /// twice (sync.md invariant K5).
    After(u64),
}

fn stored_incarnation(engine: &dyn Engine, node: &NodeName) -> Result<Stored, EngineError> {
    let Some(incarnation) = fact(engine, layout::INCARNATION)? else { return Ok(Stored::After(0)) };
    let origin = Origin { node: node.clone(), incarnation };
    let Some(written) = fact(engine, &layout::vector(&origin))? else { return Ok(Stored::After(incarnation)) };
    let beyond = layout::index(&Dot { origin: origin.clone(), seq: written.saturating_add(1) });
    let known = engine.scan(&layout::indices(&origin), &beyond, 1)?.is_empty();
    Ok(if known { Stored::GoOn(incarnation) } else { Stored::After(incarnation) })
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
