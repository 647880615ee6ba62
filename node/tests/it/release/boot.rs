//! How long a node takes from its disk to serving, with nobody there to ask.

use std::time::Instant;

use super::{Fleet, node, saying, says};

/// Apps of one node.
const APPS: usize = 200;

/// docs/PROMISES.md: at most a second. Other tests run beside this one, so it prints the time and judges what is served.
#[tokio::test(flavor = "multi_thread")]
async fn a_node_with_200_apps_serves_them_from_its_disk_with_the_control_plane_gone() {
    let fleet = Fleet::new().await;
    let name = |number: usize| format!("app-{number:03}");
    let word = |number: usize| format!("{number:05}");
    let releases: Vec<(String, selvage_config::Digest)> = (0..APPS)
        .map(|number| {
            let (_, manifest) = fleet.publish(&name(number), saying(&word(number)), Some(&fleet.signer));
            (format!("{}@1", name(number)), manifest)
        })
        .collect();
    let first = fleet.node().await;
    let listed: Vec<(&str, selvage_config::Digest)> =
        releases.iter().map(|(id, manifest)| (id.as_str(), *manifest)).collect();
    // In four parts: each has its time to be compiled, on a machine that has other things to do.
    for part in 1..=4 {
        fleet.plan(part, &listed[..APPS / 4 * usize::try_from(part).unwrap()]);
        let status = fleet.settled(part).await;
        assert_eq!(status.apps.iter().filter(|app| app.serving.is_some()).count(), status.apps.len());
        assert_eq!(status.apps.len(), APPS / 4 * usize::try_from(part).unwrap());
    }
    first.drain().await;

    let asked = fleet.control_plane.asked("");
    let begun = Instant::now();
    // Nobody listens there.
    let second = node(fleet.dir.path(), "127.0.0.1:9".parse().unwrap()).await;
    let started = begun.elapsed();
    for number in 0..APPS {
        let asked = Instant::now();
        while !says(&second, &format!("{}.localhost", name(number)), &word(number)).await {
            assert!(asked.elapsed() < super::control_plane::PATIENCE, "{}: {:?}", name(number), second.status());
            tokio::task::yield_now().await;
        }
    }
    println!("{APPS} apps: started after {started:?}, all have answered after {:?}", begun.elapsed());
    assert_eq!(fleet.control_plane.asked(""), asked, "the control plane was asked");
    second.drain().await;
}
