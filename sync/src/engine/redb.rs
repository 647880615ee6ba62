//! Rows in redb: one file, with pages in a copy-on-write tree.
//!
//! Its pages are not checked when they are read, so what it returns is worth no more than the envelope of the
//! row says. It gives space back, opens in milliseconds and survives a power cut as it is.

use std::path::Path;
use std::sync::{Mutex, PoisonError};

use ::redb::{Database, Durability, Error, ReadableDatabase, TableDefinition, WriteTransaction};
use bytes::Bytes;

use super::guard::{Guard, caught};
use super::{Batch, Engine, EngineError, Row};

/// The file, within the engine's directory.
const FILE: &str = "rows.redb";

/// All rows.
const ROWS: TableDefinition<&[u8], &[u8]> = TableDefinition::new("rows");

/// An engine on disk.
pub struct Redb {
    database: Database,
    path: std::path::PathBuf,
    guard: Guard,
    /// Whether something was applied that is not on disk yet.
    behind: Mutex<bool>,
}

impl Redb {
    /// Opens or makes the rows in `directory`, which no other process may have open. At most `cache_bytes` are its
    /// cache.
    pub fn open(directory: &Path, cache_bytes: u64) -> Result<Self, EngineError> {
        let path = directory.join(FILE);
        std::fs::create_dir_all(directory).map_err(|source| EngineError::io("open", source))?;
        let database = caught("open", || {
            let mut builder = Database::builder();
            builder.set_cache_size(usize::try_from(cache_bytes).unwrap_or(usize::MAX));
            let database = builder.create(&path).map_err(|source| failed("open", source))?;
            // The table must be there before it is read.
            let mut first = database.begin_write().map_err(|source| failed("open", source))?;
            first.set_durability(Durability::Immediate).map_err(|source| failed("open", source))?;
            first.open_table(ROWS).map_err(|source| failed("open", source))?;
            first.commit().map_err(|source| failed("open", source))?;
            Ok(database)
        })?;
        Ok(Self { database, path, guard: Guard::default(), behind: Mutex::default() })
    }

    fn write(&self, batch: Batch, durability: Durability) -> Result<(), EngineError> {
        let mut behind = self.behind.lock().unwrap_or_else(PoisonError::into_inner);
        let durable = matches!(durability, Durability::Immediate);
        if durable && batch.is_empty() && !*behind {
            return Ok(());
        }
        let done = self.guard.run("apply", || {
            let mut transaction = self.database.begin_write().map_err(|source| failed("apply", source))?;
            transaction.set_durability(durability).map_err(|source| failed("apply", source))?;
            fill(&transaction, batch)?;
            transaction.commit().map_err(|source| failed("apply", source))
        });
        *behind = !durable || done.is_err();
        done
    }
}

fn fill(transaction: &WriteTransaction, batch: Batch) -> Result<(), EngineError> {
    let mut table = transaction.open_table(ROWS).map_err(|source| failed("apply", source))?;
    for (key, value) in batch.into_changes() {
        let done = match value {
            Some(value) => table.insert(key.as_slice(), value.as_slice()).map(drop),
            None => table.remove(key.as_slice()).map(drop),
        };
        done.map_err(|source| failed("apply", source))?;
    }
    Ok(())
}

impl Engine for Redb {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.guard.run("get", || {
            let transaction = self.database.begin_read().map_err(|source| failed("get", source))?;
            let table = transaction.open_table(ROWS).map_err(|source| failed("get", source))?;
            let row = table.get(key).map_err(|source| failed("get", source))?;
            Ok(row.map(|value| Bytes::copy_from_slice(value.value())))
        })
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
        self.guard.run("scan", || {
            let transaction = self.database.begin_read().map_err(|source| failed("scan", source))?;
            let table = transaction.open_table(ROWS).map_err(|source| failed("scan", source))?;
            let mut rows = Vec::new();
            for row in table.range(prefix.max(from)..).map_err(|source| failed("scan", source))?.take(limit) {
                let (key, value) = row.map_err(|source| failed("scan", source))?;
                if !key.value().starts_with(prefix) {
                    break;
                }
                let (key, value) = (Bytes::copy_from_slice(key.value()), Bytes::copy_from_slice(value.value()));
                rows.push(Row { key, value: Ok(value) });
            }
            Ok(rows)
        })
    }

    fn apply(&self, batch: Batch) -> Result<(), EngineError> {
        self.write(batch, Durability::None)
    }

    fn flush(&self) -> Result<(), EngineError> {
        self.write(Batch::default(), Durability::Immediate)
    }

    fn commit(&self, batch: Batch) -> Result<(), EngineError> {
        self.write(batch, Durability::Immediate)
    }

    fn disk_bytes(&self) -> Result<u64, EngineError> {
        let file = std::fs::metadata(&self.path).map_err(|source| EngineError::io("stat", source))?;
        Ok(file.len())
    }
}

fn failed(doing: &'static str, error: impl Into<Error>) -> EngineError {
    match error.into() {
        Error::Io(error) => EngineError::io(doing, error),
        error @ (Error::DatabaseAlreadyOpen | Error::PreviousIo) => EngineError::new(doing, error),
        error => EngineError::corrupt(doing, error),
    }
}
