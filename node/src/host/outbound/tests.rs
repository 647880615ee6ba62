//! The shared client: TLS, timeouts, and what a guest hears of failures.

use http_body_util::Full;
use rustls::ServerConfig;
use rustls::pki_types::PrivateKeyDer;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;
use tokio_rustls::TlsAcceptor;

use super::*;

/// What an origin sends once it got a head, and then nothing more.
const ANSWER: &[u8] = b"HTTP/1.1 200 OK\r\ncontent-length: 10\r\n\r\n";

fn egress(roots: Vec<PathBuf>) -> Egress {
    Egress::new(&Options { private_networks: true, roots }).unwrap()
}

async fn send(roots: Vec<PathBuf>, uri: String) -> Result<http::Response<WasiBody>, Error> {
    egress(roots).send(request(uri), RequestOptions::default()).await
}

fn request(uri: String) -> http::Request<WasiBody> {
    let body = Full::new(Bytes::new()).map_err(|never| match never {}).boxed_unsync();
    http::Request::builder().uri(uri).body(body).unwrap()
}

/// An origin on loopback that answers with `answer`, over TLS if it has a configuration for it.
async fn origin(answer: &'static [u8], tls: Option<ServerConfig>) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = listener.local_addr().unwrap().port();
    let tls = tls.map(|tls| TlsAcceptor::from(Arc::new(tls)));
    tokio::spawn(async move {
        while let Ok((tcp, _)) = listener.accept().await {
            let tls = tls.clone();
            tokio::spawn(async move {
                match tls {
                    Some(tls) => {
                        if let Ok(stream) = tls.accept(tcp).await {
                            serve(stream, answer).await;
                        }
                    }
                    None => serve(tcp, answer).await,
                }
            });
        }
    });
    port
}

async fn serve(mut stream: impl tokio::io::AsyncRead + tokio::io::AsyncWrite + Unpin, answer: &[u8]) {
    let mut head = Vec::new();
    while stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {
        if head.ends_with(b"\r\n\r\n") && !answer.is_empty() {
            stream.write_all(answer).await.unwrap();
        }
    }
}

/// A server for `localhost`, and the file of its authority.
fn certified(dir: &std::path::Path) -> (ServerConfig, PathBuf) {
    let certified = rcgen::generate_simple_self_signed(vec!["localhost".to_owned()]).unwrap();
    let root = dir.join("root.pem");
    std::fs::write(&root, certified.cert.pem()).unwrap();
    let key = PrivateKeyDer::Pkcs8(certified.signing_key.serialize_der().into());
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let builder = ServerConfig::builder_with_provider(provider).with_safe_default_protocol_versions().unwrap();
    let chain = vec![certified.cert.der().clone()];
    (builder.with_no_client_auth().with_single_cert(chain, key).unwrap(), root)
}

#[tokio::test]
async fn an_authority_of_the_operator_is_trusted() {
    let dir = tempfile::tempdir().unwrap();
    let (server, root) = certified(dir.path());
    let port = origin(b"HTTP/1.1 204 No Content\r\n\r\n", Some(server)).await;
    let response = send(vec![root], format!("https://localhost:{port}/")).await.unwrap();
    assert_eq!(response.status(), 204);
}

#[tokio::test]
async fn an_unknown_authority_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (server, _) = certified(dir.path());
    let port = origin(b"HTTP/1.1 204 No Content\r\n\r\n", Some(server)).await;
    let refused = send(Vec::new(), format!("https://localhost:{port}/")).await;
    assert!(matches!(refused, Err(Error::TlsCertificateError)));
}

#[tokio::test]
async fn a_file_without_authorities_does_not_pass_unnoticed() {
    let missing = Egress::new(&Options { private_networks: false, roots: vec!["/nonexistent.pem".into()] });
    assert!(matches!(missing, Err(EgressError::Roots { .. })));
}

#[tokio::test]
async fn an_origin_that_does_not_answer_is_given_up() {
    let port = origin(b"", None).await;
    let options = RequestOptions {
        connect_timeout: Some(Duration::from_millis(10)),
        first_byte_timeout: Some(Duration::from_millis(10)),
        between_bytes_timeout: None,
    };
    let given_up = egress(Vec::new()).send(request(format!("http://127.0.0.1:{port}/")), options).await;
    assert!(matches!(given_up, Err(Error::HttpResponseTimeout)));
}

#[tokio::test]
async fn an_answer_that_falls_silent_is_given_up() {
    let port = origin(ANSWER, None).await;
    let between_bytes_timeout = Some(Duration::from_millis(10));
    let options = RequestOptions { between_bytes_timeout, ..RequestOptions::default() };
    let response = egress(Vec::new()).send(request(format!("http://127.0.0.1:{port}/")), options).await.unwrap();
    assert!(matches!(response.into_body().collect().await, Err(Error::ConnectionReadTimeout)));
}

#[tokio::test]
async fn a_closed_port_is_a_refused_connection() {
    let port = TcpListener::bind("127.0.0.1:0").await.unwrap().local_addr().unwrap().port();
    let refused = send(Vec::new(), format!("http://127.0.0.1:{port}/")).await;
    assert!(matches!(refused, Err(Error::ConnectionRefused)));
}
