//! A profile API behind tokens that the edge checks.
//!
//! There is no cryptography here: the edge verified the token before this code ran, removed whatever `x-jwt-*`
//! headers the client sent, and set its own.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use serde_json::{Value, json};
use spin_sdk::http::{Request, Response};
use spin_sdk::http_component;

/// The token's `sub`, `iss` and whole payload (base64url of the JSON), as the edge hands them on.
const SUBJECT_HEADER: &str = "x-jwt-sub";
const ISSUER_HEADER: &str = "x-jwt-iss";
const CLAIMS_HEADER: &str = "x-jwt-claims";

#[http_component]
fn serve(request: Request) -> Response {
    match request.path() {
        "/profile" => profile(&request),
        path if path.starts_with("/public/") => Response::new(200, "open to everyone\n"),
        _ => Response::new(404, "not found\n"),
    }
}

/// Who the edge says is calling. Without its headers nobody vouches for the caller, so the answer is 401.
fn profile(request: &Request) -> Response {
    let Some(claims) = header(request, CLAIMS_HEADER) else {
        return Response::new(401, "no claims: the route is not behind a token rule\n");
    };
    let Some(claims) = decode(claims) else {
        eprintln!("gate: {CLAIMS_HEADER} is not base64url of a JSON object");
        return Response::new(500, "claims are not readable\n");
    };
    let profile = json!({
        "subject": header(request, SUBJECT_HEADER),
        "issuer": header(request, ISSUER_HEADER),
        "claims": claims,
    });
    Response::builder()
        .status(200)
        .header("content-type", "application/json")
        .header("cache-control", "no-store")
        .body(profile.to_string())
        .build()
}

fn header<'a>(request: &'a Request, name: &str) -> Option<&'a str> {
    request.header(name).and_then(|value| value.as_str())
}

fn decode(claims: &str) -> Option<Value> {
    let payload = URL_SAFE_NO_PAD.decode(claims).ok()?;
    let claims = serde_json::from_slice::<Value>(&payload).ok()?;
    claims.is_object().then_some(claims)
}
