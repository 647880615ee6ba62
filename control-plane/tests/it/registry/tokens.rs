//! Registry tokens, as docker, oras and crane get them.

use reqwest::{Method, StatusCode};
use serde_json::Value;

use crate::world::{TOKEN, World, refusal};

async fn token(world: &World, scope: &str) -> String {
    let path = format!("/v2/token?service=selvage&scope={scope}");
    let answer = world.stranger().ask(Method::GET, &path).basic_auth("ops", Some(TOKEN)).send().await.unwrap();
    assert_eq!(answer.status(), StatusCode::OK);
    let answer: Value = answer.json().await.unwrap();
    assert_eq!(answer["token"], answer["access_token"]);
    assert!(answer["expires_in"].as_u64().unwrap() >= 60);
    answer["token"].as_str().unwrap().to_owned()
}

#[tokio::test]
async fn a_client_follows_the_challenge_and_may_do_what_its_token_says_and_no_more() {
    let world = World::start().await;
    let refused = world.stranger().ask(Method::POST, "/v2/acme/app/blobs/uploads/").send().await.unwrap();
    let challenge = refused.headers()["www-authenticate"].to_str().unwrap().to_owned();
    assert_eq!(
        challenge,
        format!(
            "Bearer realm=\"{}/v2/token\",service=\"selvage\",scope=\"repository:acme/app:pull,push\"",
            world.url()
        )
    );
    let client = world.by_token(&token(&world, "repository:acme/app:pull,push").await);
    client.push_blob("acme/app", b"content").await;
    let elsewhere = client.get("/v2/acme/other/tags/list").await;
    let again = elsewhere.headers()["www-authenticate"].to_str().unwrap().to_owned();
    assert!(again.contains("scope=\"repository:acme/other:pull\""), "{again}");
    assert_eq!(refusal(elsewhere, StatusCode::UNAUTHORIZED).await, "UNAUTHORIZED");
    let path = format!("/v2/acme/app/blobs/{}", selvage_config::Digest::of(b"content"));
    assert_eq!(client.delete(&path).await.status(), StatusCode::UNAUTHORIZED);
    // It opens nothing but the registry.
    assert_eq!(client.get("/api/v1/apps").await.status(), StatusCode::UNAUTHORIZED);
}

#[tokio::test]
async fn a_token_is_had_by_operators_alone_and_outlives_a_restart() {
    let mut world = World::start().await;
    let stranger = world.stranger();
    let none = stranger.get("/v2/token?scope=repository:a:pull").await;
    assert_eq!(
        (none.status(), &none.headers()["www-authenticate"]),
        (StatusCode::UNAUTHORIZED, &"Basic realm=\"selvage\"".parse().unwrap())
    );
    assert_eq!(world.node("fra-1").get("/v2/token").await.status(), StatusCode::FORBIDDEN);
    let kept = token(&world, "repository:acme/app:pull,push").await;
    world.restart().await;
    world.by_token(&kept).push_blob("acme/app", b"content").await;
}
