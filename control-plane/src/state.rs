//! What the control plane remembers of apps and nodes, and where it lies on disk.
//!
//! [`Records`] are immutable once published; a change makes new ones that share what did not change.
//! [`State::save`] writes the difference in one batch and returns when it is on disk.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::Arc;

use selvage_config::plan::{Peer, Status};
use selvage_config::release::Release;
use selvage_config::snapshot::Revoked;
use selvage_config::{AppName, NodeName};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use sled::{Batch, Db, IVec, Tree};

/// Memory for pages of the database, bytes.
const CACHE_BYTES: u64 = 64 * 1024 * 1024;

const GENERATION: &[u8] = b"generation";
const REVOKED: &[u8] = b"revoked";
const APP: &[u8] = b"app/";
const NODE: &[u8] = b"node/";

/// All that plans are made from.
#[derive(Debug, Clone, Default)]
pub(crate) struct Records {
    /// Grows with every change of any plan.
    pub(crate) generation: u64,
    pub(crate) apps: BTreeMap<AppName, Arc<AppRecord>>,
    pub(crate) nodes: BTreeMap<NodeName, Arc<NodeRecord>>,
    /// What must not run any more. It only grows: nodes take nothing back.
    pub(crate) revoked: Arc<Revoked>,
}

/// One app's releases. An app that was removed keeps its record, so that a number never names two releases.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub(crate) struct AppRecord {
    /// The highest number ever given.
    pub(crate) last: u32,
    /// The release that plans name.
    pub(crate) current: Option<u32>,
    /// Those that can be gone back to.
    pub(crate) releases: BTreeMap<u32, ReleaseRecord>,
}

/// A release, and what must be known of it without reading its manifest again.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct ReleaseRecord {
    pub(crate) release: Release,
    /// The hosts that the app document claims.
    pub(crate) hosts: Vec<String>,
}

/// What a node last told.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub(crate) struct NodeRecord {
    pub(crate) status: Status,
    /// Where its peers reach it, if it replicates.
    pub(crate) replication: Option<SocketAddr>,
}

impl AppRecord {
    /// The release that plans name.
    pub(crate) fn current(&self) -> Option<&ReleaseRecord> {
        self.releases.get(&self.current?)
    }
}

impl Records {
    /// The current release of each app that has one.
    pub(crate) fn current(&self) -> impl Iterator<Item = &ReleaseRecord> {
        self.apps.values().filter_map(|app| app.current())
    }

    /// The nodes that replicate.
    pub(crate) fn peers(&self) -> impl Iterator<Item = Peer> {
        self.nodes.values().filter_map(|node| {
            let (name, region) = (node.status.node.clone(), node.status.region.clone());
            node.replication.map(|address| Peer { node: name, region, address })
        })
    }

    /// The newest generation that any node says to have taken in.
    pub(crate) fn told_generation(&self) -> u64 {
        self.nodes.values().map(|node| node.status.generation).max().unwrap_or(0)
    }
}

/// The database could not be used.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StateError {
    #[error("use the database")]
    Database(#[from] sled::Error),
    #[error("read record {key:?} of the database")]
    Record {
        key: String,
        #[source]
        source: serde_json::Error,
    },
    #[error("record {key:?} of the database is malformed")]
    Malformed { key: String },
}

/// The database of apps and nodes.
#[derive(Debug)]
pub(crate) struct State {
    database: Db,
    tree: Tree,
}

impl State {
    /// Opens the database in `directory`, or makes it.
    pub(crate) fn open(directory: &Path) -> Result<Self, StateError> {
        // Nothing is flushed by a clock: every change waits for its own flush.
        let database = sled::Config::new().path(directory).cache_capacity(CACHE_BYTES).flush_every_ms(None).open()?;
        let tree = database.open_tree("fleet")?;
        Ok(Self { database, tree })
    }

    /// The tree of the registry's own records.
    pub(crate) fn open_catalog(&self) -> Result<Tree, StateError> {
        Ok(self.database.open_tree("registry")?)
    }

    /// Everything remembered.
    pub(crate) fn load(&self) -> Result<Records, StateError> {
        let generation = match self.tree.get(GENERATION)? {
            None => 0,
            Some(bytes) => u64::from_be_bytes(
                bytes.as_ref().try_into().map_err(|_| StateError::Malformed { key: "generation".into() })?,
            ),
        };
        let revoked = match self.tree.get(REVOKED)? {
            None => Revoked::default(),
            Some(bytes) => {
                serde_json::from_slice(&bytes).map_err(|source| StateError::Record { key: "revoked".into(), source })?
            }
        };
        let revoked = Arc::new(revoked);
        Ok(Records { generation, apps: self.load_all(APP)?, nodes: self.load_all(NODE)?, revoked })
    }

    fn load_all<N, R>(&self, prefix: &[u8]) -> Result<BTreeMap<N, Arc<R>>, StateError>
    where
        N: TryFrom<String> + Ord,
        R: DeserializeOwned,
    {
        let read = |entry: sled::Result<(IVec, IVec)>| {
            let (key, value) = entry?;
            let text = String::from_utf8_lossy(&key).into_owned();
            let name = String::from_utf8_lossy(&key[prefix.len()..]).into_owned();
            let name = N::try_from(name).map_err(|_| StateError::Malformed { key: text.clone() })?;
            let record = serde_json::from_slice(&value).map_err(|source| StateError::Record { key: text, source })?;
            Ok((name, Arc::new(record)))
        };
        self.tree.scan_prefix(prefix).map(read).collect()
    }

    /// Makes `after` what is remembered instead of `before`: whole or not at all. It is on disk on return if it
    /// changes a plan or a release; what else a node tells, it tells again in seconds.
    pub(crate) fn save(&self, before: &Records, after: &Records) -> Result<(), StateError> {
        let mut batch = Batch::default();
        if before.generation != after.generation {
            batch.insert(GENERATION, &after.generation.to_be_bytes());
        }
        if before.revoked != after.revoked {
            batch.insert(REVOKED, serde_json::to_vec(&*after.revoked).expect("it has only strings"));
        }
        put_changed(&mut batch, APP, &before.apps, &after.apps);
        put_changed(&mut batch, NODE, &before.nodes, &after.nodes);
        self.tree.apply_batch(batch)?;
        if before.generation != after.generation || before.apps != after.apps {
            self.tree.flush()?;
        }
        Ok(())
    }
}

fn put_changed<N, R>(batch: &mut Batch, prefix: &[u8], before: &BTreeMap<N, Arc<R>>, after: &BTreeMap<N, Arc<R>>)
where
    N: ToString + Ord,
    R: Serialize,
{
    let key = |name: &N| [prefix, name.to_string().as_bytes()].concat();
    for (name, record) in after {
        if !before.get(name).is_some_and(|old| Arc::ptr_eq(old, record)) {
            let bytes = serde_json::to_vec(&**record).expect("a record has only string keys and numbers as keys");
            batch.insert(key(name), bytes);
        }
    }
    for name in before.keys().filter(|name| !after.contains_key(name)) {
        batch.remove(key(name));
    }
}

#[cfg(test)]
mod tests {
    use super::*;

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
            releases: [(7, ReleaseRecord { release, hosts: vec!["a.test".into()] })].into(),
        };
        let empty = Records::default();
        let full = Records {
            generation: 3,
            apps: [("hello".parse().unwrap(), Arc::new(app.clone()))].into(),
            revoked: Arc::new(Revoked { identities: ["eve".to_owned()].into(), ..Revoked::default() }),
            ..empty.clone()
        };
        let state = State::open(&directory.path().join("db")).unwrap();
        state.save(&empty, &full).unwrap();
        drop(state);

        let state = State::open(&directory.path().join("db")).unwrap();
        let read = state.load().unwrap();
        assert_eq!((read.generation, &read.revoked), (3, &full.revoked));
        assert_eq!(*read.apps[&"hello".parse().unwrap()], app);
        state.save(&full, &Records { generation: 4, ..Records::default() }).unwrap();
        assert!(state.load().unwrap().apps.is_empty());
    }
}
