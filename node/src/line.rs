//! Whose turn it is on a core that is full.
//!
//! A guest is polled where its connection is, and connections in the order in which they have something to be read. That
//! is as good as any while a core has time left. When it has none, most of that order is the app that is asked most, and
//! a neighbour's request would wait behind all of it. So from then on a request is read where its connection is and
//! waits here, in the queue of its app; [`Order`] says whose is next, by the CPU time that each app used. Ushers let go
//! of as many as fit one [`ROUND`], and then step back behind every connection that has become ready.
//!
//! An app that is alone never waits here, nor does anybody on a core that rests now and then: then this is one look at
//! the thread's own clock.

pub(crate) mod full;
mod order;
mod turns;

use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use tokio::sync::oneshot;
use tokio::task::JoinSet;
use tokio::time::Sleep;

use self::order::{Order, Ticket};

pub use self::full::runtime;
pub use self::order::Spent;
pub(crate) use self::order::{Class, Crowded};
pub(crate) use self::turns::{InTurns, Late};

/// CPU time that is let go of at once: what a request which came now waits for those before it.
const ROUND: Duration = Duration::from_micros(100);
/// The most that is let go of at once, where what never waits here takes long.
const ROUND_MAX: Duration = Duration::from_millis(1);
/// A round is at least one part in so many of what came between it and the one before: what never waits here has no more
/// than four fifths of the core. To read and to write for those who waited takes up to twice as long as their turns, so
/// with a larger part rounds would grow by themselves.
const ROUND_SHARE: u32 = 4;
/// How long it is remembered that more than one app asked for a full core.
const COMPANY: Duration = Duration::from_secs(60);

/// The line of one node. Clones share it.
#[derive(Debug, Clone, Default)]
pub(crate) struct Line {
    desk: Arc<Desk>,
}

#[derive(Debug)]
struct Desk {
    state: Mutex<State>,
    /// Which app asked for a full core last.
    last: AtomicU64,
    /// Until when it counts that another one had before, milliseconds after `since`.
    company_ms: AtomicU64,
    since: Instant,
    /// The ushers. They end when nobody waits, and with the line.
    tasks: Mutex<JoinSet<()>>,
}

#[derive(Debug, Default)]
struct State {
    order: Order<oneshot::Sender<u64>>,
    ushers: usize,
}

impl Default for Desk {
    fn default() -> Self {
        Self {
            state: Mutex::default(),
            last: AtomicU64::new(0),
            company_ms: AtomicU64::new(0),
            since: Instant::now(),
            tasks: Mutex::new(JoinSet::new()),
        }
    }
}

impl Line {
    /// Whether a guest of this app has to wait for its turn at `now`: the core that asks is full, and others want it too.
    pub(crate) fn is_on(&self, spent: &Spent, now: Instant) -> bool {
        full::is_full(now) && self.desk.has_company(spent, now)
    }

    /// Takes a place in the line. Call it where there is a tokio runtime.
    ///
    /// # Errors
    /// So much of its app waits already that it would be answered too late.
    pub(crate) fn enter(&self, spent: &Arc<Spent>, class: Class, deadline: Instant) -> Result<Wait, Crowded> {
        let (granted, turn) = oneshot::channel();
        let mut state = self.desk.lock();
        let ticket = state.order.push(spent, class, granted)?;
        let is_usher_wanted = state.ushers < state.order.len().min(ushers_max());
        state.ushers += usize::from(is_usher_wanted);
        drop(state);
        if is_usher_wanted {
            self.desk.begin_usher();
        }
        let place = Place { desk: Arc::clone(&self.desk), spent: Arc::clone(spent), ticket };
        Ok(Wait { turn: Some(turn), place, deadline: Box::pin(tokio::time::sleep_until(deadline.into())) })
    }
}

/// As many may let go as there are threads that could do something then.
fn ushers_max() -> usize {
    tokio::runtime::Handle::current().metrics().num_workers()
}

impl Desk {
    fn has_company(&self, spent: &Spent, now: Instant) -> bool {
        let now = millis(now.saturating_duration_since(self.since));
        if self.last.load(Ordering::Relaxed) != spent.id() {
            let last = self.last.swap(spent.id(), Ordering::Relaxed);
            if last != 0 && last != spent.id() {
                self.company_ms.store(now + millis(COMPANY), Ordering::Relaxed);
            }
        }
        now < self.company_ms.load(Ordering::Relaxed)
    }

    fn begin_usher(self: &Arc<Self>) {
        let usher = Usher { desk: Arc::downgrade(self), is_done: false };
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(usher.work());
    }

    /// Lets go of what will take so much time, and says how much that is. `None` if nobody waits: then there is one usher
    /// fewer.
    fn round(&self, time: Duration) -> Option<Duration> {
        let mut state = self.lock();
        let (mut taken, mut granted) = (Duration::ZERO, Vec::new());
        while taken < time
            && let Some(next) = state.order.pop()
        {
            taken += Duration::from_nanos(next.expected);
            granted.push(next);
        }
        if granted.is_empty() {
            state.ushers -= 1;
            return None;
        }
        drop(state);
        for next in granted {
            // Who left just now gives back what was expected of it.
            if next.item.send(next.expected).is_err() {
                next.spent.give_back(next.expected);
            }
        }
        Some(taken)
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn millis(time: Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX / 2)
}

/// Lets go of those whose turn it is, as long as somebody waits.
struct Usher {
    desk: Weak<Desk>,
    is_done: bool,
}

impl Usher {
    async fn work(mut self) {
        let mut time = ROUND;
        while let Some(desk) = self.desk.upgrade() {
            let begun = Instant::now();
            let Some(taken) = desk.round(time) else {
                self.is_done = true;
                return;
            };
            drop(desk);
            // Behind those that were let go of, and behind what is read then.
            tokio::task::yield_now().await;
            time = (begun.elapsed().saturating_sub(taken) / ROUND_SHARE).clamp(ROUND, ROUND_MAX);
        }
    }
}

impl Drop for Usher {
    /// Its runtime ends. Whoever comes in from another one begins another usher.
    fn drop(&mut self) {
        if let Some(desk) = self.desk.upgrade().filter(|_| !self.is_done) {
            desk.lock().ushers -= 1;
        }
    }
}

/// A place in the line. It is over when the turn has come, or when there is no more time to wait for it; whoever drops it
/// before has left.
pub(crate) struct Wait {
    /// `None` once it has come.
    turn: Option<oneshot::Receiver<u64>>,
    place: Place,
    deadline: Pin<Box<Sleep>>,
}

impl Future for Wait {
    /// The CPU time that was put down for this turn, nanoseconds. `None` if it has not come.
    type Output = Option<u64>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<u64>> {
        let Some(turn) = &mut self.turn else { return Poll::Ready(None) };
        match Pin::new(turn).poll(cx) {
            Poll::Ready(granted) => {
                self.turn = None;
                Poll::Ready(granted.ok())
            }
            Poll::Pending => self.deadline.as_mut().poll(cx).map(|()| None),
        }
    }
}

impl Drop for Wait {
    fn drop(&mut self) {
        let Some(mut turn) = self.turn.take() else { return };
        self.place.leave();
        // Let go of, but not there any more.
        if let Ok(expected) = turn.try_recv() {
            self.place.spent.give_back(expected);
        }
    }
}

struct Place {
    desk: Arc<Desk>,
    spent: Arc<Spent>,
    ticket: Ticket,
}

impl Place {
    fn leave(&self) {
        let left = self.desk.lock().order.remove(&self.ticket);
        drop(left);
    }
}

#[cfg(test)]
mod tests;
