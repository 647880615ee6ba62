//! Certificates that a node gets by itself, from an authority that was not written here: Debian's pebble.
//!
//! `.ci/tools` has it. Without it these tests are skipped with a loud line; never in CI.

mod pebble;
pub(crate) mod place;
mod window;

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use pebble::Pebble;
use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, RootCertStore};
use selvage_certs::{
    ACME_ALPN, Certificates, FrontSecret, FrontTls, Identity, IssuedFiles, Resolver, TlsVersions, provider,
};
use selvage_config::node::{CertificateName, NodeConfig, TlsProvider};
use selvage_node::Node;
use selvage_node::acme::Acme;
use selvage_node::listen::{ListenOptions, Listeners};
use selvage_node::metrics::Metrics;
use selvage_node::route::Table;
use selvage_node::serve::Parts;
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// Long for a certificate, short for whoever waits for a test that hangs.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node's file. `listen` has the addresses of its listeners, so that a restart has the same ones.
fn text(dir: &Path, listen: [SocketAddr; 2], pebble: &Pebble, acme: &str) -> String {
    let ([https, http], state) = (listen, dir.join("state"));
    let (directory, roots) = (pebble.directory(), pebble.roots());
    format!(
        "name = 'fra-1'\nregion = 'fra'\nstate_dir = '{}'\ninstances_max = 1\ndrain_ms = 1000\n\
         listen = {{ https = '{https}', http = '{http}', admin = '127.0.0.1:0' }}\n[acme]\ndirectory = '{directory}'\n\
         roots = '{}'\nterms_agreed = true\ncontact = ['mailto:ops@example.org']\nretry_ms = 200\nretry_ms_max = 500\n{acme}\n",
        state.display(),
        roots.display(),
    )
}

async fn start(text: &str) -> Node {
    let config = NodeConfig::parse(Path::new("/node.toml"), text).unwrap();
    Node::start(config).await.unwrap()
}

fn client(roots: &RootCertStore, alpn: &[u8]) -> TlsConnector {
    let mut config = ClientConfig::builder_with_provider(provider())
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_root_certificates(roots.clone())
        .with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    TlsConnector::from(Arc::new(config))
}

async fn handshake(
    to: SocketAddr,
    name: &str,
    roots: &RootCertStore,
    alpn: &[u8],
) -> std::io::Result<TlsStream<TcpStream>> {
    let tcp = TcpStream::connect(to).await.unwrap();
    let name = ServerName::try_from(name.to_owned()).unwrap();
    timeout(PATIENCE, client(roots, alpn).connect(name, tcp)).await.unwrap()
}

fn leaf(stream: &TlsStream<TcpStream>) -> CertificateDer<'static> {
    stream.get_ref().1.peer_certificates().unwrap()[0].clone().into_owned()
}

/// Waits until the node shows a certificate for `name` that one of `roots` vouches for.
async fn shown(to: SocketAddr, name: &str, roots: &RootCertStore) -> CertificateDer<'static> {
    let showing = async {
        loop {
            match handshake(to, name, roots, b"http/1.1").await {
                Ok(stream) => return leaf(&stream),
                Err(_) => tokio::time::sleep(Duration::from_millis(50)).await,
            }
        }
    };
    timeout(PATIENCE, showing).await.unwrap_or_else(|_| panic!("no certificate for {name}"))
}

async fn get(to: SocketAddr, host: &str, path: &str) -> (u16, String) {
    let stream = TcpStream::connect(to).await.unwrap();
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get(path).header("host", host).body(Empty::<Bytes>::new()).unwrap();
    let response = sender.send_request(request).await.unwrap();
    let status = response.status().as_u16();
    (status, String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap())
}

async fn counted(admin: SocketAddr, line: &str) -> u64 {
    let (_, text) = get(admin, "localhost", "/metrics").await;
    let found = text.lines().find_map(|found| found.strip_prefix(line)?.trim().parse().ok());
    found.unwrap_or(0)
}

/// Waits until the metric is that large.
async fn reaches(admin: SocketAddr, line: &str, least: u64) {
    let counting = async {
        while counted(admin, line).await < least {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, counting).await.unwrap_or_else(|_| panic!("{line}"));
}

fn orders(name: &str, outcome: &str) -> String {
    format!("selvage_acme_orders_total{{name=\"{name}\",outcome=\"{outcome}\"}} ")
}

/// A certificate of another authority that is in the last third of its life, and that authority.
fn old(name: &str) -> (Identity, CertificateDer<'static>) {
    let mut params = CertificateParams::new([]).unwrap();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    params.distinguished_name.push(DnType::CommonName, "old");
    let key = KeyPair::generate().unwrap();
    let root = params.self_signed(&key).unwrap().der().clone();
    let issuer = Issuer::new(params, key);
    let day = Duration::from_secs(86_400);
    let mut params = CertificateParams::new([name.to_owned()]).unwrap();
    params.not_before = (SystemTime::now() - day * 80).into();
    params.not_after = (SystemTime::now() + day * 10).into();
    let key = KeyPair::generate().unwrap();
    let leaf = params.signed_by(&key, &issuer).unwrap().der().clone();
    (Identity::new(vec![leaf], PrivateKeyDer::Pkcs8(key.serialize_der().into())).unwrap(), root)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_got_over_http_and_used_again_after_a_restart() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let acme = "names = ['a.test', 'b.test']";
    // The authority is not there yet: that is told and tried again.
    let node = start(&text(dir.path(), [any, any], &pebble, acme)).await;
    let addresses = node.addresses();
    let (https, http, admin) = (addresses.https.unwrap(), addresses.http.unwrap(), addresses.admin.unwrap());
    reaches(admin, &orders("", "directory"), 1).await;
    assert!(handshake(https, "a.test", &RootCertStore::empty(), b"h2").await.is_err(), "there is nothing to show");
    pebble.start(http.port(), https.port()).await;
    let roots = pebble.issuer().await;
    let (first, other) = (shown(https, "a.test", &roots).await, shown(https, "b.test", &roots).await);
    assert_ne!(first, other, "each name has its own");
    reaches(admin, "selvage_certificate_not_after_seconds{name=\"a.test\",source=\"acme\"} ", 1).await;
    // Who is no authority finds nothing.
    let (status, _) = get(http, "a.test", "/.well-known/acme-challenge/guessed").await;
    assert_eq!(status, 404);
    assert!(handshake(https, "a.test", &roots, ACME_ALPN).await.is_err(), "that protocol is not spoken here");
    node.drain().await;

    let account = IssuedFiles::at(&dir.path().join("state"), &pebble.directory()).account().unwrap().unwrap();
    let node = start(&text(dir.path(), [https, http], &pebble, acme)).await;
    let admin = node.addresses().admin.unwrap();
    assert_eq!(leaf(&handshake(https, "a.test", &roots, b"h2").await.unwrap()), first);
    // It asks when to renew, with the account that it has, and orders nothing.
    assert_eq!(counted(admin, &orders("a.test", "issued")).await, 0);
    assert_eq!(IssuedFiles::at(&dir.path().join("state"), &pebble.directory()).account().unwrap().unwrap(), account);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_got_over_tls() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let node = start(&text(dir.path(), [any, any], &pebble, "names = ['a.test']\nchallenge = 'tls-alpn-01'")).await;
    let https = node.addresses().https.unwrap();
    pebble.start(1, https.port()).await;
    let roots = pebble.issuer().await;
    shown(https, "a.test", &roots).await;
    // No challenge stands any more, so nobody is shown one.
    assert!(handshake(https, "a.test", &roots, ACME_ALPN).await.is_err());
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_wildcard_is_got_by_records_that_a_program_puts() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let (hook, log) = (pebble.hook(), dir.path().join("hook.log"));
    let acme = format!(
        "names = ['*.a.test']\nchallenge = 'dns-01'\ndns_hook = ['/bin/sh', '{}', '{}']",
        hook.display(),
        log.display()
    );
    let node = start(&text(dir.path(), [any, any], &pebble, &acme)).await;
    let https = node.addresses().https.unwrap();
    pebble.start(1, 1).await;
    let roots = pebble.issuer().await;
    shown(https, "any.a.test", &roots).await;
    assert!(handshake(https, "a.test", &roots, b"h2").await.is_err(), "it is for what is below");
    let log = std::fs::read_to_string(log).unwrap();
    let actions: Vec<_> = log.lines().map(|line| line.split(' ').take(2).collect::<Vec<_>>()).collect();
    let record = "_acme-challenge.a.test";
    assert_eq!(actions.last().unwrap(), &["cleanup", record]);
    assert!(actions.contains(&vec!["present", record]));
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_account_is_bound_to_one_that_the_operator_has_elsewhere() {
    let Some(mut pebble) = Pebble::new() else { return };
    let (right, wrong) = ("zWNDZM6eQGHWpSRTPal5eIUYFTu7EajVIoguysqZ9wG44nMEtx3MUAsUDkMTQ12W", "d3Jvbmc".repeat(9));
    pebble.knows_only("kid-1", right);
    let dir = tempfile::tempdir().unwrap();
    let (any, key) = ("127.0.0.1:0".parse().unwrap(), dir.path().join("external.key"));
    std::fs::write(&key, wrong).unwrap();
    let acme = format!("names = ['a.test']\nexternal_account = {{ id = 'kid-1', key = '{}' }}", key.display());
    let node = start(&text(dir.path(), [any, any], &pebble, &acme)).await;
    let addresses = node.addresses();
    let (https, http, admin) = (addresses.https.unwrap(), addresses.http.unwrap(), addresses.admin.unwrap());
    pebble.start(http.port(), https.port()).await;
    reaches(admin, &orders("", "refused"), 1).await;
    // The file is read at each try.
    std::fs::write(&key, right).unwrap();
    shown(https, "a.test", &pebble.issuer().await).await;
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_record_that_stood_when_the_node_was_stopped_is_taken_away_at_its_next_start() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let (hook, log) = (pebble.hook(), dir.path().join("hook.log"));
    // It puts the record, says so, and does not come back.
    let slow = dir.path().join("slow.sh");
    std::fs::write(&slow, format!(". {}; [ $2 = cleanup ] || sleep 600", hook.display())).unwrap();
    let acme = |hook: &Path| {
        let (hook, log) = (hook.display(), log.display());
        format!("names = ['a.test']\nchallenge = 'dns-01'\ndns_hook = ['/bin/sh', '{hook}', '{log}']")
    };
    let said = || std::fs::read_to_string(&log).unwrap_or_default();
    let says = async |what: &str| {
        let saying = async {
            while !said().contains(what) {
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        timeout(PATIENCE, saying).await.unwrap_or_else(|_| panic!("{what} in {}", said()));
    };
    pebble.start(1, 1).await;
    let node = start(&text(dir.path(), [any, any], &pebble, &acme(&slow))).await;
    says("present _acme-challenge.a.test").await;
    node.drain().await;
    assert!(!said().contains("cleanup"), "{}", said());

    let node = start(&text(dir.path(), [any, any], &pebble, &acme(&hook))).await;
    says("cleanup _acme-challenge.a.test").await;
    shown(node.addresses().https.unwrap(), "a.test", &pebble.issuer().await).await;
    says("present _acme-challenge.a.test\ncleanup _acme-challenge.a.test\npresent").await;
    let files = IssuedFiles::at(&dir.path().join("state"), &pebble.directory());
    assert_eq!(files.records().unwrap(), [], "nothing is left to do");
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_renewal_that_fails_leaves_the_old_certificate_and_is_tried_again() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let files = IssuedFiles::at(&dir.path().join("state"), &pebble.directory());
    let (old, root) = old("a.test");
    files.make().unwrap();
    files.save(&CertificateName::try_from("a.test".to_owned()).unwrap(), &old).unwrap();
    let node = start(&text(dir.path(), [any, any], &pebble, "names = ['a.test']")).await;
    let addresses = node.addresses();
    let (https, http, admin) = (addresses.https.unwrap(), addresses.http.unwrap(), addresses.admin.unwrap());
    let mut roots = RootCertStore::empty();
    roots.add(root).unwrap();
    let kept = handshake(https, "a.test", &roots, b"http/1.1").await.unwrap();
    assert_eq!(leaf(&kept), old.chain()[0]);

    // The name leads elsewhere.
    pebble.start_names().await;
    pebble.resolve("a.test", "127.0.0.9").await;
    pebble.start(http.port(), https.port()).await;
    reaches(admin, &orders("a.test", "challenge"), 2).await;
    assert_eq!(leaf(&handshake(https, "a.test", &roots, b"h2").await.unwrap()), old.chain()[0]);

    pebble.resolve("a.test", "127.0.0.1").await;
    let issuer = pebble.issuer().await;
    shown(https, "a.test", &issuer).await;
    reaches(admin, &orders("a.test", "issued"), 1).await;
    // Who was connected all the time is still served.
    let (mut sender, connection) = http1::handshake(TokioIo::new(kept)).await.unwrap();
    tokio::spawn(connection);
    let request = http::Request::get("/").header("host", "a.test").body(Empty::<Bytes>::new()).unwrap();
    assert_eq!(sender.send_request(request).await.unwrap().status(), 404);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_certificate_is_renewed_when_its_authority_says_so() {
    let Some(mut pebble) = Pebble::new() else { return };
    let window = pebble.says_when().await;
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let node = start(&text(dir.path(), [any, any], &pebble, "names = ['a.test']")).await;
    let addresses = node.addresses();
    let (https, http, admin) = (addresses.https.unwrap(), addresses.http.unwrap(), addresses.admin.unwrap());
    pebble.start(http.port(), https.port()).await;
    let roots = pebble.issuer().await;
    // The first one has all of its life before it, but its authority wants it gone. Of the second it says it has time.
    reaches(admin, &orders("a.test", "issued"), 2).await;
    let second = leaf(&handshake(https, "a.test", &roots, b"h2").await.unwrap());
    let both = async {
        while window.asked().len() < 2 {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    timeout(PATIENCE, both).await.expect("it asks about the second one too");
    // By key identifier and serial number (RFC 9773 4.1).
    let asked = window.asked();
    assert_ne!(asked[0], asked[1]);
    assert!(asked.iter().all(|number| number.trim_start_matches('/').split_once('.').is_some()), "{asked:?}");
    node.drain().await;

    // Neither does it forget that over a restart.
    let node = start(&text(dir.path(), [https, http], &pebble, "names = ['a.test']")).await;
    assert_eq!(leaf(&handshake(https, "a.test", &roots, b"h2").await.unwrap()), second);
    node.drain().await;
    assert_eq!(window.asked(), asked);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_host_of_an_app_has_a_certificate_once_a_client_asks_for_it() {
    let Some(mut pebble) = Pebble::new() else { return };
    let dir = tempfile::tempdir().unwrap();
    let any = "127.0.0.1:0".parse().unwrap();
    let config = text(dir.path(), [any, any], &pebble, "on_demand = true");
    let settings = NodeConfig::parse(Path::new("/node.toml"), &config).unwrap().acme.unwrap();
    let resolver = Arc::new(Resolver::new(Certificates::default()));
    let parts = Parts::new("fra-1".parse().unwrap(), "fra".parse().unwrap(), 100, Metrics::new());
    parts.table.store(Arc::new(Table::new(vec![Arc::new(crate::front::app("hello"))], "apps.test").unwrap()));
    let parts = Arc::new(parts.with_challenges(resolver.challenges().clone()));
    let state = dir.path().join("state");
    let acme = Acme::open(settings, &state, Arc::clone(&resolver), TlsProvider::default()).unwrap();
    let tls = FrontTls {
        resolver,
        provider: TlsProvider::default(),
        secret: FrontSecret::random().unwrap(),
        versions: TlsVersions::Only13,
        has_challenges: false,
        has_early_data: false,
        rules: Arc::default(),
    };
    let options = ListenOptions { https: Some(any), http: Some(any), tls: Some(tls) };
    let listeners = Listeners::bind(&options, Arc::clone(&parts)).await.unwrap();
    let (https, http) = (listeners.https_addr().unwrap(), listeners.http_addr().unwrap());
    pebble.start(http.port(), https.port()).await;
    let roots = pebble.issuer().await;
    let running = tokio::spawn(acme.run(Arc::clone(&parts)));

    assert!(handshake(https, "other.apps.test", &roots, b"h2").await.is_err());
    shown(https, "hello.apps.test", &roots).await;
    let metrics = parts.metrics.text();
    assert!(metrics.contains(&(orders("hello.apps.test", "issued") + "1")), "{metrics}");
    assert!(!metrics.contains("other.apps.test"), "nothing was ordered for a host that no app has: {metrics}");
    running.abort();
}
