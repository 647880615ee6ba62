//! Links: the sockets, in this file and the one below it.
//!
//! Every pair of nodes has one QUIC connection with one stream in both directions. The node whose name comes first
//! connects, again and again with a jittered wait; the other lets it in. Both verify the certificate by TLS and
//! then that it stands for the node they mean (dialing) or for one of the roster (accepting). A link ends when the
//! roster no longer has its peer, on isolation, and on any frame that is not one.

mod ask;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::crypto::rustls::{NoInitialCipherSuite, QuicClientConfig, QuicServerConfig};
use quinn::{Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use selvage_certs::Role;
use selvage_config::{NodeName, Region};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::commit::Input;
use crate::replica::{PEER_QUEUE_FRAMES_MAX, TICK_MS};
use crate::roster::{PeerAddr, Roster};
use crate::store::{Identify, Tls};
use crate::wire;

pub(crate) use self::ask::{Asked, Unanswered};
use self::ask::{STREAMS_MAX, Standing};

/// First wait before connecting again, milliseconds. It doubles.
const BACKOFF_MS_MIN: u64 = 50;

/// Longest such wait, milliseconds.
const BACKOFF_MS_MAX: u64 = 2_000;

/// A link that stood this long was a good one: the next wait is the first again, milliseconds.
const STABLE_MS: u64 = 1_000;

/// How long a handshake and the opening of the stream may take, milliseconds.
const HANDSHAKE_MS: u64 = 5_000;

/// Handshakes of strangers at a time; more are refused.
const HANDSHAKES_MAX: usize = 64;

/// A link on which nothing arrives this long is dead, milliseconds.
const IDLE_MS: u32 = 3_000;

/// How often something is sent on an idle link, milliseconds.
const KEEP_ALIVE_MS: u64 = 600;

/// Bytes of received frames that may wait for the committer; then QUIC's flow control holds the peers back.
const INBOUND_BYTES_MAX: usize = 16 * 1024 * 1024;

/// How long a frame may take to arrive once its length has, milliseconds: it holds room that others wait for.
const FRAME_MS: u64 = 30_000;

/// Frames written to the stream at once.
const WRITE_FRAMES_MAX: usize = 64;

/// Frames of hello and catch-up, which the replica does not count against a queue's number of frames.
const EXTRA_FRAMES: usize = 64;

/// How long to wait for the links to end, milliseconds.
const CLOSE_MS: u64 = 2_000;

/// Why the link did not start.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// It shall listen and has no identity.
    #[error("the link listens on {address} and has no TLS identity")]
    NoIdentity {
        /// Where it shall listen.
        address: SocketAddr,
    },
    /// The TLS configuration can't be used with QUIC.
    #[error("TLS configuration for QUIC")]
    Tls(#[source] NoInitialCipherSuite),
    /// The socket could not be bound.
    #[error("bind {address}")]
    Bind {
        /// Where.
        address: SocketAddr,
        /// Why not.
        source: io::Error,
    },
}

/// Why one link ended or never stood.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("connect")]
    Connect(#[from] quinn::ConnectError),
    #[error("connection")]
    Connection(#[from] quinn::ConnectionError),
    #[error("took over {HANDSHAKE_MS} ms")]
    Slow,
    #[error("a frame took over {FRAME_MS} ms")]
    SlowFrame,
    #[error("the certificate stands for no node")]
    Unidentified,
    #[error("the certificate is of {0}")]
    OtherNode(NodeName),
    #[error("{0} is not in the roster")]
    NotInRoster(NodeName),
    #[error("read")]
    Read(#[from] quinn::ReadExactError),
    #[error("write")]
    Write(#[from] quinn::WriteError),
    #[error("frame")]
    Frame(#[from] wire::WireError),
    #[error("replaced or closed by the replica")]
    Replaced,
    #[error("the roster changed, or this node is isolated or closing")]
    Unlisted,
    #[error("the committer ended")]
    Committer,
}

/// The sockets of one node.
pub(crate) struct Link {
    address: SocketAddr,
    own: NodeName,
    roster: watch::Sender<Roster>,
    standing: Arc<Standing>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

/// What every task of the link needs.
struct Context {
    own: NodeName,
    region: Region,
    endpoint: Endpoint,
    identify: Identify,
    inputs: mpsc::Sender<Input>,
    inbound: Arc<Semaphore>,
    standing: Arc<Standing>,
    sessions: AtomicU64,
}

impl Link {
    /// Binds the socket and starts the task that owns all others.
    pub(crate) fn start(
        (own, region): (NodeName, Region),
        address: SocketAddr,
        tls: Option<Tls>,
        identify: Identify,
        inputs: mpsc::Sender<Input>,
        asked: mpsc::Sender<Asked>,
    ) -> Result<Self, LinkError> {
        let Tls { server, client, trust: _ } = tls.ok_or(LinkError::NoIdentity { address })?;
        let bind = |source| LinkError::Bind { address, source };
        let mut endpoint = Endpoint::server(server_config(&server)?, address).map_err(bind)?;
        endpoint.set_default_client_config(client_config(&client)?);
        let address = endpoint.local_addr().map_err(bind)?;
        let (roster, wanted) = watch::channel(Roster::default());
        let standing = Arc::new(Standing::new(asked));
        let context = Arc::new(Context {
            own: own.clone(),
            region,
            endpoint,
            identify,
            inputs,
            inbound: Arc::new(Semaphore::new(INBOUND_BYTES_MAX)),
            standing: Arc::clone(&standing),
            sessions: AtomicU64::new(1),
        });
        let supervisor = tokio::spawn(supervise(context, wanted));
        Ok(Self { address, own, roster, standing, supervisor: Mutex::new(Some(supervisor)) })
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn peers(&self) -> Vec<PeerAddr> {
        self.roster.borrow().peers.values().cloned().collect()
    }

    pub(crate) fn set_peers(&self, peers: Vec<PeerAddr>) {
        self.roster.send_modify(|roster| roster.set(&self.own, peers));
    }

    /// Asks a peer.
    pub(crate) async fn ask(
        &self,
        peer: &NodeName,
        question: Bytes,
        until: tokio::time::Instant,
    ) -> Result<Bytes, Unanswered> {
        self.standing.ask(peer, question, until).await
    }

    pub(crate) fn isolate(&self, on: bool) {
        self.roster.send_modify(|roster| roster.isolated = on);
    }

    pub(crate) async fn close(&self) {
        self.roster.send_modify(|roster| roster.closing = true);
        let supervisor = self.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(supervisor) = supervisor {
            let _ended_or_panicked = supervisor.await;
        }
    }
}

impl Drop for Link {
    /// Whoever forgot to close still leaves no task behind: the supervisor's end aborts its tasks.
    fn drop(&mut self) {
        if let Some(supervisor) = self.supervisor.lock().unwrap_or_else(PoisonError::into_inner).take() {
            supervisor.abort();
        }
    }
}

fn server_config(tls: &rustls::ServerConfig) -> Result<quinn::ServerConfig, LinkError> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    let crypto = QuicServerConfig::try_from(tls).map_err(LinkError::Tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

fn client_config(tls: &rustls::ClientConfig) -> Result<quinn::ClientConfig, LinkError> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![wire::ALPN.to_vec()];
    let crypto = QuicClientConfig::try_from(tls).map_err(LinkError::Tls)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_MS).into()))
        .keep_alive_interval(Some(Duration::from_millis(KEEP_ALIVE_MS)))
        .max_concurrent_bidi_streams(VarInt::from_u32(1 + STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None);
    transport
}

/// Owns all tasks of the link: one per peer to connect to, one per connection that came in.
async fn supervise(context: Arc<Context>, mut wanted: watch::Receiver<Roster>) {
    let mut dialing: JoinSet<NodeName> = JoinSet::new();
    let mut dialed: BTreeSet<NodeName> = BTreeSet::new();
    let mut accepted: JoinSet<()> = JoinSet::new();
    let handshakes = Arc::new(Semaphore::new(HANDSHAKES_MAX));
    let mut told: Option<BTreeMap<NodeName, Region>> = None;
    let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        // Each branch only waits for one thing and loses nothing if dropped.
        tokio::select! {
            changed = wanted.changed() => if changed.is_err() { break },
            Some(ended) = dialing.join_next() => {
                match ended {
                    Ok(node) => { dialed.remove(&node); }
                    // A panic of a task hides whose it was, so all are looked at again.
                    Err(error) => {
                        tracing::error!(%error, "a task of the link panicked");
                        dialing.shutdown().await;
                        dialed.clear();
                    }
                }
            }
            Some(_) = accepted.join_next() => {}
            _ = ticks.tick() => {
                // If the committer is behind by a full queue, one tick less does not matter.
                let _full = context.inputs.try_send(Input::Tick);
            }
            incoming = context.endpoint.accept() => {
                let Some(incoming) = incoming else { break };
                match Arc::clone(&handshakes).try_acquire_owned() {
                    Ok(permit) if !wanted.borrow().isolated => {
                        let (context, wanted) = (Arc::clone(&context), wanted.clone());
                        accepted.spawn(async move { accept(&context, incoming, permit, wanted).await });
                    }
                    _ => incoming.refuse(),
                }
            }
        }
        let roster = wanted.borrow_and_update().clone();
        if roster.closing {
            break;
        }
        let peers = roster.peers.values().map(|peer| (peer.node.clone(), peer.region.clone()));
        let members: BTreeMap<_, _> = peers.chain([(context.own.clone(), context.region.clone())]).collect();
        if told.as_ref() != Some(&members) && roster.known {
            // If the committer is behind by a full queue, the next turn tells it.
            if context.inputs.try_send(Input::Roster(members.clone())).is_ok() {
                told = Some(members);
            }
        }
        // The pair's first name connects.
        for peer in roster.peers.into_values().filter(|peer| context.own < peer.node) {
            if dialed.insert(peer.node.clone()) {
                let (context, wanted) = (Arc::clone(&context), wanted.clone());
                dialing.spawn(async move { dial(&context, peer, wanted).await });
            }
        }
    }
    // Every task sees that the roster is closing and ends; one that does not is aborted.
    let ended = async {
        while dialing.join_next().await.is_some() {}
        while accepted.join_next().await.is_some() {}
    };
    if timeout(Duration::from_millis(CLOSE_MS), ended).await.is_err() {
        tracing::warn!("links did not end in time");
    }
    dialing.shutdown().await;
    accepted.shutdown().await;
    context.endpoint.close(VarInt::from_u32(0), b"closing");
    let _late = timeout(Duration::from_millis(CLOSE_MS), context.endpoint.wait_idle()).await;
}

/// Keeps a link to one peer until the roster has it no longer as it is now.
async fn dial(context: &Context, peer: PeerAddr, mut wanted: watch::Receiver<Roster>) -> NodeName {
    let mut backoff_ms = BACKOFF_MS_MIN;
    loop {
        if wanted.wait_for(|roster| !roster.isolated || roster.closing).await.is_err() {
            return peer.node;
        }
        if !wanted.borrow().lists(&peer) {
            return peer.node;
        }
        let started = Instant::now();
        let ended = dial_once(context, &peer, wanted.clone()).await;
        tracing::debug!(peer = %peer.node, address = %peer.addr, error = ?ended, "link ended");
        if started.elapsed() >= Duration::from_millis(STABLE_MS) {
            backoff_ms = BACKOFF_MS_MIN;
        }
        let wait_ms = rand::random_range(backoff_ms / 2..=backoff_ms);
        backoff_ms = (backoff_ms * 2).min(BACKOFF_MS_MAX);
        let unlisted = wanted.wait_for(|roster| !roster.lists(&peer));
        // Waiting for the roster and for time: neither holds anything.
        let _either = timeout(Duration::from_millis(wait_ms), unlisted).await;
    }
}

async fn dial_once(context: &Context, peer: &PeerAddr, wanted: watch::Receiver<Roster>) -> Ended {
    let role = Role::Node { region: peer.region.clone(), node: peer.node.clone() };
    let connect = async {
        let connection = context.endpoint.connect(peer.addr, &role.tls_name())?.await?;
        let node = identity(context, &connection)?;
        if node != peer.node {
            return Err(Ended::OtherNode(node));
        }
        let (send, receive) = connection.open_bi().await?;
        Ok((connection, send, receive))
    };
    match timeout(Duration::from_millis(HANDSHAKE_MS), connect).await {
        Ok(Ok((connection, send, receive))) => {
            let listed = peer.clone();
            let unlisted = move |roster: &Roster| !roster.admits(&listed.node) || !roster.lists(&listed);
            serve(context, peer.node.clone(), connection, send, receive, wanted, unlisted).await
        }
        Ok(Err(ended)) => ended,
        Err(_) => Ended::Slow,
    }
}

async fn accept(
    context: &Context,
    incoming: quinn::Incoming,
    handshake: tokio::sync::OwnedSemaphorePermit,
    wanted: watch::Receiver<Roster>,
) {
    let address = incoming.remote_address();
    let greet = async {
        let connection = incoming.await?;
        let node = identity(context, &connection)?;
        if !wanted.borrow().admits(&node) {
            connection.close(VarInt::from_u32(1), b"not in the roster");
            return Err(Ended::NotInRoster(node));
        }
        let (send, receive) = connection.accept_bi().await?;
        Ok((node, connection, send, receive))
    };
    let ended = match timeout(Duration::from_millis(HANDSHAKE_MS), greet).await {
        Ok(Ok((node, connection, send, receive))) => {
            drop(handshake);
            let listed = node.clone();
            let unlisted = move |roster: &Roster| !roster.admits(&listed);
            serve(context, node, connection, send, receive, wanted.clone(), unlisted).await
        }
        Ok(Err(ended)) => ended,
        Err(_) => Ended::Slow,
    };
    tracing::debug!(%address, error = ?ended, "link ended");
}

/// Whom the other end's verified certificate stands for.
fn identity(context: &Context, connection: &Connection) -> Result<NodeName, Ended> {
    let node = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|chain| (context.identify)(chain.first()?));
    if node.is_none() {
        connection.close(VarInt::from_u32(1), b"unknown certificate");
    }
    node.ok_or(Ended::Unidentified)
}

/// Carries frames both ways until one way ends or the roster wants it no longer.
async fn serve(
    context: &Context,
    peer: NodeName,
    connection: Connection,
    send: SendStream,
    receive: RecvStream,
    mut wanted: watch::Receiver<Roster>,
    unlisted: impl FnMut(&Roster) -> bool,
) -> Ended {
    let session = context.sessions.fetch_add(1, Ordering::Relaxed);
    let (frames, queue) = mpsc::channel(PEER_QUEUE_FRAMES_MAX + EXTRA_FRAMES);
    let connected = Input::Connected { peer: peer.clone(), session, frames };
    if context.inputs.send(connected).await.is_err() {
        return Ended::Committer;
    }
    tracing::info!(%peer, address = %connection.remote_address(), "link stands");
    let _stands = context.standing.stands(&peer, session, &connection);
    // Whatever ends first ends the link: a frame cut off in the middle is never read as one.
    let ended = tokio::select! {
        ended = write(context, &peer, session, send, queue) => ended,
        ended = read(context, &peer, session, receive) => ended,
        ended = ask::answer(context, &peer, &connection) => ended,
        _ = wanted.wait_for(unlisted) => Ended::Unlisted,
    };
    connection.close(VarInt::from_u32(0), b"link ended");
    let _closing = context.inputs.send(Input::Disconnected { peer, session }).await;
    ended
}

async fn write(
    context: &Context,
    peer: &NodeName,
    session: u64,
    mut stream: SendStream,
    mut queue: mpsc::Receiver<Bytes>,
) -> Ended {
    let mut waiting = Vec::new();
    while queue.recv_many(&mut waiting, WRITE_FRAMES_MAX).await > 0 {
        let frames = waiting.len();
        let bytes = waiting.iter().map(Bytes::len).sum();
        if let Err(error) = stream.write_all_chunks(&mut waiting).await {
            return error.into();
        }
        waiting.clear();
        let sent = Input::Sent { peer: peer.clone(), session, frames, bytes };
        if context.inputs.send(sent).await.is_err() {
            return Ended::Committer;
        }
    }
    Ended::Replaced
}

async fn read(context: &Context, peer: &NodeName, session: u64, mut stream: RecvStream) -> Ended {
    loop {
        if let Err(ended) = read_frame(context, peer, session, &mut stream).await {
            return ended;
        }
    }
}

async fn read_frame(context: &Context, peer: &NodeName, session: u64, stream: &mut RecvStream) -> Result<(), Ended> {
    let mut field = [0; wire::LENGTH_BYTES];
    stream.read_exact(&mut field).await?;
    let length = wire::frame_length(field)?;
    // Room first, memory second.
    let permits = u32::try_from(length.max(1)).map_err(|_| wire::WireError::TooLong { bytes: length })?;
    let room = Arc::clone(&context.inbound).acquire_many_owned(permits).await.map_err(|_| Ended::Committer)?;
    let mut body = vec![0; length];
    let arrives = timeout(Duration::from_millis(FRAME_MS), stream.read_exact(&mut body));
    arrives.await.map_err(|_| Ended::SlowFrame)??;
    if let Some(message) = wire::decode(body.into())? {
        context.standing.heard(peer, session, &message);
        let received = Input::Received { peer: peer.clone(), session, message, _room: room };
        context.inputs.send(received).await.map_err(|_| Ended::Committer)?;
    }
    Ok(())
}
