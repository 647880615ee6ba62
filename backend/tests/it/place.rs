//! Places of stores, as one node or two see them.

use std::path::Path;
use std::sync::Arc;

use selvage_backend::{Abilities, Backends, Carrier, Mesh, Reach, Store, Stores, serve_carried};
use selvage_config::node::{Kv as KeptBy, KvEngine};
use selvage_sync::{Kv, Options};
use tempfile::TempDir;

use super::server::{Kind, Server, until};

/// A place, and what is under it.
pub(crate) struct Place {
    pub(crate) here: Stores,
    /// Another node; none where it would have to be a peer first.
    pub(crate) there: Option<Stores>,
    pub(crate) abilities: &'static Abilities,
    pub(crate) server: Option<Server>,
    _dirs: Vec<TempDir>,
}

/// Of a mesh that another process of the node has: both see one KV.
static CARRIED: Abilities =
    Abilities { condition: Reach::Fleet, exact_counters: Reach::Fleet, fresh_reads: Reach::Fleet, ..Abilities::MESH };

/// A node's KV by itself.
pub(crate) async fn alone() -> (Kv, TempDir) {
    let dir = tempfile::tempdir().unwrap();
    let kept = KeptBy { engine: KvEngine::Memory, ..KeptBy::default() };
    let options = Options::alone("a".parse().unwrap(), "fra".parse().unwrap(), dir.path().to_owned(), kept);
    (Kv::open(options, Arc::new(|_| None)).await.unwrap(), dir)
}

/// What `[kv]` of a node's file says.
pub(crate) fn parsed(kv: &str) -> KeptBy {
    let text = format!("name='a'\nregion='b'\nstate_dir='s'\nlisten={{http='127.0.0.1:0'}}\n[kv]\nbackend='x'\n{kv}");
    selvage_config::node::NodeConfig::parse(Path::new("/node.toml"), &text).unwrap().kv
}

/// A table of a backend at a server.
pub(crate) fn table(kind: Kind, port: u16, more: &str) -> String {
    let at = match kind {
        Kind::Redis => format!("kind = 'redis'\nurl = 'redis://127.0.0.1:{port}'\n"),
        Kind::Nats => format!("kind = 'nats'\nservers = ['nats://127.0.0.1:{port}']\nreplicas = 1\n"),
    };
    let times = if more.contains("request_ms") { "" } else { "request_ms = 20000\n" };
    format!("[kv.backends.x]\n{at}{times}{more}")
}

/// A node whose stores are all in the backend of this table.
pub(crate) async fn node(kv: &str) -> (Stores, TempDir) {
    let (mesh, dir) = alone().await;
    (Stores::new(mesh, Backends::open(&parsed(kv)).unwrap()), dir)
}

/// Until it has a connection.
pub(crate) async fn connected(stores: &Stores) {
    until("connected", async || stores.status().iter().all(|status| status.connected)).await;
}

/// Carries the calls of `from` to `to`. They are lost when what this returns is aborted.
pub(crate) fn carry(from: &Mesh, to: &Mesh) -> tokio::task::AbortHandle {
    let (near, far) = tokio::io::duplex(4_096);
    from.carry(Carrier::over(near));
    let to = to.clone();
    tokio::spawn(async move { serve_carried(far, to, || ()).await.unwrap() }).abort_handle()
}

impl Place {
    pub(crate) async fn mesh() -> Option<Self> {
        let (kv, dir) = alone().await;
        let (here, abilities) = (kv.into(), &Abilities::MESH);
        Some(Self { here, there: None, abilities, server: None, _dirs: vec![dir] })
    }

    /// The mesh is with another process, which is `there`.
    pub(crate) async fn carried() -> Option<Self> {
        let (kv, dir) = alone().await;
        let (mesh, there) = (Mesh::coming(), Mesh::from(kv));
        carry(&mesh, &there);
        let abilities = &CARRIED;
        Some(Self { here: mesh.into(), there: Some(there.into()), abilities, server: None, _dirs: vec![dir] })
    }

    pub(crate) async fn redis() -> Option<Self> {
        Self::at(Kind::Redis, &Abilities::REDIS, "").await
    }

    pub(crate) async fn nats() -> Option<Self> {
        Self::at(Kind::Nats, &Abilities::NATS, "").await
    }

    pub(crate) async fn at(kind: Kind, abilities: &'static Abilities, more: &str) -> Option<Self> {
        let server = Server::start(kind)?;
        let table = table(kind, server.port(), more);
        let ((here, a), (there, b)) = (node(&table).await, node(&table).await);
        connected(&here).await;
        connected(&there).await;
        Some(Self { here, there: Some(there), abilities, server: Some(server), _dirs: vec![a, b] })
    }

    pub(crate) fn store(&self) -> Store {
        store(&self.here)
    }
}

pub(crate) fn store(stores: &Stores) -> Store {
    stores.store("shop/default".parse().unwrap())
}
