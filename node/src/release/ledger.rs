//! What makes this node sure that a plan is new: the chain of roots, the newest snapshot, and all that was ever revoked.
//!
//! The root in the node's file is trusted because it is there; every later one because the one before signed it. A
//! snapshot is taken if a plan key of the newest root signed it, if it is not older than the highest one that was ever
//! taken, and if it has not ended. That highest version outlives the program, and so does what was revoked: neither an
//! old copy of the control plane nor one of this disk's other files brings anything back. When the fleet's plans got
//! all new keys, the versions begin anew: so a thief of the old key who signed a version beyond all others is overcome.

use std::collections::BTreeSet;
use std::sync::{Arc, Mutex, PoisonError};

use selvage_config::operator::OperatorRights;
use selvage_config::plan::{Plan, PlanRefusal, PlanStatus};
use selvage_config::release::Release;
use selvage_config::root::{Root, RootError};
use selvage_config::signature::Envelope;
use selvage_config::snapshot::{REVOKED_MAX, Revoked, Snapshot, SnapshotError};
use selvage_config::{KeyId, PublicKey};
use serde::{Deserialize, Serialize};

use super::state::{State, StateError};

/// Most revoked things that are remembered. Nothing is forgotten to make place: a thief of a plan key could fill it.
const REMEMBERED_MAX: usize = 2 * REVOKED_MAX;

/// What stands on the disk.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Kept {
    /// The fleet. Another fleet's versions are nothing here.
    namespace: String,
    /// The highest version that was ever taken.
    floor: u64,
    /// The plan keys under which it was taken.
    plan_keys: BTreeSet<KeyId>,
    /// The snapshot of that version.
    snapshot: Option<Envelope>,
    /// All that was ever revoked.
    revoked: Revoked,
}

/// The node's own record of what its fleet signed. Clones share it.
#[derive(Debug, Clone)]
pub struct Ledger(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    state: State,
    root: Root,
    kept: Kept,
    taken: Option<Snapshot>,
    refused: Option<PlanRefusal>,
    is_expired: bool,
}

/// What a fleet's signed plan says of an operator.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Standing {
    /// What it may do.
    Listed(OperatorRights),
    /// It is none.
    Unlisted,
    /// Its certificates are worth nothing any more.
    Revoked,
    /// There is no plan yet, or one of before there were lists of operators.
    Unsaid,
}

/// Why the ledger does not open.
#[derive(Debug, thiserror::Error)]
pub enum LedgerError {
    /// The configured root is none.
    #[error("configured root")]
    Root(#[from] RootError),
    /// A later root on the disk is damaged.
    #[error("root {version} on disk")]
    Later {
        /// Its version.
        version: u64,
        /// What is wrong.
        source: RootError,
    },
    /// The disk's.
    #[error("ledger on disk")]
    State(#[from] StateError),
}

impl Ledger {
    /// Opens the ledger: `first` is the root of the node's file, what followed stands on the disk. It is verified anew.
    ///
    /// # Errors
    /// [`LedgerError`]. A ledger that can't be read is no empty one: the node must not forget how far it was.
    pub fn open(first: &Envelope, state: State) -> Result<Self, LedgerError> {
        let mut root = Root::first(first)?;
        while let Some(next) = state.root(root.version + 1)? {
            let version = root.version + 1;
            root = root.next(&next).map_err(|source| LedgerError::Later { version, source })?;
        }
        let mut kept = state.ledger()?.unwrap_or_default();
        if kept.namespace != root.namespace {
            kept = Kept { namespace: root.namespace.clone(), ..Kept::default() };
        }
        let mut inner = Inner { state, root, kept, taken: None, refused: None, is_expired: false };
        inner.begin_anew_if_the_keys_are_new();
        let taken = inner.kept.snapshot.as_ref().map(|envelope| Snapshot::signed(envelope, &inner.root));
        inner.taken = taken.and_then(Result::ok);
        Ok(Self(Arc::new(Mutex::new(inner))))
    }

    /// Reads what stands on the disk once more: another process of this node has taken something in since.
    ///
    /// # Errors
    /// [`LedgerError`]; then what is known stays, but for roots that could be followed.
    pub fn read_again(&self) -> Result<(), LedgerError> {
        let mut inner = self.inner();
        while let Some(next) = inner.state.root(inner.root.version + 1)? {
            let version = inner.root.version + 1;
            inner.root = inner.root.next(&next).map_err(|source| LedgerError::Later { version, source })?;
        }
        let kept = inner.state.ledger()?.unwrap_or_default();
        // Another fleet's counts for nothing, as at the start; and what this process has taken is never taken back.
        if kept.namespace == inner.root.namespace && kept.floor >= inner.kept.floor {
            inner.kept = kept;
        }
        inner.begin_anew_if_the_keys_are_new();
        let taken = inner.kept.snapshot.as_ref().map(|envelope| Snapshot::signed(envelope, &inner.root));
        inner.taken = taken.and_then(Result::ok);
        Ok(())
    }

    fn inner(&self) -> std::sync::MutexGuard<'_, Inner> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes the snapshot of a plan, if plan and snapshot are new and belong together. It is not on the disk yet.
    ///
    /// # Errors
    /// [`SnapshotError`]; then nothing changed, and the status says it.
    pub fn accept(&self, plan: &Plan, now_ms: u64) -> Result<(), SnapshotError> {
        let mut inner = self.inner();
        let accepted = inner.snapshot(plan.snapshot.as_ref(), now_ms).and_then(|(snapshot, envelope)| {
            if snapshot.version != plan.generation {
                return Err(SnapshotError::Mixed { snapshot: snapshot.version, plan: plan.generation });
            }
            inner.take(snapshot, envelope);
            Ok(())
        });
        inner.refused = accepted.as_ref().err().map(refusal);
        accepted
    }

    /// Takes a younger signature of the version that was taken. Whether the version is another one: then there is a new
    /// plan, and the snapshot comes with it.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn refresh(&self, envelope: &Envelope, now_ms: u64) -> Result<bool, SnapshotError> {
        let mut inner = self.inner();
        let (snapshot, envelope) = match inner.snapshot(Some(envelope), now_ms) {
            Ok(read) => read,
            Err(error) => {
                inner.refused = Some(refusal(&error));
                return Err(error);
            }
        };
        let is_another = inner.taken.as_ref().is_none_or(|taken| taken.version != snapshot.version);
        if !is_another {
            inner.take(snapshot, envelope);
            inner.refused = None;
        }
        Ok(is_another)
    }

    /// Whether this plan, which stands on the disk, is the one that was taken last. It may have ended since.
    pub fn knows(&self, plan: &Plan) -> bool {
        let inner = self.inner();
        let snapshot = plan.snapshot.as_ref().and_then(|envelope| Snapshot::signed(envelope, &inner.root).ok());
        let Some((snapshot, taken)) = snapshot.zip(inner.taken.as_ref()) else { return false };
        snapshot.version == plan.generation && snapshot.version == taken.version && snapshot.follows(taken).is_ok()
    }

    /// Follows later roots, as far as they are signed. Each is on the disk before it counts. Whether there was one.
    ///
    /// # Errors
    /// The first root that does not follow; those before it count.
    pub fn follow(&self, roots: &[Envelope]) -> Result<bool, LedgerError> {
        let mut inner = self.inner();
        let before = inner.root.version;
        for envelope in roots {
            let next = inner.root.next(envelope)?;
            inner.state.keep_root(next.version, envelope)?;
            tracing::info!(version = next.version, keys = next.plan_keys.len(), "new root");
            inner.root = next;
            inner.begin_anew_if_the_keys_are_new();
        }
        Ok(inner.root.version > before)
    }

    /// Writes down what was taken.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep(&self) -> Result<(), StateError> {
        let (state, kept) = {
            let inner = self.inner();
            (inner.state.clone(), inner.kept.clone())
        };
        state.keep_ledger(&kept)
    }

    /// Whether a plan may name this release now.
    pub fn lists(&self, release: &Release) -> bool {
        self.inner().taken.as_ref().is_some_and(|taken| taken.lists(release))
    }

    /// What the newest snapshot says of an operator, whose role has this URI.
    pub fn standing(&self, name: &str, uri: &str) -> Standing {
        let inner = self.inner();
        let newest = inner.taken.as_ref();
        let is_revoked = |revoked: &Revoked| revoked.identities.contains(uri);
        if is_revoked(&inner.kept.revoked) || newest.is_some_and(|taken| is_revoked(&taken.revoked)) {
            return Standing::Revoked;
        }
        match newest.and_then(|taken| taken.operators.as_ref()) {
            None => Standing::Unsaid,
            Some(operators) => operators.get(name).cloned().map_or(Standing::Unlisted, Standing::Listed),
        }
    }

    /// All that was ever revoked, as far as it is remembered, and what the newest snapshot revokes.
    pub fn revoked(&self) -> Revoked {
        let inner = self.inner();
        let mut revoked = inner.kept.revoked.clone();
        if let Some(taken) = &inner.taken {
            revoked.extend(&taken.revoked);
        }
        revoked
    }

    /// The newest root's version.
    pub fn root(&self) -> u64 {
        self.inner().root.version
    }

    /// Which generation to ask for a plan after.
    pub fn floor(&self) -> u64 {
        self.inner().kept.floor
    }

    /// Whether it is time to ask for a younger snapshot.
    pub fn is_old(&self, now_ms: u64) -> bool {
        self.inner().taken.as_ref().is_some_and(|taken| taken.is_old(now_ms))
    }

    /// Whether the newest snapshot is past its end, if that was not told yet.
    pub fn expired_now(&self, now_ms: u64) -> Option<bool> {
        let mut inner = self.inner();
        let is_expired = inner.is_expired(now_ms);
        (std::mem::replace(&mut inner.is_expired, is_expired) != is_expired).then_some(is_expired)
    }

    /// For the status document.
    pub fn status(&self, now_ms: u64) -> PlanStatus {
        let inner = self.inner();
        PlanStatus {
            root: inner.root.version,
            root_expired: now_ms >= inner.root.expires_ms,
            version: inner.kept.floor,
            expires_ms: inner.taken.as_ref().map_or(0, |taken| taken.expires_ms),
            expired: inner.is_expired(now_ms),
            refused: inner.refused.clone(),
        }
    }
}

impl Inner {
    /// Reads a snapshot that may be taken.
    fn snapshot(&self, envelope: Option<&Envelope>, now_ms: u64) -> Result<(Snapshot, Envelope), SnapshotError> {
        let envelope = envelope.ok_or(SnapshotError::Unsigned)?;
        let snapshot = Snapshot::signed(envelope, &self.root)?;
        if snapshot.version < self.kept.floor {
            return Err(SnapshotError::Rollback { offered: snapshot.version, taken: self.kept.floor });
        }
        if let Some(taken) = &self.taken {
            snapshot.follows(taken)?;
        }
        if let Some(ago_ms) = snapshot.expired_ms(now_ms) {
            return Err(SnapshotError::Expired { version: snapshot.version, ago_ms });
        }
        Ok((snapshot, envelope.clone()))
    }

    fn take(&mut self, snapshot: Snapshot, envelope: Envelope) {
        self.kept.floor = snapshot.version;
        self.kept.plan_keys = self.root.plan_keys.iter().map(PublicKey::id).collect();
        let mut revoked = self.kept.revoked.clone();
        revoked.extend(&snapshot.revoked);
        if revoked.len() <= REMEMBERED_MAX {
            self.kept.revoked = revoked;
        } else {
            tracing::error!(
                "too much was revoked: what this snapshot adds counts while it lasts, and is not remembered"
            );
        }
        // A younger signature of one version must not shorten its time.
        let is_longer = self
            .taken
            .as_ref()
            .is_none_or(|taken| taken.version != snapshot.version || taken.expires_ms <= snapshot.expires_ms);
        if is_longer {
            self.kept.snapshot = Some(envelope);
            self.taken = Some(snapshot);
        }
    }

    /// The Update Framework 1.0.33, 5.3.11.
    fn begin_anew_if_the_keys_are_new(&mut self) {
        let is_known = |key: &PublicKey| self.kept.plan_keys.contains(&key.id());
        if self.kept.floor > 0 && !self.root.plan_keys.iter().any(is_known) {
            tracing::warn!(root = self.root.version, "plans have all new keys: their versions begin anew");
            (self.kept.floor, self.kept.snapshot, self.taken) = (0, None, None);
        }
    }

    fn is_expired(&self, now_ms: u64) -> bool {
        self.taken.as_ref().is_some_and(|taken| taken.expired_ms(now_ms).is_some())
    }
}

fn refusal(error: &SnapshotError) -> PlanRefusal {
    PlanRefusal { cause: error.cause().to_owned(), reason: error.to_string() }
}

#[cfg(test)]
pub(crate) mod tests {
    use selvage_config::PrivateKey;
    use selvage_config::release::Release;

    use super::*;

    /// A fleet's keys.
    pub(crate) struct Fleet {
        pub(crate) offline: [PrivateKey; 2],
        pub(crate) key: PrivateKey,
        pub(crate) root: Root,
    }

    impl Fleet {
        pub(crate) fn new() -> Self {
            let make = || PrivateKey::generate().unwrap();
            let (offline, key) = ([make(), make()], make());
            let root =
                Root::initial("test".into(), offline.iter().map(PrivateKey::public).collect(), vec![key.public()]);
            let root = Root { expires_ms: 1_000_000, ..root };
            Self { offline, key, root }
        }

        pub(crate) fn envelope(&self) -> Envelope {
            self.sign_root(&self.root)
        }

        fn sign_root(&self, root: &Root) -> Envelope {
            let mut envelope = root.envelope().unwrap();
            self.offline.iter().for_each(|key| envelope.sign(key).unwrap());
            envelope
        }

        fn ledger(&self, dir: &std::path::Path) -> Ledger {
            Ledger::open(&self.envelope(), State::open(dir).unwrap()).unwrap()
        }

        fn snapshot(&self, version: u64, issued_ms: u64) -> Snapshot {
            let resources = [("hello@1".parse().unwrap(), selvage_config::Digest::of(b"m"))].into();
            let (namespace, revoked) = (self.root.namespace.clone(), Revoked::default());
            let expires_ms = issued_ms + 1_000;
            Snapshot { namespace, version, issued_ms, expires_ms, resources, revoked, operators: None }
        }
    }

    fn signed(snapshot: &Snapshot, key: &PrivateKey) -> Plan {
        let mut envelope = snapshot.envelope();
        envelope.sign(key).unwrap();
        let plan = Plan::new("fra-1".parse().unwrap(), snapshot.version, vec![], vec![]);
        Plan { snapshot: Some(envelope), ..plan }
    }

    fn release(manifest: &[u8]) -> Release {
        Release {
            id: "hello@1".parse().unwrap(),
            repository: "acme/hello".parse().unwrap(),
            manifest: selvage_config::Digest::of(manifest),
            variables: [].into(),
            created_ms: 1,
            created_by: "ops".into(),
        }
    }

    #[test]
    fn an_older_plan_is_refused_also_after_a_restart() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        ledger.accept(&signed(&fleet.snapshot(7, 10), &fleet.key), 20).unwrap();
        ledger.keep().unwrap();
        for ledger in [ledger, fleet.ledger(dir.path())] {
            let refused = ledger.accept(&signed(&fleet.snapshot(6, 15), &fleet.key), 20).unwrap_err();
            assert_eq!(refused, SnapshotError::Rollback { offered: 6, taken: 7 });
            assert_eq!(ledger.status(20).refused.unwrap().cause, "rollback");
            assert_eq!((ledger.floor(), ledger.lists(&release(b"m"))), (7, true));
            ledger.accept(&signed(&fleet.snapshot(7, 15), &fleet.key), 20).unwrap();
            assert_eq!(ledger.status(20).refused, None);
        }
    }

    #[test]
    fn a_plan_without_a_trusted_signature_is_refused() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        let good = signed(&fleet.snapshot(1, 10), &fleet.key);
        let cause = |plan: &Plan| ledger.accept(plan, 20).unwrap_err().cause();
        assert_eq!(cause(&Plan { snapshot: None, ..good.clone() }), "unsigned");
        assert_eq!(cause(&signed(&fleet.snapshot(1, 10), &PrivateKey::generate().unwrap())), "untrusted");
        // The keys of the root sign roots, not plans.
        assert_eq!(cause(&signed(&fleet.snapshot(1, 10), &fleet.offline[0])), "untrusted");
        assert_eq!(cause(&Plan { generation: 2, ..good.clone() }), "mixed");
        let elsewhere = Snapshot { namespace: "other".into(), ..fleet.snapshot(1, 10) };
        assert_eq!(cause(&signed(&elsewhere, &fleet.key)), "namespace");
        assert!(!ledger.lists(&release(b"m")));
        ledger.accept(&good, 20).unwrap();
        assert!(ledger.lists(&release(b"m")) && !ledger.lists(&release(b"other")));
        let forked = Snapshot { resources: [].into(), ..fleet.snapshot(1, 10) };
        assert_eq!(cause(&signed(&forked, &fleet.key)), "fork");
    }

    #[test]
    fn a_freeze_is_told_and_changes_nothing_that_was_taken() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        ledger.accept(&signed(&fleet.snapshot(1, 0), &fleet.key), 20).unwrap();
        assert!(!ledger.is_old(499) && ledger.is_old(500));
        assert_eq!(
            (ledger.expired_now(999), ledger.expired_now(1_000), ledger.expired_now(2_000)),
            (None, Some(true), None)
        );
        assert!(ledger.status(1_000).expired && ledger.lists(&release(b"m")));
        // Whoever freezes offers what has ended, whatever its version.
        let ended = signed(&fleet.snapshot(2, 0), &fleet.key);
        assert_eq!(ledger.accept(&ended, 5_000).unwrap_err().cause(), "expired");
        // A younger signature ends it.
        let younger = signed(&fleet.snapshot(1, 4_500), &fleet.key).snapshot.unwrap();
        assert!(!ledger.refresh(&younger, 5_000).unwrap());
        assert_eq!(ledger.expired_now(5_000), Some(false));
        // A replayed older one does not shorten it.
        let older = signed(&fleet.snapshot(1, 4_100), &fleet.key).snapshot.unwrap();
        assert!(!ledger.refresh(&older, 5_000).unwrap());
        assert_eq!(ledger.status(5_000).expires_ms, 5_500);
    }

    #[test]
    fn nothing_revoked_is_forgotten_to_make_place_for_more() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        let revoke = |version: u64, identities: std::ops::Range<usize>| {
            let identities = identities.map(|number| number.to_string()).collect();
            let snapshot =
                Snapshot { revoked: Revoked { identities, ..Revoked::default() }, ..fleet.snapshot(version, 10) };
            ledger.accept(&signed(&snapshot, &fleet.key), 20).unwrap();
        };
        revoke(1, 0..REVOKED_MAX);
        revoke(2, REVOKED_MAX..REMEMBERED_MAX);
        revoke(3, REMEMBERED_MAX..REMEMBERED_MAX + 1);
        let revoked = ledger.revoked();
        for number in [0, REMEMBERED_MAX - 1, REMEMBERED_MAX] {
            assert!(revoked.identities.contains(&number.to_string()), "{number}");
        }
    }

    #[test]
    fn what_was_revoked_once_stays_revoked() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        let bad = selvage_config::Digest::of(b"bad");
        let revoked = Revoked { digests: [bad].into(), ..Revoked::default() };
        let first = Snapshot { revoked, ..fleet.snapshot(1, 10) };
        ledger.accept(&signed(&first, &fleet.key), 20).unwrap();
        ledger.accept(&signed(&fleet.snapshot(2, 10), &fleet.key), 20).unwrap();
        assert!(ledger.revoked().digests.contains(&bad));
        ledger.keep().unwrap();
        assert!(fleet.ledger(dir.path()).revoked().digests.contains(&bad));
    }

    #[test]
    fn a_new_root_changes_the_plans_key_and_outlives_a_restart() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        ledger.accept(&signed(&fleet.snapshot(9, 10), &fleet.key), 20).unwrap();
        ledger.keep().unwrap();
        let new = PrivateKey::generate().unwrap();
        let second = Root { version: 2, plan_keys: vec![new.public()], ..fleet.root.clone() };
        let mut unsigned = second.envelope().unwrap();
        unsigned.sign(&fleet.offline[0]).unwrap();
        assert!(ledger.follow(&[unsigned]).is_err());
        assert_eq!(ledger.root(), 1);
        assert!(ledger.follow(&[fleet.sign_root(&second)]).unwrap());
        for ledger in [ledger, fleet.ledger(dir.path())] {
            assert_eq!(ledger.root(), 2);
            let stolen = signed(&fleet.snapshot(10, 10), &fleet.key);
            assert_eq!(ledger.accept(&stolen, 20).unwrap_err().cause(), "untrusted");
        }
        // All keys are new, so versions begin anew: a thief's 2^53 would otherwise be the last plan for ever.
        let ledger = fleet.ledger(dir.path());
        ledger.accept(&signed(&fleet.snapshot(3, 10), &new), 20).unwrap();
        // With one key kept, they don't.
        let third = Root { version: 3, plan_keys: vec![new.public(), fleet.key.public()], ..fleet.root.clone() };
        ledger.follow(&[fleet.sign_root(&third)]).unwrap();
        assert_eq!(ledger.accept(&signed(&fleet.snapshot(2, 10), &new), 20).unwrap_err().cause(), "rollback");
    }

    #[test]
    fn a_damaged_ledger_is_an_error_and_not_an_empty_one() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        ledger.accept(&signed(&fleet.snapshot(9, 10), &fleet.key), 20).unwrap();
        ledger.keep().unwrap();
        std::fs::write(dir.path().join("ledger.json"), b"{").unwrap();
        assert!(Ledger::open(&fleet.envelope(), State::open(dir.path()).unwrap()).is_err());
    }

    #[test]
    fn only_the_plan_that_was_taken_last_is_known_after_a_restart() {
        let (fleet, dir) = (Fleet::new(), tempfile::tempdir().unwrap());
        let ledger = fleet.ledger(dir.path());
        let (old, new) = (signed(&fleet.snapshot(1, 10), &fleet.key), signed(&fleet.snapshot(2, 10), &fleet.key));
        ledger.accept(&old, 20).unwrap();
        ledger.accept(&new, 20).unwrap();
        ledger.keep().unwrap();
        let again = fleet.ledger(dir.path());
        assert!(again.knows(&new) && !again.knows(&old));
        assert!(!again.knows(&Plan { snapshot: None, ..new }));
    }
}
