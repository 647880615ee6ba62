//! What waits to be used again: a stack, so that few are in use and those are warm. Knows no clock.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Things that wait, at most so many and each at most so long.
pub(super) struct Idle<T> {
    max: usize,
    longest: Duration,
    /// Held for a push or a pop only; what is given up is dropped after it.
    ///
    /// The one used last is the last.
    stack: Mutex<Vec<(Instant, T)>>,
}

impl<T> Idle<T> {
    pub(super) fn new(max: usize, longest: Duration) -> Self {
        Self { max, longest, stack: Mutex::new(Vec::new()) }
    }

    /// The one used last, if it does not wait too long already.
    pub(super) fn take(&self, now: Instant) -> Option<T> {
        let (since, last) = self.lock().pop()?;
        (!self.is_over(since, now)).then_some(last)
    }

    /// Lets one wait; beyond the most, it is dropped.
    pub(super) fn put(&self, one: T, now: Instant) {
        let mut stack = self.lock();
        if stack.len() >= self.max {
            drop(stack);
            drop(one);
        } else {
            stack.push((now, one));
        }
    }

    /// Drops what waits too long. False if nothing is left.
    pub(super) fn expire(&self, now: Instant) -> bool {
        let mut stack = self.lock();
        let over = stack.iter().take_while(|(since, _)| self.is_over(*since, now)).count();
        let dropped: Vec<_> = stack.drain(..over).collect();
        let is_left = !stack.is_empty();
        drop(stack);
        drop(dropped);
        is_left
    }

    pub(super) fn count(&self) -> usize {
        self.lock().len()
    }

    pub(super) fn most(&self) -> usize {
        self.max
    }

    pub(super) fn longest(&self) -> Duration {
        self.longest
    }

    fn is_over(&self, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) >= self.longest
    }

    fn lock(&self) -> MutexGuard<'_, Vec<(Instant, T)>> {
        self.stack.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONGEST: Duration = Duration::from_secs(1);

    #[test]
    fn the_one_used_last_is_used_next() {
        let (idle, now) = (Idle::new(3, LONGEST), Instant::now());
        for one in ["a", "b"] {
            idle.put(one, now);
        }
        assert_eq!([idle.take(now), idle.take(now), idle.take(now)], [Some("b"), Some("a"), None]);
    }

    #[test]
    fn beyond_the_most_nothing_waits() {
        let (idle, now) = (Idle::new(2, LONGEST), Instant::now());
        for one in ["a", "b", "c"] {
            idle.put(one, now);
        }
        assert_eq!((idle.count(), idle.take(now)), (2, Some("b")));
    }

    #[test]
    fn what_waited_too_long_is_never_used() {
        let (idle, now) = (Idle::new(2, LONGEST), Instant::now());
        idle.put("a", now);
        assert_eq!(idle.take(now + LONGEST), None);
        idle.put("b", now);
        assert_eq!(idle.take(now + LONGEST / 2), Some("b"));
    }

    #[test]
    fn what_waits_too_long_is_dropped_and_nothing_else() {
        let (idle, now) = (Idle::new(3, LONGEST), Instant::now());
        idle.put("a", now);
        idle.put("b", now + LONGEST / 2);
        assert!(idle.expire(now + LONGEST / 2));
        assert_eq!(idle.count(), 2);
        assert!(idle.expire(now + LONGEST));
        assert_eq!(idle.count(), 1, "the older one is gone");
        assert!(!idle.expire(now + LONGEST * 2));
        assert_eq!(idle.count(), 0);
    }
}
