//! The API under `/api/v1`: releases, nodes and plans as JSON.

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{Extension, FromRequestParts, Path, Query, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{any, delete, get, post, put};
use axum::{Json, Router, middleware};
use http::StatusCode;
use http::header::RETRY_AFTER;
use http::request::Parts as RequestParts;
use selvage_config::app::variables::Values;
use selvage_config::app::{APP_BYTES_MAX, App};
use selvage_config::oci::{APP_CONFIG, Manifest};
use selvage_config::plan::{NODES_PATH, PLAN_PATH, POLL_MS_MAX, Status};
use selvage_config::release::Release;
use selvage_config::root::ROOTS_PATH;
use selvage_config::snapshot::SNAPSHOT_PATH;
use selvage_config::{AppName, Digest, NodeName};
use serde::Deserialize;

use crate::access::{Caller, OperatorId, Peer, authenticate};
use crate::answers::{AppAnswer, NodeAnswer, ReleaseRequest, Released, Removed, RollbackRequest, Rollout, hidden};
use crate::audit::now_ms;
use crate::body::whole;
use crate::failure::Failure;
use crate::fleet::{Polled, StatusError};
use crate::plans::Reader;
use crate::registry::{self, Reference, Registry};
use crate::releases::{Proposal, VARIABLES_BYTES_MAX};
use crate::{Parts, disk, freshness};

/// Body of a release or rollback, bytes: the variables, as JSON writes them at worst.
const REQUEST_BYTES_MAX: usize = 8 * VARIABLES_BYTES_MAX;
/// Body of a status, bytes: 10,000 apps and a sentence for each.
const STATUS_BYTES_MAX: usize = 4 * 1024 * 1024;
/// After how many seconds somebody who was turned away may ask again.
const RETRY_SECONDS: &str = "5";

/// Everything that is answered.
pub(crate) fn router(parts: Arc<Parts>) -> Router {
    let guarded = Router::new()
        .route("/api/v1/apps", get(apps))
        .route("/api/v1/apps/{app}", delete(remove))
        .route("/api/v1/apps/{app}/releases", get(app_releases).post(release))
        .route("/api/v1/apps/{app}/rollback", post(rollback))
        .route("/api/v1/apps/{app}/rollout", get(rollout))
        .route("/api/v1/releases", get(all_releases))
        .route(NODES_PATH, get(nodes))
        .route(&format!("{NODES_PATH}/{{node}}"), put(status).delete(forget))
        .route(&format!("{PLAN_PATH}/{{node}}"), get(plan))
        .route(SNAPSHOT_PATH, get(freshness::snapshot))
        .route(ROOTS_PATH, get(freshness::roots))
        .route("/api/v1/revocations", get(freshness::revoked).post(freshness::revoke))
        .route("/v2", any(registry::serve))
        .route("/v2/", any(registry::serve))
        .route("/v2/{*path}", any(registry::serve))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is nothing here"))
        .method_not_allowed_fallback(async || Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this can't be done here"))
        .layer(middleware::from_fn_with_state(Arc::clone(&parts), authenticate))
        .with_state(parts);
    // The one thing that strangers are told: whoever watches over the process need not be able to change it.
    Router::new().route("/healthz", get(async || "ok\n")).merge(guarded)
}

/// The one name in a path, as what it names.
struct Named<T>(T);

impl<S, T> FromRequestParts<S> for Named<T>
where
    S: Send + Sync,
    T: FromStr<Err: std::fmt::Display>,
{
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut RequestParts, state: &S) -> Result<Self, Failure> {
        let path = Path::<String>::from_request_parts(parts, state).await;
        let Path(text) = path.map_err(|_| Failure::bad("the path can't be read"))?;
        text.parse().map(Self).map_err(Failure::bad)
    }
}

/// The query of a request, of which each reads what it knows.
pub(crate) struct Queries(BTreeMap<String, String>);

impl<S: Send + Sync> FromRequestParts<S> for Queries {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut RequestParts, state: &S) -> Result<Self, Failure> {
        let query = Query::from_request_parts(parts, state).await;
        query.map(|Query(map)| Self(map)).map_err(|_| Failure::bad("the query can't be read"))
    }
}

impl Queries {
    pub(crate) fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>, Failure> {
        let number = self.0.get(name).map(|text| text.parse::<T>());
        number.transpose().map_err(|_| Failure::bad(format!("{name} is no whole number")))
    }
}

pub(crate) async fn json<T: for<'d> Deserialize<'d>>(body: Body, max: usize) -> Result<T, Failure> {
    Ok(serde_json::from_slice(&whole(body, max).await?)?)
}

async fn apps(State(parts): State<Arc<Parts>>, _: OperatorId) -> Json<Vec<AppAnswer>> {
    let records = parts.fleet.records();
    let answers = records.apps.values().filter_map(|app| {
        let current = app.current()?;
        Some(AppAnswer {
            app: current.release.id.app.clone(),
            release: hidden(&current.release),
            hosts: current.hosts.clone(),
            releases: app.releases.keys().copied().collect(),
        })
    });
    Json(answers.collect())
}

async fn all_releases(State(parts): State<Arc<Parts>>, _: OperatorId) -> Json<Vec<Release>> {
    let records = parts.fleet.records();
    let releases = records.apps.values().flat_map(|app| app.releases.values());
    Json(releases.map(|record| hidden(&record.release)).collect())
}

async fn app_releases(
    State(parts): State<Arc<Parts>>,
    _: OperatorId,
    Named(app): Named<AppName>,
) -> Result<Json<Vec<Release>>, Failure> {
    let records = parts.fleet.records();
    let record = records.apps.get(&app).filter(|record| !record.releases.is_empty());
    let record = record.ok_or_else(|| Failure::new(StatusCode::NOT_FOUND, format!("there is no app {app}")))?;
    Ok(Json(record.releases.values().map(|record| hidden(&record.release)).collect()))
}

async fn release(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
    body: Body,
) -> Result<(StatusCode, Json<Released>), Failure> {
    let request: ReleaseRequest = json(body, REQUEST_BYTES_MAX).await?;
    let (at, created_by) = (Arc::clone(&parts), who.name().to_owned());
    let (release, is_new, generation) = disk::wait(move || {
        let (manifest, hosts) = inspect(&at.registry, &app, &request)?;
        let ReleaseRequest { repository, variables, .. } = request;
        let proposal = Proposal { app, repository, manifest, variables, hosts, created_by, created_ms: now_ms() };
        let ((release, is_new), generation) = at.fleet.release(proposal)?;
        Ok::<_, Failure>((release, is_new, generation))
    })
    .await?;
    if is_new {
        parts.audit.note(&who, "release.create", &release.id, release.manifest).await;
    }
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(Released { release: hidden(&release), generation })))
}

/// Which manifest is meant, and the hosts that its app claims. What a node could not run for a reason that can be
/// seen from here is refused here, where somebody waits for the answer.
fn inspect(registry: &Registry, app: &AppName, request: &ReleaseRequest) -> Result<(Digest, Vec<String>), Failure> {
    let unfit = |error: String| Failure::new(StatusCode::UNPROCESSABLE_ENTITY, error);
    let repository = &request.repository;
    let digest = registry.resolve(repository, &Reference::parse(&request.reference)?)?;
    let manifest: Manifest = serde_json::from_slice(&registry.manifest(repository, &digest)?)
        .map_err(|error| unfit(format!("{digest} is no image manifest: {error}")))?;
    if manifest.config.media_type != APP_CONFIG {
        // A bare component: an app without a document, which declares no variable and claims no host.
        return Ok((digest, Vec::new()));
    }
    let document = App::from_json(&registry.small_blob(repository, &manifest.config.digest, APP_BYTES_MAX)?)?;
    if document.name != *app {
        let error = format!("{digest} is app {}, not {app}", document.name);
        return Err(unfit(error).hint("release it under its own name"));
    }
    let missing = document.digests().find(|needed| manifest.layers.iter().all(|layer| layer.digest != *needed));
    if let Some(missing) = missing {
        return Err(unfit(format!("the app needs {missing}, which is not among the manifest's layers")));
    }
    Values::settle(&document.variables, &request.variables)?;
    Ok((digest, document.hosts))
}

async fn rollback(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
    body: Body,
) -> Result<Json<Released>, Failure> {
    let bytes = whole(body, REQUEST_BYTES_MAX).await?;
    let RollbackRequest { to } =
        if bytes.is_empty() { RollbackRequest::default() } else { serde_json::from_slice(&bytes)? };
    let at = Arc::clone(&parts);
    let (release, generation) = disk::wait(move || at.fleet.rollback(&app, to)).await?;
    parts.audit.note(&who, "release.rollback", &release.id, release.manifest).await;
    Ok(Json(Released { release: hidden(&release), generation }))
}

async fn remove(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
) -> Result<Json<Removed>, Failure> {
    let (at, name) = (Arc::clone(&parts), app.clone());
    let generation = disk::wait(move || at.fleet.remove(&name)).await?;
    parts.audit.note(&who, "app.remove", app, generation).await;
    Ok(Json(Removed { generation }))
}

async fn rollout(
    State(parts): State<Arc<Parts>>,
    _: OperatorId,
    Named(app): Named<AppName>,
    queries: Queries,
) -> Result<Json<Rollout>, Failure> {
    Ok(Json(parts.fleet.rollout(&app, queries.number("release")?)?))
}

async fn nodes(State(parts): State<Arc<Parts>>, _: OperatorId) -> Json<Vec<NodeAnswer>> {
    Json(parts.fleet.nodes())
}

async fn status(
    State(parts): State<Arc<Parts>>,
    Extension(peer): Extension<Peer>,
    caller: Caller,
    Named(node): Named<NodeName>,
    body: Body,
) -> Result<StatusCode, Failure> {
    let Caller::Node { region: own_region, node: own } = caller else {
        return Err(Failure::new(StatusCode::FORBIDDEN, "only a node tells its status"));
    };
    if own != node {
        return Err(StatusError::Node { told: node, certified: own }.into());
    }
    let status: Status = json(body, STATUS_BYTES_MAX).await?;
    if status.node != own {
        return Err(StatusError::Node { told: status.node, certified: own }.into());
    }
    if status.region != own_region {
        return Err(StatusError::Region { told: status.region, certified: own_region }.into());
    }
    let at = Arc::clone(&parts);
    disk::wait(move || at.fleet.tell(status, peer.address.ip())).await?;
    Ok(StatusCode::NO_CONTENT)
}

async fn forget(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(node): Named<NodeName>,
) -> Result<Json<Removed>, Failure> {
    let (at, name) = (Arc::clone(&parts), node.clone());
    let generation = disk::wait(move || at.fleet.forget(&name)).await?;
    parts.audit.note(&who, "node.forget", node, generation).await;
    Ok(Json(Removed { generation }))
}

async fn plan(
    State(parts): State<Arc<Parts>>,
    caller: Caller,
    Named(node): Named<NodeName>,
    queries: Queries,
) -> Result<Response, Failure> {
    let reader = match &caller {
        Caller::Node { node: own, .. } if *own == node => Reader::Node,
        Caller::Node { node: own, .. } => {
            tracing::warn!(target: "audit", who = %own, %node, "refused: a plan is read by its own node");
            return Err(Failure::new(StatusCode::FORBIDDEN, format!("the plan of {node} is not for {own}")));
        }
        Caller::Operator(_) => Reader::Operator,
    };
    let after = queries.number("after")?;
    let wait = Duration::from_millis(queries.number("wait_ms")?.unwrap_or(0).min(POLL_MS_MAX));
    Ok(match parts.fleet.poll(&node, reader, after, wait, parts.stopping.clone()).await {
        Polled::News(plan) => Json(plan).into_response(),
        Polled::Nothing => StatusCode::NOT_MODIFIED.into_response(),
        Polled::TooMany => {
            let failure = Failure::new(StatusCode::TOO_MANY_REQUESTS, "too many wait for plans");
            ([(RETRY_AFTER, RETRY_SECONDS)], failure).into_response()
        }
    })
}
