//! The documents that more than one part of Selvage reads: apps, releases, plans, node and control-plane
//! configuration, and the words they are made of.
//!
//! Everything here is parsed once and then valid. Nothing here knows tokio, a socket or a clock.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod app;
pub mod bundle;
pub mod control_plane;
pub mod digest;
pub mod front;
pub mod id;
pub mod invalid;
pub mod join;
pub mod key;
pub mod limits;
pub mod manifest;
pub mod node;
pub mod oci;
pub mod operator;
pub mod plan;
pub mod policy;
pub mod release;
pub mod rollout;
pub mod root;
pub mod signature;
pub mod snapshot;
pub mod spin_lock;

pub use digest::Digest;
pub use id::{AppName, ComponentName, NODES_APP, NodeName, PlacementName, Region, StoreLabel, StoreName};
pub use invalid::Invalid;
pub use key::{KeyId, PrivateKey, PublicKey};
pub use limits::Limits;
