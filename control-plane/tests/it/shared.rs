//! Several control planes with one state, over a real NATS server.

mod agreed;
mod cluster;
mod fleet;
mod guard;
mod guarded;
mod server;

use std::collections::BTreeSet;
use std::io::Read as _;
use std::time::Duration;

use reqwest::{Method, StatusCode};
use selvage_config::control_plane::ControlPlaneConfig;
use selvage_control_plane::{ControlPlane, StartError};
use serde_json::{Value, json};

use crate::world::{Asker, app, json_of, status};
use fleet::{Fleet, until};
use server::Server;
pub(crate) use server::is_there;

/// Changes of each kind that each control plane is asked for.
const EACH: usize = 12;

/// What both must say alike.
async fn said(ops: &Asker) -> Vec<Value> {
    let mut said = Vec::new();
    for path in ["/api/v1/apps", "/api/v1/releases", "/api/v1/join-tokens", "/api/v1/plans/fra-1", "/v2/_catalog"] {
        said.push(json_of(ops.get(path).await, StatusCode::OK).await);
    }
    said
}

/// The registry's rows as they lie there.
async fn rows(ops: &Asker) -> String {
    let backup = ops.get("/api/v1/backup").await.bytes().await.unwrap();
    let mut archive = tar::Archive::new(backup.as_ref());
    for entry in archive.entries().unwrap() {
        let mut entry = entry.unwrap();
        if entry.path().unwrap().as_os_str() == "registry.jsonl" {
            let mut text = String::new();
            entry.read_to_string(&mut text).unwrap();
            return text;
        }
    }
    panic!("no registry.jsonl");
}

async fn change_much(ops: Asker, who: &'static str) {
    for n in 0..EACH {
        let version = format!("{who}-{n}");
        ops.push_app("apps/hello", &version, &app("hello", &version, &[])).await;
        assert_eq!(ops.release("hello", &version).await.status(), StatusCode::CREATED, "{version}");
        let secret = ops.ask(Method::PUT, &format!("/api/v1/apps/hello/secrets/{who}x{n}"));
        let answer = secret.json(&json!({ "value": version })).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::OK, "{version}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn changes_of_two_at_once_are_all_made_and_none_twice() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    let tasks =
        [("a", &a), ("b", &b), ("c", &a), ("d", &b)].map(|(who, ops)| tokio::spawn(change_much(ops.clone(), who)));
    for task in tasks {
        task.await.unwrap();
    }
    until("both say the same", async || said(&a).await == said(&b).await).await;
    // Each push, release and secret was made once: numbers have no gap and nothing is missing.
    let releases = json_of(a.get("/api/v1/apps/hello/releases").await, StatusCode::OK).await;
    let numbers: BTreeSet<u64> = releases.as_array().unwrap().iter().filter_map(number).collect();
    assert_eq!(numbers.len(), 4 * EACH, "{releases}");
    assert_eq!(numbers.last(), Some(&(4 * EACH as u64)), "{releases}");
    let tags = json_of(b.get("/v2/apps/hello/tags/list").await, StatusCode::OK).await;
    assert_eq!(tags["tags"].as_array().unwrap().len(), 4 * EACH);
    let secrets = json_of(b.get("/api/v1/apps/hello/secrets").await, StatusCode::OK).await;
    assert_eq!(secrets.as_array().unwrap().len(), 4 * EACH);
    assert_eq!(rows(&a).await, rows(&b).await);
    // One that comes later begins with a baseline: what it has is not in the journal any more.
    let c = fleet.start("later").await;
    until("the third says the same", async || said(&c).await == said(&a).await).await;
    assert_eq!(rows(&c).await, rows(&a).await);
    // What both could do is done by one, and refused by the other as if they had come one after the other.
    let token = json!({ "region": "fra" });
    let made = json_of(a.post("/api/v1/join-tokens", &token).await, StatusCode::CREATED).await;
    let path = format!("/api/v1/join-tokens/{}", made["id"].as_str().unwrap());
    let (one, two) = tokio::join!(a.delete(&path), b.delete(&path));
    let both = BTreeSet::from([one.status().as_u16(), two.status().as_u16()]);
    assert_eq!(both, BTreeSet::from([204, 404]));
    fleet.stop().await;
}

fn number(release: &Value) -> Option<u64> {
    release["id"].as_str().or_else(|| release["release"]["id"].as_str())?.rsplit_once('@')?.1.parse().ok()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blob_that_is_pushed_to_one_is_pulled_from_another_and_goes_for_both() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    let bytes: Vec<u8> = (0..1_500_000_u32).map(|n| n.to_le_bytes()[1]).collect();
    let digest = a.push_blob("apps/hello", &bytes).await;
    let path = format!("/v2/apps/hello/blobs/{digest}");
    until("the other knows it", async || b.get(&path).await.status() == StatusCode::OK).await;
    assert_eq!(b.get(&path).await.bytes().await.unwrap(), bytes);
    // A file that was damaged or is gone comes anew; what is damaged is never told.
    let cached = fleet.path("b").join("blobs/sha256").join(digest.hex());
    std::fs::remove_file(&cached).unwrap();
    let part = b.ask(Method::GET, &path).header("range", "bytes=1000-1999").send().await.unwrap();
    assert_eq!(part.bytes().await.unwrap(), bytes[1000..2000]);
    let manifest = a.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    until("the tag is there", async || b.get("/v2/apps/hello/manifests/v1").await.status() == StatusCode::OK).await;
    std::fs::write(fleet.path("b").join("blobs/sha256").join(manifest.hex()), "damaged").unwrap();
    assert_eq!(b.get("/v2/apps/hello/manifests/v1").await.headers()["docker-content-digest"], manifest.to_string());
    assert_eq!(
        selvage_config::Digest::of(&b.get("/v2/apps/hello/manifests/v1").await.bytes().await.unwrap()),
        manifest
    );
    // Deleted through one and pushed again through the other at once, it is there whole, or was deleted after.
    for _ in 0..5 {
        let (gone, there) = tokio::join!(a.delete(&path), b.push_blob("apps/other", &bytes));
        assert!(matches!(gone.status(), StatusCode::ACCEPTED | StatusCode::NOT_FOUND));
        let other = format!("/v2/apps/other/blobs/{there}");
        let cached = fleet.path("a").join("blobs/sha256").join(digest.hex());
        let _ = std::fs::remove_file(cached);
        until("it is pulled", async || {
            let answer = a.get(&other).await;
            answer.status() == StatusCode::OK && answer.bytes().await.is_ok_and(|got| got == bytes)
        })
        .await;
        b.push_blob("apps/hello", &bytes).await;
        assert_eq!(a.delete(&other).await.status(), StatusCode::ACCEPTED);
    }
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn while_the_server_is_away_plans_go_on_and_changes_wait() {
    let Some(mut server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    a.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(a.release("hello", "v1").await.status(), StatusCode::CREATED);
    until("the other knows it", async || said(&a).await == said(&b).await).await;
    let before = said(&a).await;
    // What was pulled once lies on the disk.
    assert_eq!(b.get("/v2/apps/hello/manifests/v1").await.status(), StatusCode::OK);
    let secret = async |ops: &Asker, name: &str| {
        let request = ops.ask(Method::PUT, &format!("/api/v1/apps/hello/secrets/{name}"));
        request.json(&json!({ "value": "v" })).send().await.unwrap()
    };
    for (round, is_killed) in [(0, false), (1, true)] {
        if is_killed {
            server.kill()
        } else {
            server.signal("-STOP")
        }
        for ops in [&a, &b] {
            let answer = secret(ops, &format!("away{round}")).await;
            assert_eq!(answer.status(), StatusCode::SERVICE_UNAVAILABLE);
            assert!(answer.headers().contains_key("retry-after"));
            let begun = ops.ask(Method::POST, "/v2/apps/hello/blobs/uploads/").send().await.unwrap();
            assert_eq!(begun.status(), StatusCode::ACCEPTED, "uploads in progress are one control plane's own");
            // What nodes tell, and what they are told, goes on.
            assert_eq!(said(ops).await[3], before[3]);
            assert_eq!(ops.get("/v2/apps/hello/manifests/v1").await.status(), StatusCode::OK);
        }
        if is_killed {
            server.resume()
        } else {
            server.signal("-CONT")
        }
        let name = format!("back{round}");
        until("changes are taken", async || secret(&b, &name).await.status() == StatusCode::OK).await;
        until("both know it", async || {
            let known = json_of(a.get("/api/v1/apps/hello/secrets").await, StatusCode::OK).await;
            known.as_array().unwrap().contains(&json!(name))
        })
        .await;
    }
    // One that starts while the server is away begins with what it knew.
    fleet.stop_one("a").await;
    server.kill();
    let a = fleet.start("a").await;
    assert_eq!(secret(&a, "alone").await.status(), StatusCode::SERVICE_UNAVAILABLE);
    assert_eq!(said(&a).await[3]["releases"][0]["id"], before[3]["releases"][0]["id"]);
    server.resume();
    until("changes are taken", async || secret(&a, "again").await.status() == StatusCode::OK).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn who_does_not_belong_to_the_fleet_is_refused() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let a = fleet.start("a").await;
    a.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    let refused = async |config: ControlPlaneConfig| {
        let error = ControlPlane::start(config).await.err().expect("it is refused");
        let source = std::error::Error::source(&error).map(ToString::to_string).unwrap_or_default();
        (matches!(error, StartError::Shared(_)), format!("{error}: {source}"))
    };
    // Another sealing key.
    let mut config = fleet.config("b");
    std::fs::write(fleet.path("other.key"), format!("{}\n", "ab".repeat(32))).unwrap();
    config.sealing_key = Some(fleet.path("other.key"));
    let (is_shared, told) = refused(config).await;
    assert!(is_shared && told.contains("sealing_key"), "{told}");
    // Another authority, until it is said to be the fleet's from now on.
    let mut config = fleet.config("c");
    config.authority = Some(fleet.path("other-ca"));
    let (_, told) = refused(config.clone()).await;
    assert!(told.contains("another authority") && told.contains("--new-keys"), "{told}");
    // A state of its own.
    let mut alone = fleet.config("d");
    let nats = alone.nats.take();
    let own = ControlPlane::start(alone.clone()).await.unwrap();
    let asker = a.at(&format!("https://{}", own.address()));
    asker.push_blob("apps/own", b"own").await;
    own.stop().await;
    let (_, told) = refused(ControlPlaneConfig { nats, ..alone }).await;
    assert!(told.contains("empty state_dir"), "{told}");
    // A copy does not go on alone.
    fleet.stop().await;
    let mut config = fleet.config("a");
    config.nats = None;
    assert!(matches!(ControlPlane::start(config).await, Err(StartError::Alone { .. })));
    let mut config = fleet.config("a");
    config.authority = Some(fleet.path("other-ca"));
    config.nats.as_mut().unwrap().new_keys = true;
    ControlPlane::start(config).await.unwrap().stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_rollout_that_one_is_killed_in_ends_at_the_other_and_each_step_is_made_once() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let b = fleet.start("b").await;
    let (mut killed, a) = fleet.start_process("a").await;
    for version in ["1", "2"] {
        a.push_app("apps/hello", version, &app("hello", version, &[])).await;
    }
    assert_eq!(a.release("hello", "1").await.status(), StatusCode::CREATED);
    // One node talks to each; both control planes know both.
    let nodes = [("fra-1", a.clone()), ("fra-2", b.clone())];
    for (name, at) in &nodes {
        fleet.turn(name, at).await;
    }
    until("what nodes told is passed on", async || {
        fleet.turn("fra-1", &a).await;
        let known = json_of(b.get("/api/v1/nodes").await, StatusCode::OK).await;
        known.as_array().unwrap().iter().filter(|node| node["alive"] == true).count() == 2
    })
    .await;
    let rollout = json!({ "waves": { "waves": [{ "nodes": "50%" }, { "nodes": "100%", "bake_ms": 300 }] } });
    let body = json!({ "repository": "apps/hello", "reference": "2", "rollout": rollout });
    assert_eq!(a.post("/api/v1/apps/hello/releases", &body).await.status(), StatusCode::CREATED);
    until("a node was taken", async || {
        let wave = json_of(b.get("/api/v1/apps/hello/rollout").await, StatusCode::OK).await["wave"].clone();
        wave["taken"].as_array().is_some_and(|taken| !taken.is_empty())
    })
    .await;
    killed.kill().unwrap();
    killed.wait().unwrap();
    // The node that talked to it goes on with the other.
    until("the rollout ends", async || {
        for name in ["fra-1", "fra-2"] {
            fleet.turn(name, &b).await;
        }
        let wave = json_of(b.get("/api/v1/apps/hello/rollout?release=2").await, StatusCode::OK).await["wave"].clone();
        assert_ne!(wave["stage"], "halted", "{wave}");
        wave["stage"] == "done"
    })
    .await;
    let mut steps = Vec::new();
    for name in ["a", "b"] {
        let audit = std::fs::read_to_string(fleet.path(name).join("audit.jsonl")).unwrap();
        let lines = audit.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        steps.extend(lines.filter(|line| line["what"] == "release.rollout").map(|line| line["after"].to_string()));
    }
    let once: BTreeSet<&String> = steps.iter().collect();
    assert_eq!(once.len(), steps.len(), "{steps:#?}");
    // The one that was killed comes back to what became of it.
    let a = fleet.start("a").await;
    until("both say the same", async || said(&a).await == said(&b).await).await;
    fleet.stop().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_reaches_the_others_and_a_new_node_is_in_everybodys_plan() {
    let Some(server) = Server::start() else { return };
    let mut fleet = Fleet::begin(&server).await;
    let (a, b) = (fleet.start("a").await, fleet.start("b").await);
    let tell = async |node: &str, at: &Asker, generation: u64, port: u16| {
        let told = status(node, generation, Some(port), vec![]);
        fleet.node(node, at).tell(&told).await.status()
    };
    assert_eq!(tell("fra-1", &a, 0, 7001).await, StatusCode::NO_CONTENT);
    assert_eq!(tell("fra-2", &b, 0, 7002).await, StatusCode::NO_CONTENT);
    until("each plan has the other as a peer", async || {
        let mut peers = 0;
        for (node, ops) in [("fra-1", &b), ("fra-2", &a)] {
            let plan = json_of(ops.get(&format!("/api/v1/plans/{node}")).await, StatusCode::OK).await;
            peers += plan["peers"].as_array().map_or(0, Vec::len);
        }
        peers == 2
    })
    .await;
    // What is no change of a plan is passed on, and asked for if it was not heard.
    assert_eq!(tell("fra-1", &a, 1, 7001).await, StatusCode::NO_CONTENT);
    until("the status is known", async || {
        tokio::time::sleep(Duration::from_millis(20)).await;
        tell("fra-1", &a, 1, 7001).await;
        let nodes = json_of(b.get("/api/v1/nodes").await, StatusCode::OK).await;
        nodes
            .as_array()
            .unwrap()
            .iter()
            .any(|node| node["status"]["node"] == "fra-1" && node["status"]["generation"] == 1)
    })
    .await;
    fleet.stop().await;
}
