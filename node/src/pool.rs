//! Instances of one component.
//!
//! A [`Lease`] is one instance for one request, fresh or, if the app's author chose that, used before. As many as the component's limit run at once; a few more
//! requests wait for a lease, and what is beyond that, or waits past its deadline, is [`Fault::Overload`].

mod idle;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use selvage_config::app::isolation::{Isolation, Reuse};
use selvage_config::app::outbound::AllowedHost;
use selvage_config::{AppName, ComponentName, Limits, StoreLabel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use wasmtime::Engine;
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p3::bindings::ServicePre;

use self::idle::Idle;
use crate::engine::{Engines, Generation};
use crate::fault::Fault;
use crate::guest;
use crate::guest::heavy::Heavy;
use crate::guest::instance::Instance;
use crate::host::outbound::Egress;
use crate::host::{self, State};
use crate::release::compile::Compiled;
use crate::request::{Request, Response};

/// Requests that may wait for a lease, for each that may run.
const WAITING_PER_RUNNING: usize = 4;

/// What a component may use.
pub struct Grants {
    /// Whose component it is.
    pub app: AppName,
    /// Its name within the app.
    pub component: ComponentName,
    /// Its limits, none above the node's.
    pub limits: Limits,
    /// What its requests may share.
    pub isolation: Isolation,
    /// Its variables, settled.
    pub variables: BTreeMap<String, String>,
    /// Its environment. Nothing of the node's own.
    pub environment: BTreeMap<String, String>,
    /// The directory that it sees, read-only, as `/`.
    pub files: Option<PathBuf>,
    /// Where it may send requests.
    pub outbound: Vec<AllowedHost>,
    /// The stores that it may open.
    pub stores: Vec<StoreLabel>,
    /// Where its stores are.
    pub kv: selvage_sync::Kv,
    /// The way out.
    pub egress: Arc<Egress>,
}

/// A component can't be run with these grants.
#[derive(Debug, thiserror::Error)]
pub enum ActivateError {
    /// It imports what this node doesn't offer.
    #[error("imports that this node does not offer: {}", missing.join(", "))]
    Imports {
        /// All of them.
        missing: Vec<String>,
    },
    /// It imports an interface that this node offers in another shape.
    #[error("an import has another type than this node offers")]
    Mismatch(#[source] wasmtime::Error),
    /// It exports no HTTP handler of its generation.
    #[error("exports no usable HTTP handler")]
    NotHttp(#[source] wasmtime::Error),
    /// The directory of its files is not there.
    #[error("open files at {path}")]
    Files {
        /// Where they should be.
        path: PathBuf,
        /// Why not.
        #[source]
        source: std::io::Error,
    },
}

/// A component that is linked and ready to be instantiated.
pub(crate) enum Pre {
    P2(ProxyPre<State>),
    P3(ServicePre<State>),
}

/// The instances of one component.
pub struct Pool {
    pub(crate) engine: Engine,
    /// Where guests go that compute for long.
    pub(crate) heavy: Heavy,
    pub(crate) pre: Pre,
    /// The component's files, open as long as the pool is.
    pub(crate) files: WasiFilesystemCtx,
    pub(crate) grants: Arc<Grants>,
    slots: Arc<Semaphore>,
    waiting: AtomicUsize,
    kept: Option<Kept>,
}

/// What answered a request and waits for the next one.
struct Kept {
    reuse: Reuse,
    /// Shared by all pools of the engine: what waits must never take all room from what runs.
    places: Arc<Semaphore>,
    idle: Idle<Rested>,
    /// Ends with the pool.
    sweepers: Mutex<JoinSet<()>>,
}

/// An instance that waits for its next request, with its place.
pub(crate) struct Rested {
    instance: Instance,
    _place: OwnedSemaphorePermit,
}

impl Pool {
    /// Links a component to what it was granted.
    ///
    /// # Errors
    /// It imports or exports something else than this node can serve: it fails here, never at a request.
    pub fn new(engines: &Engines, compiled: &Compiled, grants: Grants) -> Result<Arc<Self>, ActivateError> {
        let files = host::wasi::files(grants.files.as_deref()).map_err(|error| {
            let source = error.downcast().unwrap_or_else(std::io::Error::other);
            ActivateError::Files { path: grants.files.clone().unwrap_or_default(), source }
        })?;
        let generation = compiled.generation();
        let linker = engines.linker(generation);
        let linked = linker.instantiate_pre(compiled.component()).map_err(|error| {
            let missing = host::missing(linker, compiled.component());
            if missing.is_empty() { ActivateError::Mismatch(error) } else { ActivateError::Imports { missing } }
        })?;
        let pre = match generation {
            Generation::P2 => ProxyPre::new(linked).map(Pre::P2),
            Generation::P3 => ServicePre::new(linked).map(Pre::P3),
        };
        let slots = grants.limits.concurrent_requests as usize;
        let kept = match grants.isolation {
            Isolation::Fresh => None,
            Isolation::Reuse(reuse) => Some(Kept::new(reuse, slots, engines.places(generation))),
        };
        Ok(Arc::new(Self {
            engine: engines.engine(generation).clone(),
            heavy: engines.heavy().clone(),
            pre: pre.map_err(ActivateError::NotHttp)?,
            files,
            grants: Arc::new(grants),
            slots: Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS))),
            waiting: AtomicUsize::new(0),
            kept,
        }))
    }

    /// Takes the right to run one instance, at once or when another request is done.
    ///
    /// # Errors
    /// [`Fault::Overload`] if too many wait already, or if the deadline passes.
    pub async fn lease(self: &Arc<Self>, deadline: Instant) -> Result<Lease, Fault> {
        let permit = match Arc::clone(&self.slots).try_acquire_owned() {
            Ok(permit) => permit,
            Err(_) => self.wait(deadline).await?,
        };
        Ok(Lease { pool: Arc::clone(self), permit })
    }

    async fn wait(&self, deadline: Instant) -> Result<OwnedSemaphorePermit, Fault> {
        let _waiting = Waiting::new(&self.waiting, self.waiting_max()).ok_or(Fault::Overload("queue"))?;
        let acquired = tokio::time::timeout_at(deadline.into(), Arc::clone(&self.slots).acquire_owned()).await;
        acquired.map_err(|_| Fault::Overload("queue-deadline"))?.map_err(|_| Fault::Overload("queue"))
    }

    fn waiting_max(&self) -> usize {
        (self.grants.limits.concurrent_requests as usize).saturating_mul(WAITING_PER_RUNNING)
    }

    /// Instances that wait for their next request.
    pub fn idle(&self) -> usize {
        self.kept.as_ref().map_or(0, |kept| kept.idle.count())
    }

    /// Gives up the instances that wait too long at `now`. The pool does so itself as time goes by. False if none is
    /// left.
    pub fn expire(&self, now: Instant) -> bool {
        self.kept.as_ref().is_some_and(|kept| kept.idle.expire(now))
    }

    /// When an instance that answered a request is given up, if it may answer another at all.
    pub(crate) fn reuse(&self) -> Option<&Reuse> {
        self.kept.as_ref().map(|kept| &kept.reuse)
    }

    /// An instance that waits for a request. Nobody else has it.
    pub(crate) fn take(&self) -> Option<Instance> {
        Some(self.kept.as_ref()?.idle.take(Instant::now())?.instance)
    }

    /// A place to wait in for an instance, or the end of it.
    pub(crate) fn rest(&self, instance: Instance) -> Option<Rested> {
        let place = Arc::clone(&self.kept.as_ref()?.places).try_acquire_owned().ok()?;
        Some(Rested { instance, _place: place })
    }

    /// Keeps an instance for its next request.
    pub(crate) fn keep(self: &Arc<Self>, rested: Rested) {
        let Some(kept) = &self.kept else { return };
        if kept.idle.put(rested, Instant::now()) {
            let mut sweepers = kept.sweepers.lock().unwrap_or_else(PoisonError::into_inner);
            // The one before has found nothing left: it ends, or has ended.
            while sweepers.try_join_next().is_some() {}
            sweepers.spawn(sweep(Arc::downgrade(self), Duration::from_millis(kept.reuse.idle_ms)));
        }
    }

    /// What a request of this component may use.
    pub fn limits(&self) -> &Limits {
        &self.grants.limits
    }
}

impl Kept {
    fn new(reuse: Reuse, max: usize, places: &Arc<Semaphore>) -> Self {
        let idle = Idle::new(max, Duration::from_millis(reuse.idle_ms));
        Self { reuse, places: Arc::clone(places), idle, sweepers: Mutex::new(JoinSet::new()) }
    }
}

/// Gives up instances for which no request comes, until none waits any more.
async fn sweep(pool: Weak<Pool>, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        if !pool.upgrade().is_some_and(|pool| pool.expire(Instant::now())) {
            return;
        }
    }
}

/// One request that waits for a lease.
struct Waiting<'a>(&'a AtomicUsize);

impl<'a> Waiting<'a> {
    /// `None` if `max` wait already.
    fn new(count: &'a AtomicUsize, max: usize) -> Option<Self> {
        let more = |waiting: usize| (waiting < max).then_some(waiting + 1);
        count.fetch_update(Ordering::Relaxed, Ordering::Relaxed, more).ok().map(|_| Self(count))
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// One instance for one request. Its place is free again when the guest is done: with the end of the answer's
/// body, or before it if the guest had nothing more to do with that.
pub struct Lease {
    pool: Arc<Pool>,
    permit: OwnedSemaphorePermit,
}

impl Lease {
    /// Asks the guest. Bodies stream both ways; the limits hold until the end of the answer's body.
    ///
    /// # Errors
    /// Exactly one [`Fault`] if there is no answer. What fails later ends the body with an error.
    pub async fn call(self, request: Request) -> Result<Response, Fault> {
        guest::call(self.pool, self.permit, request).await
    }
}
