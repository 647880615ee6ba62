//! What operators do for the control plane itself: the audit log, and what nothing refers to.

use std::sync::Arc;

use axum::Json;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use http::header::CONTENT_TYPE;

use super::{Queries, Route};
use crate::access::{Act, OperatorId};
use crate::audit::now_ms;
use crate::failure::Failure;
use crate::registry::Collected;
use crate::{Parts, disk};

/// Lines of the audit log in one answer.
const LINES_MAX: usize = 1_000;
/// How old something must be to be collected, where nobody says, hours.
const COLLECT_HOURS: u64 = 24;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::new(
            ("GET", "/api/v1/audit"),
            "admin",
            "At most 1,000 lines of the audit log from number `from` on, as they stand there.",
            get(audit),
        ),
        Route::new(
            ("POST", "/api/v1/registry/collect"),
            "admin",
            "Lets go of what nothing in the registry refers to and nobody touched for `hours`.",
            post(collect),
        ),
    ]
}

async fn audit(State(parts): State<Arc<Parts>>, who: OperatorId, queries: Queries) -> Result<Response, Failure> {
    who.over_fleet(Act::Administer)?;
    let from = queries.number("from")?.unwrap_or(0);
    let max = queries.number("max")?.unwrap_or(LINES_MAX).min(LINES_MAX);
    let lines = disk::wait(move || parts.audit.read(from, max)).await.map_err(|error| Failure::internal(&error))?;
    Ok(([(CONTENT_TYPE, "application/x-ndjson")], lines).into_response())
}

async fn collect(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    queries: Queries,
) -> Result<Json<Collected>, Failure> {
    who.over_fleet(Act::Administer)?;
    let hours: u64 = queries.number("hours")?.unwrap_or(COLLECT_HOURS);
    let before_ms = now_ms().saturating_sub(hours.saturating_mul(3_600_000));
    let at = Arc::clone(&parts);
    let gone = disk::wait(move || at.registry.collect(before_ms, || at.fleet.needed())).await?;
    let after = format!("{} manifests, {} blobs, {} bytes", gone.manifests, gone.blobs, gone.bytes);
    parts.audit.note(&who, "registry.collect", format!("older than {hours} h"), after).await;
    Ok(Json(gone))
}
