//! HTTP to the control plane, and to a node's admin listener.

use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use miette::Report;
use reqwest::dns::{Addrs, Name, Resolve, Resolving};
use reqwest::{Method, RequestBuilder, Response, StatusCode, retry};
use selvage_certs::{Role, mutual_client, roots_from_pem};
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

/// The same where there is another control plane to ask.
const PASS_BY_TIMEOUT: Duration = Duration::from_secs(3);

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
        let (builder, base) = match context.control_planes()[..] {
            [one] => (builder, format!("https://{one}")),
            ref several => passing_by(builder, several),
        };
        let http = builder.build().map_err(|error| failure("set up the HTTP client", &error, None))?;
        Ok(Self { http, base, token })
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

/// Several control planes under the one name that stands in all their certificates: those that can't be reached are passed by.
fn passing_by(builder: reqwest::ClientBuilder, places: &[&str]) -> (reqwest::ClientBuilder, String) {
    let name = Role::ControlPlane.tls_name();
    let current = Arc::new(AtomicUsize::new(0));
    let several =
        Several { places: places.iter().map(|place| (*place).to_owned()).collect(), current: Arc::clone(&current) };
    // Without a connection nothing was sent, so anything may be sent again: the next time to the next one.
    let policy =
        retry::for_host(name.clone()).no_budget().max_retries_per_request(u32::try_from(places.len()).unwrap_or(1));
    let policy = policy.classify_fn(move |tried| {
        let is_unreached = tried.error().and_then(|error| error.downcast_ref::<reqwest::Error>());
        if is_unreached.is_some_and(reqwest::Error::is_connect) {
            current.fetch_add(1, Ordering::Relaxed);
            return tried.retryable();
        }
        tried.success()
    });
    let builder = builder.dns_resolver(Arc::new(several)).retry(policy).connect_timeout(PASS_BY_TIMEOUT);
    // Without a port, so that each address keeps its own.
    (builder, format!("https://{name}"))
}

/// Where several control planes are. A node's admin listener is asked by its address, and never looked up here.
#[derive(Debug)]
struct Several {
    places: Vec<String>,
    current: Arc<AtomicUsize>,
}

impl Resolve for Several {
    fn resolve(&self, _: Name) -> Resolving {
        let first = self.current.load(Ordering::Relaxed) % self.places.len();
        let places: Vec<String> = self.places[first..].iter().chain(&self.places[..first]).cloned().collect();
        Box::pin(async move {
            let mut found = Vec::new();
            let mut failed = None;
            for place in places {
                match tokio::net::lookup_host(&place).await {
                    Ok(addresses) => found.extend(addresses),
                    Err(error) => failed = Some(format!("look up {place}: {error}")),
                }
            }
            match failed {
                Some(error) if found.is_empty() => Err(error.into()),
                _ => Ok(Box::new(found.into_iter()) as Addrs),
            }
        })
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
