//! All stores of a node: which is in the mesh, and which in a backend.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_config::StoreName;
use selvage_config::node::{Kv as KeptBy, KvBackend, KvBackendKind};
use selvage_sync::Kv;

use crate::ability::Abilities;
use crate::contact::BackendStatus;
use crate::error::OpenError;
use crate::mesh::Mesh;
use crate::nats::Nats;
use crate::redis::Redis;
use crate::store::Store;

/// All stores of a node. Clones share them.
#[derive(Clone)]
pub struct Stores {
    mesh: Mesh,
    /// None: every store is in the mesh, and no server is known.
    away: Option<Arc<Away>>,
}

/// The backends of a node's file, and which store is in which.
#[derive(Clone)]
pub struct Backends(Option<Arc<Away>>);

struct Away {
    rules: KeptBy,
    backends: BTreeMap<String, Arc<Backend>>,
}

impl Backends {
    /// As the node's file says. Connections begin to be made; whether they come about is not waited for, so a node starts
    /// while its backends are away.
    ///
    /// # Errors
    /// What is wrong with the files that a backend's table names.
    pub fn open(config: &KeptBy) -> Result<Self, OpenError> {
        if config.backends.is_empty() {
            return Ok(Self(None));
        }
        let open = |(name, backend): (&String, &KvBackend)| Ok((name.clone(), Arc::new(Backend::open(name, backend)?)));
        let backends = config.backends.iter().map(open).collect::<Result<_, _>>()?;
        Ok(Self(Some(Arc::new(Away { rules: config.clone(), backends }))))
    }
}

/// Looks at the files that the backends of a node's file name, as [`Backends::open`] does. Connects to nothing.
///
/// # Errors
/// What is wrong with them.
pub fn check(config: &KeptBy) -> Result<(), OpenError> {
    for (name, backend) in &config.backends {
        match backend.kind {
            KvBackendKind::Redis => Redis::check(name, backend)?,
            KvBackendKind::Nats => Nats::check(name, backend)?,
        }
    }
    Ok(())
}

/// One backend.
pub(crate) enum Backend {
    Redis(Redis),
    Nats(Nats),
}

impl Backend {
    fn open(name: &str, config: &KvBackend) -> Result<Self, OpenError> {
        match config.kind {
            KvBackendKind::Redis => Redis::open(name, config).map(Self::Redis),
            KvBackendKind::Nats => Nats::open(name, config).map(Self::Nats),
        }
    }

    pub(crate) fn name(&self) -> &str {
        match self {
            Self::Redis(redis) => redis.name(),
            Self::Nats(nats) => nats.name(),
        }
    }

    pub(crate) fn abilities(&self) -> &'static Abilities {
        Abilities::of(match self {
            Self::Redis(_) => KvBackendKind::Redis,
            Self::Nats(_) => KvBackendKind::Nats,
        })
    }

    fn status(&self) -> BackendStatus {
        match self {
            Self::Redis(redis) => redis.status(),
            Self::Nats(nats) => nats.status(),
        }
    }
}

impl From<Kv> for Stores {
    /// All of them in the mesh, which is here.
    fn from(kv: Kv) -> Self {
        Mesh::from(kv).into()
    }
}

impl From<Mesh> for Stores {
    /// All of them in the mesh.
    fn from(mesh: Mesh) -> Self {
        Self { mesh, away: None }
    }
}

impl Stores {
    /// In the mesh, but for those that the node's file puts into a backend.
    pub fn new(mesh: impl Into<Mesh>, backends: Backends) -> Self {
        Self { mesh: mesh.into(), away: backends.0 }
    }

    /// The node's own replicated KV, with that of the placements.
    pub fn mesh(&self) -> &Mesh {
        &self.mesh
    }

    /// A store.
    pub fn store(&self, name: StoreName) -> Store {
        let away = self.away.as_ref().and_then(|away| away.backends.get(away.rules.backend_of(&name)?));
        match away {
            Some(backend) => Store::in_backend(Arc::clone(backend), name),
            None => Store::in_mesh(self.mesh.clone(), name),
        }
    }

    /// How it stands with every backend.
    pub fn status(&self) -> Vec<BackendStatus> {
        self.away.iter().flat_map(|away| away.backends.values()).map(|backend| backend.status()).collect()
    }
}
