//! The floor: the same libraries as they come, one thread, two bodies, nothing asked and nothing bounded.

use std::convert::Infallible;
use std::net::UdpSocket;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use h3::quic::BidiStream;
use h3::server::RequestStream;
use http_body_util::Full;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use quinn::crypto::rustls::QuicServerConfig;
use rustls::ServerConfig;
use rustls::pki_types::pem::PemObject as _;
use rustls::pki_types::{CertificateDer, PrivateKeyDer};
use tokio::io::AsyncReadExt as _;
use tokio::net::{TcpListener, TcpStream};
use tokio_rustls::TlsAcceptor;

use super::{LARGE_BYTES, MIB_PATH, SMALL_BYTES, body};

/// The answers.
#[derive(Clone)]
struct Bodies {
    small: Bytes,
    large: Bytes,
}

impl Bodies {
    fn at(&self, path: &str) -> Bytes {
        if path == MIB_PATH { self.large.clone() } else { self.small.clone() }
    }
}

/// HTTP/1.1 and 2 by hyper, HTTP/3 by `h3`, until it is killed.
pub(super) fn run(port: u16, dir: &Path) -> anyhow::Result<()> {
    let (tls, quic) = (config(dir, &[b"h2", b"http/1.1"])?, config(dir, &[b"h3"])?);
    let bodies = Bodies { small: body(SMALL_BYTES).into(), large: body(LARGE_BYTES).into() };
    run_in_one_thread(async move {
        let quic = quinn::ServerConfig::with_crypto(Arc::new(QuicServerConfig::try_from(quic)?));
        let socket = UdpSocket::bind(("127.0.0.1", port))?;
        let (of_endpoint, runtime) = (quinn::EndpointConfig::default(), Arc::new(quinn::TokioRuntime));
        let endpoint = quinn::Endpoint::new(of_endpoint, Some(quic), socket, runtime)?;
        // Ends with the process, as all that it starts.
        tokio::spawn(accept_quic(endpoint, bodies.clone()));
        accept(port, tls, move |tcp, tls| over_tls(tcp, tls, bodies.clone())).await
    })
}

/// Handshakes alone, until it is killed.
pub(super) fn run_tls(port: u16, dir: &Path) -> anyhow::Result<()> {
    let mut config = config(dir, &[b"h2", b"http/1.1"])?;
    config.ticketer = rustls::crypto::aws_lc_rs::Ticketer::new()?;
    run_in_one_thread(accept(port, config, |tcp, tls| async move {
        let mut tls = tls.accept(tcp).await?;
        // The client ends it.
        let _ = tls.read(&mut [0]).await;
        Ok(())
    }))
}

fn run_in_one_thread(serving: impl Future<Output = anyhow::Result<()>>) -> anyhow::Result<()> {
    tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(serving)
}

fn config(dir: &Path, alpn: &[&[u8]]) -> anyhow::Result<ServerConfig> {
    let chain = CertificateDer::pem_file_iter(dir.join("front.pem"))?.collect::<Result<_, _>>()?;
    let key = PrivateKeyDer::from_pem_file(dir.join("front.key"))?;
    let config = ServerConfig::builder_with_provider(selvage_certs::provider())
        .with_protocol_versions(&[&rustls::version::TLS13])?
        .with_no_client_auth();
    let mut config = config.with_single_cert(chain, key)?;
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    Ok(config)
}

async fn accept<F>(port: u16, config: ServerConfig, on: impl Fn(TcpStream, TlsAcceptor) -> F) -> anyhow::Result<()>
where
    F: Future<Output = anyhow::Result<()>> + Send + 'static,
{
    let (listener, tls) = (TcpListener::bind(("127.0.0.1", port)).await?, TlsAcceptor::from(Arc::new(config)));
    loop {
        let (tcp, _) = listener.accept().await?;
        tcp.set_nodelay(true)?;
        // Ends with its client, and with the process.
        tokio::spawn(on(tcp, tls.clone()));
    }
}

async fn over_tls(tcp: TcpStream, tls: TlsAcceptor, bodies: Bodies) -> anyhow::Result<()> {
    let stream = tls.accept(tcp).await?;
    let is_h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
    let answer = service_fn(move |request: http::Request<Incoming>| {
        let body = bodies.at(request.uri().path());
        async move { Ok::<_, Infallible>(http::Response::new(Full::new(body))) }
    });
    if is_h2 {
        http2::Builder::new(TokioExecutor::new()).serve_connection(TokioIo::new(stream), answer).await?;
    } else {
        http1::Builder::new().serve_connection(TokioIo::new(stream), answer).await?;
    }
    Ok(())
}

async fn accept_quic(endpoint: quinn::Endpoint, bodies: Bodies) {
    while let Some(incoming) = endpoint.accept().await {
        tokio::spawn(over_quic(incoming, bodies.clone()));
    }
}

async fn over_quic(incoming: quinn::Incoming, bodies: Bodies) -> anyhow::Result<()> {
    let quic = h3_quinn::Connection::new(incoming.await?);
    let mut connection = h3::server::Connection::<_, Bytes>::new(quic).await?;
    while let Some(resolver) = connection.accept().await? {
        let bodies = bodies.clone();
        tokio::spawn(async move {
            let (request, stream) = resolver.resolve_request().await?;
            answer(stream, bodies.at(request.uri().path())).await
        });
    }
    Ok(())
}

async fn answer<S: BidiStream<Bytes>>(mut stream: RequestStream<S, Bytes>, body: Bytes) -> anyhow::Result<()> {
    let head = http::Response::builder().header(http::header::CONTENT_LENGTH, body.len()).body(())?;
    stream.send_response(head).await?;
    stream.send_data(body).await?;
    Ok(stream.finish().await?)
}
