//! The same answer over every version.

use super::*;

#[tokio::test]
async fn http_1_over_tls_tells_where_http_3_is() {
    let front = Front::start().await;
    let mut client = h1(front.tls(b"http/1.1").await).await;
    let response = client.send_request(get("/")).await.unwrap();
    assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_11));
    let fields = response.headers();
    assert_eq!(fields["alt-svc"], format!("h3=\":{}\"; ma=86400", front.https().port()));
    assert_eq!((&fields["server"], &fields["selvage-node"], &fields["selvage-region"]).2, "fra");
    assert!(fields.contains_key("date") && fields.contains_key("selvage-request-id"));
    assert_eq!(text(response).await, "hello");
    // Keep-alive: the same connection answers again.
    assert_eq!(text(client.send_request(get("/")).await.unwrap()).await, "hello");
}

#[tokio::test]
async fn http_2_over_tls_answers_many_at_once() {
    let front = Front::start().await;
    let client = h2(front.tls(b"h2").await).await;
    let asks = (0..50).map(|_| {
        let mut client = client.clone();
        async move { client.send_request(get("https://hello.edge.test/")).await.unwrap() }
    });
    for response in futures_util::future::join_all(asks).await {
        assert_eq!((response.status().as_u16(), response.version()), (200, http::Version::HTTP_2));
        assert!(response.headers().contains_key("alt-svc"));
        assert_eq!(text(response).await, "hello");
    }
}

#[tokio::test]
async fn the_plain_listener_tells_http_1_and_2_apart() {
    let front = Front::start().await;
    let mut one = h1(TcpStream::connect(front.http()).await.unwrap()).await;
    let response = one.send_request(get("/")).await.unwrap();
    assert!(!response.headers().contains_key("alt-svc"), "without TLS nothing is promised");
    assert_eq!(text(response).await, "hello");
    let mut two = h2(TcpStream::connect(front.http()).await.unwrap()).await;
    let response = two.send_request(get("http://hello.edge.test/")).await.unwrap();
    assert_eq!(response.version(), http::Version::HTTP_2);
    assert_eq!(text(response).await, "hello");
}

#[tokio::test]
async fn a_preface_in_pieces_is_http_2_all_the_same() {
    let front = Front::start().await;
    let mut tcp = TcpStream::connect(front.http()).await.unwrap();
    tcp.set_nodelay(true).unwrap();
    for piece in b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n".chunks(5) {
        tcp.write_all(piece).await.unwrap();
        tcp.flush().await.unwrap();
        tokio::task::yield_now().await;
    }
    // An empty SETTINGS frame. The node's own begins with its length and type 4.
    tcp.write_all(&[0, 0, 0, 4, 0, 0, 0, 0, 0]).await.unwrap();
    let mut head = [0; 9];
    timeout(PATIENCE, tcp.read_exact(&mut head)).await.unwrap().unwrap();
    assert_eq!(head[3], 4, "{head:?}");
}

#[tokio::test]
async fn head_gets_a_length_and_no_body() {
    let front = Front::start().await;
    let answer = front.raw("HEAD / HTTP/1.1\r\nhost: hello.edge.test\r\nconnection: close\r\n\r\n").await;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.starts_with("HTTP/1.1 200 ") && head.contains("content-length: 5"), "{head}");
    assert_eq!(body, "");
    let mut two = h2(front.tls(b"h2").await).await;
    let request = http::Request::head("https://hello.edge.test/").body(Empty::new()).unwrap();
    let response = two.send_request(request).await.unwrap();
    assert_eq!(response.headers()["content-length"], "5");
    assert_eq!(text(response).await, "");
}

#[tokio::test]
async fn connections_are_counted_by_version() {
    let front = Front::start().await;
    let mut client = h2(front.tls(b"h2").await).await;
    text(client.send_request(get("https://hello.edge.test/")).await.unwrap()).await;
    let metrics = front.parts.metrics.text();
    assert!(metrics.contains(r#"selvage_connections{protocol="h2"} 1"#), "{metrics}");
    let counted = r#"selvage_requests_total{app="hello",fault="",outcome="ok",protocol="h2"} 1"#;
    assert!(metrics.contains(counted), "{metrics}");
}

#[tokio::test]
async fn spins_health_path_answers_at_an_apps_host() {
    let front = Front::start().await;
    let mut client = h1(TcpStream::connect(front.http()).await.unwrap()).await;
    let response = client.send_request(get("/.well-known/spin/health")).await.unwrap();
    assert_eq!(text(response).await, "OK");
}
