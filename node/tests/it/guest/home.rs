//! Guests on one node whose store has its home on another.

use selvage_certs::Authority;
use selvage_config::plan::Home;
use selvage_sync::{PeerAddr, Place};

use super::*;
use crate::acme::place::kv;

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < patience, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// Two nodes, the first of which is the home of this guest's store, and the guest on each.
async fn on_two_nodes(name: &str) -> ([Active; 2], [Kv; 2], [tempfile::TempDir; 2]) {
    let authority = Authority::create("fleet").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let kvs = [kv(&authority, "fra-1", dirs[0].path()).await, kv(&authority, "sin-1", dirs[1].path()).await];
    let peer = |node: &str, kv: &Kv| PeerAddr {
        node: node.parse().unwrap(),
        region: "fra".parse().unwrap(),
        addr: kv.local_addr().unwrap(),
    };
    let roster = vec![peer("fra-1", &kvs[0]), peer("sin-1", &kvs[1])];
    let home = Home::first("test/default".parse().unwrap(), "fra-1".parse().unwrap(), 1);
    for kv in &kvs {
        kv.set_peers(roster.clone());
        kv.set_homes(vec![home.clone()]);
    }
    until("the first is the home", || matches!(kvs[0].homes().get(&home.store), Some(Place::Here { .. }))).await;
    let mut guests = Vec::new();
    for kv in &kvs {
        let guest = Guest::new(name).await.with(|grants| {
            grants.stores = vec!["default".parse().unwrap()];
            grants.kv = kv.clone().into();
        });
        guests.push(guest.activate().unwrap());
    }
    let Ok(guests) = guests.try_into() else { panic!("two guests") };
    (guests, kvs, dirs)
}

async fn put(guest: &Active, path: &str, etag: Option<&str>) -> (u16, Option<String>) {
    let mut request = request("PUT", path, full("stitch"));
    request.http.headers_mut().insert("content-type", "text/tailored".parse().unwrap());
    if let Some(etag) = etag {
        request.http.headers_mut().insert("if-match", etag.parse().unwrap());
    }
    let response = guest.call(request).await.unwrap();
    let etag = response.headers().get("etag").map(|etag| etag.to_str().unwrap().to_owned());
    (response.status().as_u16(), etag)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_compare_and_set_is_decided_at_the_home_of_its_store() {
    let ([home, away], kvs, _dirs) = on_two_nodes("session").await;
    for round in 0..10 {
        let path = format!("/s{round}");
        let (one, other) = tokio::join!(put(&home, &path, None), put(&away, &path, None));
        let mut told = [one.0, other.0];
        told.sort_unstable();
        assert_eq!(told, [201, 412], "of two who create it on two nodes at once one does");
    }
    // What was read at one node is the condition at the other, at once.
    let (status, etag) = put(&away, "/s", None).await;
    assert_eq!(status, 201);
    let (status, newer) = put(&home, "/s", etag.as_deref()).await;
    assert_eq!(status, 200);
    assert_eq!(put(&away, "/s", etag.as_deref()).await, (412, None));
    let read = away.get("/s").await.unwrap();
    assert_eq!(read.headers()["etag"].to_str().ok().map(str::to_owned), newer, "read at the home");
    assert_eq!(put(&away, "/s", newer.as_deref()).await.0, 200);
    assert!(kvs[1].home_counts().carried >= 10);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guests_counts_on_two_nodes_are_all_different_and_its_own_writes_are_there_at_once() {
    let ([home, away], _kvs, _dirs) = on_two_nodes("counter").await;
    let mut told = std::collections::BTreeSet::new();
    for _ in 0..15 {
        let (one, other) = tokio::join!(home.ask("POST", "/count/n", ""), away.ask("POST", "/count/n", ""));
        for (status, count) in [one, other] {
            assert_eq!(status, 200);
            assert!(told.insert(count.clone()), "{count} was told twice");
        }
    }
    assert_eq!(away.ask("GET", "/count/n", "").await, (200, "30\n".into()));
    assert_eq!(away.ask("PUT", "/kv/a", "value").await.0, 204);
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "value".into()));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_told_that_the_home_of_its_store_is_away() {
    let ([_home, away], kvs, _dirs) = on_two_nodes("counter").await;
    assert_eq!(away.ask("PUT", "/kv/a", "value").await.0, 204);
    kvs[0].partition(true);
    until("the link ends", || !kvs[1].status()[0].connected).await;
    let (status, why) = away.ask("POST", "/count/n", "").await;
    assert_eq!(status, 500);
    assert!(why.contains("no link to fra-1, the home of store test/default: nothing was written"), "{why}");
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "value".into()), "reads go on");
}
