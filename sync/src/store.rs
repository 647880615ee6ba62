//! The KV as a node uses it.

mod chunks;
mod watch;

use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::JoinHandle;

use bytes::Bytes;
use rustls::pki_types::CertificateDer;
use selvage_config::node::Kv as KeptBy;
use selvage_config::{NodeName, Region, StoreName};
use tokio::sync::{Semaphore, mpsc, oneshot};

use crate::commit::{self, INPUTS_MAX, Input, SharedHealth};
use crate::engine::{Engine, EngineError, Settings, Stats, Usage, Vault};
use crate::entry::{KEY_BYTES_MAX, Key};
use crate::layout;
use crate::link::{Link, LinkError};
use crate::read::{self, ReadError};
use crate::record::Record;
use crate::replica::{Replica, Write};
use crate::roster::PeerAddr;

use chunks::Manifest;
pub use chunks::{HIDDEN, LARGE_BYTES_MAX};
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

/// Both sides of mutual TLS between peers. The link sets the protocol on clones of them.
pub struct Tls {
    /// For peers that connect here. It must demand certificates.
    pub server: Arc<rustls::ServerConfig>,
    /// For connecting to peers. It must show a certificate.
    pub client: Arc<rustls::ClientConfig>,
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
    /// A key or value is too long.
    #[error("{what} of {bytes} bytes, the limit is {max}")]
    TooLarge {
        /// `key` or `value`.
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
    vault: Arc<Vault>,
    kept: KeptBy,
    inputs: mpsc::Sender<Input>,
    room: Arc<Semaphore>,
    health: SharedHealth,
    link: Option<Link>,
    committer: Mutex<Option<JoinHandle<()>>>,
}

impl Kv {
    /// Opens the rows in the directory and, if it shall listen, the link. It has no peers yet.
    pub async fn open(options: Options, identify: Identify) -> Result<Self, OpenError> {
        let Options { node, region, directory, listen, tls, kept } = options;
        tracing::debug!(%node, %region, directory = %directory.display(), "opening the kv");
        let (own, replica_node) = (node.clone(), node.clone());
        let settings = Settings::from(&kept);
        let opened = tokio::task::spawn_blocking(move || {
            let failed = |source| OpenError::Engine { directory: directory.clone(), source };
            let vault = Arc::new(Vault::open(&directory, settings).map_err(failed)?);
            let engine = Arc::clone(&vault) as Arc<dyn Engine>;
            let replica = Replica::open(Arc::clone(&engine), replica_node, commit::now_ms(), rand::random());
            Ok::<_, OpenError>((vault, replica.map_err(failed)?))
        });
        let (vault, replica) = opened.await.map_err(|error| OpenError::Thread(std::io::Error::other(error)))??;
        let (inputs, received) = mpsc::channel(INPUTS_MAX);
        let link = match listen {
            Some(address) => Some(Link::start(node, address, tls, identify, inputs.clone())?),
            None => None,
        };
        let health = SharedHealth::default();
        let thread = std::thread::Builder::new().name("selvage-kv".into());
        let (rows, shown) = (Arc::clone(&vault) as Arc<dyn Engine>, Arc::clone(&health));
        let committer = thread.spawn(move || commit::run(replica, rows, received, shown)).map_err(OpenError::Thread)?;
        let shared = Shared {
            node: own,
            vault,
            kept,
            inputs,
            room: Arc::new(Semaphore::new(WRITES_BYTES_MAX as usize)),
            health,
            link,
            committer: Mutex::new(Some(committer)),
        };
        Ok(Self { shared: Arc::new(shared) })
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
    }

    /// Ends all links and refuses new ones until it is turned off again.
    pub fn partition(&self, on: bool) {
        if let Some(link) = &self.shared.link {
            link.isolate(on);
        }
    }

    /// The value of a key. A counter's is 8 bytes, little-endian. It may be seen here before it is durable.
    pub fn get(&self, store: &StoreName, key: &str) -> Result<Option<Bytes>, KvError> {
        is_shown(key)?;
        let Some(value) = self.raw(store, key)? else { return Ok(None) };
        match Manifest::of(&value) {
            Some(manifest) => self.get_chunks(store, key, &manifest).map(Some),
            None => Ok(Some(value)),
        }
    }

    /// The value as the record has it.
    fn raw(&self, store: &StoreName, key: &str) -> Result<Option<Bytes>, KvError> {
        Ok(self.record(store, key)?.value())
    }

    /// Whether the key exists.
    pub fn exists(&self, store: &StoreName, key: &str) -> Result<bool, KvError> {
        is_shown(key)?;
        Ok(self.record(store, key)?.exists())
    }

    /// Sets a key. It is durable here when this returns, and on its way to the peers.
    pub async fn set(&self, store: &StoreName, key: &str, value: Bytes) -> Result<(), KvError> {
        self.replace(store, key, Some(value), None).await
    }

    /// Sets a key if its value is `seen` at that moment; whether it was. Between the comparison and the write nothing
    /// comes, neither a local write nor one of a peer. What is on its way from a peer is not seen: in the order of
    /// stamps it may come before this, and is then lost, as by any later `set`. So it is no lock between nodes.
    pub async fn swap(&self, store: &StoreName, key: &str, seen: Option<&[u8]>, value: Bytes) -> Result<bool, KvError> {
        let raw = match self.record(store, key) {
            Ok(record) => record.value(),
            Err(error) => return Err(error),
        };
        let manifest = raw.as_ref().and_then(Manifest::of);
        let stands = match (&manifest, &raw) {
            (Some(manifest), _) => Some(self.get_chunks(store, key, manifest)?),
            (None, raw) => raw.clone(),
        };
        if stands.as_deref() != seen {
            return Ok(false);
        }
        match self.replace(store, key, Some(value), Some(raw)).await {
            Ok(()) => Ok(true),
            Err(KvError::Changed { .. }) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Deletes a key, whether it exists or not. It is durable here when this returns.
    pub async fn delete(&self, store: &StoreName, key: &str) -> Result<(), KvError> {
        self.replace(store, key, None, None).await
    }

    /// Sets or deletes a key, and then the chunks of what it replaced.
    async fn replace(
        &self,
        store: &StoreName,
        key: &str,
        value: Option<Bytes>,
        seen: Option<Option<Bytes>>,
    ) -> Result<(), KvError> {
        is_shown(key)?;
        check("key", key.len(), KEY_BYTES_MAX)?;
        // What can't be read is replaced like anything else.
        let old = self.raw(store, key).ok().flatten().and_then(|value| Manifest::of(&value));
        let mut new = None;
        let write = match value {
            None => Write::Delete,
            Some(value) => {
                check("value", value.len(), LARGE_BYTES_MAX)?;
                self.has_room(store, value.len())?;
                if chunks::must_be_chunked(&value) {
                    let value = self.put_chunks(store, value).await?;
                    new = Manifest::of(&value);
                    Write::Set(value)
                } else {
                    Write::Set(value)
                }
            }
        };
        let bytes = if let Write::Set(value) = &write { value.len() } else { 0 };
        let done = self.write(store, key, bytes, write, seen).await;
        let unused = if done.is_ok() { old } else { new };
        if let Some(unused) = unused {
            self.remove_chunks(store, &unused).await;
        }
        done.map(|_| ())
    }

    /// Adds `delta` to a counter, returns its value as this node knows it. Increments on several nodes at once all
    /// count. A key that does not exist counts from zero, a value of 8 bytes from that little-endian number.
    pub async fn increment(&self, store: &StoreName, key: &str, delta: i64) -> Result<i64, KvError> {
        is_shown(key)?;
        self.has_room(store, 0)?;
        let value = self.write(store, key, 0, Write::Increment(delta), None).await?;
        Ok(value.expect("the replica tells an increment's value"))
    }

    /// The existing keys that begin with `prefix` and come after `after`, in order; [`LIST_MAX`] at most.
    pub fn list(
        &self,
        store: &StoreName,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, KvError> {
        let found = read::list(self.shared.vault.as_ref(), store, prefix, after, limit.min(LIST_MAX));
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
        let found = read::list(self.shared.vault.as_ref(), store, prefix, after, limit.min(LIST_MAX));
        Ok(shown(found.map_err(KvError::Engine)?).map(listed).collect())
    }

    /// How it stands with every peer of the roster.
    pub fn status(&self) -> Vec<PeerStatus> {
        let Some(link) = &self.shared.link else { return Vec::new() };
        let health = self.shared.health.read().unwrap_or_else(PoisonError::into_inner).clone();
        let status = |peer: PeerAddr| {
            let known = health.iter().find(|known| known.node == peer.node);
            PeerStatus {
                node: peer.node,
                region: peer.region,
                connected: known.is_some(),
                queued_bytes: known.map_or(0, |known| known.queued_bytes),
                lag: known.map(|known| known.lag),
                heard_ms: known.map(|known| known.heard_ms),
            }
        };
        link.peers().into_iter().map(status).collect()
    }

    /// Whether nobody else holds this store: its files are free as soon as this handle is dropped.
    pub fn is_last_handle(&self) -> bool {
        Arc::strong_count(&self.shared) == 1
    }

    /// Ends the links, flushes and ends the committer. Reads go on working; writes fail.
    pub async fn close(&self) {
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

    /// Quotas bind this node's own writes. What peers send is always taken: nodes must end with the same.
    fn has_room(&self, store: &StoreName, bytes: usize) -> Result<(), KvError> {
        let within = |what: &dyn Fn() -> String, used: u64, max: u64| {
            let fits = used.saturating_add(bytes as u64) <= max;
            if fits { Ok(()) } else { Err(KvError::Quota { what: what(), bytes: used, max }) }
        };
        let used = self.usage(store).bytes;
        within(&|| format!("store {store}"), used, self.shared.kept.store_bytes_max(store))?;
        within(&|| "the node's kv".to_owned(), self.shared.vault.record_bytes(), self.shared.kept.total_bytes_max())
    }

    fn record(&self, store: &StoreName, key: &str) -> Result<Record, KvError> {
        check("key", key.len(), KEY_BYTES_MAX)?;
        let key = Key { store: store.clone(), name: key.to_owned() };
        read::record(self.shared.vault.as_ref(), &key).map_err(|error| match error {
            ReadError::Corrupt(_) => KvError::Corrupt { key: key.name },
            ReadError::Engine(error) => KvError::Engine(error),
        })
    }

    /// `seen`: the write is made only if this is the record's value.
    async fn write(
        &self,
        store: &StoreName,
        key: &str,
        bytes: usize,
        write: Write,
        seen: Option<Option<Bytes>>,
    ) -> Result<Option<i64>, KvError> {
        check("key", key.len(), KEY_BYTES_MAX)?;
        let room = WRITE_OVERHEAD_BYTES.saturating_add(u32::try_from(bytes).unwrap_or(u32::MAX));
        let room = Arc::clone(&self.shared.room).try_acquire_many_owned(room).map_err(|_| KvError::Overloaded)?;
        let key = Key { store: store.clone(), name: key.to_owned() };
        let (reply, done) = oneshot::channel();
        let input = Input::Write { key, write, seen, reply, _room: room };
        self.shared.inputs.send(input).await.map_err(|_| KvError::Closed)?;
        done.await.map_err(|_| KvError::Closed)?
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

fn check(what: &'static str, bytes: usize, max: usize) -> Result<(), KvError> {
    if bytes > max { Err(KvError::TooLarge { what, bytes, max }) } else { Ok(()) }
}

fn listed(found: read::Found) -> Listed {
    let record = found.record.unwrap_or_default();
    let newest = record.newest();
    Listed {
        bytes: record.value().map_or(0, |value| Manifest::of(&value).map_or(value.len(), |manifest| manifest.bytes())),
        stamp_ms: newest.map_or(0, |entry| entry.version.stamp.ms()),
        node: newest.map(|entry| entry.version.dot.origin.node.clone()),
        name: found.name,
    }
}
