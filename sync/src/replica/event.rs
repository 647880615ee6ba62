//! What happens to a replica, and what it then wants done.

use std::collections::BTreeMap;

use bytes::Bytes;
use selvage_config::{NodeName, Region};

use crate::engine::Batch;
use crate::entry::{CONTEXT_MAX, Dot, Entry, Key};
use crate::record::NotCounter;
use crate::wire::Message;

/// A local write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write {
    /// The key has this value from now on.
    Set {
        /// The value.
        value: Bytes,
        /// When it ends to exist, milliseconds since the Unix epoch.
        expires_ms: Option<u64>,
    },
    /// The key does not exist from now on.
    Delete,
    /// The counter is changed by this.
    Increment {
        /// By how much.
        delta: i64,
        /// When this node's share ends to exist, unless it has one already that does at another time.
        expires_ms: Option<u64>,
    },
    /// The key has this value beside those that others write at the same time.
    Beside {
        /// The value.
        value: Bytes,
        /// When it ends to exist, milliseconds since the Unix epoch.
        expires_ms: Option<u64>,
    },
}

/// A write that was made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Written {
    /// Its dot: whoever covers it has it.
    pub dot: Dot,
    /// The counter's value, after an increment.
    pub counted: Option<i64>,
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
    /// The nodes of the roster, with this one, and where they are.
    Roster(BTreeMap<NodeName, Region>),
    /// A reader found a record corrupt: it is asked of the peers.
    Heal(Key),
    /// [`TICK_MS`](super::TICK_MS) passed.
    Tick,
}

/// What shall be done, in this order.
#[derive(Debug)]
pub enum Action {
    /// Apply this before the next event.
    Commit(Batch),
    /// Make all that was committed durable before what follows, though nobody wrote.
    Flush,
    /// The write is done, once what was committed is durable.
    Done {
        /// Of which write.
        ticket: u64,
        /// How it went.
        result: Result<Written, WriteError>,
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
    /// This node's clock is too far from the others'.
    #[error("the clock is unsafe: {ahead_ms} ms from the fleet's")]
    ClockUnsafe {
        /// How far the fleet's time is ahead.
        ahead_ms: i64,
    },
    /// Too many nodes wrote siblings of this key since it was last set.
    #[error("over {CONTEXT_MAX} nodes wrote beside each other")]
    Crowded,
}

/// What an operator may want to know.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Notice {
    /// A record failed its checksum.
    Corrupt {
        /// Where.
        key: Key,
    },
    /// Entries with stamps from the future were kept aside until they are due, or refused if these are too many.
    Future {
        /// Who sent them.
        peer: NodeName,
        /// How many.
        entries: usize,
    },
    /// Entries were refused: they are older than what was collected here, and their sender does not know that.
    Stale {
        /// Who sent them.
        peer: NodeName,
        /// How many.
        entries: usize,
    },
    /// Entries came that are not proved to be of their origins. They were not taken, and the link was ended unless their
    /// sender may be honest.
    Forged {
        /// Who sent them.
        peer: NodeName,
        /// How many were in the frame.
        entries: usize,
    },
    /// For long a node has had something else than this one of what no promise covers, or said nothing at all, so nothing is
    /// collected here. It is told once.
    Apart {
        /// Which.
        node: NodeName,
        /// Since when, milliseconds since the Unix epoch.
        since_ms: u64,
    },
    /// A write reached nobody of the roster before all of it collected what is as old: it is given up.
    Discarded {
        /// The write.
        entry: Box<Entry>,
    },
    /// All of a peer's state was taken.
    Bootstrapped {
        /// Whose.
        peer: NodeName,
    },
    /// A proof found entries that a peer lacks or that are lacking here, older than any push takes.
    Diverged {
        /// From whom.
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

/// What was counted since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Counts {
    /// Writes that lost against one whose writer had not seen them, as far as this node took part.
    pub conflicts: u64,
    /// Entries from the future.
    pub future: u64,
    /// Entries refused for their age, and own writes given up.
    pub stale: u64,
    /// Entries refused since nothing proves that their origins wrote them.
    pub forged: u64,
    /// Entries of past origins that were taken on a peer's word, since nobody can vouch for their keys any more.
    pub hearsay: u64,
    /// Mortal entries that were collected.
    pub collected: u64,
    /// Old differences that proofs found.
    pub diverged: u64,
    /// Proofs that found none.
    pub proved: u64,
}
