//! Names of one listener that differ in what is spoken and in whose certificates count.

use quinn::Endpoint;
use quinn::crypto::rustls::QuicClientConfig;
use rustls::pki_types::PrivateKeyDer;
use selvage_certs::{Identity, Reloaded};
use selvage_config::node::TlsName;

use super::*;

/// Where a certificate is required.
const SAFE: &str = "safe.edge.test";
/// Where only HTTP/1.1 is spoken.
const OLD: &str = "old.edge.test";

struct World {
    front: Front,
    clients: Authority,
    dir: tempfile::TempDir,
}

impl World {
    async fn start() -> Self {
        let (clients, dir) = (Authority::create("clients").unwrap(), tempfile::tempdir().unwrap());
        let roots = dir.path().join("clients.pem");
        std::fs::write(&roots, clients.certificate_pem()).unwrap();
        let rule = |text: String| toml::from_str::<TlsName>(&text).unwrap();
        let rules = [
            rule(format!("name = '{SAFE}'\nclient_certificates = 'require'\nclient_roots = '{}'", roots.display())),
            rule(format!("name = '{OLD}'\nalpn = ['http/1.1']")),
        ];
        let rules = Arc::new(NameRules::load(&rules).unwrap());
        let front = Front::of(Bounds::default(), &["hello", "safe", "old"], rules).await;
        Self { front, clients, dir }
    }

    /// A client of `authority`, or one without a certificate.
    fn client(&self, alpn: &[u8], authority: Option<&Authority>) -> ClientConfig {
        let mut config = self.front.client(alpn);
        if let Some(authority) = authority {
            let role = selvage_certs::Role::Operator { name: "alice".parse().unwrap() };
            let identity = authority.issue_identity(&role, &[], &[]).unwrap();
            let (certificate, key) = (self.dir.path().join("c.pem"), self.dir.path().join("c.key"));
            identity.save(&certificate, &key).unwrap();
            let identity = Identity::load(&certificate, &key).unwrap();
            let key = <PrivateKeyDer<'_> as rustls::pki_types::pem::PemObject>::from_pem_file(key).unwrap();
            config = ClientConfig::builder_with_provider(provider())
                .with_safe_default_protocol_versions()
                .unwrap()
                .with_root_certificates(self.front.roots.clone())
                .with_client_auth_cert(identity.chain().to_vec(), key)
                .unwrap();
            config.alpn_protocols = vec![alpn.to_vec()];
        }
        config
    }

    /// Whether a client of this authority is let in where a certificate is required.
    async fn refuses(&self, authority: Option<&Authority>) -> bool {
        // In TLS 1.3 a client learns of it by what it reads first.
        match self.connect(SAFE, b"http/1.1", authority).await {
            Err(_) => true,
            Ok(mut stream) => {
                let asked = stream.write_all(format!("GET / HTTP/1.1\r\nhost: {SAFE}\r\n\r\n").as_bytes()).await;
                asked.is_err() || matches!(stream.read(&mut [0; 1]).await, Err(_) | Ok(0))
            }
        }
    }

    async fn connect(
        &self,
        name: &str,
        alpn: &[u8],
        authority: Option<&Authority>,
    ) -> std::io::Result<TlsStream<TcpStream>> {
        let connector = TlsConnector::from(Arc::new(self.client(alpn, authority)));
        let tcp = TcpStream::connect(self.front.https()).await.unwrap();
        connector.connect(ServerName::try_from(name.to_owned()).unwrap(), tcp).await
    }
}

fn to(host: &str, version: &[u8]) -> http::Request<Empty<Bytes>> {
    let request = match version {
        b"h2" => http::Request::get(format!("https://{host}/")),
        _ => http::Request::get("/").header("host", host),
    };
    request.body(Empty::new()).unwrap()
}

#[tokio::test]
async fn who_has_no_certificate_is_not_let_in_where_one_is_required() {
    let world = World::start().await;
    let stranger = Authority::create("clients").unwrap();
    for authority in [None, Some(&stranger)] {
        assert!(world.refuses(authority).await, "{authority:?}");
    }
    let stream = world.connect(SAFE, b"http/1.1", Some(&world.clients)).await.unwrap();
    let response = h1(stream).await.send_request(to(SAFE, b"http/1.1")).await.unwrap();
    assert_eq!(response.status(), 200);
    assert!(!response.headers().contains_key("alt-svc"), "there is no HTTP/3 for it");
    let stream = world.connect(HOST, b"http/1.1", None).await.unwrap();
    let response = h1(stream).await.send_request(to(HOST, b"http/1.1")).await.unwrap();
    assert!(response.status() == 200 && response.headers().contains_key("alt-svc"));
}

#[tokio::test]
async fn new_authorities_of_clients_count_from_the_next_handshake_on_and_a_bad_file_changes_nothing() {
    let world = World::start().await;
    let (servers, file) = (world.front.listeners.servers().unwrap(), world.dir.path().join("clients.pem"));
    let next = Authority::create("next").unwrap();
    assert_eq!(servers.reload().unwrap(), Reloaded::Unchanged);
    let kept = world.connect(SAFE, b"h2", Some(&world.clients)).await.unwrap();
    let mut kept = h2(kept).await;
    for bad in ["", "-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"] {
        std::fs::write(&file, bad).unwrap();
        assert!(servers.reload().is_err(), "{bad:?}");
        assert!(!world.refuses(Some(&world.clients)).await && world.refuses(Some(&next)).await);
    }
    // Both, as while one takes the place of the other; then the new one alone.
    std::fs::write(&file, [world.clients.certificate_pem(), next.certificate_pem()].concat()).unwrap();
    assert_eq!(servers.reload().unwrap(), Reloaded::Changed);
    assert!(!world.refuses(Some(&world.clients)).await && !world.refuses(Some(&next)).await);
    std::fs::write(&file, next.certificate_pem()).unwrap();
    assert_eq!(servers.reload().unwrap(), Reloaded::Changed);
    assert_eq!(servers.reload().unwrap(), Reloaded::Unchanged);
    assert!(world.refuses(Some(&world.clients)).await && !world.refuses(Some(&next)).await);
    assert!(world.refuses(None).await);
    // Who was let in is not put out.
    assert_eq!(kept.send_request(to(SAFE, b"h2")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_session_is_not_resumed_where_a_certificate_is_required() {
    let world = World::start().await;
    let connector = TlsConnector::from(Arc::new(world.client(b"h2", Some(&world.clients))));
    for _ in 0..3 {
        let tcp = TcpStream::connect(world.front.https()).await.unwrap();
        let stream = connector.connect(ServerName::try_from(SAFE).unwrap(), tcp).await.unwrap();
        assert_eq!(stream.get_ref().1.handshake_kind(), Some(rustls::HandshakeKind::Full));
        assert_eq!(h2(stream).await.send_request(to(SAFE, b"h2")).await.unwrap().status(), 200);
    }
}

#[tokio::test]
async fn a_name_speaks_what_it_says() {
    let world = World::start().await;
    assert!(world.connect(OLD, b"h2", None).await.is_err());
    let stream = world.connect(OLD, b"http/1.1", None).await.unwrap();
    assert_eq!(h1(stream).await.send_request(to(OLD, b"http/1.1")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn a_connection_for_one_name_carries_no_request_for_another_over_a_border() {
    let world = World::start().await;
    let clients = Some(&world.clients);
    for (name, authority, version, host, want) in [
        (HOST, None, &b"h2"[..], HOST, 200),
        (HOST, None, b"h2", SAFE, 421),
        (HOST, None, b"http/1.1", SAFE, 421),
        (HOST, clients, b"h2", SAFE, 421),
        (SAFE, clients, b"h2", HOST, 421),
        (SAFE, clients, b"http/1.1", HOST, 421),
        (SAFE, clients, b"h2", SAFE, 200),
        (HOST, None, b"h2", OLD, 421),
        (HOST, None, b"http/1.1", OLD, 200),
        (OLD, None, b"http/1.1", HOST, 200),
    ] {
        let stream = world.connect(name, version, authority).await.unwrap();
        let status = match version {
            b"h2" => h2(stream).await.send_request(to(host, version)).await.unwrap().status(),
            _ => h1(stream).await.send_request(to(host, version)).await.unwrap().status(),
        };
        assert_eq!(status, want, "{name} {host} {}", String::from_utf8_lossy(version));
    }
    let answer = world.front.raw(&format!("GET / HTTP/1.1\r\nhost: {SAFE}\r\nconnection: close\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 421 "), "{answer}");
    let answer = world.front.raw(&format!("GET / HTTP/1.1\r\nhost: {OLD}\r\nconnection: close\r\n\r\n")).await;
    assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
}

#[tokio::test]
async fn names_that_have_no_h3_are_neither_shown_nor_carried_there() {
    let world = World::start().await;
    let mut endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let crypto = QuicClientConfig::try_from(world.client(b"h3", Some(&world.clients))).unwrap();
    endpoint.set_default_client_config(quinn::ClientConfig::new(Arc::new(crypto)));
    for name in [SAFE, OLD] {
        assert!(endpoint.connect(world.front.https(), name).unwrap().await.is_err(), "{name}");
    }
    let mut client = h3::connect(&world.front).await;
    for (host, want) in [(HOST, 200), (SAFE, 421), (OLD, 421), (HOST, 200)] {
        let (status, _, _) = h3::ask(&mut client, h3::request(&format!("https://{host}/"))).await.unwrap();
        assert_eq!(status, want, "{host}");
    }
    world.front.counted(r#"outcome="misdirected",protocol="h3"} 2"#).await;
}
