//! The mesh changes its process under its stores.

use bytes::Bytes;
use selvage_backend::{Mesh, Moving, StoreError, Stores};
use selvage_sync::KvError;
use selvage_sync::store::Terms;

use super::place::{alone, carry, store};

fn v() -> Bytes {
    Bytes::from_static(b"v")
}

#[tokio::test]
async fn a_call_waits_for_a_kv_that_is_on_its_way() {
    let mesh = Mesh::coming();
    let waiting = store(&Stores::from(mesh.clone()));
    let set = tokio::spawn({
        let waiting = waiting.clone();
        async move { waiting.set("k", v()).await }
    });
    mesh.set_peers(Vec::new());
    mesh.set_homes(Vec::new());
    assert!(mesh.kv().is_none() && mesh.leave().is_none(), "there is nothing to take away");
    let (kv, _dir) = alone().await;
    mesh.arrive(kv.clone());
    set.await.unwrap().unwrap();
    assert_eq!(kv.get(waiting.name(), "k").unwrap(), Some(v()));
}

#[tokio::test]
async fn a_store_follows_from_here_to_the_next_process_and_the_files_are_free_before() {
    let ((kv, _a), (next, _b)) = (alone().await, alone().await);
    let (mesh, there) = (Mesh::from(kv), Mesh::coming());
    let held = store(&Stores::from(mesh.clone()));
    held.set("k", v()).await.unwrap();

    let left = mesh.leave().unwrap();
    assert!(left.is_last_handle(), "an open store holds no files");
    let asked = tokio::spawn({
        let held = held.clone();
        async move { held.increment("n", 2, None).await }
    });
    left.close().await;
    let _serving = carry(&mesh, &there);
    assert!(!asked.is_finished(), "nobody has the kv");
    there.arrive(next);
    assert_eq!(asked.await.unwrap().unwrap(), 2);
    assert_eq!(store(&there.into()).increment("n", 0, None).await.unwrap(), 2);
    // What was set before went with the files, which are others here.
    assert_eq!(held.get("k").await.unwrap(), None);
}

#[tokio::test]
async fn keys_are_listed_where_the_kv_is() {
    let (kv, _dir) = alone().await;
    let (mesh, there) = (Mesh::coming(), Mesh::from(kv));
    let _serving = carry(&mesh, &there);
    let carried = store(&mesh.into());
    for key in ["b/1", "a/2", "a/1", "\0\"\\"] {
        carried.set(key, v()).await.unwrap();
    }
    assert_eq!(carried.list("a/", None, 10).await.unwrap(), ["a/1", "a/2"]);
    assert_eq!(carried.list("", Some("a/1"), 1).await.unwrap(), ["a/2"]);
    assert_eq!(carried.list("", None, 1).await.unwrap(), ["\0\"\\"]);
    // Operators ask the process that has it.
    let asked = carried.list_entries("", None, 1).await;
    assert!(matches!(asked, Err(StoreError::Moving(Moving::NotYet))), "{asked:?}");
}

#[tokio::test]
async fn what_the_process_that_has_the_kv_refuses_is_refused_with_its_words() {
    let (kv, _dir) = alone().await;
    let (mesh, there) = (Mesh::coming(), Mesh::from(kv));
    let _serving = carry(&mesh, &there);
    let carried = store(&mesh.into());
    carried.set("k", v()).await.unwrap();
    let own = store(&there.into()).increment("k", 1, None).await.unwrap_err().to_string();
    let refused = carried.increment("k", 1, None).await;
    assert!(matches!(&refused, Err(StoreError::Moving(Moving::Refused { why })) if *why == own), "{refused:?}");
    let unknown = carried.set_if("k", v(), Terms::default(), Some("no version")).await;
    assert!(matches!(unknown, Err(StoreError::Version)), "{unknown:?}");
    let long = carried.get(&"k".repeat(1_025)).await;
    assert!(matches!(long, Err(StoreError::Kv(KvError::TooLarge { what: "key", .. }))), "{long:?}");
    let large = Bytes::from(vec![0; 25 * 1024 * 1024 + 1]);
    let larger = carried.set("k", large).await;
    assert!(matches!(larger, Err(StoreError::Kv(KvError::TooLarge { what: "value", .. }))), "{larger:?}");
}

#[tokio::test]
async fn calls_beyond_the_bound_are_refused_and_those_before_it_are_answered() {
    let (mesh, there) = (Mesh::coming(), Mesh::coming());
    let _serving = carry(&mesh, &there);
    let carried = store(&mesh.into());
    // 64 MiB of values may be on their way.
    let large = Bytes::from(vec![1; 20 * 1024 * 1024]);
    let set = |key: &'static str| {
        let (carried, large) = (carried.clone(), large.clone());
        async move { carried.set(key, large).await }
    };
    let under_way = ["a", "b", "c"].map(|key| tokio::spawn(set(key)));
    // Each is asked as soon as it is polled, on this one thread.
    tokio::task::yield_now().await;
    assert!(matches!(set("d").await, Err(StoreError::Kv(KvError::Overloaded))));
    let (kv, _dir) = alone().await;
    there.arrive(kv);
    for set in under_way {
        set.await.unwrap().unwrap();
    }
    assert_eq!(carried.list("", None, 10).await.unwrap(), ["a", "b", "c"]);
}

#[tokio::test]
async fn calls_are_lost_with_the_process_that_has_the_kv_and_later_ones_are_told_at_once() {
    let (mesh, there) = (Mesh::coming(), Mesh::coming());
    let serving = carry(&mesh, &there);
    let carried = store(&mesh.into());
    let lost = |result: Result<(), StoreError>| matches!(result, Err(StoreError::Moving(Moving::Lost)));
    let under_way = tokio::spawn({
        let carried = carried.clone();
        async move { carried.set("k", v()).await }
    });
    while !under_way.is_finished() {
        tokio::task::yield_now().await;
        serving.abort();
    }
    assert!(lost(under_way.await.unwrap()));
    assert!(lost(carried.set("k", v()).await));
}
