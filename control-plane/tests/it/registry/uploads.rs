//! Blobs: in at once or in pieces, and out again whole or in part.

use reqwest::{Method, Response, StatusCode};
use selvage_config::Digest;

use crate::world::{Asker, World, refusal};

async fn begin(ops: &Asker) -> String {
    let begun = ops.ask(Method::POST, "/v2/acme/hello/blobs/uploads/").send().await.unwrap();
    assert_eq!(begun.status(), StatusCode::ACCEPTED);
    location(&begun)
}

fn location(answer: &Response) -> String {
    answer.headers()["location"].to_str().unwrap().to_owned()
}

async fn patch(ops: &Asker, upload: &str, range: Option<&str>, bytes: &'static [u8]) -> Response {
    let mut request = ops.ask(Method::PATCH, upload).body(bytes);
    if let Some(range) = range {
        request = request.header("content-range", range);
    }
    request.send().await.unwrap()
}

async fn put(ops: &Asker, upload: &str, digest: Digest, bytes: &'static [u8]) -> Response {
    ops.ask(Method::PUT, &format!("{upload}?digest={digest}")).body(bytes).send().await.unwrap()
}

#[tokio::test]
async fn a_blob_pushed_at_once_is_pulled_as_it_was() {
    let world = World::start().await;
    let ops = world.ops();
    let content: Vec<u8> = (0..3_000_000_u32).map(|n| n.to_le_bytes()[0] ^ n.to_le_bytes()[1]).collect();
    let digest = ops.push_blob("acme/hello", &content).await;
    let path = format!("/v2/acme/hello/blobs/{digest}");
    let head = ops.ask(Method::HEAD, &path).send().await.unwrap();
    assert_eq!((head.status(), head.headers()["content-length"].to_str().unwrap()), (StatusCode::OK, "3000000"));
    assert_eq!(head.headers()["docker-content-digest"], digest.to_string());
    for asker in [&ops, &world.node("fra-1")] {
        assert!(asker.get(&path).await.bytes().await.unwrap() == content);
    }
    let elsewhere = ops.get(&format!("/v2/acme/other/blobs/{digest}")).await;
    assert_eq!(refusal(elsewhere, StatusCode::NOT_FOUND).await, "BLOB_UNKNOWN");
}

#[tokio::test]
async fn a_part_of_a_blob_is_answered_for_a_range() {
    let world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_blob("acme/hello", b"0123456789").await;
    let part = async |range: &str| {
        let path = format!("/v2/acme/hello/blobs/{digest}");
        ops.ask(Method::GET, &path).header("range", range).send().await.unwrap()
    };
    let middle = part("bytes=2-4").await;
    assert_eq!(middle.status(), StatusCode::PARTIAL_CONTENT);
    assert_eq!(middle.headers()["content-range"], "bytes 2-4/10");
    assert_eq!(middle.text().await.unwrap(), "234");
    assert_eq!(part("bytes=-2").await.text().await.unwrap(), "89");
    let outside = part("bytes=10-").await;
    assert_eq!(outside.status(), StatusCode::RANGE_NOT_SATISFIABLE);
    assert_eq!(outside.headers()["content-range"], "bytes */10");
}

#[tokio::test]
async fn a_blob_pushed_in_chunks_is_one_blob() {
    let world = World::start().await;
    let ops = world.ops();
    let upload = begin(&ops).await;
    let first = patch(&ops, &upload, Some("0-4"), b"hello").await;
    assert_eq!((first.status(), &first.headers()["range"]), (StatusCode::ACCEPTED, &"0-4".parse().unwrap()));
    let upload = location(&first);
    let asked = ops.get(&upload).await;
    assert_eq!((asked.status(), &asked.headers()["range"]), (StatusCode::NO_CONTENT, &"0-4".parse().unwrap()));
    let second = patch(&ops, &upload, Some("5-6"), b", ").await;
    assert_eq!(second.status(), StatusCode::ACCEPTED);
    let digest = Digest::of(b"hello, world");
    let ended = put(&ops, &location(&second), digest, b"world").await;
    assert_eq!((ended.status(), location(&ended)), (StatusCode::CREATED, format!("/v2/acme/hello/blobs/{digest}")));
    assert_eq!(ops.get(&location(&ended)).await.text().await.unwrap(), "hello, world");
    assert_eq!(refusal(ops.get(&upload).await, StatusCode::NOT_FOUND).await, "BLOB_UPLOAD_UNKNOWN");
}

#[tokio::test]
async fn a_chunk_out_of_order_is_refused_and_says_where_to_go_on() {
    let world = World::start().await;
    let ops = world.ops();
    let upload = begin(&ops).await;
    patch(&ops, &upload, None, b"hello").await;
    for range in ["0-4", "6-7", "99-100"] {
        let refused = patch(&ops, &upload, Some(range), b"xx").await;
        assert_eq!(refused.status(), StatusCode::RANGE_NOT_SATISFIABLE, "{range}");
        assert_eq!(refused.headers()["range"], "0-4");
    }
    let nonsense = patch(&ops, &upload, Some("x"), b"xx").await;
    assert_eq!(refusal(nonsense, StatusCode::BAD_REQUEST).await, "BLOB_UPLOAD_INVALID");
    let digest = Digest::of(b"hello");
    assert_eq!(put(&ops, &upload, digest, b"").await.status(), StatusCode::CREATED);
}

#[tokio::test]
async fn bytes_without_their_digest_are_refused() {
    let world = World::start().await;
    let ops = world.ops();
    let wrong = Digest::of(b"other");
    let path = format!("/v2/acme/hello/blobs/uploads/?digest={wrong}");
    let at_once = ops.ask(Method::POST, &path).body("content").send().await.unwrap();
    assert_eq!(refusal(at_once, StatusCode::BAD_REQUEST).await, "DIGEST_INVALID");
    let upload = begin(&ops).await;
    let ended = put(&ops, &upload, wrong, b"content").await;
    assert_eq!(refusal(ended, StatusCode::BAD_REQUEST).await, "DIGEST_INVALID");
    assert_eq!(put(&ops, &upload, Digest::of(b"content"), b"").await.status(), StatusCode::NOT_FOUND);
    for digest in [wrong, Digest::of(b"content")] {
        assert_eq!(ops.get(&format!("/v2/acme/hello/blobs/{digest}")).await.status(), StatusCode::NOT_FOUND);
    }
    for bad in ["", "sha512:00", "sha256:00", "md5:x"] {
        let path = format!("/v2/acme/hello/blobs/uploads/?digest={bad}");
        let answer = ops.ask(Method::POST, &path).body("content").send().await.unwrap();
        assert_eq!(refusal(answer, StatusCode::BAD_REQUEST).await, "DIGEST_INVALID", "{bad}");
    }
    let left = std::fs::read_dir(world.directory.path().join("state/uploads")).unwrap().count();
    assert_eq!(left, 0);
}

#[tokio::test]
async fn an_upload_can_be_given_up() {
    let world = World::start().await;
    let ops = world.ops();
    let upload = begin(&ops).await;
    assert_eq!(ops.delete(&upload).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(ops.delete(&upload).await.status(), StatusCode::NOT_FOUND);
    let put = ops.ask(Method::PUT, &begin(&ops).await).body("x").send().await.unwrap();
    assert_eq!(refusal(put, StatusCode::BAD_REQUEST).await, "DIGEST_INVALID");
}

#[tokio::test]
async fn a_blob_too_large_is_refused_before_it_is_sent() {
    let world = World::start().await;
    let (ops, upload) = (world.ops(), begin(&world.ops()).await);
    let nothing = futures_util::stream::pending::<Result<bytes::Bytes, std::io::Error>>();
    let request = ops.ask(Method::PATCH, &upload).header("content-length", "300000000000");
    let answer = request.body(reqwest::Body::wrap_stream(nothing)).send().await.unwrap();
    assert_eq!(refusal(answer, StatusCode::PAYLOAD_TOO_LARGE).await, "SIZE_INVALID");
}

#[tokio::test]
async fn a_blob_is_mounted_where_it_is_and_pushed_where_it_is_not() {
    let world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_blob("acme/hello", b"content").await;
    let mount = async |from: &str| {
        let path = format!("/v2/acme/copy/blobs/uploads/?mount={digest}&from={from}");
        ops.ask(Method::POST, &path).send().await.unwrap()
    };
    let elsewhere = mount("acme/nothing").await;
    assert_eq!(elsewhere.status(), StatusCode::ACCEPTED);
    assert!(location(&elsewhere).contains("/blobs/uploads/"));
    assert_eq!(mount("acme/hello").await.status(), StatusCode::CREATED);
    let copy = format!("/v2/acme/copy/blobs/{digest}");
    assert_eq!(ops.get(&copy).await.text().await.unwrap(), "content");

    // The bytes stay as long as any repository has them.
    let file = world.directory.path().join("state/blobs/sha256").join(digest.hex());
    assert_eq!(ops.delete(&format!("/v2/acme/hello/blobs/{digest}")).await.status(), StatusCode::ACCEPTED);
    assert_eq!(ops.get(&copy).await.status(), StatusCode::OK);
    assert!(file.exists());
    assert_eq!(ops.delete(&copy).await.status(), StatusCode::ACCEPTED);
    assert_eq!(ops.delete(&copy).await.status(), StatusCode::NOT_FOUND);
    assert!(!file.exists());
}
