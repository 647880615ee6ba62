use std::sync::Arc;

use selvage_config::node::Kv as Kept;

use super::*;
use crate::store::{Kv, Options};

async fn open(directory: &Path, engine: KvEngine) -> Kv {
    let options = Options::alone(
        "a".parse().unwrap(),
        "fra".parse().unwrap(),
        directory.to_owned(),
        Kept { engine, ..Kept::default() },
    );
    Kv::open(options, Arc::new(|_| None)).await.unwrap()
}

fn store() -> selvage_config::StoreName {
    "app/default".parse().unwrap()
}

const LARGE: usize = 100_000;

async fn fill(directory: &Path, engine: KvEngine) {
    let kv = open(directory, engine).await;
    for number in 0..600 {
        kv.set(&store(), &format!("k{number:03}"), vec![7; number].into()).await.unwrap();
    }
    for number in 0..50 {
        kv.delete(&store(), &format!("k{number:03}")).await.unwrap();
    }
    kv.increment(&store(), "counter", 5).await.unwrap();
    kv.set(&store(), "large", vec![9; LARGE].into()).await.unwrap();
    kv.close().await;
}

async fn is_filled(directory: &Path, engine: KvEngine) {
    let kv = open(directory, engine).await;
    assert_eq!(kv.get(&store(), "k049").unwrap(), None);
    assert_eq!(kv.get(&store(), "k599").unwrap().unwrap().len(), 599);
    assert_eq!(kv.get(&store(), "large").unwrap().unwrap(), vec![9; LARGE]);
    assert_eq!(kv.increment(&store(), "counter", 2).await.unwrap(), 7);
    kv.close().await;
}

#[tokio::test]
async fn an_engine_is_changed_and_nothing_else() {
    let directory = tempfile::tempdir().unwrap();
    fill(directory.path(), KvEngine::Sled).await;
    assert!(matches!(migrate(directory.path(), KvEngine::Sled, |_| ()), Err(OfflineError::Same(KvEngine::Sled))));
    assert!(matches!(migrate(directory.path(), KvEngine::Memory, |_| ()), Err(OfflineError::Memory)));
    let before = check(directory.path(), |_| ()).unwrap();
    let carried = migrate(directory.path(), KvEngine::Redb, |_| ()).unwrap();
    assert_eq!((carried.damaged, carried.rows), (0, before.rows));
    let after = check(directory.path(), |_| ()).unwrap();
    assert_eq!((after.records, after.record_bytes), (before.records, before.record_bytes));
    assert_eq!(after.generation.unwrap().to_string(), "redb-2");
    assert!(after.is_sound() && !after.recounted);
    is_filled(directory.path(), KvEngine::Redb).await;
    migrate(directory.path(), KvEngine::Sled, |_| ()).unwrap();
    let kv = open(directory.path(), KvEngine::Sled).await;
    assert_eq!(kv.increment(&store(), "counter", 0).await.unwrap(), 7);
    kv.close().await;
}

#[tokio::test]
async fn what_was_exported_is_imported_as_a_new_incarnation() {
    let directory = tempfile::tempdir().unwrap();
    fill(directory.path(), KvEngine::Redb).await;
    let mut snapshot = Vec::new();
    let out = export(directory.path(), &mut snapshot, |_| ()).unwrap();
    let other = tempfile::tempdir().unwrap();
    let other = other.path().join("kv");
    let carried = import(&other, KvEngine::Sled, snapshot.as_slice(), |_| ()).unwrap();
    assert_eq!(carried, out);
    let incarnation = |directory: &Path| existing(directory, Damage::Refuse).unwrap().get(layout::INCARNATION).unwrap();
    let (first, none) = (incarnation(directory.path()), incarnation(&other));
    assert_eq!(none, None);
    is_filled(&other, KvEngine::Sled).await;
    assert!(incarnation(&other).is_some_and(|second| Some(second) != first));
    assert!(check(&other, |_| ()).unwrap().is_sound());
    let again = import(&other, KvEngine::Sled, snapshot.as_slice(), |_| ());
    assert!(matches!(again, Err(OfflineError::Occupied(_))));
}

#[tokio::test]
async fn damage_is_found_by_a_check_and_left_out_of_an_export() {
    let directory = tempfile::tempdir().unwrap();
    fill(directory.path(), KvEngine::Redb).await;
    let blobs = directory.path().join("blobs");
    let folder = std::fs::read_dir(blobs).unwrap().next().unwrap().unwrap().path();
    let file = std::fs::read_dir(folder).unwrap().next().unwrap().unwrap().path();
    let mut bytes = std::fs::read(&file).unwrap();
    bytes[5_000] ^= 1;
    std::fs::write(&file, bytes).unwrap();
    let report = check(directory.path(), |_| ()).unwrap();
    assert_eq!((report.corrupt, report.corrupt_keys), (1, vec!["dapp/default large".to_owned()]));
    let mut snapshot = Vec::new();
    let out = export(directory.path(), &mut snapshot, |_| ()).unwrap();
    assert_eq!(out.damaged, 1);
    // What is not whole does not say that it is.
    let other = tempfile::tempdir().unwrap();
    let other = other.path().join("kv");
    assert_eq!(import(&other, KvEngine::Redb, snapshot.as_slice(), |_| ()).unwrap().rows, out.rows);
    let vault = existing(&other, Damage::Refuse).unwrap();
    let vector = vault.scan(layout::VECTOR, layout::VECTOR, 10).unwrap();
    assert!(!vector.is_empty() && vector.iter().all(|row| row.value.as_ref().unwrap().as_ref() == [0; 8]));
    assert_eq!(vault.get(layout::CUT).unwrap(), None);
}

#[tokio::test]
async fn what_a_node_moved_aside_is_exported_as_far_as_it_can_be_read() {
    let directory = tempfile::tempdir().unwrap();
    fill(directory.path(), KvEngine::Redb).await;
    // As if a restored disk had less than was acknowledged.
    let later = crate::engine::far_mark();
    std::fs::write(directory.path().join("FLUSHED"), later).unwrap();
    assert!(matches!(check(directory.path(), |_| ()), Err(OfflineError::Engine(error)) if error.is_corrupt()));
    let kv = open(directory.path(), KvEngine::Redb).await;
    let aside = kv.stats().unwrap().quarantined.unwrap();
    assert_eq!(kv.get(&store(), "k599").unwrap(), None);
    kv.close().await;
    let mut snapshot = Vec::new();
    let out = export(&aside, &mut snapshot, |_| ()).unwrap();
    assert!(out.rows > 600 && out.damaged == 0);
    let other = tempfile::tempdir().unwrap();
    import(&other.path().join("kv"), KvEngine::Redb, snapshot.as_slice(), |_| ()).unwrap();
    is_filled(&other.path().join("kv"), KvEngine::Redb).await;
}

#[test]
fn a_directory_without_a_kv_is_told_and_left_as_it_is() {
    let directory = tempfile::tempdir().unwrap();
    assert!(matches!(check(directory.path(), |_| ()), Err(OfflineError::Missing(_))));
    assert!(matches!(export(&directory.path().join("none"), std::io::sink(), |_| ()), Err(OfflineError::Missing(_))));
    assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0);
    let no_snapshot = import(&directory.path().join("kv"), KvEngine::Redb, &b"surprise"[..], |_| ());
    assert!(matches!(no_snapshot, Err(OfflineError::Snapshot(SnapshotError::Foreign))));
    assert!(!directory.path().join("kv").exists());
}
