//! Placements: stores that the nodes of some regions hold, and all others ask them for.
//!
//! The nodes of a placement are a fleet of their own: a KV with rows, links and a roster that has nobody else, so every
//! invariant holds for it as for the fleet of all, and no node outside learns a row. Here is which store is where
//! ([`Kv::holding`]); what a node that holds a store answers to one that does not; and what that one does ([`Elsewhere`]).

mod cache;
mod counts;
mod elsewhere;
mod hold;

use std::collections::{BTreeMap, BTreeSet};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock};
use std::time::Duration;

use selvage_config::plan::{PLACEMENTS_MAX, Placement};
use selvage_config::{NodeName, PlacementName, Region, StoreName};
use tokio::sync::watch;
use tokio::time::{Instant, timeout};

use super::{HomeError, Kv, KvError};
use crate::entry::Dot;
use crate::home::wire::{Answer, Call, Outcome};
use crate::roster::PeerAddr;
use crate::session::{TOKEN_ORIGINS_MAX, Token};

pub use self::cache::CACHE_BYTES_MAX;
use self::cache::Cache;
use self::counts::Counters;
pub use self::counts::PlacementCounts;
pub use self::elsewhere::Elsewhere;
pub(super) use self::hold::start;

/// Where placements have their rows, below the directory of all others.
pub(crate) const PLACEMENTS: &str = "placements";

/// How long a node that holds a store waits for what the asker saw, milliseconds.
const SEEN_MS_MAX: u64 = 1_000;

/// For how long a node has its reads wait for its own writes, milliseconds. By then they are everywhere, or what is
/// missing is a node that was cut off with them.
const OWN_MS_MAX: u64 = 10_000;

/// Why a store that is not held here could not be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// None of those that hold it has a link to here, or answered a question that changes nothing.
    #[error("no node of placement {placement}, which holds store {store}, can be reached: nothing was done")]
    Unreachable {
        /// The store.
        store: StoreName,
        /// Where it is held.
        placement: PlacementName,
    },
    /// One was asked, and did not answer in time.
    #[error("no answer of {holder}, which holds store {store}: what was asked for may have been done")]
    Unknown {
        /// The store.
        store: StoreName,
        /// Who was asked.
        holder: NodeName,
    },
    /// Those that shall hold it do not yet: their plans are older, they lack rows, or what every node held is still being
    /// carried over.
    #[error("placement {placement} is not ready for store {store} yet: nothing was done")]
    NotReady {
        /// The store.
        store: StoreName,
        /// Where it shall be held.
        placement: PlacementName,
    },
    /// Who holds it is a program that knows no placements.
    #[error("{holder}, which holds store {store}, runs a version that knows no placements")]
    Older {
        /// The store.
        store: StoreName,
        /// Who was asked.
        holder: NodeName,
    },
    /// Who holds it refuses, as this node might if it did.
    #[error("{holder}, which holds store {store}: {why}")]
    Refused {
        /// The store.
        store: StoreName,
        /// Who was asked.
        holder: NodeName,
        /// Why.
        why: String,
    },
}

/// Where a store is.
#[derive(Clone)]
pub enum Holding {
    /// This node has its rows, in this KV.
    Here(Kv),
    /// It has none, or not yet.
    Elsewhere(Elsewhere),
}

/// A placement, as this node knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PlacementStatus {
    /// Its name.
    pub name: PlacementName,
    /// Its regions.
    pub regions: BTreeSet<Region>,
    /// Its stores, and for how long what is read elsewhere may be kept, milliseconds.
    pub stores: BTreeMap<StoreName, u64>,
    /// The nodes that hold them, without this one.
    pub holders: Vec<NodeName>,
    /// Whether this node holds them.
    pub here: bool,
    /// Those of its stores that wait, here, until what every node held is carried over.
    pub waiting: Vec<StoreName>,
}

/// What a node knows of placements.
#[derive(Default)]
pub(super) struct Placed {
    table: RwLock<Arc<Table>>,
    /// Counts what is to be looked at anew.
    news: watch::Sender<u64>,
    cache: Cache,
    own: Mutex<BTreeMap<PlacementName, Own>>,
    counters: Counters,
    closing: AtomicBool,
}

/// Which store is where: made whole of what a plan says.
#[derive(Default, Clone)]
struct Table {
    placements: Arc<Vec<Placement>>,
    stores: BTreeMap<StoreName, Rule>,
    meshes: Arc<BTreeMap<PlacementName, Kv>>,
}

#[derive(Clone)]
struct Rule {
    placement: PlacementName,
    cache_ms: u64,
    place: RulePlace,
}

#[derive(Clone)]
enum RulePlace {
    /// Held here, and usable once this is set.
    Here(Arc<AtomicBool>),
    /// Held by these; the home of the store is asked first, if it has one.
    At { holders: Arc<Vec<NodeName>>, home: Option<NodeName> },
}

/// Where a store is at the moment.
enum Whereabouts {
    Unplaced,
    Here(Kv),
    Coming(PlacementError),
    At(Rule),
}

/// What this node wrote a short while ago.
struct Own {
    token: Token,
    last: Instant,
}

impl Placed {
    fn table(&self) -> Arc<Table> {
        Arc::clone(&self.table.read().unwrap_or_else(PoisonError::into_inner))
    }

    fn change(&self, change: impl FnOnce(&mut Table)) {
        let mut table = self.table.write().unwrap_or_else(PoisonError::into_inner);
        let mut next = (**table).clone();
        change(&mut next);
        *table = Arc::new(next);
    }

    /// What this node wrote lately: its own readers shall see that.
    fn own(&self, placement: &PlacementName) -> Token {
        let own = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let lately = own.get(placement).filter(|own| own.last.elapsed() < Duration::from_millis(OWN_MS_MAX));
        lately.map(|own| own.token.clone()).unwrap_or_default()
    }

    fn wrote(&self, placement: &PlacementName, dot: &Dot) {
        let mut all = self.own.lock().unwrap_or_else(PoisonError::into_inner);
        let now = Instant::now();
        let own = all.entry(placement.clone()).or_insert_with(|| Own { token: Token::default(), last: now });
        if own.last.elapsed() >= Duration::from_millis(OWN_MS_MAX) {
            own.token = Token::default();
        }
        own.token.saw(dot);
        if own.token.origins() > TOKEN_ORIGINS_MAX {
            own.token = Token::default();
            own.token.saw(dot);
        }
        own.last = now;
    }
}

impl Kv {
    /// Sets which regions hold which stores: what a plan says, after its roster and before its homes.
    pub fn set_placements(&self, mut placements: Vec<Placement>) {
        if placements.len() > PLACEMENTS_MAX {
            tracing::error!(placements = placements.len(), limit = PLACEMENTS_MAX, "placements left out: too many");
            placements.truncate(PLACEMENTS_MAX);
        }
        self.shared.placed.change(|table| table.placements = Arc::new(placements));
        self.place_anew();
    }

    /// Where a store is: this KV, that of a placement, or elsewhere.
    pub fn holding(&self, store: &StoreName) -> Holding {
        match self.whereabouts(store) {
            Whereabouts::Unplaced => Holding::Here(self.clone()),
            Whereabouts::Here(mesh) => Holding::Here(mesh),
            Whereabouts::Coming(_) | Whereabouts::At(_) => Holding::Elsewhere(Elsewhere::new(self, store)),
        }
    }

    /// The placements of the plan.
    pub fn placements(&self) -> Vec<PlacementStatus> {
        let table = self.shared.placed.table();
        let peers = self.peers();
        let status = |placement: &Placement| {
            let of = |(store, rule): (&StoreName, &Rule)| match &rule.place {
                RulePlace::Here(settled) if rule.placement == placement.name && !settled.load(Ordering::Relaxed) => {
                    Some(store.clone())
                }
                _ => None,
            };
            PlacementStatus {
                name: placement.name.clone(),
                regions: placement.regions.clone(),
                stores: placement.stores.clone(),
                holders: holders(placement, &peers).map(|peer| peer.node.clone()).collect(),
                here: placement.regions.contains(&self.shared.region),
                waiting: table.stores.iter().filter_map(of).collect(),
            }
        };
        table.placements.iter().map(status).collect()
    }

    /// The KVs of the placements that this node holds.
    pub fn meshes(&self) -> Arc<BTreeMap<PlacementName, Kv>> {
        Arc::clone(&self.shared.placed.table().meshes)
    }

    /// What was counted of placements since the start.
    pub fn placement_counts(&self) -> PlacementCounts {
        self.shared.placed.counters.now(self.shared.placed.cache.bytes())
    }

    /// Whether the rows of this node are those of the others, here and in the placements that it holds.
    pub fn is_ready(&self) -> bool {
        let held = self.shared.placed.table();
        let open = |placement: &Placement| {
            !placement.regions.contains(&self.shared.region)
                || held.meshes.get(&placement.name).is_some_and(|mesh| mesh.progress().is_ready())
        };
        self.progress().is_ready() && held.placements.iter().all(open)
    }

    pub(super) fn peers(&self) -> Vec<PeerAddr> {
        self.shared.link.as_ref().map(|link| link.peers()).unwrap_or_default()
    }

    /// Whether a store is in a placement.
    pub(super) fn is_placed(&self, store: &StoreName) -> bool {
        self.shared.placed.table().stores.contains_key(store)
    }

    /// Where the rows of a placement lie.
    fn directory_of(&self, placement: &PlacementName) -> PathBuf {
        self.shared.directory.join(PLACEMENTS).join(placement.as_str())
    }

    /// Makes the table anew of what plan and roster say.
    pub(super) fn place_anew(&self) {
        let (peers, homes) = (self.peers(), self.shared.told.planned());
        self.shared.placed.change(|table| {
            let before = std::mem::take(&mut table.stores);
            for placement in table.placements.iter() {
                let here = placement.regions.contains(&self.shared.region);
                let held_by = Arc::new(holders(placement, &peers).map(|peer| peer.node.clone()).collect::<Vec<_>>());
                for (store, cache_ms) in &placement.stores {
                    let home = || homes.iter().find(|home| home.store == *store).map(|home| home.node.clone());
                    let place = match before.get(store) {
                        Some(Rule { placement: same, place: place @ RulePlace::Here(_), .. })
                            if here && *same == placement.name =>
                        {
                            place.clone()
                        }
                        _ if here => RulePlace::Here(Arc::default()),
                        _ => RulePlace::At { holders: Arc::clone(&held_by), home: home() },
                    };
                    let rule = Rule { placement: placement.name.clone(), cache_ms: *cache_ms, place };
                    table.stores.insert(store.clone(), rule);
                }
            }
        });
        self.shared.placed.news.send_modify(|news| *news += 1);
    }

    fn whereabouts(&self, store: &StoreName) -> Whereabouts {
        let table = self.shared.placed.table();
        let Some(rule) = table.stores.get(store) else { return Whereabouts::Unplaced };
        match (&rule.place, table.meshes.get(&rule.placement)) {
            (RulePlace::Here(settled), Some(mesh)) if settled.load(Ordering::Acquire) => {
                Whereabouts::Here(mesh.clone())
            }
            (RulePlace::Here(_), _) => {
                let (store, placement) = (store.clone(), rule.placement.clone());
                Whereabouts::Coming(PlacementError::NotReady { store, placement })
            }
            (RulePlace::At { .. }, _) => Whereabouts::At(rule.clone()),
        }
    }

    /// What this node answers to one that does not hold a store.
    pub(super) async fn answer_call(&self, store: &StoreName, call: Call) -> Option<Answer> {
        // Nothing was done, and the asker goes to another.
        if self.shared.placed.closing.load(Ordering::Acquire) {
            return Some(Answer::NotYet);
        }
        let mesh = match self.whereabouts(store) {
            Whereabouts::Here(mesh) => mesh,
            Whereabouts::Coming(_) => return Some(Answer::NotYet),
            Whereabouts::Unplaced | Whereabouts::At(_) => return Some(Answer::NotHeld),
        };
        if call.only_reads() && !mesh.progress().is_ready() {
            return Some(Answer::NotYet);
        }
        self.shared.placed.counters.answered();
        match mesh.done_here(store, call).await {
            Ok(answer) => Some(answer),
            Err(KvError::Overloaded) => Some(Answer::Overloaded),
            Err(KvError::Home(HomeError::Moving { .. } | HomeError::Unreachable { .. })) => Some(Answer::NotYet),
            // Whether it was done is not known, so nothing is said.
            Err(KvError::Closed | KvError::Home(HomeError::Unknown { .. })) => None,
            Err(error) => Some(Answer::Failed(error.to_string())),
        }
    }

    /// Does here, where the rows are, what was asked for.
    async fn done_here(&self, store: &StoreName, call: Call) -> Result<Answer, KvError> {
        match call {
            Call::Get { key, seen, must } => {
                let is_seen = self.has_seen(seen).await?;
                if must && !is_seen {
                    return Ok(Answer::NotYet);
                }
                Ok(Answer::Done(Outcome::Found(self.get_kept(store, &key)?)))
            }
            Call::Has { key, seen } => {
                self.has_seen(seen).await?;
                Ok(Answer::Has(self.exists(store, &key)?))
            }
            Call::List { prefix, after, limit, seen } => {
                self.has_seen(seen).await?;
                let (kv, store) = (self.clone(), store.clone());
                let limit = usize::try_from(limit).unwrap_or(usize::MAX);
                // It reads many rows; it must not hold up a thread that serves.
                let listed =
                    tokio::task::spawn_blocking(move || kv.list_entries(&store, &prefix, after.as_deref(), limit));
                Ok(Answer::Listed(listed.await.map_err(|_| KvError::Closed)??))
            }
            Call::Do { key, op } => Ok(Answer::Done(self.decide(store, &key, op).await?)),
        }
    }

    /// Waits a while for what a session saw.
    async fn has_seen(&self, seen: Token) -> Result<bool, KvError> {
        if seen.origins() == 0 {
            return Ok(true);
        }
        match timeout(Duration::from_millis(SEEN_MS_MAX), self.wait_for(seen)).await {
            Ok(done) => done.map(|()| true),
            Err(_) => Ok(false),
        }
    }
}

/// Those of the roster that hold a placement.
fn holders<'p>(placement: &'p Placement, peers: &'p [PeerAddr]) -> impl Iterator<Item = &'p PeerAddr> {
    peers.iter().filter(|peer| placement.regions.contains(&peer.region))
}
