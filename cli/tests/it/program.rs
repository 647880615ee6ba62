//! Runs `selvage` as a process of its own.

use std::io::{BufRead, BufReader, Write};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::Duration;

/// The program, built by this test run.
pub(crate) fn selvage() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_selvage"));
    command
        .env_remove("RUST_BACKTRACE")
        .env_remove("SELVAGE_CONTEXT")
        .env_remove("SELVAGE_OUTPUT")
        .env("SELVAGE_LOG", "error");
    command
}

/// An example: of the tree, or of the directory that `SELVAGE_TEST_EXAMPLES` names.
pub(crate) fn example(name: &str) -> PathBuf {
    let own = || Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    std::env::var_os("SELVAGE_TEST_EXAMPLES").map_or_else(own, Into::into).join(name)
}

/// Says on the terminal that something was not tested: past the capture of a passing test's output.
pub(crate) fn skipped(what: &str) {
    let _ = writeln!(std::io::stderr(), "\n!!! SKIPPED: {what} is not installed; .ci/tools DIR installs it !!!\n");
}

/// An HTTP client without TLS roots: for plain listeners on this machine.
pub(crate) fn http() -> reqwest::Client {
    let tls = selvage_certs::client(&rustls::RootCertStore::empty());
    reqwest::Client::builder().use_preconfigured_tls(tls).no_proxy().build().unwrap()
}

/// Runs to its end.
pub(crate) fn finish(command: &mut Command) -> Output {
    command.output().unwrap()
}

/// What a command printed, which must have ended well.
pub(crate) fn well(what: &str, output: &Output) -> String {
    let text = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{what}: {text}");
    text
}

/// A process that serves until it is dropped.
pub(crate) struct Serving {
    child: Child,
    /// The JSON document that it printed when it was ready.
    pub(crate) told: serde_json::Value,
}

impl Serving {
    /// Starts `command` with `-o json` and waits until it says that it serves.
    pub(crate) fn start(command: &mut Command) -> Self {
        let mut child = command.args(["-o", "json"]).stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        let told = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line:?}"));
        Self { child, told }
    }

    /// `selvage up` with these arguments, on any free port.
    pub(crate) fn up(arguments: &[&str]) -> Self {
        Self::start(selvage().args(["up", "--listen", "127.0.0.1:0"]).args(arguments))
    }

    /// Where it serves.
    pub(crate) fn url(&self, path: &str) -> String {
        format!("{}{path}", self.told["url"].as_str().unwrap())
    }

    /// Bytes of memory that it holds.
    pub(crate) fn resident_bytes(&self) -> u64 {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.child.id())).unwrap();
        let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
        line.split_whitespace().nth(1).unwrap().parse::<u64>().unwrap() * 1024
    }

    /// The process.
    pub(crate) fn id(&self) -> u32 {
        self.child.id()
    }

    /// Descriptors that it has open.
    pub(crate) fn descriptors(&self) -> usize {
        std::fs::read_dir(format!("/proc/{}/fd", self.child.id())).unwrap().count()
    }

    /// CPU time that it has used, in the clock's ticks of a hundredth of a second (proc(5)).
    pub(crate) fn cpu(&self) -> Duration {
        let stat = std::fs::read_to_string(format!("/proc/{}/stat", self.child.id())).unwrap();
        let (_, fields) = stat.rsplit_once(')').unwrap();
        let ticks: u64 = fields.split_whitespace().skip(11).take(2).map(|field| field.parse::<u64>().unwrap()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Whether it has not ended.
    pub(crate) fn runs(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Waits until it ends by itself; whether it ended well.
    pub(crate) fn end(mut self) -> bool {
        self.child.wait().unwrap().success()
    }

    /// Asks it to stop and waits; whether it ended well.
    pub(crate) fn stop(mut self) -> bool {
        terminate(&self.child);
        self.child.wait().unwrap().success()
    }
}

/// Asks a process to stop.
pub(crate) fn terminate(child: &Child) {
    let _ = Command::new("kill").args(["-TERM", &child.id().to_string()]).status();
}

impl Drop for Serving {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
