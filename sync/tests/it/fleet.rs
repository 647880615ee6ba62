//! A few nodes in one process, each with its certificate, directory and socket.

use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use selvage_certs::{
    Anchors, Authority, ClientAuth, Identity, Role, mutual_client, mutual_server, peer_role, roots_of,
};
use selvage_config::{NodeName, Region, StoreName};
use selvage_sync::{Identify, Kv, Options, PeerAddr, Tls, Trust};
use tempfile::TempDir;

/// How long anything may take that shall happen.
const PATIENCE: Duration = Duration::from_secs(30);

/// Waits until `holds`, which must come true within [`PATIENCE`].
pub(crate) async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let start = Instant::now();
    while !holds() {
        assert!(start.elapsed() < PATIENCE, "not within {PATIENCE:?}: {what}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

pub(crate) fn region() -> Region {
    "fra".parse().unwrap()
}

/// Where a node stands: what comes before the number in its name, as `sin-1`, or else [`region`].
pub(crate) fn region_of(node: &str) -> Region {
    node.split_once('-').map_or_else(region, |(region, _)| region.parse().unwrap())
}

pub(crate) fn store() -> StoreName {
    "app/default".parse().unwrap()
}

pub(crate) fn tls(authority: &Authority, node: &str) -> Tls {
    let role = Role::Node { region: region_of(node), node: node.parse().unwrap() };
    let identity = authority.issue_identity(&role, &[], &[]).unwrap();
    let roots = roots_of(&[authority.certificate_der()]).unwrap();
    let anchors = Anchors::new(roots.clone()).unwrap();
    Tls {
        trust: Arc::new(Word { identity: identity.clone(), anchors }),
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
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(at_ms);
        let said = self.anchors.stated_by(statement, proof, at);
        said.is_some_and(|role| matches!(role, Role::Node { node: said, .. } if said == *node))
    }
}

pub(crate) fn identify() -> Identify {
    Arc::new(|certificate: &CertificateDer<'_>| match peer_role(certificate) {
        Ok(Role::Node { node, .. }) => Some(node),
        _ => None,
    })
}

pub(crate) async fn open(node: &str, directory: &Path, tls: Tls) -> Kv {
    let options = Options {
        node: node.parse().unwrap(),
        region: region_of(node),
        directory: directory.to_owned(),
        listen: Some("127.0.0.1:0".parse().unwrap()),
        tls: Some(tls),
        kept: Default::default(),
    };
    Kv::open(options, identify()).await.unwrap()
}

/// The nodes of one authority.
pub(crate) struct Fleet {
    authority: Authority,
    pub(crate) nodes: Vec<(NodeName, Kv, TempDir)>,
}

impl Fleet {
    /// Starts nodes that know nothing of each other.
    pub(crate) async fn start(names: &[&str]) -> Self {
        let authority = Authority::create("test").unwrap();
        let mut nodes = Vec::new();
        for name in names {
            let directory = tempfile::tempdir().unwrap();
            let kv = open(name, directory.path(), tls(&authority, name)).await;
            nodes.push((name.parse().unwrap(), kv, directory));
        }
        Self { authority, nodes }
    }

    /// Starts nodes that all have links to each other.
    pub(crate) async fn meshed(names: &[&str]) -> Self {
        let fleet = Self::start(names).await;
        fleet.introduce();
        fleet.linked().await;
        fleet
    }

    /// The identity of a node that this fleet's authority knows.
    pub(crate) fn tls(&self, node: &str) -> Tls {
        tls(&self.authority, node)
    }

    pub(crate) fn roots(&self) -> rustls::RootCertStore {
        roots_of(&[self.authority.certificate_der()]).unwrap()
    }

    pub(crate) fn kv(&self, index: usize) -> &Kv {
        &self.nodes[index].1
    }

    pub(crate) fn address(&self, index: usize) -> PeerAddr {
        let (node, kv, _) = &self.nodes[index];
        PeerAddr { node: node.clone(), region: region_of(node.as_str()), addr: kv.local_addr().unwrap() }
    }

    /// Gives every node the whole roster.
    pub(crate) fn introduce(&self) {
        let roster: Vec<PeerAddr> = (0..self.nodes.len()).map(|index| self.address(index)).collect();
        for (_, kv, _) in &self.nodes {
            kv.set_peers(roster.clone());
        }
    }

    pub(crate) async fn linked(&self) {
        for (_, kv, _) in &self.nodes {
            until("all links stand", || kv.status().iter().all(|peer| peer.connected)).await;
        }
    }

    /// Closes a node and opens it again from its directory, at a new address.
    pub(crate) async fn restart(&mut self, index: usize) {
        let (name, kv, directory) = self.nodes.remove(index);
        kv.close().await;
        drop(kv);
        let kv = open(name.as_str(), directory.path(), tls(&self.authority, name.as_str())).await;
        self.nodes.insert(index, (name, kv, directory));
    }

    pub(crate) async fn close(self) {
        for (_, kv, _) in &self.nodes {
            kv.close().await;
        }
    }

    /// Waits until node `index` sees this.
    pub(crate) async fn sees(&self, index: usize, key: &str, value: Option<&str>) {
        let what = format!("node {index} sees {key} = {value:?}");
        let value = value.map(|text| Bytes::copy_from_slice(text.as_bytes()));
        until(&what, || self.kv(index).get(&store(), key).unwrap() == value).await;
    }

    pub(crate) async fn set(&self, index: usize, key: &str, value: &str) {
        self.kv(index).set(&store(), key, Bytes::copy_from_slice(value.as_bytes())).await.unwrap();
    }
}
