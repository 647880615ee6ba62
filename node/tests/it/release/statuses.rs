//! What a node tells of itself.

use super::{Fleet, saying, serving};

#[tokio::test(flavor = "multi_thread")]
async fn a_node_tells_what_changed_and_all_of_it_to_who_knows_something_else() {
    let fleet = Fleet::new().await;
    let node = fleet.node().await;
    // The first is told whole.
    fleet.control_plane.status(|_| true).await;
    let (_, good) = fleet.publish("hello", saying("hello"), Some(&fleet.signer));
    fleet.plan(5, &[("hello@1", good)]);
    let status = fleet.settled(5).await;
    assert_eq!(serving(&status, "hello").unwrap(), "hello@1");
    assert!(fleet.control_plane.deltas() > 0, "the plan came after the first status");

    // The control plane was set back, or hears of it by another one: what changes next does not fit.
    let before = fleet.control_plane.deltas();
    fleet.control_plane.mistake(|status| {
        status.generation = 4;
        status.apps.clear();
        status.version = "another".into();
    });
    fleet.plan(6, &[("hello@1", good)]);
    let status = fleet.settled(6).await;
    assert_eq!((serving(&status, "hello").unwrap().as_str(), status.version == "another"), ("hello@1", false));
    assert!(fleet.control_plane.deltas() > before);
    node.drain().await;
}
