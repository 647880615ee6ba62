//! Guests that compute for long: they go on behind everything else.
//!
//! A request's guest is polled where its connection is, because most are done within a fraction of a tick. One that
//! turns out to compute moves to threads of the kernel's idle class (sched(7), SCHED_IDLE): they have what the others
//! leave, and step back at once when a request comes. So any number of them make no neighbour wait but for what each uses
//! before it moves; and where one after another of a component computes, the next ones begin there.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use tokio::runtime::{Builder, Handle, Runtime};
use tokio::task::JoinHandle;

use super::instance::Instance;
use super::meter::{Metered, Time};

/// The threads for guests that compute, one for each core. Clones share them.
#[derive(Debug, Clone)]
pub(crate) struct Heavy {
    threads: Arc<Threads>,
}

/// Ends without waiting, so that it may be dropped anywhere.
#[derive(Debug)]
struct Threads(Option<Runtime>);

impl Drop for Threads {
    fn drop(&mut self) {
        if let Some(runtime) = self.0.take() {
            runtime.shutdown_background();
        }
    }
}

impl Heavy {
    /// Starts the threads.
    ///
    /// # Errors
    /// The system has no more of them.
    pub(crate) fn start() -> io::Result<Self> {
        let runtime = Builder::new_multi_thread().thread_name("selvage-heavy").on_thread_start(step_back).build()?;
        Ok(Self { threads: Arc::new(Threads(Some(runtime))) })
    }

    /// Work of the node itself that can wait, on the same threads.
    pub(crate) fn spawn<T: Send + 'static>(&self, work: impl Future<Output = T> + Send + 'static) -> Option<Moved<T>> {
        let work = There { work: Box::pin(work), home: Handle::current() };
        self.threads.0.as_ref().map(|runtime| Moved(runtime.spawn(work)))
    }
}

/// Puts this thread behind all others. Where the system refuses, it is a thread like any other.
#[cfg(target_os = "linux")]
fn step_back() {
    use thread_priority::{NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy};

    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let id = thread_priority::thread_native_id();
    if let Err(error) = thread_priority::set_thread_priority_and_policy(id, ThreadPriority::Min, idle) {
        tracing::warn!(?error, "guests that compute for long can't be put behind the others");
    }
}

/// Other systems have no such class: there it is a thread like any other.
#[cfg(not(target_os = "linux"))]
fn step_back() {}

/// A guest's work, wherever it goes on.
pub(super) enum Guest {
    /// In the task that asks.
    Here(Metered, Heavy),
    /// On a thread for those that compute.
    There(Moved<Option<Instance>>, Time),
}

impl Guest {
    /// One that begins in the task that asks.
    pub(super) fn new(guest: Metered, heavy: &Heavy) -> Self {
        Self::Here(guest, heavy.clone())
    }

    /// One that begins behind everything else.
    pub(super) fn behind(mut guest: Metered, heavy: &Heavy) -> Self {
        let time = guest.time();
        match heavy.spawn(guest.take()) {
            Some(moved) => Self::There(moved, time),
            None => Self::Here(guest, heavy.clone()),
        }
    }

    /// Whether what it sends comes from another thread.
    pub(super) fn has_moved(&self) -> bool {
        matches!(self, Self::There(..))
    }
}

impl Future for Guest {
    type Output = Option<Instance>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Instance>> {
        if let Self::Here(guest, heavy) = &mut *self {
            let polled = Pin::new(&mut *guest).poll(cx);
            if polled.is_ready() || !guest.is_heavy() {
                return polled;
            }
            let time = guest.time();
            let Some(moved) = heavy.spawn(guest.take()) else { return Poll::Ready(None) };
            *self = Self::There(moved, time);
        }
        let Self::There(moved, time) = &mut *self else { return Poll::Pending };
        if let Poll::Ready(ended) = Pin::new(moved).poll(cx) {
            return Poll::Ready(ended.flatten());
        }
        Pin::new(time).poll(cx).map(|()| None)
    }
}

/// Work on another thread. It ends there when this is dropped.
pub(crate) struct Moved<T>(JoinHandle<T>);

impl<T> Future for Moved<T> {
    /// `None` if it panicked, which was told already, or was cut off.
    type Output = Option<T>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<T>> {
        Pin::new(&mut self.0).poll(cx).map(Result::ok)
    }
}

impl<T> Drop for Moved<T> {
    fn drop(&mut self) {
        self.0.abort();
    }
}

/// Work as a task of those threads. Its sockets, timers and tasks stay with the runtime that it came from.
struct There<T> {
    work: Pin<Box<dyn Future<Output = T> + Send>>,
    home: Handle,
}

impl<T> Future for There<T> {
    type Output = T;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<T> {
        let me = &mut *self;
        let _home = me.home.enter();
        me.work.as_mut().poll(cx)
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeMap;
    use std::sync::mpsc;
    use std::time::{Duration, Instant};

    use bytes::Bytes;
    use selvage_config::Digest;
    use selvage_config::app::App;

    use super::*;
    use crate::engine::{EngineOptions, Engines};
    use crate::fault::{Fault, GuestFault};
    use crate::host::tests::grants;
    use crate::pool::Pool;
    use crate::release::compile::{CompileCache, compile};
    use crate::release::fetch::Fetched;
    use crate::release::verify::{Policy, verify};
    use crate::request::{Protocol, Request, empty};

    /// Long enough for a guest to use the few milliseconds after which it moves.
    const LONG: Duration = Duration::from_secs(2);
    /// Longer than anything here.
    const PATIENCE: Duration = Duration::from_secs(60);

    async fn burner(engines: &Engines, cpu_ms: u64) -> (Arc<Pool>, tempfile::TempDir) {
        let (mut grants, dir) = grants(&[]).await;
        grants.limits.concurrent_requests = 1;
        grants.limits.cpu_ms = cpu_ms;
        grants.limits.wall_ms = 60_000;
        let text = std::fs::read(concat!(env!("CARGO_MANIFEST_DIR"), "/tests/guests/burn.wat")).unwrap();
        let bytes = Bytes::from(wat::parse_bytes(&text).unwrap().into_owned());
        let (digest, name) = (Digest::of(&bytes), "guest".parse().unwrap());
        let app = App::of_component("test".parse().unwrap(), "guest".parse().unwrap(), digest);
        let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, bytes)]));
        let verified = verify(fetched, &Policy::LocalFiles.into()).unwrap();
        let cache = CompileCache::open(&dir.path().join("compiled")).unwrap();
        let compiled = compile(engines, &cache, &verified.component(&name).unwrap()).unwrap();
        (Pool::new(engines, &compiled, grants).unwrap(), dir)
    }

    fn request() -> Request {
        let http = http::Request::builder().uri("/").header("host", "a").body(empty()).unwrap();
        let client = ([192, 0, 2, 1], 4711).into();
        Request { http, client, protocol: Protocol::H1, secure: false, arrived: Instant::now() }
    }

    /// Nobody gets to anything on those threads until the first is dropped, as on a machine that is full of requests.
    fn fill(engines: &Engines) -> (mpsc::Sender<()>, Vec<Moved<bool>>) {
        let (release, held) = mpsc::channel::<()>();
        let held = Arc::new(std::sync::Mutex::new(held));
        let threads = std::thread::available_parallelism().unwrap().get();
        let full = (0..threads).map(|_| {
            let held = Arc::clone(&held);
            engines.heavy().spawn(async move { held.lock().unwrap().recv().is_ok() }).unwrap()
        });
        (release, full.collect())
    }

    #[tokio::test]
    async fn where_one_after_another_computes_the_next_begins_behind_everything_else() {
        let engines = Engines::new(&EngineOptions::of_instances(2)).unwrap();
        let (pool, _dir) = burner(&engines, 20).await;
        for _ in 0..4 {
            let lease = pool.lease(Instant::now() + PATIENCE).await.unwrap();
            assert_eq!(lease.call(request()).await.unwrap_err(), Fault::Guest(GuestFault::ExceededCpu));
        }
        let (release, full) = fill(&engines);
        let next = pool.lease(Instant::now() + PATIENCE).await.unwrap();
        let mut next = std::pin::pin!(next.call(request()));
        assert!(tokio::time::timeout(LONG, &mut next).await.is_err(), "in front it would have ended long ago");
        drop(release);
        assert_eq!(next.await.unwrap_err(), Fault::Guest(GuestFault::ExceededCpu));
        for thread in full {
            thread.await;
        }
    }

    #[tokio::test]
    async fn a_guest_that_was_given_up_counts_until_it_has_gone() {
        let engines = Engines::new(&EngineOptions::of_instances(2)).unwrap();
        let (pool, _dir) = burner(&engines, 60_000).await;
        let (release, full) = fill(&engines);
        let lease = pool.lease(Instant::now() + LONG).await.unwrap();
        assert!(tokio::time::timeout(LONG, lease.call(request())).await.is_err(), "it burns on");
        // The client has left. Its instance is still there, and so nobody else's may be.
        assert!(pool.lease(Instant::now() + LONG / 10).await.is_err());

        drop(release);
        for thread in full {
            thread.await;
        }
        assert!(pool.lease(Instant::now() + PATIENCE).await.is_ok());
    }
}
