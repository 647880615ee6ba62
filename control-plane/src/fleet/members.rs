//! What operators say of nodes: who may join, who is cordoned, drained or revoked.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_config::rollout::is_label_text;
use selvage_config::{Digest, NodeName, Region};

use super::Fleet;
use crate::state::{JoinRecord, MemberRecord, Records, StateError};

/// Join tokens that wait to be used.
const JOINS_MAX: usize = 1_000;
/// Labels of one node.
const LABELS_MAX: usize = 32;
/// Nodes of which operators have said something.
const MEMBERS_MAX: usize = 20_000;

/// Why a node was not changed.
#[derive(Debug, thiserror::Error)]
pub(crate) enum MemberError {
    #[error("there is no node {0}")]
    NoNode(NodeName),
    #[error("there are {JOINS_MAX} join tokens that nobody has used")]
    Joins,
    #[error("there are {MEMBERS_MAX} nodes, those that left included")]
    Members,
    #[error("labels are up to {LABELS_MAX} names and values of letters, digits, '-', '_', '.' and '/'")]
    Labels,
    #[error("the join token is not good: used, expired, or never made")]
    Token,
    #[error("the join token is for another name than {0}")]
    Name(NodeName),
    #[error("there is a node {0} already")]
    Taken(NodeName),
    #[error("there is no join token {0}")]
    NoToken(String),
    #[error(transparent)]
    State(#[from] StateError),
}

/// What is said of a node.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Said {
    /// It keeps what it has, and rollouts pass it by.
    Cordon,
    Uncordon,
    /// It shall be sent no requests.
    Drain,
    Undrain,
    /// Its certificates are worth nothing any more.
    Revoke,
    /// Its labels, all of them.
    Labels(BTreeMap<String, String>),
}

impl Fleet {
    /// Says something of a node. Answers what was said before and is said now, for the audit log.
    pub(crate) fn say(&self, node: &NodeName, said: &Said) -> Result<(MemberRecord, MemberRecord), MemberError> {
        let change = |records: &mut Records| {
            if !records.nodes.contains_key(node) && !records.members.contains_key(node) {
                return Err(MemberError::NoNode(node.clone()));
            }
            let numbers = records.numbers(node);
            let member = member(records, node)?;
            let before = member.clone();
            match said {
                Said::Cordon => drop(member.cordon.get_or_insert(numbers)),
                Said::Uncordon => member.cordon = None,
                Said::Drain => member.drain = true,
                Said::Undrain => member.drain = false,
                Said::Revoke => member.revoked = true,
                Said::Labels(labels) => {
                    check_labels(labels)?;
                    member.labels.clone_from(labels);
                }
            }
            Ok((before, member.clone()))
        };
        self.change(change).map(|(both, _)| both)
    }

    /// Remembers a join token.
    pub(crate) fn allow_join(&self, id: &str, join: JoinRecord, now_ms: u64) -> Result<(), MemberError> {
        check_labels(&join.labels)?;
        let join = Arc::new(join);
        let change = |records: &mut Records| {
            records.joins.retain(|_, join| join.ends_ms > now_ms);
            if records.joins.len() >= JOINS_MAX {
                return Err(MemberError::Joins);
            }
            records.joins.insert(id.to_owned(), Arc::clone(&join));
            Ok(())
        };
        self.change(change).map(|((), _)| ())
    }

    /// Takes a join token back.
    pub(crate) fn forbid_join(&self, id: &str) -> Result<(), MemberError> {
        let change = |records: &mut Records| match records.joins.remove(id) {
            Some(_) => Ok(()),
            None => Err(MemberError::NoToken(id.to_owned())),
        };
        self.change(change).map(|((), _)| ())
    }

    /// Where a join token would let `node` stand, if it is good.
    pub(crate) fn may_join(
        &self,
        id: &str,
        secret: &Digest,
        node: &NodeName,
        now_ms: u64,
    ) -> Result<Region, MemberError> {
        joinable(&self.records(), id, secret, node, now_ms).map(|join| join.region.clone())
    }

    /// Uses a join token up: `node` is one of the fleet from now on. Answers its labels.
    pub(crate) fn join(
        &self,
        id: &str,
        secret: &Digest,
        node: &NodeName,
        now_ms: u64,
    ) -> Result<BTreeMap<String, String>, MemberError> {
        let change = |records: &mut Records| {
            let join = joinable(records, id, secret, node, now_ms)?;
            records.joins.remove(id);
            let member = member(records, node)?;
            *member = MemberRecord {
                region: Some(join.region.clone()),
                labels: join.labels.clone(),
                joined_ms: Some(now_ms),
                ..MemberRecord::default()
            };
            Ok(join.labels.clone())
        };
        self.change(change).map(|(labels, _)| labels)
    }
}

fn joinable(
    records: &Records,
    id: &str,
    secret: &Digest,
    node: &NodeName,
    now_ms: u64,
) -> Result<Arc<JoinRecord>, MemberError> {
    let join = records.joins.get(id).filter(|join| join.digest == *secret && join.ends_ms > now_ms);
    let join = join.ok_or(MemberError::Token)?;
    match &join.node {
        Some(only) if only != node => Err(MemberError::Name(node.clone())),
        // A token that names the node was made for it: to come back with a new certificate, too.
        None if records.nodes.contains_key(node) || records.members.contains_key(node) => {
            Err(MemberError::Taken(node.clone()))
        }
        _ => Ok(Arc::clone(join)),
    }
}

fn member<'r>(records: &'r mut Records, node: &NodeName) -> Result<&'r mut MemberRecord, MemberError> {
    if !records.members.contains_key(node) && records.members.len() >= MEMBERS_MAX {
        return Err(MemberError::Members);
    }
    Ok(Arc::make_mut(records.members.entry(node.clone()).or_default()))
}

fn check_labels(labels: &BTreeMap<String, String>) -> Result<(), MemberError> {
    let is_fine = labels.len() <= LABELS_MAX
        && labels.iter().all(|(name, value)| is_label_text(name) && is_label_text(value) && name != "region");
    if is_fine { Ok(()) } else { Err(MemberError::Labels) }
}
