//! How nodes come into the fleet, stay, and are put out of it.

use std::path::Path;
use std::sync::Arc;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use reqwest::{Response, StatusCode};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use selvage_certs::{Authority, Enrolment, Identity, Role, chain_pem, mutual_client, peer_role};
use selvage_config::Digest;
use selvage_config::control_plane::ControlPlaneConfig;
use selvage_config::join::{CertificateAnswer, JoinToken};
use serde_json::{Value, json};

use crate::world::{Asker, World, json_of, status};

fn with_authority(config: &mut ControlPlaneConfig, directory: &Path) {
    config.authority = Some(directory.join("ca"));
}

async fn invite(ops: &Asker, body: Value) -> JoinToken {
    let answer = json_of(ops.post("/api/v1/join-tokens", &body).await, StatusCode::CREATED).await;
    answer["token"].as_str().unwrap().parse().unwrap()
}

async fn ask(asker: &Asker, token: &JoinToken, node: &str, enrolment: &Enrolment) -> Response {
    let request = STANDARD.encode(enrolment.request());
    let token = String::from(token.clone());
    asker.post("/api/v1/join", &json!({ "token": token, "node": node, "request": request })).await
}

fn identity(enrolment: Enrolment, answer: &CertificateAnswer) -> Identity {
    let chain = CertificateDer::pem_slice_iter(answer.certificate.as_bytes()).map(Result::unwrap).collect();
    enrolment.finish(chain).unwrap()
}

impl World {
    fn with_identity(&self, identity: &Identity) -> Asker {
        self.asker(Arc::unwrap_or_clone(mutual_client(identity, &self.roots()).unwrap()), None)
    }
}

#[tokio::test]
async fn a_token_lets_one_node_join_once_where_it_says() {
    let world = World::start_with(with_authority).await;
    let (ops, stranger) = (world.ops(), world.stranger());
    let token = invite(&ops, json!({ "region": "fra", "labels": { "tier": "canary" } })).await;
    // The node knows the fleet by the token alone.
    let roots = stranger.get("/api/v1/authorities").await.text().await.unwrap();
    let known =
        CertificateDer::pem_slice_iter(roots.as_bytes()).any(|der| Digest::of(&der.unwrap()) == token.authority);
    assert!(known);
    let enrolment = Enrolment::create().unwrap();
    let answer: CertificateAnswer = ask(&stranger, &token, "fra-9", &enrolment).await.json().await.unwrap();
    assert_eq!((answer.region.as_str(), answer.labels["tier"].as_str()), ("fra", "canary"));
    let identity = identity(enrolment, &answer);
    let role = Role::Node { region: "fra".parse().unwrap(), node: "fra-9".parse().unwrap() };
    assert_eq!(peer_role(&identity.chain()[0]).unwrap(), role);
    let node = world.with_identity(&identity);
    assert_eq!(node.tell(&status("fra-9", 0, None, vec![])).await.status(), StatusCode::NO_CONTENT);
    let nodes = json_of(ops.get("/api/v1/nodes").await, StatusCode::OK).await;
    assert_eq!(nodes[0]["labels"]["tier"], "canary");

    let again = ask(&stranger, &token, "fra-10", &Enrolment::create().unwrap()).await;
    assert_eq!(again.status(), StatusCode::FORBIDDEN);
    assert_eq!(json_of(ops.get("/api/v1/join-tokens").await, StatusCode::OK).await, json!([]));
    let secret = token.secret.as_str();
    assert!(!world.audit().contains(secret) && world.audit().contains("node.join"));
}

#[tokio::test]
async fn a_token_that_is_not_good_lets_nobody_in() {
    let mut world = World::start_with(with_authority).await;
    let (ops, stranger) = (world.ops(), world.stranger());
    let enrolment = Enrolment::create().unwrap();
    let token = invite(&ops, json!({ "region": "fra", "node": "fra-1" })).await;
    let forged = JoinToken { secret: token.secret.chars().rev().collect(), ..token.clone() };
    assert_eq!(ask(&stranger, &forged, "fra-1", &enrolment).await.status(), StatusCode::FORBIDDEN);
    assert_eq!(ask(&stranger, &token, "fra-2", &enrolment).await.status(), StatusCode::FORBIDDEN);
    // A bad request does not use it up.
    let bad = json!({ "token": String::from(token.clone()), "node": "fra-1", "request": "AAAA" });
    assert_eq!(stranger.post("/api/v1/join", &bad).await.status(), StatusCode::BAD_REQUEST);
    let taken = invite(&ops, json!({ "region": "fra" })).await;
    assert_eq!(ops.delete(&format!("/api/v1/join-tokens/{}", taken.id)).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(ask(&stranger, &taken, "fra-3", &enrolment).await.status(), StatusCode::FORBIDDEN);
    let short = invite(&ops, json!({ "region": "fra", "ttl_seconds": 1 })).await;
    tokio::time::sleep(std::time::Duration::from_millis(1_100)).await;
    assert_eq!(ask(&stranger, &short, "fra-4", &enrolment).await.status(), StatusCode::FORBIDDEN);
    for body in [json!({ "region": "fra", "ttl_seconds": 0 }), json!({ "region": "fra", "labels": { "a b": "c" } })] {
        assert_eq!(ops.post("/api/v1/join-tokens", &body).await.status(), StatusCode::UNPROCESSABLE_ENTITY, "{body}");
    }
    // A name that is taken is given again only by a token that was made for it.
    world.node("fra-5").tell(&status("fra-5", 0, None, vec![])).await;
    let any = invite(&ops, json!({ "region": "fra" })).await;
    assert_eq!(ask(&stranger, &any, "fra-5", &enrolment).await.status(), StatusCode::CONFLICT);
    let own = invite(&ops, json!({ "region": "fra", "node": "fra-5" })).await;
    assert_eq!(ask(&stranger, &own, "fra-5", &enrolment).await.status(), StatusCode::OK);
    // Tokens outlive a restart, and their secrets are not on the disk.
    world.restart().await;
    assert_eq!(ask(&world.stranger(), &token, "fra-1", &enrolment).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn without_an_authority_nobody_joins() {
    let world = World::start().await;
    let answer = world.ops().post("/api/v1/join-tokens", &json!({ "region": "fra" })).await;
    assert_eq!(answer.status(), StatusCode::CONFLICT);
}

#[tokio::test]
async fn a_node_renews_its_own_certificate_until_it_is_revoked() {
    let world = World::start_with(with_authority).await;
    let (ops, node) = (world.ops(), world.node("fra-1"));
    node.tell(&status("fra-1", 0, Some(7001), vec![])).await;
    world.node("fra-2").tell(&status("fra-2", 0, Some(7002), vec![])).await;
    let enrolment = Enrolment::create().unwrap();
    let body = json!({ "request": STANDARD.encode(enrolment.request()) });
    for (asker, path) in [(&world.node("fra-2"), "fra-1"), (&ops, "fra-1")] {
        let refused = asker.post(&format!("/api/v1/nodes/{path}/certificate"), &body).await;
        assert_eq!(refused.status(), StatusCode::FORBIDDEN);
    }
    let answer: CertificateAnswer = node.post("/api/v1/nodes/fra-1/certificate", &body).await.json().await.unwrap();
    let renewed = world.with_identity(&identity(enrolment, &answer));
    assert_eq!(renewed.get("/api/v1/plans/fra-1").await.status(), StatusCode::OK);

    let revoked = ops.post("/api/v1/nodes/fra-1", &json!("revoke")).await;
    assert_eq!(revoked.status(), StatusCode::NO_CONTENT);
    for asker in [&node, &renewed] {
        assert_eq!(asker.get("/api/v1/plans/fra-1").await.status(), StatusCode::FORBIDDEN);
        assert_eq!(asker.post("/api/v1/nodes/fra-1/certificate", &body).await.status(), StatusCode::FORBIDDEN);
        assert_eq!(asker.get("/v2/").await.status(), StatusCode::FORBIDDEN);
    }
    // Its peers no longer hear of it.
    let plan = json_of(world.node("fra-2").get("/api/v1/plans/fra-2").await, StatusCode::OK).await;
    assert_eq!(plan["peers"], json!([]));
    assert_eq!(ops.post("/api/v1/nodes/nobody", &json!("revoke")).await.status(), StatusCode::NOT_FOUND);
}

#[tokio::test]
async fn a_node_whose_certificate_has_ended_gets_another_by_its_key_and_nobody_else_does() {
    let world = World::start_with(with_authority).await;
    let (ops, stranger) = (world.ops(), world.stranger());
    let issue = |authority: &Authority, role: &Role| authority.issue_identity(role, &[], &[]).unwrap();
    let node = |name: &str| Role::Node { region: "fra".parse().unwrap(), node: name.parse().unwrap() };
    world.node("fra-1").tell(&status("fra-1", 0, None, vec![])).await;
    let own = issue(&world.authority, &node("fra-1"));
    let ask = async |identity: &Identity, enrolment: &Enrolment| {
        let certificate = chain_pem(identity.chain());
        let body = json!({ "certificate": certificate, "request": STANDARD.encode(enrolment.request()) });
        stranger.post("/api/v1/renewals", &body).await
    };
    let answer = ask(&own, &Enrolment::again(&own).unwrap()).await;
    assert_eq!(answer.status(), StatusCode::OK);
    let renewed = identity(Enrolment::again(&own).unwrap(), &answer.json().await.unwrap());
    assert_eq!(peer_role(&renewed.chain()[0]).unwrap(), node("fra-1"));
    assert!(world.audit().contains("node.renew-late"));

    // Another key, another authority, somebody who is no node, and one that nobody knows.
    assert_eq!(ask(&own, &Enrolment::create().unwrap()).await.status(), StatusCode::BAD_REQUEST);
    let elsewhere = Authority::create("elsewhere").unwrap();
    let operator = Role::Operator { name: "ada".parse().unwrap() };
    for stranger in [
        issue(&elsewhere, &node("fra-1")),
        issue(&world.authority, &operator),
        issue(&world.authority, &Role::ControlPlane),
        issue(&world.authority, &node("nobody")),
    ] {
        let refused = ask(&stranger, &Enrolment::again(&stranger).unwrap()).await;
        assert_eq!(refused.status(), StatusCode::FORBIDDEN, "{stranger:?}");
    }
    assert_eq!(ops.post("/api/v1/nodes/fra-1", &json!("revoke")).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(ask(&own, &Enrolment::again(&own).unwrap()).await.status(), StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_node_is_told_which_authorities_there_are_and_operators_see_who_knows_them() {
    let world = World::start_with(with_authority).await;
    let (ops, node) = (world.ops(), world.node("fra-1"));
    let tells = async |authorities: Option<&str>| {
        let request = node.ask(reqwest::Method::PUT, "/api/v1/nodes/fra-1").json(&status("fra-1", 0, None, vec![]));
        let request = match authorities {
            Some(known) => request.header("selvage-authorities", known),
            None => request,
        };
        let answer = request.send().await.unwrap();
        answer.headers()["selvage-authorities"].to_str().unwrap().to_owned()
    };
    let seen = async || {
        let nodes = json_of(ops.get("/api/v1/nodes").await, StatusCode::OK).await;
        (nodes[0]["believes_authorities"].clone(), nodes[0]["certificate_is_current"].clone())
    };
    let fleets = tells(None).await;
    let text = world.stranger().get("/api/v1/authorities").await.text().await.unwrap();
    let (believed, issuing) = fleets.split_once(' ').unwrap();
    assert_eq!(believed, Digest::of(text.as_bytes()).to_string());
    assert_eq!(issuing, Digest::of(&world.authority.certificate_der()).to_string());
    assert_eq!(seen().await, (Value::Null, Value::Null));
    tells(Some(&fleets)).await;
    assert_eq!(seen().await, (json!(true), json!(true)));
    let other = Digest::of(b"other");
    tells(Some(&format!("{other} {issuing}"))).await;
    assert_eq!(seen().await, (json!(false), json!(true)));
    tells(Some("nonsense")).await;
    assert_eq!(seen().await, (Value::Null, Value::Null));
}
