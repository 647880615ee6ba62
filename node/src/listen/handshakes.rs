//! Handshakes of TLS and QUIC that are under way. They cost more than what follows, and nobody knows yet who asks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

/// How many there are, of all listeners.
#[derive(Debug)]
pub(super) struct Handshakes {
    count: AtomicU32,
    most: u32,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Handshake(Arc<Handshakes>);

impl Handshakes {
    pub(super) fn new(most: u32) -> Self {
        Self { count: AtomicU32::new(0), most }
    }

    /// One begins, if there are not too many.
    pub(super) fn begin(self: &Arc<Self>) -> Option<Handshake> {
        let more = |count: u32| Some(count + 1).filter(|count| *count <= self.most);
        self.count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok()?;
        Some(Handshake(Arc::clone(self)))
    }

    /// Whether there are so many that none should begin for an address that may be forged: half of all.
    pub(super) fn is_crowded(&self) -> bool {
        self.count.load(Ordering::Relaxed) >= self.most / 2
    }
}

impl Drop for Handshake {
    fn drop(&mut self) {
        self.0.count.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn there_are_so_many_and_no_more_until_one_ends() {
        let all = Arc::new(Handshakes::new(2));
        assert!(!all.is_crowded());
        let (first, _second) = (all.begin(), all.begin().unwrap());
        assert!(all.is_crowded());
        assert!(first.is_some() && all.begin().is_none() && all.begin().is_none());
        drop(first);
        let _third = all.begin().unwrap();
        assert!(all.begin().is_none());
    }
}
