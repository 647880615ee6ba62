//! Writing: what a node's guests and operators set, delete and count.

use std::sync::Arc;

use bytes::Bytes;
use selvage_config::StoreName;
use tokio::sync::oneshot;

use super::chunks::{self, LARGE_BYTES_MAX, Manifest};
use super::home::sum;
use super::{Kv, KvError, Terms, WRITE_OVERHEAD_BYTES, check, is_shown, terms};
use crate::commit::{Input, Seen, now_ms};
use crate::entry::{Content, KEY_BYTES_MAX, Key, VALUE_BYTES_MAX};
use crate::home::wire::{Op, Outcome};
use crate::record::Record;
use crate::replica::{Write, Written};

impl Kv {
    /// Sets a key. It is durable when this returns, here or at the store's home, and on its way to the peers.
    pub async fn set(&self, store: &StoreName, key: &str, value: Bytes) -> Result<(), KvError> {
        self.set_until(store, key, value, None).await.map(|_| ())
    }

    /// Sets a key that ends to exist at an instant, milliseconds since the Unix epoch, the same on every node.
    pub async fn set_until(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        expires_ms: Option<u64>,
    ) -> Result<Written, KvError> {
        self.set_on(store, key, value, Terms { expires_ms, metadata: Bytes::new() }).await
    }

    /// Sets a key beside the values that other nodes set at the same time: [`Kv::siblings`] shows all of them, until
    /// somebody who had them all writes beside them again, sets or deletes.
    pub async fn set_beside(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        expires_ms: Option<u64>,
    ) -> Result<Written, KvError> {
        self.replace(store, key, Write::Beside { value, expires_ms }, Bytes::new(), None).await
    }

    /// Sets a key if its value is `seen` at that moment; whether it was. Between the comparison and the write nothing
    /// comes, neither a local write nor one of a peer. Of a store that has a home all nodes' writes are compared and made
    /// there, one after the other: it is a lock between nodes. Of one that has none, what is on its way from a peer is
    /// not seen: in the order of stamps it may come before this, and is then lost, as by any later `set`.
    pub async fn swap(&self, store: &StoreName, key: &str, seen: Option<&[u8]>, value: Bytes) -> Result<bool, KvError> {
        let outcome = self.decide(store, key, Op::Swap { value, seen: seen.map(sum) }).await?;
        Ok(matches!(outcome, Outcome::Written(_)))
    }

    /// Deletes a key, whether it exists or not. It is durable when this returns.
    pub async fn delete(&self, store: &StoreName, key: &str) -> Result<(), KvError> {
        self.written(store, key, Op::Delete).await.map(|_| ())
    }

    /// Adds `delta` to a counter, returns its value: as the store's home knows it, or as this node does where there is
    /// none. Increments on several nodes at once all count. A key that does not exist counts from zero, a value of 8
    /// bytes from that little-endian number.
    pub async fn increment(&self, store: &StoreName, key: &str, delta: i64) -> Result<i64, KvError> {
        self.increment_until(store, key, delta, None).await.map(|(counted, _)| counted)
    }

    /// As [`Kv::increment`]; this node's share ends to exist at an instant, unless it has one that ends at another.
    pub async fn increment_until(
        &self,
        store: &StoreName,
        key: &str,
        delta: i64,
        expires_ms: Option<u64>,
    ) -> Result<(i64, Written), KvError> {
        let written = self.written(store, key, Op::Increment { delta, expires_ms }).await?;
        // The replica tells an increment's value; a home that does not is none.
        let counted = written.counted.ok_or_else(|| KvError::NotCounter { key: key.to_owned() })?;
        Ok((counted, written))
    }

    /// Makes a write that replaces what stands there, and then deletes the chunks of what no longer does.
    pub(super) async fn replace(
        &self,
        store: &StoreName,
        key: &str,
        write: Write,
        metadata: Bytes,
        seen: Option<Seen>,
    ) -> Result<Written, KvError> {
        is_shown(key)?;
        check("key", key.len(), KEY_BYTES_MAX)?;
        let mut unused = self.manifests(store, key).unwrap_or_default();
        let write = match write {
            Write::Set { value, expires_ms } => {
                let placed = self.placed(store, value, metadata.len(), expires_ms, &mut unused).await?;
                Write::Set { value: terms::put(&metadata, placed), expires_ms }
            }
            Write::Beside { value, expires_ms } => {
                Write::Beside { value: self.placed(store, value, 0, expires_ms, &mut unused).await?, expires_ms }
            }
            write @ (Write::Delete | Write::Increment { .. }) => write,
        };
        let done = self.write(store, key, write, seen).await;
        if !unused.is_empty()
            && let Ok(used) = self.manifests(store, key)
        {
            unused.retain(|manifest| !used.contains(manifest));
            for manifest in unused {
                self.remove_chunks(store, &manifest).await;
            }
        }
        done
    }

    /// What the record shall have for a value with so many bytes of metadata: itself, or what names its chunks, which
    /// then are written.
    async fn placed(
        &self,
        store: &StoreName,
        value: Bytes,
        metadata: usize,
        expires_ms: Option<u64>,
        made: &mut Vec<Manifest>,
    ) -> Result<Bytes, KvError> {
        check("value", value.len(), LARGE_BYTES_MAX)?;
        self.has_room(store, value.len() + metadata)?;
        let fits = metadata == 0 || value.len() + metadata + terms::MARK_BYTES <= VALUE_BYTES_MAX;
        if fits && !chunks::must_be_chunked(&value) {
            return Ok(value);
        }
        let manifest = self.put_chunks(store, value, expires_ms).await?;
        let value = manifest.encode();
        made.push(manifest);
        Ok(value)
    }

    /// What names chunks at this key. What has expired names some too, but they have expired with it.
    fn manifests(&self, store: &StoreName, key: &str) -> Result<Vec<Manifest>, KvError> {
        self.record(store, key).map(|record| manifests(&record, now_ms()))
    }

    /// Quotas bind this node's own writes. What peers send is always taken: nodes must end with the same.
    pub(super) fn has_room(&self, store: &StoreName, bytes: usize) -> Result<(), KvError> {
        let within = |what: &dyn Fn() -> String, used: u64, max: u64| {
            let fits = used.saturating_add(bytes as u64) <= max;
            if fits { Ok(()) } else { Err(KvError::Quota { what: what(), bytes: used, max }) }
        };
        let used = self.usage(store).bytes;
        within(&|| format!("store {store}"), used, self.shared.kept.store_bytes_max(store))?;
        within(&|| "the node's kv".to_owned(), self.shared.vault.record_bytes(), self.shared.kept.total_bytes_max())
    }

    /// `seen`: the write is made only if this stands there.
    pub(super) async fn write(
        &self,
        store: &StoreName,
        key: &str,
        write: Write,
        seen: Option<Seen>,
    ) -> Result<Written, KvError> {
        check("key", key.len(), KEY_BYTES_MAX)?;
        let bytes = match &write {
            Write::Set { value, .. } | Write::Beside { value, .. } => value.len(),
            Write::Delete | Write::Increment { .. } => 0,
        };
        let room = WRITE_OVERHEAD_BYTES.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        let room = Arc::clone(&self.shared.room).try_acquire_many_owned(room).map_err(|_| KvError::Overloaded)?;
        let key = Key { store: store.clone(), name: key.to_owned() };
        let (reply, done) = oneshot::channel();
        let input = Input::Write { key, write, seen, reply, _room: room };
        self.shared.inputs.send(input).await.map_err(|_| KvError::Closed)?;
        done.await.map_err(|_| KvError::Closed)?
    }
}

/// What names chunks in a record.
pub(super) fn manifests(record: &Record, now_ms: u64) -> Vec<Manifest> {
    let living = record.entries().filter(|entry| !entry.expired(now_ms));
    let values = living.filter_map(|entry| match &entry.content {
        Content::Value(value) | Content::Sibling { value, .. } => Manifest::of(value),
        Content::Tombstone | Content::Part { .. } => None,
    });
    values.collect()
}
