//! Rows in sled: a directory on disk.
//!
//! One tree, since many trees bloat the log. A flush is sled's own (which on Linux asks for the written range
//! only) and then one of the whole file, so that what was acknowledged survives a power cut. sled collects its
//! garbage only in its own periodic flush, so that stays on.

use std::fs::File;
use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::guard::{Guard, caught};
use super::{Batch, Engine, EngineError, Row};

/// How often sled flushes by itself what nobody waits for, milliseconds.
const FLUSH_EVERY_MS: u64 = 500;

/// How long the file may still be held that was closed a moment ago: sled's threads let go of it in their own time.
const CLOSING_MAX: Duration = Duration::from_secs(5);

/// How often it is tried meanwhile.
const CLOSING_LOOK: Duration = Duration::from_millis(20);

/// The file that sled writes to, within its directory.
const LOG_FILE: &str = "db";

/// An engine on disk.
#[derive(Debug)]
pub struct Sled {
    /// There until it is dropped.
    rows: Option<sled::Db>,
    log: File,
    guard: Guard,
}

impl Sled {
    /// Opens or makes the rows in `directory`, which no other process may have open: an error after
    /// [`CLOSING_MAX`]. sled may use `cache_bytes` as cache; its real use is a multiple of that.
    pub fn open(directory: &Path, cache_bytes: u64) -> Result<Self, EngineError> {
        let config = sled::Config::new().path(directory).cache_capacity(cache_bytes);
        let config = config.flush_every_ms(Some(FLUSH_EVERY_MS));
        let began = Instant::now();
        let rows = loop {
            match caught("open", || Ok(config.open()))? {
                Err(error) if is_held(&error) && began.elapsed() < CLOSING_MAX => thread::sleep(CLOSING_LOOK),
                opened => break opened.map_err(|source| failed("open", source))?,
            }
        };
        let log = File::open(directory.join(LOG_FILE)).map_err(|source| EngineError::io("open", source))?;
        Ok(Self { rows: Some(rows), log, guard: Guard::default() })
    }
}

impl Sled {
    fn rows(&self) -> &sled::Db {
        self.rows.as_ref().expect("there until it is dropped")
    }
}

impl Drop for Sled {
    fn drop(&mut self) {
        let rows = self.rows.take();
        if self.guard.is_down() {
            // After a panic sled's locks may be held for ever, and its end would wait for them: better leak.
            std::mem::forget(rows);
            return;
        }
        let _ended = caught("close", || {
            drop(rows);
            Ok(())
        });
    }
}

impl Engine for Sled {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.guard.run("get", || {
            let row = self.rows().get(key).map_err(|source| failed("get", source))?;
            Ok(row.map(|value| Bytes::copy_from_slice(&value)))
        })
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
        self.guard.run("scan", || {
            let mut rows = Vec::new();
            for row in self.rows().range(prefix.max(from)..).take(limit) {
                let (key, value) = row.map_err(|source| failed("scan", source))?;
                if !key.starts_with(prefix) {
                    break;
                }
                rows.push(Row { key: Bytes::copy_from_slice(&key), value: Ok(Bytes::copy_from_slice(&value)) });
            }
            Ok(rows)
        })
    }

    fn apply(&self, batch: Batch) -> Result<(), EngineError> {
        let mut changes = sled::Batch::default();
        for (key, value) in batch.into_changes() {
            match value {
                Some(value) => changes.insert(key, value),
                None => changes.remove(key),
            }
        }
        self.guard.run("apply", || self.rows().apply_batch(changes).map_err(|source| failed("apply", source)))
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.guard.run("flush", || {
            self.rows().flush().map_err(|source| failed("flush", source))?;
            self.log.sync_data().map_err(|source| EngineError::io("flush", source))
        })
    }

    fn disk_bytes(&self) -> Result<u64, EngineError> {
        self.guard.run("stat", || self.rows().size_on_disk().map_err(|source| failed("stat", source)))
    }
}

/// Whether the file is locked. sled has no kind of its own for it.
fn is_held(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("could not acquire lock"))
}

/// What sled calls a bug or not supported is in practice what it finds in damaged files.
fn failed(doing: &'static str, error: sled::Error) -> EngineError {
    match error {
        sled::Error::Io(error) => EngineError::io(doing, error),
        error => EngineError::corrupt(doing, error),
    }
}
