//! Two nodes of one place, behind one name: whichever of them the authority asks answers, and both show what one got.

use rustls::pki_types::CertificateDer;
use selvage_certs::{
    Anchors, Authority, ClientAuth, Identity, Role, mutual_client, mutual_server, peer_role, roots_of,
};
use selvage_config::NodeName;
use selvage_node::acme::Place;
use selvage_sync::{Kv, Options, PeerAddr, Trust};
use tokio::task::JoinHandle;

use super::*;

/// A node as far as this concerns it: its front, its KV, and who gets its certificates.
struct Member {
    parts: Arc<Parts>,
    listeners: Listeners,
    acme: Option<Acme>,
    running: Option<JoinHandle<()>>,
}

fn ordered(member: &Member, outcome: &str) -> bool {
    member.parts.metrics.text().contains(&(orders("www.example.org", outcome) + "1"))
}

impl Member {
    async fn new(name: &str, dir: &Path, pebble: &Pebble, challenge: &str, kv: Kv, secret: FrontSecret) -> Self {
        let any = "127.0.0.1:0".parse().unwrap();
        let names = format!("names = ['www.example.org']\nchallenge = '{challenge}'\nshared = true");
        std::fs::write(dir.join("pop.secret"), [b'a'; 32]).unwrap();
        let config = text(dir, [any, any], pebble, &format!("{names}\n[tls]\nsecret = 'pop.secret'"));
        let settings = NodeConfig::parse(&dir.join("node.toml"), &config).unwrap().acme.unwrap();
        let resolver = Arc::new(Resolver::new(Certificates::default()));
        let parts = Parts::new(name.parse().unwrap(), "fra".parse().unwrap(), 100, Metrics::new());
        let parts = Arc::new(parts.with_challenges(resolver.challenges().clone()));
        let place = Place::new(kv, secret.place_seal(), name.parse().unwrap());
        let acme = Acme::open(settings, &dir.join("state"), Arc::clone(&resolver), TlsProvider::default()).unwrap();
        let tls = FrontTls {
            resolver,
            provider: TlsProvider::default(),
            secret,
            versions: TlsVersions::Only13,
            has_challenges: challenge == "tls-alpn-01",
            has_early_data: false,
            rules: Arc::default(),
        };
        let options = ListenOptions { https: Some(any), http: Some(any), tls: Some(tls) };
        let listeners = Listeners::bind(&options, Arc::clone(&parts)).await.unwrap();
        Self { parts, listeners, acme: Some(acme.of_place(place)), running: None }
    }

    fn run(&mut self) {
        let acme = self.acme.take().unwrap();
        self.running = Some(tokio::spawn(acme.run(Arc::clone(&self.parts))));
    }

    fn https(&self) -> SocketAddr {
        self.listeners.https_addr().unwrap()
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if let Some(running) = &self.running {
            running.abort();
        }
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

/// The KV of a node that nobody has introduced to the other yet.
pub(crate) async fn kv(authority: &Authority, node: &str, dir: &Path) -> Kv {
    kv_in(authority, "fra", node, dir).await
}

/// The same, of a node that stands in this region.
pub(crate) async fn kv_in(authority: &Authority, region: &str, node: &str, dir: &Path) -> Kv {
    let role = Role::Node { region: region.parse().unwrap(), node: node.parse().unwrap() };
    let identity = authority.issue_identity(&role, &[], &[]).unwrap();
    let roots = roots_of(&[authority.certificate_der()]).unwrap();
    let anchors = Anchors::new(roots.clone()).unwrap();
    let tls = selvage_sync::Tls {
        trust: Arc::new(Word { identity: identity.clone(), anchors }),
        server: mutual_server(&identity, &roots, ClientAuth::Required).unwrap(),
        client: mutual_client(&identity, &roots).unwrap(),
    };
    let mut options =
        Options::alone(node.parse().unwrap(), region.parse().unwrap(), dir.join("kv"), Default::default());
    (options.listen, options.tls) = (Some("127.0.0.1:0".parse().unwrap()), Some(tls));
    let identify = Arc::new(|certificate: &CertificateDer<'_>| match peer_role(certificate) {
        Ok(Role::Node { node, .. }) => Some(node),
        _ => None,
    });
    Kv::open(options, identify).await.unwrap()
}

/// Two nodes whose KVs have found each other.
async fn place(dirs: [&Path; 2], pebble: &Pebble, challenge: &str) -> [Member; 2] {
    let authority = Authority::create("fleet").unwrap();
    let kvs = [kv(&authority, "fra-1", dirs[0]).await, kv(&authority, "fra-2", dirs[1]).await];
    let peer = |node: &str, kv: &Kv| PeerAddr {
        node: node.parse().unwrap(),
        region: "fra".parse().unwrap(),
        addr: kv.local_addr().unwrap(),
    };
    let roster = vec![peer("fra-1", &kvs[0]), peer("fra-2", &kvs[1])];
    for kv in &kvs {
        kv.set_peers(roster.clone());
    }
    let linked = async {
        while !kvs.iter().all(|kv| kv.status().iter().all(|peer| peer.connected && peer.lag == Some(0))) {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, linked).await.expect("the two find each other");
    let file = dirs[0].join("secret");
    std::fs::write(&file, [b'a'; 32]).unwrap();
    let secret = FrontSecret::load(&file).unwrap();
    let [one, other] = kvs;
    [
        Member::new("fra-1", dirs[0], pebble, challenge, one, secret.clone()).await,
        Member::new("fra-2", dirs[1], pebble, challenge, other, secret).await,
    ]
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_answers_for_another_one_of_its_place_and_shows_what_that_got() {
    for challenge in ["http-01", "tls-alpn-01"] {
        let Some(mut pebble) = Pebble::new() else { return };
        let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
        let [mut one, mut other] = place([dirs[0].path(), dirs[1].path()], &pebble, challenge).await;
        // The name leads to the one that does not order.
        pebble.start(other.listeners.http_addr().unwrap().port(), other.https().port()).await;
        let roots = pebble.issuer().await;
        one.run();
        let leaf = shown(one.https(), "www.example.org", &roots).await;
        other.run();
        assert_eq!(shown(other.https(), "www.example.org", &roots).await, leaf, "{challenge}");
        assert!(ordered(&one, "issued") && ordered(&other, "taken"), "{challenge}: {}", other.parts.metrics.text());
        assert!(!ordered(&other, "issued"));
        let (_, said) =
            get(other.listeners.http_addr().unwrap(), "www.example.org", "/.well-known/acme-challenge/x").await;
        assert!(!said.contains('.'), "{said}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn of_two_nodes_that_begin_at_once_one_orders() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dirs = [tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap()];
    let mut members = place([dirs[0].path(), dirs[1].path()], &pebble, "http-01").await;
    pebble.start(members[0].listeners.http_addr().unwrap().port(), members[0].https().port()).await;
    let roots = pebble.issuer().await;
    for member in &mut members {
        member.run();
    }
    let mut leaves = Vec::new();
    for member in &members {
        leaves.push(shown(member.https(), "www.example.org", &roots).await);
    }
    assert_eq!(leaves[0], leaves[1]);
    assert_eq!(members.iter().filter(|member| ordered(member, "issued")).count(), 1);
    assert_eq!(members.iter().filter(|member| ordered(member, "taken")).count(), 1);
    for dir in &dirs {
        let settings = IssuedFiles::at(&dir.path().join("state"), &pebble.directory());
        let kept = settings.load(&"www.example.org".to_owned().try_into().unwrap()).unwrap().unwrap();
        assert_eq!(kept.chain()[0], leaves[0], "both find it again after a restart");
    }
}
