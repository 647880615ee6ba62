//! How a release does on a node: what gates of rollouts look at.

use serde::{Deserialize, Serialize};

use crate::release::ReleaseId;

/// Buckets of times: two for each doubling, from 64 µs to a minute.
pub const BUCKETS: usize = 42;
/// The first bucket ends before the second power of two after this one.
const BUCKET_BITS_MIN: u32 = 6;

/// What a release has answered on one node since it was brought up there.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ReleaseLoad {
    /// Which.
    pub release: ReleaseId,
    /// Requests that it has answered.
    pub requests: u64,
    /// Those of them with a status of 500 or above that the release is answerable for.
    pub errors: u64,
    /// Those of them that ended in a trap or at a limit.
    pub traps: u64,
    /// How many of them took how long, by [`bucket_of`]; zeros at the end are left out.
    pub times: Vec<u64>,
}

/// The bucket of a time.
pub fn bucket_of(micros: u64) -> usize {
    let micros = micros.max(1 << BUCKET_BITS_MIN);
    let bits = micros.ilog2();
    let half = (micros >> (bits - 1)) & 1;
    let index = (bits - BUCKET_BITS_MIN) as usize * 2 + usize::from(half == 1);
    index.min(BUCKETS - 1)
}

/// Where a bucket ends, microseconds.
pub fn bucket_end(index: usize) -> u64 {
    let bits = BUCKET_BITS_MIN + u32::try_from(index / 2).unwrap_or(u32::MAX).min(50);
    if index.is_multiple_of(2) { (1 << bits) + (1 << (bits - 1)) } else { 1 << (bits + 1) }
}

impl ReleaseLoad {
    /// Nothing yet.
    pub fn none(release: ReleaseId) -> Self {
        Self { release, requests: 0, errors: 0, traps: 0, times: Vec::new() }
    }

    /// What came since `before`. A node that was restarted, or brought the release up anew, began again at 0.
    #[must_use]
    pub fn since(&self, before: &Self) -> Self {
        if self.requests < before.requests {
            return self.clone();
        }
        let times = self.times.iter().enumerate();
        let before_at = |index: usize| before.times.get(index).copied().unwrap_or(0);
        Self {
            release: self.release.clone(),
            requests: self.requests - before.requests,
            errors: self.errors.saturating_sub(before.errors),
            traps: self.traps.saturating_sub(before.traps),
            times: times.map(|(index, count)| count.saturating_sub(before_at(index))).collect(),
        }
    }

    /// Adds what another node told of the same release.
    pub fn add(&mut self, other: &Self) {
        self.requests = self.requests.saturating_add(other.requests);
        self.errors = self.errors.saturating_add(other.errors);
        self.traps = self.traps.saturating_add(other.traps);
        if self.times.len() < other.times.len().min(BUCKETS) {
            self.times.resize(other.times.len().min(BUCKETS), 0);
        }
        for (sum, count) in self.times.iter_mut().zip(&other.times) {
            *sum = sum.saturating_add(*count);
        }
    }

    /// The time that 99 of 100 requests stay below, microseconds, to the precision of the buckets. None without any.
    pub fn p99_us(&self) -> Option<u64> {
        let all: u64 = self.times.iter().sum();
        let rank = all - all / 100;
        let mut below = 0;
        let index = self.times.iter().position(|count| {
            below += count;
            below >= rank && all > 0
        })?;
        Some(bucket_end(index))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(requests: u64, times: &[u64]) -> ReleaseLoad {
        let release = "hello@1".parse().unwrap();
        ReleaseLoad { requests, times: times.to_vec(), ..ReleaseLoad::none(release) }
    }

    #[test]
    fn buckets_follow_each_other_without_a_gap() {
        for index in 0..BUCKETS - 1 {
            let end = bucket_end(index);
            assert_eq!((bucket_of(end - 1), bucket_of(end)), (index, index + 1), "{end}");
        }
        assert_eq!((bucket_of(0), bucket_of(u64::MAX)), (0, BUCKETS - 1));
    }

    #[test]
    fn the_p99_is_that_of_the_hundredth_slowest() {
        assert_eq!(load(0, &[]).p99_us(), None);
        assert_eq!(load(100, &[99, 1]).p99_us(), Some(bucket_end(0)));
        assert_eq!(load(100, &[98, 0, 2]).p99_us(), Some(bucket_end(2)));
        assert_eq!(load(1, &[0, 1]).p99_us(), Some(bucket_end(1)));
    }

    #[test]
    fn what_came_since_is_counted_and_a_restart_begins_anew() {
        let since = load(10, &[5, 5]).since(&load(4, &[4]));
        assert_eq!((since.requests, since.times), (6, vec![1, 5]));
        assert_eq!(load(3, &[3]).since(&load(4, &[4])).requests, 3);
        let mut sum = load(1, &[1]);
        sum.add(&load(2, &[0, 2]));
        assert_eq!((sum.requests, sum.times), (3, vec![1, 2]));
    }
}
