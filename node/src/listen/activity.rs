//! What one connection over TCP does: what its stream, its requests and its owner tell each other.

use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use tokio::sync::Notify;

use crate::fault::ClientFault;

/// What one connection does. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Activity {
    shared: Arc<Counters>,
}

#[derive(Debug)]
struct Counters {
    since: Instant,
    read_bytes: AtomicU64,
    requests: AtomicU64,
    under_way: AtomicUsize,
    /// When the last request ended, milliseconds after `since`.
    rested_ms: AtomicU64,
    /// When a head began that is not whole yet, in the same way and one more; 0: there is none.
    head_ms: AtomicU64,
    glitches: AtomicU32,
    choked: AtomicBool,
    leaving: AtomicBool,
    /// Nothing of a message of HTTP/1.1 is on its way, in or out.
    at_rest: AtomicBool,
    /// The request of HTTP/1.1, by its number, that broke a rule. There is none after it.
    fault: OnceLock<(u64, ClientFault)>,
    /// The connection should end.
    urge: Notify,
}

/// A request under way on a connection.
#[derive(Debug)]
pub(super) struct Busy {
    shared: Arc<Counters>,
}

impl Activity {
    pub(super) fn new() -> Self {
        let shared = Counters {
            since: Instant::now(),
            read_bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            under_way: AtomicUsize::new(0),
            rested_ms: AtomicU64::new(0),
            head_ms: AtomicU64::new(0),
            glitches: AtomicU32::new(0),
            choked: AtomicBool::new(false),
            leaving: AtomicBool::new(false),
            at_rest: AtomicBool::new(false),
            fault: OnceLock::new(),
            urge: Notify::new(),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A request begins. Returns also how many there were, this one counted.
    pub(super) fn begin(&self) -> (Busy, u64) {
        self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        let count = self.shared.requests.fetch_add(1, Ordering::Relaxed) + 1;
        (Busy { shared: Arc::clone(&self.shared) }, count)
    }

    /// How many requests there were.
    pub(super) fn requests(&self) -> u64 {
        self.shared.requests.load(Ordering::Relaxed)
    }

    /// Whether one is under way.
    pub(super) fn is_busy(&self) -> bool {
        self.shared.under_way.load(Ordering::Relaxed) > 0
    }

    /// How old the connection was when the last request ended.
    pub(super) fn rested(&self) -> Duration {
        Duration::from_millis(self.shared.rested_ms.load(Ordering::Relaxed))
    }

    /// How old the connection is.
    pub(super) fn age(&self) -> Duration {
        self.shared.since.elapsed()
    }

    /// So many bytes came.
    pub(super) fn read(&self, bytes: usize) {
        self.shared.read_bytes.fetch_add(bytes as u64, Ordering::Relaxed);
    }

    /// Bytes that came over it.
    pub(super) fn read_bytes(&self) -> u64 {
        self.shared.read_bytes.load(Ordering::Relaxed)
    }

    /// Whether nothing of a message of HTTP/1.1 is on its way between the stream and its parser.
    pub(super) fn rest(&self, is_at_rest: bool) {
        self.shared.at_rest.store(is_at_rest, Ordering::Relaxed);
    }

    /// Whether it has been without a request so long, and nothing of one is on its way.
    pub(super) fn is_at_rest(&self, since: Duration) -> bool {
        self.shared.at_rest.load(Ordering::Relaxed) && !self.is_busy() && self.age() >= self.rested() + since
    }

    /// A head has begun, or the one that had is whole.
    pub(super) fn head(&self, is_partial: bool) {
        let begun = self.shared.head_ms.load(Ordering::Relaxed) > 0;
        if begun != is_partial {
            let now = if is_partial { self.shared.now_ms().saturating_add(1) } else { 0 };
            self.shared.head_ms.store(now, Ordering::Relaxed);
        }
    }

    /// How old the connection was when a head began that is not whole yet.
    pub(super) fn head_begun(&self) -> Option<Duration> {
        self.shared.head_ms.load(Ordering::Relaxed).checked_sub(1).map(Duration::from_millis)
    }

    /// The request of this number broke a rule.
    pub(super) fn broke(&self, request: u64, fault: ClientFault) {
        // The first is the one: nothing is read after it.
        let _ = self.shared.fault.set((request, fault));
    }

    /// The rule that the request of this number broke.
    pub(super) fn fault(&self, request: u64) -> Option<ClientFault> {
        self.shared.fault.get().filter(|(number, _)| *number == request).map(|(_, fault)| *fault)
    }

    /// The client did something that serves nothing. From three quarters of `max` on it should leave, at `max` it is read
    /// no more.
    pub(super) fn glitch(&self, max: u32) {
        let count = self.shared.glitches.fetch_add(1, Ordering::Relaxed).saturating_add(1);
        if count >= max {
            self.shared.choked.store(true, Ordering::Relaxed);
        }
        if count >= max / 4 * 3 {
            self.shared.urge.notify_one();
        }
    }

    /// The client took a whole answer: one glitch is forgiven.
    pub(super) fn forgive(&self) {
        let less = |count: u32| count.checked_sub(1);
        // It fails where there is none to forgive.
        let _ = self.shared.glitches.fetch_update(Ordering::Relaxed, Ordering::Relaxed, less);
    }

    /// Whether the client did too much that serves nothing.
    pub(super) fn is_choked(&self) -> bool {
        self.shared.choked.load(Ordering::Relaxed)
    }

    /// From now on each answer is the last one.
    pub(super) fn leave(&self) {
        self.shared.leaving.store(true, Ordering::Relaxed);
    }

    /// Whether it is so.
    pub(super) fn is_leaving(&self) -> bool {
        self.shared.leaving.load(Ordering::Relaxed)
    }

    /// The connection should end.
    pub(super) fn urge(&self) {
        self.shared.urge.notify_one();
    }

    /// Waits until the connection should end.
    pub(super) async fn urged(&self) {
        self.shared.urge.notified().await;
    }
}

impl Counters {
    fn now_ms(&self) -> u64 {
        u64::try_from(self.since.elapsed().as_millis()).unwrap_or(u64::MAX)
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.shared.rested_ms.store(self.shared.now_ms(), Ordering::Relaxed);
        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_connection_with_a_request_is_busy() {
        let activity = Activity::new();
        let (one, first) = activity.begin();
        let (two, second) = activity.begin();
        assert_eq!((first, second, activity.requests()), (1, 2, 2));
        drop(one);
        assert!(activity.is_busy());
        drop(two);
        assert!(!activity.is_busy() && activity.rested() <= activity.age());
    }

    #[test]
    fn a_head_is_timed_from_its_first_byte() {
        let activity = Activity::new();
        assert_eq!(activity.head_begun(), None);
        activity.head(true);
        let begun = activity.head_begun().unwrap();
        activity.head(true);
        assert_eq!(activity.head_begun(), Some(begun));
        activity.head(false);
        assert_eq!(activity.head_begun(), None);
    }

    #[tokio::test]
    async fn glitches_add_up_and_answers_forgive_them() {
        let activity = Activity::new();
        activity.forgive();
        for _ in 0..2 {
            activity.glitch(4);
        }
        activity.forgive();
        activity.glitch(4);
        assert!(!activity.is_choked());
        activity.glitch(4);
        activity.urged().await;
        assert!(!activity.is_choked());
        activity.glitch(4);
        assert!(activity.is_choked());
    }

    #[test]
    fn only_the_request_that_broke_a_rule_is_told_so() {
        let activity = Activity::new();
        activity.broke(2, ClientFault::Malformed);
        activity.broke(3, ClientFault::Host);
        assert_eq!([1, 2, 3].map(|number| activity.fault(number)), [None, Some(ClientFault::Malformed), None]);
    }
}
