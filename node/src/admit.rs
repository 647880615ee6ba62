//! How many requests are under way at once on this node.
//!
//! Nothing queues here: a request beyond the bound is refused at once ([`Fault::Overload`]), because a queue in
//! front of a full node only makes every answer late.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

use crate::fault::Fault;

/// The bound. Clones share it.
#[derive(Debug, Clone)]
pub struct Admission {
    places: Arc<Semaphore>,
}

/// A place among the requests under way. It is held until the last byte of the answer is out.
#[derive(Debug)]
#[must_use = "the place is free again as soon as this is dropped"]
pub struct Permit {
    _place: OwnedSemaphorePermit,
}

impl Admission {
    /// Room for `requests_max` requests at once.
    pub fn new(requests_max: u32) -> Self {
        let places = usize::try_from(requests_max).unwrap_or(usize::MAX).min(Semaphore::MAX_PERMITS);
        Self { places: Arc::new(Semaphore::new(places)) }
    }

    /// Takes a place.
    ///
    /// # Errors
    /// [`Fault::Overload`] when there is none.
    pub fn admit(&self) -> Result<Permit, Fault> {
        match Arc::clone(&self.places).try_acquire_owned() {
            Ok(place) => Ok(Permit { _place: place }),
            Err(_) => Err(Fault::Overload("requests_max")),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_request_beyond_the_bound_is_refused_until_one_ends() {
        let admission = Admission::new(2);
        let first = admission.admit().unwrap();
        let _second = admission.admit().unwrap();
        assert_eq!(admission.admit().unwrap_err(), Fault::Overload("requests_max"));
        drop(first);
        assert!(admission.admit().is_ok());
    }

    #[test]
    fn clones_share_the_bound() {
        let admission = Admission::new(1);
        let other = admission.clone();
        let _permit = admission.admit().unwrap();
        assert!(other.admit().is_err());
    }
}
