//! Whole KVs on real sockets and real disks.

#![allow(clippy::unwrap_used, clippy::print_stderr)]

mod alone;
mod fleet;
mod forgery;
mod home;
mod mesh;
mod placement;
mod refusals;
mod regions;
mod slow;
mod terms;
