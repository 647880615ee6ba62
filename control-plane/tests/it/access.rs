//! Who may do what.

use reqwest::{Method, StatusCode};
use selvage_certs::{Authority, Role, mutual_client, roots_of};

use crate::world::{TOKEN, World, app, refusal, status};

#[tokio::test]
async fn a_stranger_gets_nothing_but_health() {
    let world = World::start().await;
    let stranger = world.stranger();
    assert_eq!(stranger.get("/healthz").await.text().await.unwrap(), "ok\n");
    for (method, path) in [
        (Method::GET, "/"),
        (Method::GET, "/v2/"),
        (Method::GET, "/v2"),
        (Method::GET, "/v2/a/tags/list"),
        (Method::POST, "/v2/a/blobs/uploads/"),
        (Method::PUT, "/v2/a/manifests/v1"),
        (Method::GET, "/api/v1/apps"),
        (Method::POST, "/api/v1/apps/hello/releases"),
        (Method::PUT, "/api/v1/nodes/a"),
        (Method::GET, "/api/v1/plans/a"),
        (Method::GET, "/nothing"),
        (Method::PATCH, "/api/v1/apps"),
    ] {
        let answer = stranger.ask(method, path).send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::UNAUTHORIZED, "{path}");
        assert!(answer.headers().contains_key("www-authenticate"), "{path}");
    }
    let challenge = stranger.get("/v2/").await;
    let told = challenge.headers()["www-authenticate"].to_str().unwrap();
    assert!(told.starts_with("Bearer realm=\"https://127.0.0.1:") && told.contains("/v2/token\""), "{told}");
    assert_eq!(refusal(challenge, StatusCode::UNAUTHORIZED).await, "UNAUTHORIZED");
}

#[tokio::test]
async fn a_token_is_taken_as_bearer_and_as_password() {
    let world = World::start().await;
    assert_eq!(world.ops().get("/v2/").await.status(), StatusCode::OK);
    assert_eq!(world.ops().get("/api/v1/apps").await.status(), StatusCode::OK);
    let stranger = world.stranger();
    let basic = |user: &str, password: &str| stranger.ask(Method::GET, "/v2/").basic_auth(user, Some(password)).send();
    assert_eq!(basic("ops", TOKEN).await.unwrap().status(), StatusCode::OK);
    for (user, password) in [("ops", "wrong"), ("ops", ""), ("nobody", TOKEN), ("", TOKEN)] {
        assert_eq!(basic(user, password).await.unwrap().status(), StatusCode::UNAUTHORIZED, "{user}");
    }
}

#[tokio::test]
async fn an_operators_certificate_is_as_good_as_a_token() {
    let world = World::start().await;
    let ada = world.by_certificate(&Role::Operator { name: "ada".parse().unwrap() });
    ada.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(ada.release("hello", "v1").await.status(), StatusCode::CREATED);
    let audit = world.audit();
    let lines: Vec<_> = audit.lines().collect();
    assert!(lines.iter().all(|line| line.contains("operator ada by certificate")), "{audit}");
    let last: serde_json::Value = serde_json::from_str(lines.last().unwrap()).unwrap();
    assert_eq!((last["what"].as_str(), last["subject"].as_str()), (Some("release.create"), Some("hello@1")));
    assert!(!audit.contains(TOKEN));
}

#[tokio::test]
async fn the_certificate_of_an_operator_who_is_named_no_more_opens_nothing() {
    let world = World::start().await;
    let eve = world.by_certificate(&Role::Operator { name: "eve".parse().unwrap() });
    for path in ["/api/v1/apps", "/api/v1/nodes", "/v2/apps/hello/manifests/v1"] {
        assert_eq!(eve.get(path).await.status(), StatusCode::UNAUTHORIZED, "{path}");
    }
}

#[tokio::test]
async fn a_control_planes_certificate_opens_nothing() {
    let world = World::start().await;
    let other = world.by_certificate(&Role::ControlPlane);
    assert_eq!(other.get("/api/v1/apps").await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_certificate_of_another_authority_gets_no_connection() {
    let world = World::start().await;
    let foreign = Authority::create("foreign").unwrap();
    let role = Role::Operator { name: "eve".parse().unwrap() };
    let identity = foreign.issue_identity(&role, &[], &[]).unwrap();
    let roots = roots_of(&[world.authority.certificate_der()]).unwrap();
    let tls = (*mutual_client(&identity, &roots).unwrap()).clone();
    let client = reqwest::Client::builder().use_preconfigured_tls(tls).no_proxy().build().unwrap();
    let url = world.stranger().ask(Method::GET, "/healthz").build().unwrap().url().clone();
    assert!(client.get(url).send().await.is_err());
}

#[tokio::test]
async fn a_node_reads_the_registry_and_changes_nothing() {
    let world = World::start().await;
    let (ops, node) = (world.ops(), world.node("fra-1"));
    ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    assert_eq!(node.get("/v2/apps/hello/manifests/v1").await.status(), StatusCode::OK);
    for (method, path) in [
        (Method::POST, "/v2/apps/hello/blobs/uploads/"),
        (Method::PUT, "/v2/apps/hello/manifests/v2"),
        (Method::DELETE, "/v2/apps/hello/manifests/v1"),
        (Method::POST, "/api/v1/apps/hello/releases"),
        (Method::POST, "/api/v1/apps/hello/rollback"),
        (Method::DELETE, "/api/v1/apps/hello"),
        (Method::GET, "/api/v1/apps"),
        (Method::GET, "/api/v1/nodes"),
        (Method::DELETE, "/api/v1/nodes/fra-2"),
        (Method::GET, "/api/v1/plans/fra-2"),
    ] {
        let answer = node.ask(method, path).body("{}").send().await.unwrap();
        assert_eq!(answer.status(), StatusCode::FORBIDDEN, "{path}");
    }
}

#[tokio::test]
async fn a_node_tells_its_own_status_only() {
    let world = World::start().await;
    let node = world.node("fra-1");
    assert_eq!(node.tell(&status("fra-1", 0, None, vec![])).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(node.tell(&status("fra-2", 0, None, vec![])).await.status(), StatusCode::FORBIDDEN);
    let put = |status| node.ask(Method::PUT, "/api/v1/nodes/fra-1").json(&status).send();
    assert_eq!(put(status("fra-2", 0, None, vec![])).await.unwrap().status(), StatusCode::FORBIDDEN);
    let mut elsewhere = status("fra-1", 0, None, vec![]);
    elsewhere.region = "iad".parse().unwrap();
    assert_eq!(put(elsewhere).await.unwrap().status(), StatusCode::FORBIDDEN);
    assert_eq!(put(status("fra-1", u64::MAX, None, vec![])).await.unwrap().status(), StatusCode::BAD_REQUEST);
    let told = world.ops().tell(&status("fra-1", 0, None, vec![])).await;
    assert_eq!(told.status(), StatusCode::FORBIDDEN);
}
