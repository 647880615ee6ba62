//! Stores that have a home, over real links.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::crypto::rustls::QuicServerConfig;
use selvage_config::NodeName;
use selvage_config::plan::Home;
use selvage_sync::store::Terms;
use selvage_sync::wire::{self, ALPN, Message, Reach, Versions};
use selvage_sync::{HomeError, Kv, KvError, PeerAddr, Place, VersionVector};

use crate::fleet::{Fleet, region, store, until};

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn here(kv: &Kv) -> bool {
    matches!(kv.homes().get(&store()), Some(Place::Here { .. }))
}

/// A fleet whose store has its home at the first node, and what the plan says.
async fn at_home(nodes: &[&str]) -> (Fleet, Home) {
    let fleet = Fleet::meshed(nodes).await;
    let home = Home::first(store(), name(nodes[0]), 10);
    tell(&fleet, &home);
    until("the first node is the home", || here(fleet.kv(0))).await;
    (fleet, home)
}

fn tell(fleet: &Fleet, home: &Home) {
    fleet.nodes.iter().for_each(|(_, kv, _)| kv.set_homes(vec![home.clone()]));
}

#[tokio::test(flavor = "multi_thread")]
async fn of_many_who_want_one_key_one_gets_it_and_no_count_is_told_twice() {
    let (fleet, _) = at_home(&["a", "b", "c"]).await;
    let mut asking = Vec::new();
    for number in 0..30 {
        let kv = fleet.kv(number % 3).clone();
        asking.push(tokio::spawn(async move {
            let won = kv.swap(&store(), "lock", None, Bytes::from(format!("{number}"))).await.unwrap();
            (won, kv.increment(&store(), "count", 1).await.unwrap())
        }));
    }
    let (mut winners, mut counts) = (0, BTreeSet::new());
    for asked in asking {
        let (won, count) = asked.await.unwrap();
        winners += usize::from(won);
        assert!(counts.insert(count), "{count} was told twice");
    }
    assert_eq!((winners, counts), (1, (1..=30).collect()));
    let counts = fleet.kv(1).home_counts();
    assert!(counts.carried >= 20 && counts.unknown == 0, "{counts:?}");
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_wrote_through_a_node_reads_it_there_at_once_and_the_latest_is_read_at_the_home() {
    let (fleet, _) = at_home(&["a", "b"]).await;
    for number in 0..20 {
        let text = format!("{number}");
        fleet.set(1, "k", &text).await;
        assert_eq!(fleet.kv(1).get(&store(), "k").unwrap(), Some(Bytes::from(text)), "a reader of b sees it");
    }
    let seen = fleet.kv(1).latest(&store(), "k").await.unwrap().unwrap();
    let terms = Terms { expires_ms: None, metadata: Bytes::from_static(b"kind") };
    let (one, other, seen) = (Bytes::from_static(b"x"), Bytes::from_static(b"y"), Some(seen.version));
    let newer = fleet.kv(1).set_if(&store(), "k", one, terms.clone(), seen.clone()).await.unwrap().unwrap();
    let late = fleet.kv(0).set_if(&store(), "k", other, terms, seen).await.unwrap();
    assert_eq!(late, None);
    let latest = fleet.kv(1).latest(&store(), "k").await.unwrap().unwrap();
    assert_eq!(
        (latest.value.as_ref(), latest.terms.metadata.as_ref(), latest.version),
        (&b"x"[..], &b"kind"[..], newer.dot)
    );
    fleet.kv(1).delete(&store(), "k").await.unwrap();
    assert_eq!(fleet.kv(1).get(&store(), "k").unwrap(), None);
    assert_eq!(fleet.kv(1).latest(&store(), "k").await.unwrap(), None);
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_large_value_is_carried_and_compared() {
    let (fleet, _) = at_home(&["a", "b"]).await;
    let (one, other) = (Bytes::from(vec![1; 3 << 20]), Bytes::from(vec![2; 3 << 20]));
    assert!(fleet.kv(1).swap(&store(), "large", None, one.clone()).await.unwrap());
    assert!(!fleet.kv(1).swap(&store(), "large", Some(&other), other.clone()).await.unwrap());
    assert!(fleet.kv(1).swap(&store(), "large", Some(&one), other.clone()).await.unwrap());
    assert_eq!(fleet.kv(1).latest(&store(), "large").await.unwrap().unwrap().value, other);
    let too_large = Bytes::from(vec![0; (25 << 20) + 2048]);
    let refused = fleet.kv(1).set(&store(), "large", too_large).await;
    assert!(matches!(refused, Err(KvError::TooLarge { .. })), "{refused:?}");
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_the_home_refuses_the_asker_is_told() {
    let (fleet, _) = at_home(&["a", "b"]).await;
    fleet.set(1, "text", "not a number").await;
    let refused = fleet.kv(1).increment(&store(), "text", 1).await.unwrap_err();
    assert!(
        matches!(&refused, KvError::Home(HomeError::Refused { home, why, .. }) if *home == name("a") && why.contains("counter")),
        "{refused:?}"
    );
    assert!(matches!(fleet.kv(1).set(&store(), "\u{10ffff}k", Bytes::new()).await, Err(KvError::Hidden)));
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn without_the_home_nothing_is_written_and_who_asks_is_told_in_time() {
    let (fleet, _) = at_home(&["a", "b"]).await;
    fleet.set(1, "k", "before").await;
    fleet.kv(0).partition(true);
    until("the link ends", || !fleet.kv(1).status()[0].connected).await;
    let begun = Instant::now();
    let refused = fleet.kv(1).set(&store(), "k", Bytes::from_static(b"after")).await.unwrap_err();
    assert!(matches!(refused, KvError::Home(HomeError::Unreachable { .. })), "{refused:?}");
    assert!(begun.elapsed() < Duration::from_secs(30));
    let refused = fleet.kv(1).latest(&store(), "k").await.unwrap_err();
    assert!(matches!(refused, KvError::Home(HomeError::Unreachable { .. })), "{refused:?}");
    assert_eq!(fleet.kv(1).get(&store(), "k").unwrap(), Some(Bytes::from_static(b"before")), "reads go on");
    assert_eq!(fleet.kv(1).home_counts().refused, 2);
    // The home decides for its own node, and the other has it after the cut.
    fleet.set(0, "k", "home").await;
    fleet.kv(0).partition(false);
    fleet.sees(1, "k", Some("home")).await;
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_moves_under_load_and_no_count_is_lost_or_told_twice() {
    let (fleet, first) = at_home(&["a", "b", "c"]).await;
    let second = first.next(&name("b"), 0, 20).unwrap();
    let counting: Vec<_> = (0..3)
        .map(|index| {
            let kv = fleet.kv(index).clone();
            tokio::spawn(async move {
                let mut counts = Vec::new();
                while counts.len() < 40 {
                    counts.push(kv.increment(&store(), "count", 1).await.unwrap());
                }
                counts
            })
        })
        .collect();
    until("some counted", || fleet.kv(0).get(&store(), "count").unwrap().is_some()).await;
    tell(&fleet, &second);
    let mut told = BTreeSet::new();
    for counted in counting {
        let counts = counted.await.unwrap();
        assert!(counts.is_sorted(), "{counts:?}");
        assert!(counts.iter().all(|count| told.insert(*count)), "told twice: {counts:?}");
    }
    assert_eq!(told, (1..=120).collect());
    until("the second node is the home", || here(fleet.kv(1)) && !here(fleet.kv(0))).await;
    assert_eq!(fleet.kv(0).increment(&store(), "count", 1).await.unwrap(), 121);
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_is_the_home_again_after_a_restart_and_none_on_an_empty_disk() {
    let (mut fleet, home) = at_home(&["a", "b"]).await;
    assert_eq!(fleet.kv(1).increment(&store(), "count", 5).await.unwrap(), 5);
    fleet.restart(0).await;
    until("it knows from its disk", || here(fleet.kv(0))).await;
    fleet.introduce();
    tell(&fleet, &home);
    fleet.linked().await;
    assert_eq!(fleet.kv(1).increment(&store(), "count", 5).await.unwrap(), 10);

    let (node, kv, directory) = fleet.nodes.remove(0);
    kv.close().await;
    drop((kv, directory));
    let empty = tempfile::tempdir().unwrap();
    let kv = crate::fleet::open("a", empty.path(), fleet.tls("a")).await;
    fleet.nodes.insert(0, (node, kv, empty));
    fleet.introduce();
    tell(&fleet, &home);
    let lost = |kv: &Kv| matches!(kv.homes().get(&store()), Some(Place::Coming { lost: Some(_), .. }));
    until("it knows that it lost what it had", || lost(fleet.kv(0))).await;
    let refused = fleet.kv(0).increment(&store(), "count", 1).await.unwrap_err();
    assert!(matches!(refused, KvError::Home(HomeError::Lost { .. })), "{refused:?}");
    // The operator gives up what only that disk had.
    let given_up = home.next(&name("a"), home.term, 30).unwrap();
    tell(&fleet, &given_up);
    until("it is the home anew", || here(fleet.kv(0))).await;
    assert_eq!(fleet.kv(1).increment(&store(), "count", 1).await.unwrap(), 11);
    fleet.close().await;
}

/// A node of an older version: it greets, and answers no questions.
async fn older(fleet: &Fleet, node: &'static str) -> (PeerAddr, tokio::task::JoinHandle<()>) {
    let mut config = (*fleet.tls(node).server).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let config = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(config).unwrap()));
    let endpoint = quinn::Endpoint::server(config, "127.0.0.1:0".parse().unwrap()).unwrap();
    let peer = PeerAddr { node: name(node), region: region(), addr: endpoint.local_addr().unwrap() };
    let serving = tokio::spawn(async move {
        while let Some(incoming) = endpoint.accept().await {
            let Ok(connection) = incoming.await else { continue };
            let Ok((mut send, mut receive)) = connection.accept_bi().await else { continue };
            let hello = Message::Hello {
                versions: Versions { min: 3, max: 3 },
                node: name(node),
                vector: VersionVector::default(),
                reach: Reach::default(),
            };
            send.write_all(&wire::encode(&hello)).await.unwrap();
            while receive.read_chunk(64 * 1024, true).await.is_ok_and(|chunk| chunk.is_some()) {}
        }
    });
    (peer, serving)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_home_of_an_older_version_is_named() {
    let fleet = Fleet::start(&["a"]).await;
    let (peer, serving) = older(&fleet, "b").await;
    fleet.kv(0).set_peers(vec![peer]);
    tell(&fleet, &Home::first(store(), name("b"), 10));
    until("it knows the home", || fleet.kv(0).homes().get(&store()).is_some()).await;
    until("the link stands", || fleet.kv(0).status()[0].connected).await;
    let mut refused = fleet.kv(0).set(&store(), "k", Bytes::new()).await.unwrap_err();
    while matches!(refused, KvError::Home(HomeError::Unreachable { .. })) {
        // Its greeting is on its way.
        refused = fleet.kv(0).set(&store(), "k", Bytes::new()).await.unwrap_err();
    }
    assert!(matches!(&refused, KvError::Home(HomeError::Older { home, .. }) if *home == name("b")), "{refused:?}");
    assert_eq!(fleet.kv(0).get(&store(), "k").unwrap(), None);
    serving.abort();
    fleet.close().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_question_that_is_none_harms_nobody() {
    let fleet = Fleet::start(&["b"]).await;
    let stranger = PeerAddr { node: name("a"), region: region(), addr: "127.0.0.1:9".parse().unwrap() };
    fleet.kv(0).set_peers(vec![stranger]);
    let mut config = (*fleet.tls("a").client).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let client = quinn::crypto::rustls::QuicClientConfig::try_from(config).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(client));
    let connecting = endpoint.connect_with(client, fleet.kv(0).local_addr().unwrap(), "b.node.selvage.internal");
    let connection = connecting.unwrap().await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    let hello = Message::Hello {
        versions: wire::VERSIONS,
        node: name("a"),
        vector: VersionVector::default(),
        reach: Reach::default(),
    };
    send.write_all(&wire::encode(&hello)).await.unwrap();
    // Cut short, too long, garbage, and one about a store that has no home.
    let asked: [&[u8]; 4] =
        [b"\0\0\0\x09abc", b"\xff\xff\xff\xff", b"\0\0\0\x04junk", b"\0\0\0\x0f\x02\x03a/s\0\0\0\0\0\0\0\x01\x01k"];
    for question in asked {
        let (mut send, mut receive) = connection.open_bi().await.unwrap();
        send.write_all(question).await.unwrap();
        send.finish().unwrap();
        let answer = receive.read_to_end(1024).await;
        assert!(answer.is_err(), "{question:?}: {answer:?}");
    }
    // A read of that store is answered: not yet.
    let (mut send, mut receive) = connection.open_bi().await.unwrap();
    send.write_all(b"\0\0\0\x10\x02\x03a/s\0\0\0\0\0\0\0\x01\x01k\0").await.unwrap();
    assert_eq!(receive.read_to_end(1024).await.unwrap(), b"\0\0\0\x01\x08");
    assert!(connection.close_reason().is_none());
    drop(send);
    fleet.close().await;
}
