//! The registry's end points, one function each (distribution-spec 1.1, "Endpoints").

mod authorize;
mod lists;
mod pull;
mod push;

use std::collections::BTreeMap;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::rejection::{PathRejection, QueryRejection};
use axum::extract::{Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use http::{HeaderMap, HeaderName, HeaderValue, Method, StatusCode, Uri};

pub(crate) use authorize::{challenge, host};
pub(super) use push::fill;

use super::target::Target;
use super::{Reference, RegistryError};
use crate::Parts;
use crate::access::{Action, Caller};
use crate::disk;

/// What clients of the first registry looked for.
const API_VERSION: (HeaderName, HeaderValue) =
    (HeaderName::from_static("docker-distribution-api-version"), HeaderValue::from_static("registry/2.0"));
/// The digest of what is answered. Our clients compute their own.
const CONTENT_DIGEST: HeaderName = HeaderName::from_static("docker-content-digest");

/// The query of a request.
type Queries = BTreeMap<String, String>;

/// A request for something in the registry.
struct Asked {
    method: Method,
    uri: Uri,
    headers: HeaderMap,
    queries: Queries,
    caller: Caller,
}

impl Asked {
    fn header(&self, name: impl http::header::AsHeaderName) -> Option<&str> {
        self.headers.get(name).and_then(|value| value.to_str().ok())
    }

    fn query(&self, name: &str) -> Option<&str> {
        self.queries.get(name).map(String::as_str)
    }
}

/// Answers every request under `/v2`.
pub(crate) async fn serve(
    State(parts): State<Arc<Parts>>,
    path: Result<Path<String>, PathRejection>,
    queries: Result<Query<Queries>, QueryRejection>,
    caller: Caller,
    request: Request,
) -> Response {
    let (head, body) = request.into_parts();
    let path = match path {
        // These two routes have no rest of a path to extract.
        _ if matches!(head.uri.path(), "/v2" | "/v2/") => String::new(),
        Ok(Path(path)) => path,
        Err(_) => return RegistryError::name_invalid("the path is not UTF-8").into_response(),
    };
    let Ok(Query(queries)) = queries else {
        return RegistryError::query_invalid("the query can't be read").into_response();
    };
    let asked = Asked { method: head.method, uri: head.uri, headers: head.headers, queries, caller };
    if path == authorize::TOKEN_PATH && asked.method == Method::GET {
        return authorize::token(&parts, &asked).unwrap_or_else(IntoResponse::into_response);
    }
    let mut answer = match Target::parse(&path) {
        Ok(target) => dispatch(&parts, target, &asked, body).await.unwrap_or_else(IntoResponse::into_response),
        Err(error) => error.into_response(),
    };
    answer.headers_mut().insert(API_VERSION.0, API_VERSION.1);
    asked.challenged(answer)
}

async fn dispatch(parts: &Arc<Parts>, target: Target, asked: &Asked, body: Body) -> Result<Response, RegistryError> {
    let method = &asked.method;
    let is_read = matches!(*method, Method::GET | Method::HEAD);
    if let Some(repository) = target.repository() {
        let reads = is_read && !matches!(target, Target::Upload(..));
        asked.check(if reads { Action::Pull } else { Action::Push }, repository)?;
        if reads {
            parts.mirror(&target).await?;
        }
    }
    match target {
        Target::Root if is_read => Ok(axum::Json(serde_json::json!({})).into_response()),
        Target::Catalog if is_read => lists::repositories(parts, asked).await,
        Target::Blob(repository, digest) if is_read => pull::blob(parts, repository, digest, asked).await,
        Target::Blob(repository, digest) if *method == Method::DELETE => {
            let who = asked.operator(Action::Delete, &repository)?;
            let (registry, name) = (Arc::clone(&parts.registry), repository.clone());
            disk::wait(move || registry.delete_blob(&name, &digest)).await?;
            parts.audit.note(&who, "blob.delete", repository, digest).await;
            Ok(StatusCode::ACCEPTED.into_response())
        }
        Target::Uploads(repository) if *method == Method::POST => push::begin(parts, repository, asked, body).await,
        Target::Upload(repository, id) => push::upload(parts, repository, &id, asked, body).await,
        Target::Manifest(repository, reference) if is_read => pull::manifest(parts, repository, reference, asked).await,
        Target::Manifest(repository, reference) if *method == Method::PUT => {
            push::manifest(parts, repository, reference, asked, body).await
        }
        Target::Manifest(repository, reference) if *method == Method::DELETE => {
            let who = asked.operator(Action::Delete, &repository)?;
            let (at, name, named) = (Arc::clone(parts), repository.clone(), reference.clone());
            disk::wait(move || match &named {
                Reference::Digest(digest) => {
                    at.registry.delete_manifest(&name, digest, || at.fleet.needing(&name, digest))
                }
                Reference::Tag(tag) => at.registry.delete_tag(&name, tag),
            })
            .await?;
            parts.audit.note(&who, "manifest.delete", repository, reference).await;
            Ok(StatusCode::ACCEPTED.into_response())
        }
        Target::Tags(repository) if is_read => lists::tags(parts, repository, asked).await,
        Target::Referrers(repository, digest) if is_read => lists::referrers(parts, repository, digest, asked).await,
        _ => Err(RegistryError::unsupported(format!("{method} means nothing here"))),
    }
}

/// An answer without a body.
fn empty<const N: usize>(status: StatusCode, headers: [(HeaderName, String); N]) -> Response {
    let mut answer = status.into_response();
    for (name, value) in headers {
        if let Ok(value) = HeaderValue::from_str(&value) {
            answer.headers_mut().insert(name, value);
        }
    }
    answer
}
