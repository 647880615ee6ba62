//! What a thief gets who has a node's certificate and key: that node's own, until somebody notices.

use std::path::Path;

use reqwest::{Method, StatusCode};
use selvage_config::control_plane::ControlPlaneConfig;
use serde_json::{Value, json};

use crate::world::{World, app, json_of, refusal, status};

fn with_authority(config: &mut ControlPlaneConfig, directory: &Path) {
    config.authority = Some(directory.join("ca"));
}

/// What a node may ask that is not about itself, and what anybody may.
const OPEN: [(&str, &str); 5] = [
    ("get", "/api/v1/snapshot"),
    ("get", "/api/v1/roots"),
    ("get", "/api/v1/authorities"),
    ("post", "/api/v1/join"),
    ("post", "/api/v1/renewals"),
];

#[tokio::test]
async fn with_a_stolen_certificate_of_a_node_nothing_of_another_is_had_and_nothing_changes() {
    let world = World::start_with(with_authority).await;
    let (ops, thief, other) = (world.ops(), world.node("fra-1"), world.node("fra-2"));
    ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(ops.release("hello", "v1").await.status(), StatusCode::CREATED);
    for (node, asker) in [("fra-1", &thief), ("fra-2", &other)] {
        assert_eq!(asker.tell(&status(node, 0, None, vec![])).await.status(), StatusCode::NO_CONTENT);
    }
    let document = json_of(ops.get("/api/v1/openapi.json").await, StatusCode::OK).await;
    let before = world.audit();
    let mut tried = 0;
    for (path, operations) in document["paths"].as_object().unwrap() {
        let steps = path.split('/').map(|step| match step {
            "{app}" => "hello",
            "{node}" => "fra-2",
            step if step.starts_with('{') => "1",
            step => step,
        });
        let asked = steps.collect::<Vec<_>>().join("/");
        for method in operations.as_object().unwrap().keys() {
            let verb: Method = method.to_uppercase().parse().unwrap();
            let answer = thief.ask(verb, &asked).json(&json!({})).send().await.unwrap().status();
            if OPEN.contains(&(method.as_str(), path.as_str())) {
                assert!(method == "get" || answer.is_client_error(), "{method} {asked}: {answer}");
            } else {
                assert_eq!(answer, StatusCode::FORBIDDEN, "{method} {asked}");
            }
            tried += 1;
        }
    }
    assert!(tried > 25, "{tried}");
    // It may say nothing in another's name, and put nothing into the registry.
    let lie = other.tell(&status("fra-1", 0, None, vec![])).await;
    assert_eq!(lie.status(), StatusCode::FORBIDDEN);
    let upload = thief.ask(Method::POST, "/v2/apps/hello/blobs/uploads/").send().await.unwrap();
    assert_eq!(refusal(upload, StatusCode::FORBIDDEN).await, "DENIED");
    let moved = thief.ask(Method::PUT, "/v2/apps/hello/manifests/v1").body("{}").send().await.unwrap();
    assert_eq!(refusal(moved, StatusCode::FORBIDDEN).await, "DENIED");
    let gone = thief.ask(Method::DELETE, "/v2/apps/hello/manifests/v1").send().await.unwrap();
    assert_eq!(refusal(gone, StatusCode::FORBIDDEN).await, "DENIED");
    assert_eq!(world.audit(), before, "nothing was changed");

    // Once it is noticed, not even its own is had any more.
    assert_eq!(ops.post("/api/v1/nodes/fra-1", &json!("revoke")).await.status(), StatusCode::NO_CONTENT);
    for path in ["/api/v1/plans/fra-1", "/api/v1/snapshot", "/v2/apps/hello/manifests/v1"] {
        assert_eq!(thief.get(path).await.status(), StatusCode::FORBIDDEN, "{path}");
    }
    let nodes: Vec<Value> =
        serde_json::from_value(json_of(ops.get("/api/v1/nodes").await, StatusCode::OK).await).unwrap();
    assert_eq!(nodes.iter().filter(|node| node["revoked"] == true).count(), 1);
}
