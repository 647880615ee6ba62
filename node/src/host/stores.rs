//! The stores that a component was granted, for all the interfaces through which guests reach them.

use bytes::Bytes;
use selvage_config::{StoreLabel, StoreName};
use selvage_sync::store::{Kept, Terms};
use selvage_sync::{Dot, Kv, KvError};
use wasmtime::component::ResourceTableError;

use crate::pool::Grants;

/// Keys of one page of a list.
pub(super) const PAGE_KEYS: usize = 1_000;
/// Keys of a list that comes at once, as Spin's interface has it; more is an error.
pub(super) const KEYS_MAX: usize = 100_000;
/// Keys of one batch.
pub(super) const BATCH_KEYS_MAX: usize = 1_000;

/// One granted store, opened by a guest.
#[expect(unreachable_pub, reason = "the generated bindings re-export it")]
#[derive(Clone)]
pub struct Store {
    kv: Kv,
    name: StoreName,
}

/// Why a store or a key can't be had. Always a value for the guest.
#[derive(Debug, thiserror::Error)]
#[expect(unreachable_pub, reason = "the generated bindings re-export it")]
pub enum StoreError {
    /// The label is not of the grammar, so no app can have such a store.
    #[error("no such store")]
    NoSuchStore,
    /// The component was not granted this label.
    #[error("access denied")]
    AccessDenied,
    /// More keys than one call may name or get.
    #[error("more than {0} keys")]
    TooMany(usize),
    /// A cursor that no list gave.
    #[error("unknown cursor")]
    Cursor,
    /// A count beyond what the interface and the store can both hold.
    #[error("count is out of range")]
    Delta,
    /// A life that is none, or beyond the bound.
    #[error("ttl of {ttl_ms} ms, it is from 1 to {max}")]
    Ttl {
        /// What was asked for.
        ttl_ms: u64,
        /// The longest.
        max: u64,
    },
    /// A version that no read gave.
    #[error("unknown version")]
    Version,
    /// The guest's handle is none, or it holds too many: not a value but a trap.
    #[error("handle")]
    Handle(#[from] ResourceTableError),
    /// The store refuses: the key or value breaks a bound, or the disk fails.
    #[error(transparent)]
    Kv(#[from] KvError),
}

impl Store {
    /// The store of `label`, if it was granted.
    pub(super) fn open(grants: &Grants, label: &str) -> Result<Self, StoreError> {
        let label = label.parse::<StoreLabel>().map_err(|_| StoreError::NoSuchStore)?;
        if !grants.stores.contains(&label) {
            return Err(StoreError::AccessDenied);
        }
        Ok(Self { kv: grants.kv.clone(), name: StoreName::of(&grants.app, &label) })
    }

    pub(super) fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.kv.get(&self.name, key)?.map(Into::into))
    }

    pub(super) async fn set(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        Ok(self.kv.set(&self.name, key, Bytes::from(value)).await.map(drop)?)
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Ok(self.kv.delete(&self.name, key).await.map(drop)?)
    }

    pub(super) fn exists(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.kv.exists(&self.name, key)?)
    }

    pub(super) async fn increment(&self, key: &str, delta: i64) -> Result<i64, StoreError> {
        Ok(self.kv.increment(&self.name, key, delta).await?)
    }

    pub(super) async fn increment_until(
        &self,
        key: &str,
        delta: i64,
        expires_ms: Option<u64>,
    ) -> Result<i64, StoreError> {
        Ok(self.kv.increment_until(&self.name, key, delta, expires_ms).await?.0)
    }

    /// The value as the store's home has it, or this node where there is none: what a condition is to be made of.
    pub(super) async fn latest(&self, key: &str) -> Result<Option<Kept>, StoreError> {
        Ok(self.kv.latest(&self.name, key).await?)
    }

    /// Which write it was.
    pub(super) async fn set_on(&self, key: &str, value: Vec<u8>, terms: Terms) -> Result<Dot, StoreError> {
        Ok(self.kv.set_on(&self.name, key, Bytes::from(value), terms).await?.dot)
    }

    /// Which write it was; none if `seen` is not what stands there.
    pub(super) async fn set_if(
        &self,
        key: &str,
        value: Vec<u8>,
        terms: Terms,
        seen: Option<Dot>,
    ) -> Result<Option<Dot>, StoreError> {
        let written = self.kv.set_if(&self.name, key, Bytes::from(value), terms, seen).await?;
        Ok(written.map(|written| written.dot))
    }

    /// Up to `limit` keys that begin with `prefix`, behind `after`.
    pub(super) fn list(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<String>, StoreError> {
        Ok(self.kv.list(&self.name, prefix, after, limit)?)
    }

    /// Sets `key` to `value` if it stands as `seen` at that moment, at the store's home or here; whether it did.
    pub(super) async fn swap(&self, key: &str, seen: Option<&[u8]>, value: Vec<u8>) -> Result<bool, StoreError> {
        Ok(self.kv.swap(&self.name, key, seen, Bytes::from(value)).await?)
    }

    /// Sets one after the other. What was set before a failure stays, as the interface allows.
    pub(super) async fn set_many(&self, pairs: Vec<(String, Vec<u8>)>) -> Result<(), StoreError> {
        check_batch(pairs.len())?;
        for (key, value) in pairs {
            self.set(&key, value).await?;
        }
        Ok(())
    }

    /// Deletes one after the other.
    pub(super) async fn delete_many(&self, keys: Vec<String>) -> Result<(), StoreError> {
        check_batch(keys.len())?;
        for key in keys {
            self.delete(&key).await?;
        }
        Ok(())
    }

    /// Up to [`PAGE_KEYS`] keys behind `after`, and whether there may be more.
    pub(super) fn page(&self, after: Option<&str>) -> Result<(Vec<String>, bool), StoreError> {
        let keys = self.kv.list(&self.name, "", after, PAGE_KEYS)?;
        let more = keys.len() == PAGE_KEYS;
        Ok((keys, more))
    }

    /// All keys.
    pub(super) fn keys(&self) -> Result<Vec<String>, StoreError> {
        let mut all: Vec<String> = Vec::new();
        loop {
            let (keys, more) = self.page(all.last().map(String::as_str))?;
            all.extend(keys);
            if all.len() > KEYS_MAX {
                return Err(StoreError::TooMany(KEYS_MAX));
            }
            if !more {
                return Ok(all);
            }
        }
    }
}

/// Refuses a batch that is too large.
pub(super) fn check_batch(keys: usize) -> Result<(), StoreError> {
    if keys > BATCH_KEYS_MAX { Err(StoreError::TooMany(BATCH_KEYS_MAX)) } else { Ok(()) }
}
