//! The listener: TLS, then HTTP/1.1 or HTTP/2 as the client chose by ALPN.

use std::collections::BTreeMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use hyper::body::Incoming;
use hyper::service::{Service as _, service_fn};
use hyper_util::rt::{TokioExecutor, TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use rustls::ServerConfig;
use selvage_certs::{ClientAuth, FileError, Identity, TlsError, mutual_server, peer_of, roots_from_pem};
use selvage_config::node::IdentityFiles;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;

use crate::access::Peer;
use crate::{DRAIN, StartError};

/// Connections at once; further ones wait in the system's queue.
const CONNECTIONS_MAX: usize = 8_192;
/// Connections at once from one address; further ones are closed.
const CONNECTIONS_PER_ADDRESS: usize = 2_048;
/// Longest TLS handshake.
const HANDSHAKE: Duration = Duration::from_secs(10);
/// Longest wait for a request's head, on a quiet HTTP/1.1 connection too.
const HEAD: Duration = Duration::from_secs(60);
/// Bytes of a request's head.
const HEAD_BYTES: usize = 64 * 1024;
/// After this long a connection takes no more requests, so that no certificate is believed for ever.
const LIFE: Duration = Duration::from_secs(3_600);
/// The same for those that showed no certificate.
const LIFE_ANONYMOUS: Duration = Duration::from_secs(600);
/// Requests under way at once on one HTTP/2 connection.
const STREAMS: u32 = 128;
/// How much an HTTP/2 client may send ahead, bytes: on one stream, and on the connection.
const WINDOW: (u32, u32) = (1024 * 1024, 4 * 1024 * 1024);
/// How often a quiet HTTP/2 connection is asked whether it lives, and how long it may take to say so.
const PING: Duration = Duration::from_secs(20);
/// How often the identity's files are read again: its certificates live for days.
const RELOAD: Duration = Duration::from_secs(5);
/// Pause after the system refused a connection, mostly for want of file descriptors.
const REFUSED_PAUSE: Duration = Duration::from_millis(100);

/// What the listener shows, and where that is read from.
pub(crate) struct Tls {
    files: IdentityFiles,
    shown: Identity,
    config: Arc<ServerConfig>,
}

impl Tls {
    /// Reads the identity and the roots.
    pub(crate) fn load(files: IdentityFiles) -> Result<Self, StartError> {
        let shown = Identity::load(&files.certificate, &files.key)?;
        let config = server_config(&shown, &files)?;
        Ok(Self { files, shown, config })
    }

    /// Reads them again. When they can't be used the last good ones stay.
    fn reload(mut self) -> Self {
        let fresh = Identity::load(&self.files.certificate, &self.files.key).map_err(StartError::from);
        let read = fresh.and_then(|identity| Ok((server_config(&identity, &self.files)?, identity)));
        match read {
            Ok((config, identity)) => {
                if identity != self.shown {
                    tracing::info!("a new identity is shown");
                }
                (self.config, self.shown) = (config, identity);
            }
            Err(error) => tracing::warn!(error = %chain(&error), "the identity was not read again"),
        }
        self
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    let source = error.source().map(|source| format!(": {source}")).unwrap_or_default();
    format!("{error}{source}")
}

fn server_config(identity: &Identity, files: &IdentityFiles) -> Result<Arc<ServerConfig>, StartError> {
    let roots = roots_from_pem(&files.roots).map_err(|error: FileError| StartError::from(error))?;
    let config =
        mutual_server(identity, &roots, ClientAuth::Optional).map_err(|error: TlsError| StartError::from(error))?;
    let mut config = (*config).clone();
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    Ok(Arc::new(config))
}

/// Takes connections until `stopping` says so, then lets those under way end for at most [`DRAIN`].
pub(crate) async fn run(listener: TcpListener, tls: Tls, router: Router, stopping: watch::Receiver<bool>) {
    let places = Arc::new(Semaphore::new(CONNECTIONS_MAX));
    let addresses = Addresses::default();
    let mut told = stopping.clone();
    let mut connections = JoinSet::new();
    let mut config = Arc::clone(&tls.config);
    let mut reloading = None;
    let mut tls = Some(tls);
    let mut tick = interval(RELOAD);
    tick.set_missed_tick_behavior(MissedTickBehavior::Delay);
    tick.reset();
    loop {
        let accept = async {
            let place = Arc::clone(&places).acquire_owned().await.expect("the semaphore is never closed");
            (listener.accept().await, place)
        };
        // `accept` loses at most a place that it gives back; the others only wait.
        tokio::select! {
            (accepted, place) = accept => match accepted {
                Ok((stream, address)) => {
                    let Some(counted) = addresses.enter(address.ip()) else { continue };
                    let conversation = converse(stream, address, Arc::clone(&config), router.clone(), stopping.clone());
                    connections.spawn(async move {
                        conversation.await;
                        drop((place, counted));
                    });
                }
                Err(error) => {
                    tracing::warn!(%error, "a connection was not taken");
                    sleep(REFUSED_PAUSE).await;
                }
            },
            Some(_) = connections.join_next() => {}
            _ = tick.tick(), if tls.is_some() => {
                reloading = tls.take().map(|tls| tokio::task::spawn_blocking(move || tls.reload()));
            }
            fresh = async { reloading.as_mut().expect("guarded").await }, if reloading.is_some() => {
                reloading = None;
                if let Ok(fresh) = fresh {
                    config = Arc::clone(&fresh.config);
                    tls = Some(fresh);
                }
            }
            () = stopped(&mut told) => break,
        }
    }
    drop(listener);
    let ended = timeout(DRAIN, async { while connections.join_next().await.is_some() {} }).await;
    if ended.is_err() {
        tracing::warn!(connections = connections.len(), "connections were cut off");
    }
    connections.shutdown().await;
}

/// Returns once the control plane stops, or is gone.
async fn stopped(stopping: &mut watch::Receiver<bool>) {
    let _ = stopping.wait_for(|stopping| *stopping).await;
}

/// One connection, from its handshake to its end.
async fn converse(
    stream: TcpStream,
    address: SocketAddr,
    config: Arc<ServerConfig>,
    router: Router,
    mut stopping: watch::Receiver<bool>,
) {
    // Answers are small and awaited: a delayed one is a slow one.
    let _ = stream.set_nodelay(true);
    let stream = match timeout(HANDSHAKE, TlsAcceptor::from(config).accept(stream)).await {
        Ok(Ok(stream)) => stream,
        Ok(Err(error)) => return tracing::debug!(%address, %error, "handshake failed"),
        Err(_) => return tracing::debug!(%address, "handshake took too long"),
    };
    let session = stream.get_ref().1;
    let role = match peer_of(session.peer_certificates()) {
        Ok(role) => role,
        Err(error) => return tracing::warn!(%address, %error, "a certificate names nobody"),
    };
    let life = if role.is_some() { LIFE } else { LIFE_ANONYMOUS };
    let is_h2 = session.alpn_protocol() == Some(b"h2");
    let peer = Peer { address, role };
    let router = TowerToHyperService::new(router);
    let service = service_fn(move |mut request: http::Request<Incoming>| {
        request.extensions_mut().insert(peer.clone());
        router.call(request.map(Body::new))
    });
    let over = async {
        let _ = timeout(life, stopped(&mut stopping)).await;
    };
    let io = TokioIo::new(stream);
    // Both kinds of connection: once it is over, what is under way ends and nothing new is taken.
    macro_rules! until_over {
        ($connection:expr) => {{
            let mut connection = std::pin::pin!($connection);
            tokio::select! {
                ended = connection.as_mut() => ended,
                () = over => {
                    connection.as_mut().graceful_shutdown();
                    connection.await
                }
            }
        }};
    }
    let ended = if is_h2 {
        let mut http2 = hyper::server::conn::http2::Builder::new(TokioExecutor::new());
        http2
            .timer(TokioTimer::new())
            .max_concurrent_streams(STREAMS)
            .max_header_list_size(u32::try_from(HEAD_BYTES).unwrap_or(u32::MAX))
            .initial_stream_window_size(WINDOW.0)
            .initial_connection_window_size(WINDOW.1)
            .keep_alive_interval(PING)
            .keep_alive_timeout(PING);
        until_over!(http2.serve_connection(io, service))
    } else {
        let mut http1 = hyper::server::conn::http1::Builder::new();
        http1.timer(TokioTimer::new()).header_read_timeout(HEAD).max_buf_size(HEAD_BYTES);
        until_over!(http1.serve_connection(io, service))
    };
    if let Err(error) = ended {
        tracing::debug!(%address, %error, "connection ended");
    }
}

/// How many connections each address has.
#[derive(Debug, Clone, Default)]
struct Addresses(Arc<Mutex<BTreeMap<IpAddr, usize>>>);

/// One counted connection.
struct Counted {
    addresses: Addresses,
    address: IpAddr,
}

impl Addresses {
    fn enter(&self, address: IpAddr) -> Option<Counted> {
        let mut counts = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let count = counts.entry(address).or_default();
        if *count >= CONNECTIONS_PER_ADDRESS {
            return None;
        }
        *count += 1;
        Some(Counted { addresses: self.clone(), address })
    }
}

impl Drop for Counted {
    fn drop(&mut self) {
        let mut counts = self.addresses.0.lock().unwrap_or_else(PoisonError::into_inner);
        match counts.get_mut(&self.address) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                counts.remove(&self.address);
            }
        }
    }
}
