//! Homes: which node decides the writes of a store, so that compare-and-set and counters are linearizable.
//!
//! The plan names a store's home, with a term that grows with each home. A node keeps the newest it was told on disk
//! before anything else follows from it, and it alone bars a node: whoever was told a newer term never decides for an
//! older one again. The home of a new term decides only once whoever decided last has said that it was told, and all
//! that it had then is here ([`claim`]). So no two nodes ever decide for one store at the same time, whichever plans
//! they have, and who begins knows all that was acknowledged.
//!
//! [`Homes`] is a state machine without sockets or clock. The committer asks it before each write, since between its
//! answer and the write nothing may come.

mod claim;
mod row;
pub(crate) mod wire;

use std::collections::{BTreeMap, BTreeSet};

use selvage_config::plan::{HOMES_MAX, Home};
use selvage_config::{NodeName, StoreName};

use self::claim::{Claiming, Wanted};
use self::row::{GRANTS_MAX, Grant, Held, Row};
pub(crate) use self::wire::{Claim, Released};
use crate::engine::{Batch, Engine, EngineError};
use crate::layout;
use crate::planted::{self, Bug};
use crate::vector::VersionVector;

/// Stores that had a home since this directory began, at most: what is beyond could not be told from stores without.
const ROWS_MAX: usize = 1 << 16;

/// Who decides the writes of a store, as one node knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Place {
    /// Every node, each for itself: the store has no home.
    Free,
    /// This node.
    Here {
        /// As which home.
        term: u64,
    },
    /// This node, once it has what the homes before acknowledged.
    Coming {
        /// As which home.
        term: u64,
        /// Who has not said yet that it decides no more. Nobody: what they had is on its way.
        waits_for: Vec<NodeName>,
        /// Who may have decided before, and does not remember: it lost its disk. It is so until that is given up.
        lost: Option<NodeName>,
    },
    /// Another node.
    At {
        /// Which.
        home: NodeName,
        /// As which home.
        term: u64,
    },
}

/// What became of a claim.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Claimed {
    /// This node decides no more, nor does anybody through it.
    Released(Released),
    /// This node was not told of this home yet.
    NotYet,
    /// There is a newer home.
    Elsewhere {
        /// Which.
        home: NodeName,
        /// Since when.
        term: u64,
    },
}

/// What one node knows of all homes.
#[derive(Debug)]
pub(crate) struct Homes {
    own: NodeName,
    rows: BTreeMap<StoreName, Row>,
    /// What the newest plan says.
    planned: BTreeMap<StoreName, Home>,
    /// The nodes of the roster, with this one.
    members: BTreeSet<NodeName>,
    claiming: BTreeMap<StoreName, Claiming>,
}

impl Homes {
    /// As the engine has them.
    pub(crate) fn open(engine: &dyn Engine, own: NodeName) -> Result<Self, EngineError> {
        let mut rows = BTreeMap::new();
        for row in engine.scan(layout::HOMES, layout::HOMES, ROWS_MAX)? {
            if let Some(store) = layout::home_store(&row.key) {
                // One that can't be read is a home that nobody knows: nothing is decided until the plan says.
                rows.insert(store, row.value.ok().and_then(|value| Row::decode(value).ok()).unwrap_or_default());
            }
        }
        Ok(Self { rows, ..Self::none(own) })
    }

    /// Of a node that was told of none.
    pub(crate) fn none(own: NodeName) -> Self {
        let (planned, members, claiming) = (BTreeMap::new(), BTreeSet::new(), BTreeMap::new());
        Self { own, rows: BTreeMap::new(), planned, members, claiming }
    }

    /// Who decides for a store, where this node is in its life `incarnation`.
    pub(crate) fn place(&self, store: &StoreName, incarnation: u64) -> Place {
        let Some(row) = self.rows.get(store) else { return Place::Free };
        let (term, held) = (row.term, row.held);
        if planted::is(Bug::HomeFence) && held.is_some_and(|held| held.incarnation == incarnation) {
            return Place::Here { term };
        }
        match &row.home {
            Some(home) if *home != self.own => Place::At { home: home.clone(), term },
            Some(_) if held.is_some_and(|held| (held.term, held.incarnation) == (term, incarnation)) => {
                Place::Here { term }
            }
            Some(_) => match self.wanted(store, row, incarnation) {
                Wanted::Answers(nodes) => Place::Coming { term, waits_for: nodes.into_iter().collect(), lost: None },
                Wanted::Lost(node) => Place::Coming { term, waits_for: Vec::new(), lost: Some(node) },
            },
            None => Place::Coming { term, waits_for: Vec::new(), lost: None },
        }
    }

    /// All of them.
    pub(crate) fn places(&self, incarnation: u64) -> BTreeMap<StoreName, Place> {
        self.rows.keys().map(|store| (store.clone(), self.place(store, incarnation))).collect()
    }

    /// Takes what the plan says, and who is in the roster. From here on this node decides by it; what is to be kept on
    /// disk is returned. An older plan changes nothing.
    pub(crate) fn plan(&mut self, homes: Vec<Home>, members: BTreeSet<NodeName>) -> Batch {
        let mut batch = Batch::default();
        self.members = members;
        self.planned.clear();
        for home in homes.into_iter().take(HOMES_MAX) {
            let known = self.rows.get(&home.store);
            if known.is_none_or(|known| home.term > known.term) {
                let row = known.map_or_else(Row::default, Row::clone).follow(&home);
                batch.put(layout::home(&home.store), row.encode());
                self.rows.insert(home.store.clone(), row);
                self.claiming.remove(&home.store);
            }
            if self.rows.get(&home.store).is_some_and(|row| row.is_of(&home)) {
                self.planned.insert(home.store.clone(), home);
            }
        }
        batch
    }

    /// Answers the claim of `from` to be the home. What it says, with what this node has now, is true from now on and
    /// to be told once the batch is on disk.
    pub(crate) fn release(&mut self, from: &NodeName, claim: &Claim, vector: &VersionVector) -> (Batch, Claimed) {
        let mut batch = Batch::default();
        let Some(row) = self.rows.get_mut(&claim.store).filter(|row| row.term >= claim.term) else {
            return (batch, Claimed::NotYet);
        };
        match &row.home {
            Some(home) if (home, row.term) == (from, claim.term) => {}
            Some(home) => return (batch, Claimed::Elsewhere { home: home.clone(), term: row.term }),
            None => return (batch, Claimed::NotYet),
        }
        // What was granted before this, so that the claimant learns of all who may have decided.
        let (held, before) = (row.held.map(|held| held.term), row.before.clone());
        let (claims, grants) = (row.claims.clone(), row.grants.clone());
        let grant = Grant { node: from.clone(), held: Held { term: claim.term, incarnation: claim.incarnation } };
        if !row.grants.contains(&grant) {
            if row.grants.len() >= GRANTS_MAX {
                return (batch, Claimed::NotYet);
            }
            row.grants.push(grant);
            batch.put(layout::home(&claim.store), row.encode());
        }
        (batch, Claimed::Released(Released { held, before, claims, grants, vector: vector.clone() }))
    }
}

#[cfg(test)]
mod linear;
#[cfg(test)]
mod model;
#[cfg(test)]
mod tests;
