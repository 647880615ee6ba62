//! A neighbour that asks, beside the client that measures.

use std::io::Read as _;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;
use rustix::process::{Pid, Signal, kill_process};

use crate::figures::{CLIENT_CORE, without_backtraces};
use crate::servers::Running;
use crate::servers::tools::Tools;

/// How long a neighbour is there before anything counts.
const BEGIN: Duration = Duration::from_secs(1);
/// Longer than everything here, seconds: a neighbour ends when it is ended.
const LONG_S: &str = "600";

/// A neighbour that asks. It ends when this is dropped.
pub(crate) struct Asking(Child);

/// What it got.
pub(crate) struct Answers {
    /// A second, of those with a 2xx or 3xx.
    pub(crate) rate: f64,
    /// All others together.
    pub(crate) unwanted: f64,
}

impl Asking {
    /// So many requests a second, evenly spaced.
    pub(crate) fn evenly(tools: &Tools, running: &Running, host: &str, rate: u32) -> anyhow::Result<Self> {
        let (url, address) = running.url_at(host)?;
        let mut command = behind();
        command.arg(&tools.selvage).args(["loadtest", &url, "--connect", &address.to_string(), "--even"]);
        command.args(["--connections", "64", "--duration", LONG_S, "--rate"]).arg(rate.to_string());
        Self::begin(command.stdout(Stdio::null()))
    }

    /// As many as go.
    pub(crate) fn greedily(tools: &Tools, running: &Running, host: &str, connections: u32) -> anyhow::Result<Self> {
        let mut command = behind();
        command.arg(&tools.wrk).args(["-t1", "--timeout", LONG_S, "-d", LONG_S, "-c"]).arg(connections.to_string());
        command.args(["-H", &format!("Host: {host}")]).arg(&running.url);
        Self::begin(command.stdout(Stdio::piped()))
    }

    fn begin(command: &mut Command) -> anyhow::Result<Self> {
        let asking = Self(without_backtraces(command).stdin(Stdio::null()).stderr(Stdio::null()).spawn()?);
        std::thread::sleep(BEGIN);
        Ok(asking)
    }

    /// Ends it. What it got, if it says so.
    pub(crate) fn end(mut self) -> anyhow::Result<Option<Answers>> {
        let Some(mut stdout) = self.0.stdout.take() else { return Ok(None) };
        let pid = Pid::from_child(&self.0);
        // wrk sums up when it is interrupted.
        kill_process(pid, Signal::INT)?;
        let mut text = String::new();
        stdout.read_to_string(&mut text)?;
        let number =
            |name: &str| text.lines().find_map(|line| line.trim().strip_prefix(name)?.trim().parse::<f64>().ok());
        let rate = number("Requests/sec:").with_context(|| format!("wrk says no rate: {text}"))?;
        let unwanted = number("Non-2xx or 3xx responses:").unwrap_or(0.0);
        let all = text.lines().find_map(|line| line.trim().split_once(" requests in ")?.0.parse::<f64>().ok());
        let share = unwanted / all.context("wrk says no number of requests")?.max(1.0);
        Ok(Some(Answers { rate: rate * (1.0 - share), unwanted }))
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// On the client's core, but never before the client that measures (sched(7), SCHED_IDLE).
fn behind() -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", CLIENT_CORE, "chrt", "--idle", "0"]);
    command
}
