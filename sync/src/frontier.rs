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

use crate::entry::{Origin, fold, mix, put_origin};
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

    /// The roster, and what `vector` holds of origins that promise nothing, as one number: what nodes say of different
    /// rosters does not add up.
    pub(crate) fn rest(&self, own: &Origin, vector: &VersionVector) -> u64 {
        let promises =
            |origin: &Origin| origin == own || self.rows.get(&origin.node).is_some_and(|row| row.origin == *origin);
        let rest = vector.iter().filter(|(origin, seq)| *seq > 0 && !promises(origin));
        let members = self.members.iter().flatten().fold(0, |sum, member| sum ^ mix(fold(member.as_str().as_bytes())));
        rest.fold(members, |sum, (origin, seq)| {
            let mut bytes = Vec::new();
            put_origin(&mut bytes, origin);
            sum ^ mix(fold(&bytes) ^ mix(seq))
        })
    }

    /// Up to when the whole roster has everything; none while that can't be known.
    pub(crate) fn get(&self, own: &NodeName, rest: u64, alive: &BTreeSet<NodeName>) -> Option<Stamp> {
        let members = self.members.as_ref()?;
        let mut least = self.level;
        for member in members.iter().filter(|member| *member != own) {
            if planted::is(Bug::FrontierOfAlive) && !alive.contains(member) {
                continue;
            }
            let row = self.rows.get(member)?;
            if row.rest != rest {
                return None;
            }
            least = least.min(row.cut);
        }
        Some(least)
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
        Row { origin: origin(node), promise: Stamp::at_ms(promise), seq, cut: Stamp::at_ms(cut), rest: 0 }
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
        assert_eq!(frontier.get(&own, 0, &BTreeSet::new()), None);
        frontier.learn(row("c", 400, 0, 50));
        update(&mut frontier);
        assert_eq!(frontier.get(&own, 0, &BTreeSet::new()), Some(Stamp::at_ms(50)));
        // Who has other writes of a dead incarnation than we stops it.
        assert_eq!(frontier.get(&own, 1, &BTreeSet::new()), None);
        frontier.set_members(["a", "b"].iter().map(|node| node.parse().unwrap()).collect());
        update(&mut frontier);
        assert_eq!(frontier.get(&own, 0, &BTreeSet::new()), Some(Stamp::at_ms(300)));
    }

    #[test]
    fn who_comes_back_with_older_writes_holds_the_frontier_but_not_the_cut() {
        let own: NodeName = "a".parse().unwrap();
        let mut frontier = frontier(&["a"]);
        let mut vector = VersionVector::default();
        let alone = frontier.rest(&origin("a"), &vector);
        frontier.update(&own, Stamp::at_ms(500), &vector);
        assert_eq!(frontier.get(&own, 0, &BTreeSet::new()), Some(Stamp::at_ms(500)));
        frontier.set_members(["a", "b"].iter().map(|node| node.parse().unwrap()).collect());
        assert_ne!(frontier.rest(&origin("a"), &vector), alone);
        frontier.learn(row("b", 600, 3, 600));
        frontier.update(&own, Stamp::at_ms(700), &vector);
        assert_eq!(frontier.get(&own, 0, &BTreeSet::new()), Some(Stamp::default()));
        assert_eq!(frontier.cut(), Stamp::at_ms(500));
        vector.lift(&origin("b"), 3);
        frontier.update(&own, Stamp::at_ms(700), &vector);
        assert_eq!(frontier.get(&own, 0, &BTreeSet::new()), Some(Stamp::at_ms(600)));
    }

    #[test]
    fn a_floor_is_an_epoch_behind_the_frontier_and_the_grace() {
        assert_eq!(floor_of(Stamp::at_ms(190), 1_000, 100, 60), Stamp::at_ms(180));
        assert_eq!(floor_of(Stamp::at_ms(990), 1_000, 100, 60), Stamp::at_ms(900));
        assert_eq!(floor_of(Stamp::at_ms(990), 50, 100, 60), Stamp::default());
    }
}
