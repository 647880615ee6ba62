//! A node: everything that runs in one worker process, started in order and ended in order.
//!
//! What is configured is read and checked before a socket opens. What was good before the restart serves before the
//! listeners open, from this disk alone; only then the control plane is asked for news.

mod certificates;
mod check;
mod error;
mod fleet;
mod handover;
mod up;

use std::collections::BTreeMap;
use std::io::Read as _;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::{Duration, Instant};

use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use selvage_backend::{Backends, Stores};
use selvage_certs::{FrontSecret, NameRules, Role, peer_role};
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

use self::certificates::{acme_of, certificates, front_tls, look_at_certificates, own_secret};
use self::fleet::Fleet;
use self::handover::{Offer, take_over};

use crate::acme::Place;
use crate::admin::{Access, Admin, AdminParts, Shelf};
use crate::engine::{EngineError, EngineOptions, Engines, machine};
use crate::host::outbound::Egress;
use crate::jwt::KeyFetcher;
use crate::listen::sockets::Sockets;
use crate::listen::{ListenOptions, Listeners};
use crate::metrics::Metrics;
use crate::release::activate::{Activation, Base, Report};
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
/// How long an operator's request may take to end.
const ADMIN_DRAIN: Duration = Duration::from_secs(1);
/// How long the last instances may take to go, and how often that is looked at.
const RELEASE_MAX: Duration = Duration::from_secs(1);
const RELEASE_LOOK: Duration = Duration::from_millis(5);
/// Where compiled code lies below the state directory.
const COMPILED: &str = "compiled";

/// A running node.
pub struct Node {
    me: Arc<Me>,
    parts: Arc<Parts>,
    kv: Kv,
    listeners: Listeners,
    admin: Option<Admin>,
    report: watch::Receiver<Report>,
    drain: Duration,
    /// How long requests may take to end when a successor waits.
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
    fn of(listeners: &Listeners, kv: &Kv) -> Self {
        let (https, http) = (listeners.https_addr(), listeners.http_addr());
        Self { https, http, replication: kv.local_addr(), admin: None }
    }
}

impl Node {
    /// Starts a node. When it returns, the listeners are bound and the apps that were good before serve.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is left running.
    pub async fn start(config: NodeConfig) -> Result<Self, StartError> {
        Box::pin(Self::begin(config, false)).await
    }

    /// The same, with the sockets of the node that runs with this state directory, if one does: it is told to go, and has
    /// gone when this returns. What is wrong with the configuration is found before that.
    ///
    /// # Errors
    /// [`StartError`]; then nothing of this node is left running.
    pub async fn take_over(config: NodeConfig) -> Result<Self, StartError> {
        Box::pin(Self::begin(config, true)).await
    }

    async fn begin(config: NodeConfig, takes_over: bool) -> Result<Self, StartError> {
        let drain = Duration::from_millis(config.drain_ms);
        let handover = Duration::from_millis(config.handover_ms).min(drain);
        let fleet = config.identity.as_ref().map(Fleet::load).transpose()?;
        let reload = certificates(&config.certificates, config.tls.provider, config.acme.is_some())?;
        let names = Arc::new(NameRules::load(&config.tls.names)?);
        let secret = config.tls.secret.as_deref().map_or_else(own_secret, |path| Ok(FrontSecret::load(path)?))?;
        let seen = look_of(&config.trust);
        let policy = trust(&config.trust)?;
        let origin = match (&config.control_plane, &fleet) {
            (Some(place), Some(fleet)) => Some(Origin::new(&place.address, &*fleet.client()?)?),
            (Some(_), None) => return Err(StartError::Identity),
            (None, _) => None,
        };
        let (ways_out, backends) = (WaysOut::new(&config.egress)?, Backends::open(&config.kv)?);
        let engines = start_engines(engine_options(&config));
        let state = State::open_with(&config.state_dir, config.sealing_key.as_deref())?;
        let acme = acme_of(&config, reload.as_ref())?;
        let sealing = config.acme.as_ref().filter(|acme| acme.shared).map(|_| secret.place_seal());
        if takes_over {
            // What is wrong with the trust is found before the other node goes.
            ledger(&config.trust, &state)?;
        }
        let inherited = if takes_over { predecessors(&config.state_dir).await? } else { Sockets::default() };
        let ledger = ledger(&config.trust, &state)?;
        let revoked = ledger.as_ref().map(Ledger::revoked).unwrap_or_default();
        let terms = Terms::new(policy, revoked);
        let kv = open_kv(&config, fleet.as_ref()).await?;
        let stores = Stores::new(kv.clone(), backends);
        let compiled = state.dir().join(COMPILED);
        let base =
            base(state.clone(), stores.clone(), terms, config.limits.clone(), ways_out, (engines, compiled)).await?;
        machine::tell_if_few_descriptors();

        let parts = Parts::new(config.name.clone(), config.region.clone(), config.requests_max, base.metrics.clone());
        let challenges = reload.as_ref().map(|reload| reload.resolver().challenges().clone()).unwrap_or_default();
        let parts =
            Arc::new(parts.with_front(config.front.clone()).with_challenges(challenges).with_rules(Arc::clone(&names)));
        let terms = base.terms.clone();
        let (plans, planned) = watch::channel(None);
        let from = (Fleet::sources(fleet.as_ref(), origin.clone(), &config.region, &planned)?, ledger.clone());
        let mut activation = Activation::new(base, from, Arc::clone(&parts), config.domain.clone(), drain);
        let report = activation.report();
        plans.send_replace(Box::pin(activation.restore()).await);

        let tls = reload.as_ref().map(|reload| front_tls(reload, &config.tls, config.acme.as_ref(), (names, secret)));
        let options = ListenOptions { https: config.listen.https, http: config.listen.http, tls };
        let listeners = Listeners::open(&options, inherited, Arc::clone(&parts)).await?;
        let offer = offer(&config.state_dir, &listeners, handover);
        let addresses = Addresses::of(&listeners, &kv);
        let me = Arc::new(Me {
            name: config.name,
            region: config.region,
            labels: config.labels,
            addresses,
            admin: OnceLock::new(),
            ledger: ledger.clone(),
        });
        let access = Access::new(ledger.clone(), config.admin.named());
        let shelf = Shelf::new(state.clone(), planned.clone());
        let status = admin_parts(&me, &parts, (stores, shelf), &report, access);
        let admin = open_admin(config.listen.admin, fleet.as_ref(), &me, status).await?;

        let mut tasks = JoinSet::new();
        tasks.spawn(activation.run(planned));
        if let Some(reload) = reload {
            tasks.spawn(look_at_certificates(reload, listeners.servers(), parts.metrics.clone()));
        }
        if let Some(acme) = acme {
            let acme = match sealing {
                Some(sealing) => acme.of_place(Place::new(kv.clone(), sealing, me.name.clone())),
                None => acme,
            };
            tasks.spawn(acme.run(Arc::clone(&parts)));
        }
        let authorities = fleet.as_ref().map(Fleet::authorities);
        if let Some(fleet) = fleet {
            tasks.spawn(fleet.look_after(origin.clone().zip(config.control_plane.clone()), me.name.clone()));
        }
        tasks.spawn(look_at_policy(config.trust.clone(), terms.clone(), seen));
        let mut held = None;
        match origin.zip(authorities) {
            None => held = Some(plans),
            Some((origin, authorities)) => {
                let metrics = parts.metrics.clone();
                let course = Course { node: me.name.clone(), state, ledger, terms, metrics, plans };
                follow(&mut tasks, origin, (&me, &parts, report.clone()), authorities, course);
            }
        }
        Ok(Self {
            me,
            parts,
            kv,
            listeners,
            admin,
            report,
            drain,
            handover,
            offer,
            tasks,
            _plans: held,
            _temporary: None,
        })
    }

    /// Where it listens.
    pub fn addresses(&self) -> Addresses {
        Addresses { admin: self.me.admin.get().copied(), ..self.me.addresses.clone() }
    }

    /// What it runs.
    pub fn status(&self) -> Status {
        self.me.status(&self.report.borrow(), &self.parts)
    }

    /// Its KV.
    pub fn kv(&self) -> &Kv {
        &self.kv
    }

    /// Waits until a successor has taken the sockets. Then it is time to drain.
    pub async fn succeeded(&self) {
        match &self.offer {
            Some(offer) => offer.taken().cancelled().await,
            None => std::future::pending().await,
        }
    }

    /// Ends it: nothing new comes in, what is under way may end in `drain_ms`, and the KV is closed last. A successor that
    /// has the sockets is waited for no longer than `handover_ms`.
    pub async fn drain(mut self) {
        self.parts.begin_drain();
        let mut time = self.drain;
        if let Some(offer) = &mut self.offer {
            if offer.taken().is_cancelled() {
                time = self.handover;
            }
            offer.withdraw().await;
        }
        self.tasks.shutdown().await;
        self.listeners.drain(Instant::now() + time).await;
        if let Some(admin) = self.admin {
            // Operators may watch the drain to its end.
            admin.drain(Instant::now() + ADMIN_DRAIN).await;
        }
        self.kv.close().await;
        // With the apps go the instances that were being made for requests that will not come. Until the last one is
        // gone it holds the store's files, which whoever starts next wants.
        self.parts.table.store(Arc::new(Table::empty()));
        let released = async {
            while !self.kv.is_last_handle() {
                tokio::time::sleep(RELEASE_LOOK).await;
            }
        };
        let released = tokio::time::timeout(RELEASE_MAX, released).await.is_ok();
        if !released {
            tracing::warn!("what was under way holds the kv's files until the process ends");
        }
        drop(self.kv);
        if let Some(offer) = self.offer {
            offer.let_go(released);
        }
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

/// The sockets of the node that ran before.
async fn predecessors(state_dir: &Path) -> Result<Sockets, StartError> {
    let state_dir = state_dir.to_owned();
    let taken = tokio::task::spawn_blocking(move || take_over(&state_dir)).await?;
    Ok(taken.map_err(StartError::Handover)?.unwrap_or_default())
}

/// Offers the sockets to a successor. A node that can't do so serves all the same.
fn offer(state_dir: &Path, listeners: &Listeners, handover: Duration) -> Option<Offer> {
    // `drain` takes a little longer than its requests.
    let goes_within = handover + ADMIN_DRAIN + RELEASE_MAX;
    let sockets =
        listeners.sockets().try_clone().map_err(|error| tracing::warn!(%error, "sockets can't be handed over"));
    Offer::open(state_dir, sockets.ok()?, goes_within)
        .map_err(|error| tracing::warn!(error = chain(&error), "sockets can't be handed over"))
        .ok()
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
