//! Watching a store: what changed here, by local writes and by those of peers.

use std::time::Duration;

use selvage_config::StoreName;

use super::{HIDDEN, Kv, KvError, Listed, listed};
use crate::commit::now_ms;
use crate::entry::Key;
use crate::layout;
use crate::read::{self, Found, ReadError};

/// Changes that one look takes in.
const LOOK_CHANGES: usize = 1000;

/// What changed in a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Watched {
    /// Keys in the order of their last change.
    pub changes: Vec<Change>,
    /// To go on from here.
    pub cursor: u64,
    /// Whether there were changes that are no longer known: list the store to see them.
    pub missed: bool,
}

/// A key that changed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    /// The key, with facts on its newest entry.
    pub key: Listed,
    /// Whether it exists now.
    pub exists: bool,
}

impl Kv {
    /// Where a watch begins that wants what is new from now on.
    pub fn cursor(&self) -> u64 {
        self.shared.vault.changes().cursor()
    }

    /// What changed among the keys that begin with `prefix` since `cursor`. Waits for the first, at most `patience`. A key
    /// that changed several times is told once. Cursors begin anew with the process; an old one is told as missed.
    pub async fn watch(
        &self,
        store: &StoreName,
        prefix: &str,
        cursor: u64,
        patience: Duration,
    ) -> Result<Watched, KvError> {
        let base = layout::records(store);
        let rows = [&base, prefix.as_bytes()].concat();
        let changes = self.shared.vault.changes();
        let deadline = tokio::time::Instant::now() + patience;
        let mut from = cursor;
        loop {
            let changed = changes.behind(from, &rows, LOOK_CHANGES);
            from = changed.cursor;
            if changed.rows.is_empty() && !changed.missed {
                if from != changes.cursor() {
                    continue;
                }
                if tokio::time::timeout_at(deadline, changes.wait(from)).await.is_ok() {
                    continue;
                }
            }
            let hidden = |row: &&bytes::Bytes| row[base.len()..].starts_with(HIDDEN.to_string().as_bytes());
            let found =
                changed.rows.iter().filter(|row| !hidden(row)).map(|row| self.change(store, &row[base.len()..]));
            return Ok(Watched { changes: found.collect::<Result<_, _>>()?, cursor: from, missed: changed.missed });
        }
    }

    fn change(&self, store: &StoreName, name: &[u8]) -> Result<Change, KvError> {
        let name = String::from_utf8_lossy(name).into_owned();
        let key = Key { store: store.clone(), name };
        let record = match read::record(self.shared.vault.as_ref(), &key) {
            Ok(record) => Ok(record),
            Err(ReadError::Corrupt(error)) => Err(error),
            Err(ReadError::Engine(error)) => return Err(KvError::Engine(error)),
        };
        let exists = record.as_ref().map_or(true, |record| record.exists(now_ms()));
        Ok(Change { key: listed(Found { name: key.name, record }, now_ms()), exists })
    }
}
