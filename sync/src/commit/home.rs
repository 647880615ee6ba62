//! Homes within the committer: whether a write may be made here, and what must be on disk before anybody hears of it.

use std::collections::BTreeSet;

use selvage_config::plan::Home;
use selvage_config::{NodeName, StoreName};
use tokio::sync::oneshot;

use super::{Committer, Seen, apply, now_ms, refused};
use crate::engine::{Batch, EngineError};
use crate::entry::Key;
use crate::home::{Claim, Claimed, Place};
use crate::read::{self, ReadError};
use crate::record::Record;
use crate::replica::Action;
use crate::store::{HIDDEN, HomeError, KvError};

/// What reaches the committer of homes.
pub(crate) enum HomeInput {
    /// What the plan says, and who is in the roster.
    Plan { homes: Vec<Home>, members: BTreeSet<NodeName> },
    /// Time passed: become the home where nothing is missing; whom to ask where something is.
    Claims(oneshot::Sender<Vec<(NodeName, Claim)>>),
    /// A node answered a claim.
    Claimed { node: NodeName, claim: Claim, answer: Claimed },
    /// A node claims to be a home.
    Release { from: NodeName, claim: Claim, reply: oneshot::Sender<Claimed> },
    /// Answered once all that a reader can have seen is durable, if this node is still the home of this term.
    Settle { store: StoreName, term: u64, reply: oneshot::Sender<Result<(), KvError>> },
}

/// What is told after the flush.
pub(super) enum Told {
    Claims(Vec<(NodeName, Claim)>, oneshot::Sender<Vec<(NodeName, Claim)>>),
    Released(Claimed, oneshot::Sender<Claimed>),
    Settled(oneshot::Sender<Result<(), KvError>>),
}

impl HomeInput {
    /// Whether readers shall see at once what it changed.
    pub(super) fn is_shown(&self) -> bool {
        !matches!(self, Self::Settle { .. })
    }
}

impl Committer {
    /// Whether a write may be made: nothing is written between this and the event that follows.
    pub(super) fn admits(&self, key: &Key, seen: Option<&Seen>) -> Result<(), KvError> {
        // Chunks have keys of their own. What makes them a value is decided.
        if !key.name.starts_with(HIDDEN) {
            let place = self.homes.place(&key.store, self.replica.origin().incarnation);
            if !matches!(place, Place::Free | Place::Here { .. }) {
                return Err(HomeError::not_here(&key.store, &place).into());
            }
        }
        seen.map_or(Ok(()), |seen| self.stands(key, seen))
    }

    /// Whether what was `seen` stands at `key` now.
    fn stands(&self, key: &Key, seen: &Seen) -> Result<(), KvError> {
        let name = || key.name.clone();
        let now = now_ms();
        let is = |record: &Record| match seen {
            Seen::Value(value) => record.value(now) == *value,
            Seen::Version(None) => !record.exists(now),
            Seen::Version(Some(dot)) => {
                record.exists(now) && record.newest().is_some_and(|newest| newest.version.dot == *dot)
            }
        };
        match read::record(self.engine.as_ref(), key) {
            Ok(record) if is(&record) => Ok(()),
            Ok(_) => Err(KvError::Changed { key: name() }),
            Err(ReadError::Corrupt(_)) => Err(KvError::Corrupt { key: name() }),
            Err(ReadError::Engine(error)) => Err(KvError::Engine(error)),
        }
    }

    /// Takes one input. What is kept of it is applied now and told after the flush.
    pub(super) fn home(&mut self, input: HomeInput, later: &mut Vec<Action>) {
        let (incarnation, vector) = (self.replica.origin().incarnation, self.replica.vector());
        let batch = match input {
            HomeInput::Plan { homes, members } => self.homes.plan(homes, members),
            HomeInput::Claims(reply) => {
                let batch = self.homes.settle(incarnation, vector);
                let (claimed, claims) = self.homes.claims(incarnation);
                self.told.push(Told::Claims(claims, reply));
                self.keep(batch, later);
                claimed
            }
            HomeInput::Claimed { node, claim, answer } => {
                self.homes.claimed(&node, &claim, answer);
                self.homes.settle(incarnation, vector)
            }
            HomeInput::Release { from, claim, reply } => {
                let (batch, claimed) = self.homes.release(&from, &claim, vector);
                self.told.push(Told::Released(claimed, reply));
                // What is granted follows from what an earlier input may have brought.
                later.push(Action::Flush);
                batch
            }
            HomeInput::Settle { store, term, reply } => {
                let place = self.homes.place(&store, incarnation);
                if matches!(place, Place::Here { term: now } if now == term) {
                    self.told.push(Told::Settled(reply));
                    later.push(Action::Flush);
                } else {
                    let _gone = reply.send(Err(HomeError::not_here(&store, &place).into()));
                }
                Batch::default()
            }
        };
        self.keep(batch, later);
    }

    fn keep(&mut self, batch: Batch, later: &mut Vec<Action>) {
        if batch.is_empty() {
            return;
        }
        later.push(Action::Flush);
        let kept = if self.failed.is_some() {
            Ok(())
        } else {
            apply(self.engine.as_ref(), vec![Action::Commit(batch)], later)
        };
        if let Err(error) = kept {
            self.fail(error);
        }
    }

    /// Tells what was to be durable first. Where it is not, nobody is told that it were.
    pub(super) fn tell_homes(&mut self) {
        let trouble: Option<EngineError> = self.failed.clone().or_else(|| self.full.clone());
        for told in std::mem::take(&mut self.told) {
            // Who asked may be gone.
            match (told, &trouble) {
                (Told::Released(claimed, reply), None) => drop(reply.send(claimed)),
                (Told::Claims(claims, reply), None) => drop(reply.send(claims)),
                (Told::Claims(_, reply), Some(_)) => drop(reply.send(Vec::new())),
                (Told::Released(..), Some(_)) => {}
                (Told::Settled(reply), None) => drop(reply.send(Ok(()))),
                (Told::Settled(reply), Some(error)) => drop(reply.send(Err(refused(error.clone())))),
            }
        }
    }
}
