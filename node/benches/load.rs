//! The clients: `wrk` for what a server can do at most, `selvage loadtest` for how long an answer takes below that.

use std::process::Command;
use std::time::Duration;

use anyhow::{Context, bail, ensure};
use serde_json::Value;

use crate::figures::{CLIENT_CORE, without_backtraces};
use crate::servers::{Running, Tools};

/// How long a round counts.
pub(crate) const ROUND: Duration = Duration::from_secs(3);
/// What runs before it counts.
const WARM_UP: Duration = Duration::from_secs(1);
/// Connections, for both clients.
const CONNECTIONS: &str = "16";

/// Times of an open loop.
pub(crate) enum Tail {
    Of {
        p50_us: f64,
        p99_us: f64,
    },
    /// The generator itself was late, or answers were wrong.
    Invalid(String),
}

/// Requests per second, as many as go.
pub(crate) fn saturate(tools: &Tools, server: &Running) -> anyhow::Result<f64> {
    wrk(tools, server, WARM_UP)?;
    wrk(tools, server, ROUND)
}

fn wrk(tools: &Tools, server: &Running, duration: Duration) -> anyhow::Result<f64> {
    let mut command = on_client_core();
    command.arg(&tools.wrk).args(["-t1", "-c", CONNECTIONS]).arg(format!("-d{}s", duration.as_secs())).arg(&server.url);
    let output = command.output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success(), "wrk: {}", String::from_utf8_lossy(&output.stderr));
    if let Some(wrong) = text.lines().find(|line| line.contains("Non-2xx") || line.contains("Socket errors")) {
        bail!("{}: {}", server.url, wrong.trim());
    }
    let rate = text.lines().find_map(|line| line.trim().strip_prefix("Requests/sec:"));
    Ok(rate.context("wrk says no rate")?.trim().parse()?)
}

/// Times at `rate` requests per second, evenly spaced, counted from when each was due.
pub(crate) fn paced(tools: &Tools, server: &Running, rate: f64) -> anyhow::Result<Tail> {
    wrk(tools, server, WARM_UP)?;
    let mut command = on_client_core();
    command.arg(&tools.selvage).args(["loadtest", &server.url, "--even", "--connections", CONNECTIONS, "-o", "json"]);
    command.arg("--rate").arg(format!("{rate:.0}")).arg("--duration").arg(ROUND.as_secs().to_string());
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

fn on_client_core() -> Command {
    let mut command = Command::new("taskset");
    command.args(["-c", CLIENT_CORE]);
    without_backtraces(&mut command);
    command
}
