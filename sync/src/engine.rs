//! Storage engines: ordered rows of bytes, changed by atomic batches.

mod memory;
mod sled;

use std::error::Error;
use std::sync::Arc;

use bytes::Bytes;

pub use self::memory::Memory;
pub use self::sled::Sled;

/// One row: key and value.
pub type Row = (Bytes, Bytes);

/// What a store keeps its rows in.
pub trait Engine: Send + Sync + 'static {
    /// The row of `key`.
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// At most `limit` rows whose keys begin with `prefix` and are at or after `from`, in order.
    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError>;

    /// Applies the whole batch or nothing. It is visible at once and durable after the next [`Engine::flush`].
    fn apply(&self, batch: Batch) -> Result<(), EngineError>;

    /// Returns when all that was applied is on disk.
    fn flush(&self) -> Result<(), EngineError>;
}

/// Changes that are made together.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Batch {
    changes: Vec<(Vec<u8>, Option<Vec<u8>>)>,
}

impl Batch {
    /// Sets a row.
    pub fn put(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.changes.push((key, Some(value)));
    }

    /// Removes a row.
    pub fn remove(&mut self, key: Vec<u8>) {
        self.changes.push((key, None));
    }

    /// Whether it changes nothing.
    pub fn is_empty(&self) -> bool {
        self.changes.is_empty()
    }

    /// The changes in order: a later one of the same key wins.
    pub fn into_changes(self) -> Vec<(Vec<u8>, Option<Vec<u8>>)> {
        self.changes
    }
}

/// An engine that failed. Cheap to clone, since one failure may fail many writes.
#[derive(Debug, Clone, thiserror::Error)]
#[error("{doing} of the storage engine")]
pub struct EngineError {
    doing: &'static str,
    source: Arc<dyn Error + Send + Sync>,
}

impl EngineError {
    /// `doing` is the engine's operation that failed.
    pub fn new(doing: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self { doing, source: Arc::new(source) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn conforms(engine: &dyn Engine) {
        let mut batch = Batch::default();
        for key in ["a1", "a2", "a3", "b1"] {
            batch.put(key.into(), key.to_uppercase().into());
        }
        batch.remove("a2".into());
        engine.apply(batch).unwrap();
        engine.flush().unwrap();
        assert_eq!(engine.get(b"a1").unwrap(), Some(Bytes::from_static(b"A1")));
        assert_eq!(engine.get(b"a2").unwrap(), None);
        let keys = |prefix: &str, from: &str, limit| -> Vec<Bytes> {
            let rows = engine.scan(prefix.as_bytes(), from.as_bytes(), limit).unwrap();
            rows.into_iter().map(|(key, _)| key).collect()
        };
        assert_eq!(keys("a", "", 10), ["a1", "a3"]);
        assert_eq!(keys("a", "a2", 10), ["a3"]);
        assert_eq!(keys("", "", 2), ["a1", "a3"]);
        assert_eq!(keys("a", "a4", 10), [""; 0]);
        assert_eq!(keys("", "b", 10), ["b1"]);
    }

    #[test]
    fn both_engines_do_the_same() {
        conforms(&Memory::default());
        let directory = tempfile::tempdir().unwrap();
        conforms(&Sled::open(directory.path()).unwrap());
    }

    #[test]
    fn sled_keeps_its_rows_when_opened_again() {
        let directory = tempfile::tempdir().unwrap();
        let mut batch = Batch::default();
        batch.put(b"k".to_vec(), vec![7; 200_000]);
        let engine = Sled::open(directory.path()).unwrap();
        engine.apply(batch).unwrap();
        engine.flush().unwrap();
        drop(engine);
        let engine = Sled::open(directory.path()).unwrap();
        assert_eq!(engine.get(b"k").unwrap().unwrap(), vec![7; 200_000]);
    }
}
