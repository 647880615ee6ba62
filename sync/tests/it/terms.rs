//! Values that end, with metadata, written only if a certain write stands there.

use bytes::Bytes;
use selvage_sync::entry::VALUE_BYTES_MAX;
use selvage_sync::store::{METADATA_BYTES_MAX, Terms, now_ms};
use selvage_sync::{Kv, KvError};
use tempfile::TempDir;

use crate::alone::{alone, text};
use crate::fleet::{Fleet, store, until};

fn with(metadata: &'static str) -> Terms {
    Terms { expires_ms: None, metadata: text(metadata) }
}

async fn opened() -> (Kv, TempDir) {
    let directory = tempfile::tempdir().unwrap();
    (alone(&directory).await, directory)
}

#[tokio::test]
async fn metadata_stay_beside_values_of_every_size_and_over_a_restart() {
    let (kv, directory) = opened().await;
    // Around the bound above which a value is kept in chunks, and none at all.
    let sizes =
        [0, VALUE_BYTES_MAX - 24, VALUE_BYTES_MAX - 23, VALUE_BYTES_MAX, VALUE_BYTES_MAX + 1, 3 * VALUE_BYTES_MAX];
    for size in sizes {
        let (key, value) = (size.to_string(), Bytes::from(vec![7; size]));
        kv.set_on(&store(), &key, value, with("meta")).await.unwrap();
    }
    kv.close().await;
    drop(kv);
    let kv = alone(&directory).await;
    for size in sizes {
        let key = size.to_string();
        let kept = kv.get_kept(&store(), &key).unwrap().unwrap();
        assert!(kept.value.len() == size && kept.value.iter().all(|byte| *byte == 7), "{size}");
        assert_eq!(kept.terms, with("meta"), "{size}");
        // Who knows nothing of metadata sees none.
        assert!(kv.get(&store(), &key).unwrap() == Some(kept.value), "{size}");
    }
    let listed = kv.list_entries(&store(), "", None, 1000).unwrap();
    assert_eq!(listed.len(), sizes.len());
    assert!(listed.iter().all(|key| key.bytes.to_string() == key.name), "a size is the value's alone");
    kv.close().await;
}

#[tokio::test]
async fn a_value_that_looks_like_metadata_is_a_value() {
    let (kv, _directory) = opened().await;
    let looks_so = text("\0selvage-metadata\u{1}\0\u{2}abvalue");
    kv.set(&store(), "k", looks_so.clone()).await.unwrap();
    assert_eq!(kv.get(&store(), "k").unwrap(), Some(looks_so.clone()));
    let kept = kv.get_kept(&store(), "k").unwrap().unwrap();
    assert_eq!((kept.value, kept.terms), (looks_so.clone(), Terms::default()));
    kv.set_on(&store(), "k", looks_so.clone(), with("meta")).await.unwrap();
    let kept = kv.get_kept(&store(), "k").unwrap().unwrap();
    assert_eq!((kept.value, kept.terms), (looks_so.clone(), with("meta")));
    assert!(kv.swap(&store(), "k", Some(&looks_so), text("1")).await.unwrap());
    assert_eq!(kv.get_kept(&store(), "k").unwrap().unwrap().terms, Terms::default());
    kv.close().await;
}

#[tokio::test]
async fn metadata_beyond_their_bound_are_refused_and_nothing_is_written() {
    let (kv, _directory) = opened().await;
    let terms = |bytes| Terms { expires_ms: None, metadata: vec![1; bytes].into() };
    let long = || terms(METADATA_BYTES_MAX + 1);
    let refused = kv.set_on(&store(), "k", text("1"), long()).await.unwrap_err();
    assert_eq!(refused.to_string(), "metadata of 1025 bytes, the limit is 1024");
    let refused = kv.set_if(&store(), "k", text("1"), long(), None).await;
    assert!(matches!(refused, Err(KvError::TooLarge { .. })));
    assert!(!kv.exists(&store(), "k").unwrap());
    kv.set_on(&store(), "k", text("1"), terms(METADATA_BYTES_MAX)).await.unwrap();
    assert_eq!(kv.get_kept(&store(), "k").unwrap().unwrap().terms, terms(METADATA_BYTES_MAX));
    // A counter is a value of 8 bytes, not one with metadata.
    kv.set_on(&store(), "n", Bytes::from(vec![0; 8]), with("meta")).await.unwrap();
    assert!(matches!(kv.increment(&store(), "n", 1).await, Err(KvError::NotCounter { .. })));
    kv.close().await;
}

#[tokio::test]
async fn what_has_ended_is_absent_and_its_version_is_none_to_write_on() {
    let (kv, _directory) = opened().await;
    let expires_ms = now_ms() + 50;
    let ends = Terms { expires_ms: Some(expires_ms), metadata: text("meta") };
    let first = kv.set_if(&store(), "k", text("1"), ends.clone(), None).await.unwrap().unwrap();
    if let Some(kept) = kv.get_kept(&store(), "k").unwrap() {
        assert_eq!((kept.terms, &kept.version), (ends, &first.dot));
    }
    until("it ended", || kv.get_kept(&store(), "k").unwrap().is_none()).await;
    assert!(now_ms() >= expires_ms);
    assert!(kv.set_if(&store(), "k", text("2"), with(""), Some(first.dot)).await.unwrap().is_none());
    assert!(kv.set_if(&store(), "k", text("2"), with(""), None).await.unwrap().is_some());
    kv.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_conditional_writes_at_once_each_is_on_top_of_the_one_it_read() {
    const TASKS: u64 = 8;
    const WRITES: u64 = 40;
    let (kv, _directory) = opened().await;
    let first = kv.set_on(&store(), "n", text("0"), Terms::default()).await.unwrap();
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let kv = kv.clone();
            tokio::spawn(async move {
                let mut made = 0;
                while made < WRITES {
                    let kept = kv.get_kept(&store(), "n").unwrap().unwrap();
                    let number: u64 = std::str::from_utf8(&kept.value).unwrap().parse().unwrap();
                    let next = (number + 1).to_string().into();
                    let done = kv.set_if(&store(), "n", next, Terms::default(), Some(kept.version)).await.unwrap();
                    made += u64::from(done.is_some());
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(kv.get(&store(), "n").unwrap().unwrap(), (TASKS * WRITES).to_string());
    assert!(kv.set_if(&store(), "n", text("x"), Terms::default(), Some(first.dot)).await.unwrap().is_none());
    kv.close().await;
}

#[tokio::test]
async fn a_large_value_that_came_too_late_leaves_no_chunks() {
    let (kv, _directory) = opened().await;
    kv.set(&store(), "k", text("1")).await.unwrap();
    let large = Bytes::from(vec![7; 3 * VALUE_BYTES_MAX]);
    assert!(kv.set_if(&store(), "k", large, with("meta"), None).await.unwrap().is_none());
    assert_eq!(kv.get(&store(), "k").unwrap(), Some(text("1")));
    let left = kv.usage(&store());
    assert!(left.bytes < 100_000, "{left:?}");
    kv.close().await;
}

#[tokio::test]
async fn terms_and_version_are_the_same_on_every_node_and_a_condition_sees_what_arrived() {
    let fleet = Fleet::meshed(&["a", "b"]).await;
    let terms = Terms { expires_ms: Some(now_ms() + 600_000), metadata: text("meta") };
    let set = fleet.kv(0).set_on(&store(), "k", text("1"), terms.clone()).await.unwrap();
    fleet.sees(1, "k", Some("1")).await;
    let there = fleet.kv(1).get_kept(&store(), "k").unwrap().unwrap();
    assert_eq!((&there.terms, &there.version), (&terms, &set.dot));
    assert!(fleet.kv(1).set_if(&store(), "k", text("2"), terms.clone(), None).await.unwrap().is_none());
    assert!(fleet.kv(1).set_if(&store(), "k", text("2"), terms.clone(), Some(set.dot)).await.unwrap().is_some());
    fleet.sees(0, "k", Some("2")).await;

    // What has not arrived is not seen: both are told that they wrote, and the later write stands on both.
    fleet.kv(0).partition(true);
    until("the links end", || !fleet.kv(0).status()[0].connected && !fleet.kv(1).status()[0].connected).await;
    assert!(fleet.kv(0).set_if(&store(), "new", text("older"), Terms::default(), None).await.unwrap().is_some());
    assert!(fleet.kv(1).set_if(&store(), "new", text("newer"), Terms::default(), None).await.unwrap().is_some());
    fleet.kv(0).partition(false);
    fleet.sees(0, "new", Some("newer")).await;
    fleet.sees(1, "new", Some("newer")).await;
    fleet.close().await;
}
