//! Writes that others pass on: proved to be of their origins, or not taken.

use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use quinn::crypto::rustls::QuicClientConfig;
use selvage_sync::entry::Version;
use selvage_sync::stamp::Stamp;
use selvage_sync::wire::{self, ALPN, Message, Reach, Reason};
use selvage_sync::{Content, Dot, Entry, Key, Kv, Origin, PeerAddr, VersionVector};

use crate::fleet::{Fleet, region, store, until};

fn entry(node: &str, value: &'static str) -> Entry {
    let now_ms = selvage_sync::store::now_ms();
    let origin = Origin { node: node.parse().unwrap(), incarnation: now_ms << 16 };
    Entry {
        key: Key { store: store(), name: "k".into() },
        version: Version { stamp: Stamp::at_ms(now_ms), dot: Dot { origin, seq: 1 } },
        prev: 0,
        expires_ms: None,
        content: Content::Value(Bytes::from_static(value.as_bytes())),
    }
}

/// Says these as node `a` to `kv`, and waits for the end of the link.
async fn say(fleet: &Fleet, kv: &Kv, messages: &[Message]) {
    let mut config = (*fleet.tls("a").client).clone();
    config.alpn_protocols = vec![ALPN.to_vec()];
    let endpoint = quinn::Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let client = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(config).unwrap()));
    let connecting = endpoint.connect_with(client, kv.local_addr().unwrap(), "b.node.selvage.internal").unwrap();
    let connection = connecting.await.unwrap();
    let (mut send, _receive) = connection.open_bi().await.unwrap();
    for message in messages {
        send.write_all(&wire::encode(message)).await.unwrap();
    }
    let ended = tokio::time::timeout(Duration::from_secs(60), connection.closed()).await;
    assert!(ended.is_ok(), "the link is closed");
}

#[tokio::test]
async fn a_member_can_say_nothing_in_the_name_of_another_member() {
    let fleet = Fleet::meshed(&["b", "c"]).await;
    let stranger = "127.0.0.1:9".parse().unwrap();
    fleet
        .kv(0)
        .set_peers(vec![fleet.address(1), PeerAddr { node: "a".parse().unwrap(), region: region(), addr: stranger }]);
    fleet.set(1, "k", "true").await;
    fleet.sees(0, "k", Some("true")).await;

    let vector = VersionVector::default();
    let hello = Message::Hello {
        versions: wire::VERSIONS,
        node: "a".parse().unwrap(),
        vector: vector.clone(),
        reach: Reach::default(),
    };
    let cut = Stamp::at_ms(selvage_sync::store::now_ms());
    let batch = |reason| Message::Batch {
        reason,
        cut,
        entries: vec![entry("c", "forged")],
        warrants: Vec::new(),
        complete: None,
    };
    for (forged, reason) in [(1, Reason::CatchUp), (2, Reason::Repair)] {
        say(&fleet, fleet.kv(0), &[hello.clone(), batch(reason)]).await;
        until("it is counted", || fleet.kv(0).progress().counts.forged == forged).await;
    }
    assert_eq!(fleet.kv(0).get(&store(), "k").unwrap(), Some(Bytes::from_static(b"true")));
    // The honest go on.
    fleet.set(1, "k", "newer").await;
    fleet.sees(0, "k", Some("newer")).await;
    fleet.close().await;
}

#[tokio::test]
async fn what_a_node_wrote_that_is_gone_is_proved_by_who_passes_it_on() {
    let mut fleet = Fleet::start(&["a", "b", "c"]).await;
    fleet.kv(0).set_peers(vec![fleet.address(1)]);
    fleet.kv(1).set_peers(vec![fleet.address(0)]);
    fleet.set(0, "k1", "1").await;
    fleet.set(0, "k2", "old").await;
    fleet.set(0, "k2", "new").await;
    fleet.sees(1, "k1", Some("1")).await;
    fleet.sees(1, "k2", Some("new")).await;

    // It ends, and never had a link to c, for which it stays in the roster.
    let (a, gone) = (fleet.address(0), fleet.nodes.remove(0));
    gone.1.close().await;
    fleet.kv(0).set_peers(vec![a.clone(), fleet.address(1)]);
    fleet.kv(1).set_peers(vec![a, fleet.address(0)]);
    fleet.sees(1, "k1", Some("1")).await;
    fleet.sees(1, "k2", Some("new")).await;
    assert_eq!(fleet.kv(1).progress().counts.forged, 0);
    assert_eq!(fleet.kv(1).progress().counts.hearsay, 0);
    fleet.close().await;
}
