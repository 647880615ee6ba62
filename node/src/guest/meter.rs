//! The clock on a guest: CPU time and wall time, from instantiation to the end of its work.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use rustix::time::{ClockId, clock_gettime};
use tokio::time::Sleep;

use super::instance::Instance;
use super::outcome::Outcome;
use crate::fault::{Fault, GuestFault};

/// The work of one guest. It settles the [`Outcome`] before it drops its store, or gives the instance back if that may
/// answer another request.
pub(super) type Work = Pin<Box<dyn Future<Output = Option<Instance>> + Send>>;

/// A guest's work under its limits.
///
/// The guest yields at each tick of the epoch, so a poll takes a tick at most, and between polls its time is looked
/// at from outside: it has no say in this, not even while it blocks its own event loop. What is beyond a limit is
/// dropped where it stands.
pub(super) struct Metered {
    work: Option<Work>,
    outcome: Arc<Outcome>,
    cpu_left: Duration,
    deadline: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Metered {
    pub(super) fn new(work: Work, outcome: Arc<Outcome>, cpu: Duration, deadline: Instant) -> Self {
        Self { work: Some(work), outcome, cpu_left: cpu, deadline, sleep: None }
    }

    fn end(&mut self, fault: GuestFault) -> Poll<Option<Instance>> {
        self.outcome.settle(Err(Fault::Guest(fault)));
        self.work = None;
        Poll::Ready(None)
    }
}

impl Future for Metered {
    type Output = Option<Instance>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Instance>> {
        let me = &mut *self;
        if Instant::now() >= me.deadline {
            return me.end(GuestFault::ExceededWall);
        }
        let Some(work) = &mut me.work else { return Poll::Ready(None) };
        let before = thread_cpu();
        if let Poll::Ready(instance) = work.as_mut().poll(cx) {
            me.work = None;
            return Poll::Ready(instance);
        }
        let spent = thread_cpu().saturating_sub(before);
        match me.cpu_left.checked_sub(spent) {
            Some(left) => me.cpu_left = left,
            None => return me.end(GuestFault::ExceededCpu),
        }
        let deadline = me.deadline.into();
        let sleep = me.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => me.end(GuestFault::ExceededWall),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// CPU time of this thread. Not the wall's: on a busy machine a guest must not pay for what others use.
fn thread_cpu() -> Duration {
    Duration::try_from(clock_gettime(ClockId::ThreadCPUTime)).unwrap_or_default()
}
