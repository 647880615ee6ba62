//! A node without peers.

use bytes::Bytes;
use selvage_sync::entry::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use selvage_sync::store::{HIDDEN, LARGE_BYTES_MAX};
use selvage_sync::{Kv, KvError, Options};
use tempfile::TempDir;

use crate::fleet::{identify, region, store};

pub(crate) async fn alone(directory: &TempDir) -> Kv {
    let options = Options::alone("a".parse().unwrap(), region(), directory.path().to_owned(), Default::default());
    Kv::open(options, identify()).await.unwrap()
}

pub(crate) fn text(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

#[tokio::test]
async fn it_reads_its_own_writes_and_keeps_them() {
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    assert_eq!(kv.local_addr(), None);
    assert_eq!(kv.get(&store(), "k").unwrap(), None);
    kv.set(&store(), "k", text("1")).await.unwrap();
    kv.set(&store(), "empty", text("")).await.unwrap();
    assert_eq!(kv.get(&store(), "k").unwrap(), Some(text("1")));
    assert_eq!(kv.get(&"other/default".parse().unwrap(), "k").unwrap(), None);
    kv.delete(&store(), "k").await.unwrap();
    assert!(!kv.exists(&store(), "k").unwrap());
    kv.close().await;
    drop(kv);
    let kv = alone(&directory).await;
    assert!(!kv.exists(&store(), "k").unwrap());
    assert_eq!(kv.get(&store(), "empty").unwrap(), Some(text("")));
    kv.close().await;
}

#[tokio::test]
async fn what_is_too_large_is_refused_and_what_just_fits_is_not() {
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    let (long, fits) = ("k".repeat(KEY_BYTES_MAX + 1), "k".repeat(KEY_BYTES_MAX));
    let refused = |result| matches!(result, Err(KvError::TooLarge { .. }));
    assert!(refused(kv.set(&store(), &long, text("")).await));
    assert!(refused(kv.get(&store(), &long).map(|_| ())));
    assert!(refused(kv.delete(&store(), &long).await));
    assert!(refused(kv.increment(&store(), &long, 1).await.map(|_| ())));
    assert!(refused(kv.set(&store(), "k", vec![0; LARGE_BYTES_MAX + 1].into()).await));
    let largest = Bytes::from(vec![0; VALUE_BYTES_MAX]);
    kv.set(&store(), &fits, largest.clone()).await.unwrap();
    assert_eq!(kv.get(&store(), &fits).unwrap(), Some(largest));
    kv.close().await;
}

#[tokio::test]
async fn a_counter_begins_at_its_value_and_text_is_none() {
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    assert_eq!(kv.increment(&store(), "n", 3).await.unwrap(), 3);
    assert_eq!(kv.increment(&store(), "n", -5).await.unwrap(), -2);
    kv.set(&store(), "n", Bytes::copy_from_slice(&40_i64.to_le_bytes())).await.unwrap();
    assert_eq!(kv.increment(&store(), "n", 2).await.unwrap(), 42);
    kv.delete(&store(), "n").await.unwrap();
    assert!(!kv.exists(&store(), "n").unwrap());
    assert_eq!(kv.increment(&store(), "n", 1).await.unwrap(), 1);
    kv.set(&store(), "t", text("five")).await.unwrap();
    assert!(matches!(kv.increment(&store(), "t", 1).await, Err(KvError::NotCounter { .. })));
    assert_eq!(kv.get(&store(), "t").unwrap(), Some(text("five")));
    kv.close().await;
}

#[tokio::test]
async fn a_listing_goes_on_after_its_cursor_and_leaves_out_the_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    for number in 0..150 {
        kv.set(&store(), &format!("k{number:03}"), text("v")).await.unwrap();
    }
    for number in (0..150).step_by(2) {
        kv.delete(&store(), &format!("k{number:03}")).await.unwrap();
    }
    kv.set(&store(), "other", text("v")).await.unwrap();
    let (mut all, mut after) = (Vec::<String>::new(), None::<String>);
    loop {
        let page = kv.list(&store(), "k", after.as_deref(), 10).unwrap();
        let Some(last) = page.last() else { break };
        after = Some(last.clone());
        all.extend(page);
    }
    let expected: Vec<String> = (1..150).step_by(2).map(|number| format!("k{number:03}")).collect();
    assert_eq!(all, expected);
    let entries = kv.list_entries(&store(), "other", None, 10).unwrap();
    assert_eq!((entries.len(), entries[0].bytes, entries[0].name.as_str()), (1, 1, "other"));
    assert_eq!(entries[0].node, Some("a".parse().unwrap()));
    kv.close().await;
}

#[tokio::test]
async fn after_closing_writes_fail_and_too_many_at_once_are_refused() {
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    let value = Bytes::from(vec![0; VALUE_BYTES_MAX]);
    let writers: Vec<_> = (0..64)
        .map(|number| {
            let (kv, value) = (kv.clone(), value.clone());
            tokio::spawn(async move { kv.set(&store(), &format!("k{number}"), value).await })
        })
        .collect();
    let (mut made, mut refused) = (0, 0);
    for writer in writers {
        match writer.await.unwrap() {
            Ok(()) => made += 1,
            Err(KvError::Overloaded) => refused += 1,
            Err(other) => panic!("{other}"),
        }
    }
    assert!(made >= 31 && refused > 0, "{made} made, {refused} refused");
    kv.close().await;
    kv.close().await;
    assert!(matches!(kv.set(&store(), "k", text("1")).await, Err(KvError::Closed)));
}

#[tokio::test]
async fn a_large_value_is_whole_or_not_there_and_its_chunks_go_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    let large: Bytes = (0..LARGE_BYTES_MAX).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<_>>().into();
    kv.set(&store(), "large", large.clone()).await.unwrap();
    kv.set(&store(), "small", text("1")).await.unwrap();
    assert!(kv.get(&store(), "large").unwrap() == Some(large.clone()));
    let listed = kv.list_entries(&store(), "", None, 1000).unwrap();
    let facts: Vec<(&str, usize)> = listed.iter().map(|key| (key.name.as_str(), key.bytes)).collect();
    assert_eq!(facts, [("large", LARGE_BYTES_MAX), ("small", 1)]);
    assert_eq!(kv.list(&store(), "", None, 1000).unwrap(), ["large", "small"]);

    let other: Bytes = vec![9; VALUE_BYTES_MAX + 1].into();
    assert!(!kv.swap(&store(), "large", Some(b"another"), other.clone()).await.unwrap());
    assert!(kv.swap(&store(), "large", Some(&large), other.clone()).await.unwrap());
    assert!(kv.get(&store(), "large").unwrap() == Some(other));
    kv.delete(&store(), "large").await.unwrap();
    assert_eq!(kv.get(&store(), "large").unwrap(), None);
    let left = kv.usage(&store());
    // What is left are tombstones.
    assert!(left.bytes < 100_000, "{left:?}");

    // A value that looks like one that is kept in chunks is a value like any other.
    let looks_so = text("\0selvage-chunks\u{1}000000000000000000000000000000000000000000000000fra-1");
    kv.set(&store(), "looks so", looks_so.clone()).await.unwrap();
    assert_eq!(kv.get(&store(), "looks so").unwrap(), Some(looks_so));
    let hidden = format!("{HIDDEN}chunk/a/0/0");
    assert!(matches!(kv.set(&store(), &hidden, text("1")).await, Err(KvError::Hidden)));
    assert!(matches!(kv.get(&store(), &hidden), Err(KvError::Hidden)));
    kv.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn of_swaps_at_once_each_counts_once() {
    const TASKS: u64 = 8;
    const SWAPS: u64 = 40;
    let directory = tempfile::tempdir().unwrap();
    let kv = alone(&directory).await;
    let tasks: Vec<_> = (0..TASKS)
        .map(|_| {
            let kv = kv.clone();
            tokio::spawn(async move {
                let mut made = 0;
                while made < SWAPS {
                    let seen = kv.get(&store(), "n").unwrap();
                    let number: u64 =
                        seen.as_ref().map_or(0, |seen| std::str::from_utf8(seen).unwrap().parse().unwrap());
                    let next = (number + 1).to_string().into();
                    made += u64::from(kv.swap(&store(), "n", seen.as_deref(), next).await.unwrap());
                }
            })
        })
        .collect();
    for task in tasks {
        task.await.unwrap();
    }
    assert_eq!(kv.get(&store(), "n").unwrap().unwrap(), (TASKS * SWAPS).to_string());
    assert!(!kv.swap(&store(), "n", None, text("1")).await.unwrap());
    assert!(kv.swap(&store(), "new", None, text("1")).await.unwrap());
    kv.close().await;
}

#[tokio::test]
async fn a_full_store_refuses_own_writes_until_something_is_deleted() {
    let directory = tempfile::tempdir().unwrap();
    let options = Options::alone(
        "a".parse().unwrap(),
        region(),
        directory.path().to_owned(),
        selvage_config::node::Kv { store_mib_max: 1, total_mib_max: 2, ..Default::default() },
    );
    let kv = Kv::open(options, identify()).await.unwrap();
    let half = Bytes::from(vec![1; 500_000]);
    kv.set(&store(), "a", half.clone()).await.unwrap();
    kv.set(&store(), "b", half.clone()).await.unwrap();
    let refused = kv.set(&store(), "c", half.clone()).await;
    assert!(matches!(refused, Err(KvError::Quota { max: 1_048_576, .. })), "{refused:?}");
    let second = "app/other".parse().unwrap();
    kv.set(&second, "a", half.clone()).await.unwrap();
    kv.set(&second, "b", half.clone()).await.unwrap();
    let third = "app/third".parse().unwrap();
    assert!(matches!(kv.set(&third, "a", half.clone()).await, Err(KvError::Quota { max: 2_097_152, .. })));
    kv.delete(&store(), "a").await.unwrap();
    kv.set(&store(), "c", half).await.unwrap();
    kv.close().await;
}
