//! What flows through a guest, and what becomes of half an answer.

use std::convert::Infallible;

use futures_util::StreamExt;
use http_body::Frame;
use http_body_util::StreamBody;
use selvage_node::fault::{ClientFault, GuestFault};
use selvage_node::request::BodyError;
use tokio::sync::mpsc;

use super::*;

/// A body whose chunks the test sends one by one.
fn channel() -> (mpsc::Sender<&'static str>, Body) {
    let (sender, receiver) = mpsc::channel::<&'static str>(1);
    let frames = futures_util::stream::unfold(receiver, |mut receiver| async {
        let chunk = receiver.recv().await?;
        Some((Ok::<_, Infallible>(Frame::data(Bytes::from_static(chunk.as_bytes()))), receiver))
    });
    (sender, StreamBody::new(frames).map_err(|never| match never {}).boxed_unsync())
}

#[tokio::test]
async fn a_guest_of_each_generation_answers() {
    assert_eq!(told(Guest::new("hello.wat").await.get("/").await.unwrap()).await, (200, "hello".into()));
    for name in ["hello", "hello-p3"] {
        let response = Guest::new(name).await.get("/").await.unwrap();
        assert_eq!(told(response).await, (200, "Hello from Selvage\n".into()), "{name}");
    }
}

#[tokio::test]
async fn a_whole_answer_has_a_length() {
    use http_body::Body as _;
    // A guest that a tick of the clock interrupts is not done with its head, and its answer streams: on a busy machine
    // that may happen to one, not to every one of these.
    let pool = Guest::new("hello.wat").await.activate().unwrap();
    for _ in 0..100 {
        let response = pool.call(request("GET", "/", empty())).await.unwrap();
        if response.body().size_hint().exact() == Some(5) {
            return;
        }
    }
    panic!("no answer had a length");
}

#[tokio::test]
async fn a_guest_reads_while_it_writes() {
    for name in ["hello", "hello-p3"] {
        let guest = Guest::new(name).await.activate().unwrap();
        let (sender, body) = channel();
        let response = guest.call(request("POST", "/echo", body)).await.unwrap();
        let mut frames = response.into_body().into_data_stream();
        // Each chunk comes back before the next one is sent: nothing is collected on the way.
        for chunk in ["one", "two", "three"] {
            sender.send(chunk).await.unwrap();
            assert_eq!(frames.next().await.unwrap().unwrap(), chunk, "{name}");
        }
        drop(sender);
        assert!(frames.next().await.is_none(), "{name}");
    }
}

#[tokio::test]
async fn a_large_body_comes_back_whole() {
    for name in ["hello", "hello-p3"] {
        let guest = Guest::new(name).await.activate().unwrap();
        let sent: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
        let response = guest.call(request("POST", "/echo", full(sent.clone()))).await.unwrap();
        assert!(response.into_body().collect().await.unwrap().to_bytes() == sent, "{name}");
    }
}

#[tokio::test]
async fn a_guest_goes_on_writing_after_its_head() {
    let response = Guest::new("hello-p3").await.get("/stream").await.unwrap();
    let (status, text) = told(response).await;
    assert_eq!(status, 200);
    assert_eq!(text.lines().count(), 5);
    assert!(text.ends_with("chunk 5 of 5\n"));
}

#[tokio::test]
async fn a_guest_does_not_see_the_host_field() {
    let response = Guest::new("hello").await.get("/headers").await.unwrap();
    let (status, text) = told(response).await;
    // It has the authority by a function of its own; as a field it could forge it on the way out.
    assert_eq!((status, text.as_str()), (200, "{}"));
}

#[tokio::test]
async fn a_request_without_authority_is_the_clients_fault() {
    let guest = Guest::new("hello.wat").await.activate().unwrap();
    let mut asked = request("GET", "/", empty());
    asked.http.headers_mut().clear();
    assert_eq!(guest.call(asked).await.unwrap_err(), Fault::Client(ClientFault::Host));
}

#[tokio::test]
async fn a_body_beyond_the_limit_is_refused() {
    for name in ["hello", "hello-p3"] {
        let guest = Guest::new(name).await.limits(|limits| limits.request_body_bytes = 10).activate().unwrap();
        let told = guest.ask("POST", "/echo", "0123456789").await;
        assert_eq!(told, (200, "0123456789".into()), "{name}");
        // With a length it does not even start.
        let mut asked = request("POST", "/echo", full("0123456789a"));
        asked.http.headers_mut().insert("content-length", "11".parse().unwrap());
        assert_eq!(guest.call(asked).await.unwrap_err(), Fault::Client(ClientFault::BodyTooLarge), "{name}");
        // Without one, the guest has begun its answer when the limit is met: it breaks off, or was never sent.
        let (sender, body) = channel();
        let response = guest.call(request("POST", "/echo", body)).await.unwrap();
        let mut frames = response.into_body().into_data_stream();
        sender.send("0123456789").await.unwrap();
        assert_eq!(frames.next().await.unwrap().unwrap(), "0123456789", "{name}");
        sender.send("a").await.unwrap();
        let rest = frames.next().await;
        assert!(!matches!(rest, Some(Ok(_))), "{name}: {rest:?}");
    }
}

#[tokio::test]
async fn a_trap_before_the_head_is_a_fault() {
    assert_eq!(Guest::new("trap.wat").await.get("/").await.unwrap_err(), Fault::Guest(GuestFault::Trap));
}

#[tokio::test]
async fn a_trap_in_the_body_never_looks_like_its_end() {
    match Guest::new("trap_mid_body.wat").await.get("/").await {
        // Nothing was sent yet, so the whole answer is a fault.
        Err(fault) => assert_eq!(fault, Fault::Guest(GuestFault::Trap)),
        // A tick before the trap, and the head is out: the body breaks off.
        Ok(response) => {
            let error = response.into_body().collect().await.unwrap_err();
            assert!(matches!(error, BodyError::Guest { outcome: "trap" }), "{error:?}");
        }
    }
}

#[tokio::test]
async fn a_guest_that_runs_out_of_cpu_in_its_body_breaks_it_off() {
    let guest = Guest::new("endless_body.wat").await.limits(|limits| limits.cpu_ms = 200);
    let mut frames = guest.get("/").await.unwrap().into_body().into_data_stream();
    let mut bytes = 0;
    let end = loop {
        match frames.next().await.expect("an endless body does not end") {
            Ok(data) => bytes += data.len(),
            Err(error) => break error,
        }
    };
    assert!(bytes > 0);
    assert!(matches!(end, BodyError::Guest { outcome: "exceeded-cpu" }), "{end:?}");
}

#[tokio::test]
async fn a_body_that_nobody_reads_ends_at_the_wall() {
    let guest = Guest::new("endless_body.wat").await.limits(|limits| {
        limits.wall_ms = 300;
        limits.concurrent_requests = 1;
    });
    let guest = guest.activate().unwrap();
    let response = guest.get("/").await.unwrap();
    // The body is held, not read; the only lease is free again as soon as the guest is stopped.
    let _second = guest.pool.lease(Instant::now() + PATIENCE).await.unwrap();
    let mut frames = response.into_body().into_data_stream();
    let end = loop {
        match frames.next().await.expect("an endless body does not end") {
            Ok(_) => {}
            Err(error) => break error,
        }
    };
    assert!(matches!(end, BodyError::Guest { outcome: "exceeded-wall" }), "{end:?}");
}

#[tokio::test]
async fn a_client_that_leaves_stops_the_guest() {
    let guest = Guest::new("endless_body.wat").await.limits(|limits| limits.concurrent_requests = 1);
    let guest = guest.activate().unwrap();
    drop(guest.get("/").await.unwrap());
    // Its lease comes back although it would have written for ever.
    drop(guest.get("/").await.unwrap());
}
