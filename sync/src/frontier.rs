//! The frontier: up to when every node of the roster has every write.
//!
//! Every node promises from time to time that it will write nothing older than a stamp, and how many writes it had
//! made by then. Who has all these writes of every node of the roster has a *cut*: the least of these promises. The
//! least cut of the roster is the frontier: whatever is older reached every node. A node collects tombstones and
//! expired entries only up to its *floor*, which follows the frontier by the grace, and never goes back.
//!
//! A promise binds one incarnation. Writes of earlier incarnations, and of nodes outside the roster, have no promise:
//! the frontier stands still until all nodes of the roster have the same of them ([`Row::rest`]).

use std::collections::{BTreeMap, BTreeSet};

use selvage_config::NodeName;

use crate::entry::{Dot, Origin, fold, mix, put_origin};
use crate::planted::{self, Bug};
use crate::stamp::Stamp;
use crate::vector::VersionVector;

/// How much older than now a mortal entry must be before it is collected, milliseconds: longer than any frame can
/// be under way, and than any clock may be wrong.
pub const GRACE_MS: u64 = 3_600_000;

/// The floor is a multiple of this, milliseconds: nodes then collect the same things at once.
pub const EPOCH_MS: u64 = 60_000;

/// Nodes of which a promise is kept, at most.
pub const ROWS_MAX: usize = 4096;

/// What one node says of itself, and others pass on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Row {
    /// Which node, and as which incarnation it writes now.
    pub origin: Origin,
    /// It will write nothing at or before this.
    pub promise: Stamp,
    /// How many writes it had made by then.
    pub seq: u64,
    /// The least promise of the roster whose writes it all has.
    pub cut: Stamp,
    /// The roster that it knows, and what it has of origins that promise nothing, as one number.
    pub rest: u64,
    /// Up to where it had collected by then: what ended before is not in `rest`.
    pub floor: Stamp,
}

/// A write that is here though the vector does not cover it, of an origin that promises nothing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Beyond {
    pub(crate) dot: Dot,
    /// [`Entry::mortal_ms`](crate::Entry::mortal_ms) of it.
    pub(crate) mortal_ms: Option<u64>,
}

/// What a node knows of the roster's progress.
#[derive(Debug, Default)]
pub(crate) struct Frontier {
    /// The roster, this node included; none before it was told.
    members: Option<BTreeSet<NodeName>>,
    rows: BTreeMap<NodeName, Row>,
    /// Of every member, the newest promise up to which nothing is missing here.
    held: BTreeMap<NodeName, Stamp>,
    /// Of this roster, the least promise whose writes are all here: the cut, but for members that came back with
    /// older writes.
    level: Stamp,
    cut: Stamp,
    floor: Stamp,
}

impl Frontier {
    /// As it was when this was stored.
    pub(crate) fn resume(cut: Stamp, floor: Stamp) -> Self {
        Self { cut, floor, ..Self::default() }
    }

    pub(crate) fn set_members(&mut self, members: BTreeSet<NodeName>) {
        self.rows.retain(|node, _| members.contains(node));
        self.held.retain(|node, _| members.contains(node));
        if self.members.as_ref() != Some(&members) {
            self.level = Stamp::default();
        }
        self.members = Some(members);
    }

    /// Whether a node may be listened to: it is in the roster, or there is none yet and so no collection either.
    pub(crate) fn admits(&self, node: &NodeName) -> bool {
        self.members.as_ref().is_none_or(|members| members.contains(node))
    }

    /// Whether the roster has other nodes.
    pub(crate) fn has_others(&self, own: &NodeName) -> bool {
        self.members.as_ref().is_some_and(|members| members.iter().any(|member| member != own))
    }

    /// What this node has of the roster as it is now.
    pub(crate) fn level(&self) -> Stamp {
        self.level
    }

    /// Every delete up to this was processed here.
    pub(crate) fn cut(&self) -> Stamp {
        self.cut
    }

    /// Mortal entries up to this may have been dropped here.
    pub(crate) fn floor(&self) -> Stamp {
        self.floor
    }

    pub(crate) fn raise_floor(&mut self, floor: Stamp) {
        self.floor = self.floor.max(floor);
    }

    /// Takes over the cut of a node whose whole state was taken.
    pub(crate) fn adopt_cut(&mut self, cut: Stamp) {
        self.cut = self.cut.max(cut);
    }

    pub(crate) fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }

    /// Takes a row in, if it is of the roster and newer than what is known.
    pub(crate) fn learn(&mut self, row: Row) {
        let listed = self.members.as_ref().is_some_and(|members| members.contains(&row.origin.node));
        let newer = self.rows.get(&row.origin.node).is_none_or(|known| known.promise < row.promise);
        if listed && newer && self.rows.len() < ROWS_MAX {
            self.rows.insert(row.origin.node.clone(), row);
        }
    }

    /// Renews this node's cut by what it has now.
    pub(crate) fn update(&mut self, own: &NodeName, promise: Stamp, vector: &VersionVector) {
        let Some(members) = &self.members else { return };
        for row in self.rows.values().filter(|row| vector.get(&row.origin) >= row.seq) {
            let held = self.held.entry(row.origin.node.clone()).or_default();
            *held = (*held).max(row.promise);
        }
        let others = members.iter().filter(|member| *member != own);
        let least = others.map(|member| self.held.get(member).copied().unwrap_or_default()).min();
        self.level = least.unwrap_or(promise).min(promise);
        self.cut = self.cut.max(self.level);
    }

    /// Whether an origin has made a promise that binds it now.
    pub(crate) fn promises(&self, own: &Origin, origin: &Origin) -> bool {
        origin == own || self.rows.get(&origin.node).is_some_and(|row| row.origin == *origin)
    }

    /// The roster, and what `vector` holds of origins that promise nothing, as one number: what nodes say of different
    /// rosters does not add up. What is beyond a gap supersedes what it supersedes, so it must be everywhere before it is
    /// collected anywhere; but what ended before `floor` may have been by somebody, who knew that it was.
    pub(crate) fn rest(&self, own: &Origin, vector: &VersionVector, beyond: &[Beyond], floor: Stamp) -> u64 {
        let number = |origin: &Origin, seq: u64| {
            let mut bytes = Vec::new();
            put_origin(&mut bytes, origin);
            mix(fold(&bytes) ^ mix(seq))
        };
        let members = self.members.iter().flatten().fold(0, |sum, member| sum ^ mix(fold(member.as_str().as_bytes())));
        let rest = vector.iter().filter(|(origin, seq)| *seq > 0 && !self.promises(own, origin));
        let rest = rest.fold(members, |sum, (origin, seq)| sum ^ number(origin, seq));
        let lasting = beyond.iter().filter(|one| one.mortal_ms.is_none_or(|mortal| mortal >= floor.ms()));
        lasting.fold(rest, |sum, Beyond { dot, .. }| sum ^ number(&dot.origin, dot.seq).rotate_left(1))
    }

    /// Up to when the whole roster has everything, where they also agree on the rest ([`Frontier::agrees`]); none while
    /// that can't be known.
    pub(crate) fn get(&self, own: &NodeName, alive: &BTreeSet<NodeName>) -> Option<Stamp> {
        let rows: Option<Vec<&Row>> = self.others(own, alive)?.collect();
        Some(rows?.into_iter().fold(self.level, |least, row| least.min(row.cut)))
    }

    /// Whether all others of the roster said last that they have the same of origins that promise nothing, and know the
    /// same roster. One that has collected further leaves more out, and so does `rest` then.
    pub(crate) fn agrees(&self, own: &NodeName, rest: impl Fn(Stamp) -> u64, alive: &BTreeSet<NodeName>) -> bool {
        let agrees = |row: Option<&Row>| row.is_some_and(|row| row.rest == rest(row.floor.max(self.floor)));
        self.others(own, alive).is_some_and(|mut rows| rows.all(agrees))
    }

    /// The members that keep this node from collecting: they said nothing yet, or last that they have something else of
    /// origins that promise nothing, or know another roster.
    pub(crate) fn apart(&self, own: &NodeName, rest: impl Fn(Stamp) -> u64) -> BTreeSet<NodeName> {
        let agrees = |row: &Row| row.rest == rest(row.floor.max(self.floor));
        let others = self.members.iter().flatten().filter(|member| *member != own);
        others.filter(|member| !self.rows.get(*member).is_some_and(agrees)).cloned().collect()
    }

    /// What the others of the roster said last, if they did.
    fn others<'a>(
        &'a self,
        own: &'a NodeName,
        alive: &'a BTreeSet<NodeName>,
    ) -> Option<impl Iterator<Item = Option<&'a Row>>> {
        let counts = move |member: &NodeName| !planted::is(Bug::FrontierOfAlive) || alive.contains(member);
        let others = self.members.as_ref()?.iter().filter(move |member| *member != own && counts(member));
        Some(others.map(|member| self.rows.get(member)))
    }
}

/// The floor that a frontier allows.
pub(crate) fn floor_of(frontier: Stamp, now_ms: u64, grace_ms: u64, epoch_ms: u64) -> Stamp {
    let ms = frontier.ms().min(now_ms.saturating_sub(grace_ms));
    Stamp::at_ms(ms / epoch_ms * epoch_ms)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(node: &str) -> Origin {
        Origin { node: node.parse().unwrap(), incarnation: 1 }
    }

    fn row(node: &str, promise: u64, seq: u64, cut: u64) -> Row {
        Row {
            origin: origin(node),
            promise: Stamp::at_ms(promise),
            seq,
            cut: Stamp::at_ms(cut),
            rest: 0,
            floor: Stamp::default(),
        }
    }

    fn frontier(members: &[&str]) -> Frontier {
        let mut frontier = Frontier::default();
        frontier.set_members(members.iter().map(|node| node.parse().unwrap()).collect());
        frontier
    }

    #[test]
    fn the_cut_waits_for_the_promised_writes_of_every_member() {
        let own: NodeName = "a".parse().unwrap();
        let mut frontier = frontier(&["a", "b", "c"]);
        let mut vector = VersionVector::default();
        frontier.learn(row("b", 100, 2, 0));
        frontier.update(&own, Stamp::at_ms(200), &vector);
        assert_eq!(frontier.cut(), Stamp::default());
        frontier.learn(row("c", 90, 0, 0));
        frontier.update(&own, Stamp::at_ms(200), &vector);
        assert_eq!(frontier.cut(), Stamp::default());
        vector.lift(&origin("b"), 2);
        frontier.update(&own, Stamp::at_ms(200), &vector);
        assert_eq!(frontier.cut(), Stamp::at_ms(90));
    }

    #[test]
    fn the_frontier_is_over_the_roster_not_over_who_is_heard() {
        let own: NodeName = "a".parse().unwrap();
        let mut frontier = frontier(&["a", "b", "c"]);
        let update = |frontier: &mut Frontier| frontier.update(&own, Stamp::at_ms(500), &VersionVector::default());
        frontier.learn(row("b", 400, 0, 300));
        update(&mut frontier);
        assert_eq!(frontier.get(&own, &BTreeSet::new()), None);
        frontier.learn(row("c", 400, 0, 50));
        update(&mut frontier);
        assert_eq!(frontier.get(&own, &BTreeSet::new()), Some(Stamp::at_ms(50)));
        // Who has other writes of a dead incarnation than we stops it.
        assert!(frontier.agrees(&own, |_| 0, &BTreeSet::new()));
        assert!(!frontier.agrees(&own, |_| 1, &BTreeSet::new()));
        assert!(frontier.apart(&own, |_| 0).is_empty());
        assert_eq!(frontier.apart(&own, |_| 1).len(), 2);
        frontier.set_members(["a", "b"].iter().map(|node| node.parse().unwrap()).collect());
        update(&mut frontier);
        assert_eq!(frontier.get(&own, &BTreeSet::new()), Some(Stamp::at_ms(300)));
    }

    #[test]
    fn who_comes_back_with_older_writes_holds_the_frontier_but_not_the_cut() {
        let own: NodeName = "a".parse().unwrap();
        let mut frontier = frontier(&["a"]);
        let mut vector = VersionVector::default();
        let alone = frontier.rest(&origin("a"), &vector, &[], Stamp::default());
        frontier.update(&own, Stamp::at_ms(500), &vector);
        assert_eq!(frontier.get(&own, &BTreeSet::new()), Some(Stamp::at_ms(500)));
        frontier.set_members(["a", "b"].iter().map(|node| node.parse().unwrap()).collect());
        assert_ne!(frontier.rest(&origin("a"), &vector, &[], Stamp::default()), alone);
        frontier.learn(row("b", 600, 3, 600));
        frontier.update(&own, Stamp::at_ms(700), &vector);
        assert_eq!(frontier.get(&own, &BTreeSet::new()), Some(Stamp::default()));
        assert_eq!(frontier.cut(), Stamp::at_ms(500));
        vector.lift(&origin("b"), 3);
        frontier.update(&own, Stamp::at_ms(700), &vector);
        assert_eq!(frontier.get(&own, &BTreeSet::new()), Some(Stamp::at_ms(600)));
    }

    #[test]
    fn what_is_beyond_a_gap_of_an_earlier_incarnation_is_part_of_the_rest() {
        let mut frontier = frontier(&["a", "b"]);
        let vector = VersionVector::from_iter([(origin("b"), 1)]);
        let beyond = |seq| Beyond { dot: Dot { origin: origin("b"), seq }, mortal_ms: Some(50) };
        let rest = |beyond: &[Beyond], floor| frontier.rest(&origin("a"), &vector, beyond, Stamp::at_ms(floor));
        assert_ne!(rest(&[beyond(3)], 50), rest(&[], 50));
        assert_ne!(rest(&[beyond(3)], 50), rest(&[beyond(4)], 50));
        // Who has collected it leaves it out, and so does who compares with that one.
        assert_eq!(rest(&[beyond(3)], 51), rest(&[], 51));
        assert!(!frontier.promises(&origin("a"), &origin("b")));
        frontier.learn(row("b", 100, 2, 0));
        assert!(frontier.promises(&origin("a"), &origin("b")) && frontier.promises(&origin("a"), &origin("a")));
        assert!(frontier.admits(&origin("b").node) && !frontier.admits(&"c".parse().unwrap()));
    }

    #[test]
    fn a_floor_is_an_epoch_behind_the_frontier_and_the_grace() {
        assert_eq!(floor_of(Stamp::at_ms(190), 1_000, 100, 60), Stamp::at_ms(180));
        assert_eq!(floor_of(Stamp::at_ms(990), 1_000, 100, 60), Stamp::at_ms(900));
        assert_eq!(floor_of(Stamp::at_ms(990), 50, 100, 60), Stamp::default());
    }
}
