//! Reads: one record, or the keys of a store in order.

use bytes::Bytes;
use selvage_config::StoreName;

use crate::engine::{Corrupt, Engine, EngineError};
use crate::entry::{EntryError, Key};
use crate::layout;
use crate::record::Record;

/// Rows read at once while listing. It bounds the memory of a listing: the rows hold values too.
const SCAN_ROWS: usize = 64;

/// Why a record can't be read.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReadError {
    #[error("record is corrupt")]
    Corrupt(#[source] EntryError),
    #[error(transparent)]
    Engine(EngineError),
}

impl From<EngineError> for ReadError {
    fn from(error: EngineError) -> Self {
        if error.is_corrupt() { Self::Corrupt(EntryError::Checksum) } else { Self::Engine(error) }
    }
}

/// The record of a key; the empty one if nothing is known of it. Its checksums were verified.
pub(crate) fn record(engine: &dyn Engine, key: &Key) -> Result<Record, ReadError> {
    let record = record_at(engine, &layout::record(key))?;
    // A row that holds a key of another row is as corrupt as one with a wrong sum.
    if record.entries().any(|entry| entry.key != *key) {
        return Err(ReadError::Corrupt(EntryError::Field("key")));
    }
    Ok(record)
}

/// The record in a row.
pub(crate) fn record_at(engine: &dyn Engine, row: &[u8]) -> Result<Record, ReadError> {
    let Some(bytes) = engine.get(row)? else { return Ok(Record::default()) };
    Record::decode(bytes).map_err(ReadError::Corrupt)
}

/// A key of a listing.
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) record: Result<Record, EntryError>,
}

/// The existing keys of `store` that begin with `prefix` and come after `after`, `limit` at most. A corrupt record
/// is listed: to leave it out would call it deleted.
pub(crate) fn list(
    engine: &dyn Engine,
    store: &StoreName,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
    now_ms: u64,
) -> Result<Vec<Found>, EngineError> {
    let base = layout::records(store);
    let rows_prefix = [&base, prefix.as_bytes()].concat();
    let mut from = match after {
        Some(after) => next(&[&base, after.as_bytes()].concat()),
        None => rows_prefix.clone(),
    };
    let mut found = Vec::new();
    while found.len() < limit {
        let rows = engine.scan(&rows_prefix, &from, SCAN_ROWS)?;
        let ended = rows.len() < SCAN_ROWS;
        if let Some(last) = rows.last() {
            from = next(&last.key);
        }
        found.extend(rows.into_iter().filter_map(|row| existing(&row.key[base.len()..], row.value, now_ms)));
        if ended {
            break;
        }
    }
    found.truncate(limit);
    Ok(found)
}

fn existing(name: &[u8], bytes: Result<Bytes, Corrupt>, now_ms: u64) -> Option<Found> {
    let name = String::from_utf8_lossy(name).into_owned();
    let record = bytes.map_err(|Corrupt| EntryError::Checksum).and_then(Record::decode);
    let exists = record.as_ref().map_or(true, |record| record.exists(now_ms));
    exists.then_some(Found { name, record })
}

/// The least row after `row`.
fn next(row: &[u8]) -> Vec<u8> {
    [row, &[0]].concat()
}
