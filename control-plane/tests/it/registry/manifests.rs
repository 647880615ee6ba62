//! Manifests: what is taken, what is refused, what is answered.

use reqwest::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::{Descriptor, EMPTY, INDEX, MANIFEST, MANIFEST_BYTES_MAX, Manifest, WASM};
use serde_json::json;

use crate::world::{Asker, World, manifest, refusal};

async fn artifact(ops: &Asker, content: &[u8]) -> Manifest {
    ops.push_blob("acme/hello", b"{}").await;
    ops.push_blob("acme/hello", content).await;
    manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, content)])
}

async fn put(ops: &Asker, reference: &str, content_type: &str, bytes: Vec<u8>) -> reqwest::Response {
    let request = ops.ask(Method::PUT, &format!("/v2/acme/hello/manifests/{reference}"));
    request.header("content-type", content_type).body(bytes).send().await.unwrap()
}

#[tokio::test]
async fn a_manifest_is_pulled_by_tag_and_digest_as_it_was_pushed() {
    let world = World::start().await;
    let ops = world.ops();
    let manifest = artifact(&ops, b"code").await;
    // Not the bytes that a serializer would write: those that were pushed count.
    let bytes = serde_json::to_vec_pretty(&manifest).unwrap();
    let digest = Digest::of(&bytes);
    let pushed = put(&ops, "v1", MANIFEST, bytes.clone()).await;
    assert_eq!(pushed.status(), StatusCode::CREATED);
    assert_eq!(pushed.headers()["docker-content-digest"], digest.to_string());
    assert_eq!(pushed.headers()["location"], format!("/v2/acme/hello/manifests/{digest}"));
    for reference in ["v1".to_owned(), digest.to_string(), digest.to_string().replace(':', "%3A")] {
        let path = format!("/v2/acme/hello/manifests/{reference}");
        let answer = ops.get(&path).await;
        assert_eq!(answer.headers()["content-type"], MANIFEST);
        assert_eq!(answer.headers()["docker-content-digest"], digest.to_string());
        assert_eq!(answer.bytes().await.unwrap(), bytes);
        let head = ops.ask(Method::HEAD, &path).send().await.unwrap();
        assert_eq!(head.headers()["content-length"], bytes.len().to_string());
        assert_eq!(head.status(), StatusCode::OK);
    }
    let unknown = ops.get("/v2/acme/hello/manifests/v2").await;
    assert_eq!(refusal(unknown, StatusCode::NOT_FOUND).await, "MANIFEST_UNKNOWN");
}

#[tokio::test]
async fn a_tag_moves() {
    let world = World::start().await;
    let ops = world.ops();
    let mut digests = Vec::new();
    for content in [b"one", b"two"] {
        let manifest = artifact(&ops, content).await;
        ops.put_manifest("acme/hello", "latest", &manifest).await;
        let answer = ops.get("/v2/acme/hello/manifests/latest").await;
        digests.push(answer.headers()["docker-content-digest"].to_str().unwrap().to_owned());
    }
    assert_ne!(digests[0], digests[1]);
    assert_eq!(ops.get(&format!("/v2/acme/hello/manifests/{}", digests[0])).await.status(), StatusCode::OK);
}

#[tokio::test]
async fn a_manifest_must_be_what_it_is_called() {
    let world = World::start().await;
    let ops = world.ops();
    let bytes = serde_json::to_vec(&artifact(&ops, b"code").await).unwrap();
    let other = Digest::of(b"").to_string();
    assert_eq!(
        refusal(put(&ops, &other, MANIFEST, bytes.clone()).await, StatusCode::BAD_REQUEST).await,
        "DIGEST_INVALID"
    );
    let refused = put(&ops, "v1", INDEX, bytes.clone()).await;
    assert_eq!(refusal(refused, StatusCode::BAD_REQUEST).await, "MANIFEST_INVALID");
    for bad in ["", "{}", "null", "[1", "{\"schemaVersion\":2}"] {
        let refused = put(&ops, "v1", MANIFEST, bad.into()).await;
        assert_eq!(refusal(refused, StatusCode::BAD_REQUEST).await, "MANIFEST_INVALID", "{bad}");
    }
    assert_eq!(put(&ops, ".v1", MANIFEST, bytes).await.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn a_manifest_too_large_is_refused() {
    let world = World::start().await;
    let ops = world.ops();
    let mut manifest = artifact(&ops, b"code").await;
    manifest.annotations.insert("a".into(), "x".repeat(MANIFEST_BYTES_MAX));
    let refused = ops.put_manifest("acme/hello", "v1", &manifest).await;
    assert_eq!(refusal(refused, StatusCode::PAYLOAD_TOO_LARGE).await, "SIZE_INVALID");
}

#[tokio::test]
async fn a_manifest_is_taken_only_when_all_that_it_names_is_there() {
    let world = World::start().await;
    let ops = world.ops();
    let mut lacking = artifact(&ops, b"code").await;
    lacking.layers.push(Descriptor::of(WASM, b"never pushed"));
    let refused = ops.put_manifest("acme/hello", "v1", &lacking).await;
    assert_eq!(refusal(refused, StatusCode::BAD_REQUEST).await, "MANIFEST_BLOB_UNKNOWN");
    let mut resized = artifact(&ops, b"code").await;
    resized.layers[0].size += 1;
    let refused = ops.put_manifest("acme/hello", "v1", &resized).await;
    assert_eq!(refusal(refused, StatusCode::BAD_REQUEST).await, "MANIFEST_INVALID");
    // A blob of another repository is not this one's.
    let refused = ops.put_manifest("acme/other", "v1", &artifact(&ops, b"code").await).await;
    assert_eq!(refusal(refused, StatusCode::BAD_REQUEST).await, "MANIFEST_BLOB_UNKNOWN");
}

#[tokio::test]
async fn an_index_names_manifests_that_are_there_and_keeps_them() {
    let world = World::start().await;
    let ops = world.ops();
    let manifest = artifact(&ops, b"code").await;
    let bytes = serde_json::to_vec(&manifest).unwrap();
    let named = Descriptor::of(MANIFEST, &bytes);
    let index = serde_json::to_vec(&json!({ "schemaVersion": 2, "mediaType": INDEX, "manifests": [named] })).unwrap();
    let early = put(&ops, "all", INDEX, index.clone()).await;
    assert_eq!(refusal(early, StatusCode::BAD_REQUEST).await, "MANIFEST_BLOB_UNKNOWN");
    put(&ops, "v1", MANIFEST, bytes).await;
    assert_eq!(put(&ops, "all", INDEX, index.clone()).await.status(), StatusCode::CREATED);
    assert_eq!(ops.get("/v2/acme/hello/manifests/all").await.headers()["content-type"], INDEX);

    let path = |digest: Digest| format!("/v2/acme/hello/manifests/{digest}");
    assert_eq!(ops.delete(&path(named.digest)).await.status(), StatusCode::CONFLICT);
    assert_eq!(ops.delete(&path(Digest::of(&index))).await.status(), StatusCode::ACCEPTED);
    assert_eq!(ops.delete(&path(named.digest)).await.status(), StatusCode::ACCEPTED);
}

#[tokio::test]
async fn a_deleted_manifest_takes_its_tags_along_and_frees_its_blobs() {
    let world = World::start().await;
    let ops = world.ops();
    let manifest = artifact(&ops, b"code").await;
    let digest = Digest::of(&serde_json::to_vec(&manifest).unwrap());
    for tag in ["v1", "v2", "v3"] {
        ops.put_manifest("acme/hello", tag, &manifest).await;
    }
    let blob = format!("/v2/acme/hello/blobs/{}", Digest::of(b"code"));
    assert_eq!(refusal(ops.delete(&blob).await, StatusCode::CONFLICT).await, "DENIED");
    assert_eq!(ops.delete("/v2/acme/hello/manifests/v3").await.status(), StatusCode::ACCEPTED);
    assert_eq!(ops.get("/v2/acme/hello/manifests/v1").await.status(), StatusCode::OK);
    assert_eq!(ops.delete("/v2/acme/hello/manifests/v3").await.status(), StatusCode::NOT_FOUND);
    let path = format!("/v2/acme/hello/manifests/{digest}");
    assert_eq!(ops.delete(&path).await.status(), StatusCode::ACCEPTED);
    for path in ["/v2/acme/hello/manifests/v1", "/v2/acme/hello/manifests/v2", &path] {
        assert_eq!(ops.get(path).await.status(), StatusCode::NOT_FOUND, "{path}");
    }
    assert_eq!(ops.delete(&path).await.status(), StatusCode::NOT_FOUND);
    assert_eq!(ops.delete(&blob).await.status(), StatusCode::ACCEPTED);
}
