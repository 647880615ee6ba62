//! A release from the registry to serving: what is refused, what stays, and what needs no control plane.

mod boot;
mod control_plane;
mod freshness;
mod neighbours;
pub(crate) mod signed;
mod statuses;

use std::net::SocketAddr;
use std::path::Path;

use bytes::Bytes;
use control_plane::{ControlPlane, PATIENCE, Signer, write_identity};
use selvage_certs::Authority;
use selvage_config::Digest;
use selvage_config::app::App;
use selvage_config::bundle::Bundle;
use selvage_config::node::NodeConfig;
use selvage_config::plan::{AppStatus, Status};
use selvage_node::release::fetch::Fetched;
use selvage_node::{Node, UpOptions};
use signed::Signed;
use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
use tokio::net::TcpStream;

/// A fleet of one.
struct Fleet {
    dir: tempfile::TempDir,
    authority: Authority,
    signer: Signer,
    signed: Signed,
    control_plane: ControlPlane,
}

impl Fleet {
    async fn new() -> Self {
        let (dir, authority, signer) =
            (tempfile::tempdir().unwrap(), Authority::create("test").unwrap(), Signer::new());
        write_identity(&authority, dir.path(), &signer);
        let signed = Signed::new();
        signed.write_root(dir.path());
        let control_plane = ControlPlane::start(&authority).await;
        Self { dir, authority, signer, signed, control_plane }
    }

    async fn node(&self) -> Node {
        node(self.dir.path(), self.control_plane.address).await
    }

    /// Publishes an app and signs it if `signer` is there.
    fn publish(&self, name: &str, code: Bytes, signer: Option<&Signer>) -> (Fetched, Digest) {
        let component = name.parse().unwrap();
        let app = App::of_component(name.parse().unwrap(), component, Digest::of(&code));
        let fetched = Fetched::of_files(&app, [(Digest::of(&code), code)].into());
        let digest = self.control_plane.publish(&fetched);
        if let Some(signer) = signer {
            self.control_plane.sign(digest, signer, false);
        }
        (fetched, digest)
    }

    fn plan(&self, generation: u64, releases: &[(&str, Digest)]) {
        self.control_plane.plan(self.signed.plan(&self.signed.snapshot(generation, releases)));
    }

    async fn settled(&self, generation: u64) -> Status {
        self.control_plane.status(|status| status.generation == generation).await
    }
}

async fn node(dir: &Path, control_plane: SocketAddr) -> Node {
    let text = format!(
        r#"
name = "fra-1"
region = "fra"
state_dir = "state"
listen = {{ http = "127.0.0.1:0", admin = "127.0.0.1:0" }}
identity = {{ certificate = "node.pem", key = "node.key", roots = "ca.pem" }}
control_plane = {{ address = "{control_plane}" }}
trust = {{ keys = ["cosign.pub"], root = "root-1.json" }}
drain_ms = 1000
"#
    );
    let config = NodeConfig::parse(&dir.join("node.toml"), &text).unwrap();
    Box::pin(Node::start(config)).await.unwrap()
}

/// A guest that answers with five letters.
fn saying(word: &str) -> Bytes {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests/hello.wat");
    let text = std::fs::read_to_string(path).unwrap();
    assert_eq!(word.len(), "hello".len());
    wat::parse_str(text.replace("\"hello\"", &format!("\"{word}\""))).unwrap().into()
}

fn guest(name: &str) -> Bytes {
    wat::parse_file(Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/guests").join(name)).unwrap().into()
}

/// The status line's code and the body.
async fn get(address: SocketAddr, host: &str) -> (u16, String) {
    let asked = async {
        let mut stream = TcpStream::connect(address).await.unwrap();
        let request = format!("GET / HTTP/1.1\r\nhost: {host}\r\nconnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        answer
    };
    let answer = tokio::time::timeout(PATIENCE, asked).await.unwrap();
    let code = answer.split(' ').nth(1).unwrap().parse().unwrap();
    (code, answer.split_once("\r\n\r\n").unwrap().1.to_owned())
}

async fn says(node: &Node, host: &str, word: &str) -> bool {
    let (code, body) = get(node.addresses().http.unwrap(), host).await;
    code == 200 && body.contains(word)
}

fn app<'s>(status: &'s Status, name: &str) -> &'s AppStatus {
    status.apps.iter().find(|app| app.app.as_str() == name).unwrap()
}

fn serving(status: &Status, name: &str) -> Option<String> {
    app(status, name).serving.as_ref().map(|serving| serving.release.to_string())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signed_release_serves_until_a_newer_one_takes_its_place() {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    let (_, first) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    fleet.plan(1, &[("hello@1", first)]);
    let status = fleet.settled(1).await;
    assert_eq!(serving(&status, "hello").unwrap(), "hello@1");
    assert!(says(&node, "hello.localhost", "hello").await);

    // This one's signature lies where registries without the referrers API have it.
    let (_, second) = fleet.publish("hello", saying("howdy"), None);
    fleet.control_plane.sign(second, &fleet.signer, true);
    fleet.plan(2, &[("hello@2", second)]);
    let status = fleet.settled(2).await;
    assert_eq!(app(&status, "hello").refused, None);
    assert_eq!(serving(&status, "hello").unwrap(), "hello@2");
    assert!(says(&node, "hello.localhost", "howdy").await);

    fleet.plan(3, &[]);
    assert_eq!(fleet.settled(3).await.apps, []);
    assert_eq!(get(node.addresses().http.unwrap(), "hello.localhost").await.0, 404);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_is_found_behind_pages_of_others() {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    let (_, release) = fleet.publish("hello", saying("hello"), None);
    for _ in 0..5 {
        fleet.control_plane.sign(release, &Signer::new(), false);
    }
    fleet.control_plane.sign(release, &fleet.signer, false);
    fleet.plan(1, &[("hello@1", release)]);
    let status = fleet.settled(1).await;
    assert_eq!((app(&status, "hello").refused.clone(), serving(&status, "hello").as_deref()), (None, Some("hello@1")));
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_exactly_what_a_trusted_key_signed_is_refused_and_the_last_good_release_stays() {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    let (_, good) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    fleet.plan(1, &[("hello@1", good)]);
    fleet.settled(1).await;

    let (unsigned, unsigned_digest) = fleet.publish("hello", saying("unsig"), None);
    let (_, strange) = fleet.publish("hello", saying("strng"), Some(&Signer::new()));
    let (tampered, tampered_layer) = fleet.publish("hello", saying("tampr"), Some(&fleet.signer));
    fleet.control_plane.tamper(Digest::of(&saying("tampr")));
    let (_, tampered_manifest) = fleet.publish("hello", saying("manif"), Some(&fleet.signer));
    fleet.control_plane.tamper(tampered_manifest);
    let (_, other) = fleet.publish("other", saying("other"), Some(&fleet.signer));
    let cases = [
        (unsigned_digest, "unsigned"),
        (strange, "untrusted"),
        (tampered_layer, "digest"),
        (tampered_manifest, "digest"),
        (Digest::of(b"nobody has it"), "fetch"),
        (other, "app"),
    ];
    for (number, (manifest, cause)) in (2..).zip(cases) {
        fleet.plan(number, &[(&format!("hello@{number}"), manifest)]);
        let status = fleet.settled(number).await;
        let refused = app(&status, "hello").refused.clone().unwrap();
        assert_eq!((refused.cause.as_str(), refused.release.number), (cause, u32::try_from(number).unwrap()));
        assert_eq!(serving(&status, "hello").unwrap(), "hello@1");
        assert!(says(&node, "hello.localhost", "hello").await, "{cause}");
    }
    let component =
        |fetched: &Fetched| *fetched.blobs.keys().find(|d| fetched.blobs[*d].starts_with(b"\0asm")).unwrap();
    assert_eq!(fleet.control_plane.asked(&component(&unsigned).hex()), 0, "code was fetched before its signature");
    assert!(fleet.control_plane.asked(&component(&tampered).hex()) > 0);

    // Back to what serves: nothing is refused any more.
    fleet.plan(8, &[("hello@1", good)]);
    assert_eq!(app(&fleet.settled(8).await, "hello").refused, None);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_signature_that_comes_later_is_found_without_a_new_plan() {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    let (_, digest) = fleet.publish("hello", saying("later"), None);
    fleet.plan(1, &[("hello@1", digest)]);
    assert_eq!(app(&fleet.settled(1).await, "hello").refused.clone().unwrap().cause, "unsigned");
    assert_eq!(get(node.addresses().http.unwrap(), "hello.localhost").await.0, 404);
    fleet.control_plane.sign(digest, &fleet.signer, false);
    fleet.control_plane.status(|status| serving(status, "hello").is_some()).await;
    assert!(says(&node, "hello.localhost", "later").await);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_without_its_control_plane_serves_from_its_disk_what_was_good() {
    let fleet = Fleet::new().await;
    let first = fleet.node().await;
    let (_, good) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    let (_, bad) = fleet.publish("hello", saying("strng"), Some(&Signer::new()));
    fleet.plan(1, &[("hello@1", good)]);
    fleet.settled(1).await;
    fleet.plan(2, &[("hello@2", bad)]);
    fleet.settled(2).await;
    first.drain().await;
    let Fleet { dir, authority, control_plane, .. } = fleet;
    let address = control_plane.address;
    drop(control_plane);

    let second = node(dir.path(), address).await;
    assert!(says(&second, "hello.localhost", "hello").await);
    assert_eq!(serving(&second.status(), "hello").unwrap(), "hello@1");
    second.drain().await;

    // The disk is not trusted with the truth: without the key that signed it, nothing on it runs.
    write_identity(&authority, dir.path(), &Signer::new());
    let third = node(dir.path(), address).await;
    assert_eq!(get(third.addresses().http.unwrap(), "hello.localhost").await.0, 404);
    third.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn an_import_that_is_not_offered_is_refused_by_name_and_stands_in_nobodys_way() {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    let (_, greedy) = fleet.publish("greedy", guest("ungranted.wat"), Some(&fleet.signer));
    let (_, silent) = fleet.publish("silent", guest("not_http.wat"), Some(&fleet.signer));
    let (_, good) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    fleet.plan(1, &[("greedy@1", greedy), ("silent@1", silent), ("hello@1", good)]);
    let status = fleet.settled(1).await;
    let refused = app(&status, "greedy").refused.clone().unwrap();
    assert_eq!(refused.cause, "grant", "{}", refused.reason);
    assert!(refused.reason.contains("acme:unknown/thing@1.0.0"), "{}", refused.reason);
    assert_eq!(app(&status, "silent").refused.clone().unwrap().cause, "compile");
    assert!(says(&node, "hello.localhost", "hello").await);
    assert_eq!(serving(&status, "greedy"), None);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn up_serves_one_app_whatever_the_host_and_needs_no_signature() {
    let code = saying("hello");
    let app = App::of_component("hello".parse().unwrap(), "hello".parse().unwrap(), Digest::of(&code));
    let options = UpOptions {
        compiled_dir: None,
        bundle: Bundle { app, blobs: [(Digest::of(&code), code)].into() },
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        variables: [].into(),
        environment: [].into(),
        state_dir: None,
        private_networks: false,
        values: vec![("default".parse().unwrap(), "greeting".to_owned(), Bytes::from_static(b"hi"))],
    };
    let node = Box::pin(Node::up(options)).await.unwrap();
    assert!(says(&node, "localhost", "hello").await);
    let value = node.kv().unwrap().get(&"hello/default".parse().unwrap(), "greeting").unwrap();
    assert_eq!(value.unwrap(), "hi");
    node.drain().await;
}
