//! What a store does on one machine: get, durable put, entries taken from peers, and bytes on disk for each key.
//!
//! `cargo bench -p selvage-sync --bench store`, or with names: `-- sled get put`. Everything is measured through the
//! engine that a node uses, with its envelopes, beside the disk's own floor (one `fdatasync` after another).

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::fs::File;
use std::io::Write as _;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selvage_config::StoreName;
use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_sync::{Kv, Options};

const KEYS: u64 = 100_000;
const VALUE_BYTES: usize = 100;
const GETS: u64 = 500_000;
/// Writers that wait for the disk at the same time.
const WRITERS: u64 = 1024;
const PUTS: Duration = Duration::from_secs(5);
const FLOOR: u32 = 500;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let wants = |word: &str, of: &[&str]| {
        let asked = words.iter().any(|known| of.contains(&known.as_str()));
        !asked || words.iter().any(|known| known == word)
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    floor();
    for engine in [KvEngine::Sled, KvEngine::Redb, KvEngine::Memory] {
        if wants(&engine.to_string(), &["sled", "redb", "memory"]) {
            let directory = tempfile::tempdir().unwrap();
            runtime.block_on(async {
                let kv = open(directory.path(), engine).await;
                load(&kv, engine).await;
                if wants("get", &["get", "put"]) {
                    get(&kv, engine);
                }
                if wants("put", &["get", "put"]) {
                    put(&kv, engine).await;
                }
                kv.close().await;
            });
        }
    }
}

/// What the disk takes for a write that is there after a power cut.
fn floor() {
    let directory = tempfile::tempdir().unwrap();
    let mut file = File::create(directory.path().join("floor")).unwrap();
    let mut times = Histogram::<u64>::new(3).unwrap();
    for _ in 0..FLOOR {
        let start = Instant::now();
        file.write_all(&[7; 200]).unwrap();
        file.sync_data().unwrap();
        times.record(nanos(start)).unwrap();
    }
    println!("floor   200 bytes and fdatasync: {}", shown(&times));
}

fn store() -> StoreName {
    "bench/default".parse().unwrap()
}

fn key(number: u64) -> String {
    format!("key-of-24-bytes-{number:08}")
}

async fn open(directory: &Path, engine: KvEngine) -> Kv {
    let options = Options::alone(
        "bench".parse().unwrap(),
        "here".parse().unwrap(),
        directory.to_owned(),
        Kept { engine, ..Kept::default() },
    );
    Kv::open(options, Arc::new(|_| None)).await.unwrap()
}

/// Puts by many writers; returns how many and how long each waited.
async fn puts(kv: &Kv, next: impl Fn(u64, u64) -> Option<u64> + Send + Sync + Clone + 'static) -> Histogram<u64> {
    let mut writers = tokio::task::JoinSet::new();
    for writer in 0..WRITERS {
        let (kv, next) = (kv.clone(), next.clone());
        writers.spawn(async move {
            let mut times = Histogram::<u64>::new(3).unwrap();
            let mut rng = StdRng::seed_from_u64(writer);
            let mut done = 0;
            while let Some(number) = next(writer, done) {
                let value: Vec<u8> = (0..VALUE_BYTES).map(|_| rng.random()).collect();
                let start = Instant::now();
                kv.set(&store(), &key(number), Bytes::from(value)).await.unwrap();
                times.record(nanos(start)).unwrap();
                done += 1;
            }
            times
        });
    }
    let mut all = Histogram::<u64>::new(3).unwrap();
    while let Some(times) = writers.join_next().await {
        all.add(times.unwrap()).unwrap();
    }
    all
}

async fn load(kv: &Kv, engine: KvEngine) {
    let start = Instant::now();
    puts(kv, |writer, done| Some(writer + done * WRITERS).filter(|number| *number < KEYS)).await;
    let seconds = start.elapsed().as_secs_f64();
    let stats = kv.stats().unwrap();
    let own = KEYS * (24 + VALUE_BYTES as u64);
    let metadata = (stats.records.bytes - own) / KEYS;
    println!(
        "{engine:<7} load of {KEYS} keys of 24 + {VALUE_BYTES} bytes: {:.0}/s; record's metadata {metadata} B/key, engine \
         {} B/key on disk",
        KEYS as f64 / seconds,
        stats.disk_bytes / KEYS
    );
}

fn get(kv: &Kv, engine: KvEngine) {
    let mut times = Histogram::<u64>::new(3).unwrap();
    let mut rng = StdRng::seed_from_u64(1);
    let (store, start) = (store(), Instant::now());
    for _ in 0..GETS {
        let key = key(rng.random_range(0..KEYS));
        let start = Instant::now();
        assert!(kv.get(&store, &key).unwrap().is_some());
        times.record(nanos(start)).unwrap();
    }
    println!("{engine:<7} get: {:.0}/s, {}", GETS as f64 / start.elapsed().as_secs_f64(), shown(&times));
}

async fn put(kv: &Kv, engine: KvEngine) {
    let start = Instant::now();
    let times = puts(kv, move |writer, done| {
        (start.elapsed() < PUTS).then_some((writer.wrapping_mul(7919) + done.wrapping_mul(104_729)) % KEYS)
    })
    .await;
    let rate = times.len() as f64 / start.elapsed().as_secs_f64();
    println!("{engine:<7} durable put, {WRITERS} writers: {rate:.0}/s, {}", shown(&times));
}

fn nanos(start: Instant) -> u64 {
    u64::try_from(start.elapsed().as_nanos()).unwrap_or(u64::MAX)
}

fn shown(times: &Histogram<u64>) -> String {
    let at = |quantile: f64| times.value_at_quantile(quantile) as f64 / 1000.0;
    format!("p50 {:.1} µs, p99 {:.1} µs, p99.9 {:.1} µs", at(0.5), at(0.99), at(0.999))
}
