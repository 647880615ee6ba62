//! A node without peers.

use bytes::Bytes;
use selvage_sync::entry::{KEY_BYTES_MAX, VALUE_BYTES_MAX};
use selvage_sync::{Kv, KvError, Options};
use tempfile::TempDir;

use crate::fleet::{identify, region, store};

async fn alone(directory: &TempDir) -> Kv {
    let options = Options {
        node: "a".parse().unwrap(),
        region: region(),
        directory: directory.path().to_owned(),
        listen: None,
        tls: None,
        kept: Default::default(),
    };
    Kv::open(options, identify()).await.unwrap()
}

fn text(text: &'static str) -> Bytes {
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
    assert!(refused(kv.set(&store(), "k", vec![0; VALUE_BYTES_MAX + 1].into()).await));
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
