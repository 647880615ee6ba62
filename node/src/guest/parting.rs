//! Between a request and the instance that answered it: it is free for the next one only when both the guest's work and
//! the answer's body ended well.

use std::sync::{Arc, Mutex, PoisonError};

use super::instance::Instance;
use crate::pool::{Pool, Rested};

/// Waits for the second of both ends. Dropped before it, the instance is given up.
pub(super) struct Parting {
    pool: Arc<Pool>,
    first: Mutex<First>,
}

/// What ended first.
enum First {
    Neither,
    Guest(Rested),
    Body,
}

impl Parting {
    pub(super) fn new(pool: Arc<Pool>) -> Arc<Self> {
        Arc::new(Self { pool, first: Mutex::new(First::Neither) })
    }

    /// The guest is done with the request.
    pub(super) fn guest_ended(&self, instance: Instance) {
        // While the client reads on, the instance takes a place of those that wait; without one it is given up.
        let Some(rested) = self.pool.rest(instance) else { return };
        self.second(First::Guest(rested));
    }

    /// The client has all of the answer.
    pub(super) fn body_ended(&self) {
        self.second(First::Body);
    }

    fn second(&self, end: First) {
        let mut first = self.first.lock().unwrap_or_else(PoisonError::into_inner);
        let rested = match (std::mem::replace(&mut *first, First::Neither), end) {
            (First::Guest(rested), First::Body) | (First::Body, First::Guest(rested)) => rested,
            (_, end) => return *first = end,
        };
        drop(first);
        self.pool.keep(rested);
    }
}
