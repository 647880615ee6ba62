//! Backups: made while everything goes on, put back elsewhere, and nothing but whole ones.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use reqwest::{Method, StatusCode};
use selvage_config::app::variables::Variable;
use selvage_config::control_plane::OperatorRole;
use selvage_config::plan::Plan;
use selvage_config::snapshot::Snapshot;
use selvage_control_plane::audit;
use selvage_control_plane::backup::{ADVANCE, BackupError, Restored, check, restore};
use serde_json::{Value, json};

use crate::freshness::signing;
use crate::world::{Asker, World, app, json_of, status};

async fn back_up(world: &World, ops: &Asker, name: &str) -> PathBuf {
    let answer = ops.get("/api/v1/backup").await;
    assert_eq!(answer.status(), StatusCode::OK);
    let path = world.directory.path().join(name);
    std::fs::write(&path, answer.bytes().await.unwrap()).unwrap();
    path
}

/// Puts a backup back into another directory, and starts with it.
async fn move_to(world: &mut World, state: &'static str, backup: &Path, hold: bool) -> Restored {
    let key = world.directory.path().join(world.state).join("sealing.key");
    world.stop().await;
    world.state = state;
    let restored = restore(backup, &world.config(), Some(&key), hold).unwrap();
    world.resume().await;
    restored
}

/// An app with a secret, of a content that is new each time.
async fn release(ops: &Asker, name: &str, version: u32) -> Option<Value> {
    let mut app = app(name, &version.to_string(), &[]);
    app.variables.insert("token".into(), Variable { default: None, secret: true });
    ops.push_app(&format!("apps/{name}"), &format!("v{version}"), &app).await;
    let path = format!("/api/v1/apps/{name}/secrets/token");
    let set = ops.ask(Method::PUT, &path).json(&json!({ "value": format!("s3cret-{version}") })).send().await.unwrap();
    assert_eq!(set.status(), StatusCode::OK);
    let answer = ops.release(name, &format!("v{version}")).await;
    Some(json_of(answer, StatusCode::CREATED).await)
}

async fn plan(world: &World, after: Option<u64>) -> Option<Plan> {
    let after = after.map(|after| format!("?after={after}")).unwrap_or_default();
    let answer = world.node("fra-1").get(&format!("/api/v1/plans/fra-1{after}")).await;
    (answer.status() == StatusCode::OK).then_some(())?;
    Some(answer.json().await.unwrap())
}

#[tokio::test(flavor = "multi_thread")]
async fn a_backup_of_a_busy_control_plane_is_put_back_elsewhere_and_nodes_go_on() {
    let (mut world, root) = signing().await;
    let ops = world.ops();
    assert_eq!(world.node("fra-1").tell(&status("fra-1", 0, None, Vec::new())).await.status(), StatusCode::NO_CONTENT);
    let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU32::new(0)));
    let writers: Vec<_> = ["one", "two"]
        .map(|name| {
            let (ops, stop, made) = (ops.clone(), Arc::clone(&stop), Arc::clone(&made));
            tokio::spawn(async move {
                for version in 1.. {
                    release(&ops, name, version).await;
                    made.fetch_add(1, Ordering::SeqCst);
                    if stop.load(Ordering::SeqCst) {
                        return;
                    }
                }
            })
        })
        .into();
    let mut backups = Vec::new();
    for round in 0..4 {
        while made.load(Ordering::SeqCst) < 6 * (round + 1) {
            tokio::task::yield_now().await;
        }
        let before = plan(&world, None).await.unwrap();
        backups.push((before, back_up(&world, &ops, &format!("{round}.tar")).await));
    }
    stop.store(true, Ordering::SeqCst);
    for writer in writers {
        writer.await.unwrap();
    }
    // The node has taken all of it.
    let last = plan(&world, None).await.unwrap();
    let told = status("fra-1", last.generation, None, Vec::new());
    assert_eq!(world.node("fra-1").tell(&told).await.status(), StatusCode::NO_CONTENT);
    for (before, backup) in &backups {
        let contents = check(backup).unwrap();
        assert!(contents.generation >= before.generation && contents.generation < last.generation, "{contents:?}");
    }
    let (before, backup) = &backups[2];
    let contents = move_to(&mut world, "restored", backup, false).await.contents;
    let after = plan(&world, Some(last.generation)).await.expect("a node takes what is newer than all it has");
    assert_eq!(after.generation, contents.generation + ADVANCE);
    let snapshot = Snapshot::signed(after.snapshot.as_ref().unwrap(), &root).unwrap();
    assert_eq!(snapshot.version, after.generation);
    // What was acknowledged before the backup began is there; every release is whole, with its secret.
    let ops = world.ops();
    assert_eq!(after.releases.len(), 2);
    for release in &after.releases {
        assert!(contents.releases.contains(&release.id.to_string()) && snapshot.lists(release));
        let known = before.releases.iter().find(|known| known.id.app == release.id.app).unwrap();
        assert!(release.id.number >= known.id.number, "{} {}", release.id, known.id);
        assert!(release.variables["token"].starts_with("s3cret-"));
        let manifest = ops.get(&format!("/v2/{}/manifests/{}", release.repository, release.manifest)).await;
        let manifest = json_of(manifest, StatusCode::OK).await;
        for blob in [&manifest["config"], &manifest["layers"][0]] {
            let path = format!("/v2/{}/blobs/{}", release.repository, blob["digest"].as_str().unwrap());
            assert_eq!(ops.get(&path).await.status(), StatusCode::OK, "{path}");
        }
    }
    // It goes on from there, and the log tells that it was put back.
    release(&ops, "one", 1_000).await;
    assert_eq!(plan(&world, None).await.unwrap().generation, after.generation + 2);
    let log = world.audit();
    audit::verify(log.as_bytes()).unwrap();
    assert!(log.contains("state.backup") && log.contains("state.restore"), "{log}");
}

#[tokio::test]
async fn a_restore_that_holds_leaves_nodes_as_they_are_until_somebody_changes_something() {
    let mut world = World::start_with(|config, directory| config.authority = Some(directory.join("ca"))).await;
    let ops = world.ops();
    release(&ops, "one", 1).await;
    let invited = ops.post("/api/v1/join-tokens", &json!({ "region": "fra" })).await;
    assert_eq!(invited.status(), StatusCode::CREATED);
    let backup = back_up(&world, &ops, "backup.tar").await;
    let contents = check(&backup).unwrap();
    for version in 2..5 {
        release(&ops, "one", version).await;
    }
    let last = plan(&world, None).await.unwrap();
    let restored = move_to(&mut world, "restored", &backup, true).await;
    assert_eq!((restored.begins_with, restored.join_tokens_dropped), (contents.generation, 1));
    assert_eq!(plan(&world, Some(last.generation)).await, None);
    let told = status("fra-1", last.generation, None, Vec::new());
    assert_eq!(world.node("fra-1").tell(&told).await.status(), StatusCode::NO_CONTENT);
    assert_eq!(plan(&world, Some(last.generation)).await, None);
    let ops = world.ops();
    assert_eq!(json_of(ops.get("/api/v1/join-tokens").await, StatusCode::OK).await, json!([]));
    release(&ops, "one", 5).await;
    let next = plan(&world, Some(last.generation)).await.unwrap();
    assert_eq!(next.generation, last.generation + 2);
}

#[tokio::test]
async fn a_backup_that_is_not_whole_is_refused_and_leaves_nothing() {
    let mut world = World::start().await;
    let ops = world.ops();
    release(&ops, "one", 1).await;
    let backup = back_up(&world, &ops, "backup.tar").await;
    let key = world.directory.path().join("state/sealing.key");
    world.stop().await;
    let config = world.config();
    let refused = |backup: &PathBuf, key: Option<&PathBuf>| {
        let error = restore(backup, &config, key.map(PathBuf::as_path), false).unwrap_err();
        assert!(!world.directory.path().join("other.restoring").exists());
        error
    };
    // Nothing is overwritten.
    assert!(matches!(refused(&backup, Some(&key)), BackupError::Occupied(_)));
    let config = selvage_config::control_plane::ControlPlaneConfig {
        state_dir: world.directory.path().join("other"),
        ..world.config()
    };
    let refused = |backup: &PathBuf, key: Option<&PathBuf>| {
        let error = restore(backup, &config, key.map(PathBuf::as_path), false).unwrap_err();
        assert!(!config.state_dir.exists() && !world.directory.path().join("other.restoring").exists());
        error
    };
    let other = world.directory.path().join("other.key");
    std::fs::write(&other, format!("{}\n", "ab".repeat(32))).unwrap();
    assert!(matches!(refused(&backup, Some(&other)), BackupError::Key { .. }));
    assert!(matches!(refused(&backup, None), BackupError::NoKey(_)));
    let missing = world.directory.path().join("missing.key");
    assert!(matches!(refused(&backup, Some(&missing)), BackupError::File { .. }));
    assert!(!missing.exists(), "a key was made");
    let whole = std::fs::read(&backup).unwrap();
    let contents = check(&backup).unwrap();
    let changed = world.directory.path().join("changed.tar");
    let mut found = 0;
    for at in (0..whole.len()).step_by(61) {
        std::fs::write(&changed, &whole[..at]).unwrap();
        // The last kilobyte is the zeros that end a tar file.
        assert!(check(&changed).is_err() || at > whole.len() - 1_536, "{at} of {}", whole.len());
        let mut flipped = whole.clone();
        flipped[at] ^= 4;
        std::fs::write(&changed, flipped).unwrap();
        match check(&changed) {
            // Between the parts are zeros that mean nothing.
            Ok(same) => assert_eq!((same, whole[at]), (contents.clone(), 0), "{at}"),
            Err(_) => found += 1,
        }
    }
    assert!(found * 61 * 3 > whole.len(), "{found} of {}", whole.len() / 61);
    std::fs::write(&changed, &whole[..whole.len() / 2]).unwrap();
    refused(&changed, Some(&key));
    let text = String::from_utf8_lossy(&whole);
    assert!(!text.contains("s3cret") && !text.contains("PRIVATE KEY"));
}

#[tokio::test]
async fn only_an_administrator_of_the_whole_fleet_makes_a_backup() {
    let world = World::start_with(|config, _| config.operators[0].role = OperatorRole::Deploy).await;
    assert_eq!(world.ops().get("/api/v1/backup").await.status(), StatusCode::FORBIDDEN);
    assert_eq!(world.node("fra-1").get("/api/v1/backup").await.status(), StatusCode::FORBIDDEN);
}
