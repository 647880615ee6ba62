//! Stores in every place that they can be: one suite of behaviours for the mesh and for each backend, against real servers,
//! and what becomes of requests when these fail, or when the mesh changes its process.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod behaves;
mod fails;
mod moves;
mod place;
mod secured;
mod server;
