//! Opens connections of one target and protocol, and owns the tasks that drive them.

use std::future::Future;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::QuicClientConfig;
use rustls::{ClientConfig, RootCertStore};
use rustls_pki_types::ServerName;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

use crate::error::{ConnectError, LoadError};
use crate::options::{Protocol, Scheme, Target};

/// After a failed attempt the next one of the same target and protocol waits this long. Requests that need it
/// earlier fail at once, so that a target that is down is not hammered with handshakes.
const REOPEN_PAUSE: Duration = Duration::from_millis(100);
/// Keeps an idle QUIC connection from running into the idle timeout, as TCP needs no such thing.
const QUIC_KEEP_ALIVE: Duration = Duration::from_secs(5);

/// TLS settings per protocol.
#[derive(Debug)]
pub(super) struct Tls {
    h1: Arc<ClientConfig>,
    h2: Arc<ClientConfig>,
    quic: quinn::ClientConfig,
}

impl Tls {
    pub(super) fn new(roots: &Arc<RootCertStore>) -> Result<Tls, rustls::Error> {
        let h3 = config(roots, Protocol::H3)?;
        let h3 = QuicClientConfig::try_from(h3).map_err(|error| rustls::Error::General(error.to_string()))?;
        let mut quic = quinn::ClientConfig::new(Arc::new(h3));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(QUIC_KEEP_ALIVE));
        quic.transport_config(Arc::new(transport));
        Ok(Tls { h1: Arc::new(config(roots, Protocol::H1)?), h2: Arc::new(config(roots, Protocol::H2)?), quic })
    }
}

fn config(roots: &Arc<RootCertStore>, protocol: Protocol) -> Result<ClientConfig, rustls::Error> {
    let versions = match protocol {
        Protocol::H1 | Protocol::H2 => rustls::DEFAULT_VERSIONS,
        Protocol::H3 => &[&rustls::version::TLS13],
    };
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let mut config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(versions)?
        .with_root_certificates(Arc::clone(roots))
        .with_no_client_auth();
    config.alpn_protocols = vec![protocol.alpn().to_vec()];
    Ok(config)
}

/// The tasks that drive open connections. Dropping it ends them all.
#[derive(Debug, Default)]
pub(super) struct Drivers {
    tasks: Mutex<JoinSet<()>>,
}

impl Drivers {
    pub(super) fn spawn(&self, driver: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.lock();
        while tasks.try_join_next().is_some() {}
        tasks.spawn(driver);
    }

    /// Waits for all to end by themselves, then ends the rest.
    pub(super) async fn finish(&self, patience: Duration) {
        let mut tasks = std::mem::take(&mut *self.lock());
        let all = async { while tasks.join_next().await.is_some() {} };
        let _ = tokio::time::timeout(patience, all).await;
    }

    fn lock(&self) -> MutexGuard<'_, JoinSet<()>> {
        // Nothing in this file panics while it holds the lock.
        self.tasks.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A stream to speak HTTP/1.1 or HTTP/2 on.
pub(super) enum Stream {
    Plain(TcpStream),
    Tls(Box<TlsStream<TcpStream>>),
}

/// Opens connections to one target over one protocol.
#[derive(Debug)]
pub(super) struct Opener {
    target: Target,
    protocol: Protocol,
    name: ServerName<'static>,
    tls: Arc<ClientConfig>,
    quic: quinn::ClientConfig,
    drivers: Arc<Drivers>,
    /// Time for one connection to be ready for requests.
    open_max: Duration,
    failed_at: Mutex<Option<Instant>>,
    opened: AtomicU64,
    failed: AtomicU64,
}

impl Opener {
    pub(super) fn new(
        target: Target,
        protocol: Protocol,
        tls: &Tls,
        drivers: Arc<Drivers>,
        open_max: Duration,
    ) -> Result<Opener, LoadError> {
        let name =
            ServerName::try_from(target.host.clone()).map_err(|_| LoadError::Host { host: target.host.clone() })?;
        let config = if protocol == Protocol::H1 { &tls.h1 } else { &tls.h2 };
        Ok(Opener {
            target,
            protocol,
            name,
            tls: Arc::clone(config),
            quic: tls.quic.clone(),
            drivers,
            open_max,
            failed_at: Mutex::new(None),
            opened: AtomicU64::new(0),
            failed: AtomicU64::new(0),
        })
    }

    pub(super) fn target(&self) -> &Target {
        &self.target
    }

    pub(super) fn protocol(&self) -> Protocol {
        self.protocol
    }

    pub(super) fn quic(&self) -> quinn::ClientConfig {
        self.quic.clone()
    }

    pub(super) fn drivers(&self) -> &Drivers {
        &self.drivers
    }

    pub(super) fn opened(&self) -> u64 {
        self.opened.load(Ordering::Relaxed)
    }

    pub(super) fn failed(&self) -> u64 {
        self.failed.load(Ordering::Relaxed)
    }

    pub(super) fn unreachable(&self, source: ConnectError) -> LoadError {
        LoadError::Unreachable { target: self.target.to_string(), protocol: self.protocol, source }
    }

    /// Runs one attempt to open a connection, inside of its time, unless the last one failed just now.
    pub(super) async fn attempt<T>(
        &self,
        opening: impl Future<Output = Result<T, ConnectError>>,
    ) -> Result<T, ConnectError> {
        let last = *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner);
        if last.is_some_and(|at| at.elapsed() < REOPEN_PAUSE) {
            return Err(ConnectError::Pause { ms: REOPEN_PAUSE.as_millis() });
        }
        let opened = tokio::time::timeout(self.open_max, opening)
            .await
            .unwrap_or(Err(ConnectError::Timeout { ms: self.open_max.as_millis() }));
        let failed_at = opened.is_err().then(Instant::now);
        let counter = if failed_at.is_some() { &self.failed } else { &self.opened };
        counter.fetch_add(1, Ordering::Relaxed);
        *self.failed_at.lock().unwrap_or_else(PoisonError::into_inner) = failed_at;
        opened
    }

    /// A TCP stream, inside TLS if the target is https; with TLS the protocol was agreed on by ALPN.
    pub(super) async fn stream(&self) -> Result<Stream, ConnectError> {
        let tcp = TcpStream::connect(self.target.addr).await.map_err(ConnectError::Tcp)?;
        tcp.set_nodelay(true).map_err(ConnectError::Tcp)?;
        if self.target.scheme == Scheme::Http {
            return Ok(Stream::Plain(tcp));
        }
        let connector = TlsConnector::from(Arc::clone(&self.tls));
        let stream = connector.connect(self.name.clone(), tcp).await.map_err(ConnectError::Tls)?;
        let agreed = match stream.get_ref().1.alpn_protocol() {
            Some(agreed) => agreed == self.protocol.alpn(),
            // A server without ALPN speaks HTTP/1.1; HTTP/2 must be agreed on (RFC 9113 3.2).
            None => self.protocol == Protocol::H1,
        };
        if agreed { Ok(Stream::Tls(Box::new(stream))) } else { Err(ConnectError::Alpn { wanted: self.protocol }) }
    }
}
