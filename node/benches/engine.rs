//! What an instance, a call and a start cost inside one process, beside the same wasmtime without Selvage.
//!
//! `cargo bench -p selvage-node --bench engine`; `-- profile GUEST CALLS` makes that many calls and nothing else, for a
//! profiler.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

#[allow(dead_code, reason = "each bench asks for a part of it")]
mod aim;
mod bare;
mod figures;
mod ours;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;

use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use bytes::Bytes;

use aim::Aim;
use bare::Bare;
use figures::{Figure, ROUNDS, look, say, settle, tree};
use ours::Ours;

/// What a round runs before it counts.
const WARM_UP: Duration = Duration::from_millis(200);
/// How long it counts.
const ROUND: Duration = Duration::from_millis(500);
/// Components loaded anew for the figures of a first call, in each round.
const COLD_COMPONENTS: usize = 40;
/// Leases that are timed together: one takes less than the clock.
const LEASES: u32 = 64;

/// Instances that wait together when it is measured what each takes.
const WAITING: usize = 256;
const WAITING_KIB: Aim = Aim::AtMost(32.0);

/// A guest that both sides run, and the path that it answers with 200.
#[derive(Clone)]
pub(crate) struct Guest {
    name: &'static str,
    path: &'static str,
    bytes: Bytes,
}

/// A hand-written component, two Rust ones and a Rust one for WASI 0.3: without an SDK, with Spin's, with Spin's. None
/// imports anything but WASI, so that wasmtime alone can run them; `examples/hello` reads a variable of Spin's.
fn guests() -> anyhow::Result<Vec<Guest>> {
    let hello = wat::parse_file(tree().join("node/tests/guests/hello.wat"))?;
    let example = |name: &str| {
        let path = tree().join(format!("examples/{name}/{name}.wasm"));
        std::fs::read(&path).with_context(|| format!("read {}", path.display())).map(Bytes::from)
    };
    Ok(vec![
        Guest { name: "hello.wat", path: "/", bytes: hello.into() },
        Guest { name: "plain", path: "/", bytes: example("plain")? },
        Guest { name: "gate", path: "/public/x", bytes: example("gate")? },
        Guest { name: "plain-p3", path: "/", bytes: example("plain-p3")? },
    ])
}

fn main() -> anyhow::Result<()> {
    settle()?;
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    // One task makes all calls, a server's only a few in a turn: without this it would be made to yield among them.
    runtime.block_on(tokio::task::unconstrained(run()))
}

async fn run() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).filter(|argument| !argument.starts_with('-')).collect();
    let guests = guests()?;
    if let [mode, name, calls] = arguments.as_slice() {
        let Some(guest) = guests.iter().find(|guest| guest.name == name && mode == "profile") else {
            bail!("expected: profile GUEST CALLS");
        };
        return profile(guest, calls.parse()?).await;
    }
    look("before")?;
    say(format_args!("medians of {ROUNDS} rounds of {ROUND:?} after {WARM_UP:?} of warm-up, µs, one thread"));
    for guest in &guests {
        warm(guest).await?;
        cold(guest).await?;
        let kib = Ours::start(guest).await?.waiting(WAITING).await?;
        let aim = WAITING_KIB.judge(kib, " KiB");
        say(format_args!("  an instance that waits for its next request: {kib:.1} KiB resident  {aim}"));
    }
    look("after")
}

async fn profile(guest: &Guest, calls: u32) -> anyhow::Result<()> {
    let ours = Ours::start(guest).await?;
    let start = Instant::now();
    for _ in 0..calls {
        ours.serve().await?;
    }
    say(format_args!("{:.2} µs a call", micros(start.elapsed()) / f64::from(calls)));
    Ok(())
}

/// The rounds of one operation.
#[derive(Default)]
struct Series {
    mean: Figure,
    p50: Figure,
    p99: Figure,
}

impl Series {
    /// One more round: `operation` again and again, each time it takes `count` times what is to be known.
    async fn round(&mut self, count: u32, operation: impl AsyncFn() -> anyhow::Result<()>) -> anyhow::Result<()> {
        let warm = Instant::now();
        while warm.elapsed() < WARM_UP {
            operation().await?;
        }
        let mut samples = Vec::with_capacity(1 << 20);
        let start = Instant::now();
        while start.elapsed() < ROUND {
            let before = Instant::now();
            operation().await?;
            samples.push(micros(before.elapsed()) / f64::from(count));
        }
        self.take(samples);
        Ok(())
    }

    fn take(&mut self, mut samples: Vec<f64>) {
        samples.sort_by(f64::total_cmp);
        let at = |percent: usize| samples.get(samples.len() * percent / 100).copied().unwrap_or(f64::NAN);
        self.mean.push(samples.iter().sum::<f64>() / samples.len().max(1) as f64);
        self.p50.push(at(50));
        self.p99.push(at(99));
    }

    fn tell(&self, name: &str, more: &str) {
        let (mean, p50, p99) = (self.mean.median(), self.p50.median(), self.p99.median());
        let doubt = self.p50.doubt();
        say(format_args!("  {name:<50} p50 {p50:>9.2}  p99 {p99:>9.2}  mean {mean:>9.2}  {more}{doubt}"));
    }

    fn over(&self, floor: &Self) -> String {
        let (ours, bare) = (self.p50.median(), floor.p50.median());
        format!("{:.2}x the floor, {:+.2}", ours / bare, ours - bare)
    }
}

fn micros(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e6
}

/// What a request costs once its component has run before.
async fn warm(guest: &Guest) -> anyhow::Result<()> {
    let (ours, bare) = (Ours::start(guest).await?, Bare::start(guest)?);
    if !ours.like(&bare) {
        say("  NOT THE SAME CODE: node/benches/bare.rs no longer configures its engine as node/src/engine.rs does");
    }
    let mut series: [Series; 6] = Default::default();
    for _ in 0..ROUNDS {
        let [lease, call, again, serve, floor, instantiate] = &mut series;
        lease.round(LEASES, async || ours.lease(LEASES).await).await?;
        call.round(1, async || ours.call().await).await?;
        again.round(1, async || ours.call_again().await).await?;
        floor.round(1, async || bare.call().await).await?;
        serve.round(1, async || ours.serve().await).await?;
        instantiate.round(1, async || bare.instantiate().await).await?;
    }
    let [lease, call, again, serve, floor, instantiate] = &series;
    say(format_args!("{}, {} bytes, GET {}", guest.name, guest.bytes.len(), guest.path));
    lease.tell("lease, given back", "");
    call.tell("lease, fresh instance, call, body, end", &call.over(floor));
    again.tell("the same, instance used again where it was chosen", &again.over(floor));
    serve.tell("the same through every step of `serve`", &serve.over(floor));
    floor.tell("floor: wasmtime alone, all but the lease", "");
    instantiate.tell("of it: store, instance, end", "");
    Ok(())
}

/// What the first request of a component costs, and its way there.
async fn cold(guest: &Guest) -> anyhow::Result<()> {
    let ours = Ours::start(guest).await?;
    let mut series: [Series; 8] = Default::default();
    for _ in 0..ROUNDS {
        let [compile, load, link, first, bare_compile, bare_load, bare_first, bare_instance] = &mut series;
        compile.take(vec![ours.compile()?]);
        // A component's slots know its memory; these have never seen any of the new ones.
        let loaded = ours.load(COLD_COMPONENTS)?;
        load.take(loaded.iter().map(|(time, _)| *time).collect());
        let linked = ours.link(loaded.into_iter().map(|(_, compiled)| compiled))?;
        link.take(linked.iter().map(|(time, _)| *time).collect());
        first.take(ours.first_calls(linked.into_iter().map(|(_, pool)| pool)).await?);
        let bare = Bare::start(guest)?;
        bare_compile.take(vec![bare.compile_micros()]);
        let (times, components) = bare.load(COLD_COMPONENTS)?;
        bare_load.take(times);
        bare_first.take(bare.first_calls(&components).await?);
        let (_, components) = bare.load(COLD_COMPONENTS)?;
        bare_instance.take(bare.first_instances(&components).await?);
    }
    let [compile, load, link, first, bare_compile, bare_load, bare_first, bare_instance] = &series;
    compile.tell("compile, and keep on disk", &compile.over(bare_compile));
    bare_compile.tell("floor: wasmtime alone, compile", "");
    let gain = compile.p50.median() / load.p50.median();
    load.tell("load from disk, MAC checked", &format!("{}; 1/{gain:.0} of compiling", load.over(bare_load)));
    bare_load.tell("floor: wasmtime alone, bytes in memory", "");
    link.tell("link to its grants", "");
    first.tell("first call of a loaded component, with body", &first.over(bare_first));
    bare_first.tell("floor: wasmtime alone", "");
    bare_instance.tell("of it: store, first instance", "");
    Ok(())
}
