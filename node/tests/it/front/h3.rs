//! HTTP/3.

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
    _endpoint: Endpoint,
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
    Client { sender, quic, ended, _endpoint: endpoint }
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
    let with = |name: &'static str, value: &str| {
        let mut request = request("https://hello.edge.test/");
        request.headers_mut().insert(name, value.parse().unwrap());
        request
    };
    for (request, want) in [
        // A host that differs from `:authority` is not sent by this client: the rule's own test has it.
        (with("connection", "close"), 400),
        (with("te", "gzip"), 400),
        (with("transfer-encoding", "chunked"), 400),
        (request("https://other.edge.test/"), 404),
        (http::Request::builder().method("TRACE").uri("https://hello.edge.test/").body(()).unwrap(), 405),
        (request("https://hello.edge.test/"), 200),
    ] {
        let what = format!("{:?}", request.headers().keys().next());
        assert_eq!(ask(&mut client, request).await.unwrap().0, want, "{what}");
    }
    let head = http::Request::head("https://hello.edge.test/").body(()).unwrap();
    let (_, fields, body) = ask(&mut client, head).await.unwrap();
    assert_eq!((&fields["content-length"], body.as_slice()), (&"5".parse().unwrap(), &b""[..]));
}

#[tokio::test]
async fn a_peer_that_declares_a_huge_frame_is_cut_off() {
    let front = Front::start().await;
    // HEADERS of 1 GiB, and a frame of an unknown type of the same size.
    for kind in [0x01, 0x21] {
        let (_endpoint, quic) = quic(&front).await;
        let (mut send, _receive) = quic.open_bi().await.unwrap();
        let mut frame = vec![kind];
        frame.extend_from_slice(&0xc000_0000_4000_0000_u64.to_be_bytes());
        send.write_all(&frame).await.unwrap();
        let closed = timeout(PATIENCE, quic.closed()).await.unwrap();
        let quinn::ConnectionError::ApplicationClosed(close) = closed else { panic!("{closed}") };
        assert_eq!(close.error_code, VarInt::from_u32(0x107), "H3_EXCESSIVE_LOAD");
    }
}

#[tokio::test]
async fn a_head_of_thousands_of_short_fields_is_refused_and_breaks_nothing() {
    let front = Front::start().await;
    let (_endpoint, quic) = quic(&front).await;
    let (mut send, mut receive) = quic.open_bi().await.unwrap();
    // A field section of one-byte references into the static table (RFC 9204 4.5.2): prefix, then 50,000 times field 2.
    let mut frame = vec![0x01, 0x80, 0x00, 0xc3, 0x52, 0, 0];
    frame.resize(frame.len() + 50_000, 0xc2);
    send.write_all(&frame).await.unwrap();
    send.finish().unwrap();
    let answer = timeout(PATIENCE, receive.read_to_end(64 * 1024)).await.unwrap().unwrap();
    // 431, Huffman-coded (RFC 7541 B) or not.
    let is_431 = |bytes: &[u8]| bytes == [0x69, 0x90, 0xff] || bytes == b"431";
    assert!(answer.windows(3).any(is_431), "{answer:02x?}");
    let mut client = connect(&front).await;
    assert_eq!(ask(&mut client, request("https://hello.edge.test/")).await.unwrap().0, 200);
}
