//! The replicated KV of Selvage.
//!
//! A write is stamped, committed to this node's engine, pushed to all others at once and merged there.
//! What a peer missed it gets after the next exchange of version vectors, from any peer that has it.
//!
//! [`Replica`] is the protocol: a state machine without sockets, clock or randomness of its own. [`Kv`] is what a
//! node uses: the replica, its engine and its links. The simulator runs the same replica.

#![cfg_attr(test, allow(clippy::unwrap_used, clippy::print_stderr))]

pub mod stamp;

pub mod entry;
pub mod record;

pub mod vector;

pub mod wire;

pub mod trust;
pub mod warrant;

pub mod frontier;
pub mod offset;
pub mod sketch;

mod planted;

pub mod engine;
mod layout;
mod place;
mod read;

pub mod replica;

pub mod home;

mod commit;
mod link;
mod roster;
pub mod session;
pub mod store;

pub mod offline;

#[cfg(test)]
mod simulator;

pub use entry::{Content, Dot, Entry, Key, Origin};
pub use home::Place;
pub use replica::{Action, Counts, Event, Replica, Written};
pub use roster::PeerAddr;
pub use session::Token;
pub use stamp::{Clock, Stamp};
pub use store::{
    Elsewhere, Holding, HomeCounts, HomeError, Identify, Kv, KvError, Listed, OpenError, Options, PeerStatus,
    PlacementCounts, PlacementError, PlacementStatus, Progress, Tls,
};
pub use trust::Trust;
pub use vector::VersionVector;
