//! The API under `/api/v1`: releases, rollouts, nodes and plans as JSON. Every route stands in one table with what is
//! told of it, so that the document of the API and the server can't differ.

mod apps;
mod document;
mod joining;
mod nodes;
mod schema;
mod upkeep;

use std::collections::BTreeMap;
use std::str::FromStr;
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequestParts, Path, Query};
use axum::routing::{MethodRouter, any, get};
use axum::{Json, Router, middleware};
use http::request::Parts as RequestParts;
use http::{HeaderMap, StatusCode, Uri};
use serde::Deserialize;

use crate::Parts;
use crate::access::authenticate;
use crate::body::whole;
use crate::failure::Failure;
use crate::{freshness, registry};

/// One thing that can be asked.
pub(crate) struct Route {
    method: &'static str,
    /// As axum and OpenAPI write it.
    path: String,
    /// What it does, in a sentence.
    summary: &'static str,
    /// The operator's right that it needs, or who else may ask.
    who: &'static str,
    /// The document that it takes.
    takes: Option<&'static str>,
    answer: MethodRouter<Arc<Parts>>,
}

impl Route {
    pub(crate) fn new(
        (method, path): (&'static str, impl Into<String>),
        who: &'static str,
        summary: &'static str,
        answer: MethodRouter<Arc<Parts>>,
    ) -> Self {
        Self { method, path: path.into(), summary, who, takes: None, answer }
    }

    pub(crate) fn takes(self, document: &'static str) -> Self {
        Self { takes: Some(document), ..self }
    }
}

/// Everything that is answered.
pub(crate) fn router(parts: Arc<Parts>) -> Router {
    let guarded: Vec<Route> =
        [apps::routes(), nodes::routes(), freshness::routes(), joining::routes(), upkeep::routes()]
            .into_iter()
            .flatten()
            .collect();
    let open = joining::open_routes();
    let document = Arc::new(document::write(guarded.iter().chain(&open)));
    let served = |routes: Vec<Route>| {
        routes.into_iter().fold(Router::new(), |router, route| router.route(&route.path, route.answer))
    };
    let guarded = served(guarded)
        .route(document::PATH, get(move || std::future::ready(Json(document.as_ref().clone()))))
        .route("/v2", any(registry::serve))
        .route("/v2/", any(registry::serve))
        .route("/v2/{*path}", any(registry::serve))
        .fallback(async || Failure::new(StatusCode::NOT_FOUND, "there is nothing here"))
        .method_not_allowed_fallback(async || Failure::new(StatusCode::METHOD_NOT_ALLOWED, "this can't be done here"))
        .layer(middleware::from_fn_with_state(Arc::clone(&parts), authenticate))
        .with_state(Arc::clone(&parts));
    // What strangers are told: whoever watches over the process need not be able to change it, a client of the wasm
    // package tools asks this before it knows that there is a registry, and who joins has nothing to show but a token.
    Router::new()
        .route("/healthz", get(async || "ok\n"))
        .route("/.well-known/wasm-pkg/registry.json", get(wasm_registry))
        .merge(served(open).with_state(parts))
        .merge(guarded)
}

/// Where the wasm package tools find the registry: here.
async fn wasm_registry(uri: Uri, headers: HeaderMap) -> Result<Json<serde_json::Value>, Failure> {
    let host = registry::host(&uri, &headers).ok_or_else(|| Failure::bad("which host?"))?;
    Ok(Json(serde_json::json!({ "preferredProtocol": "oci", "oci": { "registry": host } })))
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
    fn text(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str)
    }

    pub(crate) fn number<T: FromStr>(&self, name: &str) -> Result<Option<T>, Failure> {
        let number = self.0.get(name).map(|text| text.parse::<T>());
        number.transpose().map_err(|_| Failure::bad(format!("{name} is no whole number")))
    }
}

pub(crate) async fn json<T: for<'d> Deserialize<'d>>(body: Body, max: usize) -> Result<T, Failure> {
    Ok(serde_json::from_slice(&whole(body, max).await?)?)
}
