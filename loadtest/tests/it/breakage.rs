//! Connections that end are opened again, and what was lost with them is counted.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use selvage_loadtest::{ErrorKind, Mix, Protocol, Report, run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::server::{LONG, Server, get, options};

const H1: Mix = Mix { h1: 1, h2: 0, h3: 0 };

/// Reads one request and answers with these bytes, then closes.
async fn answer_once(mut stream: TcpStream, answer: &[u8]) {
    let mut request = [0; 4096];
    if stream.read(&mut request).await.is_ok_and(|read| read > 0) {
        let _ = stream.write_all(answer).await;
        let _ = stream.shutdown().await;
    }
}

/// Runs 40 requests against a server that answers each connection once with these bytes.
async fn against(answer: &'static [u8]) -> Report {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(answer_once(stream, answer));
        }
    });
    let report = run(options(addr, H1, vec![get("/", "200")]), |_| {}).await.unwrap();
    server.abort();
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_cut_short_is_a_closed_connection() {
    let report = against(b"HTTP/1.1 200 OK\r\ncontent-length: 100\r\n\r\nshort").await;
    assert_eq!((report.total.answered, report.total.statuses.len()), (0, 0));
    assert_eq!(report.total.errors, BTreeMap::from([(ErrorKind::Closed, 40)]));
    assert!(report.connections.opened >= 40);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_answer_that_is_not_http_is_a_broken_protocol() {
    let report = against(b"220 mail.example ESMTP\r\n\r\n").await;
    assert_eq!(report.total.errors, BTreeMap::from([(ErrorKind::Protocol, 40)]));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_closes_after_each_answer_costs_connections_and_no_errors() {
    let server = Server::plain(Protocol::H1).await;
    let report = run(server.options(H1, vec![get("/last", "200")]), |_| {}).await.unwrap();
    assert_eq!((report.total.answered, report.total.errors), (40, BTreeMap::new()));
    assert!(report.connections.opened >= 40, "{:?}", report.connections);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_is_gone_fails_requests_without_being_hammered() {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr: SocketAddr = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let (stream, _) = listener.accept().await.unwrap();
        drop(listener);
        answer_once(stream, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\nconnection: close\r\n\r\n").await;
    });
    let mut options = options(addr, H1, vec![get("/", "200")]);
    options.connections = 1;
    let report = run(options, |_| {}).await.unwrap();
    server.await.unwrap();
    assert_eq!(report.total.answered, 1);
    assert_eq!(report.total.errors, BTreeMap::from([(ErrorKind::Connect, 39)]));
    // One attempt in 100 ms: as many as fit into the run, and never one for each request.
    let most = report.elapsed_ms / 100 + 2;
    assert!((1..=most).contains(&report.connections.failed), "{:?}", report.connections);
}

#[tokio::test(flavor = "multi_thread")]
async fn an_h3_connection_that_the_server_closes_is_opened_again() {
    let server = Server::tls().await;
    let (server_config, listener) =
        (server.quic_config(), std::net::UdpSocket::bind((Ipv4Addr::LOCALHOST, 0)).unwrap());
    let addr = listener.local_addr().unwrap();
    drop(listener);
    let endpoint = quinn::Endpoint::server(server_config, addr).unwrap();
    let accepting = tokio::spawn(async move {
        // The first connection is closed as soon as its first request is answered, the second one is kept.
        for answers_max in [1_u32, u32::MAX] {
            let connection = endpoint.accept().await.unwrap().await.unwrap();
            let kept = connection.clone();
            let mut h3 = h3::server::Connection::<_, Bytes>::new(h3_quinn::Connection::new(connection)).await.unwrap();
            let mut answers = 0;
            while let Ok(Some(resolver)) = h3.accept().await {
                let Ok((_, mut stream)) = resolver.resolve_request().await else { break };
                let _ = stream.send_response(http::Response::new(())).await;
                let _ = stream.finish().await;
                answers += 1;
                if answers == answers_max {
                    kept.close(0_u32.into(), b"enough");
                    break;
                }
            }
        }
    });
    let mut options = server.options(Mix { h1: 0, h2: 0, h3: 1 }, vec![get("/", "200")]);
    (options.targets[0].addr, options.connections, options.duration) = (addr, 1, Duration::from_secs(1));
    let report = tokio::time::timeout(LONG, run(options, |_| {})).await.unwrap().unwrap();
    accepting.await.unwrap();
    assert_eq!(report.connections.opened, 2);
    // Those that were on the first connection may be lost; they are counted, and the rest is answered.
    let lost = report.total.errors.get(&ErrorKind::Closed).copied().unwrap_or(0);
    assert_eq!(report.total.answered + lost, 200, "{report}");
    assert!(report.total.answered > 0 && report.total.errors.keys().all(|kind| *kind == ErrorKind::Closed));
}
