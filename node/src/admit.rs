//! How many requests are under way at once on this node, and how many of one app.
//!
//! Nothing queues here: a request beyond a bound is refused ([`Fault::Overload`]), because a queue in front of a full node
//! only makes every answer late. Where the core is full too, the answer that says so is held back for a moment
//! ([`Admission::hold_back`]): who asks again at once shall not use up the core by being refused.
//!
//! The bound of an app moves with what is free (dynamic thresholds: Choudhury and Hahne, IEEE/ACM Transactions on
//! Networking 6(2), 1998): it may hold [`SHARE`] times as many places as nobody holds. One app alone can have four
//! fifths of the node, two greedy ones four ninths each, and however many there are, another app still finds room.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::fault::Fault;
use crate::line::full;

/// Places that one app may hold for each that is free.
const SHARE: usize = 4;
/// How long a refusal is held back.
const REFUSAL: Duration = Duration::from_millis(100);
/// Refusals that are held back at once. They have a connection and nothing else of the node's.
const REFUSALS_MAX: usize = 4_096;

/// The bound of the node. Clones share it.
#[derive(Debug, Clone)]
pub struct Admission {
    places: Arc<Semaphore>,
    refusals: Arc<AtomicUsize>,
}

/// The places that one app holds.
#[derive(Debug, Clone, Default)]
pub struct Held {
    count: Arc<AtomicUsize>,
}

/// A place among the requests under way. It is held until the last byte of the answer is out.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub struct Permit {
    _place: OwnedSemaphorePermit,
    held: Held,
}

impl Drop for Permit {
    fn drop(&mut self) {
        self.held.count.fetch_sub(1, Ordering::Relaxed);
    }
}

impl Admission {
    /// Room for `requests_max` requests at once.
    pub fn new(requests_max: u32) -> Self {
        let places = usize::try_from(requests_max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(places)), refusals: Arc::default() }
    }

    /// Takes a place for an app.
    ///
    /// # Errors
    /// [`Fault::Overload`] when there is none, or the app has its share.
    pub fn admit(&self, held: &Held) -> Result<Permit, Fault> {
        let full = Fault::Overload("requests_max");
        let free = self.places.available_permits();
        let place = Arc::clone(&self.places).try_acquire_owned().map_err(|_| full)?;
        if held.count.fetch_add(1, Ordering::Relaxed) >= free.saturating_mul(SHARE) {
            held.count.fetch_sub(1, Ordering::Relaxed);
            return Err(Fault::Overload("share"));
        }
        Ok(Permit { _place: place, held: held.clone() })
    }

    /// Lets a moment pass before a request is refused at `now`, if the core is full.
    pub(crate) async fn hold_back(&self, now: Instant) {
        let more = |held: usize| (held < REFUSALS_MAX).then_some(held + 1);
        if full::is_full(now) && self.refusals.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).is_ok() {
            let _held = Refusal(&self.refusals);
            tokio::time::sleep(REFUSAL).await;
        }
    }
}

/// One that is held back.
struct Refusal<'a>(&'a AtomicUsize);

impl Drop for Refusal<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use futures_util::FutureExt as _;

    use super::*;

    /// Takes places until one is refused.
    fn take_all(admission: &Admission, held: &Held) -> (Vec<Permit>, Fault) {
        let mut taken = Vec::new();
        loop {
            match admission.admit(held) {
                Ok(permit) => taken.push(permit),
                Err(fault) => return (taken, fault),
            }
        }
    }

    #[test]
    fn a_request_beyond_the_bound_is_refused_until_one_ends() {
        let (admission, app) = (Admission::new(2), Held::default());
        let first = admission.admit(&app).unwrap();
        let _second = admission.admit(&app).unwrap();
        assert_eq!(admission.admit(&app).unwrap_err(), Fault::Overload("requests_max"));
        drop(first);
        assert!(admission.admit(&app).is_ok());
    }

    #[tokio::test]
    async fn a_refusal_is_held_back_where_the_core_is_full_up_to_a_bound() {
        let (admission, now) = (Admission::new(1), Instant::now());
        assert!(admission.hold_back(now).now_or_never().is_some(), "there is time for it");
        let _full = full::Filled::new();
        let mut held: Vec<_> = (0..REFUSALS_MAX).map(|_| Box::pin(admission.hold_back(now))).collect();
        assert!(held.iter_mut().all(|one| one.now_or_never().is_none()));
        assert!(admission.hold_back(now).now_or_never().is_some(), "that many and no more");
        held.pop();
        assert!(admission.hold_back(now).now_or_never().is_none());
        held.pop().unwrap().await;
        assert!(now.elapsed() >= REFUSAL);
    }

    #[test]
    fn clones_share_the_bound() {
        let (admission, app) = (Admission::new(1), Held::default());
        let other = admission.clone();
        let _permit = admission.admit(&app).unwrap();
        assert!(other.admit(&Held::default()).is_err());
    }

    #[test]
    fn a_greedy_app_leaves_room_for_others() {
        let admission = Admission::new(1_000);
        let apps: Vec<Held> = (0..3).map(|_| Held::default()).collect();
        let (first, fault) = take_all(&admission, &apps[0]);
        assert_eq!((first.len(), fault), (800, Fault::Overload("share")));
        let (second, fault) = take_all(&admission, &apps[1]);
        assert_eq!((second.len(), fault), (160, Fault::Overload("share")));
        let (third, _) = take_all(&admission, &apps[2]);
        assert!(third.len() >= 30, "{}", third.len());
        // What the first one gives back it doesn't get again as long as the others are there.
        drop(first);
        let (again, _) = take_all(&admission, &apps[0]);
        assert!((600..700).contains(&again.len()), "{}", again.len());
        drop((again, second, third));
        assert_eq!(take_all(&admission, &apps[2]).0.len(), 800);
    }
}
