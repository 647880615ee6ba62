//! What one release has answered on this node: what a rollout is judged by.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use selvage_config::plan::{BUCKETS, ReleaseLoad, bucket_of};
use selvage_config::release::ReleaseId;

/// Counts that only grow. They are read beside each other and not as one: a request more or less changes no verdict.
#[derive(Debug)]
pub(crate) struct Tally {
    errors: AtomicU64,
    traps: AtomicU64,
    times: [AtomicU64; BUCKETS],
}

/// How a request went, as a rollout sees it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Went {
    Well,
    /// An answer of 500 or above that the release is answerable for.
    Badly,
    /// A trap or a limit.
    Trapped,
}

impl Default for Tally {
    fn default() -> Self {
        let (errors, traps) = (AtomicU64::new(0), AtomicU64::new(0));
        Self { errors, traps, times: std::array::from_fn(|_| AtomicU64::new(0)) }
    }
}

impl Tally {
    pub(crate) fn count(&self, took: Duration, went: Went) {
        let micros = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
        self.times[bucket_of(micros)].fetch_add(1, Ordering::Relaxed);
        if went != Went::Well {
            self.errors.fetch_add(1, Ordering::Relaxed);
        }
        if went == Went::Trapped {
            self.traps.fetch_add(1, Ordering::Relaxed);
        }
    }

    pub(crate) fn load(&self, release: ReleaseId) -> ReleaseLoad {
        let mut times: Vec<u64> = self.times.iter().map(|count| count.load(Ordering::Relaxed)).collect();
        let used = times.iter().rposition(|count| *count > 0).map_or(0, |last| last + 1);
        times.truncate(used);
        ReleaseLoad {
            release,
            requests: times.iter().sum(),
            errors: self.errors.load(Ordering::Relaxed),
            traps: self.traps.load(Ordering::Relaxed),
            times,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_are_counted_by_how_they_went_and_how_long_they_took() {
        let tally = Tally::default();
        assert!(tally.load("hello@1".parse().unwrap()).times.is_empty());
        for (micros, went) in [(10, Went::Well), (10, Went::Badly), (5_000, Went::Trapped)] {
            tally.count(Duration::from_micros(micros), went);
        }
        let load = tally.load("hello@1".parse().unwrap());
        assert_eq!((load.requests, load.errors, load.traps), (3, 2, 1));
        assert_eq!((load.times[0], load.times.len()), (2, bucket_of(5_000) + 1));
    }
}
