//! Latency counts from the time a request was due, whatever held it up.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use selvage_loadtest::{ErrorKind, LAG_P99_DEFAULT, Mix, Phase, Protocol, run};

use crate::server::{Server, get};

const H1: Mix = Mix { h1: 1, h2: 0, h3: 0 };

#[tokio::test(flavor = "multi_thread")]
async fn a_stall_counts_in_every_request_that_was_due_during_it() {
    let server = Server::plain(Protocol::H1).await;
    let mut options = server.options(H1, vec![get("/held", "200")]);
    options.connections = 1;
    let site = Arc::clone(&server.site);
    let stall = tokio::spawn(async move {
        site.requests.subscribe().wait_for(|count| *count > 0).await.unwrap();
        // The last request is due 195 ms after the first, and the stall ends 400 ms after it arrived.
        tokio::time::sleep(Duration::from_millis(400)).await;
        let during = *site.requests.borrow();
        site.gate.send_replace(true);
        during
    });
    let report = run(options, |_| {}).await.unwrap();
    assert_eq!(stall.await.unwrap(), 1, "one connection carries one request");
    assert_eq!((report.total.answered, report.total.latency.count), (40, 40));
    // A tool that counts from the send would show one slow request of 40; here each waited 200 ms or more.
    assert!(report.total.latency.min_us >= 200_000, "{report}");
    assert!(report.total.latency.max_us >= 400_000, "{report}");
    assert!(report.total.service.max_us >= 400_000, "{report}");
}

#[tokio::test]
async fn a_generator_that_is_held_up_says_so_and_counts_it_in_the_latency() {
    let server = Server::plain(Protocol::H1).await;
    let mut options = server.options(H1, vec![get("/", "200")]);
    options.lag_p99_max = LAG_P99_DEFAULT;
    // Blocks the only thread of this runtime for longer than requests are due.
    let report = run(options, |progress| {
        if progress.phase == Phase::Sending {
            std::thread::sleep(Duration::from_millis(400));
        }
    });
    let report = report.await.unwrap();
    assert_eq!(report.total.answered, 40);
    assert!(report.lag.max_us >= 200_000 && report.total.latency.p50_us >= 200_000, "{report}");
    assert!(!report.valid && report.reason.as_ref().unwrap().starts_with("the generator was late"), "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_beyond_the_limit_in_flight_are_errors_and_not_forgotten() {
    let server = Server::tls().await;
    let mut options = server.options(Mix { h1: 0, h2: 1, h3: 1 }, vec![get("/held", "200")]);
    options.in_flight_max = 3;
    let gate = server.site.gate.clone();
    let report = run(options, move |progress| {
        if progress.phase == Phase::Draining {
            gate.send_replace(true);
        }
    });
    let report = report.await.unwrap();
    assert_eq!((report.total.requests, report.total.answered), (40, 3));
    assert_eq!(report.total.errors, BTreeMap::from([(ErrorKind::Saturated, 37)]));
    assert!(!report.valid && report.reason.unwrap().contains("the generator sent"));
    assert_eq!(report.total.latency.count, 3, "what was never sent has no latency");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_without_an_answer_in_time_is_a_timeout_at_its_age() {
    let server = Server::tls().await;
    let mut options = server.options(Mix { h1: 1, h2: 1, h3: 1 }, vec![get("/held", "200")]);
    // Enough for a handshake on a busy machine: one that took longer would be an error of its own.
    options.timeout = Duration::from_secs(2);
    let report = run(options, |_| {}).await.unwrap();
    assert_eq!(report.total.errors, BTreeMap::from([(ErrorKind::Timeout, 40)]));
    assert_eq!((report.total.latency.count, report.total.service.count), (40, 0));
    assert!(report.total.latency.min_us >= 2_000_000 - 2_000, "{report}");
}

#[tokio::test(flavor = "multi_thread")]
async fn progress_ends_with_every_request_accounted_for() {
    let server = Server::plain(Protocol::H1).await;
    let (sender, mut receiver) = tokio::sync::mpsc::channel(100);
    run(server.options(H1, vec![get("/", "200")]), move |progress| sender.try_send(progress).unwrap()).await.unwrap();
    let mut all = Vec::new();
    while let Some(progress) = receiver.recv().await {
        assert_eq!(progress.in_flight, progress.due - progress.answered - progress.errors);
        all.push(progress);
    }
    assert_eq!(all.first().unwrap().phase, Phase::Sending);
    let last = all.last().unwrap();
    assert_eq!((last.phase, last.due), (Phase::Draining, 40));
}
