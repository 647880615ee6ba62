//! Placements of stores: what the configuration says of them becomes what plans say.
//!
//! Nodes of a placement are a fleet of their own with one roster. So a placement may get and lose regions, as a fleet
//! does nodes, while one that it keeps has everything; and a store stays in the placement that it was given, for nobody
//! would carry its rows from one to the other.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use selvage_config::control_plane::{PlacementRule, StoreRule};
use selvage_config::plan::{HOMES_MAX, PLACEMENTS_MAX, Placement};
use selvage_config::{NodeName, PlacementName, Region, StoreName};

use super::Fleet;
use crate::state::{Records, StateError};

/// All placements that have a store.
pub(crate) type Placements = BTreeMap<PlacementName, Placement>;

/// Why the placements of the configuration can't follow those that plans have.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PlacementError {
    /// The store is in another.
    #[error(
        "stores.{store}.placement: the store is in placement {from} and can't go to {to}: say {from}, or copy its keys to \
         a store of another name"
    )]
    Moved {
        /// The store.
        store: StoreName,
        /// Where it is.
        from: PlacementName,
        /// Where the configuration wants it.
        to: PlacementName,
    },
    /// None of the regions before is among those of now.
    #[error(
        "placements.{placement}.regions: none of the regions before ({before}) is left, and only they have its stores: keep \
         one of them until the new ones are ready"
    )]
    Apart {
        /// The placement.
        placement: PlacementName,
        /// Its regions before.
        before: String,
    },
    /// The store had a home while every node held it.
    #[error(
        "stores.{store}.placement: the store has a home that every node knows, and can't be placed any more: copy its keys \
         to a store of another name"
    )]
    Homed {
        /// The store.
        store: StoreName,
    },
    /// The home of a store stands where the store is not held.
    #[error("stores.{store}.home: {home} stands in {region}, which is not in placement {placement}")]
    Outside {
        /// The store.
        store: StoreName,
        /// Its home.
        home: NodeName,
        /// Where that stands.
        region: Region,
        /// The placement of the store.
        placement: PlacementName,
    },
    /// Too many, with those of stores that no rule names any more.
    #[error(
        "{placements} placements of {stores} stores, the most is {PLACEMENTS_MAX} of {HOMES_MAX}, with those that no rule names any more"
    )]
    TooMany {
        /// How many placements.
        placements: usize,
        /// Of how many stores.
        stores: usize,
    },
}

/// Why plans do not tell of the placements.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Unsettled {
    #[error(transparent)]
    State(#[from] StateError),
    #[error(transparent)]
    Placement(#[from] PlacementError),
}

impl Fleet {
    /// Has plans name these placements; waits on the disk. A store that is not named keeps the one that it has.
    pub(crate) fn settle_placements(
        &self,
        stores: &BTreeMap<StoreName, StoreRule>,
        rules: &BTreeMap<PlacementName, PlacementRule>,
    ) -> Result<(), Unsettled> {
        let records = self.records();
        for placement in records.placements.values() {
            let names_none = |store: &&StoreName| stores.get(*store).is_none_or(|rule| rule.placement.is_none());
            for store in placement.stores.keys().filter(names_none) {
                let placement = &placement.name;
                tracing::warn!(%store, %placement, "a store stays where it is, though no configuration places it");
            }
        }
        if *records.placements == settled(&records, stores, rules)? {
            return Ok(());
        }
        self.change(|records| {
            records.placements = Arc::new(settled(records, stores, rules)?);
            Ok::<(), Unsettled>(())
        })?;
        for placement in self.records().placements.values() {
            let (name, regions, stores) = (&placement.name, listed(&placement.regions), placement.stores.len());
            tracing::info!(placement = %name, regions, stores, "regions that hold stores");
        }
        Ok(())
    }
}

/// The placements as the configuration has them.
fn settled(
    records: &Records,
    stores: &BTreeMap<StoreName, StoreRule>,
    rules: &BTreeMap<PlacementName, PlacementRule>,
) -> Result<Placements, PlacementError> {
    let mut placements = records.placements.as_ref().clone();
    for (name, rule) in rules {
        let new = || Placement { name: name.clone(), regions: rule.regions.clone(), stores: BTreeMap::new() };
        let placement = placements.entry(name.clone()).or_insert_with(new);
        if placement.regions.is_disjoint(&rule.regions) {
            return Err(PlacementError::Apart { placement: name.clone(), before: listed(&placement.regions) });
        }
        placement.regions.clone_from(&rule.regions);
    }
    for (store, rule) in stores {
        place(&mut placements, records, store, rule)?;
    }
    placements.retain(|_, placement| !placement.stores.is_empty());
    let of_all = placements.values().map(|placement| placement.stores.len()).sum();
    if placements.len() > PLACEMENTS_MAX || of_all > HOMES_MAX {
        return Err(PlacementError::TooMany { placements: placements.len(), stores: of_all });
    }
    let homes = records.homes.values().filter(|home| stores.get(&home.store).is_none_or(|rule| rule.home.is_none()));
    let homes = homes.map(|home| (&home.store, &home.node));
    for (store, home) in homes.chain(stores.iter().filter_map(|(store, rule)| Some((store, rule.home.as_ref()?)))) {
        stands_in(&placements, records, store, home)?;
    }
    Ok(placements)
}

/// Puts a store where its rule says, for good.
fn place(
    placements: &mut Placements,
    records: &Records,
    store: &StoreName,
    rule: &StoreRule,
) -> Result<(), PlacementError> {
    let Some(to) = &rule.placement else { return Ok(()) };
    let from = placements.values().find(|placement| placement.stores.contains_key(store));
    match from.map(|placement| placement.name.clone()) {
        Some(from) if from != *to => {
            return Err(PlacementError::Moved { store: store.clone(), from, to: to.clone() });
        }
        // Its terms, and what they decided, are every node's.
        None if records.homes.contains_key(store) => return Err(PlacementError::Homed { store: store.clone() }),
        _ => {}
    }
    if let Some(placement) = placements.get_mut(to) {
        placement.stores.insert(store.clone(), rule.cache_ms);
    }
    Ok(())
}

/// Whether a home holds the store that it is to decide for, as far as its node was ever heard of.
fn stands_in(
    placements: &Placements,
    records: &Records,
    store: &StoreName,
    home: &NodeName,
) -> Result<(), PlacementError> {
    let placement = placements.values().find(|placement| placement.stores.contains_key(store));
    let region = records.nodes.get(home).map(|node| node.status.region.clone());
    match (placement, region) {
        (Some(placement), Some(region)) if !placement.regions.contains(&region) => {
            let (store, home, placement) = (store.clone(), home.clone(), placement.name.clone());
            Err(PlacementError::Outside { store, home, region, placement })
        }
        _ => Ok(()),
    }
}

fn listed(regions: &BTreeSet<Region>) -> String {
    regions.iter().map(Region::as_str).collect::<Vec<_>>().join(" ")
}

#[cfg(test)]
mod tests {
    use selvage_config::plan::Home;

    use super::*;

    fn store(name: &str) -> StoreName {
        name.parse().unwrap()
    }

    fn in_placement(placement: &str, cache_ms: u64) -> StoreRule {
        StoreRule { placement: Some(placement.parse().unwrap()), cache_ms, ..StoreRule::default() }
    }

    fn rules(placements: &[(&str, &[&str])]) -> BTreeMap<PlacementName, PlacementRule> {
        let regions = |names: &[&str]| names.iter().map(|name| name.parse().unwrap()).collect();
        placements.iter().map(|(n, r)| (n.parse().unwrap(), PlacementRule { regions: regions(r) })).collect()
    }

    fn orders(placement: &str, cache_ms: u64) -> BTreeMap<StoreName, StoreRule> {
        [(store("shop/orders"), in_placement(placement, cache_ms))].into()
    }

    fn with(placements: Placements) -> Records {
        Records { placements: Arc::new(placements), ..Records::default() }
    }

    fn first() -> Records {
        with(
            settled(&Records::default(), &orders("eu", 5), &rules(&[("eu", &["fra", "ams"]), ("us", &["iad"])]))
                .unwrap(),
        )
    }

    #[test]
    fn a_placement_that_has_a_store_is_told_and_keeps_it_when_no_rule_names_it() {
        let records = first();
        let eu = &records.placements[&"eu".parse().unwrap()];
        assert_eq!(
            (records.placements.len(), listed(&eu.regions), &eu.stores),
            (1, "ams fra".into(), &[(store("shop/orders"), 5)].into())
        );
        assert_eq!(settled(&records, &BTreeMap::new(), &BTreeMap::new()).unwrap(), *records.placements);
    }

    #[test]
    fn a_placement_gets_and_loses_regions_while_one_of_them_stays() {
        let records = first();
        let now = |regions| settled(&records, &orders("eu", 7), &rules(&[("eu", regions)]));
        let placements = now(&["ams", "sin"]).unwrap();
        let eu = &placements[&"eu".parse().unwrap()];
        assert_eq!((listed(&eu.regions), eu.stores[&store("shop/orders")]), ("ams sin".into(), 7));
        let apart = now(&["sin"]).unwrap_err();
        assert!(matches!(&apart, PlacementError::Apart { before, .. } if before == "ams fra"), "{apart}");
    }

    #[test]
    fn a_store_does_not_go_from_one_placement_to_another() {
        let moved = settled(&first(), &orders("us", 0), &rules(&[("eu", &["fra"]), ("us", &["iad"])])).unwrap_err();
        assert!(moved.to_string().starts_with("stores.shop/orders.placement: the store is in placement eu"), "{moved}");
    }

    #[test]
    fn a_store_that_every_node_knows_a_home_of_is_not_placed_and_one_that_is_placed_may_get_a_home() {
        let home = Home::first(store("shop/orders"), "fra-1".parse().unwrap(), 3);
        let homes = Arc::new([(home.store.clone(), home)].into());
        let records = Records { homes, ..Records::default() };
        let homed = settled(&records, &orders("eu", 0), &rules(&[("eu", &["fra"])])).unwrap_err();
        assert_eq!(homed, PlacementError::Homed { store: store("shop/orders") });
        let both = Records { placements: first().placements, ..records };
        assert!(settled(&both, &orders("eu", 0), &rules(&[("eu", &["fra"])])).is_ok());
    }

    #[test]
    fn a_home_stands_in_its_stores_placement() {
        let mut records = first();
        let node = crate::plans::tests::told("sin-1", 0, 1);
        records.nodes.insert("sin-1".parse().unwrap(), node);
        let at = |home: &str| {
            let rule = StoreRule { home: Some(home.parse().unwrap()), ..in_placement("eu", 0) };
            settled(&records, &[(store("shop/orders"), rule)].into(), &rules(&[("eu", &["ams"])]))
        };
        // The node of this test stands in fra.
        assert!(matches!(at("sin-1"), Err(PlacementError::Outside { region, .. }) if region.as_str() == "fra"));
        assert!(at("nobody-heard-of-it").is_ok());
    }

    #[test]
    fn placements_that_no_rule_names_any_more_count() {
        let many: Placements = (0..PLACEMENTS_MAX)
            .map(|n| Placement {
                name: format!("p{n}").parse().unwrap(),
                regions: ["fra".parse().unwrap()].into(),
                stores: [(store(&format!("s{n}/a")), 0)].into(),
            })
            .map(|placement| (placement.name.clone(), placement))
            .collect();
        let refused = settled(&with(many), &orders("eu", 0), &rules(&[("eu", &["fra"])]));
        assert_eq!(
            refused,
            Err(PlacementError::TooMany { placements: PLACEMENTS_MAX + 1, stores: PLACEMENTS_MAX + 1 })
        );
    }
}
