//! Minutes of mixed load on one node: healthy guests, hostile ones, and a deploy every second, over real sockets.
//!
//! `cargo bench -p selvage-node --bench soak -- [SECONDS]`. It ends with exit code 1 if a request of a healthy app
//! failed or got another text than its release says, or if descriptors or memory grew.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

#[allow(dead_code, reason = "each bench asks for a part of it")]
mod apps;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod figures;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;
mod soaked;

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use selvage_node::listen::{ListenOptions, Listeners};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval};

use figures::{look, say};
use soaked::client::{Count, healthy, hostile};
use soaked::fleet::Fleet;
use soaked::verdict::{Sample, complaints};

/// Seconds, unless the argument says otherwise.
const SECONDS: u64 = 600;
/// Connections of the healthy load.
const CONNECTIONS: u32 = 8;
/// Requests per second of the healthy load, all connections together. Low enough for two cores that do the rest too.
const HEALTHY_RATE: u32 = 300;
/// Requests per second for hostile guests.
const HOSTILE_RATE: u32 = 10;
/// Time from one deploy to the next.
const DEPLOY_EVERY: Duration = Duration::from_secs(1);
/// Time from one sample to the next.
const SAMPLE_EVERY: Duration = Duration::from_secs(1);
/// Samples from one line to the next.
const SAMPLES_PER_LINE: usize = 10;
/// Time for what is under way at the end.
const DRAIN: Duration = Duration::from_secs(5);

fn main() -> anyhow::Result<()> {
    let mut words = std::env::args().skip(1).filter(|word| !word.starts_with('-'));
    let seconds = words.next().map_or(Ok(SECONDS), |word| word.parse()).context("expected seconds")?;
    look("before")?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
    let complaints = runtime.block_on(run(Duration::from_secs(seconds)))?;
    look("after")?;
    if complaints.is_empty() {
        say("passed: no healthy request failed, descriptors and memory did not grow");
        return Ok(());
    }
    bail!("the soak failed: {}", complaints.join("; "))
}

/// Returns what is to be complained of.
async fn run(duration: Duration) -> anyhow::Result<Vec<String>> {
    let dir = tempfile::tempdir()?;
    let base = apps::base(&dir.path().join("state"), &dir.path().join("compiled")).await?;
    let kv = base.kv.mesh().kv().context("the kv is here")?;
    let parts = apps::parts()?;
    let fleet = tokio::task::spawn_blocking({
        let parts = Arc::clone(&parts);
        move || Fleet::deploy(base, parts)
    });
    let fleet = Arc::new(fleet.await??);
    let listening = ListenOptions { http: Some("127.0.0.1:0".parse()?), ..ListenOptions::default() };
    let listeners = Listeners::bind(&listening, parts).await?;
    let address = listeners.http_addr().context("no address")?;
    let (healthy_apps, hostile_apps) = (fleet.healthy(), fleet.hostile());
    say(format_args!(
        "{healthy_apps} healthy apps, {hostile_apps} hostile ones; {HEALTHY_RATE} and {HOSTILE_RATE} requests/s for \
         them, a deploy every {DEPLOY_EVERY:?}, {duration:?}"
    ));

    let count = Arc::new(Count::default());
    let mut load = JoinSet::new();
    for _ in 0..CONNECTIONS {
        let every = Duration::from_secs(1) * CONNECTIONS / HEALTHY_RATE;
        load.spawn(healthy(address, Arc::clone(&fleet), Arc::clone(&count), every));
    }
    load.spawn(hostile(address, Arc::clone(&fleet), Arc::clone(&count), Duration::from_secs(1) / HOSTILE_RATE));
    load.spawn(deploys(Arc::clone(&fleet), Arc::clone(&count)));
    let samples = watch(duration, &count).await?;
    load.shutdown().await;
    for line in count.hostile() {
        say(line);
    }
    listeners.drain(Instant::now() + DRAIN).await;
    kv.close().await;
    Ok(complaints(&samples, &count))
}

/// Another release of some healthy app, again and again.
async fn deploys(fleet: Arc<Fleet>, count: Arc<Count>) {
    let mut ticks = interval(DEPLOY_EVERY);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let fleet = Arc::clone(&fleet);
        match tokio::task::spawn_blocking(move || fleet.deploy_next()).await {
            Ok(Ok(())) => drop(count.deploys.fetch_add(1, Ordering::Relaxed)),
            Ok(Err(error)) => count.failed(format!("deploy: {error:#}")),
            Err(error) => count.failed(format!("deploy: {error}")),
        }
    }
}

/// Samples until the time is over.
async fn watch(duration: Duration, count: &Count) -> anyhow::Result<Vec<Sample>> {
    let start = Instant::now();
    let mut samples = Vec::new();
    let mut ticks = interval(SAMPLE_EVERY);
    // The first one is at once, when nothing has happened yet.
    ticks.tick().await;
    while start.elapsed() < duration {
        ticks.tick().await;
        let sample = Sample::take()?;
        samples.push(sample);
        if samples.len() % SAMPLES_PER_LINE == 0 {
            let seconds = start.elapsed().as_secs();
            let (answered, hostile, deploys) = count.so_far();
            say(format_args!(
                "{seconds:>5} s  {sample}  {answered} healthy answers, {} failures, {hostile} hostile requests, \
                 {deploys} deploys",
                count.failures()
            ));
        }
    }
    Ok(samples)
}
