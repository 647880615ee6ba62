//! Storage engines: ordered rows of bytes, changed by atomic batches.

mod blobs;
mod changes;
mod disk;
mod envelope;
mod guard;
mod mark;
mod memory;
mod place;
mod redb;
mod sled;
mod usage;
mod vault;

use std::error::Error;
use std::io::ErrorKind;
use std::sync::Arc;

use bytes::Bytes;

pub use self::changes::{Changed, Changes};
#[cfg(test)]
pub(crate) use self::mark::far_mark;
pub use self::memory::Memory;
pub use self::place::Generation;
pub use self::redb::Redb;
pub use self::sled::Sled;
pub use self::usage::Usage;
pub use self::vault::{Checked, Damage, Settings, Stats, Vault, engine_in};

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

    /// Applies a batch and returns when it and all before is on disk.
    fn commit(&self, batch: Batch) -> Result<(), EngineError> {
        self.apply(batch)?;
        self.flush()
    }

    /// Whether it takes writes: an error that [`EngineError::is_full`] says that the disk is nearly full. Asked before
    /// anything is decided that a failed [`Engine::apply`] could not take back.
    fn writable(&self) -> Result<(), EngineError> {
        Ok(())
    }

    /// Bytes that it takes on disk; none if it has no disk.
    fn disk_bytes(&self) -> Result<u64, EngineError> {
        Ok(0)
    }

    /// What the records of a store take, whose rows begin with `prefix`. None if the engine does not count.
    fn usage(&self, prefix: &[u8]) -> Option<Usage> {
        let _ = prefix;
        None
    }

    /// How often a row failed its checksum since the start.
    fn corrupt_reads(&self) -> u64 {
        0
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

    /// How many changes.
    pub fn len(&self) -> usize {
        self.changes.len()
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
    Panic,
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

    /// The file system failed.
    pub fn io(doing: &'static str, source: std::io::Error) -> Self {
        match source.kind() {
            ErrorKind::StorageFull | ErrorKind::QuotaExceeded => Self::full(doing, source),
            ErrorKind::InvalidData | ErrorKind::UnexpectedEof | ErrorKind::InvalidInput => Self::corrupt(doing, source),
            _ => Self::new(doing, source),
        }
    }

    fn panicked(doing: &'static str, source: guard::Panicked) -> Self {
        Self { trouble: Trouble::Panic, ..Self::new(doing, source) }
    }

    fn is_panic(&self) -> bool {
        self.trouble == Trouble::Panic
    }

    /// Whether what was read is not what was written.
    pub fn is_corrupt(&self) -> bool {
        matches!(self.trouble, Trouble::Corrupt | Trouble::Panic)
    }

    /// Whether the disk is full.
    pub fn is_full(&self) -> bool {
        self.trouble == Trouble::Full
    }
}

#[cfg(test)]
mod suite;
