//! Releases, rollbacks and removals.

use reqwest::StatusCode;
use selvage_config::Digest;
use selvage_config::oci::{Descriptor, EMPTY, WASM};
use serde_json::{Value, json};

use crate::world::{Asker, World, app, json_of, manifest};

async fn made(asker: &Asker, app: &str, reference: &str) -> (Value, u64) {
    let answer = json_of(asker.release(app, reference).await, StatusCode::CREATED).await;
    (answer["release"].clone(), answer["generation"].as_u64().unwrap())
}

async fn error_of(answer: reqwest::Response, status: StatusCode) -> String {
    let problem = json_of(answer, status).await;
    assert!(problem.get("hint").is_some(), "{problem}");
    problem["error"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_tag_is_resolved_once() {
    let world = World::start().await;
    let ops = world.ops();
    let first = ops.push_app("apps/hello", "latest", &app("hello", "1", &[])).await;
    let (release, generation) = made(&ops, "hello", "latest").await;
    assert_eq!(release["id"], "hello@1");
    assert_eq!(release["manifest"], first.to_string());
    assert_eq!((release["created_by"].as_str(), generation), (Some("ops"), 1));

    let second = ops.push_app("apps/hello", "latest", &app("hello", "2", &[])).await;
    let apps = json_of(ops.get("/api/v1/apps").await, StatusCode::OK).await;
    assert_eq!(apps[0]["release"]["manifest"], first.to_string());
    let (release, generation) = made(&ops, "hello", "latest").await;
    assert_eq!((release["manifest"].as_str().unwrap(), generation), (second.to_string().as_str(), 2));
}

#[tokio::test]
async fn the_same_release_again_changes_nothing() {
    let world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    made(&ops, "hello", "v1").await;
    let again = json_of(ops.release("hello", &digest.to_string()).await, StatusCode::OK).await;
    assert_eq!((again["release"]["id"].as_str(), again["generation"].as_u64()), (Some("hello@1"), Some(1)));
    assert_eq!(world.audit().matches("release.create").count(), 1);
}

#[tokio::test]
async fn a_rollback_makes_an_earlier_release_current_with_a_new_generation() {
    let world = World::start().await;
    let ops = world.ops();
    for version in ["1", "2", "3"] {
        ops.push_app("apps/hello", version, &app("hello", version, &[])).await;
        made(&ops, "hello", version).await;
    }
    let back = |body: Value| async move {
        let answer = ops.post("/api/v1/apps/hello/rollback", &body).await;
        let answer = json_of(answer, StatusCode::OK).await;
        (answer["release"]["id"].as_str().unwrap().to_owned(), answer["generation"].as_u64().unwrap(), ops)
    };
    let (id, generation, ops) = back(json!({})).await;
    assert_eq!((id.as_str(), generation), ("hello@2", 4));
    let to = |to: u32| json!({ "to": to });
    let answer = json_of(ops.post("/api/v1/apps/hello/rollback", &to(1)).await, StatusCode::OK).await;
    assert_eq!((answer["release"]["id"].as_str(), answer["generation"].as_u64()), (Some("hello@1"), Some(5)));
    let same = json_of(ops.post("/api/v1/apps/hello/rollback", &to(1)).await, StatusCode::OK).await;
    assert_eq!(same["generation"], 5);
    error_of(ops.post("/api/v1/apps/hello/rollback", &json!({})).await, StatusCode::CONFLICT).await;
    error_of(ops.post("/api/v1/apps/hello/rollback", &to(9)).await, StatusCode::NOT_FOUND).await;
    error_of(ops.post("/api/v1/apps/other/rollback", &json!({})).await, StatusCode::NOT_FOUND).await;
    let all = json_of(ops.get("/api/v1/releases").await, StatusCode::OK).await;
    assert_eq!(all.as_array().unwrap().len(), 3);
}

#[tokio::test]
async fn a_removed_app_is_in_no_plan() {
    let world = World::start().await;
    let ops = world.ops();
    ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    made(&ops, "hello", "v1").await;
    let removed = json_of(ops.delete("/api/v1/apps/hello").await, StatusCode::OK).await;
    assert_eq!(removed["generation"], 2);
    assert_eq!(json_of(ops.get("/api/v1/apps").await, StatusCode::OK).await, json!([]));
    let plan = json_of(ops.get("/api/v1/plans/any").await, StatusCode::OK).await;
    assert_eq!(plan["releases"], json!([]));
    error_of(ops.delete("/api/v1/apps/hello").await, StatusCode::NOT_FOUND).await;
    assert_eq!(made(&ops, "hello", "v1").await.0["id"], "hello@2");
}

#[tokio::test]
async fn two_apps_that_claim_one_host_are_a_conflict() {
    let world = World::start().await;
    let ops = world.ops();
    ops.push_app("apps/one", "v1", &app("one", "1", &["www.example.com"])).await;
    ops.push_app("apps/two", "v1", &app("two", "1", &["api.example.com", "www.example.com"])).await;
    made(&ops, "one", "v1").await;
    let error = error_of(ops.release("two", "v1").await, StatusCode::CONFLICT).await;
    for named in ["one", "two", "www.example.com"] {
        assert!(error.contains(named), "{error}");
    }
    ops.delete("/api/v1/apps/one").await;
    made(&ops, "two", "v1").await;
}

#[tokio::test]
async fn what_no_node_could_run_is_refused() {
    let world = World::start().await;
    let ops = world.ops();
    let hello = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;

    let error = error_of(ops.release("hello", "v2").await, StatusCode::NOT_FOUND).await;
    assert!(error.contains("v2"), "{error}");
    error_of(ops.release("hello", &Digest::of(b"").to_string()).await, StatusCode::NOT_FOUND).await;
    error_of(ops.release("hello", "no tag").await, StatusCode::BAD_REQUEST).await;

    let misnamed = json!({ "repository": "apps/hello", "reference": hello });
    let error = ops.post("/api/v1/apps/other/releases", &misnamed).await;
    let error = error_of(error, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(error.contains("hello") && error.contains("other"), "{error}");

    let undeclared = json!({ "repository": "apps/hello", "reference": "v1", "variables": { "x": "y" } });
    let answer = ops.post("/api/v1/apps/hello/releases", &undeclared).await;
    error_of(answer, StatusCode::UNPROCESSABLE_ENTITY).await;

    let unknown = json!({ "repository": "apps/hello", "reference": "v1", "created_by": "eve" });
    error_of(ops.post("/api/v1/apps/hello/releases", &unknown).await, StatusCode::BAD_REQUEST).await;
    let large = json!({ "repository": "apps/hello", "reference": "v".repeat(1024 * 1024) });
    error_of(ops.post("/api/v1/apps/hello/releases", &large).await, StatusCode::PAYLOAD_TOO_LARGE).await;

    let garbage = b"{\"name\":7}";
    ops.push_blob("apps/hello", garbage).await;
    let broken = manifest(Descriptor::of(selvage_config::oci::APP_CONFIG, garbage), Vec::new());
    ops.put_manifest("apps/hello", "broken", &broken).await;
    error_of(ops.release("hello", "broken").await, StatusCode::UNPROCESSABLE_ENTITY).await;

    let document = app("hello", "1", &[]).to_json();
    let bare = manifest(Descriptor::of(selvage_config::oci::APP_CONFIG, &document), Vec::new());
    ops.put_manifest("apps/hello", "bare", &bare).await;
    let error = error_of(ops.release("hello", "bare").await, StatusCode::UNPROCESSABLE_ENTITY).await;
    assert!(error.contains("layers"), "{error}");
    assert_eq!(json_of(ops.get("/api/v1/apps").await, StatusCode::OK).await, json!([]));
}

#[tokio::test]
async fn a_bare_component_can_be_released() {
    let world = World::start().await;
    let ops = world.ops();
    ops.push_blob("apps/bare", b"{}").await;
    ops.push_blob("apps/bare", b"code").await;
    let bare = manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, b"code")]);
    ops.put_manifest("apps/bare", "v1", &bare).await;
    assert_eq!(made(&ops, "bare", "v1").await.0["id"], "bare@1");
}

#[tokio::test]
async fn a_manifest_that_runs_can_not_be_deleted() {
    let world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    made(&ops, "hello", "v1").await;
    let path = format!("/v2/apps/hello/manifests/{digest}");
    assert_eq!(ops.delete(&path).await.status(), StatusCode::CONFLICT);
    ops.delete("/api/v1/apps/hello").await;
    assert_eq!(ops.delete(&path).await.status(), StatusCode::ACCEPTED);
}
