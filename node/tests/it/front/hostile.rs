//! What is refused, and who must not suffer from it.

use super::*;

/// A request's answer line, for a head that names the app's host unless it has one of its own.
async fn status(front: &Front, head: &str) -> String {
    let answer = front.raw(&format!("{head}connection: close\r\n\r\n")).await;
    answer.split("\r\n").next().unwrap().chars().skip(9).take(3).collect()
}

#[tokio::test]
async fn a_request_without_one_clear_host_is_refused() {
    let front = Front::start().await;
    for (head, want) in [
        ("GET / HTTP/1.1\r\nhost: hello.edge.test\r\n", "200"),
        ("GET / HTTP/1.1\r\nHost: HELLO.edge.test.:80\r\n", "200"),
        ("GET http://hello.edge.test/ HTTP/1.1\r\nhost: hello.edge.test\r\n", "200"),
        ("GET / HTTP/1.1\r\n", "400"),
        ("GET / HTTP/1.0\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: hello.edge.test\r\nhost: hello.edge.test\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: hello.edge.test\r\nhost: other.edge.test\r\n", "400"),
        ("GET / HTTP/1.1\r\nhost: a@hello.edge.test\r\n", "400"),
        // RFC 9112 3.2.2: the target wins.
        ("GET http://hello.edge.test/ HTTP/1.1\r\nhost: other.edge.test\r\n", "200"),
        ("GET http://other.edge.test/ HTTP/1.1\r\nhost: hello.edge.test\r\n", "404"),
        ("GET / HTTP/1.1\r\nhost: other.edge.test\r\n", "404"),
        ("GET / HTTP/1.1\r\nhost: 127.0.0.1\r\n", "404"),
        ("GET /missing HTTP/1.1\r\nhost: hello.edge.test\r\n", "404"),
    ] {
        assert_eq!(status(&front, head).await, want, "{head}");
    }
    let mut two = h2(front.tls(b"h2").await).await;
    let mut forged = get("https://hello.edge.test/");
    forged.headers_mut().insert("host", "other.edge.test".parse().unwrap());
    assert_eq!(two.send_request(forged).await.unwrap().status(), 400);
}

#[tokio::test]
async fn methods_that_are_not_for_us_are_refused() {
    let front = Front::start().await;
    for (head, want) in [
        ("CONNECT hello.edge.test:443 HTTP/1.1\r\nhost: hello.edge.test:443\r\n", "405"),
        ("TRACE / HTTP/1.1\r\nhost: hello.edge.test\r\n", "405"),
        ("OPTIONS * HTTP/1.1\r\nhost: hello.edge.test\r\n", "400"),
        ("DELETE / HTTP/1.1\r\nhost: hello.edge.test\r\n", "200"),
    ] {
        assert_eq!(status(&front, head).await, want, "{head}");
    }
}

#[tokio::test]
async fn a_body_with_two_ends_is_refused_or_has_one() {
    let front = Front::start().await;
    for codings in ["chunked, chunked", "identity", "chunked, identity"] {
        let head = format!("POST / HTTP/1.1\r\nhost: hello.edge.test\r\ntransfer-encoding: {codings}\r\n");
        assert_eq!(status(&front, &head).await, "400", "{codings}");
    }
    for lengths in ["5\r\ncontent-length: 6", "-1", "+5", "5, 5", "x"] {
        let head = format!("POST / HTTP/1.1\r\nhost: hello.edge.test\r\ncontent-length: {lengths}\r\n");
        assert_eq!(status(&front, &head).await, "400", "{lengths}");
    }
    // RFC 9112 6.3: nobody says which of the two counts, and nothing after it is taken for a request.
    let smuggled = "GET /missing HTTP/1.1\r\nhost: hello.edge.test\r\n\r\n";
    let answer = front
        .raw(&format!(
            "POST / HTTP/1.1\r\nhost: hello.edge.test\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n\
             0\r\n\r\n{smuggled}"
        ))
        .await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
    assert_eq!(answer.matches("HTTP/1.1 ").count(), 1, "{answer}");
}

#[tokio::test]
async fn a_head_that_is_too_large_is_told_so() {
    let front = Front::start().await;
    let large = format!("GET / HTTP/1.1\r\nhost: hello.edge.test\r\nx: {}\r\n", "a".repeat(17 * 1024));
    assert_eq!(status(&front, &large).await, "431");
    let many = format!("GET / HTTP/1.1\r\nhost: hello.edge.test\r\n{}", "a: b\r\n".repeat(101));
    assert_eq!(status(&front, &many).await, "431");
    let long = format!("GET /{} HTTP/1.1\r\nhost: hello.edge.test\r\n", "a".repeat(9 * 1024));
    assert_eq!(status(&front, &long).await, "414");
    let mut two = h2(front.tls(b"h2").await).await;
    let mut request = get("https://hello.edge.test/");
    request.headers_mut().insert("x", "a".repeat(17 * 1024).parse().unwrap());
    assert_eq!(two.send_request(request).await.unwrap().status(), 431);
    // The connection lives on.
    assert_eq!(two.send_request(get("https://hello.edge.test/")).await.unwrap().status(), 200);
}

#[tokio::test]
async fn clients_that_say_nothing_hold_up_nobody() {
    let front = Front::start().await;
    let mut silent = Vec::new();
    for address in [front.https(), front.http()] {
        for _ in 0..50 {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
    }
    let answer = async {
        let mut one = h1(front.tls(b"http/1.1").await).await;
        text(one.send_request(get("/")).await.unwrap()).await
    };
    assert_eq!(timeout(Duration::from_secs(5), answer).await.unwrap(), "hello");
    assert!(front.raw("GET / HTTP/1.1\r\nhost: hello.edge.test\r\nconnection: close\r\n\r\n").await.ends_with("hello"));
    drop(silent);
}

#[tokio::test]
async fn a_name_without_a_certificate_gets_no_handshake() {
    let front = Front::start().await;
    let tcp = TcpStream::connect(front.https()).await.unwrap();
    let connector = TlsConnector::from(Arc::new(front.client(b"h2")));
    let refused = connector.connect(ServerName::try_from("other.edge.test").unwrap(), tcp).await;
    assert!(refused.is_err());
}

#[tokio::test]
async fn bytes_that_are_no_http_are_refused() {
    let front = Front::start().await;
    for noise in ["\u{0}\u{1}\u{2}\r\n\r\n", "PRI * HTTP/2.0\r\n\r\nXX\r\n\r\n", "hello\r\n\r\n"] {
        let answer = front.raw(noise).await;
        let is_refused = ["HTTP/1.1 400 ", "HTTP/1.1 505 "].iter().any(|line| answer.starts_with(line));
        assert!(answer.is_empty() || is_refused, "{noise:?}: {answer}");
    }
    assert!(front.raw("GET / HTTP/1.1\r\nhost: hello.edge.test\r\nconnection: close\r\n\r\n").await.ends_with("hello"));
}
