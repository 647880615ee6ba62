//! HTTP/1.1: a connection carries one request at a time; a request waits for a free one.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};
use std::time::Instant;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::sync::{Semaphore, SemaphorePermit};

use crate::error::{ConnectError, ErrorKind};

use super::connect::{Opener, Stream};
use super::lane::kind_of;
use super::request::Template;
use super::{Answer, Failure};

type Sender = SendRequest<Full<Bytes>>;

/// A fixed number of connections. Those who wait for one get it in the order they came.
#[derive(Debug)]
pub(super) struct Pool {
    permits: Semaphore,
    /// Open connections without a request; at most as many as permits. Used in turn.
    idle: Mutex<VecDeque<Sender>>,
}

/// The right to use one connection. The connection is given back only after a whole answer: one that is
/// dropped with its request half way ends, which is all that HTTP/1.1 offers to cancel it.
struct Lease<'pool> {
    pool: &'pool Pool,
    _permit: SemaphorePermit<'pool>,
}

impl Pool {
    pub(super) fn new(count: usize) -> Pool {
        Pool { permits: Semaphore::new(count), idle: Mutex::default() }
    }

    pub(super) async fn warm(&self, opener: &Opener) -> Result<(), ConnectError> {
        let sender = opener.attempt(open(opener)).await?;
        self.put(sender);
        Ok(())
    }

    /// If it was sent before, it goes to a new connection.
    pub(super) async fn exchange(
        &self,
        opener: &Opener,
        template: &Template,
        is_again: bool,
    ) -> Result<Answer, Failure> {
        let lease = self.lease().await?;
        let idle = if is_again { None } else { lease.idle().await };
        let is_reused = idle.is_some();
        let mut sender = match idle {
            Some(sender) => sender,
            None => opener.attempt(open(opener)).await?,
        };
        let sent = Instant::now();
        let response = sender.try_send_request(template.h1()).await.map_err(|mut error| {
            let kind = kind_of(error.error());
            // RFC 9112 9.3.1: a connection that was idle may be closed just then, which nobody can tell. What has the same
            // effect twice as once is sent again (RFC 9110 9.2.2).
            let is_lost = is_reused && kind == ErrorKind::Closed && template.is_idempotent();
            Failure { unprocessed: error.take_message().is_some() || is_lost, kind }
        })?;
        let answer = read(response, sent).await?;
        lease.give_back(sender);
        Ok(answer)
    }

    async fn lease(&self) -> Result<Lease<'_>, Failure> {
        // The semaphore is never closed.
        let permit =
            self.permits.acquire().await.map_err(|_| Failure { kind: ErrorKind::Closed, unprocessed: false })?;
        Ok(Lease { pool: self, _permit: permit })
    }

    fn take(&self) -> Option<Sender> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn put(&self, sender: Sender) {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push_back(sender);
    }
}

impl Lease<'_> {
    /// An idle connection that is still open.
    async fn idle(&self) -> Option<Sender> {
        while let Some(mut sender) = self.pool.take() {
            if sender.ready().await.is_ok() {
                return Some(sender);
            }
        }
        None
    }

    fn give_back(self, sender: Sender) {
        if !sender.is_closed() {
            self.pool.put(sender);
        }
    }
}

async fn open(opener: &Opener) -> Result<Sender, ConnectError> {
    match opener.stream().await? {
        Stream::Plain(stream) => shake(opener, stream).await,
        Stream::Tls(stream) => shake(opener, *stream).await,
    }
}

async fn shake(
    opener: &Opener,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Sender, ConnectError> {
    let (sender, connection) = handshake(TokioIo::new(stream)).await.map_err(ConnectError::Http)?;
    // What ends a connection is told to the request on it.
    opener.drivers().spawn(async move { drop(connection.await) });
    Ok(sender)
}

/// Reads an answer to its end and keeps only its size.
pub(super) async fn read(response: http::Response<hyper::body::Incoming>, sent: Instant) -> Result<Answer, Failure> {
    let (head, mut body) = response.into_parts();
    let mut bytes = 0;
    while let Some(frame) = body.frame().await {
        let frame = frame.map_err(|error| Failure { kind: kind_of(&error), unprocessed: false })?;
        bytes += frame.data_ref().map_or(0, |data| data.len() as u64);
    }
    Ok(Answer { status: head.status.as_u16(), bytes, sent })
}
