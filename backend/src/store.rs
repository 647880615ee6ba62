//! One store, wherever it is.

use std::sync::Arc;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use selvage_config::StoreName;
use selvage_sync::store::{HIDDEN, METADATA_BYTES_MAX, Terms};
use selvage_sync::{Dot, Elsewhere, KvError, Listed};

use crate::ability::Abilities;
use crate::error::{Moving, StoreError};
use crate::mesh::{Mesh, Reached};
use crate::stores::Backend;

/// Longest key, bytes: the same wherever a store is, so that it can move.
pub(crate) const KEY_BYTES_MAX: usize = selvage_sync::entry::KEY_BYTES_MAX;
/// Keys of one batch that are read from a backend at once.
const BATCH_AT_ONCE: usize = 16;

/// A value, its terms, and which write it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The value. A counter's is 8 bytes, little-endian.
    pub value: Bytes,
    /// Its terms.
    pub terms: Terms,
    /// Names the very write. No two have the same.
    pub version: String,
}

impl From<selvage_sync::store::Kept> for Kept {
    fn from(kept: selvage_sync::store::Kept) -> Self {
        Self { value: kept.value, terms: kept.terms, version: kept.version.to_string() }
    }
}

/// One store.
#[derive(Clone)]
pub struct Store {
    name: StoreName,
    place: Place,
}

#[derive(Clone)]
enum Place {
    Mesh(Mesh),
    Backend(Arc<Backend>),
}

impl Store {
    pub(crate) fn in_mesh(mesh: Mesh, name: StoreName) -> Self {
        Self { name, place: Place::Mesh(mesh) }
    }

    pub(crate) fn in_backend(backend: Arc<Backend>, name: StoreName) -> Self {
        Self { name, place: Place::Backend(backend) }
    }

    /// Its name.
    pub fn name(&self) -> &StoreName {
        &self.name
    }

    /// How other nodes are asked for it, if it is in the mesh and this node does not hold it.
    pub fn held_elsewhere(&self) -> Option<Elsewhere> {
        self.mesh()?.held_elsewhere(&self.name)
    }

    /// The node's own replicated KV, if that is where it is.
    pub fn mesh(&self) -> Option<&Mesh> {
        match &self.place {
            Place::Mesh(mesh) => Some(mesh),
            Place::Backend(_) => None,
        }
    }

    /// The name of the backend that keeps it, if one does.
    pub fn backend(&self) -> Option<&str> {
        match &self.place {
            Place::Mesh(_) => None,
            Place::Backend(backend) => Some(backend.name()),
        }
    }

    /// What can be done with it.
    pub fn abilities(&self) -> &'static Abilities {
        match &self.place {
            Place::Mesh(mesh) if mesh.held_elsewhere(&self.name).is_some() => &Abilities::ELSEWHERE,
            Place::Mesh(_) => &Abilities::MESH,
            Place::Backend(backend) => backend.abilities(),
        }
    }

    /// The value of a key.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.get(&self.name, key)?),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.get(key).await?),
                Reached::Carried(carrier) => carrier.get(&self.name, key).await,
            },
            Place::Backend(_) => Ok(self.latest(key).await?.map(|kept| kept.value)),
        }
    }

    /// The values of keys, in their order.
    pub async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Bytes>>, StoreError> {
        if let Place::Mesh(mesh) = &self.place
            && let Reached::Here(kv) = mesh.reach(&self.name).await?
        {
            return Ok(keys.iter().map(|key| kv.get(&self.name, key)).collect::<Result<_, _>>()?);
        }
        let values = stream::iter(keys.iter().map(|key| self.get(key)).collect::<Vec<_>>());
        values.buffered(BATCH_AT_ONCE).try_collect().await
    }

    /// A value with its terms and which write it is, as the store's home has it or its backend: what a condition is to be
    /// made of.
    pub async fn latest(&self, key: &str) -> Result<Option<Kept>, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.latest(&self.name, key).await?.map(Kept::from)),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.latest(key).await?.map(Kept::from)),
                Reached::Carried(carrier) => carrier.latest(&self.name, key).await,
            },
            Place::Backend(backend) => {
                check_key(key)?;
                match &**backend {
                    Backend::Redis(redis) => redis.get(&self.name, key).await,
                    Backend::Nats(nats) => nats.get(&self.name, key).await,
                }
            }
        }
    }

    /// Whether the key exists.
    pub async fn exists(&self, key: &str) -> Result<bool, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.exists(&self.name, key)?),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.exists(key).await?),
                Reached::Carried(carrier) => carrier.exists(&self.name, key).await,
            },
            Place::Backend(backend) => {
                check_key(key)?;
                match &**backend {
                    Backend::Redis(redis) => redis.exists(&self.name, key).await,
                    Backend::Nats(nats) => Ok(nats.get(&self.name, key).await?.is_some()),
                }
            }
        }
    }

    /// Sets a key.
    pub async fn set(&self, key: &str, value: Bytes) -> Result<(), StoreError> {
        self.set_on(key, value, Terms::default()).await.map(drop)
    }

    /// Sets a key on terms. Which write it was.
    pub async fn set_on(&self, key: &str, value: Bytes, terms: Terms) -> Result<String, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.set_on(&self.name, key, value, terms).await?.dot.to_string()),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.set_on(key, value, terms).await?.dot.to_string()),
                Reached::Carried(carrier) => carrier.set_on(&self.name, key, value, terms).await,
            },
            Place::Backend(backend) => {
                check_entry(key, &terms)?;
                match &**backend {
                    Backend::Redis(redis) => redis.set(&self.name, key, &value, &terms).await,
                    Backend::Nats(nats) => nats.set(&self.name, key, value, &terms).await,
                }
            }
        }
    }

    /// Sets a key if the write `seen` still stands there, or nothing if none was seen. Which write it was; none if
    /// something else stands there.
    pub async fn set_if(
        &self,
        key: &str,
        value: Bytes,
        terms: Terms,
        seen: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => {
                    let written = kv.set_if(&self.name, key, value, terms, version(seen)?).await?;
                    Ok(written.map(|written| written.dot.to_string()))
                }
                Reached::Elsewhere(elsewhere) => {
                    let written = elsewhere.set_if(key, value, terms, version(seen)?).await?;
                    Ok(written.map(|written| written.dot.to_string()))
                }
                Reached::Carried(carrier) => carrier.set_if(&self.name, key, value, terms, seen).await,
            },
            Place::Backend(backend) => {
                check_entry(key, &terms)?;
                match &**backend {
                    Backend::Redis(redis) => redis.set_if(&self.name, key, &value, &terms, seen).await,
                    Backend::Nats(nats) => nats.set_if(&self.name, key, value, &terms, seen).await,
                }
            }
        }
    }

    /// Sets a key if its value is `seen` at that moment; whether it was.
    pub async fn swap(&self, key: &str, seen: Option<&[u8]>, value: Bytes) -> Result<bool, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.swap(&self.name, key, seen, value).await?),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.swap(key, seen, value).await?),
                Reached::Carried(carrier) => carrier.swap(&self.name, key, seen, value).await,
            },
            Place::Backend(_) => {
                let stands = self.latest(key).await?;
                if stands.as_ref().map(|stands| &*stands.value) != seen {
                    return Ok(false);
                }
                let version = stands.as_ref().map(|stands| stands.version.as_str());
                Ok(self.set_if(key, value, Terms::default(), version).await?.is_some())
            }
        }
    }

    /// Deletes a key, whether it exists or not.
    pub async fn delete(&self, key: &str) -> Result<(), StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.delete(&self.name, key).await?),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.delete(key).await?),
                Reached::Carried(carrier) => carrier.delete(&self.name, key).await,
            },
            Place::Backend(backend) => {
                check_key(key)?;
                match &**backend {
                    Backend::Redis(redis) => redis.delete(&self.name, key).await,
                    Backend::Nats(nats) => nats.delete(&self.name, key).await,
                }
            }
        }
    }

    /// Adds to a counter, and tells its sum. A key that does not exist counts from zero, a value of 8 bytes from that
    /// little-endian number. A counter that this begins ends at `expires_ms`; one that is there ends when it would.
    pub async fn increment(&self, key: &str, delta: i64, expires_ms: Option<u64>) -> Result<i64, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.increment_until(&self.name, key, delta, expires_ms).await?.0),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.increment_until(key, delta, expires_ms).await?),
                Reached::Carried(carrier) => carrier.increment(&self.name, key, delta, expires_ms).await,
            },
            Place::Backend(backend) => {
                check_key(key)?;
                match &**backend {
                    Backend::Redis(redis) => redis.increment(&self.name, key, delta, expires_ms).await,
                    Backend::Nats(nats) => nats.increment(&self.name, key, delta, expires_ms).await,
                }
            }
        }
    }

    /// The keys that begin with `prefix` and come after `after`, in order; [`LIST_MAX`](selvage_sync::store::LIST_MAX) at
    /// most. Fewer than `limit`: there are no more.
    pub async fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<String>, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.list(&self.name, prefix, after, limit)?),
                Reached::Elsewhere(elsewhere) => {
                    let found = elsewhere.list_entries(prefix, after, limit).await?;
                    Ok(found.into_iter().map(|found| found.name).collect())
                }
                Reached::Carried(carrier) => carrier.list(&self.name, prefix, after, limit).await,
            },
            Place::Backend(backend) => {
                let found = list(backend, &self.name, prefix, after, limit).await?;
                Ok(found.into_iter().map(|found| found.name).collect())
            }
        }
    }

    /// As [`Store::list`], with facts on each. Who wrote is known in the mesh only. In the mesh it reads many rows: not on
    /// a thread that serves.
    pub async fn list_entries(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        match &self.place {
            Place::Mesh(mesh) => match mesh.reach(&self.name).await? {
                Reached::Here(kv) => Ok(kv.list_entries(&self.name, prefix, after, limit)?),
                Reached::Elsewhere(elsewhere) => Ok(elsewhere.list_entries(prefix, after, limit).await?),
                // Only operators ask this, who ask the process that has it.
                Reached::Carried(_) => Err(Moving::NotYet.into()),
            },
            Place::Backend(backend) => list(backend, &self.name, prefix, after, limit).await,
        }
    }
}

/// Which write of the mesh is meant.
fn version(seen: Option<&str>) -> Result<Option<Dot>, StoreError> {
    seen.map(|seen| seen.parse().map_err(|_| StoreError::Version)).transpose()
}

async fn list(
    backend: &Backend,
    store: &StoreName,
    prefix: &str,
    after: Option<&str>,
    limit: usize,
) -> Result<Vec<Listed>, StoreError> {
    let limit = limit.min(selvage_sync::store::LIST_MAX);
    if limit == 0 {
        return Ok(Vec::new());
    }
    match backend {
        Backend::Redis(redis) => redis.list(store, prefix, after, limit).await,
        Backend::Nats(nats) => nats.list(store, prefix, after, limit).await,
    }
}

pub(crate) fn check_key(key: &str) -> Result<(), StoreError> {
    if key.starts_with(HIDDEN) {
        return Err(KvError::Hidden.into());
    }
    check("key", key.len(), KEY_BYTES_MAX)
}

fn check_entry(key: &str, terms: &Terms) -> Result<(), StoreError> {
    check_key(key)?;
    check("metadata", terms.metadata.len(), METADATA_BYTES_MAX)
}

pub(crate) fn check(what: &'static str, bytes: usize, max: usize) -> Result<(), StoreError> {
    if bytes > max { Err(KvError::TooLarge { what, bytes, max }.into()) } else { Ok(()) }
}
