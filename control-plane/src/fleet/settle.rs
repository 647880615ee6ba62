//! Nodes that come together are told together.
//!
//! Every plan of a fleet changes when a node comes. Were each of thousands that come at once to make a generation, every
//! one of those before it would be told thousands of times; so there is a time between two generations that tell of
//! peers alone, which grows with the fleet. Whatever else makes a generation tells of them too.

use std::sync::{MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use super::Fleet;
use crate::state::{Records, StateError};

/// Fleets of fewer nodes are told of every one at once.
const NODES_MIN: usize = 64;
/// The time between two generations that tell of peers alone, for each node.
const PER_NODE: Duration = Duration::from_micros(200);

/// When plans last told of peers, and whether peers have changed since.
#[derive(Debug)]
pub(super) struct Peers {
    told: Option<Instant>,
    are_unsettled: bool,
}

/// How long plans of these records do not tell of peers after they did.
fn time_between(records: &Records) -> Duration {
    let nodes = records.nodes.len();
    if nodes < NODES_MIN { Duration::ZERO } else { PER_NODE * u32::try_from(nodes).unwrap_or(u32::MAX) }
}

impl Peers {
    /// As a run begins: peers may have changed just before the last one ended.
    pub(super) fn new(records: &Records) -> Self {
        Self { told: None, are_unsettled: !time_between(records).is_zero() }
    }

    /// Whether peers that changed are told later.
    pub(super) fn may_wait(&self, records: &Records) -> bool {
        self.told.is_some_and(|told| told.elapsed() < time_between(records))
    }

    /// Peers have changed, and no generation tells of it.
    pub(super) fn unsettle(&mut self) {
        self.are_unsettled = true;
    }

    /// There is a generation that tells of all of them.
    pub(super) fn settled(&mut self) {
        (self.are_unsettled, self.told) = (false, Some(Instant::now()));
    }
}

impl Fleet {
    pub(super) fn peers(&self) -> MutexGuard<'_, Peers> {
        self.peers.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How long to wait until plans may tell of the peers that changed. None: there is nothing to tell.
    pub(crate) fn unsettled_for(&self) -> Option<Duration> {
        let time = time_between(&self.records());
        let peers = self.peers();
        let left = |told: Instant| time.saturating_sub(told.elapsed());
        peers.are_unsettled.then(|| peers.told.map_or(Duration::ZERO, left))
    }

    /// Tells of all peers that changed, in one generation; waits on the disk, and on the journal if there is one. Of
    /// several control planes that would do it one does: a generation that comes meanwhile has told of them.
    pub(crate) fn settle(&self) -> Result<(), StateError> {
        let change = |records: &mut Records| {
            let mut peers = self.peers();
            if peers.are_unsettled && records.is_behind() {
                // Whatever goes past what nodes know tells of them too.
                peers.settled();
            } else if peers.are_unsettled {
                records.generation = records.generation.saturating_add(1);
            }
            Ok(())
        };
        self.change(change).map(|((), _)| ())
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::net::{IpAddr, Ipv4Addr};
    use std::sync::Arc;

    use selvage_certs::Seal;
    use selvage_config::plan::Status;

    use super::*;
    use crate::state::State;

    fn status(number: usize) -> Status {
        Status {
            node: format!("n-{number}").parse().unwrap(),
            region: "fra".parse().unwrap(),
            version: "1".into(),
            generation: 0,
            replication: Some(([127, 0, 0, 1], 7000).into()),
            front: None,
            admin: None,
            apps: Vec::new(),
            plan: None,
            load: Vec::new(),
            labels: BTreeMap::new(),
        }
    }

    #[test]
    fn thousands_that_join_make_a_few_generations_and_all_of_them_are_told() {
        let directory = tempfile::tempdir().unwrap();
        let seal = Seal::open(&directory.path().join("key")).unwrap();
        let state = Arc::new(State::open(&directory.path().join("db"), seal).unwrap());
        let fleet = Fleet::open(state, None).unwrap();
        let from = IpAddr::V4(Ipv4Addr::LOCALHOST);
        let mut settled = 0;
        for number in 0..2_000 {
            fleet.tell(status(number), from).unwrap();
            // As the chore does it.
            if fleet.unsettled_for().is_some_and(|wait| wait.is_zero()) {
                fleet.settle().unwrap();
                settled += 1;
            }
        }
        fleet.settle().unwrap();
        let records = fleet.records();
        assert_eq!(records.peers().count(), 2_000);
        // One for each of the first, and then as many as there is time for.
        let most = NODES_MIN as u64 + 2 * settled + 2;
        assert!(records.generation < most && records.generation < 1_500, "{} of {most}", records.generation);
        assert_eq!(fleet.unsettled_for(), None);
    }
}
