//! Rows in sled: a directory on disk.
//!
//! One tree, since many trees bloat the log. A flush is sled's own (which on Linux asks for the written range
//! only) and then one of the whole file, so that what was acknowledged survives a power cut.

use std::fs::File;
use std::path::Path;

use bytes::Bytes;

use super::{Batch, Engine, EngineError, Row};

/// Memory sled may use as cache, bytes. Its real use is a multiple of this.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;

/// How often sled flushes by itself what nobody waits for, milliseconds.
const FLUSH_EVERY_MS: u64 = 500;

/// The file that sled writes to, within its directory.
const LOG_FILE: &str = "db";

/// An engine on disk.
#[derive(Debug)]
pub struct Sled {
    rows: sled::Db,
    log: File,
}

impl Sled {
    /// Opens or makes the rows in `directory`, which no other process may have open.
    pub fn open(directory: &Path) -> Result<Self, EngineError> {
        let rows = sled::Config::new()
            .path(directory)
            .cache_capacity(CACHE_BYTES)
            .flush_every_ms(Some(FLUSH_EVERY_MS))
            .open()
            .map_err(|source| EngineError::new("open", source))?;
        let log = File::open(directory.join(LOG_FILE)).map_err(|source| EngineError::new("open", source))?;
        Ok(Self { rows, log })
    }
}

impl Engine for Sled {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        let row = self.rows.get(key).map_err(|source| EngineError::new("get", source))?;
        Ok(row.map(|value| Bytes::copy_from_slice(&value)))
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
        let mut rows = Vec::new();
        for row in self.rows.range(prefix.max(from)..).take(limit) {
            let (key, value) = row.map_err(|source| EngineError::new("scan", source))?;
            if !key.starts_with(prefix) {
                break;
            }
            rows.push(Row { key: Bytes::copy_from_slice(&key), value: Ok(Bytes::copy_from_slice(&value)) });
        }
        Ok(rows)
    }

    fn apply(&self, batch: Batch) -> Result<(), EngineError> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch.into_changes() {
            match value {
                Some(value) => changes.insert(key, value),
                None => changes.remove(key),
            }
        }
        self.rows.apply_batch(changes).map_err(|source| EngineError::new("apply", source))
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.rows.flush().map_err(|source| EngineError::new("flush", source))?;
        self.log.sync_data().map_err(|source| EngineError::new("flush", source))
    }
}
