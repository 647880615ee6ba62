//! Nodes: what they tell, what they shall run, and what operators say of them.

use std::sync::Arc;
use std::time::Duration;

use axum::Json;
use axum::body::Body;
use axum::extract::{Extension, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{delete, get, patch, post, put};
use http::header::RETRY_AFTER;
use http::{HeaderMap, HeaderValue, StatusCode};
use selvage_config::join::{AUTHORITIES_FIELD, Authorities};
use selvage_config::plan::{NODES_PATH, News, PLAN_PATH, POLL_MS_MAX, Status, StatusDelta, Told};
use selvage_config::{NodeName, Region};

use super::{Named, Queries, Route, json};
use crate::access::{Act, Caller, OperatorId, Peer};
use crate::answers::{NodeAnswer, NodeRequest, Removed};
use crate::failure::Failure;
use crate::fleet::{Polled, STATUS_BYTES_MAX, Said, StatusError};
use crate::plans::Reader;
use crate::state::MemberRecord;
use crate::{Parts, disk};

/// Body of what is said of a node, bytes.
const REQUEST_BYTES_MAX: usize = 64 * 1024;
/// After how many seconds somebody who was turned away may ask again.
const RETRY_SECONDS: &str = "5";

pub(super) fn routes() -> Vec<Route> {
    let node = || format!("{NODES_PATH}/{{node}}");
    vec![
        Route::new(("GET", NODES_PATH), "look", "Every node with what it told.", get(nodes)),
        Route::new(("PUT", node()), "the node's own certificate", "A node tells its status.", put(status))
            .takes("Status"),
        Route::new(
            ("PATCH", node()),
            "the node's own certificate",
            "A node tells what changed in its status; 412 asks for the whole of it.",
            patch(status_delta),
        )
        .takes("StatusDelta"),
        Route::new(("POST", node()), "admin", "Cordons, drains, labels or revokes a node, or the contrary.", post(say))
            .takes("NodeRequest"),
        Route::new(("DELETE", node()), "admin", "Forgets a node that is gone.", delete(forget)),
        Route::new(
            ("GET", format!("{PLAN_PATH}/{{node}}")),
            "look, or the node's own certificate",
            "What a node shall run, once it is newer than the generation `after`; waits up to `wait_ms`. With `nonce`, what changed.",
            get(plan),
        ),
    ]
}

async fn nodes(State(parts): State<Arc<Parts>>, who: OperatorId) -> Result<Json<Vec<NodeAnswer>>, Failure> {
    who.over_fleet(Act::Look)?;
    let authorities = disk::wait({
        let parts = Arc::clone(&parts);
        move || parts.joining.authorities_now()
    });
    let authorities = authorities.await;
    Ok(Json(parts.fleet.nodes(authorities)))
}

async fn status(
    State(parts): State<Arc<Parts>>,
    Extension(peer): Extension<Peer>,
    caller: Caller,
    Named(node): Named<NodeName>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let whose = Own::of(caller, &node)?;
    let status: Status = json(body, STATUS_BYTES_MAX).await?;
    let at = Arc::clone(&parts);
    told(&parts, whose, headers, move |whose, believes| {
        whose.check(&status)?;
        at.fleet.believes(&status.node, believes);
        at.fleet.tell(status, peer.address.ip())
    })
    .await
}

async fn status_delta(
    State(parts): State<Arc<Parts>>,
    Extension(peer): Extension<Peer>,
    caller: Caller,
    Named(node): Named<NodeName>,
    headers: HeaderMap,
    body: Body,
) -> Result<Response, Failure> {
    let whose = Own::of(caller, &node)?;
    let delta: StatusDelta = json(body, STATUS_BYTES_MAX).await?;
    let at = Arc::clone(&parts);
    told(&parts, whose, headers, move |whose, believes| {
        let status = at.fleet.status_with(&whose.node, delta)?;
        whose.check(&status)?;
        at.fleet.believes(&whose.node, believes);
        at.fleet.tell(status, peer.address.ip())
    })
    .await
}

/// The node that tells its status, by its certificate.
struct Own {
    node: NodeName,
    region: Region,
}

impl Own {
    fn of(caller: Caller, node: &NodeName) -> Result<Self, Failure> {
        let Caller::Node { region, node: own } = caller else {
            return Err(Failure::new(StatusCode::FORBIDDEN, "only a node tells its status"));
        };
        if own != *node {
            return Err(StatusError::Node { told: node.clone(), certified: own }.into());
        }
        Ok(Self { node: own, region })
    }

    fn check(&self, status: &Status) -> Result<(), StatusError> {
        if status.node != self.node {
            return Err(StatusError::Node { told: status.node.clone(), certified: self.node.clone() });
        }
        if status.region != self.region {
            return Err(StatusError::Region { told: status.region.clone(), certified: self.region.clone() });
        }
        Ok(())
    }
}

/// Takes in what a node tells, and answers which authorities the fleet has.
async fn told(
    parts: &Arc<Parts>,
    whose: Own,
    headers: HeaderMap,
    take: impl FnOnce(&Own, Option<Authorities>) -> Result<(), StatusError> + Send + 'static,
) -> Result<Response, Failure> {
    let at = Arc::clone(parts);
    let believes = headers.get(AUTHORITIES_FIELD).and_then(|value| value.to_str().ok()?.parse().ok());
    let authorities = disk::wait(move || {
        take(&whose, believes)?;
        Ok::<_, StatusError>(at.joining.authorities())
    });
    let authorities = authorities.await?;
    parts.moves.notify_one();
    let field = authorities.and_then(|authorities| HeaderValue::try_from(authorities.to_string()).ok());
    let mut answer = StatusCode::NO_CONTENT.into_response();
    if let Some(field) = field {
        answer.headers_mut().insert(AUTHORITIES_FIELD, field);
    }
    Ok(answer)
}

async fn say(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(node): Named<NodeName>,
    body: Body,
) -> Result<StatusCode, Failure> {
    who.over_fleet(Act::Administer)?;
    let (what, said) = match json(body, REQUEST_BYTES_MAX).await? {
        NodeRequest::Cordon => ("node.cordon", Said::Cordon),
        NodeRequest::Uncordon => ("node.uncordon", Said::Uncordon),
        NodeRequest::Drain => ("node.drain", Said::Drain),
        NodeRequest::Undrain => ("node.undrain", Said::Undrain),
        NodeRequest::Revoke => ("node.revoke", Said::Revoke),
        NodeRequest::Labels(labels) => ("node.labels", Said::Labels(labels)),
    };
    let (at, name) = (Arc::clone(&parts), node.clone());
    let (before, after) = disk::wait(move || at.fleet.say(&name, &said)).await?;
    parts.audit.note_change(&who, what, node, described(&before), described(&after)).await;
    Ok(StatusCode::NO_CONTENT)
}

/// What is said of a node, for the audit log.
fn described(member: &MemberRecord) -> String {
    let labels: Vec<String> = member.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let MemberRecord { cordon, drain, revoked, .. } = member;
    format!("cordoned {}, draining {drain}, revoked {revoked}, labels [{}]", cordon.is_some(), labels.join(" "))
}

async fn forget(
    State(parts): State<Arc<Parts>>,
    who: OperatorId,
    Named(node): Named<NodeName>,
) -> Result<Json<Removed>, Failure> {
    who.over_fleet(Act::Administer)?;
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
        Caller::Operator(who) => {
            who.over_fleet(Act::Look)?;
            Reader::Operator
        }
    };
    let after = queries.number("after")?;
    let wait = Duration::from_millis(queries.number("wait_ms")?.unwrap_or(0).min(POLL_MS_MAX));
    let nonce = queries.text("nonce");
    Ok(match parts.fleet.poll(&node, reader, (after, nonce), wait, parts.stopping.clone()).await {
        // Who gives no nonce knows nothing of deltas.
        Polled::News(news) => match *news {
            News { plan: Told::Whole(plan), .. } if nonce.is_none() => Json(plan).into_response(),
            news => Json(news).into_response(),
        },
        Polled::Nothing => StatusCode::NOT_MODIFIED.into_response(),
        Polled::TooMany => {
            let failure = Failure::new(StatusCode::TOO_MANY_REQUESTS, "too many wait for plans");
            ([(RETRY_AFTER, RETRY_SECONDS)], failure).into_response()
        }
    })
}
