//! Placements: which regions hold stores that not every node shall hold.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::{PlacementName, Region, StoreName};

/// Most placements of a fleet: a node has an engine, and its links, for each that it holds.
pub const PLACEMENTS_MAX: usize = 8;
/// Most regions of one placement.
pub const REGIONS_MAX: usize = 64;
/// Longest that a node elsewhere may keep what it read, milliseconds.
pub const CACHE_MS_MAX: u64 = 3_600_000;

/// The regions that hold some of the stores. Nodes elsewhere have no row of these, and ask a node that has.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Placement {
    /// Its name, which it keeps whichever regions it has.
    pub name: PlacementName,
    /// Where its stores are held, by every node that stands there.
    pub regions: BTreeSet<Region>,
    /// Its stores, and for how long a node elsewhere may keep what it read of each, milliseconds. 0: not at all.
    pub stores: BTreeMap<StoreName, u64>,
}
