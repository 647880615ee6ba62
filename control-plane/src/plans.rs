//! Plans: what each node shall run, and how a node waits for the next one.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};

use selvage_config::NodeName;
use selvage_config::plan::Plan;

use crate::answers::hidden;
use crate::state::Records;

/// Polls for one node's plan that wait at once: the node's own, one that it gave up on, and people's.
const POLLS_PER_NODE: usize = 8;
/// Polls that wait at once.
const POLLS_MAX: usize = 8_192;

/// Who a plan is for: a node is told the values of variables, people are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    Node,
    Operator,
}

impl Records {
    /// What `node` shall run.
    pub(crate) fn plan(&self, node: &NodeName, reader: Reader) -> Plan {
        let releases = self.current().map(|record| match reader {
            Reader::Node => record.release.clone(),
            Reader::Operator => hidden(&record.release),
        });
        Plan {
            node: node.clone(),
            generation: self.generation,
            releases: releases.collect(),
            peers: self.peers().filter(|peer| peer.node != *node).collect(),
        }
    }

    /// Whether `other` makes other plans than these, generation aside.
    pub(crate) fn differs(&self, other: &Self) -> bool {
        !self.current().map(|record| &record.release).eq(other.current().map(|record| &record.release))
            || !self.peers().eq(other.peers())
    }

    /// Whether a node has taken in a newer plan than these records ever made: they are an old copy, or lost.
    pub(crate) fn is_behind(&self) -> bool {
        self.told_generation() > self.generation
    }
}

/// The generation that follows a change from `before` to `after`.
///
/// When the state was lost, nodes know generations that are yet to come. Their peers' addresses trickle in and must
/// not add up to a generation that a node takes in, for its plan would hold no app: so only an operator's act counts
/// then, and it goes past every generation that a node has told.
pub(crate) fn next_generation(before: &Records, after: &Records) -> u64 {
    let same_releases = before.current().map(|r| &r.release).eq(after.current().map(|r| &r.release));
    match (same_releases, before.differs(after), after.is_behind()) {
        (true, false, _) | (true, true, true) => before.generation,
        _ => before.generation.max(if same_releases { 0 } else { after.told_generation() }).saturating_add(1),
    }
}

/// Counts the polls that wait.
#[derive(Debug, Default)]
pub(crate) struct Polls(Mutex<BTreeMap<NodeName, usize>>);

/// A poll's place; given back when dropped.
#[derive(Debug)]
pub(crate) struct Place<'p> {
    polls: &'p Polls,
    node: NodeName,
}

impl Polls {
    /// A place to wait, unless too many wait already.
    pub(crate) fn enter(&self, node: &NodeName) -> Option<Place<'_>> {
        let mut waiting = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let all: usize = waiting.values().sum();
        let own = waiting.get(node).copied().unwrap_or(0);
        if all >= POLLS_MAX || own >= POLLS_PER_NODE {
            return None;
        }
        waiting.insert(node.clone(), own + 1);
        Some(Place { polls: self, node: node.clone() })
    }
}

impl Drop for Place<'_> {
    fn drop(&mut self) {
        let mut waiting = self.polls.0.lock().unwrap_or_else(PoisonError::into_inner);
        match waiting.get_mut(&self.node) {
            Some(count) if *count > 1 => *count -= 1,
            _ => {
                waiting.remove(&self.node);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use selvage_config::plan::Status;

    use super::*;
    use crate::state::NodeRecord;

    fn told(node: &str, generation: u64, port: u16) -> Arc<NodeRecord> {
        let status = Status {
            node: node.parse().unwrap(),
            region: "fra".parse().unwrap(),
            version: "1".into(),
            generation,
            replication: None,
            front: None,
            admin: None,
            apps: Vec::new(),
        };
        Arc::new(NodeRecord { status, replication: Some(([127, 0, 0, 1], port).into()) })
    }

    fn with(records: &Records, node: Arc<NodeRecord>) -> Records {
        let mut records = records.clone();
        records.nodes.insert(node.status.node.clone(), node);
        records
    }

    #[test]
    fn the_generation_grows_with_what_plans_say_and_nothing_else() {
        let none = Records::default();
        let one = with(&none, told("a", 0, 1));
        assert_eq!(next_generation(&none, &one), 1);
        let one = Records { generation: 1, ..one };
        assert_eq!(next_generation(&one, &with(&one, told("a", 1, 1))), 1);
        assert_eq!(next_generation(&one, &with(&one, told("a", 1, 2))), 2);
    }

    #[test]
    fn a_plan_names_all_peers_but_its_own_node() {
        let records = with(&with(&Records::default(), told("a", 0, 1)), told("b", 0, 2));
        let plan = records.plan(&"a".parse().unwrap(), Reader::Node);
        assert_eq!(plan.peers.iter().map(|peer| peer.node.as_str()).collect::<Vec<_>>(), ["b"]);
        assert_eq!(records.plan(&"c".parse().unwrap(), Reader::Node).peers.len(), 2);
    }

    #[test]
    fn after_a_loss_of_state_only_an_operator_makes_a_new_generation() {
        let lost = Records::default();
        let behind = with(&lost, told("a", 57, 1));
        assert_eq!(next_generation(&lost, &behind), 0);

        let mut released = behind.clone();
        let proposal = crate::releases::Proposal {
            app: "hello".parse().unwrap(),
            repository: "apps/hello".parse().unwrap(),
            manifest: selvage_config::Digest::of(b"m"),
            variables: BTreeMap::new(),
            hosts: Vec::new(),
            created_by: "ops".into(),
            created_ms: 1,
        };
        crate::releases::release(&mut released, proposal).unwrap();
        assert_eq!(next_generation(&behind, &released), 58);
    }

    #[test]
    fn one_node_cannot_take_every_place() {
        let polls = Polls::default();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let places: Vec<_> = (0..POLLS_PER_NODE).map(|_| polls.enter(&a).unwrap()).collect();
        assert!(polls.enter(&a).is_none());
        assert!(polls.enter(&b).is_some());
        drop(places);
        assert!(polls.enter(&a).is_some());
    }
}
