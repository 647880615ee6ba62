//! Bodies on their way through a guest: the client's, bounded, and the guest's, watched.

use std::collections::VecDeque;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll};
use std::time::Instant;

use bytes::Bytes;
use http_body::{Body as _, Frame, SizeHint};
use http_body_util::BodyExt;
use tokio::sync::oneshot;
use tokio::task::JoinHandle;
use tokio::time::Sleep;
use wasmtime_wasi_http::{Error, WasiBody};

use super::outcome::Outcome;
use super::parting::Parting;
use crate::fault::{Fault, GuestFault};
use crate::request::{Body, BodyError};

/// The client's body as the guest reads it: more bytes than the limit are an error.
struct Bounded {
    body: Option<Body>,
    left: u64,
    max: u64,
    outcome: Arc<Outcome>,
}

/// `body`, of which the guest gets `max` bytes at most.
pub(super) fn bounded(body: Body, max: u64, outcome: Arc<Outcome>) -> WasiBody {
    if body.is_end_stream() {
        outcome.end_body();
    }
    Bounded { body: Some(body), left: max, max, outcome }.boxed_unsync()
}

impl Bounded {
    fn refuse(&mut self) -> Error {
        self.body = None;
        self.outcome.refuse_body();
        Error::HttpRequestBodySize(Some(self.max))
    }
}

impl Drop for Bounded {
    fn drop(&mut self) {
        self.outcome.end_body();
    }
}

impl http_body::Body for Bounded {
    type Data = Bytes;
    type Error = Error;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Error>>> {
        let Some(body) = &mut self.body else { return Poll::Ready(None) };
        let Poll::Ready(frame) = Pin::new(body).poll_frame(cx) else { return Poll::Pending };
        Poll::Ready(match frame {
            None => {
                self.outcome.end_body();
                None
            }
            Some(Ok(frame)) => {
                let length = frame.data_ref().map_or(0, |data| data.len() as u64);
                match self.left.checked_sub(length) {
                    Some(left) => {
                        self.left = left;
                        Some(Ok(frame))
                    }
                    None => Some(Err(self.refuse())),
                }
            }
            Some(Err(BodyError::TooLarge { .. })) => Some(Err(self.refuse())),
            Some(Err(_)) => {
                self.body = None;
                Some(Err(Error::ConnectionTerminated))
            }
        })
    }

    fn is_end_stream(&self) -> bool {
        self.body.as_ref().is_none_or(http_body::Body::is_end_stream)
    }

    fn size_hint(&self) -> SizeHint {
        self.body.as_ref().map_or(SizeHint::with_exact(0), http_body::Body::size_hint)
    }
}

/// How much of an answer was there.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Drained {
    /// All of it.
    Whole,
    /// There is more to come.
    Open,
    /// It broke off.
    Broken,
}

/// Takes what is there of a guest's body. The host holds few chunks of it, so this is short.
pub(super) fn drain(body: &mut WasiBody, frames: &mut VecDeque<Frame<Bytes>>, cx: &mut Context<'_>) -> Drained {
    while frames.len() < DRAINED_FRAMES_MAX {
        match Pin::new(&mut *body).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => frames.push_back(frame),
            Poll::Ready(Some(Err(_))) => return Drained::Broken,
            Poll::Ready(None) => return Drained::Whole,
            Poll::Pending => break,
        }
    }
    Drained::Open
}

/// Frames taken of a guest's body before the rest is left to stream.
pub(super) const DRAINED_FRAMES_MAX: usize = 16;

/// A guest at work on the rest of its answer.
pub(super) struct Running {
    /// The task that it works in.
    pub(super) task: JoinHandle<()>,
    /// Whether it may go on when its body is dropped: the body was complete, and what it still does is its own affair,
    /// under the same limits.
    pub(super) complete: bool,
}

impl Drop for Running {
    fn drop(&mut self) {
        if !self.complete {
            self.task.abort();
        }
    }
}

/// The body of a guest's answer. Dropping it before its end stops the guest.
pub(super) struct Answer {
    pub(super) frames: VecDeque<Frame<Bytes>>,
    pub(super) rest: Option<WasiBody>,
    pub(super) outcome: Arc<Outcome>,
    pub(super) guest: Option<Running>,
    /// Who waits for the end of this body, if the instance may answer another request.
    pub(super) parting: Option<Arc<Parting>>,
    /// Whom to tell by dropping it that this body is over, if the instance answers others meanwhile.
    pub(super) over: Option<oneshot::Sender<()>>,
    /// Bytes still to come, if the head says how many.
    pub(super) promised: Option<u64>,
    pub(super) deadline: Instant,
    pub(super) sleep: Option<Pin<Box<Sleep>>>,
}

impl Answer {
    fn ends(&mut self) {
        if let Some(guest) = &mut self.guest {
            guest.complete = true;
        }
        if let Some(parting) = self.parting.take() {
            parting.body_ended();
        }
        self.over = None;
    }

    fn breaks(&mut self, fault: GuestFault) -> BodyError {
        self.rest = None;
        self.guest = None;
        self.parting = None;
        self.over = None;
        let outcome = match self.outcome.end() {
            Some(Err(fault)) => fault.outcome(),
            _ => fault.as_str(),
        };
        BodyError::Guest { outcome }
    }

    fn count(&mut self, frame: &Frame<Bytes>) {
        let Some(promised) = &mut self.promised else { return };
        let length = frame.data_ref().map_or(0, |data| data.len() as u64);
        *promised = promised.saturating_sub(length);
        // Whoever knows the length does not ask for the end.
        if *promised == 0 {
            self.ends();
        }
    }
}

impl http_body::Body for Answer {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let me = &mut *self;
        if let Some(frame) = me.frames.pop_front() {
            me.count(&frame);
            return Poll::Ready(Some(Ok(frame)));
        }
        let Some(rest) = &mut me.rest else { return Poll::Ready(None) };
        match Pin::new(rest).poll_frame(cx) {
            Poll::Ready(Some(Ok(frame))) => {
                me.count(&frame);
                Poll::Ready(Some(Ok(frame)))
            }
            Poll::Ready(Some(Err(_))) => Poll::Ready(Some(Err(me.breaks(GuestFault::BadResponse)))),
            // A store that was dropped looks like an end. It is one only if the guest did not fail.
            Poll::Ready(None) if matches!(me.outcome.end(), Some(Err(_))) => {
                Poll::Ready(Some(Err(me.breaks(GuestFault::Trap))))
            }
            Poll::Ready(None) => {
                me.ends();
                me.rest = None;
                Poll::Ready(None)
            }
            Poll::Pending => {
                let deadline = me.deadline.into();
                let sleep = me.sleep.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(deadline)));
                match sleep.as_mut().poll(cx) {
                    Poll::Ready(()) => {
                        me.outcome.settle(Err(Fault::Guest(GuestFault::ExceededWall)));
                        Poll::Ready(Some(Err(me.breaks(GuestFault::ExceededWall))))
                    }
                    Poll::Pending => Poll::Pending,
                }
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        self.frames.is_empty() && self.rest.is_none()
    }

    fn size_hint(&self) -> SizeHint {
        if self.rest.is_some() {
            return self.promised.map_or_else(SizeHint::default, SizeHint::with_exact);
        }
        let length = self.frames.iter().filter_map(Frame::data_ref).map(|data| data.len() as u64).sum();
        SizeHint::with_exact(length)
    }
}
