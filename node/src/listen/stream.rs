//! One byte stream under HTTP/1.1 or HTTP/2: with what was read ahead put back, a bound on how long a client may leave
//! us waiting to write, and a count that tells whether the connection is in use.

use std::io::{self, IoSlice};
use std::pin::Pin;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::task::{Context, Poll};
use std::time::{Duration, Instant};

use bytes::Bytes;
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::Sleep;

/// How long a client may take nothing of what we have to send.
const WRITE_IDLE: Duration = Duration::from_secs(60);

/// What one connection does. Clones share it.
#[derive(Debug, Clone)]
pub(super) struct Activity {
    shared: Arc<Counters>,
}

#[derive(Debug)]
struct Counters {
    since: Instant,
    read_bytes: AtomicU64,
    requests: AtomicU64,
    under_way: AtomicUsize,
    /// When the last request ended, milliseconds after `since`.
    rested_ms: AtomicU64,
}

/// A request under way on a connection.
#[derive(Debug)]
pub(super) struct Busy {
    shared: Arc<Counters>,
}

impl Activity {
    pub(super) fn new() -> Self {
        let shared = Counters {
            since: Instant::now(),
            read_bytes: AtomicU64::new(0),
            requests: AtomicU64::new(0),
            under_way: AtomicUsize::new(0),
            rested_ms: AtomicU64::new(0),
        };
        Self { shared: Arc::new(shared) }
    }

    /// A request begins. Returns also how many there were, this one counted.
    pub(super) fn begin(&self) -> (Busy, u64) {
        self.shared.under_way.fetch_add(1, Ordering::Relaxed);
        let count = self.shared.requests.fetch_add(1, Ordering::Relaxed) + 1;
        (Busy { shared: Arc::clone(&self.shared) }, count)
    }

    /// For how long no request has been under way.
    pub(super) fn idle(&self) -> Duration {
        if self.shared.under_way.load(Ordering::Relaxed) > 0 {
            return Duration::ZERO;
        }
        let rested = Duration::from_millis(self.shared.rested_ms.load(Ordering::Relaxed));
        self.shared.since.elapsed().saturating_sub(rested)
    }

    /// How old the connection is, and the bytes that came over it.
    pub(super) fn age(&self) -> (Duration, u64) {
        (self.shared.since.elapsed(), self.shared.read_bytes.load(Ordering::Relaxed))
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        let now = u64::try_from(self.shared.since.elapsed().as_millis()).unwrap_or(u64::MAX);
        self.shared.rested_ms.store(now, Ordering::Relaxed);
        self.shared.under_way.fetch_sub(1, Ordering::Relaxed);
    }
}

/// A stream with its own patience.
pub(super) struct Stream<S> {
    inner: S,
    /// Read already, to be read first.
    ahead: Bytes,
    activity: Activity,
    /// Runs only while a write waits for the client.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<S> Stream<S> {
    pub(super) fn new(inner: S, ahead: Bytes, activity: Activity) -> Self {
        Self { inner, ahead, activity, patience: None }
    }

    fn patient<T>(&mut self, cx: &mut Context<'_>, written: Poll<io::Result<T>>) -> Poll<io::Result<T>> {
        if written.is_ready() {
            self.patience = None;
            return written;
        }
        let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(WRITE_IDLE)));
        patience.as_mut().poll(cx).map(|()| Err(io::Error::new(io::ErrorKind::TimedOut, "client takes nothing")))
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Stream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        let read = if self.ahead.is_empty() {
            Pin::new(&mut self.inner).poll_read(cx, buffer)
        } else {
            let length = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead.split_to(length));
            Poll::Ready(Ok(()))
        };
        let count = buffer.filled().len() - before;
        self.activity.shared.read_bytes.fetch_add(count as u64, Ordering::Relaxed);
        read
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(mut self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write(cx, bytes);
        self.patient(cx, written)
    }

    fn poll_write_vectored(
        mut self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let written = Pin::new(&mut self.inner).poll_write_vectored(cx, slices);
        self.patient(cx, written)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        self.patient(cx, flushed)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let closed = Pin::new(&mut self.inner).poll_shutdown(cx);
        self.patient(cx, closed)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    #[tokio::test]
    async fn what_was_read_ahead_comes_first() {
        let (near, mut far) = tokio::io::duplex(64);
        tokio::io::AsyncWriteExt::write_all(&mut far, b" world").await.unwrap();
        drop(far);
        let activity = Activity::new();
        let mut text = String::new();
        Stream::new(near, Bytes::from_static(b"hello"), activity.clone()).read_to_string(&mut text).await.unwrap();
        assert_eq!(text, "hello world");
        assert_eq!(activity.age().1, 11);
    }

    #[test]
    fn a_connection_with_a_request_is_not_idle() {
        let activity = Activity::new();
        let (one, first) = activity.begin();
        let (two, second) = activity.begin();
        assert_eq!((first, second), (1, 2));
        drop(one);
        assert_eq!(activity.idle(), Duration::ZERO);
        drop(two);
        assert!(activity.idle() < Duration::from_secs(60));
    }
}
