//! One request as it comes: its head, then its body, held to the length that the head announced.

use std::collections::VecDeque;
use std::future::{Future as _, poll_fn};
use std::pin::{Pin, pin};
use std::sync::{Arc, OnceLock};
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};
use tokio::sync::oneshot;

use super::code::{Code, Wrong};
use super::frames::{Frames, Part};
use super::message;
use super::section::Refused;
use super::shared::Shared;
use crate::listen::STREAM_WINDOW_BYTES;
use crate::listen::patience::Patience;
use crate::request::BodyError;

/// Bytes that are taken from quinn at once.
const CHUNK_BYTES_MAX: usize = 64 * 1024;

/// Why nothing more comes.
#[derive(Debug, Clone, Copy, thiserror::Error)]
pub(super) enum Lost {
    /// The client broke a rule.
    #[error(transparent)]
    Wrong(#[from] Wrong),
    /// The client took the request back, or the connection is gone.
    #[error("client went away")]
    Gone,
}

/// How a head can come out.
pub(super) enum Opened {
    /// Well.
    Head(Box<message::Head>),
    /// Its fields are larger than we take.
    TooLarge,
}

/// The receiving half of a request's stream.
pub(super) struct Receiving {
    stream: quinn::RecvStream,
    shared: Arc<Shared>,
    frames: Frames,
    /// What [`Frames`] held back when it was last looked at.
    kept_bytes: usize,
    /// Data that was read before somebody asked for it.
    ahead: VecDeque<Bytes>,
    ahead_bytes: usize,
    /// How much of the announced length is still to come.
    left: Option<u64>,
    /// Whether the stream is read to its end, or given up.
    over: bool,
    /// What the client did wrong.
    wrong: Option<Wrong>,
}

impl Receiving {
    pub(super) fn new(stream: quinn::RecvStream, shared: Arc<Shared>) -> Self {
        let frames = Frames::new(shared.headers_bytes_max());
        Self {
            stream,
            shared,
            frames,
            kept_bytes: 0,
            ahead: VecDeque::new(),
            ahead_bytes: 0,
            left: None,
            over: false,
            wrong: None,
        }
    }

    /// Waits for the head.
    pub(super) async fn head(&mut self) -> Result<Opened, Lost> {
        let part = poll_fn(|cx| self.poll_part(cx)).await?;
        let section = match part {
            Some(Part::Head(section)) => section,
            Some(_) => return Ok(Opened::TooLarge),
            // `Frames::end` has said so already.
            None => return Err(Wrong::stream(Code::RequestIncomplete, "no request").into()),
        };
        match message::head(&section, self.shared.head_bytes_max()) {
            Ok(head) => {
                self.left = head.length;
                Ok(Opened::Head(Box::new(head)))
            }
            Err(Refused::TooLarge) => Ok(Opened::TooLarge),
            Err(Refused::Wrong(wrong)) => Err(wrong.into()),
        }
    }

    /// Reads what has come by now. A body that is all there is judged before anybody answers to it.
    pub(super) async fn look_ahead(&mut self) -> Result<(), Lost> {
        poll_fn(|cx| {
            while self.ahead_bytes < STREAM_WINDOW_BYTES as usize {
                match self.poll_next(cx) {
                    Poll::Ready(Ok(Some(data))) => {
                        self.ahead_bytes += data.len();
                        self.ahead.push_back(data);
                    }
                    Poll::Ready(Ok(None)) | Poll::Pending => break,
                    Poll::Ready(Err(lost)) => return Poll::Ready(Err(lost)),
                }
            }
            Poll::Ready(Ok(()))
        })
        .await
    }

    /// The body, if all of it is there and in one piece.
    pub(super) fn whole(&mut self) -> Option<Bytes> {
        (self.over && self.ahead.len() < 2).then(|| self.ahead.pop_front().unwrap_or_default())
    }

    /// The next piece of the body.
    pub(super) fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Lost>> {
        if let Some(data) = self.ahead.pop_front() {
            self.ahead_bytes -= data.len();
            return Poll::Ready(Ok(Some(data)));
        }
        if let Some(wrong) = self.wrong {
            return Poll::Ready(Err(wrong.into()));
        }
        self.poll_next(cx).map_err(|lost| {
            if let Lost::Wrong(wrong) = lost {
                self.refuse(wrong);
            }
            lost
        })
    }

    /// Tells the client to stop, and why.
    pub(super) fn refuse(&mut self, wrong: Wrong) {
        self.wrong = Some(wrong);
        self.stop(wrong.code);
        self.shared.wrong(wrong);
    }

    /// The client took the request back before it was whole.
    pub(super) fn taken_back(&self) {
        self.shared.glitch();
    }

    /// Tells the client to stop.
    pub(super) fn stop(&mut self, code: Code) {
        if !self.over {
            self.over = true;
            // Fails only where there is nothing to stop.
            let _ = self.stream.stop(code.into());
        }
    }

    fn poll_next(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, Lost>> {
        loop {
            match ready!(self.poll_part(cx))? {
                Some(Part::Data(data)) => {
                    if let Some(left) = &mut self.left {
                        // RFC 9114 4.1.2.
                        let rest = left.checked_sub(data.len() as u64);
                        *left = rest.ok_or_else(|| Wrong::malformed("body is longer than its content-length"))?;
                    }
                    return Poll::Ready(Ok(Some(data)));
                }
                Some(Part::Trailers(section)) => match message::trailers(&section, self.shared.head_bytes_max()) {
                    Ok(()) => {}
                    Err(Refused::TooLarge) => return Poll::Ready(Err(too_large_trailers())),
                    Err(Refused::Wrong(wrong)) => return Poll::Ready(Err(wrong.into())),
                },
                Some(Part::Head(_) | Part::TooLong) => return Poll::Ready(Err(too_large_trailers())),
                None => {
                    if self.left.is_some_and(|left| left > 0) {
                        return Poll::Ready(Err(Wrong::malformed("body is shorter than its content-length").into()));
                    }
                    return Poll::Ready(Ok(None));
                }
            }
        }
    }

    fn poll_part(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Part>, Lost>> {
        loop {
            if self.over {
                return Poll::Ready(Ok(None));
            }
            let part = self.frames.next()?;
            let kept = self.frames.kept_bytes();
            if kept != self.kept_bytes {
                self.shared.keep(std::mem::replace(&mut self.kept_bytes, kept), kept)?;
            }
            if part.is_some() {
                return Poll::Ready(Ok(part));
            }
            // The future holds nothing of its own: made anew, it goes on where it was.
            let read = pin!(self.stream.read_chunk(CHUNK_BYTES_MAX, true)).poll(cx);
            match ready!(read) {
                Ok(Some(chunk)) => self.frames.feed(chunk.bytes),
                Ok(None) => {
                    self.over = true;
                    self.frames.end()?;
                    return Poll::Ready(Ok(None));
                }
                Err(_) => {
                    self.over = true;
                    return Poll::Ready(Err(Lost::Gone));
                }
            }
        }
    }
}

fn too_large_trailers() -> Lost {
    Wrong::stream(Code::ExcessiveLoad, "trailers are too large").into()
}

impl Drop for Receiving {
    fn drop(&mut self) {
        // Lowering never fails.
        let _ = self.shared.keep(self.kept_bytes, 0);
        // Left alone, quinn would say code 0, and clients take that for a failed request (RFC 9114 4.1).
        self.stop(Code::NoError);
    }
}

/// A request's body. Dropped before its end, it hands the stream back to whoever answers.
pub(super) struct Streamed {
    receiving: Option<Receiving>,
    back: Option<oneshot::Sender<Receiving>>,
    patience: Patience,
    wrong: Arc<OnceLock<Wrong>>,
}

/// What is left of a request whose body others read.
pub(super) struct Unread {
    back: oneshot::Receiver<Receiving>,
    wrong: Arc<OnceLock<Wrong>>,
}

impl Unread {
    /// The stream, if nobody reads it any more.
    pub(super) fn back(&mut self) -> Option<Receiving> {
        self.back.try_recv().ok()
    }

    /// What the client did wrong, if it did.
    pub(super) fn wrong(&self) -> Option<Wrong> {
        self.wrong.get().copied()
    }
}

impl Streamed {
    /// `patience` is how long the client may be waited for.
    pub(super) fn new(receiving: Receiving, patience: Patience) -> (Self, Unread) {
        let (back, unread) = oneshot::channel();
        let wrong = Arc::<OnceLock<Wrong>>::default();
        let unread = Unread { back: unread, wrong: Arc::clone(&wrong) };
        (Self { receiving: Some(receiving), back: Some(back), patience, wrong }, unread)
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        if let (Some(receiving), Some(back)) = (self.receiving.take(), self.back.take()) {
            // Nobody waits any more once the answer is out: then it may be dropped here.
            drop(back.send(receiving));
        }
    }
}

impl http_body::Body for Streamed {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let Self { receiving, patience, wrong, .. } = self.get_mut();
        let Some(receiving) = receiving.as_mut() else { return Poll::Ready(None) };
        let data = match receiving.poll_data(cx) {
            Poll::Ready(data) => data,
            Poll::Pending => {
                let _slow = ready!(patience.poll_wait(cx));
                // As where the client had ended it here (RFC 9114 8.1).
                let slow = Wrong::stream(Code::RequestIncomplete, "body did not come in time");
                receiving.refuse(slow);
                Err(slow.into())
            }
        };
        patience.moved(data.as_ref().map_or(0, |data| data.as_ref().map_or(0, Bytes::len)));
        if let Err(Lost::Wrong(found)) = &data {
            // The first is the one that is told.
            let _ = wrong.set(*found);
        }
        Poll::Ready(
            data.map_err(|lost| BodyError::Transport(lost.into())).map(|data| data.map(Frame::data)).transpose(),
        )
    }

    fn is_end_stream(&self) -> bool {
        self.receiving.as_ref().is_none_or(|receiving| receiving.over && receiving.ahead.is_empty())
    }

    fn size_hint(&self) -> SizeHint {
        let Some(receiving) = &self.receiving else { return SizeHint::with_exact(0) };
        receiving.left.map_or_else(SizeHint::default, |left| SizeHint::with_exact(left + receiving.ahead_bytes as u64))
    }
}
