//! Rollouts in waves, splits, and nodes that keep out of both.

use std::time::{Duration, Instant};

use reqwest::{Method, StatusCode};
use selvage_config::plan::{AppStatus, Plan, Refusal, ReleaseLoad, Serving};
use selvage_config::release::ReleaseId;
use serde_json::{Value, json};

use crate::world::{Asker, World, app, json_of, status};

/// How long a condition may take to come true on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A node that does as its plan says, or does not.
struct Simulated {
    name: &'static str,
    asker: Asker,
    /// The release that it will not run.
    refuses: Option<u32>,
    /// What it says that its releases answered, by number: requests and errors.
    answers: fn(u32) -> (u64, u64),
}

fn simulated(world: &World, name: &'static str) -> Simulated {
    Simulated { name, asker: world.node(name), refuses: None, answers: |_| (0, 0) }
}

impl Simulated {
    async fn plan(&self) -> Plan {
        self.asker.get(&format!("/api/v1/plans/{}", self.name)).await.json().await.unwrap()
    }

    /// Takes the plan in and tells so.
    async fn turn(&self) {
        let plan = self.plan().await;
        let mut told = status(self.name, plan.generation, None, vec![]);
        for release in &plan.releases {
            let id = &release.id;
            let refusal =
                Refusal { release: id.clone(), cause: "untrusted".into(), reason: "signed by a stranger".into() };
            let refused = (self.refuses == Some(id.number)).then_some(refusal);
            let serving = refused.is_none().then(|| Serving { release: id.clone(), manifest: release.manifest });
            told.apps.push(AppStatus { app: id.app.clone(), serving, refused, candidate: None });
            if plan.watched.contains(&id.app) {
                let (requests, errors) = (self.answers)(id.number);
                told.load.push(ReleaseLoad { requests, errors, ..ReleaseLoad::none(id.clone()) });
            }
        }
        assert_eq!(self.asker.tell(&told).await.status(), StatusCode::NO_CONTENT);
    }

    async fn number(&self) -> Option<u32> {
        self.plan().await.releases.first().map(|release| release.id.number)
    }
}

async fn push(ops: &Asker, version: &str) {
    ops.push_app("apps/hello", version, &app("hello", version, &[])).await;
}

async fn deploy(ops: &Asker, version: &str, rollout: Value) -> Value {
    let body = json!({ "repository": "apps/hello", "reference": version, "rollout": rollout });
    json_of(ops.post("/api/v1/apps/hello/releases", &body).await, StatusCode::CREATED).await
}

async fn wave(ops: &Asker) -> Value {
    json_of(ops.get("/api/v1/apps/hello/rollout").await, StatusCode::OK).await["wave"].clone()
}

/// Lets the nodes take turns until the rollout ends, and answers how.
async fn settle(ops: &Asker, nodes: &[Simulated], number: u32) -> Value {
    let begun = Instant::now();
    loop {
        for node in nodes {
            node.turn().await;
        }
        let rollout = ops.get(&format!("/api/v1/apps/hello/rollout?release={number}")).await;
        let wave = json_of(rollout, StatusCode::OK).await["wave"].clone();
        if wave["stage"] != "running" {
            return wave;
        }
        assert!(begun.elapsed() < PATIENCE, "{wave}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn fleet(world: &World, names: &[&'static str]) -> Vec<Simulated> {
    let nodes: Vec<Simulated> = names.iter().map(|name| simulated(world, name)).collect();
    for node in &nodes {
        node.turn().await;
    }
    nodes
}

#[tokio::test]
async fn waves_reach_everybody_one_after_the_other() {
    let world = World::start().await;
    let ops = world.ops();
    let nodes = fleet(&world, &["fra-1", "fra-2", "fra-3", "fra-4"]).await;
    push(&ops, "1").await;
    push(&ops, "2").await;
    deploy(&ops, "1", json!("at_once")).await;
    let waves = json!({ "waves": { "waves": [{ "nodes": "25%" }, { "nodes": "50%" }] } });
    deploy(&ops, "2", waves).await;
    let begun = Instant::now();
    while wave(&ops).await["taken"].as_array().unwrap().is_empty() {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let mut given = 0;
    for node in &nodes {
        given += usize::from(node.number().await == Some(2));
    }
    assert_eq!(given, 1, "the first wave is one of four, and nobody else before it has answered");
    let ended = settle(&ops, &nodes, 2).await;
    assert_eq!((&ended["stage"], &ended["count"]), (&json!("done"), &json!(3)));
    for node in &nodes {
        assert_eq!(node.number().await, Some(2));
    }
    let apps = json_of(ops.get("/api/v1/apps").await, StatusCode::OK).await;
    assert_eq!(apps[0]["release"]["id"], "hello@2");
    assert!(world.audit().contains("release.rollout"));
}

#[tokio::test]
async fn a_release_that_a_node_refuses_is_taken_back_in_its_first_wave() {
    let world = World::start().await;
    let ops = world.ops();
    let mut nodes = fleet(&world, &["fra-1", "fra-2", "iad-1"]).await;
    push(&ops, "1").await;
    push(&ops, "2").await;
    deploy(&ops, "1", json!("at_once")).await;
    for node in &mut nodes {
        node.refuses = Some(2);
    }
    deploy(&ops, "2", json!({ "waves": { "waves": [{ "nodes": "1%" }] } })).await;
    let ended = settle(&ops, &nodes, 2).await;
    assert_eq!((&ended["stage"], &ended["number"]), (&json!("halted"), &json!(1)));
    let reason = ended["reason"].as_str().unwrap();
    assert!(reason.contains("untrusted") && reason.contains("signed by a stranger"), "{reason}");
    assert_eq!(ended["taken"].as_array().unwrap().len(), 1);
    for node in &nodes {
        assert_eq!(node.number().await, Some(1));
    }
}

#[tokio::test]
async fn a_release_that_fails_more_requests_than_the_old_one_is_taken_back() {
    let world = World::start().await;
    let ops = world.ops();
    let mut nodes = fleet(&world, &["fra-1", "fra-2"]).await;
    push(&ops, "1").await;
    push(&ops, "2").await;
    deploy(&ops, "1", json!("at_once")).await;
    for node in &mut nodes {
        node.answers = |number| if number == 2 { (100, 60) } else { (5_000, 1) };
    }
    // It would bake for an hour: what halts it is what the nodes tell.
    deploy(&ops, "2", json!({ "waves": { "waves": [{ "nodes": "50%", "bake_ms": 3_600_000 }] } })).await;
    let ended = settle(&ops, &nodes, 2).await;
    assert_eq!(ended["stage"], "halted");
    assert!(ended["reason"].as_str().unwrap().contains("60 of 100 requests fail"), "{ended}");
    assert_eq!(nodes[0].number().await, Some(1));
    assert_eq!(nodes[1].number().await, Some(1));
}

#[tokio::test]
async fn a_rollout_goes_on_after_a_restart_of_the_control_plane() {
    let mut world = World::start().await;
    let ops = world.ops();
    let nodes = fleet(&world, &["fra-1", "fra-2"]).await;
    push(&ops, "1").await;
    push(&ops, "2").await;
    deploy(&ops, "1", json!("at_once")).await;
    for node in &nodes {
        node.turn().await;
    }
    deploy(&ops, "2", json!({ "waves": { "waves": [{ "nodes": "50%" }] } })).await;
    let begun = Instant::now();
    while wave(&ops).await["taken"].as_array().unwrap().is_empty() {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    world.restart().await;
    let ops = world.ops();
    let nodes = fleet(&world, &["fra-1", "fra-2"]).await;
    assert_eq!(settle(&ops, &nodes, 2).await["stage"], "done");
}

#[tokio::test]
async fn one_call_takes_the_last_move_back() {
    let world = World::start().await;
    let ops = world.ops();
    let nodes = fleet(&world, &["fra-1"]).await;
    for version in ["1", "2", "3"] {
        push(&ops, version).await;
    }
    deploy(&ops, "1", json!("at_once")).await;
    deploy(&ops, "2", json!({ "waves": { "waves": [{ "nodes": "100%", "bake_ms": 3_600_000 }] } })).await;
    let begun = Instant::now();
    while nodes[0].number().await != Some(2) {
        assert!(begun.elapsed() < PATIENCE);
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let back = async || json_of(ops.post("/api/v1/apps/hello/rollback", &json!({})).await, StatusCode::OK).await;
    assert_eq!(back().await["release"]["id"], "hello@1");
    assert_eq!(nodes[0].number().await, Some(1));
    let halted = json_of(ops.get("/api/v1/apps/hello/rollout?release=2").await, StatusCode::OK).await;
    assert_eq!(halted["wave"]["reason"], "ops rolled it back");
    deploy(&ops, "3", json!({ "split": { "percent": 10 } })).await;
    assert_eq!(nodes[0].plan().await.candidates[0].release.id, "hello@3".parse::<ReleaseId>().unwrap());
    assert_eq!(back().await["release"]["id"], "hello@1");
    assert_eq!(nodes[0].plan().await.candidates, []);
}

#[tokio::test]
async fn a_split_is_in_every_plan_until_it_is_ended() {
    let world = World::start().await;
    let ops = world.ops();
    let nodes = fleet(&world, &["fra-1"]).await;
    push(&ops, "1").await;
    push(&ops, "2").await;
    let first = json!({ "repository": "apps/hello", "reference": "1", "rollout": { "split": { "percent": 5 } } });
    assert_eq!(ops.post("/api/v1/apps/hello/releases", &first).await.status(), StatusCode::CONFLICT);
    deploy(&ops, "1", json!("at_once")).await;
    deploy(&ops, "2", json!({ "split": { "percent": 0, "key": "cookie:sid" } })).await;
    let number = json_of(ops.get("/api/v1/apps").await, StatusCode::OK).await[0]["releases"].clone();
    let latest = number.as_array().unwrap().last().unwrap().as_u64().unwrap();
    let plan = nodes[0].plan().await;
    assert_eq!(plan.releases[0].id.number, 1);
    assert_eq!((plan.candidates[0].percent, plan.candidates[0].key.to_string().as_str()), (0, "cookie:sid"));
    let path = format!("/api/v1/apps/hello/splits/{latest}");
    let put = |percent: u32| ops.ask(Method::PUT, &path).json(&json!({ "percent": percent })).send();
    assert_eq!(put(50).await.unwrap().status(), StatusCode::OK);
    assert_eq!(nodes[0].plan().await.candidates[0].percent, 50);
    let named = json!({ "percent": 50, "named": true });
    assert_eq!(ops.ask(Method::PUT, &path).json(&named).send().await.unwrap().status(), StatusCode::OK);
    assert!(nodes[0].plan().await.candidates[0].named);
    assert_eq!(put(101).await.unwrap().status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(ops.delete(&path).await.status(), StatusCode::OK);
    assert_eq!(nodes[0].plan().await.candidates, []);
    assert_eq!(ops.delete(&path).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_cordoned_node_keeps_what_it_has_and_a_drained_one_is_told_so() {
    let world = World::start().await;
    let ops = world.ops();
    let nodes = fleet(&world, &["fra-1", "fra-2"]).await;
    push(&ops, "1").await;
    push(&ops, "2").await;
    deploy(&ops, "1", json!("at_once")).await;
    let say = |node: &str, word: &str| {
        let (ops, path, word) = (ops.clone(), format!("/api/v1/nodes/{node}"), json!(word));
        async move { assert_eq!(ops.post(&path, &word).await.status(), StatusCode::NO_CONTENT) }
    };
    say("fra-1", "cordon").await;
    deploy(&ops, "2", json!({ "waves": { "waves": [{ "nodes": "100%" }] } })).await;
    assert_eq!(settle(&ops, &nodes, 2).await["stage"], "done");
    assert_eq!((nodes[0].number().await, nodes[1].number().await), (Some(1), Some(2)));
    say("fra-1", "uncordon").await;
    assert_eq!(nodes[0].number().await, Some(2));
    say("fra-2", "drain").await;
    assert_eq!((nodes[0].plan().await.drain, nodes[1].plan().await.drain), (false, true));
    let listed = json_of(ops.get("/api/v1/nodes").await, StatusCode::OK).await;
    assert_eq!(listed[1]["draining"], true);
    say("fra-2", "undrain").await;
    assert!(!nodes[1].plan().await.drain);
}
