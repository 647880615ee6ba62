//! Guests that mean harm: what becomes of each, and that nobody else is the worse for it.

mod crowd;
mod hoards;
mod wire;

use std::convert::Infallible;
use std::sync::atomic::{AtomicUsize, Ordering};

use http_body::Frame;
use http_body_util::StreamBody;
use selvage_node::request::BodyError;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// Guests that can't succeed, and how each ends. Only `slow.wat` needs a wall that one can wait for.
const ENDS: [(&str, &str); 20] = [
    ("burn.wat", "exceeded-cpu"),
    ("burn_start.wat", "exceeded-cpu"),
    ("realloc_burn.wat", "exceeded-cpu"),
    ("slow.wat", "exceeded-wall"),
    ("hog.wat", "exceeded-memory"),
    ("memories.wat", "exceeded-memory"),
    ("trap.wat", "trap"),
    ("trap_mid_body.wat", "trap"),
    ("deep.wat", "trap"),
    ("table_hog.wat", "trap"),
    ("handle_leak.wat", "trap"),
    ("twice.wat", "trap"),
    ("realloc_outside.wat", "trap"),
    ("realloc_unaligned.wat", "trap"),
    ("random_flood.wat", "trap"),
    ("exit.wat", "trap"),
    ("exit_late.wat", "trap"),
    ("silent.wat", "no-response"),
    ("short_body.wat", "bad-response"),
    ("long_body.wat", "bad-response"),
];
/// One chunk of a client's body.
const CHUNK_BYTES: usize = 16 * 1024;

/// A guest that has one lease, so that a second call shows that the first gave it back.
async fn hostile(name: &str) -> Guest {
    Guest::new(name).await.with(|grants| {
        grants.environment.insert("NAME".into(), "value".into());
        grants.limits.memory_bytes = 64 << 20;
        grants.limits.cpu_ms = 200;
        grants.limits.wall_ms = if name == "slow.wat" { 200 } else { WALL_MS };
        grants.limits.concurrent_requests = 1;
    })
}

/// How a call ends: the status of an answer that is whole, or the name of the fault, however far the guest had come.
async fn end(guest: &Active, request: Request) -> String {
    // With all of its task's time, as the first request of a connection.
    tokio::task::yield_now().await;
    let response = match guest.call(request).await {
        Ok(response) => response,
        Err(fault) => return fault.outcome().to_owned(),
    };
    let status = response.status().as_u16().to_string();
    match tokio::time::timeout(PATIENCE, response.into_body().collect()).await.unwrap() {
        Ok(_) => status,
        Err(BodyError::Guest { outcome }) => outcome.to_owned(),
        Err(error) => panic!("{error}"),
    }
}

/// Calls a guest that means no harm, which must not notice any.
async fn unharmed(hello: &Active, when: &str) {
    tokio::task::yield_now().await;
    assert_eq!(hello.ask("GET", "/", "").await, (200, "hello".into()), "{when}");
}

/// A body of chunks without end, and how many were taken.
fn endless() -> (Body, Arc<AtomicUsize>) {
    let taken = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&taken);
    let frames = futures_util::stream::repeat_with(move || {
        count.fetch_add(1, Ordering::SeqCst);
        Ok::<_, Infallible>(Frame::data(Bytes::from_static(&[b'x'; CHUNK_BYTES])))
    });
    (StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync(), taken)
}

#[tokio::test]
async fn each_hostile_guest_ends_with_its_fault_and_its_neighbour_answers() {
    let neighbour = Guest::new("hello.wat").await.activate().unwrap();
    for (name, fault) in ENDS {
        let guest = hostile(name).await.activate().unwrap();
        for time in 1..=2 {
            let end = end(&guest, request("GET", "/", empty())).await;
            // A tick between its two answers, and the first one is out, whole, before the guest traps.
            let is_between = name == "twice.wat" && end == "201";
            assert!(end == fault || is_between, "{name}, time {time}: {end}");
            unharmed(&neighbour, &format!("after {name}, time {time}")).await;
        }
    }
}

#[tokio::test]
async fn all_memories_of_a_guest_are_one_sum() {
    // Twice 96 MiB: one less is refused, and where they are allowed the guest runs, and traps.
    for (mebibytes, fault) in [(191, "exceeded-memory"), (192, "trap")] {
        let guest = hostile("memories.wat").await.limits(|limits| limits.memory_bytes = mebibytes << 20);
        assert_eq!(end(&guest.activate().unwrap(), request("GET", "/", empty())).await, fault);
    }
}

#[tokio::test]
async fn fields_that_no_answer_may_have_are_refused_to_the_guest() {
    let guest = hostile("forged_fields.wat").await.activate().unwrap();
    let response = guest.get("/").await.unwrap();
    assert_eq!(response.status(), 204);
    assert_eq!(response.headers().len(), 0, "{:?}", response.headers());
}

#[tokio::test]
async fn keys_and_values_beyond_their_bounds_are_errors_that_the_guest_sees() {
    let guest = hostile("long_key.wat").await.with(|grants| grants.stores = vec!["default".parse().unwrap()]);
    let guest = guest.activate().unwrap();
    for _ in 0..2 {
        assert_eq!(end(&guest, request("GET", "/", empty())).await, "204");
    }
}

#[tokio::test]
async fn a_status_that_is_no_answer_is_a_fault() {
    let guest = hostile("status.wat").await.activate().unwrap();
    for (status, want) in [
        ("100", "bad-response"),
        ("101", "bad-response"),
        ("103", "bad-response"),
        ("199", "bad-response"),
        // No status at all: the host refuses it, and this guest traps on that.
        ("000", "trap"),
        ("099", "trap"),
        ("200", "200"),
        ("599", "599"),
        ("600", "600"),
        ("999", "999"),
    ] {
        assert_eq!(end(&guest, request("GET", &format!("/{status}"), empty())).await, want, "{status}");
    }
}

#[tokio::test]
async fn a_guest_that_reads_without_end_gets_what_the_limit_allows() {
    let guest = hostile("reads_all.wat").await.limits(|limits| limits.request_body_bytes = 1 << 20);
    let guest = guest.activate().unwrap();
    for _ in 0..2 {
        let (body, taken) = endless();
        assert_eq!(end(&guest, request("POST", "/", body)).await, "body-too-large");
        let most = (1 << 20) / CHUNK_BYTES + 1;
        assert!(taken.load(Ordering::SeqCst) <= most, "{taken:?} chunks of {most}");
    }
    assert_eq!(end(&guest, request("POST", "/", full(vec![0; 1 << 20]))).await, "204");
}

#[tokio::test]
async fn a_guest_that_waits_for_a_body_that_never_comes_ends_at_the_wall() {
    let guest = hostile("reads_all.wat").await.limits(|limits| limits.wall_ms = 200).activate().unwrap();
    for _ in 0..2 {
        let never = StreamBody::new(futures_util::stream::pending::<Result<Frame<Bytes>, BodyError>>());
        assert_eq!(end(&guest, request("POST", "/", never.boxed_unsync())).await, "exceeded-wall");
    }
}

#[tokio::test]
async fn a_body_that_the_guest_does_not_want_is_not_collected() {
    for (name, want) in [("slow.wat", "exceeded-wall"), ("hello.wat", "200")] {
        let guest = hostile(name).await.activate().unwrap();
        let (body, taken) = endless();
        assert_eq!(end(&guest, request("POST", "/", body)).await, want);
        assert_eq!(taken.load(Ordering::SeqCst), 0, "{name}");
    }
}

/// An origin that answers each request on each connection with 204, and counts requests.
async fn origin() -> (String, Arc<AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap().to_string();
    let requests = Arc::new(AtomicUsize::new(0));
    let count = Arc::clone(&requests);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            let count = Arc::clone(&count);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {
                    if head.ends_with(b"\r\n\r\n") {
                        head.clear();
                        count.fetch_add(1, Ordering::SeqCst);
                        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                    }
                }
            });
        }
    });
    (address, requests)
}

#[tokio::test]
async fn a_flood_of_requests_is_cut_at_the_limit() {
    let (origin, requests) = origin().await;
    let guest = hostile("outbound_flood.wat").await.with(|grants| {
        grants.limits.outbound_requests = 7;
        // Its hundred requests are all under way before it waits for one.
        grants.limits.cpu_ms = 5_000;
        grants.outbound = vec!["http://127.0.0.1:*".parse().unwrap()];
        let options = EgressOptions { private_networks: true, roots: Vec::new() };
        grants.egress = Arc::new(Egress::new(&options).unwrap());
    });
    let guest = guest.activate().unwrap();
    for time in 1..=2 {
        assert_eq!(end(&guest, request("GET", &format!("/{origin}"), empty())).await, "207");
        assert_eq!(requests.load(Ordering::SeqCst), 7 * time, "each request has the whole limit, and no more");
    }
}
