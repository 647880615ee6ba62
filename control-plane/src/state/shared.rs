//! A state that several control planes have: how a change gets into the database, and how far the database has come.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use serde::{Deserialize, Serialize};
use sled::Batch;

use super::{
    APP, Change, GENERATION, JOIN, MEMBER, NODE, OPERATORS, Order, REVOKED, Records, State, StateError, Table,
};
use crate::journal::{Journal, JournalError};

/// The row that says which journal the database is a copy of. It is each control plane's own.
const JOURNAL: &[u8] = b"journal";
/// How long a change waits for the journal to tell what came before it.
const BEHIND: Duration = Duration::from_secs(10);

/// Which journal the database is a copy of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Member {
    pub(crate) id: String,
    /// The sequence of the last change that is in the database.
    pub(crate) applied: u64,
    pub(crate) standing: Standing,
}

/// How the database stands to the journal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Standing {
    /// The journal is to begin with what is here.
    Founding,
    /// What is here comes from a baseline and is not whole.
    Filling,
    Joined,
}

impl State {
    /// Where the state is shared, if it is.
    pub(crate) fn journal(&self) -> Option<&Arc<Journal>> {
        self.journal.get()
    }

    /// From now on a change is one when the journal has it.
    pub(crate) fn share(&self, journal: Arc<Journal>, applied: u64) {
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = applied;
        // There is one start, and nobody shares twice.
        let _ = self.journal.set(journal);
    }

    /// The sequence of the last change of the journal that is in the database.
    pub(crate) fn applied(&self) -> u64 {
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Makes a change of the registry's records, if none came since `base`.
    pub(crate) fn commit(&self, change: &Change, base: u64) -> Result<(), StateError> {
        if self.journal().is_none() {
            // The registry has a lock of its own, and nothing that the fleet does waits for it.
            return self.write(change, true);
        }
        let _order = self.order();
        if self.applied() != base {
            return Err(JournalError::Stale.into());
        }
        self.write(change, true)
    }

    /// Writes a change; the order must be held. A lasting one is in the journal on return, or on the disk if there is none.
    pub(super) fn write(&self, change: &Change, is_lasting: bool) -> Result<(), StateError> {
        match self.journal() {
            Some(journal) if is_lasting => {
                let sequence = journal.publish(change, self.applied())?;
                self.apply(change, Some(sequence))
            }
            Some(_) => self.apply(change, None),
            None => {
                self.apply(change, None)?;
                if is_lasting { self.flush() } else { Ok(()) }
            }
        }
    }

    /// Takes the journal's next change into the database; the order must be held.
    pub(crate) fn take(&self, _order: &Order<'_>, sequence: u64, change: &Change) -> Result<(), StateError> {
        self.apply(change, Some(sequence))
    }

    fn apply(&self, change: &Change, sequence: Option<u64>) -> Result<(), StateError> {
        let mut batches = (Batch::default(), Batch::default());
        for row in change.rows() {
            let batch = match row.table {
                Table::Fleet => &mut batches.0,
                Table::Registry => &mut batches.1,
            };
            match &row.value {
                Some(value) => batch.insert(row.key.as_slice(), value.as_slice()),
                None => batch.remove(row.key.as_slice()),
            }
        }
        let Some(sequence) = sequence else {
            self.catalog.apply_batch(batches.1)?;
            self.tree.apply_batch(batches.0)?;
            return Ok(());
        };
        let member = self.member()?.map(|member| Member { applied: sequence, ..member });
        if let Some(member) = member {
            batches.0.insert(JOURNAL, written(&member));
        }
        // In this order: a crash between the two makes the change again, and it sets rows to what they are.
        self.catalog.apply_batch(batches.1)?;
        self.tree.apply_batch(batches.0)?;
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = sequence;
        self.progress.notify_all();
        Ok(())
    }

    /// Waits until the database has come further than `base`.
    pub(crate) fn wait_past(&self, base: u64) -> Result<(), StateError> {
        let until = Instant::now() + BEHIND;
        let mut applied = self.applied.lock().unwrap_or_else(PoisonError::into_inner);
        while *applied <= base {
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                let why = "what other control planes changed did not come in time";
                return Err(JournalError::Away(why.into()).into());
            }
            applied = self.progress.wait_timeout(applied, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        Ok(())
    }

    /// Whether nothing that came since `base` can be why a change is refused. Returns when the database has come further
    /// if something did: who asks looks again.
    pub(crate) fn is_current(&self, base: u64) -> Result<bool, StateError> {
        let Some(journal) = self.journal() else { return Ok(true) };
        if self.applied() == base && journal.last()? == base {
            return Ok(true);
        }
        self.wait_past(base)?;
        Ok(false)
    }

    /// How long a change is tried anew.
    pub(crate) fn contend(&self) -> Duration {
        self.journal().map_or(Duration::ZERO, |journal| Duration::from_millis(journal.config().contend_ms))
    }

    /// Which journal the database is a copy of, if it is one.
    pub(crate) fn member(&self) -> Result<Option<Member>, StateError> {
        let read = |bytes: sled::IVec| {
            serde_json::from_slice(&bytes).map_err(|source| StateError::Record { key: "journal".into(), source })
        };
        self.tree.get(JOURNAL)?.map(read).transpose()
    }

    /// Notes it, on the disk.
    pub(crate) fn set_member(&self, member: &Member) -> Result<(), StateError> {
        self.tree.insert(JOURNAL, written(member))?;
        self.tree.flush()?;
        Ok(())
    }

    /// What the database holds is on the disk on return.
    pub(crate) fn flush(&self) -> Result<(), StateError> {
        self.database.flush()?;
        Ok(())
    }

    /// Whether nothing was ever done here.
    pub(crate) fn is_empty(&self) -> Result<bool, StateError> {
        for prefix in [APP, NODE, MEMBER, JOIN, REVOKED] {
            if self.tree.scan_prefix(prefix).next().transpose()?.is_some() {
                return Ok(false);
            }
        }
        Ok(self.catalog.is_empty())
    }

    /// Seals a key that was written before keys were sealed: it is about to leave the disk.
    pub(crate) fn seal_key<const N: usize>(&self, name: &str) -> Result<(), StateError> {
        let key: [u8; N] = self.key(name)?;
        self.write_key(name, &key)
    }

    /// A row that is neither of an app nor of a node.
    pub(crate) fn row(&self, key: &str) -> Result<Option<Vec<u8>>, StateError> {
        Ok(self.tree.get(key)?.map(|bytes| bytes.to_vec()))
    }

    /// Puts one.
    pub(crate) fn put_row(&self, key: &str, value: Vec<u8>) -> Result<(), StateError> {
        let mut change = Change::default();
        change.put(Table::Fleet, key.as_bytes().to_vec(), value);
        let _order = self.order();
        self.write(&change, true)
    }

    /// Every row that all control planes have, and the last change that made them; the order must be held.
    pub(crate) fn all(&self, _order: &Order<'_>) -> Result<(Change, u64), StateError> {
        let mut all = Change::default();
        for (table, tree) in [(Table::Fleet, &self.tree), (Table::Registry, &self.catalog)] {
            for row in tree {
                let (key, value) = row?;
                if key.as_ref() != JOURNAL {
                    all.put(table, key.to_vec(), value.to_vec());
                }
            }
        }
        Ok((all, self.applied()))
    }

    /// Puts a baseline in the place of all that is here; the order must be held. A crash within leaves what says that it
    /// is to be filled again.
    pub(crate) fn refill(&self, _order: &Order<'_>, id: &str, all: &Change, sequence: u64) -> Result<(), StateError> {
        self.set_member(&Member { id: id.to_owned(), applied: 0, standing: Standing::Filling })?;
        let mut gone = Change::default();
        for (table, tree) in [(Table::Fleet, &self.tree), (Table::Registry, &self.catalog)] {
            for key in tree.iter().keys() {
                let key = key?;
                if key.as_ref() != JOURNAL {
                    gone.remove(table, key.to_vec());
                }
            }
        }
        self.apply(&gone, None)?;
        self.apply(all, None)?;
        self.set_member(&Member { id: id.to_owned(), applied: sequence, standing: Standing::Joined })?;
        *self.applied.lock().unwrap_or_else(PoisonError::into_inner) = sequence;
        self.progress.notify_all();
        Ok(())
    }

    /// The records that a change makes of `before`. Rows of others are not among them.
    pub(crate) fn changed(&self, before: &Records, change: &Change) -> Result<Records, StateError> {
        let mut after = before.clone();
        for row in change.rows().iter().filter(|row| row.table == Table::Fleet) {
            let (key, value) = (row.key.as_slice(), row.value.as_deref());
            if key == GENERATION {
                after.generation = value.map_or(Ok(0), super::generation_of)?;
            } else if key == REVOKED {
                after.revoked = Arc::new(value.map_or_else(|| Ok(Default::default()), super::revoked_of)?);
            } else if key == OPERATORS {
                after.operators = value.map(super::operators_of).transpose()?;
            } else if key == super::HOMES {
                after.homes = value.map(super::homes_of).transpose()?.unwrap_or_default();
            } else if key == super::PLACEMENTS {
                after.placements = value.map(super::placements_of).transpose()?.unwrap_or_default();
            } else if let Some(name) = key.strip_prefix(APP) {
                self.set(&mut after.apps, key, name, value)?;
            } else if let Some(name) = key.strip_prefix(NODE) {
                self.set(&mut after.nodes, key, name, value)?;
            } else if let Some(name) = key.strip_prefix(MEMBER) {
                self.set(&mut after.members, key, name, value)?;
            } else if let Some(name) = key.strip_prefix(JOIN) {
                self.set(&mut after.joins, key, name, value)?;
            }
        }
        Ok(after)
    }
}

fn written(member: &Member) -> Vec<u8> {
    serde_json::to_vec(member).expect("it has only strings and numbers")
}
