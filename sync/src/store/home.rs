//! Stores that have a home: what is asked of it, and what this node answers where it is the home itself.
//!
//! Every write goes through here. Where the store has no home this node decides, as it does where it is the home; else
//! the write is carried to the home, decided and made durable there, and awaited here, so that a reader of this node
//! sees it.

mod claim;
mod counts;

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use ring::digest::{SHA256, digest};
use selvage_config::plan::Home;
use selvage_config::{NodeName, StoreName};
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout};

use super::chunks::LARGE_BYTES_MAX;
use super::terms::METADATA_BYTES_MAX;
use super::{Kept, Kv, KvError, Shared, Terms, WRITE_OVERHEAD_BYTES, check, is_shown};
use crate::commit::{HomeInput, Input, Seen, now_ms};
use crate::entry::KEY_BYTES_MAX;
use crate::home::Place;
use crate::home::wire::{Answer, HASH_BYTES, Op, Outcome, Request};
use crate::link::{Asked, Unanswered};
use crate::replica::{Write, Written};
use crate::session::Token;

pub(super) use claim::start;
use counts::Counters;
pub use counts::HomeCounts;

/// How long anything may take that a home is asked for, milliseconds. A move of the home is waited for as long.
const ASK_MS_MAX: u64 = 5_000;

/// How long a link that is not there is waited for, milliseconds: it may just be made anew.
const LINK_MS_MAX: u64 = 1_000;

/// Time until what was surely not done is asked again, milliseconds.
const AGAIN_MS: u64 = 50;

/// How long a writer waits for its own write to come back from the home, milliseconds.
const BACK_MS_MAX: u64 = 2_000;

/// Questions of peers that are decided at once; more are refused as overload.
const DECIDED_MAX: usize = 1_024;

/// Questions of peers that wait to be looked at.
pub(super) const ASKED_MAX: usize = 64;

/// Why the home of a store did not do what it was asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum HomeError {
    /// This node has no link to it. Nothing was written.
    #[error("no link to {home}, the home of store {store}: nothing was written")]
    Unreachable {
        /// The store.
        store: StoreName,
        /// Its home.
        home: NodeName,
    },
    /// It was asked, and did not answer in time.
    #[error("no answer of {home}, the home of store {store}: what was asked for may have been done")]
    Unknown {
        /// The store.
        store: StoreName,
        /// Its home.
        home: NodeName,
    },
    /// The node that was asked is not the home, or not yet. Nothing was written.
    #[error("store {store} is moving to its home {home}: nothing was written")]
    Moving {
        /// The store.
        store: StoreName,
        /// Its home, as far as this node knows.
        home: String,
    },
    /// The home lost what it had, and somebody must say what to do.
    #[error(
        "{home}, the home of store {store} before, has lost what it acknowledged: nothing is written until it is given up"
    )]
    Lost {
        /// The store.
        store: StoreName,
        /// Its home.
        home: String,
    },
    /// It is a program that knows no homes.
    #[error("{home}, the home of store {store}, runs a version that knows no homes")]
    Older {
        /// The store.
        store: StoreName,
        /// Its home.
        home: NodeName,
    },
    /// It refuses, as any node might.
    #[error("{home}, the home of store {store}: {why}")]
    Refused {
        /// The store.
        store: StoreName,
        /// Its home.
        home: NodeName,
        /// Why.
        why: String,
    },
}

impl HomeError {
    /// What a node says that is asked to decide and does not.
    pub(crate) fn not_here(store: &StoreName, place: &Place) -> Self {
        let (store, here) = (store.clone(), || "this node".to_owned());
        match place {
            Place::Coming { lost: Some(home), .. } => Self::Lost { store, home: home.to_string() },
            Place::At { home, .. } => Self::Moving { store, home: home.to_string() },
            Place::Free | Place::Here { .. } | Place::Coming { .. } => Self::Moving { store, home: here() },
        }
    }

    /// For how long it is worth asking again.
    fn patience_ms(&self) -> u64 {
        match self {
            Self::Moving { .. } => ASK_MS_MAX,
            Self::Unreachable { .. } => LINK_MS_MAX,
            Self::Unknown { .. } | Self::Lost { .. } | Self::Older { .. } | Self::Refused { .. } => 0,
        }
    }
}

/// What the store's tasks need besides the store.
#[derive(Default)]
pub(super) struct Told {
    /// What the plan says.
    pub(super) homes: tokio::sync::watch::Sender<Vec<Home>>,
    /// The same, with the homes of stores that are in a placement.
    all: Mutex<Vec<Home>>,
    counters: Counters,
}

impl Told {
    /// All homes of the plan.
    pub(super) fn planned(&self) -> Vec<Home> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

impl Kv {
    /// Sets which stores have a home: what a plan says, after its roster. A home once set stays until a newer plan moves
    /// it. Those of stores in placements are told there alone.
    pub fn set_homes(&self, mut homes: Vec<Home>) {
        self.shared.told.all.lock().unwrap_or_else(PoisonError::into_inner).clone_from(&homes);
        self.place_anew();
        homes.retain(|home| !self.is_placed(&home.store));
        self.shared.told.homes.send_if_modified(|known| {
            let is_new = *known != homes;
            *known = homes;
            is_new
        });
    }

    /// Who decides the writes of every store that has a home.
    pub fn homes(&self) -> Arc<std::collections::BTreeMap<StoreName, Place>> {
        let state = self.shared.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        Arc::clone(&state.homes)
    }

    /// What was counted of homes since the start.
    pub fn home_counts(&self) -> HomeCounts {
        self.shared.told.counters.now()
    }

    /// The value of a key with its terms, as the store's home has it: no write that anybody was told of is missing. Of a
    /// store without a home, what this node has.
    pub async fn latest(&self, store: &StoreName, key: &str) -> Result<Option<Kept>, KvError> {
        match self.decide(store, key, Op::Read).await? {
            Outcome::Found(kept) => Ok(kept),
            Outcome::Written(_) | Outcome::Changed => Err(unasked(store)),
        }
    }

    fn place(&self, store: &StoreName) -> Place {
        let state = self.shared.state.read().unwrap_or_else(std::sync::PoisonError::into_inner);
        state.homes.get(store).cloned().unwrap_or(Place::Free)
    }

    /// A write that nothing but trouble keeps from being made.
    pub(super) async fn written(&self, store: &StoreName, key: &str, op: Op) -> Result<Written, KvError> {
        match self.decide(store, key, op).await? {
            Outcome::Written(written) => Ok(written),
            Outcome::Changed | Outcome::Found(_) => Err(unasked(store)),
        }
    }

    /// Has an operation decided by whoever decides for the store. What was surely not done is tried again for a while:
    /// so a move of the home takes a little longer and fails nobody.
    pub(super) async fn decide(&self, store: &StoreName, key: &str, op: Op) -> Result<Outcome, KvError> {
        is_shown(key)?;
        check("key", key.len(), KEY_BYTES_MAX)?;
        let begun = Instant::now();
        loop {
            let decided = match self.place(store) {
                Place::Free => self.perform(store, key, op.clone(), None).await,
                Place::Here { term } => self.perform(store, key, op.clone(), Some(term)).await,
                place @ Place::Coming { .. } => Err(HomeError::not_here(store, &place).into()),
                Place::At { home, term } => {
                    self.carry(store, (&home, term), key, &op, begun + Duration::from_millis(ASK_MS_MAX)).await
                }
            };
            let Err(KvError::Home(error)) = &decided else { return decided };
            if begun.elapsed() + Duration::from_millis(AGAIN_MS) > Duration::from_millis(error.patience_ms()) {
                if self.shared.told.counters.failed(error, now_ms()) {
                    let hint = "see selvage kv homes, and selvage kv lag for the link to it";
                    tracing::warn!(%error, hint, "a home did not decide");
                }
                return decided;
            }
            tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
        }
    }

    /// Does it here. As the home of a term, what is answered is durable, and this node is that home still.
    async fn perform(&self, store: &StoreName, key: &str, op: Op, term: Option<u64>) -> Result<Outcome, KvError> {
        let outcome = match op {
            Op::Read => Outcome::Found(self.get_kept(store, key)?),
            Op::Set { value, terms } => Outcome::Written(self.put(store, key, value, terms, None).await?),
            Op::SetIf { value, terms, seen } => {
                unless_changed(self.put(store, key, value, terms, Some(Seen::Version(seen))).await)?
            }
            Op::Swap { value, seen } => {
                let raw = self.raw(store, key)?;
                let stands = raw.as_ref().map(|raw| self.whole(store, key, raw)).transpose()?;
                if stands.as_deref().map(sum) == seen {
                    unless_changed(self.put(store, key, value, Terms::default(), Some(Seen::Value(raw))).await)?
                } else {
                    Outcome::Changed
                }
            }
            Op::Delete => Outcome::Written(self.replace(store, key, Write::Delete, Bytes::new(), None).await?),
            Op::Increment { delta, expires_ms } => {
                self.has_room(store, 0)?;
                Outcome::Written(self.write(store, key, Write::Increment { delta, expires_ms }, None).await?)
            }
        };
        match (term, &outcome) {
            (None, _) | (_, Outcome::Written(_)) => {}
            // What was seen may not be durable yet, or be of a time after this node was the home.
            (Some(term), _) => self.settled(store, term).await?,
        }
        Ok(outcome)
    }

    async fn put(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        terms: Terms,
        seen: Option<Seen>,
    ) -> Result<Written, KvError> {
        check("metadata", terms.metadata.len(), METADATA_BYTES_MAX)?;
        let Terms { expires_ms, metadata } = terms;
        self.replace(store, key, Write::Set { value, expires_ms }, metadata, seen).await
    }

    async fn settled(&self, store: &StoreName, term: u64) -> Result<(), KvError> {
        let (reply, done) = oneshot::channel();
        let input = Input::Home(HomeInput::Settle { store: store.clone(), term, reply });
        self.shared.inputs.send(input).await.map_err(|_| KvError::Closed)?;
        done.await.map_err(|_| KvError::Closed)?
    }

    /// Asks the home, and waits until what was written is here too.
    async fn carry(
        &self,
        store: &StoreName,
        (home, term): (&NodeName, u64),
        key: &str,
        op: &Op,
        until: Instant,
    ) -> Result<Outcome, KvError> {
        let bytes = op.bytes();
        check("value", bytes, LARGE_BYTES_MAX + METADATA_BYTES_MAX)?;
        let room = WRITE_OVERHEAD_BYTES.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        let _room = Arc::clone(&self.shared.room).try_acquire_many_owned(room).map_err(|_| KvError::Overloaded)?;
        let (store, home) = (store.clone(), home.clone());
        let Some(link) = &self.shared.link else { return Err(HomeError::Unreachable { store, home }.into()) };
        let question = Request::Do { store: store.clone(), term, key: key.to_owned(), op: op.clone() };
        self.shared.told.counters.carried();
        let answer = match link.ask(&home, &question, until).await {
            Ok(answer) => Answer::decode(answer),
            Err(Unanswered::NoLink) => return Err(HomeError::Unreachable { store, home }.into()),
            Err(Unanswered::Older) => return Err(HomeError::Older { store, home }.into()),
            Err(Unanswered::Busy) => return Err(KvError::Overloaded),
            Err(Unanswered::Unknown) => return Err(HomeError::Unknown { store, home }.into()),
        };
        match answer {
            Ok(Answer::Done(outcome)) => {
                if let Outcome::Written(written) = &outcome {
                    self.await_back(written).await;
                }
                Ok(outcome)
            }
            Ok(Answer::NotHome { .. } | Answer::NotYet) => {
                Err(HomeError::Moving { store, home: home.to_string() }.into())
            }
            Ok(Answer::Overloaded) => Err(KvError::Overloaded),
            Ok(Answer::Failed(why)) => Err(HomeError::Refused { store, home, why }.into()),
            Ok(Answer::Claimed(_) | Answer::NotHeld | Answer::Has(_) | Answer::Listed(_)) | Err(_) => {
                Err(HomeError::Unknown { store, home }.into())
            }
        }
    }

    /// Waits for a write of the home. It is made, whether it comes in time or not.
    async fn await_back(&self, written: &Written) {
        let mut token = Token::default();
        token.saw(&written.dot);
        if !matches!(timeout(Duration::from_millis(BACK_MS_MAX), self.wait_for(token)).await, Ok(Ok(()))) {
            self.shared.told.counters.late();
        }
    }

    /// What this node answers to a peer.
    async fn answer(&self, peer: &NodeName, request: Request) -> Option<Answer> {
        let (store, asked, key, op) = match request {
            Request::Claim(claim) => {
                let (reply, claimed) = oneshot::channel();
                let input = HomeInput::Release { from: peer.clone(), claim, reply };
                self.shared.inputs.send(Input::Home(input)).await.ok()?;
                return Some(Answer::Claimed(claimed.await.ok()?));
            }
            Request::Do { store, term, key, op } => (store, term, key, op),
            Request::Call { store, call } => return self.answer_call(&store, call).await,
        };
        let term = match self.place(&store) {
            // An asker that knows a newer home shall not be answered by an older one.
            Place::Here { term } if term >= asked => term,
            Place::At { home, term } => return Some(Answer::NotHome { home, term }),
            Place::Free | Place::Here { .. } | Place::Coming { .. } => return Some(Answer::NotYet),
        };
        self.shared.told.counters.decided();
        let done = match is_shown(&key) {
            Ok(()) => self.perform(&store, &key, op, Some(term)).await,
            Err(error) => Err(error),
        };
        Some(match done {
            Ok(outcome) => Answer::Done(outcome),
            Err(KvError::Overloaded) => Answer::Overloaded,
            Err(KvError::Home(_)) => Answer::NotYet,
            // Whether it was written is not known, so nothing is said.
            Err(KvError::Closed) => return None,
            Err(error) => Answer::Failed(error.to_string()),
        })
    }
}

/// Answers what peers ask, as long as the store is open.
pub(super) fn serve(shared: &Arc<Shared>, mut asked: mpsc::Receiver<Asked>) -> tokio::task::JoinHandle<()> {
    let shared = Arc::downgrade(shared);
    tokio::spawn(async move {
        let mut deciding = JoinSet::new();
        loop {
            // Both wait for one thing and lose nothing if dropped.
            let question = tokio::select! {
                question = asked.recv() => question,
                Some(_) = deciding.join_next() => continue,
            };
            let (Some(Asked { peer, request, reply, _room }), Some(shared)) = (question, shared.upgrade()) else {
                return;
            };
            if deciding.len() >= DECIDED_MAX {
                let _gone = reply.send(Answer::Overloaded);
                continue;
            }
            let kv = Kv { shared };
            deciding.spawn(async move {
                let _room = _room;
                if let Some(answer) = kv.answer(&peer, request).await {
                    let _gone = reply.send(answer);
                }
            });
        }
    })
}

fn unless_changed(done: Result<Written, KvError>) -> Result<Outcome, KvError> {
    match done {
        Ok(written) => Ok(Outcome::Written(written)),
        Err(KvError::Changed { .. }) => Ok(Outcome::Changed),
        Err(error) => Err(error),
    }
}

/// What a value is compared by: so a question does not carry it twice.
pub(super) fn sum(value: &[u8]) -> [u8; HASH_BYTES] {
    let mut sum = [0; HASH_BYTES];
    sum.copy_from_slice(digest(&SHA256, value).as_ref());
    sum
}

/// An answer to something else than was asked for.
fn unasked(store: &StoreName) -> KvError {
    HomeError::Moving { store: store.clone(), home: "its home".to_owned() }.into()
}
