//! The whole way: a socket, a token, a guest, and its answer back.

use base64::Engine;
use base64::engine::general_purpose::URL_SAFE_NO_PAD;
use bytes::Buf;
use http_body_util::{Full, StreamBody};
use quinn::Endpoint;
use quinn::crypto::rustls::QuicClientConfig;
use ring::signature::Ed25519KeyPair;
use rustls::pki_types::PrivatePkcs8KeyDer;
use rustls::pki_types::pem::PemObject;
use selvage_config::bundle::Bundle;
use selvage_config::node::CertificateFiles;
use selvage_node::{Node, UpOptions};
use serde_json::{Value, json};
use tempfile::TempDir;

use super::*;

/// What an echo sends back.
const ECHO_BYTES: usize = 1024 * 1024;

/// A node that runs one example, with a certificate for [`HOST`].
struct Up {
    node: Node,
    roots: RootCertStore,
    _directory: TempDir,
}

impl Up {
    async fn start(example: &str) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let authority = Authority::create("test").unwrap();
        let files =
            CertificateFiles { certificate: directory.path().join("c.pem"), key: directory.path().join("k.pem") };
        authority.issue_server(&[HOST.into()], &[]).unwrap().save(&files.certificate, &files.key).unwrap();
        let options = UpOptions {
            compiled_dir: None,
            bundle: Bundle::load(&crate::examples().join(example).join("spin.toml")).unwrap(),
            listen: "127.0.0.1:0".parse().unwrap(),
            tls: Some(files),
            variables: BTreeMap::new(),
            environment: BTreeMap::new(),
            state_dir: None,
            private_networks: false,
            values: Vec::new(),
        };
        let node = Box::pin(Node::up(options)).await.unwrap();
        Self { node, roots: roots_of(&[authority.certificate_der()]).unwrap(), _directory: directory }
    }

    fn tls(&self, alpn: &[u8]) -> ClientConfig {
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_safe_default_protocol_versions()
            .unwrap()
            .with_root_certificates(self.roots.clone())
            .with_no_client_auth();
        config.alpn_protocols = vec![alpn.to_vec()];
        config
    }

    async fn stream(&self, alpn: &[u8]) -> TokioIo<TlsStream<TcpStream>> {
        let tcp = TcpStream::connect(self.node.addresses().https.unwrap()).await.unwrap();
        let connector = TlsConnector::from(Arc::new(self.tls(alpn)));
        TokioIo::new(connector.connect(ServerName::try_from(HOST).unwrap(), tcp).await.unwrap())
    }

    /// Asks over HTTP/1.1 on a connection of its own.
    async fn h1(&self, request: http::Request<Full<Bytes>>) -> http::Response<Bytes> {
        let (mut sender, connection) = http1::handshake(self.stream(b"http/1.1").await).await.unwrap();
        tokio::spawn(connection);
        whole(timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap()).await
    }

    /// Asks over HTTP/3 on a connection of its own. The body goes out in pieces.
    async fn h3(&self, request: http::Request<Full<Bytes>>) -> Result<http::Response<Bytes>, ::h3::error::StreamError> {
        let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
        let config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(self.tls(b"h3")).unwrap()));
        let address = self.node.addresses().https.unwrap();
        let quic = endpoint.connect_with(config, address, HOST).unwrap().await.unwrap();
        let (mut driver, mut sender) = ::h3::client::new(h3_quinn::Connection::new(quic)).await.unwrap();
        let driver = tokio::spawn(async move { driver.wait_idle().await });
        let (head, body) = request.into_parts();
        let (mut send, mut receive) = sender.send_request(http::Request::from_parts(head, ())).await?.split();
        let body = body.collect().await.unwrap().to_bytes();
        let sending = async {
            for piece in body.chunks(10_000) {
                // A node that has answered may have stopped listening.
                if send.send_data(Bytes::copy_from_slice(piece)).await.is_err() {
                    return;
                }
            }
            let _ = send.finish().await;
        };
        let receiving = async {
            let head = receive.recv_response().await?;
            let mut bytes = Vec::new();
            while let Some(mut data) = receive.recv_data().await? {
                bytes.extend_from_slice(&data.copy_to_bytes(data.remaining()));
            }
            Ok(head.map(|()| Bytes::from(bytes)))
        };
        let answer = timeout(PATIENCE, async { tokio::join!(sending, receiving).1 }).await.unwrap();
        driver.abort();
        answer
    }
}

async fn whole(response: http::Response<Incoming>) -> http::Response<Bytes> {
    let (head, body) = response.into_parts();
    http::Response::from_parts(head, timeout(PATIENCE, body.collect()).await.unwrap().unwrap().to_bytes())
}

fn ask(uri: &str, fields: &[(&str, &str)]) -> http::Request<Full<Bytes>> {
    let mut request = http::Request::get(uri);
    for (name, value) in fields {
        request = request.header(*name, *value);
    }
    request.body(Full::default()).unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guest_sees_the_nodes_fields_and_no_forged_one() {
    let up = Up::start("hello").await;
    let forged = [
        ("spin-client-addr", "127.0.0.1:1"),
        ("spin-path-info", "/forged"),
        ("spin-forged", "1"),
        ("x-jwt-sub", "root"),
        ("x-jwt-claims", "e30"),
        ("x-forwarded-for", "127.0.0.1"),
        ("forwarded", "for=127.0.0.1"),
        ("selvage-request-id", "1"),
        ("x-own", "kept"),
    ];
    let h1_fields: Vec<_> =
        forged.into_iter().chain([("host", HOST), ("connection", "x-hop"), ("x-hop", "1")]).collect();
    let one = up.h1(ask("/headers?a=b", &h1_fields)).await;
    let three = up.h3(ask("https://hello.edge.test/headers?a=b", &forged)).await.unwrap();
    for answer in [one, three] {
        assert_eq!(answer.status(), 200);
        let seen: Value = serde_json::from_slice(answer.body()).unwrap();
        let text = |name: &str| seen[name].as_str().unwrap_or_default().to_owned();
        assert_eq!(text("x-own"), "kept");
        assert_eq!(text("spin-full-url"), "https://hello.edge.test/headers?a=b");
        assert_eq!(text("spin-path-info"), "/headers");
        assert!(text("spin-client-addr").starts_with("127.0.0.1:") && text("spin-client-addr") != "127.0.0.1:1");
        assert_eq!(text("selvage-request-id"), answer.headers()["selvage-request-id"].to_str().unwrap());
        for name in ["spin-forged", "x-jwt-sub", "x-jwt-claims", "forwarded", "x-forwarded-for", "x-hop", "connection"]
        {
            assert!(seen.get(name).is_none(), "{name} in {seen}");
        }
    }
    up.node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_stream_both_ways_over_every_version() {
    let up = Up::start("hello").await;
    let body: Bytes = (0..ECHO_BYTES).map(|i| u8::try_from(i % 251).unwrap()).collect::<Vec<_>>().into();
    let post = |uri: &str| http::Request::post(uri).header("host", HOST).body(Full::new(body.clone())).unwrap();
    assert!(up.h1(post("/echo")).await.body() == &body);
    assert!(up.h3(post("https://hello.edge.test/echo")).await.unwrap().body() == &body);

    // HTTP/2, piece by piece: each comes back before the next one is sent.
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), up.stream(b"h2").await).await.unwrap();
    tokio::spawn(connection);
    let (pieces, queue) = tokio::sync::mpsc::channel::<Bytes>(1);
    let frames = futures_util::stream::unfold(queue, |mut queue| async move {
        Some((Ok::<_, std::convert::Infallible>(http_body::Frame::data(queue.recv().await?)), queue))
    });
    let request = http::Request::post("https://hello.edge.test/echo").body(StreamBody::new(Box::pin(frames))).unwrap();
    let mut answer = timeout(PATIENCE, sender.send_request(request)).await.unwrap().unwrap().into_body();
    for piece in ["one", "two", "three"] {
        pieces.send(piece.into()).await.unwrap();
        let frame = timeout(PATIENCE, answer.frame()).await.unwrap().unwrap().unwrap();
        assert_eq!(frame.into_data().unwrap(), piece);
    }
    drop(pieces);
    assert_eq!(timeout(PATIENCE, answer.collect()).await.unwrap().unwrap().to_bytes(), "");
    up.node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_body_that_is_too_large_or_not_as_announced_is_refused() {
    let up = Up::start("hello").await;
    let announced =
        format!("POST /echo HTTP/1.1\r\nhost: {HOST}\r\ncontent-length: 99999999\r\nconnection: close\r\n\r\n");
    let mut stream = up.stream(b"http/1.1").await.into_inner();
    stream.write_all(announced.as_bytes()).await.unwrap();
    let mut head = [0; 12];
    timeout(PATIENCE, stream.read_exact(&mut head)).await.unwrap().unwrap();
    assert_eq!(&head, b"HTTP/1.1 413", "refused before the body was sent");
    // RFC 9114 4.1.2: more DATA than the head announced. Less of it the guest hears of, when it reads to the end.
    let request = http::Request::post("https://hello.edge.test/echo").header("content-length", "4");
    let answer = up.h3(request.body(Full::new("hello".into())).unwrap()).await;
    let echoed = answer.is_ok_and(|answer| answer.body() == "hello");
    assert!(!echoed, "5 bytes of 4");
    up.node.drain().await;
}

/// A token of the example's issuer.
fn token(expires_in: i64) -> String {
    let pem = std::fs::read(crate::examples().join("gate/test-keys/eddsa.pem")).unwrap();
    let der = PrivatePkcs8KeyDer::from_pem_slice(&pem).unwrap();
    let key = Ed25519KeyPair::from_pkcs8_maybe_unchecked(der.secret_pkcs8_der()).unwrap();
    let jwks: Value =
        serde_json::from_slice(&std::fs::read(crate::examples().join("gate/jwks.json")).unwrap()).unwrap();
    let kid = jwks["keys"].as_array().unwrap().iter().find(|jwk| jwk["kty"] == "OKP").unwrap()["kid"].clone();
    let now = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().as_secs();
    let expires = i64::try_from(now).unwrap() + expires_in;
    let claims = json!({"iss": "https://issuer.example", "aud": "gate", "sub": "ada", "exp": expires});
    let parts = [json!({"alg": "EdDSA", "kid": kid}), claims].map(|part| URL_SAFE_NO_PAD.encode(part.to_string()));
    let input = parts.join(".");
    format!("{input}.{}", URL_SAFE_NO_PAD.encode(key.sign(input.as_bytes())))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_guarded_guest_is_asked_only_for_who_has_a_good_token() {
    let up = Up::start("gate").await;
    let forged = ("x-jwt-claims", "eyJzdWIiOiJyb290In0");
    let get = async |path: &str, bearer: Option<String>| {
        let bearer = bearer.map(|token| format!("Bearer {token}"));
        let fields: Vec<_> = [("host", HOST), forged]
            .into_iter()
            .chain(bearer.iter().map(|bearer| ("authorization", bearer.as_str())))
            .collect();
        up.h1(ask(path, &fields)).await
    };
    let good = get("/profile", Some(token(300))).await;
    assert_eq!(good.status(), 200, "{good:?}");
    let profile: Value = serde_json::from_slice(good.body()).unwrap();
    assert_eq!((&profile["subject"], &profile["issuer"]), (&json!("ada"), &json!("https://issuer.example")));
    assert_eq!(profile["claims"]["aud"], "gate");

    let missing = get("/profile", None).await;
    assert_eq!((missing.status().as_u16(), &missing.headers()["www-authenticate"]), (401, &"Bearer".parse().unwrap()));
    let mut tampered = token(300);
    tampered.insert(tampered.len() - 10, 'A');
    for bad in [token(-3_600), tampered, "nonsense".into()] {
        let answer = get("/profile", Some(bad)).await;
        assert_eq!(answer.status(), 401);
        assert_eq!(answer.headers()["www-authenticate"], "Bearer error=\"invalid_token\"");
        assert_eq!(answer.body(), "invalid token\n");
    }
    assert_eq!(get("/public/a", None).await.status(), 200);
    assert_eq!(get("/public/../profile", None).await.status(), 401);
    assert_eq!(get("/public/%2e%2e/profile", None).await.status(), 401);
    up.node.drain().await;
}
