//! What a guest was granted works; what it was not is a value that it sees.

use std::net::SocketAddr;

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpListener;

use super::*;

/// 900 and the number of the error code, as `outbound.wat` answers.
const PROHIBITED: u16 = 904;
const LIMIT_REACHED: u16 = 911;
const DENIED: u16 = 915;

/// An origin that answers each request on each connection with 204, and counts connections.
async fn origin() -> (SocketAddr, Arc<std::sync::atomic::AtomicUsize>) {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let address = listener.local_addr().unwrap();
    let connections = Arc::new(std::sync::atomic::AtomicUsize::new(0));
    let count = Arc::clone(&connections);
    tokio::spawn(async move {
        while let Ok((mut stream, _)) = listener.accept().await {
            count.fetch_add(1, std::sync::atomic::Ordering::SeqCst);
            tokio::spawn(async move {
                let mut head = Vec::new();
                while stream.read_buf(&mut head).await.is_ok_and(|read| read > 0) {
                    if head.ends_with(b"\r\n\r\n") {
                        head.clear();
                        stream.write_all(b"HTTP/1.1 204 No Content\r\n\r\n").await.unwrap();
                    }
                }
            });
        }
    });
    (address, connections)
}

async fn sender(allowed: &[&str], private_networks: bool) -> Guest {
    Guest::new("outbound.wat").await.with(|grants| {
        grants.outbound = allowed.iter().map(|entry| entry.parse().unwrap()).collect();
        let options = EgressOptions { private_networks, roots: Vec::new() };
        grants.egress = Arc::new(Egress::new(&options).unwrap());
    })
}

async fn status(guest: Guest, authority: &str) -> u16 {
    guest.get(&format!("/{authority}")).await.unwrap().status().as_u16()
}

#[tokio::test]
async fn a_request_goes_where_it_was_granted() {
    let (address, connections) = origin().await;
    let guest = sender(&[&format!("http://{address}")], true).await.activate().unwrap();
    for _ in 0..3 {
        assert_eq!(guest.get(&format!("/{address}")).await.unwrap().status(), 204);
    }
    assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 1, "the connection is used again");
}

#[tokio::test]
async fn a_host_that_was_not_granted_is_denied() {
    let (address, connections) = origin().await;
    assert_eq!(status(sender(&[], true).await, &address.to_string()).await, DENIED);
    let elsewhere = sender(&["http://api.example", "https://*:*"], true).await;
    assert_eq!(status(elsewhere, &address.to_string()).await, DENIED);
    assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test]
async fn private_networks_are_refused_even_where_everything_was_granted() {
    let (address, connections) = origin().await;
    let port = address.port();
    // A literal, names that resolve to loopback, and spellings that only a resolver understands.
    for authority in [
        address.to_string(),
        format!("localhost:{port}"),
        format!("[::1]:{port}"),
        format!("[::ffff:127.0.0.1]:{port}"),
        format!("127.1:{port}"),
        format!("2130706433:{port}"),
        "169.254.169.254".to_owned(),
    ] {
        assert_eq!(status(sender(&["*://*:*"], false).await, &authority).await, PROHIBITED, "{authority}");
    }
    assert_eq!(connections.load(std::sync::atomic::Ordering::SeqCst), 0);
}

#[tokio::test]
async fn a_name_is_resolved_to_what_may_be_reached() {
    let (address, _) = origin().await;
    let guest = sender(&["http://localhost:*"], true).await;
    assert_eq!(status(guest, &format!("localhost:{}", address.port())).await, 204);
}

#[tokio::test]
async fn requests_beyond_the_limit_are_refused() {
    let (address, _) = origin().await;
    let guest = sender(&["*://*:*"], true).await.limits(|limits| limits.outbound_requests = 0);
    assert_eq!(status(guest, &address.to_string()).await, LIMIT_REACHED);
}

#[tokio::test]
async fn a_variable_is_read() {
    let guest = Guest::new("hello").await.with(|grants| {
        grants.variables.insert("greeting".into(), "Moin".into());
    });
    assert_eq!(told(guest.get("/env").await.unwrap()).await, (200, "Moin\n".into()));
    let (status, text) = told(Guest::new("hello").await.get("/env").await.unwrap()).await;
    assert_eq!(status, 500);
    assert!(text.contains("ndefined"), "{text}");
}

fn granted(grants: &mut Grants) {
    grants.stores = vec!["default".parse().unwrap()];
}

#[tokio::test]
async fn a_value_that_one_request_set_is_there_for_the_next() {
    let guest = Guest::new("counter").await.with(granted).activate().unwrap();
    assert_eq!(guest.ask("GET", "/kv/a", "").await.0, 404);
    assert_eq!(guest.ask("PUT", "/kv/a", "value").await.0, 204);
    assert_eq!(guest.ask("GET", "/kv/a", "").await, (200, "value".into()));
    assert_eq!(guest.ask("PUT", "/kv/b", "").await.0, 204);
    assert_eq!(guest.ask("GET", "/keys", "").await, (200, r#"["a","b"]"#.into()));
    assert_eq!(guest.ask("DELETE", "/kv/a", "").await.0, 204);
    assert_eq!(guest.ask("GET", "/kv/a", "").await.0, 404);
}

#[tokio::test]
async fn a_counter_counts() {
    let guest = Guest::new("counter").await.with(granted).activate().unwrap();
    for want in ["1\n", "2\n", "3\n"] {
        assert_eq!(guest.ask("POST", "/count/visits", "").await, (200, want.into()));
    }
    assert_eq!(guest.ask("GET", "/count/visits", "").await, (200, "3\n".into()));
}

#[tokio::test]
async fn a_session_is_written_on_terms_and_only_if_nobody_wrote_before() {
    let guest = Guest::new("session").await.with(granted).activate().unwrap();
    let put = async |path: &str, etag: Option<&str>| {
        let mut request = request("PUT", path, full("stitch"));
        request.http.headers_mut().insert("content-type", "text/tailored".parse().unwrap());
        if let Some(etag) = etag {
            request.http.headers_mut().insert("if-match", etag.parse().unwrap());
        }
        let response = guest.call(request).await.unwrap();
        let etag = response.headers().get("etag").map(|etag| etag.to_str().unwrap().to_owned());
        (response.status().as_u16(), etag)
    };
    let (status, etag) = put("/alice?ttl=60000", None).await;
    assert_eq!(status, 201);
    assert_eq!(put("/alice", None).await, (412, None));
    let session = guest.get("/alice").await.unwrap();
    assert_eq!((session.status().as_u16(), session.headers()["content-type"].as_bytes()), (200, &b"text/tailored"[..]));
    let age = session.headers()["cache-control"].to_str().unwrap().strip_prefix("max-age=").unwrap().to_owned();
    assert!(age.parse::<u64>().unwrap() <= 60);
    assert_eq!(told(session).await.1, "stitch");
    let (status, newer) = put("/alice", etag.as_deref()).await;
    assert!(status == 200 && newer != etag);
    assert_eq!(put("/alice", etag.as_deref()).await, (412, None));
    assert_eq!(guest.ask("GET", "/", "").await, (200, "alice\n".into()));
    assert!(guest.get("/alice").await.unwrap().headers().get("cache-control").is_none());
    for counted in 1..=6 {
        let status = if counted > 5 { 429 } else { 200 };
        assert_eq!(guest.ask("POST", "/alice?ttl=60000", "").await, (status, format!("{counted}\n")));
    }
    put("/bob?ttl=1", None).await;
    let patience = Instant::now() + PATIENCE;
    while guest.ask("GET", "/bob", "").await.0 != 404 {
        assert!(Instant::now() < patience, "a session of 1 ms is there");
    }
    assert_eq!(guest.ask("DELETE", "/alice", "").await.0, 204);
    assert_eq!(guest.ask("GET", "/", "").await, (200, String::new()));
}

#[tokio::test]
async fn terms_beyond_their_bounds_are_values_that_the_guest_sees() {
    let guest = Guest::new("session").await.with(granted).activate().unwrap();
    let put = async |path: &str, kind: &str, etag: Option<&str>| {
        let mut request = request("PUT", path, full("stitch"));
        request.http.headers_mut().insert("content-type", kind.parse().unwrap());
        if let Some(etag) = etag {
            request.http.headers_mut().insert("if-match", etag.parse().unwrap());
        }
        told(guest.call(request).await.unwrap()).await
    };
    let refused = |why: &str| (500, format!("store: Error::Other(\"{why}\")\n"));
    assert_eq!(put("/a?ttl=0", "a/b", None).await, refused("ttl of 0 ms, it is from 1 to 315360000000"));
    let long = put("/a?ttl=315360000001", "a/b", None).await;
    assert_eq!(long, refused("ttl of 315360000001 ms, it is from 1 to 315360000000"));
    assert_eq!(guest.ask("POST", "/a?ttl=0", "").await, refused("ttl of 0 ms, it is from 1 to 315360000000"));
    let large = put("/a", &"m".repeat(1025), None).await;
    assert_eq!(large, refused("metadata of 1025 bytes, the limit is 1024"));
    assert_eq!(put("/a", "a/b", Some("\"no version\"")).await, refused("unknown version"));
    assert_eq!(guest.ask("GET", "/a", "").await.0, 404, "nothing was written");
    assert_eq!(put("/a?ttl=315360000000", &"m".repeat(1024), None).await.0, 201);

    let guest = Guest::new("session").await.activate().unwrap();
    let denied = guest.ask("GET", "/a", "").await;
    assert_eq!(denied, (500, "store: Error::AccessDenied\n".into()));
}

#[test]
fn the_interface_that_the_example_ships_is_the_hosts() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let host = std::fs::read_to_string(root.join("wit/selvage-keyvalue.wit")).unwrap();
    let example = root.join("../examples/session/wit/selvage-keyvalue.wit");
    assert_eq!(std::fs::read_to_string(example).unwrap(), host);
}

#[tokio::test]
async fn a_store_that_was_not_granted_is_denied() {
    let guest = Guest::new("counter").await.activate().unwrap();
    for path in ["/kv/a", "/count/a"] {
        let (status, text) = guest.ask(if path == "/kv/a" { "GET" } else { "POST" }, path, "").await;
        assert_eq!(status, 500);
        assert!(text.to_lowercase().contains("denied"), "{text}");
    }
}

#[tokio::test]
async fn two_apps_with_one_label_have_two_stores() {
    let mine = Guest::new("counter").await.with(granted);
    let kv = mine.grants.kv.clone();
    let theirs = Guest::new("counter").await.with(granted).with(|grants| {
        grants.app = "other".parse().unwrap();
        grants.kv = kv;
    });
    let (mine, theirs) = (mine.activate().unwrap(), theirs.activate().unwrap());
    assert_eq!(mine.ask("PUT", "/kv/a", "mine").await.0, 204);
    assert_eq!(theirs.ask("GET", "/kv/a", "").await.0, 404);
    assert_eq!(mine.ask("GET", "/kv/a", "").await, (200, "mine".into()));
}
