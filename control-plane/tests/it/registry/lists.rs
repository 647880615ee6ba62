//! Lists of tags and referrers.

use reqwest::{Response, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::{BUNDLE, Descriptor, EMPTY, INDEX, Index, MANIFEST, Manifest, SIMPLE_SIGNING, WASM};
use serde_json::json;

use crate::world::{Asker, World, json_of, manifest, refusal};

async fn artifact(ops: &Asker, content: &[u8]) -> Manifest {
    ops.push_blob("acme/hello", b"{}").await;
    ops.push_blob("acme/hello", content).await;
    manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, content)])
}

/// The path of the next page.
fn next(answer: &Response) -> Option<String> {
    let link = answer.headers().get("link")?.to_str().unwrap();
    Some(link.strip_prefix('<').unwrap().split_once('>').unwrap().0.to_owned())
}

#[tokio::test]
async fn tags_are_listed_in_order_and_in_pages() {
    let world = World::start().await;
    let ops = world.ops();
    assert_eq!(refusal(ops.get("/v2/acme/hello/tags/list").await, StatusCode::NOT_FOUND).await, "NAME_UNKNOWN");
    let manifest = artifact(&ops, b"code").await;
    let none = json_of(ops.get("/v2/acme/hello/tags/list").await, StatusCode::OK).await;
    assert_eq!(none, json!({ "name": "acme/hello", "tags": [] }));
    for tag in ["b", "a", "A", "c", "a.1"] {
        ops.put_manifest("acme/hello", tag, &manifest).await;
    }
    let all = json_of(ops.get("/v2/acme/hello/tags/list").await, StatusCode::OK).await;
    assert_eq!(all["tags"], json!(["A", "a", "a.1", "b", "c"]));
    let mut pages = Vec::new();
    let mut path = Some("/v2/acme/hello/tags/list?n=2".to_owned());
    while let Some(at) = path {
        let answer = ops.get(&at).await;
        path = next(&answer);
        pages.push(json_of(answer, StatusCode::OK).await["tags"].clone());
    }
    assert_eq!(pages, [json!(["A", "a"]), json!(["a.1", "b"]), json!(["c"])]);
    for (query, tags) in
        [("n=0", json!([])), ("last=b", json!(["c"])), ("last=zz", json!([])), ("n=5", all["tags"].clone())]
    {
        let answer = ops.get(&format!("/v2/acme/hello/tags/list?{query}")).await;
        assert!(next(&answer).is_none(), "{query}");
        assert_eq!(json_of(answer, StatusCode::OK).await["tags"], tags, "{query}");
    }
    assert_eq!(ops.get("/v2/acme/hello/tags/list?n=x").await.status(), StatusCode::BAD_REQUEST);
}

#[tokio::test]
async fn what_refers_to_a_manifest_is_listed_and_filtered() {
    let world = World::start().await;
    let ops = world.ops();
    let subject = Descriptor::of(MANIFEST, &serde_json::to_vec(&artifact(&ops, b"code").await).unwrap());
    let path = format!("/v2/acme/hello/referrers/{}", subject.digest);
    let none: Index = ops.get(&path).await.json().await.unwrap();
    assert_eq!(none.manifests, []);

    // The subject need not be there yet.
    for (kind, content) in
        [(Some(BUNDLE), b"signature".as_slice()), (Some("application/spdx+json"), b"sbom"), (None, b"x")]
    {
        let mut referrer = artifact(&ops, content).await;
        referrer.artifact_type = kind.map(str::to_owned);
        referrer.subject = Some(subject.clone());
        referrer.annotations.insert("org.example.what".into(), "x".into());
        let digest = Digest::of(&serde_json::to_vec(&referrer).unwrap());
        let pushed = ops.put_manifest("acme/hello", &digest.to_string(), &referrer).await;
        assert_eq!(pushed.headers()["oci-subject"], subject.digest.to_string());
    }
    let answer = world.node("fra-1").get(&path).await;
    assert_eq!(answer.headers()["content-type"], INDEX);
    assert!(!answer.headers().contains_key("oci-filters-applied"));
    let all: Index = answer.json().await.unwrap();
    assert_eq!(all.manifests.len(), 3);
    let unnamed = all.manifests.iter().filter(|found| found.artifact_type.as_deref() == Some(EMPTY)).count();
    assert_eq!(unnamed, 1);

    let filtered = ops.get(&format!("{path}?artifactType={}", BUNDLE.replace('+', "%2B"))).await;
    assert_eq!(filtered.headers()["oci-filters-applied"], "artifactType");
    let found: Index = filtered.json().await.unwrap();
    assert_eq!(found.manifests.len(), 1);
    assert_eq!(found.manifests[0].artifact_type.as_deref(), Some(BUNDLE));
    assert_eq!(found.manifests[0].annotations["org.example.what"], "x");
    let other: Index = ops.get(&format!("{path}?artifactType={SIMPLE_SIGNING}")).await.json().await.unwrap();
    assert_eq!(other.manifests, []);

    let gone = format!("/v2/acme/hello/manifests/{}", found.manifests[0].digest);
    assert_eq!(ops.delete(&gone).await.status(), StatusCode::ACCEPTED);
    let left: Index = ops.get(&path).await.json().await.unwrap();
    assert_eq!(left.manifests.len(), 2);
    let elsewhere: Index = ops.get(&path.replace("hello", "other")).await.json().await.unwrap();
    assert_eq!(elsewhere.manifests, []);
}

#[tokio::test]
async fn many_referrers_come_in_pages() {
    let world = World::start().await;
    let ops = world.ops();
    let subject = Descriptor::of(MANIFEST, b"subject");
    let mut pushed = Vec::new();
    for number in 0..3 {
        let mut referrer = artifact(&ops, b"code").await;
        referrer.subject = Some(subject.clone());
        // Three of these are more than one page of bytes.
        referrer.annotations.insert("n".into(), number.to_string().repeat(900_000));
        pushed.push(Digest::of(&serde_json::to_vec(&referrer).unwrap()));
        ops.put_manifest("acme/hello", "any", &referrer).await;
    }
    let (mut found, mut pages) = (Vec::new(), 0);
    let mut path = Some(format!("/v2/acme/hello/referrers/{}?artifactType={EMPTY}", subject.digest));
    while let Some(at) = path {
        let answer = ops.get(&at).await;
        path = next(&answer);
        pages += 1;
        let index: Index = answer.json().await.unwrap();
        found.extend(index.manifests.iter().map(|descriptor| descriptor.digest));
    }
    pushed.sort();
    assert_eq!((found, pages), (pushed, 2));
}
