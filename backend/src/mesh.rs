//! The mesh as a node's stores reach it, while one process of the node takes over from another.
//!
//! The files of the KV can be one process's only. So each process has a [`Mesh`] from its start, which knows where the KV
//! is: not here yet, here, or with the process that came after this one. Calls wait for the first, and are carried to the
//! last over the socket by which it took over (`carry`): a guest that goes on in the old process has its KV to its end.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use selvage_config::StoreName;
use selvage_config::plan::{Home, Placement};
use selvage_sync::{Elsewhere, Holding, Kv, PeerAddr};
use tokio::sync::watch;
use tokio::time::timeout;

use crate::carry::Carrier;
use crate::error::{Moving, StoreError};

/// How long a call waits for a KV that is on its way. Opening it takes as long as its engine does, a second at most for
/// gigabytes; whoever it is who asks has a deadline of its own, too.
const COMING_MAX: Duration = Duration::from_secs(10);

/// The node's own replicated KV, wherever it is now. Clones are the same one.
#[derive(Clone)]
pub struct Mesh(Arc<Inner>);

struct Inner {
    place: watch::Sender<Place>,
    /// What a plan said of it, for when it comes.
    told: Mutex<Told>,
}

#[derive(Default)]
struct Told {
    peers: Option<Vec<PeerAddr>>,
    placements: Option<Vec<Placement>>,
    homes: Option<Vec<Home>>,
}

/// Where it is.
#[derive(Clone)]
enum Place {
    /// On its way: to this process from the one before, or from this one to the next.
    Coming,
    /// Here.
    Here(Kv),
    /// With the process that took over.
    Carried(Carrier),
}

/// Where a call goes.
pub(crate) enum Reached {
    /// To this KV: the node's own, or that of the store's placement.
    Here(Kv),
    /// To a node that holds the store's placement.
    Elsewhere(Elsewhere),
    Carried(Carrier),
}

impl From<Kv> for Mesh {
    fn from(kv: Kv) -> Self {
        Self::of(Place::Here(kv))
    }
}

impl Mesh {
    /// One whose KV is not here yet.
    pub fn coming() -> Self {
        Self::of(Place::Coming)
    }

    fn of(place: Place) -> Self {
        Self(Arc::new(Inner { place: watch::Sender::new(place), told: Mutex::default() }))
    }

    /// The KV has come. What plans said of it meanwhile, it hears now.
    pub fn arrive(&self, kv: Kv) {
        let told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(peers) = &told.peers {
            kv.set_peers(peers.clone());
        }
        if let Some(placements) = &told.placements {
            kv.set_placements(placements.clone());
        }
        if let Some(homes) = &told.homes {
            kv.set_homes(homes.clone());
        }
        self.0.place.send_replace(Place::Here(kv));
    }

    /// Takes the KV away: what calls from now on waits for [`Mesh::carry`]. None if it was not here. Calls that have begun
    /// still have it.
    pub fn leave(&self) -> Option<Kv> {
        match self.0.place.send_replace(Place::Coming) {
            Place::Here(kv) => Some(kv),
            Place::Coming | Place::Carried(_) => None,
        }
    }

    /// From now on calls are carried.
    pub fn carry(&self, carrier: Carrier) {
        self.0.place.send_replace(Place::Carried(carrier));
    }

    /// The KV, if it is here.
    pub fn kv(&self) -> Option<Kv> {
        match &*self.0.place.borrow() {
            Place::Here(kv) => Some(kv.clone()),
            Place::Coming | Place::Carried(_) => None,
        }
    }

    /// As [`Kv::set_peers`], now or as soon as it is here.
    pub fn set_peers(&self, peers: Vec<PeerAddr>) {
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kv) = self.kv() {
            kv.set_peers(peers.clone());
        }
        told.peers = Some(peers);
    }

    /// As [`Kv::set_placements`], now or as soon as it is here.
    pub fn set_placements(&self, placements: Vec<Placement>) {
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kv) = self.kv() {
            kv.set_placements(placements.clone());
        }
        told.placements = Some(placements);
    }

    /// As [`Kv::set_homes`], now or as soon as it is here.
    pub fn set_homes(&self, homes: Vec<Home>) {
        let mut told = self.0.told.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(kv) = self.kv() {
            kv.set_homes(homes.clone());
        }
        told.homes = Some(homes);
    }

    /// How other nodes are asked for a store, if this one does not hold it.
    pub fn held_elsewhere(&self, store: &StoreName) -> Option<Elsewhere> {
        match self.kv()?.holding(store) {
            Holding::Elsewhere(elsewhere) => Some(elsewhere),
            Holding::Here(_) => None,
        }
    }

    /// Where a call of a store goes, as soon as that is known.
    pub(crate) async fn reach(&self, store: &StoreName) -> Result<Reached, StoreError> {
        if let Some(reached) = reached(&self.0.place.borrow(), store) {
            return Ok(reached);
        }
        let mut place = self.0.place.subscribe();
        let known = timeout(COMING_MAX, place.wait_for(|place| !matches!(place, Place::Coming))).await;
        let known = known.ok().and_then(Result::ok).and_then(|place| reached(&place, store));
        known.ok_or(StoreError::Moving(Moving::NotYet))
    }
}

fn reached(place: &Place, store: &StoreName) -> Option<Reached> {
    match place {
        Place::Coming => None,
        Place::Here(kv) => Some(match kv.holding(store) {
            Holding::Here(kv) => Reached::Here(kv),
            Holding::Elsewhere(elsewhere) => Reached::Elsewhere(elsewhere),
        }),
        Place::Carried(carrier) => Some(Reached::Carried(carrier.clone())),
    }
}
