//! The program as a user meets it: real processes, real sockets, real peers.

#![allow(clippy::unwrap_used, clippy::print_stderr, missing_docs)]

mod attacked;
mod backends;
mod by_hand;
mod demo;
mod fleet;
mod front;
mod killed;
mod killed_node;
mod kv;
mod peers;
mod program;
mod refusals;
mod root;
mod rotation;
mod several;
mod takeover;
mod up;
mod verify;
mod wasm_clients;
