//! A process killed at any moment, and any one flipped bit.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selvage_config::StoreName;
use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_sync::engine::{Batch, Engine, Settings, Vault};
use selvage_sync::{Kv, Options};

/// Tasks of a process that write at once.
const WRITERS: usize = 8;
/// Values of which each 64th is: kept as a file of its own.
const LARGE_BYTES: usize = 40_000;

pub(super) fn kept(engine: KvEngine) -> Kept {
    Kept { engine, cache_mib: 8, disk_free_mib_min: 0, ..Kept::default() }
}

pub(super) fn store() -> StoreName {
    "app/default".parse().unwrap()
}

async fn open(directory: &Path, engine: KvEngine) -> Kv {
    let options = Options::alone("a".parse().unwrap(), "fra".parse().unwrap(), directory.to_owned(), kept(engine));
    Kv::open(options, Arc::new(|_| None)).await.unwrap()
}

fn value(key: &str) -> Bytes {
    let large = key.ends_with("00");
    let mut value = key.repeat(if large { LARGE_BYTES / key.len() } else { 3 }).into_bytes();
    value.push(b'.');
    value.into()
}

pub(super) fn runtime() -> tokio::runtime::Runtime {
    tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap()
}

/// The process that is killed: it says every key whose write was acknowledged.
pub(super) fn write(directory: &Path, engine: KvEngine) {
    runtime().block_on(async {
        let kv = open(directory, engine).await;
        let life = std::process::id();
        let writers: Vec<_> = (0..WRITERS)
            .map(|writer| {
                let kv = kv.clone();
                tokio::spawn(async move {
                    for number in 0_u64.. {
                        let key = format!("{life}-{writer}-{number}");
                        kv.set(&store(), &key, value(&key)).await.unwrap();
                        kv.set(&store(), "shared", value(&key)).await.unwrap();
                        let mut out = std::io::stdout().lock();
                        // The parent reads until the process is dead; a closed pipe means that it has failed.
                        if writeln!(out, "{key}").and_then(|()| out.flush()).is_err() {
                            return;
                        }
                    }
                })
            })
            .collect();
        for writer in writers {
            writer.await.unwrap();
        }
    });
}

pub(super) fn kill(engine: KvEngine, rounds: u64) {
    let directory = tempfile::tempdir().unwrap();
    let runtime = runtime();
    let mut acknowledged: Vec<String> = Vec::new();
    let start = Instant::now();
    for round in 0..rounds {
        let mut child = Command::new(std::env::current_exe().unwrap())
            .args(["write", directory.path().to_str().unwrap(), &engine.to_string()])
            .stdout(Stdio::piped())
            .spawn()
            .unwrap();
        let out = child.stdout.take().unwrap();
        let mut lines = BufReader::new(out).lines();
        acknowledged.push(lines.next().expect("the first write is acknowledged").unwrap());
        let reader = std::thread::spawn(move || lines.map_while(Result::ok).collect::<Vec<String>>());
        std::thread::sleep(Duration::from_millis(rand::rng().random_range(1..400)));
        child.kill().unwrap();
        child.wait().unwrap();
        acknowledged.extend(reader.join().unwrap());
        runtime.block_on(async {
            let kv = open(directory.path(), engine).await;
            assert_eq!(kv.stats().unwrap().quarantined, None, "{engine}, round {round}");
            for key in &acknowledged {
                let found = kv.get(&store(), key).unwrap();
                assert!(found == Some(value(key)), "{engine}, round {round}: {key} was acknowledged and is lost");
            }
            kv.close().await;
        });
    }
    let vault = Vault::open(directory.path(), Settings::from(&kept(engine))).unwrap();
    let checked = vault.check(|_| ()).unwrap();
    assert_eq!((checked.corrupt, checked.recounted), (0, false), "{engine}: {checked:?}");
    println!(
        "{engine}: {rounds} kills, {} acknowledged writes, none lost, {:.1} s",
        acknowledged.len(),
        start.elapsed().as_secs_f64()
    );
}

/// What became of the rows after a flip.
#[derive(Debug, Default)]
struct Seen {
    aside: u64,
    refused: u64,
    told: u64,
    silent: u64,
    clean: u64,
}

pub(super) fn flip(engine: KvEngine, flips: u64) {
    let seed = std::env::var("SELVAGE_SEED").map_or_else(|_| rand::random(), |seed| seed.parse().unwrap());
    println!("{engine}: SELVAGE_SEED={seed}");
    let mut rng = StdRng::seed_from_u64(seed);
    let whole = tempfile::tempdir().unwrap();
    let rows = fill(engine, whole.path());
    let files = files_below(whole.path());
    let total: u64 = files.iter().map(|(_, length)| length).sum();
    let mut seen = Seen::default();
    let start = Instant::now();
    for number in 0..flips {
        let copy = tempfile::tempdir().unwrap();
        copy_below(whole.path(), copy.path());
        // Each byte is as likely as any other, in all files.
        let mut at = rng.random_range(0..total);
        let hit = files.iter().find(|(_, length)| match at.checked_sub(*length) {
            Some(rest) => {
                at = rest;
                false
            }
            None => true,
        });
        let (file, _) = hit.unwrap();
        let bit = rng.random_range(0..8);
        let path = copy.path().join(file);
        let mut bytes = std::fs::read(&path).unwrap();
        bytes[usize::try_from(at).unwrap()] ^= 1 << bit;
        std::fs::write(&path, bytes).unwrap();
        let place = format!("{engine}, flip {number} of seed {seed}: bit {bit} of byte {at} of {}", file.display());
        look(engine, copy.path(), &rows, &place, &mut seen);
    }
    println!(
        "{engine}: {flips} flips, no wrong value; {} moved aside, {} not opened, {} told by a read, {} only missing, \
         {} not met, {:.1} s",
        seen.aside,
        seen.refused,
        seen.told,
        seen.silent,
        seen.clean,
        start.elapsed().as_secs_f64()
    );
    assert!(flips < 20 || seen.clean < flips, "{engine}: no flip was ever met: {seen:?}");
}

/// A store of small, overwritten, deleted and large rows. Returns what must be there.
fn fill(engine: KvEngine, directory: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let vault = Vault::open(directory, Settings::from(&kept(engine))).unwrap();
    let mut rows = BTreeMap::new();
    for round in 0..3_u8 {
        for chunk in 0..10 {
            let mut batch = Batch::default();
            for number in 0..60 {
                let key = format!("dapp/default\0key-{chunk}-{number:012}").into_bytes();
                let length = if (chunk, number) == (3, 7) { LARGE_BYTES } else { 100 };
                let value: Vec<u8> = (0..length).map(|at| round ^ u8::try_from((at + number) % 251).unwrap()).collect();
                if round == 2 && number % 7 == 0 && length == 100 {
                    batch.remove(key.clone());
                    rows.remove(&key);
                } else {
                    batch.put(key.clone(), value.clone());
                    rows.insert(key, value);
                }
            }
            vault.apply(batch).unwrap();
            vault.flush().unwrap();
        }
    }
    rows
}

/// Opens a damaged directory as a node would, and reads everything.
fn look(engine: KvEngine, directory: &Path, rows: &BTreeMap<Vec<u8>, Vec<u8>>, place: &str, seen: &mut Seen) {
    let vault = match Vault::open(directory, Settings::from(&kept(engine))) {
        Ok(vault) => vault,
        Err(error) => {
            assert!(!error.is_corrupt(), "{place}: damage is moved aside, not refused: {error:?}");
            seen.refused += 1;
            return;
        }
    };
    let (mut told, mut missing) = (0, 0);
    for (key, value) in rows {
        match vault.get(key) {
            Ok(Some(found)) => assert!(found == *value, "{place}: a wrong value was served"),
            Ok(None) => missing += 1,
            Err(_) => told += 1,
        }
    }
    match vault.scan(b"d", b"", rows.len() + 100) {
        Ok(found) => {
            for row in found {
                match row.value {
                    Ok(value) => assert!(rows.get(row.key.as_ref()).is_some_and(|v| value == *v), "{place}: invented"),
                    Err(_) => told += 1,
                }
            }
        }
        Err(_) => told += 1,
    }
    let aside = vault.stats().is_ok_and(|stats| stats.quarantined.is_some());
    match (aside, told, missing) {
        (true, _, _) => seen.aside += 1,
        (false, 0, 0) => seen.clean += 1,
        (false, 0, _) => seen.silent += 1,
        (false, _, _) => seen.told += 1,
    }
}

pub(super) fn files_below(directory: &Path) -> Vec<(PathBuf, u64)> {
    let mut files = Vec::new();
    let mut folders = vec![directory.to_owned()];
    while let Some(folder) = folders.pop() {
        for entry in std::fs::read_dir(folder).unwrap() {
            let entry = entry.unwrap();
            let facts = entry.metadata().unwrap();
            if facts.is_dir() {
                folders.push(entry.path());
            } else if facts.len() > 0 {
                files.push((entry.path().strip_prefix(directory).unwrap().to_owned(), facts.len()));
            }
        }
    }
    files.sort();
    files
}

pub(super) fn copy_below(from: &Path, to: &Path) {
    for (file, _) in files_below(from) {
        let target = to.join(&file);
        std::fs::create_dir_all(target.parent().unwrap()).unwrap();
        std::fs::copy(from.join(&file), target).unwrap();
    }
}
