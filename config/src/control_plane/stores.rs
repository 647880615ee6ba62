//! Rules of stores: where the writes of each are decided, and which regions hold it.

use std::collections::{BTreeMap, BTreeSet};

use serde::Deserialize;

use crate::id::NODES_APP;
use crate::invalid::Problems;
use crate::plan::{CACHE_MS_MAX, HOMES_MAX, PLACEMENTS_MAX, REGIONS_MAX};
use crate::{NodeName, PlacementName, Region, StoreName};

/// One store's own rules: a home, a placement, or both.
#[derive(Debug, Clone, PartialEq, Eq, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct StoreRule {
    /// The node that decides all writes of the store, one after another: compare-and-set and counters are linearizable.
    /// Another one moves it. A store that had a home keeps one, also when its rule is taken out.
    pub home: Option<NodeName>,
    /// The home of this term, and those before it, are gone: what they acknowledged and nobody else has is given up.
    /// `selvage kv homes` shows the term. Default 0: the home before must have made way.
    pub lost: u64,
    /// The regions that hold the store, by the name of their table. Default: every node holds it. A store stays in the
    /// placement that it was given, also when its rule is taken out.
    pub placement: Option<PlacementName>,
    /// How long nodes outside the placement may keep what they read of the store, milliseconds, at most an hour. Default
    /// 0: they ask each time.
    pub cache_ms: u64,
}

/// `[placements.<name>]`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlacementRule {
    /// Every node that stands in one of these holds the stores of the placement.
    pub regions: BTreeSet<Region>,
}

/// Notes every mistake.
pub(super) fn settle(
    stores: &BTreeMap<StoreName, StoreRule>,
    placements: &BTreeMap<PlacementName, PlacementRule>,
    problems: &mut Problems,
) {
    if stores.len() > HOMES_MAX {
        let message = format!("{} stores, the most is {HOMES_MAX}", stores.len());
        problems.add(None, "stores", message, None);
    }
    if placements.len() > PLACEMENTS_MAX {
        let message = format!("{} placements, the most is {PLACEMENTS_MAX}", placements.len());
        problems.add(None, "placements", message, Some("stores of the same regions can share one"));
    }
    for (name, placement) in placements {
        let field = format!("placements.{name}.regions");
        match placement.regions.len() {
            0 => problems.add(None, field, "no region holds the stores", Some("name at least one")),
            1..=REGIONS_MAX => {}
            regions => problems.add(None, field, format!("{regions} regions, the most is {REGIONS_MAX}"), None),
        }
    }
    for (store, rule) in stores {
        rule.settle(store, placements, problems);
    }
}

impl StoreRule {
    fn settle(&self, store: &StoreName, placements: &BTreeMap<PlacementName, PlacementRule>, problems: &mut Problems) {
        let field = |name: &str| format!("stores.{store}{name}");
        if self.home.is_none() && self.placement.is_none() {
            let hint = Some("say home = \"<node>\", placement = \"<name>\", or both");
            problems.add(None, field(""), "the rule has neither a home nor a placement", hint);
        }
        if self.home.is_none() && self.lost > 0 {
            problems.add(None, field(".lost"), "a home is given up and none is named", Some("say home = \"<node>\""));
        }
        if let Some(placement) = self.placement.as_ref().filter(|name| !placements.contains_key(*name)) {
            let hint = format!("add [placements.{placement}] with its regions");
            problems.add(None, field(".placement"), format!("there is no placement {placement}"), Some(&hint));
        }
        if self.placement.is_some() && store.as_str().starts_with(&format!("{NODES_APP}/")) {
            let message = "stores of the nodes themselves are held by every node";
            problems.add(None, field(".placement"), message, None);
        }
        if self.cache_ms > CACHE_MS_MAX {
            let message = format!("{} ms, the most is {CACHE_MS_MAX}", self.cache_ms);
            problems.add(None, field(".cache_ms"), message, None);
        }
        if self.cache_ms > 0 && self.placement.is_none() {
            let hint = Some("name a placement, for instance of the home's region alone");
            problems.add(None, field(".cache_ms"), "every node holds the store, so nothing is kept besides", hint);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::super::ControlPlaneConfig;
    use super::*;
    use crate::Invalid;

    fn with(stores: &str) -> Result<ControlPlaneConfig, Invalid> {
        let text =
            format!("listen='127.0.0.1:0'\nstate_dir='s'\nidentity={{certificate='c',key='k',roots='r'}}\n{stores}\n");
        ControlPlaneConfig::parse(Path::new("/etc/cp.toml"), &text)
    }

    #[test]
    fn a_store_has_its_home_by_name_and_mistakes_are_told_with_their_place() {
        let stores = with("[stores.'shop/orders']\nhome='fra-1'\n[stores.'shop/stock']\nhome='iad-1'\nlost=7").unwrap();
        let rule = |home: &str, lost| StoreRule { home: Some(home.parse().unwrap()), lost, ..StoreRule::default() };
        assert_eq!(stores.stores[&"shop/orders".parse().unwrap()], rule("fra-1", 0));
        assert_eq!(stores.stores[&"shop/stock".parse().unwrap()], rule("iad-1", 7));
        for (bad, line) in [
            ("[stores.'shop/orders']\nlost=1", 4),
            ("[stores.'shop/orders']\nhome='Not A Node'", 5),
            ("[stores.orders]\nhome='fra-1'", 4),
            ("[stores.'shop/orders']\nhome='fra-1'\nhouse=1", 6),
        ] {
            let error = with(bad).unwrap_err();
            assert!(error.to_string().contains("/etc/cp.toml") || error.places().len() > 1, "{error}");
            assert_eq!(error.places()[0].line, Some(line), "{bad}: {error}");
        }
        let many: String = (0..=HOMES_MAX).map(|n| format!("[stores.'s{n}/a']\nhome='fra-1'\n")).collect();
        assert_eq!(with(&many).unwrap_err().places()[0].field, "stores");
    }

    #[test]
    fn a_store_is_placed_by_name_with_or_without_a_home_and_what_is_read_elsewhere_may_be_kept() {
        let config = with(
            "[placements.eu]\nregions=['fra','ams']\n[stores.'shop/orders']\nplacement='eu'\n\
             cache_ms=1500\n[stores.'shop/stock']\nhome='fra-1'\nplacement='eu'",
        )
        .unwrap();
        let eu: PlacementName = "eu".parse().unwrap();
        let regions: Vec<_> = config.placements[&eu].regions.iter().map(Region::as_str).collect();
        assert_eq!(regions, ["ams", "fra"]);
        let orders = &config.stores[&"shop/orders".parse().unwrap()];
        assert_eq!((&orders.home, &orders.placement, orders.cache_ms), (&None, &Some(eu.clone()), 1500));
        let stock = &config.stores[&"shop/stock".parse().unwrap()];
        assert_eq!((stock.home.is_some(), &stock.placement, stock.cache_ms), (true, &Some(eu), 0));
    }

    #[test]
    fn what_is_wrong_with_placements_is_told_with_line_and_field() {
        let eu = "[placements.eu]\nregions=['fra']\n";
        let beside_eu = |text: &str| format!("{eu}{text}");
        let too_many: String = (0..=PLACEMENTS_MAX).map(|n| format!("[placements.p{n}]\nregions=['fra']\n")).collect();
        let regions: String = (0..=REGIONS_MAX).map(|n| format!("'r{n}',")).collect();
        for (bad, line, field, said) in [
            ("[placements.eu]\nregions=[]".into(), 5, "placements.eu.regions", "no region"),
            (format!("[placements.eu]\nregions=[{regions}]"), 5, "placements.eu.regions", "the most is 64"),
            (too_many, 4, "placements", "the most is 8"),
            ("[placements.eu]\nregions=['Not one']".into(), 5, "", "region"),
            ("[placements.eu]".into(), 4, "regions", "missing"),
            ("[stores.'a/b']\nplacement='eu'".into(), 5, "stores.a/b.placement", "no placement eu"),
            (beside_eu("[stores.'a/b']\ncache_ms=5"), 6, "stores.a/b", "neither"),
            (beside_eu("[stores.'a/b']\nhome='fra-1'\ncache_ms=5"), 8, "stores.a/b.cache_ms", "every node holds"),
            (beside_eu("[stores.'a/b']\nplacement='eu'\ncache_ms=3600001"), 8, "stores.a/b.cache_ms", "3600000"),
            (beside_eu("[stores.'a/b']\nplacement='eu'\nlost=1"), 8, "stores.a/b.lost", "none is named"),
            (
                beside_eu("[stores.'selvage-acme/place']\nplacement='eu'"),
                7,
                "stores.selvage-acme/place.placement",
                "nodes themselves",
            ),
        ] {
            let error = with(&bad).unwrap_err();
            let place = &error.places()[0];
            assert_eq!((place.line, place.field.as_str()), (Some(line), field), "{bad}: {place:?}");
            assert!(place.message.contains(said), "{bad}: {place:?}");
        }
    }
}
