//! A control plane over real sockets, asked as operators, nodes and strangers ask.

#![allow(clippy::unwrap_used)]

mod access;
mod fleet;
mod freshness;
mod garbage;
mod plans;
mod registry;
mod releases;
mod restart;
mod world;
