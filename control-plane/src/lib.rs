//! The control plane: an OCI registry for what runs, releases of apps, and a plan for every node.
//!
//! It chooses among signed releases and never decides what is trusted: that is each node's own business. Nodes go
//! on serving without it. All that it must remember lies in one directory, on disk before an answer is given.

#![cfg_attr(test, allow(clippy::unwrap_used))]

mod disk;

mod state;

mod fleet;
mod plans;
mod releases;

mod registry;

mod access;
mod audit;
mod body;

pub mod answers;
mod api;
mod failure;
mod freshness;

mod listen;

use std::io;
use std::net::SocketAddr;
use std::os::unix::fs::DirBuilderExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use selvage_certs::{FileError, TlsError};
use selvage_config::control_plane::ControlPlaneConfig;
use tokio::net::TcpListener;
use tokio::sync::watch;
use tokio::task::JoinHandle;

use access::Access;
use audit::Audit;
use fleet::Fleet;
use listen::Tls;
use plans::Signer;
pub use plans::SignerError;
use registry::Registry;
use state::{State, StateError};

/// How long [`ControlPlane::stop`] lets requests under way end. Long polls end at once.
pub const DRAIN: Duration = Duration::from_secs(10);

/// What answers requests: one for the life of the program.
pub(crate) struct Parts {
    pub(crate) access: Access,
    pub(crate) audit: Audit,
    pub(crate) fleet: Fleet,
    pub(crate) registry: Arc<Registry>,
    /// True once the control plane stops: whoever waits for news stops waiting.
    pub(crate) stopping: watch::Receiver<bool>,
}

/// A control plane that listens.
pub struct ControlPlane {
    address: SocketAddr,
    stop: watch::Sender<bool>,
    task: JoinHandle<()>,
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
    /// Plans can't be signed.
    #[error("sign plans")]
    Signer(#[from] SignerError),
    /// The identity or its roots can't be read.
    #[error("read the control plane's identity")]
    Identity(#[from] FileError),
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
        Self::State(Box::new(error))
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
        let operators = config.operators;
        let plans = config.plans;
        if plans.is_none() {
            tracing::warn!("plans are not signed: nodes with a root take none; `selvage root` makes one");
        }
        let signer = disk::wait(move || plans.as_ref().map(Signer::load).transpose()).await?;
        let opened = disk::wait(move || open(&directory, signer)).await?;
        let tls = {
            let identity = config.identity;
            disk::wait(move || Tls::load(identity)).await?
        };
        let failed = |source| StartError::Listen { address: config.listen, source };
        let listener = TcpListener::bind(config.listen).await.map_err(failed)?;
        let address = listener.local_addr().map_err(failed)?;
        let (fleet, registry, audit) = opened;
        let access = Access::new(operators);
        let parts = Arc::new(Parts { access, audit, fleet, registry: Arc::new(registry), stopping: stopping.clone() });
        let task = tokio::spawn(listen::run(listener, tls, api::router(parts), stopping));
        tracing::info!(%address, "control plane listens");
        Ok(Self { address, stop, task })
    }

    /// Where it listens: the port is a real one even if the configuration said 0.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Takes no more connections, lets requests under way end for at most [`DRAIN`], and closes.
    pub async fn stop(self) {
        self.stop.send_replace(true);
        if let Err(error) = self.task.await {
            tracing::error!(%error, "the listener ended badly");
        }
    }
}

fn open(directory: &Path, signer: Option<Signer>) -> Result<(Fleet, Registry, Audit), StartError> {
    let make = |path: PathBuf| {
        // Others on the machine have no business here: a release may carry secret variables.
        let made = std::fs::DirBuilder::new().recursive(true).mode(0o700).create(&path);
        made.map(|()| path.clone()).map_err(|source| StartError::Directory { path, source })
    };
    make(directory.to_owned())?;
    let blobs = make(directory.join("blobs").join("sha256"))?;
    let uploads = make(directory.join("uploads"))?;
    let state = State::open(&directory.join("db"))?;
    let catalog = state.open_catalog()?;
    let registry =
        Registry::open(blobs, &uploads, catalog).map_err(|source| StartError::Directory { path: uploads, source })?;
    let path = directory.join("audit.jsonl");
    let audit = Audit::open(&path).map_err(|source| StartError::Directory { path, source })?;
    Ok((Fleet::open(state, signer)?, registry, audit))
}
