//! A node obeys one signed plan: none that is older, forged, frozen unnoticed, or mixed; and what is revoked is gone.

use selvage_config::plan::{Plan, PlanStatus, Status};
use selvage_config::root::Root;
use selvage_config::snapshot::{Revoked, Snapshot};
use selvage_config::{Digest, PrivateKey};
use selvage_node::Node;
use selvage_node::release::state::State;

use super::{Fleet, Signer, app, get, node, saying, says, serving};

fn plan_of(status: &Status) -> &PlanStatus {
    status.plan.as_ref().unwrap()
}

fn refused(status: &Status) -> Option<&str> {
    plan_of(status).refused.as_ref().map(|refused| refused.cause.as_str())
}

async fn is_silent(node: &Node, host: &str) -> bool {
    get(node.addresses().http.unwrap(), host).await.0 == 404
}

/// A fleet whose node serves `hello@1`, and that release's manifest.
async fn serving_fleet() -> (Fleet, Node, Digest) {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    let (_, good) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    fleet.plan(5, &[("hello@1", good)]);
    fleet.settled(5).await;
    assert!(says(&node, "hello.localhost", "hello").await);
    (fleet, node, good)
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_that_is_older_unsigned_or_another_of_its_version_changes_nothing_and_is_named() {
    let (fleet, node, good) = serving_fleet().await;
    let (_, other) = fleet.publish("hello", saying("other"), Some(&fleet.signer));
    let signed = &fleet.signed;
    let of = |version| signed.plan(&signed.snapshot(version, &[("hello@2", other)]));
    // How else a plan can be wrong, the ledger's own tests say.
    let lies = [
        (Plan { generation: 6, ..of(4) }, "rollback"),
        (Plan { snapshot: None, ..of(6) }, "unsigned"),
        (Plan { generation: 6, ..of(5) }, "fork"),
    ];
    for (lie, cause) in lies {
        fleet.control_plane.lie(lie);
        let status = fleet.control_plane.status(|status| refused(status) == Some(cause)).await;
        assert_eq!(serving(&status, "hello").unwrap(), "hello@1", "{cause}");
        assert_eq!(plan_of(&status).version, 5, "{cause}");
        assert!(says(&node, "hello.localhost", "hello").await, "{cause}");
    }
    // The truth is taken right after.
    fleet.plan(6, &[("hello@1", good)]);
    assert_eq!(refused(&fleet.settled(6).await), None);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_node_remembers_over_a_restart_how_far_it_was() {
    let (fleet, first, _) = serving_fleet().await;
    first.drain().await;
    // Somebody puts an old plan on the disk, and an old control plane says the same.
    let (_, old) = fleet.publish("hello", saying("older"), Some(&fleet.signer));
    let stale = fleet.signed.plan(&fleet.signed.snapshot(4, &[("hello@9", old)]));
    std::fs::write(fleet.dir.path().join("state/plan.json"), serde_json::to_vec(&stale).unwrap()).unwrap();
    fleet.control_plane.lie(stale);
    let second = fleet.node().await;
    let status = fleet.control_plane.status(|status| refused(status) == Some("rollback")).await;
    assert_eq!((serving(&status, "hello").unwrap().as_str(), plan_of(&status).version), ("hello@1", 5));
    assert!(says(&second, "hello.localhost", "hello").await);
    second.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_the_signed_list_does_not_name_is_refused_and_the_others_come() {
    let (fleet, node, good) = serving_fleet().await;
    let (_, smuggled) = fleet.publish("other", saying("smugl"), Some(&fleet.signer));
    let (_, old) = fleet.publish("hello", saying("older"), Some(&fleet.signer));
    let signed = &fleet.signed;
    // Signed for hello@1 alone; the plan around it says more, and another manifest under a listed name.
    let plan = signed.plan(&signed.snapshot(6, &[("hello@2", good)]));
    let mut more = signed.plan(&signed.snapshot(6, &[("other@1", smuggled), ("hello@2", old)]));
    more.snapshot = plan.snapshot;
    fleet.control_plane.plan(more);
    let status = fleet.settled(6).await;
    for name in ["other", "hello"] {
        assert_eq!(app(&status, name).refused.as_ref().unwrap().cause, "unlisted", "{name}");
    }
    assert!(says(&node, "hello.localhost", "hello").await && is_silent(&node, "other.localhost").await);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_freeze_is_told_while_everything_serves_on_and_ends_with_a_younger_signature() {
    let (fleet, node, good) = serving_fleet().await;
    let snapshot = fleet.signed.snapshot(6, &[("hello@1", good)]);
    let short = Snapshot { expires_ms: snapshot.issued_ms + 1_500, ..snapshot };
    fleet.control_plane.plan(fleet.signed.plan(&short));
    let status = fleet.control_plane.status(|status| plan_of(status).expired).await;
    assert_eq!(serving(&status, "hello").unwrap(), "hello@1");
    assert!(says(&node, "hello.localhost", "hello").await);

    let younger = fleet.signed.snapshot(6, &[("hello@1", good)]);
    fleet.control_plane.document("/api/v1/snapshot", &fleet.signed.envelope(&younger));
    // The node looks between two questions for a plan; the control plane holds one open until there is one.
    fleet.control_plane.plan(fleet.signed.plan(&fleet.signed.snapshot(7, &[("hello@1", good)])));
    fleet.control_plane.status(|status| !plan_of(status).expired).await;
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_release_stops_and_never_comes_back_not_even_from_the_disk() {
    let (fleet, first, good) = serving_fleet().await;
    let revoked = Revoked { digests: [good].into(), ..Revoked::default() };
    let snapshot = Snapshot { revoked, ..fleet.signed.snapshot(6, &[("hello@1", good)]) };
    let plan = fleet.signed.plan(&snapshot);
    fleet.control_plane.plan(plan);
    let status = fleet.control_plane.status(|status| serving(status, "hello").is_none()).await;
    assert_eq!(app(&status, "hello").refused.as_ref().unwrap().cause, "revoked");
    assert!(is_silent(&first, "hello.localhost").await);

    // A later snapshot that forgets it revokes it still.
    fleet.plan(7, &[("hello@1", good)]);
    let status = fleet.settled(7).await;
    assert_eq!(app(&status, "hello").refused.as_ref().unwrap().cause, "revoked");
    first.drain().await;

    // With the control plane gone, and an old list of good releases on the disk.
    let release = fleet.signed.plan(&fleet.signed.snapshot(7, &[("hello@1", good)])).releases.remove(0);
    let serving = serde_json::json!({ "hello": release });
    std::fs::write(fleet.dir.path().join("state/serving.json"), serving.to_string()).unwrap();
    let Fleet { dir, control_plane, .. } = fleet;
    let address = control_plane.address;
    drop(control_plane);
    let second = node(dir.path(), address).await;
    assert!(is_silent(&second, "hello.localhost").await);
    second.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_revoked_component_and_a_revoked_key_stop_what_runs() {
    let (fleet, node, good) = serving_fleet().await;
    let code = Digest::of(&saying("hello"));
    let revoke = |version, revoked| {
        let snapshot = Snapshot { revoked, ..fleet.signed.snapshot(version, &[("hello@1", good)]) };
        fleet.control_plane.plan(fleet.signed.plan(&snapshot));
    };
    revoke(6, Revoked { digests: [code].into(), ..Revoked::default() });
    let status = fleet.control_plane.status(|status| serving(status, "hello").is_none()).await;
    assert_eq!(app(&status, "hello").refused.as_ref().unwrap().cause, "revoked");

    let (_, second) = fleet.publish("other", saying("other"), Some(&fleet.signer));
    fleet.plan(7, &[("other@1", second)]);
    assert_eq!(serving(&fleet.settled(7).await, "other").unwrap(), "other@1");
    let key = selvage_config::PublicKey::from_pem(fleet.signer.pem().as_bytes()).unwrap();
    let revoked = Revoked { keys: [key.id()].into(), ..Revoked::default() };
    let snapshot = Snapshot { revoked, ..fleet.signed.snapshot(8, &[("other@1", second)]) };
    fleet.control_plane.plan(fleet.signed.plan(&snapshot));
    let status = fleet.control_plane.status(|status| serving(status, "other").is_none()).await;
    assert_eq!(app(&status, "other").refused.as_ref().unwrap().cause, "untrusted");
    assert!(is_silent(&node, "other.localhost").await);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_root_cuts_off_a_stolen_plan_key() {
    let (mut fleet, node, good) = serving_fleet().await;
    let (_, evil) = fleet.publish("hello", saying("older"), Some(&fleet.signer));
    let stolen = std::mem::replace(&mut fleet.signed.key, PrivateKey::generate().unwrap());
    let second = Root { version: 2, plan_keys: vec![fleet.signed.key.public()], ..fleet.signed.root.clone() };
    let chain = vec![fleet.signed.sign_root(&second)];
    fleet.control_plane.document("/api/v1/roots", &chain);
    fleet.plan(6, &[("hello@1", good)]);
    let status = fleet.control_plane.status(|status| plan_of(status).root == 2 && plan_of(status).version == 6).await;
    assert_eq!(serving(&status, "hello").unwrap(), "hello@1");

    let snapshot = fleet.signed.snapshot(1 << 50, &[("hello@2", evil)]);
    let mut envelope = snapshot.envelope();
    envelope.sign(&stolen).unwrap();
    fleet.control_plane.lie(Plan { snapshot: Some(envelope), ..fleet.signed.plan(&snapshot) });
    fleet.control_plane.status(|status| refused(status) == Some("untrusted")).await;
    assert!(says(&node, "hello.localhost", "hello").await);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_policy_that_trusts_a_key_no_more_stops_what_it_signed_and_a_new_one_starts_it_again() {
    let (fleet, node, _) = serving_fleet().await;
    let path = fleet.dir.path().join("cosign.pub");
    let trusted = std::fs::read(&path).unwrap();
    std::fs::write(&path, Signer::new().pem()).unwrap();
    let status = fleet.control_plane.status(|status| serving(status, "hello").is_none()).await;
    assert_eq!(app(&status, "hello").refused.as_ref().unwrap().cause, "untrusted");
    assert!(is_silent(&node, "hello.localhost").await);
    // A file that is no key changes nothing; the old key starts it again.
    std::fs::write(&path, "no key").unwrap();
    std::fs::write(&path, trusted).unwrap();
    fleet.control_plane.status(|status| serving(status, "hello").is_some()).await;
    assert!(says(&node, "hello.localhost", "hello").await);
    node.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_release_that_brings_the_node_down_is_quarantined_and_the_one_before_serves() {
    let (fleet, first, _) = serving_fleet().await;
    let (_, bad) = fleet.publish("hello", saying("crash"), Some(&fleet.signer));
    fleet.plan(6, &[("hello@2", bad)]);
    fleet.settled(6).await;
    assert!(says(&first, "hello.localhost", "crash").await);
    let path = fleet.dir.path().join("state/trials.json");
    let kept = State::open(&fleet.dir.path().join("state")).unwrap().trials().unwrap();
    let mut during = serde_json::to_value(&kept).unwrap();
    first.drain().await;
    // What three deaths of the process would have left.
    let mut trial = during[bad.to_string()].take();
    assert_eq!(trial["starts"], 1);
    trial["starts"] = 3.into();
    std::fs::write(&path, serde_json::json!({ bad.to_string(): trial }).to_string()).unwrap();
    let second = fleet.node().await;
    assert!(says(&second, "hello.localhost", "hello").await);
    let quarantined = |status: &Status| app(status, "hello").refused.as_ref().is_some_and(|r| r.cause == "quarantined");
    let status = fleet.control_plane.status(|status| status.generation == 6 && quarantined(status)).await;
    assert_eq!(serving(&status, "hello").unwrap(), "hello@1");
    second.drain().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_key_that_is_no_longer_trusted_runs_nothing_after_a_restart() {
    let (fleet, first, _) = serving_fleet().await;
    first.drain().await;
    std::fs::write(fleet.dir.path().join("cosign.pub"), Signer::new().pem()).unwrap();
    let second = fleet.node().await;
    assert!(is_silent(&second, "hello.localhost").await);
    second.drain().await;
}
