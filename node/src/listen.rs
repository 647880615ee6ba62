//! Sockets and HTTP versions. Nothing outside of this folder knows which version carried a request.
//!
//! One task per listener accepts; each connection is a task of its own, owned by its listener's. On drain a listener
//! accepts no more, tells its clients (GOAWAY, `connection: close`) and waits; at the deadline what is left is cut off.

mod source;

mod tcp;

mod proxy;
mod stream;

mod h1;
mod h2;

mod activity;
mod drive;
mod patience;
mod tasks;

mod quic;

mod h3;

mod body;
pub(crate) mod head;

mod forwarded;

use std::io;
use std::net::{SocketAddr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::HeaderValue;
use selvage_certs::{FrontTls, TlsVersions, front_server};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use self::source::Sources;
use crate::serve::Parts;

/// Time for a handshake of QUIC.
const HANDSHAKE_MAX: Duration = Duration::from_secs(10);
/// Time for a request's head over QUIC.
const HEAD_MAX: Duration = Duration::from_secs(10);
/// Bytes of a request's head over QUIC.
const HEAD_BYTES_MAX: u32 = 16 * 1024;
/// Requests that one connection of HTTP/3 may have under way.
const STREAMS_MAX: u32 = 100;
/// Bytes of one request's body that may wait unread.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// Bytes of all bodies of a connection that may wait unread.
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
/// QUIC connections of one listener.
const CONNECTIONS_MAX: usize = 16_384;
/// How often a port is tried that must be free for TCP and UDP alike.
const PORT_TRIES_MAX: usize = 16;
/// Seconds for which clients remember that there is HTTP/3 here.
const ALT_SVC_SECONDS: u32 = 86_400;
/// Time to tell QUIC clients that their connection is over.
const FAREWELL_MAX: Duration = Duration::from_secs(1);

/// Where to listen.
#[derive(Debug, Clone, Default)]
pub struct ListenOptions {
    /// HTTP/1.1 and 2 over TLS on TCP, HTTP/3 on UDP. Needs `tls`.
    pub https: Option<SocketAddr>,
    /// HTTP/1.1, and HTTP/2 with prior knowledge, without TLS.
    pub http: Option<SocketAddr>,
    /// Certificates and keys.
    pub tls: Option<FrontTls>,
}

/// Why a listener could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// A socket can't be had.
    #[error("listen on {address} ({transport})")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// TCP or UDP.
        transport: &'static str,
        /// What the system said.
        source: io::Error,
    },
    /// There is an address for TLS, but no certificates.
    #[error("listener for https has no certificates")]
    Certificates,
    /// TLS can't be set up.
    #[error("set up TLS")]
    Tls(#[source] selvage_certs::TlsError),
    /// TLS can't be set up for QUIC.
    #[error("set up TLS for QUIC")]
    Quic(#[source] quinn::crypto::rustls::NoInitialCipherSuite),
}

/// Open listeners. Dropping them cuts everything off.
#[derive(Debug)]
pub struct Listeners {
    https: Option<SocketAddr>,
    http: Option<SocketAddr>,
    parts: Arc<Parts>,
    sources: Arc<Sources>,
    stop: CancellationToken,
    quic: Option<quinn::Endpoint>,
    tasks: JoinSet<()>,
}

impl Listeners {
    /// Opens the listeners. They answer when this returns.
    ///
    /// # Errors
    /// [`ListenError`], with nothing left open.
    pub async fn bind(options: &ListenOptions, parts: Arc<Parts>) -> Result<Self, ListenError> {
        let mut listeners = Self {
            https: None,
            http: None,
            sources: Arc::new(Sources::new(&parts.front)),
            parts: Arc::clone(&parts),
            stop: CancellationToken::new(),
            quic: None,
            tasks: JoinSet::new(),
        };
        if let Some(address) = options.https {
            let tls = options.tls.as_ref().ok_or(ListenError::Certificates)?;
            listeners.open_https(address, tls, &parts).await?;
        }
        if let Some(address) = options.http {
            let listener = bind_tcp(address).await?;
            listeners.http = Some(local_address(&listener, address)?);
            let (stop, sources) = (listeners.stop.clone(), Arc::clone(&listeners.sources));
            let listening = tcp::Listening { kind: tcp::Kind::Plain, parts, sources };
            listeners.tasks.spawn(tcp::accept(listener, listening, stop));
        }
        Ok(listeners)
    }

    async fn open_https(
        &mut self,
        address: SocketAddr,
        front: &FrontTls,
        parts: &Arc<Parts>,
    ) -> Result<(), ListenError> {
        let alpn: &[&[u8]] = &[b"h2", b"http/1.1"];
        let tls = front_server(front, alpn, front.versions).map_err(ListenError::Tls)?;
        let h3 = front_server(front, &[b"h3"], TlsVersions::Only13).map_err(ListenError::Tls)?;
        let quic = quic::server_config(h3, &front.secret)?;
        let (listener, socket) = bind_both(address).await?;
        let local = local_address(&listener, address)?;
        let unbound = |source| ListenError::Bind { address: local, transport: "UDP", source };
        let endpoint = quic::endpoint(quic, &front.secret, socket).map_err(unbound)?;
        let alt_svc = format!("h3=\":{}\"; ma={ALT_SVC_SECONDS}", local.port());
        let alt_svc = HeaderValue::try_from(alt_svc).expect("digits and ASCII text");
        let kind = tcp::Kind::Tls { acceptor: TlsAcceptor::from(tls), alt_svc };
        let sources = Arc::clone(&self.sources);
        self.tasks.spawn(quic::accept(endpoint.clone(), Arc::clone(parts), sources, self.stop.clone()));
        let sources = Arc::clone(&self.sources);
        let listening = tcp::Listening { kind, parts: Arc::clone(parts), sources };
        self.tasks.spawn(tcp::accept(listener, listening, self.stop.clone()));
        self.https = Some(local);
        self.quic = Some(endpoint);
        Ok(())
    }

    /// Where https is, over TCP and UDP alike.
    pub fn https_addr(&self) -> Option<SocketAddr> {
        self.https
    }

    /// Where http is.
    pub fn http_addr(&self) -> Option<SocketAddr> {
        self.http
    }

    /// Accepts no more, lets what is under way end until `deadline`, and cuts off the rest.
    pub async fn drain(mut self, deadline: Instant) {
        self.parts.begin_drain();
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let in_time = tokio::time::timeout_at(deadline.into(), all).await;
        if in_time.is_err() {
            tracing::warn!("requests were cut off at the end of the drain");
        }
        self.tasks.shutdown().await;
        if let Some(endpoint) = self.quic.take() {
            endpoint.close(h3::Code::NoError.into(), b"");
            let _ = tokio::time::timeout(FAREWELL_MAX, endpoint.wait_idle()).await;
        }
    }
}

async fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let failed = |source| ListenError::Bind { address, transport: "TCP", source };
    TcpListener::bind(address).await.map_err(failed)
}

fn local_address(listener: &TcpListener, asked: SocketAddr) -> Result<SocketAddr, ListenError> {
    listener.local_addr().map_err(|source| ListenError::Bind { address: asked, transport: "TCP", source })
}

/// One port for TCP and UDP. With port 0 the system chooses for TCP, and may choose one that is taken for UDP.
async fn bind_both(address: SocketAddr) -> Result<(TcpListener, UdpSocket), ListenError> {
    let mut tries = if address.port() == 0 { PORT_TRIES_MAX } else { 1 };
    loop {
        let listener = bind_tcp(address).await?;
        let local = local_address(&listener, address)?;
        tries -= 1;
        match UdpSocket::bind(local) {
            Ok(socket) => return Ok((listener, socket)),
            Err(source) if tries == 0 => return Err(ListenError::Bind { address: local, transport: "UDP", source }),
            Err(_) => {}
        }
    }
}
