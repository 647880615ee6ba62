//! What a closing connection gives back goes to another one; what it may have done does not.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, SocketAddr};
use std::time::Duration;

use bytes::Bytes;
use h2::Reason;
use http::{Method, Response};
use selvage_loadtest::{ErrorKind, Mix, Options, Report, run};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};

use crate::server::{LONG, Server, get, options};

const H1: Mix = Mix { h1: 1, h2: 0, h3: 0 };
const H2: Mix = Mix { h1: 0, h2: 1, h3: 0 };
const H3: Mix = Mix { h1: 0, h2: 0, h3: 1 };

/// Answers the first request of a connection, reads the second one, and closes.
async fn close_at_the_second(mut stream: TcpStream) {
    let mut request = [0; 4_096];
    if stream.read(&mut request).await.is_ok_and(|read| read > 0) {
        let _ = stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n").await;
        let _ = stream.read(&mut request).await;
    }
}

async fn against_h1(method: Method) -> Report {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(close_at_the_second(stream));
        }
    });
    let mut class = get("/", "200");
    class.method = method;
    let report = run(options(addr, H1, vec![class]), |_| {}).await.unwrap();
    server.abort();
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_get_that_met_the_end_of_an_idle_connection_is_sent_again_and_a_post_is_not() {
    let report = against_h1(Method::GET).await;
    assert_eq!((report.total.answered, &report.total.errors), (40, &BTreeMap::new()));
    assert!(report.connections.resent > 0);
    let report = against_h1(Method::POST).await;
    assert_eq!(report.connections.resent, 0);
    let lost = report.total.errors[&ErrorKind::Closed];
    assert!(lost > 0 && report.total.answered + lost == 40, "{report}");
}

/// The first three requests of a connection are reset with this, the others are answered.
async fn against_h2(reason: Reason) -> Report {
    let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap();
    let addr = listener.local_addr().unwrap();
    let server = tokio::spawn(async move {
        let mut left = 3;
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            let mut connection = h2::server::handshake(stream).await.unwrap();
            let refused = left;
            left = 0;
            tokio::spawn(async move {
                let mut seen = 0;
                while let Some(Ok((_, mut respond))) = connection.accept().await {
                    seen += 1;
                    if seen <= refused {
                        respond.send_reset(reason);
                    } else {
                        respond.send_response(Response::new(()), true).unwrap();
                    }
                }
            });
        }
    });
    let mut options = options(addr, H2, vec![get("/", "200")]);
    options.connections = 1;
    let report = run(options, |_| {}).await.unwrap();
    server.abort();
    report
}

#[tokio::test(flavor = "multi_thread")]
async fn a_refused_stream_is_sent_again_and_a_cancelled_one_is_not() {
    let report = against_h2(Reason::REFUSED_STREAM).await;
    assert_eq!((report.total.answered, &report.total.errors), (40, &BTreeMap::new()));
    assert!((1..=3).contains(&report.connections.resent), "{report}");
    let report = against_h2(Reason::CANCEL).await;
    assert_eq!((report.connections.resent, report.total.answered), (0, 37));
}

/// An endpoint of QUIC elsewhere, and requests to it on one connection at a time.
async fn quic() -> (quinn::Endpoint, Options) {
    let server = Server::tls().await;
    let any = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let endpoint = quinn::Endpoint::server(server.quic_config(), any).unwrap();
    let mut options = server.options(H3, vec![get("/", "200")]);
    (options.targets[0].addr, options.connections) = (endpoint.local_addr().unwrap(), 1);
    options.duration = Duration::from_secs(1);
    (endpoint, options)
}

type Http3 = h3::server::Connection<h3_quinn::Connection, Bytes>;

async fn h3(endpoint: &quinn::Endpoint) -> (quinn::Connection, Http3) {
    let quic = endpoint.accept().await.unwrap().await.unwrap();
    let http = h3::server::Connection::new(h3_quinn::Connection::new(quic.clone())).await.unwrap();
    (quic, http)
}

async fn answer(mut http: Http3) {
    while let Ok(Some(resolver)) = http.accept().await {
        let Ok((_, mut stream)) = resolver.resolve_request().await else { break };
        let _ = stream.send_response(Response::new(())).await;
        let _ = stream.finish().await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_of_http_3_rejects_is_sent_again() {
    let (endpoint, options) = quic().await;
    let serving = tokio::spawn(async move {
        let first = endpoint.accept().await.unwrap().await.unwrap();
        while let Ok((mut send, mut receive)) = first.accept_bi().await {
            // H3_REQUEST_REJECTED.
            let _ = (send.reset(0x10b_u32.into()), receive.stop(0x10b_u32.into()));
        }
        let (_, http) = h3(&endpoint).await;
        answer(http).await;
    });
    let report = tokio::time::timeout(LONG, run(options, |_| {})).await.unwrap().unwrap();
    serving.await.unwrap();
    assert_eq!((report.total.answered, &report.total.errors), (200, &BTreeMap::new()));
    assert_eq!(report.connections.opened, 2);
    assert!(report.connections.resent > 0);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_a_server_of_http_3_left_behind_is_sent_again_if_it_said_goaway() {
    for (says_goaway, want) in [(true, 200), (false, 199)] {
        let (endpoint, options) = quic().await;
        let serving = tokio::spawn(async move {
            let (quic, mut first) = h3(&endpoint).await;
            let _unanswered = first.accept().await.unwrap().unwrap();
            if says_goaway {
                first.shutdown(0).await.unwrap();
                // Whoever connects anew has heard it.
                let (_, http) = h3(&endpoint).await;
                quic.close(0x100_u32.into(), b"");
                answer(http).await;
            } else {
                quic.close(0x100_u32.into(), b"");
                let (_, http) = h3(&endpoint).await;
                answer(http).await;
            }
        });
        let report = tokio::time::timeout(LONG, run(options, |_| {})).await.unwrap().unwrap();
        serving.await.unwrap();
        // Without the word others may have been on their way too.
        let fits = report.total.answered == want || (!says_goaway && report.total.answered < want);
        assert!(fits, "{says_goaway}: {report}");
    }
}
