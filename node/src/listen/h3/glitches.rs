//! What a connection may do that costs us more than it does its client: requests taken back, frames of no use, rules
//! broken. A little of it is life; a lot is an attack.

use std::sync::atomic::{AtomicU32, Ordering};

/// Glitches of a connection from which on it is cut off. Each request that was answered allows one more.
const GLITCHES_MAX: u32 = 1_000;
/// How many before that it is asked to leave.
const LEAVE_BEFORE: u32 = 250;

/// Counts of one connection.
#[derive(Debug, Default)]
pub(super) struct Glitches {
    spent: AtomicU32,
    earned: AtomicU32,
}

/// What follows from a glitch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// Nothing.
    Bear,
    /// No more requests are taken.
    Leave,
    /// The connection is closed.
    Cut,
}

impl Glitches {
    /// A request was answered.
    pub(super) fn earn(&self) {
        self.earned.fetch_add(1, Ordering::Relaxed);
    }

    /// Something was not as it should be.
    pub(super) fn note(&self) -> Verdict {
        let spent = self.spent.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        let most = GLITCHES_MAX.saturating_add(self.earned.load(Ordering::Relaxed));
        match spent {
            _ if spent > most => Verdict::Cut,
            _ if spent > most - LEAVE_BEFORE => Verdict::Leave,
            _ => Verdict::Bear,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_glitches_end_a_connection_in_two_steps() {
        let glitches = Glitches::default();
        let verdicts: Vec<Verdict> = (0..=GLITCHES_MAX).map(|_| glitches.note()).collect();
        assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Bear).count(), 750);
        assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Leave).count(), 250);
        assert_eq!(verdicts.last(), Some(&Verdict::Cut));
    }

    #[test]
    fn who_is_answered_may_err_more() {
        let glitches = Glitches::default();
        for _ in 0..9_000 {
            glitches.earn();
            assert_eq!(glitches.note(), Verdict::Bear);
        }
    }
}
