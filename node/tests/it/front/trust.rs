//! Who a client is, whom we believe about it, and what one address may do.

use selvage_config::front::PerAddress;

use super::*;

const GET: &str = "GET / HTTP/1.1\r\nhost: hello.edge.test\r\nconnection: close\r\n\r\n";

fn bound(per_address: &PerAddress) -> Bounds {
    let per_address = PerAddress { exempt: Vec::new(), ..*per_address };
    Bounds { per_address, ..Bounds::default() }
}

/// What comes for these bytes, if anything does.
async fn said(front: &Front, bytes: &[u8]) -> String {
    let mut tcp = TcpStream::connect(front.http()).await.unwrap();
    // The node may have closed already, and a reset is an end too.
    let _ = tcp.write_all(bytes).await;
    let mut answer = Vec::new();
    let _ = timeout(PATIENCE, tcp.read_to_end(&mut answer)).await.unwrap();
    String::from_utf8(answer).unwrap()
}

#[tokio::test]
async fn one_address_has_so_many_connections() {
    let front = Front::with(bound(&PerAddress { connections_max: 3, ..PerAddress::default() })).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let mut client = h1(TcpStream::connect(front.http()).await.unwrap()).await;
        assert_eq!(text(client.send_request(get("/")).await.unwrap()).await, "hello");
        held.push(client);
    }
    assert_eq!(said(&front, GET.as_bytes()).await, "");
    front.counted(r#"selvage_connections_refused_total{bound="per-address"} 1"#).await;
    drop(held);
    front.counted(r#"selvage_connections{protocol="h1"} 0"#).await;
    assert!(said(&front, GET.as_bytes()).await.ends_with("hello"));
}

#[tokio::test]
async fn one_address_makes_so_many_connections_a_second() {
    let front = Front::with(bound(&PerAddress { connections_per_second: 1, ..PerAddress::default() })).await;
    // Two at once; a slow machine may get another one or two.
    let mut answers = Vec::new();
    for _ in 0..20 {
        answers.push(said(&front, GET.as_bytes()).await);
    }
    assert!(answers[0].ends_with("hello") && answers[1].ends_with("hello"));
    assert!(answers.iter().any(String::is_empty), "{answers:?}");
    assert!(front.parts.metrics.text().contains(r#"selvage_connections_refused_total{bound="per-address-rate"}"#));
}

#[tokio::test]
async fn one_address_makes_so_many_requests_a_second() {
    let front = Front::with(bound(&PerAddress { requests_per_second: 5, ..PerAddress::default() })).await;
    let mut client = h1(TcpStream::connect(front.http()).await.unwrap()).await;
    let mut refused = 0;
    for _ in 0..50 {
        let response = client.send_request(get("/")).await.unwrap();
        if response.status() == 429 {
            assert!(response.headers().contains_key("retry-after"));
            refused += 1;
        }
        text(response).await;
    }
    assert!((1..=40).contains(&refused), "{refused}");
}

#[tokio::test]
async fn a_balancer_tells_whose_connection_it_passes_on() {
    let bounds = bound(&PerAddress { connections_max: 1, ..PerAddress::default() });
    let front = Front::with(Bounds { proxy_protocol_from: vec!["127.0.0.0/8".parse().unwrap()], ..bounds }).await;
    let of = |client: &str| format!("PROXY TCP4 {client} 192.0.2.1 4711 80\r\n");
    let mut held = Vec::new();
    for client in ["192.0.2.7", "192.0.2.8"] {
        let mut tcp = TcpStream::connect(front.http()).await.unwrap();
        tcp.write_all(of(client).as_bytes()).await.unwrap();
        let mut client = h1(tcp).await;
        assert_eq!(text(client.send_request(get("/")).await.unwrap()).await, "hello");
        held.push(client);
    }
    // The same client again is one too many, another one is not; the balancer itself is not bound.
    assert_eq!(said(&front, format!("{}{GET}", of("192.0.2.7")).as_bytes()).await, "");
    assert!(said(&front, format!("{}{GET}", of("192.0.2.9")).as_bytes()).await.ends_with("hello"));
    let two = [b"\r\n\r\n\0\r\nQUIT\n\x21\x11\0\x0c", &[192, 0, 2, 10, 192, 0, 2, 1, 0x12, 0x67, 0, 80][..]].concat();
    assert!(said(&front, &[&two, GET.as_bytes()].concat()).await.ends_with("hello"));
    let local = b"\r\n\r\n\0\r\nQUIT\n\x20\0\0\0";
    for _ in 0..2 {
        assert!(said(&front, &[local, GET.as_bytes()].concat()).await.ends_with("hello"));
    }
    drop(held);
}

#[tokio::test]
async fn a_balancer_that_tells_nothing_is_not_served() {
    let front =
        Front::with(Bounds { proxy_protocol_from: vec!["127.0.0.0/8".parse().unwrap()], ..Bounds::default() }).await;
    for bytes in [GET, "PROXY TCP4 x y 1 2\r\n", "PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"] {
        assert_eq!(said(&front, bytes.as_bytes()).await, "", "{bytes:?}");
    }
    front.counted(r#"selvage_connections_refused_total{bound="proxy-header"} 3"#).await;
}

#[tokio::test]
async fn nobody_else_can_say_who_it_is() {
    let front = Front::start().await;
    let answer = said(&front, format!("PROXY TCP4 192.0.2.7 192.0.2.1 4711 80\r\n{GET}").as_bytes()).await;
    assert!(answer.starts_with("HTTP/1.1 400 "), "{answer}");
}
