//! The operators' listener: health, metrics, status, KV and peers.
//!
//! With TLS operators are let in, each for what [`Access`] says of it, and the node's peers for what [`Shelf`] gives
//! them; not the control plane, which has no business here. Without, the listener takes a loopback address only, and no
//! request that a web page could have sent.

mod access;
mod away;
mod kv;
mod shelf;

use std::convert::Infallible;
use std::io;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http::header::{CONTENT_TYPE, HOST, ORIGIN};
use http::{HeaderMap, HeaderValue, Method, Request, Response, StatusCode};
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustls::ServerConfig;
use selvage_backend::{BackendStatus, Stores};
use selvage_certs::{OperatorName, Role, peer_of};
use selvage_config::NodeName;
use selvage_config::plan::Status;
use selvage_sync::Kv;
use serde::Serialize;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use crate::listen::dearth::Dearth;
pub use access::Access;
pub use shelf::Shelf;

use crate::serve::Parts;

/// Connections at once.
const CONNECTIONS_MAX: usize = 64;
/// Of these, those of the node's peers: operators always find a place.
const PEERS_MAX: usize = 32;
/// Time for a TLS handshake, and for a request's head.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// Bytes of a request's head.
const HEAD_BYTES_MAX: usize = 16 * 1024;
/// Prometheus' text format.
const EXPOSITION: HeaderValue = HeaderValue::from_static("text/plain; version=0.0.4; charset=utf-8");

/// Tells what the node runs.
pub type StatusOf = Arc<dyn Fn() -> Status + Send + Sync>;

/// What the listener shows.
#[derive(Clone)]
pub struct AdminParts {
    /// The front's parts: metrics, and whether there is anything to serve.
    pub parts: Arc<Parts>,
    /// The node's stores.
    pub kv: Option<Stores>,
    /// What the node runs.
    pub status: StatusOf,
    /// Whom it lets in.
    pub access: Access,
    /// What it gives the node's peers.
    pub shelf: Option<Shelf>,
}

impl AdminParts {
    fn mesh(&self) -> Option<Kv> {
        self.kv.as_ref()?.mesh().kv()
    }
}

/// The status as the control plane is told it, and what only operators see.
#[derive(Debug, Serialize)]
struct Shown {
    #[serde(flatten)]
    status: Status,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    kv_backends: Vec<BackendStatus>,
}

/// Why the listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum AdminError {
    /// Anybody could reach it.
    #[error("admin listener without TLS on {address}, which is not loopback")]
    Open {
        /// Where it would have been.
        address: SocketAddr,
    },
    /// The socket can't be had.
    #[error("listen on {address} (admin)")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

/// The open listener. Dropping it cuts everything off.
#[derive(Debug)]
pub struct Admin {
    address: SocketAddr,
    stop: CancellationToken,
    tasks: JoinSet<()>,
}

impl Admin {
    /// Opens the listener. It answers when this returns.
    ///
    /// # Errors
    /// [`AdminError`].
    pub async fn bind(
        address: SocketAddr,
        tls: Option<Arc<ServerConfig>>,
        parts: AdminParts,
    ) -> Result<Self, AdminError> {
        if tls.is_none() && !address.ip().is_loopback() {
            return Err(AdminError::Open { address });
        }
        let failed = |source| AdminError::Bind { address, source };
        let listener = TcpListener::bind(address).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let stop = CancellationToken::new();
        let mut tasks = JoinSet::new();
        tasks.spawn(accept(listener, tls.map(TlsAcceptor::from), parts, stop.clone()));
        Ok(Self { address, stop, tasks })
    }

    /// Where it is.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Accepts no more, lets what is under way end until `deadline`, and cuts off the rest.
    pub async fn drain(mut self, deadline: Instant) {
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout_at(deadline.into(), all).await;
        self.tasks.shutdown().await;
    }
}

async fn accept(listener: TcpListener, tls: Option<TlsAcceptor>, parts: AdminParts, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let mut dearth = Dearth::at("admin");
    let peers = Arc::new(Semaphore::new(PEERS_MAX));
    loop {
        // Every branch may be dropped: each of the three futures loses nothing.
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((tcp, client)) => {
                    let (tls, parts, stop, peers) = (tls.clone(), parts.clone(), stop.clone(), Arc::clone(&peers));
                    connections.spawn(async move {
                        if let Err(error) = connection(tcp, tls, parts, (stop, peers)).await {
                            tracing::debug!(%client, error = format!("{error:#}"), "admin connection ended");
                        }
                    });
                }
                Err(error) => dearth.pause(&error).await,
            },
        }
    }
    drop(listener);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    tcp: TcpStream,
    tls: Option<TlsAcceptor>,
    parts: AdminParts,
    (stop, peers): (CancellationToken, Arc<Semaphore>),
) -> anyhow::Result<()> {
    let Some(tls) = tls else { return speak(tcp, Caller::Local, parts, stop).await };
    let stream = timeout(HEAD_MAX, tls.accept(tcp)).await??;
    let caller = match peer_of(stream.get_ref().1.peer_certificates())? {
        Some(Role::Operator { name }) => Caller::Operator(name),
        Some(Role::Node { node, .. }) => Caller::Peer(node),
        Some(Role::ControlPlane) | None => Caller::Stranger,
    };
    let _place = match caller {
        Caller::Peer(_) => Some(peers.try_acquire()?),
        _ => None,
    };
    speak(stream, caller, parts, stop).await
}

/// Who asks.
#[derive(Debug, Clone)]
enum Caller {
    /// Somebody on this machine.
    Local,
    /// An operator, by certificate. What it may do is looked up for each request.
    Operator(OperatorName),
    /// Another node.
    Peer(NodeName),
    /// Anybody else.
    Stranger,
}

async fn speak(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    caller: Caller,
    parts: AdminParts,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let service = service_fn(move |request| {
        let (caller, parts) = (caller.clone(), parts.clone());
        async move { Ok::<_, Infallible>(answer(&caller, &parts, request).await) }
    });
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_MAX).max_header_size(HEAD_BYTES_MAX);
    let mut connection = pin!(builder.serve_connection(TokioIo::new(stream), service));
    // The connection is polled by reference: nothing of it is lost when the other branch wins.
    tokio::select! {
        ended = connection.as_mut() => return Ok(ended?),
        () = stop.cancelled() => connection.as_mut().graceful_shutdown(),
    }
    Ok(connection.await?)
}

/// An answer of this listener.
type Answer = Response<Full<Bytes>>;

/// What was wrong with a request, for people and programs.
#[derive(Debug, Serialize)]
struct Refusal<'a> {
    error: &'a str,
    hint: &'a str,
}

fn refuse(status: StatusCode, error: &str, hint: &str) -> Answer {
    json(status, &Refusal { error, hint })
}

fn json(status: StatusCode, value: &impl Serialize) -> Answer {
    let text = serde_json::to_vec(value).expect("documents here have string keys and plain values");
    plain(status, HeaderValue::from_static("application/json"), text)
}

fn plain(status: StatusCode, kind: HeaderValue, body: impl Into<Bytes>) -> Answer {
    let mut response = Response::new(Full::new(body.into()));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, kind);
    response
}

fn text(status: StatusCode, body: &'static str) -> Answer {
    plain(status, HeaderValue::from_static("text/plain; charset=utf-8"), body)
}

async fn answer(caller: &Caller, admin: &AdminParts, request: Request<Incoming>) -> Answer {
    match caller {
        Caller::Stranger => {
            let hint = "use a certificate of an operator";
            return refuse(StatusCode::FORBIDDEN, "not allowed", hint);
        }
        Caller::Peer(node) => {
            return match &admin.shelf {
                Some(shelf) => shelf.answer(node, &request).await,
                None => refuse(StatusCode::FORBIDDEN, "not allowed", "use a certificate of an operator"),
            };
        }
        Caller::Local if !is_local(request.headers()) => {
            return refuse(StatusCode::FORBIDDEN, "not allowed", "ask by loopback address, not from a web page");
        }
        Caller::Local => {}
        Caller::Operator(name) => {
            let (method, path) = (request.method(), request.uri().path());
            if let Err(refused) = admin.access.admit(name, method, path) {
                tracing::warn!(target: "audit", operator = %name, %method, path, reason = %refused, "refused");
                return refuse(StatusCode::FORBIDDEN, &refused.to_string(), refused.hint());
            }
            tracing::info!(operator = %name, %method, path, "admin request");
        }
    }
    let path = request.uri().path().to_owned();
    match (request.method(), path.as_str()) {
        (&Method::GET, "/healthz") => text(StatusCode::OK, "ok\n"),
        (&Method::GET, "/readyz") if admin.parts.is_ready() && admin.mesh().is_none_or(|kv| kv.is_ready()) => {
            text(StatusCode::OK, "ready\n")
        }
        (&Method::GET, "/readyz") => text(StatusCode::SERVICE_UNAVAILABLE, "not ready\n"),
        (&Method::GET, "/metrics") => {
            if let Some(kv) = admin.mesh() {
                kv::measure(&kv, &admin.parts.metrics);
            }
            for backend in admin.kv.iter().flat_map(Stores::status) {
                admin.parts.metrics.kv_backend(&backend);
            }
            plain(StatusCode::OK, EXPOSITION, admin.parts.metrics.text())
        }
        (&Method::GET, "/status") => {
            let backends = admin.kv.iter().flat_map(Stores::status).collect();
            json(StatusCode::OK, &Shown { status: (admin.status)(), kv_backends: backends })
        }
        (_, "/healthz" | "/readyz" | "/metrics" | "/status") => {
            refuse(StatusCode::METHOD_NOT_ALLOWED, "method", "use GET")
        }
        (method, path) if admin.kv.is_some() && path.starts_with("/placements") => {
            match (admin.mesh(), path.strip_prefix("/placements")) {
                (Some(kv), Some(rest)) => kv::placements(&kv, rest, method),
                _ => kv::away(),
            }
        }
        (method, path) if admin.kv.is_some() && path.starts_with("/homes") => {
            match (admin.mesh(), path.strip_prefix("/homes")) {
                (Some(kv), Some(rest)) => kv::homes(&kv, rest, method),
                _ => kv::away(),
            }
        }
        (_, path) => match (&admin.kv, path.strip_prefix("/kv/"), path.strip_prefix("/peers")) {
            (_, None, None) => refuse(
                StatusCode::NOT_FOUND,
                "no such path",
                "see /status, /metrics, /kv/, /homes, /placements, /peers",
            ),
            (None, ..) => refuse(StatusCode::NOT_FOUND, "no KV", "this node runs without KV"),
            (Some(stores), Some(rest), _) => kv::answer(stores, rest, request).await,
            (Some(_), None, Some(rest)) => match admin.mesh() {
                Some(kv) => kv::peers(&kv, rest, request).await,
                None => kv::away(),
            },
        },
    }
}

/// A web page can make a browser ask loopback addresses, but not without Origin on anything that changes something, nor
/// under another name than its own.
fn is_local(fields: &HeaderMap) -> bool {
    let Some(host) = fields.get(HOST).and_then(|host| host.to_str().ok()) else { return false };
    let name = match host.parse::<SocketAddr>() {
        Ok(address) => return address.ip().is_loopback() && !fields.contains_key(ORIGIN),
        Err(_) => host.rsplit_once(':').map_or(host, |(name, _)| name),
    };
    let loopback = name == "localhost" || name.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback());
    loopback && !fields.contains_key(ORIGIN)
}
