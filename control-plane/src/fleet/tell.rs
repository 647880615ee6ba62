//! What nodes tell. After a change of plans all of them tell at once: whoever comes first writes down what all those have
//! told who wait, in one change.

use std::net::{IpAddr, SocketAddr};
use std::sync::{Arc, OnceLock, PoisonError};
use std::time::Instant;

use selvage_config::plan::{ReleaseLoad, Status, StatusDelta, StatusDeltaError};
use selvage_config::{AppName, Digest, NodeName};

use super::{Fleet, GENERATION_MAX, NODES_MAX, STATUS_BYTES_MAX, StatusError};
use crate::journal::Told;
use crate::state::{NodeRecord, Records, StateError};

/// What a node told, and what became of it.
#[derive(Debug)]
pub(super) struct Telling {
    told: Arc<NodeRecord>,
    outcome: OnceLock<Outcome>,
}

#[derive(Debug, Clone, Copy)]
enum Outcome {
    Taken,
    /// There are too many nodes.
    Full,
    /// The disk did not take it.
    Failed,
}

impl Fleet {
    /// Takes in what a node tells. `from` is where it calls from: a node that listens at any address does not know
    /// how its peers reach it.
    pub(crate) fn tell(&self, mut status: Status, from: IpAddr) -> Result<(), StatusError> {
        if status.generation > GENERATION_MAX {
            return Err(StatusError::Generation { generation: status.generation });
        }
        let node = status.node.clone();
        let load = std::mem::take(&mut status.load);
        self.take_load(&node, load.clone());
        let reached = |mut address: SocketAddr| {
            if address.ip().is_unspecified() {
                address.set_ip(from.to_canonical());
            }
            // Nobody on another machine reaches a loopback address.
            (!address.ip().is_loopback() || from.to_canonical().is_loopback()).then_some(address)
        };
        let (replication, admin) =
            (status.replication.map(|a| reached(a).unwrap_or(a)), status.admin.and_then(reached));
        let told = Arc::new(NodeRecord { status, replication, admin });
        let is_news = !self.records().nodes.get(&node).is_some_and(|known| **known == *told);
        if is_news {
            let telling = Arc::new(Telling { told: Arc::clone(&told), outcome: OnceLock::new() });
            self.told.lock().unwrap_or_else(PoisonError::into_inner).push(Arc::clone(&telling));
            self.write_down_what_was_told();
            match telling.outcome.get() {
                Some(Outcome::Taken) => {}
                Some(Outcome::Full) => return Err(StatusError::Nodes),
                Some(Outcome::Failed) | None => return Err(StatusError::Unwritten),
            }
        }
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).insert(node, Instant::now());
        if let Some(journal) = self.state.journal() {
            journal.pass_on(&Told::new(&told, load, is_news, self.believed_by(&told.status.node)));
        }
        Ok(())
    }

    /// The status that a node has when what it tells has changed. It is on top of what is known here, or it is refused, and
    /// so it is where many small changes add up to more than may be told at once.
    pub(crate) fn status_with(&self, node: &NodeName, delta: StatusDelta) -> Result<Status, StatusError> {
        let known = self.records().nodes.get(node).cloned();
        let known = known.ok_or(StatusDeltaError::Base(delta.base))?;
        let digest = self.digest_of(node, &known);
        let is_news = delta.digest != digest;
        let status = known.status.with(delta, digest)?;
        let bytes = if is_news { serde_json::to_vec(&status).map_or(usize::MAX, |json| json.len()) } else { 0 };
        if bytes > STATUS_BYTES_MAX { Err(StatusError::Grown { bytes }) } else { Ok(status) }
    }

    /// The digest of what a node has told: counted once for each, since most of the time it says the same again.
    fn digest_of(&self, node: &NodeName, known: &Arc<NodeRecord>) -> Digest {
        let counted = self.digests.lock().unwrap_or_else(PoisonError::into_inner).get(node).cloned();
        if let Some((of, digest)) = counted
            && Arc::ptr_eq(&of, known)
        {
            return digest;
        }
        let digest = known.status.digest();
        self.digests.lock().unwrap_or_else(PoisonError::into_inner).insert(node.clone(), (Arc::clone(known), digest));
        digest
    }

    /// Takes in how releases do on a node, as far as they are being moved.
    pub(super) fn take_load(&self, node: &NodeName, load: Vec<ReleaseLoad>) {
        let records = self.records();
        let moves =
            |app: &AppName| records.apps.get(app).is_some_and(|app| app.running().is_some() || app.split.is_some());
        self.loads.take(node, load, moves);
    }

    /// Once it returns, everything that was told before it was called is written down, by this caller or another one.
    fn write_down_what_was_told(&self) {
        let _writing = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let all = std::mem::take(&mut *self.told.lock().unwrap_or_else(PoisonError::into_inner));
        if all.is_empty() {
            return;
        }
        let mut outcomes = self.write_down(&all);
        if outcomes.iter().all(|outcome| matches!(outcome, Outcome::Failed)) && all.len() > 1 {
            // One of them may be what can't be written now: a node that is new, while the journal is away.
            let each = all.iter().map(|telling| self.write_down(std::slice::from_ref(telling)));
            outcomes = each.flatten().collect();
        }
        for (telling, outcome) in all.iter().zip(outcomes) {
            // Nobody else has taken it out of the list.
            let _ = telling.outcome.set(outcome);
        }
        let records = self.records();
        // Where several tell nodes what to run, another one's news may have come to a node first.
        if records.is_behind() && self.state.journal().is_none() {
            let (told, own) = (records.told_generation(), records.generation);
            tracing::error!(told, own, "nodes know a newer plan than this control plane: was its state lost?");
        }
    }
}

impl Fleet {
    /// Writes down what was told, in one change.
    fn write_down(&self, all: &[Arc<Telling>]) -> Vec<Outcome> {
        let changed = self.change(|records| {
            let outcomes: Vec<Outcome> = all.iter().map(|telling| take(records, &telling.told)).collect();
            Ok::<_, StateError>(outcomes)
        });
        changed.map(|(outcomes, _)| outcomes).unwrap_or_else(|error| {
            tracing::error!(%error, nodes = all.len(), "what nodes told was not written down");
            vec![Outcome::Failed; all.len()]
        })
    }
}

fn take(records: &mut Records, told: &Arc<NodeRecord>) -> Outcome {
    let node = &told.status.node;
    if !records.nodes.contains_key(node) && records.nodes.len() >= NODES_MAX {
        return Outcome::Full;
    }
    records.nodes.insert(node.clone(), Arc::clone(told));
    Outcome::Taken
}
