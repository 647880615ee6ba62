//! Links: the sockets, in this file and the one below it.
//!
//! Every pair of nodes has one QUIC connection with one stream in both directions. The node whose name comes first
//! connects, again and again with a jittered wait; the other lets it in. Both verify the certificate by TLS and
//! then that it stands for the node they mean (dialing) or for one of the roster (accepting). A link ends when the
//! roster no longer has its peer, on isolation, and on any frame that is not one.
//!
//! The nodes of a placement have links of their own among each other, through the same sockets ([`door`]).

mod ask;
mod door;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use bytes::Bytes;
use quinn::crypto::rustls::NoInitialCipherSuite;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use rustls::pki_types::CertificateDer;
use selvage_certs::Role;
use selvage_config::{NodeName, PlacementName, Region};
use tokio::sync::{Semaphore, mpsc, watch};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::commit::Input;
use crate::replica::{PEER_QUEUE_FRAMES_MAX, TICK_MS};
use crate::roster::{PeerAddr, Roster};
use crate::store::{Identify, Tls};
use crate::wire;

use self::ask::Standing;
pub(crate) use self::ask::{Asked, Unanswered};
pub(crate) use self::door::Door;
use self::door::{Arrival, Greeted};
use crate::home::wire::Request;

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
    #[error("this node does not hold that placement")]
    NotHeld,
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

/// The links of one node, or those of a placement that it holds.
pub(crate) struct Link {
    door: Arc<Door>,
    own: NodeName,
    roster: watch::Sender<Roster>,
    standing: Arc<Standing>,
    supervisor: Mutex<Option<JoinHandle<()>>>,
}

/// What every task of the link needs.
struct Context {
    own: NodeName,
    region: Region,
    door: Arc<Door>,
    /// None: of all stores that are not placed.
    placement: Option<PlacementName>,
    inputs: mpsc::Sender<Input>,
    inbound: Arc<Semaphore>,
    standing: Arc<Standing>,
    sessions: AtomicU64,
}

impl Link {
    /// Binds the socket and starts the task that owns all others.
    pub(crate) fn start(
        node: (NodeName, Region),
        address: SocketAddr,
        tls: Option<Tls>,
        identify: Identify,
        inputs: mpsc::Sender<Input>,
        asked: mpsc::Sender<Asked>,
    ) -> Result<Self, LinkError> {
        let door = Door::open(address, tls.ok_or(LinkError::NoIdentity { address })?, identify)?;
        Ok(Self::through(Arc::new(door), node, None, inputs, asked))
    }

    /// Starts the links of a placement, through the sockets that are there.
    pub(crate) fn within(
        door: &Arc<Door>,
        node: (NodeName, Region),
        placement: PlacementName,
        inputs: mpsc::Sender<Input>,
        asked: mpsc::Sender<Asked>,
    ) -> Self {
        Self::through(Arc::clone(door), node, Some(placement), inputs, asked)
    }

    fn through(
        door: Arc<Door>,
        (own, region): (NodeName, Region),
        placement: Option<PlacementName>,
        inputs: mpsc::Sender<Input>,
        asked: mpsc::Sender<Asked>,
    ) -> Self {
        let (roster, wanted) = watch::channel(Roster::default());
        let standing = Arc::new(Standing::new(asked));
        let passed = placement.clone().map(|placement| door.hold(placement));
        let context = Arc::new(Context {
            own: own.clone(),
            region,
            door: Arc::clone(&door),
            placement,
            inputs,
            inbound: Arc::new(Semaphore::new(INBOUND_BYTES_MAX)),
            standing: Arc::clone(&standing),
            sessions: AtomicU64::new(1),
        });
        let supervisor = tokio::spawn(supervise(context, wanted, passed));
        Self { door, own, roster, standing, supervisor: Mutex::new(Some(supervisor)) }
    }

    /// The sockets.
    pub(crate) fn door(&self) -> &Arc<Door> {
        &self.door
    }

    pub(crate) fn local_addr(&self) -> SocketAddr {
        self.door.address()
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
        question: &Request,
        until: tokio::time::Instant,
    ) -> Result<Bytes, Unanswered> {
        self.standing.ask(peer, question, until).await
    }

    /// How long a packet to a peer and back takes; none without a link.
    pub(crate) fn round_trip(&self, peer: &NodeName) -> Option<Duration> {
        self.standing.round_trip(peer)
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

/// Owns all tasks of the link: one per peer to connect to, one per connection that came in.
async fn supervise(
    context: Arc<Context>,
    mut wanted: watch::Receiver<Roster>,
    mut passed: Option<mpsc::Receiver<Greeted>>,
) {
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
            arrival = context.door.arrival(&mut passed) => match arrival {
                None => break,
                Some(Arrival::Stranger(incoming)) => match Arc::clone(&handshakes).try_acquire_owned() {
                    Ok(permit) if !wanted.borrow().isolated => {
                        let (context, wanted) = (Arc::clone(&context), wanted.clone());
                        accepted.spawn(async move { accept(&context, *incoming, permit, wanted).await });
                    }
                    _ => (*incoming).refuse(),
                },
                Some(Arrival::Greeted(greeted)) => {
                    let (context, wanted) = (Arc::clone(&context), wanted.clone());
                    accepted.spawn(async move { welcome(&context, greeted, wanted).await });
                }
            },
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
    if context.placement.is_none() {
        context.door.close().await;
    }
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
        let placement = context.placement.as_ref();
        let connection = context.door.connect(peer.addr, &role.tls_name(), placement)?.await?;
        let node = identity(context, &connection)?;
        if node != peer.node {
            return Err(Ended::OtherNode(node));
        }
        let (mut send, receive) = connection.open_bi().await?;
        if let Some(placement) = placement {
            door::name(&mut send, placement).await?;
        }
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
        let (send, mut receive) = connection.accept_bi().await?;
        let placement = match door::is_of_placement(&connection) {
            true => Some(door::named(&mut receive).await?),
            false => None,
        };
        Ok((placement, Greeted { node, connection, send, receive }))
    };
    let ended = match timeout(Duration::from_millis(HANDSHAKE_MS), greet).await {
        Ok(Ok((None, greeted))) => {
            drop(handshake);
            return welcome(context, greeted, wanted).await;
        }
        Ok(Ok((Some(placement), greeted))) => match context.door.pass(&placement, greeted) {
            Ok(()) => return,
            Err(ended) => ended,
        },
        Ok(Err(ended)) => ended,
        Err(_) => Ended::Slow,
    };
    tracing::debug!(%address, error = ?ended, "link ended");
}

/// Serves a link that came in, if the roster has its other end.
async fn welcome(context: &Context, greeted: Greeted, wanted: watch::Receiver<Roster>) {
    let Greeted { node, connection, send, receive } = greeted;
    let address = connection.remote_address();
    let ended = if wanted.borrow().admits(&node) {
        let listed = node.clone();
        let unlisted = move |roster: &Roster| !roster.admits(&listed);
        serve(context, node, connection, send, receive, wanted.clone(), unlisted).await
    } else {
        connection.close(VarInt::from_u32(1), b"not in the roster");
        Ended::NotInRoster(node)
    };
    tracing::debug!(%address, error = ?ended, "link ended");
}

/// Whom the other end's verified certificate stands for.
fn identity(context: &Context, connection: &Connection) -> Result<NodeName, Ended> {
    let node = connection
        .peer_identity()
        .and_then(|identity| identity.downcast::<Vec<CertificateDer<'static>>>().ok())
        .and_then(|chain| context.door.identify(chain.first()?));
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
    let placement = context.placement.as_ref().map(PlacementName::as_str);
    tracing::info!(%peer, address = %connection.remote_address(), placement, "link stands");
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
