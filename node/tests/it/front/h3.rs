//! HTTP/3.

mod attacks;
mod bodies;
mod early;
mod leaving;
mod limits;
mod raw;
mod rules;

use ::h3::client::SendRequest;
use ::h3::error::{ConnectionError, StreamError};
use bytes::Buf;
use quinn::crypto::rustls::QuicClientConfig;
use quinn::{Endpoint, VarInt};

use super::*;

/// A client with one connection.
pub(super) struct Client {
    pub(super) sender: SendRequest<h3_quinn::OpenStreams, Bytes>,
    pub(super) quic: quinn::Connection,
    pub(super) ended: tokio::task::JoinHandle<ConnectionError>,
    endpoint: Endpoint,
}

/// What an answer brought: status, fields, body.
pub(super) type Answer = (u16, http::HeaderMap, Vec<u8>);

pub(super) async fn quic(front: &Front) -> (Endpoint, quinn::Connection) {
    let crypto = QuicClientConfig::try_from(front.client(b"h3")).unwrap();
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let quic = endpoint.connect_with(config, front.https(), HOST).unwrap().await.unwrap();
    (endpoint, quic)
}

pub(super) async fn connect(front: &Front) -> Client {
    let (endpoint, quic) = quic(front).await;
    let connection = h3_quinn::Connection::new(quic.clone());
    let (mut driver, sender) = ::h3::client::builder().send_grease(false).build(connection).await.unwrap();
    let ended = tokio::spawn(async move { driver.wait_idle().await });
    Client { sender, quic, ended, endpoint }
}

pub(super) async fn ask(client: &mut Client, request: http::Request<()>) -> Result<Answer, StreamError> {
    let mut stream = client.sender.send_request(request).await?;
    stream.finish().await?;
    let response = timeout(PATIENCE, stream.recv_response()).await.unwrap()?;
    let mut body = Vec::new();
    while let Some(mut data) = stream.recv_data().await? {
        body.extend_from_slice(&data.copy_to_bytes(data.remaining()));
    }
    Ok((response.status().as_u16(), response.headers().clone(), body))
}

pub(super) fn request(uri: &str) -> http::Request<()> {
    http::Request::get(uri).body(()).unwrap()
}

#[tokio::test]
async fn http_3_answers_on_the_same_port() {
    let front = Front::start().await;
    let mut client = connect(&front).await;
    for _ in 0..3 {
        let (status, fields, body) = ask(&mut client, request("https://hello.edge.test/")).await.unwrap();
        assert_eq!((status, body.as_slice()), (200, &b"hello"[..]));
        assert_eq!(
            (&fields["server"], &fields["selvage-node"]),
            (&"selvage".parse().unwrap(), &"fra-1".parse().unwrap())
        );
        assert!(fields.contains_key("date") && !fields.contains_key("alt-svc"));
    }
    let metrics = front.parts.metrics.text();
    let counted = r#"selvage_requests_total{app="hello",fault="",outcome="ok",protocol="h3"} 3"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn a_large_answer_streams_whole() {
    let front = Front::start().await;
    let mut client = connect(&front).await;
    let (status, _, body) = ask(&mut client, request("https://hello.edge.test/large")).await.unwrap();
    assert_eq!((status, body.len()), (200, LARGE_BYTES));
}

#[tokio::test]
async fn the_rules_of_a_head_hold_here_too() {
    let front = Front::start().await;
    let mut client = connect(&front).await;
    for (request, want) in [
        (request("https://other.edge.test/"), 404),
        (http::Request::builder().method("TRACE").uri("https://hello.edge.test/").body(()).unwrap(), 405),
        (request("https://hello.edge.test/"), 200),
    ] {
        let what = format!("{} {}", request.method(), request.uri());
        assert_eq!(ask(&mut client, request).await.unwrap().0, want, "{what}");
    }
    let head = http::Request::head("https://hello.edge.test/").body(()).unwrap();
    let (_, fields, body) = ask(&mut client, head).await.unwrap();
    assert_eq!((&fields["content-length"], body.as_slice()), (&"5".parse().unwrap(), &b""[..]));
}

#[tokio::test]
async fn a_client_that_moves_to_another_address_keeps_its_connection() {
    let front = Front::start().await;
    let mut client = connect(&front).await;
    for _ in 0..5 {
        assert_eq!(ask(&mut client, request("https://hello.edge.test/")).await.unwrap().0, 200);
        client.endpoint.rebind(std::net::UdpSocket::bind("127.0.0.1:0").unwrap()).unwrap();
    }
    assert_eq!(client.quic.close_reason(), None);
}
