//! The behaviour of a node, seen from outside.

#![allow(clippy::unwrap_used)]

mod admin;
mod front;
mod guest;
mod release;
