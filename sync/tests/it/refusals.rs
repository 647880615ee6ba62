//! Who gets no link.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use selvage_certs::Authority;
use selvage_sync::wire::ALPN;
use selvage_sync::{Kv, PeerAddr, Tls};

use crate::fleet::{Fleet, open, region, store, tls, until};

/// Tries to get a link to `kv` as a client of `tls` would; says how the attempt ended.
async fn attempt(kv: &Kv, tls: Tls, name: &str) -> Result<(), String> {
    let mut config = (*tls.client).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let crypto = QuicClientConfig::try_from(config).unwrap();
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(crypto));
    let connecting = endpoint.connect_with(client, kv.local_addr().unwrap(), name).unwrap();
    let connection = connecting.await.map_err(|error| error.to_string())?;
    let (mut send, mut receive) = connection.open_bi().await.map_err(|error| error.to_string())?;
    send.write_all(&[0]).await.map_err(|error| error.to_string())?;
    let mut first = [0; 1];
    // A refusal comes as the end of the connection; a link would begin with a hello.
    let read = tokio::time::timeout(Duration::from_secs(20), receive.read_exact(&mut first));
    read.await
        .expect("an answer in time")
        .map_err(|_| connection.close_reason().map_or_else(String::new, |why| why.to_string()))
}

#[tokio::test]
async fn a_node_outside_the_roster_gets_no_link_and_one_in_it_does() {
    let fleet = Fleet::start(&["b"]).await;
    let refused = attempt(fleet.kv(0), fleet.tls("a"), "b.node.selvage.internal").await;
    assert!(refused.as_ref().is_err_and(|why| why.contains("not in the roster")), "{refused:?}");

    let stranger = "127.0.0.1:9".parse().unwrap();
    fleet.kv(0).set_peers(vec![PeerAddr { node: "a".parse().unwrap(), region: region(), addr: stranger }]);
    assert_eq!(attempt(fleet.kv(0), fleet.tls("a"), "b.node.selvage.internal").await, Ok(()));
    fleet.kv(0).partition(true);
    assert!(attempt(fleet.kv(0), fleet.tls("a"), "b.node.selvage.internal").await.is_err());
    fleet.close().await;
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let fleet = Fleet::start(&["b"]).await;
    let stranger = "127.0.0.1:9".parse().unwrap();
    fleet.kv(0).set_peers(vec![PeerAddr { node: "a".parse().unwrap(), region: region(), addr: stranger }]);
    // It trusts the fleet's authority and shows a certificate of its own.
    let foreign = Authority::create("foreign").unwrap();
    let role = selvage_certs::Role::Node { region: region(), node: "a".parse().unwrap() };
    let identity = foreign.issue_identity(&role, &[], &[]).unwrap();
    let client = selvage_certs::mutual_client(&identity, &fleet.roots()).unwrap();
    let forged = Tls { client, ..fleet.tls("a") };
    let refused = attempt(fleet.kv(0), forged, "b.node.selvage.internal").await;
    assert!(refused.is_err(), "{refused:?}");
    fleet.close().await;
}

#[tokio::test]
async fn a_node_that_is_another_than_the_roster_says_is_not_talked_to() {
    let fleet = Fleet::start(&["a", "b", "c"]).await;
    // At the address where the roster has b, c answers.
    let wrong = PeerAddr { node: "b".parse().unwrap(), ..fleet.address(2) };
    fleet.kv(0).set_peers(vec![wrong]);
    fleet.kv(2).set_peers(vec![fleet.address(0)]);
    fleet.set(0, "k", "1").await;
    // Once the roster is right, b gets it, so a did have the time to try.
    tokio::time::timeout(Duration::from_millis(700), until("never", || fleet.kv(0).status()[0].connected))
        .await
        .expect_err("no link to another node");
    assert_eq!(fleet.kv(2).get(&store(), "k").unwrap(), None);
    fleet.kv(0).set_peers(vec![fleet.address(1)]);
    fleet.kv(1).set_peers(vec![fleet.address(0)]);
    fleet.sees(1, "k", Some("1")).await;
    assert_eq!(fleet.kv(2).get(&store(), "k").unwrap(), None);
    fleet.close().await;
}

#[tokio::test]
async fn a_peer_that_leaves_the_roster_loses_its_link() {
    let fleet = Fleet::meshed(&["a", "b"]).await;
    fleet.kv(1).set_peers(Vec::new());
    until("a sees the end", || !fleet.kv(0).status()[0].connected).await;
    fleet.set(0, "k", "1").await;
    assert_eq!(fleet.kv(1).get(&store(), "k").unwrap(), None);
    fleet.introduce();
    fleet.sees(1, "k", Some("1")).await;
    fleet.close().await;
}

#[tokio::test]
async fn garbage_from_a_node_of_the_roster_ends_its_link_and_nothing_else() {
    let fleet = Fleet::meshed(&["b", "c"]).await;
    let known: Vec<PeerAddr> = vec![
        fleet.address(1),
        PeerAddr { node: "a".parse().unwrap(), region: region(), addr: "127.0.0.1:9".parse().unwrap() },
    ];
    fleet.kv(0).set_peers(known);
    let mut config = (*fleet.tls("a").client).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let address = fleet.kv(0).local_addr().unwrap();
    let connection = endpoint.connect_with(client, address, "b.node.selvage.internal").unwrap().await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    send.write_all(&[0xff; 64]).await.unwrap();
    let ended = tokio::time::timeout(Duration::from_secs(20), connection.closed()).await;
    assert!(ended.is_ok(), "the link is closed");
    fleet.set(0, "k", "1").await;
    fleet.sees(1, "k", Some("1")).await;
    fleet.close().await;
}

#[tokio::test]
async fn a_node_that_shall_listen_needs_an_identity() {
    let directory = tempfile::tempdir().unwrap();
    let options = selvage_sync::Options {
        node: "a".parse().unwrap(),
        region: region(),
        directory: directory.path().to_owned(),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        tls: None,
        kept: Default::default(),
    };
    let opened = Kv::open(options, crate::fleet::identify()).await;
    assert!(matches!(opened, Err(selvage_sync::OpenError::Link(_))));
}

#[tokio::test]
async fn a_directory_that_is_open_is_not_opened_again() {
    let authority = Authority::create("test").unwrap();
    let directory = tempfile::tempdir().unwrap();
    let kv = open("a", directory.path(), tls(&authority, "a")).await;
    let options =
        selvage_sync::Options::alone("a".parse().unwrap(), region(), directory.path().to_owned(), Default::default());
    assert!(matches!(Kv::open(options, crate::fleet::identify()).await, Err(selvage_sync::OpenError::Engine { .. })));
    kv.set(&store(), "k", Bytes::from_static(b"1")).await.unwrap();
    kv.close().await;
}
