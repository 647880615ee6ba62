//! The stores that a component was granted, for all the interfaces through which guests reach them.

use bytes::Bytes;
use selvage_backend::{Kept, Store as Place, StoreError as PlaceError};
use selvage_config::{StoreLabel, StoreName};
use selvage_sync::store::Terms;
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
    place: Place,
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
    /// The store refuses: the key or value breaks a bound, the disk fails, or its backend is away.
    #[error(transparent)]
    Place(PlaceError),
}

impl From<PlaceError> for StoreError {
    fn from(error: PlaceError) -> Self {
        match error {
            PlaceError::Version => Self::Version,
            error => Self::Place(error),
        }
    }
}

impl Store {
    /// The store of `label`, if it was granted.
    pub(super) fn open(grants: &Grants, label: &str) -> Result<Self, StoreError> {
        let label = label.parse::<StoreLabel>().map_err(|_| StoreError::NoSuchStore)?;
        if !grants.stores.contains(&label) {
            return Err(StoreError::AccessDenied);
        }
        Ok(Self { place: grants.kv.store(StoreName::of(&grants.app, &label)) })
    }

    pub(super) async fn get(&self, key: &str) -> Result<Option<Vec<u8>>, StoreError> {
        Ok(self.place.get(key).await?.map(Into::into))
    }

    /// The values of keys, in their order.
    pub(super) async fn get_many(&self, keys: &[String]) -> Result<Vec<Option<Vec<u8>>>, StoreError> {
        check_batch(keys.len())?;
        let values = self.place.get_many(keys).await?;
        Ok(values.into_iter().map(|value| value.map(Into::into)).collect())
    }

    pub(super) async fn set(&self, key: &str, value: Vec<u8>) -> Result<(), StoreError> {
        Ok(self.place.set(key, Bytes::from(value)).await?)
    }

    pub(super) async fn delete(&self, key: &str) -> Result<(), StoreError> {
        Ok(self.place.delete(key).await?)
    }

    pub(super) async fn exists(&self, key: &str) -> Result<bool, StoreError> {
        Ok(self.place.exists(key).await?)
    }

    pub(super) async fn increment(&self, key: &str, delta: i64) -> Result<i64, StoreError> {
        self.increment_until(key, delta, None).await
    }

    pub(super) async fn increment_until(
        &self,
        key: &str,
        delta: i64,
        expires_ms: Option<u64>,
    ) -> Result<i64, StoreError> {
        Ok(self.place.increment(key, delta, expires_ms).await?)
    }

    /// The value as the store's home has it, or this node where there is none: what a condition is to be made of.
    pub(super) async fn latest(&self, key: &str) -> Result<Option<Kept>, StoreError> {
        Ok(self.place.latest(key).await?)
    }

    /// Which write it was.
    pub(super) async fn set_on(&self, key: &str, value: Vec<u8>, terms: Terms) -> Result<String, StoreError> {
        Ok(self.place.set_on(key, Bytes::from(value), terms).await?)
    }

    /// Which write it was; none if `seen` is not what stands there.
    pub(super) async fn set_if(
        &self,
        key: &str,
        value: Vec<u8>,
        terms: Terms,
        seen: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        Ok(self.place.set_if(key, Bytes::from(value), terms, seen).await?)
    }

    /// Up to `limit` keys that begin with `prefix`, behind `after`.
    pub(super) async fn list(
        &self,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, StoreError> {
        Ok(self.place.list(prefix, after, limit).await?)
    }

    /// Sets `key` to `value` if it stands as `seen` at that moment, at the store's home or here; whether it did.
    pub(super) async fn swap(&self, key: &str, seen: Option<&[u8]>, value: Vec<u8>) -> Result<bool, StoreError> {
        Ok(self.place.swap(key, seen, Bytes::from(value)).await?)
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
    pub(super) async fn page(&self, after: Option<&str>) -> Result<(Vec<String>, bool), StoreError> {
        let keys = self.list("", after, PAGE_KEYS).await?;
        let more = keys.len() == PAGE_KEYS;
        Ok((keys, more))
    }

    /// All keys.
    pub(super) async fn keys(&self) -> Result<Vec<String>, StoreError> {
        let mut all: Vec<String> = Vec::new();
        loop {
            let (keys, more) = self.page(all.last().map(String::as_str)).await?;
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
fn check_batch(keys: usize) -> Result<(), StoreError> {
    if keys > BATCH_KEYS_MAX { Err(StoreError::TooMany(BATCH_KEYS_MAX)) } else { Ok(()) }
}
