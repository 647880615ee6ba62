//! Why a node does not start.

use std::path::PathBuf;

use selvage_backend::OpenError as BackendsError;
use selvage_certs::{FileError, RandomError, ReloadError, TlsError};
use selvage_sync::{KvError, OpenError};

use super::handover::HandoverError;
use crate::acme::AcmeError;
use crate::admin::AdminError;
use crate::engine::EngineError;
use crate::host::outbound::EgressError;
use crate::jwt::JwtError;
use crate::listen::ListenError;
use crate::release::activate::ReadyError;
use crate::release::compile::CacheError;
use crate::release::ledger::LedgerError;
use crate::release::origin::OriginError;
use crate::release::state::StateError;
use crate::release::verify::PolicyError;

/// Why a node does not start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The node that runs did not hand over.
    #[error("take over from the node that runs")]
    Handover(#[source] HandoverError),
    /// A control plane is configured, and no identity to show it.
    #[error("control_plane needs an identity")]
    Identity,
    /// A file of the identity, or of the front's secret, can't be used.
    #[error("identity or secret")]
    IdentityFile(#[from] FileError),
    /// The front has no secret file, and there is no randomness to make a secret.
    #[error("secret of the front")]
    Random(#[source] RandomError),
    /// The identity can't speak TLS.
    #[error("identity")]
    Tls(#[from] TlsError),
    /// A certificate of the front can't be used.
    #[error("certificates")]
    Certificates(#[from] ReloadError),
    /// Certificates can't be got from an authority.
    #[error("acme")]
    Acme(#[from] Box<AcmeError>),
    /// The policy can't be used.
    #[error("trust")]
    Policy(#[from] PolicyError),
    /// The file of the root can't be read.
    #[error("read {path}")]
    KeyFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// The root of the fleet's plans can't be read.
    #[error("root {path}")]
    RootFile {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: serde_json::Error,
    },
    /// What the fleet signed so far can't be known.
    #[error("ledger of signed plans")]
    Ledger(#[from] LedgerError),
    /// A file of authorities can't be read.
    #[error("authorities in {path}")]
    Roots {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: rustls::pki_types::pem::Error,
    },
    /// The address of the control plane is none.
    #[error("control plane")]
    Origin(#[from] OriginError),
    /// What guests may reach can't be set up.
    #[error("egress")]
    Egress(#[from] EgressError),
    /// Keys of token issuers can't be fetched.
    #[error("keys of issuers")]
    Keys(#[from] JwtError),
    /// The state directory can't be used.
    #[error("state_dir")]
    State(#[from] StateError),
    /// No temporary directory.
    #[error("make temporary directory")]
    Temporary(#[source] std::io::Error),
    /// The KV does not open.
    #[error("key-value store")]
    Kv(#[from] OpenError),
    /// The files of a backend of the KV can't be used.
    #[error("kv backends")]
    Backends(#[from] BackendsError),
    /// A value can't be put where it shall stand at the start.
    #[error("set key-value")]
    Value(#[from] KvError),
    /// The engines don't start.
    #[error("engine")]
    Engine(#[from] EngineError),
    /// The cache of compiled code can't be used.
    #[error("compiled code")]
    Cache(#[from] CacheError),
    /// The app of `selvage up` does not run.
    #[error("app")]
    App(#[from] ReadyError),
    /// A listener can't be opened.
    #[error("listen")]
    Listen(#[from] ListenError),
    /// The admin listener can't be opened.
    #[error("listen.admin")]
    Admin(#[from] AdminError),
    /// A task of the start ended early.
    #[error("start task")]
    Ended(#[from] tokio::task::JoinError),
}
