//! How many instances are made ahead of the requests: as many as run at once, so that none has to wait for its own.

use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use super::AHEAD_MAX;

/// What is wanted of instances that nobody used yet.
#[derive(Debug, Default)]
pub(super) struct Ahead {
    /// The most requests at once since the last look.
    peak: AtomicUsize,
    /// The most before it.
    before: AtomicUsize,
    is_making: AtomicBool,
}

impl Ahead {
    /// A request took one while `running` run, and `left` wait. True if somebody must begin to make more: only when
    /// half of them are gone, so that not every request makes work.
    pub(super) fn ask(&self, running: usize, left: usize) -> bool {
        self.peak.fetch_max(running, Ordering::Relaxed);
        left * 2 <= self.wanted()
            && !self.is_making.load(Ordering::SeqCst)
            && !self.is_making.swap(true, Ordering::SeqCst)
    }

    /// Whether who makes them shall make another one, while `waiting` wait. If not, whoever asks next begins again.
    pub(super) fn goes_on(&self, waiting: impl Fn() -> usize) -> bool {
        if waiting() < self.wanted() {
            return true;
        }
        self.made();
        // One may have been taken just before, by somebody who saw that somebody makes them.
        waiting() < self.wanted() && !self.is_making.swap(true, Ordering::SeqCst)
    }

    /// Nobody makes any more.
    pub(super) fn made(&self) {
        self.is_making.store(false, Ordering::SeqCst);
    }

    /// Time has passed: what was wanted once is wanted no more.
    pub(super) fn settle(&self) {
        self.before.store(self.peak.swap(0, Ordering::Relaxed), Ordering::Relaxed);
    }

    /// As many are wanted as of another component, whose place this one takes.
    pub(super) fn expect(&self, wanted: usize) {
        self.peak.fetch_max(wanted, Ordering::Relaxed);
    }

    pub(super) fn wanted(&self) -> usize {
        self.peak.load(Ordering::Relaxed).max(self.before.load(Ordering::Relaxed)).min(AHEAD_MAX)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn as_many_are_wanted_as_ran_at_once() {
        let ahead = Ahead::default();
        assert!(!ahead.goes_on(|| 0), "nobody asked yet");
        assert!(ahead.ask(3, 0));
        assert!(ahead.goes_on(|| 2));
        assert!(!ahead.ask(100, 0), "somebody makes them already");
        assert!(ahead.goes_on(|| AHEAD_MAX - 1) && !ahead.goes_on(|| AHEAD_MAX));
        assert!(!ahead.ask(1, AHEAD_MAX), "enough wait");
        assert!(ahead.ask(1, AHEAD_MAX / 2));
    }

    #[test]
    fn what_was_wanted_once_is_forgotten() {
        let ahead = Ahead::default();
        assert!(ahead.ask(5, 0));
        ahead.settle();
        assert!(ahead.goes_on(|| 4));
        ahead.settle();
        assert!(!ahead.goes_on(|| 0));
    }
}
