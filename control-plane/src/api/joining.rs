//! Joining: tokens, and certificates for them.

use std::sync::Arc;

use axum::Json;
use axum::body::Body;
use axum::extract::{Path, State};
use axum::routing::{delete, get, post};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::StatusCode;
use selvage_config::NodeName;
use selvage_config::join::{
    AUTHORITIES_PATH, CERTIFICATE_PATH, CertificateAnswer, CertificateRequest, JOIN_BYTES_MAX, JOIN_PATH, JoinRequest,
    RENEWAL_PATH, RenewalRequest,
};
use selvage_config::plan::NODES_PATH;

use super::{Named, Route, json};
use crate::access::{Act, Caller, OperatorId};
use crate::answers::{JoinTokenAnswer, JoinTokenRequest, JoinTokenState};
use crate::failure::Failure;
use crate::joining::Invitation;
use crate::{Parts, disk};

pub(super) fn routes() -> Vec<Route> {
    let tokens = || "/api/v1/join-tokens".to_owned();
    vec![
        Route::new(("GET", tokens()), "admin", "The join tokens that nobody has used yet.", get(list)),
        Route::new(("POST", tokens()), "admin", "Makes a token that lets one node join, once.", post(invite))
            .takes("JoinTokenRequest"),
        Route::new(("DELETE", format!("{}/{{id}}", tokens())), "admin", "Takes a join token back.", delete(take_back)),
        Route::new(
            ("POST", format!("{NODES_PATH}/{{node}}/{CERTIFICATE_PATH}")),
            "the node's own certificate",
            "Another certificate for a node that has one.",
            post(certificate),
        )
        .takes("CertificateRequest"),
    ]
}

/// What is answered to whoever has no certificate and no token of an operator.
pub(super) fn open_routes() -> Vec<Route> {
    vec![
        Route::new(("POST", JOIN_PATH), "a join token", "Lets a node join.", post(join)).takes("JoinRequest"),
        Route::new(
            ("POST", RENEWAL_PATH),
            "a node's certificate that has ended, and its key",
            "Another certificate for a node that could not renew its own in time.",
            post(renew_late),
        )
        .takes("RenewalRequest"),
        Route::new(("GET", AUTHORITIES_PATH), "nothing", "The authorities of the fleet, PEM.", get(roots)),
    ]
}

async fn list(State(parts): State<Arc<Parts>>, who: OperatorId) -> Result<Json<Vec<JoinTokenState>>, Failure> {
    who.over_fleet(Act::Administer)?;
    let records = parts.fleet.records();
    let state = |(id, join): (&String, &Arc<crate::state::JoinRecord>)| JoinTokenState {
        id: id.clone(),
        region: join.region.clone(),
        node: join.node.clone(),
        labels: join.labels.clone(),
        ends_ms: join.ends_ms,
        created_by: join.created_by.clone(),
    };
    Ok(Json(records.joins.iter().map(state).collect()))
}

async fn invite(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    body: Body,
) -> Result<(StatusCode, Json<JoinTokenAnswer>), Failure> {
    who.over_fleet(Act::Administer)?;
    let JoinTokenRequest { region, node, labels, ttl_seconds } = json(body, JOIN_BYTES_MAX).await?;
    let told = format!("region {region}, node {}", node.as_ref().map_or("any", NodeName::as_str));
    let invitation = Invitation { region, node, labels, ttl_seconds, created_by: who.name().to_owned() };
    let at = Arc::clone(&parts);
    let (token, ends_ms) = disk::wait(move || at.joining.invite(&at.fleet, invitation)).await?;
    parts.audit.note(&who, "join.invite", &token.id, told).await;
    Ok((StatusCode::CREATED, Json(JoinTokenAnswer { id: token.id.clone(), token: token.into(), ends_ms })))
}

async fn take_back(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Path(id): Path<String>,
) -> Result<StatusCode, Failure> {
    who.over_fleet(Act::Administer)?;
    let (at, name) = (Arc::clone(&parts), id.clone());
    disk::wait(move || at.fleet.forbid_join(&name)).await?;
    parts.audit.note(&who, "join.take-back", id, "").await;
    Ok(StatusCode::NO_CONTENT)
}

async fn join(State(parts): State<Arc<Parts>>, body: Body) -> Result<Json<CertificateAnswer>, Failure> {
    let JoinRequest { token, node, request } = json(body, JOIN_BYTES_MAX).await?;
    let request = decoded(&request)?;
    let (at, used, name) = (Arc::clone(&parts), token.clone(), node.clone());
    let answer = disk::wait(move || at.joining.join(&at.fleet, &used, &name, &request)).await?;
    parts.audit.note(format!("join token {}", token.id), "node.join", node, format!("region {}", answer.region)).await;
    Ok(Json(answer))
}

async fn renew_late(State(parts): State<Arc<Parts>>, body: Body) -> Result<Json<CertificateAnswer>, Failure> {
    let RenewalRequest { certificate, request } = json(body, JOIN_BYTES_MAX).await?;
    let request = decoded(&request)?;
    let at = Arc::clone(&parts);
    let renewed = disk::wait(move || at.joining.renew_late(&at.fleet, &certificate, &request)).await;
    let (node, answer) =
        renewed.inspect_err(|error| tracing::warn!(target: "audit", %error, "late renewal refused"))?;
    parts.audit.note(format!("node {node}"), "node.renew-late", node, "").await;
    Ok(Json(answer))
}

async fn certificate(
    State(parts): State<Arc<Parts>>,
    caller: Caller,
    Named(node): Named<NodeName>,
    body: Body,
) -> Result<Json<CertificateAnswer>, Failure> {
    let Caller::Node { region, node: own } = caller else {
        return Err(Failure::new(StatusCode::FORBIDDEN, "only a node asks for its certificate"));
    };
    if own != node {
        return Err(Failure::new(StatusCode::FORBIDDEN, format!("a certificate of {node} is not for {own}")));
    }
    let CertificateRequest { request } = json(body, JOIN_BYTES_MAX).await?;
    let request = decoded(&request)?;
    let (at, name) = (Arc::clone(&parts), own.clone());
    let answer = disk::wait(move || at.joining.certify(&name, region, &request)).await?;
    parts.audit.note(format!("node {own}"), "node.renew", own, "").await;
    Ok(Json(answer))
}

fn decoded(request: &str) -> Result<Vec<u8>, Failure> {
    STANDARD.decode(request).map_err(|_| Failure::bad("request is not base64"))
}

async fn roots(State(parts): State<Arc<Parts>>) -> Result<String, Failure> {
    Ok(disk::wait(move || parts.joining.roots_pem()).await?)
}
