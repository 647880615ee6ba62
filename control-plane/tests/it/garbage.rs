//! Bytes that mean nothing are the sender's mistake, never ours.

use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use reqwest::Method;

use crate::world::World;

/// Requests of one run.
const CASES: u32 = 300;

const PATHS: [(&str, &str); 14] = [
    ("POST", "/api/v1/apps/hello/releases"),
    ("POST", "/api/v1/apps/hello/rollback"),
    ("POST", "/api/v1/apps/%ff/rollback"),
    ("GET", "/api/v1/plans/%2e%2e?after=%ff"),
    ("PUT", "/api/v1/nodes/fra-1"),
    ("DELETE", "/api/v1/apps/%00"),
    ("POST", "/v2/a/blobs/uploads/"),
    ("POST", "/v2/a/blobs/uploads/?digest=x"),
    ("POST", "/v2/a/blobs/uploads/?mount=x&from=y"),
    ("PATCH", "/v2/a/blobs/uploads/x"),
    ("PUT", "/v2/a/manifests/v1"),
    ("PUT", "/v2/a/%2e%2e/%2e%2e/manifests/v1"),
    ("PUT", "/v2/%ff/manifests/v1"),
    ("GET", "/v2/a/tags/list?n=-1&last=%ff"),
];

#[test]
fn garbage_is_never_an_inner_error() {
    let runtime = tokio::runtime::Runtime::new().unwrap();
    let world = runtime.block_on(World::start());
    let (ops, node) = (world.ops(), world.node("fra-1"));
    let json_like = "[\\{\\}\\[\\]\",:0-9a-z]{0,80}".prop_map(String::into_bytes);
    let bodies = prop_oneof![any::<Vec<u8>>(), json_like];
    let kinds = prop_oneof![
        Just("application/json"),
        Just("application/vnd.oci.image.manifest.v1+json"),
        Just("application/vnd.oci.image.index.v1+json"),
        Just(";;;"),
    ];
    let strategy = (0..PATHS.len(), any::<bool>(), bodies, kinds, ".{0,20}");
    let mut runner = TestRunner::new(Config { cases: CASES, failure_persistence: None, ..Config::default() });
    let result = runner.run(&strategy, |(index, as_node, body, kind, range)| {
        let (method, path) = PATHS[index];
        let asker = if as_node { &node } else { &ops };
        let mut request = asker.ask(Method::from_bytes(method.as_bytes()).unwrap(), path).body(body);
        request = request.header("content-type", kind);
        if let Ok(range) = reqwest::header::HeaderValue::from_str(&range) {
            request = request.header("content-range", range.clone()).header("range", range);
        }
        let status = runtime.block_on(request.send()).unwrap().status();
        prop_assert!(status.as_u16() < 500, "{method} {path}: {status}");
        Ok(())
    });
    result.unwrap();
}
