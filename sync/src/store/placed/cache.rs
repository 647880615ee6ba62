//! What a node keeps of reads of stores that it does not hold: for as long as the store's rule says, counted from before
//! the question was asked, and never beyond a write that went through this node.

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher as _, RandomState};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use selvage_config::StoreName;
use tokio::time::Instant;

use crate::store::Kept;

/// Bytes of all that is kept, with its keys. What was read first goes first.
pub const CACHE_BYTES_MAX: usize = 32 * 1024 * 1024;

/// Bytes of one value, beyond which it is not kept.
const CACHED_BYTES_MAX: usize = 1024 * 1024;

/// What a row takes besides key, metadata and value, bytes.
const ROW_BYTES: usize = 256;

/// Counters of writes; keys share them by their hash.
const EPOCHS: usize = 256;

type Key = (StoreName, String);

/// When a question is asked, and how many writes had gone through this node then.
#[derive(Clone, Copy)]
pub(super) struct Asked {
    at: Instant,
    epoch: u64,
}

pub(super) struct Cache {
    rows: Mutex<Rows>,
    epochs: Vec<AtomicU64>,
    hasher: RandomState,
}

#[derive(Default)]
struct Rows {
    rows: HashMap<Key, Row>,
    /// The keys in the order in which they came; with rows that are gone or newer.
    order: VecDeque<(u64, Key)>,
    bytes: usize,
    next: u64,
}

struct Row {
    kept: Option<Kept>,
    at: Instant,
    number: u64,
}

impl Default for Cache {
    fn default() -> Self {
        let epochs = (0..EPOCHS).map(|_| AtomicU64::new(0)).collect();
        Self { rows: Mutex::default(), epochs, hasher: RandomState::new() }
    }
}

impl Cache {
    /// What is kept of a key that is not older than `cache_ms`, and has not ended. Within: whether there was a value.
    pub(super) fn get(
        &self,
        store: &StoreName,
        key: &str,
        cache_ms: u64,
        (now, now_ms): (Instant, u64),
    ) -> Option<Option<Kept>> {
        if cache_ms == 0 {
            return None;
        }
        let rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        let row = rows.rows.get(&(store.clone(), key.to_owned()))?;
        if now.duration_since(row.at) > Duration::from_millis(cache_ms) {
            return None;
        }
        let ends = row.kept.as_ref().and_then(|kept| kept.terms.expires_ms);
        Some(if ends.is_some_and(|ends| ends <= now_ms) { None } else { row.kept.clone() })
    }

    /// Before a question.
    pub(super) fn asks(&self, store: &StoreName, key: &str, now: Instant) -> Asked {
        Asked { at: now, epoch: self.epoch(store, key).load(Ordering::Acquire) }
    }

    /// Keeps an answer, unless a write went through this node since it was asked.
    pub(super) fn keep(&self, asked: Asked, store: &StoreName, key: &str, kept: Option<Kept>) {
        let value = kept.as_ref().map_or(0, |kept| kept.value.len() + kept.terms.metadata.len());
        if value > CACHED_BYTES_MAX {
            return;
        }
        let mut rows = self.rows.lock().unwrap_or_else(PoisonError::into_inner);
        // Looked at under the lock, which a write takes after it has counted.
        if self.epoch(store, key).load(Ordering::Acquire) != asked.epoch {
            return;
        }
        rows.put((store.clone(), key.to_owned()), kept, asked.at);
    }

    /// After a write.
    pub(super) fn forget(&self, store: &StoreName, key: &str) {
        self.epoch(store, key).fetch_add(1, Ordering::AcqRel);
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).remove(&(store.clone(), key.to_owned()));
    }

    pub(super) fn bytes(&self) -> usize {
        self.rows.lock().unwrap_or_else(PoisonError::into_inner).bytes
    }

    fn epoch(&self, store: &StoreName, key: &str) -> &AtomicU64 {
        let hash = self.hasher.hash_one((store, key));
        &self.epochs[usize::try_from(hash % EPOCHS as u64).unwrap_or_default()]
    }
}

impl Rows {
    fn put(&mut self, key: Key, kept: Option<Kept>, at: Instant) {
        self.remove(&key);
        self.bytes += weight(&key, kept.as_ref());
        self.next += 1;
        self.order.push_back((self.next, key.clone()));
        self.rows.insert(key, Row { kept, at, number: self.next });
        while self.bytes > CACHE_BYTES_MAX {
            let Some((number, oldest)) = self.order.pop_front() else { break };
            if self.rows.get(&oldest).is_some_and(|row| row.number == number) {
                self.remove(&oldest);
            }
        }
        // What is written again and again leaves no more behind than there are rows.
        if self.order.len() > 2 * self.rows.len() + EPOCHS {
            let rows = &self.rows;
            self.order.retain(|(number, key)| rows.get(key).is_some_and(|row| row.number == *number));
        }
    }

    fn remove(&mut self, key: &Key) {
        if let Some(row) = self.rows.remove(key) {
            self.bytes -= weight(key, row.kept.as_ref());
        }
    }
}

fn weight((store, name): &Key, kept: Option<&Kept>) -> usize {
    // A key lies in the rows and in their order.
    let key = 2 * (store.as_str().len() + name.len());
    ROW_BYTES + key + kept.map_or(0, |kept| kept.value.len() + kept.terms.metadata.len())
}

#[cfg(test)]
mod tests {
    use bytes::Bytes;

    use super::*;
    use crate::entry::{Dot, Origin};
    use crate::store::Terms;

    fn store() -> StoreName {
        "app/default".parse().unwrap()
    }

    fn kept(value: &[u8], expires_ms: Option<u64>) -> Kept {
        Kept {
            value: Bytes::copy_from_slice(value),
            terms: Terms { expires_ms, metadata: Bytes::new() },
            version: Dot { origin: Origin { node: "a".parse().unwrap(), incarnation: 1 }, seq: 1 },
        }
    }

    fn read(cache: &Cache, key: &str, value: &[u8], now: Instant) {
        cache.keep(cache.asks(&store(), key, now), &store(), key, Some(kept(value, None)));
    }

    fn after(begun: Instant, ms: u64) -> Instant {
        begun + Duration::from_millis(ms)
    }

    #[test]
    fn what_was_read_is_kept_for_so_long_and_no_longer() {
        let (cache, begun) = (Cache::default(), Instant::now());
        read(&cache, "k", b"v", begun);
        assert!(cache.get(&store(), "k", 100, (after(begun, 100), 0)).is_some());
        assert_eq!(cache.get(&store(), "k", 100, (after(begun, 101), 0)), None);
        assert_eq!(cache.get(&store(), "k", 0, (begun, 0)), None, "the rule says now that nothing is kept");
        assert_eq!(cache.get(&store(), "other", 100, (begun, 0)), None);
    }

    #[test]
    fn a_value_that_ends_is_gone_when_it_does_and_that_there_was_none_is_kept_too() {
        let (cache, now) = (Cache::default(), Instant::now());
        cache.keep(cache.asks(&store(), "k", now), &store(), "k", Some(kept(b"v", Some(500))));
        cache.keep(cache.asks(&store(), "none", now), &store(), "none", None);
        assert!(cache.get(&store(), "k", 100, (now, 499)).unwrap().is_some());
        assert_eq!(cache.get(&store(), "k", 100, (now, 500)), Some(None));
        assert_eq!(cache.get(&store(), "none", 100, (now, 0)), Some(None));
    }

    #[test]
    fn what_was_asked_before_a_write_is_not_kept_after_it() {
        let (cache, now) = (Cache::default(), Instant::now());
        read(&cache, "k", b"old", now);
        let asked = cache.asks(&store(), "k", now);
        cache.forget(&store(), "k");
        assert_eq!(cache.get(&store(), "k", 100, (now, 0)), None);
        cache.keep(asked, &store(), "k", Some(kept(b"old", None)));
        assert_eq!(cache.get(&store(), "k", 100, (now, 0)), None);
        read(&cache, "k", b"new", now);
        assert_eq!(cache.get(&store(), "k", 100, (now, 0)).unwrap().unwrap().value, "new");
    }

    #[test]
    fn what_is_kept_is_bounded_and_the_oldest_goes_first() {
        let (cache, now) = (Cache::default(), Instant::now());
        let value = vec![7; CACHED_BYTES_MAX];
        for number in 0..40 {
            read(&cache, &format!("k{number}"), &value, now);
            assert!(cache.bytes() <= CACHE_BYTES_MAX);
        }
        assert_eq!(cache.get(&store(), "k0", 100, (now, 0)), None);
        assert!(cache.get(&store(), "k39", 100, (now, 0)).is_some());
        read(&cache, "large", &vec![7; CACHED_BYTES_MAX + 1], now);
        assert_eq!(cache.get(&store(), "large", 100, (now, 0)), None);
        for _ in 0..10_000 {
            read(&cache, "same", b"v", now);
        }
        let rows = cache.rows.lock().unwrap();
        assert!(rows.order.len() <= 2 * rows.rows.len() + EPOCHS + 1, "{}", rows.order.len());
    }
}
