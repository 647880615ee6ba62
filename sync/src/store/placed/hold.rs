//! Holding placements: their KVs are opened when a plan gives this node one, and closed when it takes it away; and keys that
//! every node held before their store was placed are carried over.
//!
//! Carrying over: until no key of the store is left in the KV of all nodes, as far as a node of the placement sees it, that
//! node answers nothing for the store. So no two places take its writes, and nobody reads half of it. One node carries, the
//! first of the placement by name: it sets each key in the placement, durable there, and then deletes it where it was. What a
//! node with an older plan writes there later is carried over as well, unless it is older than what is in the placement.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use bytes::Bytes;
use selvage_config::plan::Placement;
use selvage_config::{PlacementName, StoreName};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::{Instant, MissedTickBehavior};

use super::{Kv, Placed, RulePlace, Table, holders};
use crate::commit::Seen;
use crate::entry::Content;
use crate::replica::Write;
use crate::store::{Base, KvError, LIST_MAX, Shared, Through};

/// Time between two looks, milliseconds.
const LOOK_MS: u64 = 250;

/// Time until a placement that did not open is tried again, milliseconds.
const AGAIN_MS: u64 = 5_000;

/// How long after a store was placed its keys are left where they are, milliseconds: other nodes take in the plan
/// meanwhile, and write there no more.
const CARRY_AFTER_MS: u64 = 2_000;

/// Keys that are carried over at once.
const CARRIED_MAX: usize = 64;

/// The part of the engine's cache that a placement's engine has.
const CACHE_PART: u32 = 4;

/// What is known between two looks.
#[derive(Default)]
struct Looks {
    /// The news that were taken in.
    news: Option<u64>,
    /// When each placement that did not open was tried.
    tried: BTreeMap<PlacementName, Instant>,
    /// Since when each store is here, and up to where the changes of the KV of all nodes were looked at.
    stores: BTreeMap<StoreName, (Instant, u64)>,
}

/// Looks after placements as long as the KV of all nodes is open.
pub(in crate::store) fn start(shared: &Arc<Shared>) -> JoinHandle<()> {
    let mut news = shared.placed.news.subscribe();
    let shared = Arc::downgrade(shared);
    tokio::spawn(async move {
        let mut looks = Looks::default();
        let mut turns = tokio::time::interval(Duration::from_millis(LOOK_MS));
        turns.set_missed_tick_behavior(MissedTickBehavior::Delay);
        loop {
            // Both wait for one thing and lose nothing if dropped.
            tokio::select! {
                changed = news.changed() => if changed.is_err() { return },
                _ = turns.tick() => {}
            }
            let Some(shared) = shared.upgrade() else { return };
            if shared.placed.closing.load(Ordering::Acquire) {
                return;
            }
            let kv = Kv { shared };
            looks.look(&kv).await;
        }
    })
}

impl Looks {
    async fn look(&mut self, kv: &Kv) {
        let placed = &kv.shared.placed;
        let (news, table) = (*placed.news.borrow(), placed.table());
        let wanted: Vec<&Placement> =
            table.placements.iter().filter(|placement| placement.regions.contains(&kv.shared.region)).collect();
        let names: BTreeSet<&PlacementName> = wanted.iter().map(|placement| &placement.name).collect();
        for (name, mesh) in table.meshes.iter().filter(|(name, _)| !names.contains(name)) {
            placed.change(|table| Arc::make_mut(&mut table.meshes).retain(|held, _| held != name));
            kv.leave(name, mesh).await;
        }
        let mut is_new = self.news != Some(news);
        for placement in wanted {
            let name = &placement.name;
            let is_due = |tried: &Instant| tried.elapsed() >= Duration::from_millis(AGAIN_MS);
            if !table.meshes.contains_key(name) && self.tried.get(name).is_none_or(is_due) {
                self.tried.insert(name.clone(), Instant::now());
                is_new |= kv.hold(name).await;
            }
        }
        if is_new {
            kv.introduce();
            self.news = Some(news);
        }
        self.carry_over(kv, &placed.table()).await;
    }

    /// Makes stores usable here whose keys are all where they shall be, and carries over what is not.
    async fn carry_over(&mut self, kv: &Kv, table: &Table) {
        self.stores.retain(|store, _| table.stores.contains_key(store));
        for (store, rule) in &table.stores {
            let (RulePlace::Here(settled), Some(mesh)) = (&rule.place, table.meshes.get(&rule.placement)) else {
                self.stores.remove(store);
                continue;
            };
            // Changes from here on are looked at, and what was there before is listed.
            let (since, cursor) = *self.stores.entry(store.clone()).or_insert_with(|| (Instant::now(), kv.cursor()));
            let looked = if settled.load(Ordering::Acquire) {
                kv.changed_behind(store, cursor).await
            } else if kv.progress().caught_up {
                Ok((kv.has_keys(store).await, cursor))
            } else {
                continue;
            };
            match looked {
                Ok((Ok(false), cursor)) => {
                    settled.store(true, Ordering::Release);
                    self.stores.insert(store.clone(), (since, cursor));
                }
                Ok((Ok(true), _)) if kv.carries(table, &rule.placement) => {
                    if since.elapsed() >= Duration::from_millis(CARRY_AFTER_MS)
                        && let Err(error) = kv.carry_keys(store, mesh).await
                    {
                        tracing::warn!(%store, %error, "keys wait to be carried over into the store's placement");
                    }
                }
                // Another node carries them over.
                Ok((Ok(true), _)) => {}
                Ok((Err(error), _)) | Err(error) => {
                    tracing::warn!(%store, %error, "what every node held of a store is not known yet");
                }
            }
        }
    }
}

impl Placed {
    /// Has the look that is under way, if any, be the last one that opens anything.
    fn close(&self) {
        self.closing.store(true, Ordering::Release);
    }
}

impl Kv {
    /// Opens a placement; whether it did.
    async fn hold(&self, name: &PlacementName) -> bool {
        let shared = &self.shared;
        let mut kept = shared.kept.clone();
        kept.cache_mib = (kept.cache_mib / CACHE_PART).max(1);
        let base = Base {
            node: shared.node.clone(),
            region: shared.region.clone(),
            directory: self.directory_of(name),
            trust: Arc::clone(&shared.trust),
            kept,
        };
        let through = match &shared.link {
            Some(link) => Through::Door(Arc::clone(link.door()), name.clone()),
            None => Through::Nobody,
        };
        match Self::begin(base, through).await {
            Ok(mesh) => {
                tracing::info!(placement = %name, "this node holds a placement");
                let closed = mesh.clone();
                // Whoever closes all that is open comes before this, and finds it, or after it.
                let mut is_late = false;
                shared.placed.change(|table| {
                    is_late = shared.placed.closing.load(Ordering::Acquire);
                    Arc::make_mut(&mut table.meshes).insert(name.clone(), mesh);
                });
                if is_late {
                    closed.close().await;
                }
                true
            }
            Err(error) => {
                let source = std::error::Error::source(&error).map(ToString::to_string);
                tracing::error!(placement = %name, %error, source, "a placement does not open: its stores can't be used here");
                false
            }
        }
    }

    /// Tells the KVs of placements who their peers are, and which homes their stores have.
    fn introduce(&self) {
        let (table, peers, homes) = (self.shared.placed.table(), self.peers(), self.shared.told.planned());
        for placement in table.placements.iter() {
            let Some(mesh) = table.meshes.get(&placement.name) else { continue };
            mesh.set_peers(holders(placement, &peers).cloned().collect());
            let homes = homes.iter().filter(|home| placement.stores.contains_key(&home.store));
            mesh.set_homes(homes.cloned().collect());
        }
    }

    /// Closes a placement that this node holds no more. Its rows stay on the disk: what nobody else has is only there.
    async fn leave(&self, name: &PlacementName, mesh: &Self) {
        let behind = mesh.status().iter().filter(|peer| peer.connected).filter_map(|peer| peer.lag).min();
        let directory = self.directory_of(name);
        let directory = directory.display();
        match behind {
            Some(0) => {
                tracing::info!(placement = %name, %directory, "a placement is held here no more: remove its rows")
            }
            writes => tracing::error!(
                placement = %name, %directory, ?writes,
                "a placement is held here no more, and its last writes may be on no other node: have this node hold it \
                 again until they are"
            ),
        }
        mesh.close().await;
    }

    /// Closes the KVs of all placements.
    pub(in crate::store) async fn close_placements(&self) {
        self.shared.placed.close();
        for mesh in self.meshes().values() {
            Box::pin(mesh.close()).await;
        }
    }

    /// Whether this is the node of a placement that carries keys over: the first by name, whoever can be reached.
    fn carries(&self, table: &Table, name: &PlacementName) -> bool {
        let peers = self.peers();
        let placement = table.placements.iter().find(|placement| placement.name == *name);
        placement.is_some_and(|placement| holders(placement, &peers).all(|peer| self.shared.node < peer.node))
    }

    async fn has_keys(&self, store: &StoreName) -> Result<bool, KvError> {
        Ok(!self.some_keys(store, None, 1).await?.is_empty())
    }

    /// Whether any node wrote the store where all nodes held it, since `cursor`, and up to where that is known.
    async fn changed_behind(&self, store: &StoreName, cursor: u64) -> Result<(Result<bool, KvError>, u64), KvError> {
        let watched = self.watch(store, "", cursor, Duration::ZERO).await?;
        let may = watched.missed || watched.changes.iter().any(|change| change.exists);
        Ok((if may { self.has_keys(store).await } else { Ok(false) }, watched.cursor))
    }

    async fn some_keys(&self, store: &StoreName, after: Option<String>, limit: usize) -> Result<Vec<String>, KvError> {
        let (kv, store) = (self.clone(), store.clone());
        let listed = tokio::task::spawn_blocking(move || kv.list(&store, "", after.as_deref(), limit));
        listed.await.map_err(|_| KvError::Closed)?
    }

    /// Carries keys over into a placement: as many as one listing has.
    async fn carry_keys(&self, store: &StoreName, mesh: &Self) -> Result<(), KvError> {
        let keys = self.some_keys(store, None, LIST_MAX).await?;
        for keys in keys.chunks(CARRIED_MAX) {
            let mut carried = JoinSet::new();
            for key in keys {
                let (kv, mesh, store, key) = (self.clone(), mesh.clone(), store.clone(), key.clone());
                carried.spawn(async move { kv.carry_key(&store, &key, &mesh).await });
            }
            while let Some(done) = carried.join_next().await {
                done.map_err(|_| KvError::Closed)??;
                self.shared.placed.counters.carried();
            }
        }
        Ok(())
    }

    /// Sets a key in the placement as it is here, and then deletes it here.
    async fn carry_key(&self, store: &StoreName, key: &str, mesh: &Self) -> Result<(), KvError> {
        let (old, new) = (self.record(store, key)?, mesh.record(store, key)?);
        let (Some(newest), Some(kept)) = (old.newest(), self.get_kept(store, key)?) else { return Ok(()) };
        let is_newer = new.newest().is_none_or(|there| there.version.stamp < newest.version.stamp);
        let counts = old.entries().any(|entry| matches!(entry.content, Content::Part { .. }));
        let exists = new.newest().is_some();
        match <[u8; 8]>::try_from(&*kept.value) {
            // What was counted here since the rest was carried over.
            Ok(count) if counts && exists => {
                mesh.increment(store, key, i64::from_le_bytes(count)).await?;
            }
            _ if is_newer => drop(mesh.set_on(store, key, kept.value, kept.terms).await?),
            _ => {}
        }
        let seen = Some(Seen::Version(Some(newest.version.dot.clone())));
        match self.replace(store, key, Write::Delete, Bytes::new(), seen).await {
            // It is looked at again.
            Ok(_) | Err(KvError::Changed { .. }) => Ok(()),
            Err(error) => Err(error),
        }
    }
}
