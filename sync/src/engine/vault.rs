//! The engine that a node uses: any engine, with every safeguard around it.
//!
//! - Each row is in an envelope whose checksum is verified at every read (sync.md invariant K11).
//! - What is applied waits in memory until the flush and goes to the engine as one batch: many writers share it, and a
//!   row that several of them change is written once.
//! - Values above [`INLINE_BYTES_MAX`] are files of their own.
//! - A directory that can't be opened is moved aside, and the node begins anew and takes everything from its peers.
//! - An engine that has grown far beyond what it holds is rewritten while it works.
//! - When the disk is nearly full it only reads.

mod check;
mod open;
mod rewrite;
mod seal;

use std::collections::BTreeMap;
use std::ops::Bound;
use std::path::PathBuf;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, RwLock};
use std::time::{Duration, Instant};

use bytes::Bytes;

use super::blobs::Blobs;
use super::changes::Changes;
use super::envelope::{self, Hash};
use super::mark::Mark;
use super::place::{Generation, Place};
use super::usage::Usage;
use super::{Batch, Corrupt, Engine, EngineError, Row, disk};

pub use check::Checked;
pub use open::{Damage, Settings, engine_in};
use rewrite::Tidying;

/// Largest value that lies in the engine itself, bytes.
pub(super) const INLINE_BYTES_MAX: usize = 32 * 1024;

/// Bytes that may wait for a flush. Beyond, they go to the engine without one.
const PENDING_BYTES_MAX: usize = 4 * 1024 * 1024;

/// How long something may wait for a flush before it goes to the engine without one.
const PENDING_AGE_MAX: Duration = Duration::from_millis(500);

/// How often free space is asked for.
const ROOM_LOOK: Duration = Duration::from_millis(100);

/// How often a read is tried whose file vanishes: another write has replaced the row meanwhile.
const READ_TRIES: usize = 8;

/// Rows from here on are the vault's own: nobody else sees or writes them.
const OWN: u8 = 0xff;
const OWN_USAGE: &[u8] = &[OWN, b'u'];
const OWN_BLOB: &[u8] = &[OWN, b'b'];
/// How many flushes there were. It is there from the start.
const OWN_COUNT: &[u8] = &[OWN, b'n'];

/// How an engine stands.
#[derive(Debug, Clone, Default)]
pub struct Stats {
    /// What keeps the rows and for the how manieth time; none in memory.
    pub generation: Option<Generation>,
    /// Records of all stores.
    pub records: Usage,
    /// Bytes on disk, without large values.
    pub disk_bytes: u64,
    /// How often a row or file failed its checksum since the start.
    pub corrupt: u64,
    /// Where what could not be opened was moved at the start.
    pub quarantined: Option<PathBuf>,
}

/// An engine with every safeguard.
pub struct Vault {
    core: Arc<Core>,
    tidying: Mutex<Option<Tidying>>,
}

struct Core {
    blobs: Option<Blobs>,
    mark: Option<Mark>,
    settings: Settings,
    quarantined: Option<PathBuf>,
    current: RwLock<Current>,
    /// Rows in their envelopes that were applied and not yet given to the engine; none: removed.
    pending: RwLock<BTreeMap<Vec<u8>, Option<Bytes>>>,
    writing: Mutex<Writing>,
    usage: RwLock<BTreeMap<Vec<u8>, Usage>>,
    corrupt: AtomicU64,
    changes: Changes,
    room: Mutex<Option<(Instant, u64)>>,
    /// The last to be dropped: who waits for the directory finds the rows closed.
    place: Option<Place>,
}

#[derive(Clone)]
struct Current {
    rows: Arc<dyn Engine>,
    generation: Option<Generation>,
}

/// What only one writer at a time has.
#[derive(Default)]
struct Writing {
    flushes: u64,
    pending_bytes: usize,
    since: Option<Instant>,
    /// Whether the engine was given something without a flush.
    behind: bool,
    /// Files that no row names once the pending ones are flushed.
    unnamed: Vec<Hash>,
    /// The next generation while a rewrite fills it: it gets every batch too.
    next: Option<Arc<dyn Engine>>,
}

/// No room for writes.
#[derive(Debug, thiserror::Error)]
#[error("{free} bytes are free on the disk of {directory}, kv.disk_free_mib_min asks for {least}")]
struct NoRoom {
    directory: PathBuf,
    free: u64,
    least: u64,
}

impl Vault {
    /// Which records changed last.
    pub fn changes(&self) -> &Changes {
        &self.core.changes
    }

    /// Bytes of all records, with large values.
    pub fn record_bytes(&self) -> u64 {
        read(&self.core.usage).values().map(|usage| usage.bytes).sum()
    }

    /// How it stands.
    pub fn stats(&self) -> Result<Stats, EngineError> {
        let current = self.core.current();
        let mut records = Usage::default();
        for usage in read(&self.core.usage).values() {
            records += *usage;
        }
        Ok(Stats {
            generation: current.generation,
            records,
            disk_bytes: current.rows.disk_bytes()?,
            corrupt: self.core.corrupt.load(Ordering::Relaxed),
            quarantined: self.core.quarantined.clone(),
        })
    }
}

impl Engine for Vault {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.core.get(key)
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
        self.core.scan(prefix, from, limit)
    }

    fn apply(&self, batch: Batch) -> Result<(), EngineError> {
        self.core.apply(batch)
    }

    fn flush(&self) -> Result<(), EngineError> {
        let mut writing = self.core.writing();
        self.core.write_out(&mut writing, true)
    }

    fn writable(&self) -> Result<(), EngineError> {
        self.core.writable()
    }

    fn disk_bytes(&self) -> Result<u64, EngineError> {
        self.core.current().rows.disk_bytes()
    }

    fn usage(&self, prefix: &[u8]) -> Option<Usage> {
        Some(read(&self.core.usage).get(prefix).copied().unwrap_or_default())
    }

    fn corrupt_reads(&self) -> u64 {
        self.core.corrupt.load(Ordering::Relaxed)
    }
}

impl Core {
    fn current(&self) -> Current {
        read(&self.current).clone()
    }

    fn writing(&self) -> MutexGuard<'_, Writing> {
        self.writing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The row in its envelope.
    fn row(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if let Some(pending) = read(&self.pending).get(key) {
            return Ok(pending.clone());
        }
        self.current().rows.get(key)
    }

    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        if key.first() == Some(&OWN) {
            return Ok(None);
        }
        for _ in 0..READ_TRIES {
            let Some(row) = self.row(key).inspect_err(|error| self.count(error))? else { return Ok(None) };
            match self.value(key, &row)? {
                Some(Ok(value)) => return Ok(Some(value)),
                Some(Err(Corrupt)) => break,
                None => {}
            }
        }
        let error = EngineError::corrupt("get", Corrupt);
        self.count(&error);
        Err(error)
    }

    fn count(&self, error: &EngineError) {
        if error.is_corrupt() {
            let before = self.corrupt.fetch_add(1, Ordering::Relaxed);
            // A damaged row that is asked for all the time must not fill the log.
            if (before + 1).is_power_of_two() {
                tracing::error!(error = %error, source = ?error, times = before + 1, "damaged data in the kv's engine");
            }
        }
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
        let mut from = prefix.max(from).to_vec();
        let mut found: Vec<Row> = Vec::new();
        while found.len() < limit {
            // What is pending is read first: a flush between the two moves rows to the engine, never away from it.
            let pending = self.pending_rows(prefix, &from);
            let rows = self.current().rows.scan(prefix, &from, limit).inspect_err(|error| self.count(error))?;
            let last = (rows.len() == limit).then(|| rows.last().map(|row| row.key.clone())).flatten();
            let mut merged: BTreeMap<Bytes, Option<Bytes>> = BTreeMap::new();
            for row in rows {
                merged.insert(row.key, row.value.ok());
            }
            merged.extend(pending.into_iter().filter(|(key, _)| last.as_ref().is_none_or(|last| key <= last)));
            for (key, row) in merged {
                if key.first() == Some(&OWN) {
                    return Ok(found);
                }
                if found.len() == limit {
                    break;
                }
                if let Some(row) = row {
                    found.extend(self.opened(key, &row)?);
                }
            }
            let Some(last) = last else { break };
            from = [&last, &[0][..]].concat();
        }
        Ok(found)
    }

    fn pending_rows(&self, prefix: &[u8], from: &[u8]) -> Vec<(Bytes, Option<Bytes>)> {
        let pending = read(&self.pending);
        let range = pending.range::<[u8], _>((Bound::Included(from), Bound::Unbounded));
        range
            .take_while(|(key, _)| key.starts_with(prefix))
            .map(|(key, row)| (Bytes::copy_from_slice(key), row.clone()))
            .collect()
    }

    /// The row for a scan; none if it has gone meanwhile.
    fn opened(&self, key: Bytes, row: &Bytes) -> Result<Option<Row>, EngineError> {
        let value = match self.value(&key, row)? {
            Some(Ok(value)) => Ok(value),
            Some(Err(Corrupt)) => {
                self.count(&EngineError::corrupt("scan", Corrupt));
                Err(Corrupt)
            }
            // Its file has gone: the row was replaced, or the file is lost.
            None => match self.get(&key) {
                Ok(Some(value)) => Ok(value),
                Ok(None) => return Ok(None),
                Err(error) if error.is_corrupt() => Err(Corrupt),
                Err(error) => return Err(error),
            },
        };
        Ok(Some(Row { key, value }))
    }

    /// Gives what is pending to the engine.
    fn write_out(&self, writing: &mut Writing, durable: bool) -> Result<(), EngineError> {
        let mut batch = Batch::default();
        for (key, row) in read(&self.pending).iter() {
            match row {
                Some(row) => batch.put(key.clone(), row.to_vec()),
                None => batch.remove(key.clone()),
            }
        }
        let rows = self.current().rows;
        if batch.is_empty() {
            if durable && writing.behind {
                rows.flush()?;
                writing.behind = false;
            }
            return Ok(());
        }
        let count = writing.flushes + 1;
        batch.put(OWN_COUNT.to_vec(), envelope::inline(OWN_COUNT, &count.to_be_bytes()));
        if let Some(next) = &writing.next {
            // A failed rewrite is given up by its own thread; it must not fail a write.
            if next.apply(batch.clone()).is_err() {
                writing.next = None;
            }
        }
        let done = if durable { rows.commit(batch) } else { rows.apply(batch) };
        if let Err(error) = done {
            self.doubt(&error);
            return Err(error);
        }
        writing.flushes = count;
        if let (true, Some(mark)) = (durable, &self.mark)
            && let Err(error) = mark.write(count)
        {
            tracing::warn!(%error, "how far the kv's engine has come can't be noted");
        }
        write(&self.pending).clear();
        writing.behind = !durable;
        writing.pending_bytes = 0;
        writing.since = None;
        if durable {
            self.remove_unnamed(writing);
        }
        Ok(())
    }

    fn remove_unnamed(&self, writing: &mut Writing) {
        let Some(blobs) = &self.blobs else { return };
        for hash in std::mem::take(&mut writing.unnamed) {
            // It may have been named again since; and what can't be removed is swept at the next start.
            if matches!(self.row(&[OWN_BLOB, &hash].concat()), Ok(None))
                && let Err(error) = blobs.remove(&hash)
            {
                tracing::warn!(%error, "a large value's file can't be removed");
            }
        }
    }

    fn writable(&self) -> Result<(), EngineError> {
        let Some(place) = &self.place else { return Ok(()) };
        let mut room = self.room.lock().unwrap_or_else(PoisonError::into_inner);
        let free = match *room {
            Some((at, free)) if at.elapsed() < ROOM_LOOK => free,
            _ => {
                let free = disk::free_bytes(place.directory()).map_err(|source| EngineError::io("stat", source))?;
                *room = Some((Instant::now(), free));
                free
            }
        };
        let least = self.settings.disk_free_bytes_min;
        if free >= least {
            return Ok(());
        }
        Err(EngineError::full("write", NoRoom { directory: place.directory().to_owned(), free, least }))
    }
}

fn read<T>(lock: &RwLock<T>) -> std::sync::RwLockReadGuard<'_, T> {
    lock.read().unwrap_or_else(PoisonError::into_inner)
}

fn write<T>(lock: &RwLock<T>) -> std::sync::RwLockWriteGuard<'_, T> {
    lock.write().unwrap_or_else(PoisonError::into_inner)
}
