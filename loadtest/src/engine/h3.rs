//! HTTP/3. Each connection has a socket of its own, as each client in the world has.

use std::fmt;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::time::Instant;

use bytes::{Buf, Bytes};
use h3::client::SendRequest;
use h3::error::{Code, StreamError};
use quinn::{Endpoint, VarInt};

use crate::error::{ConnectError, ErrorKind};

use super::connect::Opener;
use super::request::Template;
use super::shared::Multiplexed;
use super::{Answer, Failure};

/// One connection. Requests beyond the number of streams that the server allows wait inside of it.
#[derive(Clone)]
pub(super) struct Connection {
    sender: SendRequest<h3_quinn::OpenStreams, Bytes>,
    quic: quinn::Connection,
}

impl Multiplexed for Connection {
    async fn open(opener: &Opener) -> Result<Connection, ConnectError> {
        let addr = opener.target().addr;
        let any: SocketAddr =
            if addr.is_ipv4() { (Ipv4Addr::UNSPECIFIED, 0).into() } else { (Ipv6Addr::UNSPECIFIED, 0).into() };
        let endpoint = Endpoint::client(any).map_err(ConnectError::Udp)?;
        let connecting = endpoint.connect_with(opener.quic(), addr, &opener.target().host);
        let quic = connecting.map_err(ConnectError::QuicStart)?.await.map_err(ConnectError::Quic)?;
        let (mut connection, sender) = h3::client::builder()
            .send_grease(false)
            .build(h3_quinn::Connection::new(quic.clone()))
            .await
            .map_err(ConnectError::H3)?;
        let closing = quic.clone();
        opener.drivers().spawn(async move {
            // Ends when the server closes, or when the last sender is dropped.
            connection.wait_idle().await;
            closing.close(no_error(), b"");
            endpoint.wait_idle().await;
        });
        Ok(Connection { sender, quic })
    }

    fn is_closed(&self) -> bool {
        self.quic.close_reason().is_some()
    }

    async fn exchange(mut self, template: &Template) -> Result<Answer, Failure> {
        let sent = Instant::now();
        let (head, body) = template.h3();
        let mut stream = self.sender.send_request(head).await.map_err(|error| Failure {
            kind: kind_of(&error),
            // The head goes out whole or, as far as the server can tell, not at all.
            unprocessed: matches!(error, StreamError::ConnectionError { .. } | StreamError::RemoteClosing { .. }),
        })?;
        let answered = async {
            if !body.is_empty() {
                stream.send_data(body).await?;
            }
            stream.finish().await?;
            stream.recv_response().await
        };
        let response = match answered.await {
            Ok(response) => response,
            Err(error) => {
                let unprocessed = is_rejected(&error) || (error.is_h3_no_error() && self.was_told_to_go().await);
                return Err(Failure { kind: kind_of(&error), unprocessed });
            }
        };
        let mut bytes = 0;
        let failed = |error: StreamError| Failure { kind: kind_of(&error), unprocessed: false };
        while let Some(data) = stream.recv_data().await.map_err(failed)? {
            bytes += data.remaining() as u64;
        }
        Ok(Answer { status: response.status().as_u16(), bytes, sent })
    }
}

impl Connection {
    /// Whether a server that has closed the connection without an error said GOAWAY before. Then it has answered all that
    /// it took (RFC 9114 5.2).
    async fn was_told_to_go(&mut self) -> bool {
        // The library tells it to whoever asks for more; on a closed connection nothing is sent.
        let more = self.sender.send_request(http::Request::new(())).await;
        self.quic.close_reason().is_some() && matches!(more, Err(StreamError::RemoteClosing { .. }))
    }
}

impl fmt::Debug for Connection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Connection").field("peer", &self.quic.remote_address()).finish_non_exhaustive()
    }
}

fn no_error() -> VarInt {
    VarInt::from_u64(Code::H3_NO_ERROR.value()).unwrap_or_default()
}

/// RFC 9114 4.1.1: the server did nothing with the request.
fn is_rejected(error: &StreamError) -> bool {
    matches!(error, StreamError::RemoteTerminate { code, .. } if *code == Code::H3_REQUEST_REJECTED)
}

fn kind_of(error: &StreamError) -> ErrorKind {
    match error {
        StreamError::ConnectionError { .. }
        | StreamError::RemoteTerminate { .. }
        | StreamError::RemoteClosing { .. } => ErrorKind::Closed,
        _ => ErrorKind::Protocol,
    }
}
