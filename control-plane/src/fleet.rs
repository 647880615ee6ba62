//! The fleet: the one owner of the records. Every change goes through [`Fleet`], one at a time, and is on disk before
//! anybody sees it; where the state is shared, it is in the journal.

mod advance;
mod history;
mod homes;
mod load;
mod members;
mod others;
mod placements;
mod settle;
mod tell;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_config::join::Authorities;
use selvage_config::oci::Repository;
use selvage_config::operator::Operators;
use selvage_config::plan::{News, Plan, SILENT_MS, StatusDeltaError, Told};
use selvage_config::release::{Release, ReleaseId};
use selvage_config::signature::Envelope;
use selvage_config::snapshot::{REVOKED_MAX, Revoked};
use selvage_config::{AppName, Digest, NodeName, Region};
use tokio::sync::{Notify, watch};

use crate::answers::{NodeAnswer, Share};
use crate::audit::now_ms;
use crate::journal::JournalError;
use crate::plans::{Polls, Reader, Signer, next_generation};
use crate::releases::{self, Proposal, ReleaseError};
use crate::state::{KeyValue, NodeRecord, Order, Records, ReleaseRecord, State, StateError};

pub(crate) use advance::Moved;
pub(crate) use homes::Homes;
pub(crate) use members::{MemberError, Said};
pub(crate) use others::Followed;
pub use placements::PlacementError;
pub(crate) use placements::{Placements, Unsettled};

use history::History;
use load::Loads;
use settle::Peers;
use tell::Telling;

/// A status, told whole or made of what changed, bytes of JSON: 10,000 apps and a sentence for each.
pub(crate) const STATUS_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Nodes that are remembered.
const NODES_MAX: usize = 10_000;
/// Highest generation that a node is believed: JSON readers know no higher whole number.
const GENERATION_MAX: u64 = 1 << 53;
/// Bytes of a run's nonce before they are written in hexadecimal.
const NONCE_BYTES: usize = 16;

/// The records, and who waits for them to change.
#[derive(Debug)]
pub(crate) struct Fleet {
    state: Arc<State>,
    /// What plans have told of peers. Nobody holds it for longer than a look: the order of changes is the state's.
    peers: Mutex<Peers>,
    /// Told when peers have changed and no plan says so yet.
    pub(crate) unsettled: Notify,
    records: watch::Sender<Arc<Records>>,
    /// Digests of the statuses that are known, for those that tell what changed.
    digests: Mutex<BTreeMap<NodeName, (Arc<NodeRecord>, Digest)>>,
    /// What nodes have told and nobody has written down yet: at most one for each request under way.
    told: Mutex<Vec<Arc<Telling>>>,
    /// Held by whoever writes that down, until it is known what became of it.
    writing: Mutex<()>,
    /// The generation of the records. Who waits for a plan is not woken by what nodes tell.
    generations: watch::Sender<u64>,
    history: History,
    /// Names this run of the program, which alone remembers what its plans were.
    nonce: String,
    seen: Mutex<BTreeMap<NodeName, Instant>>,
    /// Which authorities nodes know, as they tell it.
    believed: Mutex<BTreeMap<NodeName, Authorities>>,
    polls: Polls,
    signer: Option<Signer>,
    loads: Loads,
    /// Since when nodes are heard: nobody is silent who could not have been heard yet.
    hears_since: Mutex<Instant>,
}

/// A change that was tried.
enum Tried<E> {
    /// It can't be, on these records.
    Refused(E),
    Unwritten(StateError),
}

/// Why a status was not taken.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StatusError {
    #[error("the status is of {told}, the certificate of {certified}")]
    Node { told: NodeName, certified: NodeName },
    #[error("the status is from region {told}, the certificate from {certified}")]
    Region { told: Region, certified: Region },
    #[error("generation {generation} can't be")]
    Generation { generation: u64 },
    #[error("there are {NODES_MAX} nodes")]
    Nodes,
    #[error("there is no node {node}")]
    NoNode { node: NodeName },
    #[error("what the node tells could not be written down")]
    Unwritten,
    #[error(transparent)]
    Changed(#[from] StatusDeltaError),
    #[error("what changed makes a status of {bytes} bytes, at most {STATUS_BYTES_MAX} may be told")]
    Grown { bytes: usize },
    #[error("node {node} is alive")]
    Alive { node: NodeName },
    #[error(transparent)]
    State(#[from] StateError),
}

/// Why nothing was revoked.
#[derive(Debug, thiserror::Error)]
pub(crate) enum RevokeError {
    #[error("{REVOKED_MAX} things are revoked already")]
    Full,
    #[error(transparent)]
    State(#[from] StateError),
}

/// What became of a poll.
#[derive(Debug)]
pub(crate) enum Polled {
    News(Box<News>),
    Nothing,
    TooMany,
}

impl Fleet {
    /// The fleet as it was remembered. Without a signer its plans are unsigned.
    pub(crate) fn open(state: Arc<State>, signer: Option<Signer>) -> Result<Self, StateError> {
        let records = Arc::new(state.load()?);
        let mut nonce = [0; NONCE_BYTES];
        SystemRandom::new().fill(&mut nonce).map_err(|_| StateError::Random)?;
        let history = History::default();
        history.note(&records);
        Ok(Self {
            state,
            peers: Mutex::new(Peers::new(&records)),
            unsettled: Notify::new(),
            digests: Mutex::default(),
            told: Mutex::default(),
            writing: Mutex::default(),
            generations: watch::Sender::new(records.generation),
            records: watch::Sender::new(records),
            history,
            nonce: nonce.iter().map(|byte| format!("{byte:02x}")).collect(),
            seen: Mutex::default(),
            believed: Mutex::default(),
            polls: Polls::default(),
            signer,
            loads: Loads::default(),
            hears_since: Mutex::new(Instant::now()),
        })
    }

    /// Has plans tell nodes of these operators; waits on the disk. It is done under the signature alone: a plan without
    /// says nothing of them. Whoever starts last has its own told, and nobody writes them again because they differ.
    pub(crate) fn tell_of(&self, operators: &Operators) -> Result<(), StateError> {
        let operators = self.signer.is_some().then(|| Arc::new(operators.clone()));
        if self.records().operators == operators {
            return Ok(());
        }
        self.change(|records| {
            records.operators.clone_from(&operators);
            Ok(())
        })
        .map(|((), _)| ())
    }

    /// The records as they are now.
    pub(crate) fn records(&self) -> Arc<Records> {
        Arc::clone(&self.records.borrow())
    }

    /// All rows of these records, as they lie on the disk.
    pub(crate) fn rows(&self, records: &Records) -> Result<Vec<KeyValue>, StateError> {
        self.state.rows(records)
    }

    /// Which key seals them.
    pub(crate) fn sealing_key(&self) -> &str {
        self.state.sealing_key()
    }

    /// Makes one change; waits on the disk, and on the journal if there is one. Nothing changes if `change` fails. What
    /// other control planes changed meanwhile comes first, and `change` is then tried on that: it is made, or refused, as
    /// if all had come one after the other.
    fn change<T, E: From<StateError>>(&self, change: impl Fn(&mut Records) -> Result<T, E>) -> Result<(T, u64), E> {
        let until = Instant::now() + self.state.contend();
        loop {
            let (base, tried) = {
                let order = self.state.order();
                (self.state.applied(), self.change_under(&order, &change))
            };
            match tried {
                Ok(changed) => return Ok(changed),
                Err(Tried::Refused(error)) => {
                    if self.state.is_current(base)? {
                        return Err(error);
                    }
                }
                Err(Tried::Unwritten(StateError::Journal(JournalError::Stale))) => self.state.wait_past(base)?,
                Err(Tried::Unwritten(error)) => return Err(error.into()),
            }
            if Instant::now() > until {
                let why = "other control planes change too much at once";
                return Err(StateError::from(JournalError::Away(why.into())).into());
            }
        }
    }

    /// The same, once, for who holds the lock.
    fn change_under<T, E: From<StateError>>(
        &self,
        order: &Order<'_>,
        change: &impl Fn(&mut Records) -> Result<T, E>,
    ) -> Result<(T, u64), Tried<E>> {
        let before = self.records();
        let mut after = (*before).clone();
        let value = change(&mut after).map_err(Tried::Refused)?;
        let news = next_generation(&before, &after);
        let may_wait = news != before.generation && before.is_told_as(&after) && self.peers().may_wait(&after);
        // A change that makes a generation of its own is told now, whatever it is of.
        after.generation = after.generation.max(if may_wait { before.generation } else { news });
        let generation = after.generation;
        self.state.save(&before, &after).map_err(Tried::Unwritten)?;
        self.show(order, &before, after);
        Ok((value, generation))
    }

    /// Shows everybody what was written down, here or by another control plane.
    fn show(&self, _order: &Order<'_>, before: &Records, after: Records) {
        let generation = after.generation;
        if generation != before.generation {
            self.peers().settled();
        } else if next_generation(before, &after) != generation {
            self.peers().unsettle();
            self.unsettled.notify_one();
        }
        let after = Arc::new(after);
        if generation != before.generation || after.is_behind() {
            self.history.note(&after);
        }
        self.records.send_replace(after);
        if generation != before.generation {
            self.generations.send_replace(generation);
        }
    }

    /// Makes a release current. Answers whether it is new, and the generation that names it.
    pub(crate) fn release(&self, proposal: &Proposal) -> Result<((Release, bool), u64), ReleaseError> {
        self.change(|records| releases::release(records, proposal.clone()))
    }

    /// Takes the last move back, or goes to an earlier release.
    pub(crate) fn rollback(
        &self,
        app: &AppName,
        to: Option<u32>,
        reason: &str,
    ) -> Result<(Release, u64), ReleaseError> {
        self.change(|records| releases::rollback(records, app, to, reason))
    }

    /// Lets a release serve a part of the visitors, or no longer.
    pub(crate) fn split(&self, id: &ReleaseId, share: Option<&Share>) -> Result<(Release, u64), ReleaseError> {
        self.change(|records| releases::split(records, id, share.cloned()))
    }

    /// Sets a secret of an app, or takes it away. Nodes that run the app get it at once.
    pub(crate) fn secret(&self, app: &AppName, name: &str, value: Option<&str>) -> Result<u64, ReleaseError> {
        self.change(|records| releases::secret(records, app, name, value.map(str::to_owned)))
            .map(|((), generation)| generation)
    }

    /// Takes an app off all plans.
    pub(crate) fn remove(&self, app: &AppName) -> Result<u64, ReleaseError> {
        self.change(|records| releases::remove(records, app)).map(|((), generation)| generation)
    }

    /// Makes sure that something never runs again. Whether it was not so before, and the generation that says it.
    pub(crate) fn revoke(&self, what: &Revoked) -> Result<(bool, u64), RevokeError> {
        self.change(|records| {
            let mut revoked = (*records.revoked).clone();
            let is_new = revoked.extend(what);
            if revoked.len() > REVOKED_MAX {
                return Err(RevokeError::Full);
            }
            records.revoked = Arc::new(revoked);
            Ok(is_new)
        })
    }

    /// The signed list of what plans may name now. None: plans are not signed here.
    pub(crate) fn snapshot(&self) -> Option<Envelope> {
        self.signer.as_ref()?.snapshot(&self.records(), now_ms()).map(|signed| signed.envelope.clone())
    }

    /// What signs plans, if anything does.
    pub(crate) fn signer(&self) -> Option<&Signer> {
        self.signer.as_ref()
    }

    /// A release that is kept and runs this manifest, if any does: it can be gone back to.
    pub(crate) fn needing(&self, repository: &Repository, manifest: &Digest) -> Option<ReleaseId> {
        let records = self.records();
        let mut releases = records.apps.values().flat_map(|app| app.releases.values());
        let needs =
            |record: &&ReleaseRecord| (&record.release.repository, &record.release.manifest) == (repository, manifest);
        releases.find(needs).map(|record| record.release.id.clone())
    }

    /// The manifests of all releases that are kept.
    pub(crate) fn needed(&self) -> BTreeSet<(Repository, Digest)> {
        let records = self.records();
        let releases = records.apps.values().flat_map(|app| app.releases.values());
        releases.map(|record| (record.release.repository.clone(), record.release.manifest)).collect()
    }

    /// Forgets a node that is gone for good: the others stop replicating with it.
    pub(crate) fn forget(&self, node: &NodeName) -> Result<u64, StatusError> {
        if self.seen_ago(node).is_some_and(is_recent) {
            return Err(StatusError::Alive { node: node.clone() });
        }
        let ((), generation) = self.change(|records| match records.nodes.remove(node) {
            Some(_) => {
                // That its certificates are worth nothing stays true when it is gone.
                let is_revoked = records.is_revoked(node);
                if !is_revoked {
                    records.members.remove(node);
                }
                Ok(())
            }
            None => Err(StatusError::NoNode { node: node.clone() }),
        })?;
        self.seen.lock().unwrap_or_else(PoisonError::into_inner).remove(node);
        self.digests.lock().unwrap_or_else(PoisonError::into_inner).remove(node);
        Ok(generation)
    }

    fn seen_ago(&self, node: &NodeName) -> Option<Duration> {
        let seen = self.seen.lock().unwrap_or_else(PoisonError::into_inner);
        seen.get(node).map(Instant::elapsed)
    }

    /// A node tells which authorities it knows.
    pub(crate) fn believes(&self, node: &NodeName, authorities: Option<Authorities>) {
        let mut believed = self.believed.lock().unwrap_or_else(PoisonError::into_inner);
        match authorities {
            Some(authorities) if believed.contains_key(node) || believed.len() < NODES_MAX => {
                believed.insert(node.clone(), authorities);
            }
            _ => {
                believed.remove(node);
            }
        }
    }

    /// Which authorities a node has told that it knows.
    fn believed_by(&self, node: &NodeName) -> Option<Authorities> {
        self.believed.lock().unwrap_or_else(PoisonError::into_inner).get(node).copied()
    }

    /// Whether a node is known, and its certificates are worth something.
    pub(crate) fn is_registered(&self, node: &NodeName) -> bool {
        let records = self.records();
        (records.nodes.contains_key(node) || records.members.contains_key(node)) && !records.is_revoked(node)
    }

    /// Every node, with how long ago it was heard of, and how it stands with the authorities that the fleet has now.
    pub(crate) fn nodes(&self, now: Option<Authorities>) -> Vec<NodeAnswer> {
        let records = self.records();
        let believed = self.believed.lock().unwrap_or_else(PoisonError::into_inner).clone();
        let answer = |node: &Arc<NodeRecord>| {
            let ago = self.seen_ago(&node.status.node);
            let member = records.members.get(&node.status.node).map(|member| &**member);
            let both = now.zip(believed.get(&node.status.node).copied());
            NodeAnswer {
                believes_authorities: both.map(|(fleet, own)| fleet.believed == own.believed),
                certificate_is_current: both.map(|(fleet, own)| fleet.issuing == own.issuing),
                labels: records.labels(&node.status.node),
                cordoned: member.is_some_and(|member| member.cordon.is_some()),
                draining: member.is_some_and(|member| member.drain),
                revoked: member.is_some_and(|member| member.revoked),
                status: node.status.clone(),
                seen_ms_ago: ago.map(|ago| u64::try_from(ago.as_millis()).unwrap_or(u64::MAX)),
                alive: ago.is_some_and(is_recent),
            }
        };
        records.nodes.values().map(answer).collect()
    }

    /// The plan of `node` once it is newer than `after`, or nothing when `wait` is over or the control plane stops. Who
    /// gives the nonce of a plan that came from here is told what changed.
    pub(crate) async fn poll(
        &self,
        node: &NodeName,
        reader: Reader,
        (after, nonce): (Option<u64>, Option<&str>),
        wait: Duration,
        mut stopping: watch::Receiver<bool>,
    ) -> Polled {
        let is_news = |generation: u64| after.is_none_or(|after| generation > after);
        let mut generations = self.generations.subscribe();
        let generation = *generations.borrow_and_update();
        if !is_news(generation) {
            let Some(_place) = self.polls.enter(node) else { return Polled::TooMany };
            let news = async { generations.wait_for(|generation| is_news(*generation)).await.is_ok() };
            let stop = async { stopping.wait_for(|stopping| *stopping).await.is_ok() };
            // Both only wait, so dropping either loses nothing.
            let came = tokio::select! {
                came = tokio::time::timeout(wait, news) => came.unwrap_or(false),
                _ = stop => false,
            };
            if !came {
                return Polled::Nothing;
            }
        }
        let records = self.history.told(self.records());
        let signed = self.signer.as_ref().and_then(|signer| Some((signer, signer.snapshot(&records, now_ms())?)));
        let is_ours = reader == Reader::Node && nonce == Some(self.nonce.as_str());
        let signer = signed.as_ref().map(|(signer, signed)| (*signer, &**signed));
        let changes = after.filter(|_| is_ours).and_then(|after| self.history.since(after, &records, signer));
        let plan = match changes {
            Some(changes) => Told::Delta(Box::new(changes.of(node))),
            None => {
                let snapshot = signed.map(|(_, signed)| signed.envelope.clone());
                Told::Whole(Box::new(Plan { snapshot, ..records.plan(node, reader) }))
            }
        };
        Polled::News(Box::new(News { nonce: self.nonce.clone(), plan }))
    }
}

fn is_recent(ago: Duration) -> bool {
    ago <= Duration::from_millis(SILENT_MS)
}
