//! Instances that answer several requests at once, and which of them gets the next one.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::Waker;
use std::time::{Duration, Instant};

use crate::guest::shared::Call;

/// The instances of one component.
pub(super) struct Shared {
    /// Requests of one instance at once.
    concurrency: usize,
    /// Instances that share the work before requests share an instance: as many as can compute at once.
    spread: usize,
    instances: Mutex<Vec<Arc<Inbox>>>,
}

impl Shared {
    pub(super) fn new(concurrency: usize) -> Self {
        let spread = std::thread::available_parallelism().map_or(1, Into::into);
        Self { concurrency, spread, instances: Mutex::default() }
    }

    /// Gives a request to the instance that has least to do. The way into a new one if there must be one.
    pub(super) fn give(&self, mut call: Call) -> Option<Arc<Inbox>> {
        let mut instances = self.lock();
        instances.retain(|inbox| !inbox.lock().is_closed);
        loop {
            let open = instances.iter().filter_map(|inbox| Some((inbox.load()?, inbox)));
            let (mut count, mut least) = (0, None::<(usize, &Arc<Inbox>)>);
            for (load, inbox) in open {
                count += 1;
                if least.is_none_or(|(less, _)| load < less) {
                    least = Some((load, inbox));
                }
            }
            let fits = |load: usize| load == 0 || (count >= self.spread && load < self.concurrency);
            let Some((_, inbox)) = least.filter(|(load, _)| fits(*load)) else { break };
            match inbox.push(call) {
                Ok(()) => return None,
                // It closed just now, so there is one fewer to try.
                Err(back) => call = back,
            }
        }
        let inbox = Arc::new(Inbox::with(call));
        instances.push(Arc::clone(&inbox));
        Some(inbox)
    }

    /// Instances that have nothing to do.
    pub(super) fn idle(&self) -> usize {
        self.lock().iter().filter(|inbox| inbox.lock().idle_since.is_some()).count()
    }

    /// Closes those that have had nothing to do for so long. False if none is idle any more.
    pub(super) fn expire(&self, now: Instant, longest: Duration) -> bool {
        let mut is_left = false;
        for inbox in self.lock().iter() {
            let since = inbox.lock().idle_since;
            match since {
                Some(since) if now.saturating_duration_since(since) >= longest => inbox.retire(),
                Some(_) => is_left = true,
                None => {}
            }
        }
        is_left
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Arc<Inbox>>> {
        self.instances.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// The way into one instance.
#[derive(Default)]
pub(crate) struct Inbox {
    desk: Mutex<Desk>,
}

/// What waits there.
#[derive(Default)]
struct Desk {
    calls: VecDeque<Call>,
    /// Requests that the instance has begun with.
    under_way: usize,
    /// It takes no more.
    is_closed: bool,
    /// It can't take any now: a call of its guest holds all of it.
    is_stuck: bool,
    idle_since: Option<Instant>,
    waker: Option<Waker>,
}

impl Inbox {
    fn with(call: Call) -> Self {
        let desk = Desk { calls: VecDeque::from([call]), ..Desk::default() };
        Self { desk: Mutex::new(desk) }
    }

    /// What it has to do. `None` if it takes nothing.
    fn load(&self) -> Option<usize> {
        let desk = self.lock();
        (!desk.is_closed && !desk.is_stuck).then_some(desk.calls.len() + desk.under_way)
    }

    #[expect(clippy::result_large_err, reason = "it is handed back, which is rare, without an allocation for each")]
    fn push(&self, call: Call) -> Result<(), Call> {
        let mut desk = self.lock();
        if desk.is_closed {
            return Err(call);
        }
        desk.calls.push_back(call);
        desk.idle_since = None;
        let waker = desk.waker.take();
        drop(desk);
        if let Some(waker) = waker {
            waker.wake();
        }
        Ok(())
    }

    /// The next request, which is under way from here on.
    pub(crate) fn pop(&self) -> Option<Call> {
        let mut desk = self.lock();
        let call = desk.calls.pop_front()?;
        desk.under_way += 1;
        Some(call)
    }

    /// One request less is under way.
    pub(crate) fn done(&self) {
        self.lock().under_way -= 1;
    }

    /// Whether the instance, which asks, can take requests now. It is woken when there is one.
    pub(crate) fn attend(&self, is_stuck: bool, waker: &Waker) {
        let mut desk = self.lock();
        desk.is_stuck = is_stuck;
        if desk.waker.as_ref().is_none_or(|known| !known.will_wake(waker)) {
            desk.waker = Some(waker.clone());
        }
    }

    /// The instance can't take requests now. Those that wait for it may try another: once each, as long as this one may
    /// take them later.
    pub(crate) fn stuck(&self) -> VecDeque<Call> {
        let mut desk = self.lock();
        desk.is_stuck = true;
        let is_closed = desk.is_closed;
        let stays = |call: &Call| !is_closed && call.was_moved();
        let (stay, go) = std::mem::take(&mut desk.calls).into_iter().partition(stays);
        desk.calls = stay;
        go
    }

    /// The instance has nothing to do. False if it has after all.
    pub(crate) fn rests(&self, now: Instant) -> bool {
        let mut desk = self.lock();
        let rests = desk.calls.is_empty() && !desk.is_closed;
        if rests && desk.idle_since.is_none() {
            desk.idle_since = Some(now);
        }
        rests
    }

    /// Takes no more requests; the instance ends when it has nothing to do.
    pub(crate) fn retire(&self) {
        let mut desk = self.lock();
        desk.is_closed = true;
        desk.idle_since = None;
        let waker = desk.waker.take();
        drop(desk);
        if let Some(waker) = waker {
            waker.wake();
        }
    }

    /// Takes no more requests, and gives back those that the instance has not begun with.
    pub(crate) fn close(&self) -> VecDeque<Call> {
        let mut desk = self.lock();
        desk.is_closed = true;
        desk.idle_since = None;
        std::mem::take(&mut desk.calls)
    }

    pub(crate) fn is_closed(&self) -> bool {
        self.lock().is_closed
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.lock().calls.is_empty()
    }

    /// Looks at those that wait: the earliest deadline, and without those that are past it.
    pub(crate) fn expire(&self, now: Instant) -> Option<Instant> {
        let mut desk = self.lock();
        if desk.calls.is_empty() {
            return None;
        }
        let (late, waiting) = std::mem::take(&mut desk.calls).into_iter().partition(|call| call.deadline() <= now);
        desk.calls = waiting;
        let next = desk.calls.iter().map(Call::deadline).min();
        drop(desk);
        let late: VecDeque<Call> = late;
        late.into_iter().for_each(Call::late);
        next
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }
}
