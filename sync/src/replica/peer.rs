//! What a replica knows of one connected peer.

use std::collections::{BTreeMap, BTreeSet};

use bytes::Bytes;
use selvage_config::{NodeName, Region};

use super::Action;
use super::push::{FLEET_NODES, REGION_NODES, Way};
use crate::entry::{Dot, Origin};
use crate::frontier::{EPOCH_MS, GRACE_MS};
use crate::sketch::Item;
use crate::vector::VersionVector;
use crate::wire::{self, BATCH_BYTES, Reach};

/// Bytes that may wait to be sent to one peer.
pub const PEER_QUEUE_BYTES_MAX: usize = 8 * 1024 * 1024;

/// Frames that may wait to be sent to one peer.
pub const PEER_QUEUE_FRAMES_MAX: usize = 4096;

/// First wait before a peer that did not take a catch-up is offered it again, milliseconds. It doubles.
const RETRY_MS_MIN: u64 = 1_000;

/// Longest such wait, milliseconds.
const RETRY_MS_MAX: u64 = 30_000;

/// How long a peer that is behind may acknowledge nothing more before it is offered what it lacks: a push was lost on it.
const STALLED_MS: u64 = 3_000;

/// Bytes of a catch-up that wait to be sent at a time; the rest is read when they have left.
const WINDOW_BYTES: usize = 1024 * 1024;

/// Entries in one batch.
const BATCH_ENTRIES_MAX: usize = 2048;

/// Bytes of a snapshot that are sent to one peer in a tick: 64 MiB in a second.
const SNAPSHOT_BYTES: usize = 16 * 1024 * 1024;

/// Writes that a peer must have for a node without any to take a snapshot of it rather than catch up.
const SNAPSHOT_WRITES: u64 = 10_000;

/// Entries from the future that are kept until they are due.
const FUTURE_ENTRIES: usize = 10_000;

/// The sizes and times that a replica works with. The simulator makes them small, so that a few writes reach them.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    pub(crate) queue_bytes: usize,
    pub(crate) queue_frames: usize,
    pub(crate) window_bytes: usize,
    pub(crate) batch_bytes: usize,
    pub(crate) batch_entries: usize,
    pub(crate) snapshot_bytes: usize,
    pub(crate) snapshot_writes: u64,
    pub(crate) future_entries: usize,
    /// Nodes of a fleet, and of a region, that are too few for relays.
    pub(crate) fleet_nodes: usize,
    pub(crate) region_nodes: usize,
    /// Ticks without a part of a snapshot after which its source is asked again, or another.
    pub(crate) silent_ticks: u64,
    /// Ticks in which a peer that passed on a forged write is not asked for a snapshot.
    pub(crate) forger_ticks: u64,
    /// Ticks between two promises: each is one flush.
    pub(crate) promise_ticks: u64,
    /// Ticks between two times that promises of others are passed on.
    pub(crate) rows_ticks: u64,
    /// Ticks between two proofs with a peer.
    pub(crate) prove_ticks: u64,
    pub(crate) grace_ms: u64,
    pub(crate) epoch_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue_bytes: PEER_QUEUE_BYTES_MAX,
            queue_frames: PEER_QUEUE_FRAMES_MAX,
            window_bytes: WINDOW_BYTES,
            batch_bytes: BATCH_BYTES,
            batch_entries: BATCH_ENTRIES_MAX,
            snapshot_bytes: SNAPSHOT_BYTES,
            snapshot_writes: SNAPSHOT_WRITES,
            future_entries: FUTURE_ENTRIES,
            fleet_nodes: FLEET_NODES,
            region_nodes: REGION_NODES,
            silent_ticks: 40,
            forger_ticks: 2_400,
            promise_ticks: 20,
            rows_ticks: 60,
            prove_ticks: 120,
            grace_ms: GRACE_MS,
            epoch_ms: EPOCH_MS,
        }
    }
}

/// How the link to a peer stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Health {
    /// The peer.
    pub node: NodeName,
    /// Bytes that wait to be sent.
    pub queued_bytes: usize,
    /// How many of this node's writes it has not acknowledged.
    pub lag: u64,
    /// When it last said something, milliseconds since the Unix epoch.
    pub heard_ms: u64,
    /// How far its clock is ahead of this one's, milliseconds, if that is known.
    pub ahead_ms: Option<i64>,
}

/// What waits to be sent.
#[derive(Debug, Default)]
pub(super) struct Queued {
    pub(super) frames: usize,
    pub(super) bytes: usize,
}

impl Queued {
    pub(super) fn has_room(&self, limits: &Limits, bytes: usize) -> bool {
        self.frames < limits.queue_frames && self.bytes + bytes <= limits.queue_bytes
    }

    pub(super) fn take(&mut self, frames: usize, bytes: usize) {
        self.frames = self.frames.saturating_sub(frames);
        self.bytes = self.bytes.saturating_sub(bytes);
    }
}

/// A catch-up that runs.
#[derive(Debug, Default)]
pub(super) struct CatchUp {
    /// Of every origin, up to where the peer has it or it was sent.
    pub(super) cursors: BTreeMap<Origin, u64>,
    /// Of an origin with an unreadable entry, the last write before it: no more of it may be called complete.
    pub(super) caps: BTreeMap<Origin, u64>,
}

/// A snapshot that is sent.
#[derive(Debug, Default)]
pub(super) struct Snapshot {
    /// The last row that was sent.
    pub(super) place: Vec<u8>,
    /// What we had when it began.
    pub(super) vector: VersionVector,
    /// How far we had come.
    pub(super) reach: Reach,
    /// Bytes that may still be sent in this tick.
    pub(super) allowance: usize,
}

/// What the peer is sent.
#[derive(Debug)]
pub(super) enum Stream {
    /// Nothing but our hello: we don't know yet what it has.
    Greeting,
    /// Nothing: it needs a snapshot, of us or of another, or we need one.
    Held,
    /// All we have, in the order of keys.
    Snapshot(Snapshot),
    /// All it lacks.
    CatchUp(CatchUp),
    /// Local writes as they happen.
    Live,
    /// Nothing: it has not acknowledged what it was pushed a while ago. Once it has, it gets what was written meanwhile by
    /// a catch-up, of every key the last state.
    Behind { heard_ms: u64 },
}

/// One link.
#[derive(Debug)]
pub(super) struct Peer {
    pub(super) session: u64,
    /// The version that both speak.
    pub(super) version: u16,
    /// How this node's writes reach it, and how much it is liked as a relay of them.
    pub(super) way: Way,
    pub(super) rank: u64,
    /// The last of its own writes that were passed on for it on this link.
    pub(super) passed_on: Option<Dot>,
    /// What it said it has.
    pub(super) vector: VersionVector,
    pub(super) stream: Stream,
    pub(super) queued: Queued,
    pub(super) heard_ms: u64,
    /// What it was pushed since the last look, and before.
    pushed: VersionVector,
    awaited: VersionVector,
    /// Its vector at the last look, and at the one before.
    pub(super) recent: VersionVector,
    pub(super) settled: VersionVector,
    /// How far it said it has come.
    pub(super) reach: Reach,
    /// What it was last told we have.
    pub(super) announced: VersionVector,
    /// When it said its newest ping, by its clock, and when that came, by ours.
    pub(super) ping: Option<(u64, u64)>,
    /// Items that only we have, by the last proof: sent once it answered.
    pub(super) ours: Vec<Item>,
    /// We refused entries of the catch-up that it sends, or gave some up that it builds on, so its claim at the end won't
    /// be true.
    pub(super) refused: bool,
    /// Origins whose keys it was sent.
    pub(super) introduced: BTreeSet<Origin>,
    retry_at_ms: u64,
    retry_ms: u64,
}

impl Peer {
    pub(super) fn new(session: u64, now_ms: u64) -> Self {
        Self {
            session,
            version: wire::VERSIONS.min,
            way: Way::Far,
            rank: 0,
            passed_on: None,
            vector: VersionVector::default(),
            stream: Stream::Greeting,
            queued: Queued::default(),
            heard_ms: now_ms,
            pushed: VersionVector::default(),
            awaited: VersionVector::default(),
            recent: VersionVector::default(),
            settled: VersionVector::default(),
            reach: Reach::default(),
            announced: VersionVector::default(),
            ping: None,
            ours: Vec::new(),
            refused: false,
            introduced: BTreeSet::new(),
            retry_at_ms: 0,
            retry_ms: RETRY_MS_MIN,
        }
    }

    pub(super) fn is_live(&self) -> bool {
        matches!(self.stream, Stream::Live)
    }

    /// Whether it said hello.
    pub(super) fn greeted(&self) -> bool {
        !matches!(self.stream, Stream::Greeting)
    }

    /// The region whose relays this node's writes reach it through, if they do.
    pub(super) fn through(&self) -> Option<&Region> {
        match &self.way {
            Way::Through(region) if self.version >= wire::RELAYS_SINCE => Some(region),
            Way::Through(_) | Way::Near | Way::Far => None,
        }
    }

    /// Whether what others wrote is passed on to it.
    pub(super) fn takes_relayed(&self) -> bool {
        self.way == Way::Near && self.version >= wire::RELAYS_SINCE
    }

    /// Sends it what was just written, if it has all before. Where there is no room for that its queue is not fed any more
    /// (bounded memory), and it catches up when that has drained. What was overwritten meanwhile it never gets.
    pub(super) fn push(&mut self, name: &NodeName, frame: &Bytes, last: &Dot, limits: &Limits) -> Option<Action> {
        if !self.is_live() {
            return None;
        }
        if frame.len() <= wire::FRAME_BYTES_MAX && self.queued.has_room(limits, frame.len()) {
            self.pushed.lift(&last.origin, last.seq);
            return Some(self.send(name, frame.clone()));
        }
        self.catch_up();
        None
    }

    pub(super) fn send(&mut self, name: &NodeName, frame: Bytes) -> Action {
        self.queued.frames += 1;
        self.queued.bytes += frame.len();
        Action::Send { peer: name.clone(), session: self.session, frame }
    }

    /// Begins to send all that it lacks by its own last word.
    pub(super) fn catch_up(&mut self) {
        self.catch_up_from(&self.vector.clone());
    }

    /// Begins to send all that is not covered by this.
    pub(super) fn catch_up_from(&mut self, vector: &VersionVector) {
        let cursors = vector.iter().map(|(origin, seq)| (origin.clone(), seq)).collect();
        self.stream = Stream::CatchUp(CatchUp { cursors, caps: BTreeMap::new() });
    }

    /// Looks whether it has acknowledged what it was pushed before the last look. If not, the line to it or it itself is too
    /// slow, and what is pushed on top of that would only wait there.
    pub(super) fn look(&mut self, now_ms: u64) {
        self.settled = std::mem::replace(&mut self.recent, self.vector.clone());
        if !self.vector.lacks(&self.awaited) {
            self.awaited = std::mem::take(&mut self.pushed);
            return;
        }
        self.awaited.set(&std::mem::take(&mut self.pushed));
        if self.is_live() {
            self.stream = Stream::Behind { heard_ms: now_ms };
        }
    }

    /// Takes the word of one that is behind: it has all that it was pushed, or some more of it, or it stays where it is.
    fn comes_on(&mut self, now_ms: u64, before: &VersionVector) {
        let Stream::Behind { heard_ms } = &mut self.stream else { return };
        let lacks = |what: &VersionVector| self.vector.lacks(what);
        if !lacks(&self.awaited) && !lacks(&self.pushed) {
            self.catch_up();
        } else if self.awaited.iter().any(|(origin, _)| self.vector.get(origin) > before.get(origin)) {
            *heard_ms = now_ms;
        } else if now_ms >= *heard_ms + STALLED_MS {
            self.stream = Stream::Live;
        }
    }

    /// Takes its word on what it has, and begins a catch-up if it lacks what was `settled` here long enough that
    /// a push would have arrived. One that stays behind (it refuses entries, say) is offered them ever less often.
    pub(super) fn reported(&mut self, now_ms: u64, vector: &VersionVector, settled: &VersionVector) {
        let before = self.awaited.meet(&self.vector);
        self.vector.set(vector);
        self.comes_on(now_ms, &before);
        if !self.vector.lacks(settled) {
            self.retry_ms = RETRY_MS_MIN;
        } else if self.is_live() && self.queued.frames == 0 && now_ms >= self.retry_at_ms {
            self.retry_at_ms = now_ms + self.retry_ms;
            self.retry_ms = (self.retry_ms * 2).min(RETRY_MS_MAX);
            self.catch_up();
        }
    }

    /// Entries arrived here that a running catch-up has passed already: it goes back to them, or its claim at the
    /// end would cover what it never sent.
    pub(super) fn revisit(&mut self, arrived: &[Dot]) {
        let Stream::CatchUp(catch_up) = &mut self.stream else { return };
        for dot in arrived {
            if let Some(cursor) = catch_up.cursors.get_mut(&dot.origin) {
                *cursor = (*cursor).min(dot.seq - 1);
            }
        }
    }
}
