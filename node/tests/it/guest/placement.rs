//! Guests on nodes of two regions whose store only one of them holds.

use selvage_certs::Authority;
use selvage_config::plan::{Home, Placement};
use selvage_sync::{Holding, PeerAddr};

use super::*;
use crate::acme::place::kv_in;

async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let patience = Instant::now() + PATIENCE;
    while !holds() {
        assert!(Instant::now() < patience, "not in time: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}

/// A node of fra, which holds this guest's store, and one of sin, which does not; and the guest on each.
async fn in_two_regions(name: &str, cache_ms: u64, home: bool) -> ([Active; 2], [Kv; 2], [tempfile::TempDir; 2]) {
    let authority = Authority::create("fleet").unwrap();
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let (fra, sin) =
        (kv_in(&authority, "fra", "fra-1", dirs[0].path()), kv_in(&authority, "sin", "sin-1", dirs[1].path()));
    let kvs = [fra.await, sin.await];
    let peer = |region: &str, kv: &Kv| PeerAddr {
        node: format!("{region}-1").parse().unwrap(),
        region: region.parse().unwrap(),
        addr: kv.local_addr().unwrap(),
    };
    let roster = vec![peer("fra", &kvs[0]), peer("sin", &kvs[1])];
    let store: selvage_config::StoreName = "test/default".parse().unwrap();
    let placement = Placement {
        name: "eu".parse().unwrap(),
        regions: ["fra".parse().unwrap()].into(),
        stores: [(store.clone(), cache_ms)].into(),
    };
    let homes = home.then(|| Home::first(store.clone(), "fra-1".parse().unwrap(), 1));
    for kv in &kvs {
        kv.set_peers(roster.clone());
        kv.set_placements(vec![placement.clone()]);
        kv.set_homes(homes.iter().cloned().collect());
    }
    until("it is held", || matches!(kvs[0].holding(&store), Holding::Here(_))).await;
    until("there is a link", || kvs[1].status()[0].connected).await;
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

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_uses_a_store_that_its_region_does_not_hold_as_any_other() {
    let ([here, away], kvs, dirs) = in_two_regions("counter", 0, false).await;
    assert_eq!(away.ask("PUT", "/kv/a", "written in sin").await.0, 204);
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "written in sin".into()));
    assert_eq!(here.ask("GET", "/kv/a", "").await, (200, "written in sin".into()));
    for count in 1..=5 {
        assert_eq!(away.ask("POST", "/count/n", "").await, (200, format!("{count}\n")));
    }
    assert_eq!(here.ask("GET", "/count/n", "").await, (200, "5\n".into()));
    assert!(dirs[0].path().join("kv/placements/eu").exists());
    assert!(!dirs[1].path().join("kv/placements").exists(), "no row of it is there");
    assert!(kvs[1].placement_counts().asked >= 7);
    assert_eq!(away.ask("DELETE", "/kv/a", "").await.0, 204);
    assert_eq!(away.ask("GET", "/kv/a", "").await.0, 404);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_away_compares_and_counts_at_the_home_of_a_placed_store() {
    let ([here, away], _kvs, _dirs) = in_two_regions("counter", 60_000, true).await;
    let mut told = std::collections::BTreeSet::new();
    // The home begins a moment after it was named: what is asked before that waits.
    for _ in 0..15 {
        let (one, other) = tokio::join!(here.ask("POST", "/count/n", ""), away.ask("POST", "/count/n", ""));
        for (status, count) in [one, other] {
            assert_eq!(status, 200, "{count}");
            assert!(told.insert(count.clone()), "{count} was told twice");
        }
    }
    assert_eq!(away.ask("PUT", "/kv/a", "one").await.0, 204);
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "one".into()));
    assert_eq!(away.ask("PUT", "/kv/a", "two").await.0, 204);
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "two".into()), "what was kept of it is not what it wrote");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_is_told_that_nobody_who_holds_its_store_can_be_reached() {
    let ([_here, away], kvs, _dirs) = in_two_regions("counter", 60_000, false).await;
    assert_eq!(away.ask("PUT", "/kv/a", "value").await.0, 204);
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "value".into()));
    kvs[0].partition(true);
    until("the link ends", || !kvs[1].status()[0].connected).await;
    let (status, why) = away.ask("POST", "/count/n", "").await;
    assert_eq!(status, 500);
    assert!(why.contains("no node of placement eu, which holds store test/default, can be reached"), "{why}");
    assert_eq!(away.ask("GET", "/kv/a", "").await, (200, "value".into()), "what was read is kept");
}
