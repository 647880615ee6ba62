//! What a connection may do that costs us more than it does its client: requests taken back, frames of no use, rules
//! broken. A little of it is life; a lot is an attack.

use std::sync::atomic::{AtomicU32, Ordering};

/// Counts of one connection.
#[derive(Debug)]
pub(super) struct Glitches {
    count: AtomicU32,
    most: u32,
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
    /// So many are borne.
    pub(super) fn new(most: u32) -> Self {
        Self { count: AtomicU32::new(0), most }
    }

    /// A request was answered: one is forgiven.
    pub(super) fn forgive(&self) {
        // It fails where there is none to forgive.
        let _ = self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, |count| count.checked_sub(1));
    }

    /// Something was not as it should be, so many times.
    pub(super) fn note(&self, times: u32) -> Verdict {
        let add = |count: u32| Some(count.saturating_add(times));
        let before = self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, add).unwrap_or(0);
        match before.saturating_add(times) {
            count if count > self.most => Verdict::Cut,
            count if count > self.most / 4 * 3 => Verdict::Leave,
            _ => Verdict::Bear,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_glitches_end_a_connection_in_two_steps() {
        let glitches = Glitches::new(1_000);
        let verdicts: Vec<Verdict> = (0..=1_000).map(|_| glitches.note(1)).collect();
        assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Bear).count(), 750);
        assert_eq!(verdicts.iter().filter(|verdict| **verdict == Verdict::Leave).count(), 250);
        assert_eq!(verdicts.last(), Some(&Verdict::Cut));
        assert_eq!(Glitches::new(10).note(u32::MAX), Verdict::Cut);
    }

    #[test]
    fn who_is_answered_may_err_and_saves_nothing_up() {
        let glitches = Glitches::new(4);
        for _ in 0..9_000 {
            glitches.forgive();
            assert_eq!(glitches.note(1), Verdict::Bear);
        }
        assert_eq!(glitches.note(4), Verdict::Cut);
    }
}
