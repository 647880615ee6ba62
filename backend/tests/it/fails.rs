//! Servers that die, stand still, are full, refuse, or hold what nobody of ours wrote: each is told by name and in time.

use std::time::{Duration, Instant};

use async_nats::jetstream::stream::{Config as StreamConfig, DiscardPolicy};
use bytes::Bytes;
use selvage_backend::{Abilities, StoreError, Stores, Trouble};
use selvage_sync::KvError;
use selvage_sync::store::{Terms, now_ms};

use super::place::{Place, connected, node, store, table};
use super::server::{Kind, PATIENCE, Server, until};

const KINDS: [Kind; 2] = [Kind::Redis, Kind::Nats];

fn trouble<T>(result: Result<T, StoreError>) -> Trouble {
    match result {
        Err(StoreError::Backend(error)) => {
            assert_eq!(&*error.backend, "x");
            error.trouble
        }
        Err(error) => panic!("{error}"),
        Ok(_) => panic!("it was done"),
    }
}

fn v() -> Bytes {
    Bytes::from_static(b"v")
}

async fn away(stores: &Stores) {
    until("away", async || stores.status().iter().all(|status| !status.connected)).await;
}

async fn place(kind: Kind, more: &str) -> Option<Place> {
    let abilities = if kind == Kind::Redis { &Abilities::REDIS } else { &Abilities::NATS };
    Place::at(kind, abilities, more).await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_dies_is_told_and_what_it_acknowledged_is_there_when_it_is_back() {
    for kind in KINDS {
        let Some(mut place) = place(kind, "request_ms = 300\n").await else { return };
        let store = place.store();
        // The first answers of a server that has just come may take their time.
        until("it is written", async || store.set("k", v()).await.is_ok()).await;
        place.server.as_mut().unwrap().kill();
        away(&place.here).await;
        let begun = Instant::now();
        while begun.elapsed() < Duration::from_secs(1) {
            assert!(matches!(trouble(store.get("k").await), Trouble::Away | Trouble::Lost));
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        // From then on nobody waits for it.
        let asked = Instant::now();
        assert_eq!(trouble(store.set("k", v()).await), Trouble::Away);
        assert!(asked.elapsed() < Duration::from_millis(250), "{:?}", asked.elapsed());
        let status = &place.here.status()[0];
        assert!(status.error.is_some() && status.requests["away"] > 0, "{status:?}");
        place.server.as_mut().unwrap().resume();
        until("it is there again", async || store.get("k").await.is_ok_and(|value| value == Some(v()))).await;
        until("and takes writes", async || store.set("k", Bytes::new()).await.is_ok()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_stands_still_costs_no_more_than_the_bound() {
    for kind in KINDS {
        let Some(place) = place(kind, "request_ms = 400\nrequests_max = 1\n").await else { return };
        let store = place.store();
        until("it is written", async || store.set("k", v()).await.is_ok()).await;
        let server = place.server.as_ref().unwrap();
        server.signal("-STOP");
        let asked = Instant::now();
        // One request has the only place: the other is told so at once.
        let (one, other) = tokio::join!(store.get("k"), store.get("k"));
        assert!(asked.elapsed() < PATIENCE);
        assert_eq!(trouble(one), Trouble::Silent { ms: 400 });
        assert_eq!(trouble(other), Trouble::Overloaded { max: 1 });
        // After a few seconds it is known to be away, and nobody waits.
        away(&place.here).await;
        until("nobody waits", async || trouble(store.get("k").await) == Trouble::Away).await;
        server.signal("-CONT");
        until("it answers again", async || store.get("k").await.is_ok_and(|value| value == Some(v()))).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_begins_without_its_server_and_finds_it_when_it_comes() {
    for kind in KINDS {
        let Some(mut server) = Server::prepared(kind, |_| String::new()) else { return };
        let (stores, _dir) = node(&table(kind, server.port(), "request_ms = 2000\n")).await;
        let mesh = stores.mesh().kv().unwrap();
        mesh.set(&"other/default".parse().unwrap(), "k", v()).await.unwrap();
        assert_eq!(trouble(store(&stores).get("k").await), Trouble::Away);
        server.resume();
        connected(&stores).await;
        until("it is written", async || store(&stores).set("k", v()).await.is_ok()).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_full_server_refuses_writes_and_lets_room_be_made() {
    for kind in KINDS {
        let (settings, more) = match kind {
            Kind::Redis => ("maxmemory 3mb\nmaxmemory-policy noeviction\n", ""),
            Kind::Nats => ("", "bucket_mib_max = 1\n"),
        };
        let Some(server) = Server::start_with(kind, |_| settings.to_owned()) else { return };
        let (stores, _dir) = node(&table(kind, server.port(), &format!("request_ms = 20000\n{more}"))).await;
        connected(&stores).await;
        let store = store(&stores);
        let large = Bytes::from(vec![7; 100_000]);
        let mut written = Vec::new();
        let full = loop {
            let key = format!("k{:03}", written.len());
            match store.set(&key, large.clone()).await {
                Ok(()) => written.push(key),
                refused => break refused,
            }
            assert!(written.len() < 1_000);
        };
        assert_eq!(trouble(full), Trouble::Full);
        assert!(!written.is_empty());
        let refused = store.set_if("other", large.clone(), Terms::default(), None).await;
        assert_eq!(trouble(refused), Trouble::Full);
        // Nothing half: what was refused is in no list, and what is in the list is there.
        assert_eq!(store.list("", None, 1_000).await.unwrap(), written);
        for key in written.drain(..) {
            assert_eq!(store.get(&key).await.unwrap(), Some(large.clone()));
            store.delete(&key).await.unwrap();
        }
        store.set("k", large).await.unwrap();
        assert_eq!(store.increment("n", 1, None).await.unwrap(), 1);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_redis_server_refuses_is_told_by_its_word() {
    let Some(place) = place(Kind::Redis, "").await else { return };
    let (store, server) = (place.store(), place.server.as_ref().unwrap());
    store.set("k", v()).await.unwrap();
    assert_eq!(server.redis(&["SCRIPT", "FLUSH"]), "+OK");
    assert_eq!(store.get("k").await.unwrap(), Some(v()), "scripts are sent again");
    assert_eq!(server.redis(&["CONFIG", "SET", "min-replicas-to-write", "1"]), "+OK");
    assert_eq!(trouble(store.set("k", Bytes::new()).await), Trouble::Refused { code: "NOREPLICAS".into() });
    assert_eq!(store.get("k").await.unwrap(), Some(v()));
    assert_eq!(server.redis(&["CONFIG", "SET", "min-replicas-to-write", "0"]), "+OK");
    assert_eq!(server.redis(&["REPLICAOF", "127.0.0.1", "1"]), "+OK");
    until("it only reads", async || {
        store.set("k", Bytes::new()).await.is_err_and(|error| error.to_string().contains("READONLY"))
    })
    .await;
    assert_eq!(server.redis(&["REPLICAOF", "NO", "ONE"]), "+OK");
    until("it writes again", async || store.set("k", Bytes::new()).await.is_ok()).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_others_put_into_a_redis_server_is_no_entry() {
    let Some(place) = place(Kind::Redis, "").await else { return };
    let (store, server) = (place.store(), place.server.as_ref().unwrap());
    let key = "selvage:{shop/default}:k:k";
    for garbage in [&["SET", key, "text"][..], &["HSET", key, "other", "field"], &["HSET", key, "r", "1"]] {
        server.redis(garbage);
        assert_eq!(trouble(store.get("k").await), Trouble::Foreign, "{garbage:?}");
        server.redis(&["DEL", key]);
    }
    server.redis(&["LPUSH", key, "x"]);
    assert_eq!(trouble(store.set("k", v()).await), Trouble::Foreign);
    assert_eq!(trouble(store.increment("k", 1, None).await), Trouble::Foreign);
    store.delete("k").await.unwrap();
    store.set("k", v()).await.unwrap();
    server.redis(&["HSET", key, "n", "text"]);
    assert!(matches!(store.increment("k", 1, None).await, Err(StoreError::Kv(KvError::NotCounter { .. }))));
    assert_eq!(trouble(store.get("k").await), Trouble::Foreign);
    // An index that lost its entries, and one that has too many.
    server.redis(&["DEL", key]);
    assert!(store.list("", None, 10).await.unwrap().is_empty());
    assert_eq!(server.redis(&["ZCARD", "selvage:{shop/default}:i"]), ":0");
}

#[tokio::test(flavor = "multi_thread")]
async fn an_index_does_not_grow_by_what_has_ended() {
    let Some(place) = place(Kind::Redis, "").await else { return };
    let (store, server) = (place.store(), place.server.as_ref().unwrap());
    for number in 0..300 {
        let terms = Terms { expires_ms: Some(now_ms() + 1), metadata: Bytes::new() };
        store.set_on(&format!("session-{number}"), v(), terms).await.unwrap();
    }
    let card = async |of: &str| {
        let answer = server.redis(&["ZCARD", &format!("selvage:{{shop/default}}:{of}")]);
        answer.strip_prefix(':').unwrap().parse::<usize>().unwrap()
    };
    until("the index is small", async || {
        store.set("any", v()).await.unwrap();
        card("i").await == 1 && card("x").await == 0
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_value_beyond_the_bound_that_another_node_wrote_is_not_taken_in() {
    let Some(place) = place(Kind::Redis, "").await else { return };
    place.store().set("k", Bytes::from(vec![7; 2_000])).await.unwrap();
    let port = place.server.as_ref().unwrap().port();
    let (small, _dir) = node(&table(Kind::Redis, port, "value_kib_max = 1\n")).await;
    connected(&small).await;
    let refused = store(&small).get("k").await;
    assert!(
        matches!(refused, Err(StoreError::Kv(KvError::TooLarge { what: "value", bytes: 2_000, max: 1_024 }))),
        "{refused:?}"
    );
    assert_eq!(store(&small).list("", None, 10).await.unwrap(), ["k"]);
}

async fn nats(server: &Server) -> async_nats::jetstream::Context {
    let client = async_nats::connect(format!("nats://127.0.0.1:{}", server.port())).await.unwrap();
    async_nats::jetstream::new(client)
}

fn bucket() -> StreamConfig {
    StreamConfig {
        name: "KV_selvage".into(),
        subjects: vec!["$KV.selvage.>".into()],
        max_messages_per_subject: 1,
        discard: DiscardPolicy::New,
        allow_rollup: true,
        ..StreamConfig::default()
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_of_somebody_else_is_taken_for_what_it_can() {
    let Some(server) = Server::start(Kind::Nats) else { return };
    let context = nats(&server).await;
    context.create_stream(bucket()).await.unwrap();
    let (stores, _dir) = node(&table(Kind::Nats, server.port(), "")).await;
    connected(&stores).await;
    let store = store(&stores);
    store.set("k", v()).await.unwrap();
    let terms = Terms { expires_ms: Some(now_ms() + 60_000), metadata: Bytes::new() };
    assert!(matches!(trouble(store.set_on("k", v(), terms).await), Trouble::Unable { .. }));
    assert_eq!(store.get("k").await.unwrap(), Some(v()));
    // What NATS' own clients write is there, and what they delete is not.
    context.publish("$KV.selvage.shop.default.theirs", "t".into()).await.unwrap().await.unwrap();
    assert_eq!(store.get("theirs").await.unwrap(), Some(Bytes::from_static(b"t")));
    assert_eq!(store.list("", None, 10).await.unwrap(), ["k", "theirs"]);
    let mut deleted = async_nats::HeaderMap::new();
    deleted.insert("KV-Operation", "DEL");
    let subject = "$KV.selvage.shop.default.theirs";
    context.publish_with_headers(subject, deleted, Bytes::new()).await.unwrap().await.unwrap();
    assert_eq!((store.get("theirs").await.unwrap(), store.list("", None, 10).await.unwrap().len()), (None, 1));
    assert!(store.set_if("theirs", v(), Terms::default(), None).await.unwrap().is_some());
    // Garbage is no key and no entry.
    for subject in ["$KV.selvage.shop.default.=2e", "$KV.selvage.shop.default.a.b"] {
        context.publish(subject, "x".into()).await.unwrap().await.unwrap();
    }
    let mut broken = async_nats::HeaderMap::new();
    broken.insert("Selvage-Expires-Ms", "soon");
    let subject = "$KV.selvage.shop.default.broken";
    context.publish_with_headers(subject, broken, Bytes::new()).await.unwrap().await.unwrap();
    assert_eq!(trouble(store.get("broken").await), Trouble::Foreign);
    assert_eq!(store.list("", None, 10).await.unwrap(), ["broken", "k", "theirs"]);
    store.delete("broken").await.unwrap();
    assert_eq!(store.get("broken").await.unwrap(), None);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_bucket_that_forgets_is_not_taken_and_one_that_goes_is_made_again() {
    let Some(server) = Server::start(Kind::Nats) else { return };
    let context = nats(&server).await;
    context.create_stream(StreamConfig { max_bytes: 1 << 20, discard: DiscardPolicy::Old, ..bucket() }).await.unwrap();
    let (stores, _dir) = node(&table(Kind::Nats, server.port(), "request_ms = 2000\n")).await;
    until("it is told", async || {
        stores.status()[0].error.as_ref().is_some_and(|error| error.contains("it forgets entries when it is full"))
    })
    .await;
    assert_eq!(trouble(store(&stores).get("k").await), Trouble::Away);
    context.delete_stream("KV_selvage").await.unwrap();
    connected(&stores).await;
    store(&stores).set("k", v()).await.unwrap();
    context.delete_stream("KV_selvage").await.unwrap();
    assert!(store(&stores).set("k", v()).await.is_err());
    until("it is made again", async || store(&stores).set("k", v()).await.is_ok()).await;
}
