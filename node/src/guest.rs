//! One request through one guest: the head as soon as it stands, the bodies streaming both ways, the limits all along.

pub(crate) mod bounds;

mod body;
pub(crate) mod heavy;
pub(crate) mod instance;
pub(crate) mod meter;
pub(crate) mod outcome;
mod parting;
mod run;
pub(crate) mod shared;

use std::collections::VecDeque;
use std::future::poll_fn;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, Waker};
use std::time::{Duration, Instant};

use http::header::CONTENT_LENGTH;
use http_body_util::BodyExt;
use tokio::sync::oneshot::error::TryRecvError;
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use wasmtime_wasi_http::WasiBody;

use self::body::{Answer, Drained, Running};
use self::heavy::Guest;
use self::instance::Instance;
use self::meter::Metered;
use self::outcome::Outcome;
use self::parting::Parting;
use self::shared::Call;
use crate::fault::{ClientFault, Fault, GuestFault};
use crate::line::InTurns;
use crate::pool::Pool;
use crate::request::{Request, Response};

/// Names and values of an answer's head together, bytes. More would not pass what stands between us and the client.
const HEAD_BYTES_MAX: usize = 64 * 1024;

/// Calls an instance: one that nobody used before, unless the pool keeps some for another request.
pub(crate) async fn call(pool: Arc<Pool>, permit: OwnedSemaphorePermit, request: Request) -> Result<Response, Fault> {
    let limits = &pool.grants.limits;
    let deadline = request.arrived + Duration::from_millis(limits.wall_ms);
    let outcome = Arc::new(Outcome::default());
    let asked = admit(request, limits.request_body_bytes, &outcome)?;
    if pool.is_shared() {
        return among_others(pool, permit, asked, outcome, deadline).await;
    }
    let (sender, mut head) = oneshot::channel();
    let work = run::work(&pool, permit, asked, &outcome, sender);
    let guest = Metered::new(work, Arc::clone(&outcome), Duration::from_millis(limits.cpu_ms), deadline);
    let guest = guest.telling(pool.habit());
    let begin = if pool.habit().is_heavy() { Guest::behind } else { Guest::new };
    let mut guest = begin(guest, pool.heavy());
    // Here, not in a task of its own: most guests are done before they ever wait.
    let (head, ended) = poll_fn(|cx| {
        let ended = Pin::new(&mut guest).poll(cx);
        // First without asking to be woken: to poll the channel would say "not yet" of a head that is there, once the
        // task has used up its budget. Here the head is set within that poll or not at all.
        match (head.try_recv(), ended) {
            (Ok(head), ended) => Poll::Ready((Some(head), ended)),
            (Err(_), ended @ Poll::Ready(_)) => Poll::Ready((None, ended)),
            (Err(TryRecvError::Empty), Poll::Pending) if guest.has_moved() => {
                Pin::new(&mut head).poll(cx).map(|head| (head.ok(), Poll::Pending))
            }
            (Err(_), Poll::Pending) => Poll::Pending,
        }
    })
    .await;
    if let Some(fault) = outcome.body_fault() {
        return Err(fault);
    }
    let response = head.ok_or_else(|| run::silent(&outcome))?.map_err(|code| error_code(&code, &pool))?;
    let (parts, body) = response.into_parts();
    let response = http::Response::from_parts(checked(parts)?, body);
    let answer = Streaming { outcome, deadline, pool };
    match ended {
        Poll::Ready(instance) => answer.ended(response, instance),
        Poll::Pending => Ok(answer.streaming(response, guest)),
    }
}

/// Calls an instance that answers others at the same time.
async fn among_others(
    pool: Arc<Pool>,
    permit: OwnedSemaphorePermit,
    asked: run::Asked,
    outcome: Arc<Outcome>,
    deadline: Instant,
) -> Result<Response, Fault> {
    let (answer, answered) = oneshot::channel();
    pool.share(Call { asked, answer, outcome: Arc::clone(&outcome), deadline, permit, was_moved: false });
    let answered = answered.await;
    if let Some(fault) = outcome.body_fault() {
        return Err(fault);
    }
    let sent = answered.map_err(|_| run::silent(&outcome))?.map_err(|code| error_code(&code, &pool))?;
    let head = checked(sent.head)?;
    let (rest, over) = sent.rest.unzip();
    Ok(Streaming { outcome, deadline, pool }
        .answer(head, Rest { frames: sent.frames, body: rest, over, ..Rest::default() }))
}

/// An instance that no request asked for yet, under the limits of one.
pub(crate) async fn ahead(pool: &Arc<Pool>) -> Option<Instance> {
    let limits = &pool.grants.limits;
    let deadline = Instant::now() + Duration::from_millis(limits.wall_ms);
    let outcome = Arc::new(Outcome::default());
    let (made, of) = (Arc::clone(pool), Arc::clone(&outcome));
    let work = Box::pin(async move {
        let instance = Instance::fresh(&made, &of).await.ok()?;
        // What it was refused would be forgotten by the time a request meets the consequences.
        (!of.is_excess()).then_some(instance)
    });
    Metered::new(work, outcome, Duration::from_millis(limits.cpu_ms), deadline).await
}

/// The request in the guest's form, if its head allows it at all.
fn admit(request: Request, body_bytes: u64, outcome: &Arc<Outcome>) -> Result<run::Asked, Fault> {
    let length = request.http.headers().get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
    if length.and_then(|length| length.parse::<u64>().ok()).is_some_and(|length| length > body_bytes) {
        return Err(Fault::Client(ClientFault::BodyTooLarge));
    }
    let http = request.http.map(|body| body::bounded(body, body_bytes, Arc::clone(outcome)));
    run::asked(http, request.secure)
}

/// The fault of a guest that answered with an error code, told to the app's author.
fn error_code(code: &str, pool: &Pool) -> Fault {
    let (app, component) = (&pool.grants.app, &pool.grants.component);
    tracing::info!(target: "guest", %app, %component, code, "guest answered with an error code");
    Fault::Guest(GuestFault::ErrorCode)
}

/// Refuses what can't be sent.
fn checked(head: http::response::Parts) -> Result<http::response::Parts, Fault> {
    let bytes: usize = head.headers.iter().map(|(name, value)| name.as_str().len() + value.len()).sum();
    // An informational status is no answer (RFC 9110 15.2).
    if bytes > HEAD_BYTES_MAX || head.status.is_informational() {
        return Err(Fault::Guest(GuestFault::BadResponse));
    }
    Ok(head)
}

/// An answer's body, and what goes on until its end.
#[derive(Default)]
struct Rest {
    frames: VecDeque<http_body::Frame<bytes::Bytes>>,
    body: Option<WasiBody>,
    guest: Option<Running>,
    parting: Option<Arc<Parting>>,
    over: Option<oneshot::Sender<()>>,
}

/// What an answer needs on its way out.
struct Streaming {
    outcome: Arc<Outcome>,
    deadline: Instant,
    pool: Arc<Pool>,
}

impl Streaming {
    /// The answer of a guest that is done. Nothing was sent yet, so a failure is still a fault, not half an answer.
    fn ended(self, response: http::Response<WasiBody>, instance: Option<Instance>) -> Result<Response, Fault> {
        let (head, mut body) = response.into_parts();
        let mut frames = VecDeque::new();
        let drained = body::drain(&mut body, &mut frames, &mut Context::from_waker(Waker::noop()));
        if let Some(Err(fault)) = self.outcome.end() {
            return Err(fault.clone());
        }
        let mut rest = Rest { frames, ..Rest::default() };
        match drained {
            Drained::Broken => return Err(Fault::Guest(GuestFault::BadResponse)),
            Drained::Whole => {
                if let Some(rested) = instance.and_then(|instance| self.pool.rest(instance)) {
                    self.pool.keep(rested);
                }
            }
            Drained::Open => {
                rest.body = Some(body);
                rest.parting = instance.map(|instance| {
                    let parting = Parting::new(Arc::clone(&self.pool));
                    parting.guest_ended(instance);
                    parting
                });
            }
        }
        Ok(self.answer(head, rest))
    }

    /// The answer of a guest that still works on it, from now on in a task.
    fn streaming(&self, response: http::Response<WasiBody>, guest: Guest) -> Response {
        let (head, body) = response.into_parts();
        let parting = self.pool.reuse().map(|_| Parting::new(Arc::clone(&self.pool)));
        let guests = parting.clone();
        let guest = InTurns::going_on(self.pool.line(), &self.pool.grants.spent, self.deadline, guest);
        let task = tokio::spawn(async move {
            if let (Ok(Some(instance)), Some(parting)) = (guest.await, guests) {
                parting.guest_ended(instance);
            }
        });
        let guest = Some(Running { task, complete: false });
        self.answer(head, Rest { body: Some(body), guest, parting, ..Rest::default() })
    }

    fn answer(&self, head: http::response::Parts, rest: Rest) -> Response {
        let length = head.headers.get(CONTENT_LENGTH).and_then(|length| length.to_str().ok());
        let Rest { frames, body, guest, parting, over } = rest;
        let answer = Answer {
            frames,
            rest: body,
            outcome: Arc::clone(&self.outcome),
            guest,
            parting,
            over,
            promised: length.and_then(|length| length.parse().ok()),
            deadline: self.deadline,
            sleep: None,
        };
        http::Response::from_parts(head, answer.boxed_unsync())
    }
}
