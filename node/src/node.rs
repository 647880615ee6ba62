//! A node: everything that runs in one worker process, started in order and ended in order.
//!
//! What is configured is read and checked before a socket opens. What was good before the restart serves before the
//! listeners open, from this disk alone; only then the control plane is asked for news.

mod begin;
mod certificates;
mod check;
mod error;
mod fleet;
mod handover;
mod parting;
mod up;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use selvage_backend::{Mesh, Stores};
use selvage_certs::{Role, peer_role};
use selvage_config::join::Authorities;
use selvage_config::node::{Egress as EgressConfig, NodeConfig, Trust};
use selvage_config::plan::{Plan, Status};
use selvage_config::root::ROOT_BYTES_MAX;
use selvage_config::{Digest, Limits, NodeName, Region};
use selvage_sync::{Kv, Options as KvOptions, Tls};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};

pub use check::check;
pub use error::StartError;
pub use handover::HandoverError;
pub use up::UpOptions;

use self::begin::begin;
use self::fleet::Fleet;
use self::handover::Offer;
use self::parting::Parting;

use crate::admin::{Access, Admin, AdminParts, Shelf};
use crate::engine::{EngineError, EngineOptions, Engines};
use crate::host::outbound::Egress;
use crate::jwt::KeyFetcher;
use crate::listen::Listeners;
use crate::metrics::Metrics;
use crate::release::activate::{Base, Report};
use crate::release::compile::CompileCache;
use crate::release::ledger::Ledger;
use crate::release::origin::{Origin, chain};
use crate::release::plan::{self, Course};
use crate::release::state::State;
use crate::release::verify::{Policy, PolicyError, Terms};
use crate::route::Table;
use crate::serve::Parts;

/// How often the front's certificate files are looked at.
const CERTIFICATES_LOOK: Duration = Duration::from_secs(30);
/// How often the policy's files are looked at.
const POLICY_LOOK: Duration = Duration::from_secs(5);
/// Where compiled code lies below the state directory.
const COMPILED: &str = "compiled";

/// A running node.
pub struct Node {
    me: Arc<Me>,
    parts: Arc<Parts>,
    mesh: Mesh,
    listeners: Listeners,
    admin: Option<Admin>,
    report: watch::Receiver<Report>,
    drain: Duration,
    /// How long calls of the KV may take to end when a successor waits for it.
    handover: Duration,
    /// The sockets for a successor.
    offer: Option<Offer>,
    tasks: JoinSet<()>,
    /// Without a control plane nobody else holds it, and nothing new is planned.
    _plans: Option<watch::Sender<Option<Arc<Plan>>>>,
    /// The directory of `selvage up` when it was given none. It goes with the node.
    _temporary: Option<tempfile::TempDir>,
}

/// Who a node is and where it listens.
struct Me {
    name: NodeName,
    region: Region,
    labels: BTreeMap<String, String>,
    /// All but `admin`.
    addresses: Addresses,
    /// Known last: the listener that tells it must be there first.
    admin: OnceLock<SocketAddr>,
    /// What its fleet signed.
    ledger: Option<Ledger>,
}

/// Where a node listens, with the ports that it got.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Addresses {
    /// HTTP over TLS, and HTTP/3.
    pub https: Option<SocketAddr>,
    /// HTTP without TLS.
    pub http: Option<SocketAddr>,
    /// Operators.
    pub admin: Option<SocketAddr>,
    /// Other nodes.
    pub replication: Option<SocketAddr>,
}

impl Addresses {
    /// All but the operators'.
    fn of(listeners: &Listeners, mesh: &Mesh) -> Self {
        let (https, http) = (listeners.https_addr(), listeners.http_addr());
        Self { https, http, replication: mesh.kv().and_then(|kv| kv.local_addr()), admin: None }
    }
}

impl Node {
    /// Starts a node. When it returns, the listeners are bound and the apps that were good before serve.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is left running.
    pub async fn start(config: NodeConfig) -> Result<Self, StartError> {
        Box::pin(begin(config, false)).await
    }

    /// The same, with the sockets of the node that runs with this state directory, if one does. That one serves until this
    /// one has everything ready but the KV, takes nothing new then, and hands over the KV; when this returns, it may still
    /// end requests. What is wrong with the configuration is found before it hears of this one.
    ///
    /// # Errors
    /// [`StartError`]; then nothing of this node is left running.
    pub async fn take_over(config: NodeConfig) -> Result<Self, StartError> {
        Box::pin(begin(config, true)).await
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        Addresses { admin: self.me.admin.get().copied(), ..self.me.addresses.clone() }
    }

    /// What it runs.
    pub fn status(&self) -> Status {
        self.me.status(&self.report.borrow(), &self.parts)
    }

    /// Its KV, which is here as long as the node does not drain.
    pub fn kv(&self) -> Option<Kv> {
        self.mesh.kv()
    }

    /// Waits until a successor has taken the sockets. Then it is time to drain.
    pub async fn succeeded(&self) {
        match &self.offer {
            Some(offer) => offer.taken().cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Ends it: nothing new comes in, what is under way may end in `drain_ms`, and the KV is closed last. Where a successor
    /// has the sockets, it gets the KV at once, and calls of the KV are carried to it.
    pub async fn drain(mut self) {
        self.parts.begin_drain();
        let mut is_succeeded = false;
        if let Some(offer) = &mut self.offer {
            is_succeeded = offer.taken().is_cancelled();
            offer.withdraw().await;
        }
        self.tasks.shutdown().await;
        let listeners = self.listeners.drain(Instant::now() + self.drain);
        if let Some(offer) = self.offer.filter(|_| is_succeeded) {
            let parting = Parting { mesh: self.mesh, admin: self.admin, calls: self.handover };
            parting.hand_over(offer, listeners).await;
        } else {
            listeners.await;
            Parting { mesh: self.mesh, admin: self.admin, calls: Duration::ZERO }.let_go().await;
        }
        self.parts.table.store(Arc::new(Table::empty()));
    }
}

/// Follows the control plane: plans come in, the status goes out.
fn follow(
    tasks: &mut JoinSet<()>,
    origin: Origin,
    (me, parts, report): (&Arc<Me>, &Arc<Parts>, watch::Receiver<Report>),
    authorities: (watch::Receiver<Option<Authorities>>, watch::Sender<Option<Authorities>>),
    course: Course,
) {
    let (me, parts) = (Arc::clone(me), Arc::clone(parts));
    let status = move |report: &Report| me.status(report, &parts);
    tasks.spawn(plan::report(origin.clone(), report, authorities, status));
    tasks.spawn(plan::watch(origin, course));
}

impl Me {
    fn status(&self, report: &Report, parts: &Parts) -> Status {
        Status {
            load: parts.load_of(&report.watched),
            labels: self.labels.clone(),
            node: self.name.clone(),
            region: self.region.clone(),
            version: env!("CARGO_PKG_VERSION").to_owned(),
            generation: report.generation,
            replication: self.addresses.replication,
            front: self.addresses.https.or(self.addresses.http),
            admin: self.admin.get().copied(),
            apps: report.apps.values().cloned().collect(),
            plan: self.ledger.as_ref().map(|ledger| ledger.status(plan::now_ms())),
        }
    }
}

/// The node's own trust: nothing but its configuration makes it.
fn trust(trust: &Trust) -> Result<Policy, PolicyError> {
    match &trust.policy {
        Some(path) => Policy::load(path),
        None => Policy::of_key_files(&trust.keys, trust.legacy_signatures),
    }
}

/// The files that the policy is made of: changed ones are read anew.
fn look_of(trust: &Trust) -> Vec<Option<Digest>> {
    let policy = trust.policy.iter().chain(&trust.keys);
    let mut files: Vec<PathBuf> = policy.cloned().collect();
    if let Some(document) = trust.policy.as_ref().and_then(|path| {
        let text = std::fs::read_to_string(path).ok()?;
        selvage_config::policy::Policy::parse(path, &text).ok()
    }) {
        files.extend(document.files().cloned());
    }
    files.iter().map(|path| Some(Digest::of(&std::fs::read(path).ok()?))).collect()
}

/// Takes a new policy as it comes: what runs is verified by it, and what it does not cover stops. A bad one is told, and
/// the old one stays.
async fn look_at_policy(trusted: Trust, terms: watch::Sender<Arc<Terms>>, mut seen: Vec<Option<Digest>>) {
    loop {
        tokio::time::sleep(POLICY_LOOK).await;
        let (looking, before) = (trusted.clone(), seen.clone());
        let looked = tokio::task::spawn_blocking(move || {
            let now = look_of(&looking);
            let policy = (now != before).then(|| trust(&looking));
            (now, policy)
        });
        let Ok((now, policy)) = looked.await else { return };
        seen = now;
        match policy {
            None => {}
            Some(Ok(policy)) => {
                tracing::info!("new policy");
                terms.send_modify(|terms| *terms = Arc::new(Terms::new(policy, terms.revoked.clone())));
            }
            Some(Err(error)) => tracing::error!(error = chain(&error), "policy can't be used, the old one stays"),
        }
    }
}

/// The ledger of what the fleet signed, if the node has a root.
fn ledger(trust: &Trust, state: &State) -> Result<Option<Ledger>, StartError> {
    let Some(path) = &trust.root else { return Ok(None) };
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(ROOT_BYTES_MAX as u64).read_to_end(&mut bytes));
    read.map_err(|source| StartError::KeyFile { path: path.clone(), source })?;
    let envelope =
        serde_json::from_slice(&bytes).map_err(|source| StartError::RootFile { path: path.clone(), source })?;
    Ok(Some(Ledger::open(&envelope, state.clone())?))
}

/// The ways out: of guests, and for the keys of token issuers.
struct WaysOut {
    guests: Arc<Egress>,
    keys: KeyFetcher,
}

impl WaysOut {
    fn new(config: &EgressConfig) -> Result<Self, StartError> {
        let mut roots = Vec::new();
        for path in &config.roots {
            let read = |source| StartError::Roots { path: path.clone(), source };
            for certificate in CertificateDer::pem_file_iter(path).map_err(read)? {
                roots.push(certificate.map_err(read)?);
            }
        }
        let keys = KeyFetcher::new(&roots, config.private_networks)?;
        Ok(Self { guests: Arc::new(Egress::new(config)?), keys })
    }
}

fn engine_options(config: &NodeConfig) -> EngineOptions {
    config.instances_max.map_or_else(EngineOptions::default, |n| EngineOptions::of_instances(n.get()))
}

/// Starts the engines beside what else a start has to do: reserving the address space of the pools waits for the kernel.
fn start_engines(options: EngineOptions) -> JoinHandle<Result<Engines, EngineError>> {
    tokio::task::spawn_blocking(move || Engines::new(&options))
}

/// What all apps of a node stand on.
async fn base(
    state: State,
    kv: impl Into<Stores>,
    terms: Terms,
    limits_cap: Limits,
    ways_out: WaysOut,
    (engines, compiled): (JoinHandle<Result<Engines, EngineError>>, PathBuf),
) -> Result<Arc<Base>, StartError> {
    let (engines, kv) = (engines.await??, kv.into());
    let started = tokio::task::spawn_blocking(move || {
        let cache = CompileCache::open(&compiled)?;
        let WaysOut { guests: egress, keys } = ways_out;
        let terms = watch::Sender::new(Arc::new(terms));
        Ok(Arc::new(Base { engines, cache, terms, limits_cap, kv, egress, keys, state, metrics: Metrics::new() }))
    });
    started.await?
}

async fn open_kv(config: &NodeConfig, fleet: Option<&Fleet>) -> Result<Kv, StartError> {
    let tls = match fleet {
        Some(fleet) => Some(Tls { server: fleet.server(), client: fleet.client()?, trust: Arc::new(fleet.clone()) }),
        None => None,
    };
    let options = KvOptions {
        node: config.name.clone(),
        region: config.region.clone(),
        directory: config.state_dir.join("kv"),
        listen: config.listen.replication,
        tls,
        kept: config.kv.clone(),
    };
    // Only nodes replicate: an operator's or the control plane's certificate is nobody's here.
    let identify = |certificate: &CertificateDer<'_>| match peer_role(certificate) {
        Ok(Role::Node { node, .. }) => Some(node),
        _ => None,
    };
    Ok(Kv::open(options, Arc::new(identify)).await?)
}

/// Opens the operators' listener, if there shall be one, and has the status tell where it is.
async fn open_admin(
    address: Option<SocketAddr>,
    fleet: Option<&Fleet>,
    me: &Me,
    parts: AdminParts,
) -> Result<Option<Admin>, StartError> {
    let Some(address) = address else { return Ok(None) };
    let tls = fleet.map(Fleet::server);
    let bound = Admin::bind(address, tls, parts).await?;
    me.admin.get_or_init(|| bound.address());
    Ok(Some(bound))
}

fn admin_parts(
    me: &Arc<Me>,
    parts: &Arc<Parts>,
    (stores, shelf): (Stores, Shelf),
    report: &watch::Receiver<Report>,
    access: Access,
) -> AdminParts {
    let (me, report, seen) = (Arc::clone(me), report.clone(), Arc::clone(parts));
    let status = Arc::new(move || me.status(&report.borrow(), &seen));
    AdminParts { parts: Arc::clone(parts), kv: Some(stores), status, access, shelf: Some(shelf) }
}
