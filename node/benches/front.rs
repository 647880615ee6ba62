//! What the front costs: requests, handshakes, bodies and idle connections over TLS and QUIC, beside bare hyper, bare
//! rustls, `quinn` with `h3`, nginx and Caddy.
//!
//! `cargo bench -p selvage-node --bench front`; what else it needs it says. `-- WORD...` measures only the parts whose name
//! has one of the words (`requests`, `handshakes`, `bodies`, `idle`); `-- --quick` shows that everything runs, and no more.
//! Server on core 0, client on core 1, loopback. Our front and the bare ones are this very program, started again, so
//! that allocator and compiler are the same; all bounds of the front are on. Clients: `h2load` (Debian: nghttp2-client) for
//! HTTP/1.1 and 2, which needs less CPU than any of the servers; for HTTP/3 and handshakes one of our own, on quinn and
//! rustls. CPU time is what the kernel counts for the server's process: neighbours disturb it less than a rate.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

mod aim;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod figures;
mod fronts;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;

use std::time::Duration;

use anyhow::Context;

use aim::Aim;
use figures::{Figure, look, say, settle};
use fronts::load::{Client, Version};
use fronts::shakes::{self, Group};
use fronts::{Kind, Paths, held};

/// The allocator of the program.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The argument that makes the rounds too short to say anything.
const QUICK: &str = "--quick";
/// Bytes of the large answer.
const MIB: f64 = 1_048_576.0;

/// How long and how often is measured.
#[derive(Clone, Copy)]
struct Pace {
    rounds: usize,
    round: Duration,
}

const PACE: Pace = Pace { rounds: 5, round: Duration::from_secs(3) };
const PACE_QUICK: Pace = Pace { rounds: 1, round: Duration::from_secs(1) };

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    if arguments.first().is_some_and(|first| first == fronts::ARGUMENT) {
        return fronts::serve(&arguments[1..]);
    }
    settle()?;
    let is_quick = arguments.iter().any(|flag| flag == QUICK);
    let pace = if is_quick { PACE_QUICK } else { PACE };
    if is_quick {
        say("rounds too short to judge anything: this shows that it runs");
    }
    let words: Vec<&String> = arguments.iter().filter(|word| !word.starts_with('-')).collect();
    let wanted = |name: &str| words.is_empty() || words.iter().any(|word| name.contains(word.as_str()));
    // Also for the servers, which inherit it.
    held::raise_descriptors();
    let dir = tempfile::tempdir()?;
    let paths = Paths::find(dir.path())?;
    look("before")?;
    if wanted("requests") {
        requests(&paths, pace)?;
    }
    if wanted("handshakes") {
        handshakes(&paths, pace)?;
    }
    if wanted("bodies") {
        bodies(&paths, pace)?;
    }
    if wanted("idle") {
        idle(&paths, is_quick)?;
    }
    look("after")
}

/// A server beside ours, and how many times as many requests ours shall answer.
struct Peer {
    kind: Kind,
    aims: [Option<f64>; 3],
}

const PEERS: [Peer; 4] = [
    Peer { kind: Kind::Node, aims: [None; 3] },
    Peer { kind: Kind::Probe, aims: [Some(0.9), Some(0.9), Some(0.95)] },
    Peer { kind: Kind::Nginx, aims: [Some(0.9), Some(0.9), None] },
    Peer { kind: Kind::Caddy, aims: [Some(2.0), Some(6.0), Some(3.0)] },
];

/// Rounds of one server.
#[derive(Default)]
struct Row {
    rate: Figure,
    cpu_us: Figure,
}

fn requests(paths: &Paths, pace: Pace) -> anyhow::Result<()> {
    for (place, version) in Version::ALL.into_iter().enumerate() {
        let shown = (pace.rounds, pace.round);
        say(format_args!("requests of 1 KiB over {}, {} rounds of {:?}", version.name(), shown.0, shown.1));
        let peers: Vec<&Peer> = PEERS.iter().filter(|peer| version.is_of(peer.kind) && paths.has(peer.kind)).collect();
        let mut rows: Vec<Row> = peers.iter().map(|_| Row::default()).collect();
        for _ in 0..pace.rounds {
            for (peer, row) in peers.iter().zip(&mut rows) {
                let done = measure(paths, peer.kind, version, "/", pace)?;
                row.rate.push(done.rate);
                row.cpu_us.push(done.cpu.as_secs_f64() * 1e6 / done.requests);
            }
        }
        let ours = (rows[0].rate.median(), rows[0].cpu_us.median());
        for (peer, row) in peers.iter().zip(&rows) {
            let (name, rate, cpu_us) = (peer.kind.name(), row.rate.median(), row.cpu_us.median());
            say(format_args!("  {name:<28} {rate:>8.0}/s{}  CPU {cpu_us:.1} µs a request", row.rate.doubt()));
            if peer.kind == Kind::Node {
                continue;
            }
            let (by_rate, by_cpu) = (ours.0 / rate, cpu_us / ours.1);
            let aim = peer.aims[place].map(|aim| Aim::AtLeast(aim).judge(by_cpu, "x").to_string());
            let aim = aim.unwrap_or_default();
            say(format_args!("  {:<28} ours is {by_rate:.2}x of it, by CPU time {by_cpu:.2}x  {aim}", ""));
        }
    }
    Ok(())
}

/// What one round brought.
struct Done {
    requests: f64,
    rate: f64,
    cpu: Duration,
}

fn measure(paths: &Paths, kind: Kind, version: Version, path: &str, pace: Pace) -> anyhow::Result<Done> {
    let server = paths.start(kind)?;
    let client = Client { version, port: server.port, path };
    client.run(pace.round / 3)?;
    let before = server.cpu()?;
    let requests = client.run(pace.round).with_context(|| format!("{} over {}", kind.name(), version.name()))?;
    let cpu = server.cpu()? - before;
    Ok(Done { requests, rate: requests / pace.round.as_secs_f64(), cpu })
}

fn handshakes(paths: &Paths, pace: Pace) -> anyhow::Result<()> {
    for group in Group::ALL {
        for is_resumed in [false, true] {
            let mut rows = [Figure::default(), Figure::default()];
            for _ in 0..pace.rounds {
                for (kind, row) in [Kind::Node, Kind::Rustls].into_iter().zip(&mut rows) {
                    let server = paths.start(kind)?;
                    let client = shakes::Client::new(server.port, group, is_resumed)?;
                    let before = server.cpu()?;
                    let count = client.run(pace.round)?;
                    row.push((server.cpu()? - before).as_secs_f64() * 1e6 / count);
                }
            }
            let [ours, bare] = rows;
            let (what, us, bare_us) = (if is_resumed { "resumed" } else { "full" }, ours.median(), bare.median());
            let mut line = format!("handshakes {what}, {}: CPU {us:.0} µs, {:.0}/s a core", group.name(), 1e6 / us);
            line += &format!("; bare rustls {bare_us:.0} µs; ours {}", Aim::AtLeast(0.95).judge(bare_us / us, "x"));
            line += &format!(" ({:.2}x)", bare_us / us);
            if group == Group::Hybrid {
                line += &format!("; {}", Aim::AtLeast(8_000.0).judge(1e6 / us, "/s"));
            }
            say(line);
        }
    }
    Ok(())
}

fn bodies(paths: &Paths, pace: Pace) -> anyhow::Result<()> {
    for (version, aim) in [(Version::H1, None), (Version::H2, Some(0.5)), (Version::H3, Some(1.5))] {
        for kind in PEERS.iter().map(|peer| peer.kind).filter(|kind| version.is_of(*kind) && paths.has(*kind)) {
            let mut ns = Figure::default();
            for _ in 0..pace.rounds {
                let done = measure(paths, kind, version, fronts::MIB_PATH, pace)?;
                ns.push(done.cpu.as_secs_f64() * 1e9 / (done.requests * MIB));
            }
            let judged = aim.filter(|_| kind == Kind::Node).map(|aim| Aim::AtMost(aim).judge(ns.median(), " ns"));
            let judged = judged.map(|judged| judged.to_string()).unwrap_or_default();
            let (name, ns) = (kind.name(), ns.median());
            say(format_args!("bodies of 1 MiB over {}: {name:<28} CPU {ns:.2} ns a byte  {judged}", version.name()));
        }
    }
    Ok(())
}

fn idle(paths: &Paths, is_quick: bool) -> anyhow::Result<()> {
    for version in [Version::H1, Version::H2] {
        let server = paths.start(Kind::Node)?;
        let wanted = if is_quick { 200 } else { held::CONNECTIONS };
        let held = held::hold(&server, version, wanted)?;
        let count = held.count;
        say(format_args!("idle over {}: {count} connections, each after one answer", version.name()));
        for (when, kib) in [("at once", held.kib_fresh), ("rested", held.kib_rested)] {
            let mib = kib * f64::from(held::CONNECTIONS) / 1_024.0;
            let judged = Aim::AtMost(600.0).judge(mib, " MiB");
            say(format_args!("  {when:<8} {kib:.1} KiB each; {mib:.0} MiB for {}, {judged}", held::CONNECTIONS));
        }
        if count < wanted {
            say(format_args!(
                "  {wanted} were wanted, but a process may have only {} descriptors here",
                held.descriptors
            ));
        }
    }
    Ok(())
}
