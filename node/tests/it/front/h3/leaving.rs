//! How a connection leaves (RFC 9114 5.2): it says so, takes what was on its way, and says what it did not take.

use std::time::Instant;

use super::raw::{GOAWAY, Outcome, Raw, get, integer};
use super::*;

/// What a node says on its control stream, frame by frame: type and payload.
pub(super) struct Control {
    stream: quinn::RecvStream,
    bytes: Vec<u8>,
}

impl Control {
    pub(super) async fn of(raw: &Raw) -> Self {
        let mut stream = timeout(PATIENCE, raw.quic.accept_uni()).await.unwrap().unwrap();
        let mut kind = [0xff];
        stream.read_exact(&mut kind).await.unwrap();
        assert_eq!(kind, [0], "the control stream is the first");
        Self { stream, bytes: Vec::new() }
    }

    pub(super) async fn next(&mut self) -> (u64, Vec<u8>) {
        loop {
            // Types and lengths of what a node says are below 64.
            if let [kind, length, rest @ ..] = &self.bytes[..]
                && rest.len() >= usize::from(*length)
            {
                let (kind, length) = (u64::from(*kind), usize::from(*length));
                let payload = self.bytes.drain(..2 + length).skip(2).collect();
                return (kind, payload);
            }
            let mut chunk = [0; 64];
            let read = timeout(PATIENCE, self.stream.read(&mut chunk)).await.expect("nothing more is said").unwrap();
            self.bytes.extend_from_slice(&chunk[..read.expect("the control stream stays")]);
        }
    }
}

#[tokio::test]
async fn a_node_that_drains_warns_then_tells_and_then_refuses() {
    let front = Front::start().await;
    let (raw, _client) = Raw::connect(&front).await;
    let mut control = Control::of(&raw).await;
    // SETTINGS: MAX_FIELD_SECTION_SIZE of 16 KiB.
    assert_eq!(control.next().await, (0x04, vec![0x06, 0x80, 0, 0x40, 0]));
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
    // This one keeps the connection until the end.
    let (mut slow, mut reading) = raw.quic.open_bi().await.unwrap();
    slow.write_all(&get("/large")).await.unwrap();
    slow.finish().unwrap();
    let mut read = vec![0; 1_000];
    reading.read_exact(&mut read).await.unwrap();
    let listeners = front.listeners;
    let drained = tokio::spawn(async move { listeners.drain(Instant::now() + Duration::from_secs(60)).await });
    let (kind, payload) = control.next().await;
    assert_eq!((kind, payload), (GOAWAY, integer((1 << 62) - 4)));
    // Whoever has not heard it yet loses nothing.
    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
    assert_eq!(control.next().await, (GOAWAY, integer(12)));
    // H3_REQUEST_REJECTED: the client may send it to somebody else.
    for _ in 0..3 {
        assert_eq!(raw.ask(&get("/")).await, Outcome::Reset(0x10b));
    }
    let rest = timeout(PATIENCE, reading.read_to_end(LARGE_BYTES * 2)).await.unwrap().unwrap();
    assert!(rest.len() > LARGE_BYTES - 1_000);
    assert_eq!(raw.closed().await, 0x100);
    timeout(PATIENCE, drained).await.unwrap().unwrap();
}

#[tokio::test]
async fn a_connection_has_a_last_request() {
    let front = Front::start().await;
    let (raw, _client) = Raw::connect(&front).await;
    let raw = Arc::new(raw);
    let mut control = Control::of(&raw).await;
    assert_eq!(control.next().await.0, 0x04);
    let asks = (0..100).map(|_| {
        let raw = Arc::clone(&raw);
        tokio::spawn(async move {
            let mut outcomes = Vec::new();
            for _ in 0..102 {
                match raw.quic.open_bi().await {
                    Ok((mut send, receive)) => {
                        let _ = send.write_all(&get("/none")).await;
                        let _ = send.finish();
                        outcomes.push(raw.outcome(receive).await);
                    }
                    Err(_) => break,
                }
            }
            outcomes
        })
    });
    let outcomes = futures_util::future::join_all(asks).await;
    let outcomes: Vec<Outcome> = outcomes.into_iter().flat_map(Result::unwrap).collect();
    let answered = outcomes.iter().filter(|outcome| **outcome == Outcome::Status(404)).count();
    assert!((10_000..=10_100).contains(&answered), "{answered}");
    let fit =
        |outcome: &Outcome| matches!(outcome, Outcome::Status(404) | Outcome::Reset(0x10b) | Outcome::Closed(0x100));
    assert!(outcomes.iter().all(fit));
    assert_eq!(control.next().await, (GOAWAY, integer((1 << 62) - 4)));
    assert_eq!(control.next().await, (GOAWAY, integer(answered as u64 * 4)));
}
