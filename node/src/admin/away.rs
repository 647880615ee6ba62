//! KV for operators where a backend keeps the store, or nodes of a placement that this node is not of: the same paths, without
//! what only a node's own rows have.

use bytes::Bytes;
use http::header::IF_NONE_MATCH;
use http::{HeaderValue, Method, Request, StatusCode};
use hyper::body::Incoming;
use selvage_backend::{BackendError, Store, StoreError, Trouble};
use selvage_config::NodeName;
use selvage_sync::store::{LARGE_BYTES_MAX, Terms};

use super::kv::{Asked, Listing, TOKEN, body, decode, ends, failed as mesh_failed, token_of};
use super::{Answer, json, plain, refuse};

/// Values as they are.
const BYTES: HeaderValue = HeaderValue::from_static("application/octet-stream");

/// Answers about a store, or a key of it, still encoded. In a backend a session's token needs nothing: what was written is
/// there.
pub(super) async fn answer(store: &Store, key: Option<&str>, request: Request<Incoming>) -> Answer {
    let Some(key) = key else {
        let query = request.uri().query().unwrap_or_default();
        return match *request.method() {
            Method::GET if query.contains("watch=") => {
                let (error, hint) = unwatched(store);
                refuse(StatusCode::NOT_IMPLEMENTED, &error, &hint)
            }
            Method::GET => list(store, query).await,
            _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "use GET to list a store"),
        };
    };
    let Some(key) = decode(key, false) else {
        return refuse(StatusCode::BAD_REQUEST, "key is not percent-encoded UTF-8", "encode the key's bytes");
    };
    match *request.method() {
        Method::GET => match read(store, &key, &request).await {
            Err(refusal) => *refusal,
            Ok(read) => read_answer(read),
        },
        Method::PUT => put(store, &key, request).await,
        Method::DELETE => done(store.delete(&key).await),
        _ => refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "use GET, PUT or DELETE"),
    }
}

fn read_answer(read: Result<Option<Bytes>, StoreError>) -> Answer {
    match read {
        Ok(Some(value)) => plain(StatusCode::OK, BYTES, value),
        Ok(None) => refuse(StatusCode::NOT_FOUND, "no such key", "list the store's keys with GET /kv/<app>/<label>"),
        Err(error) => failed(&error),
    }
}

/// The value of a key: as its home has it, at a node that has what the session saw, or as ever.
async fn read(
    store: &Store,
    key: &str,
    request: &Request<Incoming>,
) -> Result<Result<Option<Bytes>, StoreError>, Box<Answer>> {
    if request.uri().query() == Some("latest") {
        return Ok(store.latest(key).await.map(|kept| kept.map(|kept| kept.value)));
    }
    let token = token_of(request)?;
    Ok(match store.held_elsewhere().zip(token) {
        Some((elsewhere, token)) => elsewhere.get_seen(key, token).await.map_err(StoreError::from),
        None => store.get(key).await,
    })
}

/// Why a store is not watched from here, and what to do.
fn unwatched(store: &Store) -> (String, String) {
    let Some((placement, holders)) = store.held_elsewhere().and_then(|elsewhere| elsewhere.held_by()) else {
        let backend = store.backend().unwrap_or_default();
        return (format!("{} is in backend {backend}", store.name()), "only stores in the mesh can be watched".into());
    };
    let holders: Vec<_> = holders.iter().map(NodeName::as_str).collect();
    let error = format!("{} is in placement {placement}, which this node does not hold", store.name());
    (error, format!("watch it at one of its nodes: {}", holders.join(" ")))
}

async fn put(store: &Store, key: &str, request: Request<Incoming>) -> Answer {
    let expires_ms = match ends(request.uri().query()) {
        Ok(expires_ms) => expires_ms,
        Err(refusal) => return *refusal,
    };
    // RFC 9110 13.1.2: only if there is none yet.
    let if_absent = request.headers().get(IF_NONE_MATCH).is_some_and(|value| value == "*");
    let value = match body(request, LARGE_BYTES_MAX).await {
        Ok(value) => value,
        Err(refusal) => return *refusal,
    };
    let terms = Terms { expires_ms, metadata: Bytes::new() };
    if !if_absent {
        return written(store, store.set_on(key, value, terms).await);
    }
    match store.set_if(key, value, terms, None).await {
        Ok(Some(version)) => written(store, Ok(version)),
        Ok(None) => refuse(StatusCode::PRECONDITION_FAILED, "the key exists", "read it, or set it without a condition"),
        Err(error) => failed(&error),
    }
}

async fn list(store: &Store, query: &str) -> Answer {
    let Some(asked) = Asked::parse(query) else {
        let hint = "the query may have prefix, after and limit (at most 1000)";
        return refuse(StatusCode::BAD_REQUEST, "query", hint);
    };
    match store.list_entries(&asked.prefix, asked.after.as_deref(), asked.limit).await {
        Ok(found) => json(StatusCode::OK, &Listing::of(found, asked.limit)),
        Err(error) => failed(&error),
    }
}

/// The answer to a write. In the mesh its name is what a session has seen.
fn written(store: &Store, result: Result<String, StoreError>) -> Answer {
    let token = result.as_deref().ok().filter(|_| store.held_elsewhere().is_some());
    let token = token.and_then(|version| HeaderValue::from_str(version).ok());
    let mut answer = done(result.map(drop));
    if let Some(token) = token {
        answer.headers_mut().insert(TOKEN, token);
    }
    answer
}

fn done(result: Result<(), StoreError>) -> Answer {
    match result {
        Ok(()) => plain(StatusCode::NO_CONTENT, BYTES, Bytes::new()),
        Err(error) => failed(&error),
    }
}

fn failed(error: &StoreError) -> Answer {
    let BackendError { trouble, .. } = match error {
        StoreError::Kv(error) => return mesh_failed(error),
        StoreError::Version => return refuse(StatusCode::BAD_REQUEST, "unknown version", "read the key again"),
        StoreError::Moving(error) => return refuse(StatusCode::SERVICE_UNAVAILABLE, &error.to_string(), "try again"),
        StoreError::Backend(error) => error,
    };
    let (status, hint) = match trouble {
        Trouble::Away => (StatusCode::SERVICE_UNAVAILABLE, "see kv_backends in /status"),
        Trouble::Silent { .. } | Trouble::Lost => (StatusCode::GATEWAY_TIMEOUT, "read the key to see"),
        Trouble::Overloaded { .. } | Trouble::Contended => (StatusCode::SERVICE_UNAVAILABLE, "try again"),
        Trouble::Full => (StatusCode::INSUFFICIENT_STORAGE, "make room in the backend"),
        Trouble::Refused { .. } => (StatusCode::BAD_GATEWAY, "see the backend's log"),
        Trouble::Foreign => (StatusCode::BAD_GATEWAY, "set or delete the key"),
        Trouble::Unable { .. } => (StatusCode::NOT_IMPLEMENTED, "see docs/BACKENDS.md"),
    };
    refuse(status, &error.to_string(), hint)
}
