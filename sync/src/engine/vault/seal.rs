//! Batches on their way in: each row gets its envelope, large values become files, and stores are counted.

use std::collections::BTreeMap;
use std::time::Instant;

use bytes::Bytes;

use super::{Core, INLINE_BYTES_MAX, OWN_BLOB, OWN_USAGE, PENDING_AGE_MAX, PENDING_BYTES_MAX, read, write};
use crate::engine::blobs::Found;
use crate::engine::envelope::{self, Hash, Sealed};
use crate::engine::usage::{Usage, Weight};
use crate::engine::{Batch, Corrupt, EngineError};

/// Bytes that may wait in memory for room on the disk.
const WAITING_BYTES_MAX: usize = 4 * PENDING_BYTES_MAX;

/// A batch in envelopes, and what it changes besides.
#[derive(Default)]
struct Sealing {
    rows: BTreeMap<Vec<u8>, Option<Bytes>>,
    usage: BTreeMap<Vec<u8>, Usage>,
    /// How many rows name a file.
    names: BTreeMap<Hash, u64>,
    bytes: usize,
}

impl Core {
    /// The value of a row; none if its file has gone.
    pub(super) fn value(&self, key: &[u8], row: &Bytes) -> Result<Option<Result<Bytes, Corrupt>>, EngineError> {
        match (envelope::open(key, row), &self.blobs) {
            (Ok(Sealed::Inline(value)), _) => Ok(Some(Ok(value))),
            (Ok(Sealed::Filed { length, hash }), Some(blobs)) => {
                let found = blobs.get(&hash, length).map_err(|source| EngineError::io("get", source))?;
                Ok(match found {
                    Found::Value(value) => Some(Ok(value)),
                    Found::Damaged(Corrupt) => Some(Err(Corrupt)),
                    Found::Gone => None,
                })
            }
            _ => Ok(Some(Err(Corrupt))),
        }
    }

    /// Takes a batch. It is whole in memory when this returns, or nothing of it is.
    pub(super) fn apply(&self, batch: Batch) -> Result<(), EngineError> {
        let mut writing = self.writing();
        let mut sealing = Sealing::default();
        for (key, value) in batch.into_changes() {
            self.seal(&mut sealing, key, value)?;
        }
        let class_of = self.settings.class_of;
        let changed: Vec<Bytes> =
            sealing.rows.keys().filter(|key| class_of(key).is_some()).map(|key| Bytes::copy_from_slice(key)).collect();
        for (class, usage) in &sealing.usage {
            let key = [OWN_USAGE, class].concat();
            let row = envelope::inline(&key, &usage.encode()).into();
            sealing.rows.insert(key, Some(row));
        }
        for (hash, names) in &sealing.names {
            let key = [OWN_BLOB, hash].concat();
            let row = (*names > 0).then(|| envelope::inline(&key, &names.to_be_bytes()).into());
            sealing.rows.insert(key, row);
            if *names == 0 {
                writing.unnamed.push(*hash);
            }
        }
        write(&self.pending).extend(sealing.rows);
        write(&self.usage).extend(sealing.usage);
        self.changes.note(changed);
        writing.pending_bytes += sealing.bytes;
        let since = *writing.since.get_or_insert_with(Instant::now);
        if writing.pending_bytes > PENDING_BYTES_MAX || since.elapsed() > PENDING_AGE_MAX {
            match self.write_out(&mut writing, false) {
                // It waits for room in memory, and the next flush tells. Only so much of it does.
                Err(error) if error.is_full() && writing.pending_bytes <= WAITING_BYTES_MAX => {}
                written => return written,
            }
        }
        Ok(())
    }

    fn seal(&self, sealing: &mut Sealing, key: Vec<u8>, value: Option<Vec<u8>>) -> Result<(), EngineError> {
        let counted = (self.settings.class_of)(&key).map(<[u8]>::to_vec);
        if counted.is_some() {
            let old = match sealing.rows.get(&key) {
                Some(row) => row.clone(),
                // A row that can't be read is replaced like any other; only the count is off by it.
                None => self.row(&key).or_else(|error| if error.is_corrupt() { Ok(None) } else { Err(error) })?,
            };
            let old = old.and_then(|row| envelope::open(&key, &row).ok());
            if let Some(Sealed::Filed { hash, .. }) = &old {
                let names = self.names(sealing, hash)?;
                *names = names.saturating_sub(1);
            }
            if let (Some(class), Some(old)) = (&counted, &old) {
                self.used(sealing, class).remove(weight(&key, old));
            }
        }
        let Some(value) = value else {
            sealing.bytes += key.len();
            sealing.rows.insert(key, None);
            return Ok(());
        };
        let (row, sealed) = match (&self.blobs, &counted) {
            (Some(blobs), Some(_)) if value.len() > INLINE_BYTES_MAX => {
                let hash = blobs.put(&value).map_err(|source| EngineError::io("apply", source))?;
                *self.names(sealing, &hash)? += 1;
                let length = value.len() as u64;
                (envelope::filed(&key, length, &hash), Sealed::Filed { length, hash })
            }
            _ => {
                let row = envelope::inline(&key, &value);
                (row, Sealed::Inline(value.into()))
            }
        };
        if let Some(class) = &counted {
            self.used(sealing, class).add(weight(&key, &sealed));
        }
        sealing.bytes += key.len() + row.len();
        sealing.rows.insert(key, Some(row.into()));
        Ok(())
    }

    fn used<'s>(&self, sealing: &'s mut Sealing, class: &[u8]) -> &'s mut Usage {
        let before = || read(&self.usage).get(class).copied().unwrap_or_default();
        sealing.usage.entry(class.to_vec()).or_insert_with(before)
    }

    fn names<'s>(&self, sealing: &'s mut Sealing, hash: &Hash) -> Result<&'s mut u64, EngineError> {
        if !sealing.names.contains_key(hash) {
            sealing.names.insert(*hash, self.named(hash)?);
        }
        Ok(sealing.names.get_mut(hash).expect("inserted above"))
    }

    /// How many rows name a file.
    pub(super) fn named(&self, hash: &Hash) -> Result<u64, EngineError> {
        let key = [OWN_BLOB, hash].concat();
        let Some(row) = self.row(&key)? else { return Ok(0) };
        match envelope::open(&key, &row) {
            Ok(Sealed::Inline(number)) => Ok(number.as_ref().try_into().map_or(1, u64::from_be_bytes)),
            // A count that can't be read keeps the file: better a file too many than one too few.
            _ => Ok(u64::MAX / 2),
        }
    }
}

pub(super) fn weight(key: &[u8], sealed: &Sealed) -> Weight {
    let key = key.len() as u64;
    match sealed {
        Sealed::Inline(value) => {
            let bytes = key + value.len() as u64;
            Weight { bytes, inline_bytes: bytes }
        }
        Sealed::Filed { length, .. } => Weight { bytes: key + length, inline_bytes: key },
    }
}
