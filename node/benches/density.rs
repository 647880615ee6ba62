//! Thousands of components on one node: how long until it is ready, what each costs in memory, what its first request
//! and every other one takes, also after a rest; how long a whole node takes to start with all of them on its disk; and
//! how long a process with one of them needs for its first answer.
//!
//! `cargo bench -p selvage-node --bench density -- [COMPONENTS] [plain|hello.wat]`. All code is compiled first, into a
//! cache that stays in the target directory: the next run begins sooner. Then another process, on one core, makes all
//! apps ready out of that cache, one after the other, as a node does when it starts again. No
//! signature is checked on the way, and components are made in memory where a node reads them from its disk.

#![allow(clippy::print_stdout, reason = "the figures are what a bench is for")]

#[allow(dead_code, reason = "each bench asks for a part of it")]
mod aim;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod apps;
mod figures;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod process;
mod restart;
#[allow(dead_code, reason = "each bench asks for a part of it")]
mod servers;
mod start;

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use http_body_util::BodyExt;
use selvage_config::Limits;
use selvage_config::app::isolation::Isolation;
use selvage_node::request::{Protocol, Request, empty};
use selvage_node::route::{ActiveApp, Table};
use selvage_node::serve::{Parts, serve};

use aim::Aim;
use apps::Template;
use figures::{Figure, ROUNDS, look, say, settle, without_backtraces};
use process::{Resident, descriptors, mappings, resident};

/// Components, unless the argument says otherwise.
const COMPONENTS: u32 = 2_000;
/// Of them, those that get requests in turn.
const IN_TURN: usize = 1_000;
/// The argument that makes this program the process that loads.
const LOAD: &str = "--load";
/// The argument that makes it the node that starts; the directory stands behind it.
const RESTART: &str = "--restart=";
/// How long nobody asks. A node gives up what nobody asked for within a minute and a half.
const REST: Duration = Duration::from_secs(100);
/// How many components are compiled between two lines of progress.
const PROGRESS: u32 = 100;

const READY_MS: Aim = Aim::AtMost(2_000.0);
const RESIDENT_KIB: Aim = Aim::AtMost(150.0);
const FIRST_P99_MS: Aim = Aim::AtMost(5.0);
const IN_TURN_US: Aim = Aim::AtMost(30.0);

/// What is asked for.
struct Options {
    components: u32,
    guest: String,
}

impl Options {
    /// Of the arguments that are no flags.
    fn read() -> anyhow::Result<Self> {
        let mut options = Self { components: COMPONENTS, guest: "plain".to_owned() };
        for word in std::env::args().skip(1).filter(|word| !word.starts_with('-')) {
            match word.parse() {
                Ok(components) => options.components = components,
                Err(_) => options.guest = word,
            }
        }
        ensure!((1..apps::NUMBERS).contains(&options.components), "at most {} components", apps::NUMBERS - 1);
        Ok(options)
    }

    fn template(&self) -> anyhow::Result<Template> {
        match self.guest.as_str() {
            "plain" => Template::plain(),
            "hello.wat" => Template::hello(),
            other => bail!("no guest {other:?}: plain or hello.wat"),
        }
    }
}

fn main() -> anyhow::Result<()> {
    let is_load = std::env::args().any(|word| word == LOAD);
    if is_load {
        settle()?;
    }
    let options = Options::read()?;
    if let Some(dir) = std::env::args().find_map(|word| Some(word.strip_prefix(RESTART)?.to_owned())) {
        // As `selvage node` runs: on all cores.
        let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build()?;
        return runtime.block_on(restart::start(Path::new(&dir), options.components as usize));
    }
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    if is_load {
        // One task makes all calls, a server's only a few in a turn: without this it would be made to yield among them.
        return runtime.block_on(tokio::task::unconstrained(load(&options)));
    }
    runtime.block_on(compile(&options))?;
    let dir = tempfile::tempdir()?;
    restart::prepare(dir.path(), &compiled(), &options.template()?, options.components)?;
    look("before")?;
    again(LOAD, &options)?;
    again(&format!("{RESTART}{}", dir.path().display()), &options)?;
    start::measure()?;
    look("after")
}

/// Runs this program as another process.
fn again(mode: &str, options: &Options) -> anyhow::Result<()> {
    let mut command = std::process::Command::new(std::env::current_exe()?);
    without_backtraces(&mut command).args([mode, &options.components.to_string(), &options.guest]);
    let ended = command.status()?;
    ensure!(ended.success(), "{mode} ended with {ended}");
    Ok(())
}

/// Where compiled code stays from run to run.
fn compiled() -> PathBuf {
    Path::new(env!("CARGO_TARGET_TMPDIR")).join("density")
}

/// Compiles all components.
async fn compile(options: &Options) -> anyhow::Result<()> {
    let (template, dir) = (options.template()?, tempfile::tempdir()?);
    let base = apps::base(dir.path(), &compiled()).await?;
    let (start, components) = (Instant::now(), options.components);
    for number in 0..components {
        // Dropped at once: only its code in the cache is wanted.
        ready(&base, &template, number)?;
        if (number + 1) % PROGRESS == 0 {
            say(format_args!("compiled {} of {components} in {:.0} s", number + 1, start.elapsed().as_secs_f64()));
        }
    }
    base.kv.mesh().kv().context("the kv is here")?.close().await;
    Ok(())
}

fn ready(
    base: &selvage_node::release::activate::Base,
    template: &Template,
    number: u32,
) -> anyhow::Result<Arc<ActiveApp>> {
    let name = apps::name(number as usize);
    apps::app(base, &name, template.code(number), &Limits::default(), Isolation::Fresh)
}

/// Makes all apps ready, then asks each of them.
async fn load(options: &Options) -> anyhow::Result<()> {
    let (template, dir) = (options.template()?, tempfile::tempdir()?);
    let base = apps::base(dir.path(), &compiled()).await?;
    let (parts, components) = (apps::parts()?, options.components as usize);
    say(format_args!("{components} components ({}, {} bytes, each with its own text)", options.guest, template.len()));

    let empty = resident()?;
    let start = Instant::now();
    let made = (0..options.components).map(|number| ready(&base, &template, number));
    let table = Table::new(made.collect::<Result<_, _>>()?, apps::DOMAIN)?;
    parts.table.store(Arc::new(table));
    let ready = millis(start.elapsed());
    let each = ready / components as f64;
    say(format_args!("  ready in {ready:.0} ms, {each:.2} ms each  {}", READY_MS.judge(ready, " ms")));
    tell_resident("idle", empty, components)?;

    first_requests("first request of each", &parts, &template, components).await?;
    let in_turn = components.min(IN_TURN);
    let mut micros = Figure::default();
    for _ in 0..ROUNDS {
        let start = Instant::now();
        for number in 0..in_turn {
            ask(&parts, &template, number).await?;
        }
        micros.push(millis(start.elapsed()) * 1e3 / in_turn as f64);
    }
    let (median, min, max, doubt) = (micros.median(), micros.min(), micros.max(), micros.doubt());
    let aim = IN_TURN_US.judge(median, " µs");
    say(format_args!("  in turn over {in_turn}: {median:.1} µs a request ({min:.1} to {max:.1})  {aim}{doubt}"));
    tell_resident("after all that", empty, components)?;
    // Others run now: what gives up what nobody asks for.
    tokio::time::sleep(REST).await;
    tell_resident(&format!("after a rest of {REST:?}"), empty, components)?;
    first_requests("the next request of each", &parts, &template, components).await?;
    base.kv.mesh().kv().context("the kv is here")?.close().await;
    Ok(())
}

/// One request for each app.
async fn first_requests(what: &str, parts: &Arc<Parts>, template: &Template, apps: usize) -> anyhow::Result<()> {
    let mut times = Vec::with_capacity(apps);
    for number in 0..apps {
        times.push(millis(ask(parts, template, number).await?));
    }
    times.sort_by(f64::total_cmp);
    let at = |percent: usize| times[(times.len() - 1) * percent / 100];
    let aim = FIRST_P99_MS.judge(at(99), " ms at p99");
    say(format_args!("  {what}: p50 {:.2} ms  p99 {:.2} ms  {aim}", at(50), at(99)));
    Ok(())
}

fn tell_resident(when: &str, empty: Resident, components: usize) -> anyhow::Result<()> {
    let now = resident()?;
    let each = |now: f64, before: f64| (now - before) / components as f64;
    let (all, anonymous) = (each(now.kib, empty.kib), each(now.anonymous_kib, empty.anonymous_kib));
    // What is a file's can be given back when memory is short; it counts all the same.
    let aim = RESIDENT_KIB.judge(all, " KiB");
    let (mib, descriptors, mappings) = (now.kib / 1024.0, descriptors()?, mappings()?);
    say(format_args!(
        "  resident {when}: {all:.0} KiB each, {anonymous:.0} of it no file's  {aim}; in all {mib:.0} MiB, {descriptors} \
         descriptors, {mappings} mappings"
    ));
    Ok(())
}

/// One request through every step of the node but its sockets; the answer is checked.
async fn ask(parts: &Arc<Parts>, template: &Template, number: usize) -> anyhow::Result<Duration> {
    let http = http::Request::builder().uri("/").header("host", apps::host(number)).body(empty())?;
    let client = ([192, 0, 2, 1], 4711).into();
    let start = Instant::now();
    let request = Request { http, client, protocol: Protocol::H1, secure: false, arrived: start };
    let response = serve(parts, request).await;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let took = start.elapsed();
    let want = template.text(u32::try_from(number).context("a number of an app")?);
    ensure!(status == 200 && body == want.as_bytes(), "app {number}: status {status}, body {body:?}, not {want:?}");
    Ok(took)
}

fn millis(duration: Duration) -> f64 {
    duration.as_secs_f64() * 1e3
}
