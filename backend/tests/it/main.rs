//! Stores in every place that they can be: one suite of behaviours for the mesh and for each backend, against real servers,
//! and what becomes of requests when these fail.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod behaves;
mod fails;
mod place;
mod secured;
mod server;
