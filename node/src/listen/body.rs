//! Bodies between a transport and the rest of the node.

use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};
use std::time::Duration;

use bytes::Bytes;
use http_body::{Frame, SizeHint};
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
