//! The public listeners, over real sockets: what they answer, what they refuse, and how they leave.

mod attacks;
mod drain;
mod frames;
mod guests;
mod h3;
mod hostile;
mod messages;
mod names;
mod peers;
mod reload;
mod slow;
mod trust;
mod versions;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::body::Incoming;
use hyper::client::conn::{http1, http2};
use hyper_util::rt::{TokioExecutor, TokioIo};
use rustls::pki_types::ServerName;
use rustls::{ClientConfig, RootCertStore};
use selvage_certs::{
    Authority, Certificates, FrontSecret, FrontTls, NameRules, Resolver, TlsVersions, provider, roots_of,
};
use selvage_config::app::{App, Route, StaticResponse, Target};
use selvage_config::front::Front as Bounds;
use selvage_config::node::TlsProvider;
use selvage_config::{AppName, Digest};
use selvage_node::listen::{ListenOptions, Listeners};
use selvage_node::metrics::Metrics;
use selvage_node::route::{ActiveApp, Table};
use selvage_node::serve::Parts;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;
use tokio_rustls::TlsConnector;
use tokio_rustls::client::TlsStream;

/// The app's host.
const HOST: &str = "hello.edge.test";
/// Bytes of the answer at `/large`: more than all buffers between here and the node hold.
const LARGE_BYTES: usize = 32 * 1024 * 1024;
/// Long for an answer, short for whoever waits for a test that hangs.
const PATIENCE: Duration = Duration::from_secs(30);

/// A node's front with one app, `hello`, which has no guest.
struct Front {
    parts: Arc<Parts>,
    listeners: Listeners,
    authority: Authority,
    resolver: Arc<Resolver>,
    roots: RootCertStore,
}

pub(crate) fn app(name: &str) -> ActiveApp {
    let route = |pattern: &str, body: String| Route {
        pattern: pattern.parse().unwrap(),
        target: Target::Static(StaticResponse { status_code: 200, headers: BTreeMap::new(), body: Some(body) }),
    };
    let app = App {
        name: name.parse::<AppName>().unwrap(),
        version: None,
        hosts: Vec::new(),
        variables: BTreeMap::new(),
        issuers: BTreeMap::new(),
        routes: vec![route("/", "hello".into()), route("/large", "x".repeat(LARGE_BYTES))],
        components: BTreeMap::new(),
    };
    ActiveApp::new(app, None, Digest::of(b"manifest"), &BTreeMap::new(), &BTreeMap::new()).unwrap()
}

impl Front {
    async fn start() -> Self {
        Self::with(Bounds::default()).await
    }

    async fn with(bounds: Bounds) -> Self {
        Self::of(bounds, &["hello"], Arc::default()).await
    }

    /// A front with these apps, each at a host below `edge.test`, and with these names apart.
    async fn of(bounds: Bounds, apps: &[&str], rules: Arc<NameRules>) -> Self {
        Self::open(bounds, apps, rules, false).await
    }

    /// The same, perhaps with early data.
    async fn open(bounds: Bounds, apps: &[&str], rules: Arc<NameRules>, has_early_data: bool) -> Self {
        let authority = Authority::create("test").unwrap();
        let hosts: Vec<String> = apps.iter().map(|app| format!("{app}.edge.test")).collect();
        let identity = authority.issue_server(&hosts, &[]).unwrap();
        let certificates = Certificates::of([&identity]).unwrap();
        let parts = Parts::new("fra-1".parse().unwrap(), "fra".parse().unwrap(), 1_000, Metrics::new());
        parts
            .table
            .store(Arc::new(Table::new(apps.iter().map(|name| Arc::new(app(name))).collect(), "edge.test").unwrap()));
        let parts = Arc::new(parts.with_front(bounds).with_rules(Arc::clone(&rules)));
        let resolver = Arc::new(Resolver::new(certificates));
        let any = Some("127.0.0.1:0".parse().unwrap());
        let tls = FrontTls {
            resolver: Arc::clone(&resolver),
            provider: TlsProvider::default(),
            secret: FrontSecret::random().unwrap(),
            versions: TlsVersions::Only13,
            has_challenges: false,
            has_early_data,
            rules,
        };
        let options = ListenOptions { https: any, http: any, tls: Some(tls) };
        let listeners = Listeners::bind(&options, Arc::clone(&parts)).await.unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        Self { parts, listeners, authority, resolver, roots }
    }

    fn https(&self) -> SocketAddr {
        self.listeners.https_addr().unwrap()
    }

    fn http(&self) -> SocketAddr {
        self.listeners.http_addr().unwrap()
    }

    fn client(&self, alpn: &[u8]) -> ClientConfig {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        config
    }

    async fn tls(&self, alpn: &[u8]) -> TlsStream<TcpStream> {
        let tcp = TcpStream::connect(self.https()).await.unwrap();
        let connector = TlsConnector::from(Arc::new(self.client(alpn)));
        let stream = connector.connect(ServerName::try_from(HOST).unwrap(), tcp).await.unwrap();
        assert_eq!(stream.get_ref().1.alpn_protocol(), Some(alpn));
        stream
    }

    /// Waits until the metrics say this.
    async fn counted(&self, line: &str) {
        let counted = async {
            while !self.parts.metrics.text().contains(line) {
                tokio::time::sleep(Duration::from_millis(5)).await;
            }
        };
        let waited = timeout(PATIENCE, counted).await;
        assert!(waited.is_ok(), "{line} in\n{}", self.parts.metrics.text());
    }

    /// What comes back for these bytes, until the node closes or says nothing for a moment.
    async fn raw(&self, bytes: &str) -> String {
        let mut tcp = TcpStream::connect(self.http()).await.unwrap();
        tcp.write_all(bytes.as_bytes()).await.unwrap();
        let mut answer = Vec::new();
        timeout(PATIENCE, tcp.read_to_end(&mut answer)).await.unwrap().unwrap();
        String::from_utf8(answer).unwrap()
    }
}

type H1 = http1::SendRequest<Empty<Bytes>>;
type H2 = http2::SendRequest<Empty<Bytes>>;

async fn h1(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> H1 {
    let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

async fn h2(stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static) -> H2 {
    let (sender, connection) = http2::handshake(TokioExecutor::new(), TokioIo::new(stream)).await.unwrap();
    tokio::spawn(connection);
    sender
}

fn get(uri: &str) -> http::Request<Empty<Bytes>> {
    let request = http::Request::get(uri);
    let request = if uri.starts_with('/') { request.header("host", HOST) } else { request };
    request.body(Empty::new()).unwrap()
}

async fn text(response: http::Response<Incoming>) -> String {
    String::from_utf8(response.into_body().collect().await.unwrap().to_bytes().to_vec()).unwrap()
}
