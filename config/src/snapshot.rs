//! A snapshot: everything that a fleet's plans may name now, under one signature, with an end.
//!
//! Signatures on releases never expire; this one does. It says which releases are current (so an old one can't be
//! passed off as new), how new it is (so a node never goes back), until when it holds (so a node notices that somebody
//! keeps news from it), and what must never run again.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::key::KeyId;
use crate::operator::{OPERATORS_MAX, Operators};
use crate::release::{Release, ReleaseId};
use crate::root::Root;
use crate::signature::Envelope;

/// The payload type of a snapshot's envelope.
pub const SNAPSHOT_TYPE: &str = "application/vnd.selvage.snapshot.v1+json";
/// Highest version: JSON readers know no higher whole number.
pub const VERSION_MAX: u64 = 1 << 53;
/// Most things that are revoked.
pub const REVOKED_MAX: usize = 16_384;
/// Longest identity that is revoked, bytes.
pub const IDENTITY_BYTES_MAX: usize = 2_048;
/// The control plane's path of the newest snapshot: `GET` answers its envelope, issued anew when it is no longer young.
pub const SNAPSHOT_PATH: &str = "/api/v1/snapshot";

/// What a fleet may run now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Snapshot {
    /// The fleet: the root's namespace.
    pub namespace: String,
    /// The generation of the plans that it is for. A node never goes back.
    pub version: u64,
    /// When it was signed, milliseconds since 1970. The same version may be signed anew.
    pub issued_ms: u64,
    /// Until when it holds, milliseconds since 1970.
    pub expires_ms: u64,
    /// Each release that a plan may name, and its manifest.
    pub resources: BTreeMap<ReleaseId, Digest>,
    /// What must not run, whatever else is said.
    #[serde(default)]
    pub revoked: Revoked,
    /// Who may ask a node's admin listener, and for what. None: the control plane is older than this list.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operators: Option<Operators>,
}

/// What must not run any more.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Revoked {
    /// Manifests, and components and files: no release that has one runs.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub digests: BTreeSet<Digest>,
    /// Keys whose signatures count no more.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub keys: BTreeSet<KeyId>,
    /// Identities in certificates whose signatures count no more.
    #[serde(default, skip_serializing_if = "BTreeSet::is_empty")]
    pub identities: BTreeSet<String>,
}

/// Why a snapshot is not taken.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// There is none.
    #[error("plan has no signed snapshot, and this node has a root")]
    Unsigned,
    /// Its envelope holds something else, or not of the schema.
    #[error("payload is no snapshot: {0}")]
    Form(String),
    /// No key that the root names signed it.
    #[error("snapshot is not signed by a plan key of root {root}")]
    Untrusted {
        /// The root's version.
        root: u64,
    },
    /// Of another fleet.
    #[error("snapshot is of {offered:?}, the root of {own:?}")]
    Namespace {
        /// Its fleet.
        offered: String,
        /// This fleet.
        own: String,
    },
    /// It ended before it came.
    #[error("snapshot {version} expired {ago_ms} ms ago: is the clock right?")]
    Expired {
        /// Its version.
        version: u64,
        /// How long ago.
        ago_ms: u64,
    },
    /// Older than what was taken.
    #[error("snapshot has version {offered}, this node has taken {taken}")]
    Rollback {
        /// Its version.
        offered: u64,
        /// What was taken.
        taken: u64,
    },
    /// Another content under a version that was taken.
    #[error("snapshot {version} differs from the one that was taken")]
    Fork {
        /// The version of both.
        version: u64,
    },
    /// It is for other plans than the one it came with.
    #[error("snapshot has version {snapshot}, its plan generation {plan}")]
    Mixed {
        /// The snapshot's version.
        snapshot: u64,
        /// The plan's generation.
        plan: u64,
    },
}

impl SnapshotError {
    /// The stable word for a refused plan.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Unsigned => "unsigned",
            Self::Form(_) => "malformed",
            Self::Untrusted { .. } => "untrusted",
            Self::Namespace { .. } => "namespace",
            Self::Expired { .. } => "expired",
            Self::Rollback { .. } => "rollback",
            Self::Fork { .. } => "fork",
            Self::Mixed { .. } => "mixed",
        }
    }
}

impl Snapshot {
    /// Reads an envelope that a plan key of `root` signed. What it covers is parsed only then.
    ///
    /// # Errors
    /// [`SnapshotError`].
    pub fn signed(envelope: &Envelope, root: &Root) -> Result<Self, SnapshotError> {
        if envelope.payload_type != SNAPSHOT_TYPE {
            return Err(SnapshotError::Form(envelope.payload_type.chars().take(100).collect()));
        }
        if envelope.signers(&root.plan_keys).is_empty() {
            return Err(SnapshotError::Untrusted { root: root.version });
        }
        let form = |reason: &str| SnapshotError::Form(reason.to_owned());
        let read = serde_json::from_slice::<Self>(&envelope.payload);
        let snapshot = read.map_err(|error| SnapshotError::Form(error.to_string()))?;
        if snapshot.namespace != root.namespace {
            return Err(SnapshotError::Namespace { offered: snapshot.namespace, own: root.namespace.clone() });
        }
        if snapshot.version > VERSION_MAX {
            return Err(form("version can't be"));
        }
        if snapshot.revoked.len() > REVOKED_MAX {
            return Err(form("revokes too many things"));
        }
        if snapshot.operators.as_ref().is_some_and(|operators| operators.len() > OPERATORS_MAX) {
            return Err(form("names too many operators"));
        }
        Ok(snapshot)
    }

    /// Whether it may follow `taken`: newer, or the same signed at another time.
    ///
    /// # Errors
    /// [`SnapshotError::Rollback`], [`SnapshotError::Fork`].
    pub fn follows(&self, taken: &Self) -> Result<(), SnapshotError> {
        if self.version < taken.version {
            return Err(SnapshotError::Rollback { offered: self.version, taken: taken.version });
        }
        let is_same =
            self.resources == taken.resources && self.revoked == taken.revoked && self.operators == taken.operators;
        if self.version == taken.version && !is_same {
            return Err(SnapshotError::Fork { version: self.version });
        }
        Ok(())
    }

    /// Whether a plan may name this release.
    pub fn lists(&self, release: &Release) -> bool {
        self.resources.get(&release.id) == Some(&release.manifest)
    }

    /// For how long it has been over, if it is.
    pub fn expired_ms(&self, now_ms: u64) -> Option<u64> {
        (now_ms >= self.expires_ms).then(|| now_ms - self.expires_ms)
    }

    /// Whether half of its time is over: time to ask for a younger one.
    pub fn is_old(&self, now_ms: u64) -> bool {
        now_ms >= self.issued_ms.saturating_add(self.expires_ms.saturating_sub(self.issued_ms) / 2)
    }

    /// An envelope of it, unsigned.
    pub fn envelope(&self) -> Envelope {
        Envelope::new(SNAPSHOT_TYPE, serde_json::to_vec(self).expect("a snapshot has only string keys"))
    }
}

impl Revoked {
    /// How many things are revoked.
    pub fn len(&self) -> usize {
        self.digests.len() + self.keys.len() + self.identities.len()
    }

    /// Whether nothing is.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Adds what `other` revokes. Whether anything was new.
    pub fn extend(&mut self, other: &Self) -> bool {
        let before = self.len();
        self.digests.extend(&other.digests);
        self.keys.extend(&other.keys);
        self.identities.extend(other.identities.iter().cloned());
        self.len() != before
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PrivateKey;
    use crate::operator::OperatorRights;

    fn root(plan: &PrivateKey) -> Root {
        Root {
            namespace: "test".into(),
            version: 1,
            issued_ms: 0,
            expires_ms: 10,
            threshold: 1,
            keys: vec![PrivateKey::generate().unwrap().public()],
            plan_keys: vec![plan.public()],
        }
    }

    fn snapshot(version: u64) -> Snapshot {
        Snapshot {
            namespace: "test".into(),
            version,
            issued_ms: 100,
            expires_ms: 200,
            resources: [("hello@1".parse().unwrap(), Digest::of(b"m"))].into(),
            revoked: Revoked::default(),
            operators: None,
        }
    }

    fn signed(snapshot: &Snapshot, key: &PrivateKey) -> Envelope {
        let mut envelope = snapshot.envelope();
        envelope.sign(key).unwrap();
        envelope
    }

    #[test]
    fn a_snapshot_is_read_only_if_a_plan_key_of_the_root_signed_it() {
        let key = PrivateKey::generate().unwrap();
        let root = root(&key);
        assert_eq!(Snapshot::signed(&signed(&snapshot(1), &key), &root).unwrap(), snapshot(1));
        let stranger = signed(&snapshot(1), &PrivateKey::generate().unwrap());
        assert_eq!(Snapshot::signed(&stranger, &root).unwrap_err().cause(), "untrusted");
        assert_eq!(Snapshot::signed(&snapshot(1).envelope(), &root).unwrap_err().cause(), "untrusted");
        let elsewhere = Snapshot { namespace: "other".into(), ..snapshot(1) };
        assert_eq!(Snapshot::signed(&signed(&elsewhere, &key), &root).unwrap_err().cause(), "namespace");
        let mut changed = signed(&snapshot(1), &key);
        changed.payload = snapshot(2).envelope().payload;
        assert_eq!(Snapshot::signed(&changed, &root).unwrap_err().cause(), "untrusted");
    }

    #[test]
    fn a_plan_keys_signature_over_something_else_is_no_snapshot() {
        let key = PrivateKey::generate().unwrap();
        let mut envelope = Envelope::new("application/vnd.in-toto+json", snapshot(1).envelope().payload);
        envelope.sign(&key).unwrap();
        assert_eq!(Snapshot::signed(&envelope, &root(&key)).unwrap_err().cause(), "malformed");
        envelope.payload_type = SNAPSHOT_TYPE.into();
        assert_eq!(Snapshot::signed(&envelope, &root(&key)).unwrap_err().cause(), "untrusted");
    }

    #[test]
    fn an_older_snapshot_does_not_follow_and_neither_does_another_of_the_same_version() {
        let taken = snapshot(7);
        assert!(snapshot(8).follows(&taken).is_ok());
        assert!(Snapshot { issued_ms: 150, expires_ms: 250, ..snapshot(7) }.follows(&taken).is_ok());
        assert_eq!(snapshot(6).follows(&taken).unwrap_err().cause(), "rollback");
        let other = Snapshot { resources: [].into(), ..snapshot(7) };
        assert_eq!(other.follows(&taken).unwrap_err().cause(), "fork");
        let more = Snapshot { operators: Some([("eve".to_owned(), OperatorRights::default())].into()), ..snapshot(7) };
        assert_eq!(more.follows(&taken).unwrap_err().cause(), "fork");
    }

    #[test]
    fn a_snapshot_of_before_there_was_a_list_of_operators_is_read() {
        let key = PrivateKey::generate().unwrap();
        let text = serde_json::to_string(&snapshot(1)).unwrap();
        assert!(!text.contains("operators"), "an older node reads what has no list: {text}");
        let mut envelope = Envelope::new(SNAPSHOT_TYPE, text.into_bytes());
        envelope.sign(&key).unwrap();
        assert_eq!(Snapshot::signed(&envelope, &root(&key)).unwrap().operators, None);
        let operators = (0..=OPERATORS_MAX).map(|n| (format!("o{n}"), OperatorRights::default())).collect();
        let many = Snapshot { operators: Some(operators), ..snapshot(1) };
        assert_eq!(Snapshot::signed(&signed(&many, &key), &root(&key)).unwrap_err().cause(), "malformed");
    }

    #[test]
    fn a_release_is_listed_by_name_and_manifest() {
        let release = |id: &str, manifest: &[u8]| Release {
            id: id.parse().unwrap(),
            repository: "acme/hello".parse().unwrap(),
            manifest: Digest::of(manifest),
            variables: [].into(),
            created_ms: 1,
            created_by: "ops".into(),
        };
        assert!(snapshot(1).lists(&release("hello@1", b"m")));
        assert!(!snapshot(1).lists(&release("hello@1", b"n")));
        assert!(!snapshot(1).lists(&release("hello@2", b"m")));
    }

    #[test]
    fn a_snapshot_ends_and_is_old_from_half_of_its_time_on() {
        let snapshot = snapshot(1);
        assert_eq!((snapshot.expired_ms(199), snapshot.expired_ms(205)), (None, Some(5)));
        assert!(!snapshot.is_old(149) && snapshot.is_old(150));
    }

    proptest::proptest! {
        #[test]
        fn no_signed_payload_panics(payload: Vec<u8>) {
            let key = PrivateKey::generate().unwrap();
            let mut envelope = Envelope::new(SNAPSHOT_TYPE, payload);
            envelope.sign(&key).unwrap();
            let _ = Snapshot::signed(&envelope, &root(&key));
        }
    }
}
