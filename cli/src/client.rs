//! HTTP to the control plane, and to a node's admin listener.

use std::net::SocketAddr;
use std::path::Path;
use std::time::Duration;

use miette::Report;
use reqwest::{Method, RequestBuilder, Response, StatusCode};
use selvage_certs::{mutual_client, roots_from_pem};
use selvage_config::NodeName;
use selvage_control_plane::answers::NodeAnswer;
use serde::Deserialize;
use serde::de::DeserializeOwned;

use crate::context::Context;
use crate::output::{failed, failure};

/// Longest time for a connection.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest time for one request: an upload of the largest component at 10 Mbit/s.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(240);

/// A client of one fleet.
#[derive(Clone)]
pub(crate) struct Client {
    http: reqwest::Client,
    base: String,
    token: Option<String>,
}

/// How the servers of the fleet tell a mistake.
#[derive(Debug, Deserialize)]
struct ServerError {
    error: String,
    hint: Option<String>,
}

impl Client {
    /// A client as the context file at `path` says.
    pub(crate) fn of(path: &Path) -> Result<Self, Report> {
        let context = Context::load(path)?;
        let roots = roots_from_pem(&context.roots).map_err(|e| failure("load the fleet's authority", &e, None))?;
        let tls = match context.identity()? {
            Some(identity) => {
                let tls = mutual_client(&identity, &roots);
                tls.map_err(|error| failure("use the operator's identity", &error, None))?.as_ref().clone()
            }
            None => selvage_certs::client(&roots),
        };
        let token = context.token()?;
        let builder = reqwest::Client::builder().use_preconfigured_tls(tls).no_proxy();
        let builder = builder.connect_timeout(CONNECT_TIMEOUT).timeout(REQUEST_TIMEOUT);
        let http = builder.build().map_err(|error| failure("set up the HTTP client", &error, None))?;
        Ok(Self { http, base: context.control_plane.trim_end_matches('/').to_owned(), token })
    }

    /// A request to the control plane. `path` starts with '/'.
    pub(crate) fn request(&self, method: Method, path: &str) -> RequestBuilder {
        let url = if path.starts_with("https://") { path.to_owned() } else { format!("{}{path}", self.base) };
        let request = self.http.request(method, url);
        match &self.token {
            Some(token) => request.bearer_auth(token),
            None => request,
        }
    }

    /// A request to a node's admin listener.
    pub(crate) fn admin(&self, method: Method, address: SocketAddr, path: &str) -> RequestBuilder {
        self.http.request(method, format!("https://{address}{path}"))
    }

    /// The nodes that the control plane knows.
    pub(crate) async fn nodes(&self) -> Result<Vec<NodeAnswer>, Report> {
        json(self.request(Method::GET, "/api/v1/nodes"), "ask for the nodes").await
    }

    /// The admin address of a node.
    pub(crate) async fn admin_address(&self, node: &NodeName) -> Result<SocketAddr, Report> {
        let nodes = self.nodes().await?;
        let known: Vec<&str> = nodes.iter().map(|n| n.status.node.as_str()).collect();
        let hint = format!("the control plane knows: {}", known.join(", "));
        let found = nodes.iter().find(|n| n.status.node == *node);
        let found = found.ok_or_else(|| failed(format!("no node is named {node}"), Some(&hint)))?;
        found.status.admin.ok_or_else(|| failed(format!("{node} has no admin listener"), Some("set listen.admin")))
    }
}

/// Sends a request; an answer that is no success becomes an error with the server's own words.
pub(crate) async fn send(request: RequestBuilder, tried: &str) -> Result<Response, Report> {
    let hint = "is the control plane (or node) running, and reachable at that address?";
    accepted(request.send().await.map_err(|error| failure(tried, &error, Some(hint)))?, tried).await
}

/// An answer that is none of a mistake; else what the other side says of it.
pub(crate) async fn accepted(response: Response, tried: &str) -> Result<Response, Report> {
    let status = response.status();
    if status.is_success() || status == StatusCode::NOT_MODIFIED {
        return Ok(response);
    }
    let text = response.text().await.unwrap_or_default();
    let (error, hint) = match serde_json::from_str::<ServerError>(&text) {
        Ok(told) => (told.error, told.hint),
        Err(_) => (text.trim().chars().take(300).collect(), None),
    };
    Err(failed(format!("{tried}: {status}: {error}"), hint.as_deref()))
}

/// Sends a request and reads a JSON answer.
pub(crate) async fn json<T: DeserializeOwned>(request: RequestBuilder, tried: &str) -> Result<T, Report> {
    let response = send(request, tried).await?;
    response.json().await.map_err(|error| failure(&format!("{tried}: read the answer"), &error, None))
}
