//! Clients that were not written here: curl and an HTTP/3 client against a running demo; oras and cosign against a fleet
//! that was set up by hand, as docs/OPERATING.md says.
//!
//! `.ci/tools` installs them by package. Without one, its part is skipped with a loud line; never in CI.

use std::process::{Command, Output};

use crate::by_hand::Fleet;
use crate::program::{Serving, example, finish, selvage, skipped, well};

/// Whether `program` is there. In CI it must be.
pub(crate) fn have(program: &str) -> bool {
    let there = Command::new(program).arg("--help").output().is_ok();
    assert!(there || std::env::var_os("CI").is_none(), "CI needs {program}: see .ci/tools");
    if !there {
        skipped(program);
    }
    there
}

fn python() -> Option<String> {
    let python = std::env::var("SELVAGE_TEST_PYTHON").ok();
    assert!(python.is_some() || std::env::var_os("CI").is_none(), "CI needs SELVAGE_TEST_PYTHON: see .ci/tools");
    if python.is_none() {
        skipped("a Python with curl_cffi and aioquic");
    }
    python
}

struct Demo {
    serving: Serving,
    _directory: tempfile::TempDir,
}

impl Demo {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let state = directory.path().join("state");
        let serving = Serving::start(selvage().args(["demo", "--port", "21443", "--state-dir"]).arg(&state));
        Self { serving, _directory: directory }
    }

    fn ca(&self) -> &str {
        self.serving.told["ca"].as_str().unwrap()
    }

    fn front(&self, node: usize) -> String {
        let front = self.serving.told["nodes"][node]["front"].as_str().unwrap();
        format!("https://hello.localhost:{}/", front.rsplit(':').next().unwrap())
    }

    fn selvage(&self, arguments: &[&str]) -> Output {
        finish(selvage().args(arguments).env("SELVAGE_CONTEXT", self.serving.told["context"].as_str().unwrap()))
    }
}

#[test]
fn other_peoples_clients_reach_every_node_of_a_demo() {
    let demo = Demo::start();
    if have("curl") {
        curl(&demo);
    }
    if let Some(python) = python() {
        http3(&demo, &python);
        aioquic(&demo, &python);
    }
    kv(&demo);
    let Demo { serving, _directory } = demo;
    assert!(serving.stop(), "SIGTERM ends the demo well");
}

fn curl(demo: &Demo) {
    for (flag, version) in [("--http1.1", "1.1"), ("--http2", "2")] {
        for node in 0..3 {
            let format = "%{http_version} %{http_code}";
            let get = ["-sS", flag, "--cacert", demo.ca(), "-o", "/dev/null", "-w", format, &demo.front(node)];
            let text = well("curl", &finish(Command::new("curl").args(get)));
            assert_eq!(text, format!("{version} 200"));
        }
    }
}

/// curl_cffi speaks HTTP/3 with another library (ngtcp2).
fn http3(demo: &Demo, python: &str) {
    let script = "
import sys
from curl_cffi import requests, CurlHttpVersion
answer = requests.get(sys.argv[1], verify=sys.argv[2], http_version=CurlHttpVersion.V3ONLY)
assert answer.status_code == 200 and 'Hello' in answer.text, (answer.status_code, answer.text)
assert int(answer.http_version) == int(CurlHttpVersion.V3), answer.http_version
";
    for node in 0..3 {
        well("curl_cffi over HTTP/3", &finish(Command::new(python).args(["-c", script, &demo.front(node), demo.ca()])));
    }
}

/// aioquic is a third one, and strict.
fn aioquic(demo: &Demo, python: &str) {
    let script = "
import asyncio, ssl, sys
from urllib.parse import urlparse
from aioquic.asyncio.client import connect
from aioquic.asyncio.protocol import QuicConnectionProtocol
from aioquic.h3.connection import H3_ALPN, H3Connection
from aioquic.h3.events import DataReceived, HeadersReceived
from aioquic.quic.configuration import QuicConfiguration

class Client(QuicConnectionProtocol):
    def __init__(self, *arguments, **named):
        super().__init__(*arguments, **named)
        self.http, self.answers = H3Connection(self._quic), {}

    def quic_event_received(self, event):
        for part in self.http.handle_event(event):
            fields, body, done = self.answers[part.stream_id]
            if isinstance(part, HeadersReceived):
                fields.update(part.headers)
            elif isinstance(part, DataReceived):
                body.extend(part.data)
            if part.stream_ended:
                done.set_result(None)

    async def get(self, url):
        stream = self._quic.get_next_available_stream_id()
        self.answers[stream] = ({}, bytearray(), asyncio.get_running_loop().create_future())
        head = [(b':method', b'GET'), (b':scheme', b'https'), (b':authority', url.netloc.encode()), (b':path', b'/')]
        self.http.send_headers(stream, head, end_stream=True)
        self.transmit()
        await self.answers[stream][2]
        return self.answers[stream][:2]

async def main():
    url = urlparse(sys.argv[1])
    configuration = QuicConfiguration(is_client=True, alpn_protocols=H3_ALPN, cafile=sys.argv[2], server_name=url.hostname)
    async with connect('127.0.0.1', url.port, configuration=configuration, create_protocol=Client) as client:
        for fields, body in await asyncio.gather(*(client.get(url) for _ in range(20))):
            assert fields[b':status'] == b'200' and b'Hello' in body, (fields, body)

asyncio.run(asyncio.wait_for(main(), 60))
";
    for node in 0..3 {
        well("aioquic", &finish(Command::new(python).args(["-c", script, &demo.front(node), demo.ca()])));
    }
}

fn kv(demo: &Demo) {
    well("kv set", &demo.selvage(&["kv", "--node", "fra-1", "set", "counter/default", "greeting", "ahoy"]));
    let began = std::time::Instant::now();
    loop {
        let got = demo.selvage(&["kv", "--node", "sin-1", "get", "counter/default", "greeting"]);
        if got.status.success() {
            assert_eq!(got.stdout, b"ahoy");
            break;
        }
        assert!(began.elapsed().as_secs() < 30, "{}", String::from_utf8_lossy(&got.stderr));
    }
    let listed = well("kv list", &demo.selvage(&["kv", "--node", "iad-1", "list", "counter/default"]));
    assert!(listed.contains("greeting"), "{listed}");
    let peers = well("kv lag", &demo.selvage(&["kv", "--node", "iad-1", "lag"]));
    assert!(peers.contains("fra-1") && peers.contains("sin-1"), "{peers}");
    home(demo);
    placed(demo);
    watch(demo);
}

/// A store with a home: whoever writes elsewhere reads it there at once.
fn home(demo: &Demo) {
    let set = ["kv", "--node", "sin-1", "set", "orders/default", "next", "7"];
    let began = std::time::Instant::now();
    // The first home waits for all nodes.
    while !demo.selvage(&set).status.success() {
        assert!(began.elapsed().as_secs() < 60, "{}", String::from_utf8_lossy(&demo.selvage(&set).stderr));
    }
    assert_eq!(demo.selvage(&["kv", "--node", "sin-1", "get", "orders/default", "next"]).stdout, b"7");
    let absent = demo.selvage(&["kv", "--node", "iad-1", "set", "orders/default", "next", "8", "--if-absent"]);
    assert!(!absent.status.success() && String::from_utf8_lossy(&absent.stderr).contains("exists"), "{absent:?}");
    let latest = ["kv", "--node", "iad-1", "get", "orders/default", "next", "--latest"];
    assert_eq!(demo.selvage(&latest).stdout, b"7");
    let homes = well("kv homes", &demo.selvage(&["kv", "--node", "sin-1", "homes"]));
    assert!(["orders/default", "fra-1", "elsewhere"].iter().all(|part| homes.contains(part)), "{homes}");
    let homes = well("kv homes", &demo.selvage(&["kv", "--node", "fra-1", "homes"]));
    assert!(homes.contains("here"), "{homes}");
}

/// A store that two of the three regions hold: the third uses it too, and has none of its rows.
fn placed(demo: &Demo) {
    let set = ["kv", "--node", "sin-1", "set", "carts/default", "ada", "3 pairs", "--token"];
    let began = std::time::Instant::now();
    let mut written = demo.selvage(&set);
    // Its placement is opened when the plan comes.
    while !written.status.success() {
        assert!(began.elapsed().as_secs() < 60, "{}", String::from_utf8_lossy(&written.stderr));
        written = demo.selvage(&set);
    }
    let token = String::from_utf8(written.stdout).unwrap().trim().to_owned();
    for node in ["fra-1", "iad-1", "sin-1"] {
        let got = demo.selvage(&["kv", "--node", node, "get", "carts/default", "ada", "--token", &token]);
        assert_eq!(got.stdout, b"3 pairs", "{node}: {}", String::from_utf8_lossy(&got.stderr));
        let told = well("kv placements", &demo.selvage(&["kv", "--node", node, "placements"]));
        let here = if node == "sin-1" { "no" } else { "yes" };
        assert!(["carts/default", "atlantic", "fra iad", here].iter().all(|part| told.contains(part)), "{told}");
    }
    let listed = well("kv list", &demo.selvage(&["kv", "--node", "sin-1", "list", "carts/default"]));
    assert!(listed.contains("ada"), "{listed}");
    let watched = demo.selvage(&["kv", "--node", "sin-1", "watch", "carts/default", "--count", "1"]);
    let why = String::from_utf8_lossy(&watched.stderr).into_owned();
    assert!(!watched.status.success() && why.contains("fra-1") && why.contains("atlantic"), "{why}");
    let lag = well("kv lag", &demo.selvage(&["kv", "--node", "iad-1", "lag"]));
    assert!(lag.contains("PLACEMENT") && lag.contains("atlantic"), "{lag}");
    let lag = well("kv lag", &demo.selvage(&["kv", "--node", "sin-1", "lag"]));
    assert!(!lag.contains("atlantic"), "{lag}");
}

/// What is written in one place is told by a watch in another, whenever the watch begins.
fn watch(demo: &Demo) {
    std::thread::scope(|scope| {
        let watched = scope.spawn(|| {
            demo.selvage(&[
                "-o",
                "json",
                "kv",
                "--node",
                "sin-1",
                "watch",
                "counter/default",
                "--prefix",
                "seen/",
                "--count",
                "1",
            ])
        });
        let mut number = 0;
        while !watched.is_finished() {
            assert!(number < 600, "nothing was told");
            number += 1;
            let key = format!("seen/{number}");
            well("kv set", &demo.selvage(&["kv", "--node", "fra-1", "set", "counter/default", &key, "x"]));
        }
        let told = well("kv watch", &watched.join().unwrap());
        assert!(told.contains(r#""exists":true"#) && told.contains("seen/") && told.contains("fra-1"), "{told}");
    });
}

/// cosign 3 from a release of Debian that moves: CI takes it if it is there.
fn have_optional(program: &str) -> bool {
    let there = Command::new(program).arg("version").output().is_ok_and(|output| output.status.success());
    if !there {
        skipped(program);
    }
    there
}

/// A bundle that cosign 3 wrote, on an artifact that nothing else signed, with a key that cosign 3 made.
fn cosign_3_signs(fleet: &Fleet, run: &dyn Fn(&str, &[&str]) -> Output, registry: &str) {
    let config = r#"{"mediaType":"application/vnd.dev.sigstore.signingconfig.v0.2+json","caUrls":[],"oidcUrls":[],
        "rekorTlogUrls":[],"tsaUrls":[],"rekorTlogConfig":{"selector":"ANY"},"tsaConfig":{"selector":"ANY"}}"#;
    std::fs::write(fleet.path("signing.json"), config).unwrap();
    let source = example("hello-p3").display().to_string();
    let pushed = fleet.selvage(&["push", "-f", &source, "-o", "json"]);
    let pushed: serde_json::Value = serde_json::from_slice(&pushed.stdout).unwrap();
    let digest = pushed["manifest"].as_str().unwrap();
    let name = format!("{registry}/hello-p3@{digest}");
    well(
        "cosign 3 signs",
        &run(
            "cosign3",
            &["sign", "--key", "release.key", "--signing-config", "signing.json", "-a", "env=prod", "-y", &name],
        ),
    );
    for (env, accepted) in [("prod", true), ("test", false)] {
        let policy = format!("[[rule]]\nannotations = {{ env = '{env}' }}\nsigners = [{{ key = 'release.pub' }}]\n");
        std::fs::write(fleet.path("policy.toml"), policy).unwrap();
        let told = fleet.selvage(&["verify", &format!("hello-p3@{digest}"), "--policy", "policy.toml"]);
        assert_eq!(told.status.success(), accepted, "{env}: {}", String::from_utf8_lossy(&told.stdout));
    }
    well("deploy what cosign 3 signed", &fleet.selvage(&["deploy", &format!("hello-p3@{digest}")]));
}

/// cosign 2 writes `.sig` tags, cosign 3 bundles: a node that allows both runs what either signed, and each verifies what
/// `selvage sign` signed.
#[test]
fn cosign_and_selvage_accept_each_others_signatures() {
    if !(have("cosign") && have("oras")) {
        return;
    }
    let fleet = Fleet::start();
    let registry = fleet.registry();
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command
            .args(arguments)
            .env("HOME", fleet.path(""))
            .env("DOCKER_CONFIG", fleet.path(""))
            .env("COSIGN_PASSWORD", "pw");
        finish(command.env("SSL_CERT_FILE", fleet.path("certs/ca.pem")).current_dir(fleet.path("")))
    };
    let ca = fleet.path("certs/ca.pem").display().to_string();
    well("oras login", &run("oras", &["login", "-u", "ci", "-p", Fleet::TOKEN, "--ca-file", &ca, &registry]));

    let source = example("hello").display().to_string();
    let pushed = fleet.selvage(&["push", "-f", &source, "--repository", "acme/hello", "--tag", "v1", "-o", "json"]);
    well("push", &pushed);
    let pushed: serde_json::Value = serde_json::from_slice(&pushed.stdout).unwrap();
    let digest = pushed["manifest"].as_str().unwrap();
    let (name, reference) = (format!("{registry}/acme/hello@{digest}"), format!("acme/hello@{digest}"));

    let refused = fleet.selvage(&["deploy", &reference, "--app", "hello"]);
    let text = String::from_utf8_lossy(&refused.stdout).into_owned();
    assert!(refused.status.code() == Some(1) && text.contains("unsigned"), "{text}");

    well("cosign sign", &run("cosign", &["sign", "--key", "release.key", "--tlog-upload=false", "-y", &name]));
    let again = fleet.selvage(&["deploy", &reference, "--app", "hello", "--variable", "greeting=signed"]);
    well("deploy what cosign signed", &again);

    let pulled = fleet.path("pulled").display().to_string();
    well("oras pull", &run("oras", &["pull", "--ca-file", &ca, "-o", &pulled, &name]));
    assert!(fleet.path("pulled/hello.wasm").exists());

    // What oras pushes runs too: a plain wasm artifact, without a manifest of ours.
    std::fs::copy(example("hello").join("hello.wasm"), fleet.path("plain.wasm")).unwrap();
    std::fs::write(fleet.path("empty.json"), "{}").unwrap();
    let plain = format!("{registry}/acme/plain:1");
    let config = "empty.json:application/vnd.wasm.config.v0+json";
    let push = ["push", "--ca-file", &ca, "--config", config, &plain, "plain.wasm:application/wasm"];
    well("oras push", &run("oras", &push));
    let verify = ["verify", "--key", "release.pub", "--insecure-ignore-tlog=true", &plain];
    assert!(!run("cosign", &verify).status.success(), "nothing is signed yet");
    well("selvage sign", &fleet.selvage(&["sign", "acme/plain:1", "--key", "release.key", "--legacy"]));
    well("cosign 2 verifies the tag", &run("cosign", &verify));
    if have_optional("cosign3") {
        let only_bundle = format!("{registry}/acme/bundle:1");
        well("oras copy", &run("oras", &["cp", "--from-ca-file", &ca, "--to-ca-file", &ca, &plain, &only_bundle]));
        well("selvage sign", &fleet.selvage(&["sign", "acme/bundle:1", "--key", "release.key"]));
        let verify = ["verify", "--key", "release.pub", "--insecure-ignore-tlog=true", &only_bundle];
        well("cosign 3 verifies the bundle", &run("cosign3", &verify));
        cosign_3_signs(&fleet, &run, &registry);
    }
    well("deploy what oras pushed", &fleet.selvage(&["deploy", "acme/plain:1"]));
}

/// crane and skopeo, of two other families of registry clients, by name and password: each is sent for a token first.
#[test]
fn crane_and_skopeo_push_pull_copy_list_and_delete() {
    let fleet = Fleet::start();
    let registry = fleet.registry();
    let run = |program: &str, arguments: &[&str]| {
        let mut command = Command::new(program);
        command.args(arguments).env("HOME", fleet.path("")).env("DOCKER_CONFIG", fleet.path(""));
        finish(command.env("SSL_CERT_FILE", fleet.path("certs/ca.pem")).current_dir(fleet.path("")))
    };
    let source = example("hello").display().to_string();
    let pushed = fleet.selvage(&["push", "-f", &source, "--repository", "acme/hello", "--tag", "v1", "-o", "json"]);
    let pushed: serde_json::Value = serde_json::from_slice(&pushed.stdout).unwrap();
    let digest = pushed["manifest"].as_str().unwrap();
    let (first, second) = (format!("{registry}/acme/hello:v1"), format!("{registry}/acme/copy:v1"));
    if have_optional("crane") {
        well("crane login", &run("crane", &["auth", "login", &registry, "-u", "ci", "-p", Fleet::TOKEN]));
        assert_eq!(well("crane digest", &run("crane", &["digest", &first])).trim(), digest);
        well("crane copy", &run("crane", &["copy", &first, &second]));
        assert_eq!(well("crane digest", &run("crane", &["digest", &second])).trim(), digest);
        well("crane tag", &run("crane", &["tag", &second, "v2"]));
        assert_eq!(well("crane ls", &run("crane", &["ls", &format!("{registry}/acme/copy")])).trim(), "v1\nv2");
        let catalog = well("crane catalog", &run("crane", &["catalog", &registry]));
        assert_eq!(catalog.trim(), "acme/copy\nacme/hello");
        well("crane delete", &run("crane", &["delete", &format!("{registry}/acme/copy@{digest}")]));
        assert!(!run("crane", &["digest", &second]).status.success());
    }
    if have("skopeo") {
        let credentials = format!("ci:{}", Fleet::TOKEN);
        // Debian's skopeo trusts authorities by host, from a directory.
        std::fs::create_dir(fleet.path("trusted")).unwrap();
        std::fs::copy(fleet.path("certs/ca.pem"), fleet.path("trusted/ca.crt")).unwrap();
        let certs = fleet.path("trusted").display().to_string();
        let (from, to) = (format!("docker://{first}"), format!("docker://{registry}/acme/third:v1"));
        let copy = ["copy", "--insecure-policy", "--src-cert-dir", &certs, "--dest-cert-dir", &certs];
        let copy = [&copy[..], &["--src-creds", &credentials, "--dest-creds", &credentials, &from, &to]].concat();
        well("skopeo copy", &run("skopeo", &copy));
        let inspect = ["inspect", "--raw", "--cert-dir", &certs, "--creds", &credentials, &to];
        let raw = run("skopeo", &inspect);
        assert_eq!(
            selvage_config::Digest::of(&raw.stdout).to_string(),
            digest,
            "{}",
            String::from_utf8_lossy(&raw.stderr)
        );
        let list =
            ["list-tags", "--cert-dir", &certs, "--creds", &credentials, &format!("docker://{registry}/acme/third")];
        assert!(well("skopeo list-tags", &run("skopeo", &list)).contains("\"v1\""));
        let dir = fleet.path("layout").display().to_string();
        let pull = ["copy", "--insecure-policy", "--src-cert-dir", &certs, "--src-creds", &credentials, &to];
        well("skopeo pull", &run("skopeo", &[&pull[..], &[&format!("dir:{dir}")]].concat()));
        assert!(fleet.path("layout/manifest.json").exists());
    }
}
