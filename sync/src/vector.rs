//! Version vectors: of every origin, the prefix of its writes that is complete.
//!
//! `vector[o] = s` says: every write of `o` up to `s` was applied here, or what superseded it was. It advances
//! only over a contiguous prefix or by the claim at the end of a complete catch-up; what arrives beyond a gap is
//! applied and not counted.

use std::collections::BTreeMap;

use crate::entry::{Dot, Origin};

/// Origins in one vector, the most that is sent or taken. An origin is a node's data directory, so this grows
/// with every directory a node ever started from.
pub const ORIGINS_MAX: usize = 16_384;

/// Of every origin, the sequence number up to which nothing is missing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct VersionVector(BTreeMap<Origin, u64>);

impl VersionVector {
    /// How far `origin` is complete; 0 for one never seen.
    pub fn get(&self, origin: &Origin) -> u64 {
        self.0.get(origin).copied().unwrap_or(0)
    }

    /// Counts `dot` if it is the next of its origin. Says whether it was.
    pub fn advance(&mut self, dot: &Dot) -> bool {
        let next = self.get(&dot.origin).checked_add(1) == Some(dot.seq);
        if next {
            self.0.insert(dot.origin.clone(), dot.seq);
        }
        next
    }

    /// Lifts `origin` to `seq`; never lowers it. Says whether that changed anything.
    pub fn lift(&mut self, origin: &Origin, seq: u64) -> bool {
        let lifts = seq > self.get(origin);
        if lifts {
            self.0.insert(origin.clone(), seq);
        }
        lifts
    }

    /// Lowers `origin` to `seq` if it is above.
    pub(crate) fn cap(&mut self, origin: &Origin, seq: u64) {
        if let Some(have) = self.0.get_mut(origin) {
            *have = (*have).min(seq);
        }
    }

    /// What differs from what was said before: of every such origin, how far it is complete now.
    pub(crate) fn since(&self, before: &Self) -> Self {
        self.iter()
            .filter(|(origin, seq)| before.get(origin) != *seq)
            .map(|(origin, seq)| (origin.clone(), seq))
            .collect()
    }

    /// Takes over what was said by [`VersionVector::since`].
    pub(crate) fn set(&mut self, changed: &Self) {
        self.0.extend(changed.0.clone());
    }

    /// What both have.
    pub(crate) fn meet(&self, other: &Self) -> Self {
        self.iter().map(|(origin, seq)| (origin.clone(), seq.min(other.get(origin)))).collect()
    }

    /// How many writes it covers.
    pub fn total(&self) -> u64 {
        self.0.values().fold(0, |sum, seq| sum.saturating_add(*seq))
    }

    /// Whether it covers a write.
    pub fn covers(&self, dot: &Dot) -> bool {
        self.get(&dot.origin) >= dot.seq
    }

    /// Whether `other` has a write that this lacks.
    pub fn lacks(&self, other: &Self) -> bool {
        other.iter().any(|(origin, seq)| seq > self.get(origin))
    }

    /// Origins and how far each is complete, in the order of origins.
    pub fn iter(&self) -> impl Iterator<Item = (&Origin, u64)> {
        self.0.iter().map(|(origin, seq)| (origin, *seq))
    }

    /// How many origins it knows.
    pub fn len(&self) -> usize {
        self.0.len()
    }

    /// Whether it knows none.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl FromIterator<(Origin, u64)> for VersionVector {
    fn from_iter<I: IntoIterator<Item = (Origin, u64)>>(pairs: I) -> Self {
        Self(pairs.into_iter().collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(node: &str) -> Origin {
        Origin { node: node.parse().unwrap(), incarnation: 1 }
    }

    fn dot(node: &str, seq: u64) -> Dot {
        Dot { origin: origin(node), seq }
    }

    #[test]
    fn a_gap_is_not_counted() {
        let mut vector = VersionVector::default();
        assert!(vector.advance(&dot("a", 1)));
        assert!(!vector.advance(&dot("a", 3)));
        assert_eq!(vector.get(&origin("a")), 1);
        assert!(vector.advance(&dot("a", 2)));
        assert!(vector.advance(&dot("a", 3)));
        assert!(!vector.advance(&dot("a", 3)));
        assert_eq!(vector.get(&origin("a")), 3);
    }

    #[test]
    fn two_incarnations_of_a_node_are_two_origins() {
        let mut vector = VersionVector::default();
        vector.advance(&dot("a", 1));
        assert_eq!(vector.get(&Origin { incarnation: 2, ..origin("a") }), 0);
    }

    #[test]
    fn lacks_compares_every_origin() {
        let ahead = VersionVector::from_iter([(origin("a"), 2), (origin("b"), 1)]);
        let mut behind = VersionVector::from_iter([(origin("a"), 3)]);
        assert!(behind.lacks(&ahead));
        assert!(behind.lift(&origin("b"), 1));
        assert!(!behind.lift(&origin("b"), 1));
        assert!(!behind.lacks(&ahead));
        assert!(ahead.lacks(&behind));
    }
}
