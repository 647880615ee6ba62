//! What the kernel tells of a process (proc(5)).

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

/// Ticks of a second in `/proc/PID/stat`: what the kernel tells every program on Linux (`sysconf(_SC_CLK_TCK)`).
const TICKS_PER_SECOND: f64 = 100.0;
/// Fields of `stat` between the program's name and `utime`.
const FIELDS_BEFORE_UTIME: usize = 11;

/// CPU time of a process and all its threads, its own and the kernel's for it. Ends of its children don't count.
pub(crate) fn cpu(pid: u32) -> anyhow::Result<Duration> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    // The name stands in parentheses and may hold anything.
    let (_, fields) = stat.rsplit_once(')').context("stat without a name")?;
    let ticks = fields.split_whitespace().skip(FIELDS_BEFORE_UTIME).take(2).map(str::parse::<f64>);
    let ticks: f64 = ticks.sum::<Result<_, _>>()?;
    Ok(Duration::from_secs_f64(ticks / TICKS_PER_SECOND))
}

/// Memory of a process that is in RAM.
#[derive(Clone, Copy)]
pub(crate) struct Resident {
    /// All of it, KiB.
    pub(crate) kib: f64,
    /// Of it what is no file's and could only go to swap, KiB.
    pub(crate) anonymous_kib: f64,
}

pub(crate) fn resident() -> anyhow::Result<Resident> {
    resident_of("self")
}

/// The same of another process, by its number.
pub(crate) fn resident_of(process: &str) -> anyhow::Result<Resident> {
    let status = std::fs::read_to_string(format!("/proc/{process}/status"))?;
    Ok(Resident { kib: kib(&status, "VmRSS:")?, anonymous_kib: kib(&status, "RssAnon:")? })
}

fn kib(status: &str, name: &str) -> anyhow::Result<f64> {
    let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

/// Open descriptors of this process.
pub(crate) fn descriptors() -> anyhow::Result<usize> {
    // The one that reads the directory is in it.
    Ok(entries("/proc/self/fd")?.saturating_sub(1))
}

/// Threads of this process.
pub(crate) fn threads() -> anyhow::Result<usize> {
    entries("/proc/self/task")
}

/// Mapped regions of this process. The kernel allows a process so many (`vm.max_map_count`, 65,530 by default).
pub(crate) fn mappings() -> anyhow::Result<usize> {
    Ok(std::fs::read_to_string("/proc/self/maps")?.lines().count())
}

fn entries(dir: impl AsRef<Path>) -> anyhow::Result<usize> {
    Ok(std::fs::read_dir(dir)?.count())
}
