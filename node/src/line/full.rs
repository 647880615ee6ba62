//! Whether the core of this thread is full: whether its thread has had no rest for a while.
//!
//! The runtime says when a thread has nothing to do, and when it has again. That costs nothing while it has, which is when
//! it would count.

use std::cell::Cell;
use std::io;
use std::time::{Duration, Instant};

use tokio::runtime::{Builder, Runtime};

/// How long a thread has had no rest when its core counts as full. At half of its load one has a rest after a few
/// requests; a burst of cheap ones is over by then.
const FULL_AFTER: Duration = Duration::from_micros(500);

thread_local! {
    /// Since when it has been at work. `None` if it rests, or if nobody tells.
    static AT_WORK: Cell<Option<Instant>> = const { Cell::new(None) };
}

/// The runtime of a node: it tells when its threads rest.
///
/// # Errors
/// The system has no more threads.
pub fn runtime() -> io::Result<Runtime> {
    Builder::new_multi_thread().enable_all().on_thread_park(rests).on_thread_unpark(works).build()
}

fn rests() {
    AT_WORK.set(None);
}

fn works() {
    AT_WORK.set(Some(Instant::now()));
}

/// Whether this thread's core is full at `now`.
pub(crate) fn is_full(now: Instant) -> bool {
    AT_WORK.get().is_some_and(|since| now.saturating_duration_since(since) >= FULL_AFTER)
}

/// Makes this thread's core full until this is dropped.
#[cfg(test)]
pub(crate) struct Filled;

#[cfg(test)]
impl Filled {
    pub(crate) fn new() -> Self {
        AT_WORK.set(Instant::now().checked_sub(FULL_AFTER * 1_000));
        Self
    }
}

#[cfg(test)]
impl Drop for Filled {
    fn drop(&mut self) {
        rests();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_core_is_full_when_its_thread_has_had_no_rest_for_a_while() {
        let now = Instant::now();
        assert!(!is_full(now + FULL_AFTER), "nobody told");
        works();
        assert!(!is_full(now) && is_full(Instant::now() + FULL_AFTER));
        rests();
        assert!(!is_full(Instant::now() + FULL_AFTER));
    }
}
