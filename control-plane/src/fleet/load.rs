//! How releases that are being moved do, as nodes tell it: in memory, for it is told again every second.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use selvage_config::plan::ReleaseLoad;
use selvage_config::release::ReleaseId;
use selvage_config::{AppName, NodeName};

use crate::rollouts::Compared;

/// What nodes told, by app. An app is forgotten when nothing of it moves any more.
#[derive(Debug, Default)]
pub(super) struct Loads(Mutex<BTreeMap<AppName, Releases>>);

/// What was told of one app.
type Releases = BTreeMap<(NodeName, ReleaseId), Told>;

/// What one node told of one release.
#[derive(Debug)]
struct Told {
    first: ReleaseLoad,
    last: ReleaseLoad,
}

impl Loads {
    /// Takes in what a node tells of the apps that `is_moving` names.
    pub(super) fn take(&self, node: &NodeName, loads: Vec<ReleaseLoad>, is_moving: impl Fn(&AppName) -> bool) {
        let mut apps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        apps.retain(|app, _| is_moving(app));
        for load in loads {
            if !is_moving(&load.release.app) {
                continue;
            }
            let app = apps.entry(load.release.app.clone()).or_default();
            match app.entry((node.clone(), load.release.clone())) {
                std::collections::btree_map::Entry::Vacant(free) => {
                    free.insert(Told { first: load.clone(), last: load });
                }
                std::collections::btree_map::Entry::Occupied(mut known) => {
                    let told = known.get_mut();
                    if load.requests < told.last.requests {
                        // The node began to count anew.
                        told.first = ReleaseLoad::none(load.release.clone());
                    }
                    told.last = load;
                }
            }
        }
    }

    /// What the new release answered at all, and the old one since the move began.
    pub(super) fn compared(&self, new: &ReleaseId, old: Option<&ReleaseId>) -> Compared {
        let apps = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let mut compared = Compared::default();
        for ((_, release), told) in apps.get(&new.app).into_iter().flatten() {
            let (sum, load) = if release == new {
                (&mut compared.new, told.last.clone())
            } else if Some(release) == old {
                (&mut compared.old, told.last.since(&told.first))
            } else {
                continue;
            };
            sum.get_or_insert_with(|| ReleaseLoad::none(release.clone())).add(&load);
        }
        compared
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(release: &str, requests: u64) -> ReleaseLoad {
        ReleaseLoad { requests, ..ReleaseLoad::none(release.parse().unwrap()) }
    }

    #[test]
    fn the_old_release_counts_from_when_the_move_began() {
        let loads = Loads::default();
        let (one, two) = ("fra-1".parse().unwrap(), "iad-1".parse().unwrap());
        loads.take(&one, vec![load("hello@1", 1_000)], |_| true);
        loads.take(&two, vec![load("hello@2", 5), load("other@1", 9)], |app| app.as_str() == "hello");
        loads.take(&one, vec![load("hello@1", 1_007)], |_| true);
        let (old, new) = ("hello@1".parse().unwrap(), "hello@2".parse().unwrap());
        let compared = loads.compared(&new, Some(&old));
        assert_eq!((compared.new.unwrap().requests, compared.old.unwrap().requests), (5, 7));
        // A node that was restarted counts from 0.
        loads.take(&one, vec![load("hello@1", 3)], |_| true);
        assert_eq!(loads.compared(&new, Some(&old)).old.unwrap().requests, 3);
        loads.take(&one, Vec::new(), |_| false);
        assert!(loads.compared(&new, Some(&old)).new.is_none());
    }
}
