//! The worker: it listens, finds the route, applies its policy, leases an instance and calls the guest.
//!
//! Read a request in this order: [`listen`] → [`request`] → [`route`] → [`admit`] → [`mod@line`] → [`jwt`] → [`pool`] → [`guest`] →
//! [`host`]; [`serve`] names the steps. A release: [`release`]. A write: [`host`] → `selvage_sync`.

#![cfg_attr(test, allow(clippy::unwrap_used))]

pub mod node;

pub mod listen;

mod names;
pub mod request;

pub mod serve;

pub mod route;

pub mod admit;

pub mod line;

pub mod jwt;

pub mod pool;

pub mod guest;

pub mod host;

pub mod engine;

pub mod release;

pub mod acme;
pub mod admin;
pub mod fault;
pub mod metrics;

pub use node::{Addresses, Node, StartError, UpOptions};
