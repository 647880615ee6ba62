//! The tasks of one HTTP/2 connection: one per request. They end with it.
//!
//! A client may keep the connection going and yet open no window for one stream. So each task is watched by itself: when
//! it waits neither for its guest nor for a body, it waits for its client, and not without end.

use std::future::{Future, poll_fn};
use std::pin::{Pin, pin};
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::task::JoinSet;

use super::drive::Drain;
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
    running: Arc<AtomicUsize>,
    idle: Duration,
    bytes_per_second_min: u32,
}

impl Tasks {
    /// Tasks with so much patience with the client.
    pub(super) fn new(idle: Duration, bytes_per_second_min: u32) -> Self {
        Self { set: Arc::default(), running: Arc::default(), idle, bytes_per_second_min }
    }
}

impl Tasks {
    /// Whether one has not ended.
    fn is_any(&self) -> bool {
        self.running.load(Ordering::Relaxed) > 0
    }
}

/// One that has not ended.
struct Running(Arc<AtomicUsize>);

impl Running {
    fn begin(running: &Arc<AtomicUsize>) -> Self {
        running.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(running))
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
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
        set.spawn(watched(Box::pin(task), patience, Running::begin(&self.running)));
    }
}

/// A connection that lets its requests which are ready to go on do so before it goes on itself: what they have to say then
/// goes out together. It steps back once behind all that its thread has to do, and only if it has requests.
pub(super) struct Together<C> {
    connection: Pin<Box<C>>,
    tasks: Tasks,
    has_waited: bool,
}

impl<C> Together<C> {
    pub(super) fn new(connection: Pin<Box<C>>, tasks: Tasks) -> Self {
        Self { connection, tasks, has_waited: false }
    }
}

impl<C: Future> Future for Together<C> {
    type Output = C::Output;

    fn poll(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<C::Output> {
        let this = self.get_mut();
        this.has_waited = !this.has_waited && this.tasks.is_any();
        if this.has_waited {
            // Whoever wakes itself comes last.
            cx.waker().wake_by_ref();
            return Poll::Pending;
        }
        this.connection.as_mut().poll(cx)
    }
}

impl<C: Drain> Drain for Together<C> {
    fn drain(self: Pin<&mut Self>) {
        self.get_mut().connection.as_mut().drain();
    }
}

/// The task, or its end: dropped, the parser resets its stream.
async fn watched(task: Pin<Box<impl Future<Output = ()>>>, mut patience: Patience, _running: Running) {
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
    async fn requests_that_are_ready_go_before_their_connection() {
        let (tasks, said) = (Tasks::new(Duration::from_secs(60), 1_024), Arc::new(Mutex::new(Vec::new())));
        let say = |what: u32| {
            let said = Arc::clone(&said);
            move || said.lock().unwrap().push(what)
        };
        let connection = say(0);
        let connection = Box::pin(poll_fn(move |_| {
            connection();
            Poll::Ready(())
        }));
        for number in 1..=3 {
            let request = say(number);
            tasks.execute(async move { request() });
        }
        let together = Together::new(connection, tasks.clone());
        tokio::spawn(together).await.unwrap();
        assert_eq!(*said.lock().unwrap(), [1, 2, 3, 0]);
        assert!(!tasks.is_any());
        // One that waits for something holds nobody up.
        tasks.execute(std::future::pending());
        let connection = say(4);
        let connection = Box::pin(poll_fn(move |_| {
            connection();
            Poll::Ready(())
        }));
        tokio::spawn(Together::new(connection, tasks.clone())).await.unwrap();
        assert_eq!(said.lock().unwrap().last(), Some(&4));
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
