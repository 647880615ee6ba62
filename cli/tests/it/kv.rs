//! `selvage kv` on the directory of a node that does not run.

use std::path::Path;
use std::sync::Arc;

use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_config::plan::Placement;
use selvage_sync::{Holding, Kv, Options};

use crate::by_hand::Fleet;
use crate::program::{finish, selvage, well};

async fn open(directory: &Path, engine: KvEngine) -> Kv {
    let options = Options::alone(
        "a".parse().unwrap(),
        "fra".parse().unwrap(),
        directory.to_owned(),
        Kept { engine, ..Kept::default() },
    );
    Kv::open(options, Arc::new(|_| None)).await.unwrap()
}

fn json(output: &std::process::Output) -> serde_json::Value {
    serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {output:?}"))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_directory_is_checked_exported_imported_and_given_another_engine() {
    let directory = tempfile::tempdir().unwrap();
    let (kv_dir, other) = (directory.path().join("kv"), directory.path().join("other"));
    let snapshot = directory.path().join("kv.snapshot");
    let store = "shop/default".parse().unwrap();
    let kv = open(&kv_dir, KvEngine::Sled).await;
    kv.set(&store, "k", vec![7; 50_000].into()).await.unwrap();
    kv.set(&store, "gone", vec![7].into()).await.unwrap();
    kv.delete(&store, "gone").await.unwrap();

    let busy = finish(selvage().args(["kv", "check", "--dir"]).arg(&kv_dir));
    assert_eq!(busy.status.code(), Some(1));
    let told = String::from_utf8_lossy(&busy.stderr).into_owned();
    assert!(told.contains("open in another process"), "{told}");
    kv.close().await;
    drop(kv);

    let checked = finish(selvage().args(["-o", "json", "kv", "check", "--dir"]).arg(&kv_dir));
    well("kv check", &checked);
    let report = json(&checked);
    assert_eq!(
        (&report["sound"], &report["records"], &report["generation"]),
        (&true.into(), &2.into(), &"sled-1".into())
    );

    well("kv export", &finish(selvage().args(["kv", "export", "--dir"]).arg(&kv_dir).arg(&snapshot)));
    let twice = finish(selvage().args(["kv", "export", "--dir"]).arg(&kv_dir).arg(&snapshot));
    assert_eq!(twice.status.code(), Some(1), "a file is never overwritten");
    let import = || finish(selvage().args(["kv", "import", "--engine", "redb", "--dir"]).arg(&other).arg(&snapshot));
    well("kv import", &import());
    assert!(String::from_utf8_lossy(&import().stderr).contains("holds a kv already"));

    let migrated = finish(selvage().args(["-o", "json", "kv", "migrate", "--to", "redb", "--dir"]).arg(&kv_dir));
    well("kv migrate", &migrated);
    assert_eq!(json(&migrated)["damaged"], 0);
    for place in [&kv_dir, &other] {
        let kv = open(place, KvEngine::Redb).await;
        assert_eq!(kv.get(&store, "k").unwrap().unwrap(), vec![7; 50_000]);
        assert_eq!(kv.get(&store, "gone").unwrap(), None);
        kv.close().await;
    }
}

/// The rows of the placement that this KV holds, once it is open.
async fn placed(kv: &Kv, store: &selvage_config::StoreName) -> Kv {
    kv.set_placements(vec![Placement {
        name: "eu".parse().unwrap(),
        regions: ["fra".parse().unwrap()].into(),
        stores: [(store.clone(), 0)].into(),
    }]);
    let begun = std::time::Instant::now();
    loop {
        if let Holding::Here(mesh) = kv.holding(store) {
            return mesh;
        }
        assert!(begun.elapsed().as_secs() < 60, "the placement does not open");
        tokio::time::sleep(std::time::Duration::from_millis(10)).await;
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn placements_below_a_directory_are_checked_and_migrated_with_it() {
    let directory = tempfile::tempdir().unwrap();
    let (kv_dir, snapshot) = (directory.path().join("kv"), directory.path().join("kv.snapshot"));
    let store = "shop/default".parse().unwrap();
    let kv = open(&kv_dir, KvEngine::Sled).await;
    placed(&kv, &store).await.set(&store, "k", vec![7; 50].into()).await.unwrap();
    kv.close().await;
    drop(kv);

    let checked = well("kv check", &finish(selvage().args(["kv", "check", "--dir"]).arg(&kv_dir)));
    assert!(checked.contains("kv: sled-1: ") && checked.contains("placements/eu: sled-1: "), "{checked}");
    let exported = finish(selvage().args(["kv", "export", "--dir"]).arg(&kv_dir).arg(&snapshot));
    well("kv export", &exported);
    assert!(String::from_utf8_lossy(&exported.stderr).contains("placements/eu"), "{exported:?}");
    for _ in 0..2 {
        // The second time one is migrated already, as after a migration that did not end.
        let migrate =
            finish(selvage().args(["kv", "migrate", "--to", "redb", "--dir"]).arg(kv_dir.join("placements/eu")));
        well("kv migrate", &migrate);
    }
    well("kv migrate", &finish(selvage().args(["kv", "migrate", "--to", "redb", "--dir"]).arg(&kv_dir)));
    let checked = well("kv check", &finish(selvage().args(["kv", "check", "--dir"]).arg(&kv_dir)));
    assert!(checked.contains("placements/eu: redb-2: "), "{checked}");
    let kv = open(&kv_dir, KvEngine::Redb).await;
    assert_eq!(placed(&kv, &store).await.get(&store, "k").unwrap().unwrap(), vec![7; 50]);
    kv.close().await;
    // Damage in a placement is damage.
    drop(kv);
    std::fs::write(kv_dir.join("placements/eu/redb-2/rows.redb"), b"damage").unwrap();
    let damaged = finish(selvage().args(["kv", "check", "--dir"]).arg(&kv_dir));
    assert_eq!(damaged.status.code(), Some(1), "{damaged:?}");
}

#[test]
fn what_is_no_kv_or_no_snapshot_is_told() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("surprise");
    std::fs::write(&file, b"surprise").unwrap();
    let none = finish(selvage().args(["kv", "check", "--dir"]).arg(directory.path()));
    assert!(String::from_utf8_lossy(&none.stderr).contains("no kv in"));
    let foreign = finish(selvage().args(["kv", "import", "--dir"]).arg(directory.path().join("kv")).arg(&file));
    assert!(String::from_utf8_lossy(&foreign.stderr).contains("no snapshot"));
    assert!(!directory.path().join("kv").exists());
    let engine = finish(selvage().args(["kv", "migrate", "--to", "rocks", "--dir"]).arg(directory.path()));
    assert_eq!(engine.status.code(), Some(2));
    let nobody = finish(selvage().args(["kv", "get", "shop/default", "k"]));
    assert_eq!(nobody.status.code(), Some(2));
}

#[test]
fn a_value_ends_and_a_session_is_followed() {
    let fleet = Fleet::start();
    let kv = |arguments: &[&str]| fleet.selvage(&[&["kv", "--node", "fra-1"], arguments].concat());
    let token = well("set", &kv(&["set", "shop/default", "k", "v", "--token"]));
    assert_eq!(well("get", &kv(&["get", "shop/default", "k", "--token", token.trim()])), "v");
    let none = kv(&["get", "shop/default", "k", "--token", "nonsense"]);
    let told = String::from_utf8_lossy(&none.stderr).into_owned();
    assert!(!none.status.success() && told.contains("not a session's token") && told.contains("help"), "{told}");

    // The node may be named behind the command too.
    well("set", &fleet.selvage(&["kv", "set", "shop/default", "short", "v", "--ttl-ms", "1", "--node", "fra-1"]));
    let begun = std::time::Instant::now();
    while kv(&["get", "shop/default", "short"]).status.success() {
        assert!(begun.elapsed().as_secs() < 60, "it has not ended");
    }
}
