//! Every request is sent once, over the protocol it is for, and counted as what became of it.

use std::collections::BTreeMap;

use bytes::Bytes;
use http::{HeaderValue, Method};
use selvage_loadtest::{Mix, Protocol, Report, RequestClass, run};

use crate::server::{Server, get};

const ALL: Mix = Mix { h1: 1, h2: 1, h3: 1 };

async fn answers(server: &Server, mix: Mix, requests: Vec<RequestClass>) -> Report {
    let report = run(server.options(mix, requests), |_| {}).await.unwrap();
    assert_eq!(report.total.errors, BTreeMap::new());
    assert_eq!((report.total.requests, report.total.answered), (40, 40));
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn each_protocol_serves_what_is_counted_for_it() {
    let server = Server::tls().await;
    let report = answers(&server, ALL, vec![get("/", "200")]).await;
    for protocol in Protocol::ALL {
        let line = &report.protocols[&protocol];
        assert!(line.requests > 0);
        assert_eq!((line.requests, line.answered), (server.seen(protocol), server.seen(protocol)), "{protocol}");
        assert_eq!(line.statuses, BTreeMap::from([(200, line.requests)]));
        assert_eq!(line.body_bytes, 5 * line.requests);
        assert_eq!((line.latency.count, line.service.count), (line.requests, line.requests));
        assert!(line.latency.min_us > 0 && line.latency.p50_us <= line.latency.max_us);
    }
    assert!(report.lag.count == 40 && report.connections.failed == 0);
    assert_eq!(report.connections.opened, 6);
    assert!(server.site.authorities.lock().unwrap().iter().all(|authority| authority == "hello.localhost:8443"));
}

#[tokio::test(flavor = "multi_thread")]
async fn plain_http_serves_h1_and_h2_by_prior_knowledge() {
    for (protocol, mix) in [(Protocol::H1, Mix { h1: 1, h2: 0, h3: 0 }), (Protocol::H2, Mix { h1: 0, h2: 1, h3: 0 })] {
        let server = Server::plain(protocol).await;
        let report = answers(&server, mix, vec![get("/", "200")]).await;
        assert_eq!(server.seen(protocol), 40);
        assert_eq!(report.protocols.keys().copied().collect::<Vec<_>>(), [protocol]);
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn bodies_arrive_whole_over_each_protocol() {
    let server = Server::tls().await;
    let size = 300_000;
    let class = RequestClass { method: Method::POST, body: Bytes::from(vec![7; size]), ..get("/echo", "200") };
    let report = answers(&server, ALL, vec![class]).await;
    assert_eq!(report.total.body_bytes, 40 * size as u64);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_status_that_a_class_does_not_expect_is_counted_for_that_class() {
    let server = Server::tls().await;
    let token = |name: &str, token: &'static str, expect: &str| {
        let mut class = get("/private", expect);
        class.name = name.to_owned();
        class.headers.insert("authorization", HeaderValue::from_static(token));
        class
    };
    let classes = vec![
        token("valid", "Bearer good", "200"),
        token("forged", "Bearer forged", "401"),
        token("forged, wrongly thought to pass", "Bearer forged", "2xx"),
    ];
    let report = answers(&server, ALL, classes).await;
    let [valid, forged, surprise] = report.classes.as_slice() else { panic!("three classes") };
    assert_eq!((valid.unexpected_status, &valid.statuses), (0, &BTreeMap::from([(200, valid.requests)])));
    assert_eq!((forged.unexpected_status, &forged.statuses), (0, &BTreeMap::from([(401, forged.requests)])));
    assert!(surprise.requests > 0);
    assert_eq!((surprise.unexpected_status, report.total.unexpected_status), (surprise.requests, surprise.requests));
    assert!(!report.clean());
}

#[tokio::test(flavor = "multi_thread")]
async fn a_class_may_ask_for_another_host_at_the_same_server() {
    let server = Server::tls().await;
    answers(&server, ALL, vec![RequestClass { host: Some("other.localhost".to_owned()), ..get("/", "200") }]).await;
    assert!(server.site.authorities.lock().unwrap().iter().all(|authority| authority == "other.localhost"));
}

#[tokio::test(flavor = "multi_thread")]
async fn several_targets_share_the_requests() {
    let (one, other) = (Server::plain(Protocol::H1).await, Server::plain(Protocol::H1).await);
    let mut options = one.options(Mix { h1: 1, h2: 0, h3: 0 }, vec![get("/", "200")]);
    options.targets.extend(other.options(options.mix, Vec::new()).targets);
    let report = run(options, |_| {}).await.unwrap();
    let (one, other) = (one.seen(Protocol::H1), other.seen(Protocol::H1));
    assert!(one > 0 && other > 0);
    assert_eq!((one + other, report.total.answered), (40, 40));
}
