//! Bodies between a transport and the rest of the node.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::{Buf, Bytes};
use http_body::{Frame, SizeHint};
use tokio::sync::oneshot;
use tokio::time::Sleep;

use crate::request::{Body, BodyError};

use super::stream::Busy;

/// How long a client may stay silent while its body is waited for.
const READ_IDLE: Duration = Duration::from_secs(30);

/// A request's body, with an end to patience.
pub(super) struct Inbound<B> {
    body: B,
    /// Runs only while the body is waited for.
    patience: Option<Pin<Box<Sleep>>>,
}

impl<B> Inbound<B> {
    pub(super) fn new(body: B) -> Self {
        Self { body, patience: None }
    }
}

impl<B> http_body::Body for Inbound<B>
where
    B: http_body::Body<Data = Bytes> + Unpin,
    B::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            self.patience = None;
            return Poll::Ready(frame.map(|frame| frame.map_err(|error| BodyError::Transport(error.into()))));
        }
        let patience = self.patience.get_or_insert_with(|| Box::pin(tokio::time::sleep(READ_IDLE)));
        ready!(patience.as_mut().poll(cx));
        let silent = io::Error::new(io::ErrorKind::TimedOut, "client sent nothing for too long");
        Poll::Ready(Some(Err(BodyError::Transport(silent.into()))))
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// An answer's body, which keeps its connection busy until it is out.
pub(super) struct Outbound {
    body: Body,
    _busy: Busy,
}

impl Outbound {
    pub(super) fn new(body: Body, busy: Busy) -> Self {
        Self { body, _busy: busy }
    }
}

impl http_body::Body for Outbound {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        Pin::new(&mut self.body).poll_frame(cx)
    }

    fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }
}

/// The receiving half of an HTTP/3 request.
pub(super) type Half = h3::server::RequestStream<super::frames::Receive, Bytes>;

/// A request's body over HTTP/3, held to the length that its head announced (RFC 9114 4.1.2).
///
/// Dropped before its end, it hands the half back: quinn would tell the client at once to stop sending, with code 0,
/// and clients take that for a failed request.
pub(super) struct Streamed {
    half: Option<Half>,
    back: Option<oneshot::Sender<Half>>,
    left: Option<u64>,
    ended: bool,
}

impl Streamed {
    pub(super) fn new(half: Half, length: Option<u64>) -> (Self, oneshot::Receiver<Half>) {
        let (back, unread) = oneshot::channel();
        (Self { half: Some(half), back: Some(back), left: length, ended: false }, unread)
    }
}

impl Drop for Streamed {
    fn drop(&mut self) {
        if let (false, Some(half), Some(back)) = (self.ended, self.half.take(), self.back.take()) {
            // Nobody waits any more once the answer is out: then it may be dropped here.
            drop(back.send(half));
        }
    }
}

impl http_body::Body for Streamed {
    type Data = Bytes;
    type Error = Box<dyn std::error::Error + Send + Sync>;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, Self::Error>>> {
        if self.ended {
            return Poll::Ready(None);
        }
        let Some(half) = self.half.as_mut() else { return Poll::Ready(None) };
        let data = match ready!(half.poll_recv_data(cx)) {
            Ok(Some(mut data)) => data.copy_to_bytes(data.remaining()),
            Ok(None) => {
                self.ended = true;
                // Trailers of a request tell a guest nothing that it could trust; they are read over.
                return Poll::Ready(match self.left {
                    Some(1..) => Some(Err("body is shorter than its content-length".into())),
                    _ => None,
                });
            }
            Err(error) => {
                self.ended = true;
                return Poll::Ready(Some(Err(error.into())));
            }
        };
        if let Some(left) = self.left {
            let Some(left) = left.checked_sub(data.len() as u64) else {
                self.ended = true;
                return Poll::Ready(Some(Err("body is longer than its content-length".into())));
            };
            self.left = Some(left);
        }
        Poll::Ready(Some(Ok(Frame::data(data))))
    }

    fn is_end_stream(&self) -> bool {
        self.ended
    }

    fn size_hint(&self) -> SizeHint {
        self.left.map_or_else(SizeHint::default, SizeHint::with_exact)
    }
}
