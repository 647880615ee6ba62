//! What is done to a KV directory while no node has it open: check, change its engine, export, import.
//!
//! All work on rows and not on what they mean, but for two: a check looks whether records and index fit each other, and
//! an import leaves out who the directory belonged to. So what is imported begins as a new incarnation, and gives no
//! number twice (sync.md invariant K5).

mod snapshot;

use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use selvage_config::node::KvEngine;

use crate::engine::{Batch, Damage, Engine, EngineError, Generation, Settings, Vault, engine_in};
use crate::layout;
use crate::read;
use crate::store::PLACEMENTS;

pub use snapshot::SnapshotError;
use snapshot::{Reader, Writer};

/// Rows read or written at once.
const ROWS: usize = 512;

/// Cache of an engine that is opened for one pass, bytes.
const CACHE_BYTES: u64 = 32 << 20;

/// Why nothing was done, or not all.
#[derive(Debug, thiserror::Error)]
pub enum OfflineError {
    /// There are no rows.
    #[error("no kv in {0}: name the directory `kv` below a node's state_dir")]
    Missing(String),
    /// There are rows where none may be.
    #[error("{0} holds a kv already: import into a new directory")]
    Occupied(String),
    /// It is kept by this engine already.
    #[error("the rows are kept by {0} already")]
    Same(KvEngine),
    /// Rows that only live in memory can't be had.
    #[error("the engine `memory` keeps nothing in a directory")]
    Memory,
    /// The engine failed.
    #[error(transparent)]
    Engine(#[from] EngineError),
    /// The snapshot is none, or damaged.
    #[error(transparent)]
    Snapshot(#[from] SnapshotError),
}

/// What was carried over.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Carried {
    /// Rows.
    pub rows: u64,
    /// Rows that were damaged and left out.
    pub damaged: u64,
    /// Bytes of keys and values.
    pub bytes: u64,
}

/// What a check found.
#[derive(Debug, Clone)]
pub struct Report {
    /// What keeps the rows.
    pub generation: Option<Generation>,
    /// Rows.
    pub rows: u64,
    /// Records of all stores, with tombstones.
    pub records: u64,
    /// Bytes of these.
    pub record_bytes: u64,
    /// Bytes of the engine on disk.
    pub disk_bytes: u64,
    /// Rows or files that fail their checksum.
    pub corrupt: u64,
    /// The keys of the first of these, readable.
    pub corrupt_keys: Vec<String>,
    /// Records that can't be decoded though their checksum is right, and rows of the index that lead nowhere.
    pub misfits: u64,
    /// Whether the counts of stores were wrong; they are right now.
    pub recounted: bool,
}

impl Report {
    /// Whether nothing is wrong.
    pub fn is_sound(&self) -> bool {
        self.corrupt == 0 && self.misfits == 0
    }
}

/// The directories of placements below a KV directory, in the order of their names.
///
/// # Errors
/// What the system says of a directory that can't be read.
pub fn placements(directory: &Path) -> std::io::Result<Vec<PathBuf>> {
    let entries = match std::fs::read_dir(directory.join(PLACEMENTS)) {
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        entries => entries?,
    };
    let mut all = entries.map(|entry| Ok(entry?.path())).collect::<std::io::Result<Vec<_>>>()?;
    all.sort();
    Ok(all)
}

/// Whether a directory is that of a placement.
pub fn is_of_placement(directory: &Path) -> bool {
    directory.parent().and_then(Path::file_name).is_some_and(|name| name == PLACEMENTS)
}

fn existing(directory: &Path, damage: Damage) -> Result<Vault, OfflineError> {
    let missing = || OfflineError::Missing(directory.display().to_string());
    let engine = engine_in(directory)?.ok_or_else(missing)?;
    Ok(Vault::open(directory, settings(engine, damage))?)
}

fn settings(engine: KvEngine, damage: Damage) -> Settings {
    Settings { engine, cache_bytes: CACHE_BYTES, disk_free_bytes_min: 0, class_of: layout::class_of, damage }
}

/// Reads every row and verifies it. `progress` is told how many rows were read.
///
/// # Errors
/// [`OfflineError`]; damage that keeps the engine from opening is one.
pub fn check(directory: &Path, mut progress: impl FnMut(u64)) -> Result<Report, OfflineError> {
    let vault = existing(directory, Damage::Refuse)?;
    let checked = vault.check(&mut progress)?;
    let stats = vault.stats()?;
    let mut misfits = 0;
    each(&vault, |row| {
        let fits = match row.key.first() {
            Some(b'd') => read::record_at(&vault, &row.key).is_ok() || row.value.is_err(),
            Some(b'o') => row.value.as_ref().map_or(Ok(true), |value| match layout::index_row(value) {
                Some(record) => vault.get(record).map(|found| found.is_some()).or_else(told),
                None => Ok(false),
            })?,
            _ => true,
        };
        misfits += u64::from(!fits);
        Ok(())
    })?;
    let readable = |key: &bytes::Bytes| String::from_utf8_lossy(key).replace('\0', " ");
    Ok(Report {
        generation: stats.generation,
        rows: checked.rows,
        records: stats.records.rows,
        record_bytes: stats.records.bytes,
        disk_bytes: stats.disk_bytes,
        corrupt: checked.corrupt,
        corrupt_keys: checked.corrupt_keys.iter().map(readable).collect(),
        misfits,
        recounted: checked.recounted,
    })
}

/// A damaged row was counted already.
fn told(error: EngineError) -> Result<bool, EngineError> {
    if error.is_corrupt() { Ok(true) } else { Err(error) }
}

/// Changes what keeps the rows. The old files go when the new ones are complete.
///
/// # Errors
/// [`OfflineError`]; then the directory is as it was.
pub fn migrate(directory: &Path, to: KvEngine, progress: impl FnMut(u64)) -> Result<Carried, OfflineError> {
    if to == KvEngine::Memory {
        return Err(OfflineError::Memory);
    }
    let vault = existing(directory, Damage::Refuse)?;
    if vault.stats()?.generation.is_some_and(|generation| generation.engine == to) {
        return Err(OfflineError::Same(to));
    }
    let checked = vault.check(progress)?;
    let bytes = vault.stats()?.records.bytes;
    vault.rewrite_as(to)?;
    Ok(Carried { rows: checked.rows, damaged: checked.corrupt, bytes })
}

/// Writes all rows that can be read to `out`, with checksums. It also opens what a node has moved aside. If any row was
/// damaged, nothing that is written claims to be complete (sync.md invariant K4): who imports it asks its peers for all.
///
/// # Errors
/// [`OfflineError`].
pub fn export(directory: &Path, out: impl Write, mut progress: impl FnMut(u64)) -> Result<Carried, OfflineError> {
    let vault = existing(directory, Damage::Accept)?;
    let mut writer = Writer::begin(out)?;
    let mut carried = Carried { rows: 0, damaged: 0, bytes: 0 };
    let mut cut = None;
    let walked = each(&vault, |row| {
        match row.value {
            // Records and index are before the vector, so by then it is known.
            Ok(_) if row.key.starts_with(layout::VECTOR) && carried.damaged > 0 => {
                let nothing = 0_u64.to_be_bytes();
                carried.rows += 1;
                carried.bytes += (row.key.len() + nothing.len()) as u64;
                writer.row(&row.key, &nothing)?;
            }
            // Who signs with it is the directory's owner alone.
            Ok(_) if row.key == layout::SIGNER => {}
            Ok(value) if row.key == layout::CUT => cut = Some(value),
            Ok(value) => {
                carried.rows += 1;
                carried.bytes += (row.key.len() + value.len()) as u64;
                writer.row(&row.key, &value)?;
            }
            Err(_) => carried.damaged += 1,
        }
        if carried.rows.is_multiple_of(ROWS as u64) {
            progress(carried.rows);
        }
        Ok(())
    });
    match walked {
        // What lies behind damage that the engine itself meets can't be reached.
        Err(OfflineError::Engine(error)) if error.is_corrupt() => carried.damaged += 1,
        walked => walked?,
    }
    if let Some(cut) = cut.filter(|_| carried.damaged == 0) {
        carried.rows += 1;
        carried.bytes += (layout::CUT.len() + cut.len()) as u64;
        writer.row(layout::CUT, &cut)?;
    }
    writer.end()?;
    Ok(carried)
}

/// Fills a new directory from a snapshot. Clock, cut and floor come along, since they are facts on the rows; who wrote
/// them does not.
///
/// # Errors
/// [`OfflineError`]; after one the directory is not to be used.
pub fn import(
    directory: &Path,
    engine: KvEngine,
    input: impl Read,
    mut progress: impl FnMut(u64),
) -> Result<Carried, OfflineError> {
    if engine == KvEngine::Memory {
        return Err(OfflineError::Memory);
    }
    if engine_in(directory)?.is_some() {
        return Err(OfflineError::Occupied(directory.display().to_string()));
    }
    let mut reader = Reader::begin(input)?;
    let vault = Vault::open(directory, settings(engine, Damage::Refuse))?;
    let mut carried = Carried { rows: 0, damaged: 0, bytes: 0 };
    while let Some(rows) = reader.block()? {
        let mut batch = Batch::default();
        for (key, value) in rows {
            carried.rows += 1;
            carried.bytes += (key.len() + value.len()) as u64;
            if key != layout::INCARNATION {
                batch.put(key, value);
            }
        }
        vault.apply(batch)?;
        progress(carried.rows);
    }
    vault.flush()?;
    Ok(carried)
}

fn each(
    vault: &Vault,
    mut take: impl FnMut(crate::engine::Row) -> Result<(), OfflineError>,
) -> Result<(), OfflineError> {
    let mut from = Vec::new();
    loop {
        let rows = vault.scan(&[], &from, ROWS)?;
        let ended = rows.len() < ROWS;
        for row in rows {
            from = [&row.key, &[0][..]].concat();
            take(row)?;
        }
        if ended {
            return Ok(());
        }
    }
}

#[cfg(test)]
mod tests;
