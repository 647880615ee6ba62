//! Where a node keeps its KV, and how much.

mod backend;

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;

use crate::StoreName;
use crate::invalid::Problems;

pub use backend::{KvBackend, KvBackendKind, MESH, RedisAddress};

/// The `[kv]` table of a node's configuration.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Kv {
    /// What keeps the rows. Default `sled`. Another one is changed to with `selvage kv migrate`.
    pub engine: KvEngine,
    /// Memory that the engine may use as cache, MiB. Default 64. The real use of `sled` is up to four times that.
    pub cache_mib: u32,
    /// Free space that the disk of `state_dir` must keep, MiB. Below it the KV only reads. Default 256.
    pub disk_free_mib_min: u32,
    /// The most that all stores together take by this node's own writes, MiB. Default 1,024, what `sled` is good for.
    pub total_mib_max: u32,
    /// The most that one store takes by this node's own writes, MiB. Default 256.
    pub store_mib_max: u32,
    /// Stores with rules of their own, by name: `[kv.stores."app/label"]`.
    pub stores: BTreeMap<StoreName, KvStore>,
    /// Servers that may keep stores in place of the mesh, by name.
    pub backends: BTreeMap<String, KvBackend>,
    /// Which of them keeps every store that does not say otherwise. Default `mesh`: none of them.
    pub backend: Option<String>,
}

/// One store's own rules.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize, Default)]
#[serde(deny_unknown_fields, default)]
pub struct KvStore {
    /// In place of `store_mib_max`. Only for a store in the mesh: other servers have bounds of their own.
    pub mib_max: Option<u32>,
    /// The backend that keeps it, or `mesh`.
    pub backend: Option<String>,
}

impl Default for Kv {
    fn default() -> Self {
        Self {
            engine: KvEngine::default(),
            cache_mib: 64,
            disk_free_mib_min: 256,
            total_mib_max: 1024,
            store_mib_max: 256,
            stores: BTreeMap::new(),
            backends: BTreeMap::new(),
            backend: None,
        }
    }
}

/// What keeps the rows of a node's KV.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Deserialize, Default)]
#[serde(rename_all = "lowercase")]
pub enum KvEngine {
    /// A log-structured tree in a directory.
    #[default]
    Sled,
    /// A copy-on-write tree in one file: opens in milliseconds, gives space back.
    Redb,
    /// Nothing stays: a restart begins empty and takes everything from the peers.
    Memory,
}

impl fmt::Display for KvEngine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Sled => "sled",
            Self::Redb => "redb",
            Self::Memory => "memory",
        })
    }
}

impl std::str::FromStr for KvEngine {
    type Err = String;
    fn from_str(text: &str) -> Result<Self, String> {
        let known = [Self::Sled, Self::Redb, Self::Memory].into_iter().find(|known| known.to_string() == text);
        known.ok_or_else(|| format!("{text:?} is none of sled, redb and memory"))
    }
}

impl Kv {
    pub(super) fn problems(&self, problems: &mut Problems) {
        if self.cache_mib == 0 {
            problems.add(None, "kv.cache_mib", "an engine without a cache", Some("leave it out, or give at least 1"));
        }
        if self.total_mib_max == 0 {
            problems.add(
                None,
                "kv.total_mib_max",
                "nothing could be written",
                Some("leave it out, or give at least 1"),
            );
        }
        if self.store_mib_max > self.total_mib_max {
            let message = format!("{} is above total_mib_max, which is {}", self.store_mib_max, self.total_mib_max);
            problems.add(None, "kv.store_mib_max", message, None);
        }
        backend::problems(&self.backends, problems);
        let chosen = self.stores.iter().map(|(name, store)| (format!("kv.stores.{name}.backend"), &store.backend));
        for (field, backend) in chosen.chain([("kv.backend".to_owned(), &self.backend)]) {
            if let Some(name) = backend.as_deref().filter(|name| *name != MESH && !self.backends.contains_key(*name)) {
                problems.add(None, field, format!("there is no [kv.backends.{name}]"), None);
            }
        }
        for name in self.stores.iter().filter(|(_, store)| store.mib_max.is_some()).map(|(name, _)| name) {
            if let Some(backend) = self.backend_of(name) {
                let message = format!("is for stores in the mesh, and this one is in backend {backend:?}");
                problems.add(None, format!("kv.stores.{name}.mib_max"), message, Some("bound it there"));
            }
        }
    }

    pub(super) fn place_below(&mut self, base: &Path) {
        self.backends.values_mut().for_each(|backend| backend.place_below(base));
    }

    /// The backend that keeps `store`; none: it is in the mesh.
    pub fn backend_of(&self, store: &StoreName) -> Option<&str> {
        let own = self.stores.get(store).and_then(|store| store.backend.as_ref());
        own.or(self.backend.as_ref()).map(String::as_str).filter(|name| *name != MESH)
    }

    /// The most that `store` takes, bytes.
    pub fn store_bytes_max(&self, store: &StoreName) -> u64 {
        let own = self.stores.get(store).and_then(|store| store.mib_max);
        u64::from(own.unwrap_or(self.store_mib_max)) << 20
    }

    /// The most that all stores take together, bytes.
    pub fn total_bytes_max(&self) -> u64 {
        u64::from(self.total_mib_max) << 20
    }
}

#[cfg(test)]
mod tests;
