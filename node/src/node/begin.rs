//! How a node starts: alone, or beside the process that runs and then in its place.
//!
//! What needs no KV comes first: configuration, engines, the apps that were good. So the process that runs serves until
//! this one could; then this one accepts, and the KV, whose files only one of them may have, follows in a moment. Calls of it
//! wait for that, and nothing else does.

use std::path::Path;
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use selvage_backend::{Backends, Mesh, Stores};
use selvage_certs::{FrontSecret, FrontTls, NameRules, PlaceSeal, Reload};
use selvage_config::Digest;
use selvage_config::node::NodeConfig;
use selvage_config::plan::Plan;
use tokio::sync::watch;
use tokio::task::JoinSet;
use tokio_util::sync::CancellationToken;

use super::certificates::{acme_of, certificates, front_tls, look_at_certificates, own_secret};
use super::fleet::Fleet;
use super::handover::{Offer, Predecessor, meet, runs};
use super::parting::{ADMIN_DRAIN, RELEASE_MAX};
use super::{
    Addresses, COMPILED, Me, Node, StartError, WaysOut, admin_parts, base, engine_options, follow, ledger,
    look_at_policy, look_of, open_admin, open_kv, start_engines, trust,
};
use crate::acme::{Acme, Place};
use crate::admin::{Access, Shelf};
use crate::engine::machine;
use crate::listen::sockets::Sockets;
use crate::listen::{ListenOptions, Listeners};
use crate::release::activate::{Activation, Base};
use crate::release::ledger::Ledger;
use crate::release::origin::{Origin, chain};
use crate::release::plan::Course;
use crate::release::state::State;
use crate::release::verify::Terms;
use crate::serve::Parts;

/// What the configuration names, read and checked. Nothing is open yet.
struct Named {
    config: NodeConfig,
    fleet: Option<Fleet>,
    origin: Option<Origin>,
    reload: Option<Reload>,
    tls: Option<FrontTls>,
    acme: Option<Acme>,
    sealing: Option<PlaceSeal>,
    state: State,
    ledger: Option<Ledger>,
    /// The policy's files as they were.
    seen: Vec<Option<Digest>>,
}

/// What serves as soon as it is given sockets, but for the KV.
struct Ready {
    mesh: Mesh,
    stores: Stores,
    base: Arc<Base>,
    parts: Arc<Parts>,
    activation: Activation,
    plans: watch::Sender<Option<Arc<Plan>>>,
    planned: watch::Receiver<Option<Arc<Plan>>>,
    /// Whether a process runs that may hand over.
    is_second: bool,
}

/// Starts a node.
pub(super) async fn begin(config: NodeConfig, takes_over: bool) -> Result<Node, StartError> {
    let is_second = takes_over && in_the_background(&config.state_dir, runs).await?;
    let (named, ready) = Box::pin(ready(config, is_second)).await?;
    Box::pin(serve(named, ready)).await
}

/// Reads what is configured, and makes ready what needs no socket.
async fn ready(config: NodeConfig, is_second: bool) -> Result<(Named, Ready), StartError> {
    let drain = Duration::from_millis(config.drain_ms);
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
    let ledger = ledger(&config.trust, &state)?;
    let revoked = ledger.as_ref().map(Ledger::revoked).unwrap_or_default();

    let mesh = Mesh::coming();
    if !is_second {
        mesh.arrive(open_kv(&config, fleet.as_ref()).await?);
    }
    let stores = Stores::new(mesh.clone(), backends);
    let (compiled, limits) = (state.dir().join(COMPILED), config.limits.clone());
    let terms = Terms::new(policy, revoked);
    let base = base(state.clone(), stores.clone(), terms, limits, ways_out, (engines, compiled)).await?;
    machine::tell_if_few_descriptors();
    let parts = Parts::new(config.name.clone(), config.region.clone(), config.requests_max, base.metrics.clone());
    let challenges = reload.as_ref().map(|reload| reload.resolver().challenges().clone()).unwrap_or_default();
    let parts =
        Arc::new(parts.with_front(config.front.clone()).with_challenges(challenges).with_rules(Arc::clone(&names)));
    let (plans, planned) = watch::channel(None);
    let from = (Fleet::sources(fleet.as_ref(), origin.clone(), &config.region, &planned)?, ledger.clone());
    let mut activation = Activation::new(Arc::clone(&base), from, Arc::clone(&parts), config.domain.clone(), drain);
    plans.send_replace(match is_second {
        false => Box::pin(activation.restore()).await,
        true => Box::pin(activation.restore_beside()).await,
    });
    let tls = reload.as_ref().map(|reload| front_tls(reload, &config.tls, config.acme.as_ref(), (names, secret)));
    let ready = Ready { mesh, stores, base, parts, activation, plans, planned, is_second };
    Ok((Named { config, fleet, origin, reload, tls, acme, sealing, state, ledger, seen }, ready))
}

/// Accepts, and takes over where there is somebody to take over from.
async fn serve(named: Named, mut ready: Ready) -> Result<Node, StartError> {
    let Named { config, fleet, tls, .. } = &named;
    let patience = Duration::from_millis(config.drain_ms);
    let before = match ready.is_second {
        true => in_the_background(&config.state_dir, move |dir| meet(dir, patience)).await?,
        false => None,
    };
    let (predecessor, inherited) = before.unzip();
    if ready.is_second && predecessor.is_none() {
        // It went while this one got ready.
        ready.mesh.arrive(open_kv(config, fleet.as_ref()).await?);
    }
    let options = ListenOptions { https: config.listen.https, http: config.listen.http, tls: tls.clone() };
    let listeners = Listeners::open(&options, inherited.unwrap_or_default(), Arc::clone(&ready.parts)).await?;
    let alone = CancellationToken::new();
    let mut tasks = JoinSet::new();
    let offer = match predecessor {
        None => {
            alone.cancel();
            offer(config, &listeners, &alone)
        }
        Some(mut predecessor) => {
            predecessor.succeed(listeners.sockets().quic.as_ref()).map_err(StartError::Handover)?;
            let offer = offer(config, &listeners, &alone);
            let predecessor = succeed(&named, &mut ready, predecessor).await?;
            let (mesh, parts) = (ready.mesh.clone(), Arc::clone(&ready.parts));
            let sockets =
                listeners.sockets().try_clone().map_err(|error| tracing::warn!(%error, "sockets of QUIC")).ok();
            tasks.spawn(async move {
                predecessor.serve(mesh, || parts.metrics.kv_carried()).await;
                part(sockets.as_ref());
                alone.cancel();
            });
            offer
        }
    };
    go_on(named, ready, (listeners, offer), tasks).await
}

/// Waits until the process before has let go of what only one may have, and takes that.
async fn succeed(named: &Named, ready: &mut Ready, mut before: Predecessor) -> Result<Predecessor, StartError> {
    let waited = tokio::task::spawn_blocking(move || before.wait_until_free().map(|()| before)).await?;
    let before = waited.map_err(StartError::Handover)?;
    ready.mesh.arrive(open_kv(&named.config, named.fleet.as_ref()).await?);
    tracing::info!("the kv is here");
    if let Some(plan) = Box::pin(ready.activation.go_on()).await {
        ready.plans.send_replace(Some(plan));
    }
    Ok(before)
}

/// The process before has ended: no packets are steered to it any more.
fn part(sockets: Option<&Sockets>) {
    let steered = sockets.and_then(|sockets| sockets.quic.as_ref()).map_or(Ok(()), |group| group.steer(false));
    match steered {
        Ok(()) => tracing::info!("the node before has ended"),
        Err(error) => tracing::warn!(%error, "the node before has ended; packets are steered to it still"),
    }
}

/// Starts what looks after a node that serves.
async fn go_on(
    named: Named,
    ready: Ready,
    (listeners, offer): (Listeners, Option<Offer>),
    mut tasks: JoinSet<()>,
) -> Result<Node, StartError> {
    let Named { config, fleet, origin, reload, acme, sealing, state, ledger, seen, .. } = named;
    let Ready { mesh, stores, base, parts, activation, plans, planned, .. } = ready;
    let (terms, report) = (base.terms.clone(), activation.report());
    let me = Arc::new(Me {
        name: config.name.clone(),
        region: config.region.clone(),
        labels: config.labels.clone(),
        addresses: Addresses::of(&listeners, &mesh),
        admin: OnceLock::new(),
        ledger: ledger.clone(),
    });
    let access = Access::new(ledger.clone(), config.admin.named());
    let shelf = Shelf::new(state.clone(), planned.clone());
    let status = admin_parts(&me, &parts, (stores, shelf), &report, access);
    let admin = open_admin(config.listen.admin, fleet.as_ref(), &me, status).await?;

    tasks.spawn(activation.run(planned));
    if let Some(reload) = reload {
        tasks.spawn(look_at_certificates(reload, listeners.servers(), parts.metrics.clone()));
    }
    if let Some(acme) = acme {
        let acme = match sealing.zip(mesh.kv()) {
            Some((sealing, kv)) => acme.of_place(Place::new(kv, sealing, me.name.clone())),
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
    let drain = Duration::from_millis(config.drain_ms);
    let handover = Duration::from_millis(config.handover_ms).min(drain);
    Ok(Node {
        me,
        parts,
        mesh,
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

/// Offers the sockets to a successor. A node that can't do so serves all the same.
fn offer(config: &NodeConfig, listeners: &Listeners, alone: &CancellationToken) -> Option<Offer> {
    // Letting go takes a little longer than the calls.
    let free_within = Duration::from_millis(config.handover_ms.min(config.drain_ms)) + ADMIN_DRAIN + RELEASE_MAX;
    let sockets =
        listeners.sockets().try_clone().map_err(|error| tracing::warn!(%error, "sockets can't be handed over"));
    Offer::open(&config.state_dir, sockets.ok()?, free_within, alone.clone())
        .map_err(|error| tracing::warn!(error = chain(&error), "sockets can't be handed over"))
        .ok()
}

/// Asks the node that runs, without holding up this runtime.
async fn in_the_background<T: Send + 'static>(
    state_dir: &Path,
    ask: impl FnOnce(&Path) -> Result<T, super::HandoverError> + Send + 'static,
) -> Result<T, StartError> {
    let state_dir = state_dir.to_owned();
    let asked = tokio::task::spawn_blocking(move || ask(&state_dir)).await?;
    asked.map_err(StartError::Handover)
}
