//! Storage engines: ordered rows of bytes, changed by atomic batches.

mod memory;
mod sled;

use std::error::Error;
use std::sync::Arc;

use bytes::Bytes;

pub use self::memory::Memory;
pub use self::sled::Sled;

/// One row of a scan.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Its key.
    pub key: Bytes,
    /// Its value, if its checksum is right. A row that fails it is told and not left out: to leave it out would call it
    /// deleted.
    pub value: Result<Bytes, Corrupt>,
}

/// A row whose bytes are not those that were written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("row's checksum is wrong")]
pub struct Corrupt;

/// What a store keeps its rows in.
///
/// A batch and its durability are two calls, since many writers share one flush.
pub trait Engine: Send + Sync + 'static {
    /// The row of `key`. One that fails its checksum is an error that [`EngineError::is_corrupt`].
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError>;

    /// At most `limit` rows whose keys begin with `prefix` and are at or after `from`, in order.
    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError>;

    /// Applies the whole batch or nothing. It is visible at once and durable after the next [`Engine::flush`].
    fn apply(&self, batch: Batch) -> Result<(), EngineError>;

    /// Returns when all that was applied is on disk.
    fn flush(&self) -> Result<(), EngineError>;

    /// Whether it takes writes: an error that [`EngineError::is_full`] says that the disk is nearly full. Asked before
    /// anything is decided that a failed [`Engine::apply`] could not take back.
    fn writable(&self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Bytes that it takes on disk; none if it has no disk.
    fn disk_bytes(&self) -> Result<u64, EngineError> {
        Ok(0)
    }
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
    trouble: Trouble,
    source: Arc<dyn Error + Send + Sync>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Trouble {
    Failed,
    Corrupt,
    Full,
}

impl EngineError {
    /// `doing` is the engine's operation that failed.
    pub fn new(doing: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self { doing, trouble: Trouble::Failed, source: Arc::new(source) }
    }

    /// What was read is not what was written.
    pub fn corrupt(doing: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self { trouble: Trouble::Corrupt, ..Self::new(doing, source) }
    }

    /// There is no room on the disk.
    pub fn full(doing: &'static str, source: impl Error + Send + Sync + 'static) -> Self {
        Self { trouble: Trouble::Full, ..Self::new(doing, source) }
    }

    /// Whether what was read is not what was written.
    pub fn is_corrupt(&self) -> bool {
        self.trouble == Trouble::Corrupt
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        self.trouble == Trouble::Full
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
            rows.into_iter().map(|row| row.key).collect()
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
