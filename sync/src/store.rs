//! The KV as a node uses it.

mod chunks;
mod home;
mod placed;
mod sweep;
mod terms;
mod watch;
mod write;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::Duration;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use selvage_config::node::Kv as KeptBy;
use selvage_config::{NodeName, PlacementName, Region, StoreName};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::commit::{self, INPUTS_MAX, Input, SharedState};
use crate::engine::{Engine, EngineError, Settings, Stats, Usage, Vault};
use crate::entry::{KEY_BYTES_MAX, Key};
use crate::layout;
use crate::link::{Door, Link, LinkError};
use crate::offset::OFFSET_MS_MAX;
use crate::place;
use crate::read::{self, ReadError};
use crate::record::Record;
use crate::replica::{Counts, Replica, TICK_MS};
use crate::roster::PeerAddr;
use crate::session::Token;
use crate::trust::{Keyring, Nobody, Trust};

pub use crate::commit::now_ms;
use chunks::Manifest;
pub use chunks::{HIDDEN, LARGE_BYTES_MAX};
pub use home::{HomeCounts, HomeError};
pub(crate) use placed::PLACEMENTS;
pub use placed::{CACHE_BYTES_MAX, Elsewhere, Holding, PlacementCounts, PlacementError, PlacementStatus};
pub use terms::{Kept, METADATA_BYTES_MAX, Terms};
pub use watch::{Change, Watched};

/// Bytes of local writes that may wait for the committer. What is beyond is refused as overload.
const WRITES_BYTES_MAX: u32 = 32 * 1024 * 1024;

/// What a write counts besides its value, bytes. It bounds the number of small writes that wait to 4096.
const WRITE_OVERHEAD_BYTES: u32 = 8 * 1024;

/// Keys of one listing, at most.
pub const LIST_MAX: usize = 1000;

/// What a node's replicated KV needs to start.
pub struct Options {
    /// This node.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// Where its rows are kept.
    pub directory: PathBuf,
    /// Where its link listens; none: it is alone and has no peers.
    pub listen: Option<SocketAddr>,
    /// Who it is to its peers; needed if it listens.
    pub tls: Option<Tls>,
    /// What keeps the rows, and how much.
    pub kept: KeptBy,
}

impl Options {
    /// Of a KV that has no peers.
    pub fn alone(node: NodeName, region: Region, directory: PathBuf, kept: KeptBy) -> Self {
        Self { node, region, directory, listen: None, tls: None, kept }
    }
}

/// Both sides of mutual TLS between peers. The link sets the protocol on clones of them.
pub struct Tls {
    /// For peers that connect here. It must demand certificates.
    pub server: Arc<rustls::ServerConfig>,
    /// For connecting to peers. It must show a certificate.
    pub client: Arc<rustls::ClientConfig>,
    /// The same identity, for what is passed on without a link to it.
    pub trust: Arc<dyn Trust>,
}

/// Maps a peer's certificate, whose chain was verified, to the node it stands for.
pub type Identify = Arc<dyn Fn(&CertificateDer<'_>) -> Option<NodeName> + Send + Sync>;

/// Why the KV did not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The engine did not open.
    #[error("open the kv in {directory}")]
    Engine {
        /// Where.
        directory: PathBuf,
        /// Why.
        source: EngineError,
    },
    /// The link did not start.
    #[error("start the kv's link")]
    Link(#[from] LinkError),
    /// The thread that commits did not start.
    #[error("start the kv's committer")]
    Thread(#[source] std::io::Error),
}

/// Why an operation failed.
#[derive(Debug, Clone, thiserror::Error)]
pub enum KvError {
    /// A key, a value or metadata are too long.
    #[error("{what} of {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// `key`, `value` or `metadata`.
        what: &'static str,
        /// How long it is.
        bytes: usize,
        /// How long it may be.
        max: usize,
    },
    /// Too many writes wait; try again later.
    #[error("too many writes are waiting")]
    Overloaded,
    /// The record failed its checksum. A `set` or `delete` replaces it.
    #[error("record of {key:?} is corrupt")]
    Corrupt {
        /// The key.
        key: String,
    },
    /// The value can't be counted with: it is not 8 bytes, or the counter is full.
    #[error("value of {key:?} is not a counter, or the counter is full")]
    NotCounter {
        /// The key.
        key: String,
    },
    /// The store, or all together, has no room left for this. Deleting makes room.
    #[error("{what} holds {bytes} bytes of at most {max}")]
    Quota {
        /// Which store, or all.
        what: String,
        /// What it holds.
        bytes: u64,
        /// What it may hold.
        max: u64,
    },
    /// The node's disk is nearly full: it only reads.
    #[error("the node's disk is nearly full")]
    Full(#[source] EngineError),
    /// A key that begins with [`HIDDEN`], which is for the chunks of large values.
    #[error("keys that begin with U+10FFFF are not for users")]
    Hidden,
    /// Not all of a large value has arrived here yet.
    #[error("value of {key:?} has not arrived as a whole yet")]
    Incomplete {
        /// The key.
        key: String,
    },
    /// What stands there is not what was expected.
    #[error("value of {key:?} is another by now")]
    Changed {
        /// The key.
        key: String,
    },
    /// This node's clock is too far from the others': it takes no writes until that is mended.
    #[error("this node's clock is unsafe: {ahead_ms} ms behind the fleet's")]
    ClockUnsafe {
        /// How far the fleet's time is ahead.
        ahead_ms: i64,
    },
    /// Too many nodes wrote siblings of a key.
    #[error("too many nodes wrote beside each other in {key:?}")]
    Crowded {
        /// The key.
        key: String,
    },
    /// The store has a home that did not do it.
    #[error(transparent)]
    Home(#[from] HomeError),
    /// The store is held elsewhere, and could not be asked there.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// The KV was closed.
    #[error("the kv is closed")]
    Closed,
    /// The storage engine failed.
    #[error("storage engine")]
    Engine(#[source] EngineError),
}

/// How it stands with a peer of the roster.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PeerStatus {
    /// Its name.
    pub node: NodeName,
    /// Where it stands.
    pub region: Region,
    /// Whether there is a link.
    pub connected: bool,
    /// Bytes that wait to be sent to it.
    pub queued_bytes: usize,
    /// How many of this node's writes it has not acknowledged; unknown without a link.
    pub lag: Option<u64>,
    /// When it last said something on this link, milliseconds since the Unix epoch.
    pub heard_ms: Option<u64>,
    /// How far its clock is ahead of this node's, milliseconds, if that is known.
    pub ahead_ms: Option<i64>,
    /// Since when it keeps this node from collecting, milliseconds since the Unix epoch; none: it does not. It has something
    /// else of what no promise covers, knows another roster, or has said nothing.
    pub apart_since_ms: Option<u64>,
}

/// How it stands with this node.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Whether all that any connected peer had a second ago is here.
    pub caught_up: bool,
    /// How far the fleet's time is ahead of this node's clock, milliseconds.
    pub ahead_ms: i64,
    /// Every delete up to this was processed here, milliseconds since the Unix epoch.
    pub cut_ms: u64,
    /// What ended before this was collected here, milliseconds since the Unix epoch.
    pub floor_ms: u64,
    /// What was counted since the start.
    pub counts: Counts,
}

impl Progress {
    /// Whether this node shall take traffic: it has what the others have, and the right time.
    pub fn is_ready(&self) -> bool {
        self.caught_up && self.ahead_ms.unsigned_abs() <= OFFSET_MS_MAX
    }
}

/// A key with facts on its newest entry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listed {
    /// The key.
    pub name: String,
    /// The length of its value.
    pub bytes: usize,
    /// When it was written, milliseconds since the Unix epoch.
    pub stamp_ms: u64,
    /// Who wrote it; none if the record is corrupt.
    pub node: Option<NodeName>,
}

/// A handle to the KV. Clones share it.
#[derive(Clone)]
pub struct Kv {
    shared: Arc<Shared>,
}

struct Shared {
    node: NodeName,
    region: Region,
    directory: PathBuf,
    trust: Arc<dyn Trust>,
    vault: Arc<Vault>,
    kept: KeptBy,
    inputs: mpsc::Sender<Input>,
    room: Arc<Semaphore>,
    state: SharedState,
    link: Option<Link>,
    told: home::Told,
    placed: placed::Placed,
    tasks: Mutex<Vec<tokio::task::JoinHandle<()>>>,
    committer: Mutex<Option<JoinHandle<()>>>,
}

/// What any KV of a node needs.
struct Base {
    node: NodeName,
    region: Region,
    directory: PathBuf,
    trust: Arc<dyn Trust>,
    kept: KeptBy,
}

/// How a KV has peers.
enum Through {
    /// It has none.
    Nobody,
    /// By sockets of its own.
    Sockets(SocketAddr, Option<Tls>, Identify),
    /// By the sockets of another, as that of a placement.
    Door(Arc<Door>, PlacementName),
}

impl Kv {
    /// Opens the rows in the directory and, if it shall listen, the link. It has no peers yet.
    pub async fn open(options: Options, identify: Identify) -> Result<Self, OpenError> {
        let Options { node, region, directory, listen, tls, kept } = options;
        let nobody = || Arc::new(Nobody) as Arc<dyn Trust>;
        let trust = tls.as_ref().map_or_else(nobody, |tls| Arc::clone(&tls.trust));
        let through = listen.map_or(Through::Nobody, |address| Through::Sockets(address, tls, identify));
        let kv = Self::begin(Base { node, region, directory, trust, kept }, through).await?;
        // Placements are opened by the one KV that all others of a node belong to.
        let placing = placed::start(&kv.shared);
        kv.shared.tasks.lock().unwrap_or_else(PoisonError::into_inner).push(placing);
        Ok(kv)
    }

    async fn begin(base: Base, through: Through) -> Result<Self, OpenError> {
        let Base { node, region, directory, trust, kept } = base;
        tracing::debug!(%node, %region, directory = %directory.display(), "opening the kv");
        let (own, place, discarded) = (node.clone(), directory.clone(), directory.join("discarded"));
        let (settings, keyring) =
            (Settings::from(&kept), Keyring { trust: Arc::clone(&trust), chance: rand::random() });
        let opened = tokio::task::spawn_blocking(move || {
            let failed = |source| OpenError::Engine { directory: place.clone(), source };
            let vault = Arc::new(Vault::open(&place, settings).map_err(failed)?);
            let engine = Arc::clone(&vault) as Arc<dyn Engine>;
            let mark = place::of(&place).map_err(|source| failed(EngineError::new("open", source)))?;
            let replica = Replica::open(Arc::clone(&engine), own, &mark, now_ms(), keyring);
            Ok::<_, OpenError>((vault, replica.map_err(failed)?))
        });
        let (vault, replica) = opened.await.map_err(|error| OpenError::Thread(std::io::Error::other(error)))??;
        let (inputs, received) = mpsc::channel(INPUTS_MAX);
        let (ask, asked) = mpsc::channel(home::ASKED_MAX);
        let who = (node.clone(), region.clone());
        let link = match through {
            Through::Sockets(address, tls, identify) => {
                Some(Link::start(who, address, tls, identify, inputs.clone(), ask)?)
            }
            Through::Door(door, placement) => Some(Link::within(&door, who, placement, inputs.clone(), ask)),
            Through::Nobody => {
                // Alone, it is the whole roster.
                let _full = inputs.try_send(Input::Roster([who].into()));
                None
            }
        };
        // Nothing else makes time pass where there is no link.
        let ticks = link.is_none().then(|| tokio::spawn(tick(inputs.downgrade())));
        let state = SharedState::default();
        let thread = std::thread::Builder::new().name("selvage-kv".into());
        let (rows, shown) = (Arc::clone(&vault) as Arc<dyn Engine>, Arc::clone(&state));
        let run = move || commit::run(replica, rows, received, shown, discarded);
        let committer = thread.spawn(run).map_err(OpenError::Thread)?;
        let shared = Arc::new(Shared {
            node,
            region,
            directory,
            trust,
            vault,
            kept,
            inputs,
            room: Arc::new(Semaphore::new(WRITES_BYTES_MAX as usize)),
            state,
            link,
            told: home::Told::default(),
            placed: placed::Placed::default(),
            tasks: Mutex::new(ticks.into_iter().collect()),
            committer: Mutex::new(Some(committer)),
        });
        let own = [sweep::start(&shared), home::start(&shared), home::serve(&shared, asked)];
        shared.tasks.lock().unwrap_or_else(PoisonError::into_inner).extend(own);
        Ok(Self { shared })
    }

    /// The UDP address of the link.
    pub fn local_addr(&self) -> Option<SocketAddr> {
        self.shared.link.as_ref().map(Link::local_addr)
    }

    /// Sets the roster. Links to nodes that are no longer in it end; others in it are connected to or let in.
    pub fn set_peers(&self, peers: Vec<PeerAddr>) {
        if let Some(link) = &self.shared.link {
            link.set_peers(peers);
        }
        self.place_anew();
    }

    /// Ends all links and refuses new ones until it is turned off again.
    pub fn partition(&self, on: bool) {
        if let Some(link) = &self.shared.link {
            link.isolate(on);
        }
        self.meshes().values().for_each(|mesh| mesh.partition(on));
    }

    /// The value of a key. A counter's is 8 bytes, little-endian. It may be seen here before it is durable.
    pub fn get(&self, store: &StoreName, key: &str) -> Result<Option<Bytes>, KvError> {
        is_shown(key)?;
        let Some(mut value) = self.raw(store, key)? else { return Ok(None) };
        loop {
            let whole = self.whole(store, key, &value).map(Some);
            let Err(KvError::Incomplete { .. }) = &whole else { return whole };
            // Its chunks may have gone with it while they were read: another value is there then, or none.
            let Some(now) = self.raw(store, key)? else { return Ok(None) };
            if now == value {
                return whole;
            }
            value = now;
        }
    }

    /// All values of a key that stand side by side.
    pub fn siblings(&self, store: &StoreName, key: &str) -> Result<Vec<Bytes>, KvError> {
        is_shown(key)?;
        let values = self.record(store, key)?.siblings(now_ms());
        values.into_iter().map(|value| self.whole(store, key, &value)).collect()
    }

    /// Waits until this node has all that a session saw. Dropping the future ends the wait.
    pub async fn wait_for(&self, token: Token) -> Result<(), KvError> {
        let (reply, done) = oneshot::channel();
        self.shared.inputs.send(Input::Await { token, reply }).await.map_err(|_| KvError::Closed)?;
        done.await.map_err(|_| KvError::Overloaded)
    }

    /// The value as the record has it.
    fn raw(&self, store: &StoreName, key: &str) -> Result<Option<Bytes>, KvError> {
        Ok(self.record(store, key)?.value(now_ms()))
    }

    /// A value with its chunks.
    fn whole(&self, store: &StoreName, key: &str, stored: &Bytes) -> Result<Bytes, KvError> {
        match Manifest::of(stored) {
            Some(manifest) => self.get_chunks(store, key, &manifest),
            None => Ok(terms::parts(stored).1),
        }
    }

    /// Whether the key exists.
    pub fn exists(&self, store: &StoreName, key: &str) -> Result<bool, KvError> {
        is_shown(key)?;
        Ok(self.record(store, key)?.exists(now_ms()))
    }

    /// The existing keys that begin with `prefix` and come after `after`, in order; [`LIST_MAX`] at most.
    pub fn list(
        &self,
        store: &StoreName,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, KvError> {
        let now = now_ms();
        let found = read::list(self.shared.vault.as_ref(), store, prefix, after, limit.min(LIST_MAX), now);
        Ok(shown(found.map_err(KvError::Engine)?).map(|found| found.name).collect())
    }

    /// As [`Kv::list`], with facts on each.
    pub fn list_entries(
        &self,
        store: &StoreName,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, KvError> {
        let now = now_ms();
        let found = read::list(self.shared.vault.as_ref(), store, prefix, after, limit.min(LIST_MAX), now);
        Ok(shown(found.map_err(KvError::Engine)?).map(|found| listed(found, now)).collect())
    }

    /// How it stands with every peer of the roster.
    pub fn status(&self) -> Vec<PeerStatus> {
        let Some(link) = &self.shared.link else { return Vec::new() };
        let state = self.shared.state.read().unwrap_or_else(PoisonError::into_inner);
        let (health, apart) = (state.peers.clone(), state.apart.clone());
        drop(state);
        let status = |peer: PeerAddr| {
            let known = health.iter().find(|known| known.node == peer.node);
            PeerStatus {
                apart_since_ms: apart.get(&peer.node).copied(),
                node: peer.node,
                region: peer.region,
                connected: known.is_some(),
                queued_bytes: known.map_or(0, |known| known.queued_bytes),
                lag: known.map(|known| known.lag),
                heard_ms: known.map(|known| known.heard_ms),
                ahead_ms: known.and_then(|known| known.ahead_ms),
            }
        };
        link.peers().into_iter().map(status).collect()
    }

    /// How it stands with this node.
    pub fn progress(&self) -> Progress {
        let state = self.shared.state.read().unwrap_or_else(PoisonError::into_inner);
        Progress {
            caught_up: state.caught_up,
            ahead_ms: state.ahead_ms,
            cut_ms: state.reach.cut.ms(),
            floor_ms: state.reach.floor.ms(),
            counts: state.counts,
        }
    }

    /// Whether nobody else holds this store: its files are free as soon as this handle is dropped.
    pub fn is_last_handle(&self) -> bool {
        Arc::strong_count(&self.shared) == 1 && self.meshes().values().all(|mesh| mesh.is_last_handle())
    }

    /// Ends the links, flushes and ends the committer. Reads go on working; writes fail.
    pub async fn close(&self) {
        self.close_placements().await;
        if let Some(link) = &self.shared.link {
            link.close().await;
        }
        let _already_closed = self.shared.inputs.send(Input::Close).await;
        let committer = self.shared.committer.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(committer) = committer {
            let joined = tokio::task::spawn_blocking(move || committer.join()).await;
            if !matches!(joined, Ok(Ok(()))) {
                tracing::error!("the kv's committer did not end well");
            }
        }
    }

    /// What a store takes here.
    pub fn usage(&self, store: &StoreName) -> Usage {
        self.shared.vault.usage(&layout::records(store)).unwrap_or_default()
    }

    /// How the engine stands.
    pub fn stats(&self) -> Result<Stats, KvError> {
        self.shared.vault.stats().map_err(KvError::Engine)
    }

    fn record(&self, store: &StoreName, key: &str) -> Result<Record, KvError> {
        check("key", key.len(), KEY_BYTES_MAX)?;
        let key = Key { store: store.clone(), name: key.to_owned() };
        read::record(self.shared.vault.as_ref(), &key).map_err(|error| match error {
            ReadError::Corrupt(_) => {
                // Whoever has it sends it. If too much waits, the next reader asks.
                let _full = self.shared.inputs.try_send(Input::Heal(key.clone()));
                KvError::Corrupt { key: key.name }
            }
            ReadError::Engine(error) => KvError::Engine(error),
        })
    }
}

/// Keys of chunks are nobody's.
fn is_shown(key: &str) -> Result<(), KvError> {
    if key.starts_with(HIDDEN) { Err(KvError::Hidden) } else { Ok(()) }
}

/// What users see of a listing: the keys of chunks are behind all others.
fn shown(found: Vec<read::Found>) -> impl Iterator<Item = read::Found> {
    found.into_iter().take_while(|found| !found.name.starts_with(HIDDEN))
}

impl Drop for Shared {
    fn drop(&mut self) {
        let tasks = self.tasks.get_mut().unwrap_or_else(PoisonError::into_inner);
        tasks.iter().for_each(tokio::task::JoinHandle::abort);
    }
}

/// Lets time pass for a node without a link, as long as it is open.
async fn tick(inputs: mpsc::WeakSender<Input>) {
    let mut ticks = tokio::time::interval(Duration::from_millis(TICK_MS));
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Skip);
    loop {
        ticks.tick().await;
        let Some(inputs) = inputs.upgrade() else { return };
        // If the committer is behind by a full queue, one tick less does not matter.
        if let Err(mpsc::error::TrySendError::Closed(_)) = inputs.try_send(Input::Tick) {
            return;
        }
    }
}

fn check(what: &'static str, bytes: usize, max: usize) -> Result<(), KvError> {
    if bytes > max { Err(KvError::TooLarge { what, bytes, max }) } else { Ok(()) }
}

fn listed(found: read::Found, now: u64) -> Listed {
    let record = found.record.unwrap_or_default();
    let newest = record.newest();
    Listed {
        bytes: record
            .value(now)
            .map_or(0, |value| Manifest::of(&value).map_or(terms::parts(&value).1.len(), |manifest| manifest.bytes())),
        stamp_ms: newest.map_or(0, |entry| entry.version.stamp.ms()),
        node: newest.map(|entry| entry.version.dot.origin.node.clone()),
        name: found.name,
    }
}
