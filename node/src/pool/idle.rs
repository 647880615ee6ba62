//! What waits to be used again: a stack, so that few are in use and those are warm. Knows no clock.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

/// Things that wait, at most so many and each at most so long.
pub(super) struct Idle<T> {
    max: usize,
    longest: Duration,
    /// Held for a push or a pop only; what is given up is dropped after it.
    stack: Mutex<Stack<T>>,
}

struct Stack<T> {
    /// The one used last is the last.
    waiting: Vec<(Instant, T)>,
    /// Whether somebody calls [`Idle::expire`] until nothing is left.
    is_swept: bool,
}

impl<T> Idle<T> {
    pub(super) fn new(max: usize, longest: Duration) -> Self {
        Self { max, longest, stack: Mutex::new(Stack { waiting: Vec::new(), is_swept: false }) }
    }

    /// The one used last, if it does not wait too long already.
    pub(super) fn take(&self, now: Instant) -> Option<T> {
        let (since, last) = self.lock().waiting.pop()?;
        (!self.is_over(since, now)).then_some(last)
    }

    /// Lets one wait; beyond the most, it is dropped. True if somebody must begin to sweep.
    #[must_use]
    pub(super) fn put(&self, one: T, now: Instant) -> bool {
        let mut stack = self.lock();
        if stack.waiting.len() >= self.max {
            drop(stack);
            drop(one);
            return false;
        }
        stack.waiting.push((now, one));
        !std::mem::replace(&mut stack.is_swept, true)
    }

    /// Drops what waits too long. False if nothing is left, and nobody needs to sweep any more.
    pub(super) fn expire(&self, now: Instant) -> bool {
        let mut stack = self.lock();
        let over = stack.waiting.iter().take_while(|(since, _)| self.is_over(*since, now)).count();
        let dropped: Vec<_> = stack.waiting.drain(..over).collect();
        stack.is_swept = !stack.waiting.is_empty();
        let is_left = stack.is_swept;
        drop(stack);
        drop(dropped);
        is_left
    }

    pub(super) fn count(&self) -> usize {
        self.lock().waiting.len()
    }

    fn is_over(&self, since: Instant, now: Instant) -> bool {
        now.saturating_duration_since(since) >= self.longest
    }

    fn lock(&self) -> MutexGuard<'_, Stack<T>> {
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
            let _ = idle.put(one, now);
        }
        assert_eq!([idle.take(now), idle.take(now), idle.take(now)], [Some("b"), Some("a"), None]);
    }

    #[test]
    fn beyond_the_most_nothing_waits() {
        let (idle, now) = (Idle::new(2, LONGEST), Instant::now());
        for one in ["a", "b", "c"] {
            let _ = idle.put(one, now);
        }
        assert_eq!((idle.count(), idle.take(now)), (2, Some("b")));
    }

    #[test]
    fn what_waited_too_long_is_never_used() {
        let (idle, now) = (Idle::new(2, LONGEST), Instant::now());
        let _ = idle.put("a", now);
        assert_eq!(idle.take(now + LONGEST), None);
        let _ = idle.put("b", now);
        assert_eq!(idle.take(now + LONGEST / 2), Some("b"));
    }

    #[test]
    fn the_sweep_begins_once_and_ends_with_the_last() {
        let (idle, now) = (Idle::new(3, LONGEST), Instant::now());
        assert!(idle.put("a", now));
        assert!(!idle.put("b", now + LONGEST / 2), "somebody sweeps already");
        assert!(idle.expire(now + LONGEST / 2));
        assert_eq!(idle.count(), 2);
        assert!(idle.expire(now + LONGEST));
        assert_eq!(idle.count(), 1, "the older one is gone");
        assert!(!idle.expire(now + LONGEST * 2));
        assert_eq!(idle.count(), 0);
        assert!(idle.put("c", now), "nobody sweeps any more");
    }
}
