//! What changed from one plan to a later one of the same node, so that a change of one app among thousands sends little.
//!
//! A node that names the [`News::nonce`] of the plan that it has taken is told only what changed since. It makes the whole
//! plan of that, and the exact bytes of the snapshot: these are what was signed, and what is verified, as if the plan had
//! come whole. Whatever does not fit is thrown away, and the plan is asked for whole.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{Candidate, Home, Peer, Placement, Plan};
use crate::operator::Operators;
use crate::release::{Release, ReleaseId};
use crate::signature::{Envelope, EnvelopeSignature};
use crate::snapshot::{Revoked, Snapshot};
use crate::{AppName, Digest, NodeName};

/// The answer to a node that gave a nonce with its question: `&nonce={nonce}`, of the last news or any other text.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct News {
    /// What to give with the next question: it names whoever remembers what this plan was.
    pub nonce: String,
    /// The plan, or what changed.
    #[serde(flatten)]
    pub plan: Told,
}

/// A plan as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Told {
    /// All of it.
    Whole(Box<Plan>),
    /// What changed.
    Delta(Box<PlanDelta>),
}

/// What changed from the plan of generation `base`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PlanDelta {
    /// For which node.
    pub node: NodeName,
    /// On top of which plan.
    pub base: u64,
    /// Which plan comes of it.
    pub generation: u64,
    /// Releases that are new, or not as they were.
    pub releases: Vec<Release>,
    /// Apps that are gone.
    pub gone: Vec<AppName>,
    /// Peers that are new, or not as they were.
    pub peers: Vec<Peer>,
    /// Peers that are gone.
    pub left: Vec<NodeName>,
    /// All second releases.
    pub candidates: Vec<Candidate>,
    /// All apps whose load is told.
    pub watched: Vec<AppName>,
    /// Whether load balancers shall send nothing more.
    pub drain: bool,
    /// What changed in the snapshot, if plans are signed.
    pub snapshot: Option<SnapshotDelta>,
    /// All homes of stores, if they are others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub homes: Option<Vec<Home>>,
    /// All placements, if they are others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub placements: Option<Vec<Placement>>,
}

/// What changed from the snapshot of the plan before, and who signed all of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotDelta {
    /// When it was signed.
    pub issued_ms: u64,
    /// Until when it holds.
    pub expires_ms: u64,
    /// Releases that are listed now.
    pub listed: BTreeMap<ReleaseId, Digest>,
    /// Releases that are listed no more.
    pub unlisted: BTreeSet<ReleaseId>,
    /// All that is revoked, if there is more of it.
    pub revoked: Option<Revoked>,
    /// All operators, if they are others.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub operators: Option<Operators>,
    /// The digest of the bytes that were signed.
    pub payload: Digest,
    /// The signatures over them.
    pub signatures: Vec<EnvelopeSignature>,
}

/// Why a delta is of no use.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DeltaError {
    /// It is for another node.
    #[error("delta is for node {0}")]
    Node(NodeName),
    /// It is on top of another plan.
    #[error("delta is on top of generation {base}, this node has {taken}")]
    Base {
        /// The plan that it is on top of.
        base: u64,
        /// The plan that is there.
        taken: u64,
    },
    /// The plan has no snapshot, or an unreadable one, and the delta one on top of it; or the contrary.
    #[error("delta is of a signed plan and this one is not, or the contrary")]
    Snapshot,
    /// What comes of it is not what was signed.
    #[error("delta makes a snapshot of {made}, {signed} was signed")]
    Payload {
        /// The digest of what came of it.
        made: Digest,
        /// The digest of what was signed.
        signed: Digest,
    },
}

impl Plan {
    /// The plan that `delta` makes of this one. It is as little verified as any plan that came.
    ///
    /// # Errors
    /// [`DeltaError`]: the plan must be asked for whole.
    pub fn with(&self, delta: PlanDelta) -> Result<Self, DeltaError> {
        if delta.node != self.node {
            return Err(DeltaError::Node(delta.node));
        }
        if delta.base != self.generation {
            return Err(DeltaError::Base { base: delta.base, taken: self.generation });
        }
        let snapshot = match (&self.snapshot, &delta.snapshot) {
            (None, None) => None,
            (Some(envelope), Some(changes)) => Some(changes.apply(envelope, delta.generation)?),
            _ => return Err(DeltaError::Snapshot),
        };
        let own = self.releases.iter().map(|release| (release.id.app.clone(), release));
        let mut releases: BTreeMap<AppName, &Release> = own.filter(|(app, _)| !delta.gone.contains(app)).collect();
        releases.extend(delta.releases.iter().map(|release| (release.id.app.clone(), release)));
        let left: BTreeSet<&NodeName> = delta.left.iter().collect();
        let own = self.peers.iter().map(|peer| (&peer.node, peer));
        let mut peers: BTreeMap<&NodeName, &Peer> = own.filter(|(node, _)| !left.contains(node)).collect();
        peers.extend(delta.peers.iter().map(|peer| (&peer.node, peer)));
        Ok(Self {
            node: self.node.clone(),
            generation: delta.generation,
            releases: releases.into_values().cloned().collect(),
            peers: peers.into_values().cloned().collect(),
            snapshot,
            candidates: delta.candidates,
            watched: delta.watched,
            drain: delta.drain,
            homes: delta.homes.unwrap_or_else(|| self.homes.clone()),
            placements: delta.placements.unwrap_or_else(|| self.placements.clone()),
        })
    }
}

impl SnapshotDelta {
    /// What leads from `before` to `after`, whose envelope is given.
    pub fn between(before: &Snapshot, after: &Snapshot, envelope: &Envelope) -> Self {
        let is_new = |(id, digest): &(&ReleaseId, &Digest)| before.resources.get(id) != Some(digest);
        let listed = after.resources.iter().filter(is_new).map(|(id, digest)| (id.clone(), *digest)).collect();
        let unlisted = before.resources.keys().filter(|id| !after.resources.contains_key(id)).cloned().collect();
        let (issued_ms, expires_ms) = (after.issued_ms, after.expires_ms);
        let revoked = (before.revoked != after.revoked).then(|| after.revoked.clone());
        let operators = after.operators.clone().filter(|_| before.operators != after.operators);
        let (payload, signatures) = (Digest::of(&envelope.payload), envelope.signatures.clone());
        Self { issued_ms, expires_ms, listed, unlisted, revoked, operators, payload, signatures }
    }

    /// The envelope that was signed.
    fn apply(&self, before: &Envelope, version: u64) -> Result<Envelope, DeltaError> {
        let mut snapshot: Snapshot = serde_json::from_slice(&before.payload).map_err(|_| DeltaError::Snapshot)?;
        snapshot.version = version;
        (snapshot.issued_ms, snapshot.expires_ms) = (self.issued_ms, self.expires_ms);
        snapshot.resources.retain(|id, _| !self.unlisted.contains(id));
        snapshot.resources.extend(self.listed.iter().map(|(id, digest)| (id.clone(), *digest)));
        if let Some(revoked) = &self.revoked {
            snapshot.revoked = revoked.clone();
        }
        if let Some(operators) = &self.operators {
            snapshot.operators = Some(operators.clone());
        }
        let mut envelope = snapshot.envelope();
        let made = Digest::of(&envelope.payload);
        if made != self.payload {
            return Err(DeltaError::Payload { made, signed: self.payload });
        }
        envelope.signatures.clone_from(&self.signatures);
        Ok(envelope)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key::PrivateKey;
    use crate::operator::OperatorRights;

    fn release(id: &str, content: &str) -> Release {
        Release {
            id: id.parse().unwrap(),
            repository: "acme/app".parse().unwrap(),
            manifest: Digest::of(content.as_bytes()),
            variables: BTreeMap::new(),
            created_ms: 1,
            created_by: "ops".into(),
        }
    }

    fn peer(node: &str, port: u16) -> Peer {
        let (region, address) = ("fra".parse().unwrap(), ([127, 0, 0, 1], port).into());
        Peer { node: node.parse().unwrap(), region, address, admin: Some(address) }
    }

    fn signed(generation: u64, releases: &[Release], revoked: &[&str], key: &PrivateKey) -> (Snapshot, Envelope) {
        let snapshot = Snapshot {
            namespace: "test".into(),
            version: generation,
            issued_ms: generation * 10,
            expires_ms: generation * 10 + 1_000,
            resources: releases.iter().map(|release| (release.id.clone(), release.manifest)).collect(),
            revoked: Revoked {
                digests: revoked.iter().map(|r| Digest::of(r.as_bytes())).collect(),
                ..Revoked::default()
            },
            // Another one in each generation.
            operators: Some([(format!("o{generation}"), OperatorRights::default())].into()),
        };
        let mut envelope = snapshot.envelope();
        envelope.sign(key).unwrap();
        (snapshot, envelope)
    }

    /// Two plans, and what leads from one to the other.
    fn plans(apps: usize) -> (Plan, Plan, PlanDelta) {
        let key = PrivateKey::generate().unwrap();
        let mut old: Vec<Release> = (0..apps).map(|n| release(&format!("app-{n:04}@1"), &format!("{n}"))).collect();
        let mut new = old.clone();
        old.push(release("gone@1", "gone"));
        old.sort_by(|a, b| a.id.app.cmp(&b.id.app));
        new[1] = release("app-0001@2", "changed");
        let before = signed(3, &old, &[], &key);
        let after = signed(7, &new, &["bad"], &key);
        let plan = |generation, releases: &[Release], peers: &[Peer], envelope: &Envelope| Plan {
            snapshot: Some(envelope.clone()),
            ..Plan::new("fra-1".parse().unwrap(), generation, releases.to_vec(), peers.to_vec())
        };
        let from = plan(3, &old, &[peer("a", 1), peer("b", 2), peer("c", 3)], &before.1);
        let to = plan(7, &new, &[peer("a", 1), peer("aa", 9), peer("c", 4)], &after.1);
        let delta = PlanDelta {
            node: to.node.clone(),
            base: 3,
            generation: 7,
            releases: vec![new[1].clone()],
            gone: vec!["gone".parse().unwrap()],
            peers: vec![peer("aa", 9), peer("c", 4)],
            left: vec!["b".parse().unwrap()],
            candidates: Vec::new(),
            watched: Vec::new(),
            drain: false,
            snapshot: Some(SnapshotDelta::between(&before.0, &after.0, &after.1)),
            homes: None,
            placements: None,
        };
        (from, to, delta)
    }

    #[test]
    fn a_delta_makes_the_very_plan_and_the_very_bytes_that_were_signed() {
        let (from, to, delta) = plans(5);
        assert_eq!(from.with(delta).unwrap(), to);
    }

    #[test]
    fn a_change_of_one_app_among_2_000_is_small() {
        let (from, to, delta) = plans(2_000);
        let bytes = |value: &Told| serde_json::to_vec(value).unwrap().len();
        let (whole, part) = (bytes(&Told::Whole(Box::new(to.clone()))), bytes(&Told::Delta(Box::new(delta.clone()))));
        assert!(whole > 500_000 && part < 2_000, "{part} of {whole}");
        assert_eq!(from.with(delta).unwrap(), to);
    }

    #[test]
    fn news_are_read_as_they_were_written() {
        let (_, to, delta) = plans(2);
        for plan in [Told::Whole(Box::new(to)), Told::Delta(Box::new(delta))] {
            let news = News { nonce: "n".into(), plan };
            assert_eq!(serde_json::from_slice::<News>(&serde_json::to_vec(&news).unwrap()).unwrap(), news);
        }
    }

    #[test]
    fn homes_are_told_when_they_are_others_and_stay_else() {
        let (mut from, mut to, mut delta) = plans(2);
        let home = Home::first("app-0001/default".parse().unwrap(), "fra-1".parse().unwrap(), 3);
        from.homes = vec![home.clone()];
        to.homes = vec![home.clone()];
        assert_eq!(from.with(delta.clone()).unwrap(), to);
        to.homes = vec![home.next(&"iad-1".parse().unwrap(), 0, 7).unwrap()];
        delta.homes = Some(to.homes.clone());
        assert_eq!(from.with(delta.clone()).unwrap(), to);
        let news = News { nonce: "n".into(), plan: Told::Delta(Box::new(delta)) };
        assert_eq!(serde_json::from_slice::<News>(&serde_json::to_vec(&news).unwrap()).unwrap(), news);
    }

    #[test]
    fn placements_are_told_when_they_are_others_and_stay_else() {
        let (mut from, mut to, mut delta) = plans(2);
        let placement = |regions: &[&str]| Placement {
            name: "eu".parse().unwrap(),
            regions: regions.iter().map(|region| region.parse().unwrap()).collect(),
            stores: [("app-0001/default".parse().unwrap(), 1_000)].into(),
        };
        from.placements = vec![placement(&["fra"])];
        to.placements.clone_from(&from.placements);
        assert_eq!(from.with(delta.clone()).unwrap(), to);
        to.placements = vec![placement(&["ams", "fra"])];
        delta.placements = Some(to.placements.clone());
        assert_eq!(from.with(delta.clone()).unwrap(), to);
        let news = News { nonce: "n".into(), plan: Told::Delta(Box::new(delta)) };
        assert_eq!(serde_json::from_slice::<News>(&serde_json::to_vec(&news).unwrap()).unwrap(), news);
    }

    #[test]
    fn a_delta_that_does_not_fit_makes_nothing() {
        let (from, to, delta) = plans(3);
        let other = PlanDelta { node: "iad-1".parse().unwrap(), ..delta.clone() };
        assert!(matches!(from.with(other), Err(DeltaError::Node(_))));
        assert!(matches!(to.with(delta.clone()), Err(DeltaError::Base { base: 3, taken: 7 })));
        let unsigned = PlanDelta { snapshot: None, ..delta.clone() };
        assert!(matches!(from.with(unsigned), Err(DeltaError::Snapshot)));
        let none = Plan { snapshot: None, ..from.clone() };
        assert!(matches!(none.with(delta.clone()), Err(DeltaError::Snapshot)));
        // A release more or less than was signed, a moved time, a revocation that is kept back: other bytes.
        type Change = fn(&mut SnapshotDelta);
        let changes: [Change; 6] = [
            |s| s.listed.clear(),
            |s| s.listed.extend([("evil@1".parse().unwrap(), Digest::of(b"evil"))]),
            |s| s.unlisted.clear(),
            |s| s.revoked = None,
            |s| s.operators = None,
            |s| s.expires_ms += 1,
        ];
        for change in changes {
            let mut changed = delta.clone();
            change(changed.snapshot.as_mut().unwrap());
            assert!(matches!(from.with(changed), Err(DeltaError::Payload { .. })));
        }
    }
}
