//! In which order those in line have their turns: by the CPU time that their apps used, in equal parts.
//!
//! Each app has a clock of its own, which its turns move on by what they cost (start-time fair queueing: Goyal, Vin and
//! Cheng, IEEE/ACM Transactions on Networking 5(5), 1997). Next is who waits under the clock that is furthest behind. Who
//! comes after a while begins where the others are, so that nobody saves up turns. What a turn costs is known after it;
//! when it begins, what turns of that app usually cost is put down for it. Knows no clock, and no sockets.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::sync::atomic::{AtomicI64, AtomicU64, Ordering};
use std::time::Duration;

/// Of one app that may wait at once.
const WAITING_MAX: usize = 4_096;
/// CPU time of what may wait of one app: there, more only makes every answer late.
const WAITING_TIME_MAX: Duration = Duration::from_secs(1);
/// What a request costs besides its turns: it is read, and its answer is written.
const HANDLING: Duration = Duration::from_micros(10);
/// The most that is expected of a turn: guests that go on longer do so elsewhere.
const USUAL_MAX: Duration = Duration::from_millis(5);
/// The most that an app may be behind others when it comes back, for what it used before.
const DEBT_MAX: Duration = Duration::from_millis(100);
/// A turn counts one part in so many in what is usual.
const USUAL_SHARE: i64 = 8;

/// What one app has used of full cores, for all of its components together.
#[derive(Debug)]
pub struct Spent {
    id: u64,
    /// Its clock, nanoseconds. Only [`Order`] moves it.
    clock: AtomicU64,
    /// What the clock is to be moved by, nanoseconds.
    owed: AtomicI64,
    /// What a turn costs, nanoseconds.
    usual: AtomicI64,
}

impl Default for Spent {
    fn default() -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            clock: AtomicU64::new(0),
            owed: AtomicI64::new(0),
            usual: AtomicI64::new(0),
        }
    }
}

impl Spent {
    /// Never 0.
    pub(super) fn id(&self) -> u64 {
        self.id
    }

    /// A turn took so long, for which so much was put down.
    pub(crate) fn pay(&self, took: Duration, expected: u64) {
        let took = i64::try_from(took.as_nanos()).unwrap_or(i64::MAX / 2);
        self.owed.fetch_add(took + signed(HANDLING) - to_signed(expected), Ordering::Relaxed);
        let usual = self.usual.load(Ordering::Relaxed);
        let next = usual + (took.min(signed(USUAL_MAX)) - usual) / USUAL_SHARE;
        // Two at once: one of them counts.
        self.usual.store(next, Ordering::Relaxed);
    }

    /// Whoever had a turn was not there.
    pub(super) fn give_back(&self, expected: u64) {
        self.owed.fetch_sub(to_signed(expected), Ordering::Relaxed);
    }

    /// What one turn more will cost.
    fn expected(&self) -> u64 {
        (self.usual.load(Ordering::Relaxed) + signed(HANDLING)).unsigned_abs()
    }

    /// Moves a clock by what is owed.
    fn settle(&self, clock: u64) -> u64 {
        clock.saturating_add_signed(self.owed.swap(0, Ordering::Relaxed))
    }
}

fn signed(time: Duration) -> i64 {
    i64::try_from(time.as_nanos()).unwrap_or(i64::MAX / 2)
}

fn to_signed(nanos: u64) -> i64 {
    i64::try_from(nanos).unwrap_or(i64::MAX / 2)
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// Who waits for what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Class {
    /// To go on: before those that have not begun, so that what is begun ends.
    GoesOn,
    /// To begin.
    Begins,
}

/// Of this app enough waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Crowded;

/// Names one that waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Ticket {
    app: u64,
    place: Rank,
}

type Rank = (Class, u64);

/// Whose turn it is.
#[derive(Debug)]
pub(super) struct Next<T> {
    pub(super) item: T,
    pub(super) spent: Arc<Spent>,
    /// What was put down for the turn, nanoseconds.
    pub(super) expected: u64,
}

/// Those that wait.
#[derive(Debug)]
pub(super) struct Order<T> {
    queues: HashMap<u64, Queue<T>>,
    /// Apps of which somebody waits, the one that is next first.
    clocks: BTreeSet<(u64, u64)>,
    /// Where the clock of the one stood that was next last.
    now: u64,
    tickets: u64,
    waiting: usize,
}

#[derive(Debug)]
struct Queue<T> {
    spent: Arc<Spent>,
    clock: u64,
    waiting: BTreeMap<Rank, T>,
}

impl<T> Default for Order<T> {
    fn default() -> Self {
        Self { queues: HashMap::new(), clocks: BTreeSet::new(), now: 0, tickets: 0, waiting: 0 }
    }
}

impl<T> Order<T> {
    /// How many wait.
    pub(super) fn len(&self) -> usize {
        self.waiting
    }

    /// Lets one wait.
    ///
    /// # Errors
    /// It would begin, and of its app there is too much.
    pub(super) fn push(&mut self, spent: &Arc<Spent>, class: Class, item: T) -> Result<Ticket, Crowded> {
        let waiting = self.queues.get(&spent.id).map_or(0, |queue| queue.waiting.len());
        let time = spent.expected().saturating_mul(waiting as u64);
        if class == Class::Begins && (waiting >= WAITING_MAX || time >= nanos(WAITING_TIME_MAX)) {
            return Err(Crowded);
        }
        self.tickets += 1;
        self.waiting += 1;
        let place = (class, self.tickets);
        let queue = self.queues.entry(spent.id).or_insert_with(|| {
            let clock = spent.settle(spent.clock.load(Ordering::Relaxed));
            let clock = clock.clamp(self.now, self.now.saturating_add(nanos(DEBT_MAX)));
            self.clocks.insert((clock, spent.id));
            Queue { spent: Arc::clone(spent), clock, waiting: BTreeMap::new() }
        });
        queue.waiting.insert(place, item);
        Ok(Ticket { app: spent.id, place })
    }

    /// Whose turn it is.
    pub(super) fn pop(&mut self) -> Option<Next<T>> {
        loop {
            let (clock, app) = self.clocks.pop_first()?;
            let Some(queue) = self.queues.get_mut(&app) else { continue };
            queue.clock = queue.spent.settle(clock);
            if queue.clock > clock && self.clocks.first().is_some_and(|(other, _)| *other < queue.clock) {
                // It used more than was put down for it, so it may not be the next one after all.
                self.clocks.insert((queue.clock, app));
                continue;
            }
            self.now = self.now.max(queue.clock);
            let expected = queue.spent.expected();
            queue.clock = queue.clock.saturating_add(expected);
            let (clock, spent) = (queue.clock, Arc::clone(&queue.spent));
            let next = queue.waiting.pop_first();
            if queue.waiting.is_empty() {
                self.close(app);
            } else {
                self.clocks.insert((clock, app));
            }
            let Some((_, item)) = next else { continue };
            self.waiting -= 1;
            return Some(Next { item, spent, expected });
        }
    }

    /// Takes one out that waits no longer, if it is still there.
    pub(super) fn remove(&mut self, ticket: &Ticket) -> Option<T> {
        let queue = self.queues.get_mut(&ticket.app)?;
        let item = queue.waiting.remove(&ticket.place)?;
        self.waiting -= 1;
        if queue.waiting.is_empty() {
            self.clocks.remove(&(queue.clock, ticket.app));
            self.close(ticket.app);
        }
        Some(item)
    }

    /// How many have waited so far.
    #[cfg(test)]
    pub(super) fn tickets(&self) -> u64 {
        self.tickets
    }

    /// Where the clock of an app stands of which somebody waits.
    #[cfg(test)]
    pub(super) fn clock_of(&self, spent: &Spent) -> Option<u64> {
        self.queues.get(&spent.id).map(|queue| queue.clock)
    }

    /// Nobody of an app waits any more. Its clock stays with it.
    fn close(&mut self, app: u64) {
        if let Some(queue) = self.queues.remove(&app) {
            queue.spent.clock.store(queue.clock, Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const US: Duration = Duration::from_micros(1);

    fn app() -> Arc<Spent> {
        Arc::default()
    }

    /// An app whose turns cost this.
    fn costing(each: Duration) -> Arc<Spent> {
        let app = app();
        for _ in 0..100 {
            app.pay(each, 0);
        }
        app.owed.store(0, Ordering::Relaxed);
        app
    }

    fn fill(order: &mut Order<&'static str>, app: &Arc<Spent>, name: &'static str, count: usize) {
        for _ in 0..count {
            order.push(app, Class::Begins, name).unwrap();
        }
    }

    /// Whose turns come, each of which costs what is given for it.
    fn turns(order: &mut Order<&'static str>, count: usize, cost: impl Fn(&str) -> Duration) -> Vec<&'static str> {
        let one = || {
            let next = order.pop()?;
            next.spent.pay(cost(next.item), next.expected);
            Some(next.item)
        };
        std::iter::from_fn(one).take(count).collect()
    }

    #[test]
    fn one_app_alone_has_its_turns_in_the_order_in_which_they_came() {
        let (mut order, app) = (Order::default(), app());
        for number in 0..5 {
            order.push(&app, Class::Begins, number).unwrap();
        }
        let all: Vec<_> = std::iter::from_fn(|| order.pop()).map(|next| next.item).collect();
        assert_eq!((all, order.len()), (vec![0, 1, 2, 3, 4], 0));
    }

    #[test]
    fn a_neighbour_comes_before_all_of_a_flood_that_was_there_first() {
        let (mut order, flood, neighbour) = (Order::default(), app(), app());
        fill(&mut order, &flood, "flood", 1_000);
        turns(&mut order, 500, |_| 40 * US);
        fill(&mut order, &neighbour, "neighbour", 1);
        assert_eq!(turns(&mut order, 2, |_| 40 * US), ["neighbour", "flood"]);
    }

    #[test]
    fn two_that_want_all_of_it_have_equal_parts_of_the_time_and_not_of_the_turns() {
        let (mut order, cheap, dear) = (Order::default(), costing(10 * US), costing(190 * US));
        fill(&mut order, &cheap, "cheap", 2_000);
        fill(&mut order, &dear, "dear", 2_000);
        let all = turns(&mut order, 1_100, |name| if name == "cheap" { 10 * US } else { 190 * US });
        let cheap = all.iter().filter(|name| **name == "cheap").count();
        // A turn is 20 µs of the one and 200 µs of the other, each with what its connection costs.
        assert!((990..=1_010).contains(&cheap), "{cheap}");
    }

    #[test]
    fn however_many_apps_there_are_each_has_its_part() {
        let mut order = Order::default();
        let names = ["a", "b", "c", "d"];
        for (name, count) in names.into_iter().zip([4_000, 400, 100, 60]) {
            fill(&mut order, &app(), name, count);
        }
        let all = turns(&mut order, 200, |_| 30 * US);
        for name in names {
            let count = all.iter().filter(|other| **other == name).count();
            assert!((49..=51).contains(&count), "{name} {count}");
        }
    }

    #[test]
    fn what_a_turn_cost_beyond_what_was_expected_is_paid_by_its_app() {
        let (mut order, burner, neighbour) = (Order::default(), app(), app());
        fill(&mut order, &burner, "burner", 10);
        fill(&mut order, &neighbour, "neighbour", 100);
        let cost = |name: &str| if name == "burner" { 2_000 * US } else { 30 * US };
        let all = turns(&mut order, 52, cost);
        // 2 ms of the one are some fifty turns of the other.
        assert!(all.iter().filter(|name| **name == "burner").count() <= 2, "{all:?}");
    }

    #[test]
    fn who_comes_back_has_saved_up_nothing_and_owes_little() {
        let (mut order, rare, busy) = (Order::default(), app(), app());
        fill(&mut order, &rare, "rare", 1);
        turns(&mut order, 1, |_| US);
        fill(&mut order, &busy, "busy", 3_000);
        turns(&mut order, 2_000, |_| 100 * US);
        fill(&mut order, &rare, "rare", 100);
        let all = turns(&mut order, 20, |_| 100 * US);
        assert!(all.iter().filter(|name| **name == "rare").count() <= 11, "{all:?}");

        let (mut order, owes, other) = (Order::default(), app(), costing(90 * US));
        owes.pay(Duration::from_secs(3_600), 0);
        fill(&mut order, &other, "other", 3_000);
        fill(&mut order, &owes, "owes", 1);
        let all = turns(&mut order, 1_100, |_| 90 * US);
        let before = all.iter().position(|name| *name == "owes").unwrap();
        assert!((900..=1_001).contains(&before), "an hour counts as a tenth of a second: {before}");
    }

    #[test]
    fn what_is_begun_goes_on_before_its_app_begins_more() {
        let (mut order, app) = (Order::default(), app());
        fill(&mut order, &app, "begins", 2);
        order.push(&app, Class::GoesOn, "goes on").unwrap();
        assert_eq!(turns(&mut order, 3, |_| US), ["goes on", "begins", "begins"]);
    }

    #[test]
    fn who_leaves_leaves_nothing_behind() {
        let (mut order, app) = (Order::default(), app());
        for _ in 0..10_000 {
            let ticket = order.push(&app, Class::Begins, "left").unwrap();
            assert_eq!(order.remove(&ticket), Some("left"));
            assert_eq!(order.remove(&ticket), None);
        }
        assert!(order.queues.is_empty() && order.clocks.is_empty() && order.pop().is_none());
        let (first, second) = (order.push(&app, Class::Begins, "a"), order.push(&app, Class::Begins, "b"));
        order.remove(&first.unwrap()).unwrap();
        let next = order.pop().unwrap();
        assert_eq!((next.item, order.len()), ("b", 0));
        assert_eq!(order.remove(&second.unwrap()), None, "it had its turn");
        assert!(order.queues.is_empty() && order.clocks.is_empty());
        app.give_back(next.expected);
        fill(&mut order, &app, "c", 1);
        assert_eq!(order.queues[&app.id].clock, 0, "who left used nothing");
    }

    #[test]
    fn of_one_app_so_many_wait_and_what_is_begun_always_may() {
        let (mut order, flood, other) = (Order::default(), app(), app());
        fill(&mut order, &flood, "flood", WAITING_MAX);
        assert_eq!(order.push(&flood, Class::Begins, "one more"), Err(Crowded));
        assert!(
            order.push(&flood, Class::GoesOn, "begun").is_ok() && order.push(&other, Class::Begins, "other").is_ok()
        );
        for _ in 0..3 {
            order.pop().unwrap();
        }
        assert!(order.push(&flood, Class::Begins, "again").is_ok());
    }

    #[test]
    fn of_one_app_no_more_waits_than_its_core_does_in_a_second() {
        let (mut order, slow) = (Order::default(), costing(Duration::from_millis(4)));
        let count = std::iter::repeat_with(|| order.push(&slow, Class::Begins, ())).take_while(Result::is_ok).count();
        assert!((245..=270).contains(&count), "{count}");
    }
}
