//! Those who ask: the healthy apps on connections that stay, the hostile ones on a connection for each request.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, timeout};

use crate::apps;
use crate::soaked::fleet::Fleet;

/// Longest time for a healthy answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// Longest time for what a hostile guest answers: its limits are far shorter.
const HOSTILE_MAX: Duration = Duration::from_secs(20);
/// Requests for hostile guests under way. More are left out.
const HOSTILE_AT_ONCE: usize = 32;
/// Failures that are told in words.
const REASONS_MAX: usize = 10;

/// What has happened so far.
#[derive(Default)]
pub(crate) struct Count {
    pub(crate) deploys: AtomicU64,
    answered: AtomicU64,
    failures: AtomicU64,
    reasons: Mutex<Vec<String>>,
    next: AtomicUsize,
    /// By guest and what came of its request.
    hostile: Mutex<BTreeMap<(&'static str, String), u64>>,
}

impl Count {
    /// Something failed that must not.
    pub(crate) fn failed(&self, reason: String) {
        self.failures.fetch_add(1, Ordering::Relaxed);
        let mut reasons = self.reasons.lock().unwrap_or_else(PoisonError::into_inner);
        if reasons.len() < REASONS_MAX {
            reasons.push(reason);
        }
    }

    pub(crate) fn failures(&self) -> u64 {
        self.failures.load(Ordering::Relaxed)
    }

    /// The first few, in words.
    pub(crate) fn reasons(&self) -> Vec<String> {
        self.reasons.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Healthy answers, requests for hostile guests, deploys.
    pub(crate) fn so_far(&self) -> (u64, u64, u64) {
        let hostile = self.hostile.lock().unwrap_or_else(PoisonError::into_inner).values().sum();
        (self.answered.load(Ordering::Relaxed), hostile, self.deploys.load(Ordering::Relaxed))
    }

    /// What came of the requests for each hostile guest, a line each.
    pub(crate) fn hostile(&self) -> Vec<String> {
        let mut guests: BTreeMap<&str, Vec<String>> = BTreeMap::new();
        for ((guest, outcome), count) in self.hostile.lock().unwrap_or_else(PoisonError::into_inner).iter() {
            guests.entry(guest).or_default().push(format!("{outcome} {count}"));
        }
        guests.iter().map(|(guest, outcomes)| format!("  {guest:<20} {}", outcomes.join(", "))).collect()
    }

    fn next(&self) -> usize {
        self.next.fetch_add(1, Ordering::Relaxed)
    }
}

/// One connection that asks the healthy apps in turn, until the task is aborted.
pub(crate) async fn healthy(address: SocketAddr, fleet: Arc<Fleet>, count: Arc<Count>, every: Duration) {
    let mut connection = None;
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    loop {
        ticks.tick().await;
        let app = count.next() % fleet.healthy();
        match timeout(ANSWER_MAX, check(address, &fleet, &mut connection, app)).await {
            Ok(Ok(())) => drop(count.answered.fetch_add(1, Ordering::Relaxed)),
            Ok(Err(error)) => {
                connection = None;
                count.failed(format!("app {app}: {error:#}"));
            }
            Err(_) => {
                connection = None;
                count.failed(format!("app {app}: no answer in {ANSWER_MAX:?}"));
            }
        }
    }
}

async fn check(
    address: SocketAddr,
    fleet: &Fleet,
    connection: &mut Option<SendRequest<Empty<Bytes>>>,
    app: usize,
) -> anyhow::Result<()> {
    let sender = match connection {
        Some(sender) => sender,
        None => connection.insert(connect(address).await?),
    };
    // A connection that ends without having said so is a failure: a client would have to guess what became of its
    // request.
    sender.ready().await.context("the connection ended unannounced")?;
    let settled = fleet.settled(app);
    let response = sender.send_request(get(app)?).await.context("no answer")?;
    let (head, body) = response.into_parts();
    let body = body.collect().await.context("the answer broke off")?.to_bytes();
    if head.headers.get("connection").is_some_and(|value| value == "close") {
        *connection = None;
    }
    let outcome = head.headers.get("selvage-outcome");
    ensure!(head.status == 200, "status {}, outcome {outcome:?}", head.status);
    ensure!(fleet.may_answer(app, settled, &body), "{body:?} is no text of its release");
    Ok(())
}

/// Asks the hostile apps in turn, each on a connection of its own, until the task is aborted.
pub(crate) async fn hostile(address: SocketAddr, fleet: Arc<Fleet>, count: Arc<Count>, every: Duration) {
    let mut under_way = JoinSet::new();
    let mut ticks = interval(every);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    for place in (0..fleet.hostile()).cycle() {
        ticks.tick().await;
        while under_way.try_join_next().is_some() {}
        if under_way.len() >= HOSTILE_AT_ONCE {
            continue;
        }
        let (guest, app, count) = (fleet.hostile_guest(place), fleet.healthy() + place, Arc::clone(&count));
        under_way.spawn(async move {
            let outcome = timeout(HOSTILE_MAX, provoke(address, app)).await;
            let outcome = match outcome {
                Ok(Ok(outcome)) => outcome,
                Ok(Err(error)) => format!("{error:#}"),
                Err(_) => format!("nothing in {HOSTILE_MAX:?}"),
            };
            *count.hostile.lock().unwrap_or_else(PoisonError::into_inner).entry((guest, outcome)).or_default() += 1;
        });
    }
}

/// What came of a request: the node's word for it, or how its answer ended.
async fn provoke(address: SocketAddr, app: usize) -> anyhow::Result<String> {
    let mut sender = connect(address).await?;
    let response = sender.send_request(get(app)?).await.context("no answer")?;
    let (head, mut body) = response.into_parts();
    if let Some(outcome) = head.headers.get("selvage-outcome") {
        return Ok(outcome.to_str().unwrap_or("not text").to_owned());
    }
    while let Some(frame) = body.frame().await {
        if frame.is_err() {
            return Ok(format!("{}, broken off", head.status.as_u16()));
        }
    }
    Ok(format!("{}, whole", head.status.as_u16()))
}

async fn connect(address: SocketAddr) -> anyhow::Result<SendRequest<Empty<Bytes>>> {
    let stream = TcpStream::connect(address).await.context("connect")?;
    stream.set_nodelay(true)?;
    let (sender, connection) = handshake(TokioIo::new(stream)).await?;
    // Ends with its sender.
    tokio::spawn(connection);
    Ok(sender)
}

fn get(app: usize) -> Result<http::Request<Empty<Bytes>>, http::Error> {
    http::Request::get("/").header("host", apps::host(app)).body(Empty::new())
}
