//! What operators may do by role and by app.

use std::path::Path;

use reqwest::{Method, StatusCode};
use selvage_certs::Role;
use selvage_config::Digest;
use selvage_config::control_plane::{ControlPlaneConfig, Operator, OperatorRole};
use selvage_control_plane::audit::verify;
use serde_json::json;

use crate::world::{World, app, json_of};

fn operators(config: &mut ControlPlaneConfig, _: &Path) {
    let operator = |name: &str, role, apps: Option<&[&str]>| Operator {
        name: name.into(),
        token_digest: Some(Digest::of(name.as_bytes())),
        role,
        apps: apps.map(|apps| apps.iter().map(|app| app.parse().unwrap()).collect()),
    };
    config.operators.retain(|operator| operator.name != "ada");
    config.operators.extend([
        operator("reader", OperatorRole::Read, None),
        operator("deployer", OperatorRole::Deploy, Some(&["hello"])),
        Operator { token_digest: None, ..operator("ada", OperatorRole::Read, None) },
    ]);
}

#[tokio::test]
async fn a_reader_looks_and_changes_nothing() {
    let world = World::start_with(operators).await;
    let ops = world.ops();
    ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    ops.release("hello", "v1").await;
    // By token, and by a certificate of a name that the configuration limits.
    let certified = world.by_certificate(&Role::Operator { name: "ada".parse().unwrap() });
    for reader in [world.by_token("reader"), certified] {
        for path in ["/api/v1/apps", "/api/v1/nodes", "/v2/apps/hello/manifests/v1", "/api/v1/apps/hello/rollout"] {
            assert_eq!(reader.get(path).await.status(), StatusCode::OK, "{path}");
        }
        for (method, path) in [
            (Method::POST, "/api/v1/apps/hello/releases"),
            (Method::POST, "/api/v1/apps/hello/rollback"),
            (Method::PUT, "/api/v1/apps/hello/splits/1"),
            (Method::PUT, "/api/v1/apps/hello/secrets/token"),
            (Method::DELETE, "/api/v1/apps/hello"),
            (Method::POST, "/api/v1/nodes/fra-1"),
            (Method::POST, "/api/v1/join-tokens"),
            (Method::GET, "/api/v1/join-tokens"),
            (Method::GET, "/api/v1/audit"),
            (Method::POST, "/v2/apps/hello/blobs/uploads/"),
            (Method::PUT, "/v2/apps/hello/manifests/v2"),
            (Method::DELETE, "/v2/apps/hello/manifests/v1"),
        ] {
            let body = json!({ "percent": 1, "value": "x", "region": "fra" });
            let body = if path.starts_with("/api/v1/nodes") { json!("cordon") } else { body };
            let answer = reader.ask(method, path).json(&body).send().await.unwrap();
            assert_eq!(answer.status(), StatusCode::FORBIDDEN, "{path}");
        }
    }
}

#[tokio::test]
async fn a_deployer_of_one_app_deploys_that_app() {
    let world = World::start_with(operators).await;
    let (ops, deployer) = (world.ops(), world.by_token("deployer"));
    deployer.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(deployer.release("hello", "v1").await.status(), StatusCode::CREATED);
    ops.push_app("apps/other", "v1", &app("other", "1", &[])).await;
    assert_eq!(deployer.release("other", "v1").await.status(), StatusCode::FORBIDDEN);
    assert_eq!(deployer.get("/v2/apps/other/manifests/v1").await.status(), StatusCode::FORBIDDEN);
    assert_eq!(deployer.get("/api/v1/apps/other/releases").await.status(), StatusCode::FORBIDDEN);
    ops.release("other", "v1").await;
    let seen = json_of(deployer.get("/api/v1/apps").await, StatusCode::OK).await;
    assert_eq!(seen.as_array().unwrap().len(), 1);
    let listed = json_of(deployer.get("/v2/_catalog").await, StatusCode::OK).await;
    assert_eq!(listed["repositories"], json!(["apps/hello"]));
    assert_eq!(deployer.delete("/api/v1/apps/hello").await.status(), StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn every_change_is_in_the_log_with_what_was_before_and_the_log_is_a_chain() {
    let mut world = World::start().await;
    let ops = world.ops();
    for version in ["1", "2"] {
        ops.push_app("apps/hello", version, &app("hello", version, &[])).await;
        ops.release("hello", version).await;
    }
    ops.post("/api/v1/apps/hello/rollback", &json!({})).await;
    world.restart().await;
    let ops = world.ops();
    ops.delete("/api/v1/apps/hello").await;
    let lines = ops.get("/api/v1/audit").await.text().await.unwrap();
    let verified = verify(lines.as_bytes()).unwrap();
    assert_eq!(verified.first, Some(0));
    assert_eq!(verified.lines, lines.lines().count() as u64);
    let line = |what: &str| -> serde_json::Value {
        let found = lines.lines().rfind(|line| line.contains(what)).unwrap_or_else(|| panic!("{what}: {lines}"));
        serde_json::from_str(found).unwrap()
    };
    assert_eq!(line("release.rollback")["before"], "hello@2");
    assert_eq!(line("release.rollback")["after"], "hello@1");
    assert_eq!(line("app.remove")["who"], "operator ops by token");
    assert_eq!(line("app.remove")["before"], "hello@1");
    let forged = lines.replacen("operator ops by token", "operator eve by token", 1);
    assert!(verify(forged.as_bytes()).is_err());
    let page = ops.get("/api/v1/audit?from=2&max=3").await.text().await.unwrap();
    assert_eq!(page.lines().count(), 3);
}
