//! A store that other nodes hold: each use of it is a question to one of them.
//!
//! Who is asked: the store's home, if it has one, else the nearest that has a link, as the links measure it; among those
//! that are as near, by rendezvous hashing, so that askers spread. If that one does not have it in time, another is asked,
//! unless it may have made a write: then the asker is told that it may.

use std::collections::hash_map::DefaultHasher;
use std::hash::{Hash as _, Hasher as _};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use selvage_config::{NodeName, PlacementName, StoreName};
use tokio::time::Instant;

use super::{Kv, PlacementError, Rule, RulePlace, SEEN_MS_MAX, Whereabouts};
use crate::commit::now_ms;
use crate::entry::{Dot, KEY_BYTES_MAX};
use crate::home::wire::{Answer, Call, Op, Outcome, Request};
use crate::link::{Link, Unanswered};
use crate::replica::Written;
use crate::session::Token;
use crate::store::chunks::LARGE_BYTES_MAX;
use crate::store::home::sum;
use crate::store::terms::METADATA_BYTES_MAX;
use crate::store::{Kept, KvError, LIST_MAX, Listed, Terms, WRITE_OVERHEAD_BYTES, check, is_shown};

/// How long one use may take, milliseconds. A home that moves meanwhile has its own five seconds of these.
const CALL_MS_MAX: u64 = 7_000;

/// How long one of several nodes has for what changes nothing, before another is asked, milliseconds.
const TRY_MS_MAX: u64 = 1_500;

/// Nodes that are asked for one thing, at most.
const TRIES_MAX: usize = 3;

/// How long a link that is not there is waited for, milliseconds: it may just be made anew.
const LINK_MS_MAX: u64 = 1_000;

/// How long it is waited for that whoever shall hold a store does, milliseconds.
const READY_MS_MAX: u64 = 5_000;

/// Time until what was surely not done is asked again, milliseconds.
const AGAIN_MS: u64 = 50;

/// A store that this node does not hold, or not yet. Clones name the same.
#[derive(Clone)]
pub struct Elsewhere {
    kv: Kv,
    store: Arc<StoreName>,
}

/// Forgets what was read of a key, however its write ends.
struct Forget<'w> {
    of: &'w Elsewhere,
    key: &'w str,
}

impl Drop for Forget<'_> {
    fn drop(&mut self) {
        self.of.kv.shared.placed.cache.forget(&self.of.store, self.key);
    }
}

impl PlacementError {
    /// For how long it is worth asking again.
    fn patience_ms(&self) -> u64 {
        match self {
            Self::NotReady { .. } => READY_MS_MAX,
            Self::Unreachable { .. } => LINK_MS_MAX,
            Self::Unknown { .. } | Self::Older { .. } | Self::Refused { .. } => 0,
        }
    }
}

impl Elsewhere {
    pub(super) fn new(kv: &Kv, store: &StoreName) -> Self {
        Self { kv: kv.clone(), store: Arc::new(store.clone()) }
    }

    /// The value of a key, as a node has it that holds the store; or as this one read it, not longer ago than the store's
    /// rule says. What was written through this node is seen.
    pub async fn get(&self, key: &str) -> Result<Option<Bytes>, KvError> {
        is_shown(key)?;
        let placed = &self.kv.shared.placed;
        if let Some(found) = self.cached(key) {
            return Ok(found.map(|kept| kept.value));
        }
        let begun = Instant::now();
        let asked = placed.cache.asks(&self.store, key, begun);
        let kept = self.found(key, Call::Get { key: key.to_owned(), seen: Token::default(), must: false }).await?;
        // Who lacks what was written through this node waits that long for it before it says what it has.
        let may_lack = begun.elapsed() >= Duration::from_millis(SEEN_MS_MAX / 10 * 9);
        if !may_lack && self.rule().is_some_and(|rule| rule.cache_ms > 0) {
            placed.cache.keep(asked, &self.store, key, kept.clone());
        }
        Ok(kept.map(|kept| kept.value))
    }

    /// As [`Elsewhere::get`], of a node that has what the session saw.
    pub async fn get_seen(&self, key: &str, seen: Token) -> Result<Option<Bytes>, KvError> {
        let kept = self.found(key, Call::Get { key: key.to_owned(), seen, must: true }).await?;
        Ok(kept.map(|kept| kept.value))
    }

    /// The value of a key with its terms, as [`Kv::latest`] has it at a node that holds the store.
    pub async fn latest(&self, key: &str) -> Result<Option<Kept>, KvError> {
        self.found(key, Call::Do { key: key.to_owned(), op: Op::Read }).await
    }

    /// Whether the key exists.
    pub async fn exists(&self, key: &str) -> Result<bool, KvError> {
        is_shown(key)?;
        if let Some(found) = self.cached(key) {
            return Ok(found.is_some());
        }
        match self.call(key, Call::Has { key: key.to_owned(), seen: Token::default() }).await? {
            Answer::Has(has) => Ok(has),
            _ => Err(self.unasked()),
        }
    }

    /// The existing keys that begin with `prefix` and come after `after`, in order, with facts on each; [`LIST_MAX`] at most.
    pub async fn list_entries(&self, prefix: &str, after: Option<&str>, limit: usize) -> Result<Vec<Listed>, KvError> {
        check("key", after.map_or(0, str::len), KEY_BYTES_MAX)?;
        let (prefix, after, limit) = (prefix.to_owned(), after.map(str::to_owned), limit.min(LIST_MAX) as u64);
        let call = Call::List { prefix: prefix.clone(), after, limit, seen: Token::default() };
        match self.call(&prefix, call).await? {
            Answer::Listed(listed) => Ok(listed),
            _ => Err(self.unasked()),
        }
    }

    /// As [`Kv::set_on`].
    pub async fn set_on(&self, key: &str, value: Bytes, terms: Terms) -> Result<Written, KvError> {
        self.written(key, Op::Set { value, terms }).await?.ok_or_else(|| self.unasked())
    }

    /// As [`Kv::set_if`].
    pub async fn set_if(
        &self,
        key: &str,
        value: Bytes,
        terms: Terms,
        seen: Option<Dot>,
    ) -> Result<Option<Written>, KvError> {
        self.written(key, Op::SetIf { value, terms, seen }).await
    }

    /// As [`Kv::swap`].
    pub async fn swap(&self, key: &str, seen: Option<&[u8]>, value: Bytes) -> Result<bool, KvError> {
        Ok(self.written(key, Op::Swap { value, seen: seen.map(sum) }).await?.is_some())
    }

    /// As [`Kv::delete`].
    pub async fn delete(&self, key: &str) -> Result<(), KvError> {
        self.written(key, Op::Delete).await.map(drop)
    }

    /// As [`Kv::increment_until`].
    pub async fn increment_until(&self, key: &str, delta: i64, expires_ms: Option<u64>) -> Result<i64, KvError> {
        let written = self.written(key, Op::Increment { delta, expires_ms }).await?;
        let counted = written.and_then(|written| written.counted);
        counted.ok_or_else(|| KvError::NotCounter { key: key.to_owned() })
    }

    /// In which placement it is, and who else holds it.
    pub fn held_by(&self) -> Option<(PlacementName, Vec<NodeName>)> {
        let rule = self.rule()?;
        let holders = match rule.place {
            RulePlace::At { holders, .. } => holders.to_vec(),
            RulePlace::Here(_) => Vec::new(),
        };
        Some((rule.placement, holders))
    }

    fn rule(&self) -> Option<Rule> {
        self.kv.shared.placed.table().stores.get(&*self.store).cloned()
    }

    fn cached(&self, key: &str) -> Option<Option<Kept>> {
        let placed = &self.kv.shared.placed;
        let found = placed.cache.get(&self.store, key, self.rule()?.cache_ms, (Instant::now(), now_ms()))?;
        placed.counters.cached();
        Some(found)
    }

    async fn found(&self, key: &str, call: Call) -> Result<Option<Kept>, KvError> {
        match self.call(key, call).await? {
            Answer::Done(Outcome::Found(kept)) => Ok(kept),
            _ => Err(self.unasked()),
        }
    }

    /// None: something else stands there than was expected.
    async fn written(&self, key: &str, op: Op) -> Result<Option<Written>, KvError> {
        // Also where nobody waits for the answer any more.
        let _forget = Forget { of: self, key };
        let placement = self.rule().map(|rule| rule.placement);
        match self.call(key, Call::Do { key: key.to_owned(), op }).await? {
            Answer::Done(Outcome::Written(written)) => {
                if let Some(placement) = placement {
                    self.kv.shared.placed.wrote(&placement, &written.dot);
                }
                Ok(Some(written))
            }
            Answer::Done(Outcome::Changed) => Ok(None),
            _ => Err(self.unasked()),
        }
    }

    /// Has it done where the rows are. What was surely not done is tried again for a while.
    async fn call(&self, key: &str, call: Call) -> Result<Answer, KvError> {
        is_shown(key)?;
        check("key", key.len(), KEY_BYTES_MAX)?;
        check("value", call.bytes(), LARGE_BYTES_MAX + METADATA_BYTES_MAX)?;
        let room = WRITE_OVERHEAD_BYTES.saturating_add(u32::try_from(call.bytes()).unwrap_or(u32::MAX));
        let _room = Arc::clone(&self.kv.shared.room).try_acquire_many_owned(room).map_err(|_| KvError::Overloaded)?;
        let begun = Instant::now();
        loop {
            let done = match self.kv.whereabouts(&self.store) {
                Whereabouts::Unplaced => return self.kv.done_here(&self.store, call).await,
                Whereabouts::Here(mesh) => return mesh.done_here(&self.store, call).await,
                Whereabouts::Coming(error) => Err(error.into()),
                Whereabouts::At(rule) => self.ask(&rule, &call, begun + Duration::from_millis(CALL_MS_MAX)).await,
            };
            let Err(KvError::Placement(error)) = &done else { return done };
            if begun.elapsed() + Duration::from_millis(AGAIN_MS) > Duration::from_millis(error.patience_ms()) {
                if self.kv.shared.placed.counters.failed(error, now_ms()) {
                    let hint = "see selvage kv placements, and selvage kv lag for the links";
                    tracing::warn!(%error, hint, "a store that is held elsewhere could not be used");
                }
                return done;
            }
            tokio::time::sleep(Duration::from_millis(AGAIN_MS)).await;
        }
    }

    /// Asks those that hold it, one after the other.
    async fn ask(&self, rule: &Rule, call: &Call, until: Instant) -> Result<Answer, KvError> {
        let (store, placement) = ((*self.store).clone(), rule.placement.clone());
        let mut failed =
            KvError::from(PlacementError::Unreachable { store: store.clone(), placement: placement.clone() });
        let (Some(link), RulePlace::At { holders, home }) = (&self.kv.shared.link, &rule.place) else {
            return Err(failed);
        };
        let mut order = nearest(link, &self.kv.shared.node, holders, home.as_ref());
        order.truncate(TRIES_MAX);
        let request = Request::Call { store: store.clone(), call: self.seeing(call, &placement) };
        while let Some(holder) = order.pop_front() {
            // A write that another node might make too is given all the time there is.
            let one_of_several = call.only_reads() && !order.is_empty();
            let until =
                if one_of_several { until.min(Instant::now() + Duration::from_millis(TRY_MS_MAX)) } else { until };
            self.kv.shared.placed.counters.asked();
            let (store, not_ready) =
                (store.clone(), || PlacementError::NotReady { store: store.clone(), placement: placement.clone() });
            failed = match link.ask(&holder, &request, until).await {
                Ok(answer) => match Answer::decode(answer) {
                    Ok(answer @ (Answer::Done(_) | Answer::Has(_) | Answer::Listed(_))) => return Ok(answer),
                    Ok(Answer::NotHeld | Answer::NotYet) => not_ready().into(),
                    Ok(Answer::Overloaded) => KvError::Overloaded,
                    Ok(Answer::Failed(why)) => return Err(PlacementError::Refused { store, holder, why }.into()),
                    _ => return Err(PlacementError::Unknown { store, holder }.into()),
                },
                Err(Unanswered::NoLink) => PlacementError::Unreachable { store, placement: placement.clone() }.into(),
                Err(Unanswered::Older) => PlacementError::Older { store, holder }.into(),
                Err(Unanswered::Busy) => KvError::Overloaded,
                Err(Unanswered::Unknown) if call.only_reads() => {
                    PlacementError::Unreachable { store, placement: placement.clone() }.into()
                }
                Err(Unanswered::Unknown) => return Err(PlacementError::Unknown { store, holder }.into()),
            };
        }
        Err(failed)
    }

    /// The call, with what this node wrote itself as seen.
    fn seeing(&self, call: &Call, placement: &PlacementName) -> Call {
        let mut call = call.clone();
        match &mut call {
            // Who says what it saw, and that it must be there, is told if it is not: nothing is added to that.
            Call::Get { must: true, .. } | Call::Do { .. } => {}
            Call::Get { seen, .. } | Call::Has { seen, .. } | Call::List { seen, .. } => {
                *seen = self.kv.shared.placed.own(placement);
            }
        }
        call
    }

    /// An answer to something else than was asked for.
    fn unasked(&self) -> KvError {
        let (store, placement) = ((*self.store).clone(), self.rule().map(|rule| rule.placement));
        match placement {
            Some(placement) => PlacementError::NotReady { store, placement }.into(),
            None => KvError::Closed,
        }
    }
}

/// Those that can be asked, in the order in which they are.
fn nearest(
    link: &Link,
    own: &NodeName,
    holders: &[NodeName],
    home: Option<&NodeName>,
) -> std::collections::VecDeque<NodeName> {
    let linked = holders.iter().filter_map(|holder| Some((link.round_trip(holder)?, holder)));
    let mut order: Vec<_> = linked
        .map(|(round_trip, holder)| {
            // Distances of one power of two are the same: what is measured is never twice the same.
            let distance = round_trip.as_millis().checked_ilog2().map_or(0, |log| log + 1);
            let mut hasher = DefaultHasher::new();
            (own, holder).hash(&mut hasher);
            ((home != Some(holder), distance, hasher.finish()), holder)
        })
        .collect();
    order.sort_unstable();
    order.into_iter().map(|(_, holder)| holder.clone()).collect()
}
