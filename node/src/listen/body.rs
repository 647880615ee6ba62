//! Bodies between a transport and the rest of the node.

use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Frame, SizeHint};

use crate::request::{Body, BodyError};

use super::activity::{Activity, Busy};
use super::patience::Patience;
use super::tasks::Progress;

/// Bytes of an answer that one stream of HTTP/2 offers at once: what it offers waits where no time is kept.
const PIECE_BYTES: usize = 16 * 1024;

/// A request's body, with an end to patience.
pub(super) struct Inbound<B> {
    body: B,
    patience: Patience,
}

impl<B> Inbound<B> {
    pub(super) fn patient(body: B, patience: Patience) -> Self {
        Self { body, patience }
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
        loop {
            let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
                let slow = ready!(self.patience.poll_wait(cx));
                return Poll::Ready(Some(Err(BodyError::Transport(slow.into()))));
            };
            let Some(Ok(frame)) = frame else {
                self.patience.moved(0);
                return Poll::Ready(frame.map(|frame| frame.map_err(|error| BodyError::Transport(error.into()))));
            };
            match frame.into_data() {
                Ok(data) => {
                    self.patience.moved(data.len());
                    return Poll::Ready(Some(Ok(Frame::data(data))));
                }
                // Trailers of a request tell a guest nothing that it could trust; they are read over.
                Err(_) => self.patience.moved(0),
            }
        }
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
    /// What is not offered yet of the last frame.
    rest: Bytes,
    /// HTTP/2: what the task's watch wants to know.
    progress: Option<Arc<Progress>>,
    activity: Activity,
    ended: bool,
    _busy: Busy,
}

impl Outbound {
    pub(super) fn new(body: Body, activity: Activity, busy: Busy) -> Self {
        let progress = Progress::of_task();
        if let Some(progress) = &progress {
            progress.offer(0);
        }
        Self { body, rest: Bytes::new(), progress, activity, ended: false, _busy: busy }
    }

    /// A piece of what there is.
    fn piece(&mut self) -> Frame<Bytes> {
        let length = match &self.progress {
            Some(progress) => {
                let length = self.rest.len().min(PIECE_BYTES);
                progress.offer(length);
                length
            }
            None => self.rest.len(),
        };
        Frame::data(self.rest.split_to(length))
    }
}

impl http_body::Body for Outbound {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if !self.rest.is_empty() {
            return Poll::Ready(Some(Ok(self.piece())));
        }
        let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) else {
            if let Some(progress) = &self.progress {
                progress.is_taken();
            }
            return Poll::Pending;
        };
        let Some(Ok(frame)) = frame else {
            self.ended |= frame.is_none();
            return Poll::Ready(frame);
        };
        match frame.into_data() {
            Ok(data) => {
                self.rest = data;
                Poll::Ready(Some(Ok(self.piece())))
            }
            Err(frame) => Poll::Ready(Some(Ok(frame))),
        }
    }

    fn is_end_stream(&self) -> bool {
        self.rest.is_empty() && self.body.is_end_stream()
    }

    fn size_hint(&self) -> SizeHint {
        let (hint, rest) = (self.body.size_hint(), self.rest.len() as u64);
        let mut whole = SizeHint::new();
        whole.set_lower(hint.lower() + rest);
        if let Some(upper) = hint.upper() {
            whole.set_upper(upper + rest);
        }
        whole
    }
}

impl Drop for Outbound {
    fn drop(&mut self) {
        if self.ended || http_body::Body::is_end_stream(self) {
            self.activity.forgive();
        }
    }
}
