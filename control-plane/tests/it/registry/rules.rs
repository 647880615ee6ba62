//! What the configuration says of repositories: tags that stay, and how much they may hold.

use std::path::Path;

use reqwest::{Method, StatusCode};
use selvage_config::Digest;
use selvage_config::control_plane::{ControlPlaneConfig, RepositoryRule};
use selvage_config::oci::{Descriptor, EMPTY, Manifest, WASM};

use crate::world::{Asker, World, manifest, refusal};

fn rules(config: &mut ControlPlaneConfig, _: &Path) {
    config.registry.bytes_max = 50_000;
    config.registry.rules = vec![
        RepositoryRule { repositories: "fixed/*".into(), immutable_tags: true, bytes_max: None },
        RepositoryRule { repositories: "small".into(), immutable_tags: false, bytes_max: Some(1_000) },
    ];
}

async fn artifact(ops: &Asker, repository: &str, content: &[u8]) -> Manifest {
    ops.push_blob(repository, b"{}").await;
    ops.push_blob(repository, content).await;
    manifest(Descriptor::of(EMPTY, b"{}"), vec![Descriptor::of(WASM, content)])
}

#[tokio::test]
async fn a_tag_that_stays_names_one_manifest_for_ever() {
    let world = World::start_with(rules).await;
    let ops = world.ops();
    let (one, two) = (artifact(&ops, "fixed/app", b"one").await, artifact(&ops, "fixed/app", b"two").await);
    let digest = Digest::of(&serde_json::to_vec(&one).unwrap());
    assert_eq!(ops.put_manifest("fixed/app", "v1", &one).await.status(), StatusCode::CREATED);
    assert_eq!(ops.put_manifest("fixed/app", "v1", &one).await.status(), StatusCode::CREATED);
    let moved = ops.put_manifest("fixed/app", "v1", &two).await;
    assert_eq!(refusal(moved, StatusCode::CONFLICT).await, "DENIED");
    for reference in ["v1".to_owned(), digest.to_string()] {
        let gone = ops.delete(&format!("/v2/fixed/app/manifests/{reference}")).await;
        assert_eq!(refusal(gone, StatusCode::CONFLICT).await, "DENIED", "{reference}");
    }
    assert_eq!(ops.put_manifest("fixed/app", "v2", &two).await.status(), StatusCode::CREATED);
    let other = artifact(&ops, "free", b"one").await;
    ops.put_manifest("free", "v1", &other).await;
    assert_eq!(ops.delete("/v2/free/manifests/v1").await.status(), StatusCode::ACCEPTED);
}

#[tokio::test]
async fn what_has_no_room_is_refused_and_room_comes_back_with_a_deletion() {
    let world = World::start_with(rules).await;
    let ops = world.ops();
    let push = async |repository: &str, bytes: &[u8]| {
        let path = format!("/v2/{repository}/blobs/uploads/?digest={}", Digest::of(bytes));
        ops.ask(Method::POST, &path).body(bytes.to_vec()).send().await.unwrap()
    };
    assert_eq!(push("small", &[1; 900]).await.status(), StatusCode::CREATED);
    assert_eq!(refusal(push("small", &[2; 200]).await, StatusCode::FORBIDDEN).await, "DENIED");
    // What it has already takes no more room, and neither does another repository.
    assert_eq!(push("small", &[1; 900]).await.status(), StatusCode::CREATED);
    assert_eq!(push("large", &[2; 200]).await.status(), StatusCode::CREATED);
    // A mount counts as a push does.
    let mount = format!("/v2/small/blobs/uploads/?mount={}&from=large", Digest::of(&[2; 200]));
    assert_eq!(ops.ask(Method::POST, &mount).send().await.unwrap().status(), StatusCode::FORBIDDEN);
    ops.delete(&format!("/v2/small/blobs/{}", Digest::of(&[1; 900]))).await;
    assert_eq!(push("small", &[2; 200]).await.status(), StatusCode::CREATED);

    assert_eq!(push("large", &[3; 49_000]).await.status(), StatusCode::CREATED);
    assert_eq!(refusal(push("large", &[4; 2_000]).await, StatusCode::FORBIDDEN).await, "DENIED");
    let left = std::fs::read_dir(world.directory.path().join("state/uploads")).unwrap().count();
    assert_eq!(left, 0);
}
