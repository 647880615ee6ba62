//! Apps: their releases, how those come into use, and their secrets.

use std::collections::BTreeSet;
use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::routing::{delete, get, post, put};
use http::StatusCode;
use selvage_config::app::variables::Values;
use selvage_config::app::{APP_BYTES_MAX, App};
use selvage_config::oci::{APP_CONFIG, Manifest};
use selvage_config::release::{Release, ReleaseId};
use selvage_config::{AppName, Digest};

use super::{Named, Queries, Route, json};
use crate::access::{Act, OperatorId};
use crate::answers::{
    AppAnswer, ReleaseRequest, Released, Removed, RollbackRequest, Rollout, RolloutRequest, SecretRequest, Share,
    hidden,
};
use crate::audit::now_ms;
use crate::body::whole;
use crate::failure::Failure;
use crate::registry::{Reference, Registry};
use crate::releases::{How, Proposal, VARIABLES_BYTES_MAX};
use crate::{Parts, disk};

/// Body of a release or rollback, bytes: the variables, as JSON writes them at worst.
const REQUEST_BYTES_MAX: usize = 8 * VARIABLES_BYTES_MAX;

pub(super) fn routes() -> Vec<Route> {
    let at = |method, path: &str| (method, format!("/api/v1/{path}"));
    vec![
        Route::new(at("GET", "apps"), "look", "Every app with its current release.", get(apps)),
        Route::new(at("DELETE", "apps/{app}"), "admin", "Takes an app off every plan.", delete(remove)),
        Route::new(
            at("GET", "apps/{app}/releases"),
            "look",
            "The releases of an app that are kept.",
            get(app_releases),
        ),
        Route::new(at("POST", "apps/{app}/releases"), "deploy", "Makes a release and begins to use it.", post(release))
            .takes("ReleaseRequest"),
        Route::new(at("POST", "apps/{app}/rollback"), "deploy", "Takes the last move back.", post(rollback))
            .takes("RollbackRequest"),
        Route::new(at("GET", "apps/{app}/rollout"), "look", "How far a release has come.", get(rollout)),
        Route::new(
            at("PUT", "apps/{app}/splits/{release}"),
            "deploy",
            "Lets a release serve a part of the visitors beside the current one.",
            put(split),
        )
        .takes("Share"),
        Route::new(at("DELETE", "apps/{app}/splits/{release}"), "deploy", "Ends such a split.", delete(end_split)),
        Route::new(at("GET", "apps/{app}/secrets"), "look", "The names of an app's secrets.", get(secrets)),
        Route::new(at("PUT", "apps/{app}/secrets/{name}"), "deploy", "Sets a secret of an app.", put(set_secret))
            .takes("SecretRequest"),
        Route::new(at("DELETE", "apps/{app}/secrets/{name}"), "deploy", "Forgets a secret.", delete(drop_secret)),
        Route::new(at("GET", "releases"), "look", "The releases of all apps that are kept.", get(all_releases)),
    ]
}

async fn apps(State(parts): State<Arc<Parts>>, who: OperatorId) -> Json<Vec<AppAnswer>> {
    let records = parts.fleet.records();
    let answers = records.apps.values().filter_map(|app| {
        let current = app.current()?;
        who.may(Act::Look, &current.release.id.app).then(|| AppAnswer {
            app: current.release.id.app.clone(),
            release: hidden(&current.release),
            hosts: current.hosts.clone(),
            releases: app.releases.keys().copied().collect(),
        })
    });
    Json(answers.collect())
}

async fn all_releases(State(parts): State<Arc<Parts>>, who: OperatorId) -> Json<Vec<Release>> {
    let records = parts.fleet.records();
    let apps = records.apps.iter().filter(|(app, _)| who.may(Act::Look, app));
    Json(apps.flat_map(|(_, app)| app.releases.values()).map(|record| hidden(&record.release)).collect())
}

async fn app_releases(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
) -> Result<Json<Vec<Release>>, Failure> {
    who.over_app(Act::Look, &app)?;
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
    who.over_app(Act::Deploy, &app)?;
    let request: ReleaseRequest = json(body, REQUEST_BYTES_MAX).await?;
    let how = match &request.rollout {
        RolloutRequest::AtOnce => How::AtOnce,
        RolloutRequest::Waves { waves, gate } => How::Waves { waves: waves.clone(), gate: gate.clone() },
        RolloutRequest::Split(share) => How::Split(share.clone()),
    };
    let (at, created_by, told) = (Arc::clone(&parts), who.name().to_owned(), app.clone());
    let (before, release, is_new, generation) = disk::wait(move || {
        let Inspected { manifest, hosts, declared } = inspect(&at, &app, &request)?;
        let ReleaseRequest { repository, variables, .. } = request;
        let before = current(&at, &app);
        let (created_ms, name) = (now_ms(), created_by);
        let proposal =
            Proposal { app, repository, manifest, variables, hosts, declared, created_by: name, created_ms, how };
        let ((release, is_new), generation) = at.fleet.release(&proposal)?;
        Ok::<_, Failure>((before, release, is_new, generation))
    })
    .await?;
    if is_new {
        let after = format!("{} {}", release.manifest, current(&parts, &told));
        parts.audit.note_change(&who, "release.create", &release.id, before, after).await;
        parts.moves.notify_one();
    }
    let status = if is_new { StatusCode::CREATED } else { StatusCode::OK };
    Ok((status, Json(Released { release: hidden(&release), generation })))
}

/// What plans say of an app, for the audit log.
fn current(parts: &Parts, app: &AppName) -> String {
    let records = parts.fleet.records();
    let Some(record) = records.apps.get(app) else { return "nothing".to_owned() };
    let current = record.current.map_or("nothing".to_owned(), |number| format!("{app}@{number}"));
    let split = record.split.as_ref().map(|s| format!(", {}% {app}@{}", s.percent, s.release)).unwrap_or_default();
    let coming = record.running().map(|rollout| format!(", moving to {app}@{}", rollout.to)).unwrap_or_default();
    format!("{current}{split}{coming}")
}

struct Inspected {
    manifest: Digest,
    hosts: Vec<String>,
    declared: BTreeSet<String>,
}

/// Which manifest is meant, and the hosts that its app claims. What a node could not run for a reason that can be
/// seen from here is refused here, where somebody waits for the answer.
fn inspect(parts: &Parts, app: &AppName, request: &ReleaseRequest) -> Result<Inspected, Failure> {
    let registry: &Registry = &parts.registry;
    let unfit = |error: String| Failure::new(StatusCode::UNPROCESSABLE_ENTITY, error);
    let repository = &request.repository;
    let digest = registry.resolve_for_release(repository, &Reference::parse(&request.reference)?)?;
    let manifest: Manifest = serde_json::from_slice(&registry.manifest(repository, &digest)?)
        .map_err(|error| unfit(format!("{digest} is no image manifest: {error}")))?;
    if manifest.is_spin() {
        let error = unfit(format!("{digest} is an app as `spin registry push` writes it"));
        return Err(error.hint("make it one of ours with `selvage import`, sign and deploy that"));
    }
    if manifest.config.media_type != APP_CONFIG {
        // A bare component: an app without a document, which declares no variable and claims no host.
        return Ok(Inspected { manifest: digest, hosts: Vec::new(), declared: BTreeSet::new() });
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
    let declared: BTreeSet<String> = document.variables.keys().cloned().collect();
    let mut variables = request.variables.clone();
    if let Some(record) = parts.fleet.records().apps.get(app) {
        let secrets = record.secrets.iter().filter(|(name, _)| declared.contains(*name));
        variables.extend(secrets.map(|(name, value)| (name.clone(), value.clone())));
    }
    Values::settle(&document.variables, &variables)?;
    Ok(Inspected { manifest: digest, hosts: document.hosts, declared })
}

async fn rollback(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
    body: Body,
) -> Result<Json<Released>, Failure> {
    who.over_app(Act::Deploy, &app)?;
    let bytes = whole(body, REQUEST_BYTES_MAX).await?;
    let RollbackRequest { to } =
        if bytes.is_empty() { RollbackRequest::default() } else { serde_json::from_slice(&bytes)? };
    let before = current(&parts, &app);
    let (at, name, reason) = (Arc::clone(&parts), app.clone(), format!("{} rolled it back", who.name()));
    let (release, generation) = disk::wait(move || at.fleet.rollback(&name, to, &reason)).await?;
    parts.audit.note_change(&who, "release.rollback", &release.id, before, current(&parts, &app)).await;
    Ok(Json(Released { release: hidden(&release), generation }))
}

async fn remove(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
) -> Result<Json<Removed>, Failure> {
    who.over_app(Act::Administer, &app)?;
    let before = current(&parts, &app);
    let (at, name) = (Arc::clone(&parts), app.clone());
    let generation = disk::wait(move || at.fleet.remove(&name)).await?;
    parts.audit.note_change(&who, "app.remove", app, before, generation).await;
    Ok(Json(Removed { generation }))
}

async fn rollout(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
    queries: Queries,
) -> Result<Json<Rollout>, Failure> {
    who.over_app(Act::Look, &app)?;
    Ok(Json(parts.fleet.rollout(&app, queries.number("release")?)?))
}

/// The release that a path names.
fn release_of(app: &str, number: &str) -> Result<ReleaseId, Failure> {
    format!("{app}@{number}").parse().map_err(Failure::bad)
}

async fn split(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Path((app, number)): Path<(String, String)>,
    body: Body,
) -> Result<Json<Released>, Failure> {
    let id = release_of(&app, &number)?;
    who.over_app(Act::Deploy, &id.app)?;
    let share: Share = json(body, REQUEST_BYTES_MAX).await?;
    change_split(&parts, &who, id, Some(share)).await
}

async fn end_split(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Path((app, number)): Path<(String, String)>,
) -> Result<Json<Released>, Failure> {
    let id = release_of(&app, &number)?;
    who.over_app(Act::Deploy, &id.app)?;
    change_split(&parts, &who, id, None).await
}

async fn change_split(
    parts: &Arc<Parts>,
    who: &OperatorId,
    id: ReleaseId,
    share: Option<Share>,
) -> Result<Json<Released>, Failure> {
    let before = current(parts, &id.app);
    let (at, split) = (Arc::clone(parts), id.clone());
    let (release, generation) = disk::wait(move || at.fleet.split(&split, share.as_ref())).await?;
    parts.audit.note_change(who, "release.split", &id, before, current(parts, &id.app)).await;
    Ok(Json(Released { release: hidden(&release), generation }))
}

async fn secrets(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(app): Named<AppName>,
) -> Result<Json<Vec<String>>, Failure> {
    who.over_app(Act::Look, &app)?;
    let records = parts.fleet.records();
    Ok(Json(records.apps.get(&app).map(|app| app.secrets.keys().cloned().collect()).unwrap_or_default()))
}

async fn set_secret(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Path((app, name)): Path<(String, String)>,
    body: Body,
) -> Result<Json<Removed>, Failure> {
    let app: AppName = app.parse().map_err(Failure::bad)?;
    who.over_app(Act::Deploy, &app)?;
    let SecretRequest { value } = json(body, REQUEST_BYTES_MAX).await?;
    change_secret(&parts, &who, app, name, Some(value)).await
}

async fn drop_secret(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Path((app, name)): Path<(String, String)>,
) -> Result<Json<Removed>, Failure> {
    let app: AppName = app.parse().map_err(Failure::bad)?;
    who.over_app(Act::Deploy, &app)?;
    change_secret(&parts, &who, app, name, None).await
}

async fn change_secret(
    parts: &Arc<Parts>,
    who: &OperatorId,
    app: AppName,
    name: String,
    value: Option<String>,
) -> Result<Json<Removed>, Failure> {
    // Neither the value nor its hash is told: a short secret could be guessed from that.
    let (what, after) = if value.is_some() { ("secret.set", "set") } else { ("secret.drop", "") };
    let (at, owner, variable) = (Arc::clone(parts), app.clone(), name.clone());
    let generation = disk::wait(move || at.fleet.secret(&owner, &variable, value.as_deref())).await?;
    parts.audit.note(who, what, format!("{app}/{name}"), after).await;
    Ok(Json(Removed { generation }))
}
