//! Connections that carry many requests at once, used in turn.

use std::future::Future;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use crate::error::ConnectError;

use super::connect::Opener;
use super::request::Template;
use super::{Answer, Failure};

/// A connection that carries many requests at once.
pub(super) trait Multiplexed: Clone + Send + Sync + 'static {
    /// Opens one.
    fn open(opener: &Opener) -> impl Future<Output = Result<Self, ConnectError>> + Send;
    /// Whether it takes no more requests.
    fn is_closed(&self) -> bool;
    /// Sends one request and reads the whole answer.
    fn exchange(self, template: &Template) -> impl Future<Output = Result<Answer, Failure>> + Send;
}

/// A fixed number of places, each with one connection or none yet.
#[derive(Debug)]
pub(super) struct Shared<C> {
    places: Vec<Place<C>>,
}

/// A cell is filled by one opener at a time, the others wait for it. It is swapped for an empty one when its
/// connection has ended.
type Place<C> = Mutex<Arc<OnceCell<C>>>;

impl<C: Multiplexed> Shared<C> {
    pub(super) fn new(count: usize) -> Shared<C> {
        Shared { places: (0..count).map(|_| Place::default()).collect() }
    }

    pub(super) async fn warm(&self, opener: &Opener, index: usize) -> Result<(), ConnectError> {
        let cell = current(&self.places[index]);
        cell.get_or_try_init(|| opener.attempt(C::open(opener))).await.map(drop)
    }

    /// The same `turn` goes to the same place: after a failure that left nothing behind, to its next connection.
    pub(super) async fn exchange(&self, opener: &Opener, template: &Template, turn: usize) -> Result<Answer, Failure> {
        let place = &self.places[turn % self.places.len()];
        let cell = current(place);
        let connection = cell.get_or_try_init(|| opener.attempt(C::open(opener))).await?.clone();
        let end = connection.exchange(template).await;
        if matches!(end, Err(Failure { unprocessed: true, .. })) {
            // It says no by now, even if it does not look closed: the next request needs another one.
            retire(place, &cell);
        }
        end
    }
}

/// The cell of a place, after an ended connection was taken out.
fn current<C: Multiplexed>(place: &Place<C>) -> Arc<OnceCell<C>> {
    let mut cell = place.lock().unwrap_or_else(PoisonError::into_inner);
    if cell.get().is_some_and(C::is_closed) {
        *cell = Arc::default();
    }
    Arc::clone(&cell)
}

fn retire<C>(place: &Place<C>, retired: &Arc<OnceCell<C>>) {
    let mut cell = place.lock().unwrap_or_else(PoisonError::into_inner);
    if Arc::ptr_eq(&cell, retired) {
        *cell = Arc::default();
    }
}
