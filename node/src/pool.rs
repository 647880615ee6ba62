//! Instances of one component.
//!
//! A [`Lease`] is one fresh instance for one request. As many as the component's limit run at once; a few more
//! requests wait for a lease, and what is beyond that, or waits past its deadline, is [`Fault::Overload`].

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Instant;

use selvage_config::app::outbound::AllowedHost;
use selvage_config::{AppName, ComponentName, Limits, StoreLabel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use wasmtime::Engine;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p3::bindings::ServicePre;

use crate::engine::{Engines, Generation};
use crate::fault::Fault;
use crate::guest;
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
    pub(crate) pre: Pre,
    pub(crate) grants: Arc<Grants>,
    slots: Arc<Semaphore>,
    waiting: AtomicUsize,
}

impl Pool {
    /// Links a component to what it was granted.
    ///
    /// # Errors
    /// It imports or exports something else than this node can serve: it fails here, never at a request.
    pub fn new(engines: &Engines, compiled: &Compiled, grants: Grants) -> Result<Arc<Self>, ActivateError> {
        if let Some(path) = &grants.files {
            let open = std::fs::read_dir(path).map(drop);
            open.map_err(|source| ActivateError::Files { path: path.clone(), source })?;
        }
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
        Ok(Arc::new(Self {
            engine: engines.engine(generation).clone(),
            pre: pre.map_err(ActivateError::NotHttp)?,
            grants: Arc::new(grants),
            slots: Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS))),
            waiting: AtomicUsize::new(0),
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

    /// What a request of this component may use.
    pub fn limits(&self) -> &Limits {
        &self.grants.limits
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

/// One fresh instance for one request. Its place is free again when the guest is done: with the end of the answer's
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
        guest::call(&self.pool, self.permit, request).await
    }
}
