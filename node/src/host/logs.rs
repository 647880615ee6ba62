//! What guests write to stdout and stderr: line by line into the node's log, under the target `guest`.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::task::{Context, Poll};

use bytes::Bytes;
use selvage_config::{AppName, ComponentName};
use tokio::io::AsyncWrite;
use wasmtime_wasi::cli::{IsTerminal, StdoutStream};
use wasmtime_wasi::p2::{OutputStream, Pollable, StreamResult};

use crate::metrics::LogDropped;

/// Longest line, bytes; what is longer is told in pieces.
const LINE_BYTES_MAX: usize = 8 * 1024;
/// What a guest may write in one call, bytes.
const WRITE_BYTES_MAX: usize = 64 * 1024;

/// The log of one guest, for one request at a time. Both streams share its bound.
pub(crate) struct Log {
    app: AppName,
    component: ComponentName,
    /// Bytes that may still be written.
    left: AtomicU64,
    dropped: AtomicU64,
    /// All that this app's guests lost.
    counter: LogDropped,
    /// The lines that are being written, by [`Name`].
    open: [Mutex<Vec<u8>>; 2],
}

/// Which of the two streams.
#[derive(Clone, Copy)]
pub(crate) enum Name {
    Stdout,
    Stderr,
}

impl Name {
    fn as_str(self) -> &'static str {
        match self {
            Self::Stdout => "stdout",
            Self::Stderr => "stderr",
        }
    }
}

impl Log {
    pub(crate) fn new(app: AppName, component: ComponentName, log_bytes: u64, counter: LogDropped) -> Arc<Self> {
        let (left, dropped) = (AtomicU64::new(log_bytes), AtomicU64::new(0));
        Arc::new(Self { app, component, left, dropped, counter, open: Default::default() })
    }

    /// Ends one request's log and begins the next one's: neither a line nor a byte of the bound goes over.
    pub(crate) fn renew(&self, log_bytes: u64) {
        self.end();
        self.left.store(log_bytes, Ordering::Relaxed);
    }

    /// Tells what has no line end yet, and how much was too much.
    fn end(&self) {
        for name in [Name::Stdout, Name::Stderr] {
            let mut open = self.open(name);
            self.tell(name, &open);
            open.clear();
        }
        let dropped = self.dropped.swap(0, Ordering::Relaxed);
        if dropped > 0 {
            self.counter.count(dropped);
            tracing::warn!(target: "guest", app = %self.app, component = %self.component, dropped, "log cut off");
        }
    }

    /// Bytes that were not written because there were too many.
    #[cfg(test)]
    pub(crate) fn dropped(&self) -> u64 {
        self.dropped.load(Ordering::Relaxed)
    }

    fn open(&self, name: Name) -> MutexGuard<'_, Vec<u8>> {
        self.open[name as usize].lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// How many of `wanted` bytes may be written.
    fn take(&self, wanted: usize) -> usize {
        let wanted = wanted as u64;
        let spend = |left: u64| Some(left - left.min(wanted));
        let left = self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, spend).unwrap_or(0);
        let taken = left.min(wanted);
        self.dropped.fetch_add(wanted - taken, Ordering::Relaxed);
        usize::try_from(taken).unwrap_or(usize::MAX)
    }

    fn tell(&self, name: Name, line: &[u8]) {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        if !line.is_empty() {
            let (text, stream) = (String::from_utf8_lossy(line), name.as_str());
            tracing::info!(target: "guest", app = %self.app, component = %self.component, stream, "{text}");
        }
    }
}

impl Drop for Log {
    fn drop(&mut self) {
        self.end();
    }
}

/// Stdout or stderr of a guest. All clones and handles are one stream.
#[derive(Clone)]
pub(crate) struct Stream {
    log: Arc<Log>,
    name: Name,
}

impl Stream {
    pub(crate) fn new(log: &Arc<Log>, name: Name) -> Self {
        Self { log: Arc::clone(log), name }
    }

    /// Never refuses: a guest must not fail because nobody wants to read that much of it.
    fn take(&self, bytes: &[u8]) {
        let bytes = &bytes[..self.log.take(bytes.len())];
        let mut open = self.log.open(self.name);
        for piece in bytes.split_inclusive(|byte| *byte == b'\n') {
            let (text, ended) = piece.strip_suffix(b"\n").map_or((piece, false), |text| (text, true));
            for part in text.chunks(LINE_BYTES_MAX) {
                if open.len() + part.len() > LINE_BYTES_MAX {
                    self.log.tell(self.name, &open);
                    open.clear();
                }
                open.extend_from_slice(part);
            }
            if ended {
                self.log.tell(self.name, &open);
                open.clear();
            }
        }
    }
}

impl IsTerminal for Stream {
    fn is_terminal(&self) -> bool {
        false
    }
}

impl StdoutStream for Stream {
    fn async_stream(&self) -> Box<dyn AsyncWrite + Send + Sync> {
        Box::new(self.clone())
    }

    fn p2_stream(&self) -> Box<dyn OutputStream> {
        Box::new(self.clone())
    }
}

#[wasmtime_wasi::async_trait]
impl Pollable for Stream {
    async fn ready(&mut self) {}
}

impl OutputStream for Stream {
    fn write(&mut self, bytes: Bytes) -> StreamResult<()> {
        self.take(&bytes);
        Ok(())
    }

    fn flush(&mut self) -> StreamResult<()> {
        Ok(())
    }

    fn check_write(&mut self) -> StreamResult<usize> {
        Ok(WRITE_BYTES_MAX)
    }
}

impl AsyncWrite for Stream {
    fn poll_write(self: Pin<&mut Self>, _: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let bytes = &bytes[..bytes.len().min(WRITE_BYTES_MAX)];
        self.take(bytes);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use crate::metrics::Metrics;

    fn log(log_bytes: u64) -> Arc<Log> {
        let counter = Metrics::new().log_dropped("app");
        Log::new("app".parse().unwrap(), "component".parse().unwrap(), log_bytes, counter)
    }

    fn open(stream: &Stream) -> String {
        String::from_utf8(stream.log.open(stream.name).clone()).unwrap()
    }

    #[test]
    fn a_line_is_told_when_it_ends() {
        let stream = Stream::new(&log(100), Name::Stdout);
        stream.take(b"one\ntwo");
        assert_eq!(open(&stream), "two");
        stream.take(b"\n");
        assert_eq!(open(&stream), "");
    }

    #[test]
    fn both_streams_share_one_bound_and_the_rest_is_counted() {
        let log = log(10);
        let (out, err) = (Stream::new(&log, Name::Stdout), Stream::new(&log, Name::Stderr));
        out.take(b"sixsix");
        err.take(b"sixsix");
        assert_eq!((open(&out).as_str(), open(&err).as_str()), ("sixsix", "sixs"));
        assert_eq!(log.dropped(), 2);
        out.take(b"more");
        assert_eq!(log.dropped(), 6);
    }

    #[test]
    fn nothing_of_one_request_goes_over_to_the_next() {
        let log = log(10);
        let out = Stream::new(&log, Name::Stdout);
        out.take(b"a line without its end");
        assert_eq!((open(&out).as_str(), log.dropped()), ("a line wit", 12));
        log.renew(10);
        assert_eq!((open(&out).as_str(), log.dropped()), ("", 0));
        // The handle that the guest still holds writes for the next request, with all of its bound.
        out.take(b"ten bytes!");
        assert_eq!((open(&out).as_str(), log.dropped()), ("ten bytes!", 0));
    }

    #[test]
    fn a_line_without_end_is_told_in_pieces() {
        let stream = Stream::new(&log(u64::MAX), Name::Stdout);
        for _ in 0..100 {
            stream.take(&[b'x'; 1000]);
            assert!(open(&stream).len() <= LINE_BYTES_MAX);
        }
        stream.take(&[b'y'; 3 * LINE_BYTES_MAX]);
        assert!(open(&stream).len() <= LINE_BYTES_MAX);
    }
}
