//! One byte stream under HTTP/1.1 or HTTP/2. What a client sends is judged here before a parser sees it ([`Messages`],
//! [`Glitches`]), and a client that takes nothing of what we have to send is not waited for without end.

use std::future::Future;
use std::io::{self, IoSlice};
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes, BytesMut};
use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};
use tokio::time::{Sleep, sleep};

use super::activity::Activity;
use super::gathered::Gathered;
use super::h1::{Messages, Passed};
use super::h2::Glitches;
use super::patience::Patience;
use crate::fault::ClientFault;

/// What the parser reads in place of a head that is refused: so the refusal is an answer in its turn like any other.
const REFUSED: &[u8] = b"GET / HTTP/1.1\r\nhost: refused\r\nconnection: close\r\n\r\n";
/// Bytes that are read at once when some are held already.
const READ_BYTES: usize = 4 * 1024;
/// After our last byte, what a client may still send, and for how long, before the socket is closed. The system tells a
/// client that is still sending of a reset, which makes it drop the answer (RFC 9112 9.6).
const LINGER_BYTES_MAX: usize = 256 * 1024;
const LINGER: Duration = Duration::from_secs(1);

/// Who judges what comes.
#[derive(Debug)]
pub(super) enum Judge {
    /// HTTP/1.1.
    Messages(Messages),
    /// HTTP/2.
    Glitches(Glitches, u32),
}

/// A stream with its own judgement and patience.
pub(super) struct Stream<S> {
    inner: S,
    /// Read already, not judged.
    ahead: Bytes,
    /// Judged, incomplete: the beginning of a head.
    held: BytesMut,
    /// Judged, to be read first.
    ready: BytesMut,
    judge: Judge,
    /// Nothing more goes on.
    end: Option<End>,
    activity: Activity,
    /// For writing.
    patience: Patience,
    /// Has the system forget what a client that is given up did not take, in place of waiting for it on our behalf.
    shed: fn(&S),
    linger: Linger,
    out: Out,
    /// HTTP/2: what goes out together.
    gathered: Gathered,
}

/// What was last done about what we have to send.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Out {
    /// The system has all of it.
    Flushed,
    /// It was written, or tried to be.
    Written,
    /// It was the last.
    Ended,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    /// A refused head is being answered.
    Refused,
    /// A body broke its framing.
    Broken,
}

/// What is read over after our last byte.
#[derive(Debug, Default)]
struct Linger {
    is_shut: bool,
    bytes: usize,
    end: Option<Pin<Box<Sleep>>>,
}

impl<S> Stream<S> {
    pub(super) fn new(
        (inner, shed): (S, fn(&S)),
        ahead: Bytes,
        judge: Judge,
        activity: Activity,
        patience: Patience,
    ) -> Self {
        let (held, ready, linger) = (BytesMut::new(), BytesMut::new(), Linger::default());
        let (end, out, gathered) = (None, Out::Flushed, Gathered::default());
        Self { inner, ahead, held, ready, judge, end, activity, patience, shed, linger, out, gathered }
    }

    /// Gives back what was judged and not used: it is to be read first.
    pub(super) fn unread(&mut self, unused: &[u8]) {
        if !unused.is_empty() {
            let later = std::mem::replace(&mut self.ready, unused.into());
            self.ready.extend_from_slice(&later);
        }
    }

    fn note_write(&mut self) {
        if self.out == Out::Flushed {
            self.out = Out::Written;
            self.activity.rest(false);
        }
    }

    /// Notes whether a parser of messages would lose nothing if it went now.
    fn note_rest(&self) {
        let Judge::Messages(messages) = &self.judge else { return };
        let empty = self.ahead.is_empty() && self.held.is_empty() && self.ready.is_empty() && self.end.is_none();
        self.activity.rest(empty && messages.is_between() && self.out == Out::Flushed);
    }

    fn patient<T>(
        &mut self,
        cx: &mut Context<'_>,
        written: Poll<io::Result<T>>,
        bytes: impl Fn(&T) -> usize,
    ) -> Poll<io::Result<T>> {
        match written {
            Poll::Ready(done) => {
                self.patience.moved(done.as_ref().map_or(0, bytes));
                Poll::Ready(done)
            }
            Poll::Pending => self.patience.poll_wait(cx).map(|slow| {
                (self.shed)(&self.inner);
                Err(slow)
            }),
        }
    }

    /// Notes what we sent.
    fn sent(&mut self, slices: &[IoSlice<'_>], written: &Poll<io::Result<usize>>) {
        let (Judge::Glitches(glitches, max), Poll::Ready(Ok(written))) = (&mut self.judge, written) else { return };
        let mut left = *written;
        for slice in slices {
            let count = left.min(slice.len());
            for _ in 0..glitches.sent(&slice[..count]) {
                self.activity.glitch(*max);
            }
            left -= count;
        }
    }
}

impl<S: AsyncRead + Unpin> Stream<S> {
    /// Waits until there is something to read, or nothing more: an end or a failure, which whoever reads then meets.
    pub(super) fn poll_woken(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        if !self.ahead.is_empty() || !self.ready.is_empty() {
            return Poll::Ready(());
        }
        let mut space = [0; READ_BYTES];
        let mut space = ReadBuf::new(&mut space);
        let _read = ready!(Pin::new(&mut self.inner).poll_read(cx, &mut space));
        self.ahead = Bytes::copy_from_slice(space.filled());
        Poll::Ready(())
    }

    /// Reads what nobody has judged.
    fn poll_raw(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let before = buffer.filled().len();
        if self.ahead.is_empty() {
            ready!(Pin::new(&mut self.inner).poll_read(cx, buffer))?;
        } else {
            let length = self.ahead.len().min(buffer.remaining());
            buffer.put_slice(&self.ahead.split_to(length));
        }
        self.activity.read(buffer.filled().len() - before);
        Poll::Ready(Ok(()))
    }

    /// Reads frames, which are counted and go on.
    fn poll_frames(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        if self.activity.is_choked() {
            // The connection's owner knows, and ends it.
            return Poll::Pending;
        }
        let before = buffer.filled().len();
        ready!(self.poll_raw(cx, buffer))?;
        if let Judge::Glitches(glitches, max) = &mut self.judge {
            for _ in 0..glitches.received(&buffer.filled()[before..]) {
                self.activity.glitch(*max);
            }
        }
        Poll::Ready(Ok(()))
    }

    /// Reads messages: what is by the rules goes on, a head when it is whole.
    fn poll_messages(&mut self, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            if !self.ready.is_empty() {
                let length = self.ready.len().min(buffer.remaining());
                buffer.put_slice(&self.ready[..length]);
                self.ready.advance(length);
                return Poll::Ready(Ok(()));
            }
            match self.end {
                // Told that the client is gone the parser would drop the answer.
                Some(End::Refused) => return Poll::Pending,
                Some(End::Broken) => return Poll::Ready(Err(broken())),
                None => {}
            }
            let before = buffer.filled().len();
            if self.held.is_empty() {
                ready!(self.poll_raw(cx, buffer))?;
                let Judge::Messages(messages) = &mut self.judge else { return Poll::Ready(Ok(())) };
                let new = &buffer.filled()[before..];
                let (count, passed) = judged(messages, new);
                self.held.extend_from_slice(if passed == Verdict::Fine { &new[count..] } else { &[] });
                buffer.set_filled(before + count);
                let is_end = passed == Verdict::Fine && count == 0 && self.held.is_empty();
                self.note(passed);
                if is_end || count > 0 {
                    return Poll::Ready(Ok(()));
                }
            } else {
                let mut space = [0; READ_BYTES];
                let mut space = ReadBuf::new(&mut space);
                ready!(self.poll_raw(cx, &mut space))?;
                if space.filled().is_empty() {
                    // The end, in the middle of a head.
                    return Poll::Ready(Ok(()));
                }
                self.held.extend_from_slice(space.filled());
                let Judge::Messages(messages) = &mut self.judge else { return Poll::Ready(Ok(())) };
                let (count, passed) = judged(messages, &self.held);
                self.ready = self.held.split_to(count);
                self.note(passed);
            }
        }
    }

    /// Tells the connection what was found.
    fn note(&mut self, verdict: Verdict) {
        let Judge::Messages(messages) = &self.judge else { return };
        match verdict {
            Verdict::Fine => self.activity.head(!self.held.is_empty()),
            Verdict::Refused(fault) => {
                self.activity.head(false);
                self.activity.broke(messages.heads() + 1, fault);
                self.held.clear();
                self.ready.extend_from_slice(REFUSED);
                self.end = Some(End::Refused);
            }
            Verdict::Broken => {
                self.activity.broke(messages.heads(), ClientFault::Malformed);
                self.held.clear();
                self.end = Some(End::Broken);
            }
        }
    }

    /// Reads over what still comes, for a while.
    fn poll_linger(&mut self, cx: &mut Context<'_>) -> Poll<()> {
        let end = self.linger.end.get_or_insert_with(|| Box::pin(sleep(LINGER)));
        if end.as_mut().poll(cx).is_ready() {
            return Poll::Ready(());
        }
        let mut space = [0; READ_BYTES];
        while self.linger.bytes < LINGER_BYTES_MAX {
            let mut space = ReadBuf::new(&mut space);
            match ready!(Pin::new(&mut self.inner).poll_read(cx, &mut space)) {
                Ok(()) if !space.filled().is_empty() => self.linger.bytes += space.filled().len(),
                _ => break,
            }
        }
        Poll::Ready(())
    }
}

impl<S: AsyncWrite + Unpin> Stream<S> {
    /// Writes what was gathered.
    fn poll_gathered(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.gathered.rest().is_empty() {
            let written = Pin::new(&mut self.inner).poll_write(cx, self.gathered.rest());
            match ready!(self.patient(cx, written, |count| *count))? {
                0 => return Poll::Ready(Err(io::ErrorKind::WriteZero.into())),
                count => self.gathered.advance(count),
            }
        }
        Poll::Ready(Ok(()))
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Verdict {
    Fine,
    Refused(ClientFault),
    Broken,
}

/// How many bytes go on, and what is with the next.
fn judged(messages: &mut Messages, bytes: &[u8]) -> (usize, Verdict) {
    match messages.pass(bytes) {
        Passed::All => (bytes.len(), Verdict::Fine),
        Passed::Part(count) => (count, Verdict::Fine),
        Passed::Refused(count, fault) => (count, Verdict::Refused(fault)),
        Passed::Broken(count) => (count, Verdict::Broken),
    }
}

fn broken() -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, "body breaks its framing")
}

impl<S: AsyncRead + Unpin> AsyncRead for Stream<S> {
    fn poll_read(mut self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        match self.judge {
            Judge::Glitches(..) => self.poll_frames(cx, buffer),
            Judge::Messages(_) => {
                let read = self.poll_messages(cx, buffer);
                match read {
                    Poll::Pending => self.note_rest(),
                    Poll::Ready(_) => self.activity.rest(false),
                }
                read
            }
        }
    }
}

impl<S: AsyncRead + AsyncWrite + Unpin> AsyncWrite for Stream<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        self.poll_write_vectored(cx, &[IoSlice::new(bytes)])
    }

    fn poll_write_vectored(
        self: Pin<&mut Self>,
        cx: &mut Context<'_>,
        slices: &[IoSlice<'_>],
    ) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        this.note_write();
        if let Judge::Glitches(..) = this.judge {
            let mut taken = this.gathered.take(slices);
            if taken.is_none() && !this.gathered.rest().is_empty() {
                ready!(this.poll_gathered(cx))?;
                taken = this.gathered.take(slices);
            }
            if let Some(length) = taken {
                let taken = Poll::Ready(Ok(length));
                this.sent(slices, &taken);
                return taken;
            }
        }
        let written = Pin::new(&mut this.inner).poll_write_vectored(cx, slices);
        this.sent(slices, &written);
        this.patient(cx, written, |count| *count)
    }

    fn is_write_vectored(&self) -> bool {
        self.inner.is_write_vectored()
    }

    fn poll_flush(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        if self.gathered.may_wait() {
            return Poll::Ready(Ok(()));
        }
        ready!(self.poll_gathered(cx))?;
        let flushed = Pin::new(&mut self.inner).poll_flush(cx);
        if matches!(flushed, Poll::Ready(Ok(()))) && self.out == Out::Written {
            self.out = Out::Flushed;
            self.note_rest();
        }
        self.patient(cx, flushed, |()| 0)
    }

    fn poll_shutdown(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        self.out = Out::Ended;
        self.activity.rest(false);
        if !self.linger.is_shut {
            ready!(self.poll_gathered(cx))?;
            let shut = Pin::new(&mut self.inner).poll_shutdown(cx);
            ready!(self.patient(cx, shut, |()| 0))?;
            self.linger.is_shut = true;
        }
        self.poll_linger(cx).map(Ok)
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::{AsyncReadExt, AsyncWriteExt, DuplexStream};

    use super::super::h1::head::Bounds;
    use super::*;

    const GET: &[u8] = b"GET / HTTP/1.1\r\nhost: a\r\n\r\n";

    fn messages() -> Judge {
        Judge::Messages(Messages::new(Bounds { head_bytes_max: 16_384, target_bytes_max: 8_192, fields_max: 100 }))
    }

    fn stream(inner: DuplexStream, ahead: &'static [u8], judge: Judge) -> (Stream<DuplexStream>, Activity) {
        let (activity, patience) = (Activity::new(), Patience::new(Duration::from_secs(60), 1_024));
        (Stream::new((inner, |_| ()), Bytes::from_static(ahead), judge, activity.clone(), patience), activity)
    }

    #[tokio::test]
    async fn what_was_read_ahead_comes_first() {
        let (near, mut far) = tokio::io::duplex(64);
        far.write_all(&GET[5..]).await.unwrap();
        drop(far);
        let (mut stream, activity) = stream(near, &GET[..5], messages());
        let mut bytes = Vec::new();
        stream.read_to_end(&mut bytes).await.unwrap();
        assert_eq!(bytes, GET);
        assert_eq!(activity.read_bytes(), GET.len() as u64);
    }

    #[tokio::test]
    async fn a_head_that_breaks_a_rule_is_never_read() {
        let (near, mut far) = tokio::io::duplex(1_024);
        for piece in [GET, b"GET / HTTP/1.1\r\nhost: a", b"\nx: y\r\n\r\n", GET] {
            far.write_all(piece).await.unwrap();
        }
        let (mut stream, activity) = stream(near, b"", messages());
        let mut bytes = vec![0; GET.len() + REFUSED.len()];
        stream.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, [GET, REFUSED].concat());
        assert_eq!((activity.fault(1), activity.fault(2)), (None, Some(ClientFault::Malformed)));
        let more = tokio::time::timeout(Duration::from_millis(1), stream.read_u8()).await;
        assert!(more.is_err(), "{more:?}");
    }

    #[tokio::test]
    async fn a_body_that_breaks_its_framing_ends_in_an_error() {
        let (near, mut far) = tokio::io::duplex(1_024);
        let head = b"POST / HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n5\r\nhello";
        far.write_all(head).await.unwrap();
        far.write_all(b"x5\r\n").await.unwrap();
        let (mut stream, activity) = stream(near, b"", messages());
        let mut bytes = vec![0; head.len()];
        stream.read_exact(&mut bytes).await.unwrap();
        assert_eq!(bytes, head);
        assert_eq!(stream.read_u8().await.unwrap_err().kind(), io::ErrorKind::InvalidData);
        assert_eq!(activity.fault(1), Some(ClientFault::Malformed));
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_is_given_up() {
        let (near, far) = tokio::io::duplex(8);
        let (mut stream, _) = stream(near, b"", messages());
        stream.patience = Patience::new(Duration::from_millis(1), 1_024);
        let error = stream.write_all(&[0; 64]).await.unwrap_err();
        assert_eq!(error.kind(), io::ErrorKind::TimedOut);
        drop(far);
    }

    #[tokio::test]
    async fn frames_of_http_2_go_out_together_and_none_is_left_behind() {
        let (near, mut far) = tokio::io::duplex(8);
        let (mut stream, _) = stream(near, b"", Judge::Glitches(Glitches::new(0), 4));
        let frame = || [IoSlice::new(b"head "), IoSlice::new(b"payload ")];
        for _ in 0..2 {
            assert_eq!(stream.write_vectored(&frame()).await.unwrap(), 13);
            stream.flush().await.unwrap();
        }
        let mut bytes = [0; 26];
        assert!(tokio::time::timeout(Duration::from_millis(1), far.read_u8()).await.is_err(), "there is more to come");
        // More than the other side takes at once.
        let (flushed, read) = tokio::join!(stream.flush(), far.read_exact(&mut bytes));
        assert!(flushed.is_ok() && read.is_ok());
        assert_eq!(&bytes, b"head payload head payload ");
        assert_eq!(stream.write_vectored(&frame()).await.unwrap(), 13);
        stream.flush().await.unwrap();
        // What does not fit any more is written after what was there.
        let large = vec![7; 20_000];
        let write = async {
            stream.write_all(&large).await.unwrap();
            assert_eq!(stream.write_vectored(&frame()).await.unwrap(), 13);
            stream.flush().await.unwrap();
            stream.shutdown().await.unwrap();
        };
        let mut all = Vec::new();
        let read = async {
            let mut space = vec![0; 13 + large.len() + 13];
            far.read_exact(&mut space).await.unwrap();
            all = space;
            drop(far);
        };
        tokio::join!(write, read);
        assert_eq!(all, [&b"head payload "[..], &large, b"head payload "].concat());
    }

    #[tokio::test]
    async fn a_client_that_takes_nothing_of_what_was_gathered_is_given_up_too() {
        let (near, far) = tokio::io::duplex(8);
        let (mut stream, _) = stream(near, b"", Judge::Glitches(Glitches::new(0), 4));
        stream.patience = Patience::new(Duration::from_millis(1), 1_024);
        stream.write_all(&[0; 64]).await.unwrap();
        assert_eq!(stream.flush().await.unwrap_err().kind(), io::ErrorKind::TimedOut);
        drop(far);
    }

    #[tokio::test]
    async fn a_client_that_still_sends_is_heard_out_for_a_while() {
        let (near, mut far) = tokio::io::duplex(64);
        let (mut stream, _) = stream(near, b"", messages());
        let closing = tokio::spawn(async move { stream.shutdown().await });
        for _ in 0..10 {
            far.write_all(&[0; 64]).await.unwrap();
        }
        assert!(!closing.is_finished());
        drop(far);
        closing.await.unwrap().unwrap();
    }

    #[tokio::test]
    async fn a_client_that_only_makes_work_is_read_no_more() {
        let (near, mut far) = tokio::io::duplex(1_024);
        let (mut stream, activity) = stream(near, b"", Judge::Glitches(Glitches::new(0), 4));
        let ping = [0, 0, 8, 6, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8];
        far.write_all(&ping.repeat(4)).await.unwrap();
        let mut bytes = vec![0; ping.len() * 4];
        stream.read_exact(&mut bytes).await.unwrap();
        assert!(activity.is_choked());
        activity.urged().await;
        far.write_all(&ping).await.unwrap();
        assert!(tokio::time::timeout(Duration::from_millis(1), stream.read_u8()).await.is_err());
    }
}
