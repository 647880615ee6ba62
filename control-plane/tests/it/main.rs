//! A control plane over real sockets, asked as operators, nodes and strangers ask.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod access;
mod backup;
mod document;
mod fleet;
mod freshness;
mod garbage;
mod homes;
mod joining;
mod placements;
mod plans;
mod registry;
mod releases;
mod restart;
mod roles;
mod rollouts;
mod secrets;
mod shared;
mod statuses;
mod stolen;
mod world;
