//! The tasks of one HTTP/2 connection: one per request. They end with it.
//!
//! A client may keep the connection going and yet open no window for one stream. So each task is watched by itself: when
//! it waits neither for its guest nor for a body, it waits for its client, and not without end.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::Poll;
use std::time::Duration;

use tokio::task::JoinSet;

use super::patience::Patience;

tokio::task_local! {
    static PROGRESS: Arc<Progress>;
}

/// How far the answer of one task is.
#[derive(Debug, Default)]
pub(super) struct Progress {
    /// The client has yet to take what there is.
    is_offered: AtomicBool,
    bytes: AtomicUsize,
}

impl Progress {
    /// That of the task that runs now. None outside of [`Tasks`].
    pub(super) fn of_task() -> Option<Arc<Self>> {
        PROGRESS.try_with(Arc::clone).ok()
    }

    /// So many bytes are there for the client, which may be none: a head.
    pub(super) fn offer(&self, bytes: usize) {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.is_offered.store(true, Ordering::Relaxed);
    }

    /// The client has taken all that there was; more is to come.
    pub(super) fn is_taken(&self) {
        self.is_offered.store(false, Ordering::Relaxed);
    }
}

/// The tasks. Clones share them.
#[derive(Debug, Clone)]
pub(super) struct Tasks {
    set: Arc<Mutex<JoinSet<()>>>,
    idle: Duration,
    bytes_per_second_min: u32,
}

impl Tasks {
    /// Tasks with so much patience with the client.
    pub(super) fn new(idle: Duration, bytes_per_second_min: u32) -> Self {
        Self { set: Arc::default(), idle, bytes_per_second_min }
    }
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        let patience = Patience::new(self.idle, self.bytes_per_second_min);
        // Nothing panics while it holds the lock.
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        while set.try_join_next().is_some() {}
        // In a box of its own, so that what is made, moved and read of the task itself is small.
        set.spawn(watched(Box::pin(task), patience));
    }
}

/// The task, or its end: dropped, the parser resets its stream.
async fn watched(task: Pin<Box<impl Future<Output = ()>>>, mut patience: Patience) {
    let progress = Arc::new(Progress::default());
    let mut task = pin!(PROGRESS.scope(Arc::clone(&progress), task));
    let mut seen = 0;
    poll_fn(|cx| {
        if task.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let bytes = progress.bytes.load(Ordering::Relaxed);
        if bytes != seen || !progress.is_offered.load(Ordering::Relaxed) {
            patience.moved(bytes.wrapping_sub(seen));
            seen = bytes;
        }
        if progress.is_offered.load(Ordering::Relaxed) {
            return patience.poll_wait(cx).map(|error| tracing::debug!(%error, "answer given up"));
        }
        Poll::Pending
    })
    .await;
}

#[cfg(test)]
mod tests {
    use hyper::rt::Executor;
    use tokio::sync::oneshot;
    use tokio::time::sleep;

    use super::*;

    const IDLE: Duration = Duration::from_millis(5);

    /// Whether a task that does this, and then waits for much longer than its client has, is done at its end.
    async fn is_done(first: impl Fn(&Progress) + Send + 'static) -> bool {
        let (done, end) = oneshot::channel();
        let tasks = Tasks::new(IDLE, 1_024_000);
        tasks.execute(async move {
            first(&Progress::of_task().unwrap());
            sleep(IDLE * 20).await;
            let _ = done.send(());
        });
        end.await.is_ok()
    }

    #[tokio::test]
    async fn who_waits_for_its_client_is_ended_and_who_waits_for_its_guest_is_not() {
        assert!(!is_done(|progress| progress.offer(5)).await);
        assert!(!is_done(|progress| progress.offer(0)).await);
        assert!(is_done(|_| ()).await);
        let taken = |progress: &Progress| {
            progress.offer(5);
            progress.is_taken();
        };
        assert!(is_done(taken).await);
        assert!(Progress::of_task().is_none());
    }

    #[tokio::test]
    async fn tasks_end_with_their_connection() {
        let (alive, gone) = oneshot::channel::<()>();
        let tasks = Tasks::new(Duration::from_secs(60), 1_024);
        tasks.execute(async move {
            let _alive = alive;
            std::future::pending::<()>().await;
        });
        drop(tasks);
        assert!(gone.await.is_err());
    }
}
