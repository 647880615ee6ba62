//! A site over h1, h2 and h3, with and without TLS, that counts what it serves and can hold its answers.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use http::{HeaderMap, Method, Request, Response, Version};
use http_body_util::{BodyExt, Full};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use selvage_loadtest::{Arrivals, Mix, Options, Protocol, RequestClass, Scheme, Target};
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;
use tokio_rustls::TlsAcceptor;

/// Longer than any test takes: what ends a test is what it tests.
pub(crate) const LONG: Duration = Duration::from_secs(120);
/// The name in the certificate.
pub(crate) const HOST: &str = "hello.localhost";

/// What all connections of one server share.
pub(crate) struct Site {
    /// Answers to `/held` wait for true.
    pub(crate) gate: watch::Sender<bool>,
    /// Requests that reached the server, by protocol.
    pub(crate) seen: Mutex<BTreeMap<Protocol, u64>>,
    /// Host or :authority of each request.
    pub(crate) authorities: Mutex<Vec<String>>,
    /// Requests on their way in, for tests that wait for the first.
    pub(crate) requests: watch::Sender<u64>,
    /// Open TCP connections.
    pub(crate) open: watch::Sender<usize>,
}

/// A running server; ends when dropped.
pub(crate) struct Server {
    pub(crate) site: Arc<Site>,
    pub(crate) addr: SocketAddr,
    pub(crate) root: CertificateDer<'static>,
    key: PrivateKeyDer<'static>,
    scheme: Scheme,
    tasks: Vec<JoinHandle<()>>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.tasks.iter().for_each(JoinHandle::abort);
    }
}

impl Site {
    fn new() -> Arc<Site> {
        Arc::new(Site {
            gate: watch::Sender::new(false),
            seen: Mutex::default(),
            authorities: Mutex::default(),
            requests: watch::Sender::new(0),
            open: watch::Sender::new(0),
        })
    }

    async fn answer(&self, head: &Request<()>, body: Bytes) -> Response<Bytes> {
        let protocol = match head.version() {
            Version::HTTP_2 => Protocol::H2,
            Version::HTTP_3 => Protocol::H3,
            _ => Protocol::H1,
        };
        *self.seen.lock().unwrap().entry(protocol).or_default() += 1;
        let authority = head.uri().authority().map(ToString::to_string);
        let host = head.headers().get("host").map(|host| host.to_str().unwrap().to_owned());
        self.authorities.lock().unwrap().push(authority.or(host).unwrap());
        self.requests.send_modify(|count| *count += 1);
        let text = |status: u16, body: &'static str| {
            Response::builder().status(status).body(Bytes::from_static(body.as_bytes())).unwrap()
        };
        match head.uri().path() {
            "/" => text(200, "hello"),
            "/echo" => Response::new(body),
            "/held" => {
                self.gate.subscribe().wait_for(|open| *open).await.unwrap();
                text(200, "at last")
            }
            "/private" if head.headers().get("authorization").is_some_and(|token| token == "Bearer good") => {
                text(200, "yours")
            }
            "/private" => text(401, "no"),
            "/last" => {
                let mut response = text(200, "bye");
                response.headers_mut().insert("connection", "close".parse().unwrap());
                response
            }
            _ => text(404, ""),
        }
    }
}

impl Server {
    /// TLS for h1 and h2 by ALPN on TCP, and h3 on the UDP port of the same number.
    pub(crate) async fn tls() -> Server {
        Server::tls_with(&[b"h2", b"http/1.1"]).await
    }

    /// As [`Server::tls`], with these protocols on TCP.
    pub(crate) async fn tls_with(alpn: &[&[u8]]) -> Server {
        let (root, key) = certificate();
        let site = Site::new();
        let (listener, quic) = loop {
            let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
            // Another process may have the UDP port of this number: then take another number.
            if let Ok(quic) = quinn::Endpoint::server(quic_config(&root, &key), listener.local_addr().unwrap()) {
                break (listener, quic);
            }
        };
        let addr = listener.local_addr().unwrap();
        let mut config = server_config(&root, &key);
        config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
        let acceptor = TlsAcceptor::from(Arc::new(config));
        let tcp = tokio::spawn(accept(listener, Arc::clone(&site), Some(acceptor), Protocol::H1));
        let udp = tokio::spawn(accept_quic(quic, Arc::clone(&site)));
        Server { site, addr, root, key, scheme: Scheme::Https, tasks: vec![tcp, udp] }
    }

    /// Plain TCP with one protocol.
    pub(crate) async fn plain(protocol: Protocol) -> Server {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
        let (addr, site) = (listener.local_addr().unwrap(), Site::new());
        let tcp = tokio::spawn(accept(listener, Arc::clone(&site), None, protocol));
        let (root, key) = certificate();
        Server { site, addr, root, key, scheme: Scheme::Http, tasks: vec![tcp] }
    }

    /// Requests to this server: evenly 200 a second for 200 ms, which makes 40.
    pub(crate) fn options(&self, mix: Mix, requests: Vec<RequestClass>) -> Options {
        let mut options = options(self.addr, mix, requests);
        options.targets[0].scheme = self.scheme;
        options.roots = vec![self.root.clone()];
        options
    }

    /// To serve QUIC elsewhere with the certificate of this server.
    pub(crate) fn quic_config(&self) -> quinn::ServerConfig {
        quic_config(&self.root, &self.key)
    }

    pub(crate) fn seen(&self, protocol: Protocol) -> u64 {
        self.site.seen.lock().unwrap().get(&protocol).copied().unwrap_or(0)
    }
}

pub(crate) fn options(addr: SocketAddr, mix: Mix, requests: Vec<RequestClass>) -> Options {
    let host = HOST.to_owned();
    Options {
        targets: vec![Target { scheme: Scheme::Http, host, port: 8443, addr }],
        rate: 200,
        duration: Duration::from_millis(200),
        seed: 3,
        mix,
        connections: 2,
        arrivals: Arrivals::Even,
        requests,
        roots: Vec::new(),
        in_flight_max: 1_000,
        timeout: LONG,
        lag_p99_max: LONG,
    }
}

pub(crate) fn get(path: &str, expect: &str) -> RequestClass {
    RequestClass {
        name: path.to_owned(),
        weight: 1,
        method: Method::GET,
        path: path.to_owned(),
        headers: HeaderMap::new(),
        body: Bytes::new(),
        expect: expect.parse().unwrap(),
        host: None,
    }
}

fn certificate() -> (CertificateDer<'static>, PrivateKeyDer<'static>) {
    let made = rcgen::generate_simple_self_signed([HOST.to_owned()]).unwrap();
    (made.cert.der().clone(), PrivateKeyDer::Pkcs8(made.signing_key.serialize_der().into()))
}

fn server_config(root: &CertificateDer<'static>, key: &PrivateKeyDer<'static>) -> rustls::ServerConfig {
    rustls::ServerConfig::builder_with_provider(Arc::new(rustls::crypto::ring::default_provider()))
        .with_safe_default_protocol_versions()
        .unwrap()
        .with_no_client_auth()
        .with_single_cert(vec![root.clone()], key.clone_key())
        .unwrap()
}

fn quic_config(root: &CertificateDer<'static>, key: &PrivateKeyDer<'static>) -> quinn::ServerConfig {
    let mut config = server_config(root, key);
    config.alpn_protocols = vec![b"h3".to_vec()];
    let config = quinn::crypto::rustls::QuicServerConfig::try_from(config).unwrap();
    quinn::ServerConfig::with_crypto(Arc::new(config))
}

async fn accept(listener: TcpListener, site: Arc<Site>, tls: Option<TlsAcceptor>, plain: Protocol) {
    loop {
        let (tcp, _) = listener.accept().await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let (site, tls) = (Arc::clone(&site), tls.clone());
        tokio::spawn(async move {
            site.open.send_modify(|open| *open += 1);
            match tls {
                None => serve(tcp, &site, plain).await,
                Some(tls) => {
                    if let Ok(stream) = tls.accept(tcp).await {
                        let h2 = stream.get_ref().1.alpn_protocol() == Some(b"h2");
                        serve(stream, &site, if h2 { Protocol::H2 } else { Protocol::H1 }).await;
                    }
                }
            }
            site.open.send_modify(|open| *open -= 1);
        });
    }
}

async fn serve(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static, site: &Arc<Site>, protocol: Protocol) {
    let service = service_fn(|request: Request<Incoming>| {
        let site = Arc::clone(site);
        async move {
            let (parts, body) = request.into_parts();
            let body = body.collect().await?.to_bytes();
            let answer = site.answer(&Request::from_parts(parts, ()), body).await;
            Ok::<_, hyper::Error>(answer.map(Full::new))
        }
    });
    let stream = TokioIo::new(stream);
    let _ = match protocol {
        Protocol::H2 => {
            hyper::server::conn::http2::Builder::new(TokioExecutor::new()).serve_connection(stream, service).await
        }
        _ => hyper::server::conn::http1::Builder::new().serve_connection(stream, service).await,
    };
}

async fn accept_quic(endpoint: quinn::Endpoint, site: Arc<Site>) {
    while let Some(incoming) = endpoint.accept().await {
        let site = Arc::clone(&site);
        tokio::spawn(async move {
            let Ok(connection) = incoming.await else { return };
            let connection = h3_quinn::Connection::new(connection);
            let Ok(mut connection) = h3::server::Connection::<_, Bytes>::new(connection).await else { return };
            while let Ok(Some(resolver)) = connection.accept().await {
                let site = Arc::clone(&site);
                tokio::spawn(async move {
                    let Ok((mut head, mut stream)) = resolver.resolve_request().await else { return };
                    *head.version_mut() = Version::HTTP_3;
                    let mut body = BytesMut::new();
                    while let Ok(Some(mut data)) = stream.recv_data().await {
                        body.extend_from_slice(&data.copy_to_bytes(data.remaining()));
                    }
                    let (parts, body) = site.answer(&head, body.freeze()).await.into_parts();
                    let _ = stream.send_response(Response::from_parts(parts, ())).await;
                    let _ = stream.send_data(body).await;
                    let _ = stream.finish().await;
                });
            }
        });
    }
}
