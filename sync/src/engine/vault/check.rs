//! Looking at every row: whether it is what was written, and whether the counts are right.

use std::collections::BTreeMap;

use bytes::Bytes;

use super::seal::weight;
use super::{OWN, OWN_USAGE, Vault, write};
use crate::engine::envelope::{self, Sealed};
use crate::engine::usage::Usage;
use crate::engine::{Corrupt, Engine, EngineError};

/// Rows read at once.
const SCAN_ROWS: usize = 512;

/// Damaged rows that are named; the rest is counted.
const NAMED_MAX: usize = 100;

/// What a check found.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Checked {
    /// Rows that were read.
    pub rows: u64,
    /// How many of them are damaged, or their file is.
    pub corrupt: u64,
    /// The keys of the first of these.
    pub corrupt_keys: Vec<Bytes>,
    /// Whether the counts of stores were wrong. They are right now.
    pub recounted: bool,
}

impl Vault {
    /// Reads every row and verifies it; sets the counts of stores right. `progress` is told how many rows were read.
    pub fn check(&self, mut progress: impl FnMut(u64)) -> Result<Checked, EngineError> {
        self.flush()?;
        let rows = self.core.current().rows;
        let mut checked = Checked::default();
        let mut usage: BTreeMap<Vec<u8>, Usage> = BTreeMap::new();
        let mut from = Vec::new();
        loop {
            let found = rows.scan(&[], &from, SCAN_ROWS)?;
            let ended = found.len() < SCAN_ROWS;
            for row in found {
                checked.rows += 1;
                let sealed = row.value.and_then(|value| Ok((envelope::open(&row.key, &value)?, value)));
                let whole = match sealed {
                    Ok((sealed, value)) => {
                        if let Some(class) = (self.core.settings.class_of)(&row.key) {
                            usage.entry(class.to_vec()).or_default().add(weight(&row.key, &sealed));
                        }
                        matches!(sealed, Sealed::Inline(_)) || matches!(self.core.value(&row.key, &value)?, Some(Ok(_)))
                    }
                    Err(Corrupt) => false,
                };
                if !whole {
                    checked.corrupt += 1;
                    if checked.corrupt_keys.len() < NAMED_MAX && row.key.first() != Some(&OWN) {
                        checked.corrupt_keys.push(row.key.clone());
                    }
                }
                from = [&row.key, &[0][..]].concat();
            }
            progress(checked.rows);
            if ended {
                break;
            }
        }
        checked.recounted = self.set_usage(usage)?;
        Ok(checked)
    }

    /// Whether that changed anything.
    fn set_usage(&self, usage: BTreeMap<Vec<u8>, Usage>) -> Result<bool, EngineError> {
        let mut writing = self.core.writing();
        let right = |known: &BTreeMap<Vec<u8>, Usage>| {
            known.iter().filter(|(_, usage)| usage.rows > 0).eq(usage.iter().filter(|(_, usage)| usage.rows > 0))
        };
        let mut known = write(&self.core.usage);
        if right(&known) {
            return Ok(false);
        }
        let gone = known.keys().filter(|class| !usage.contains_key(*class)).cloned().collect::<Vec<_>>();
        for class in gone {
            write(&self.core.pending).insert([OWN_USAGE, &class].concat(), None);
        }
        for (class, usage) in &usage {
            let key = [OWN_USAGE, class].concat();
            let row = envelope::inline(&key, &usage.encode()).into();
            write(&self.core.pending).insert(key, Some(row));
        }
        *known = usage;
        drop(known);
        self.core.write_out(&mut writing, true)?;
        Ok(true)
    }
}
