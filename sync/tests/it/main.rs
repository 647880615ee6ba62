//! Whole KVs on real sockets and real disks.

#![allow(clippy::unwrap_used)]

mod alone;
mod fleet;
mod forgery;
mod home;
mod mesh;
mod refusals;
mod terms;
