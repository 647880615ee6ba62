//! A run ends when told, with a report, or when dropped, with nothing left behind.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_loadtest::{ErrorKind, LoadError, Mix, Protocol, run, run_until};

use crate::server::{LONG, Server, get};

const H1: Mix = Mix { h1: 1, h2: 0, h3: 0 };

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_ends_the_run_with_a_report_of_what_was_done() {
    let server = Server::plain(Protocol::H1).await;
    let mut options = server.options(H1, vec![get("/held", "200")]);
    options.duration = LONG;
    let site = Arc::clone(&server.site);
    let stop = async move {
        site.requests.subscribe().wait_for(|count| *count >= 2).await.unwrap();
    };
    let report = run_until(options, stop, |_| {}).await.unwrap();
    assert!(report.stopped && report.total.requests >= 2);
    assert_eq!(report.total.errors, BTreeMap::from([(ErrorKind::Stopped, report.total.requests)]));
    assert_eq!(report.classes[0].errors, report.total.requests);
    assert!(report.to_string().contains("stopped early"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stop_lets_answers_that_are_on_their_way_arrive() {
    let server = Server::plain(Protocol::H1).await;
    let mut options = server.options(H1, vec![get("/held", "200")]);
    (options.duration, options.rate, options.connections) = (LONG, 1, 1);
    let site = Arc::clone(&server.site);
    let stop = async move {
        site.requests.subscribe().wait_for(|count| *count >= 1).await.unwrap();
        site.gate.send_replace(true);
    };
    let report = run_until(options, stop, |_| {}).await.unwrap();
    assert!(report.stopped);
    assert_eq!((report.total.answered, report.total.errors), (report.total.requests, BTreeMap::new()));
}

#[tokio::test]
async fn a_stop_before_the_first_request_ends_a_handshake_that_hangs() {
    // The kernel accepts the connection, and nobody ever answers the handshake.
    let silent = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let server = Server::tls().await;
    let mut options = server.options(H1, vec![get("/", "200")]);
    options.targets[0].addr = silent.local_addr().unwrap();
    let error = run_until(options, std::future::ready(()), |_| {}).await.unwrap_err();
    assert!(matches!(error, LoadError::Stopped), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dropping_a_run_closes_its_connections() {
    let server = Server::tls().await;
    let mut options = server.options(Mix { h1: 1, h2: 1, h3: 0 }, vec![get("/held", "200")]);
    options.duration = LONG;
    let running = tokio::spawn(run(options, |_| {}));
    server.site.requests.subscribe().wait_for(|count| *count >= 4).await.unwrap();
    assert_eq!(*server.site.open.borrow(), 4);
    running.abort();
    assert!(running.await.unwrap_err().is_cancelled());
    let mut open = server.site.open.subscribe();
    tokio::time::timeout(LONG, open.wait_for(|open| *open == 0)).await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_run_that_ended_has_closed_its_connections() {
    let server = Server::tls().await;
    run(server.options(Mix { h1: 1, h2: 1, h3: 1 }, vec![get("/", "200")]), |_| {}).await.unwrap();
    let mut open = server.site.open.subscribe();
    tokio::time::timeout(LONG, open.wait_for(|open| *open == 0)).await.unwrap().unwrap();
}
