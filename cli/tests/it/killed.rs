//! A control plane that is killed at any moment loses nothing that it has said is done.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use reqwest::{Client, Method, StatusCode};
use rustls::RootCertStore;
use selvage_certs::roots_from_pem;
use selvage_config::Digest;
use selvage_config::oci::{Descriptor, EMPTY, MANIFEST, Manifest};
use serde_json::json;

use crate::program::{Serving, finish, selvage, well};

/// Rounds of one run; `SELVAGE_TEST_ROUNDS=200` is the long one.
const ROUNDS: u64 = 4;
/// Who changes something all the time.
const WRITERS: u64 = 4;
/// Tags that are looked for after each round; after the last one it is all of them.
const LATEST: usize = 100;
const TOKEN: &str = "a-token-of-a-test";

/// What was acknowledged: tags with their manifests, secrets, and the highest release of each app.
#[derive(Default)]
struct Acknowledged {
    tags: Mutex<Vec<(String, Digest)>>,
    secrets: Mutex<BTreeMap<String, usize>>,
    releases: Mutex<BTreeMap<String, u64>>,
    /// The highest generation that was ever told.
    generation: AtomicU64,
}

impl Acknowledged {
    fn copied(&self) -> Self {
        // First: it must not be higher than what is copied after it.
        let generation = AtomicU64::new(self.generation.load(Ordering::Relaxed));
        let tags = Mutex::new(self.tags.lock().unwrap().clone());
        let secrets = Mutex::new(self.secrets.lock().unwrap().clone());
        let releases = Mutex::new(self.releases.lock().unwrap().clone());
        Self { tags, secrets, releases, generation }
    }
}

#[derive(Clone)]
struct Asker {
    client: Client,
    url: String,
}

impl Asker {
    async fn send(&self, method: Method, path: &str, body: Vec<u8>, kind: &str) -> Option<(StatusCode, Vec<u8>)> {
        let request = self.client.request(method, format!("{}{path}", self.url)).bearer_auth(TOKEN);
        let answer = request.header("content-type", kind).body(body).send().await.ok()?;
        let status = answer.status();
        // An answer that broke off was not given.
        Some((status, answer.bytes().await.ok()?.to_vec()))
    }
}

/// One change after the other until the control plane is gone.
async fn write(asker: Asker, writer: u64, round: u64, done: Arc<Acknowledged>) {
    let repository = format!("apps/app-{writer}");
    for step in 0_u64.. {
        let content = format!("content {writer} {round} {step}");
        for bytes in [b"{}".to_vec(), content.clone().into_bytes()] {
            let path = format!("/v2/{repository}/blobs/uploads/?digest={}", Digest::of(&bytes));
            let Some((StatusCode::CREATED, _)) = asker.send(Method::POST, &path, bytes, "*/*").await else { return };
        }
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST.to_owned()),
            artifact_type: None,
            config: Descriptor::of(EMPTY, b"{}"),
            layers: vec![Descriptor::of("application/wasm", content.as_bytes())],
            subject: None,
            annotations: BTreeMap::new(),
        };
        let bytes = serde_json::to_vec(&manifest).unwrap();
        let (digest, tag) = (Digest::of(&bytes), format!("t{round}-{step}"));
        let path = format!("/v2/{repository}/manifests/{tag}");
        let Some((StatusCode::CREATED, _)) = asker.send(Method::PUT, &path, bytes, MANIFEST).await else { return };
        done.tags.lock().unwrap().push((path, digest));
        let body = json!({ "repository": repository, "reference": tag }).to_string().into_bytes();
        let path = format!("/api/v1/apps/app-{writer}/releases");
        let Some((StatusCode::CREATED, told)) = asker.send(Method::POST, &path, body, "application/json").await else {
            return;
        };
        let told: serde_json::Value = serde_json::from_slice(&told).unwrap();
        let number = told["release"]["id"].as_str().unwrap().split_once('@').unwrap().1.parse().unwrap();
        done.releases.lock().unwrap().insert(format!("app-{writer}"), number);
        done.generation.fetch_max(told["generation"].as_u64().unwrap(), Ordering::Relaxed);
        let path = format!("/api/v1/apps/app-{writer}/secrets/s{}", step % 50);
        let body = json!({ "value": "x" }).to_string().into_bytes();
        let Some((StatusCode::OK, _)) = asker.send(Method::PUT, &path, body, "application/json").await else { return };
        let names = usize::try_from(step % 50 + 1).unwrap();
        let mut secrets = done.secrets.lock().unwrap();
        let most = secrets.entry(format!("app-{writer}")).or_default();
        *most = (*most).max(names);
    }
}

/// Looks for what was acknowledged: the latest `tags`, and all of the rest. So many releases may have come `since`.
async fn check(asker: &Asker, done: &Acknowledged, tags: usize, since: u64) {
    let get = async |path: &str| asker.send(Method::GET, path, Vec::new(), "*/*").await.unwrap();
    let all = done.tags.lock().unwrap().clone();
    for (path, digest) in all.iter().rev().take(tags) {
        let (status, bytes) = get(path).await;
        assert_eq!((status, Digest::of(&bytes)), (StatusCode::OK, *digest), "{path}");
        let manifest: Manifest = serde_json::from_slice(&bytes).unwrap();
        let repository = path.split("/manifests/").next().unwrap();
        let blob = format!("{repository}/blobs/{}", manifest.layers[0].digest);
        let (status, bytes) = get(&blob).await;
        assert_eq!((status, Digest::of(&bytes)), (StatusCode::OK, manifest.layers[0].digest), "{blob}");
    }
    let releases = done.releases.lock().unwrap().clone();
    let plan: serde_json::Value = serde_json::from_slice(&get("/api/v1/plans/any").await.1).unwrap();
    assert!(plan["generation"].as_u64().unwrap() >= done.generation.load(Ordering::Relaxed));
    for (app, number) in releases {
        let planned = plan["releases"].as_array().unwrap().iter().filter_map(|release| release["id"].as_str());
        let planned: Vec<u64> = planned.filter_map(|id| id.strip_prefix(&format!("{app}@"))?.parse().ok()).collect();
        // One more may have been made that nobody was told of.
        assert!(
            planned.len() == 1 && (number..=number.saturating_add(since)).contains(&planned[0]),
            "{app}@{number}: {planned:?}"
        );
        // It is there now, told or not: it must not be lost either, and the next kill may leave one more.
        done.releases.lock().unwrap().insert(app, planned[0]);
    }
    let secrets = done.secrets.lock().unwrap().clone();
    for (app, most) in secrets {
        let names: Vec<String> = serde_json::from_slice(&get(&format!("/api/v1/apps/{app}/secrets")).await.1).unwrap();
        assert!(names.len() >= most, "{app}: {} of {most} secrets", names.len());
    }
}

/// Certificates and a configuration in `directory`, and who trusts them.
fn set_up(directory: &Path) -> RootCertStore {
    let setup = ["certs", "control-plane", "--address", "127.0.0.1"];
    well("set up", &finish(selvage().args(setup).current_dir(directory)));
    configure(directory, "control-plane.toml", "state");
    roots_from_pem(directory.join("certs/ca.pem")).unwrap()
}

fn configure(directory: &Path, file: &str, state_dir: &str) {
    let config = format!(
        "listen = \"127.0.0.1:0\"\nstate_dir = \"{state_dir}\"\n[identity]\ncertificate = \"certs/control-plane.pem\"\n\
         key = \"certs/control-plane.key\"\nroots = \"certs/ca.pem\"\n[[operators]]\nname = \"ci\"\ntoken_digest = \"{}\"\n",
        Digest::of(TOKEN.as_bytes())
    );
    std::fs::write(directory.join(file), config).unwrap();
}

fn start(directory: &Path, config: &str, roots: &RootCertStore) -> (Serving, Asker) {
    let serving = Serving::start(selvage().args(["control-plane", "--config", config]).current_dir(directory));
    let url = format!("https://{}", serving.told["address"].as_str().unwrap());
    let client = Client::builder().use_preconfigured_tls(selvage_certs::client(roots)).no_proxy().build().unwrap();
    (serving, Asker { client, url })
}

fn write_all(asker: &Asker, round: u64, done: &Arc<Acknowledged>) -> Vec<tokio::task::JoinHandle<()>> {
    (0..WRITERS).map(|writer| tokio::spawn(write(asker.clone(), writer, round, Arc::clone(done)))).collect()
}

#[test]
fn a_backup_made_under_load_is_put_back_elsewhere_after_a_kill() {
    let directory = tempfile::tempdir().unwrap();
    let directory = directory.path();
    let roots = set_up(directory);
    let (serving, asker) = start(directory, "control-plane.toml", &roots);
    std::fs::write(directory.join("token"), TOKEN).unwrap();
    let context = format!("control_plane = \"{}\"\nroots = \"certs/ca.pem\"\ntoken_file = \"token\"\n", asker.url);
    std::fs::write(directory.join("context.toml"), context).unwrap();
    let run = |arguments: &[&str]| finish(selvage().args(arguments).current_dir(directory));
    let back_up = ["backup", "backup.tar", "--context", "context.toml"];
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let done = Arc::new(Acknowledged::default());
    let before = runtime.block_on(async {
        let writing = write_all(&asker, 0, &done);
        while done.tags.lock().unwrap().len() < 40 {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
        let before = Arc::new(done.copied());
        well("backup", &run(&back_up));
        // SIGKILL.
        drop(serving);
        for writer in writing {
            writer.await.unwrap();
        }
        before
    });
    assert!(
        done.generation.load(Ordering::Relaxed) > before.generation.load(Ordering::Relaxed),
        "nothing else went on"
    );
    assert_eq!(run(&back_up).status.code(), Some(2), "a backup was overwritten");
    well("check", &run(&["restore", "backup.tar", "--check"]));
    configure(directory, "elsewhere.toml", "elsewhere");
    let restore = ["restore", "backup.tar", "--config", "elsewhere.toml", "--sealing-key", "state/sealing.key"];
    well("restore", &run(&restore));
    assert_eq!(run(&restore).status.code(), Some(1), "a state was overwritten");
    let (_serving, asker) = start(directory, "elsewhere.toml", &roots);
    runtime.block_on(check(&asker, &before, usize::MAX, u64::MAX));
    // It counts past all that any node can have taken.
    let plan = runtime.block_on(asker.send(Method::GET, "/api/v1/plans/any", Vec::new(), "*/*")).unwrap().1;
    let plan: serde_json::Value = serde_json::from_slice(&plan).unwrap();
    assert!(plan["generation"].as_u64().unwrap() > done.generation.load(Ordering::Relaxed) + 1);
}

#[test]
fn a_control_plane_killed_at_any_moment_loses_nothing_that_it_acknowledged() {
    let rounds = std::env::var("SELVAGE_TEST_ROUNDS").ok().and_then(|text| text.parse().ok()).unwrap_or(ROUNDS);
    let directory = tempfile::tempdir().unwrap();
    let roots = set_up(directory.path());
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let done = Arc::new(Acknowledged::default());
    // Not random, and never the same twice: the moments are spread over what a writer does.
    for round in 0..rounds {
        let (serving, asker) = start(directory.path(), "control-plane.toml", &roots);
        runtime.block_on(async {
            check(&asker, &done, LATEST, 1).await;
            let writing = write_all(&asker, round, &done);
            tokio::time::sleep(Duration::from_millis(40 + round * 97 % 400)).await;
            // SIGKILL.
            drop(serving);
            for writer in writing {
                writer.await.unwrap();
            }
        });
    }
    let (_serving, asker) = start(directory.path(), "control-plane.toml", &roots);
    runtime.block_on(check(&asker, &done, usize::MAX, 1));
    assert!(done.tags.lock().unwrap().len() as u64 > rounds, "hardly anything was written");
    let log = directory.path().join("state/audit.jsonl");
    let verify = ["audit", "verify", "--file", log.to_str().unwrap()];
    well("audit", &finish(selvage().args(verify)));
}
