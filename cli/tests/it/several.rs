//! Two control planes with one state over a real NATS server, one of them killed at a time: the node goes on with the other,
//! and so do the operator's commands.
//!
//! `.ci/tools` installs nats-server by package. Without it the test is skipped with a loud line; never in CI.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use crate::by_hand::Fleet;
use crate::peers::have;
use crate::program::{Serving, example, finish, http, selvage, well};

/// How long a condition may take to come true on a machine that has other things to do.
const PATIENCE: Duration = Duration::from_secs(60);

/// A NATS server that ends with the test.
struct Nats(Child);

impl Nats {
    fn start(directory: &Path) -> (Self, u16) {
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let store = directory.join("nats");
        let config =
            format!("listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {store:?}, sync_interval: always }}\n");
        std::fs::write(directory.join("nats.conf"), config).unwrap();
        let mut command = Command::new("nats-server");
        let command = command.arg("-c").arg(directory.join("nats.conf")).stdout(Stdio::null()).stderr(Stdio::null());
        (Self(command.spawn().unwrap()), port)
    }
}

impl Drop for Nats {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// The files of a fleet that has two control planes now.
struct Two {
    directory: tempfile::TempDir,
    _nats: Nats,
}

impl Two {
    /// In the place of one control plane: the first takes its state along.
    fn over(directory: tempfile::TempDir) -> Self {
        let (nats, port) = Nats::start(directory.path());
        let alone = std::fs::read_to_string(directory.path().join("control-plane.toml")).unwrap();
        let sealed = format!("sealing_key = \"control-plane/sealing.key\"\n{alone}");
        let shared =
            format!("{sealed}\n[nats]\nservers = [\"nats://127.0.0.1:{port}\"]\nreplicas = 1\nrequest_ms = 2000\n");
        std::fs::write(directory.path().join("a.toml"), &shared).unwrap();
        let other = shared.replace("state_dir = \"control-plane\"", "state_dir = \"b\"");
        std::fs::write(directory.path().join("b.toml"), other).unwrap();
        Self { directory, _nats: nats }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// Starts one of them, the next time where it is now.
    fn start(&self, name: &str) -> (Serving, String) {
        let file = format!("{name}.toml");
        let mut command = selvage();
        let command = command.args(["control-plane", "--config", &file]).current_dir(self.directory.path());
        let control_plane = Serving::start(command);
        let address = control_plane.told["address"].as_str().unwrap().to_owned();
        let text = std::fs::read_to_string(self.path(&file)).unwrap();
        std::fs::write(self.path(&file), text.replace("127.0.0.1:0", &address)).unwrap();
        (control_plane, address)
    }

    fn selvage(&self, arguments: &[&str]) -> Output {
        let mut command = selvage();
        command.args(arguments).env("SELVAGE_CONTEXT", self.path("both.toml")).env("COSIGN_PASSWORD", "pw");
        finish(command.current_dir(self.directory.path()))
    }

    /// Pushes, signs and deploys an example, and waits until the node answers for it.
    fn deploy(&self, name: &str, node: &Serving) {
        let source = example(name).display().to_string();
        let pushed = self.selvage(&["push", "-f", &source, "-o", "json"]);
        well("push", &pushed);
        let pushed: serde_json::Value = serde_json::from_slice(&pushed.stdout).unwrap();
        let reference = format!("{name}@{}", pushed["manifest"].as_str().unwrap());
        well("sign", &self.selvage(&["sign", &reference, "--key", "release.key"]));
        well("deploy", &self.selvage(&["deploy", &reference]));
        self.serves(name, node);
    }

    fn serves(&self, name: &str, node: &Serving) {
        let (url, begun) = (format!("http://{}/", node.told["front"].as_str().unwrap()), Instant::now());
        let host = format!("{name}.localhost");
        tokio::runtime::Runtime::new().unwrap().block_on(async {
            while http().get(&url).header("host", &host).send().await.unwrap().status() != 200 {
                assert!(begun.elapsed() < PATIENCE, "{name} is not served");
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        });
    }
}

#[test]
fn one_of_two_control_planes_is_killed_and_node_and_operator_go_on_with_the_other() {
    if !have("nats-server") {
        return;
    }
    let alone = Fleet::start();
    alone.deploy_hello();
    let fleet = Two::over(alone.dismiss());
    let ((a, address_a), (b, address_b)) = (fleet.start("a"), fleet.start("b"));

    // One file for the commands, one for the node: both name both.
    let context = std::fs::read_to_string(fleet.path("certs/context.toml")).unwrap();
    let rest: Vec<&str> = context.lines().filter(|line| !line.starts_with("control_plane")).collect();
    let rest = rest.join("\n").replace("\"ca.pem\"", "\"certs/ca.pem\"").replace("\"operator", "\"certs/operator");
    let both = format!("control_plane = [\"https://{address_a}\", \"https://{address_b}\"]\n{rest}\n");
    std::fs::write(fleet.path("both.toml"), both).unwrap();
    let text = std::fs::read_to_string(fleet.path("node.toml")).unwrap();
    let (before, after) = text.split_once("[control_plane]\naddress = ").unwrap();
    let (_, after) = after.split_once('\n').unwrap();
    let known = format!("{before}[control_plane]\naddress = [\"{address_a}\", \"{address_b}\"]\n{after}");
    std::fs::write(fleet.path("node.toml"), known).unwrap();
    let node = Serving::start(selvage().arg("node").current_dir(fleet.directory.path()));

    // What the fleet had is there, and new things come by the first.
    fleet.serves("hello", &node);
    fleet.deploy("plain", &node);
    // SIGKILL: the node's question was open, and nothing answers there any more.
    drop(a);
    fleet.deploy("hello-p3", &node);
    let nodes = well("nodes", &fleet.selvage(&["nodes"]));
    assert!(nodes.contains("fra-1"), "{nodes}");
    // The first comes back and catches up; then the other is killed.
    let (a, again) = fleet.start("a");
    assert_eq!(again, address_a);
    drop(b);
    let releases = well("releases", &fleet.selvage(&["releases", "hello-p3"]));
    assert!(releases.contains("hello-p3@1"), "{releases}");
    fleet.deploy("plain-p3", &node);
    for name in ["hello", "plain", "hello-p3"] {
        fleet.serves(name, &node);
    }
    drop(a);
    let gone = fleet.selvage(&["nodes"]);
    assert!(!gone.status.success(), "nobody is there");
}
