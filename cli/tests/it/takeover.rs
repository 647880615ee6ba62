//! A new process of a node takes over from the old one, under load.

use std::process::Stdio;
use std::time::Duration;

use crate::by_hand::Fleet;
use crate::program::selvage;

/// Time for the load to begin.
const LOAD_BEGINS: Duration = Duration::from_secs(3);

#[test]
fn a_new_process_takes_over_and_no_request_is_lost() {
    let mut fleet = Fleet::start_with_tls();
    fleet.deploy_hello();

    let front = fleet.front();
    let port = front.rsplit(':').next().unwrap();
    let mut load = selvage();
    load.args(["loadtest", &format!("https://hello.localhost:{port}/"), "--connect", &front])
        .args(["--rate", "200", "--duration", "20", "--mix", "h1=1,h2=1,h3=1", "--connections", "4", "-o", "json"])
        // Whoever comes while one process goes and the next comes waits, and this machine may be busy.
        .args(["--timeout-ms", "60000", "--lag-ms", "60000", "--ca"])
        .arg(fleet.path("front-ca.pem"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut load = load.spawn().unwrap();
    // By then it is under way; on a machine that is slower this shows less, and fails no more.
    std::thread::sleep(LOAD_BEGINS);
    // Each half of QUIC's sockets has its turn. The third process comes while clients still shake hands with the second.
    for turn in ["second", "third", "fourth"] {
        let before = fleet.take_over();
        assert_eq!(fleet.front(), front, "{turn}");
        assert!(before.end(), "the process before the {turn} ended with an error");
    }
    assert!(load.try_wait().unwrap().is_none(), "the load was over before the node was replaced");
    let report = load.wait_with_output().unwrap().stdout;
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let count = |field: &str| report["total"][field].as_u64().unwrap();
    assert_eq!(report["connections"]["failed"], 0, "{report}");
    assert_eq!(count("unexpected_status"), 0, "{report}");
    for protocol in ["h1", "h2", "h3"] {
        let of = &report["protocols"][protocol];
        assert!(of["requests"].as_u64().unwrap() > 1_000, "{report}");
        assert_eq!(of["requests"], of["answered"], "{protocol}: {report}");
    }
}
