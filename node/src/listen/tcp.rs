//! HTTP/1.1 and HTTP/2 over TCP, with TLS and without.

use std::convert::Infallible;
use std::future::Future;
use std::hash::{BuildHasher, RandomState};
use std::io;
use std::net::SocketAddr;
use std::os::fd::AsRawFd;
use std::pin::{Pin, pin};
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::{Bytes, BytesMut};
use futures_util::FutureExt as _;
use http::header::{ALT_SVC, CONNECTION};
use http::{HeaderMap, HeaderValue};
use http_body_util::BodyExt;
use hyper::body::Incoming;
use hyper::server::conn::{http1, http2};
use hyper::service::service_fn;
use hyper_util::rt::{TokioIo, TokioTimer};
use rustix::process::{Resource, getrlimit};
use rustls::HandshakeKind;
use selvage_certs::{ACME_ALPN, FrontServers};
use selvage_config::front::{Front, has};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::task::JoinSet;
use tokio::time::{sleep, timeout};
use tokio_rustls::server::TlsStream;
use tokio_util::sync::CancellationToken;

use super::activity::Activity;
use super::body::{Inbound, Outbound};
use super::crowd::Crowd;
use super::dearth::Dearth;
use super::drive::{GRACE, Times, drive};
use super::forwarded::believe;
use super::h1::Messages;
use super::h1::connection::Connection;
use super::h1::head::Bounds;
use super::h2::Glitches;
use super::handshakes::{Handshake, Handshakes};
use super::patience::Patience;
use super::proxy;
use super::source::{Place, Sources, Transport};
use super::stream::{Judge, Stream};
use super::tasks::{Tasks, Together};
use super::tls;
use super::{CONNECTION_WINDOW_BYTES, STREAM_WINDOW_BYTES};
use crate::fault::{ClientFault, Fault};
use crate::names::Session;
use crate::request::{Protocol, Request};
use crate::serve::{Parts, refuse, serve};

/// What a client of HTTP/2 says first (RFC 9113 3.4).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n";
/// Descriptors of the process that clients may have, in a hundred: the rest is for apps, KV and the control plane.
const DESCRIPTORS_PERCENT: u64 = 80;
/// HTTP/2: pause between pings, and how long the answer may take.
const PING: (Duration, Duration) = (Duration::from_secs(30), Duration::from_secs(10));
/// HTTP/2: requests that a client took back before we looked at them.
const RESETS_PENDING_MAX: usize = 20;
/// HTTP/2: streams that we reset because of the client's errors.
const RESETS_LOCAL_MAX: usize = 128;
/// HTTP/2: bytes of an answer that wait for the client.
const SEND_BUFFER_BYTES: usize = 256 * 1024;
/// Bytes that the parser of HTTP/1.1 may add to a head that was judged: what it reads at once.
const PARSER_SLACK_BYTES: usize = 1_024;

/// What a listener speaks.
pub(super) enum Kind {
    /// TLS, then what ALPN agrees on.
    Tls {
        servers: Arc<FrontServers>,
        /// Where HTTP/3 is.
        alt_svc: HeaderValue,
    },
    /// What the first bytes say.
    Plain,
}

impl Kind {
    /// The name in the file, and in the log.
    fn as_str(&self) -> &'static str {
        match self {
            Self::Tls { .. } => "https",
            Self::Plain => "http",
        }
    }
}

/// A listener and what its connections have in common.
pub(super) struct Listening {
    pub(super) kind: Kind,
    pub(super) parts: Arc<Parts>,
    pub(super) sources: Arc<Sources>,
    pub(super) handshakes: Arc<Handshakes>,
}

/// What one connection's requests have in common.
struct Shared {
    parts: Arc<Parts>,
    sources: Arc<Sources>,
    client: SocketAddr,
    place: Place,
    protocol: Protocol,
    secure: bool,
    alt_svc: Option<HeaderValue>,
    /// What the handshake settled, where names differ.
    session: Option<Arc<Session>>,
    activity: Activity,
    crowd: Crowd,
}

/// Accepts until `stop`, then waits for the connections to end.
pub(super) async fn accept(listener: TcpListener, listening: Listening, stop: CancellationToken) {
    let listening = Arc::new(listening);
    let crowd = Crowd::new(listening.parts.front.connections_max as usize);
    let descriptors = descriptors_max();
    let mut connections = JoinSet::new();
    let take = |connections: &mut JoinSet<()>, tcp: TcpStream, peer| {
        // The system gives the lowest number that is free, so all below it are taken.
        if tcp.as_raw_fd() >= descriptors {
            listening.parts.metrics.connection_refused("descriptors");
            shed(&tcp);
        } else {
            connections.spawn(connection(tcp, peer, (Arc::clone(&listening), crowd.clone()), stop.clone()));
        }
    };
    let mut dearth = Dearth::at(listening.kind.as_str());
    loop {
        // Every branch may be dropped: each of the three futures loses nothing.
        tokio::select! {
            () = stop.cancelled() => break,
            Some(_) = connections.join_next() => {}
            accepted = listener.accept(), if crowd.count(connections.len()) => match accepted {
                Ok((tcp, peer)) => take(&mut connections, tcp, peer),
                Err(error) if is_of_connection(&error) => {}
                Err(error) => {
                    listening.parts.metrics.connection_refused("system");
                    dearth.pause(&error).await;
                }
            },
        }
    }
    // The system has made these already, and would reset them with the listener.
    while crowd.count(connections.len())
        && let Some(Ok((tcp, peer))) = listener.accept().now_or_never()
    {
        take(&mut connections, tcp, peer);
    }
    // From here on the system refuses connections.
    drop(listener);
    while connections.join_next().await.is_some() {}
}

/// The first descriptor that no client may have.
fn descriptors_max() -> i32 {
    let all = getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX);
    i32::try_from(all / 100 * DESCRIPTORS_PERCENT).unwrap_or(i32::MAX)
}

/// Whether it is the one connection that failed, not the listener.
fn is_of_connection(error: &io::Error) -> bool {
    use io::ErrorKind::{ConnectionAborted, ConnectionRefused, ConnectionReset, Interrupted};
    matches!(error.kind(), ConnectionAborted | ConnectionRefused | ConnectionReset | Interrupted)
}

/// Ends a connection by a reset when it is dropped: nothing of it stays in the system.
fn shed(tcp: &TcpStream) {
    // It fails for a connection that is gone already.
    let _ = tcp.set_zero_linger();
}

/// What comes of it, if it does not take much longer than until `stop`.
async fn in_time<T>(stop: &CancellationToken, doing: impl Future<Output = T>) -> Option<T> {
    let over = async {
        stop.cancelled().await;
        sleep(GRACE).await;
    };
    // The loser is dropped for good.
    tokio::select! {
        done = doing => Some(done),
        () = over => None,
    }
}

async fn connection(
    tcp: TcpStream,
    peer: SocketAddr,
    (listening, crowd): (Arc<Listening>, Crowd),
    stop: CancellationToken,
) {
    // In a box, as most of what it takes is taken only until the connection speaks.
    let begun = Box::pin(begin(tcp, peer, (&listening, crowd), stop)).await;
    let ended = match begun {
        Ok(Some(speaking)) => speaking.await,
        Ok(None) => Ok(()),
        Err(error) => Err(error),
    };
    if let Err(error) = ended {
        tracing::debug!(%peer, error = format!("{error:#}"), "connection ended");
    }
}

/// A connection that speaks its protocol, to its end.
type Speaking = Pin<Box<dyn Future<Output = anyhow::Result<()>> + Send>>;

/// What comes before a connection speaks its protocol. None: there is nothing to say.
async fn begin(
    mut tcp: TcpStream,
    peer: SocketAddr,
    (listening, crowd): (&Listening, Crowd),
    stop: CancellationToken,
) -> anyhow::Result<Option<Speaking>> {
    let Listening { kind, parts, sources, handshakes } = listening;
    let front = &parts.front;
    tcp.set_nodelay(true)?;
    let mut client = peer;
    if has(&front.proxy_protocol_from, peer.ip()) {
        let header = timeout(Duration::from_millis(front.head_ms), proxy::read(&mut tcp));
        let Some(header) = in_time(&stop, header).await else { return Ok(None) };
        let told = header?.inspect_err(|_| parts.metrics.connection_refused("proxy-header"))?;
        client = told.unwrap_or(peer);
    }
    let place = match sources.enter(client.ip(), Transport::Tcp) {
        Ok(place) => place,
        Err(full) => {
            parts.metrics.connection_refused(full.as_str());
            shed(&tcp);
            return Err(full.into());
        }
    };
    let activity = Activity::new();
    let (parts, sources) = (Arc::clone(parts), Arc::clone(sources));
    let (protocol, secure, alt_svc, session) = (Protocol::H1, false, None, None);
    let shared = Shared { parts, sources, client, place, protocol, secure, alt_svc, session, activity, crowd };
    match kind {
        Kind::Tls { servers, alt_svc } => {
            let Some(under_way) = handshakes.begin() else {
                shared.parts.metrics.connection_refused("handshakes");
                shed(&tcp);
                anyhow::bail!("too many handshakes");
            };
            over_tls(tcp, (servers, alt_svc, under_way), shared, stop).await
        }
        Kind::Plain => {
            let sniffing = timeout(Duration::from_millis(front.head_ms), sniff(&mut tcp));
            let Some(sniffed) = in_time(&stop, sniffing).await else { return Ok(None) };
            let (ahead, is_h2) = sniffed??;
            let protocol = if is_h2 { Protocol::H2 } else { Protocol::H1 };
            Ok(Some(speak((tcp, shed as fn(&TcpStream)), ahead, Shared { protocol, ..shared }, stop)))
        }
    }
}

async fn over_tls(
    tcp: TcpStream,
    (servers, alt_svc, under_way): (&FrontServers, &HeaderValue, Handshake),
    shared: Shared,
    stop: CancellationToken,
) -> anyhow::Result<Option<Speaking>> {
    let metrics = &shared.parts.metrics;
    // In a box, as most of what it takes is taken only by it.
    let shaking = Box::pin(tls::handshake(servers, tcp));
    let shaking = timeout(Duration::from_millis(shared.parts.front.handshake_ms), shaking);
    // A client that has said its part of it may have sent a request already.
    let Some(shaken) = in_time(&stop, shaking).await else { return Ok(None) };
    let (mut tls, told) = shaken.map_err(io::Error::from).flatten().inspect_err(|_| metrics.handshake("failed"))?;
    drop(under_way);
    let (_, session) = tls.get_ref();
    if session.alpn_protocol() == Some(ACME_ALPN) {
        // RFC 8737 3: the handshake was all that there is to see.
        let _ = timeout(Duration::from_millis(shared.parts.front.handshake_ms), tls.shutdown()).await;
        return Ok(None);
    }
    let is_resumed = session.handshake_kind() == Some(HandshakeKind::Resumed);
    metrics.handshake(if is_resumed { "resumed" } else { "full" });
    let protocol = if session.alpn_protocol() == Some(b"h2") { Protocol::H2 } else { Protocol::H1 };
    let alt_svc = told.as_ref().is_none_or(|told| told.has_h3()).then(|| alt_svc.clone());
    let (secure, activity) = (true, Activity::new());
    let give_up: fn(&TlsStream<TcpStream>) = |tls| shed(tls.get_ref().0);
    let shared = Shared { protocol, secure, alt_svc, session: told, activity, ..shared };
    Ok(Some(speak((tls, give_up), Bytes::new(), shared, stop)))
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

/// Speaks the connection's protocol to its end.
fn speak<S>(inner: (S, fn(&S)), ahead: Bytes, shared: Shared, stop: CancellationToken) -> Speaking
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let open = shared.parts.metrics.connection(shared.protocol);
    let front = Arc::clone(&shared.parts.front);
    let (activity, protocol, crowd) = (shared.activity.clone(), shared.protocol, shared.crowd.clone());
    let write_idle = Duration::from_millis(front.write_idle_ms);
    let patience = Patience::new(write_idle, front.bytes_per_second_min);
    let shared = Arc::new(shared);
    let spread = u32::try_from(RandomState::new().hash_one(0_u8) % 1_000).unwrap_or(0);
    match protocol {
        Protocol::H2 => {
            let judge = Judge::Glitches(Glitches::new(PREFACE.len()), front.glitches_max);
            let io = TokioIo::new(Stream::new(inner, ahead, judge, activity.clone(), patience));
            let tasks = Tasks::new(write_idle, front.bytes_per_second_min);
            let times = Times::new(&front, PREFACE.len() as u64, spread);
            // In a box at once: its task is moved some five times before it runs, and this is most of it.
            let service = service_fn(move |http| {
                let shared = Arc::clone(&shared);
                Box::pin(async move { Ok::<_, Infallible>(answer(&shared, http).await) })
            });
            // In a box of its own: moved into what drives it, it would have room there twice.
            let connection = Box::pin(h2_builder(&front, tasks.clone()).serve_connection(io, service));
            let mut connection = Together::new(connection, tasks);
            Box::pin(async move {
                let _open = open;
                drive(Pin::new(&mut connection), &activity, (&times, &crowd), stop).await
            })
        }
        _ => {
            let judge = Judge::Messages(Messages::new(bounds(&front)));
            let stream = Stream::new(inner, ahead, judge, activity.clone(), patience);
            let times = Times::new(&front, 0, spread);
            let service = service_fn(move |http| {
                let shared = Arc::clone(&shared);
                async move { Ok::<_, Infallible>(answer(&shared, http).await) }
            });
            let connection = Connection::new(h1_builder(&front), stream, service);
            Box::pin(async move {
                let _open = open;
                drive(pin!(connection), &activity, (&times, &crowd), stop).await
            })
        }
    }
}

fn bounds(front: &Front) -> Bounds {
    Bounds {
        head_bytes_max: front.head_bytes_max as usize,
        target_bytes_max: front.target_bytes_max as usize,
        fields_max: front.fields_max as usize,
    }
}

/// Time is kept by [`drive`]; the bounds are those of [`Messages`] once more.
fn h1_builder(front: &Front) -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder
        .timer(TokioTimer::new())
        .header_read_timeout(None)
        .max_header_size(front.head_bytes_max as usize + PARSER_SLACK_BYTES)
        .max_headers(front.fields_max as usize);
    builder
}

fn h2_builder(front: &Front, tasks: Tasks) -> http2::Builder<Tasks> {
    let mut builder = http2::Builder::new(tasks);
    builder
        .timer(TokioTimer::new())
        .max_concurrent_streams(front.streams_max)
        .max_header_list_size(front.head_bytes_max)
        .initial_stream_window_size(STREAM_WINDOW_BYTES)
        .initial_connection_window_size(CONNECTION_WINDOW_BYTES)
        .max_pending_accept_reset_streams(RESETS_PENDING_MAX)
        .max_local_error_reset_streams(RESETS_LOCAL_MAX)
        .max_send_buf_size(SEND_BUFFER_BYTES)
        .keep_alive_interval(PING.0)
        .keep_alive_timeout(PING.1);
    builder
}

async fn answer(shared: &Arc<Shared>, mut http: http::Request<Incoming>) -> http::Response<Outbound> {
    if let Some(session) = &shared.session {
        http.extensions_mut().insert(Arc::clone(session));
    }
    let (busy, count) = shared.activity.begin();
    let (front, activity) = (&shared.parts.front, &shared.activity);
    let patience = Patience::new(Duration::from_millis(front.body_idle_ms), front.bytes_per_second_min);
    let mut request = Request {
        http: http.map(|body| Inbound::patient(body, patience).boxed_unsync()),
        client: shared.client,
        protocol: shared.protocol,
        secure: shared.secure,
        arrived: Instant::now(),
    };
    believe(front, &mut request);
    let refused = match activity.fault(count) {
        None if !shared.sources.may_ask(&shared.place, request.client.ip()) => Some(ClientFault::TooMany),
        fault => fault,
    };
    let mut response = match refused {
        Some(fault) => refuse(&shared.parts, &request, &Fault::Client(fault)),
        None => serve(&shared.parts, request).await,
    };
    // RFC 9112 6.3: what comes after a message that broke a rule is nobody's. Its body may have done so since.
    let fault = activity.fault(count);
    if let (None, Some(fault)) = (refused, fault) {
        response = Fault::Client(fault).response();
    }
    tell_transport(shared, count, fault.is_some(), response.headers_mut());
    response.map(|body| Outbound::new(body, activity.clone(), busy))
}

/// Fields about the connection, which nothing above may set.
fn tell_transport(shared: &Shared, count: u64, is_last: bool, fields: &mut HeaderMap) {
    if let Some(alt_svc) = &shared.alt_svc {
        fields.insert(ALT_SVC, alt_svc.clone());
    }
    let front = &shared.parts.front;
    if shared.protocol == Protocol::H2 {
        if count >= front.streams_per_connection_max {
            shared.activity.urge();
        }
    } else if is_last || shared.activity.is_leaving() || count >= front.requests_per_connection_max {
        fields.insert(CONNECTION, HeaderValue::from_static("close"));
    }
}
