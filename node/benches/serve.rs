//! Requests per second of one core, whole process against whole process, beside `wasmtime serve` and bare hyper.
//!
//! `cargo build --release && cargo bench -p selvage-node --bench serve`; what else it needs it says. Server on core 0,
//! client on core 1, loopback, HTTP/1.1 without TLS. In each round every server is started, measured and ended in turn,
//! so that whatever disturbs the machine disturbs all of them.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

mod figures;
mod load;
mod servers;

use anyhow::Context;

use figures::{Figure, ROUNDS, look, say, settle, tree};
use load::Tail;
use servers::{Server, Tools};

/// The argument that makes this program the bare server, and the port after it.
const HYPER: &str = "--hyper";
/// Rounds of the open loop.
const TAIL_ROUNDS: usize = 3;

/// A component, and the servers that run it.
struct Group {
    name: &'static str,
    path: &'static str,
    servers: Vec<Server>,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    if arguments.next().as_deref() == Some(HYPER) {
        let port = arguments.next().context("no port")?.parse()?;
        return servers::hyper::run(port);
    }
    settle()?;
    let tools = match Tools::find() {
        Ok(tools) => tools,
        Err(missing) => {
            say(format_args!("skipped: {missing}"));
            return Ok(());
        }
    };
    let wanted: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let dir = tempfile::tempdir()?;
    look("before")?;
    for group in groups(&tools, dir.path())? {
        if wanted.is_empty() || wanted.iter().any(|name| group.name.contains(name.as_str())) {
            measure(&tools, &group)?;
        }
    }
    look("after")
}

/// The components. None imports anything but WASI: `wasmtime serve` has no `fermyon:spin/variables`, which
/// `examples/hello` reads. `gate` is the same kind of thing (Rust, Spin's SDK) and its `/public/x` a fixed text.
fn groups(tools: &Tools, dir: &std::path::Path) -> anyhow::Result<Vec<Group>> {
    let hello = dir.join("hello.wasm");
    std::fs::write(&hello, wat::parse_file(tree().join("node/tests/guests/hello.wat"))?)?;
    let gate = tree().join("examples/gate/gate.wasm");
    // Writes two lines to its log for each request: both sides pass them on, to where nobody reads. Or another one.
    let usual = tree().join("examples/hello-p3/hello-p3.wasm");
    let third = std::env::var_os("SELVAGE_BENCH_P3").map_or(usual, Into::into);
    Ok(vec![
        Group {
            name: "hello.wat, WASI 0.2, written by hand",
            path: "/",
            servers: vec![
                tools.selvage(&hello, dir),
                tools.wasmtime("wasmtime serve", &hello, &["-Scli"]),
                tools.wasmtime("wasmtime serve, best flags", &hello, &servers::TUNED),
                tools.wasmtime("wasmtime serve, instances reused", &hello, &servers::REUSED),
                tools.hyper()?,
            ],
        },
        Group {
            name: "gate, WASI 0.2, Rust",
            path: "/public/x",
            servers: vec![
                tools.selvage(&gate, dir),
                tools.wasmtime("wasmtime serve", &gate, &["-Scli"]),
                tools.wasmtime("wasmtime serve, best flags", &gate, &servers::TUNED),
                tools.wasmtime("wasmtime serve, instances reused", &gate, &servers::REUSED),
                tools.hyper()?,
            ],
        },
        Group {
            name: "hello-p3, WASI 0.3, Rust",
            path: "/",
            servers: vec![
                tools.selvage(&third, dir),
                tools.wasmtime("wasmtime serve (reuses 128 times)", &third, &["-Scli", "-Sp3"]),
                tools.wasmtime("wasmtime serve, fresh instances", &third, &servers::FRESH_P3),
                tools.hyper()?,
            ],
        },
    ])
}

fn measure(tools: &Tools, group: &Group) -> anyhow::Result<()> {
    let mut rates = vec![Figure::default(); group.servers.len()];
    for _ in 0..ROUNDS {
        for (server, rate) in group.servers.iter().zip(&mut rates) {
            let running = server.start(group.path)?;
            rate.push(load::saturate(tools, &running)?);
        }
    }
    say(format_args!(
        "{}, GET {}: requests/s, 16 connections, {ROUNDS} rounds of {:?}",
        group.name,
        group.path,
        load::ROUND
    ));
    let ours = rates[0].median();
    for (server, rate) in group.servers.iter().zip(&rates) {
        let (min, max) = (rate.min(), rate.max());
        let ratio = ours / rate.median();
        let (name, median, doubt) = (&server.name, rate.median(), rate.doubt());
        say(format_args!("  {name:<36} {median:>8.0}  ({min:.0} to {max:.0})  selvage is {ratio:.2}x{doubt}"));
    }
    let slowest = rates.iter().map(Figure::median).fold(f64::INFINITY, f64::min);
    tails(tools, group, slowest / 2.0)?;
    Ok(())
}

/// The open loop: the same rate for all, half of what the slowest can do.
fn tails(tools: &Tools, group: &Group, rate: f64) -> anyhow::Result<()> {
    let mut tails = vec![(Figure::default(), Figure::default()); group.servers.len()];
    for _ in 0..TAIL_ROUNDS {
        for (server, (p50, p99)) in group.servers.iter().zip(&mut tails) {
            let running = server.start(group.path)?;
            match load::paced(tools, &running, rate)? {
                Tail::Of { p50_us, p99_us } => {
                    p50.push(p50_us);
                    p99.push(p99_us);
                }
                Tail::Invalid(reason) => say(format_args!("  {}: a round does not count: {reason}", server.name)),
            }
        }
    }
    say(format_args!("  at {rate:.0} requests/s, evenly spaced, from the moment each was due, µs"));
    for (server, (p50, p99)) in group.servers.iter().zip(&tails).filter(|(_, (p50, _))| p50.median().is_finite()) {
        let (name, min, max) = (&server.name, p99.min(), p99.max());
        let (p50, p99, doubt) = (p50.median(), p99.median(), p99.doubt());
        say(format_args!("  {name:<36} p50 {p50:>6.0}  p99 {p99:>6.0}  ({min:.0} to {max:.0}){doubt}"));
    }
    Ok(())
}
