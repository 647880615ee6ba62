//! Clients that are slow on purpose: each is given up in its time, whatever it sends in between.

use super::frames::{End, GOAWAY, Raw, SETTINGS, ask, frame};
use super::*;

/// Bounds that run out while a test waits.
fn short() -> Bounds {
    Bounds { head_ms: 300, idle_ms: 300, body_idle_ms: 300, write_idle_ms: 300, ..Bounds::default() }
}

/// Waits until the node closes. What it said before is returned.
async fn closed(tcp: &mut TcpStream) -> Vec<u8> {
    let mut said = Vec::new();
    // A reset is an end too.
    let _ = timeout(PATIENCE, tcp.read_to_end(&mut said)).await.expect("the node closes");
    said
}

#[tokio::test]
async fn a_client_that_says_nothing_is_closed() {
    let front = Front::with(short()).await;
    let mut plain = TcpStream::connect(front.http()).await.unwrap();
    let mut one = front.tls(b"http/1.1").await;
    let mut two = front.tls(b"h2").await;
    assert_eq!(closed(&mut plain).await, b"");
    let mut said = Vec::new();
    let _ = timeout(PATIENCE, one.read_to_end(&mut said)).await.unwrap();
    assert_eq!(said, b"");
    let _ = timeout(PATIENCE, two.read_to_end(&mut said)).await.unwrap();
}

#[tokio::test]
async fn a_client_that_does_not_shake_hands_is_closed() {
    let front = Front::with(Bounds { handshake_ms: 200, ..Bounds::default() }).await;
    let mut silent = TcpStream::connect(front.https()).await.unwrap();
    assert_eq!(closed(&mut silent).await, b"");
    front.counted(r#"selvage_tls_handshakes_total{kind="failed"} 1"#).await;
}

#[tokio::test]
async fn a_head_that_drips_is_closed() {
    let front = Front::with(short()).await;
    let tcp = TcpStream::connect(front.http()).await.unwrap();
    let (mut read, mut write) = tcp.into_split();
    let dripping = async {
        write.write_all(b"GET / HTTP/1.1\r\nhost: hello.edge.test\r\n").await.unwrap();
        while write.write_all(b"x: y\r\n").await.is_ok() {
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    let mut said = Vec::new();
    let reading = read.read_to_end(&mut said);
    timeout(PATIENCE, async { tokio::join!(dripping, reading) }).await.unwrap().1.ok();
    assert!(said.is_empty(), "{said:?}");
}

#[tokio::test]
async fn a_connection_without_a_request_is_closed_and_one_with_requests_is_not() {
    let front = Front::with(short()).await;
    let mut tcp = TcpStream::connect(front.http()).await.unwrap();
    // Longer than any one of its times.
    for _ in 0..12 {
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: hello.edge.test\r\n\r\n").await.unwrap();
        let mut space = [0; 1_024];
        assert!(timeout(PATIENCE, tcp.read(&mut space)).await.unwrap().unwrap() > 0);
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    assert_eq!(closed(&mut tcp).await, b"");
    let mut raw = Raw::connect(&front, &[]).await;
    raw.send(&ask(1)).await;
    assert_eq!(raw.end(1).await, End::Status(200));
    let mut left = false;
    while let Some(came) = raw.next().await {
        left |= came.kind == GOAWAY;
    }
    assert!(left, "it is asked to go first");
}

#[tokio::test]
async fn a_connection_that_is_old_is_asked_to_go() {
    let front = Front::with(Bounds { age_ms: 300, ..Bounds::default() }).await;
    let mut raw = Raw::connect(&front, &[]).await;
    raw.send(&ask(1)).await;
    let mut left = false;
    while let Some(came) = raw.next().await {
        left |= came.kind == GOAWAY;
        if left {
            break;
        }
    }
    assert!(left);
}

#[tokio::test]
async fn who_comes_to_a_full_listener_gets_the_place_of_one_that_rests() {
    // Each may rest for a minute, and is looked at twice a second.
    let front = Front::with(Bounds { connections_max: 5, head_ms: 500, idle_ms: 60_000, ..Bounds::default() }).await;
    let mut resting = Vec::new();
    for _ in 0..4 {
        let mut raw = Raw::connect(&front, &[]).await;
        raw.send(&ask(1)).await;
        assert_eq!(raw.end(1).await, End::Status(200));
        resting.push(raw);
    }
    // One that is busy: it has asked for more than it takes.
    let mut busy = Raw::connect(&front, &[0, 4, 0, 0, 0, 0]).await;
    busy.send(&ask(1)).await;
    assert_eq!(busy.end(1).await, End::Status(200));
    let mut late = Raw::connect(&front, &[]).await;
    late.send(&ask(1)).await;
    assert_eq!(late.end(1).await, End::Status(200), "long before anybody's minute is over");
    let mut left = 0;
    for mut raw in resting {
        while let Ok(Some(came)) = timeout(Duration::from_millis(50), raw.next()).await {
            left += usize::from(came.kind == GOAWAY);
        }
    }
    assert!(left > 0, "it was told to go");
    busy.send(&ask(3)).await;
    assert_eq!(busy.end(3).await, End::Status(200), "who is busy stays");
}

#[tokio::test]
async fn a_client_that_takes_nothing_of_its_answer_is_cut_off() {
    let front = Front::with(short()).await;
    let mut one = TcpStream::connect(front.http()).await.unwrap();
    one.write_all(b"GET /large HTTP/1.1\r\nhost: hello.edge.test\r\n\r\n").await.unwrap();
    front.counted(r#"selvage_requests_total{app="hello",fault="",outcome="ok",protocol="h1"} 1"#).await;
    // The node has given all of it to the socket; the client has taken hardly any.
    front.counted(r#"selvage_connections{protocol="h1"} 0"#).await;
    let mut taken = Vec::new();
    let _ = timeout(PATIENCE, one.read_to_end(&mut taken)).await.unwrap();
    assert!(taken.len() < LARGE_BYTES, "{}", taken.len());
}

#[tokio::test]
async fn a_stream_whose_window_stays_shut_is_reset_and_its_neighbour_is_not() {
    let front = Front::with(Bounds { write_idle_ms: 300, ..Bounds::default() }).await;
    // SETTINGS_INITIAL_WINDOW_SIZE 0.
    let mut raw = Raw::connect(&front, &[0, 4, 0, 0, 0, 0]).await;
    raw.send(&ask(1)).await;
    assert_eq!(raw.end(1).await, End::Status(200));
    // RFC 9113 7: CANCEL. The connection is kept going meanwhile.
    assert_eq!(raw.end(1).await, End::Reset(8));
    raw.send(&frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255])).await;
    raw.send(&ask(3)).await;
    assert_eq!(raw.end(3).await, End::Status(200));
}

#[tokio::test]
async fn two_hundred_slow_clients_hold_up_nobody() {
    let front = Front::with(short()).await;
    let mut slow = Vec::new();
    for number in 0..200 {
        let mut tcp = TcpStream::connect(front.http()).await.unwrap();
        let begin = match number % 3 {
            0 => "GET / HTTP/1.1\r\nhost: hello",
            1 => "POST / HTTP/1.1\r\nhost: hello.edge.test\r\ncontent-length: 100000\r\n\r\na",
            _ => "GET /large HTTP/1.1\r\nhost: hello.edge.test\r\n\r\n",
        };
        tcp.write_all(begin.as_bytes()).await.unwrap();
        slow.push(tcp);
    }
    assert!(front.raw("GET / HTTP/1.1\r\nhost: hello.edge.test\r\nconnection: close\r\n\r\n").await.ends_with("hello"));
    front.counted(r#"selvage_connections{protocol="h1"} 0"#).await;
    drop(slow);
}
