//! HTTP/2: over TLS by ALPN, over plain TCP by prior knowledge.

use std::error::Error as _;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::Full;
use hyper::client::conn::http2::{SendRequest, handshake};
use hyper_util::rt::{TokioExecutor, TokioIo};
use tokio::io::{AsyncRead, AsyncWrite};

use crate::error::ConnectError;

use super::connect::{Opener, Stream};
use super::h1::read;
use super::lane::kind_of;
use super::request::Template;
use super::shared::Multiplexed;
use super::{Answer, Failure};

/// One connection. Requests beyond the number of streams that the server allows wait inside of it, in order.
#[derive(Clone, Debug)]
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
}

impl Multiplexed for Connection {
    async fn open(opener: &Opener) -> Result<Connection, ConnectError> {
        match opener.stream().await? {
            Stream::Plain(stream) => shake(opener, stream).await,
            Stream::Tls(stream) => shake(opener, *stream).await,
        }
    }

    fn is_closed(&self) -> bool {
        self.sender.is_closed()
    }

    async fn exchange(mut self, template: &Template) -> Result<Answer, Failure> {
        let sent = Instant::now();
        let response = self.sender.try_send_request(template.h2()).await.map_err(|mut error| {
            let unprocessed = error.take_message().is_some() || is_unprocessed(error.error());
            Failure { unprocessed, kind: kind_of(error.error()) }
        })?;
        read(response, sent).await
    }
}

/// RFC 9113 8.7: its stream is above the last one that a GOAWAY names, or was refused. Other streams are not told of a
/// GOAWAY.
fn is_unprocessed(error: &hyper::Error) -> bool {
    let cause = error.source().and_then(|source| source.downcast_ref::<h2::Error>());
    cause.is_some_and(|cause| {
        let is_refused = cause.is_reset() && cause.reason() == Some(h2::Reason::REFUSED_STREAM);
        cause.is_remote() && (cause.is_go_away() || is_refused)
    })
}

async fn shake(
    opener: &Opener,
    stream: impl AsyncRead + AsyncWrite + Send + Unpin + 'static,
) -> Result<Connection, ConnectError> {
    let (sender, connection) =
        handshake(TokioExecutor::new(), TokioIo::new(stream)).await.map_err(ConnectError::Http)?;
    // What ends a connection is told to the requests on it.
    opener.drivers().spawn(async move { drop(connection.await) });
    Ok(Connection { sender })
}
