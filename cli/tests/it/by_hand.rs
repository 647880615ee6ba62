//! A control plane and a node, set up with the commands and files of docs/OPERATING.md.

use std::path::{Path, PathBuf};
use std::process::Output;

use selvage_certs::Authority;
use selvage_config::Digest;

use crate::program::{Serving, example, finish, selvage, well};

/// A running control plane and one node that also trusts `.sig` tags.
pub(crate) struct Fleet {
    directory: tempfile::TempDir,
    control_plane: Serving,
    node: Option<Serving>,
}

impl Fleet {
    /// The registry token of the operator `ci`.
    pub(crate) const TOKEN: &str = "a-token-of-a-test";

    /// Sets everything up and starts it. The node is reached without TLS.
    pub(crate) fn start() -> Self {
        Self::with_listeners("http = \"127.0.0.1:0\"", "", |_| ())
    }

    /// The same with more tables in the node's file.
    pub(crate) fn start_with_tables(tables: &str) -> Self {
        Self::with_listeners("http = \"127.0.0.1:0\"", tables, |_| ())
    }

    /// The same with a node that is reached by TLS and HTTP/3 too, by the name `hello.localhost` under `front-ca.pem`.
    pub(crate) fn start_with_tls() -> Self {
        Self::start_with_front("", |_| ())
    }

    /// The same with more tables in the node's file, whose files `prepare` puts into the fleet's directory.
    pub(crate) fn start_with_front(tables: &str, prepare: impl FnOnce(&Path)) -> Self {
        Self::with_listeners("http = \"127.0.0.1:0\"\nhttps = \"127.0.0.1:0\"", tables, prepare)
    }

    fn with_listeners(listeners: &str, tables: &str, prepare: impl FnOnce(&Path)) -> Self {
        let directory = tempfile::tempdir().unwrap();
        prepare(directory.path());
        let run = |arguments: &[&str]| {
            let mut command = selvage();
            well("set up", &finish(command.args(arguments).env("COSIGN_PASSWORD", "pw").current_dir(directory.path())));
        };
        run(&["certs", "control-plane", "--address", "127.0.0.1"]);
        run(&["certs", "node", "fra-1", "--region", "fra"]);
        run(&["key", "--prefix", "release"]);
        run(&["key", "--prefix", "plan", "--plain"]);
        for person in ["alice", "bob", "carol"] {
            run(&["key", "--prefix", person]);
        }
        let keys = ["--key", "alice.pub", "--key", "bob.pub", "--key", "carol.pub", "--threshold", "2"];
        run(&[&["root", "init", "--namespace", "test", "--plan-key", "plan.pub"], &keys[..]].concat());
        run(&["root", "sign", "root-1.json", "--key", "alice.key"]);
        run(&["root", "sign", "root-1.json", "--key", "carol.key"]);
        let identity = |stem: &str| {
            format!(
                "[identity]\ncertificate = \"certs/{stem}.pem\"\nkey = \"certs/{stem}.key\"\nroots = \"certs/ca.pem\"\n"
            )
        };
        let write = |name: &str, text: String| std::fs::write(directory.path().join(name), text).unwrap();
        let digest = Digest::of(Self::TOKEN.as_bytes());
        write(
            "control-plane.toml",
            format!(
                "listen = \"127.0.0.1:0\"\nstate_dir = \"control-plane\"\nauthority = \"certs\"\n{}\n[[operators]]\nname = \"alice\"\n[[operators]]\nname = \"ci\"\ntoken_digest = \"{digest}\"\n[plans]\nkey = \"plan.key\"\nroots = [\"root-1.json\"]\n",
                identity("control-plane")
            ),
        );
        let control_plane = Serving::start(selvage().arg("control-plane").current_dir(directory.path()));
        let address = control_plane.told["address"].as_str().unwrap().to_owned();
        run(&["certs", "operator", "alice", "--control-plane", &format!("https://{address}")]);
        let front = Authority::create("front").unwrap();
        write("front-ca.pem", front.certificate_pem().to_owned());
        let certificate = front.issue_server(&["hello.localhost".into()], &[]).unwrap();
        certificate.save(directory.path().join("front.pem"), directory.path().join("front.key")).unwrap();
        write(
            "node.toml",
            format!(
                "name = \"fra-1\"\nregion = \"fra\"\nstate_dir = \"node\"\n\
             [listen]\n{listeners}\nadmin = \"127.0.0.1:0\"\n{}\n\
             [[certificates]]\ncertificate = \"front.pem\"\nkey = \"front.key\"\n{tables}\n\
             [control_plane]\naddress = \"{address}\"\n[trust]\nkeys = [\"release.pub\"]\nroot = \"root-1.json\"\nlegacy_signatures = true\n",
                identity("node-fra-1")
            ),
        );
        let node = Serving::start(selvage().arg("node").current_dir(directory.path()));
        let fleet = Self { directory, control_plane, node: Some(node) };
        fleet.wait_for_node();
        fleet
    }

    /// SIGKILL.
    pub(crate) fn kill_node(&mut self) {
        drop(self.node.take());
    }

    /// Starts the node again over what it had.
    pub(crate) fn start_node(&mut self) {
        self.node = Some(Serving::start(selvage().arg("node").current_dir(self.directory.path())));
    }

    /// Stops all of it, and leaves its files.
    pub(crate) fn dismiss(mut self) -> tempfile::TempDir {
        assert!(self.node.take().unwrap().stop(), "the node ends well");
        assert!(self.control_plane.stop(), "the control plane ends well");
        self.directory
    }

    fn wait_for_node(&self) {
        let began = std::time::Instant::now();
        while !well("nodes", &self.selvage(&["nodes"])).contains("fra-1") {
            assert!(began.elapsed().as_secs() < 30, "the node did not report");
        }
    }

    /// Replaces the node by a process that takes over from it. Returns the one before.
    pub(crate) fn take_over(&mut self) -> Serving {
        let mut next = selvage();
        let next = Serving::start(next.args(["node", "--take-over"]).current_dir(self.directory.path()));
        self.node.replace(next).unwrap()
    }

    /// Pushes, signs and deploys the example `hello`.
    pub(crate) fn deploy_hello(&self) {
        self.deploy("hello");
    }

    /// Pushes, signs and deploys an example.
    pub(crate) fn deploy(&self, app: &str) {
        let source = example(app).display().to_string();
        let pushed = self.selvage(&["push", "-f", &source, "-o", "json"]);
        well("push", &pushed);
        let pushed: serde_json::Value = serde_json::from_slice(&pushed.stdout).unwrap();
        let reference = format!("{app}@{}", pushed["manifest"].as_str().unwrap());
        well("sign", &self.selvage(&["sign", &reference, "--key", "release.key"]));
        well("deploy", &self.selvage(&["deploy", &reference]));
    }

    /// Where the node answers.
    pub(crate) fn front(&self) -> String {
        self.node.as_ref().unwrap().told["front"].as_str().unwrap().to_owned()
    }

    /// A file of the fleet.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `host:port` of the registry.
    pub(crate) fn registry(&self) -> String {
        self.control_plane.told["address"].as_str().unwrap().to_owned()
    }

    /// Runs a command as the operator.
    pub(crate) fn selvage(&self, arguments: &[&str]) -> Output {
        let mut command = selvage();
        command.args(arguments).env("SELVAGE_CONTEXT", self.path("certs/context.toml")).env("COSIGN_PASSWORD", "pw");
        finish(command.current_dir(self.directory.path()))
    }
}
