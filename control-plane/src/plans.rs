//! Plans: what each node shall run, who signs it, and how a node waits for the next one.

mod delta;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use selvage_config::control_plane::PlanSigning;
use selvage_config::key::KeyError;
use selvage_config::plan::{Candidate, Plan};
use selvage_config::release::Release;
use selvage_config::root::{ROOT_BYTES_MAX, ROOTS_MAX, Root, RootError};
use selvage_config::signature::Envelope;
use selvage_config::snapshot::Snapshot;
use selvage_config::{AppName, NodeName, PrivateKey};

use crate::answers::hidden;
use crate::state::{AppRecord, MemberRecord, NodeRecord, Records, ReleaseRecord, SplitRecord};

pub(crate) use delta::Changes;

/// Polls for one node's plan that wait at once: the node's own, one that it gave up on, and people's.
const POLLS_PER_NODE: usize = 8;
/// Polls that wait at once.
const POLLS_MAX: usize = 8_192;

/// A signature is as young as a sixteenth of the time that it holds, or it is made anew: nodes ask at half of it.
const REISSUE_PART: u64 = 16;

/// Who a plan is for: a node is told the values of variables, people are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Reader {
    Node,
    Operator,
}

impl AppRecord {
    /// What `node` shall run of this app: a release, and a second one beside it.
    fn placed(&self, app: &AppName, node: &NodeName, member: Option<&MemberRecord>) -> Option<Placed<'_>> {
        let running = self.running();
        if self.current.is_none() && running.is_none() {
            return None;
        }
        if let Some(cordon) = member.and_then(|member| member.cordon.as_ref()) {
            // It keeps what it has for as long as that is there.
            let kept = cordon.get(app)?;
            let release = self.releases.get(kept).or_else(|| self.current())?;
            return Some(Placed { release, split: None });
        }
        let taken = running.filter(|rollout| rollout.taken.contains(node));
        let release = match taken {
            Some(rollout) => self.releases.get(&rollout.to)?,
            None => self.current()?,
        };
        Some(Placed { release, split: self.split.as_ref().filter(|_| running.is_none()) })
    }
}

impl AppRecord {
    /// A release as it is told to `reader`.
    fn told(&self, record: &ReleaseRecord, reader: Reader) -> Release {
        match reader {
            Reader::Node => self.delivered(record),
            Reader::Operator => hidden(&self.delivered(record)),
        }
    }

    /// What serves beside the release.
    fn beside(&self, placed: &Placed<'_>, reader: Reader) -> Option<Candidate> {
        let SplitRecord { release, percent, key, named } = placed.split?;
        let release = self.told(self.releases.get(release)?, reader);
        Some(Candidate { release, percent: *percent, key: key.clone(), named: *named })
    }

    /// Whether a node tells how the app does.
    fn is_watched(&self, placed: &Placed<'_>) -> bool {
        placed.split.is_some() || self.running().is_some()
    }
}

/// What a node shall run of one app.
struct Placed<'r> {
    release: &'r ReleaseRecord,
    split: Option<&'r SplitRecord>,
}

impl Records {
    /// What `node` shall run.
    pub(crate) fn plan(&self, node: &NodeName, reader: Reader) -> Plan {
        let member = self.members.get(node).map(|member| &**member);
        let mut plan = Plan {
            node: node.clone(),
            generation: self.generation,
            releases: Vec::new(),
            peers: self.peers().filter(|peer| peer.node != *node).collect(),
            snapshot: None,
            candidates: Vec::new(),
            watched: Vec::new(),
            drain: member.is_some_and(|member| member.drain),
            homes: self.homes.values().cloned().collect(),
            placements: self.placements.values().cloned().collect(),
        };
        for (name, app) in &self.apps {
            let Some(placed) = app.placed(name, node, member) else { continue };
            plan.releases.push(app.told(placed.release, reader));
            plan.candidates.extend(app.beside(&placed, reader));
            if app.is_watched(&placed) {
                plan.watched.push(name.clone());
            }
        }
        plan
    }

    /// Where `node` stands with an app, if it shall run it.
    fn placed_on(&self, node: &NodeName, app: &AppName) -> Option<(&AppRecord, Placed<'_>)> {
        let record = self.apps.get(app)?;
        let placed = record.placed(app, node, self.members.get(node).map(|member| &**member))?;
        Some((record, placed))
    }

    /// The release of an app that `node` shall run.
    fn release_on(&self, node: &NodeName, app: &AppName) -> Option<Release> {
        self.placed_on(node, app).map(|(record, placed)| record.told(placed.release, Reader::Node))
    }

    /// Whether the nodes are the same, and where they were. Most records are the very same ones.
    pub(crate) fn has_same_nodes(&self, other: &Self) -> bool {
        type Told<'r> = (&'r NodeName, &'r Arc<NodeRecord>);
        let is_same_node = |((a, before), (b, after)): (Told<'_>, Told<'_>)| {
            a == b && (Arc::ptr_eq(before, after) || before.is_same_peer(after))
        };
        self.nodes.len() == other.nodes.len() && self.nodes.iter().zip(&other.nodes).all(is_same_node)
    }

    /// Whether the same nodes replicate, and where they were.
    fn has_same_peers(&self, other: &Self) -> bool {
        let revoked = |records: &Self| {
            let revoked = records.members.iter().filter(|(_, member)| member.revoked);
            revoked.map(|(node, _)| node.clone()).collect::<Vec<_>>()
        };
        (self.has_same_nodes(other) && revoked(self) == revoked(other)) || self.peers().eq(other.peers())
    }

    /// Which release of each app `node` shall run: what it keeps if it is cordoned now.
    pub(crate) fn numbers(&self, node: &NodeName) -> BTreeMap<AppName, u32> {
        let plan = self.plan(node, Reader::Operator);
        plan.releases.into_iter().map(|release| (release.id.app, release.id.number)).collect()
    }

    /// Whether `other` says the same of apps and nodes as these: what only operators and rollouts change.
    pub(crate) fn is_told_as(&self, other: &Self) -> bool {
        let apps = self.apps.len() == other.apps.len()
            && self.apps.iter().all(|(name, app)| {
                other.apps.get(name).is_some_and(|found| Arc::ptr_eq(app, found) || app.plans_as(found))
            });
        let placing = |records: &Self| {
            let said = records.members.iter().filter(|(_, member)| member.cordon.is_some() || member.drain);
            said.map(|(name, member)| (name.clone(), member.cordon.clone(), member.drain)).collect::<Vec<_>>()
        };
        apps && placing(self) == placing(other) && self.revoked == other.revoked
    }

    /// Whether a node has taken in a newer plan than these records ever made: they are an old copy, or lost.
    pub(crate) fn is_behind(&self) -> bool {
        self.told_generation() > self.generation
    }
}

/// The generation that follows a change from `before` to `after`.
///
/// When the state was lost, nodes know generations that are yet to come. Their peers' addresses trickle in, and the
/// operators of the configuration are told; these must
/// not add up to a generation that a node takes in, for its plan would hold no app: so only an operator's act counts
/// then, and it goes past every generation that a node has told.
pub(crate) fn next_generation(before: &Records, after: &Records) -> u64 {
    if !before.is_told_as(after) {
        return before.generation.max(after.told_generation()).saturating_add(1);
    }
    let has_same_stores = before.homes == after.homes && before.placements == after.placements;
    let is_same = before.has_same_peers(after) && before.operators == after.operators && has_same_stores;
    let is_news = !is_same && !after.is_behind();
    if is_news { before.generation.saturating_add(1) } else { before.generation }
}

/// Signs what plans may name, under the fleet's root.
#[derive(Debug)]
pub(crate) struct Signer {
    key: PrivateKey,
    namespace: String,
    lifetime_ms: u64,
    roots: Vec<(u64, Envelope)>,
    last: Mutex<Option<Arc<Signed>>>,
}

/// The newest snapshot: one for all nodes, until the records change or it is no longer young.
#[derive(Debug)]
pub(crate) struct Signed {
    pub(crate) snapshot: Snapshot,
    pub(crate) envelope: Envelope,
}

/// Why plans can't be signed.
#[derive(Debug, thiserror::Error)]
pub enum SignerError {
    /// A file can't be read.
    #[error("read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The key is none.
    #[error("plans' key {path}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: KeyError,
    },
    /// A file is no envelope.
    #[error("{path} is no signed root")]
    Envelope {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// A root is not signed, or does not follow the one before.
    #[error("root {path}")]
    Root {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: RootError,
    },
    /// Too many roots.
    #[error("{0} roots, the most is {ROOTS_MAX}")]
    Roots(usize),
    /// The newest root does not name the key: every node would refuse what it signs.
    #[error("root {version} does not name the plans' key {key}")]
    Unnamed {
        /// The newest root's version.
        version: u64,
        /// The key's id.
        key: selvage_config::KeyId,
    },
}

fn file(path: &Path, bytes_max: usize) -> Result<Vec<u8>, SignerError> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(bytes_max as u64).read_to_end(&mut bytes));
    read.map_err(|source| SignerError::File { path: path.to_owned(), source })?;
    Ok(bytes)
}

impl Signer {
    /// Which key signs, for people and for other control planes.
    pub(crate) fn key_id(&self) -> String {
        self.key.public().id().to_string()
    }

    /// Reads the key and the chain of roots, as strictly as a node will.
    pub(crate) fn load(config: &PlanSigning) -> Result<Self, SignerError> {
        let path = config.key.clone();
        let key = PrivateKey::from_pem(&file(&path, ROOT_BYTES_MAX)?);
        let key = key.map_err(|source| SignerError::Key { path, source })?;
        if config.roots.len() > ROOTS_MAX {
            return Err(SignerError::Roots(config.roots.len()));
        }
        let mut newest: Option<Root> = None;
        let mut roots = Vec::new();
        for path in &config.roots {
            let envelope: Envelope = serde_json::from_slice(&file(path, ROOT_BYTES_MAX)?)
                .map_err(|source| SignerError::Envelope { path: path.clone(), source })?;
            let root = newest.as_ref().map_or_else(|| Root::first(&envelope), |before| before.next(&envelope));
            let root = root.map_err(|source| SignerError::Root { path: path.clone(), source })?;
            roots.push((root.version, envelope));
            newest = Some(root);
        }
        let (public, newest) = (key.public(), newest.ok_or(SignerError::Roots(0))?);
        if !newest.plan_keys.contains(&public) {
            return Err(SignerError::Unnamed { version: newest.version, key: public.id() });
        }
        let lifetime_ms = config.lifetime_s.saturating_mul(1_000);
        Ok(Self { key, namespace: newest.namespace, lifetime_ms, roots, last: Mutex::default() })
    }

    /// The signed list of what plans of these records may name. None: the system gave no random bytes.
    pub(crate) fn snapshot(&self, records: &Records, now_ms: u64) -> Option<Arc<Signed>> {
        let mut last = self.last.lock().unwrap_or_else(PoisonError::into_inner);
        let is_young = |signed: &&Arc<Signed>| {
            let age = now_ms.abs_diff(signed.snapshot.issued_ms);
            signed.snapshot.version == records.generation && age < self.lifetime_ms / REISSUE_PART
        };
        if let Some(signed) = last.as_ref().filter(is_young) {
            return Some(Arc::clone(signed));
        }
        let snapshot = self.content(records, now_ms);
        let mut envelope = snapshot.envelope();
        if let Err(error) = envelope.sign(&self.key) {
            tracing::error!(%error, "plans can't be signed");
            return None;
        }
        let signed = Arc::new(Signed { snapshot, envelope });
        *last = Some(Arc::clone(&signed));
        Some(signed)
    }

    /// The list of what plans of these records may name, unsigned.
    fn content(&self, records: &Records, now_ms: u64) -> Snapshot {
        Snapshot {
            namespace: self.namespace.clone(),
            version: records.generation,
            issued_ms: now_ms,
            expires_ms: now_ms.saturating_add(self.lifetime_ms),
            resources: records.nameable().map(|release| (release.id.clone(), release.manifest)).collect(),
            revoked: records.revoked.as_ref().clone(),
            operators: records.operators.as_deref().cloned(),
        }
    }

    /// The roots that follow `version`, oldest first.
    pub(crate) fn roots_after(&self, version: u64) -> Vec<&Envelope> {
        self.roots.iter().filter(|(own, _)| *own > version).map(|(_, envelope)| envelope).collect()
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
pub(crate) mod tests {
    use selvage_config::plan::Status;

    use super::*;

    pub(crate) fn told(node: &str, generation: u64, port: u16) -> Arc<NodeRecord> {
        let status = Status {
            node: node.parse().unwrap(),
            region: "fra".parse().unwrap(),
            version: "1".into(),
            generation,
            replication: None,
            front: None,
            admin: None,
            apps: Vec::new(),
            plan: None,
            load: Vec::new(),
            labels: BTreeMap::new(),
        };
        Arc::new(NodeRecord { status, replication: Some(([127, 0, 0, 1], port).into()), admin: None })
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
        let proposal = crate::releases::tests::proposal("hello", "m");
        crate::releases::release(&mut released, proposal).unwrap();
        assert_eq!(next_generation(&behind, &released), 58);
    }

    fn signer(lifetime_s: u64) -> (tempfile::TempDir, Result<Signer, SignerError>, PrivateKey) {
        let dir = tempfile::tempdir().unwrap();
        let (offline, key) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let root = Root::initial("test".into(), vec![offline.public()], vec![key.public()]);
        let mut envelope = root.envelope().unwrap();
        envelope.sign(&offline).unwrap();
        let paths = (dir.path().join("plan.key"), dir.path().join("root-1.json"));
        std::fs::write(&paths.0, key.to_pem()).unwrap();
        std::fs::write(&paths.1, serde_json::to_vec(&envelope).unwrap()).unwrap();
        let signer = Signer::load(&PlanSigning { key: paths.0, roots: vec![paths.1], lifetime_s });
        (dir, signer, offline)
    }

    #[test]
    fn a_snapshot_is_signed_once_for_all_nodes_and_anew_before_it_is_old() {
        let (_dir, signer, _) = signer(160);
        let (signer, records) = (signer.unwrap(), Records { generation: 3, ..Records::default() });
        let at = |ms| signer.snapshot(&records, ms).unwrap().envelope.clone();
        let first = at(1_000);
        assert_eq!(at(10_000), first);
        assert_ne!(at(11_000), first);
        let changed = Records { generation: 4, ..Records::default() };
        assert_ne!(signer.snapshot(&changed, 11_000).unwrap().envelope, at(11_000));
        let root = Root::first(&signer.roots[0].1).unwrap();
        let snapshot = Snapshot::signed(&first, &root).unwrap();
        assert_eq!((snapshot.version, snapshot.issued_ms, snapshot.expires_ms), (3, 1_000, 161_000));
        assert_eq!((signer.roots_after(0).len(), signer.roots_after(1).len()), (1, 0));
    }

    #[test]
    fn a_key_that_the_root_does_not_name_signs_nothing() {
        let (dir, good, _) = signer(60);
        assert!(good.is_ok());
        let other = PrivateKey::generate().unwrap();
        std::fs::write(dir.path().join("plan.key"), other.to_pem()).unwrap();
        let config = PlanSigning {
            key: dir.path().join("plan.key"),
            roots: vec![dir.path().join("root-1.json")],
            lifetime_s: 60,
        };
        assert!(matches!(Signer::load(&config), Err(SignerError::Unnamed { version: 1, .. })));
        let twice = PlanSigning { roots: vec![dir.path().join("root-1.json"); 2], ..config };
        assert!(matches!(Signer::load(&twice), Err(SignerError::Root { .. })));
    }

    #[test]
    fn a_revocation_makes_a_new_generation() {
        let none = Records::default();
        let mut revoked = selvage_config::snapshot::Revoked::default();
        revoked.digests.insert(selvage_config::Digest::of(b"bad"));
        let after = Records { revoked: Arc::new(revoked), ..none.clone() };
        assert_eq!(next_generation(&none, &after), 1);
    }

    #[test]
    fn a_home_makes_a_new_generation_and_every_plan_names_it() {
        let none = Records::default();
        let home = selvage_config::plan::Home::first("a/b".parse().unwrap(), "fra-1".parse().unwrap(), 7);
        let homes = Arc::new([(home.store.clone(), home.clone())].into());
        let after = Records { homes, ..none.clone() };
        assert_eq!(next_generation(&none, &after), 1);
        assert_eq!(after.plan(&"x".parse().unwrap(), Reader::Node).homes, [home]);
    }

    #[test]
    fn a_placement_makes_a_new_generation_and_every_plan_names_it() {
        let none = Records::default();
        let placement = selvage_config::plan::Placement {
            name: "eu".parse().unwrap(),
            regions: ["fra".parse().unwrap()].into(),
            stores: [("a/b".parse().unwrap(), 0)].into(),
        };
        let placements = Arc::new([(placement.name.clone(), placement.clone())].into());
        let after = Records { placements, ..none.clone() };
        assert_eq!(next_generation(&none, &after), 1);
        assert_eq!(after.plan(&"x".parse().unwrap(), Reader::Node).placements, [placement]);
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
