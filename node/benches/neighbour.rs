//! What a neighbour costs: the times of an app that few ask, alone and beside one that uses all it can get.
//!
//! `cargo build --release && cargo bench -p selvage-node --bench neighbour`; `-- --quick` shows that it runs, `-- WORD...`
//! measures only the situations that have one of the words in their names. One node on core 0, which is this very program
//! started again, with an app for each neighbour; both clients on core 1, the one that only asks as much as it can behind
//! the one that measures. Times count from the moment that each request was due. In each round every situation has its
//! turn, so that whatever disturbs the machine disturbs all of them.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

#[allow(dead_code, reason = "each bench asks for a part of it")]
mod aim;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod apps;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod asking;
mod crowd;
mod figures;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod load;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod servers;

use std::time::{Duration, Instant};

use aim::Aim;
use asking::Asking;
use crowd::App;
use figures::{Figure, ROUNDS, look, say, settle};
use load::{Client, Pace, Tail};
use servers::tools::Tools;
use servers::{Ask, Server, kinds};

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The argument that makes the rounds too short to say anything.
const QUICK: &str = "--quick";
/// Requests a second of the app that is watched.
const RATE: f64 = 100.0;
/// Of the one that asks a hundred times as often.
const RATE_CHEAP: u32 = 10_000;
/// How far a neighbour may move the watched app's p99.
const P99: Aim = Aim::AtMost(2.0);
/// Share of the core from which on it is full.
const FULL: f64 = 0.9;
const ASK: Ask = Ask { path: "/", body: None, answer: "hello" };

/// Who else asks meanwhile.
#[derive(Clone, Copy)]
enum Neighbour {
    Nobody,
    /// Cheap requests, evenly spaced.
    Even(App),
    /// As many as go over so many connections.
    Greedy(App, u32),
}

/// Who is watched, beside whom.
struct Situation {
    name: &'static str,
    watched: App,
    neighbour: Neighbour,
}

const fn of(name: &'static str, watched: App, neighbour: Neighbour) -> Situation {
    Situation { name, watched, neighbour }
}

const SITUATIONS: [Situation; 9] = [
    of("fresh, alone", App::Watched, Neighbour::Nobody),
    of("fresh, beside a hundred times as many cheap requests", App::Watched, Neighbour::Even(App::Cheap)),
    of("fresh, beside a flood over 64 connections", App::Watched, Neighbour::Greedy(App::Cheap, 64)),
    of("fresh, beside a flood over 256 connections", App::Watched, Neighbour::Greedy(App::Cheap, 256)),
    of("fresh, beside 64 that burn a second of CPU each", App::Watched, Neighbour::Greedy(App::Burn, 64)),
    of("fresh, beside 64 that end at cpu_ms = 10", App::Watched, Neighbour::Greedy(App::Short, 64)),
    of("reuse, alone", App::WatchedReuse, Neighbour::Nobody),
    of("reuse, beside a flood over 64 connections", App::WatchedReuse, Neighbour::Greedy(App::CheapReuse, 64)),
    of("reuse, beside a flood over 256 connections", App::WatchedReuse, Neighbour::Greedy(App::CheapReuse, 256)),
];

/// What came of one situation.
#[derive(Default, Clone)]
struct Row {
    p50: Figure,
    p99: Figure,
    /// Share of the server's core that the server used.
    core: Figure,
    /// Answers a second that the neighbour got and wanted, and how many others it got.
    goodput: Figure,
    unwanted: f64,
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == crowd::ARGUMENT) {
        return crowd::run(&arguments[1..]);
    }
    settle()?;
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(missing) => {
            say(format_args!("skipped: {missing}"));
            return Ok(());
        }
    };
    let is_quick = arguments.iter().any(|word| word == QUICK);
    let (rounds, seconds) = if is_quick { (1, 2) } else { (ROUNDS, 10) };
    let pace =
        Pace { rounds, tail_rounds: rounds, round: Duration::from_secs(seconds), warm_up: Duration::from_secs(1) };
    let words: Vec<&String> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    let is_wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    let wanted: Vec<_> = SITUATIONS.iter().filter(|situation| is_wanted(situation.name)).collect();
    let dir = tempfile::tempdir()?;
    let server = kinds::itself("a node with six apps", &[crowd::ARGUMENT.into(), dir.path().into()])?;
    let client = Client::new(&tools, pace, &ASK, dir.path())?;
    look("before")?;
    say(format_args!("examples/plain at {RATE} requests/s, {rounds} rounds of {seconds} s, µs"));
    let mut rows = vec![Row::default(); wanted.len()];
    for _ in 0..rounds {
        for (situation, row) in wanted.iter().zip(&mut rows) {
            round(situation, row, &tools, &server, &client)?;
        }
    }
    say("medians of the rounds:");
    tell(&wanted, &rows);
    look("after")
}

fn round(
    situation: &Situation,
    row: &mut Row,
    tools: &Tools,
    server: &Server,
    client: &Client<'_>,
) -> anyhow::Result<()> {
    let running = server.start(&ASK)?;
    let asking = match situation.neighbour {
        Neighbour::Nobody => None,
        Neighbour::Even(app) => Some(Asking::evenly(tools, &running, &app.host(), RATE_CHEAP)?),
        Neighbour::Greedy(app, connections) => Some(Asking::greedily(tools, &running, &app.host(), connections)?),
    };
    let (before, begun) = (running.cpu()?, Instant::now());
    let tail = client.paced_at(&running, &situation.watched.host(), RATE)?;
    let core = (running.cpu()? - before).as_secs_f64() / begun.elapsed().as_secs_f64();
    if let Some(answers) = asking.map(Asking::end).transpose()?.flatten() {
        row.goodput.push(answers.rate);
        row.unwanted += answers.unwanted;
    }
    match tail {
        Tail::Of { p50_us, p99_us } => {
            say(format_args!("  a round: {:<52} p50 {p50_us:>6.0}  p99 {p99_us:>6.0}", situation.name));
            row.p50.push(p50_us);
            row.p99.push(p99_us);
            row.core.push(core);
        }
        Tail::Invalid(reason) => say(format_args!("  {}: a round does not count: {reason}", situation.name)),
    }
    Ok(())
}

fn tell(situations: &[&Situation], rows: &[Row]) {
    let mut alone = f64::NAN;
    for (situation, row) in situations.iter().zip(rows) {
        let (half, most, doubt) = (row.p50.median(), row.p99.median(), row.p99.doubt());
        if most.is_nan() {
            say(format_args!("  {:<52} no round counted", situation.name));
            continue;
        }
        let is_alone = matches!(situation.neighbour, Neighbour::Nobody);
        if is_alone {
            alone = most;
        }
        let times = most / alone;
        let aim = if is_alone { String::new() } else { format!("  {times:.2}x, {}", P99.judge(times, "x")) };
        let (min, max) = (row.p99.min(), row.p99.max());
        say(format_args!(
            "  {:<52} p50 {half:>6.0}  p99 {most:>6.0}  ({min:.0} to {max:.0}){aim}{doubt}",
            situation.name
        ));
        let (core, goodput, unwanted) = (row.core.median(), row.goodput.median(), row.unwanted);
        if goodput.is_finite() {
            say(format_args!(
                "  {:<52} it got {goodput:.0} answers/s, and {unwanted:.0} that were no success in all",
                ""
            ));
        }
        let full = if core >= FULL { "full" } else { "not full" };
        say(format_args!("  {:<52} the core was {full}: {:.0} %", "", core * 100.0));
    }
}
