//! The clock on a guest: CPU time and wall time, from instantiation to the end of its work.

use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use cpu_time::ThreadTime;
use tokio::time::Sleep;

use super::instance::Instance;
use super::outcome::Outcome;
use crate::fault::{Fault, GuestFault};

/// A poll that took no longer than this is paid by the wall's clock, which costs no system call.
const SHORT: Duration = Duration::from_millis(1);

/// CPU time after which a guest is one that computes. A fresh JavaScript guest answers in one millisecond.
pub(super) const HEAVY: Duration = Duration::from_millis(5);

/// How many guests in a row of one component must compute until its next ones begin behind everything else.
const HEAVY_IN_A_ROW: u32 = 4;
/// How many must not, at most, until they begin in front again.
const LIGHT_IN_A_ROW: u32 = 8;

/// What the guests of one component were like lately.
#[derive(Debug, Default)]
pub(crate) struct Habit {
    /// Each that computed counts one more, each that did not one less.
    score: AtomicU32,
}

impl Habit {
    /// Whether the next one is likely to compute.
    pub(super) fn is_heavy(&self) -> bool {
        self.score.load(Ordering::Relaxed) >= HEAVY_IN_A_ROW
    }

    fn add(&self, is_heavy: bool) {
        let next = |score: u32| {
            let more = if is_heavy { score.saturating_add(1) } else { score.saturating_sub(1) };
            Some(more.min(HEAVY_IN_A_ROW + LIGHT_IN_A_ROW - 1)).filter(|next| *next != score)
        };
        // Fails if there is nothing to change.
        let _ = self.score.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next);
    }
}

/// The work of one guest. It settles the [`Outcome`] before it drops its store, or gives the instance back if that may
/// answer another request.
pub(super) type Work = Pin<Box<dyn Future<Output = Option<Instance>> + Send>>;

/// What polls cost in CPU time.
///
/// The CPU's clock decides: on a busy machine a guest must not pay for what others use. Only for polls so short that
/// hardly anybody came between is the wall's as good. Of the first long poll nobody took the CPU time: it costs
/// [`SHORT`]. It is a tick at most.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Clock {
    /// CPU time that was measured, which it is from the first long poll on.
    measured: Option<Duration>,
}

impl Clock {
    /// Whether the CPU time of the next poll is to be taken.
    pub(super) fn is_measured(&self) -> bool {
        self.measured.is_some()
    }

    /// What a poll costs that took so long by the wall, and by the CPU if that was measured.
    pub(super) fn cost(&mut self, wall: Duration, cpu: Option<Duration>) -> Duration {
        if Self::is_guess(wall, cpu) {
            self.measured = Some(Duration::ZERO);
            return SHORT;
        }
        let spent = cpu.unwrap_or(wall);
        if let Some(measured) = &mut self.measured {
            *measured += spent;
        }
        spent
    }

    /// Whether a cost is no more than a guess.
    fn is_guess(wall: Duration, cpu: Option<Duration>) -> bool {
        cpu.is_none() && wall > SHORT
    }
}

/// What a guest may still use of the CPU. A guess never ends a guest.
#[derive(Debug, Clone, Copy)]
struct Budget {
    left: Duration,
    clock: Clock,
}

impl Budget {
    fn new(left: Duration) -> Self {
        Self { left, clock: Clock::default() }
    }

    /// Pays for a poll that took so long by the wall, and by the CPU if that was measured. False if there is not enough
    /// left.
    fn pay(&mut self, wall: Duration, cpu: Option<Duration>) -> bool {
        let spent = self.clock.cost(wall, cpu);
        let left = self.left.checked_sub(spent);
        self.left = left.unwrap_or_default();
        left.is_some() || Clock::is_guess(wall, cpu)
    }
}

/// A guest's work under its limits.
///
/// The guest yields at each tick of the epoch, so a poll takes a tick at most, and between polls its time is looked
/// at from outside: it has no say in this, not even while it blocks its own event loop. What is beyond a limit is
/// dropped where it stands.
pub(super) struct Metered {
    work: Option<Work>,
    outcome: Arc<Outcome>,
    budget: Budget,
    /// CPU time that it had in the beginning.
    cpu: Duration,
    /// Whom to tell in the end how much it used.
    habit: Option<Arc<Habit>>,
    deadline: Instant,
    sleep: Option<Pin<Box<Sleep>>>,
    /// Somebody else waits for the deadline.
    is_watched: bool,
}

impl Metered {
    pub(super) fn new(work: Work, outcome: Arc<Outcome>, cpu: Duration, deadline: Instant) -> Self {
        let (work, budget) = (Some(work), Budget::new(cpu));
        Self { work, outcome, budget, cpu, habit: None, deadline, sleep: None, is_watched: false }
    }

    /// The same, which in the end tells what it was like.
    pub(super) fn telling(mut self, habit: &Arc<Habit>) -> Self {
        self.habit = Some(Arc::clone(habit));
        self
    }

    /// Whether this guest computes, rather than answers.
    pub(super) fn is_heavy(&self) -> bool {
        self.budget.clock.measured.is_some_and(|measured| measured > HEAVY)
    }

    /// All of it, to go on elsewhere. Whoever takes it watches the wall's clock with [`Metered::time`].
    pub(super) fn take(&mut self) -> Self {
        let (work, habit) = (self.work.take(), self.habit.take());
        let Self { budget, cpu, deadline, .. } = *self;
        Self { work, outcome: Arc::clone(&self.outcome), budget, cpu, habit, deadline, sleep: None, is_watched: true }
    }

    /// The end of the guest's time, for whoever watches it from elsewhere.
    pub(super) fn time(&self) -> Time {
        Time { outcome: Arc::clone(&self.outcome), sleep: Box::pin(tokio::time::sleep_until(self.deadline.into())) }
    }

    fn end(&mut self, fault: GuestFault) -> Poll<Option<Instance>> {
        self.outcome.settle(Err(Fault::Guest(fault)));
        self.work = None;
        Poll::Ready(None)
    }
}

impl Drop for Metered {
    fn drop(&mut self) {
        if let Some(habit) = &self.habit {
            habit.add(self.cpu - self.budget.left > HEAVY);
        }
    }
}

impl Future for Metered {
    type Output = Option<Instance>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Instance>> {
        let me = &mut *self;
        let begun = Instant::now();
        if begun >= me.deadline {
            return me.end(GuestFault::ExceededWall);
        }
        let Some(work) = &mut me.work else { return Poll::Ready(None) };
        let clock = me.budget.clock.is_measured().then(ThreadTime::now);
        if let Poll::Ready(instance) = work.as_mut().poll(cx) {
            me.work = None;
            return Poll::Ready(instance);
        }
        if !me.budget.pay(begun.elapsed(), clock.map(|clock| clock.elapsed())) {
            return me.end(GuestFault::ExceededCpu);
        }
        if me.is_watched {
            return Poll::Pending;
        }
        let deadline = me.deadline.into();
        let sleep = me.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
        match sleep.as_mut().poll(cx) {
            Poll::Ready(()) => me.end(GuestFault::ExceededWall),
            Poll::Pending => Poll::Pending,
        }
    }
}

/// Settles that a guest ran out of wall time. The guest itself may not come to it: it waits for a thread.
pub(super) struct Time {
    outcome: Arc<Outcome>,
    sleep: Pin<Box<Sleep>>,
}

impl Future for Time {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        self.sleep.as_mut().poll(cx).map(|()| self.outcome.settle(Err(Fault::Guest(GuestFault::ExceededWall))))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const MS: Duration = Duration::from_millis(1);

    #[test]
    fn short_polls_are_paid_by_the_wall() {
        let mut budget = Budget::new(2 * MS);
        assert!(budget.pay(MS, None) && budget.pay(MS, None));
        assert!(!budget.pay(Duration::from_nanos(1), None), "all is spent");
        assert_eq!(budget.clock.measured, None);
    }

    #[test]
    fn the_first_long_poll_ends_nobody_and_from_then_on_the_cpu_counts() {
        let mut budget = Budget::new(MS);
        assert!(budget.pay(MS / 2, None));
        // Somebody else had the core for most of it.
        assert!(budget.pay(100 * MS, None));
        assert_eq!(budget.clock.measured, Some(Duration::ZERO));
        assert!(budget.pay(100 * MS, Some(Duration::ZERO)), "it waited, and used nothing");
        assert!(!budget.pay(MS, Some(MS)));
    }

    #[test]
    fn a_component_whose_guests_compute_is_known_for_it_until_they_do_not() {
        let habit = Habit::default();
        for _ in 0..HEAVY_IN_A_ROW {
            assert!(!habit.is_heavy());
            habit.add(true);
        }
        assert!(habit.is_heavy());
        habit.add(false);
        assert!(!habit.is_heavy(), "one in between is doubt enough");
        for _ in 0..100 {
            habit.add(true);
        }
        for _ in 0..LIGHT_IN_A_ROW {
            assert!(habit.is_heavy());
            habit.add(false);
        }
        assert!(!habit.is_heavy());
    }

    #[test]
    fn what_is_measured_adds_up() {
        let mut budget = Budget::new(100 * MS);
        assert!(budget.pay(2 * MS, None));
        for _ in 0..3 {
            assert!(budget.pay(50 * MS, Some(2 * MS)));
        }
        assert_eq!((budget.clock.measured, budget.left), (Some(6 * MS), 93 * MS));
    }
}
