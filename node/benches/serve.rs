//! Requests per second of one core, whole process against whole process, beside `wasmtime serve`, workerd, nginx and
//! bare hyper.
//!
//! `cargo build --release && cargo bench -p selvage-node --bench serve`; what else it needs it says. `-- WORD...`
//! measures only the groups whose name has one of the words; `-- --quick` shows that everything runs, and no more.
//! Server on core 0, client on core 1, loopback, HTTP/1.1 without TLS. In each round every server is started, measured
//! and ended in turn, so that whatever disturbs the machine disturbs all of them. CPU time of a request is what the
//! kernel counts for the server's process: neighbours on the machine disturb it less than the rate.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

mod aim;
mod figures;
mod groups;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod load;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod servers;

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use figures::{Figure, ROUNDS, look, say, settle};
use groups::{Group, groups};
use load::{Client, Load, Pace, Tail};
use servers::hyper;
use servers::tools::Tools;

/// The argument that makes the rounds too short to say anything.
const QUICK: &str = "--quick";
/// What is measured.
const PACE: Pace =
    Pace { rounds: ROUNDS, tail_rounds: 3, round: Duration::from_secs(3), warm_up: Duration::from_secs(1) };
/// The least that runs everything once.
const PACE_QUICK: Pace =
    Pace { rounds: 1, tail_rounds: 1, round: Duration::from_secs(1), warm_up: Duration::from_secs(1) };
/// Of Selvage's rate at saturation, where the tails are looked at.
const TAIL_SHARE: f64 = 0.5;
/// Of a server's own rate at saturation, the most at which its tail says something.
const TAIL_SHARE_MAX: f64 = 0.8;

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(hyper::ARGUMENT) {
        let port = arguments.next().context("no port")?.parse()?;
        return hyper::run(port);
    }
    settle()?;
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(missing) => {
            say(format_args!("skipped: {missing}"));
            return Ok(());
        }
    };
    let (flags, words): (Vec<String>, Vec<String>) = std::env::args().skip(1).partition(|word| word.starts_with('-'));
    let is_quick = flags.iter().any(|flag| flag == QUICK);
    let pace = if is_quick { PACE_QUICK } else { PACE };
    if is_quick {
        say("rounds too short to judge anything: this shows that it runs");
    }
    let dir = tempfile::tempdir()?;
    look("before")?;
    for group in groups(&tools, dir.path())? {
        if words.is_empty() || words.iter().any(|word| group.name.contains(word.as_str())) {
            measure(&tools, pace, &group, dir.path())?;
        }
    }
    look("after")
}

/// The rounds of one server.
#[derive(Default, Clone)]
struct Row {
    rate: Figure,
    cpu_us: Figure,
    p50_us: Figure,
    p99_us: Figure,
}

fn measure(tools: &Tools, pace: Pace, group: &Group, dir: &Path) -> anyhow::Result<()> {
    let client = Client::new(tools, pace, &group.ask, dir)?;
    let mut rows = vec![Row::default(); group.servers.len()];
    for _ in 0..pace.rounds {
        for (server, row) in group.servers.iter().zip(&mut rows) {
            let Load { rate, cpu_us } = client.saturate(&server.start(&group.ask)?)?;
            row.rate.push(rate);
            row.cpu_us.push(cpu_us);
        }
    }
    tell_rates(group, pace, &rows);
    if group.ask.body.is_none() {
        tails(&client, pace, group, &mut rows)?;
    }
    Ok(())
}

fn tell_rates(group: &Group, pace: Pace, rows: &[Row]) {
    let (path, rounds, round) = (group.ask.path, pace.rounds, pace.round);
    say(format_args!("{}, {path}: requests/s, 16 connections, {rounds} rounds of {round:?}", group.name));
    let ours = &rows[0];
    for (server, row) in group.servers.iter().zip(rows) {
        let (name, rate, cpu_us, doubt) = (&server.name, row.rate.median(), row.cpu_us.median(), row.rate.doubt());
        let (min, max) = (row.rate.min(), row.rate.max());
        say(format_args!("  {name:<36} {rate:>8.0}  ({min:.0} to {max:.0})  CPU {cpu_us:.1} µs a request{doubt}"));
        if std::ptr::eq(row, ours) {
            continue;
        }
        let (times, by_cpu) = (ours.rate.median() / rate, cpu_us / ours.cpu_us.median());
        let aim = server.rate_aim.map(|aim| format!("  {}", aim.judge(times, "x")));
        let aim = aim.unwrap_or_default();
        say(format_args!("  {:<36} selvage is {times:.2}x of it, by CPU time {by_cpu:.2}x{aim}", ""));
    }
}

/// The open loop: the same rate for all, half of what Selvage can do.
fn tails(client: &Client<'_>, pace: Pace, group: &Group, rows: &mut [Row]) -> anyhow::Result<()> {
    let rate = rows[0].rate.median() * TAIL_SHARE;
    say(format_args!("  at {rate:.0} requests/s, evenly spaced, from the moment each was due, µs"));
    for _ in 0..pace.tail_rounds {
        for (server, row) in group.servers.iter().zip(&mut *rows) {
            if rate > row.rate.median() * TAIL_SHARE_MAX {
                continue;
            }
            match client.paced(&server.start(&group.ask)?, rate)? {
                Tail::Of { p50_us, p99_us } => {
                    row.p50_us.push(p50_us);
                    row.p99_us.push(p99_us);
                }
                Tail::Invalid(reason) => say(format_args!("  {}: a round does not count: {reason}", server.name)),
            }
        }
    }
    let ours = rows[0].p99_us.median();
    for (server, row) in group.servers.iter().zip(rows) {
        let (name, p50, p99) = (&server.name, row.p50_us.median(), row.p99_us.median());
        if p99.is_nan() {
            say(format_args!("  {name:<36} not measured: too near its saturation, or no round counts"));
            continue;
        }
        let aim =
            server.tail_aim.map(|aim| format!("  selvage's p99 {:.2}x, {}", ours / p99, aim.judge(ours / p99, "x")));
        let (min, max, doubt) = (row.p99_us.min(), row.p99_us.max(), row.p99_us.doubt());
        let aim = aim.unwrap_or_default();
        say(format_args!("  {name:<36} p50 {p50:>6.0}  p99 {p99:>6.0}  ({min:.0} to {max:.0}){aim}{doubt}"));
    }
    Ok(())
}
