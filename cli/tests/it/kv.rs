//! `selvage kv` on the directory of a node that does not run.

use std::path::Path;
use std::sync::Arc;

use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_sync::{Kv, Options};

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
