//! Sockets and HTTP versions. Nothing outside of this folder knows which version carried a request.
//!
//! One task per listener accepts; each connection is a task of its own, owned by its listener's. On drain a listener
//! accepts no more, tells its clients (GOAWAY, `connection: close`) and waits; at the deadline what is left is cut off.

pub(crate) mod sockets;
pub(crate) mod steer;

pub(crate) mod dearth;

mod handshakes;
mod source;

mod tcp;
mod tls;
mod tokens;

mod gathered;
mod proxy;
mod stream;

mod h1;
mod h2;

mod activity;
mod crowd;
mod drive;
mod patience;
mod tasks;

mod quic;

mod h3;

mod body;
pub(crate) mod head;

mod forwarded;

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use http::HeaderValue;
use selvage_certs::{FrontServers, FrontTls, quic_server};
use tokio::net::TcpListener;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use self::handshakes::Handshakes;
use self::sockets::{Sockets, UdpGroup};
use self::source::Sources;
use crate::serve::Parts;

/// Bytes of one request's body that may wait unread.
const STREAM_WINDOW_BYTES: u32 = 64 * 1024;
/// Bytes of all bodies of a connection that may wait unread.
const CONNECTION_WINDOW_BYTES: u32 = 1024 * 1024;
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
    handshakes: Arc<Handshakes>,
    stop: CancellationToken,
    quic: Vec<quinn::Endpoint>,
    tasks: JoinSet<()>,
    /// Once more, for a successor.
    sockets: Sockets,
    /// What is shown over TCP.
    servers: Option<Arc<FrontServers>>,
}

impl Listeners {
    /// Opens the listeners. They answer when this returns.
    ///
    /// # Errors
    /// [`ListenError`], with nothing left open.
    pub async fn bind(options: &ListenOptions, parts: Arc<Parts>) -> Result<Self, ListenError> {
        Self::open(options, Sockets::default(), parts).await
    }

    /// The same, on sockets of the node that ran before, as far as they are where they are wanted.
    pub(crate) async fn open(
        options: &ListenOptions,
        inherited: Sockets,
        parts: Arc<Parts>,
    ) -> Result<Self, ListenError> {
        let tls = match (options.https, &options.tls) {
            (Some(_), None) => return Err(ListenError::Certificates),
            (_, tls) => tls.as_ref(),
        };
        let sockets = inherited.bind(options)?;
        let mut listeners = Self {
            https: None,
            http: None,
            sources: Arc::new(Sources::new(&parts.front)),
            handshakes: Arc::new(Handshakes::new(parts.front.handshakes_max)),
            parts,
            stop: CancellationToken::new(),
            quic: Vec::new(),
            tasks: JoinSet::new(),
            sockets: Sockets::default(),
            servers: None,
        };
        if let (Some(listener), Some(tls)) = (&sockets.https, tls) {
            listeners.https = Some(listeners.open_https(listener, sockets.quic.as_ref(), tls)?);
        }
        if let Some(listener) = &sockets.http {
            let (listener, local) = listening(listener)?;
            listeners.http = Some(local);
            let listening = listeners.listening_to(tcp::Kind::Plain);
            listeners.tasks.spawn(tcp::accept(listener, listening, listeners.stop.clone()));
        }
        listeners.sockets = sockets;
        Ok(listeners)
    }

    fn open_https(
        &mut self,
        tcp: &std::net::TcpListener,
        udp: Option<&UdpGroup>,
        front: &FrontTls,
    ) -> Result<SocketAddr, ListenError> {
        let servers = Arc::new(FrontServers::new(front, &[b"h2", b"http/1.1"]).map_err(ListenError::Tls)?);
        self.servers = Some(Arc::clone(&servers));
        let h3 = quic_server(front).map_err(ListenError::Tls)?;
        let mut quic = quic::server_config(h3, &front.secret, &self.parts.front)?;
        if front.has_early_data {
            quic.validation_token_config(tokens::config());
        }
        let (listener, local) = listening(tcp)?;
        let alt_svc = format!("h3=\":{}\"; ma={ALT_SVC_SECONDS}", local.port());
        let alt_svc = HeaderValue::try_from(alt_svc).expect("digits and ASCII text");
        let listening = self.listening_to(tcp::Kind::Tls { servers, alt_svc });
        self.tasks.spawn(tcp::accept(listener, listening, self.stop.clone()));
        if let Some(udp) = udp {
            let unbound = |source| ListenError::Bind { address: local, transport: "UDP", source };
            self.quic = quic::endpoints(&quic, &front.secret, udp).map_err(unbound)?;
        }
        for endpoint in &self.quic {
            let listening = quic::Listening {
                parts: Arc::clone(&self.parts),
                sources: Arc::clone(&self.sources),
                handshakes: Arc::clone(&self.handshakes),
                connections_max: (self.parts.front.connections_max as usize).div_ceil(self.quic.len()),
                has_early_data: front.has_early_data,
            };
            self.tasks.spawn(quic::accept(endpoint.clone(), listening, self.stop.clone()));
        }
        Ok(local)
    }

    fn listening_to(&self, kind: tcp::Kind) -> tcp::Listening {
        let (parts, sources) = (Arc::clone(&self.parts), Arc::clone(&self.sources));
        tcp::Listening { kind, parts, sources, handshakes: Arc::clone(&self.handshakes) }
    }

    /// The sockets, for a successor.
    pub(crate) fn sockets(&self) -> &Sockets {
        &self.sockets
    }

    /// What the listener for TLS over TCP shows and asks for, if there is one.
    pub fn servers(&self) -> Option<Arc<FrontServers>> {
        self.servers.clone()
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
        // If nobody else has them, the system refuses connections as soon as those who accept let go.
        self.sockets = Sockets::default();
        self.stop.cancel();
        let all = async { while self.tasks.join_next().await.is_some() {} };
        let in_time = tokio::time::timeout_at(deadline.into(), all).await;
        if in_time.is_err() {
            tracing::warn!("requests were cut off at the end of the drain");
        }
        self.tasks.shutdown().await;
        for endpoint in self.quic {
            endpoint.close(h3::Code::NoError.into(), b"");
            let _ = tokio::time::timeout(FAREWELL_MAX, endpoint.wait_idle()).await;
        }
    }
}

/// A listener for tasks, and where it is.
fn listening(listener: &std::net::TcpListener) -> Result<(TcpListener, SocketAddr), ListenError> {
    let address = listener.local_addr().unwrap_or(SocketAddr::from(([0, 0, 0, 0], 0)));
    let opened = listener.try_clone().and_then(TcpListener::from_std);
    let opened = opened.map_err(|source| ListenError::Bind { address, transport: "TCP", source })?;
    Ok((opened, address))
}
