//! An instance that answers several requests at once: of WASI 0.3, for authors who chose reuse.
//!
//! It has a task of its own, which ends with the instance. A request goes through the instance's inbox, and comes back
//! as a head with as much of the body as was there. What can't be told apart within one instance is shared: CPU time in
//! equal parts, and the fate. A trap ends all of its requests, a timeout lets the others end and then the instance.

mod driver;
mod turn;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::{Pin, pin};
use std::sync::{Arc, Weak};
use std::task::Poll;
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body::Frame;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use wasmtime_wasi_http::WasiBody;

use self::driver::Driver;
use self::turn::{Due, Turn};
use super::heavy::Guest;
use super::instance::Instance;
use super::meter::Metered;
use super::outcome::Outcome;
use super::run::Asked;
use crate::fault::{Fault, GuestFault};
use crate::pool::{Inbox, Pool};

/// What an instance answers: head and body, or its error code as text.
pub(super) type Answered = Result<Sent, String>;

/// An answer on its way from the instance.
pub(super) struct Sent {
    pub(super) head: http::response::Parts,
    /// What was there of the body.
    pub(super) frames: VecDeque<Frame<Bytes>>,
    /// The rest of it, and whom to tell that it is over, by dropping this.
    pub(super) rest: Option<(WasiBody, oneshot::Sender<()>)>,
}

/// One request for an instance.
pub(crate) struct Call {
    pub(super) asked: Asked,
    pub(super) answer: oneshot::Sender<Answered>,
    pub(super) outcome: Arc<Outcome>,
    pub(super) deadline: Instant,
    pub(super) permit: OwnedSemaphorePermit,
    /// It waited for an instance already that could not take it.
    pub(super) was_moved: bool,
}

impl Call {
    pub(crate) fn deadline(&self) -> Instant {
        self.deadline
    }

    pub(crate) fn was_moved(&self) -> bool {
        self.was_moved
    }

    /// No instance took it in its time.
    pub(crate) fn late(self) {
        self.fails(Fault::Overload("queue-deadline"));
    }

    fn fails(self, fault: Fault) {
        self.outcome.settle(Err(fault));
    }
}

/// Makes an instance for what waits in `inbox`, and lets it answer until it is given up.
pub(crate) async fn run(pool: Weak<Pool>, inbox: Arc<Inbox>) {
    let end = End { pool: pool.clone(), inbox: Arc::clone(&inbox) };
    let Some((instance, outcome)) = begin(&pool, &inbox).await else { return };
    let Some(pool) = pool.upgrade() else { return };
    let turn = Arc::new(Turn::new(Duration::from_millis(pool.grants.limits.cpu_ms)));
    let mut driver = Driver::new(&pool, instance, outcome, Arc::clone(&inbox), Arc::clone(&turn));
    let heavy = pool.heavy().clone();
    // Idle, it does not keep the pool from ending; a request does.
    drop(pool);
    let is_heavy = poll_fn(|cx| match Pin::new(&mut driver).poll(cx) {
        Poll::Ready(()) => Poll::Ready(false),
        Poll::Pending if turn.is_heavy() => Poll::Ready(true),
        Poll::Pending => Poll::Pending,
    })
    .await;
    if is_heavy {
        // The others shall not wait for one that computes.
        end.hand_over();
        if let Some(moved) = heavy.spawn(driver) {
            watch(moved, &turn).await;
        }
    }
}

/// Waits for an instance that computes, and looks at the clock in its place: it may not come to it.
async fn watch(moved: impl Future<Output = Option<()>>, turn: &Turn) {
    let mut moved = pin!(moved);
    loop {
        match turn.expire(Instant::now()) {
            Due::Over => return,
            Due::Never => {
                moved.await;
                return;
            }
            Due::At(next) => tokio::select! {
                _ = &mut moved => return,
                () = tokio::time::sleep_until(next.into()) => {}
            },
        }
    }
}

/// The instance, under the limits of the first request that waits for it.
async fn begin(pool: &Weak<Pool>, inbox: &Inbox) -> Option<(Instance, Arc<Outcome>)> {
    let pool = pool.upgrade()?;
    let limits = &pool.grants.limits;
    let deadline = Instant::now() + Duration::from_millis(limits.wall_ms);
    let deadline = inbox.expire(Instant::now()).map_or(deadline, |first| first.min(deadline));
    let outcome = Arc::new(Outcome::default());
    let (made, of) = (Arc::clone(&pool), Arc::clone(&outcome));
    let work = Box::pin(async move {
        match Instance::fresh(&made, &of).await {
            Ok(instance) => Some(instance),
            Err(fault) => {
                of.settle(Err(fault));
                None
            }
        }
    });
    let work = Metered::new(work, Arc::clone(&outcome), Duration::from_millis(limits.cpu_ms), deadline);
    let instance = Guest::new(work, pool.heavy()).await;
    if instance.is_none() {
        let fault = match outcome.end() {
            Some(Err(fault)) => fault.clone(),
            _ => Fault::Guest(GuestFault::Trap),
        };
        for call in inbox.close() {
            call.fails(fault.clone());
        }
    }
    Some((instance?, outcome))
}

/// Whatever ends an instance, the requests that it has not begun with find another.
struct End {
    pool: Weak<Pool>,
    inbox: Arc<Inbox>,
}

impl End {
    fn hand_over(&self) {
        let calls = self.inbox.close();
        if let Some(pool) = self.pool.upgrade() {
            calls.into_iter().for_each(|call| pool.share(call));
        }
    }
}

impl Drop for End {
    fn drop(&mut self) {
        self.hand_over();
    }
}
