//! What other control planes of the fleet did, and what nodes told them.

use std::sync::{Arc, PoisonError};
use std::time::Instant;

use selvage_config::NodeName;

use super::Fleet;
use crate::journal::Told;
use crate::state::{Change, NodeRecord, Records, State, StateError, Table};

/// What became of a change that the journal told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Followed {
    Taken,
    /// It was here already.
    Known,
    /// Some before it are missing: a baseline has them.
    Gap,
}

impl Fleet {
    pub(crate) fn state(&self) -> &Arc<State> {
        &self.state
    }

    /// Takes in the change of the journal that has this sequence; waits on the disk.
    pub(crate) fn follow(&self, sequence: u64, change: &Change) -> Result<Followed, StateError> {
        let order = self.state.order();
        let applied = self.state.applied();
        if sequence <= applied {
            return Ok(Followed::Known);
        }
        if sequence > applied + 1 {
            return Ok(Followed::Gap);
        }
        let before = self.records();
        let after = self.state.changed(&before, change)?;
        self.state.take(&order, sequence, change)?;
        // A node that another control plane tells of was heard there.
        self.saw(
            after
                .nodes
                .iter()
                .filter(|(node, record)| !before.nodes.get(*node).is_some_and(|known| Arc::ptr_eq(known, record))),
        );
        let is_of_fleet = change.rows().iter().any(|row| row.table == Table::Fleet);
        if is_of_fleet {
            self.show(&order, &before, after);
        }
        Ok(Followed::Taken)
    }

    /// Begins anew with a baseline; waits on the disk. One that is older than what is here changes nothing.
    pub(crate) fn refill(&self, id: &str, all: &Change, sequence: u64) -> Result<(), StateError> {
        let order = self.state.order();
        if sequence <= self.state.applied() {
            return Ok(());
        }
        let before = self.records();
        self.state.refill(&order, id, all, sequence)?;
        self.show(&order, &before, self.state.load()?);
        Ok(())
    }

    fn saw<'r>(&self, nodes: impl Iterator<Item = (&'r NodeName, &'r Arc<NodeRecord>)>) {
        let mut seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        for (node, _) in nodes {
            seen.insert(node.clone(), Instant::now());
        }
    }

    /// Takes in what a node told another control plane. True if all of it is known here now; otherwise it must be told
    /// in full. What would change anybody's plan comes by the journal, and by nothing else.
    pub(crate) fn hear(&self, told: Told) -> Result<bool, StateError> {
        let Told { node, digest, record, load, authorities, .. } = told;
        let Some(known) = self.records().nodes.get(&node).cloned() else { return Ok(true) };
        self.saw(std::iter::once((&node, &known)));
        self.take_load(&node, load);
        self.believes(&node, authorities.and_then(|text| text.parse().ok()));
        if Told::digest_of(&known) == digest {
            return Ok(true);
        }
        let Some(record) = record else { return Ok(false) };
        if record.status.node != node {
            return Ok(true);
        }
        let record = Arc::new(record);
        let order = self.state.order();
        let change = |records: &mut Records| {
            if let Some(place) = records.nodes.get_mut(&node).filter(|known| known.is_same_peer(&record)) {
                *place = Arc::clone(&record);
            }
            Ok::<_, StateError>(())
        };
        match self.change_under(&order, &change) {
            Ok(_) => Ok(true),
            Err(super::Tried::Refused(error) | super::Tried::Unwritten(error)) => Err(error),
        }
    }

    /// What another control plane must be told of a node that this one hears, in full.
    pub(crate) fn told(&self, node: &NodeName) -> Option<Told> {
        let known = self.records().nodes.get(node).cloned()?;
        self.seen_ago(node).filter(|ago| super::is_recent(*ago))?;
        Some(Told::new(&known, Vec::new(), true, self.believed_by(node)))
    }

    /// From now on what nodes tell others comes, after a time when it did not.
    pub(crate) fn hears_again(&self) {
        *self.hears_since.lock().unwrap_or_else(PoisonError::into_inner) = Instant::now();
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use selvage_certs::Seal;
    use selvage_config::operator::{OperatorRights, Operators};
    use selvage_config::plan::Status;

    use crate::state::{Member, Standing};

    #[test]
    fn changes_are_taken_in_their_order_and_once_and_a_baseline_goes_over_a_gap() {
        let directory = tempfile::tempdir().unwrap();
        let seal = Seal::open(&directory.path().join("key")).unwrap();
        let state = Arc::new(State::open(&directory.path().join("db"), seal).unwrap());
        state.set_member(&Member { id: "j".into(), applied: 0, standing: Standing::Joined }).unwrap();
        let fleet = Fleet::open(Arc::clone(&state), None).unwrap();
        let to = |generation: u64| {
            let mut change = Change::default();
            change.put(Table::Fleet, b"generation".to_vec(), generation.to_be_bytes().to_vec());
            change
        };
        assert_eq!(fleet.follow(2, &to(8)).unwrap(), Followed::Gap);
        assert_eq!(fleet.follow(1, &to(7)).unwrap(), Followed::Taken);
        assert_eq!(fleet.follow(1, &to(9)).unwrap(), Followed::Known);
        assert_eq!((fleet.records().generation, state.member().unwrap().unwrap().applied), (7, 1));
        fleet.refill("j", &to(20), 12).unwrap();
        // One that is older than what is here changes nothing.
        fleet.refill("j", &to(3), 5).unwrap();
        assert_eq!((fleet.records().generation, state.member().unwrap().unwrap().applied), (20, 12));
        assert_eq!(fleet.follow(13, &to(21)).unwrap(), Followed::Taken);
        assert_eq!(state.load().unwrap().generation, 21);
        // Operators are among what changes tell, and so is that there are none.
        for operators in [Some(Operators::from([("ada".to_owned(), OperatorRights::default())])), None] {
            let mut change = Change::default();
            match &operators {
                Some(operators) => {
                    change.put(Table::Fleet, b"operators".to_vec(), serde_json::to_vec(operators).unwrap())
                }
                None => change.remove(Table::Fleet, b"operators".to_vec()),
            }
            fleet.follow(state.applied() + 1, &change).unwrap();
            assert_eq!(fleet.records().operators.as_deref(), operators.as_ref());
            assert_eq!(state.load().unwrap().operators.as_deref(), operators.as_ref());
        }
        // What can't be read stops everything before it changes anything.
        let mut bad = Change::default();
        bad.put(Table::Fleet, b"app/hello".to_vec(), b"{".to_vec());
        assert!(fleet.follow(16, &bad).is_err());
        assert_eq!(state.applied(), 15);
    }

    #[test]
    fn what_is_passed_on_changes_no_plan_and_peers_that_another_told_of_are_told_of_here() {
        let directory = tempfile::tempdir().unwrap();
        let seal = Seal::open(&directory.path().join("key")).unwrap();
        let state = Arc::new(State::open(&directory.path().join("db"), seal).unwrap());
        state.set_member(&Member { id: "j".into(), applied: 0, standing: Standing::Joined }).unwrap();
        let fleet = Fleet::open(Arc::clone(&state), None).unwrap();
        let record = |version: &str, port: u16| NodeRecord {
            status: Status {
                node: "fra-1".parse().unwrap(),
                region: "fra".parse().unwrap(),
                version: version.into(),
                generation: 0,
                replication: None,
                front: None,
                admin: None,
                apps: Vec::new(),
                plan: None,
                load: Vec::new(),
                labels: [].into(),
            },
            replication: Some(([127, 0, 0, 1], port).into()),
            admin: None,
        };
        let row = |record: &NodeRecord| {
            let mut change = Change::default();
            change.put(Table::Fleet, b"node/fra-1".to_vec(), serde_json::to_vec(record).unwrap());
            change
        };
        fleet.settle().unwrap();
        assert_eq!(fleet.unsettled_for(), None);
        // Another control plane wrote down that a node came, and its generation has not come yet.
        fleet.follow(1, &row(&record("1", 7001))).unwrap();
        assert!(fleet.unsettled_for().is_some());
        let known = || fleet.records().nodes[&"fra-1".parse().unwrap()].clone();
        let hear = |record: &NodeRecord| fleet.hear(Told::new(record, Vec::new(), true, None)).unwrap();
        assert!(hear(&record("2", 7001)));
        assert_eq!(*known(), record("2", 7001));
        // Where it is now comes by the journal alone.
        assert!(
            hear(&record("3", 7002))
                && hear(&NodeRecord { admin: Some(([127, 0, 0, 1], 1).into()), ..record("4", 7001) })
        );
        assert_eq!((&*known(), fleet.records().generation), (&record("2", 7001), 0));
        // The other one's generation tells of it here too; one that comes here first would have made one.
        let mut told = Change::default();
        told.put(Table::Fleet, b"generation".to_vec(), 1_u64.to_be_bytes().to_vec());
        fleet.follow(2, &told).unwrap();
        assert_eq!(fleet.unsettled_for(), None);
        fleet.settle().unwrap();
        assert_eq!(fleet.records().generation, 1);
        fleet.follow(3, &row(&record("4", 7004))).unwrap();
        fleet.settle().unwrap();
        assert_eq!((fleet.records().generation, fleet.unsettled_for()), (2, None));
    }
}
