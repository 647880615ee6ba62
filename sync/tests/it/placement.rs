//! Stores that the nodes of some regions hold, over real links.

use std::collections::BTreeSet;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::crypto::rustls::{QuicClientConfig, QuicServerConfig};
use selvage_config::NodeName;
use selvage_config::plan::{Home, Placement};
use selvage_sync::store::{CACHE_BYTES_MAX, Terms};
use selvage_sync::wire::{self, ALPN, Message, PLACED_ALPN, Reach, Versions};
use selvage_sync::{Elsewhere, Holding, Kv, KvError, PeerAddr, Place, PlacementError, Token, VersionVector};

use crate::fleet::{Fleet, region_of, store, until};

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn placed(regions: &[&str], cache_ms: u64) -> Placement {
    Placement {
        name: "eu".parse().unwrap(),
        regions: regions.iter().map(|region| region.parse().unwrap()).collect(),
        stores: [(store(), cache_ms)].into(),
    }
}

fn tell(fleet: &Fleet, placement: &Placement) {
    fleet.nodes.iter().for_each(|(_, kv, _)| kv.set_placements(vec![placement.clone()]));
}

fn mesh(kv: &Kv) -> Option<Kv> {
    match kv.holding(&store()) {
        Holding::Here(mesh) => Some(mesh),
        Holding::Elsewhere(_) => None,
    }
}

fn away(kv: &Kv) -> Elsewhere {
    match kv.holding(&store()) {
        Holding::Here(_) => panic!("it is here"),
        Holding::Elsewhere(away) => away,
    }
}

/// A fleet whose store is held in fra and ams, as all of its nodes know.
async fn in_eu(nodes: &[&str], cache_ms: u64) -> Fleet {
    let fleet = Fleet::meshed(nodes).await;
    tell(&fleet, &placed(&["fra", "ams"], cache_ms));
    held(&fleet, &["fra", "ams"]).await;
    fleet
}

/// Waits until the nodes of these regions hold the store and have links to each other.
async fn held(fleet: &Fleet, regions: &[&str]) {
    for (node, kv, _) in &fleet.nodes {
        if regions.iter().any(|region| region_of(node.as_str()).as_str() == *region) {
            until("it holds the store", || mesh(kv).is_some()).await;
            until("all links of the placement stand", || mesh(kv).unwrap().status().iter().all(|peer| peer.connected))
                .await;
        }
    }
}

async fn set(kv: &Kv, key: &str, value: &str) -> Result<(), KvError> {
    let value = Bytes::copy_from_slice(value.as_bytes());
    match kv.holding(&store()) {
        Holding::Here(mesh) => mesh.set(&store(), key, value).await,
        Holding::Elsewhere(away) => away.set_on(key, value, Terms::default()).await.map(drop),
    }
}

async fn read(kv: &Kv, key: &str) -> Result<Option<Bytes>, KvError> {
    match kv.holding(&store()) {
        Holding::Here(mesh) => mesh.get(&store(), key),
        Holding::Elsewhere(away) => away.get(key).await,
    }
}

async fn get(kv: &Kv, key: &str) -> Option<Bytes> {
    read(kv, key).await.unwrap()
}

async fn sees(kv: &Kv, key: &str, value: &str) {
    let begun = Instant::now();
    while !read(kv, key).await.is_ok_and(|read| read.is_some_and(|read| read == value)) {
        assert!(begun.elapsed() < Duration::from_secs(60), "{key} = {value} is not seen");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

/// Whether these bytes lie in any file below a directory.
fn holds(directory: &Path, bytes: &[u8]) -> bool {
    std::fs::read_dir(directory).unwrap().any(|entry| {
        let path = entry.unwrap().path();
        if path.is_dir() {
            return holds(&path, bytes);
        }
        std::fs::read(path).unwrap().windows(bytes.len()).any(|window| window == bytes)
    })
}

#[tokio::test(flavor = "multi_thread")]
async fn rows_of_a_placed_store_are_on_the_disks_of_its_regions_alone_and_all_nodes_use_it() {
    let fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 0).await;
    set(fleet.kv(2), "from-sin", "needle-in-sin").await.unwrap();
    set(fleet.kv(0), "from-fra", "needle-in-fra").await.unwrap();
    for node in 0..3 {
        sees(fleet.kv(node), "from-sin", "needle-in-sin").await;
        sees(fleet.kv(node), "from-fra", "needle-in-fra").await;
    }
    // A store that is not placed is everywhere.
    let all: selvage_config::StoreName = "app/everywhere".parse().unwrap();
    fleet.kv(0).set(&all, "k", Bytes::from_static(b"needle-of-all")).await.unwrap();
    until("all have it", || (0..3).all(|node| fleet.kv(node).exists(&all, "k").unwrap())).await;
    for (_, kv, _) in &fleet.nodes {
        assert_eq!(kv.list(&store(), "", None, 10).unwrap(), Vec::<String>::new(), "nothing of it in the rows of all");
        kv.close().await;
    }
    for (node, _, directory) in &fleet.nodes {
        let holds_it = [&b"needle-in-sin"[..], b"needle-in-fra"].map(|needle| holds(directory.path(), needle));
        assert_eq!(holds_it, [node.as_str() != "sin-1"; 2], "{node}");
        assert_eq!(directory.path().join("placements/eu").exists(), node.as_str() != "sin-1", "{node}");
        assert!(holds(directory.path(), b"needle-of-all"), "{node}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_outside_can_do_all_that_a_node_inside_can() {
    let fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 0).await;
    let away = away(fleet.kv(2));
    assert_eq!(away.get("k").await.unwrap(), None);
    let terms = Terms { expires_ms: Some(u64::MAX), metadata: Bytes::from_static(b"kind") };
    let written = away.set_on("k", Bytes::from_static(b"1"), terms.clone()).await.unwrap();
    let kept = away.latest("k").await.unwrap().unwrap();
    assert_eq!((kept.value.as_ref(), kept.terms, &kept.version), (&b"1"[..], terms.clone(), &written.dot));
    let second = away.set_if("k", Bytes::from_static(b"2"), terms.clone(), Some(written.dot.clone())).await.unwrap();
    assert!(second.is_some());
    assert_eq!(away.set_if("k", Bytes::from_static(b"3"), terms, Some(written.dot)).await.unwrap(), None);
    assert!(!away.swap("k", Some(b"1"), Bytes::from_static(b"x")).await.unwrap());
    assert!(away.swap("k", Some(b"2"), Bytes::from_static(b"3")).await.unwrap());
    assert_eq!((away.exists("k").await.unwrap(), away.exists("none").await.unwrap()), (true, false));
    assert_eq!(away.increment_until("n", 5, None).await.unwrap(), 5);
    assert_eq!(away.increment_until("n", -2, None).await.unwrap(), 3);
    let large = Bytes::from(vec![7; 3 << 20]);
    away.set_on("large", large.clone(), Terms::default()).await.unwrap();
    assert_eq!(away.get("large").await.unwrap(), Some(large));
    let listed = away.list_entries("", None, 10).await.unwrap();
    assert_eq!(listed.iter().map(|key| key.name.as_str()).collect::<Vec<_>>(), ["k", "large", "n"]);
    assert_eq!(listed[1].bytes, 3 << 20);
    let page = away.list_entries("", Some("k"), 1).await.unwrap();
    assert_eq!((page.len(), page[0].name.as_str()), (1, "large"));
    away.delete("k").await.unwrap();
    assert_eq!(away.get("k").await.unwrap(), None);
    let counts = (fleet.kv(2).placement_counts(), fleet.kv(0).placement_counts(), fleet.kv(1).placement_counts());
    // Each once; one that was not ready yet may have been asked, too.
    assert_eq!(counts.1.answered + counts.2.answered, 17);
    assert!(counts.0.asked >= 17);
    assert_eq!((counts.0.refused, counts.0.unknown), (0, 0));
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_node_inside_refuses_the_asker_is_told() {
    let fleet = in_eu(&["fra-1", "sin-1"], 0).await;
    let away = away(fleet.kv(1));
    away.set_on("text", Bytes::from_static(b"not a number"), Terms::default()).await.unwrap();
    let refused = away.increment_until("text", 1, None).await.unwrap_err();
    assert!(
        matches!(&refused, KvError::Placement(PlacementError::Refused { holder, why, .. })
            if *holder == name("fra-1") && why.contains("counter")),
        "{refused:?}"
    );
    assert!(matches!(away.get("\u{10ffff}k").await, Err(KvError::Hidden)));
    let long = "k".repeat(2000);
    assert!(matches!(away.get(&long).await, Err(KvError::TooLarge { what: "key", .. })));
    let too_large = Bytes::from(vec![0; (25 << 20) + 2048]);
    assert!(matches!(away.set_on("k", too_large, Terms::default()).await, Err(KvError::TooLarge { .. })));
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_that_holds_a_store_may_go_and_another_is_asked() {
    let mut fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 0).await;
    let counting = {
        let away = away(fleet.kv(2));
        tokio::spawn(async move {
            let (mut counted, mut unknown) = (0_i64, 0_i64);
            for _ in 0..120 {
                match away.increment_until("n", 1, None).await {
                    Ok(_) => counted += 1,
                    Err(KvError::Placement(PlacementError::Unknown { .. })) => unknown += 1,
                    Err(error) => panic!("{error}"),
                }
            }
            (counted, unknown)
        })
    };
    let some = || fleet.kv(2).placement_counts().asked >= 20;
    until("some are counted", some).await;
    // Whoever is asked now goes.
    let gone = usize::from(fleet.kv(0).placement_counts().answered == 0);
    fleet.kv(gone).close().await;
    let (counted, unknown) = counting.await.unwrap();
    // One when its rows close, and one when its link does.
    assert!(unknown <= 2, "{unknown} were under way");
    set(fleet.kv(2), "after", "1").await.unwrap();
    sees(fleet.kv(2), "after", "1").await;
    // Nothing that was acknowledged is lost, and nothing was done twice.
    fleet.restart(gone).await;
    fleet.introduce();
    tell(&fleet, &placed(&["fra", "ams"], 0));
    held(&fleet, &["fra", "ams"]).await;
    let sum = || {
        let bytes = mesh(fleet.kv(1 - gone)).unwrap().get(&store(), "n").unwrap().unwrap();
        i64::from_le_bytes((*bytes).try_into().unwrap())
    };
    until("all is there", || (counted..=counted + unknown).contains(&sum())).await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_a_node_that_holds_it_who_asks_is_told_in_time_and_nothing_is_done() {
    let fleet = in_eu(&["fra-1", "sin-1"], 0).await;
    set(fleet.kv(1), "k", "before").await.unwrap();
    fleet.kv(1).partition(true);
    until("the link ends", || !fleet.kv(1).status()[0].connected).await;
    let begun = Instant::now();
    for refused in [set(fleet.kv(1), "k", "after").await.unwrap_err(), away(fleet.kv(1)).get("k").await.unwrap_err()] {
        assert!(matches!(&refused, KvError::Placement(PlacementError::Unreachable { .. })), "{refused:?}");
        assert!(refused.to_string().contains("placement eu") && refused.to_string().contains("nothing was done"));
    }
    assert!(begun.elapsed() < Duration::from_secs(30));
    assert_eq!(fleet.kv(1).placement_counts().refused, 2);
    assert_eq!(get(fleet.kv(0), "k").await.unwrap(), "before");
    fleet.kv(1).partition(false);
    until("the link is back", || fleet.kv(1).status()[0].connected).await;
    sees(fleet.kv(1), "k", "before").await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_read_outside_may_be_kept_and_own_writes_are_seen_at_once() {
    let fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 3_600_000).await;
    set(fleet.kv(2), "k", "1").await.unwrap();
    assert_eq!(get(fleet.kv(2), "k").await.unwrap(), "1");
    let asked = fleet.kv(2).placement_counts().asked;
    for _ in 0..50 {
        assert_eq!(get(fleet.kv(2), "k").await.unwrap(), "1");
        assert!(away(fleet.kv(2)).exists("k").await.unwrap());
    }
    let counts = fleet.kv(2).placement_counts();
    assert_eq!((counts.asked, counts.cached), (asked, 100));
    assert!(counts.cached_bytes > 0 && counts.cached_bytes < CACHE_BYTES_MAX as u64);
    // Others' writes are seen when it is too old, own ones at once; what a condition is made of is never kept.
    set(fleet.kv(0), "k", "2").await.unwrap();
    assert_eq!(get(fleet.kv(2), "k").await.unwrap(), "1");
    let latest = || async { away(fleet.kv(2)).latest("k").await.unwrap().unwrap().value };
    let begun = Instant::now();
    while latest().await != "2" {
        assert!(begun.elapsed() < Duration::from_secs(60));
    }
    for number in 0..30 {
        let value = format!("own-{number}");
        set(fleet.kv(2), "k", &value).await.unwrap();
        assert_eq!(get(fleet.kv(2), "k").await.unwrap(), value);
    }
    away(fleet.kv(2)).delete("k").await.unwrap();
    assert_eq!(get(fleet.kv(2), "k").await, None);
    // With a shorter life others' writes are seen soon.
    tell(&fleet, &placed(&["fra", "ams"], 100));
    set(fleet.kv(0), "k", "others").await.unwrap();
    sees(fleet.kv(2), "k", "others").await;
    set(fleet.kv(1), "k", "newer").await.unwrap();
    sees(fleet.kv(2), "k", "newer").await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_session_reads_outside_what_it_wrote_inside() {
    let fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 3_600_000).await;
    for number in 0..20 {
        // Each a key of its own: of two writes within a millisecond the later one need not be the newer.
        let (key, value) = (format!("k{number}"), Bytes::from(format!("{number}")));
        assert_eq!(get(fleet.kv(2), &key).await, None);
        let inside = mesh(fleet.kv(number % 2)).unwrap();
        let written = inside.set_on(&store(), &key, value.clone(), Terms::default()).await;
        let mut token = Token::default();
        token.saw(&written.unwrap().dot);
        assert_eq!(away(fleet.kv(2)).get_seen(&key, token).await.unwrap(), Some(value));
    }
    // A write that nobody has is not waited for without an end.
    let refused = away(fleet.kv(2)).get_seen("k", "fra-9.1.1".parse().unwrap()).await.unwrap_err();
    assert!(matches!(refused, KvError::Placement(PlacementError::NotReady { .. })), "{refused:?}");
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_in_the_placement_decides_for_nodes_outside() {
    let fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 1_000).await;
    let home = Home::first(store(), name("ams-1"), 10);
    fleet.nodes.iter().for_each(|(_, kv, _)| kv.set_homes(vec![home.clone()]));
    let is_home = |kv: &Kv| matches!(mesh(kv).unwrap().homes().get(&store()), Some(Place::Here { .. }));
    until("the home decides", || is_home(fleet.kv(1))).await;
    assert!(fleet.kv(2).homes().is_empty() && fleet.kv(1).homes().is_empty(), "it is the placement's alone");
    let mut asking = Vec::new();
    for number in 0..30 {
        let kv = fleet.kv(number % 3).clone();
        asking.push(tokio::spawn(async move {
            let value = Bytes::from(format!("{number}"));
            match kv.holding(&store()) {
                Holding::Here(mesh) => {
                    let won = mesh.swap(&store(), "lock", None, value).await.unwrap();
                    (won, mesh.increment(&store(), "count", 1).await.unwrap())
                }
                Holding::Elsewhere(away) => {
                    let won = away.swap("lock", None, value).await.unwrap();
                    (won, away.increment_until("count", 1, None).await.unwrap())
                }
            }
        }));
    }
    let (mut winners, mut counts) = (0, BTreeSet::new());
    for asked in asking {
        let (won, count) = asked.await.unwrap();
        winners += usize::from(won);
        assert!(counts.insert(count), "{count} was told twice");
    }
    assert_eq!((winners, counts), (1, (1..=30).collect()));
    // The home is asked itself, not through the other.
    assert_eq!(fleet.kv(0).placement_counts().answered, 0);
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_that_all_nodes_held_are_carried_over_and_leave_the_others() {
    let fleet = Fleet::meshed(&["fra-1", "ams-1", "sin-1"]).await;
    for number in 0..150 {
        fleet.set(2, &format!("k{number:03}"), &format!("{number}")).await;
    }
    let terms = Terms { expires_ms: Some(u64::MAX), metadata: Bytes::from_static(b"kind") };
    fleet.kv(0).set_on(&store(), "terms", Bytes::from_static(b"v"), terms.clone()).await.unwrap();
    assert_eq!(fleet.kv(2).increment(&store(), "n", 41).await.unwrap(), 41);
    tell(&fleet, &placed(&["fra", "ams"], 0));
    // While it is being carried over it is in no place.
    let waiting = |kv: &Kv| kv.placements()[0].waiting.clone();
    assert_eq!((waiting(fleet.kv(0)), waiting(fleet.kv(2))), (vec![store()], vec![]));
    held(&fleet, &["fra", "ams"]).await;
    for number in (0..150).step_by(30) {
        sees(fleet.kv(2), &format!("k{number:03}"), &format!("{number}")).await;
    }
    assert_eq!(away(fleet.kv(2)).latest("terms").await.unwrap().unwrap().terms, terms);
    let all = || mesh(fleet.kv(0)).unwrap().list(&store(), "", None, 1000).unwrap().len();
    until("all are there", || all() == 152).await;
    until("none is elsewhere", || {
        fleet.nodes.iter().all(|(_, kv, _)| kv.list(&store(), "", None, 10).unwrap().is_empty())
    })
    .await;
    assert_eq!(away(fleet.kv(2)).increment_until("n", 1, None).await.unwrap(), 42);
    // What a node whose plan is older writes is carried over too, and counts; but nothing older than what is there.
    fleet.kv(2).set(&store(), "late", Bytes::from_static(b"late")).await.unwrap();
    fleet.kv(2).increment(&store(), "n", 8).await.unwrap();
    sees(fleet.kv(2), "late", "late").await;
    let fifty = Bytes::copy_from_slice(&50_i64.to_le_bytes());
    until("it counts", || mesh(fleet.kv(0)).unwrap().get(&store(), "n").unwrap() == Some(fifty.clone())).await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_placement_gets_a_region_and_loses_another_and_nothing_is_lost() {
    let fleet = in_eu(&["fra-1", "ams-1", "sin-1"], 0).await;
    set(fleet.kv(0), "k", "1").await.unwrap();
    sees(fleet.kv(1), "k", "1").await;
    tell(&fleet, &placed(&["ams", "sin"], 0));
    held(&fleet, &["sin"]).await;
    until("the new one has it", || {
        mesh(fleet.kv(2)).unwrap().get(&store(), "k").unwrap().is_some_and(|value| value == "1")
    })
    .await;
    set(fleet.kv(2), "k", "2").await.unwrap();
    // The one that was left asks the others, and opens no row of its own.
    assert!(mesh(fleet.kv(0)).is_none());
    until("its rows are closed", || fleet.kv(0).meshes().is_empty()).await;
    sees(fleet.kv(0), "k", "2").await;
    set(fleet.kv(0), "k", "3").await.unwrap();
    sees(fleet.kv(1), "k", "3").await;
    // And back: what it had is there, and what it missed comes.
    tell(&fleet, &placed(&["ams", "fra", "sin"], 0));
    held(&fleet, &["fra", "ams", "sin"]).await;
    sees(fleet.kv(0), "k", "3").await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_restart_has_the_rows_and_is_ready_with_them() {
    let mut fleet = in_eu(&["fra-1", "sin-1"], 0).await;
    set(fleet.kv(1), "k", "1").await.unwrap();
    fleet.restart(0).await;
    fleet.introduce();
    tell(&fleet, &placed(&["fra", "ams"], 0));
    assert!(!fleet.kv(0).is_ready(), "its placement is not open yet");
    sees(fleet.kv(1), "k", "1").await;
    until("it is ready", || fleet.kv(0).is_ready()).await;
    fleet.close().await;
}

/// Tries to get a link of a placement to a node; says how the connection ended, or that something was said.
async fn attempt(fleet: &Fleet, from: &str, to: usize, placement: &str) -> Result<(), String> {
    let mut config = (*fleet.tls(from).client).clone();
    config.alpn_protocols = vec![PLACED_ALPN.to_vec()];
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let (node, kv, _) = &fleet.nodes[to];
    let address = kv.local_addr().unwrap();
    let server = format!("{node}.node.selvage.internal");
    let connection = endpoint.connect_with(client, address, &server).unwrap().await.map_err(|e| e.to_string())?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
    let length = u8::try_from(placement.len()).unwrap();
    send.write_all(&[&[length], placement.as_bytes()].concat()).await.map_err(|error| error.to_string())?;
    // A link begins with a hello; a refusal comes as the end of the connection.
    let mut first = [0];
    let read = tokio::time::timeout(Duration::from_secs(20), receive.read_exact(&mut first));
    let ended = || connection.close_reason().map_or_else(String::new, |why| why.to_string());
    read.await.expect("an answer in time").map_err(|_| ended())
}

#[tokio::test(flavor = "multi_thread")]
async fn who_is_not_of_a_placement_gets_no_link_of_it() {
    let fleet = in_eu(&["fra-1", "sin-1"], 0).await;
    // Of the fleet, and elsewhere.
    let refused = attempt(&fleet, "sin-1", 0, "eu").await;
    assert!(refused.as_ref().is_err_and(|why| why.contains("not in the roster")), "{refused:?}");
    // Of the same authority, and not in the roster: so are revoked ones.
    let refused = attempt(&fleet, "ams-1", 0, "eu").await;
    assert!(refused.as_ref().is_err_and(|why| why.contains("not in the roster")), "{refused:?}");
    // No such placement, or not here; and what is none.
    for placement in ["us", "Not A Name", ""] {
        let refused = attempt(&fleet, "sin-1", 0, placement).await;
        assert!(refused.is_err(), "{placement}");
    }
    let refused = attempt(&fleet, "fra-1", 1, "eu").await;
    assert!(refused.as_ref().is_err_and(|why| why.contains("not held here")), "{refused:?}");
    // One that is of it gets one.
    let ams = PeerAddr { node: name("ams-1"), region: region_of("ams-1"), addr: "127.0.0.1:9".parse().unwrap() };
    fleet.kv(0).set_peers(vec![fleet.address(1), ams]);
    until("the roster is new", || mesh(fleet.kv(0)).unwrap().status().len() == 1).await;
    assert_eq!(attempt(&fleet, "ams-1", 0, "eu").await, Ok(()));
    // And none once it is revoked.
    fleet.kv(0).set_peers(vec![fleet.address(1)]);
    let refused = attempt(&fleet, "ams-1", 0, "eu").await;
    assert!(refused.is_err(), "{refused:?}");
    set(fleet.kv(1), "k", "1").await.unwrap();
    fleet.close().await;
}

/// A node that holds the store by the plan, whose program knows no placements.
async fn older(fleet: &Fleet, node: &'static str) -> (PeerAddr, tokio::task::JoinHandle<()>) {
    let mut config = (*fleet.tls(node).server).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let server = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(config).unwrap()));
    let endpoint = quinn::Endpoint::server(server, "127.0.0.1:0".parse().unwrap()).unwrap();
    let addr = endpoint.local_addr().unwrap();
    let serving = tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let Ok(connection) = incoming.await else { continue };
            let (mut send, mut receive) = connection.accept_bi().await.unwrap();
            let (versions, vector, reach) = (Versions { min: 3, max: 4 }, VersionVector::default(), Reach::default());
            let hello = Message::Hello { versions, node: name(node), vector, reach };
            send.write_all(&wire::encode(&hello)).await.unwrap();
            while receive.read_chunk(64 * 1024, true).await.is_ok_and(|chunk| chunk.is_some()) {}
        }
    });
    (PeerAddr { node: name(node), region: region_of(node), addr }, serving)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_version_without_placements_has_its_link_of_all_stores_and_is_named() {
    let fleet = Fleet::start(&["ams-1"]).await;
    let (peer, serving) = older(&fleet, "fra-1").await;
    // ams-1 comes first by name, so it dials.
    fleet.kv(0).set_peers(vec![peer]);
    fleet.kv(0).set_placements(vec![placed(&["fra"], 0)]);
    until("the link stands", || fleet.kv(0).status()[0].connected).await;
    let mut refused = away(fleet.kv(0)).get("k").await.unwrap_err();
    while matches!(refused, KvError::Placement(PlacementError::Unreachable { .. })) {
        // Its greeting is on its way.
        refused = away(fleet.kv(0)).get("k").await.unwrap_err();
    }
    let named =
        matches!(&refused, KvError::Placement(PlacementError::Older { holder, .. }) if *holder == name("fra-1"));
    assert!(named, "{refused:?}");
    serving.abort();
    fleet.close().await;
}
