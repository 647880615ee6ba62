//! What is counted of placements.

use std::sync::atomic::{AtomicU64, Ordering};

use super::PlacementError;

/// Time between two warnings of stores that could not be used, milliseconds.
const WARN_MS: u64 = 1_000;

/// What was counted of placements since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct PlacementCounts {
    /// Questions that this node asked of those that hold a store.
    pub asked: u64,
    /// Questions that it answered as one that does.
    pub answered: u64,
    /// Reads that it answered by what it kept of earlier ones.
    pub cached: u64,
    /// What was not done, for want of a node that holds the store and is ready.
    pub refused: u64,
    /// What was asked and has no answer: it may have been done.
    pub unknown: u64,
    /// Keys that were carried over into a placement.
    pub carried: u64,
    /// Bytes of what is kept of earlier reads.
    pub cached_bytes: u64,
}

#[derive(Default)]
pub(super) struct Counters {
    asked: AtomicU64,
    answered: AtomicU64,
    cached: AtomicU64,
    refused: AtomicU64,
    unknown: AtomicU64,
    carried: AtomicU64,
    warned_ms: AtomicU64,
}

fn one_more(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn asked(&self) {
        one_more(&self.asked);
    }

    pub(super) fn answered(&self) {
        one_more(&self.answered);
    }

    pub(super) fn cached(&self) {
        one_more(&self.cached);
    }

    pub(super) fn carried(&self) {
        one_more(&self.carried);
    }

    /// Whether it shall be told in the log: not all that fails within one second is.
    pub(super) fn failed(&self, error: &PlacementError, now_ms: u64) -> bool {
        one_more(if matches!(error, PlacementError::Unknown { .. }) { &self.unknown } else { &self.refused });
        let last = self.warned_ms.load(Ordering::Relaxed);
        let is_due = now_ms.abs_diff(last) >= WARN_MS;
        is_due && self.warned_ms.compare_exchange(last, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(super) fn now(&self, cached_bytes: usize) -> PlacementCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        PlacementCounts {
            asked: of(&self.asked),
            answered: of(&self.answered),
            cached: of(&self.cached),
            refused: of(&self.refused),
            unknown: of(&self.unknown),
            carried: of(&self.carried),
            cached_bytes: cached_bytes as u64,
        }
    }
}
