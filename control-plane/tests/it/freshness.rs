//! What a node needs to know that its plans are new.

use std::path::Path;

use reqwest::{Method, StatusCode};
use selvage_certs::Role;
use selvage_config::control_plane::{ControlPlaneConfig, Operator, OperatorRole, PlanSigning};
use selvage_config::plan::Plan;
use selvage_config::root::Root;
use selvage_config::signature::Envelope;
use selvage_config::snapshot::Snapshot;
use selvage_config::{Digest, PrivateKey};
use serde_json::json;

use crate::world::{World, app, json_of};

/// A control plane that signs, and the root that says so.
pub(crate) async fn signing() -> (World, Root) {
    signing_with(|_, _| {}).await
}

async fn signing_with(change: fn(&mut ControlPlaneConfig, &Path)) -> (World, Root) {
    let mut world = World::start_with(change).await;
    let (offline, key) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
    let root = Root::initial("test".into(), vec![offline.public()], vec![key.public()]);
    let mut envelope = root.envelope().unwrap();
    envelope.sign(&offline).unwrap();
    let path = |name: &str| world.directory.path().join(name);
    std::fs::write(path("plan.key"), key.to_pem()).unwrap();
    std::fs::write(path("root-1.json"), serde_json::to_vec(&envelope).unwrap()).unwrap();
    world.plans = Some(PlanSigning { key: path("plan.key"), roots: vec![path("root-1.json")], lifetime_s: 60 });
    world.restart().await;
    (world, root)
}

#[tokio::test]
async fn a_plan_comes_with_a_snapshot_that_lists_what_it_names() {
    let (world, root) = signing().await;
    let (ops, node) = (world.ops(), world.node("fra-1"));
    let manifest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(ops.release("hello", "v1").await.status(), StatusCode::CREATED);
    let plan: Plan = node.get("/api/v1/plans/fra-1").await.json().await.unwrap();
    let snapshot = Snapshot::signed(plan.snapshot.as_ref().unwrap(), &root).unwrap();
    assert_eq!((snapshot.version, snapshot.namespace.as_str()), (plan.generation, "test"));
    assert!(snapshot.lists(&plan.releases[0]));
    assert_eq!(snapshot.resources.values().collect::<Vec<_>>(), [&manifest]);
    // The same one by itself, for a node whose own grows old.
    let alone: Envelope = node.get("/api/v1/snapshot").await.json().await.unwrap();
    assert_eq!(Some(alone), plan.snapshot);
}

#[tokio::test]
async fn a_node_is_told_the_roots_that_follow_its_own() {
    let (world, root) = signing().await;
    let node = world.node("fra-1");
    let roots: Vec<Envelope> = node.get("/api/v1/roots").await.json().await.unwrap();
    assert_eq!(Root::first(&roots[0]).unwrap(), root);
    let none: Vec<Envelope> = node.get("/api/v1/roots?after=1").await.json().await.unwrap();
    assert!(none.is_empty());
    assert_eq!(world.stranger().get("/api/v1/snapshot").await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn what_is_revoked_is_in_the_next_snapshot_and_stays_over_a_restart() {
    let (mut world, root) = signing().await;
    let bad = Digest::of(b"bad");
    let before: Plan = world.node("fra-1").get("/api/v1/plans/fra-1").await.json().await.unwrap();
    let asked = json!({ "digests": [bad], "identities": ["eve@example.com"] });
    let answer = json_of(world.ops().post("/api/v1/revocations", &asked).await, StatusCode::OK).await;
    assert_eq!(answer["generation"], before.generation + 1);
    // Again: nothing new, no new plan.
    let again = json_of(world.ops().post("/api/v1/revocations", &asked).await, StatusCode::OK).await;
    assert_eq!(again["generation"], answer["generation"]);
    world.restart().await;
    let plan: Plan = world.node("fra-1").get("/api/v1/plans/fra-1").await.json().await.unwrap();
    let snapshot = Snapshot::signed(plan.snapshot.as_ref().unwrap(), &root).unwrap();
    assert!(snapshot.revoked.digests.contains(&bad) && snapshot.revoked.identities.contains("eve@example.com"));
    assert!(world.audit().contains("revoke") && world.audit().contains("eve@example.com"));
}

#[tokio::test]
async fn nodes_are_told_who_the_operators_are_and_hear_of_every_change() {
    fn change(config: &mut ControlPlaneConfig, directory: &Path) {
        let operator = |name: &str, role, apps: Option<&str>| Operator {
            name: name.into(),
            token_digest: None,
            role,
            apps: apps.map(|app| [app.parse().unwrap()].into()),
        };
        config.operators.push(operator("reader", OperatorRole::Read, Some("shop")));
        // Nobody can have a certificate of such a name.
        config.operators.push(operator("CI job", OperatorRole::Admin, None));
        if directory.join("removed").exists() {
            config.operators.retain(|operator| operator.name != "ada");
        }
    }
    let (mut world, root) = signing_with(change).await;
    let told = async |world: &World| {
        let plan: Plan = world.node("fra-1").get("/api/v1/plans/fra-1").await.json().await.unwrap();
        let snapshot = Snapshot::signed(plan.snapshot.as_ref().unwrap(), &root).unwrap();
        (snapshot.operators.unwrap(), plan.generation)
    };
    let (operators, first) = told(&world).await;
    assert_eq!(operators.keys().collect::<Vec<_>>(), ["ada", "ops", "reader"]);
    assert_eq!(operators["reader"].role, OperatorRole::Read);
    assert_eq!(operators["reader"].apps, Some(["shop".parse().unwrap()].into()));
    world.restart().await;
    assert_eq!(told(&world).await, (operators, first), "nothing changed, so there is no new plan");
    std::fs::write(world.directory.path().join("removed"), "").unwrap();
    world.restart().await;
    let (operators, second) = told(&world).await;
    assert_eq!((operators.contains_key("ada"), second), (false, first + 1));
}

#[tokio::test]
async fn a_revoked_operators_certificate_opens_nothing_here_either() {
    let (world, _) = signing().await;
    let role = Role::Operator { name: "ada".parse().unwrap() };
    let ada = world.by_certificate(&role);
    assert_eq!(ada.get("/api/v1/nodes").await.status(), StatusCode::OK);
    let asked = json!({ "identities": [role.uri()] });
    assert_eq!(world.ops().post("/api/v1/revocations", &asked).await.status(), StatusCode::OK);
    for path in ["/api/v1/nodes", "/v2/"] {
        assert_eq!(ada.get(path).await.status(), StatusCode::FORBIDDEN, "{path}");
    }
    assert_eq!(world.ops().get("/api/v1/nodes").await.status(), StatusCode::OK);
}

#[tokio::test]
async fn only_an_operator_revokes_and_only_what_can_be_read() {
    let (world, _) = signing().await;
    let asked = json!({ "identities": ["a"] });
    for asker in [world.stranger(), world.node("fra-1")] {
        let answer = asker.ask(Method::POST, "/api/v1/revocations").json(&asked).send().await.unwrap();
        assert!(answer.status() == StatusCode::UNAUTHORIZED || answer.status() == StatusCode::FORBIDDEN);
    }
    for bad in [json!({}), json!({ "digests": ["x"] }), json!({ "identities": [""] }), json!({ "what": [] })] {
        assert_eq!(world.ops().post("/api/v1/revocations", &bad).await.status(), StatusCode::BAD_REQUEST, "{bad}");
    }
}

#[tokio::test]
async fn without_a_key_nothing_is_signed_and_nothing_is_revoked() {
    let world = World::start().await;
    let plan: Plan = world.node("fra-1").get("/api/v1/plans/fra-1").await.json().await.unwrap();
    assert_eq!(plan.snapshot, None);
    assert_eq!(world.node("fra-1").get("/api/v1/snapshot").await.status(), StatusCode::NOT_FOUND);
    let asked = json!({ "identities": ["a"] });
    assert_eq!(world.ops().post("/api/v1/revocations", &asked).await.status(), StatusCode::NOT_FOUND);
}
