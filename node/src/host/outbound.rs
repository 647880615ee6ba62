//! Requests that guests send: only to hosts that the app was granted, only to public addresses unless the operator
//! says otherwise, over connections that all guests of the node share.

mod address;

pub(crate) use address::is_public;

use std::error::Error as StdError;
use std::net::{IpAddr, SocketAddr};
use std::path::PathBuf;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Duration;

use bytes::Bytes;
use http::HeaderName;
use http_body::{Frame, SizeHint};
use http_body_util::BodyExt;
use hyper_rustls::{HttpsConnector, HttpsConnectorBuilder};
use hyper_util::client::legacy::Client;
use hyper_util::client::legacy::connect::HttpConnector;
use hyper_util::client::legacy::connect::dns::Name;
use hyper_util::rt::{TokioExecutor, TokioTimer};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject;
use rustls::{ClientConfig, RootCertStore};
use selvage_config::node::Egress as Options;
use tokio::time::{Instant, Sleep};
use wasmtime_wasi_http::p2::bindings::http::types::ErrorCode as ErrorCode2;
use wasmtime_wasi_http::p3::bindings::http::types::ErrorCode as ErrorCode3;
use wasmtime_wasi_http::{DEFAULT_FORBIDDEN_HEADERS, Error, RequestOptions, WasiBody, WasiHttpHooks};

use crate::pool::Grants;

/// Longest time until a connection stands; a guest may ask for less.
const CONNECT_MAX: Duration = Duration::from_secs(10);
/// Longest time from the request until the head of the answer; a guest may ask for less.
const FIRST_BYTE_MAX: Duration = Duration::from_secs(60);
/// Longest silence within the body of an answer; a guest may ask for less.
const BETWEEN_BYTES_MAX: Duration = Duration::from_secs(60);
/// How long an unused connection is kept.
const IDLE: Duration = Duration::from_secs(30);
/// Unused connections kept for each host.
const IDLE_PER_HOST: usize = 32;
/// Addresses of one name that are tried.
const ADDRESSES_MAX: usize = 8;
/// What a guest's outgoing body may hold back in the host: chunks, and bytes of one chunk.
const BODY_CHUNKS: usize = 4;
const BODY_CHUNK_BYTES: usize = 64 * 1024;
/// Fields that no guest sees or sets.
static FORBIDDEN: [HeaderName; 9] = DEFAULT_FORBIDDEN_HEADERS;

/// The way out for all guests of a node.
pub struct Egress {
    client: Client<HttpsConnector<HttpConnector<Resolver>>, WasiBody>,
    private_networks: bool,
}

/// The way out can't be built.
#[derive(Debug, thiserror::Error)]
pub enum EgressError {
    /// A file of authorities can't be read.
    #[error("read authorities in {path}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// A certificate in it can't be an authority.
    #[error("take authorities of {path}")]
    Root {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: rustls::Error,
    },
    /// The TLS library refuses the settings.
    #[error("set up TLS")]
    Tls(#[source] rustls::Error),
}

impl Egress {
    /// Builds the shared client. Opens no connection.
    ///
    /// # Errors
    /// A file of authorities is not to be read.
    pub fn new(options: &Options) -> Result<Self, EgressError> {
        let tls = tls(&options.roots)?;
        let connector = HttpsConnectorBuilder::new().with_tls_config(tls).https_or_http().enable_all_versions();
        let mut builder = Client::builder(TokioExecutor::new());
        builder.pool_timer(TokioTimer::new()).pool_idle_timeout(IDLE).pool_max_idle_per_host(IDLE_PER_HOST);
        let client = builder.build(connector.wrap_connector(http_connector(options.private_networks)));
        Ok(Self { client, private_networks: options.private_networks })
    }

    /// Sends a request whose host was granted.
    async fn send(
        &self,
        request: http::Request<WasiBody>,
        options: RequestOptions,
    ) -> Result<http::Response<WasiBody>, Error> {
        let bounded = |asked: Option<Duration>, max: Duration| asked.map_or(max, |asked| asked.min(max));
        let head = bounded(options.connect_timeout, CONNECT_MAX) + bounded(options.first_byte_timeout, FIRST_BYTE_MAX);
        let silence = bounded(options.between_bytes_timeout, BETWEEN_BYTES_MAX);
        let response = tokio::time::timeout(head, self.client.request(request)).await;
        let response = response.map_err(|_| Error::HttpResponseTimeout)?.map_err(|error| told(&error))?;
        Ok(response.map(|body| Incoming { body, silence, sleep: None }.boxed_unsync()))
    }
}

fn http_connector(private_networks: bool) -> HttpConnector<Resolver> {
    let mut connector = HttpConnector::new_with_resolver(Resolver { private_networks });
    connector.enforce_http(false);
    connector.set_nodelay(true);
    connector.set_connect_timeout(Some(CONNECT_MAX));
    connector
}

/// The public authorities and those in `files`.
fn tls(files: &[PathBuf]) -> Result<ClientConfig, EgressError> {
    let mut roots = RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() };
    for path in files {
        let read = |source| EgressError::Roots { path: path.clone(), source };
        for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
            let certificate = certificate.map_err(read)?;
            roots.add(certificate).map_err(|source| EgressError::Root { path: path.clone(), source })?;
        }
    }
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ClientConfig::builder_with_provider(provider).with_safe_default_protocol_versions();
    Ok(builder.map_err(EgressError::Tls)?.with_root_certificates(roots).with_no_client_auth())
}

/// Resolves names to addresses that may be connected to, and to no others: what was checked is what is used, so a name
/// that changes its mind (DNS rebinding) gains nothing.
#[derive(Clone)]
struct Resolver {
    private_networks: bool,
}

#[derive(Debug, thiserror::Error)]
enum ResolveError {
    #[error("address is not public")]
    Prohibited,
    #[error("name does not resolve")]
    Unknown(#[source] std::io::Error),
}

impl tower_service::Service<Name> for Resolver {
    type Response = std::vec::IntoIter<SocketAddr>;
    type Error = ResolveError;
    type Future = Pin<Box<dyn Future<Output = Result<Self::Response, ResolveError>> + Send>>;

    fn poll_ready(&mut self, _: &mut Context<'_>) -> Poll<Result<(), ResolveError>> {
        Poll::Ready(Ok(()))
    }

    fn call(&mut self, name: Name) -> Self::Future {
        let private_networks = self.private_networks;
        Box::pin(async move {
            let found = tokio::net::lookup_host((name.as_str(), 0)).await.map_err(ResolveError::Unknown)?;
            let may = |at: &SocketAddr| private_networks || is_public(at.ip());
            let addresses: Vec<SocketAddr> = found.filter(may).take(ADDRESSES_MAX).collect();
            if addresses.is_empty() { Err(ResolveError::Prohibited) } else { Ok(addresses.into_iter()) }
        })
    }
}

/// What a guest hears of a failure.
fn told(error: &hyper_util::client::legacy::Error) -> Error {
    let mut cause: Option<&(dyn StdError + 'static)> = Some(error);
    while let Some(error) = cause {
        match error.downcast_ref() {
            Some(ResolveError::Prohibited) => return Error::DestinationIpProhibited,
            Some(ResolveError::Unknown(_)) => return Error::DnsError { rcode: None, info_code: None },
            None => {}
        }
        if let Some(tls) = error.downcast_ref::<rustls::Error>() {
            return told_tls(tls);
        }
        if let Some(hyper) = error.downcast_ref::<hyper::Error>() {
            return told_hyper(hyper);
        }
        let io = error.downcast_ref::<std::io::Error>();
        match io.map(std::io::Error::kind) {
            Some(std::io::ErrorKind::ConnectionRefused) => return Error::ConnectionRefused,
            Some(std::io::ErrorKind::TimedOut) => return Error::ConnectionTimeout,
            Some(std::io::ErrorKind::HostUnreachable | std::io::ErrorKind::NetworkUnreachable) => {
                return Error::DestinationIpUnroutable;
            }
            _ => {}
        }
        // What an I/O error wraps is not its source, but beside it.
        cause = match io.and_then(std::io::Error::get_ref) {
            Some(wrapped) => Some(wrapped),
            None => error.source(),
        };
    }
    if error.is_connect() { Error::DestinationUnavailable } else { Error::HttpProtocolError }
}

fn told_tls(error: &rustls::Error) -> Error {
    match error {
        rustls::Error::InvalidCertificate(_) | rustls::Error::NoCertificatesPresented => Error::TlsCertificateError,
        _ => Error::TlsProtocolError,
    }
}

fn told_hyper(error: &hyper::Error) -> Error {
    // A request body that failed carries our own error: the guest that wrote it should hear that one.
    if let Some(Error::HttpRequestBodySize(size)) = error.source().and_then(|source| source.downcast_ref()) {
        return Error::HttpRequestBodySize(*size);
    }
    if error.is_timeout() {
        Error::HttpResponseTimeout
    } else if error.is_incomplete_message() || error.is_closed() || error.is_canceled() {
        Error::ConnectionTerminated
    } else {
        Error::HttpProtocolError
    }
}

/// The body of an answer, which may not fall silent for too long.
struct Incoming {
    body: hyper::body::Incoming,
    silence: Duration,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl http_body::Body for Incoming {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.sleep = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(|error| told_hyper(&error))));
        }
        let until = Instant::now() + self.silence;
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(until)));
        sleep.as_mut().poll(cx).map(|()| Some(Err(Error::ConnectionReadTimeout)))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// What one guest may send while it answers one request.
pub(crate) struct Hooks {
    grants: Arc<Grants>,
    /// Requests that it may still send.
    left: u32,
}

impl Hooks {
    pub(crate) fn new(grants: Arc<Grants>) -> Self {
        Self { left: grants.limits.outbound_requests, grants }
    }

    /// Whether the guest may send this request; a refusal is a value that it sees.
    fn admit(&mut self, uri: &http::Uri) -> Result<(), Error> {
        let authority = uri.authority().ok_or(Error::HttpRequestUriInvalid)?;
        // `user@host` shows one thing to a reader and another to a resolver.
        if authority.as_str().contains('@') {
            return Err(Error::HttpRequestUriInvalid);
        }
        let scheme = uri.scheme_str().ok_or(Error::HttpRequestUriInvalid)?;
        let port = authority.port_u16().unwrap_or(if scheme == "https" { 443 } else { 80 });
        let host = authority.host();
        if !self.grants.outbound.iter().any(|entry| entry.allows(scheme, host, port)) {
            return Err(Error::HttpRequestDenied);
        }
        // The resolver never sees address literals.
        let literal = host.trim_matches(['[', ']']).parse::<IpAddr>();
        if !self.grants.egress.private_networks && literal.is_ok_and(|address| !is_public(address)) {
            return Err(Error::DestinationIpProhibited);
        }
        self.left = self.left.checked_sub(1).ok_or(Error::ConnectionLimitReached)?;
        Ok(())
    }
}

type Sent = (http::Response<WasiBody>, Box<dyn Future<Output = Result<(), Error>> + Send>);

impl WasiHttpHooks for Hooks {
    /// Asked for each field of each head, so without the list that the default makes each time.
    fn is_forbidden_header(&mut self, name: &HeaderName) -> bool {
        FORBIDDEN.contains(name)
    }

    fn set_host_header(&mut self) -> bool {
        false // the client sets it where the protocol has it
    }

    fn send_request(
        &mut self,
        request: http::Request<WasiBody>,
        options: Option<RequestOptions>,
        _sent: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Result<Sent, Error>> + Send> {
        let admitted = self.admit(request.uri());
        let egress = Arc::clone(&self.grants.egress);
        Box::new(async move {
            admitted?;
            let response = egress.send(request, options.unwrap_or_default()).await?;
            // The client drives its connections itself, so there is nothing left to drive.
            let driver: Box<dyn Future<Output = Result<(), Error>> + Send> = Box::new(std::future::ready(Ok(())));
            Ok((response, driver))
        })
    }

    fn p2_outgoing_body_buffer_chunks(&mut self) -> usize {
        BODY_CHUNKS
    }

    fn p2_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_CHUNK_BYTES
    }

    fn p3_outgoing_body_chunk_size(&mut self) -> usize {
        BODY_CHUNK_BYTES
    }

    fn p2_error_from_hyper(&mut self, _: &hyper::Error) -> ErrorCode2 {
        ErrorCode2::HttpProtocolError
    }

    fn p3_error_from_hyper(&mut self, _: &hyper::Error) -> ErrorCode3 {
        ErrorCode3::HttpProtocolError
    }
}

#[cfg(test)]
mod tests;
