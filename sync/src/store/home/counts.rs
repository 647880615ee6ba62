//! What is counted of homes.

use std::sync::atomic::{AtomicU64, Ordering};

use super::HomeError;

/// Time between two warnings of homes that did not decide, milliseconds.
const WARN_MS: u64 = 1_000;

/// What was counted of homes since the start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct HomeCounts {
    /// Questions that were carried to homes.
    pub carried: u64,
    /// Questions of peers that this node decided as a home.
    pub decided: u64,
    /// What was not decided, for want of a link, of a home that is ready, or of one that knows what a home is.
    pub refused: u64,
    /// What was asked and has no answer: it may have been done.
    pub unknown: u64,
    /// Writes that were made and did not come back in time.
    pub late: u64,
}

impl HomeCounts {
    /// Of two KVs together.
    #[must_use]
    pub fn and(self, other: Self) -> Self {
        Self {
            carried: self.carried + other.carried,
            decided: self.decided + other.decided,
            refused: self.refused + other.refused,
            unknown: self.unknown + other.unknown,
            late: self.late + other.late,
        }
    }
}

#[derive(Default)]
pub(super) struct Counters {
    carried: AtomicU64,
    decided: AtomicU64,
    refused: AtomicU64,
    unknown: AtomicU64,
    late: AtomicU64,
    warned_ms: AtomicU64,
}

fn one_more(counter: &AtomicU64) {
    counter.fetch_add(1, Ordering::Relaxed);
}

impl Counters {
    pub(super) fn carried(&self) {
        one_more(&self.carried);
    }

    pub(super) fn decided(&self) {
        one_more(&self.decided);
    }

    pub(super) fn late(&self) {
        one_more(&self.late);
    }

    /// Whether it shall be told in the log: not all that fail within one second are.
    pub(super) fn failed(&self, error: &HomeError, now_ms: u64) -> bool {
        one_more(if matches!(error, HomeError::Unknown { .. }) { &self.unknown } else { &self.refused });
        let last = self.warned_ms.load(Ordering::Relaxed);
        let is_due = now_ms.abs_diff(last) >= WARN_MS;
        is_due && self.warned_ms.compare_exchange(last, now_ms, Ordering::Relaxed, Ordering::Relaxed).is_ok()
    }

    pub(super) fn now(&self) -> HomeCounts {
        let of = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        HomeCounts {
            carried: of(&self.carried),
            decided: of(&self.decided),
            refused: of(&self.refused),
            unknown: of(&self.unknown),
            late: of(&self.late),
        }
    }
}
