//! What an instance has under way: whose answers are due when, and who pays for the CPU time.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, oneshot};

use super::super::meter::HEAVY;
use super::super::outcome::Outcome;
use super::{Answered, Call};
use crate::fault::{Fault, GuestFault};
use crate::pool::Place;

/// The requests of one instance, for the guest's side and for the side that watches it.
pub(super) struct Turn {
    cpu: Duration,
    state: Mutex<State>,
}

#[derive(Default)]
struct State {
    requests: Vec<UnderWay>,
    begun: u64,
    /// CPU time that each request would have paid that has been there from the beginning.
    clock: Duration,
    /// It is to take no more requests.
    is_spent: bool,
    /// Heads that wait for more of their bodies.
    held: bool,
    /// They wait no longer.
    flush: bool,
    /// The guest's side came to its turn.
    came: bool,
    rest: Rest,
}

/// What an instance without requests does.
#[derive(Default)]
enum Rest {
    /// It has some.
    #[default]
    None,
    /// It still works after the last one, within the bounds of that.
    After(UnderWay),
    /// It waits, in a place of those that do.
    Waiting { _place: Place },
}

/// When to look at an instance again.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Due {
    /// The first of its requests has time until then.
    At(Instant),
    /// It waits for requests.
    Never,
    /// Nobody waits for anything that it still does.
    Over,
}

struct UnderWay {
    id: u64,
    outcome: Arc<Outcome>,
    deadline: Instant,
    answer: Option<oneshot::Sender<Answered>>,
    /// It counts among those of its component until it is over.
    _permit: OwnedSemaphorePermit,
    /// The clock when it began.
    since: Duration,
}

impl Turn {
    /// For requests that may use so much CPU time each.
    pub(super) fn new(cpu: Duration) -> Self {
        Self { cpu, state: Mutex::default() }
    }

    /// Takes a request up. Its number, and what it asks.
    pub(super) fn begin(&self, call: Call) -> (u64, super::Asked) {
        let mut state = self.lock();
        state.begun += 1;
        let (id, since) = (state.begun, state.clock);
        let Call { asked, answer, outcome, deadline, permit, .. } = call;
        state.requests.push(UnderWay { id, outcome, deadline, answer: Some(answer), _permit: permit, since });
        state.rest = Rest::None;
        (id, asked)
    }

    /// Requests that were taken up so far.
    pub(super) fn begun(&self) -> u64 {
        self.lock().begun
    }

    /// Sends an answer, if anybody still waits for it.
    pub(super) fn answer(&self, id: u64, answered: Answered) {
        let mut state = self.lock();
        let answer = state.requests.iter_mut().find(|request| request.id == id).and_then(|it| it.answer.take());
        drop(state);
        if let Some(answer) = answer {
            let _ = answer.send(answered);
        }
    }

    /// Ends one request.
    pub(super) fn refuse(&self, id: u64, fault: Fault) {
        let mut state = self.lock();
        if let Some(request) = state.requests.iter_mut().find(|request| request.id == id) {
            request.outcome.settle(Err(fault));
            request.answer = None;
        }
    }

    /// A request is over. One that met a limit leaves nothing that others should meet.
    pub(super) fn done(&self, id: u64) {
        let mut state = self.lock();
        let Some(index) = state.requests.iter().position(|request| request.id == id) else { return };
        let request = state.requests.swap_remove(index);
        state.is_spent |= request.outcome.is_excess() || request.outcome.end().is_some();
        if state.requests.is_empty() {
            state.rest = Rest::After(request);
        }
    }

    /// The instance waits, in a place of those that do.
    pub(super) fn rests(&self, place: Place) {
        self.lock().rest = Rest::Waiting { _place: place };
    }

    /// Whether it has a place to wait in.
    pub(super) fn is_resting(&self) -> bool {
        matches!(self.lock().rest, Rest::Waiting { .. })
    }

    /// It is to take no more requests.
    pub(super) fn spent(&self) {
        self.lock().is_spent = true;
    }

    pub(super) fn is_spent(&self) -> bool {
        self.lock().is_spent
    }

    /// The guest's side has its turn.
    pub(super) fn comes(&self) {
        self.lock().came = true;
    }

    /// Whether it had, since this was asked last.
    pub(super) fn came(&self) -> bool {
        std::mem::take(&mut self.lock().came)
    }

    /// Whether a head is to wait for more of its body: until the guest has nothing else to do.
    pub(super) fn holds(&self) -> bool {
        let mut state = self.lock();
        state.held |= !state.flush;
        !state.flush
    }

    /// Whether heads wait. They do no more until [`Turn::flushed`].
    pub(super) fn flush(&self) -> bool {
        let mut state = self.lock();
        state.flush = std::mem::take(&mut state.held);
        state.flush
    }

    pub(super) fn flushed(&self) {
        self.lock().flush = false;
    }

    /// All requests pay for CPU time. False if that is more than the first of them may use.
    pub(super) fn pay(&self, spent: Duration) -> bool {
        let mut state = self.lock();
        let sharers = u32::try_from(state.requests.len()).unwrap_or(u32::MAX).max(1);
        state.clock += spent / sharers;
        state.most() <= self.cpu
    }

    /// Whether it computes, rather than answers.
    pub(super) fn is_heavy(&self) -> bool {
        self.lock().most() > HEAVY
    }

    /// Ends the requests whose time is over.
    pub(super) fn expire(&self, now: Instant) -> Due {
        let mut state = self.lock();
        let mut late = Vec::new();
        for request in state.requests.iter_mut().filter(|request| request.deadline <= now) {
            request.outcome.settle(Err(Fault::Guest(GuestFault::ExceededWall)));
            late.extend(request.answer.take());
        }
        state.is_spent |= !late.is_empty();
        if let (Rest::Waiting { .. } | Rest::None, true) = (&state.rest, state.requests.is_empty()) {
            return Due::Never;
        }
        let next = state.all().map(|request| request.deadline).filter(|deadline| *deadline > now).min();
        next.map_or(Due::Over, Due::At)
    }

    /// Ends all requests.
    pub(super) fn fail(&self, fault: &Fault) {
        let mut state = self.lock();
        state.is_spent = true;
        let mut answers = Vec::new();
        for request in &mut state.requests {
            // Before the instance goes: what waits for the body's end asks the outcome.
            request.outcome.settle(Err(fault.clone()));
            answers.extend(request.answer.take());
        }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    /// CPU time of the request that has been there for longest.
    fn most(&self) -> Duration {
        let first = self.all().map(|request| request.since).min();
        first.map_or(Duration::ZERO, |since| self.clock - since)
    }

    fn all(&self) -> impl Iterator<Item = &UnderWay> {
        let after = if let Rest::After(request) = &self.rest { Some(request) } else { None };
        self.requests.iter().chain(after)
    }
}
