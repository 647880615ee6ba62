//! Requests over every HTTP version, and tokens at the edge.

use base64::Engine as _;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use miette::Report;
use ring::hmac;
use serde_json::json;

use super::{Tour, expect};
use crate::demo::apps::{ISSUER, KID};
use crate::demo::visit::{Version, Visit};
use crate::loadtest::token;
use crate::output::{failed, failure};
use crate::token::TokenKey;

/// Both examples answer on every node over every version.
pub(super) async fn hello(tour: &mut Tour<'_>) -> Result<String, Report> {
    let mut answers = 0;
    for node in tour.fleet.nodes() {
        for version in Version::ALL {
            for app in ["hello", "hello-p3"] {
                let visit = Visit { version, ..Visit::get(app, "/") };
                let answer = tour.visitor.visit(node.front(), &visit).await?;
                expect(answer.status == 200 && answer.body.contains("Hello"), || {
                    format!("{app} at {} over {version:?}: {} {:?}", node.name, answer.status, answer.body)
                })?;
                answers += 1;
            }
        }
    }
    Ok(format!("{answers} answers, wasi:http 0.2 and 0.3"))
}

/// Every kind of bad token is answered 401 with a challenge; a good one reaches the guest with its claims.
pub(super) async fn tokens(tour: &mut Tour<'_>) -> Result<String, Report> {
    let pem = std::fs::read_to_string(tour.fleet.token_key());
    let pem = pem.map_err(|error| failure("read the issuer's key", &error, None))?;
    let key = TokenKey::of_pem(&pem).ok_or_else(|| failed("the issuer's key can't be read", None))?;
    let front = tour.fleet.node("fra")?.front();
    let valid = token(&key, KID, ISSUER, "gate", "valid")?;
    let visit = Visit { token: valid.as_deref(), ..Visit::get("gate", "/profile") };
    let answer = tour.visitor.visit(front, &visit).await?;
    expect(answer.status == 200 && answer.body.contains("loadtest"), || {
        format!("a valid token: {} {:?}", answer.status, answer.body)
    })?;
    let mut bad: Vec<(&str, Option<String>)> = Vec::new();
    for kind in ["none", "expired", "audience", "forged"] {
        bad.push((kind, token(&key, KID, ISSUER, "gate", kind)?));
    }
    bad.push(("alg:none", Some(unsecured())));
    bad.push(("HS256 with the public key", Some(confused(&key))));
    bad.push(("another issuer", token(&key, KID, "https://evil.example", "gate", "valid")?));
    for (kind, token) in &bad {
        for version in Version::ALL {
            let visit = Visit { version, token: token.as_deref(), ..Visit::get("gate", "/profile") };
            let answer = tour.visitor.visit(front, &visit).await?;
            expect(
                answer.status == 401 && answer.challenge.as_deref().is_some_and(|c| c.starts_with("Bearer")),
                || format!("{kind} over {version:?}: {} {:?}", answer.status, answer.challenge),
            )?;
        }
    }
    Ok(format!("200 with claims; {} kinds refused with 401 over every version", bad.len()))
}

fn encoded(value: &serde_json::Value) -> String {
    URL_SAFE_NO_PAD.encode(value.to_string())
}

fn claims() -> serde_json::Value {
    json!({ "iss": ISSUER, "aud": "gate", "sub": "mallory", "exp": 4_102_444_800_u64 })
}

/// RFC 7519 6: a token that says it needs no signature.
fn unsecured() -> String {
    format!("{}.{}.", encoded(&json!({ "alg": "none", "kid": KID })), encoded(&claims()))
}

/// RFC 8725 2.1: the public key used as a shared secret.
fn confused(key: &TokenKey) -> String {
    let signed = format!("{}.{}", encoded(&json!({ "alg": "HS256", "kid": KID })), encoded(&claims()));
    let secret = hmac::Key::new(hmac::HMAC_SHA256, key.jwk(KID).to_string().as_bytes());
    format!("{signed}.{}", URL_SAFE_NO_PAD.encode(hmac::sign(&secret, signed.as_bytes())))
}
