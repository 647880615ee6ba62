//! What a restart keeps.

use reqwest::{Method, StatusCode};
use selvage_config::oci::BUNDLE;

use crate::world::{World, app, json_of, status};

#[tokio::test]
async fn a_restart_keeps_everything_but_uploads() {
    let mut world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_app("apps/hello", "v1", &app("hello", "1", &["a.example.com"])).await;
    ops.push_app("apps/hello", "v2", &app("hello", "2", &[])).await;
    ops.release("hello", "v1").await;
    ops.release("hello", "v2").await;
    world.node("fra-1").tell(&status("fra-1", 0, Some(7001), vec![])).await;
    let begun = ops.ask(Method::POST, "/v2/apps/hello/blobs/uploads/").send().await.unwrap();
    let upload = begun.headers()["location"].to_str().unwrap().to_owned();
    let asked = ["/api/v1/apps", "/api/v1/releases", "/api/v1/plans/fra-2", "/v2/apps/hello/tags/list"];
    let mut before = Vec::new();
    for path in asked {
        before.push(json_of(ops.get(path).await, StatusCode::OK).await);
    }

    world.restart().await;
    let ops = world.ops();
    for (path, before) in asked.iter().zip(before) {
        assert_eq!(json_of(ops.get(path).await, StatusCode::OK).await, before, "{path}");
    }
    let answer = ops.get("/v2/apps/hello/manifests/v1").await;
    assert_eq!(answer.headers()["docker-content-digest"], digest.to_string());
    let referrers = ops.get(&format!("/v2/apps/hello/referrers/{digest}?artifactType={BUNDLE}")).await;
    assert_eq!(referrers.status(), StatusCode::OK);
    assert_eq!(ops.get(&upload).await.status(), StatusCode::NOT_FOUND);
    let back = ops.post("/api/v1/apps/hello/rollback", &serde_json::json!({})).await;
    assert_eq!(json_of(back, StatusCode::OK).await["generation"], 4);
}
