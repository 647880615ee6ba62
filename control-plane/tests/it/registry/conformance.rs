//! Every end point of the distribution specification 1.1, walked in the order of its table.

use reqwest::{Method, Response, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::{Descriptor, EMPTY, INDEX, Index, MANIFEST, WASM};

use crate::world::{Asker, World, manifest};

/// One request of the table: what is asked, and what must come back.
struct Case {
    end: &'static str,
    method: Method,
    path: String,
    headers: Vec<(&'static str, String)>,
    body: Vec<u8>,
    status: StatusCode,
    /// Header fields that must be there, with a part of their value.
    has: Vec<(&'static str, String)>,
}

fn case(end: &'static str, method: Method, path: impl Into<String>, status: u16) -> Case {
    let status = StatusCode::from_u16(status).unwrap();
    Case { end, method, path: path.into(), headers: Vec::new(), body: Vec::new(), status, has: Vec::new() }
}

impl Case {
    fn with(mut self, name: &'static str, value: impl Into<String>) -> Self {
        self.headers.push((name, value.into()));
        self
    }

    fn body(self, body: impl Into<Vec<u8>>) -> Self {
        Self { body: body.into(), ..self }
    }

    fn has(mut self, name: &'static str, part: impl Into<String>) -> Self {
        self.has.push((name, part.into()));
        self
    }
}

async fn walk(asker: &Asker, case: Case) -> Response {
    let mut request = asker.ask(case.method.clone(), &case.path).body(case.body);
    for (name, value) in case.headers {
        request = request.header(name, value);
    }
    let answer = request.send().await.unwrap();
    assert_eq!(answer.status(), case.status, "{} {} {}", case.end, case.method, case.path);
    for (name, part) in case.has {
        let value = answer.headers().get(name).map(|value| value.to_str().unwrap().to_owned()).unwrap_or_default();
        assert!(value.contains(&part), "{} {}: {name} is {value:?}, not {part:?}", case.end, case.path);
    }
    answer
}

#[tokio::test]
async fn every_end_point_of_the_table_does_what_the_specification_says() {
    let world = World::start().await;
    let ops = world.ops();
    let (one, two) = (b"one blob".as_slice(), b"another blob".as_slice());
    let (d1, d2) = (Digest::of(one), Digest::of(two));
    let at = |rest: &str| format!("/v2/acme/app/{rest}");
    let ok = |case| walk(&ops, case);

    ok(case("end-1", Method::GET, "/v2/", 200)).await;
    // Pushing blobs: at once, in two steps, in chunks.
    ok(case("end-2", Method::HEAD, at(&format!("blobs/{d1}")), 404)).await;
    ok(case("end-4b", Method::POST, at(&format!("blobs/uploads/?digest={d1}")), 201)
        .body(one)
        .has("location", d1.to_string()))
    .await;
    let begun = ok(case("end-4a", Method::POST, at("blobs/uploads/"), 202).has("location", "/blobs/uploads/")).await;
    let upload = begun.headers()["location"].to_str().unwrap().to_owned();
    ok(case("end-5", Method::PATCH, &upload, 202).with("content-range", "0-3").body(&two[..4]).has("range", "0-3"))
        .await;
    ok(case("end-13", Method::GET, &upload, 204).has("range", "0-3").has("location", "/blobs/uploads/")).await;
    ok(case("end-5", Method::PATCH, &upload, 416).with("content-range", "9-10").body("xx")).await;
    ok(case("end-6", Method::PUT, format!("{upload}?digest={d2}"), 201)
        .body(&two[4..])
        .has("location", d2.to_string()))
    .await;
    let begun = ok(case("end-4a", Method::POST, at("blobs/uploads/"), 202)).await;
    let given_up = begun.headers()["location"].to_str().unwrap().to_owned();
    ok(case("end-14", Method::DELETE, &given_up, 204)).await;
    ok(case("end-13", Method::GET, &given_up, 404)).await;
    // Pulling them, whole and in part.
    ok(case("end-2", Method::HEAD, at(&format!("blobs/{d1}")), 200).has("content-length", "8")).await;
    ok(case("end-2", Method::GET, at(&format!("blobs/{d1}")), 200).has("docker-content-digest", d1.to_string())).await;
    ok(case("end-2", Method::GET, at(&format!("blobs/{d2}")), 206)
        .with("range", "bytes=8-")
        .has("content-range", "bytes 8-11/12"))
    .await;
    // Manifests, by tag and by digest.
    ok(case("end-4b", Method::POST, at(&format!("blobs/uploads/?digest={}", Digest::of(b"{}"))), 201).body("{}")).await;
    let plain = manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, one), Descriptor::of(WASM, two)]);
    let bytes = serde_json::to_vec(&plain).unwrap();
    let digest = Digest::of(&bytes);
    ok(case("end-7", Method::PUT, at("manifests/v1"), 201).with("content-type", MANIFEST).body(bytes.clone())).await;
    ok(case("end-7", Method::PUT, at(&format!("manifests/{digest}")), 201)
        .with("content-type", MANIFEST)
        .body(bytes.clone())
        .has("location", digest.to_string()))
    .await;
    for reference in ["v1".to_owned(), digest.to_string()] {
        ok(case("end-3", Method::HEAD, at(&format!("manifests/{reference}")), 200).has("content-type", MANIFEST)).await;
        ok(case("end-3", Method::GET, at(&format!("manifests/{reference}")), 200)).await;
    }
    ok(case("end-3", Method::GET, at("manifests/v2"), 404)).await;
    // Lists.
    ok(case("end-8a", Method::GET, at("tags/list"), 200)).await;
    ok(case("end-8b", Method::GET, at("tags/list?n=1&last=a"), 200)).await;
    // What is about a manifest.
    let mut about = manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, one)]);
    about.subject = Some(Descriptor::of(MANIFEST, &bytes));
    about.artifact_type = Some("application/spdx+json".into());
    let about = serde_json::to_vec(&about).unwrap();
    ok(case("end-7", Method::PUT, at(&format!("manifests/{}", Digest::of(&about))), 201)
        .with("content-type", MANIFEST)
        .body(about.clone())
        .has("oci-subject", digest.to_string()))
    .await;
    let listed =
        ok(case("end-12a", Method::GET, at(&format!("referrers/{digest}")), 200).has("content-type", INDEX)).await;
    assert_eq!(listed.json::<Index>().await.unwrap().manifests.len(), 1);
    let filter = at(&format!("referrers/{digest}?artifactType=application%2Fspdx%2Bjson"));
    ok(case("end-12b", Method::GET, filter, 200).has("oci-filters-applied", "artifactType")).await;
    let none = at(&format!("referrers/{}", Digest::of(b"nothing")));
    let none = ok(case("end-12a", Method::GET, none, 200).has("content-type", INDEX)).await;
    assert_eq!(none.json::<Index>().await.unwrap().manifests, []);
    // Mounts, and what can't be mounted.
    let mount = |digest: Digest| format!("/v2/acme/other/blobs/uploads/?mount={digest}&from=acme/app");
    ok(case("end-11", Method::POST, mount(d1), 201).has("location", d1.to_string())).await;
    ok(case("end-11", Method::POST, mount(Digest::of(b"nothing")), 202).has("location", "/blobs/uploads/")).await;
    // Deletes.
    ok(case("end-9", Method::DELETE, at("manifests/v1"), 202)).await;
    ok(case("end-3", Method::GET, at(&format!("manifests/{digest}")), 200)).await;
    for manifest in [digest, Digest::of(&about)] {
        ok(case("end-9", Method::DELETE, at(&format!("manifests/{manifest}")), 202)).await;
        ok(case("end-3", Method::GET, at(&format!("manifests/{manifest}")), 404)).await;
    }
    ok(case("end-10", Method::DELETE, at(&format!("blobs/{d1}")), 202)).await;
    ok(case("end-2", Method::GET, at(&format!("blobs/{d1}")), 404)).await;
    ok(case("end-2", Method::GET, format!("/v2/acme/other/blobs/{d1}"), 200)).await;
}

#[tokio::test]
async fn repositories_are_listed_in_pages_and_the_wasm_tools_find_the_registry() {
    let world = World::start().await;
    let ops = world.ops();
    for name in ["b", "a/x", "a", "a-b", "a/x/y"] {
        ops.push_blob(name, b"content").await;
    }
    let all: serde_json::Value = ops.get("/v2/_catalog").await.json().await.unwrap();
    assert_eq!(all["repositories"], serde_json::json!(["a", "a-b", "a/x", "a/x/y", "b"]));
    let page = ops.get("/v2/_catalog?n=2&last=a-b").await;
    assert!(page.headers()["link"].to_str().unwrap().contains("last=a/x/y"));
    let page: serde_json::Value = page.json().await.unwrap();
    assert_eq!(page["repositories"], serde_json::json!(["a/x", "a/x/y"]));
    let found: serde_json::Value =
        world.stranger().get("/.well-known/wasm-pkg/registry.json").await.json().await.unwrap();
    assert_eq!(found["preferredProtocol"], "oci");
    assert_eq!(format!("https://{}", found["oci"]["registry"].as_str().unwrap()), world.url());
}
