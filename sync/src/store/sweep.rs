//! Chunks that nothing names any more.
//!
//! Who replaces a large value deletes its chunks. What that leaves are those of a value that lost to one written at the
//! same time elsewhere, and those of a writer that stopped half way. The node that wrote them looks for them now and
//! then: whatever it wrote itself it would have beside its chunks, if it were still there.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::Duration;

use selvage_config::StoreName;

use super::chunks::{Manifest, own_chunks, upload_of};
use super::write::manifests;
use super::{Kv, KvError, Shared};
use crate::commit::now_ms;
use crate::engine::Engine;
use crate::layout;
use crate::record::Record;
use crate::replica::Write;

/// Time between two looks.
const SWEEP_S: u64 = 3_600;

/// Age of the youngest chunk of a value from which on its writer is not still writing it, milliseconds.
const OLD_MS: u64 = 3_600_000;

/// Rows read at once.
const ROWS: usize = 512;

/// Looks for unused chunks as long as the store is open.
async fn run(shared: Weak<Shared>) {
    let mut turns = tokio::time::interval(Duration::from_secs(SWEEP_S));
    turns.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    loop {
        turns.tick().await;
        let Some(shared) = shared.upgrade() else { return };
        let kv = Kv { shared };
        match kv.sweep(now_ms().saturating_sub(OLD_MS)).await {
            Ok(0) => {}
            Ok(chunks) => tracing::info!(chunks, "chunks deleted that no value names"),
            Err(error) => tracing::warn!(%error, "unused chunks stay until the next look"),
        }
    }
}

impl Kv {
    /// Deletes chunks that this node wrote before `before_ms` and that no value names. Says how many.
    pub(super) async fn sweep(&self, before_ms: u64) -> Result<usize, KvError> {
        // Before all is here, what names them may be missing.
        if !self.progress().caught_up {
            return Ok(0);
        }
        let kv = self.clone();
        let found = tokio::task::spawn_blocking(move || kv.unused(before_ms)).await.map_err(|_| KvError::Closed)??;
        let mut deleted = 0;
        for (store, chunks) in found {
            for chunk in chunks {
                self.write(&store, &chunk, Write::Delete, None).await?;
                deleted += 1;
            }
        }
        Ok(deleted)
    }

    fn unused(&self, before_ms: u64) -> Result<Vec<(StoreName, Vec<String>)>, KvError> {
        let mut all = Vec::new();
        let mut from = layout::RECORDS.to_vec();
        while let Some(row) = self.shared.vault.scan(layout::RECORDS, &from, 1).map_err(KvError::Engine)?.first() {
            let Some(prefix) = layout::class_of(&row.key) else { break };
            if let Some(key) = layout::key(prefix) {
                let chunks = self.unused_in(&key.store, before_ms)?;
                all.extend((!chunks.is_empty()).then_some((key.store, chunks)));
            }
            // The prefix ends with a zero byte, and no row begins with this.
            from = [&prefix[..prefix.len() - 1], &[1]].concat();
        }
        Ok(all)
    }

    fn unused_in(&self, store: &StoreName, before_ms: u64) -> Result<Vec<String>, KvError> {
        let base = layout::records(store);
        let mut uploads: BTreeMap<u64, (u64, Vec<String>)> = BTreeMap::new();
        let chunks = [&base, own_chunks(&self.shared.node).as_bytes()].concat();
        self.each(&chunks, &chunks, |name, record| {
            let (Some(upload), Some(record)) = (upload_of(name), record) else { return true };
            let newest = record.newest().map_or(0, |entry| entry.version.stamp.ms());
            let known = uploads.entry(upload).or_default();
            known.0 = known.0.max(newest);
            known.1.extend(record.exists(now_ms()).then(|| name.to_owned()));
            true
        })?;
        uploads.retain(|_, (newest, chunks)| *newest < before_ms && !chunks.is_empty());
        if uploads.is_empty() {
            return Ok(Vec::new());
        }
        let mut used = BTreeSet::new();
        let whole = self.each(&base, &base, |_, record| {
            let named = record.map(|record| manifests(record, 0)).unwrap_or_default();
            let own = named.iter().filter(|manifest| manifest.is_of(&self.shared.node));
            used.extend(own.map(Manifest::upload));
            record.is_some()
        })?;
        // A record that can't be read may name any of them.
        Ok(if whole {
            uploads
                .into_iter()
                .filter(|(upload, _)| !used.contains(upload))
                .flat_map(|(_, (_, chunks))| chunks)
                .collect()
        } else {
            Vec::new()
        })
    }

    /// Shows `take` every record whose row begins with `prefix`, none for one that can't be read, until it has enough.
    /// Says whether it took all.
    fn each(
        &self,
        prefix: &[u8],
        from: &[u8],
        mut take: impl FnMut(&str, Option<&Record>) -> bool,
    ) -> Result<bool, KvError> {
        let mut from = from.to_vec();
        loop {
            let rows = self.shared.vault.scan(prefix, &from, ROWS).map_err(KvError::Engine)?;
            for row in &rows {
                let name = layout::key(&row.key).map(|key| key.name).unwrap_or_default();
                let record = row.value.clone().ok().and_then(|value| Record::decode(value).ok());
                if !take(&name, record.as_ref()) {
                    return Ok(false);
                }
            }
            let Some(last) = rows.last().filter(|_| rows.len() == ROWS) else { return Ok(true) };
            from = [&last.key, &[0][..]].concat();
        }
    }
}

/// Starts looking.
pub(super) fn start(shared: &Arc<Shared>) -> tokio::task::JoinHandle<()> {
    tokio::spawn(run(Arc::downgrade(shared)))
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::store::Options;
    use selvage_config::node::{Kv as Kept, KvEngine};

    const LARGE_BYTES: usize = 1_200_000;

    async fn open(directory: &std::path::Path) -> Kv {
        let options = Options::alone(
            "a".parse().unwrap(),
            "fra".parse().unwrap(),
            directory.to_owned(),
            Kept { engine: KvEngine::Memory, ..Kept::default() },
        );
        Kv::open(options, Arc::new(|_| None)).await.unwrap()
    }

    fn chunks(kv: &Kv, store: &StoreName) -> Vec<Option<u64>> {
        let mut ends = Vec::new();
        let prefix = [&layout::records(store), own_chunks(&kv.shared.node).as_bytes()].concat();
        kv.each(&prefix, &prefix, |_, record| {
            let record = record.unwrap();
            ends.extend(record.exists(now_ms()).then(|| record.newest().unwrap().expires_ms));
            true
        })
        .unwrap();
        ends
    }

    #[tokio::test]
    async fn chunks_that_nothing_names_go_and_those_of_a_value_stay() {
        let directory = tempfile::tempdir().unwrap();
        let (kv, store) = (open(directory.path()).await, "app/default".parse().unwrap());
        kv.set(&store, "stays", vec![1; LARGE_BYTES].into()).await.unwrap();
        kv.set(&store, "loses", vec![2; LARGE_BYTES].into()).await.unwrap();
        // A write of a peer leaves the chunks of what it supersedes.
        let newer = Write::Set { value: bytes::Bytes::from_static(b"small"), expires_ms: None };
        kv.write(&store, "loses", newer, None).await.unwrap();
        assert_eq!(chunks(&kv, &store).len(), 6);
        assert_eq!(kv.sweep(0).await.unwrap(), 0, "they may be of a value that is being written");
        let patience = Instant::now() + Duration::from_secs(60);
        while kv.sweep(now_ms() + 10_000).await.unwrap() == 0 {
            assert!(Instant::now() < patience, "it is never caught up");
            tokio::task::yield_now().await;
        }
        assert_eq!(chunks(&kv, &store).len(), 3);
        assert_eq!(kv.sweep(now_ms() + 10_000).await.unwrap(), 0);
        assert_eq!(kv.get(&store, "stays").unwrap().unwrap(), vec![1; LARGE_BYTES]);
        kv.set(&store, "stays", bytes::Bytes::new()).await.unwrap();
        assert!(chunks(&kv, &store).is_empty());
        kv.close().await;
    }

    #[tokio::test]
    async fn the_chunks_of_a_value_end_when_it_does() {
        let directory = tempfile::tempdir().unwrap();
        let (kv, store) = (open(directory.path()).await, "app/default".parse().unwrap());
        let end = now_ms() + 3_600_000;
        kv.set_until(&store, "k", vec![1; LARGE_BYTES].into(), Some(end)).await.unwrap();
        assert_eq!(chunks(&kv, &store), [Some(end); 3]);
        assert_eq!(kv.get(&store, "k").unwrap().unwrap().len(), LARGE_BYTES);
        kv.set_until(&store, "k", vec![1; LARGE_BYTES].into(), Some(now_ms())).await.unwrap();
        assert_eq!(kv.get(&store, "k").unwrap(), None);
        assert!(chunks(&kv, &store).is_empty());
        kv.close().await;
    }
}
