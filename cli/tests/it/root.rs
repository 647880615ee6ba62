//! The root of a fleet's plans, by the commands that people use.

use std::path::Path;
use std::process::Output;

use crate::program::{finish, selvage, well};

struct Desk(tempfile::TempDir);

impl Desk {
    fn new(people: &[&str]) -> Self {
        let desk = Self(tempfile::tempdir().unwrap());
        for person in people {
            well("key", &desk.run(&["key", "--prefix", person]));
        }
        well("plain key", &desk.run(&["key", "--prefix", "plan", "--plain"]));
        desk
    }

    fn path(&self) -> &Path {
        self.0.path()
    }

    fn run(&self, arguments: &[&str]) -> Output {
        finish(selvage().args(arguments).env("COSIGN_PASSWORD", "pw").current_dir(self.path()))
    }

    fn show(&self, root: &[&str]) -> (i32, serde_json::Value) {
        let shown = self.run(&[&["root", "show", "-o", "json"], root].concat());
        (shown.status.code().unwrap(), serde_json::from_slice(&shown.stdout).unwrap())
    }
}

#[test]
fn a_root_is_complete_when_enough_people_have_signed_it() {
    let desk = Desk::new(&["alice", "bob"]);
    let init =
        ["root", "init", "--namespace", "acme", "--key", "alice.pub", "--key", "bob.pub", "--plan-key", "plan.pub"];
    well("init", &desk.run(&init));
    assert_eq!(desk.run(&init).status.code(), Some(1), "nothing is overwritten");
    for (person, complete) in [("alice", false), ("alice", false), ("bob", true)] {
        well("sign", &desk.run(&["root", "sign", "root-1.json", "--key", &format!("{person}.key")]));
        let (code, shown) = desk.show(&["root-1.json"]);
        assert_eq!((code == 0, shown["complete"].as_bool().unwrap()), (complete, complete), "{shown}");
    }
    let plain = std::fs::read_to_string(desk.path().join("plan.key")).unwrap();
    assert!(plain.starts_with("-----BEGIN PRIVATE KEY-----"));
}

#[test]
fn the_next_root_needs_the_people_of_the_one_before() {
    let desk = Desk::new(&["alice", "bob", "carol"]);
    let keys = ["--key", "alice.pub", "--key", "bob.pub", "--plan-key", "plan.pub", "--threshold", "1"];
    well("init", &desk.run(&[&["root", "init", "--namespace", "acme"], &keys[..]].concat()));
    well("sign", &desk.run(&["root", "sign", "root-1.json", "--key", "alice.key"]));
    let rotate = [
        "root",
        "rotate",
        "root-1.json",
        "--remove-key",
        "alice.pub",
        "--add-key",
        "carol.pub",
        "--out",
        "root-2.json",
    ];
    well("rotate", &desk.run(&rotate));
    well("sign", &desk.run(&["root", "sign", "root-2.json", "--key", "carol.key"]));
    assert_eq!(desk.show(&["root-2.json"]).0, 0, "by its own keys it is complete");
    let (code, shown) = desk.show(&["root-2.json", "--after", "root-1.json"]);
    assert!(code == 1 && shown["lacks"].as_str().unwrap().contains("the root before"), "{shown}");
    well("sign", &desk.run(&["root", "sign", "root-2.json", "--key", "alice.key"]));
    assert_eq!(desk.show(&["root-2.json", "--after", "root-1.json"]).0, 0);
    assert_eq!(desk.show(&["root-2.json"]).1["version"], 2);
}

#[test]
fn a_root_that_can_t_be_is_refused_with_a_reason() {
    let desk = Desk::new(&["alice"]);
    for (arguments, reason) in [
        (&["--key", "alice.pub", "--plan-key", "plan.pub", "--threshold", "2"][..], "threshold"),
        (&["--key", "alice.pub", "--plan-key", "alice.pub", "--threshold", "1"], "roots and plans"),
        (&["--key", "gone.pub", "--plan-key", "plan.pub", "--threshold", "1"], "gone.pub"),
    ] {
        let refused = desk.run(&[&["root", "init", "--namespace", "acme"], arguments].concat());
        let text = String::from_utf8_lossy(&refused.stderr);
        assert!(!refused.status.success() && text.contains(reason), "{text}");
        assert!(!desk.path().join("root-1.json").exists());
    }
}
