//! Homes of stores: what the configuration says of them becomes what plans say.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_config::StoreName;
use selvage_config::control_plane::StoreRule;
use selvage_config::plan::Home;

use super::Fleet;
use crate::audit;
use crate::state::{Records, StateError};

/// The homes of all stores that ever had one.
pub(crate) type Homes = BTreeMap<StoreName, Home>;

impl Fleet {
    /// Has plans name these homes; waits on the disk. A store that is not named keeps the home that it has: nodes that
    /// hear of it at other times would decide beside each other.
    pub(crate) fn settle_homes(&self, rules: &BTreeMap<StoreName, StoreRule>) -> Result<(), StateError> {
        let now_ms = audit::now_ms();
        let records = self.records();
        let names_none = |store: &&StoreName| rules.get(*store).is_none_or(|rule| rule.home.is_none());
        for store in records.homes.keys().filter(names_none) {
            tracing::warn!(%store, "a store keeps the home that it had, though no configuration names it");
        }
        if *records.homes == settled(&records, rules, now_ms) {
            return Ok(());
        }
        self.change(|records| {
            records.homes = Arc::new(settled(records, rules, now_ms));
            Ok::<(), StateError>(())
        })?;
        for home in self.records().homes.values() {
            tracing::info!(store = %home.store, home = %home.node, term = home.term, lost = home.lost, "home of a store");
        }
        Ok(())
    }
}

/// The homes as the configuration has them. A term is the time at which it was given: so it is above all that nodes know,
/// also where the state was lost.
fn settled(records: &Records, rules: &BTreeMap<StoreName, StoreRule>, now_ms: u64) -> Homes {
    let mut homes = records.homes.as_ref().clone();
    for (store, rule) in rules {
        let Some(home) = &rule.home else { continue };
        match homes.get(store) {
            None => drop(homes.insert(store.clone(), Home::first(store.clone(), home.clone(), now_ms))),
            Some(known) => {
                if let Some(next) = known.next(home, rule.lost, now_ms) {
                    homes.insert(store.clone(), next);
                }
            }
        }
    }
    homes
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rules(home: &str, lost: u64) -> BTreeMap<StoreName, StoreRule> {
        [("shop/orders".parse().unwrap(), rule(home, lost))].into()
    }

    fn rule(home: &str, lost: u64) -> StoreRule {
        StoreRule { home: Some(home.parse().unwrap()), lost, ..StoreRule::default() }
    }

    fn with(homes: Homes) -> Records {
        Records { homes: Arc::new(homes), ..Records::default() }
    }

    #[test]
    fn a_home_is_moved_by_naming_another_and_stays_when_it_is_named_no_more() {
        let store: StoreName = "shop/orders".parse().unwrap();
        let first = settled(&Records::default(), &rules("fra-1", 0), 100);
        assert_eq!(first[&store], Home::first(store.clone(), "fra-1".parse().unwrap(), 100));
        assert_eq!(settled(&with(first.clone()), &rules("fra-1", 0), 200), first, "nothing is new");
        assert_eq!(settled(&with(first.clone()), &BTreeMap::new(), 200), first, "it keeps its home");
        let second = settled(&with(first), &rules("sin-1", 0), 50);
        // The clock went back: terms do not.
        assert_eq!((second[&store].node.as_str(), second[&store].term), ("sin-1", 101));
        let third = settled(&with(second), &rules("sin-1", 101), 300);
        assert_eq!((third[&store].term, third[&store].lost, third[&store].former.len()), (300, 101, 0));
    }
}
