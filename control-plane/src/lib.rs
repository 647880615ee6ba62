//! The control plane: an OCI registry for what runs, releases of apps, and a plan for every node.
//!
//! It chooses among signed releases and never decides what is trusted: that is each node's own business. Nodes go
//! on serving without it. All that it must remember lies in one directory, on disk before an answer is given.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod disk;

mod state;

mod journal;

mod fleet;
mod plans;
mod releases;
mod rollouts;

mod joining;

mod registry;

mod access;
pub mod audit;
mod body;

pub mod answers;
mod api;
pub mod backup;
mod failure;
mod freshness;

mod listen;

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use selvage_certs::{AuthorityError, FileError, OperatorName, Seal, TlsError};
use selvage_config::control_plane::{ControlPlaneConfig, Operator, PlacementRule, RegistryConfig, StoreRule};
use selvage_config::operator::Operators;
use selvage_config::{PlacementName, StoreName};
use tokio::net::TcpListener;
use tokio::sync::{Notify, Semaphore, watch};
use tokio::task::{JoinHandle, JoinSet};

use access::{Access, KEY_BYTES, Tokens};
use audit::Audit;
pub use fleet::PlacementError;
use fleet::{Fleet, Moved, Unsettled};
use joining::Joining;
use journal::{Journal, JournalError, Keys};
use listen::Tls;
use plans::Signer;
pub use plans::SignerError;
pub use registry::UpstreamError;
use registry::{Registry, Upstreams};
use state::{State, StateError};

/// How long [`ControlPlane::stop`] lets requests under way end. Long polls end at once.
pub const DRAIN: Duration = Duration::from_secs(10);

/// How often a rollout under way is looked at when nobody tells anything.
const ADVANCE_EVERY: Duration = Duration::from_millis(250);
/// The row of the key that tokens of the registry are made with.
const TOKEN_KEY: &str = "registry-token-key";
/// Pause before it is tried again what the journal did not take.
const AWAY: Duration = Duration::from_secs(1);
/// How often what nothing refers to is looked for.
const COLLECT_EVERY: Duration = Duration::from_secs(3_600);

/// What answers requests: one for the life of the program.
pub(crate) struct Parts {
    pub(crate) access: Access,
    pub(crate) audit: Audit,
    pub(crate) fleet: Fleet,
    pub(crate) registry: Arc<Registry>,
    pub(crate) upstreams: Upstreams,
    pub(crate) joining: Joining,
    /// One backup at a time.
    pub(crate) backups: Arc<Semaphore>,
    /// Told when a rollout may go on.
    pub(crate) moves: Notify,
    /// True once the control plane stops: whoever waits for news stops waiting.
    pub(crate) stopping: watch::Receiver<bool>,
}

/// A control plane that listens.
pub struct ControlPlane {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
    /// What is done by the clock.
    chores: JoinSet<()>,
}

/// Why a control plane did not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory or file below `state_dir` can't be used.
    #[error("open {path}")]
    Directory {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// What was remembered can't be read.
    #[error("read the state of earlier runs")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The state can't be shared.
    #[error("share the state with other control planes")]
    Shared(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The state is a copy of one that is shared.
    #[error("{path} is a copy of the state that control planes share: [nats] is missing")]
    Alone {
        /// The state directory.
        path: PathBuf,
    },
    /// The placements of the configuration are not such as may follow those that plans have.
    #[error(transparent)]
    Placement(#[from] PlacementError),
    /// Plans can't be signed.
    #[error("sign plans")]
    Signer(#[from] SignerError),
    /// A registry that is mirrored can't be asked.
    #[error("use an upstream registry")]
    Upstream(#[from] UpstreamError),
    /// The identity or its roots can't be read.
    #[error("read the control plane's identity")]
    Identity(#[from] FileError),
    /// The authority can't be used.
    #[error("use the fleet's authority")]
    Authority(#[from] AuthorityError),
    /// The identity is no use as a server's.
    #[error("use the control plane's identity")]
    Tls(#[from] TlsError),
    /// The address is taken, or not ours.
    #[error("listen at {address}")]
    Listen {
        /// The address.
        address: SocketAddr,
        /// What the system said.
        source: io::Error,
    },
}

impl From<StateError> for StartError {
    fn from(error: StateError) -> Self {
        match error {
            StateError::Journal(error) => error.into(),
            other => Self::State(Box::new(other)),
        }
    }
}

impl From<JournalError> for StartError {
    fn from(error: JournalError) -> Self {
        Self::Shared(Box::new(error))
    }
}

impl ControlPlane {
    /// Reads what earlier runs left and listens. On return connections are taken.
    ///
    /// # Errors
    /// [`StartError`], naming the file or address.
    pub async fn start(config: ControlPlaneConfig) -> Result<Self, StartError> {
        let (stop, stopping) = watch::channel(false);
        let directory = config.state_dir.clone();
        let plans = config.plans;
        if plans.is_none() {
            tracing::warn!("plans are not signed: nodes with a root take none; `selvage root` makes one");
        }
        let signer = disk::wait(move || plans.as_ref().map(Signer::load).transpose()).await?;
        let (joining, issuing) = {
            let (authority, roots) = (config.authority, config.identity.roots.clone());
            disk::wait(move || Joining::open(authority, roots)).await?
        };
        let keys = Keys { authority: issuing, plans: signer.as_ref().map(Signer::key_id) };
        let journal = match config.nats {
            Some(nats) => Some(Arc::new(Journal::connect(nats).await?)),
            None => None,
        };
        let shared = journal.clone().map(|journal| (journal, keys));
        let registry_config = config.registry.clone();
        let sealing = config.sealing_key.unwrap_or_else(|| directory.join("sealing.key"));
        let told = Told { operators: told(&config.operators), stores: (config.stores, config.placements) };
        let own = (signer, told.clone());
        let opened = disk::wait(move || open(&directory, &sealing, registry_config, own, shared.as_ref())).await?;
        let upstreams = {
            let upstreams = config.registry.upstreams;
            disk::wait(move || Upstreams::open(&upstreams)).await?
        };
        let tls = {
            let identity = config.identity.clone();
            disk::wait(move || Tls::load(identity)).await?
        };
        let failed = |source| StartError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let Opened { fleet, registry, audit, token_key } = opened;
        let access = Access::new(config.operators, Tokens::new(&token_key));
        let registry = Arc::new(registry);
        let parts = Arc::new(Parts {
            access,
            audit,
            fleet,
            registry,
            upstreams,
            joining,
            backups: Arc::new(Semaphore::new(1)),
            moves: Notify::new(),
            stopping: stopping.clone(),
        });
        let mut chores = JoinSet::new();
        chores.spawn(advance(Arc::clone(&parts)));
        chores.spawn(settle(Arc::clone(&parts)));
        if let Some(journal) = journal {
            chores.spawn(journal::follow(Arc::clone(&journal), Arc::clone(&parts)));
            chores.spawn(journal::hear(Arc::clone(&journal), Arc::clone(&parts)));
            chores.spawn(journal::upkeep(journal, Arc::clone(parts.fleet.state())));
            chores.spawn(tell_of(Arc::clone(&parts), told));
        }
        if config.registry.collect_after_hours > 0 {
            chores.spawn(collect(Arc::clone(&parts), config.registry.collect_after_hours));
        }
        let task = tokio::spawn(listen::run(listener, tls, api::router(parts), stopping));
        tracing::info!(%address, "control plane listens");
        Ok(Self { address, stop, task, chores })
    }

    /// Where it listens: the port is a real one even if the configuration said 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more connections, lets requests under way end for at most [`DRAIN`], and closes.
    pub async fn stop(mut self) {
        self.stop.send_replace(true);
        self.chores.shutdown().await;
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the listener ended badly");
        }
    }
}

/// What nodes are told of operators: of those that can have a certificate, for nodes take no tokens.
fn told(operators: &[Operator]) -> Operators {
    let certified = operators.iter().filter(|operator| operator.name.parse::<OperatorName>().is_ok());
    certified.map(|operator| (operator.name.clone(), operator.rights())).collect()
}

/// What plans tell of the configuration.
#[derive(Clone)]
struct Told {
    operators: Operators,
    stores: (BTreeMap<StoreName, StoreRule>, BTreeMap<PlacementName, PlacementRule>),
}

impl From<Unsettled> for StartError {
    fn from(unsettled: Unsettled) -> Self {
        match unsettled {
            Unsettled::State(error) => error.into(),
            Unsettled::Placement(error) => Self::Placement(error),
        }
    }
}

impl Told {
    fn to(&self, fleet: &Fleet) -> Result<(), Unsettled> {
        let (stores, placements) = &self.stores;
        // First what may be refused: a store is never told of with a home and without its placement.
        fleet.settle_placements(stores, placements)?;
        fleet.tell_of(&self.operators)?;
        Ok(fleet.settle_homes(stores)?)
    }
}

/// What lies in the state directory.
struct Opened {
    fleet: Fleet,
    registry: Registry,
    audit: Audit,
    token_key: [u8; KEY_BYTES],
}

fn open(
    directory: &Path,
    sealing: &Path,
    config: RegistryConfig,
    (signer, told): (Option<Signer>, Told),
    shared: Option<&(Arc<Journal>, Keys)>,
) -> Result<Opened, StartError> {
    let make = |path: PathBuf| {
        // Others on the machine have no business here: a release may carry secret variables.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map(|()| path.clone()).map_err(|source| StartError::Directory { path, source })
    };
    make(directory.to_owned())?;
    let blobs = make(directory.join("blobs").join("sha256"))?;
    let uploads = make(directory.join("uploads"))?;
    let failed = |path: &Path| {
        let path = path.to_owned();
        |source| StartError::Directory { path, source }
    };
    let seal = Seal::open(sealing).map_err(failed(sealing))?;
    let state = Arc::new(State::open(&directory.join("db"), seal)?);
    let registry = Registry::open(blobs, &uploads, Arc::clone(&state), config)
        .map_err(|source| StartError::Directory { path: uploads, source })?;
    match shared {
        Some((journal, keys)) => {
            let found = || {
                state.seal_key::<KEY_BYTES>(TOKEN_KEY)?;
                registry.found(journal).map_err(|error| StateError::Found(Box::new(error)))
            };
            journal::join(journal, &state, found, keys)?;
        }
        // What is changed here alone would be lost, or come twice.
        None if state.member()?.is_some() => return Err(StartError::Alone { path: directory.to_owned() }),
        None => {}
    }
    let token_key = state.key(TOKEN_KEY)?;
    let path = directory.join("audit.jsonl");
    let audit = Audit::open(&path).map_err(|source| StartError::Directory { path, source })?;
    let fleet = Fleet::open(state, signer)?;
    if shared.is_none() {
        told.to(&fleet)?;
    }
    Ok(Opened { fleet, registry, audit, token_key })
}

/// Moves rollouts on: at every news, and by the clock while one is under way.
async fn advance(parts: Arc<Parts>) {
    loop {
        if parts.fleet.is_moving() {
            // Dropping either branch is safe: neither holds anything.
            tokio::select! {
                () = parts.moves.notified() => {}
                () = tokio::time::sleep(ADVANCE_EVERY) => {}
            }
        } else {
            parts.moves.notified().await;
        }
        let at = Arc::clone(&parts);
        match disk::wait(move || at.fleet.advance(audit::now_ms())).await {
            Ok(moved) => {
                for Moved { release, before, after } in moved {
                    parts.audit.note_change(audit::SELF, "release.rollout", release, before, after).await;
                    // The next step may follow at once.
                    parts.moves.notify_one();
                }
            }
            Err(StateError::Journal(error)) => {
                tracing::warn!(%error, "rollouts wait");
                tokio::time::sleep(AWAY).await;
            }
            Err(error) => {
                tracing::error!(%error, "rollouts stand still");
                tokio::time::sleep(ADVANCE_EVERY).await;
            }
        }
    }
}

/// Tells of nodes that came together.
async fn settle(parts: Arc<Parts>) {
    loop {
        let Some(wait) = parts.fleet.unsettled_for() else {
            parts.fleet.unsettled.notified().await;
            continue;
        };
        tokio::time::sleep(wait).await;
        let at = Arc::clone(&parts);
        match disk::wait(move || at.fleet.settle()).await {
            Ok(()) => {}
            Err(StateError::Journal(error)) => {
                tracing::warn!(%error, "peers that changed are not told yet");
                tokio::time::sleep(AWAY).await;
            }
            Err(error) => {
                tracing::error!(%error, "peers that changed are not told");
                tokio::time::sleep(ADVANCE_EVERY).await;
            }
        }
    }
}

/// Has plans tell what this control plane's file says, where the state is shared: once, when the journal is followed and
/// takes it.
async fn tell_of(parts: Arc<Parts>, told: Told) {
    loop {
        let (at, told) = (Arc::clone(&parts), told.clone());
        match disk::wait(move || told.to(&at.fleet)).await {
            Ok(()) => return,
            Err(Unsettled::Placement(error)) => {
                tracing::error!(%error, "nodes are not told of operators, homes and placements: mend the file and start");
                return;
            }
            Err(Unsettled::State(error)) => tracing::warn!(%error, "nodes are not told of the operators and homes yet"),
        }
        tokio::time::sleep(AWAY).await;
    }
}

/// Lets go of what nothing refers to, from time to time.
async fn collect(parts: Arc<Parts>, after_hours: u64) {
    loop {
        tokio::time::sleep(COLLECT_EVERY).await;
        let at = Arc::clone(&parts);
        let before_ms = audit::now_ms().saturating_sub(after_hours.saturating_mul(3_600_000));
        match disk::wait(move || at.registry.collect(before_ms, || at.fleet.needed())).await {
            Ok(gone) => tracing::info!(gone.manifests, gone.blobs, gone.bytes, "collected what nothing refers to"),
            Err(error) => tracing::error!(%error, "could not collect what nothing refers to"),
        }
    }
}
