//! Why a store, or its backend, did not do it.

use std::path::PathBuf;
use std::sync::Arc;

use selvage_certs::FileError;
use selvage_sync::KvError;

/// Why a store did not do it.
#[derive(Debug, Clone, thiserror::Error)]
pub enum StoreError {
    /// The mesh refuses; or the key or the value breaks a bound, wherever the store is.
    #[error(transparent)]
    Kv(#[from] KvError),
    /// The backend does not do it.
    #[error(transparent)]
    Backend(#[from] BackendError),
    /// A version that no read gave.
    #[error("unknown version")]
    Version,
    /// The mesh is changing its process, or has done so.
    #[error(transparent)]
    Moving(#[from] Moving),
}

/// Why a call of the mesh came to nothing while one process takes over from another.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Moving {
    /// The process that has it now has not opened it, or the one before has not let go of it. Nothing was asked.
    #[error("the kv is on its way to another process: try again")]
    NotYet,
    /// The process that has it now is gone, or can't be understood.
    #[error("the process that has the kv now is gone: whether a write was made is not known")]
    Lost,
    /// The process that has it now did not answer.
    #[error("the process that has the kv now did not answer within {ms} ms: whether a write was made is not known")]
    Silent {
        /// How long it was waited for.
        ms: u64,
    },
    /// The process that has it now refuses.
    #[error("{why}")]
    Refused {
        /// What it says, as its own guests would read it.
        why: String,
    },
}

/// Why a backend did not do it. It says nothing of addresses or of what the server wrote: guests see it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("backend {backend} {trouble}")]
pub struct BackendError {
    /// Its name in the node's file.
    pub backend: Arc<str>,
    /// What is the matter.
    pub trouble: Trouble,
}

/// What is the matter with a backend.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Trouble {
    /// There is no connection. Nothing was asked.
    #[error("is away")]
    Away,
    /// It did not answer in time.
    #[error("did not answer within {ms} ms: whether a write was made is not known")]
    Silent {
        /// How long it was waited for.
        ms: u64,
    },
    /// The connection was lost before the answer.
    #[error("was lost before it answered: whether a write was made is not known")]
    Lost,
    /// As many requests as may be are under way.
    #[error("has {max} requests under way, and takes no more")]
    Overloaded {
        /// How many may be.
        max: u32,
    },
    /// It has no room left.
    #[error("is full")]
    Full,
    /// It refuses, with a word of its own.
    #[error("refused it ({code})")]
    Refused {
        /// The server's word for it.
        code: String,
    },
    /// Something else than an entry stands there.
    #[error("has something at this key that is no entry")]
    Foreign,
    /// It does not have what this takes.
    #[error("can't do this: {what}")]
    Unable {
        /// What it lacks.
        what: &'static str,
    },
    /// Others wrote the key each time before this could.
    #[error("has too many writers at this key")]
    Contended,
}

impl Trouble {
    /// Its name in metrics.
    pub(crate) fn outcome(&self) -> &'static str {
        match self {
            Self::Away => "away",
            Self::Silent { .. } => "silent",
            Self::Lost => "lost",
            Self::Overloaded { .. } => "overloaded",
            Self::Full => "full",
            Self::Refused { .. } => "refused",
            Self::Foreign => "foreign",
            Self::Unable { .. } => "unable",
            Self::Contended => "contended",
        }
    }
}

/// Why the backends of a node's file can't be used.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// A file of a password, token, seed or credentials can't be read.
    #[error("kv.backends.{backend}.{field}: read {path}")]
    Secret {
        /// The backend.
        backend: String,
        /// The field.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: std::io::Error,
    },
    /// Its authorities can't be used.
    #[error("kv.backends.{backend}.roots")]
    Roots {
        /// The backend.
        backend: String,
        /// Why not.
        source: Box<FileError>,
    },
    /// Its address is none.
    #[error("kv.backends.{backend}: address of the server")]
    Address {
        /// The backend.
        backend: String,
    },
}

/// What became of one request, before it is told whose it was.
#[derive(Debug)]
pub(crate) enum Failure {
    /// Something is the matter with the backend.
    Trouble(Trouble),
    /// The key or the value is not what it must be.
    Kv(KvError),
}

impl From<Trouble> for Failure {
    fn from(trouble: Trouble) -> Self {
        Self::Trouble(trouble)
    }
}

impl From<KvError> for Failure {
    fn from(error: KvError) -> Self {
        Self::Kv(error)
    }
}
