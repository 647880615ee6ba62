//! A seeded simulator: a few replicas on simulated disks in virtual time.
//!
//! A seed makes a plan: writes and faults, each at its moment. The world then plays it: it delays, resets and cuts
//! links, splits the fleet, delivers entries twice and very late, sets clocks wrong, crashes nodes at any moment with
//! what was not flushed lost, wipes disks, puts old copies back, copies disks from one node to another, takes nodes
//! out of the roster and in again, and forges writes. Then it heals everything and demands of all nodes the same
//! rows, byte for byte, and that these are what all writes merged in any order give: nothing lost, nothing
//! resurrected, nothing invented.
//!
//! `SELVAGE_SEED=n` runs one seed, `SELVAGE_SEEDS=n` as many. A failure prints its own, and the shortest plan found
//! that still fails; with `SELVAGE_TRACE=key`, and what happened to that key in it.

mod checks;
pub(crate) mod disk;
mod faults;
mod plan;
mod planted;
mod world;

use std::collections::BTreeMap;
use std::panic::AssertUnwindSafe;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use self::plan::{Plan, plan};
use self::world::World;

/// Seeds of a test run.
const SEEDS: u64 = 2_000;

/// Runs of a failing plan with parts left out, at most.
const SHORTEN_MAX: usize = 150;

/// Failures that are looked for before the first is shortened.
const FAILURES_MAX: usize = 8;

/// What is printed of each of them.
const LINE_CHARS: usize = 160;

/// Whether a run prints what `SELVAGE_TRACE` asks for: only the last one, of the shortest plan.
static TRACE: AtomicBool = AtomicBool::new(false);

/// What a run met, by name.
type Met = BTreeMap<&'static str, u64>;

/// Plays a plan. An error is what a check said.
fn play(seed: u64, plan: &Plan) -> Result<Met, String> {
    let ran = std::panic::catch_unwind(AssertUnwindSafe(|| {
        let mut world = World::new(seed, &plan.regions);
        world.run(plan);
        world.met
    }));
    ran.map_err(|panic| message_of(panic.as_ref()).to_owned())
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panicked")
}

/// Leaves parts of a failing plan out as long as it still fails.
fn shorten(seed: u64, plan: &Plan, why: &str) -> Plan {
    let kind = |why: &str| why.split(':').next().unwrap_or_default().to_owned();
    let mut best = plan.clone();
    let mut runs = 0;
    let mut size = best.steps.len() / 2;
    while size > 0 {
        let mut at = 0;
        while at < best.steps.len() && runs < SHORTEN_MAX {
            let mut less = best.clone();
            less.steps.drain(at..(at + size).min(less.steps.len()));
            runs += 1;
            if play(seed, &less).is_err_and(|other| kind(&other) == kind(why)) {
                best = less;
            } else {
                at += size;
            }
        }
        size /= 2;
    }
    best
}

/// A failure of one seed, to be printed.
fn report(seed: u64, why: &str) -> String {
    let short = shorten(seed, &plan(seed), why);
    // A long value says nothing.
    TRACE.store(true, Ordering::Relaxed);
    let why = play(seed, &short).err().unwrap_or_default().replace("\\x07", "");
    let steps: String = short.steps.iter().map(|(at, step)| format!("  {at:>6} ms {step:?}\n")).collect();
    format!("SELVAGE_SEED={seed}: {why}\nthe shortest plan found that fails, of nodes in {:?}:\n{steps}", short.regions)
}

/// Runs seeds on all cores; [`FAILURES_MAX`] failures end it.
fn run(seeds: std::ops::Range<u64>) -> Result<Met, BTreeMap<u64, String>> {
    let next = AtomicU64::new(seeds.start);
    let found: Mutex<(Met, BTreeMap<u64, String>)> = Mutex::default();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                loop {
                    let seed = next.fetch_add(1, Ordering::Relaxed);
                    if seed >= seeds.end || found.lock().unwrap().1.len() >= FAILURES_MAX {
                        return;
                    }
                    let played = play(seed, &plan(seed));
                    let mut found = found.lock().unwrap();
                    match played {
                        Ok(met) => met.into_iter().for_each(|(what, count)| *found.0.entry(what).or_default() += count),
                        Err(why) => _ = found.1.insert(seed, why),
                    }
                }
            });
        }
    });
    let (met, failed) = found.into_inner().unwrap();
    if failed.is_empty() { Ok(met) } else { Err(failed) }
}

fn quietly<T>(what: impl FnOnce() -> T) -> T {
    let hook = std::panic::take_hook();
    std::panic::set_hook(Box::new(|_| {}));
    let done = what();
    std::panic::set_hook(hook);
    done
}

#[test]
fn whatever_happens_all_nodes_end_with_the_same_rows() {
    let number = |name| std::env::var(name).ok().map(|text| text.parse::<u64>().expect("a number"));
    let seeds = match (number("SELVAGE_SEED"), number("SELVAGE_SEEDS")) {
        (Some(seed), _) => seed..seed + 1,
        (None, count) => 0..count.unwrap_or(SEEDS),
    };
    let started = std::time::Instant::now();
    let (virtual_s, count) = (seeds.clone().count() as u64 * plan::PLAN_MS / 1000, seeds.clone().count());
    let met = match quietly(|| run(seeds)) {
        Ok(met) => met,
        Err(failed) => {
            for (seed, why) in &failed {
                eprintln!("SELVAGE_SEED={seed}: {}", why.chars().take(LINE_CHARS).collect::<String>());
            }
            let (seed, why) = failed.first_key_value().expect("not empty");
            panic!("{}", quietly(|| report(*seed, why)))
        }
    };
    eprintln!("{count} seeds, {virtual_s} virtual seconds in {:?}: {met:?}", started.elapsed());
    if count >= 300 {
        for what in plan::MUST_BE_MET {
            assert!(met.get(what).is_some_and(|count| *count > 10), "{what} was hardly met: {met:?}");
        }
    }
}
