//! A new process of a node takes over from the old one, under load.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::net::TcpStream;
use std::process::{Child, Stdio};
use std::time::Duration;

use crate::by_hand::Fleet;
use crate::program::{selvage, terminate};

/// Time for the load to be under way before the first takeover, and after the last.
const UNDER_WAY: Duration = Duration::from_secs(3);
/// What each protocol must have been asked for the run to show something, requests. It is asked for 20 a second.
const ASKED_MIN: u64 = 60;
/// Longer than any answer takes on a machine that is busy.
const PATIENCE: Duration = Duration::from_secs(60);

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
    let load = load.spawn().unwrap();
    std::thread::sleep(UNDER_WAY);
    // Each half of QUIC's sockets has its turn. The third process comes while clients still shake hands with the second.
    for turn in ["second", "third", "fourth"] {
        let before = fleet.take_over();
        assert_eq!(fleet.front(), front, "{turn}");
        assert!(before.end(), "the process before the {turn} ended with an error");
    }
    std::thread::sleep(UNDER_WAY);
    lost_nothing(load, &["h1", "h2", "h3"]);
}

/// Stops a load, which must have asked enough over each of these and lost nothing.
fn lost_nothing(mut load: Child, protocols: &[&str]) {
    // Of its own accord it ends only for an error.
    assert!(load.try_wait().unwrap().is_none(), "the load was over before it was stopped");
    terminate(&load);
    let report = load.wait_with_output().unwrap().stdout;
    let report: serde_json::Value = serde_json::from_slice(&report).unwrap();
    let count = |field: &str| report["total"][field].as_u64().unwrap();
    assert_eq!(report["connections"]["failed"], 0, "{report}");
    assert_eq!(count("unexpected_status"), 0, "{report}");
    for protocol in protocols {
        let of = &report["protocols"][protocol];
        let count = |field: &serde_json::Value| field.as_u64().unwrap_or_default();
        assert!(count(&of["answered"]) > ASKED_MIN, "{protocol}: {report}");
        // What waited for its answer when the load was stopped was not lost.
        let ended = count(&of["answered"]) + count(&of["errors"]["stopped"]);
        assert_eq!(count(&of["requests"]), ended, "{protocol}: {report}");
    }
}

/// A connection of HTTP/1.1.
struct Asking(BufReader<TcpStream>);

impl Asking {
    fn connect(front: &str) -> Self {
        let tcp = TcpStream::connect(front).unwrap();
        tcp.set_read_timeout(Some(PATIENCE)).unwrap();
        Self(BufReader::new(tcp))
    }

    fn send(&mut self, bytes: &[u8]) {
        self.0.get_mut().write_all(bytes).unwrap();
    }

    /// The head of a request whose body is to follow, in chunks.
    fn begin(&mut self, method: &str, app: &str, path: &str) {
        let head = format!("{method} {path} HTTP/1.1\r\nhost: {app}.localhost\r\ntransfer-encoding: chunked\r\n\r\n");
        self.send(head.as_bytes());
    }

    fn chunk(&mut self, text: &str) {
        self.send(format!("{:x}\r\n{text}\r\n", text.len()).as_bytes());
    }

    fn line(&mut self) -> String {
        let mut line = String::new();
        self.0.read_line(&mut line).unwrap();
        line
    }

    /// An answer's status; its head is read to the end.
    fn status(&mut self) -> String {
        let status = self.line();
        while self.line() != "\r\n" {}
        status
    }

    /// One chunk of an answer. Empty: the last one.
    fn read_chunk(&mut self) -> String {
        let length = usize::from_str_radix(self.line().trim_end(), 16).unwrap();
        let mut bytes = vec![0; length + 2];
        self.0.read_exact(&mut bytes).unwrap();
        bytes.truncate(length);
        String::from_utf8(bytes).unwrap()
    }
}

/// Asks once, on a connection of its own: status and body, which HTTP/1.0 has in one piece.
fn ask(front: &str, method: &str, app: &str, path: &str, body: &str) -> String {
    let mut asking = Asking::connect(front);
    let length = body.len();
    let head = format!("{method} {path} HTTP/1.0\r\nhost: {app}.localhost\r\ncontent-length: {length}\r\n\r\n");
    asking.send(head.as_bytes());
    asking.send(body.as_bytes());
    let status = asking.status();
    let mut answer = String::new();
    asking.0.read_to_string(&mut answer).unwrap();
    format!("{} {answer}", status.split(' ').nth(1).unwrap())
}

#[test]
fn who_comes_during_a_takeover_waits_for_no_request_of_the_process_before() {
    let mut fleet = Fleet::start();
    fleet.deploy_hello();
    fleet.deploy("counter");
    let front = fleet.front();
    assert_eq!(ask(&front, "PUT", "counter", "/kv/known", "before"), "204 ");
    // Calls of the KV, over connections that come and go with the processes.
    let mut load = selvage();
    load.args(["loadtest", &format!("http://counter.localhost:{}/kv/known", front.rsplit(':').next().unwrap())])
        .args(["--connect", &front, "--rate", "40", "--duration", "600", "--mix", "h1=1,h2=1", "--connections", "4"])
        .args(["-o", "json", "--timeout-ms", "120000", "--lag-ms", "120000"])
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    let load = load.spawn().unwrap();
    std::thread::sleep(UNDER_WAY);

    for turn in ["second", "third"] {
        // Two requests that end when this test says so: an answer that has begun, and a guest that will use the KV.
        let mut streamed = Asking::connect(&front);
        streamed.begin("POST", "hello", "/echo");
        streamed.chunk("begun");
        assert!(streamed.status().contains(" 200 "), "{turn}");
        assert_eq!(streamed.read_chunk(), "begun");
        let mut slow = Asking::connect(&front);
        slow.begin("PUT", "counter", "/kv/slow");
        slow.chunk(turn);
        slow.chunk(" and");

        // It returns when the new process has all that it shall have, the KV too.
        let mut before = fleet.take_over();
        assert_eq!(fleet.front(), front, "{turn}");
        assert!(before.runs(), "the process before the {turn} still has requests");
        assert_eq!(ask(&front, "GET", "hello", "/", ""), "200 Hello from Selvage\n", "{turn}");
        assert_eq!(ask(&front, "POST", "counter", &format!("/count/{turn}"), ""), "200 1\n", "{turn}");
        assert!(before.runs(), "it still has them, and others were answered");

        // The guest of the old process has its KV still, which is the new one's.
        slow.chunk(" the rest");
        slow.send(b"0\r\n\r\n");
        assert!(slow.status().contains(" 204 "), "{turn}");
        assert_eq!(ask(&front, "GET", "counter", "/kv/slow", ""), format!("200 {turn} and the rest"));
        streamed.chunk("and whole");
        assert_eq!(streamed.read_chunk(), "and whole");
        streamed.send(b"0\r\n\r\n");
        assert_eq!(streamed.read_chunk(), "", "the last chunk");
        assert!(before.end(), "the process before the {turn} ended with an error");
    }
    std::thread::sleep(UNDER_WAY);
    lost_nothing(load, &["h1", "h2"]);
    assert_eq!(ask(&front, "GET", "counter", "/kv/known", ""), "200 before");
}
