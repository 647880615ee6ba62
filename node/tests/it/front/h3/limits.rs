//! What a node's file says of one client holds for HTTP/3 as for the others.

use std::net::IpAddr;

use futures_util::FutureExt as _;
use selvage_config::front::PerAddress;

use super::leaving::Control;
use super::raw::{GOAWAY, GOOD, Outcome, Raw, frame, get, head, integer};
use super::*;

const LOAD: u64 = 0x107;
const NO_ERROR: u64 = 0x100;

#[tokio::test]
async fn a_head_has_so_many_bytes() {
    let front = Front::with(Bounds { head_bytes_max: 2_048, target_bytes_max: 100, ..Bounds::default() }).await;
    let (raw, _client) = Raw::connect(&front).await;
    let mut control = Control::of(&raw).await;
    assert_eq!(control.next().await, (0x04, [vec![0x06], integer(2_048)].concat()));
    let with = |length: usize| head(&[&GOOD[..], &[("x", "y".repeat(length).as_str())]].concat());
    assert_eq!(raw.ask(&with(1_500)).await, Outcome::Status(200));
    assert_eq!(raw.ask(&with(2_048)).await, Outcome::Status(431));
    // Beyond four times that it is not even read.
    assert_eq!(raw.ask(&with(9_000)).await, Outcome::Status(431));
    assert_eq!(raw.ask(&get(&format!("/{}", "a".repeat(100)))).await, Outcome::Status(414));
}

#[tokio::test]
async fn a_connection_has_so_many_requests_under_way() {
    let front = Front::with(Bounds { streams_max: 3, ..Bounds::default() }).await;
    let (raw, _client) = Raw::connect(&front).await;
    let mut held = Vec::new();
    for _ in 0..3 {
        let (mut send, receive) = raw.quic.open_bi().now_or_never().expect("room for three").unwrap();
        send.write_all(&get("/large")).await.unwrap();
        held.push((send, receive));
    }
    assert!(raw.quic.open_bi().now_or_never().is_none());
    drop(held);
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
}

#[tokio::test]
async fn a_connection_has_so_many_requests_and_then_is_told_to_go() {
    let front = Front::with(Bounds { streams_per_connection_max: 3, ..Bounds::default() }).await;
    let (raw, _client) = Raw::connect(&front).await;
    let mut control = Control::of(&raw).await;
    assert_eq!(control.next().await.0, 0x04);
    for _ in 0..3 {
        assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
    }
    assert_eq!(control.next().await, (GOAWAY, integer((1 << 62) - 4)));
    assert_eq!(raw.closed().await, NO_ERROR);
}

#[tokio::test]
async fn a_connection_that_rests_or_is_old_is_told_to_go() {
    for bounds in
        [Bounds { idle_ms: 200, ..Bounds::default() }, Bounds { age_ms: 200, idle_ms: 500, ..Bounds::default() }]
    {
        let front = Front::with(bounds).await;
        let (raw, _client) = Raw::connect(&front).await;
        let mut control = Control::of(&raw).await;
        assert_eq!(control.next().await.0, 0x04);
        assert_eq!(control.next().await, (GOAWAY, integer((1 << 62) - 4)));
        assert_eq!(raw.closed().await, NO_ERROR);
    }
}

#[tokio::test]
async fn a_head_has_so_much_time() {
    let front = Front::with(Bounds { head_ms: 200, ..Bounds::default() }).await;
    let (raw, _client) = Raw::connect(&front).await;
    let (mut send, receive) = raw.quic.open_bi().await.unwrap();
    send.write_all(&get("/")[..10]).await.unwrap();
    // H3_REQUEST_INCOMPLETE.
    assert_eq!(raw.outcome(receive).await, Outcome::Reset(0x10d));
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
}

#[tokio::test]
async fn an_answer_that_nobody_takes_is_given_up() {
    let front = Front::with(Bounds { write_idle_ms: 300, ..Bounds::default() }).await;
    let (raw, _client) = Raw::connect(&front).await;
    let (mut send, _receive) = raw.quic.open_bi().await.unwrap();
    send.write_all(&get("/large")).await.unwrap();
    send.finish().unwrap();
    // The client has opened a window of a mebibyte and takes nothing out of it. A request is counted at its end.
    front.counted(r#"",protocol="h3"} 1"#).await;
    assert!(front.parts.metrics.text().contains("selvage_requests_under_way 0"));
}

#[tokio::test]
async fn a_client_makes_so_much_work() {
    let flood = |count: usize| frame(0x0d, &[0]).repeat(count);
    let front = Front::with(Bounds { glitches_max: 20, ..Bounds::default() }).await;
    let (raw, mut control) = Raw::connect(&front).await;
    let _ = control.write_all(&flood(30)).await;
    assert_eq!(raw.closed().await, LOAD);
    let (raw, mut control) = Raw::connect(&front).await;
    // Every answer makes up for one.
    for _ in 0..40 {
        control.write_all(&flood(1)).await.unwrap();
        assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
    }
}

#[tokio::test]
async fn a_client_pings_so_often() {
    // It is looked at in every half of the shortest time.
    let front = Front::with(Bounds { glitches_max: 20, write_idle_ms: 400, ..Bounds::default() }).await;
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let connect = |every_ms| {
        let mut config = quinn::ClientConfig::new(Arc::new(QuicClientConfig::try_from(front.client(b"h3")).unwrap()));
        let mut transport = quinn::TransportConfig::default();
        transport.keep_alive_interval(Some(Duration::from_millis(every_ms)));
        config.transport_config(Arc::new(transport));
        endpoint.connect_with(config, front.https(), HOST).unwrap()
    };
    let (calm, busy) = (connect(500).await.unwrap(), connect(1).await.unwrap());
    match timeout(PATIENCE, busy.closed()).await.expect("a flood of pings goes on") {
        quinn::ConnectionError::ApplicationClosed(close) => {
            assert!([LOAD, NO_ERROR].contains(&close.error_code.into_inner()))
        }
        other => panic!("{other}"),
    }
    assert_eq!(calm.close_reason(), None);
}

#[tokio::test]
async fn a_node_has_so_many_handshakes_under_way() {
    let front = Front::with(Bounds { handshakes_max: 1, ..Bounds::default() }).await;
    let silent = TcpStream::connect(front.https()).await.unwrap();
    let refused = |count: usize| format!(r#"selvage_connections_refused_total{{bound="handshakes"}} {count}"#);
    // The listener takes them in their order.
    if let Ok(mut other) = TcpStream::connect(front.https()).await {
        let mut none = Vec::new();
        let _ = timeout(PATIENCE, other.read_to_end(&mut none)).await.expect("it is reset");
    }
    front.counted(&refused(1)).await;
    let crypto = QuicClientConfig::try_from(front.client(b"h3")).unwrap();
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    let config = quinn::ClientConfig::new(Arc::new(crypto));
    let connect = || endpoint.connect_with(config.clone(), front.https(), HOST).unwrap();
    let refusal = timeout(PATIENCE, connect()).await.unwrap().unwrap_err();
    // RFC 9000 20.1: CONNECTION_REFUSED.
    let is_refusal =
        matches!(&refusal, quinn::ConnectionError::ConnectionClosed(close) if u64::from(close.error_code) == 2);
    assert!(is_refusal, "{refusal}");
    front.counted(&refused(2)).await;
    drop(silent);
    front.counted(r#"selvage_tls_handshakes_total{kind="failed"} 1"#).await;
    assert!(timeout(PATIENCE, connect()).await.unwrap().is_ok());
}

/// How many of 30 requests, over three versions in turn, are answered for this client of a proxy.
async fn answered(front: &Front, client: IpAddr) -> usize {
    let mut one = h1(TcpStream::connect(front.http()).await.unwrap()).await;
    let mut two = h2(front.tls(b"h2").await).await;
    let mut three = connect(front).await;
    let mut answered = 0;
    for number in 0..30 {
        let uri = if number % 3 == 0 { "/" } else { "https://hello.edge.test/" };
        let mut request = super::super::get(uri);
        request.headers_mut().insert("x-forwarded-for", client.to_string().parse().unwrap());
        let status = match number % 3 {
            0 => one.send_request(request).await.unwrap().status().as_u16(),
            1 => two.send_request(request).await.unwrap().status().as_u16(),
            _ => ask(&mut three, request.map(|_| ())).await.unwrap().0,
        };
        assert!([200, 429].contains(&status), "{status}");
        answered += usize::from(status == 200);
    }
    answered
}

#[tokio::test]
async fn a_client_behind_a_proxy_has_its_rate_over_all_versions() {
    let per_address = PerAddress { requests_per_second: 1, exempt: Vec::new(), ..PerAddress::default() };
    let forwarded_from = vec!["127.0.0.0/8".parse().unwrap()];
    let front = Front::with(Bounds { per_address, forwarded_from, ..Bounds::default() }).await;
    // Two at once after a rest, and one each second that this takes.
    let start = std::time::Instant::now();
    for client in ["192.0.2.7", "192.0.2.8"] {
        let most = 2 + usize::try_from(start.elapsed().as_secs()).unwrap();
        let count = answered(&front, client.parse().unwrap()).await;
        let most = most + usize::try_from(start.elapsed().as_secs()).unwrap() + 1;
        assert!((2..=most.min(29)).contains(&count), "{client}: {count}");
    }
    // The proxy itself has no bound.
    let mut client = connect(&front).await;
    for _ in 0..10 {
        assert_eq!(ask(&mut client, request("https://hello.edge.test/")).await.unwrap().0, 200);
    }
}
