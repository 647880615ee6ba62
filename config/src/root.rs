//! The root of a fleet's plans: which key may sign snapshots, said by keys that are kept offline.
//!
//! A root is signed by a threshold of its own keys, and by a threshold of the keys of the root before it: a node that
//! has one root follows the chain to the newest by itself (The Update Framework 1.0.33, 5.3). What a control plane
//! holds is only the plans' key; whoever steals it can be cut off by the next root.

use std::collections::BTreeSet;

use serde::{Deserialize, Serialize};

use crate::key::{KeyId, PublicKey};
use crate::signature::Envelope;

/// The payload type of a root's envelope.
pub const ROOT_TYPE: &str = "application/vnd.selvage.root.v1+json";
/// Largest root with its signatures, bytes.
pub const ROOT_BYTES_MAX: usize = 256 * 1024;
/// Most keys of one kind in a root.
pub const ROOT_KEYS_MAX: usize = 32;
/// Most roots that are followed, one after the other, without a restart.
pub const ROOTS_MAX: usize = 1_024;
/// Most characters of a namespace.
pub const NAMESPACE_CHARS_MAX: usize = 63;
/// The control plane's path of roots: `GET {ROOTS_PATH}?after={version}` answers a JSON list of envelopes, oldest first.
pub const ROOTS_PATH: &str = "/api/v1/roots";

/// Who may say what a fleet runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Root {
    /// The fleet. A snapshot of another one is nothing here.
    pub namespace: String,
    /// 1 for the first; each root follows the one before.
    pub version: u64,
    /// When it was made, milliseconds since 1970.
    pub issued_ms: u64,
    /// After this a node complains until there is a newer one, milliseconds since 1970. It goes on serving.
    pub expires_ms: u64,
    /// How many of `keys` must sign a root.
    pub threshold: usize,
    /// The keys that sign roots: each in its own hands, none of them online.
    pub keys: Vec<PublicKey>,
    /// The keys of which any one signs snapshots.
    pub plan_keys: Vec<PublicKey>,
}

/// Why a root is none.
#[derive(Debug, thiserror::Error)]
pub enum RootError {
    /// Its envelope holds something else.
    #[error("payload is {0:?}, no root")]
    Type(String),
    /// Not of the schema.
    #[error("read root")]
    Json(#[source] serde_json::Error),
    /// It contradicts itself.
    #[error("root {0}")]
    Form(&'static str),
    /// Too few of its own keys signed.
    #[error("root {version} is signed by {found} of its own keys, it needs {needed}")]
    Own {
        /// Which root.
        version: u64,
        /// How many keys signed.
        found: usize,
        /// How many must.
        needed: usize,
    },
    /// Too few keys of the root before signed.
    #[error("root {version} is signed by {found} keys of the root before, that one demands {needed}")]
    Before {
        /// Which root.
        version: u64,
        /// How many keys signed.
        found: usize,
        /// How many must.
        needed: usize,
    },
    /// It does not follow.
    #[error("root {offered} does not follow root {taken}")]
    Order {
        /// Its version.
        offered: u64,
        /// The version before.
        taken: u64,
    },
    /// Of another fleet.
    #[error("root is of {offered:?}, not of {taken:?}")]
    Namespace {
        /// Its fleet.
        offered: String,
        /// This fleet.
        taken: String,
    },
}

impl Root {
    /// A fleet's first root, which nobody has signed. It never ends, and two of its keys, or the only one,
    /// sign the next.
    pub fn initial(namespace: String, keys: Vec<PublicKey>, plan_keys: Vec<PublicKey>) -> Self {
        let (issued_ms, expires_ms) = (0, u64::MAX);
        Self { namespace, version: 1, issued_ms, expires_ms, threshold: keys.len().min(2), keys, plan_keys }
    }

    /// Reads what an envelope holds, signed or not.
    ///
    /// # Errors
    /// [`RootError::Type`], [`RootError::Json`], [`RootError::Form`].
    pub fn unverified(envelope: &Envelope) -> Result<Self, RootError> {
        if envelope.payload_type != ROOT_TYPE {
            return Err(RootError::Type(envelope.payload_type.chars().take(100).collect()));
        }
        let root: Self = serde_json::from_slice(&envelope.payload).map_err(RootError::Json)?;
        root.check()?;
        Ok(root)
    }

    /// Reads the root that a configuration names: trusted because it is named there, if it is whole.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn first(envelope: &Envelope) -> Result<Self, RootError> {
        let root = Self::unverified(envelope)?;
        let found = root.signers(envelope).len();
        if found < root.threshold {
            return Err(RootError::Own { version: root.version, found, needed: root.threshold });
        }
        Ok(root)
    }

    /// Reads the root that follows this one: signed by a threshold of these keys, and of its own.
    ///
    /// # Errors
    /// [`RootError`].
    pub fn next(&self, envelope: &Envelope) -> Result<Self, RootError> {
        let offered = Self::unverified(envelope)?;
        if offered.namespace != self.namespace {
            return Err(RootError::Namespace { offered: offered.namespace, taken: self.namespace.clone() });
        }
        if Some(offered.version) != self.version.checked_add(1) {
            return Err(RootError::Order { offered: offered.version, taken: self.version });
        }
        let found = self.signers(envelope).len();
        if found < self.threshold {
            return Err(RootError::Before { version: offered.version, found, needed: self.threshold });
        }
        Self::first(envelope)
    }

    /// Which of the root's keys signed `envelope`.
    pub fn signers(&self, envelope: &Envelope) -> BTreeSet<KeyId> {
        envelope.signers(&self.keys)
    }

    /// An envelope of it, unsigned.
    ///
    /// # Errors
    /// [`RootError::Form`].
    pub fn envelope(&self) -> Result<Envelope, RootError> {
        self.check()?;
        Ok(Envelope::new(ROOT_TYPE, serde_json::to_vec(self).expect("a root has only string keys")))
    }

    /// Whether a plan key of this root is also one of `other`.
    pub fn shares_plan_key(&self, other: &Self) -> bool {
        self.plan_keys.iter().any(|key| other.plan_keys.contains(key))
    }

    fn check(&self) -> Result<(), RootError> {
        let ids = |keys: &[PublicKey]| keys.iter().map(PublicKey::id).collect::<BTreeSet<_>>();
        let (own, plan) = (ids(&self.keys), ids(&self.plan_keys));
        let namespace = &self.namespace;
        let is_word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'.');
        let wrong = if namespace.is_empty() || namespace.len() > NAMESPACE_CHARS_MAX || !namespace.bytes().all(is_word)
        {
            "has no namespace of lower-case letters, digits, '-' and '.'"
        } else if self.version == 0 {
            "has version 0"
        } else if self.keys.len() > ROOT_KEYS_MAX || self.plan_keys.len() > ROOT_KEYS_MAX {
            "has too many keys"
        } else if own.len() != self.keys.len() || plan.len() != self.plan_keys.len() {
            "has a key twice"
        } else if plan.is_empty() {
            "has no key for plans"
        } else if self.threshold == 0 || self.threshold > own.len() {
            "has a threshold that its keys can't meet"
        } else if !own.is_disjoint(&plan) {
            "has one key for roots and plans: what is online must not sign roots"
        } else {
            return Ok(());
        };
        Err(RootError::Form(wrong))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PrivateKey;

    struct Keys(Vec<PrivateKey>, PrivateKey);

    fn keys() -> Keys {
        Keys((0..3).map(|_| PrivateKey::generate().unwrap()).collect(), PrivateKey::generate().unwrap())
    }

    fn root(keys: &Keys, version: u64) -> Root {
        let public = keys.0.iter().map(PrivateKey::public).collect();
        let root = Root::initial("test".into(), public, vec![keys.1.public()]);
        Root { version, issued_ms: 1, expires_ms: 2, threshold: 2, ..root }
    }

    fn signed<'k>(root: &Root, by: impl IntoIterator<Item = &'k PrivateKey>) -> Envelope {
        let mut envelope = root.envelope().unwrap();
        by.into_iter().for_each(|key| envelope.sign(key).unwrap());
        envelope
    }

    #[test]
    fn a_root_needs_a_threshold_of_its_keys() {
        let keys = keys();
        let first = root(&keys, 1);
        assert_eq!(Root::first(&signed(&first, &keys.0[..2])).unwrap(), first);
        for few in [&keys.0[..0], &keys.0[..1]] {
            let error = Root::first(&signed(&first, few)).unwrap_err();
            assert!(matches!(error, RootError::Own { needed: 2, .. }), "{error}");
        }
        // One key that signs twice is one key, and the plans' key is none.
        let mut twice = signed(&first, &keys.0[..1]);
        twice.signatures.push(twice.signatures[0].clone());
        assert!(Root::first(&twice).is_err());
        assert!(Root::first(&signed(&first, [&keys.0[0], &keys.1])).is_err());
    }

    #[test]
    fn a_changed_root_is_not_signed() {
        let keys = keys();
        let mut envelope = signed(&root(&keys, 1), &keys.0);
        let text = String::from_utf8(envelope.payload).unwrap().replace("\"test\"", "\"tost\"");
        envelope.payload = text.into_bytes();
        assert!(matches!(Root::first(&envelope), Err(RootError::Own { found: 0, .. })));
        envelope.payload_type = "application/json".into();
        assert!(matches!(Root::first(&envelope), Err(RootError::Type(_))));
    }

    #[test]
    fn the_next_root_is_signed_by_both_sets_of_keys() {
        let (old, new) = (keys(), keys());
        let (first, second) = (root(&old, 1), root(&new, 2));
        let both = || old.0[..2].iter().chain(&new.0[..2]);
        assert_eq!(first.next(&signed(&second, both())).unwrap(), second);
        assert!(matches!(first.next(&signed(&second, &new.0)), Err(RootError::Before { found: 0, .. })));
        assert!(matches!(first.next(&signed(&second, &old.0)), Err(RootError::Own { found: 0, .. })));
        assert!(matches!(first.next(&signed(&root(&new, 3), both())), Err(RootError::Order { .. })));
        assert!(matches!(first.next(&signed(&root(&old, 1), &old.0)), Err(RootError::Order { .. })));
        let elsewhere = Root { namespace: "other".into(), ..second };
        assert!(matches!(first.next(&signed(&elsewhere, both())), Err(RootError::Namespace { .. })));
    }

    #[test]
    fn a_root_that_contradicts_itself_is_refused() {
        let keys = keys();
        let good = root(&keys, 1);
        let bad = [
            Root { threshold: 0, ..good.clone() },
            Root { threshold: 4, ..good.clone() },
            Root { version: 0, ..good.clone() },
            Root { namespace: "No".into(), ..good.clone() },
            Root { plan_keys: vec![], ..good.clone() },
            Root { plan_keys: vec![good.keys[0].clone()], ..good.clone() },
            Root { keys: vec![good.keys[0].clone(); 2], ..good.clone() },
        ];
        for bad in bad {
            assert!(matches!(bad.envelope(), Err(RootError::Form(_))), "{bad:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_payload_panics(payload: Vec<u8>) {
            let _ = Root::first(&Envelope::new(ROOT_TYPE, payload));
        }
    }
}
