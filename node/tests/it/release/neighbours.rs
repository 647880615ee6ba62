//! A release from a neighbour's disk, and neighbours that lie.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::ServerName;
use selvage_certs::{ClientAuth, Role, mutual_client, mutual_server, roots_of};
use selvage_config::plan::{Peer, Plan};
use selvage_node::admin::{Access, Admin, AdminParts, Shelf};
use selvage_node::metrics::Metrics;
use selvage_node::release::state::State;
use selvage_node::serve::Parts;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWrite, AsyncWriteExt as _};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_rustls::{TlsAcceptor, TlsConnector};

use super::*;

/// What a lying neighbour answers to whatever it is asked.
#[derive(Debug, Clone, Copy)]
enum Lie {
    OtherBytes,
    CutShort,
    Silence,
    Endless,
    TooMuch,
    AnotherNode,
    OtherSignatures,
}

fn role(name: &str) -> Role {
    Role::Node { region: "fra".parse().unwrap(), node: name.parse().unwrap() }
}

fn peer(name: &str, admin: SocketAddr) -> Peer {
    Peer { node: name.parse().unwrap(), region: "fra".parse().unwrap(), address: admin, admin: Some(admin) }
}

async fn tell(mut stream: impl AsyncRead + AsyncWrite + Unpin, lie: Lie) {
    let mut asked = [0; 4_096];
    while let Ok(read @ 1..) = stream.read(&mut asked).await {
        let head = "HTTP/1.1 200 OK\r\ncontent-length: ";
        let _ = match lie {
            Lie::OtherBytes | Lie::AnotherNode => stream.write_all(format!("{head}7\r\n\r\nanother").as_bytes()).await,
            // It has nothing, and says that signatures are what nobody has.
            Lie::OtherSignatures if asked[..read].starts_with(b"GET /signatures/") => {
                let digest = Digest::of(b"nothing");
                let list = format!(r#"[{{"mediaType":"application/octet-stream","digest":"{digest}","size":90}}]"#);
                stream.write_all(format!("{head}{}\r\n\r\n{list}", list.len()).as_bytes()).await
            }
            Lie::OtherSignatures => stream.write_all(b"HTTP/1.1 404 Not Found\r\ncontent-length: 0\r\n\r\n").await,
            Lie::CutShort => {
                let _ = stream.write_all(format!("{head}90\r\n\r\nshort").as_bytes()).await;
                return;
            }
            Lie::Silence => std::future::pending().await,
            Lie::TooMuch => stream.write_all(format!("{head}999999999999\r\n\r\n").as_bytes()).await,
            Lie::Endless => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n").await;
                loop {
                    if stream.write_all(b"8\r\nendless \r\n").await.is_err() {
                        return;
                    }
                }
            }
        };
    }
}

/// A neighbour that lies, with a genuine certificate.
async fn liar(fleet: &Fleet, lie: Lie) -> (SocketAddr, JoinSet<()>) {
    // One shows a certificate that is good, and of somebody else.
    let shown = if matches!(lie, Lie::AnotherNode) { "fra-8" } else { "fra-2" };
    let identity = fleet.authority.issue_identity(&role(shown), &[], &[]).unwrap();
    let roots = roots_of(&[fleet.authority.certificate_der()]).unwrap();
    let acceptor = TlsAcceptor::from(mutual_server(&identity, &roots, ClientAuth::Required).unwrap());
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let mut tasks = JoinSet::new();
    tasks.spawn(async move {
        let mut connections = JoinSet::new();
        while let Ok((tcp, _)) = listener.accept().await {
            let acceptor = acceptor.clone();
            connections.spawn(async move {
                if let Ok(stream) = acceptor.accept(tcp).await {
                    tell(stream, lie).await;
                }
            });
        }
    });
    (address, tasks)
}

/// A neighbour as it is: the admin listener of a node whose disk is `dir`.
async fn honest(fleet: &Fleet, dir: &Path, peers: &[&str]) -> Admin {
    let identity = fleet.authority.issue_identity(&role("fra-3"), &[], &[]).unwrap();
    let roots = roots_of(&[fleet.authority.certificate_der()]).unwrap();
    let tls = mutual_server(&identity, &roots, ClientAuth::Required).unwrap();
    let peers = peers.iter().map(|name| peer(name, "127.0.0.1:1".parse().unwrap())).collect();
    let plan = Plan::new("fra-3".parse().unwrap(), 1, Vec::new(), peers);
    let plans = watch::channel(Some(Arc::new(plan))).1;
    let shelf = Shelf::new(State::open(dir).unwrap(), plans);
    let parts = Parts::new("fra-3".parse().unwrap(), "fra".parse().unwrap(), 10, Metrics::new());
    let status = Arc::new(|| -> Status { unreachable!("nobody asks") });
    let access = Access::new(None, Default::default());
    let parts = AdminParts { parts: Arc::new(parts), kv: None, status, access, shelf: Some(shelf) };
    Admin::bind("127.0.0.1:0".parse().unwrap(), Some(tls), parts).await.unwrap()
}

fn copy(from: &Path, to: &Path) {
    std::fs::create_dir_all(to).unwrap();
    for entry in std::fs::read_dir(from).unwrap() {
        let entry = entry.unwrap();
        let to = to.join(entry.file_name());
        match entry.file_type().unwrap() {
            kind if kind.is_dir() => copy(&entry.path(), &to),
            kind if kind.is_file() => drop(std::fs::copy(entry.path(), to).unwrap()),
            _ => {}
        }
    }
}

/// All that the node has of releases is gone from its disk; the plan is not.
fn empty(state: &Path) {
    for name in ["blobs", "signatures", "files", "compiled"] {
        let _ = std::fs::remove_dir_all(state.join(name));
    }
    assert!(state.join("plan.json").exists());
}

#[tokio::test(flavor = "multi_thread")]
async fn with_the_control_plane_gone_a_release_comes_from_a_neighbour_and_lies_do_not() {
    let fleet = Fleet::new().await;
    let (_, release) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    let dir = fleet.dir.path().to_owned();
    let other = tempfile::tempdir().unwrap();
    let (state, neighbours) = (dir.join("state"), other.path().join("state"));
    let lies = [Lie::OtherBytes, Lie::CutShort, Lie::Silence, Lie::Endless, Lie::TooMuch, Lie::AnotherNode];
    for (number, lie) in (1..).zip(lies.into_iter().chain([Lie::OtherSignatures])) {
        // It gets the plan and the release while the control plane is there.
        let honest_dir = neighbours.join(number.to_string());
        let (liar, _lying) = liar(&fleet, lie).await;
        let node = fleet.node().await;
        let snapshot = fleet.signed.snapshot(number, &[("hello@1", release)]);
        fleet.control_plane.plan(fleet.signed.plan(&snapshot));
        fleet.settled(number).await;
        node.drain().await;
        copy(&state, &honest_dir);
        empty(&state);
        let honest = honest(&fleet, &honest_dir, &["fra-1"]).await;
        let path = state.join("plan.json");
        let mut plan = State::open(&state).unwrap().plan().unwrap().unwrap();
        plan.peers = vec![peer("fra-2", liar), peer("fra-3", honest.address())];
        State::open(&state).unwrap().keep_plan(&plan).unwrap();
        assert!(path.exists());
        // Nobody listens there.
        let gone = "127.0.0.1:9".parse().unwrap();
        let node = super::node(&dir, gone).await;
        let began = std::time::Instant::now();
        while !says(&node, "hello.localhost", "hello").await {
            assert!(began.elapsed() < PATIENCE, "{lie:?}: {:?}", node.status());
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        node.drain().await;
        drop(honest);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_neighbour_can_not_make_a_node_run_what_nobody_signed() {
    let fleet = Fleet::new().await;
    let (_, release) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    let node = fleet.node().await;
    fleet.plan(1, &[("hello@1", release)]);
    fleet.settled(1).await;
    node.drain().await;
    let dir = fleet.dir.path().to_owned();
    let (state, other) = (dir.join("state"), tempfile::tempdir().unwrap());
    copy(&state, other.path());
    empty(&state);
    // All that it has is genuine but for the signatures, which are somebody else's.
    let theirs = Signer::new();
    let shelf = State::open(other.path()).unwrap();
    let bundle = theirs.bundle(release);
    shelf.keep_blob(&bundle).unwrap();
    let layer = selvage_config::oci::Descriptor::of(selvage_config::oci::BUNDLE, &bundle);
    shelf.keep_signatures(release, &[layer]).unwrap();
    let honest = honest(&fleet, other.path(), &["fra-1"]).await;
    let mut plan = State::open(&state).unwrap().plan().unwrap().unwrap();
    plan.peers = vec![peer("fra-3", honest.address())];
    State::open(&state).unwrap().keep_plan(&plan).unwrap();
    // The control plane is there, and has no signature any more.
    fleet.control_plane.forget_signatures();
    let node = fleet.node().await;
    let status = fleet.control_plane.status(|status| status.apps.iter().any(|app| app.refused.is_some())).await;
    let refused = app(&status, "hello").refused.clone().unwrap();
    assert_eq!(
        (refused.cause.as_str(), get(node.addresses().http.unwrap(), "hello.localhost").await.0),
        ("untrusted", 404)
    );
    node.drain().await;
}

#[tokio::test]
async fn a_shelf_is_for_the_peers_of_the_plan_and_gives_nothing_but_blobs_by_digest() {
    let fleet = Fleet::new().await;
    let dir = tempfile::tempdir().unwrap();
    let state = State::open(dir.path()).unwrap();
    state.keep_blob(b"0123456789").unwrap();
    let digest = Digest::of(b"0123456789");
    std::fs::write(dir.path().join("plan.json"), "secret").unwrap();
    let admin = honest(&fleet, dir.path(), &["fra-1"]).await;
    let roots = roots_of(&[fleet.authority.certificate_der()]).unwrap();
    let ask = async |name: &str, line: &str, field: &str| {
        let identity = fleet.authority.issue_identity(&role(name), &[], &[]).unwrap();
        let connector = TlsConnector::from(mutual_client(&identity, &roots).unwrap());
        let tcp = TcpStream::connect(admin.address()).await.unwrap();
        let mut stream = connector.connect(ServerName::try_from(role("fra-3").tls_name()).unwrap(), tcp).await.unwrap();
        let request = format!("{line} HTTP/1.1\r\nhost: fra-3\r\n{field}connection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        let _ = stream.read_to_end(&mut answer).await;
        let answer = String::from_utf8(answer).unwrap();
        let code: u16 = answer.split(' ').nth(1).unwrap().parse().unwrap();
        (code, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
    };
    let blob = format!("GET /blobs/{digest}");
    assert_eq!(ask("fra-1", &blob, "").await, (200, "0123456789".into()));
    assert_eq!(ask("fra-1", &blob, "range: bytes=4-\r\n").await, (206, "456789".into()));
    assert_eq!(ask("fra-1", &blob, "range: bytes=10-\r\n").await.0, 416);
    assert_eq!(ask("fra-9", &blob, "").await.0, 403, "the plan does not name it");
    for (line, want) in [
        (format!("GET /blobs/{}", Digest::of(b"other")), 404),
        (format!("GET /signatures/{digest}"), 404),
        (format!("PUT /blobs/{digest}"), 405),
        ("GET /blobs/../plan.json".into(), 403),
        ("GET /blobs/sha256:..%2f..%2fplan.json".into(), 403),
        ("GET /plan.json".into(), 403),
        ("GET /status".into(), 403),
        ("GET /metrics".into(), 403),
        ("GET /kv/shop/default/k".into(), 403),
    ] {
        let (code, body) = ask("fra-1", &line, "").await;
        assert_eq!(code, want, "{line}");
        assert!(!body.contains("secret"));
    }
}
