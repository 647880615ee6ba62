//! What nodes tell, whole and as what changed: nothing is lost, and nothing is taken twice.

use reqwest::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::plan::{AppStatus, Refusal, Serving, Status, StatusDelta};
use serde_json::Value;

use crate::world::{Asker, World, json_of, status};

fn app(name: &str, release: u32) -> AppStatus {
    let serving = Serving { release: format!("{name}@{release}").parse().unwrap(), manifest: Digest::of(b"m") };
    AppStatus { app: name.parse().unwrap(), serving: Some(serving), refused: None, candidate: None }
}

fn told(generation: u64, apps: &[(&str, u32)]) -> Status {
    status("fra-1", generation, None, apps.iter().map(|(name, release)| app(name, *release)).collect())
}

async fn patch(node: &Asker, delta: &StatusDelta) -> StatusCode {
    node.ask(Method::PATCH, "/api/v1/nodes/fra-1").json(delta).send().await.unwrap().status()
}

fn between(before: &Status, after: &Status) -> StatusDelta {
    StatusDelta::between((before, before.digest()), after)
}

/// What operators see of the one node that there is.
async fn seen(world: &World) -> Value {
    let nodes = json_of(world.ops().get("/api/v1/nodes").await, StatusCode::OK).await;
    nodes[0].clone()
}

fn releases(seen: &Value) -> Vec<&str> {
    let apps = seen["apps"].as_array().or_else(|| seen["status"]["apps"].as_array()).unwrap();
    apps.iter().map(|app| app["serving"]["release"].as_str().unwrap()).collect()
}

#[tokio::test]
async fn what_changed_is_taken_once_on_top_of_what_was_told_also_after_a_restart() {
    let mut world = World::start().await;
    let first = told(1, &[("a", 1), ("b", 1)]);
    let second = told(2, &[("a", 2)]);
    let third = told(3, &[("a", 2), ("c", 1)]);
    let node = world.node("fra-1");
    // Nothing is known yet, so nothing can have changed.
    assert_eq!(patch(&node, &between(&first, &second)).await, StatusCode::PRECONDITION_FAILED);
    assert_eq!(node.tell(&first).await.status(), StatusCode::NO_CONTENT);
    for _ in 0..2 {
        assert_eq!(patch(&node, &between(&first, &first)).await, StatusCode::NO_CONTENT);
    }
    assert_eq!(patch(&node, &between(&first, &second)).await, StatusCode::NO_CONTENT);
    assert_eq!(releases(&seen(&world).await), ["a@2"]);
    // The same again, as after an answer that got lost; and one before which another is missing.
    assert_eq!(patch(&node, &between(&first, &second)).await, StatusCode::PRECONDITION_FAILED);
    let gap = between(&third, &told(4, &[]));
    assert_eq!(patch(&node, &gap).await, StatusCode::PRECONDITION_FAILED);
    // One that does not make what it says is not taken in part either.
    let torn = StatusDelta { apps: Vec::new(), ..between(&second, &third) };
    assert_eq!(patch(&node, &torn).await, StatusCode::PRECONDITION_FAILED);
    assert_eq!(releases(&seen(&world).await), ["a@2"]);
    // What was taken lies on the disk: a restart asks for nothing anew.
    world.restart().await;
    let node = world.node("fra-1");
    assert_eq!(patch(&node, &between(&second, &third)).await, StatusCode::NO_CONTENT);
    let seen = seen(&world).await;
    assert_eq!(releases(&seen), ["a@2", "c@1"]);
    assert!(seen["alive"].as_bool().unwrap(), "{seen}");
}

#[tokio::test]
async fn a_status_does_not_grow_by_what_changed_beyond_what_may_be_told_whole() {
    let world = World::start().await;
    let node = world.node("fra-1");
    let reason = "x".repeat(1024 * 1024);
    let refused = |name: &str| {
        let refusal =
            Refusal { release: format!("{name}@1").parse().unwrap(), cause: "digest".into(), reason: reason.clone() };
        AppStatus { refused: Some(refusal), ..app(name, 1) }
    };
    let mut known = told(1, &[]);
    assert_eq!(node.tell(&known).await.status(), StatusCode::NO_CONTENT);
    for (name, answer) in [
        ("a", StatusCode::NO_CONTENT),
        ("b", StatusCode::NO_CONTENT),
        ("c", StatusCode::NO_CONTENT),
        ("d", StatusCode::PRECONDITION_FAILED),
    ] {
        let mut next = known.clone();
        next.apps.push(refused(name));
        assert_eq!(patch(&node, &between(&known, &next)).await, answer, "{name}");
        if answer == StatusCode::NO_CONTENT {
            known = next;
        } else {
            assert_eq!(node.tell(&next).await.status(), StatusCode::PAYLOAD_TOO_LARGE);
        }
    }
    assert_eq!(releases(&seen(&world).await), ["a@1", "b@1", "c@1"]);
}

#[tokio::test]
async fn what_changed_is_told_by_the_node_itself_and_of_itself() {
    let world = World::start().await;
    let (first, second) = (told(1, &[("a", 1)]), told(2, &[("a", 2)]));
    assert_eq!(world.node("fra-1").tell(&first).await.status(), StatusCode::NO_CONTENT);
    let delta = between(&first, &second);
    for other in [world.node("fra-2"), world.ops(), world.stranger()] {
        let answer = patch(&other, &delta).await;
        assert!(matches!(answer, StatusCode::FORBIDDEN | StatusCode::UNAUTHORIZED), "{answer}");
    }
    // Neither another name nor another region comes in by the back door.
    for other in [
        Status { node: "fra-9".parse().unwrap(), ..second.clone() },
        Status { region: "iad".parse().unwrap(), ..second.clone() },
    ] {
        assert_eq!(patch(&world.node("fra-1"), &between(&first, &other)).await, StatusCode::FORBIDDEN);
    }
    assert_eq!(releases(&seen(&world).await), ["a@1"]);
}
