//! The turns of an instance: the guest's side, within the engine's event loop, and around it the side that watches the
//! clocks. A guest that computes, or that waits in a call of the host, holds the loop; then only the outer side runs.

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::{Arc, Weak};
use std::task::{Context, Poll};
use std::time::Instant;

use cpu_time::ThreadTime;
use selvage_config::app::isolation::Reuse;
use tokio::sync::oneshot;
use tokio::time::Sleep;
use wasmtime::Store;
use wasmtime::component::Accessor;
use wasmtime_wasi_http::p3::Request as Request3;
use wasmtime_wasi_http::p3::bindings::Service;
use wasmtime_wasi_http::{WasiBody, WasiHttpView};

use super::super::body::{DRAINED_FRAMES_MAX, Drained, drain};
use super::super::instance::{self, Exports, Instance};
use super::super::meter::Clock;
use super::super::outcome::Outcome;
use super::super::run::Asked;
use super::Sent;
use super::turn::{Due, Turn};
use crate::fault::{Fault, GuestFault};
use crate::host::State;
use crate::line::{Spent, full};
use crate::pool::{Grants, Inbox, Pool};

/// An instance at work. It is over when the instance is to be given up.
pub(super) struct Driver {
    work: Option<Pin<Box<dyn Future<Output = ()> + Send>>>,
    pool: Weak<Pool>,
    inbox: Arc<Inbox>,
    turn: Arc<Turn>,
    clock: Clock,
    spent: Arc<Spent>,
    sleep: Option<Pin<Box<Sleep>>>,
}

impl Driver {
    pub(super) fn new(
        pool: &Arc<Pool>,
        instance: Instance,
        outcome: Arc<Outcome>,
        inbox: Arc<Inbox>,
        turn: Arc<Turn>,
    ) -> Self {
        let spent = Arc::clone(&pool.grants.spent);
        let guest = Guest {
            pool: Arc::downgrade(pool),
            grants: Arc::clone(&pool.grants),
            reuse: pool.reuse().copied().unwrap_or_default(),
            inbox: Arc::clone(&inbox),
            turn: Arc::clone(&turn),
            outcome,
        };
        let work = Some(Box::pin(guest.work(instance)) as Pin<Box<_>>);
        Self { work, pool: Arc::downgrade(pool), inbox, turn, clock: Clock::default(), spent, sleep: None }
    }

    fn end(&mut self, fault: &Fault) -> Poll<()> {
        self.turn.fail(fault);
        self.work = None;
        Poll::Ready(())
    }

    /// Wakes this when the first request's time is over.
    fn wait(&mut self, due: Due, cx: &mut Context<'_>) {
        let waiting = self.inbox.expire(Instant::now());
        let due = if let Due::At(due) = due { Some(due) } else { None };
        let Some(due) = waiting.into_iter().chain(due).min() else { return };
        let sleep = self.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(due.into())));
        // To move it costs more than to wake up once too often.
        if sleep.is_elapsed() || sleep.deadline() > due.into() {
            sleep.as_mut().reset(due.into());
        }
        if sleep.as_mut().poll(cx).is_ready() {
            cx.waker().wake_by_ref();
        }
    }

    /// Requests that this instance can't take now try another.
    fn hand_over(&self) {
        if self.inbox.is_empty() {
            return;
        }
        if let Some(pool) = self.pool.upgrade() {
            for mut call in self.inbox.stuck() {
                call.was_moved = true;
                pool.share(call);
            }
        }
    }
}

impl Future for Driver {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<()> {
        let me = &mut *self;
        let begun = Instant::now();
        let due = me.turn.expire(begun);
        if due == Due::Over {
            me.work = None;
            return Poll::Ready(());
        }
        let Some(work) = &mut me.work else { return Poll::Ready(()) };
        let clock = me.clock.is_measured().then(ThreadTime::now);
        let mut polled = work.as_mut().poll(cx);
        // The guest has nothing more to do now: what there is of the answers is all that there is for the moment.
        if polled.is_pending() && me.turn.flush() {
            polled = work.as_mut().poll(cx);
            me.turn.flushed();
        }
        if polled.is_ready() {
            me.work = None;
            return Poll::Ready(());
        }
        let spent = me.clock.cost(begun.elapsed(), clock.map(|clock| clock.elapsed()));
        if full::is_full(begun) {
            me.spent.pay(spent, 0);
        }
        if !me.turn.pay(spent) {
            return me.end(&Fault::Guest(GuestFault::ExceededCpu));
        }
        let came = me.turn.came();
        if me.turn.is_spent() && !me.inbox.is_closed() {
            me.inbox.retire();
        }
        if !came || me.inbox.is_closed() {
            me.hand_over();
        }
        let due = if let Due::Never = due { me.turn.expire(begun) } else { due };
        me.wait(due, cx);
        Poll::Pending
    }
}

/// The guest's side.
struct Guest {
    pool: Weak<Pool>,
    grants: Arc<Grants>,
    reuse: Reuse,
    inbox: Arc<Inbox>,
    turn: Arc<Turn>,
    /// What is known of the instance.
    outcome: Arc<Outcome>,
}

impl Guest {
    async fn work(self, instance: Instance) {
        let Instance { mut store, exports, .. } = instance;
        let Exports::P3(service) = exports else { return };
        let ended = run(&self, &mut store, &service).await;
        if let Err(error) = ended {
            instance::tell(&self.grants, &error);
            // Before the store goes.
            self.turn.fail(&self.outcome.fault(&error));
        }
    }

    /// Whether this instance is to take no more requests.
    fn is_spent(&self) -> bool {
        self.turn.is_spent() || self.inbox.is_closed() || self.outcome.is_excess()
    }

    /// Whether the instance, without requests now, has a place to wait for the next one.
    fn rests(&self, state: &mut State) -> bool {
        if self.turn.is_resting() {
            return self.inbox.rests(Instant::now());
        }
        let Some(pool) = self.pool.upgrade() else { return false };
        if !instance::may_wait(state, &self.reuse) {
            return false;
        }
        let Some(place) = pool.place(state.memory.used()) else { return false };
        if self.inbox.rests(Instant::now()) {
            self.turn.rests(place);
            pool.has_resting();
        }
        true
    }
}

/// The event loop, until the instance is to be given up.
async fn run(guest: &Guest, store: &mut Store<State>, service: &Service) -> wasmtime::Result<()> {
    let func = *service.wasi_http_handler().func_handle().func();
    let serve = async |accessor: &Accessor<State>| -> wasmtime::Result<()> {
        let mut requests: Vec<Pin<Box<dyn Future<Output = wasmtime::Result<()>> + Send + '_>>> = Vec::new();
        poll_fn(|cx| {
            guest.turn.comes();
            loop {
                let mut index = 0;
                while let Some(request) = requests.get_mut(index) {
                    match request.as_mut().poll(cx) {
                        Poll::Ready(ended) => {
                            drop(requests.swap_remove(index));
                            guest.inbox.done();
                            let () = ended?;
                        }
                        Poll::Pending => index += 1,
                    }
                }
                let is_stuck = accessor.poll_ready_for_concurrent_call(func, cx).is_pending();
                guest.inbox.attend(is_stuck, cx.waker());
                let is_spent = guest.is_spent();
                if !is_spent
                    && !is_stuck
                    && let Some(call) = guest.inbox.pop()
                {
                    let (id, asked) = guest.turn.begin(call);
                    if guest.turn.begun() >= u64::from(guest.reuse.requests_max) {
                        guest.turn.spent();
                    }
                    accessor.with(|mut access| instance::renew(access.get()));
                    requests.push(Box::pin(answer(guest, accessor, service, id, asked)));
                    continue;
                }
                if !requests.is_empty() || accessor.poll_no_interesting_tasks(cx).is_pending() {
                    return Poll::Pending;
                }
                if is_spent || !accessor.with(|mut access| guest.rests(access.get())) {
                    return Poll::Ready(Ok(()));
                }
                return Poll::Pending;
            }
        })
        .await
    };
    store.run_concurrent(serve).await?
}

/// One request.
async fn answer(
    guest: &Guest,
    accessor: &Accessor<State>,
    service: &Service,
    id: u64,
    asked: Asked,
) -> wasmtime::Result<()> {
    let (request, read) = accessor.with(|mut access| {
        let (request, read) = Request3::from_http(access.get().http().hooks, asked);
        (request, Box::pin(read) as Pin<Box<dyn Future<Output = _> + Send>>)
    });
    match service.handle(accessor, request).await? {
        Ok(response) => {
            let response = accessor.with(|access| response.into_http(access, read))?;
            let (head, mut body) = response.into_parts();
            let mut frames = VecDeque::new();
            let drained = poll_fn(|cx| match drain(&mut body, &mut frames, cx) {
                // As long as the guest goes on by itself, so does this.
                Drained::Open if frames.len() < DRAINED_FRAMES_MAX && guest.turn.holds() => Poll::Pending,
                drained => Poll::Ready(drained),
            })
            .await;
            send(guest, id, Sent { head, frames, rest: None }, drained, body).await;
        }
        Err(code) => guest.turn.answer(id, Err(format!("{code:?}"))),
    }
    guest.turn.done(id);
    if !accessor.with(|mut access| instance::may_go_on(access.get(), &guest.reuse)) {
        guest.turn.spent();
    }
    Ok(())
}

/// Sends an answer, and waits until its body is over.
async fn send(guest: &Guest, id: u64, sent: Sent, drained: Drained, body: WasiBody) {
    match drained {
        Drained::Whole => guest.turn.answer(id, Ok(sent)),
        Drained::Broken => guest.turn.refuse(id, Fault::Guest(GuestFault::BadResponse)),
        Drained::Open => {
            let (over, is_over) = oneshot::channel();
            guest.turn.answer(id, Ok(Sent { rest: Some((body, over)), ..sent }));
            // Whoever has the body drops the other end.
            let _ = is_over.await;
        }
    }
}
