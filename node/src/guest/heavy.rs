//! Guests that compute for long: they go on behind everything else.
//!
//! A request's guest is polled where its connection is, because most are done within a fraction of a tick. One that
//! turns out to compute moves to threads of the kernel's idle class (sched(7), SCHED_IDLE): they have what the others
//! leave, and step back at once when a request comes. So any number of them make no neighbour wait.

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};

use thread_priority::{NormalThreadSchedulePolicy, ThreadPriority, ThreadSchedulePolicy};
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

    fn take(&self, guest: Metered) -> Option<Moved> {
        let time = guest.time();
        let work = There { guest, home: Handle::current() };
        self.threads.0.as_ref().map(|runtime| Moved { task: runtime.spawn(work), time })
    }
}

/// Puts this thread behind all others. Where the system refuses, it is a thread like any other.
fn step_back() {
    let idle = ThreadSchedulePolicy::Normal(NormalThreadSchedulePolicy::Idle);
    let id = thread_priority::thread_native_id();
    if let Err(error) = thread_priority::set_thread_priority_and_policy(id, ThreadPriority::Min, idle) {
        tracing::warn!(?error, "guests that compute for long can't be put behind the others");
    }
}

/// A guest's work, wherever it goes on.
pub(super) enum Guest {
    /// In the task that asks.
    Here(Metered, Heavy),
    /// On a thread for those that compute.
    There(Moved),
}

impl Guest {
    pub(super) fn new(guest: Metered, heavy: &Heavy) -> Self {
        Self::Here(guest, heavy.clone())
    }

    /// Whether what it sends comes from another thread.
    pub(super) fn has_moved(&self) -> bool {
        matches!(self, Self::There(_))
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
            let Some(moved) = heavy.take(guest.take()) else { return Poll::Ready(None) };
            *self = Self::There(moved);
        }
        match &mut *self {
            Self::There(moved) => moved.poll(cx),
            Self::Here(..) => Poll::Pending,
        }
    }
}

/// A guest on another thread. It ends there when this is dropped.
pub(super) struct Moved {
    task: JoinHandle<Option<Instance>>,
    time: Time,
}

impl Moved {
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Option<Instance>> {
        if let Poll::Ready(ended) = Pin::new(&mut self.task).poll(cx) {
            // It fails only if the guest's code in the host panicked, which was told already.
            return Poll::Ready(ended.unwrap_or_default());
        }
        Pin::new(&mut self.time).poll(cx).map(|()| None)
    }
}

impl Drop for Moved {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A guest's work as a task of those threads. Its sockets, timers and tasks stay with the runtime that it came from.
struct There {
    guest: Metered,
    home: Handle,
}

impl Future for There {
    type Output = Option<Instance>;

    fn poll(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Instance>> {
        let me = &mut *self;
        let _home = me.home.enter();
        Pin::new(&mut me.guest).poll(cx)
    }
}
