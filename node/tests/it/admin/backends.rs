//! Operators and stores in backends.

use selvage_backend::{Backends, Stores};

use super::*;
use crate::guest::backends::server::{Kind, Server, until};
use crate::guest::backends::{REQUEST_MS, kv};

/// A node's listener whose stores are all at this port.
async fn at(kind: Kind, port: u16, request_ms: u64) -> (TempDir, Stores, Admin) {
    let (directory, mut parts) = parts().await;
    let mesh = parts.kv.take().unwrap().mesh().clone();
    let stores = Stores::new(mesh, Backends::open(&kv(kind, port, request_ms)).unwrap());
    parts.kv = Some(stores.clone());
    (directory, stores, Admin::bind(any(), None, parts).await.unwrap())
}

async fn put_if_absent(admin: &Admin, path: &str) -> u16 {
    let address = admin.address();
    let request = http::Request::builder().method("PUT").uri(path).header("host", address.to_string());
    let request = request.header("if-none-match", "*").body(Full::new(Bytes::from_static(b"first"))).unwrap();
    over(TcpStream::connect(address).await.unwrap(), request).await.status().as_u16()
}

#[tokio::test]
async fn stores_in_a_backend_are_read_written_and_listed() {
    for kind in [Kind::Redis, Kind::Nats] {
        let Some(server) = Server::start(kind) else { return };
        let (_directory, stores, admin) = at(kind, server.port(), REQUEST_MS).await;
        until("connected", async || stores.status().iter().all(|status| status.connected)).await;
        let path = "/kv/hello/default/a%2Fb%20c";
        assert_eq!(ask(&admin, "GET", path, "").await.0, 404);
        assert_eq!(ask(&admin, "PUT", path, "value").await.0, 204);
        assert_eq!(ask(&admin, "GET", path, "").await, (200, "value".into()));
        assert_eq!(ask(&admin, "PUT", "/kv/hello/default/long?ttl_ms=600000", "v").await.0, 204);
        let (_, listed) = ask(&admin, "GET", "/kv/hello/default?limit=1", "").await;
        assert_eq!(read(&listed)["keys"][0]["key"], "a/b c");
        assert_eq!((&read(&listed)["keys"][0]["bytes"], &read(&listed)["after"]), (&json!(5), &json!("a/b c")));
        let (_, rest) = ask(&admin, "GET", "/kv/hello/default?after=a%2Fb%20c", "").await;
        assert_eq!((&read(&rest)["keys"][0]["key"], &read(&rest)["after"]), (&json!("long"), &Value::Null));
        assert_eq!(put_if_absent(&admin, path).await, 412);
        assert_eq!(ask(&admin, "GET", &format!("{path}?latest"), "").await, (200, "value".into()));
        assert_eq!(ask(&admin, "DELETE", path, "").await.0, 204);
        assert_eq!(ask(&admin, "GET", path, "").await.0, 404);
        assert_eq!(put_if_absent(&admin, path).await, 204);
        for (method, path, body, code) in [
            ("GET", "/kv/hello/default?watch=now", vec![], 501),
            ("GET", "/kv/hello/default?limit=0", vec![], 400),
            ("GET", "/kv/hello/default/%ff", vec![], 400),
            ("POST", "/kv/hello/default/k", vec![], 405),
            ("PUT", "/kv/hello/default", vec![], 405),
            ("PUT", "/kv/hello/default/k?ttl_ms=0", vec![], 400),
            ("PUT", "/kv/hello/default/k", vec![7; 1_000 * 1_024 + 1], 413),
        ] {
            let (told, refusal) = ask(&admin, method, path, body).await;
            assert!(told == code && read(&refusal)["hint"].is_string(), "{method} {path}: {told}");
        }
        let (_, metrics) = ask(&admin, "GET", "/metrics", "").await;
        let metrics = String::from_utf8(metrics.to_vec()).unwrap();
        assert!(metrics.contains(r#"selvage_kv_backend_state{backend="x",what="connected"} 1"#), "{metrics}");
        assert!(metrics.contains(r#"selvage_kv_backend_requests_total{backend="x",outcome="refused_key"} 0"#));
        let (_, again) = ask(&admin, "GET", "/metrics", "").await;
        let ok = |text: &str| {
            let line = text.lines().find(|line| line.contains(r#"requests_total{backend="x",outcome="ok"}"#)).unwrap();
            line.rsplit(' ').next().unwrap().parse::<u64>().unwrap()
        };
        let again = String::from_utf8(again.to_vec()).unwrap();
        assert_eq!((ok(&metrics), ok(&again)), (ok(&again), stores.status()[0].requests["ok"]), "counted once");
    }
}

#[tokio::test]
async fn a_backend_that_is_away_is_told_by_status_and_metrics() {
    let nobody = std::net::TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
    let (_directory, stores, admin) = at(Kind::Redis, nobody, 500).await;
    until("it is known", async || stores.status()[0].error.as_ref().is_some_and(|e| e.starts_with("connect:"))).await;
    let (code, status) = ask(&admin, "GET", "/status", "").await;
    let told = &read(&status)["kv_backends"][0];
    assert_eq!(
        (code, &told["name"], &told["kind"], &told["connected"]),
        (200, &json!("x"), &json!("redis"), &json!(false))
    );
    assert!(told["error"].as_str().unwrap().starts_with("connect:") && read(&status)["node"] == "fra-1");
    let (_, metrics) = ask(&admin, "GET", "/metrics", "").await;
    let metrics = String::from_utf8(metrics.to_vec()).unwrap();
    assert!(metrics.contains(r#"selvage_kv_backend_state{backend="x",what="connected"} 0"#));
    let (code, refusal) = ask(&admin, "GET", "/kv/hello/default/k", "").await;
    assert_eq!((code, &read(&refusal)["error"]), (503, &json!("backend x is away")));
}
