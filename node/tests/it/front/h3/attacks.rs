//! Clients that want more than their share: each one ends with little memory and little time spent on it.

use std::sync::atomic::{AtomicUsize, Ordering};

use super::raw::{Outcome, Raw, frame, get, integer};
use super::*;

const LOAD: u64 = 0x107;

/// Writes until the node has enough of it. Returns how much it took, and the code that it stopped with.
async fn pour(send: &mut quinn::SendStream, bytes_max: usize) -> (usize, Option<u64>) {
    let chunk = vec![0; 16 * 1024];
    let mut taken = 0;
    while taken < bytes_max {
        match timeout(PATIENCE, send.write(&chunk)).await.expect("neither taken nor stopped") {
            Ok(bytes) => taken += bytes,
            Err(quinn::WriteError::Stopped(code)) => return (taken, Some(code.into_inner())),
            Err(_) => return (taken, None),
        }
    }
    (taken, None)
}

#[tokio::test]
async fn a_frame_that_declares_a_gibibyte_is_not_read() {
    let front = Front::start().await;
    let (raw, _control) = Raw::connect(&front).await;
    // HEADERS: 431, and the client is asked to stop. An unknown frame: the request is lost.
    for (kind, first) in [(0x01, Outcome::Status(431)), (0x21, Outcome::Reset(LOAD))] {
        let (mut send, receive) = raw.quic.open_bi().await.unwrap();
        send.write_all(&[integer(kind), integer(1 << 30)].concat()).await.unwrap();
        let (taken, code) = pour(&mut send, 64 << 20).await;
        assert!(taken < 4 << 20 && code == Some(LOAD), "{kind}: {taken} {code:?}");
        assert_eq!(raw.outcome(receive).await, first, "{kind}");
    }
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200), "the connection is still good");
    let (mut control, _) = (raw.uni(&[0x21]).await, ());
    let _ = pour(&mut control, 1 << 20).await;
    let other = Raw::bare(&front).await;
    let mut control = other.uni(&[vec![0, 4, 0], integer(0x21), integer(1 << 30)].concat()).await;
    // What the node has not taken it can't hold: its window opens only as it reads.
    let (taken, _) = pour(&mut control, 64 << 20).await;
    assert!(taken < 4 << 20, "{taken}");
    assert_eq!(other.closed().await, LOAD);
}

#[tokio::test]
async fn a_field_section_of_short_references_is_too_large_and_breaks_nothing() {
    let front = Front::start().await;
    let (raw, _control) = Raw::connect(&front).await;
    for count in [25_000, 60_000] {
        let mut section = vec![0, 0];
        section.resize(2 + count, 0xc2);
        assert_eq!(raw.ask(&frame(0x01, &section)).await, Outcome::Status(431));
    }
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
}

#[tokio::test]
async fn floods_of_frames_of_no_use_are_cut_off() {
    let front = Front::start().await;
    for (what, one) in [
        ("unknown frames", frame(0x21, b"")),
        ("MAX_PUSH_ID", frame(0x0d, &[0])),
        ("GOAWAY", frame(0x07, &[0])),
        ("PRIORITY_UPDATE", frame(0xf_0700, b"\0u=1")),
    ] {
        let (raw, mut control) = Raw::connect(&front).await;
        let _ = control.write_all(&one.repeat(1_100)).await;
        assert_eq!(raw.closed().await, LOAD, "{what}");
    }
    for (what, kind, one) in [("encoder", 2, 0x20), ("decoder", 3, 0x40)] {
        let (raw, _control) = Raw::connect(&front).await;
        let _stream = raw.uni(&[vec![kind], vec![one; 1_100]].concat()).await;
        assert_eq!(raw.closed().await, LOAD, "{what}");
    }
    // On a request's stream they cost the request.
    let (raw, _control) = Raw::connect(&front).await;
    for one in [frame(0x21, b""), frame(0x00, b"")] {
        assert_eq!(raw.ask(&[get("/"), one.repeat(1_100)].concat()).await, Outcome::Reset(LOAD));
    }
}

#[tokio::test]
async fn requests_that_are_taken_back_at_once_are_counted() {
    let front = Front::start().await;
    let (raw, _control) = Raw::connect(&front).await;
    for _ in 0..100_000 {
        let Ok((mut send, mut receive)) = raw.quic.open_bi().await else { break };
        let _ = send.write_all(&get("/large")).await;
        let _ = send.reset(0x10c_u32.into());
        let _ = receive.stop(0x10c_u32.into());
    }
    assert_eq!(raw.closed().await, LOAD);
    let ended = async {
        while !front.parts.metrics.text().contains("selvage_requests_under_way 0") {
            tokio::task::yield_now().await;
        }
    };
    timeout(PATIENCE, ended).await.unwrap();
}

#[tokio::test]
async fn heads_that_are_never_whole_have_a_bound_together() {
    let front = Front::start().await;
    let (raw, _control) = Raw::connect(&front).await;
    let unfinished = [integer(0x01), integer(60_000), vec![0; 50_000]].concat();
    let mut streams = Vec::new();
    for _ in 0..12 {
        let (mut send, receive) = raw.quic.open_bi().await.unwrap();
        let _ = send.write_all(&unfinished).await;
        streams.push((send, receive));
    }
    // 256 KiB are five of them: one of the others is refused at least, and the rest goes on.
    let refused = streams.iter_mut().map(|(send, _)| Box::pin(send.stopped()));
    let (code, _, _) = timeout(PATIENCE, futures_util::future::select_all(refused)).await.unwrap();
    assert_eq!(code.unwrap(), Some(VarInt::from_u32(0x107)));
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
}

/// Carries packets to the node, counted, and none back. Returns how many bytes went each way when a Retry came back.
async fn one_way(relay: tokio::net::UdpSocket, node: SocketAddr, carried: Arc<AtomicUsize>) -> (usize, usize) {
    let out = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    out.connect(node).await.unwrap();
    let (mut there, mut back, mut is_retry) = (0, 0, false);
    let (mut to, mut from) = (vec![0; 2_048], vec![0; 2_048]);
    while !is_retry {
        tokio::select! {
            got = relay.recv(&mut to) => {
                let length = got.unwrap();
                there += length;
                out.send(&to[..length]).await.unwrap();
                carried.fetch_add(1, Ordering::Relaxed);
            }
            got = out.recv(&mut from) => {
                let length = got.unwrap();
                back += length;
                // RFC 9000 17.2.5: a long header of type 3.
                is_retry = from[0] & 0xb0 == 0xb0;
            }
        }
    }
    (there, back)
}

#[tokio::test]
async fn many_handshakes_that_nobody_ends_make_clients_show_their_addresses() {
    let front = Front::start().await;
    let relay = tokio::net::UdpSocket::bind("127.0.0.1:0").await.unwrap();
    let address = relay.local_addr().unwrap();
    let carried = Arc::new(AtomicUsize::new(0));
    let relayed = tokio::spawn(one_way(relay, front.https(), Arc::clone(&carried)));
    let crypto = Arc::new(QuicClientConfig::try_from(front.client(b"h3")).unwrap());
    let endpoint = Endpoint::client("127.0.0.1:0".parse().unwrap()).unwrap();
    // Each endpoint of the node bears a hundred.
    let count = 130 * std::thread::available_parallelism().unwrap().get();
    let mut open = Vec::new();
    while open.len() < count && !relayed.is_finished() {
        let config = quinn::ClientConfig::new(Arc::<QuicClientConfig>::clone(&crypto));
        let before = carried.load(Ordering::Relaxed);
        open.push(endpoint.connect_with(config, address, HOST).unwrap());
        // More at once would not fit into the relay's socket.
        while carried.load(Ordering::Relaxed) == before && !relayed.is_finished() {
            tokio::task::yield_now().await;
        }
    }
    let (there, back) = timeout(PATIENCE, relayed).await.expect("no Retry").unwrap();
    assert!(back <= there * 3, "{back} bytes for {there}: RFC 9000 8.1");
    // Whoever shows its address is served.
    let (raw, _control) = Raw::connect(&front).await;
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
}
