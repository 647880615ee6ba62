//! HTTP/1.1 and HTTP/2 over TCP, with TLS and without.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use http::header::{ALT_SVC, CONNECTION};
use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep, timeout};
use tokio_rustls::TlsAcceptor;
use tokio_util::sync::CancellationToken;

use super::body::{Inbound, Outbound};
use super::stream::{Activity, Stream};
use super::{
    CONNECTION_WINDOW_BYTES, CONNECTIONS_MAX, HANDSHAKE_MAX, HEAD_BYTES_MAX, HEAD_MAX, STREAM_WINDOW_BYTES, STREAMS_MAX,
};
use crate::request::{Protocol, Request};
use crate::serve::{Parts, serve};

/// What a client of HTTP/2 says first (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Pause after the system refused a connection for want of files or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(100);
/// Fields of an HTTP/1.1 head.
const FIELDS_MAX: usize = 100;
/// Requests of one HTTP/1.1 connection.
const REQUESTS_MAX: u64 = 1_000;
/// How long an HTTP/2 connection may be without a request. HTTP/1.1 has [`HEAD_MAX`] between two.
const IDLE_MAX: Duration = Duration::from_secs(60);
/// How often that is looked at.
const IDLE_CHECK: Duration = Duration::from_secs(5);
/// HTTP/2: pause between pings, and how long the answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));
/// HTTP/2: requests that a client took back before we looked at them.
const RESETS_PENDING_MAX: usize = 20;
/// HTTP/2: streams that we reset because of the client's errors.
const RESETS_LOCAL_MAX: usize = 128;
/// HTTP/2: bytes of an answer that wait for the client.
const SEND_BUFFER_BYTES: usize = 256 * 1024;

/// What a listener speaks.
pub(super) enum Kind {
    /// TLS, then what ALPN agrees on.
    Tls {
        acceptor: TlsAcceptor,
        /// Where HTTP/3 is.
        alt_svc: HeaderValue,
    },
    /// What the first bytes say.
    Plain,
}

/// What one connection's requests have in common.
struct Shared {
    parts: Arc<Parts>,
    client: SocketAddr,
    protocol: Protocol,
    secure: bool,
    alt_svc: Option<HeaderValue>,
    activity: Activity,
}

/// Accepts until `stop`, then waits for the connections to end.
pub(super) async fn accept(listener: TcpListener, kind: Kind, parts: Arc<Parts>, stop: CancellationToken) {
    let kind = Arc::new(kind);
    let mut connections = JoinSet::new();
    loop {
        // Every branch may be dropped: each of the three futures loses nothing.
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if connections.len() < CONNECTIONS_MAX => match accepted {
                Ok((tcp, client)) => {
                    let (kind, parts, stop) = (Arc::clone(&kind), Arc::clone(&parts), stop.clone());
                    connections.spawn(async move {
                        if let Err(error) = connection(tcp, client, &kind, parts, stop).await {
                            tracing::debug!(%client, error = format!("{error:#}"), "connection ended");
                        }
                    });
                }
                Err(error) if is_of_connection(&error) => {}
                Err(error) => {
                    tracing::warn!(%error, "no connection can be accepted");
                    sleep(ACCEPT_PAUSE).await;
                }
            },
        }
    }
    // From here on the system refuses connections.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// Whether it is the one connection that failed, not the listener.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

async fn connection(
    tcp: TcpStream,
    client: SocketAddr,
    kind: &Kind,
    parts: Arc<Parts>,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    tcp.set_nodelay(true)?;
    let activity = Activity::new();
    let mut shared =
        Shared { parts, client, protocol: Protocol::H1, secure: false, alt_svc: None, activity: activity.clone() };
    match kind {
        Kind::Tls { acceptor, alt_svc } => {
            let handshake = timeout(HANDSHAKE_MAX, acceptor.accept(tcp));
            let tls = tokio::select! {
                // Who has not shaken hands yet loses nothing.
                () = stop.cancelled() => return Ok(()),
                tls = handshake => tls??,
            };
            shared.secure = true;
            shared.alt_svc = Some(alt_svc.clone());
            if tls.get_ref().1.alpn_protocol() == Some(b"h2") {
                shared.protocol = Protocol::H2;
            }
            speak(Stream::new(tls, Bytes::new(), activity), shared, stop).await
        }
        Kind::Plain => {
            let mut tcp = tcp;
            let (ahead, is_h2) = tokio::select! {
                () = stop.cancelled() => return Ok(()),
                sniffed = timeout(HEAD_MAX, sniff(&mut tcp)) => sniffed??,
            };
            if is_h2 {
                shared.protocol = Protocol::H2;
            }
            speak(Stream::new(tcp, ahead, activity), shared, stop).await
        }
    }
}

/// Reads until it is clear whether this is HTTP/2's preface.
async fn sniff(tcp: &mut TcpStream) -> io::Result<(Bytes, bool)> {
    let mut ahead = BytesMut::with_capacity(PREFACE.len());
    while PREFACE.starts_with(&ahead) && ahead.len() < PREFACE.len() {
        let missing = (PREFACE.len() - ahead.len()) as u64;
        if (&mut *tcp).take(missing).read_buf(&mut ahead).await? == 0 {
            break;
        }
    }
    let is_h2 = ahead == PREFACE;
    Ok((ahead.freeze(), is_h2))
}

async fn speak<S>(stream: Stream<S>, shared: Shared, stop: CancellationToken) -> anyhow::Result<()>
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let _open = shared.parts.metrics.connection(shared.protocol);
    let activity = shared.activity.clone();
    let protocol = shared.protocol;
    let shared = Arc::new(shared);
    let service = service_fn(move |http| {
        let shared = Arc::clone(&shared);
        async move { Ok::<_, Infallible>(answer(&shared, http).await) }
    });
    let io = TokioIo::new(stream);
    match protocol {
        Protocol::H2 => {
            let tasks = Tasks::default();
            let connection = h2_builder(tasks.clone()).serve_connection(io, service);
            drive(connection, &activity, PREFACE.len() as u64, stop).await
        }
        _ => drive(h1_builder().serve_connection(io, service), &activity, 0, stop).await,
    }
}

fn h1_builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(HEAD_MAX)
        .max_header_size(HEAD_BYTES_MAX as usize)
        .max_headers(FIELDS_MAX);
    builder
}

fn h2_builder(tasks: Tasks) -> http2::Builder<Tasks> {
    let mut builder = http2::Builder::new(tasks);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(STREAMS_MAX)
        .max_header_list_size(HEAD_BYTES_MAX)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_pending_accept_reset_streams(RESETS_PENDING_MAX)
        .max_local_error_reset_streams(RESETS_LOCAL_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1);
    builder
}

/// A connection that can be asked to end.
trait Drain: Future<Output = hyper::Result<()>> {
    /// Takes no further request.
    fn drain(self: Pin<&mut Self>);
}

impl<I, S> Drain for http1::Connection<I, S>
where
    Self: Future<Output = hyper::Result<()>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<Incoming, ResBody = Outbound>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
{
    fn drain(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

impl<I, S> Drain for http2::Connection<I, S, Tasks>
where
    Self: Future<Output = hyper::Result<()>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<Incoming, ResBody = Outbound>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    Tasks: hyper::rt::bounds::Http2ServerConnExec<S::Future, Outbound>,
{
    fn drain(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

/// Runs a connection to its end. It is asked to end when the listener stops, when it has been idle for too long, and
/// when `opening` bytes have not come in time.
async fn drive(
    connection: impl Drain,
    activity: &Activity,
    opening: u64,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut connection = pin!(connection);
    let mut check = interval(IDLE_CHECK);
    check.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let mut ending = false;
    loop {
        // The connection is polled by reference; the others may be dropped.
        tokio::select! {
            ended = connection.as_mut() => return Ok(ended?),
            () = stop.cancelled(), if !ending => {
                ending = true;
                connection.as_mut().drain();
            }
            _ = check.tick() => {
                let (age, read_bytes) = activity.age();
                anyhow::ensure!(age < HEAD_MAX || read_bytes >= opening, "no preface");
                // Whoever does not go when asked is cut off the next time.
                anyhow::ensure!(!(ending && activity.idle() > IDLE_MAX + IDLE_CHECK), "idle");
                if !ending && activity.idle() > IDLE_MAX {
                    ending = true;
                    connection.as_mut().drain();
                }
            }
        }
    }
}

async fn answer(shared: &Arc<Shared>, http: http::Request<Incoming>) -> http::Response<Outbound> {
    let (busy, count) = shared.activity.begin();
    let request = Request {
        http: http.map(|body| Inbound::new(body).boxed_unsync()),
        client: shared.client,
        protocol: shared.protocol,
        secure: shared.secure,
        arrived: Instant::now(),
    };
    let mut response = serve(&shared.parts, request).await;
    tell_transport(shared, count, response.headers_mut());
    response.map(|body| Outbound::new(body, busy))
}

/// Fields about the connection, which nothing above may set.
fn tell_transport(shared: &Shared, count: u64, fields: &mut HeaderMap) {
    if let Some(alt_svc) = &shared.alt_svc {
        fields.insert(ALT_SVC, alt_svc.clone());
    }
    if shared.protocol == Protocol::H1 && count >= REQUESTS_MAX {
        fields.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}

/// The tasks of one HTTP/2 connection: one per request. They end with it.
#[derive(Clone, Default)]
struct Tasks {
    set: Arc<Mutex<JoinSet<()>>>,
}

impl<F> hyper::rt::Executor<F> for Tasks
where
    F: Future<Output = ()> + Send + 'static,
{
    fn execute(&self, task: F) {
        // Nothing panics while it holds the lock.
        let mut set = self.set.lock().unwrap_or_else(PoisonError::into_inner);
        while set.try_join_next().is_some() {}
        set.spawn(task);
    }
}
