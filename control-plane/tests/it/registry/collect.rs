//! Letting go of what nothing refers to, while clients push.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use reqwest::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::oci::{BUNDLE, Descriptor, EMPTY, MANIFEST, WASM};
use serde_json::json;

use crate::world::{Asker, World, app, json_of, manifest};

async fn collect(ops: &Asker, hours: u64) -> serde_json::Value {
    let answer = ops.ask(Method::POST, &format!("/api/v1/registry/collect?hours={hours}")).send().await.unwrap();
    json_of(answer, StatusCode::OK).await
}

#[tokio::test]
async fn what_is_needed_stays_and_the_rest_goes() {
    let world = World::start().await;
    let ops = world.ops();
    let digest = ops.push_app("apps/hello", "v1", &app("hello", "1", &[])).await;
    ops.release("hello", "v1").await;
    // The tag moves on: only the release needs the first manifest, and only that the signature.
    ops.push_app("apps/hello", "v1", &app("hello", "2", &[])).await;
    ops.push_blob("apps/hello", b"{}").await;
    ops.push_blob("apps/hello", b"signature").await;
    let subject = ops.get(&format!("/v2/apps/hello/manifests/{digest}")).await.bytes().await.unwrap();
    let mut signature = manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(BUNDLE, b"signature")]);
    signature.subject = Some(Descriptor::of(MANIFEST, &subject));
    let signed = Digest::of(&serde_json::to_vec(&signature).unwrap());
    ops.put_manifest("apps/hello", &signed.to_string(), &signature).await;
    let stray = manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, b"signature")]);
    let strayed = Digest::of(&serde_json::to_vec(&stray).unwrap());
    ops.put_manifest("apps/hello", &strayed.to_string(), &stray).await;
    let lonely = ops.push_blob("apps/hello", b"lonely").await;
    let crashed = world.directory.path().join("state/blobs/sha256").join(Digest::of(b"crashed").hex());
    std::fs::write(&crashed, b"crashed").unwrap();

    // All of it is young.
    assert_eq!(collect(&ops, 1).await, json!({ "manifests": 0, "blobs": 0, "bytes": 0 }));
    tokio::time::sleep(std::time::Duration::from_millis(5)).await;
    let gone = collect(&ops, 0).await;
    assert_eq!((&gone["manifests"], &gone["blobs"]), (&json!(1), &json!(1)), "{gone}");
    assert!(!crashed.exists());
    let status = async |path: String| ops.get(&path).await.status();
    for manifest in [digest, signed] {
        assert_eq!(status(format!("/v2/apps/hello/manifests/{manifest}")).await, StatusCode::OK);
    }
    assert_eq!(status(format!("/v2/apps/hello/manifests/{strayed}")).await, StatusCode::NOT_FOUND);
    assert_eq!(status(format!("/v2/apps/hello/blobs/{lonely}")).await, StatusCode::NOT_FOUND);
    assert_eq!(world.node("fra-1").get(&format!("/v2/apps/hello/referrers/{digest}")).await.status(), StatusCode::OK);
}

/// Pushes, tags and signs while everything without a reference is let go at once, over and over. A client may be told
/// to push a blob again; it is never told that a manifest is taken that lacks one.
#[tokio::test]
async fn a_manifest_that_is_taken_is_whole_however_pushes_and_collections_meet() {
    let world = World::start().await;
    let over = Arc::new(AtomicBool::new(false));
    let sweeping = {
        let (ops, over) = (world.ops(), Arc::clone(&over));
        tokio::spawn(async move {
            let mut rounds = 0_u32;
            while !over.load(Ordering::Relaxed) {
                collect(&ops, 0).await;
                rounds += 1;
                // Now close behind the last, now with room for a push in between.
                tokio::time::sleep(std::time::Duration::from_millis(u64::from(rounds % 16) * 8)).await;
            }
            rounds
        })
    };
    let mut pushing = Vec::new();
    for pusher in 0..4_u32 {
        let ops = world.ops();
        pushing.push(tokio::spawn(async move {
            let mut taken = Vec::new();
            for round in 0..25_u32 {
                // One blob of its own, and one that all share.
                let own = format!("blob {pusher} {}", round % 5).into_bytes();
                let shared = format!("shared {}", round % 3).into_bytes();
                for bytes in [&own, &shared, &b"{}".to_vec()] {
                    ops.push_blob("acme/app", bytes).await;
                }
                let layers = vec![Descriptor::of(WASM, &own), Descriptor::of(WASM, &shared)];
                let manifest = manifest(Descriptor::of(EMPTY, b"{}"), layers);
                let tag = format!("t{pusher}");
                match ops.put_manifest("acme/app", &tag, &manifest).await.status() {
                    StatusCode::CREATED => {
                        for bytes in [&own, &shared] {
                            let answer = ops.get(&format!("/v2/acme/app/blobs/{}", Digest::of(bytes))).await;
                            assert_eq!(answer.status(), StatusCode::OK, "{pusher} {round}");
                            assert_eq!(answer.bytes().await.unwrap(), *bytes);
                        }
                        taken.push(round);
                    }
                    StatusCode::BAD_REQUEST => {}
                    other => panic!("{other}"),
                }
            }
            taken.len()
        }));
    }
    let mut taken = 0;
    for pusher in pushing {
        taken += pusher.await.unwrap();
    }
    over.store(true, Ordering::Relaxed);
    assert!(sweeping.await.unwrap() > 0 && taken > 0);
    // At rest every tag can be pulled whole.
    let ops = world.ops();
    let tags: serde_json::Value = ops.get("/v2/acme/app/tags/list").await.json().await.unwrap();
    for tag in tags["tags"].as_array().into_iter().flatten() {
        let path = format!("/v2/acme/app/manifests/{}", tag.as_str().unwrap());
        let manifest: selvage_config::oci::Manifest = ops.get(&path).await.json().await.unwrap();
        for layer in &manifest.layers {
            assert_eq!(ops.get(&format!("/v2/acme/app/blobs/{}", layer.digest)).await.status(), StatusCode::OK);
        }
    }
}
