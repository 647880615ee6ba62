//! What cannot be tested is refused before the first request, with the reason.

use std::error::Error;
use std::net::{Ipv4Addr, SocketAddr};

use selvage_loadtest::{ConnectError, LoadError, Mix, Options, Protocol, run};
use tokio::net::TcpListener;

use crate::server::{Server, get, options};

fn only(protocol: Protocol) -> Mix {
    let weight = |of| u32::from(of == protocol);
    Mix { h1: weight(Protocol::H1), h2: weight(Protocol::H2), h3: weight(Protocol::H3) }
}

async fn refusal(options: Options) -> LoadError {
    run(options, |_| {}).await.unwrap_err()
}

#[tokio::test]
async fn a_target_that_does_not_listen_is_unreachable() {
    let addr: SocketAddr = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.unwrap().local_addr().unwrap();
    for protocol in [Protocol::H1, Protocol::H2] {
        let error = refusal(options(addr, only(protocol), vec![get("/", "200")])).await;
        assert_eq!(
            error.to_string(),
            format!("http://hello.localhost:8443 at {addr} is not reachable over {protocol}")
        );
        assert!(matches!(error, LoadError::Unreachable { source: ConnectError::Tcp(_), .. }), "{error:?}");
        assert!(error.source().unwrap().source().unwrap().to_string().contains("refused"));
    }
}

#[tokio::test]
async fn a_certificate_of_another_authority_is_refused() {
    let (server, other) = (Server::tls().await, Server::tls().await);
    for protocol in Protocol::ALL {
        let mut options = server.options(only(protocol), vec![get("/", "200")]);
        options.roots = vec![other.root.clone()];
        let error = refusal(options).await;
        assert!(
            matches!(&error, LoadError::Unreachable { source: ConnectError::Tls(_) | ConnectError::Quic(_), .. }),
            "{error:?}"
        );
    }
    assert!(server.site.seen.lock().unwrap().is_empty());
}

#[tokio::test]
async fn a_certificate_for_another_name_is_refused() {
    let server = Server::tls().await;
    for protocol in Protocol::ALL {
        let mut options = server.options(only(protocol), vec![get("/", "200")]);
        options.targets[0].host = "other.localhost".to_owned();
        let error = refusal(options).await;
        assert!(matches!(&error, LoadError::Unreachable { protocol: tried, .. } if *tried == protocol), "{error:?}");
    }
}

#[tokio::test]
async fn a_server_that_does_not_agree_to_h2_is_not_spoken_to_in_h2() {
    let without = Server::tls_with(&[]).await;
    let error = refusal(without.options(only(Protocol::H2), vec![get("/", "200")])).await;
    assert!(
        matches!(error, LoadError::Unreachable { source: ConnectError::Alpn { wanted: Protocol::H2 }, .. }),
        "{error:?}"
    );
    // Without ALPN there is still HTTP/1.1.
    let report = run(without.options(only(Protocol::H1), vec![get("/", "200")]), |_| {}).await.unwrap();
    assert_eq!(report.total.answered, 40);

    let h1_only = Server::tls_with(&[b"http/1.1"]).await;
    let error = refusal(h1_only.options(only(Protocol::H2), vec![get("/", "200")])).await;
    assert!(matches!(error, LoadError::Unreachable { source: ConnectError::Tls(_), .. }), "{error:?}");
}

#[tokio::test]
async fn what_is_no_request_or_no_certificate_is_refused_before_a_connection() {
    let server = Server::tls().await;
    let error = refusal(server.options(only(Protocol::H1), vec![get("no slash", "200")])).await;
    assert!(matches!(error, LoadError::Class { .. }), "{error:?}");
    let mut options = server.options(only(Protocol::H1), vec![get("/", "200")]);
    options.roots.push(vec![1, 2, 3].into());
    assert!(matches!(refusal(options).await, LoadError::Root { index: 1, .. }));
    let plain = Server::plain(Protocol::H1).await;
    let error = refusal(plain.options(Mix { h1: 1, h2: 0, h3: 1 }, vec![get("/", "200")])).await;
    assert!(matches!(error, LoadError::PlainH3 { .. }), "{error:?}");
    assert_eq!((*server.site.open.borrow(), *plain.site.open.borrow()), (0, 0));
}
