//! The clients: `wrk` for what a server can do at most, `selvage loadtest` for how long an answer takes below that.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::figures::{CLIENT_CORE, without_backtraces};
use crate::servers::tools::Tools;
use crate::servers::{Ask, Running};

/// Connections, for both clients.
const CONNECTIONS: &str = "16";

/// How long and how often is measured. Whole seconds: the clients take no others.
#[derive(Clone, Copy)]
pub(crate) struct Pace {
    /// Rounds at saturation.
    pub(crate) rounds: usize,
    /// Rounds of the open loop.
    pub(crate) tail_rounds: usize,
    /// How long a round counts.
    pub(crate) round: Duration,
    /// What runs before it counts.
    pub(crate) warm_up: Duration,
}

/// What a server does at saturation.
pub(crate) struct Load {
    /// Requests per second.
    pub(crate) rate: f64,
    /// CPU time of the server for one request, microseconds.
    pub(crate) cpu_us: f64,
}

/// Times of an open loop.
pub(crate) enum Tail {
    Of {
        p50_us: f64,
        p99_us: f64,
    },
    /// The generator itself was late, or answers were wrong.
    Invalid(String),
}

/// What sends requests.
pub(crate) struct Client<'a> {
    tools: &'a Tools,
    pace: Pace,
    /// What makes `wrk` post.
    script: Option<PathBuf>,
}

impl<'a> Client<'a> {
    /// Leaves what it needs in `dir`.
    pub(crate) fn new(tools: &'a Tools, pace: Pace, ask: &Ask, dir: &Path) -> anyhow::Result<Self> {
        let Some(body) = ask.body else { return Ok(Self { tools, pace, script: None }) };
        let script = dir.join("post.lua");
        let text = format!(
            "wrk.method = \"POST\"\nwrk.headers[\"content-type\"] = \"application/json\"\nwrk.body = [==[{body}]==]\n"
        );
        std::fs::write(&script, text)?;
        Ok(Self { tools, pace, script: Some(script) })
    }

    /// As many requests as go.
    pub(crate) fn saturate(&self, server: &Running) -> anyhow::Result<Load> {
        self.wrk(server, self.pace.warm_up)?;
        let before = server.cpu()?;
        let (rate, requests) = self.wrk(server, self.pace.round)?;
        let used = server.cpu()? - before;
        Ok(Load { rate, cpu_us: used.as_secs_f64() * 1e6 / requests })
    }

    /// Requests per second, and requests.
    fn wrk(&self, server: &Running, duration: Duration) -> anyhow::Result<(f64, f64)> {
        let mut command = on_client_core();
        command.arg(&self.tools.wrk).args(["-t1", "-c", CONNECTIONS]).arg(format!("-d{}s", duration.as_secs()));
        if let Some(script) = &self.script {
            command.arg("-s").arg(script);
        }
        let output = command.arg(&server.url).output()?;
        let text = String::from_utf8_lossy(&output.stdout);
        ensure!(output.status.success(), "wrk: {}", String::from_utf8_lossy(&output.stderr));
        if let Some(wrong) = text.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors")) {
            bail!("{}: {}", server.url, wrong.trim());
        }
        let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
        let requests = text.lines().find_map(|line| Some(line.trim().split_once(" requests in ")?.0));
        let rate = rate.context("wrk says no rate")?.trim().parse()?;
        Ok((rate, requests.context("wrk says no number of requests")?.parse()?))
    }

    /// Times at `rate` requests per second, evenly spaced, counted from when each was due. GET only.
    pub(crate) fn paced(&self, server: &Running, rate: f64) -> anyhow::Result<Tail> {
        self.wrk(server, self.pace.warm_up)?;
        self.paced_only(server, rate)
    }

    /// The same of a server that is asked by others, and warm.
    pub(crate) fn paced_only(&self, server: &Running, rate: f64) -> anyhow::Result<Tail> {
        self.paced_with(&[&server.url], rate)
    }

    /// The same of one of several apps, by its host.
    pub(crate) fn paced_at(&self, server: &Running, host: &str, rate: f64) -> anyhow::Result<Tail> {
        let (url, address) = server.url_at(host)?;
        self.paced_with(&[&url, "--connect", &address.to_string()], rate)
    }

    fn paced_with(&self, target: &[&str], rate: f64) -> anyhow::Result<Tail> {
        let mut command = on_client_core();
        command.arg(&self.tools.selvage).arg("loadtest").args(target).args(["--even", "-o", "json"]);
        command.args(["--connections", CONNECTIONS, "--rate"]).arg(format!("{rate:.0}"));
        command.arg("--duration").arg(self.pace.round.as_secs().to_string());
        // Its exit code says whether the run counts; so does the report, and why.
        let output = command.output()?;
        let report: Value = serde_json::from_slice(&output.stdout)
            .with_context(|| format!("selvage loadtest: {}", String::from_utf8_lossy(&output.stderr)))?;
        if !output.status.success() {
            let reason = report["reason"].as_str().unwrap_or("wrong answers");
            return Ok(Tail::Invalid(reason.to_owned()));
        }
        let latency = |name: &str| report["total"]["latency"][name].as_f64().with_context(|| format!("no {name}"));
        Ok(Tail::Of { p50_us: latency("p50_us")?, p99_us: latency("p99_us")? })
    }
}

fn on_client_core() -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", CLIENT_CORE]);
    without_backtraces(&mut command);
    command
}
