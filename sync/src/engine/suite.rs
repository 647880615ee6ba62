//! One suite for all engines: what each does by itself, and what each does within the vault.

use std::path::Path;
use std::sync::Arc;

use selvage_config::node::KvEngine;

use super::vault::INLINE_BYTES_MAX;
use super::*;
use crate::layout::class_of;

const CACHE_BYTES: u64 = 4 << 20;
const ON_DISK: [KvEngine; 2] = [KvEngine::Sled, KvEngine::Redb];

fn settings(engine: KvEngine) -> Settings {
    Settings { engine, cache_bytes: CACHE_BYTES, disk_free_bytes_min: 0, class_of, damage: Damage::MoveAside }
}

fn vault(engine: KvEngine, directory: &Path) -> Vault {
    Vault::open(directory, settings(engine)).unwrap()
}

fn bare(engine: KvEngine, directory: &Path) -> Arc<dyn Engine> {
    match engine {
        KvEngine::Sled => Arc::new(Sled::open(directory, CACHE_BYTES).unwrap()),
        KvEngine::Redb => Arc::new(Redb::open(directory, CACHE_BYTES).unwrap()),
        KvEngine::Memory => Arc::new(Memory::default()),
    }
}

fn tree_bytes(path: &Path) -> u64 {
    let bytes = |entry: std::fs::DirEntry| match entry.metadata().unwrap() {
        facts if facts.is_dir() => tree_bytes(&entry.path()),
        facts => facts.len(),
    };
    std::fs::read_dir(path).unwrap().map(|entry| bytes(entry.unwrap())).sum()
}

fn record(name: &str) -> Vec<u8> {
    [b"dapp/default\0", name.as_bytes()].concat()
}

fn put(engine: &dyn Engine, key: Vec<u8>, value: &[u8]) {
    let mut batch = Batch::default();
    batch.put(key, value.to_vec());
    engine.apply(batch).unwrap();
}

fn remove(engine: &dyn Engine, key: Vec<u8>) {
    let mut batch = Batch::default();
    batch.remove(key);
    engine.apply(batch).unwrap();
}

fn keys(engine: &dyn Engine, prefix: &str, from: &str, limit: usize) -> Vec<Bytes> {
    let rows = engine.scan(prefix.as_bytes(), from.as_bytes(), limit).unwrap();
    rows.into_iter().map(|row| row.key).collect()
}

/// `between` is called between changes: a flush or nothing.
fn conforms(engine: &dyn Engine, between: &dyn Fn(&dyn Engine)) {
    let mut batch = Batch::default();
    for key in ["a1", "a2", "a3", "b1"] {
        batch.put(key.into(), key.to_uppercase().into());
    }
    batch.put("a2".into(), b"twice".to_vec());
    batch.remove("a2".into());
    batch.remove("never".into());
    engine.apply(batch).unwrap();
    between(engine);
    assert_eq!(engine.get(b"a1").unwrap(), Some(Bytes::from_static(b"A1")));
    assert_eq!(engine.get(b"a2").unwrap(), None);
    assert_eq!(engine.get(b"a").unwrap(), None);
    assert_eq!(keys(engine, "a", "", 10), ["a1", "a3"]);
    assert_eq!(keys(engine, "a", "a2", 10), ["a3"]);
    assert_eq!(keys(engine, "", "", 2), ["a1", "a3"]);
    assert_eq!(keys(engine, "a", "a4", 10), [""; 0]);
    assert_eq!(keys(engine, "", "b", 10), ["b1"]);
    assert_eq!(keys(engine, "", "", 0), [""; 0]);
    // Rows of before and after, with deletions among them, are one order: a short answer means the end.
    for number in 0..40 {
        put(engine, format!("c{number:02}").into(), b"");
    }
    between(engine);
    for number in (0..40).filter(|number| number % 10 != 0) {
        remove(engine, format!("c{number:02}").into());
    }
    put(engine, "c05".into(), b"again");
    assert_eq!(keys(engine, "c", "", 3), ["c00", "c05", "c10"]);
    assert_eq!(keys(engine, "c", "", 5), ["c00", "c05", "c10", "c20", "c30"]);
    assert_eq!(keys(engine, "c", "c06", 9), ["c10", "c20", "c30"]);
    between(engine);
    assert_eq!(keys(engine, "c", "", 5), ["c00", "c05", "c10", "c20", "c30"]);
    engine.apply(Batch::default()).unwrap();
    engine.flush().unwrap();
    engine.flush().unwrap();
}

#[test]
fn all_engines_do_the_same_with_and_without_the_vault() {
    for engine in [KvEngine::Sled, KvEngine::Redb, KvEngine::Memory] {
        let flush = |engine: &dyn Engine| engine.flush().unwrap();
        let nothing = |_: &dyn Engine| ();
        for between in [&flush as &dyn Fn(&dyn Engine), &nothing] {
            let directory = tempfile::tempdir().unwrap();
            conforms(bare(engine, directory.path()).as_ref(), between);
            let directory = tempfile::tempdir().unwrap();
            conforms(&vault(engine, directory.path()), between);
        }
    }
}

#[test]
fn an_engine_on_disk_keeps_its_rows_when_opened_again() {
    for engine in ON_DISK {
        let directory = tempfile::tempdir().unwrap();
        let large = vec![7; 200_000];
        let opened = vault(engine, directory.path());
        put(&opened, record("large"), &large);
        put(&opened, record("small"), b"1");
        opened.flush().unwrap();
        let usage = opened.usage(b"dapp/default\0").unwrap();
        drop(opened);
        let opened = vault(engine, directory.path());
        assert_eq!(opened.get(&record("large")).unwrap().unwrap(), large);
        assert_eq!(opened.get(&record("small")).unwrap().unwrap(), "1");
        assert_eq!(opened.usage(b"dapp/default\0"), Some(usage));
        assert_eq!(usage.rows, 2);
        assert_eq!(opened.stats().unwrap().generation.unwrap().to_string(), format!("{engine}-1"));
    }
}

#[test]
fn a_large_value_is_a_file_as_long_as_a_row_names_it() {
    let directory = tempfile::tempdir().unwrap();
    let opened = vault(KvEngine::Redb, directory.path());
    let files = || tree_bytes(&directory.path().join("blobs"));
    let large = vec![7; INLINE_BYTES_MAX + 1];
    put(&opened, record("one"), &large);
    put(&opened, record("two"), &large);
    put(&opened, record("inline"), &large[1..]);
    opened.flush().unwrap();
    assert_eq!(files(), large.len() as u64);
    assert_eq!(opened.usage(b"dapp/default\0").unwrap().inline_bytes, 16 + 16 + 19 + large.len() as u64 - 1);
    put(&opened, record("one"), b"small");
    opened.flush().unwrap();
    assert_eq!(opened.get(&record("two")).unwrap().unwrap(), large);
    put(&opened, record("one"), &large);
    remove(&opened, record("two"));
    opened.flush().unwrap();
    assert_eq!(opened.get(&record("one")).unwrap().unwrap(), large);
    remove(&opened, record("one"));
    assert_eq!(files(), large.len() as u64, "a crash may still bring the row back");
    opened.flush().unwrap();
    assert_eq!(files(), 0);
    assert_eq!(opened.usage(b"dapp/default\0").unwrap().rows, 1);
    put(&opened, record("one"), &large);
    opened.flush().unwrap();
    drop(opened);
    let opened = vault(KvEngine::Redb, directory.path());
    assert_eq!(opened.get(&record("one")).unwrap().unwrap(), large, "the sweep at the start keeps what is named");
}

#[test]
fn damage_in_a_row_or_a_file_is_told_and_never_served() {
    let directory = tempfile::tempdir().unwrap();
    let opened = vault(KvEngine::Redb, directory.path());
    put(&opened, record("a"), b"whole");
    put(&opened, record("b"), b"damaged");
    put(&opened, record("c"), &vec![7; INLINE_BYTES_MAX + 1]);
    opened.flush().unwrap();
    drop(opened);
    let rows = bare(KvEngine::Redb, &directory.path().join("redb-1"));
    let mut row = rows.get(&record("b")).unwrap().unwrap().to_vec();
    row[3] ^= 1;
    put(rows.as_ref(), record("b"), &row);
    rows.flush().unwrap();
    drop(rows);
    for folder in std::fs::read_dir(directory.path().join("blobs")).unwrap() {
        for file in std::fs::read_dir(folder.unwrap().path()).unwrap() {
            std::fs::remove_file(file.unwrap().path()).unwrap();
        }
    }
    let opened = vault(KvEngine::Redb, directory.path());
    assert!(opened.get(&record("b")).unwrap_err().is_corrupt());
    assert!(opened.get(&record("c")).unwrap_err().is_corrupt());
    let rows = opened.scan(b"d", b"", 10).unwrap();
    let whole: Vec<bool> = rows.iter().map(|row| row.value.is_ok()).collect();
    assert_eq!(whole, [true, false, false]);
    assert!(opened.corrupt_reads() >= 4);
    let checked = opened.check(|_| ()).unwrap();
    assert_eq!((checked.corrupt, checked.corrupt_keys), (2, vec![record("b").into(), record("c").into()]));
    assert!(checked.recounted, "a row that can't be read counts for nothing");
    put(&opened, record("b"), b"healed");
    put(&opened, record("c"), b"healed");
    opened.flush().unwrap();
    let checked = opened.check(|_| ()).unwrap();
    assert_eq!((checked.corrupt, checked.recounted), (0, false));
}

#[test]
fn what_can_not_be_opened_is_moved_aside_and_the_node_begins_anew() {
    for (engine, file) in [(KvEngine::Sled, "sled-1/db"), (KvEngine::Redb, "redb-1/rows.redb")] {
        let directory = tempfile::tempdir().unwrap();
        let opened = vault(engine, directory.path());
        put(&opened, record("k"), b"1");
        opened.flush().unwrap();
        drop(opened);
        let path = directory.path().join(file);
        let length = std::fs::metadata(&path).unwrap().len();
        std::fs::write(&path, vec![0xa5; usize::try_from(length).unwrap()]).unwrap();
        let opened = vault(engine, directory.path());
        let aside = opened.stats().unwrap().quarantined.unwrap_or_else(|| panic!("{engine}: not moved aside"));
        assert!(aside.join(file).exists(), "{engine}");
        assert_eq!(opened.get(&record("k")).unwrap(), None);
        put(&opened, record("k"), b"2");
        opened.flush().unwrap();
        drop(opened);
        let opened = vault(engine, directory.path());
        assert_eq!(opened.stats().unwrap().quarantined, None);
        assert_eq!(opened.get(&record("k")).unwrap().unwrap(), "2");
    }
}

/// sled's threads may hold its file for a moment after it was closed.
#[test]
fn a_file_that_is_still_being_closed_is_waited_for() {
    let directory = tempfile::tempdir().unwrap();
    put(&*bare(KvEngine::Sled, directory.path()), record("k"), b"1");
    let held = std::fs::File::open(directory.path().join("db")).unwrap();
    held.lock().unwrap();
    let closing = std::thread::spawn(move || {
        std::thread::sleep(std::time::Duration::from_millis(200));
        drop(held);
    });
    assert_eq!(bare(KvEngine::Sled, directory.path()).get(&record("k")).unwrap().unwrap(), "1");
    closing.join().unwrap();
}

#[test]
fn an_engine_that_failed_on_damage_is_not_opened_again() {
    let directory = tempfile::tempdir().unwrap();
    let opened = vault(KvEngine::Redb, directory.path());
    put(&opened, record("k"), b"1");
    opened.flush().unwrap();
    drop(opened);
    std::fs::write(directory.path().join("DAMAGED"), b"").unwrap();
    assert!(vault(KvEngine::Redb, directory.path()).stats().unwrap().quarantined.is_some());
    assert!(vault(KvEngine::Redb, directory.path()).stats().unwrap().quarantined.is_none());
}

#[test]
fn a_directory_of_another_engine_is_refused_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    put(&vault(KvEngine::Redb, directory.path()), record("k"), b"1");
    let refused = Vault::open(directory.path(), settings(KvEngine::Sled)).map(drop).unwrap_err();
    assert!(!refused.is_corrupt());
    let why = std::error::Error::source(&refused).unwrap().to_string();
    assert!(why.contains("selvage kv migrate"), "{why}");
    assert!(directory.path().join("redb-1").exists());
}

#[test]
fn a_rewrite_loses_nothing_while_it_is_written_to() {
    for engine in ON_DISK {
        let directory = tempfile::tempdir().unwrap();
        let opened = Arc::new(vault(engine, directory.path()));
        let large = vec![9; INLINE_BYTES_MAX + 9];
        for number in 0..2_000 {
            put(opened.as_ref(), record(&format!("k{number:04}")), &[1; 100]);
        }
        put(opened.as_ref(), record("large"), &large);
        opened.flush().unwrap();
        let writer = std::thread::spawn({
            let opened = Arc::clone(&opened);
            move || {
                for number in (0..2_000).rev() {
                    match number % 3 {
                        0 => remove(opened.as_ref(), record(&format!("k{number:04}"))),
                        1 => put(opened.as_ref(), record(&format!("k{number:04}")), b"new"),
                        _ => {}
                    }
                    if number % 50 == 0 {
                        opened.flush().unwrap();
                    }
                }
            }
        });
        opened.rewrite().unwrap();
        writer.join().unwrap();
        opened.flush().unwrap();
        assert!(!directory.path().join(format!("{engine}-1")).exists());
        drop(opened);
        let opened = vault(engine, directory.path());
        assert_eq!(opened.stats().unwrap().generation.unwrap().to_string(), format!("{engine}-2"));
        for number in 0..2_000 {
            let value = opened.get(&record(&format!("k{number:04}"))).unwrap();
            let wanted = [None, Some(Bytes::from_static(b"new")), Some(vec![1; 100].into())];
            assert_eq!(value, wanted[number % 3], "{engine} {number}");
        }
        assert_eq!(opened.get(&record("large")).unwrap().unwrap(), large);
        assert!(!opened.check(|_| ()).unwrap().recounted);
    }
}

#[test]
fn a_rewrite_that_a_crash_ended_is_forgotten() {
    let directory = tempfile::tempdir().unwrap();
    let opened = vault(KvEngine::Redb, directory.path());
    put(&opened, record("k"), b"1");
    opened.flush().unwrap();
    drop(opened);
    put(bare(KvEngine::Redb, &directory.path().join("redb-2")).as_ref(), b"half".to_vec(), b"");
    let opened = vault(KvEngine::Redb, directory.path());
    assert_eq!(opened.get(&record("k")).unwrap().unwrap(), "1");
    assert!(!directory.path().join("redb-2").exists());
}

#[test]
fn a_disk_that_is_nearly_full_takes_no_writes_and_still_reads() {
    let directory = tempfile::tempdir().unwrap();
    let opened = vault(KvEngine::Redb, directory.path());
    put(&opened, record("k"), b"1");
    opened.flush().unwrap();
    assert!(opened.writable().is_ok());
    drop(opened);
    let full = Settings { disk_free_bytes_min: u64::MAX, ..settings(KvEngine::Redb) };
    let opened = Vault::open(directory.path(), full).unwrap();
    let refused = opened.writable().unwrap_err();
    assert!(refused.is_full());
    assert!(std::error::Error::source(&refused).unwrap().to_string().contains("kv.disk_free_mib_min"));
    assert_eq!(opened.get(&record("k")).unwrap().unwrap(), "1");
}

#[test]
fn the_vaults_own_rows_are_nobody_elses() {
    let opened = vault(KvEngine::Memory, Path::new("unused"));
    put(&opened, record("k"), b"1");
    opened.flush().unwrap();
    assert_eq!(keys(&opened, "", "", 100), [record("k")]);
    assert_eq!(opened.scan(&[0xff], &[], 100).unwrap(), []);
    assert_eq!(opened.get(b"\xffudapp/default\0").unwrap(), None);
}
