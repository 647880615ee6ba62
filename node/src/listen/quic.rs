//! HTTP/3 over QUIC.

use std::io;
use std::net::UdpSocket;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Buf, Bytes};
use h3::error::Code;
use h3::server::{RequestResolver, RequestStream};
use http::HeaderValue;
use http::header::{CONTENT_LENGTH, DATE};
use http_body_util::BodyExt;
use quinn::crypto::rustls::QuicServerConfig;
use quinn::{Endpoint, EndpointConfig, IdleTimeout, Incoming, ServerConfig, TokioRuntime, TransportConfig, VarInt};
use time::OffsetDateTime;
use time::format_description::{OwnedFormatItem, parse_owned};
use tokio::task::JoinSet;
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use super::body::{Half, Inbound, Streamed};
use super::frames::Connection;
use super::head::content_length;
use super::{
    CONNECTION_WINDOW_BYTES, CONNECTIONS_MAX, HANDSHAKE_MAX, HEAD_BYTES_MAX, HEAD_MAX, ListenError,
    STREAM_WINDOW_BYTES, STREAMS_MAX,
};
use crate::request::{Protocol, Request, Response};
use crate::serve::{Parts, serve};

/// RFC 9114 8.1: nothing went wrong.
pub(super) const NO_ERROR: VarInt = VarInt::from_u32(0x100);
/// RFC 9114 8.1: we can't go on.
const INTERNAL_ERROR: VarInt = VarInt::from_u32(0x102);
/// Streams of a client that are not requests: control, QPACK, and what it greases with.
const UNI_STREAMS_MAX: u32 = 8;
/// Bytes of answers that wait for the client's acknowledgement.
const SEND_WINDOW_BYTES: u64 = 2 * 1024 * 1024;
/// How long a connection may be silent, milliseconds.
const IDLE_MS: u32 = 30_000;
/// Handshakes that have begun but not been looked at.
const INCOMING_MAX: usize = 1_024;
/// Bytes that wait for one such handshake, and for all of them.
const INCOMING_BYTES: (u64, u64) = (64 * 1024, 16 * 1024 * 1024);
/// Handshakes under way from which on a client must show that its address is its own (RFC 9000 8.1.2).
const UNPROVEN_MAX: usize = 100;
/// How long a client may take nothing of an answer.
const WRITE_IDLE: Duration = Duration::from_secs(60);
/// Bytes of a request that nobody wanted that are read over after its answer.
const READ_OVER_BYTES_MAX: usize = 256 * 1024;
/// After the last request of a draining connection, time for the answer to get through and for the client to leave.
const LINGER: Duration = Duration::from_secs(1);

/// The form of Date (RFC 9110 5.6.7). TCP's parser sets it by itself.
static DATE_FORM: LazyLock<OwnedFormatItem> = LazyLock::new(|| {
    parse_owned::<2>("[weekday repr:short], [day] [month repr:short] [year] [hour]:[minute]:[second] GMT")
        .expect("a constant that any test parses")
});

type Server = h3::server::Connection<Connection, Bytes>;
type SendHalf = RequestStream<h3_quinn::SendStream<Bytes>, Bytes>;

/// QUIC's side of the configuration.
pub(super) fn server_config(tls: Arc<rustls::ServerConfig>) -> Result<ServerConfig, ListenError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(ListenError::Quic)?;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(STREAMS_MAX.into())
        .max_concurrent_uni_streams(UNI_STREAMS_MAX.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(SEND_WINDOW_BYTES)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(IDLE_MS))))
        .datagram_receive_buffer_size(None);
    let mut config = ServerConfig::with_crypto(Arc::new(crypto));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES.0)
        .incoming_buffer_size_total(INCOMING_BYTES.1);
    Ok(config)
}

/// QUIC on a socket.
pub(super) fn endpoint(config: ServerConfig, socket: UdpSocket) -> io::Result<Endpoint> {
    Endpoint::new(EndpointConfig::default(), Some(config), socket, Arc::new(TokioRuntime))
}

/// Accepts until `stop`, then waits for the connections to end.
pub(super) async fn accept(endpoint: Endpoint, parts: Arc<Parts>, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let unproven = Arc::new(AtomicUsize::new(0));
    loop {
        // Every branch may be dropped: an unaccepted handshake stays in the endpoint.
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            incoming = endpoint.accept(), if connections.len() < CONNECTIONS_MAX => {
                let Some(incoming) = incoming else { break };
                let crowded = unproven.load(Ordering::Relaxed) >= UNPROVEN_MAX;
                if crowded && !incoming.remote_address_validated() {
                    // Fails only for an address that has been validated.
                    let _ = incoming.retry();
                    continue;
                }
                let (parts, stop, unproven) = (Arc::clone(&parts), stop.clone(), Arc::clone(&unproven));
                connections.spawn(async move {
                    let client = incoming.remote_address();
                    if let Err(error) = connection(incoming, parts, &unproven, stop).await {
                        tracing::debug!(%client, error = format!("{error:#}"), "connection ended");
                    }
                });
            }
        }
    }
    // From here on handshakes are refused.
    endpoint.set_server_config(None);
    while connections.join_next().await.is_some() {}
}

/// Counts a handshake while it lasts.
struct Handshake<'a>(&'a AtomicUsize);

impl<'a> Handshake<'a> {
    fn new(count: &'a AtomicUsize) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(count)
    }
}

impl Drop for Handshake<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// Closes a connection whose task is cut off. quinn ends the streams of a dropped request as if they were whole, so
/// the connection must be gone before that.
struct CutOff(quinn::Connection);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.close(INTERNAL_ERROR, b"");
    }
}

async fn connection(
    incoming: Incoming,
    parts: Arc<Parts>,
    unproven: &AtomicUsize,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let handshake = Handshake::new(unproven);
    let opening = async {
        let quic = incoming.accept()?.await?;
        let mut builder = h3::server::builder();
        // Unset it is without bound, and a head of many short fields then makes the parser panic.
        builder.max_field_section_size(u64::from(HEAD_BYTES_MAX)).send_grease(false);
        let server: Server = builder.build(Connection::new(quic.clone())).await?;
        anyhow::Ok((quic, server))
    };
    let (quic, mut server) = timeout(HANDSHAKE_MAX, opening).await??;
    drop(handshake);
    let _open = parts.metrics.connection(Protocol::H3);
    let mut requests = JoinSet::new();
    let cut_off = CutOff(quic.clone());
    let mut ending = false;
    loop {
        // `accept` may be dropped: what it has read so far stays in the connection.
        tokio::select! {
            accepted = server.accept(), if requests.len() < STREAMS_MAX as usize => match accepted {
                Ok(Some(request)) => drop(requests.spawn(exchange(request, quic.clone(), Arc::clone(&parts)))),
                Ok(None) => break,
                Err(error) if error.is_h3_no_error() => break,
                Err(error) => return Err(error.into()),
            },
            Some(_) = requests.join_next() => {}
            () = stop.cancelled(), if !ending => {
                ending = true;
                // RFC 9114 5.2: the client may send what this does not cover to somebody else.
                server.shutdown(0).await?;
            }
            () = tokio::time::sleep(LINGER), if ending && requests.is_empty() => break,
        }
    }
    while requests.join_next().await.is_some() {}
    quic.close(NO_ERROR, b"");
    drop(cut_off);
    Ok(())
}

async fn exchange(resolver: RequestResolver<Connection, Bytes>, quic: quinn::Connection, parts: Arc<Parts>) {
    // A head that can't be read has been answered or reset by the parser.
    let Ok(Ok((head, stream))) = timeout(HEAD_MAX, resolver.resolve_request()).await else { return };
    let (send, receive) = stream.split();
    let length = head.headers().get(CONTENT_LENGTH).and_then(content_length);
    let (body, mut unread) = Streamed::new(receive, length);
    let body = Inbound::new(body);
    let request = Request {
        http: head.map(|()| body.boxed_unsync()),
        client: quic.remote_address(),
        protocol: Protocol::H3,
        secure: true,
        arrived: Instant::now(),
    };
    let mut sending = Sending { half: send, whole: false };
    let response = serve(&parts, request).await;
    if let Err(error) = sending.send(response).await {
        tracing::debug!(client = %quic.remote_address(), error = format!("{error:#}"), "answer given up");
    } else if let Ok(half) = unread.try_recv() {
        read_over(half).await;
    }
}

/// After the whole answer: what the client still sends is read over for a while, then it is asked to stop (RFC 9114 4.1).
async fn read_over(mut half: Half) {
    let mut read = 0;
    let reading = async {
        while read < READ_OVER_BYTES_MAX {
            match half.recv_data().await {
                Ok(Some(data)) => read += data.remaining(),
                Ok(None) | Err(_) => return true,
            }
        }
        false
    };
    if !timeout(LINGER, reading).await.unwrap_or(false) {
        half.stop_sending(Code::H3_NO_ERROR);
    }
}

/// An answer on its way. Dropped before its end it is reset, so that no client takes a part for the whole.
struct Sending {
    half: SendHalf,
    whole: bool,
}

impl Sending {
    async fn send(&mut self, response: Response) -> anyhow::Result<()> {
        let (mut head, mut body) = response.into_parts();
        head.headers.entry(DATE).or_insert_with(date);
        if let Some(length) = http_body::Body::size_hint(&body).exact().filter(|length| *length > 0) {
            head.headers.entry(CONTENT_LENGTH).or_insert_with(|| length.into());
        }
        let head = http::Response::from_parts(head, ());
        timeout(WRITE_IDLE, self.half.send_response(head)).await??;
        while let Some(frame) = body.frame().await {
            match frame?.into_data() {
                Ok(data) if data.is_empty() => {}
                Ok(data) => timeout(WRITE_IDLE, self.half.send_data(data)).await??,
                Err(frame) => {
                    if let Ok(trailers) = frame.into_trailers() {
                        timeout(WRITE_IDLE, self.half.send_trailers(trailers)).await??;
                        break;
                    }
                }
            }
        }
        timeout(WRITE_IDLE, self.half.finish()).await??;
        self.whole = true;
        Ok(())
    }
}

impl Drop for Sending {
    fn drop(&mut self) {
        if !self.whole {
            self.half.stop_stream(Code::H3_INTERNAL_ERROR);
        }
    }
}

/// Now, as Date tells it.
fn date() -> HeaderValue {
    let text = OffsetDateTime::from(SystemTime::now()).format(&*DATE_FORM).unwrap_or_default();
    HeaderValue::try_from(text).unwrap_or_else(|_| HeaderValue::from_static(""))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_date_has_the_form_of_the_standard() {
        let when = OffsetDateTime::from_unix_timestamp(784_111_777).unwrap();
        assert_eq!(when.format(&*DATE_FORM).unwrap(), "Sun, 06 Nov 1994 08:49:37 GMT");
        assert_eq!(date().len(), 29);
    }
}
