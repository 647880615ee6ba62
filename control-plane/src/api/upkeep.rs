//! What operators do for the control plane itself: the audit log, and what nothing refers to.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::State;
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use futures_util::stream;
use http::StatusCode;
use http::header::CONTENT_TYPE;
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::{Queries, Route};
use crate::access::{Act, OperatorId};
use crate::audit::now_ms;
use crate::backup::{self, Pipe};
use crate::failure::Failure;
use crate::registry::Collected;
use crate::{Parts, disk};

/// Lines of the audit log in one answer.
const LINES_MAX: usize = 1_000;
/// Pieces of a backup that wait for a client to take them.
const PIECES: usize = 4;
/// How old something must be to be collected, where nobody says, hours.
const COLLECT_HOURS: u64 = 24;

pub(super) fn routes() -> Vec<Route> {
    vec![
        Route::new(
            ("GET", "/api/v1/backup"),
            "admin",
            "All that the control plane remembers, but no key, as a tar file with sums; one at a time.",
            get(backup),
        ),
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

async fn backup(State(parts): State<Arc<Parts>>, who: OperatorId) -> Result<Response, Failure> {
    who.over_fleet(Act::Administer)?;
    let Ok(place) = Arc::clone(&parts.backups).try_acquire_owned() else {
        return Err(Failure::new(StatusCode::CONFLICT, "a backup is being made").hint("wait for its end"));
    };
    let generation = parts.fleet.records().generation;
    parts.audit.note(&who, "state.backup", "state", format!("generation {generation}")).await;
    let (to, pieces) = mpsc::channel(PIECES);
    let mut pipe = Pipe::new(to, Handle::current());
    tokio::task::spawn_blocking(move || {
        let _place = place;
        match backup::write(&parts, &mut pipe) {
            Ok(contents) => tracing::info!(contents.generation, contents.blobs, contents.blobs_bytes, "backup"),
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(%error, source, "the backup could not be made");
                pipe.fail();
            }
        }
    });
    let pieces = stream::unfold(pieces, async |mut pieces| Some((pieces.recv().await?, pieces)));
    Ok(([(CONTENT_TYPE, "application/x-tar")], Body::from_stream(pieces)).into_response())
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
