//! What the control plane remembers of apps and nodes, and where it lies on disk.
//!
//! [`Records`] are immutable once published; a change makes new ones that share what did not change.
//! [`State::save`] writes the difference in one batch and returns when it is on disk. Where the state is shared, it
//! returns when the journal has it: the database is then a copy, and remembers how far it has come.

mod change;
mod records;
mod shared;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_certs::Seal;
use selvage_config::operator::Operators;
use selvage_config::plan::{Home, Placement};
use selvage_config::snapshot::Revoked;
use serde::Serialize;
use serde::de::DeserializeOwned;
use sled::{Db, IVec, Tree};

pub(crate) use change::{CHANGE_BYTES_MAX, Change, Table};
pub(crate) use records::{
    AppRecord, JoinRecord, MemberRecord, NodeRecord, Records, ReleaseRecord, RolloutRecord, SplitRecord, Stage,
};
pub(crate) use shared::{Member, Standing};

use crate::fleet::{Homes, Placements};
use crate::journal::{Journal, JournalError};

/// Memory for pages of the database, bytes.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;
/// How long a database is waited for that a control plane which is ending still holds.
const LOCK_PATIENCE: Duration = Duration::from_secs(5);
/// Pause between two tries.
const LOCK_PAUSE: Duration = Duration::from_millis(50);

const GENERATION: &[u8] = b"generation";
const REVOKED: &[u8] = b"revoked";
const OPERATORS: &[u8] = b"operators";
const HOMES: &[u8] = b"homes";
const PLACEMENTS: &[u8] = b"placements";
const APP: &[u8] = b"app/";
const NODE: &[u8] = b"node/";
const MEMBER: &[u8] = b"member/";
const JOIN: &[u8] = b"join/";

/// The database could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("use the database")]
    Database(#[from] sled::Error),
    #[error("{0} is open in another process: one directory has one control plane")]
    Busy(PathBuf),
    #[error("read record {key:?} of the database")]
    Record {
        key: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("record {key:?} of the database was sealed with another key")]
    Sealed { key: String },
    #[error("seal a record")]
    Seal(#[source] std::io::Error),
    #[error("no random bytes")]
    Random,
    #[error("record {key:?} of the database is malformed")]
    Malformed { key: String },
    #[error(transparent)]
    Journal(#[from] JournalError),
    #[error("put what is here into the object store")]
    Found(#[source] Box<dyn std::error::Error + Send + Sync>),
}

/// Whether somebody has the database open. The library has no kind of its own for it.
fn is_held(error: &sled::Error) -> bool {
    matches!(error, sled::Error::Io(error) if error.to_string().contains("could not acquire lock"))
}

/// A row of the database.
pub(crate) type KeyValue = (Vec<u8>, Vec<u8>);

/// The database of apps and nodes.
#[derive(Debug)]
pub(crate) struct State {
    database: Db,
    tree: Tree,
    /// The registry's own records.
    catalog: Tree,
    /// Apps' records hold values of variables, some of them secret.
    seal: Seal,
    /// Where the state is shared, if it is.
    journal: OnceLock<Arc<Journal>>,
    /// Held for the length of a change.
    order: Mutex<()>,
    /// The sequence of the last change of the journal that is in the database, and word of the next.
    applied: Mutex<u64>,
    progress: Condvar,
}

/// The lock under which the state changes.
pub(crate) type Order<'s> = MutexGuard<'s, ()>;

impl State {
    /// Opens the database in `directory`, or makes it.
    pub(crate) fn open(directory: &Path, seal: Seal) -> Result<Self, StateError> {
        // Nothing is flushed by a clock: every change waits for its own flush.
        let config = sled::Config::new().path(directory).cache_capacity(CACHE_BYTES).flush_every_ms(None);
        let begun = Instant::now();
        let database = loop {
            match config.open() {
                Err(error) if is_held(&error) && begun.elapsed() < LOCK_PATIENCE => std::thread::sleep(LOCK_PAUSE),
                Err(error) if is_held(&error) => return Err(StateError::Busy(directory.to_owned())),
                opened => break opened?,
            }
        };
        let (tree, catalog) = (database.open_tree("fleet")?, database.open_tree("registry")?);
        let (journal, order, applied, progress) = Default::default();
        Ok(Self { database, tree, catalog, seal, journal, order, applied, progress })
    }

    /// The registry's own records.
    pub(crate) fn catalog(&self) -> &Tree {
        &self.catalog
    }

    /// Waits until nobody else changes anything.
    pub(crate) fn order(&self) -> Order<'_> {
        self.order.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Random bytes that are made once and remembered under `name`.
    pub(crate) fn key<const N: usize>(&self, name: &str) -> Result<[u8; N], StateError> {
        let malformed = || StateError::Malformed { key: name.to_owned() };
        let _order = self.order();
        if let Some(bytes) = self.tree.get(name)? {
            // Those of before keys were sealed are as long as they are.
            if let Ok(key) = bytes.as_ref().try_into() {
                return Ok(key);
            }
            let opened = self.seal.open_record(name.as_bytes(), &bytes);
            let opened = opened.ok_or_else(|| StateError::Sealed { key: name.to_owned() })?;
            return opened.as_slice().try_into().map_err(|_| malformed());
        }
        let mut key = [0; N];
        SystemRandom::new().fill(&mut key).map_err(|_| StateError::Random)?;
        self.write_key(name, &key)?;
        Ok(key)
    }

    fn write_key(&self, name: &str, key: &[u8]) -> Result<(), StateError> {
        let sealed = self.seal.seal(name.as_bytes(), key.to_vec()).map_err(StateError::Seal)?;
        let mut change = Change::default();
        change.put(Table::Fleet, name.as_bytes().to_vec(), sealed);
        self.write(&change, true)
    }

    /// Everything remembered.
    pub(crate) fn load(&self) -> Result<Records, StateError> {
        let generation = self.tree.get(GENERATION)?.map_or(Ok(0), |bytes| generation_of(&bytes))?;
        let revoked = self.tree.get(REVOKED)?.map_or_else(|| Ok(Revoked::default()), |bytes| revoked_of(&bytes))?;
        let operators = self.tree.get(OPERATORS)?.map(|bytes| operators_of(&bytes)).transpose()?;
        Ok(Records {
            generation,
            apps: self.load_all(APP)?,
            nodes: self.load_all(NODE)?,
            members: self.load_all(MEMBER)?,
            joins: self.load_all(JOIN)?,
            revoked: Arc::new(revoked),
            operators,
            homes: self.tree.get(HOMES)?.map(|bytes| homes_of(&bytes)).transpose()?.unwrap_or_default(),
            placements: self.tree.get(PLACEMENTS)?.map(|bytes| placements_of(&bytes)).transpose()?.unwrap_or_default(),
        })
    }

    fn load_all<N, R>(&self, prefix: &[u8]) -> Result<BTreeMap<N, Arc<R>>, StateError>
    where
        N: TryFrom<String> + Ord,
        R: DeserializeOwned,
    {
        let read = |entry: sled::Result<(IVec, IVec)>| {
            let (key, value) = entry?;
            self.read(&key, &key[prefix.len()..], &value)
        };
        self.tree.scan_prefix(prefix).map(read).collect()
    }

    /// One record, with the name at the end of its key.
    fn read<N, R>(&self, key: &[u8], name: &[u8], value: &[u8]) -> Result<(N, Arc<R>), StateError>
    where
        N: TryFrom<String>,
        R: DeserializeOwned,
    {
        let text = String::from_utf8_lossy(key).into_owned();
        let name = name_of(key, name)?;
        let value = self.seal.open_record(key, value).ok_or_else(|| StateError::Sealed { key: text.clone() })?;
        let record = serde_json::from_slice(&value).map_err(|source| StateError::Record { key: text, source })?;
        Ok((name, Arc::new(record)))
    }

    /// Puts one record in its place, or takes it away.
    fn set<N, R>(
        &self,
        records: &mut BTreeMap<N, Arc<R>>,
        key: &[u8],
        name: &[u8],
        value: Option<&[u8]>,
    ) -> Result<(), StateError>
    where
        N: TryFrom<String> + Ord,
        R: DeserializeOwned,
    {
        match value {
            Some(value) => {
                let (name, record) = self.read(key, name, value)?;
                records.insert(name, record);
            }
            None => drop(records.remove(&name_of(key, name)?)),
        }
        Ok(())
    }

    /// Makes `after` what is remembered instead of `before`: whole or not at all. It is on disk, or in the journal, on
    /// return if it changes a plan or a release; what else a node tells, it tells again in seconds. The order must be held.
    pub(crate) fn save(&self, before: &Records, after: &Records) -> Result<(), StateError> {
        let mut rows = Change::default();
        if before.generation != after.generation {
            rows.put(Table::Fleet, GENERATION.to_vec(), after.generation.to_be_bytes().to_vec());
        }
        if before.revoked != after.revoked {
            let revoked = serde_json::to_vec(&*after.revoked).expect("it has only strings");
            rows.put(Table::Fleet, REVOKED.to_vec(), revoked);
        }
        if before.operators != after.operators {
            match after.operators.as_deref() {
                Some(operators) => rows.put(Table::Fleet, OPERATORS.to_vec(), operators_row(operators)),
                None => rows.remove(Table::Fleet, OPERATORS.to_vec()),
            }
        }
        if before.homes != after.homes {
            rows.put(Table::Fleet, HOMES.to_vec(), homes_row(&after.homes));
        }
        if before.placements != after.placements {
            rows.put(Table::Fleet, PLACEMENTS.to_vec(), placements_row(&after.placements));
        }
        self.put_changed(&mut rows, APP, &before.apps, &after.apps)?;
        self.put_changed(&mut rows, NODE, &before.nodes, &after.nodes)?;
        self.put_changed(&mut rows, MEMBER, &before.members, &after.members)?;
        self.put_changed(&mut rows, JOIN, &before.joins, &after.joins)?;
        let is_lasting = before.generation != after.generation
            || before.apps != after.apps
            || before.members != after.members
            || before.joins != after.joins
            || before.operators != after.operators
            || before.homes != after.homes
            || before.placements != after.placements;
        // A node that is gone is gone everywhere, and one that is new, or elsewhere, is known to be.
        let is_shared = || self.journal().is_some() && !before.has_same_nodes(after);
        self.write(&rows, is_lasting || is_shared())
    }

    /// All rows of these records, as they lie on the disk.
    pub(crate) fn rows(&self, records: &Records) -> Result<Vec<KeyValue>, StateError> {
        let mut rows = Change::default();
        let none = Records::default();
        rows.put(Table::Fleet, GENERATION.to_vec(), records.generation.to_be_bytes().to_vec());
        let revoked = serde_json::to_vec(&*records.revoked).expect("it has only strings");
        rows.put(Table::Fleet, REVOKED.to_vec(), revoked);
        if let Some(operators) = &records.operators {
            rows.put(Table::Fleet, OPERATORS.to_vec(), operators_row(operators));
        }
        if !records.homes.is_empty() {
            rows.put(Table::Fleet, HOMES.to_vec(), homes_row(&records.homes));
        }
        if !records.placements.is_empty() {
            rows.put(Table::Fleet, PLACEMENTS.to_vec(), placements_row(&records.placements));
        }
        self.put_changed(&mut rows, APP, &none.apps, &records.apps)?;
        self.put_changed(&mut rows, NODE, &none.nodes, &records.nodes)?;
        self.put_changed(&mut rows, MEMBER, &none.members, &records.members)?;
        self.put_changed(&mut rows, JOIN, &none.joins, &records.joins)?;
        Ok(rows.rows().iter().filter_map(|row| Some((row.key.clone(), row.value.clone()?))).collect())
    }

    /// Takes rows of a backup into a database that is empty, under another generation. Join tokens are left out, and
    /// counted: one that was used since would be good again.
    pub(crate) fn fill(&self, rows: impl Iterator<Item = KeyValue>, generation: u64) -> Result<usize, StateError> {
        let mut left_out = 0;
        for (key, value) in rows {
            if key.starts_with(JOIN) {
                left_out += 1;
            } else {
                self.tree.insert(key, value)?;
            }
        }
        self.tree.insert(GENERATION, &generation.to_be_bytes())?;
        self.tree.flush()?;
        Ok(left_out)
    }

    /// Which key seals.
    pub(crate) fn sealing_key(&self) -> &str {
        self.seal.id()
    }

    fn put_changed<N, R>(
        &self,
        rows: &mut Change,
        prefix: &[u8],
        before: &BTreeMap<N, Arc<R>>,
        after: &BTreeMap<N, Arc<R>>,
    ) -> Result<(), StateError>
    where
        N: ToString + Ord,
        R: Serialize,
    {
        let key = |name: &N| [prefix, name.to_string().as_bytes()].concat();
        for (name, record) in after {
            if !before.get(name).is_some_and(|old| Arc::ptr_eq(old, record)) {
                let key = key(name);
                let mut bytes =
                    serde_json::to_vec(&**record).expect("a record has only string keys and numbers as keys");
                if prefix == APP {
                    bytes = self.seal.seal(&key, bytes).map_err(StateError::Seal)?;
                }
                rows.put(Table::Fleet, key, bytes);
            }
        }
        for name in before.keys().filter(|name| !after.contains_key(name)) {
            rows.remove(Table::Fleet, key(name));
        }
        Ok(())
    }
}

fn name_of<N: TryFrom<String>>(key: &[u8], name: &[u8]) -> Result<N, StateError> {
    let malformed = |_| StateError::Malformed { key: String::from_utf8_lossy(key).into_owned() };
    N::try_from(String::from_utf8_lossy(name).into_owned()).map_err(malformed)
}

fn generation_of(bytes: &[u8]) -> Result<u64, StateError> {
    let bytes = bytes.try_into().map_err(|_| StateError::Malformed { key: "generation".into() })?;
    Ok(u64::from_be_bytes(bytes))
}

fn operators_row(operators: &Operators) -> Vec<u8> {
    serde_json::to_vec(operators).expect("it has only strings")
}

fn operators_of(bytes: &[u8]) -> Result<Arc<Operators>, StateError> {
    let read = serde_json::from_slice(bytes);
    read.map(Arc::new).map_err(|source| StateError::Record { key: "operators".into(), source })
}

/// A list: each home names its store.
fn homes_row(homes: &Homes) -> Vec<u8> {
    serde_json::to_vec(&homes.values().collect::<Vec<_>>()).expect("it has only strings and numbers")
}

fn homes_of(bytes: &[u8]) -> Result<Arc<Homes>, StateError> {
    let read = serde_json::from_slice::<Vec<Home>>(bytes);
    let homes = read.map_err(|source| StateError::Record { key: "homes".into(), source })?;
    Ok(Arc::new(homes.into_iter().map(|home| (home.store.clone(), home)).collect()))
}

/// A list: each placement has its name.
fn placements_row(placements: &Placements) -> Vec<u8> {
    serde_json::to_vec(&placements.values().collect::<Vec<_>>()).expect("it has only strings and numbers")
}

fn placements_of(bytes: &[u8]) -> Result<Arc<Placements>, StateError> {
    let read = serde_json::from_slice::<Vec<Placement>>(bytes);
    let placements = read.map_err(|source| StateError::Record { key: "placements".into(), source })?;
    Ok(Arc::new(placements.into_iter().map(|placement| (placement.name.clone(), placement)).collect()))
}

fn revoked_of(bytes: &[u8]) -> Result<Revoked, StateError> {
    serde_json::from_slice(bytes).map_err(|source| StateError::Record { key: "revoked".into(), source })
}

#[cfg(test)]
mod tests {
    use selvage_config::operator::OperatorRights;
    use selvage_config::release::Release;

    use super::*;

    #[test]
    fn a_database_that_somebody_is_about_to_close_is_waited_for() {
        let directory = tempfile::tempdir().unwrap();
        let place = directory.path().join("db");
        let open = || State::open(&place, Seal::open(&directory.path().join("sealing.key")).unwrap());
        let before = open().unwrap();
        std::thread::scope(|scope| {
            let next = scope.spawn(open);
            std::thread::sleep(4 * LOCK_PAUSE);
            assert!(!next.is_finished());
            drop(before);
            next.join().unwrap().unwrap();
        });
        let _held = open().unwrap();
        assert!(matches!(open(), Err(StateError::Busy(at)) if at == place));
    }

    #[test]
    fn records_are_read_as_they_were_saved() {
        let directory = tempfile::tempdir().unwrap();
        let release = Release {
            id: "hello@7".parse().unwrap(),
            repository: "apps/hello".parse().unwrap(),
            manifest: selvage_config::Digest::of(b"m"),
            variables: [("a".to_owned(), "b".to_owned())].into(),
            created_ms: 5,
            created_by: "ops".into(),
        };
        let app = AppRecord {
            last: 9,
            current: Some(7),
            releases: [(7, ReleaseRecord { release, hosts: vec!["a.test".into()], declared: [].into() })].into(),
            secrets: [("token".to_owned(), "s3cret".to_owned())].into(),
            ..AppRecord::default()
        };
        let home = Home::first("shop/orders".parse().unwrap(), "fra-1".parse().unwrap(), 3);
        let placement = Placement {
            name: "eu".parse().unwrap(),
            regions: ["fra".parse().unwrap()].into(),
            stores: [("shop/orders".parse().unwrap(), 5)].into(),
        };
        let empty = Records::default();
        let full = Records {
            generation: 3,
            apps: [("hello".parse().unwrap(), Arc::new(app.clone()))].into(),
            revoked: Arc::new(Revoked { identities: ["eve".to_owned()].into(), ..Revoked::default() }),
            operators: Some(Arc::new([("ada".to_owned(), OperatorRights::default())].into())),
            homes: Arc::new([(home.store.clone(), home)].into()),
            placements: Arc::new([(placement.name.clone(), placement)].into()),
            ..empty.clone()
        };
        let state =
            State::open(&directory.path().join("db"), Seal::open(&directory.path().join("key")).unwrap()).unwrap();
        state.save(&empty, &full).unwrap();
        drop(state);

        let state =
            State::open(&directory.path().join("db"), Seal::open(&directory.path().join("key")).unwrap()).unwrap();
        let read = state.load().unwrap();
        assert_eq!((read.generation, &read.revoked, &read.operators), (3, &full.revoked, &full.operators));
        assert_eq!((&read.homes, &read.placements), (&full.homes, &full.placements));
        assert_eq!(*read.apps[&"hello".parse().unwrap()], app);
        state.save(&full, &Records { generation: 4, ..Records::default() }).unwrap();
        assert!(state.load().unwrap().apps.is_empty());
    }

    #[test]
    fn no_secret_lies_on_the_disk_as_it_is() {
        let directory = tempfile::tempdir().unwrap();
        let secrets = [("token".to_owned(), "s3cret-s3cret".to_owned())].into();
        let app = Arc::new(AppRecord { secrets, ..AppRecord::default() });
        let full = Records { generation: 1, apps: [("hello".parse().unwrap(), app)].into(), ..Records::default() };
        let seal = |name: &str| Seal::open(&directory.path().join(name)).unwrap();
        let state = State::open(&directory.path().join("db"), seal("key")).unwrap();
        state.save(&Records::default(), &full).unwrap();
        drop(state);
        for entry in std::fs::read_dir(directory.path().join("db")).unwrap() {
            let path = entry.unwrap().path();
            let bytes = if path.is_file() { std::fs::read(&path).unwrap() } else { Vec::new() };
            assert!(!bytes.windows(6).any(|window| window == b"s3cret"), "{}", path.display());
        }
        let opened = State::open(&directory.path().join("db"), seal("other")).unwrap();
        assert!(matches!(opened.load(), Err(StateError::Sealed { .. })));
    }
}
