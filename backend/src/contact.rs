//! The one connection to a backend: made, watched, lost, and made again.
//!
//! A task of its own connects, asks every few seconds whether the server still answers, and tries again with growing pauses
//! when it does not. Requests never wait for longer than their own bound: while the server is away they wait for as long as
//! one request may take from the moment it went, and after that not at all.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use selvage_config::node::{KvBackend, KvBackendKind};
use selvage_sync::KvError;
use selvage_sync::store::now_ms;
use serde::Serialize;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::{timeout, timeout_at};

use crate::error::{BackendError, Failure, StoreError, Trouble};

/// How often a connection is asked whether it lives.
const PING: Duration = Duration::from_secs(2);
/// How long that answer may take, however short other requests' bound is.
const PING_MAX: Duration = Duration::from_secs(2);
/// Answers in a row that do not come end it: a server may stand still for a moment.
const MISSED_MAX: u32 = 2;
/// Pauses between tries to connect: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(4));

/// How requests may end, as metrics name it.
pub const OUTCOMES: [&str; 11] =
    ["ok", "refused_key", "away", "silent", "lost", "overloaded", "full", "refused", "foreign", "unable", "contended"];

/// The way to one kind of server.
pub(crate) trait Wire: Send + Sync + 'static {
    /// A connection. Clones share it.
    type Connection: Clone + Send + Sync + 'static;

    /// Connects, and shows who it is. What is told then is why the connection ended. An error says why not; no secret.
    fn connect(&self) -> impl Future<Output = Result<(Self::Connection, oneshot::Receiver<String>), String>> + Send;

    /// Whether the server answers.
    fn ping(&self, connection: &Self::Connection) -> impl Future<Output = Result<(), String>> + Send;
}

/// How it stands with a backend.
#[derive(Debug, Clone, Serialize)]
pub struct BackendStatus {
    /// Its name in the node's file.
    pub name: String,
    /// `redis` or `nats`.
    pub kind: &'static str,
    /// Whether there is a connection.
    pub connected: bool,
    /// Since when that is so, milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Why there is none.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Requests under way.
    pub under_way: u64,
    /// Requests that ended, by [`OUTCOMES`].
    pub requests: BTreeMap<&'static str, u64>,
    /// What they took together, microseconds.
    pub busy_us: u64,
}

/// What one backend's requests are bounded by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Bounds {
    pub(crate) connect: Duration,
    pub(crate) request: Duration,
    pub(crate) requests_max: u32,
    pub(crate) value_bytes_max: usize,
}

impl Bounds {
    pub(crate) fn of(config: &KvBackend) -> Self {
        Self {
            connect: Duration::from_millis(config.connect_ms),
            request: Duration::from_millis(config.request_ms),
            requests_max: config.requests_max,
            value_bytes_max: config.value_bytes_max(),
        }
    }
}

/// Whether there is a connection.
enum State<C> {
    Here { connection: C, since_ms: u64 },
    Away { since: Instant, since_ms: u64, why: String },
}

/// The connection, and who keeps it.
pub(crate) struct Contact<W: Wire> {
    name: Arc<str>,
    kind: KvBackendKind,
    bounds: Bounds,
    state: watch::Receiver<State<W::Connection>>,
    room: Arc<Semaphore>,
    requests: [AtomicU64; OUTCOMES.len()],
    busy_us: AtomicU64,
    keeper: AbortHandle,
}

impl<W: Wire> Drop for Contact<W> {
    fn drop(&mut self) {
        self.keeper.abort();
    }
}

impl<W: Wire> Contact<W> {
    /// Begins to connect.
    pub(crate) fn start(name: &str, kind: KvBackendKind, bounds: Bounds, wire: W) -> Self {
        let away = State::Away { since: Instant::now(), since_ms: now_ms(), why: "connecting".into() };
        let (shown, state) = watch::channel(away);
        let name: Arc<str> = name.into();
        let keeper = tokio::spawn(keep(wire, Arc::clone(&name), bounds, shown)).abort_handle();
        let room = Arc::new(Semaphore::new(bounds.requests_max as usize));
        Self { name, kind, bounds, state, room, requests: Default::default(), busy_us: AtomicU64::new(0), keeper }
    }

    pub(crate) fn name(&self) -> &Arc<str> {
        &self.name
    }

    pub(crate) fn bounds(&self) -> Bounds {
        self.bounds
    }

    /// One request, within its bounds.
    pub(crate) async fn ask<T, F>(&self, work: impl FnOnce(W::Connection) -> F + Send) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Failure>> + Send,
    {
        self.ask_for(self.bounds.request, work).await
    }

    /// The same, where the answer may take so long.
    pub(crate) async fn ask_for<T, F>(
        &self,
        most: Duration,
        work: impl FnOnce(W::Connection) -> F + Send,
    ) -> Result<T, StoreError>
    where
        F: Future<Output = Result<T, Failure>> + Send,
    {
        let begun = Instant::now();
        let done = async {
            let _place = self.place()?;
            let connection = self.connection().await?;
            let silent = || Trouble::Silent { ms: u64::try_from(most.as_millis()).unwrap_or(u64::MAX) };
            timeout(most, work(connection)).await.map_err(|_| silent())?
        };
        let done = done.await;
        let outcome = match &done {
            Ok(_) => "ok",
            Err(Failure::Kv(_)) => "refused_key",
            Err(Failure::Trouble(trouble)) => trouble.outcome(),
        };
        if let Some(counted) = OUTCOMES.iter().position(|name| *name == outcome) {
            self.requests[counted].fetch_add(1, Ordering::Relaxed);
        }
        let took = u64::try_from(begun.elapsed().as_micros()).unwrap_or(u64::MAX);
        self.busy_us.fetch_add(took, Ordering::Relaxed);
        done.map_err(|failure| self.told(failure))
    }

    fn told(&self, failure: Failure) -> StoreError {
        match failure {
            Failure::Kv(error) => error.into(),
            Failure::Trouble(trouble) => BackendError { backend: Arc::clone(&self.name), trouble }.into(),
        }
    }

    fn place(&self) -> Result<OwnedSemaphorePermit, Trouble> {
        let full = |_| Trouble::Overloaded { max: self.bounds.requests_max };
        Arc::clone(&self.room).try_acquire_owned().map_err(full)
    }

    async fn connection(&self) -> Result<W::Connection, Trouble> {
        let mut state = self.state.clone();
        loop {
            let until = match &*state.borrow_and_update() {
                State::Here { connection, .. } => return Ok(connection.clone()),
                State::Away { since, .. } => *since + self.bounds.request,
            };
            match timeout_at(until.into(), state.changed()).await {
                Ok(Ok(())) => {}
                Ok(Err(_)) | Err(_) => return Err(Trouble::Away),
            }
        }
    }

    /// Refuses a value that is too long.
    pub(crate) fn check_value(&self, value: &[u8]) -> Result<(), StoreError> {
        let (bytes, max) = (value.len(), self.bounds.value_bytes_max);
        if bytes > max { Err(KvError::TooLarge { what: "value", bytes, max }.into()) } else { Ok(()) }
    }

    pub(crate) fn status(&self) -> BackendStatus {
        let (connected, since_ms, error) = match &*self.state.borrow() {
            State::Here { since_ms, .. } => (true, *since_ms, None),
            State::Away { since_ms, why, .. } => (false, *since_ms, Some(why.clone())),
        };
        let counts = self.requests.iter().map(|count| count.load(Ordering::Relaxed));
        BackendStatus {
            name: self.name.to_string(),
            kind: self.kind.as_str(),
            connected,
            since_ms,
            error,
            under_way: (self.bounds.requests_max as usize).saturating_sub(self.room.available_permits()) as u64,
            requests: OUTCOMES.into_iter().zip(counts).collect(),
            busy_us: self.busy_us.load(Ordering::Relaxed),
        }
    }
}

/// Keeps the connection for as long as somebody may ask for it.
async fn keep<W: Wire>(wire: W, name: Arc<str>, bounds: Bounds, shown: watch::Sender<State<W::Connection>>) {
    let mut pause = PAUSE.0;
    loop {
        let connected = timeout(bounds.connect, wire.connect()).await;
        let connected = connected.unwrap_or_else(|_| Err(format!("no connection within {:?}", bounds.connect)));
        let why = match connected {
            Ok((connection, gone)) => {
                tracing::info!(backend = %name, "connected to the kv backend");
                pause = PAUSE.0;
                shown.send_replace(State::Here { connection: connection.clone(), since_ms: now_ms() });
                let why = watch_over(&wire, &connection, gone).await;
                tracing::warn!(backend = %name, why, "the connection to the kv backend is lost: its stores are away");
                why
            }
            Err(why) => why,
        };
        let mut is_news = false;
        shown.send_modify(|state| match state {
            State::Away { why: before, .. } => {
                is_news = *before != why;
                before.clone_from(&why);
            }
            here @ State::Here { .. } => {
                *here = State::Away { since: Instant::now(), since_ms: now_ms(), why: why.clone() };
            }
        });
        if is_news {
            tracing::warn!(backend = %name, why, "the kv backend can't be connected to: its stores are away");
        }
        // By chance up to half of it shorter: nodes that lost one server do not come back as one.
        tokio::time::sleep(pause.mul_f64(rand::random_range(0.5..=1.0))).await;
        pause = pause.saturating_mul(2).min(PAUSE.1);
    }
}

/// Waits until the connection is gone, or the server does not answer any more. Says why.
async fn watch_over<W: Wire>(wire: &W, connection: &W::Connection, mut gone: oneshot::Receiver<String>) -> String {
    let mut missed = 0;
    loop {
        // Nothing is lost with either branch: the receiver is polled by reference.
        let answer = tokio::select! {
            why = &mut gone => return why.unwrap_or_else(|_| "closed".into()),
            () = tokio::time::sleep(PING) => timeout(PING_MAX, wire.ping(connection)).await,
        };
        match answer.unwrap_or_else(|_| Err(format!("no answer within {PING_MAX:?}"))) {
            Ok(()) => missed = 0,
            Err(why) => {
                missed += 1;
                if missed == MISSED_MAX {
                    return why;
                }
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_outcome_has_its_place_in_the_metrics() {
        let troubles = [
            Trouble::Away,
            Trouble::Silent { ms: 1 },
            Trouble::Lost,
            Trouble::Overloaded { max: 1 },
            Trouble::Full,
            Trouble::Refused { code: "X".into() },
            Trouble::Foreign,
            Trouble::Unable { what: "x" },
            Trouble::Contended,
        ];
        for trouble in troubles {
            assert!(OUTCOMES.contains(&trouble.outcome()), "{trouble}");
        }
    }
}
