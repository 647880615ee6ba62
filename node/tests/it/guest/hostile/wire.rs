//! What a client sees of hostile guests, over one connection: it must always know where an answer ends.

use hyper::client::conn::http2;
use hyper_util::rt::{TokioExecutor, TokioIo};
use selvage_config::bundle::Bundle;
use selvage_node::{Node, UpOptions};
use tokio::net::TcpStream;

use super::*;

/// Guests, each at the path of its name.
const GUESTS: [&str; 10] = [
    "hello",
    "short_body",
    "long_body",
    "trap_mid_body",
    "exit_late",
    "twice",
    "status",
    "forged_fields",
    "huge_headers",
    "slow",
];

/// A node that runs them on one listener without TLS.
async fn up() -> (Node, std::net::SocketAddr) {
    let directory = tempfile::tempdir().unwrap();
    let mut manifest = String::from("spin_manifest_version = 2\n[application]\nname = \"hostile\"\n");
    for name in GUESTS {
        let id = name.replace('_', "-");
        std::fs::write(directory.path().join(format!("{name}.wasm")), code(&format!("{name}.wat"))).unwrap();
        manifest += &format!(
            "[[trigger.http]]\nroute = \"/{name}/...\"\ncomponent = \"{id}\"\n\
             [component.{id}]\nsource = \"{name}.wasm\"\n\
             [component.{id}.tool.selvage]\nlimits = {{ wall_ms = {} }}\n",
            if name == "slow" { 200 } else { 30_000 }
        );
    }
    std::fs::write(directory.path().join("spin.toml"), manifest).unwrap();
    let options = UpOptions {
        bundle: Bundle::load(&directory.path().join("spin.toml")).unwrap(),
        listen: "127.0.0.1:0".parse().unwrap(),
        tls: None,
        variables: BTreeMap::new(),
        environment: BTreeMap::new(),
        state_dir: None,
        compiled_dir: None,
        private_networks: false,
        values: Vec::new(),
    };
    let node = Box::pin(Node::up(options)).await.unwrap();
    let address = node.addresses().http.unwrap();
    (node, address)
}

/// Everything that comes back for these bytes until the node closes the connection.
async fn raw(address: std::net::SocketAddr, bytes: &str) -> Vec<u8> {
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(bytes.as_bytes()).await.unwrap();
    let mut answer = Vec::new();
    tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap().unwrap();
    answer
}

/// One answer as RFC 9112 6.3 frames it: its status, its head, and its body or `None` if that broke off.
type Answer = (u16, String, Option<Vec<u8>>);

/// Takes the first answer off `bytes`. Panics on bytes that are none.
fn take(bytes: &mut &[u8], head_only: bool) -> Answer {
    let end = bytes.windows(4).position(|four| four == b"\r\n\r\n");
    let end = end.unwrap_or_else(|| panic!("no head: {:?}", String::from_utf8_lossy(bytes)));
    let head = String::from_utf8(bytes[..end].to_vec()).unwrap().to_lowercase();
    *bytes = &bytes[end + 4..];
    let status = head.strip_prefix("http/1.1 ").expect("an answer begins here")[..3].parse().unwrap();
    let field = |name: &str| head.lines().find_map(|line| line.strip_prefix(&format!("{name}: ")));
    if head_only || status == 204 || status == 304 {
        return (status, head, Some(Vec::new()));
    }
    let body = if field("transfer-encoding") == Some("chunked") {
        assert_eq!(field("content-length"), None, "{head}");
        take_chunks(bytes)
    } else {
        let length = field("content-length").expect("an answer has an end").parse().unwrap();
        bytes.split_at_checked(length).map(|(body, rest)| {
            *bytes = rest;
            body.to_vec()
        })
    };
    (status, head, body)
}

fn take_chunks(bytes: &mut &[u8]) -> Option<Vec<u8>> {
    let mut body = Vec::new();
    loop {
        let end = bytes.windows(2).position(|two| two == b"\r\n")?;
        let length = usize::from_str_radix(std::str::from_utf8(&bytes[..end]).unwrap(), 16).unwrap();
        let (chunk, rest) = bytes[end + 2..].split_at_checked(length)?;
        *bytes = rest.strip_prefix(b"\r\n")?;
        if length == 0 {
            return Some(body);
        }
        body.extend(chunk);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_contradiction_in_an_answer_never_moves_the_next_one() {
    let (node, address) = up().await;
    // Status 0: the answer is a fault if nothing was sent yet, and otherwise breaks off.
    for (path, want) in [
        ("/short_body/", 0),
        ("/long_body/", 0),
        ("/trap_mid_body/", 0),
        ("/exit_late/", 0),
        ("/twice/", 500),
        ("/huge_headers/", 500),
        ("/slow/", 504),
        ("/forged_fields/", 204),
        ("/status/100", 500),
        ("/status/101", 500),
        ("/status/103", 500),
        ("/status/099", 500),
        ("/status/200", 200),
        ("/status/204", 204),
        ("/status/205", 205),
        ("/status/304", 304),
        ("/status/999", 999),
    ] {
        for method in ["GET", "HEAD"] {
            let second = "GET /hello/ HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n";
            let bytes = raw(address, &format!("{method} {path} HTTP/1.1\r\nhost: a\r\n\r\n{second}")).await;
            let mut rest = &bytes[..];
            let (status, head, body) = take(&mut rest, method == "HEAD");
            let context = format!("{method} {path}: {}", String::from_utf8_lossy(&bytes));
            match want {
                // A tick between its two answers, and the first one is out.
                500 if path == "/twice/" => assert!(matches!(status, 201 | 500), "{context}"),
                0 => assert!(status == 500 || body.is_none() || method == "HEAD", "{context}"),
                want => assert_eq!(status, want, "{context}"),
            }
            assert!(!head.contains("forged") && !head.contains("upgrade"), "{context}");
            if body.is_none() {
                // A connection whose answer broke off is good for nothing more.
                assert!(!String::from_utf8_lossy(&bytes).contains("hello"), "{context}");
                continue;
            }
            let (status, _, body) = take(&mut rest, false);
            assert_eq!((status, body), (200, Some(b"hello".to_vec())), "{context}");
            assert_eq!(rest, b"", "{context}");
        }
    }
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn one_stream_of_http_2_that_breaks_leaves_the_others_alone() {
    let (node, address) = up().await;
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let mut get = async |path: &str| {
        let uri = format!("http://a{path}");
        let request = http::Request::get(uri).body(http_body_util::Empty::<Bytes>::new()).unwrap();
        let response = tokio::time::timeout(PATIENCE, sender.send_request(request)).await.unwrap().ok()?;
        let status = response.status().as_u16();
        let body = tokio::time::timeout(PATIENCE, response.into_body().collect()).await.unwrap().ok()?;
        Some((status, body.to_bytes()))
    };
    for (path, want) in [
        ("/short_body/", 0),
        ("/long_body/", 0),
        ("/trap_mid_body/", 0),
        ("/exit_late/", 0),
        ("/twice/", 500),
        ("/huge_headers/", 500),
        ("/forged_fields/", 204),
        ("/status/101", 500),
        ("/status/204", 204),
        ("/status/304", 304),
        ("/status/999", 999),
    ] {
        let answer = get(path).await;
        match (want, &answer) {
            // A reset stream is an answer that broke off.
            (0, None) => {}
            (0, Some((status, _))) => assert_eq!(*status, 500, "{path}: {answer:?}"),
            // A tick between its two answers, and the first one is out.
            (500, Some((201, _))) if path == "/twice/" => {}
            (want, answer) => assert_eq!(answer.as_ref().map(|(status, _)| *status), Some(want), "{path}"),
        }
        assert_eq!(get("/hello/").await, Some((200, Bytes::from_static(b"hello"))), "after {path}");
    }
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_mebibyte_of_fields_from_a_client_is_refused_before_any_guest() {
    let (node, address) = up().await;
    let line = format!("x: {}\r\n", "a".repeat(8 * 1024));
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"GET /hello/ HTTP/1.1\r\nhost: a\r\n").await.unwrap();
    let mut sent = 0;
    // The node may stop listening before it has heard it all.
    while sent < 1 << 20 && stream.write_all(line.as_bytes()).await.is_ok() {
        sent += line.len();
    }
    let mut answer = Vec::new();
    // What it said may be lost to the reset that follows bytes nobody reads; more than a refusal it was not.
    let _ = tokio::time::timeout(PATIENCE, stream.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 431 "), "{:?}", String::from_utf8_lossy(&answer));

    // In HTTP/2 it is the stream alone that is refused.
    let stream = TokioIo::new(TcpStream::connect(address).await.unwrap());
    let (mut sender, connection) = http2::handshake(TokioExecutor::new(), stream).await.unwrap();
    tokio::spawn(connection);
    let mut large = http::Request::get("http://a/hello/").body(http_body_util::Empty::<Bytes>::new()).unwrap();
    for number in 0..64 {
        let name = http::HeaderName::try_from(format!("x-{number}")).unwrap();
        large.headers_mut().insert(name, "a".repeat(16 * 1024).parse().unwrap());
    }
    let refused = tokio::time::timeout(PATIENCE, sender.send_request(large)).await.unwrap();
    assert!(refused.is_err() || refused.is_ok_and(|response| response.status() == 431));
    assert_eq!(told_raw(address).await, 200);
    node.drain().await;
}

/// The status of a healthy guest on a connection of its own.
async fn told_raw(address: std::net::SocketAddr) -> u16 {
    let bytes = raw(address, "GET /hello/ HTTP/1.1\r\nhost: a\r\nconnection: close\r\n\r\n").await;
    take(&mut &bytes[..], false).0
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_sends_without_end_to_a_guest_that_never_reads_is_held_back_and_ended() {
    let (node, address) = up().await;
    let mut stream = TcpStream::connect(address).await.unwrap();
    stream.write_all(b"POST /slow/ HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n").await.unwrap();
    let (mut reading, mut writing) = stream.into_split();
    let sending = tokio::spawn(async move {
        let chunk = [b"10000\r\n".as_slice(), &[b'x'; 0x10000], b"\r\n"].concat();
        let mut sent = 0_u64;
        while writing.write_all(&chunk).await.is_ok() {
            sent += 0x10000;
        }
        sent
    });
    let mut answer = Vec::new();
    let _ = tokio::time::timeout(PATIENCE, reading.read_to_end(&mut answer)).await.unwrap();
    assert!(answer.is_empty() || answer.starts_with(b"HTTP/1.1 504 "), "{:?}", String::from_utf8_lossy(&answer));
    // The connection is closed, so the sender ends too; what it got rid of lay in the buffers of two sockets.
    let sent = tokio::time::timeout(PATIENCE, sending).await.unwrap().unwrap();
    assert!(sent < 64 << 20, "{sent} bytes were taken");
    assert_eq!(told_raw(address).await, 200);
    node.drain().await;
}
