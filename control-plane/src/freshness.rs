//! What makes a node sure that its plans are new: the signed snapshot, the roots, and what is revoked.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::routing::{get, post};
use http::StatusCode;
use selvage_config::root::ROOTS_PATH;
use selvage_config::signature::Envelope;
use selvage_config::snapshot::{IDENTITY_BYTES_MAX, Revoked, SNAPSHOT_PATH};

use crate::access::{Act, Caller, OperatorId};
use crate::answers::Revocation;
use crate::api::{Queries, Route, json};
use crate::failure::Failure;
use crate::{Parts, disk};

/// Body of a revocation, bytes.
const REVOCATION_BYTES_MAX: usize = 64 * 1024;

/// What is answered of it.
pub(crate) fn routes() -> Vec<Route> {
    let revocations = "/api/v1/revocations";
    vec![
        Route::new(
            ("GET", SNAPSHOT_PATH),
            "look, or a node's certificate",
            "The newest signed snapshot.",
            get(snapshot),
        ),
        Route::new(
            ("GET", ROOTS_PATH),
            "look, or a node's certificate",
            "The roots after version `after`.",
            get(roots),
        ),
        Route::new(("GET", revocations), "look", "What must never run again.", get(revoked)),
        Route::new(("POST", revocations), "admin", "Makes sure that something never runs again.", post(revoke))
            .takes("Revoked"),
    ]
}

fn unsigned() -> Failure {
    Failure::new(StatusCode::NOT_FOUND, "plans are not signed here").hint("add [plans] to the control plane's file")
}

/// The newest snapshot: what a node asks for when its own is no longer young.
async fn snapshot(State(parts): State<Arc<Parts>>, _: Caller) -> Result<Json<Envelope>, Failure> {
    parts.fleet.snapshot().map(Json).ok_or_else(unsigned)
}

/// The roots that follow the one that a node has.
async fn roots(State(parts): State<Arc<Parts>>, _: Caller, queries: Queries) -> Result<Json<Vec<Envelope>>, Failure> {
    let after = queries.number("after")?.unwrap_or(0);
    let signer = parts.fleet.signer().ok_or_else(unsigned)?;
    Ok(Json(signer.roots_after(after).into_iter().cloned().collect()))
}

/// What is revoked.
async fn revoked(State(parts): State<Arc<Parts>>, _: OperatorId) -> Json<Revoked> {
    Json((*parts.fleet.records().revoked).clone())
}

/// Revokes something, for good.
async fn revoke(State(parts): State<Arc<Parts>>, who: OperatorId, body: Body) -> Result<Json<Revocation>, Failure> {
    who.over_fleet(Act::Administer)?;
    let what: Revoked = json(body, REVOCATION_BYTES_MAX).await?;
    if what.is_empty() || what.identities.iter().any(|i| i.is_empty() || i.len() > IDENTITY_BYTES_MAX) {
        return Err(Failure::bad("name a digest, a key or an identity"));
    }
    if parts.fleet.signer().is_none() {
        // Without a signature no node would hear of it.
        return Err(unsigned());
    }
    let (at, asked) = (Arc::clone(&parts), what.clone());
    let (is_new, generation) = disk::wait(move || at.fleet.revoke(&asked)).await?;
    if is_new {
        let digests = what.digests.iter().map(ToString::to_string);
        let keys = what.keys.iter().map(|key| format!("key {key}"));
        let all = digests.chain(keys).chain(what.identities.iter().map(|identity| format!("identity {identity}")));
        parts.audit.note(&who, "revoke", all.collect::<Vec<_>>().join(" "), generation).await;
    }
    Ok(Json(Revocation { revoked: what, generation }))
}
