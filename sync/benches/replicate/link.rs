//! Two nodes over loopback with mutual TLS: how long until a write of one is seen at the other.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use hdrhistogram::Histogram;
use rustls::pki_types::CertificateDer;
use selvage_certs::{
    Anchors, Authority, ClientAuth, Identity, Role, mutual_client, mutual_server, peer_role, roots_of,
};
use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_config::{NodeName, Region, StoreName};
use selvage_sync::{Identify, Kv, Options, PeerAddr, Tls, Trust};

use super::{PATIENCE, VALUE_BYTES, WRITES, key, record, shown};

fn tls(authority: &Authority, node: &str) -> Tls {
    let region: Region = "here".parse().unwrap();
    let role = Role::Node { region, node: node.parse().unwrap() };
    let identity = authority.issue_identity(&role, &[], &[]).unwrap();
    let roots = roots_of(&[authority.certificate_der()]).unwrap();
    let word = Word { identity: identity.clone(), anchors: Anchors::new(roots.clone()).unwrap() };
    Tls {
        trust: Arc::new(word),
        server: mutual_server(&identity, &roots, ClientAuth::Required).unwrap(),
        client: mutual_client(&identity, &roots).unwrap(),
    }
}

/// What a node says, and what it believes.
struct Word {
    identity: Identity,
    anchors: Anchors,
}

impl Trust for Word {
    fn prove(&self, statement: &[u8]) -> Option<Vec<u8>> {
        self.identity.state(statement)
    }

    fn mark(&self) -> u64 {
        0
    }

    fn is_proved(&self, node: &NodeName, statement: &[u8], at_ms: u64, proof: &[u8]) -> bool {
        let said = self.anchors.stated_by(statement, proof, SystemTime::UNIX_EPOCH + Duration::from_millis(at_ms));
        said.is_some_and(|role| matches!(role, Role::Node { node: said, .. } if said == *node))
    }
}

fn identify() -> Identify {
    Arc::new(|certificate: &CertificateDer<'_>| match peer_role(certificate) {
        Ok(Role::Node { node, .. }) => Some(node),
        _ => None,
    })
}

pub(super) fn measure() {
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    for engine in [KvEngine::Sled, KvEngine::Memory] {
        runtime.block_on(pair(engine));
    }
}

async fn pair(engine: KvEngine) {
    let authority = Authority::create("bench").unwrap();
    let mut nodes = Vec::new();
    for name in ["a", "b"] {
        let directory = tempfile::tempdir().unwrap();
        let options = Options {
            node: name.parse().unwrap(),
            region: "here".parse().unwrap(),
            directory: directory.path().to_owned(),
            listen: Some("127.0.0.1:0".parse().unwrap()),
            tls: Some(tls(&authority, name)),
            kept: Kept { engine, ..Kept::default() },
        };
        nodes.push((Kv::open(options, identify()).await.unwrap(), directory));
    }
    let address = |of: usize, name: &str| PeerAddr {
        node: name.parse().unwrap(),
        region: "here".parse().unwrap(),
        addr: nodes[of].0.local_addr().unwrap(),
    };
    let peers = vec![address(0, "a"), address(1, "b")];
    nodes.iter().for_each(|(kv, _)| kv.set_peers(peers.clone()));
    let store: StoreName = "bench/default".parse().unwrap();
    let (a, b) = (nodes[0].0.clone(), nodes[1].0.clone());
    let mut made = Histogram::<u64>::new(3).unwrap();
    let mut seen = Histogram::<u64>::new(3).unwrap();
    let mut cursor = b.cursor();
    // The first ones are not counted: links are made meanwhile.
    for number in 0..WRITES + 100 {
        let value = Bytes::from(vec![7; VALUE_BYTES]);
        let start = Instant::now();
        let put = async {
            a.set(&store, &key(number), value).await.unwrap();
            Instant::now()
        };
        let watched = b.watch(&store, "", cursor, PATIENCE);
        let (put, watched) = tokio::join!(put, watched);
        let watched = watched.unwrap();
        assert!(!watched.changes.is_empty(), "not seen within {PATIENCE:?}");
        cursor = watched.cursor;
        if number >= 100 {
            record(&mut seen, start);
            made.record(u64::try_from((put - start).as_nanos()).unwrap()).unwrap();
        }
    }
    println!("link, {engine}, mutual TLS: put until seen remotely {}; durable here {}", shown(&seen), shown(&made));
    drop((a, b));
    for (kv, _directory) in nodes {
        kv.close().await;
    }
}
