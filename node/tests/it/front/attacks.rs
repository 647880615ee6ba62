//! Attacks on HTTP/2 by frames: each ends with its connection, at little cost, and nobody else notices.

use super::frames::*;
use super::*;

/// Frames or requests that one attack sends at most. Even of the smallest that is more than the system's own buffers hold,
/// which fill before a busy node reads at all.
const ITEMS_MAX: u32 = 2_000_000;

/// What one attack sends: its beginning, and the bytes of one item by its number.
type Item = fn(u32) -> Vec<u8>;

fn stream(item: u32) -> u32 {
    item * 2 + 1
}

fn number(value: u32) -> [u8; 4] {
    value.to_be_bytes()
}

/// Attacks.
const ATTACKS: &[(&str, Item)] = &[
    ("rapid reset (CVE-2023-44487)", |n| [ask(stream(n)), frame(RST_STREAM, 0, stream(n), &number(8))].concat()),
    ("made you reset by a window of nought (CVE-2025-8671)", |n| {
        [ask(stream(n)), frame(WINDOW_UPDATE, 0, stream(n), &number(0))].concat()
    }),
    ("made you reset by a window beyond numbers", |n| {
        [ask(stream(n)), frame(WINDOW_UPDATE, 0, stream(n), &number(0x7fff_ffff))].concat()
    }),
    ("made you reset by data after the end", |n| [ask(stream(n)), frame(DATA, 0, stream(n), b"x")].concat()),
    ("made you reset by a stream that depends on itself", |n| {
        [ask(stream(n)), frame(PRIORITY, 0, stream(n), &[&number(stream(n))[..], &[0]].concat())].concat()
    }),
    ("malformed requests", |n| frame(HEADERS, END_HEADERS | END_STREAM, stream(n), &fields(&[(":method", "GET")]))),
    ("a head without end (CVE-2024-27316)", |n| {
        if n == 0 { frame(HEADERS, 0, 1, &fields(&GET)) } else { frame(CONTINUATION, 0, 1, &fields(&[("x", "1")])) }
    }),
    ("a head of empty pieces", |n| {
        if n == 0 { frame(HEADERS, 0, 1, &fields(&GET)) } else { frame(CONTINUATION, 0, 1, b"") }
    }),
    ("empty DATA (CVE-2019-9518)", |n| {
        if n == 0 { frame(HEADERS, END_HEADERS, 1, &fields(&GET)) } else { frame(DATA, 0, 1, b"") }
    }),
    ("PING (CVE-2019-9512)", |_| frame(PING, 0, 0, &[0; 8])),
    ("PING answers that nobody asked for", |_| frame(PING, 1, 0, &[0; 8])),
    ("SETTINGS (CVE-2019-9515)", |_| frame(SETTINGS, 0, 0, &[0, 4, 0, 0, 255, 255])),
    ("PRIORITY (CVE-2019-9513)", |n| frame(PRIORITY, 0, stream(n % 50), &[0, 0, 0, 0, 9])),
    ("WINDOW_UPDATE", |_| frame(WINDOW_UPDATE, 0, 0, &number(1))),
    ("unknown frames", |_| frame(0x77, 0, 0, b"grease")),
    ("a bomb of references (HPACK)", |n| {
        // One field of 4,000 bytes is kept, then named 15,000 times (RFC 7541 6.2.1, 6.1).
        let mut block = vec![0x40, 1, b'x', 0x7f, 0xa1, 0x1e];
        block.extend([b'a'; 4_000]);
        block.extend([0xbe; 12_000]);
        frame(HEADERS, END_HEADERS | END_STREAM, stream(n), &block)
    }),
    ("answers that nobody reads (CVE-2019-9517)", |n| ask(stream(n))),
];

/// Sends until the node closes, or all is sent. Returns how many items there were, and whether the node closed.
async fn attack(front: &Front, item: Item, reads: bool) -> (u32, bool) {
    let Raw { mut read, mut write } = Raw::connect(front, &[]).await;
    let sending = async {
        for number in 0..ITEMS_MAX {
            if timeout(PATIENCE, write.write_all(&item(number))).await.is_ok_and(|sent| sent.is_ok()) {
                continue;
            }
            return number;
        }
        ITEMS_MAX
    };
    let mut space = vec![0; 64 * 1024];
    let reading = async {
        // A reset is an end too.
        while read.read(&mut space).await.is_ok_and(|count| count > 0) {}
    };
    if !reads {
        let count = sending.await;
        return (count, timeout(PATIENCE, reading).await.is_ok());
    }
    let mut reading = std::pin::pin!(reading);
    let mut sending = std::pin::pin!(sending);
    // The end of reading is the end of the connection: what was sent into it does not count.
    let count = tokio::select! {
        count = sending.as_mut() => count,
        () = reading.as_mut() => return (timeout(PATIENCE, sending).await.unwrap_or(ITEMS_MAX), true),
    };
    (count, timeout(PATIENCE, reading).await.is_ok())
}

#[tokio::test(flavor = "multi_thread")]
async fn every_attack_by_frames_ends_with_its_connection() {
    let bounds = Bounds { write_idle_ms: 500, ..Bounds::default() };
    let front = Front::with(bounds).await;
    for (name, item) in ATTACKS {
        let (count, closed) = attack(&front, *item, !name.contains("nobody reads")).await;
        assert!(closed, "{name}: the connection lives on after {count}");
        assert!(count < ITEMS_MAX, "{name}: all went through");
        let mut raw = Raw::connect(&front, &[]).await;
        raw.send(&ask(1)).await;
        assert_eq!(raw.end(1).await, End::Status(200), "{name}: somebody else");
    }
    front.counted("selvage_requests_under_way 0").await;
}

#[tokio::test]
async fn a_client_that_makes_nothing_but_work_is_told_to_go_first() {
    let front = Front::with(Bounds { glitches_max: 100, ..Bounds::default() }).await;
    let mut raw = Raw::connect(&front, &[]).await;
    for _ in 0..80 {
        raw.send(&frame(PING, 0, 0, &[0; 8])).await;
    }
    let mut kinds = Vec::new();
    while let Some(came) = raw.next().await {
        kinds.push(came.kind);
        if came.kind == GOAWAY {
            break;
        }
    }
    assert_eq!(kinds.last(), Some(&GOAWAY), "{kinds:?}");
}

#[tokio::test]
async fn a_client_that_asks_and_takes_may_ping() {
    let front = Front::with(Bounds { glitches_max: 20, ..Bounds::default() }).await;
    let mut raw = Raw::connect(&front, &[]).await;
    for number in 0..100 {
        raw.send(&[frame(PING, 0, 0, &[0; 8]), ask(stream(number))].concat()).await;
        assert_eq!(raw.end(stream(number)).await, End::Status(200), "{number}");
        raw.send(&frame(WINDOW_UPDATE, 0, 0, &5_u32.to_be_bytes())).await;
    }
}
