//! How a node becomes the home of a store: it asks whoever may have decided before it to say that it does no more.
//!
//! Who that is: of the homes before, the newest first, until one did decide, for it had itself done this and has all
//! that those before it acknowledged. Where there is none, or it is given up, or what this node knows of its own time as
//! home may be gone with an earlier life: every node of the roster. Each answers with what it has, and the home decides
//! once it has all of that.

use std::collections::{BTreeMap, BTreeSet};

use selvage_config::plan::Home;
use selvage_config::{NodeName, StoreName};

use super::row::{CLAIMS_MAX, Grant, Held, Row};
use super::{Claim, Claimed, Homes, Released};
use crate::engine::Batch;
use crate::layout;
use crate::planted::{self, Bug};
use crate::vector::VersionVector;

/// How far this node has come.
#[derive(Debug, Default)]
pub(super) struct Claiming {
    answers: BTreeMap<NodeName, Released>,
    /// The first of the answers is of an earlier life than this: they must be had anew.
    incarnation: u64,
}

/// What is missing before a node is the home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Wanted {
    /// The answers of these; nothing if there are none.
    Answers(BTreeSet<NodeName>),
    /// What this one acknowledged: it was made way for and does not remember.
    Lost(NodeName),
}

impl Wanted {
    fn nothing() -> Self {
        Self::Answers(BTreeSet::new())
    }
}

impl Homes {
    /// Whom this node asks, and for what, to become the home of stores that it is named for. What it asks for is to be
    /// on disk before: else it might become the home, lose its disk and not know.
    pub(crate) fn claims(&mut self, incarnation: u64) -> (Batch, Vec<(NodeName, Claim)>) {
        let (mut batch, mut claims) = (Batch::default(), Vec::new());
        for (store, row) in self.coming(incarnation) {
            if let Wanted::Answers(nodes) = self.wanted(store, row, incarnation) {
                let claim = Claim { store: store.clone(), term: row.term, incarnation };
                claims.extend(nodes.into_iter().map(|node| (node, claim.clone())));
            }
        }
        for (_, claim) in &claims {
            let Some(row) = self.rows.get_mut(&claim.store) else { continue };
            let made = Held { term: claim.term, incarnation };
            if !row.claims.contains(&made) {
                row.claims.push(made);
                let old = row.claims.len().saturating_sub(CLAIMS_MAX);
                row.claims.drain(..old);
                batch.put(layout::home(&claim.store), row.encode());
            }
        }
        (batch, claims)
    }

    /// Takes the answer of a node.
    pub(crate) fn claimed(&mut self, node: &NodeName, claim: &Claim, answer: Claimed) {
        let is_now = self.rows.get(&claim.store).is_some_and(|row| row.term == claim.term);
        if !is_now || !self.planned.contains_key(&claim.store) {
            return;
        }
        let claiming = self.claiming.entry(claim.store.clone()).or_default();
        if claiming.incarnation != claim.incarnation {
            *claiming = Claiming { incarnation: claim.incarnation, ..Claiming::default() };
        }
        // Else it is asked again: the plan may be on its way to it, or a newer one to here.
        if let Claimed::Released(released) = answer {
            // The first answer tells whom the node had made way for before this claim.
            claiming.answers.entry(node.clone()).or_insert(released);
        }
    }

    /// Becomes the home wherever nothing is missing any more. It is so from now on, and is to be kept on disk before any
    /// write is acknowledged.
    pub(crate) fn settle(&mut self, incarnation: u64, vector: &VersionVector) -> Batch {
        let mut batch = Batch::default();
        let ready: Vec<StoreName> = self
            .coming(incarnation)
            .filter(|(store, row)| {
                self.wanted(store, row, incarnation) == Wanted::nothing() && self.covers(store, vector)
            })
            .map(|(store, _)| store.clone())
            .collect();
        for store in ready {
            self.claiming.remove(&store);
            if let Some(row) = self.rows.get_mut(&store) {
                let term = row.term;
                row.held = Some(Held { term, incarnation });
                // Whoever may have decided before is known to have made way.
                row.grants.retain(|grant| grant.held.term > term);
                batch.put(layout::home(&store), row.encode());
            }
        }
        batch
    }

    /// The stores that this node is named for and does not decide yet. Without a plan nobody knows who did before.
    fn coming(&self, incarnation: u64) -> impl Iterator<Item = (&StoreName, &Row)> {
        self.rows.iter().filter(move |(store, row)| {
            let is_held = row.held == Some(Held { term: row.term, incarnation });
            row.home.as_ref() == Some(&self.own) && !is_held && self.planned.contains_key(*store)
        })
    }

    /// Whether all that those who answered had is here.
    fn covers(&self, store: &StoreName, vector: &VersionVector) -> bool {
        let answers = self.claiming.get(store).into_iter().flat_map(|claiming| claiming.answers.values());
        planted::is(Bug::HomeEager) || answers.into_iter().all(|released| !vector.lacks(&released.vector))
    }

    /// What is missing, but for what was said to be here.
    pub(super) fn wanted(&self, store: &StoreName, row: &Row, incarnation: u64) -> Wanted {
        let Some(plan) = self.planned.get(store) else { return Wanted::nothing() };
        let none = BTreeMap::new();
        let claiming = self.claiming.get(store).filter(|claiming| claiming.incarnation == incarnation);
        let answers = claiming.map_or(&none, |claiming| &claiming.answers);
        let decided = match self.last_holder(plan, row, incarnation, answers) {
            Holder::Asked(node) => return Wanted::Answers([node].into()),
            Holder::Was(term) => term,
            Holder::Nobody => {
                let others = self.members.iter().filter(|member| **member != self.own);
                let silent: BTreeSet<_> = others.filter(|member| !answers.contains_key(*member)).cloned().collect();
                if !silent.is_empty() {
                    return Wanted::Answers(silent);
                }
                plan.lost
            }
        };
        // Whoever was made way for since then may have decided, unless it remembers that it asked and did not.
        let grants = answers.values().flat_map(|released| &released.grants).chain(&row.grants);
        for Grant { node, held } in grants.filter(|grant| grant.held.term > decided) {
            let (last, claims) = match answers.get(node) {
                _ if *node == self.own => (row.held.map(|held| held.term), &row.claims),
                Some(released) => (released.held, &released.claims),
                None => return Wanted::Answers([node.clone()].into()),
            };
            let remembers = claims.contains(held) || last.is_some_and(|last| last >= held.term);
            if !remembers && !planted::is(Bug::HomeTaken) {
                return Wanted::Lost(node.clone());
            }
        }
        Wanted::nothing()
    }

    /// Who decided last, as far as the answers tell.
    fn last_holder(&self, plan: &Home, row: &Row, incarnation: u64, answers: &BTreeMap<NodeName, Released>) -> Holder {
        let mut former: BTreeSet<(u64, &NodeName)> =
            plan.former.iter().map(|former| (former.term, &former.node)).collect();
        // What nodes were told of homes before this one, which the control plane may have forgotten.
        let before = answers.values().filter_map(|released| released.before.as_ref()).chain(&row.before);
        former.extend(before.map(|(term, node)| (*term, node)));
        former.extend(answers.iter().filter_map(|(node, released)| Some((released.held?, node))));
        former.extend(row.held.map(|held| (held.term, &self.own)));
        for (term, node) in former.into_iter().rev().filter(|(term, _)| *term > plan.lost) {
            let last = match answers.get(node) {
                _ if *node == self.own => match row.held.filter(|held| held.term >= term) {
                    // An earlier life did: what others have of it is here once all of them have answered.
                    Some(held) if held.incarnation != incarnation => return Holder::Nobody,
                    held => held.map(|held| held.term),
                },
                Some(released) => released.held,
                None => return Holder::Asked(node.clone()),
            };
            if let Some(last) = last.filter(|last| *last >= term) {
                return Holder::Was(last);
            }
        }
        Holder::Nobody
    }
}

/// Who decided before this node.
enum Holder {
    /// This one must be asked first.
    Asked(NodeName),
    /// Somebody whose answer is here, as the home of this term.
    Was(u64),
    /// Nobody who is known, or who is not given up.
    Nobody,
}
