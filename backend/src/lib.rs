//! Where a node's stores are: in its own replicated KV, the mesh, or in a backend, a server that keeps them in its place.
//!
//! [`Stores`] knows which store is where, and a [`Store`] is used the same way wherever it is: by guests' interfaces and by
//! operators. What each place can do is [`Abilities`]. A backend has one connection for each node, kept by `contact`: it is
//! made anew with growing pauses when it is lost, every wait on it is bounded, and who asks while it is away is told so.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod ability;
mod carry;
mod contact;
mod error;
mod mesh;
mod nats;
mod redis;
mod secret;
mod store;
mod stores;
mod tls;

pub use ability::{Abilities, Reach};
pub use carry::{Carrier, serve as serve_carried};
pub use contact::{BackendStatus, OUTCOMES};
pub use error::{BackendError, Moving, OpenError, StoreError, Trouble};
pub use mesh::Mesh;
pub use store::{Kept, Store};
pub use stores::{Backends, Stores, check};
