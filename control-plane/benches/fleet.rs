//! A control plane and 5,000 nodes on one machine: how long a change takes to reach all of them, and what it costs.
//!
//! `cargo bench -p selvage-control-plane --bench fleet -- [NODES] [APPS] [PEERS] [whole]`. The control plane is a process of
//! its own, so its CPU time and memory are its own. Each node has a certificate, a connection of its own over TCP and TLS
//! 1.3 with both sides' certificates, HTTP/2, a long poll that waits, and tells its status when it has taken a plan; PEERS of
//! them replicate, and so stand in every plan. What nodes do with a plan is left out but for one in a hundred, which makes
//! the whole plan of what changed and verifies the signature. With `whole` they give no nonce and are told the whole plan.

#![allow(clippy::unwrap_used, clippy::print_stdout, missing_docs)]

use std::net::{IpAddr, Ipv4Addr, SocketAddr};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::{Method, Request, StatusCode};
use http_body_util::{BodyExt as _, Full};
use hyper::client::conn::http2::SendRequest;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::RootCertStore;
use rustls::pki_types::ServerName;
use selvage_certs::{Authority, Role, mutual_client, roots_of};
use selvage_config::app::App;
use selvage_config::control_plane::{ControlPlaneConfig, Operator, OperatorRole, PlanSigning, RegistryConfig};
use selvage_config::node::IdentityFiles;
use selvage_config::oci::{APP_CONFIG, Descriptor, MANIFEST, Manifest, WASM};
use selvage_config::plan::{News, Plan, Status, Told};
use selvage_config::root::Root;
use selvage_config::snapshot::Snapshot;
use selvage_config::{Digest, PrivateKey};
use selvage_control_plane::ControlPlane;
use tokio::net::TcpSocket;
use tokio::sync::{Semaphore, mpsc};
use tokio::task::JoinSet;

const TOKEN: &str = "a token of a bench";
/// Changes that are measured.
const ROUNDS: usize = 5;
/// Handshakes at once.
const HANDSHAKES: usize = 64;
/// Connections from one address; the control plane takes 2,048.
const PER_ADDRESS: usize = 1_500;
/// One node of so many makes the plan and verifies it.
const VERIFIES_EVERY: usize = 100;

type Sender = SendRequest<Full<Bytes>>;

fn main() {
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with("--")).collect();
    if words.first().is_some_and(|word| word == "server") {
        return serve(Path::new(&words[1]));
    }
    let numbers: Vec<usize> = words.iter().filter_map(|word| word.parse().ok()).collect();
    let (nodes, apps) = (numbers.first().copied().unwrap_or(5_000), numbers.get(1).copied().unwrap_or(20));
    let peers = numbers.get(2).copied().unwrap_or(500);
    let is_whole = words.iter().any(|word| word == "whole");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    runtime.block_on(measure(nodes, apps, peers, is_whole));
}

/// The control plane's process: tells its address, and ends with its input.
fn serve(directory: &Path) {
    let path = |name: &str| directory.join(name);
    let config = ControlPlaneConfig {
        listen: (Ipv4Addr::LOCALHOST, 0).into(),
        state_dir: path("state"),
        identity: IdentityFiles { certificate: path("c.pem"), key: path("k.pem"), roots: path("roots.pem") },
        operators: vec![Operator {
            name: "ops".into(),
            token_digest: Some(Digest::of(TOKEN.as_bytes())),
            role: OperatorRole::Admin,
            apps: None,
        }],
        plans: Some(PlanSigning { key: path("plan.key"), roots: vec![path("root-1.json")], lifetime_s: 86_400 }),
        authority: None,
        sealing_key: None,
        registry: RegistryConfig::default(),
        nats: None,
        stores: Default::default(),
        placements: Default::default(),
    };
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().unwrap();
    runtime.block_on(async {
        let control_plane = ControlPlane::start(config).await.unwrap();
        println!("{}", control_plane.address());
        tokio::task::spawn_blocking(|| std::io::stdin().read_line(&mut String::new())).await.unwrap().unwrap();
    });
    runtime.shutdown_background();
}

struct Server {
    child: Child,
    address: SocketAddr,
    authority: Authority,
    roots: RootCertStore,
    root: Root,
    _directory: tempfile::TempDir,
}

impl Server {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let authority = Authority::open_or_create(&path("ca")).unwrap();
        let identity = authority.issue_identity(&Role::ControlPlane, &[IpAddr::V4(Ipv4Addr::LOCALHOST)], &[]).unwrap();
        identity.save(path("c.pem"), path("k.pem")).unwrap();
        std::fs::write(path("roots.pem"), authority.certificate_pem()).unwrap();
        let (offline, key) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let root = Root::initial("bench".into(), vec![offline.public()], vec![key.public()]);
        let mut envelope = root.envelope().unwrap();
        envelope.sign(&offline).unwrap();
        std::fs::write(path("plan.key"), key.to_pem()).unwrap();
        std::fs::write(path("root-1.json"), serde_json::to_vec(&envelope).unwrap()).unwrap();
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.arg("server").arg(directory.path()).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let mut line = String::new();
        std::io::BufRead::read_line(&mut std::io::BufReader::new(child.stdout.as_mut().unwrap()), &mut line).unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        let address = line.trim().parse().unwrap();
        Self { child, address, authority, roots, root, _directory: directory }
    }

    /// CPU seconds so far (proc_pid_stat(5), fields 14 and 15, hundredths), and resident MiB.
    fn cost(&self) -> (f64, u64) {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let fields: Vec<&str> = stat.rsplit_once(") ").unwrap().1.split(' ').collect();
        let ticks: u32 = [fields[11], fields[12]].iter().map(|text| text.parse::<u32>().unwrap()).sum();
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS")).unwrap();
        let kib: u64 = line.split_whitespace().nth(1).unwrap().parse().unwrap();
        (f64::from(ticks) / 100.0, kib / 1_024)
    }

    async fn connect(&self, number: usize) -> Sender {
        let role = Role::Node { region: "fra".parse().unwrap(), node: name(number).parse().unwrap() };
        let identity = self.authority.issue_identity(&role, &[], &[]).unwrap();
        let mut tls = Arc::unwrap_or_clone(mutual_client(&identity, &self.roots).unwrap());
        tls.alpn_protocols = vec![b"h2".to_vec()];
        let socket = TcpSocket::new_v4().unwrap();
        let last = u8::try_from(1 + number / PER_ADDRESS).unwrap();
        socket.bind((Ipv4Addr::new(127, 0, 0, last), 0).into()).unwrap();
        let stream = socket.connect(self.address).await.unwrap();
        stream.set_nodelay(true).unwrap();
        let server = ServerName::try_from(Role::ControlPlane.tls_name()).unwrap();
        let stream = tokio_rustls::TlsConnector::from(Arc::new(tls)).connect(server, stream).await.unwrap();
        let mut http2 = hyper::client::conn::http2::Builder::new(TokioExecutor::new());
        // A whole plan is many windows of HTTP/2's default; a client that does not mind says so.
        http2.initial_stream_window_size(1 << 20).initial_connection_window_size(1 << 20);
        let (sender, connection) = http2.handshake(TokioIo::new(stream)).await.unwrap();
        tokio::spawn(connection);
        sender
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        drop(self.child.stdin.take());
        let _ = self.child.wait();
    }
}

fn name(number: usize) -> String {
    format!("node-{number:05}")
}

async fn ask(sender: &mut Sender, method: Method, path: &str, body: Vec<u8>) -> (StatusCode, Bytes) {
    let uri = format!("https://{}{path}", Role::ControlPlane.tls_name());
    let request = Request::builder().method(method).uri(uri).header("content-type", "application/json");
    let request = request.header("authorization", format!("Bearer {TOKEN}")).body(Full::from(body)).unwrap();
    let answer = sender.send_request(request).await.unwrap();
    (answer.status(), answer.into_body().collect().await.unwrap().to_bytes())
}

fn status(number: usize, generation: u64, peers: usize) -> Vec<u8> {
    let port = 10_000 + u16::try_from(number % 50_000).unwrap();
    let status = Status {
        node: name(number).parse().unwrap(),
        region: "fra".parse().unwrap(),
        version: "1".into(),
        generation,
        replication: (number < peers).then(|| ([127, 0, 0, 1], port).into()),
        front: None,
        admin: None,
        apps: Vec::new(),
        plan: None,
        load: Vec::new(),
        labels: [].into(),
    };
    serde_json::to_vec(&status).unwrap()
}

/// Pushes a version of an app and makes it current; answers the generation, and when that was asked for.
async fn release(ops: &reqwest::Client, url: &str, app: &str, version: usize) -> (u64, Instant) {
    let code = format!("the code of {app}").into_bytes();
    let mut document = App::of_component(app.parse().unwrap(), "main".parse().unwrap(), Digest::of(&code));
    document.version = Some(version.to_string());
    let document = document.to_json();
    let post = |path: String| ops.post(format!("{url}{path}")).bearer_auth(TOKEN);
    for bytes in [&document, &code] {
        let path = format!("/v2/apps/{app}/blobs/uploads/?digest={}", Digest::of(bytes));
        assert_eq!(post(path).body(bytes.clone()).send().await.unwrap().status(), StatusCode::CREATED);
    }
    let manifest = Manifest {
        schema_version: 2,
        media_type: Some(MANIFEST.to_owned()),
        artifact_type: None,
        config: Descriptor::of(APP_CONFIG, &document),
        layers: vec![Descriptor::of(WASM, &code)],
        subject: None,
        annotations: [].into(),
    };
    let put = ops.put(format!("{url}/v2/apps/{app}/manifests/v{version}")).bearer_auth(TOKEN);
    let put = put.header("content-type", MANIFEST).body(serde_json::to_vec(&manifest).unwrap());
    assert_eq!(put.send().await.unwrap().status(), StatusCode::CREATED);
    let body = serde_json::json!({ "repository": format!("apps/{app}"), "reference": format!("v{version}") });
    let asked = Instant::now();
    let answer = post(format!("/api/v1/apps/{app}/releases")).json(&body).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::CREATED);
    (answer.json::<serde_json::Value>().await.unwrap()["generation"].as_u64().unwrap(), asked)
}

/// What all nodes count together.
#[derive(Default)]
struct Counted {
    bytes: AtomicU64,
    deltas: AtomicU64,
    told: AtomicUsize,
    waiting: AtomicUsize,
}

/// A node: waits for plans, notes when each came, and tells its status. Taken are (node, generation, when).
async fn follow(
    number: usize,
    mut sender: Sender,
    root: Arc<Root>,
    (peers, is_whole): (usize, bool),
    counted: Arc<Counted>,
    taken: mpsc::Sender<(u64, Instant)>,
) {
    let (mut plan, mut nonce): (Option<Plan>, _) = (None, "none".to_owned());
    let mut generation = 0;
    loop {
        let given = if is_whole { "none" } else { &nonce };
        let path = format!("/api/v1/plans/{}?after={generation}&nonce={given}&wait_ms=30000", name(number));
        counted.waiting.fetch_add(1, Ordering::SeqCst);
        let (status_code, bytes) = ask(&mut sender, Method::GET, &path, Vec::new()).await;
        let came = Instant::now();
        counted.waiting.fetch_sub(1, Ordering::SeqCst);
        if status_code == StatusCode::NOT_MODIFIED {
            continue;
        }
        counted.bytes.fetch_add(bytes.len() as u64, Ordering::SeqCst);
        let News { nonce: next, plan: told } = serde_json::from_slice(&bytes).unwrap();
        generation = match told {
            Told::Whole(whole) => {
                let generation = whole.generation;
                // Memory: only those that verify keep it.
                plan = number.is_multiple_of(VERIFIES_EVERY).then_some(*whole);
                generation
            }
            Told::Delta(delta) => {
                counted.deltas.fetch_add(1, Ordering::SeqCst);
                let generation = delta.generation;
                plan = plan.map(|plan| plan.with(*delta).unwrap());
                generation
            }
        };
        nonce = next;
        if let Some(plan) = &plan {
            let snapshot = Snapshot::signed(plan.snapshot.as_ref().unwrap(), &root).unwrap();
            assert_eq!(snapshot.version, generation);
        }
        if taken.send((generation, came)).await.is_err() {
            return;
        }
        let path = format!("/api/v1/nodes/{}", name(number));
        let (code, _) = ask(&mut sender, Method::PUT, &path, status(number, generation, peers)).await;
        assert_eq!(code, StatusCode::NO_CONTENT);
        counted.told.fetch_add(1, Ordering::SeqCst);
    }
}

async fn measure(nodes: usize, apps: usize, peers: usize, is_whole: bool) {
    let server = Arc::new(Server::start());
    let url = format!("https://{}", server.address);
    let tls = selvage_certs::client(&server.roots);
    let ops = reqwest::Client::builder().use_preconfigured_tls(tls).no_proxy().build().unwrap();
    for app in 0..apps {
        release(&ops, &url, &format!("app-{app}"), 1).await;
    }
    let counted = Arc::new(Counted::default());
    let places = Arc::new(Semaphore::new(HANDSHAKES));
    let (begun, before) = (Instant::now(), server.cost());
    let connecting: Vec<_> = (0..nodes)
        .map(|number| {
            let (server, places) = (Arc::clone(&server), Arc::clone(&places));
            tokio::spawn(async move {
                let _place = places.acquire_owned().await.unwrap();
                let mut sender = server.connect(number).await;
                let path = format!("/api/v1/nodes/{}", name(number));
                let (code, _) = ask(&mut sender, Method::PUT, &path, status(number, 0, peers)).await;
                assert_eq!(code, StatusCode::NO_CONTENT);
                sender
            })
        })
        .collect();
    let (taken, mut came) = mpsc::channel(nodes * 2);
    let root = Arc::new(server.root.clone());
    let mut senders = Vec::new();
    for connecting in connecting {
        senders.push(connecting.await.unwrap());
    }
    tell("connected, known, status told", &server, begun, before);
    let (begun, before) = (Instant::now(), server.cost());
    // Dropped before the server is: then nobody misses it.
    let mut following = JoinSet::new();
    for (number, sender) in senders.into_iter().enumerate() {
        following.spawn(follow(
            number,
            sender,
            Arc::clone(&root),
            (peers, is_whole),
            Arc::clone(&counted),
            taken.clone(),
        ));
    }
    settle(&counted, nodes, nodes).await;
    tell("whole plan taken, waiting for the next", &server, begun, before);
    let first = counted.bytes.swap(0, Ordering::SeqCst) / nodes as u64;
    println!("a whole plan: {first} bytes");
    while came.try_recv().is_ok() {}
    for round in 0..ROUNDS {
        let (deltas, before, begun) = (counted.deltas.load(Ordering::SeqCst), server.cost(), Instant::now());
        let (generation, asked) = release(&ops, &url, "app-0", round + 2).await;
        let mut times = Vec::new();
        while times.len() < nodes {
            let (told, at) = came.recv().await.unwrap();
            assert_eq!(told, generation);
            times.push(at.saturating_duration_since(asked));
        }
        settle(&counted, nodes, nodes * (round + 2)).await;
        times.sort_unstable();
        let bytes = counted.bytes.swap(0, Ordering::SeqCst) / nodes as u64;
        let deltas = counted.deltas.load(Ordering::SeqCst) - deltas;
        println!(
            "change {round}: half of the nodes after {:?}, all after {:?}; {bytes} bytes each, {deltas} deltas",
            times[nodes / 2],
            times[nodes - 1]
        );
        tell("  and all statuses told", &server, begun, before);
    }
    let (begun, before) = (Instant::now(), server.cost());
    tokio::time::sleep(Duration::from_secs(30)).await;
    tell("waiting, each poll asked anew once", &server, begun, before);
}

/// Waits until so many statuses are told and every node waits for its next plan.
async fn settle(counted: &Counted, nodes: usize, told: usize) {
    while counted.told.load(Ordering::SeqCst) < told || counted.waiting.load(Ordering::SeqCst) < nodes {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    // The last questions are on their way.
    tokio::time::sleep(Duration::from_millis(500)).await;
}

fn tell(what: &str, server: &Server, begun: Instant, before: (f64, u64)) {
    let (cpu, mib) = server.cost();
    println!(
        "{what}: {:.2} s, control plane {:.2} s of CPU, {mib} MiB resident",
        begun.elapsed().as_secs_f64(),
        cpu - before.0
    );
}
