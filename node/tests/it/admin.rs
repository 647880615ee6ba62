//! The operators' listener.

mod backends;
mod operators;

use std::net::SocketAddr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use selvage_config::plan::Status;
use selvage_node::admin::{Access, Admin, AdminError, AdminParts};
use selvage_node::metrics::Metrics;
use selvage_node::serve::Parts;
use selvage_sync::{Kv, Options};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::TcpStream;

fn status() -> Status {
    Status {
        node: "fra-1".parse().unwrap(),
        region: "fra".parse().unwrap(),
        version: "1".into(),
        generation: 7,
        replication: None,
        front: None,
        admin: None,
        apps: Vec::new(),
        plan: None,
        load: Vec::new(),
        labels: [].into(),
    }
}

async fn parts() -> (TempDir, AdminParts) {
    let directory = tempfile::tempdir().unwrap();
    let (node, region) = (status().node, status().region);
    let options = Options::alone(node.clone(), region.clone(), directory.path().into(), Default::default());
    let kv = Kv::open(options, Arc::new(|_| None)).await.unwrap();
    let parts = Arc::new(Parts::new(node, region, 10, Metrics::new()));
    let access = Access::new(None, Default::default());
    (directory, AdminParts { parts, kv: Some(kv.into()), status: Arc::new(status), access, shelf: None })
}

fn any() -> SocketAddr {
    "127.0.0.1:0".parse().unwrap()
}

/// Asks over a stream of its own.
async fn over(
    stream: impl AsyncRead + AsyncWrite + Unpin + Send + 'static,
    request: http::Request<Full<Bytes>>,
) -> http::Response<Bytes> {
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.unwrap();
    let driver = tokio::spawn(connection);
    let response = sender.send_request(request).await.unwrap();
    let (head, body) = response.into_parts();
    let body = body.collect().await.unwrap().to_bytes();
    driver.abort();
    http::Response::from_parts(head, body)
}

async fn ask(admin: &Admin, method: &str, path: &str, body: impl Into<Bytes>) -> (u16, Bytes) {
    let answer = ask_in_session(admin, method, path, body, None).await;
    (answer.status().as_u16(), answer.into_body())
}

/// Asks with the token of a session.
async fn ask_in_session(
    admin: &Admin,
    method: &str,
    path: &str,
    body: impl Into<Bytes>,
    token: Option<&str>,
) -> http::Response<Bytes> {
    let address = admin.address();
    let mut request = http::Request::builder().method(method).uri(path).header("host", address.to_string());
    if let Some(token) = token {
        request = request.header("selvage-kv-token", token);
    }
    over(TcpStream::connect(address).await.unwrap(), request.body(Full::new(body.into())).unwrap()).await
}

fn read(body: &Bytes) -> Value {
    serde_json::from_slice(body).unwrap()
}

#[tokio::test]
async fn health_metrics_and_status_are_told() {
    let (_directory, parts) = parts().await;
    let admin = Admin::bind(any(), None, parts).await.unwrap();
    assert_eq!(ask(&admin, "GET", "/healthz", "").await.0, 200);
    assert_eq!(ask(&admin, "GET", "/readyz", "").await.0, 503, "there is no app");
    let (code, metrics) = ask(&admin, "GET", "/metrics", "").await;
    assert_eq!(code, 200);
    assert!(String::from_utf8(metrics.to_vec()).unwrap().contains("selvage_requests_under_way 0"));
    let (_, told) = ask(&admin, "GET", "/status", "").await;
    assert_eq!(serde_json::from_slice::<Status>(&told).unwrap(), status());
    assert_eq!(ask(&admin, "POST", "/status", "").await.0, 405);
    let (code, refusal) = ask(&admin, "GET", "/nothing", "").await;
    assert_eq!(code, 404);
    assert!(read(&refusal)["hint"].is_string());
    admin.drain(Instant::now() + Duration::from_secs(5)).await;
}

#[tokio::test]
async fn values_are_written_and_read_as_they_are() {
    let (_directory, parts) = parts().await;
    let admin = Admin::bind(any(), None, parts).await.unwrap();
    let bytes: Vec<u8> = (0..=255).collect();
    assert_eq!(ask(&admin, "PUT", "/kv/hello/default/a%2Fb%20c", bytes.clone()).await.0, 204);
    let (code, value) = ask(&admin, "GET", "/kv/hello/default/a/b%20c", "").await;
    assert_eq!((code, value), (200, bytes.into()));
    let (_, listed) = ask(&admin, "GET", "/kv/hello/default?prefix=a%2F&limit=1", "").await;
    let listed = read(&listed);
    assert_eq!((&listed["keys"][0]["key"], &listed["keys"][0]["bytes"]), (&json!("a/b c"), &json!(256)));
    assert_eq!(listed["after"], "a/b c");
    let (_, rest) = ask(&admin, "GET", "/kv/hello/default/?after=a%2Fb+c", "").await;
    assert_eq!(read(&rest), json!({"keys": [], "after": null}));
    assert_eq!(ask(&admin, "DELETE", "/kv/hello/default/a%2Fb%20c", "").await.0, 204);
    assert_eq!(ask(&admin, "GET", "/kv/hello/default/a%2Fb%20c", "").await.0, 404);
}

#[tokio::test]
async fn a_value_ends_when_its_writer_said() {
    let (_directory, parts) = parts().await;
    let admin = Admin::bind(any(), None, parts).await.unwrap();
    for query in ["ttl_ms=0", "ttl_ms=soon", "ttl_ms=-1", "ttl=1"] {
        assert_eq!(ask(&admin, "PUT", &format!("/kv/hello/default/k?{query}"), "v").await.0, 400, "{query}");
    }
    assert_eq!(ask(&admin, "PUT", "/kv/hello/default/long?ttl_ms=3600000", "v").await.0, 204);
    assert_eq!(ask(&admin, "PUT", "/kv/hello/default/short?ttl_ms=20", "v").await.0, 204);
    let begun = Instant::now();
    while ask(&admin, "GET", "/kv/hello/default/short", "").await.0 != 404 {
        assert!(begun.elapsed() < Duration::from_secs(60), "it has not ended");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    assert_eq!(ask(&admin, "GET", "/kv/hello/default/long", "").await, (200, "v".into()));
}

#[tokio::test]
async fn a_session_reads_what_it_wrote_and_a_token_that_is_none_is_refused() {
    let (_directory, parts) = parts().await;
    let admin = Admin::bind(any(), None, parts).await.unwrap();
    let written = ask_in_session(&admin, "PUT", "/kv/hello/default/k", "v", None).await;
    let token = written.headers()["selvage-kv-token"].to_str().unwrap();
    let read = ask_in_session(&admin, "GET", "/kv/hello/default/k", "", Some(token)).await;
    assert_eq!((read.status().as_u16(), &read.body()[..]), (200, &b"v"[..]));
    for bad in ["x", "fra-1.1", "fra-1.1.1.1", "fra-1.g.1", "Fra 1.1.1"] {
        let refused = ask_in_session(&admin, "GET", "/kv/hello/default/k", "", Some(bad)).await;
        assert_eq!(refused.status(), 400, "{bad}");
        assert!(String::from_utf8_lossy(refused.body()).contains("hint"), "{bad}");
    }
}

#[tokio::test]
async fn what_can_not_be_stored_is_refused_with_a_hint() {
    let (_directory, parts) = parts().await;
    let admin = Admin::bind(any(), None, parts).await.unwrap();
    let large = vec![0; selvage_sync::store::LARGE_BYTES_MAX + 1];
    for (method, path, body, want) in [
        ("PUT", "/kv/hello/default/k".to_owned(), large, 413),
        ("PUT", format!("/kv/hello/default/{}", "k".repeat(1_025)), vec![], 413),
        ("GET", "/kv/hello".into(), vec![], 400),
        ("GET", "/kv/Hello/default/k".into(), vec![], 400),
        ("GET", "/kv/hello/default/%ff".into(), vec![], 400),
        ("GET", "/kv/hello/default?limit=0".into(), vec![], 400),
        ("PUT", "/kv/hello/default".into(), vec![], 405),
        ("POST", "/kv/hello/default/k".into(), vec![], 405),
        ("POST", "/peers/isolation".into(), b"{}".to_vec(), 400),
        ("POST", "/peers/isolation".into(), vec![b' '; 2_000], 413),
        ("GET", "/peers/isolation".into(), vec![], 405),
    ] {
        let (code, refusal) = ask(&admin, method, &path, body).await;
        assert_eq!(code, want, "{method} {path}");
        assert!(read(&refusal)["error"].is_string() && read(&refusal)["hint"].is_string());
    }
    assert_eq!(ask(&admin, "POST", "/peers/isolation", r#"{"on":true}"#).await.0, 200);
    assert_eq!(read(&ask(&admin, "GET", "/peers", "").await.1), json!([]));
}

#[tokio::test]
async fn without_tls_only_this_machine_and_no_web_page_is_let_in() {
    let (_directory, parts) = parts().await;
    let open = Admin::bind("0.0.0.0:0".parse().unwrap(), None, parts.clone()).await;
    assert!(matches!(open, Err(AdminError::Open { .. })));
    let admin = Admin::bind(any(), None, parts).await.unwrap();
    for (fields, want) in [
        (&[("host", "127.0.0.1:1")][..], 200),
        (&[("host", "localhost:1")], 200),
        (&[("host", "[::1]:1")], 200),
        (&[], 403),
        (&[("host", "evil.example")], 403),
        (&[("host", "127.0.0.1.evil.example:1")], 403),
        (&[("host", "127.0.0.1:1"), ("origin", "https://evil.example")], 403),
    ] {
        let mut request = http::Request::get("/healthz");
        for (name, value) in fields {
            request = request.header(*name, *value);
        }
        let stream = TcpStream::connect(admin.address()).await.unwrap();
        assert_eq!(over(stream, request.body(Full::default()).unwrap()).await.status(), want, "{fields:?}");
    }
}
