//! Clients of the WebAssembly world against the registry: `wash`, whose packages are found and fetched by wkg's own library
//! (wasm-pkg-client over oci-client), and what `spin registry push` sends. What they pushed is signed, deployed and served.
//!
//! `.ci/tools` installs wash by package. There is no package of Spin: its push is made here request by request, as
//! `crates/oci/src/client.rs` of Spin 3 and oci-client make them.

use std::process::{Command, Output};
use std::time::Instant;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::header::{AUTHORIZATION, CONTENT_LENGTH, CONTENT_RANGE, CONTENT_TYPE, LOCATION, WWW_AUTHENTICATE};
use reqwest::{Method, RequestBuilder, StatusCode};
use selvage_config::Digest;
use serde_json::{Value, json};

use crate::by_hand::Fleet;
use crate::peers::have;
use crate::program::{example, finish, http, well};

/// How long a node may take to serve what was deployed.
const PATIENCE_SECONDS: u64 = 60;

fn wash(fleet: &Fleet, directory: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new("wash");
    command.arg("--non-interactive").args(arguments).current_dir(fleet.path(directory));
    finish(command.env("HOME", fleet.path("")).env("SSL_CERT_FILE", fleet.path("certs/ca.pem")))
}

/// Until the node answers with `text`.
fn serves(fleet: &Fleet, (host, path): (&str, &str), text: &str) {
    let (url, begun) = (format!("http://{}{path}", fleet.front()), Instant::now());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    runtime.block_on(async {
        loop {
            let answer = http().get(&url).header("host", host).send().await.unwrap();
            let (status, body) = (answer.status(), answer.text().await.unwrap());
            if status == StatusCode::OK && body.contains(text) {
                return;
            }
            assert!(begun.elapsed().as_secs() < PATIENCE_SECONDS, "{host}: {status} {body}");
            tokio::time::sleep(std::time::Duration::from_millis(50)).await;
        }
    });
}

#[test]
fn wash_pushes_what_nodes_run_and_its_packages_are_found_by_their_names() {
    if !have("wash") {
        return;
    }
    let fleet = Fleet::start();
    let registry = fleet.registry();
    let ca = fleet.path("certs/ca.pem").display().to_string();
    let known = ["-u", "ci", "-p", Fleet::TOKEN, "--ca-path", &ca];
    std::fs::copy(example("plain").join("plain.wasm"), fleet.path("plain.wasm")).unwrap();
    let component = format!("{registry}/acme/plain:1");
    let oci = |verb: &str, more: &[&str]| {
        well("wash oci", &wash(&fleet, "", &[&["oci", verb], &known[..], more].concat()));
    };
    oci("push", &[&component, "plain.wasm"]);
    oci("pull", &[&component, "pulled.wasm"]);
    assert_eq!(std::fs::read(fleet.path("pulled.wasm")).unwrap(), std::fs::read(fleet.path("plain.wasm")).unwrap());
    // Nobody without the word gets in, and nobody with another one.
    let other = ["oci", "push", "-u", "ci", "-p", "another", "--ca-path", &ca, &component, "plain.wasm"];
    assert!(!wash(&fleet, "", &other).status.success());

    // Signed and deployed, it is served: the layout of the CNCF is one that nodes run as it is.
    well("sign", &fleet.selvage(&["sign", "acme/plain:1", "--key", "release.key"]));
    well("deploy", &fleet.selvage(&["deploy", "acme/plain:1"]));
    serves(&fleet, ("plain.localhost", "/"), "");

    // A package of interfaces, found by the namespace's registry and its name, as wkg does.
    for (directory, text) in [
        ("greet/wit", "package acme:greet@1.0.0;\ninterface api { greet: func(name: string) -> string; }\n"),
        ("app/wit", "package acme:app@1.0.0;\nworld app { import acme:greet/api@1.0.0; }\n"),
    ] {
        std::fs::create_dir_all(fleet.path(directory)).unwrap();
        std::fs::write(fleet.path(directory).join("world.wit"), text).unwrap();
    }
    let token = Fleet::TOKEN;
    let config = format!(
        "[namespace_registries]\nacme = \"{registry}\"\n[registry.\"{registry}\"]\ntype = \"oci\"\n\
         [registry.\"{registry}\".oci]\nauth = {{ username = \"ci\", password = \"{token}\" }}\n"
    );
    std::fs::create_dir_all(fleet.path(".config/wasm-pkg")).unwrap();
    std::fs::write(fleet.path(".config/wasm-pkg/config.toml"), config).unwrap();
    assert!(!wash(&fleet, "app", &["wit", "fetch"]).status.success(), "there is no such package yet");
    well("wash wit build", &wash(&fleet, "greet", &["wit", "build", "--output-file", "greet.wasm"]));
    oci("push", &[&format!("{registry}/acme/greet:1.0.0"), "greet/greet.wasm"]);
    well("wash wit fetch", &wash(&fleet, "app", &["wit", "fetch"]));
    let fetched = std::fs::read_to_string(fleet.path("app/wit/deps/acme-greet-1.0.0/package.wit")).unwrap();
    assert!(fetched.contains("greet: func(name: string) -> string"), "{fetched}");
}

/// `spin registry push`, as an operator with a token.
struct Spin {
    client: reqwest::Client,
    base: String,
    repository: &'static str,
    token: Option<String>,
}

/// Bytes of one part of a blob (`PUSH_CHUNK_MAX_SIZE` of oci-client).
const CHUNK_BYTES: usize = 4096 * 1024;

impl Spin {
    fn request(&self, method: Method, url: &str) -> RequestBuilder {
        let url = if url.starts_with("https://") { url.to_owned() } else { format!("{}{url}", self.base) };
        let request = self.client.request(method, url);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// Asks where tokens are had, and for one that lets it push and pull.
    async fn authenticate(&mut self) {
        let challenge = self.request(Method::GET, "/v2/").send().await.unwrap();
        assert_eq!(challenge.status(), StatusCode::UNAUTHORIZED);
        let challenge = challenge.headers()[WWW_AUTHENTICATE].to_str().unwrap().to_owned();
        let part = |name: &str| {
            let (_, rest) = challenge.split_once(&format!("{name}=\"")).unwrap_or_else(|| panic!("{challenge}"));
            rest.split_once('"').unwrap().0.to_owned()
        };
        let basic = format!("Basic {}", STANDARD.encode(format!("ci:{}", Fleet::TOKEN)));
        let scope = format!("repository:{}:pull,push", self.repository);
        let query = [("scope", scope), ("service", part("service"))];
        let answer = self.client.get(part("realm")).query(&query).header(AUTHORIZATION, basic).send().await.unwrap();
        let answer: Value = answer.json().await.unwrap();
        let token = answer.get("token").or_else(|| answer.get("access_token")).unwrap();
        self.token = Some(token.as_str().unwrap().to_owned());
    }

    /// In parts, and then its digest.
    async fn push_blob(&self, bytes: &[u8]) {
        let path = format!("/v2/{}/blobs/uploads/", self.repository);
        let begun = self.request(Method::POST, &path).header(CONTENT_LENGTH, 0).send().await.unwrap();
        assert_eq!(begun.status(), StatusCode::ACCEPTED);
        let mut location = begun.headers()[LOCATION].to_str().unwrap().to_owned();
        let mut start = 0;
        for chunk in bytes.chunks(CHUNK_BYTES) {
            let range = format!("{start}-{}", start + chunk.len() - 1);
            let request = self.request(Method::PATCH, &location).header(CONTENT_RANGE, range);
            let request = request.header(CONTENT_LENGTH, chunk.len()).header(CONTENT_TYPE, "application/octet-stream");
            let taken = request.body(chunk.to_vec()).send().await.unwrap();
            assert_eq!(taken.status(), StatusCode::ACCEPTED, "{}", taken.text().await.unwrap());
            location = taken.headers()[LOCATION].to_str().unwrap().to_owned();
            start += chunk.len();
        }
        let digest = Digest::of(bytes).to_string();
        let request = self.request(Method::PUT, &location).query(&[("digest", digest)]).header(CONTENT_LENGTH, 0);
        let done = request.send().await.unwrap();
        assert_eq!(done.status(), StatusCode::CREATED, "{}", done.text().await.unwrap());
        assert!(done.headers().contains_key(LOCATION));
    }

    /// The app, its locked form last among the layers, and an image configuration that names it.
    async fn push_app(&self, layers: &[(&str, Vec<u8>)], locked: &Value, tag: &str) {
        let locked = locked.to_string().into_bytes();
        let mut blobs: Vec<(&str, &[u8])> =
            layers.iter().map(|(media_type, bytes)| (*media_type, &bytes[..])).collect();
        blobs.push(("application/vnd.fermyon.spin.application.v1+config", &locked));
        let label = json!({ "com.fermyon.spin.lockedAppDigest": Digest::of(&locked) });
        let config = json!({
            "architecture": "wasm", "os": "wasip1", "config": { "Labels": label },
            "rootfs": { "type": "layers", "diff_ids": [] },
        });
        let config = config.to_string().into_bytes();
        let descriptor = |media_type: &str, bytes: &[u8]| json!({ "mediaType": media_type, "digest": Digest::of(bytes), "size": bytes.len() });
        let manifest = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": blobs.iter().map(|(media_type, bytes)| descriptor(media_type, bytes)).collect::<Vec<_>>(),
            "annotations": {
                "org.opencontainers.image.created": "2026-11-23T00:00:00Z",
                "org.opencontainers.image.title": "of-spin",
                "org.opencontainers.image.version": "0.1.0",
            },
        });
        for (_, bytes) in &blobs {
            self.push_blob(bytes).await;
        }
        self.push_blob(&config).await;
        let path = format!("/v2/{}/manifests/{tag}", self.repository);
        let request = self.request(Method::PUT, &path);
        let request = request.header(CONTENT_TYPE, "application/vnd.oci.image.manifest.v1+json");
        let put = request.body(manifest.to_string()).send().await.unwrap();
        assert_eq!(put.status(), StatusCode::CREATED, "{}", put.text().await.unwrap());
        assert!(put.headers().contains_key(LOCATION), "it prints the manifest's place");
    }
}

#[test]
fn what_spin_pushes_is_imported_signed_deployed_and_served_with_its_files() {
    let fleet = Fleet::start();
    let code = std::fs::read(example("hello").join("hello.wasm")).unwrap();
    // Larger than one part of a push; what has 128 bytes at most stands in the document.
    let large: Vec<u8> = (0..CHUNK_BYTES + 1_000).map(|n| n.to_le_bytes()[1]).collect();
    let locked = json!({
        "spin_lock_version": 0,
        "metadata": { "name": "of-spin", "version": "0.1.0", "description": "" },
        "variables": { "greeting": { "default": "Pushed by Spin" } },
        "triggers": [{
            "id": "trigger--hello", "trigger_type": "http",
            "trigger_config": { "component": "hello", "route": "/..." },
        }],
        "components": [{
            "id": "hello",
            "metadata": { "build": { "command": "cargo build" } },
            "source": { "content_type": "application/wasm", "digest": Digest::of(&code) },
            "files": [
                { "digest": Digest::of(&large), "path": "assets/large.bin" },
                { "inline": STANDARD.encode("small"), "path": "assets/small.txt" },
                { "inline": "", "path": "assets/empty" },
            ],
            "config": { "greeting": "{{ greeting }}" },
        }],
    });
    let layers = [
        ("application/vnd.wasm.content.layer.v1+wasm", code),
        ("application/vnd.wasm.content.layer.v1+data", large.clone()),
    ];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let roots = selvage_certs::roots_from_pem(fleet.path("certs/ca.pem")).unwrap();
    let client = reqwest::Client::builder().use_preconfigured_tls(selvage_certs::client(&roots)).no_proxy();
    let mut spin = Spin {
        client: client.build().unwrap(),
        base: format!("https://{}", fleet.registry()),
        repository: "acme/of-spin",
        token: None,
    };
    runtime.block_on(async {
        spin.authenticate().await;
        spin.push_app(&layers, &locked, "0.1.0").await;
    });
    let refused = fleet.selvage(&["deploy", "acme/of-spin:0.1.0"]);
    assert!(!refused.status.success(), "it is no app of this fleet yet");
    well("import", &fleet.selvage(&["import", "acme/of-spin:0.1.0", "--key", "release.key"]));
    well("deploy", &fleet.selvage(&["deploy", "acme/of-spin:selvage", "--app", "of-spin"]));
    serves(&fleet, ("of-spin.localhost", "/env"), "Pushed by Spin");
    // The guest sees its files as Spin would lay them out.
    let files = std::fs::read_dir(fleet.path("node/files")).unwrap().next().unwrap().unwrap().path().join("hello");
    assert_eq!(std::fs::read(files.join("assets/large.bin")).unwrap(), large);
    assert_eq!(std::fs::read(files.join("assets/small.txt")).unwrap(), b"small");
    assert_eq!(std::fs::read(files.join("assets/empty")).unwrap(), b"");
}
