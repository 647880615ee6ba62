//! What every bench needs of its machine and of its samples.

use std::fmt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

/// Rounds of each figure. What is printed is the median of the rounds.
pub(crate) const ROUNDS: usize = 5;
/// The core of the load generator; of everything, where there is only one process.
pub(crate) const CLIENT_CORE: &str = "1";
/// Rounds that differ by more than this share of their median decide nothing.
const SPREAD_MAX: f64 = 0.2;
/// Share of all cores that others may use while something is measured.
const OTHERS_MAX: f64 = 0.05;
/// How long the machine is looked at.
const LOOK: Duration = Duration::from_secs(1);
/// Set in the process that a bench starts in its own place.
const PINNED: &str = "SELVAGE_BENCH_PINNED";
/// What makes wasmtime walk the native stack for each error that it makes: a figure with it is of something else.
pub(crate) const BACKTRACES: [&str; 2] = ["RUST_BACKTRACE", "RUST_LIB_BACKTRACE"];

/// Starts this program again in its own place: on one core, and without the variables that ask for backtraces.
///
/// # Errors
/// Only if the second start still has them, or if there is no second start.
pub(crate) fn settle() -> anyhow::Result<()> {
    if std::env::var_os(PINNED).is_some() {
        let set = BACKTRACES.iter().find(|name| std::env::var_os(name).is_some());
        return set.map_or(Ok(()), |name| Err(anyhow::anyhow!("{name} is set: the figures would be of backtraces")));
    }
    let program = std::env::current_exe()?;
    let again = |mut command: Command| {
        without_backtraces(&mut command).args(std::env::args_os().skip(1)).env(PINNED, "1").exec()
    };
    let mut pinned = Command::new("taskset");
    pinned.args(["-c", CLIENT_CORE]).arg(&program);
    // `exec` returns only if there is no such program.
    let error = again(pinned);
    say(format_args!("taskset (Debian: util-linux): {error}; not pinned to a core, figures will spread"));
    Err(again(Command::new(program)).into())
}

/// Takes the variables that ask for backtraces away from a program to be started.
pub(crate) fn without_backtraces(command: &mut Command) -> &mut Command {
    BACKTRACES.iter().fold(command, |command, name| command.env_remove(name))
}

/// One line of the report.
pub(crate) fn say(line: impl fmt::Display) {
    println!("{line}");
}

/// The root of the tree.
pub(crate) fn tree() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..")
}

/// One figure of several rounds.
#[derive(Default, Clone)]
pub(crate) struct Figure(Vec<f64>);

impl Figure {
    pub(crate) fn push(&mut self, value: f64) {
        self.0.push(value);
    }

    pub(crate) fn median(&self) -> f64 {
        median(&self.0)
    }

    pub(crate) fn min(&self) -> f64 {
        self.0.iter().copied().fold(f64::INFINITY, f64::min)
    }

    pub(crate) fn max(&self) -> f64 {
        self.0.iter().copied().fold(0.0, f64::max)
    }

    /// How far the rounds are apart, as a share of their median.
    pub(crate) fn spread(&self) -> f64 {
        (self.max() - self.min()) / self.median()
    }

    /// What to say of a figure whose rounds are too far apart.
    pub(crate) fn doubt(&self) -> &'static str {
        if self.spread() > SPREAD_MAX { "  TOO NOISY TO JUDGE" } else { "" }
    }
}

/// The one in the middle; `NaN` of nothing.
pub(crate) fn median(values: &[f64]) -> f64 {
    let mut sorted = values.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}

/// Says how busy the machine is with other things. Look before and after, never while something is measured.
pub(crate) fn look(when: &str) -> anyhow::Result<()> {
    let (busy, all) = ticks()?;
    std::thread::sleep(LOOK);
    let (busy_then, all_then) = ticks()?;
    let share = (busy_then - busy) / (all_then - all).max(1.0);
    let verdict = if share > OTHERS_MAX { ": TOO NOISY TO JUDGE" } else { "" };
    say(format_args!("machine {when}: others use {:.0} % of its cores{verdict}", share * 100.0));
    Ok(())
}

/// Ticks of all cores since the start: those in use (stolen ones too), and all (proc(5), /proc/stat).
fn ticks() -> anyhow::Result<(f64, f64)> {
    let stat = std::fs::read_to_string("/proc/stat")?;
    let line = stat.lines().next().unwrap_or_default();
    let fields: Vec<f64> = line.split_whitespace().skip(1).take(8).filter_map(|field| field.parse().ok()).collect();
    let all: f64 = fields.iter().sum();
    let idle: f64 = fields.iter().skip(3).take(2).sum();
    Ok((all - idle, all))
}
