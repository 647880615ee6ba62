//! How full a listener is, and what that leaves of its patience with connections that rest.
//!
//! A connection has memory of its own whether it asks for something or not. Near its bound a listener bears those that
//! rest for less and less time, as Envoy's overload manager scales its timers: who has rested longest is asked to go first,
//! and whoever comes finds room instead of a queue.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

/// How full a listener may be, in a hundred, and bear those that rest for all of their time.
const CALM_PERCENT: usize = 80;
/// What is left of that time when it is full: one of so many parts.
const PARTS: u32 = 60;

/// How many connections a listener has, of how many. Clones tell of the same one.
#[derive(Debug, Clone)]
pub(super) struct Crowd {
    count: Arc<AtomicUsize>,
    most: usize,
}

impl Crowd {
    pub(super) fn new(most: usize) -> Self {
        Self { count: Arc::default(), most }
    }

    /// So many are there now. Whether there is room for one more.
    pub(super) fn count(&self, count: usize) -> bool {
        self.count.store(count, Ordering::Relaxed);
        count < self.most
    }

    /// How long a connection may rest now that could rest for `idle`.
    pub(super) fn bears(&self, idle: Duration) -> Duration {
        let count = self.count.load(Ordering::Relaxed);
        let calm = self.most - self.most * (100 - CALM_PERCENT) / 100;
        if count <= calm || calm == self.most {
            return idle;
        }
        let part = |of: usize| u32::try_from(of).unwrap_or(u32::MAX);
        let left = idle / part(self.most - calm) * part(self.most.saturating_sub(count));
        left.max(idle / PARTS)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_fuller_it_is_the_less_time_there_is_to_rest() {
        let (crowd, idle) = (Crowd::new(1_000), Duration::from_secs(60));
        let mut bears = |count| {
            crowd.count(count);
            crowd.bears(idle).as_secs()
        };
        assert_eq!([0, 800, 900, 950, 999, 1_000].map(&mut bears), [60, 60, 30, 15, 1, 1]);
        assert!(crowd.count(999) && !crowd.count(1_000));
    }

    #[test]
    fn a_small_listener_has_a_calm_too() {
        for most in 1..10 {
            let crowd = Crowd::new(most);
            crowd.count(most);
            let bears = crowd.bears(Duration::from_secs(60)).as_secs();
            // With fewer than five places there is no fifth to tell.
            assert_eq!(bears, if most < 5 { 60 } else { 1 }, "{most}");
        }
    }
}
