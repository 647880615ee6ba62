//! What a store does, wherever it is. Each behaviour is a test in `mesh`, in `redis` and in `nats`; and those that ask for
//! no more than guests do in `carried`, where another process has the mesh.

use std::time::Duration;

use bytes::Bytes;
use futures_util::future::join_all;
use selvage_backend::{Reach, Store, StoreError};
use selvage_sync::KvError;
use selvage_sync::store::{HIDDEN, LIST_MAX, Terms, now_ms};

use super::place::{Place, store};
use super::server::until;

macro_rules! everywhere {
    ($($behaviour:ident)*) => {
        everywhere!(@ mesh $($behaviour)*);
        everywhere!(@ redis $($behaviour)*);
        everywhere!(@ nats $($behaviour)*);
    };
    (@ $place:ident $($behaviour:ident)*) => {
        mod $place {
            $(
                #[tokio::test(flavor = "multi_thread", worker_threads = 2)]
                async fn $behaviour() {
                    if let Some(place) = super::Place::$place().await {
                        super::$behaviour(&place).await;
                    }
                }
            )*
        }
    };
}

everywhere! {
    a_value_is_set_read_replaced_and_deleted
    any_text_is_a_key_and_any_bytes_are_a_value
    what_breaks_a_bound_is_refused_and_nothing_is_written
    a_value_ends_on_its_terms
    a_condition_is_of_the_very_write_that_was_read
    a_swap_needs_the_value_that_was_seen
    a_counter_counts_without_losing_any
    what_is_no_counter_is_not_counted_with
    a_counter_ends_when_it_would_have
    keys_are_listed_in_order_by_pages
    what_ended_or_was_deleted_is_in_no_list
    stores_do_not_see_each_other
    what_another_node_wrote_is_there
    one_of_several_nodes_writes_on_a_condition
}

everywhere! { @ carried
    a_value_is_set_read_replaced_and_deleted
    any_text_is_a_key_and_any_bytes_are_a_value
    a_value_ends_on_its_terms
    a_condition_is_of_the_very_write_that_was_read
    a_swap_needs_the_value_that_was_seen
    a_counter_counts_without_losing_any
    a_counter_ends_when_it_would_have
    what_ended_or_was_deleted_is_in_no_list
    stores_do_not_see_each_other
    what_another_node_wrote_is_there
    one_of_several_nodes_writes_on_a_condition
}

fn bytes(text: &'static str) -> Bytes {
    Bytes::from_static(text.as_bytes())
}

fn for_ms(ms: u64) -> Terms {
    Terms { expires_ms: Some(now_ms() + ms), metadata: Bytes::new() }
}

async fn a_value_is_set_read_replaced_and_deleted(place: &Place) {
    let store = place.store();
    assert_eq!((store.get("k").await.unwrap(), store.exists("k").await.unwrap()), (None, false));
    store.delete("k").await.unwrap();
    store.set("k", bytes("one")).await.unwrap();
    assert_eq!((store.get("k").await.unwrap(), store.exists("k").await.unwrap()), (Some(bytes("one")), true));
    store.set("k", bytes("two")).await.unwrap();
    let many = store.get_many(&["k".into(), "none".into(), "k".into()]).await.unwrap();
    assert_eq!(many, [Some(bytes("two")), None, Some(bytes("two"))]);
    store.delete("k").await.unwrap();
    assert_eq!((store.get("k").await.unwrap(), store.exists("k").await.unwrap()), (None, false));
    assert_eq!(store.latest("k").await.unwrap(), None);
    store.set("k", bytes("again")).await.unwrap();
    assert_eq!(store.get("k").await.unwrap(), Some(bytes("again")));
}

async fn any_text_is_a_key_and_any_bytes_are_a_value(place: &Place) {
    let store = place.store();
    let long = "é".repeat(512);
    let keys = [
        "",
        " ",
        ".",
        "*",
        ">",
        "a.b",
        "a.*",
        "$KV.x",
        "=",
        "=2E",
        "{x}",
        "a:k:b",
        "\0",
        "\r\n",
        "[a",
        "(a",
        "+",
        "-",
        "A",
        "a",
        "%2e",
        "\u{10FFFE}",
        "日本",
        &long,
    ];
    let value = |number: usize| Bytes::from([&[0, 255, 13, 10][..], &number.to_le_bytes()].concat());
    for (number, key) in keys.iter().enumerate() {
        store.set(key, value(number)).await.unwrap();
    }
    for (number, key) in keys.iter().enumerate() {
        assert_eq!(store.get(key).await.unwrap(), Some(value(number)), "{key:?}");
        let terms = Terms { expires_ms: None, metadata: Bytes::from_static(&[0, 255, 10]) };
        store.set_on(key, Bytes::new(), terms.clone()).await.unwrap();
        let kept = store.latest(key).await.unwrap().unwrap();
        assert_eq!((kept.value, kept.terms), (Bytes::new(), terms), "{key:?}");
    }
    let mut sorted = keys.map(str::to_owned);
    sorted.sort();
    assert_eq!(store.list("", None, LIST_MAX).await.unwrap(), sorted);
}

fn too_large<T>(result: Result<T, StoreError>) -> &'static str {
    match result {
        Err(StoreError::Kv(KvError::TooLarge { what, .. })) => what,
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was taken"),
    }
}

async fn what_breaks_a_bound_is_refused_and_nothing_is_written(place: &Place) {
    let store = place.store();
    let (most, over) = ("k".repeat(1_024), "k".repeat(1_025));
    // The mesh has one bound, the backends that of their table: 1,000 KiB.
    let value_max = if store.backend().is_some() { 1_000 * 1_024 } else { place.abilities.value_bytes_max };
    let large = Bytes::from((0..value_max).map(|at| u8::try_from(at % 251).unwrap()).collect::<Vec<_>>());
    let larger = Bytes::from(vec![7; value_max + 1]);
    let metadata = |bytes: usize| Terms { expires_ms: None, metadata: vec![1; bytes].into() };

    assert_eq!(too_large(store.set(&over, bytes("v")).await), "key");
    assert_eq!(too_large(store.increment(&over, 1, None).await), "key");
    assert_eq!(too_large(store.set_if(&over, bytes("v"), Terms::default(), None).await), "key");
    assert_eq!(too_large(store.set(&most, larger.clone()).await), "value");
    assert_eq!(too_large(store.set_if(&most, larger, Terms::default(), None).await), "value");
    assert_eq!(too_large(store.set_on(&most, bytes("v"), metadata(1_025)).await), "metadata");
    let hidden = format!("{HIDDEN}k");
    assert!(matches!(store.set(&hidden, bytes("v")).await, Err(StoreError::Kv(KvError::Hidden))));
    assert!(matches!(store.get(&hidden).await, Err(StoreError::Kv(KvError::Hidden))));
    assert_eq!(store.list("", None, 10).await.unwrap(), Vec::<String>::new());

    store.set_on(&most, large.clone(), metadata(1_024)).await.unwrap();
    let kept = store.latest(&most).await.unwrap().unwrap();
    assert!(kept.value == large && kept.terms == metadata(1_024));
    let found = store.list_entries("k", None, 10).await.unwrap();
    assert_eq!((found.len(), found[0].name.as_str()), (1, most.as_str()));
    // A value in chunks is listed by what names them.
    assert!(found[0].bytes == value_max || store.mesh().is_some());
}

async fn a_value_ends_on_its_terms(place: &Place) {
    assert!(place.abilities.ttl && place.abilities.metadata);
    let store = place.store();
    let terms = Terms { expires_ms: Some(now_ms() + 600_000), metadata: bytes("meta") };
    let version = store.set_on("k", bytes("v"), terms.clone()).await.unwrap();
    let kept = store.latest("k").await.unwrap().unwrap();
    let ends = kept.terms.expires_ms.unwrap();
    assert!(ends.abs_diff(terms.expires_ms.unwrap()) < 60_000, "{ends}");
    assert_eq!((kept.value, kept.terms.metadata, kept.version), (bytes("v"), bytes("meta"), version));
    // Terms are of one write.
    store.set("k", bytes("w")).await.unwrap();
    assert_eq!(store.latest("k").await.unwrap().unwrap().terms, Terms::default());

    store.set_on("short", bytes("v"), for_ms(1)).await.unwrap();
    until("it has ended", async || !store.exists("short").await.unwrap()).await;
    assert_eq!((store.get("short").await.unwrap(), store.latest("short").await.unwrap()), (None, None));
    assert!(store.set_if("short", bytes("new"), Terms::default(), None).await.unwrap().is_some());
    store.set_on("short", bytes("v"), for_ms(1)).await.unwrap();
    until("it has ended", async || store.get("short").await.unwrap().is_none()).await;
    assert_eq!(store.increment("short", 2, None).await.unwrap(), 2);
}

async fn a_condition_is_of_the_very_write_that_was_read(place: &Place) {
    let store = place.store();
    let set_if = async |value: &'static str, seen: Option<&str>| {
        store.set_if("k", bytes(value), Terms::default(), seen).await.unwrap()
    };
    let first = set_if("1", None).await.unwrap();
    assert_eq!(set_if("2", None).await, None);
    let second = set_if("1", Some(&first)).await.unwrap();
    // The value is the same again, the write is not.
    assert_eq!(set_if("3", Some(&first)).await, None);
    assert_eq!(store.latest("k").await.unwrap().unwrap().version, second);
    let third = set_if("3", Some(&second)).await.unwrap();
    store.delete("k").await.unwrap();
    assert_eq!(set_if("4", Some(&third)).await, None, "it was deleted");
    let fourth = set_if("3", None).await.unwrap();
    assert_ne!(fourth, third);
    assert_eq!(set_if("5", Some(&third)).await, None, "it was deleted and written again");
    let unknown = store.set_if("k", bytes("6"), Terms::default(), Some("no version")).await;
    assert!(matches!(unknown, Err(StoreError::Version)));
    assert_eq!(store.get("k").await.unwrap(), Some(bytes("3")));
    // What was read has ended since.
    let ends = store.set_on("short", bytes("v"), for_ms(1)).await.unwrap();
    until("it has ended", async || store.get("short").await.unwrap().is_none()).await;
    assert_eq!(store.set_if("short", bytes("w"), Terms::default(), Some(&ends)).await.unwrap(), None);
}

async fn a_swap_needs_the_value_that_was_seen(place: &Place) {
    let store = place.store();
    assert!(!store.swap("k", Some(b"1"), bytes("2")).await.unwrap());
    assert!(store.swap("k", None, bytes("1")).await.unwrap());
    assert!(!store.swap("k", None, bytes("2")).await.unwrap());
    assert!(!store.swap("k", Some(b"2"), bytes("3")).await.unwrap());
    assert!(store.swap("k", Some(b"1"), bytes("2")).await.unwrap());
    assert_eq!(store.get("k").await.unwrap(), Some(bytes("2")));
}

async fn a_counter_counts_without_losing_any(place: &Place) {
    const WRITERS: i64 = 8;
    const EACH: i64 = 10;
    assert!(place.abilities.counters);
    let store = place.store();
    assert_eq!(store.increment("n", 5, None).await.unwrap(), 5);
    assert_eq!(store.increment("n", -7, None).await.unwrap(), -2);
    assert_eq!(store.get("n").await.unwrap(), Some(Bytes::copy_from_slice(&(-2_i64).to_le_bytes())));
    assert_eq!(store.increment("n", 0, None).await.unwrap(), -2);
    // A value of 8 bytes is a number, whole to its last bit.
    let large = i64::MAX - 3;
    store.set("value", Bytes::copy_from_slice(&large.to_le_bytes())).await.unwrap();
    assert_eq!(store.increment("value", 2, None).await.unwrap(), i64::MAX - 1);
    let writer = async || {
        let mut sums = Vec::new();
        for _ in 0..EACH {
            sums.push(store.increment("many", 1, None).await.unwrap());
        }
        sums
    };
    let mut sums = join_all((0..WRITERS).map(|_| writer())).await.concat();
    sums.sort_unstable();
    assert_eq!(sums, (1..=WRITERS * EACH).collect::<Vec<_>>());
}

fn is_no_counter(result: &Result<i64, StoreError>) -> bool {
    matches!(result, Err(StoreError::Kv(KvError::NotCounter { .. })))
}

async fn what_is_no_counter_is_not_counted_with(place: &Place) {
    let store = place.store();
    store.set("text", bytes("nine bytes")).await.unwrap();
    assert!(is_no_counter(&store.increment("text", 1, None).await));
    assert_eq!(store.get("text").await.unwrap(), Some(bytes("nine bytes")));
    store.set("full", Bytes::copy_from_slice(&i64::MAX.to_le_bytes())).await.unwrap();
    assert!(is_no_counter(&store.increment("full", 1, None).await));
    assert_eq!(store.get("full").await.unwrap(), Some(Bytes::copy_from_slice(&i64::MAX.to_le_bytes())));
    let terms = Terms { expires_ms: None, metadata: bytes("m") };
    store.set_on("meta", Bytes::copy_from_slice(&7_i64.to_le_bytes()), terms).await.unwrap();
    assert!(is_no_counter(&store.increment("meta", 1, None).await));
    // A counter is replaced like any value.
    store.increment("n", 1, None).await.unwrap();
    store.set("n", bytes("text")).await.unwrap();
    assert_eq!(store.get("n").await.unwrap(), Some(bytes("text")));
}

async fn a_counter_ends_when_it_would_have(place: &Place) {
    let store = place.store();
    assert_eq!(store.increment("n", 1, for_ms(600_000).expires_ms).await.unwrap(), 1);
    assert_eq!(store.increment("n", 1, for_ms(1).expires_ms).await.unwrap(), 2, "the first one's end holds");
    tokio::time::sleep(Duration::from_millis(20)).await;
    assert_eq!(store.increment("n", 1, None).await.unwrap(), 3);
    store.increment("short", 1, for_ms(1).expires_ms).await.unwrap();
    until("it has ended", async || !store.exists("short").await.unwrap()).await;
    assert_eq!(store.increment("short", 4, None).await.unwrap(), 4);
}

async fn all(store: &Store, prefix: &str, limit: usize) -> Vec<String> {
    let mut keys: Vec<String> = Vec::new();
    loop {
        let page = store.list(prefix, keys.last().map(String::as_str), limit).await.unwrap();
        let is_last = page.len() < limit;
        keys.extend(page);
        if is_last {
            return keys;
        }
    }
}

async fn keys_are_listed_in_order_by_pages(place: &Place) {
    const KEYS: usize = 120;
    assert!(place.abilities.ordered_list);
    let store = place.store();
    let names: Vec<String> = (0..KEYS).map(|key| format!("a/{key:04}")).collect();
    join_all(names.iter().rev().map(|name| store.set(name, bytes("v")))).await.into_iter().for_each(Result::unwrap);
    for key in ["b", "a", "a0", "é", "ab"] {
        store.set(key, bytes("value")).await.unwrap();
    }
    assert_eq!(all(&store, "a/", 50).await, names);
    assert_eq!(all(&store, "a/", KEYS).await, names, "as many as one page has");
    let mut every = [&names[..], &["b", "a", "a0", "é", "ab"].map(str::to_owned)].concat();
    every.sort();
    assert_eq!(all(&store, "", 7).await, every);
    assert_eq!(store.list("a/", Some("a/0117"), 10).await.unwrap(), ["a/0118", "a/0119"]);
    assert_eq!(store.list("a/", Some("a/01175"), 1).await.unwrap(), ["a/0118"]);
    assert_eq!(store.list("a/", Some("A"), 1).await.unwrap(), ["a/0000"], "a cursor before the prefix");
    for (prefix, after) in [("a/", Some("b")), ("x", None), ("a/0119x", None)] {
        assert!(store.list(prefix, after, 10).await.unwrap().is_empty(), "{prefix} {after:?}");
    }
    assert!(store.list("", None, 0).await.unwrap().is_empty());
    let found = store.list_entries("b", None, 10).await.unwrap();
    assert_eq!((found[0].name.as_str(), found[0].bytes), ("b", 5));
    assert!(found[0].stamp_ms.abs_diff(now_ms()) < 60_000, "{}", found[0].stamp_ms);
}

async fn what_ended_or_was_deleted_is_in_no_list(place: &Place) {
    let store = place.store();
    for number in 0..40 {
        store.set_on(&format!("short-{number}"), bytes("v"), for_ms(1)).await.unwrap();
        store.set(&format!("gone-{number}"), bytes("v")).await.unwrap();
    }
    for number in 0..40 {
        store.delete(&format!("gone-{number}")).await.unwrap();
    }
    store.set("stays", bytes("v")).await.unwrap();
    until("all have ended", async || store.list("short-", None, 1).await.unwrap().is_empty()).await;
    assert_eq!(store.list("", None, 2).await.unwrap(), ["stays"]);
    // It begins anew, and stays.
    store.set("short-1", bytes("v")).await.unwrap();
    assert_eq!(store.list("", None, 10).await.unwrap(), ["short-1", "stays"]);
}

async fn stores_do_not_see_each_other(place: &Place) {
    let names = ["shop/default", "shop/default_2", "shop/default-2", "shop2/default", "s/hop-default"];
    let stores = names.map(|name| place.here.store(name.parse().unwrap()));
    for (store, name) in stores.iter().zip(names) {
        store.set("k", Bytes::from(name)).await.unwrap();
        store.set(name, bytes("v")).await.unwrap();
    }
    for (store, name) in stores.iter().zip(names) {
        assert_eq!(store.get("k").await.unwrap(), Some(Bytes::from(name)));
        let mut keys = ["k".to_owned(), name.to_owned()];
        keys.sort();
        assert_eq!(store.list("", None, 10).await.unwrap(), keys);
    }
}

async fn what_another_node_wrote_is_there(place: &Place) {
    assert_eq!(place.abilities.fresh_reads == Reach::Fleet, place.there.is_some());
    let Some(there) = &place.there else { return };
    let (here, there) = (place.store(), store(there));
    for number in 0..20_u8 {
        here.set("k", Bytes::copy_from_slice(&[number])).await.unwrap();
        assert_eq!(there.get("k").await.unwrap().as_deref(), Some(&[number][..]));
        there.delete("k").await.unwrap();
        assert_eq!(here.get("k").await.unwrap(), None);
        assert_eq!(here.list("k", None, 1).await.unwrap(), Vec::<String>::new());
    }
}

async fn one_of_several_nodes_writes_on_a_condition(place: &Place) {
    const ROUNDS: usize = 20;
    assert_eq!(place.abilities.condition == Reach::Fleet, place.there.is_some());
    let Some(there) = &place.there else { return };
    let nodes = [place.store(), store(there)];
    let mut version: Option<String> = None;
    for round in 0..ROUNDS {
        let tries = nodes.iter().map(|node| {
            node.set_if("k", Bytes::copy_from_slice(&round.to_le_bytes()), Terms::default(), version.as_deref())
        });
        let mut written: Vec<String> = join_all(tries).await.into_iter().filter_map(Result::unwrap).collect();
        assert_eq!(written.len(), 1, "round {round}");
        version = written.pop();
    }
    // And counters are exact over both.
    assert_eq!(place.abilities.exact_counters, Reach::Fleet);
    let counting = (0..40).map(|number| nodes[number % 2].increment("n", 1, None));
    let mut sums: Vec<i64> = join_all(counting).await.into_iter().map(Result::unwrap).collect();
    sums.sort_unstable();
    assert_eq!(sums, (1..=40).collect::<Vec<_>>());
}
