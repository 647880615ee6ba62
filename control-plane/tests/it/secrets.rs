//! Secrets: set once, delivered to the nodes that run the app, and to nobody else.

use reqwest::{Method, StatusCode};
use selvage_config::app::variables::Variable;
use selvage_config::plan::Plan;
use serde_json::json;

use crate::world::{Asker, World, app, json_of};

async fn set(ops: &Asker, name: &str, value: &str) -> StatusCode {
    let path = format!("/api/v1/apps/hello/secrets/{name}");
    ops.ask(Method::PUT, &path).json(&json!({ "value": value })).send().await.unwrap().status()
}

#[tokio::test]
async fn a_secret_reaches_nodes_at_once_and_is_shown_to_nobody() {
    let mut world = World::start().await;
    let ops = world.ops();
    let mut declares = app("hello", "1", &[]);
    declares.variables.insert("token".into(), Variable { default: None, secret: true });
    ops.push_app("apps/hello", "v1", &declares).await;
    // Without a value the app can't run, and the release is refused.
    assert_eq!(ops.release("hello", "v1").await.status(), StatusCode::UNPROCESSABLE_ENTITY);
    assert_eq!(set(&ops, "token", "s3cret-one").await, StatusCode::OK);
    assert_eq!(set(&ops, "unused", "s3cret-other").await, StatusCode::OK);
    assert_eq!(ops.release("hello", "v1").await.status(), StatusCode::CREATED);
    let plan =
        async |world: &World| -> Plan { world.node("fra-1").get("/api/v1/plans/fra-1").await.json().await.unwrap() };
    let before = plan(&world).await;
    assert_eq!(before.releases[0].variables["token"], "s3cret-one");
    // One that the app does not declare goes nowhere.
    assert_eq!(before.releases[0].variables.len(), 1);

    // Rotated without a release: the same one, with the new value, in a newer plan.
    assert_eq!(set(&ops, "token", "s3cret-two").await, StatusCode::OK);
    let after = plan(&world).await;
    assert_eq!(after.releases[0].variables["token"], "s3cret-two");
    assert_eq!((&after.releases[0].id, after.generation), (&before.releases[0].id, before.generation + 1));

    assert_eq!(json_of(ops.get("/api/v1/apps/hello/secrets").await, StatusCode::OK).await, json!(["token", "unused"]));
    for path in
        ["/api/v1/plans/fra-1", "/api/v1/apps", "/api/v1/releases", "/api/v1/apps/hello/secrets", "/api/v1/audit"]
    {
        let text = ops.get(path).await.text().await.unwrap();
        assert!(!text.contains("s3cret"), "{path}: {text}");
    }
    for bad in ["Token", "a__b"] {
        assert_eq!(set(&ops, bad, "x").await, StatusCode::UNPROCESSABLE_ENTITY, "{bad}");
    }
    world.restart().await;
    assert_eq!(plan(&world).await, after);
    world.stop().await;
    let mut todo = vec![world.directory.path().join("state")];
    while let Some(path) = todo.pop() {
        if path.is_dir() {
            todo.extend(std::fs::read_dir(&path).unwrap().map(|entry| entry.unwrap().path()));
        } else {
            let bytes = std::fs::read(&path).unwrap();
            assert!(!bytes.windows(6).any(|window| window == b"s3cret"), "{}", path.display());
        }
    }
}
