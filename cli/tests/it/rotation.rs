//! Another authority takes the place of the first under a fleet that serves.

use std::io::{Read as _, Write as _};
use std::net::TcpStream;
use std::path::Path;
use std::time::{Duration, Instant};

use serde_json::Value;

use crate::by_hand::Fleet;
use crate::program::{Serving, finish, selvage, well};

/// Longer than anything here takes, however busy the machine.
const PATIENCE: Duration = Duration::from_secs(120);

/// A visitor with one connection for all of the test.
struct Visitor(TcpStream);

impl Visitor {
    fn ask(&mut self) {
        self.0.write_all(b"GET / HTTP/1.1\r\nhost: hello.localhost\r\n\r\n").unwrap();
        let (mut answer, mut part) = (Vec::new(), [0; 4_096]);
        while !is_whole(&answer) {
            let read = self.0.read(&mut part).unwrap();
            assert!(read > 0, "the connection ended");
            answer.extend_from_slice(&part[..read]);
        }
        assert!(answer.starts_with(b"HTTP/1.1 200"), "{}", String::from_utf8_lossy(&answer));
    }
}

/// Whether it is all of an answer, by its length or its last chunk.
fn is_whole(answer: &[u8]) -> bool {
    let text = String::from_utf8_lossy(answer).to_lowercase();
    let Some((head, body)) = text.split_once("\r\n\r\n") else { return false };
    match head.lines().find_map(|line| line.strip_prefix("content-length: ")) {
        Some(length) => body.len() >= length.parse().unwrap(),
        None => body.ends_with("0\r\n\r\n"),
    }
}

impl Fleet {
    fn nodes(&self) -> Vec<Value> {
        let told = self.selvage(&["nodes", "-o", "json"]);
        well("nodes", &told);
        serde_json::from_slice(&told.stdout).unwrap()
    }

    /// Waits until both nodes say this of themselves, while a visitor keeps asking.
    fn until_both(&self, visitor: &mut Visitor, field: &str) {
        let began = Instant::now();
        loop {
            visitor.ask();
            let nodes = self.nodes();
            if nodes.len() == 2 && nodes.iter().all(|node| node[field] == true && node["alive"] == true) {
                return;
            }
            assert!(began.elapsed() < PATIENCE, "{field}: {nodes:?}");
            std::thread::sleep(Duration::from_millis(200));
        }
    }

    /// A second node, which joins by a token and so has files of its own.
    fn second_node(&self) -> Serving {
        let invited = self.selvage(&["nodes", "invite", "--region", "fra", "-o", "json"]);
        well("invite", &invited);
        let invited: Value = serde_json::from_slice(&invited.stdout).unwrap();
        let dir = self.path("second");
        let join = ["node", "join", "fra-2", "--control-plane", &self.registry(), "--dir"];
        let mut command = selvage();
        command.args(join).arg(&dir).args(["--token", invited["token"].as_str().unwrap()]);
        well("join", &finish(&mut command));
        for name in ["root-1.json", "release.pub"] {
            std::fs::copy(self.path(name), dir.join(name)).unwrap();
        }
        let path = dir.join("node.toml");
        let text = std::fs::read_to_string(&path).unwrap();
        let text = text.replace("127.0.0.1:8080", "127.0.0.1:0").replace("keys = []", "keys = [\"release.pub\"]");
        std::fs::write(&path, text.replace("# root =", "root =")).unwrap();
        Serving::start(selvage().arg("node").current_dir(&dir))
    }
}

fn certificates(path: &Path) -> usize {
    std::fs::read_to_string(path).unwrap().matches("BEGIN CERTIFICATE").count()
}

#[test]
fn another_authority_takes_the_place_of_the_first_and_nobody_loses_a_connection() {
    let fleet = Fleet::start();
    let second = fleet.second_node();
    fleet.deploy_hello();
    let certs = |arguments: &[&str]| well("certs", &fleet.selvage(&[&["certs"], arguments].concat()));
    let mut visitor = Visitor(TcpStream::connect(fleet.front()).unwrap());
    visitor.0.set_read_timeout(Some(PATIENCE)).unwrap();
    fleet.until_both(&mut visitor, "believes_authorities");

    let order = fleet.selvage(&["certs", "rotate", "switch"]);
    assert_eq!(order.status.code(), Some(2), "{}", String::from_utf8_lossy(&order.stderr));
    certs(&["rotate", "begin"]);
    fleet.until_both(&mut visitor, "believes_authorities");
    assert_eq!(certificates(&fleet.path("second/ca.pem")), 2, "the second node was told of both");

    certs(&["rotate", "switch"]);
    let before = std::fs::read(fleet.path("second/node.pem")).unwrap();
    fleet.until_both(&mut visitor, "certificate_is_current");
    assert_ne!(std::fs::read(fleet.path("second/node.pem")).unwrap(), before);
    for name in ["operator-alice.pem", "operator-alice.key"] {
        std::fs::copy(fleet.path("certs").join(name), fleet.path("certs").join(format!("old-{name}"))).unwrap();
    }
    certs(&["control-plane", "--address", "127.0.0.1"]);
    certs(&["operator", "alice", "--control-plane", &format!("https://{}", fleet.registry())]);

    // Whoever believes the new one alone reaches the control plane once it shows its new identity.
    let context = std::fs::read_to_string(fleet.path("certs/context.toml")).unwrap();
    let both = std::fs::read_to_string(fleet.path("certs/ca.pem")).unwrap();
    let new = both.rfind("-----BEGIN").unwrap();
    std::fs::write(fleet.path("certs/new.pem"), &both[new..]).unwrap();
    std::fs::write(fleet.path("certs/new.toml"), context.replace("\"ca.pem\"", "\"new.pem\"")).unwrap();
    let nodes = |context: &str| finish(selvage().arg("nodes").env("SELVAGE_CONTEXT", fleet.path(context)));
    let began = Instant::now();
    while !nodes("certs/new.toml").status.success() {
        assert!(began.elapsed() < PATIENCE, "{}", String::from_utf8_lossy(&nodes("certs/new.toml").stderr));
        visitor.ask();
    }

    certs(&["rotate", "finish"]);
    let began = Instant::now();
    while certificates(&fleet.path("second/ca.pem")) != 1 {
        assert!(began.elapsed() < PATIENCE, "the old authority is still believed");
        visitor.ask();
        std::thread::sleep(Duration::from_millis(200));
    }
    fleet.until_both(&mut visitor, "believes_authorities");
    fleet.deploy_hello();
    // What the old authority vouched for is worth nothing.
    std::fs::write(fleet.path("certs/old.toml"), context.replace("operator-alice", "old-operator-alice")).unwrap();
    assert!(!nodes("certs/old.toml").status.success());
    assert!(second.stop());
}
