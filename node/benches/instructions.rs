//! Instructions of one request, whole process against whole process: a figure that no neighbour on the machine moves.
//!
//! `cargo build --release && cargo bench -p selvage-node --bench instructions`, with Debian's `valgrind`; `-- WORD...`
//! counts only what has one of the words in its name. Counted is what the server's process does in user space while it
//! answers over 8 connections, the kernel's part not. `wasmtime serve` is optimised across crates, so the fair comparison
//! is with the `deploy` profile: `cargo build --profile deploy`, and `SELVAGE_BIN=target/deploy/selvage`.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

#[allow(dead_code, reason = "each bench asks for a part of it")]
mod aim;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod figures;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod servers;

use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};

use figures::{CLIENT_CORE, say, settle, tree, without_backtraces};
use servers::kinds::{FRESH_P3, REUSED};
use servers::tools::Tools;
use servers::{Ask, Running, Server};

/// What is asked before anything counts, and what counts.
const WARM_UP: Duration = Duration::from_secs(4);
const COUNTED: Duration = Duration::from_secs(6);
/// callgrind's dump of what was counted, beside the file that it is told.
const DUMP: &str = "out.1";
const ASK: Ask = Ask { path: "/", body: None, answer: "hello" };

fn main() -> anyhow::Result<()> {
    settle()?;
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(missing) => {
            say(format_args!("skipped: {missing}"));
            return Ok(());
        }
    };
    if Command::new("valgrind").arg("--version").output().is_err() {
        say("skipped: no valgrind: apt-get install valgrind");
        return Ok(());
    }
    let words: Vec<String> = std::env::args().skip(1).filter(|word| !word.starts_with('-')).collect();
    let dir = tempfile::tempdir()?;
    for (name, servers) in groups(&tools, dir.path())? {
        if !words.is_empty() && !words.iter().any(|word| name.contains(word.as_str())) {
            continue;
        }
        say(name);
        for server in servers {
            // Once without callgrind, so that no compilation is under it.
            drop(server.start(&ASK)?);
            let name = server.name.clone();
            match count(&tools, server, dir.path()) {
                Ok(each) => say(format_args!("  {each}")),
                // A machine that is busy with others lets a server that is that much slower miss its limits.
                Err(error) => say(format_args!("  {name:<40} does not count: {error:#}")),
            }
        }
    }
    Ok(())
}

/// What is counted: Selvage first, what it is compared with behind it.
fn groups(tools: &Tools, dir: &Path) -> anyhow::Result<Vec<(&'static str, Vec<Server>)>> {
    let example = |name: &str| tree().join(format!("examples/{name}/{name}.wasm"));
    let (plain, p3) = (example("plain"), example("plain-p3"));
    Ok(vec![
        ("plain fresh", vec![tools.fresh(&plain, dir), tools.wasmtime("wasmtime serve", &plain, &["-Scli"], dir)]),
        (
            "plain reuse",
            vec![tools.reused(&plain, dir)?, tools.wasmtime("wasmtime serve, reused", &plain, &REUSED, dir)],
        ),
        (
            "plain-p3 fresh",
            vec![
                tools.fresh_told_nothing(&p3, dir)?,
                tools.fresh(&p3, dir),
                tools.wasmtime("wasmtime serve, fresh instances", &p3, &FRESH_P3, dir),
            ],
        ),
        (
            "plain-p3 reuse",
            vec![
                tools.reused_told_nothing(&p3, dir)?,
                tools.reused(&p3, dir)?,
                tools.wasmtime("wasmtime serve (reuses 128 times)", &p3, &["-Scli", "-Sp3"], dir),
            ],
        ),
    ])
}

/// Counts one server, and says what came.
fn count(tools: &Tools, server: Server, dir: &Path) -> anyhow::Result<String> {
    let (name, dump) = (server.name.clone(), dir.join(DUMP));
    let out = format!("--callgrind-out-file={}", dir.join("out").display());
    let wrapped = server.wrapped(&["valgrind", "--tool=callgrind", "--instr-atstart=no", &out]);
    let running = wrapped.start(&ASK)?;
    ask(tools, &running, WARM_UP)?;
    control(&running, &["-i", "on"])?;
    let requests = ask(tools, &running, COUNTED)?;
    control(&running, &["-i", "off"])?;
    control(&running, &["-d"])?;
    ensure!(requests > 0.0, "no request was answered");
    let counts = std::fs::read_to_string(&dump).context("callgrind left no dump")?;
    std::fs::remove_file(&dump)?;
    let total = counts.lines().find_map(|line| line.strip_prefix("totals: ")).context("callgrind counted nothing")?;
    let each = total.trim().parse::<f64>()? / requests;
    Ok(format!("{name:<40} {:>6.0}k instructions a request, of {requests} requests", each / 1e3))
}

/// Sends as many requests as go, and says how many went.
fn ask(tools: &Tools, running: &Running, duration: Duration) -> anyhow::Result<f64> {
    let mut command = Command::new("taskset");
    command.args(["-c", CLIENT_CORE]).arg(&tools.wrk).args(["-t1", "-c8"]).arg(format!("-d{}s", duration.as_secs()));
    let output = without_backtraces(&mut command).arg(&running.url).output()?;
    let text = String::from_utf8_lossy(&output.stdout);
    ensure!(output.status.success() && !text.contains("Non-2xx"), "wrk: {text}");
    let requests = text.lines().find_map(|line| Some(line.trim().split_once(" requests in ")?.0));
    Ok(requests.context("wrk says no number of requests")?.parse()?)
}

fn control(running: &Running, arguments: &[&str]) -> anyhow::Result<()> {
    let output = Command::new("callgrind_control").args(arguments).arg(running.pid().to_string()).output()?;
    ensure!(output.status.success(), "callgrind_control: {}", String::from_utf8_lossy(&output.stderr));
    Ok(())
}
