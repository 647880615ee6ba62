//! Nodes and how far a release has come on them.

use reqwest::StatusCode;
use selvage_config::Digest;
use selvage_config::plan::{AppStatus, Refusal, Serving};
use serde_json::json;

use crate::world::{World, app, json_of, status};

#[tokio::test]
async fn nodes_are_listed_with_what_they_told() {
    let world = World::start().await;
    world.node("fra-1").tell(&status("fra-1", 3, Some(7001), vec![])).await;
    let nodes = json_of(world.ops().get("/api/v1/nodes").await, StatusCode::OK).await;
    assert_eq!(nodes[0]["alive"], true);
    assert!(nodes[0]["seen_ms_ago"].as_u64().unwrap() < 15_000);
    assert_eq!(nodes[0]["status"]["generation"], 3);
}

#[tokio::test]
async fn a_rollout_tells_of_every_node_that_is_alive() {
    let world = World::start().await;
    let ops = world.ops();
    let manifest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    ops.release("hello", "v1").await;
    let release = || "hello@1".parse().unwrap();
    let serving = AppStatus {
        app: "hello".parse().unwrap(),
        serving: Some(Serving { release: release(), manifest }),
        refused: None,
        candidate: None,
    };
    let refused = AppStatus {
        app: "hello".parse().unwrap(),
        serving: Some(Serving { release: "hello@9".parse().unwrap(), manifest: Digest::of(b"") }),
        refused: Some(Refusal { release: release(), cause: "unsigned".into(), reason: "no signature".into() }),
        candidate: None,
    };
    for (node, apps) in [("fra-1", vec![serving]), ("fra-2", vec![refused]), ("fra-3", vec![])] {
        world.node(node).tell(&status(node, 1, None, apps)).await;
    }
    let rollout = json_of(ops.get("/api/v1/apps/hello/rollout?release=1").await, StatusCode::OK).await;
    assert_eq!(rollout["release"], "hello@1");
    assert_eq!((&rollout["serving"], &rollout["refused"], &rollout["pending"]), (&json!(1), &json!(1), &json!(1)));
    let node = |number: usize| rollout["nodes"][number].clone();
    assert_eq!(node(0), json!({ "node": "fra-1", "region": "fra", "state": "serving" }));
    assert_eq!(
        node(1),
        json!({ "node": "fra-2", "region": "fra", "state": "refused", "cause": "unsigned", "reason": "no signature" })
    );
    assert_eq!(node(2)["state"], "pending");
    for path in ["/api/v1/apps/hello/rollout?release=2", "/api/v1/apps/other/rollout"] {
        assert_eq!(ops.get(path).await.status(), StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(ops.get("/api/v1/apps/hello/rollout?release=x").await.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_node_is_forgotten_only_when_it_is_silent() {
    let mut world = World::start().await;
    world.node("fra-1").tell(&status("fra-1", 0, Some(7001), vec![])).await;
    assert_eq!(world.ops().delete("/api/v1/nodes/fra-1").await.status(), StatusCode::CONFLICT);
    // After a restart it has not been heard of, and its peers still know it.
    world.restart().await;
    let ops = world.ops();
    let nodes = json_of(ops.get("/api/v1/nodes").await, StatusCode::OK).await;
    assert_eq!((&nodes[0]["alive"], &nodes[0]["seen_ms_ago"]), (&json!(false), &json!(null)));
    let plan = json_of(ops.get("/api/v1/plans/fra-2").await, StatusCode::OK).await;
    assert_eq!(plan["peers"][0]["node"], "fra-1");
    let forgotten = json_of(ops.delete("/api/v1/nodes/fra-1").await, StatusCode::OK).await;
    assert_eq!(forgotten["generation"], 2);
    assert_eq!(ops.delete("/api/v1/nodes/fra-1").await.status(), StatusCode::NOT_FOUND);
}
