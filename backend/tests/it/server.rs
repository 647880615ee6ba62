//! Real servers on free ports: `redis-server` and `nats-server`, as `.ci/tools` installs them by package.
//!
//! Without them these tests are skipped with a loud line; never in CI.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::{Duration, Instant};

use tempfile::TempDir;

/// How long one may take to listen, and anything else may take here.
pub(crate) const PATIENCE: Duration = Duration::from_secs(60);

/// What kind of server.
#[derive(Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Redis,
    Nats,
}

pub(crate) struct Server {
    kind: Kind,
    dir: TempDir,
    port: u16,
    /// What its file says besides.
    pub(crate) settings: String,
    child: Option<Child>,
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
        if std::thread::panicking() {
            let log = fs::read_to_string(self.dir.path().join("log")).unwrap_or_default();
            eprintln!("the server said:\n{log}");
        }
    }
}

fn is_there(name: &str) -> bool {
    let paths = std::env::var_os("PATH").unwrap_or_default();
    let found = std::env::split_paths(&paths).any(|dir| dir.join(name).is_file());
    assert!(found || std::env::var_os("CI").is_none(), "CI needs {name}: see .ci/tools");
    if !found {
        eprintln!("\n!!! SKIPPED: {name} is not installed; .ci/tools DIR installs it !!!\n");
    }
    found
}

/// A port that nobody listens on, below those that the system gives to whoever wants any: it stays free until it is used.
fn free_port() -> u16 {
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
    /// One that runs. None: it is not installed.
    pub(crate) fn start(kind: Kind) -> Option<Self> {
        Self::start_with(kind, |_| String::new())
    }

    /// The same with more in its file.
    pub(crate) fn start_with(kind: Kind, settings: impl FnOnce(&Path) -> String) -> Option<Self> {
        let mut server = Self::prepared(kind, settings)?;
        server.resume();
        Some(server)
    }

    /// The same, not yet running.
    pub(crate) fn prepared(kind: Kind, settings: impl FnOnce(&Path) -> String) -> Option<Self> {
        let program = match kind {
            Kind::Redis => "redis-server",
            Kind::Nats => "nats-server",
        };
        if !is_there(program) {
            return None;
        }
        let (dir, port) = (tempfile::tempdir().unwrap(), free_port());
        let settings = settings(dir.path());
        Some(Self { kind, dir, port, settings, child: None })
    }

    pub(crate) fn dir(&self) -> &Path {
        self.dir.path()
    }

    pub(crate) fn port(&self) -> u16 {
        self.port
    }

    /// Starts it, or again over what it had.
    pub(crate) fn resume(&mut self) {
        self.spawn();
        let begun = Instant::now();
        while !self.answers() {
            assert!(begun.elapsed() < PATIENCE, "the server does not listen");
            std::thread::sleep(Duration::from_millis(20));
        }
    }

    fn spawn(&mut self) {
        let (dir, port, settings) = (self.dir.path(), self.port, &self.settings);
        let log = dir.join("log");
        let (mut command, config) = match self.kind {
            Kind::Redis => {
                let config = format!(
                    "bind 127.0.0.1\ndir {}\nlogfile {}\nsave \"\"\nappendonly yes\nappendfsync always\n\
                     enable-debug-command local\n{}{settings}",
                    dir.display(),
                    log.display(),
                    if settings.contains("tls-port") { String::new() } else { format!("port {port}\n") },
                );
                (Command::new("redis-server"), config.replace("PORT", &port.to_string()))
            }
            Kind::Nats => {
                let config = format!(
                    "listen: \"127.0.0.1:{port}\"\njetstream {{ store_dir: {:?}, sync_interval: always }}\n\
                     log_file: {log:?}\n{settings}",
                    dir.join("store"),
                );
                (Command::new("nats-server"), config)
            }
        };
        let file = dir.join("server.conf");
        fs::write(&file, config).unwrap();
        if self.kind == Kind::Nats {
            command.arg("-c");
        }
        let child = command.arg(&file).stdout(Stdio::null()).stderr(Stdio::null()).spawn().unwrap();
        self.child = Some(child);
    }

    /// Whether it says who it is, or answers at all. One with TLS is there when it listens.
    fn answers(&self) -> bool {
        let Ok(mut stream) = TcpStream::connect(("127.0.0.1", self.port)) else { return false };
        if self.settings.contains("tls-port") {
            return true;
        }
        if self.kind == Kind::Redis && stream.write_all(b"PING\r\n").is_err() {
            return false;
        }
        let mut first = [0; 4];
        stream.read_exact(&mut first).is_ok() && [b"INFO", b"+PON", b"-NOA"].contains(&&first)
    }

    pub(crate) fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            let _ = child.kill();
            let _ = child.wait();
        }
    }

    /// Stops it as it stands, or lets it go on.
    pub(crate) fn signal(&self, signal: &str) {
        let id = self.child.as_ref().unwrap().id().to_string();
        assert!(Command::new("kill").args([signal, &id]).status().unwrap().success());
    }

    /// One command of a Redis server, past the node. What it answers, up to the end of the first line.
    pub(crate) fn redis(&self, command: &[&str]) -> String {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        let mut text = format!("*{}\r\n", command.len());
        for word in command {
            text += &format!("${}\r\n{word}\r\n", word.len());
        }
        stream.write_all(text.as_bytes()).unwrap();
        let mut answer = Vec::new();
        let mut byte = [0];
        while !answer.ends_with(b"\r\n") {
            stream.read_exact(&mut byte).unwrap();
            answer.push(byte[0]);
        }
        String::from_utf8_lossy(&answer).trim().to_owned()
    }
}

/// Until it is so.
pub(crate) async fn until(what: &str, mut is_so: impl AsyncFnMut() -> bool) {
    let begun = Instant::now();
    while !is_so().await {
        assert!(begun.elapsed() < PATIENCE, "not yet: {what}");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
