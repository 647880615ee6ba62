//! What a neighbour costs: the times of an app that few ask, alone and beside one that uses all it can get.
//!
//! `cargo build --release && cargo bench -p selvage-node --bench neighbour`; `-- --quick` shows that it runs. One node on
//! core 0, both clients on core 1. Times count from the moment that each request was due. In each round every situation
//! has its turn, so that whatever disturbs the machine disturbs all of them. The components stand in one app, so what is
//! seen is their pools and how their guests share a core; that one app leaves others their places is for `admit.rs` to
//! show.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

#[allow(dead_code, reason = "each bench asks for a part of it")]
mod aim;
mod figures;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod load;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod servers;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context;

use aim::Aim;
use figures::{CLIENT_CORE, Figure, ROUNDS, look, say, settle, tree, without_backtraces};
use load::{Client, Pace, Tail};
use servers::tools::Tools;
use servers::{Ask, kinds};

/// The argument that makes the rounds too short to say anything.
const QUICK: &str = "--quick";
/// Requests a second of the app that is watched.
const RATE: f64 = 100.0;
/// Of the one that asks a hundred times as often.
const RATE_CHEAP: &str = "10000";
/// How far a neighbour may move the watched app's p99.
const P99: Aim = Aim::AtMost(2.0);
/// How long a neighbour is there before anything counts.
const BEGIN: Duration = Duration::from_secs(1);
/// Longer than everything here, seconds: a neighbour ends when it is ended.
const LONG_S: &str = "600";
const ASK: Ask = Ask { path: "/", body: None, answer: "hello" };
/// The app: what is watched, the same once more for the neighbour, and guests that compute until a limit.
const MANIFEST: &str = r#"spin_manifest_version = 2
[application]
name = "neighbours"
[[trigger.http]]
route = "/"
component = "watched"
[[trigger.http]]
route = "/cheap"
component = "cheap"
[[trigger.http]]
route = "/burn"
component = "burn"
[[trigger.http]]
route = "/short"
component = "short"
[component.watched]
source = "plain.wasm"
[component.cheap]
source = "plain.wasm"
[component.burn]
source = "burn.wasm"
[component.short]
source = "burn.wasm"
[component.short.tool.selvage.limits]
cpu_ms = 10
"#;

/// Who else asks meanwhile.
#[derive(Clone, Copy)]
enum Neighbour {
    Nobody,
    /// Cheap requests, evenly spaced.
    Even,
    /// As many as go over 64 connections of what answers at this path.
    Greedy(&'static str),
}

const SITUATIONS: [(&str, Neighbour); 5] = [
    ("alone", Neighbour::Nobody),
    ("beside a hundred times as many cheap requests", Neighbour::Even),
    ("beside as many cheap requests as go", Neighbour::Greedy("/cheap")),
    ("beside 64 that burn a second of CPU each", Neighbour::Greedy("/burn")),
    ("beside 64 that end at cpu_ms = 10", Neighbour::Greedy("/short")),
];

fn main() -> anyhow::Result<()> {
    settle()?;
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(missing) => {
            say(format_args!("skipped: {missing}"));
            return Ok(());
        }
    };
    let is_quick = std::env::args().any(|word| word == QUICK);
    let (rounds, seconds) = if is_quick { (1, 1) } else { (ROUNDS, 10) };
    let pace =
        Pace { rounds, tail_rounds: rounds, round: Duration::from_secs(seconds), warm_up: Duration::from_secs(1) };
    let dir = tempfile::tempdir()?;
    let manifest = app(dir.path())?;
    let server = kinds::selvage(&tools.selvage, "selvage up", &manifest, dir.path());
    let client = Client::new(&tools, pace, &ASK, dir.path())?;
    look("before")?;
    say(format_args!("examples/plain at {RATE} requests/s, {rounds} rounds of {seconds} s, µs"));
    let mut rows = vec![(Figure::default(), Figure::default()); SITUATIONS.len()];
    for _ in 0..rounds {
        for ((name, neighbour), (p50, p99)) in SITUATIONS.iter().zip(&mut rows) {
            let running = server.start(&ASK)?;
            let _neighbour = neighbour.begin(&tools, &running.url)?;
            match client.paced_only(&running, RATE)? {
                Tail::Of { p50_us, p99_us } => {
                    p50.push(p50_us);
                    p99.push(p99_us);
                }
                Tail::Invalid(reason) => say(format_args!("  {name}: a round does not count: {reason}")),
            }
        }
    }
    tell(&rows);
    look("after")
}

fn tell(rows: &[(Figure, Figure)]) {
    let alone = rows.first().map_or(f64::NAN, |(_, p99)| p99.median());
    for ((name, neighbour), (p50, p99)) in SITUATIONS.iter().zip(rows) {
        let (half, most, doubt) = (p50.median(), p99.median(), p99.doubt());
        let times = most / alone;
        let aim = match neighbour {
            Neighbour::Nobody => String::new(),
            _ => format!("  {times:.2}x, {}", P99.judge(times, "x")),
        };
        let (min, max) = (p99.min(), p99.max());
        say(format_args!("  {name:<46} p50 {half:>6.0}  p99 {most:>6.0}  ({min:.0} to {max:.0}){aim}{doubt}"));
    }
}

/// The app's manifest, with its components beside it.
fn app(dir: &Path) -> anyhow::Result<std::path::PathBuf> {
    let plain = tree().join("examples/plain/plain.wasm");
    std::fs::copy(&plain, dir.join("plain.wasm")).with_context(|| format!("copy {}", plain.display()))?;
    std::fs::write(dir.join("burn.wasm"), wat::parse_file(tree().join("node/tests/guests/burn.wat"))?)?;
    let manifest = dir.join("spin.toml");
    std::fs::write(&manifest, MANIFEST)?;
    Ok(manifest)
}

impl Neighbour {
    /// Lets it ask until what comes back is dropped.
    fn begin(self, tools: &Tools, url: &str) -> anyhow::Result<Option<Asking>> {
        let mut command = Command::new("taskset");
        command.args(["-c", CLIENT_CORE]);
        let url = url.trim_end_matches('/');
        match self {
            Self::Nobody => return Ok(None),
            Self::Even => {
                command.arg(&tools.selvage).arg("loadtest").arg(format!("{url}/cheap"));
                command.args(["--even", "--connections", "64", "--rate", RATE_CHEAP, "--duration", LONG_S]);
            }
            Self::Greedy(path) => {
                command.arg(&tools.wrk).args(["-t1", "-c64", "--timeout", LONG_S, "-d", LONG_S]);
                command.arg(format!("{url}{path}"));
            }
        }
        without_backtraces(&mut command).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        let asking = Asking(command.spawn()?);
        std::thread::sleep(BEGIN);
        Ok(Some(asking))
    }
}

/// A neighbour that asks. It ends when this is dropped.
struct Asking(Child);

impl Drop for Asking {
    fn drop(&mut self) {
        // It may have ended by itself; then there is nothing to end.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}
