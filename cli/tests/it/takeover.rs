//! A new process of a node takes over from the old one, under load.

use std::io::{BufRead as _, BufReader};
use std::process::Stdio;

use crate::by_hand::Fleet;
use crate::program::{example, selvage, well};

#[test]
fn a_new_process_takes_over_and_no_request_fails() {
    let mut fleet = Fleet::start();
    let source = example("hello").display().to_string();
    let pushed = fleet.selvage(&["push", "-f", &source, "-o", "json"]);
    well("push", &pushed);
    let pushed: serde_json::Value = serde_json::from_slice(&pushed.stdout).unwrap();
    let reference = format!("hello@{}", pushed["manifest"].as_str().unwrap());
    well("sign", &fleet.selvage(&["sign", &reference, "--key", "release.key"]));
    well("deploy", &fleet.selvage(&["deploy", &reference]));

    let front = fleet.front();
    let port = front.rsplit(':').next().unwrap();
    // Clients of HTTP/1.1 that keep a connection are told of its end by the end alone, and may have sent a request just
    // before: they have to ask again, whoever closes.
    // The generator asks again twice where a connection gave a request back unsent: so it has two of them.
    let mut load = selvage();
    load.args(["loadtest", &format!("https://hello.localhost:{port}/"), "--connect", &front])
        .args(["--rate", "100", "--duration", "20", "--mix", "h2=1,h3=1", "--connections", "2"])
        // Whoever comes while one process goes and the next comes waits, and this machine may be busy.
        .args(["--timeout-ms", "60000", "--lag-ms", "60000", "--ca"])
        .arg(fleet.path("front-ca.pem"))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped());
    let mut load = load.spawn().unwrap();
    // It tells each second how far it is: from the first line on it is under way.
    let mut told = BufReader::new(load.stderr.take().unwrap()).lines();
    let first = told.next().unwrap().unwrap();
    assert!(first.contains("answered"), "{first}");
    // Each half of QUIC's sockets has its turn.
    for turn in ["second", "third"] {
        let before = fleet.take_over();
        assert_eq!(fleet.front(), front, "{turn}");
        assert!(before.end(), "the process before the {turn} ended with an error");
    }
    assert!(load.try_wait().unwrap().is_none(), "the load was over before the node was replaced");
    let rest: Vec<String> = told.map_while(Result::ok).collect();
    // Exit code 1 if one request failed, or one answer was not the expected one.
    let text = well("loadtest", &load.wait_with_output().unwrap());
    assert!(text.contains("h3"), "{text} {rest:?}");
}
