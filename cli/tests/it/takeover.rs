//! A new process of a node takes over from the old one, under load.

use std::process::Stdio;
use std::time::Duration;

use crate::by_hand::Fleet;
use crate::program::{selvage, terminate};

/// Time for the load to be under way before the first takeover, and after the last.
const UNDER_WAY: Duration = Duration::from_secs(3);
/// What each protocol must have been asked for the run to show something, requests. It is asked for 20 a second.
const ASKED_MIN: u64 = 60;

#[test]
fn a_new_process_takes_over_and_no_request_is_lost() {
    let mut fleet = Fleet::start_with_tls();
    fleet.deploy_hello();

    let front = fleet.front();
    let port = front.rsplit(':').next().unwrap();
    let mut load = selvage();
    load.args(["loadtest", &format!("https://hello.localhost:{port}/"), "--connect", &front])
        .args(["--rate", "60", "--duration", "600", "--mix", "h1=1,h2=1,h3=1", "--connections", "4", "-o", "json"])
        // Whoever comes while one process goes and the next comes waits, and this machine may be busy.
        .args(["--timeout-ms", "120000", "--lag-ms", "120000", "--ca"])
        .arg(fleet.path("front-ca.pem"))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let mut load = load.spawn().unwrap();
    std::thread::sleep(UNDER_WAY);
    // Each half of QUIC's sockets has its turn. The third process comes while clients still shake hands with the second.
    for turn in ["second", "third", "fourth"] {
        let before = fleet.take_over();
        assert_eq!(fleet.front(), front, "{turn}");
        assert!(before.end(), "the process before the {turn} ended with an error");
    }
    std::thread::sleep(UNDER_WAY);
    // Of its own accord it ends only for an error.
    assert!(load.try_wait().unwrap().is_none(), "the load was over before it was stopped");
    terminate(&load);
    let report = load.wait_with_output().unwrap().stdout;
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let count = |field: &str| report["total"][field].as_u64().unwrap();
    assert_eq!(report["connections"]["failed"], 0, "{report}");
    assert_eq!(count("unexpected_status"), 0, "{report}");
    for protocol in ["h1", "h2", "h3"] {
        let of = &report["protocols"][protocol];
        let count = |field: &serde_json::Value| field.as_u64().unwrap_or_default();
        assert!(count(&of["answered"]) > ASKED_MIN, "{protocol}: {report}");
        // What waited for its answer when the load was stopped was not lost.
        let ended = count(&of["answered"]) + count(&of["errors"]["stopped"]);
        assert_eq!(count(&of["requests"]), ended, "{protocol}: {report}");
    }
}
