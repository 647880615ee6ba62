//! What the machine has.

use rustix::process::{Resource, getrlimit, setrlimit};

/// Descriptors below which a node is short of them: each component has two while its code is in memory, each connection
/// one.
const DESCRIPTORS_ENOUGH: u64 = 65_536;

/// Takes as many descriptors as this process may have: what is set for it at first is for programs of another kind.
pub(super) fn take_descriptors() {
    let mut limit = getrlimit(Resource::Nofile);
    if limit.current != limit.maximum {
        limit.current = limit.maximum;
        if let Err(error) = setrlimit(Resource::Nofile, limit) {
            tracing::warn!(%error, "the limit of open descriptors stays as it is");
        }
    }
}

/// Tells an operator if they are few for a node. Whoever tries one app has no use for that.
pub(crate) fn tell_if_few_descriptors() {
    let descriptors = getrlimit(Resource::Nofile).current;
    if descriptors.is_some_and(|descriptors| descriptors < DESCRIPTORS_ENOUGH) {
        tracing::warn!(descriptors, "few descriptors for a node: raise LimitNOFILE, or `ulimit -Hn`");
    }
}

/// Memory that this process may use, bytes: the machine's, or what its control group leaves of it. `None` where the
/// system doesn't say.
pub(super) fn memory_bytes() -> Option<u64> {
    let machine = meminfo(&std::fs::read_to_string("/proc/meminfo").ok()?)?;
    // Control groups, version 2: in a container the group is the root of what is seen.
    let group = std::fs::read_to_string("/sys/fs/cgroup/memory.max").ok();
    Some(group.and_then(|text| text.trim().parse().ok()).map_or(machine, |group: u64| group.min(machine)))
}

/// `MemTotal` of proc_meminfo(5), bytes.
fn meminfo(text: &str) -> Option<u64> {
    let line = text.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machine_says_what_it_has() {
        assert_eq!(meminfo("MemTotal:       24567890 kB\nMemFree: 1 kB\n"), Some(24_567_890 * 1024));
        for text in ["", "MemFree: 1 kB", "MemTotal: kB", "MemTotal: 1 MB", "MemTotal: 99999999999999999999 kB"] {
            assert_eq!(meminfo(text), None, "{text}");
        }
        assert!(memory_bytes().is_some_and(|bytes| bytes > 1 << 20));
    }
}
