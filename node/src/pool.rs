//! Instances of one component.
//!
//! A [`Lease`] is one instance for one request: one that nobody used before, made ahead where there was time for it, or,
//! if the app's author chose that, one that answered other requests. As many as the component's limit run at once; a
//! few more requests wait for a lease, and what is beyond that, or waits past its deadline, is [`Fault::Overload`].
//!
//! What nobody asks for goes: first the instances that wait, then the code.

mod ahead;
mod code;
mod idle;
mod places;
mod shared;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError, Weak};
use std::time::{Duration, Instant};

use selvage_config::app::isolation::{Isolation, Reuse};
use selvage_config::app::outbound::AllowedHost;
use selvage_config::{AppName, ComponentName, Limits, StoreLabel};
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::JoinSet;
use wasmtime::Engine;
use wasmtime_wasi::filesystem::WasiFilesystemCtx;

use self::ahead::Ahead;
use self::code::Code;
use self::idle::Idle;
use self::shared::Shared;
use crate::engine::{Engines, Generation};
use crate::fault::Fault;
use crate::guest;
use crate::guest::heavy::Heavy;
use crate::guest::instance::Instance;
use crate::guest::meter::Habit;
use crate::guest::shared::Call;
use crate::host;
use crate::host::outbound::Egress;
use crate::line::{Line, Spent};
use crate::metrics::LogDropped;
use crate::release::compile::Compiled;
use crate::request::{Request, Response};

/// Requests that may wait for a lease, for each that may run.
const WAITING_PER_RUNNING: usize = 4;

/// Instances that are made ahead of the requests of a component, at most.
const AHEAD_MAX: usize = 16;
/// How long one waits that was made ahead.
const AHEAD_UNUSED_MAX: Duration = Duration::from_secs(10);
/// How long a component may get ready to take another one's place, once its code is there.
const WARM_MAX: Duration = Duration::from_secs(1);

pub(crate) use self::code::Pre;
pub(crate) use self::places::{Place, Places};
pub(crate) use self::shared::Inbox;

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
    pub kv: selvage_backend::Stores,
    /// The way out.
    pub egress: Arc<Egress>,
    /// What its app has used of full cores.
    pub spent: Arc<Spent>,
    /// Where is counted what it writes beyond its log.
    pub log_dropped: LogDropped,
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

/// The instances of one component.
pub struct Pool {
    code: Code,
    /// The component's files, open as long as the pool is.
    pub(crate) files: WasiFilesystemCtx,
    pub(crate) grants: Arc<Grants>,
    slots: Arc<Semaphore>,
    waiting: AtomicUsize,
    places: Places,
    idle: Idle<Rested>,
    ahead: Ahead,
    habit: Arc<Habit>,
    /// Those that answer several requests at once, if they may.
    shared: Option<Shared>,
    /// Whether somebody looks after the instances that wait, and after the code.
    is_swept: [AtomicBool; 2],
    /// What the pool does by itself. It ends with the pool.
    tasks: Mutex<JoinSet<()>>,
}

/// An instance that waits for its next request, with its place.
pub(crate) struct Rested {
    instance: Instance,
    _place: Place,
}

impl Pool {
    /// Links a component to what it was granted. Call it where there is a tokio runtime.
    ///
    /// # Errors
    /// It imports or exports something else than this node can serve: it fails here, never at a request.
    pub fn new(engines: &Engines, compiled: &Compiled, grants: Grants) -> Result<Arc<Self>, ActivateError> {
        let files = host::wasi::files(grants.files.as_deref()).map_err(|error| {
            let source = error.downcast().unwrap_or_else(std::io::Error::other);
            ActivateError::Files { path: grants.files.clone().unwrap_or_default(), source }
        })?;
        let slots = grants.limits.concurrent_requests as usize;
        let idle = match grants.isolation {
            Isolation::Fresh => Idle::new(AHEAD_MAX.min(slots), AHEAD_UNUSED_MAX),
            Isolation::Reuse(reuse) => Idle::new(slots, Duration::from_millis(reuse.idle_ms)),
        };
        let shared = match (compiled.generation(), &grants.isolation) {
            (Generation::P3, Isolation::Reuse(reuse)) => Some(Shared::new(reuse.concurrency as usize)),
            _ => None,
        };
        let pool = Arc::new(Self {
            code: Code::new(engines, compiled)?,
            files,
            grants: Arc::new(grants),
            slots: Arc::new(Semaphore::new(slots.min(Semaphore::MAX_PERMITS))),
            waiting: AtomicUsize::new(0),
            places: engines.places(compiled.generation()).clone(),
            idle,
            ahead: Ahead::default(),
            habit: Arc::default(),
            shared,
            is_swept: Default::default(),
            tasks: Mutex::new(JoinSet::new()),
        });
        pool.begin_sweep(Part::Code);
        Ok(pool)
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

    /// Instances that wait for a request: made ahead, or for the next one.
    pub fn idle(&self) -> usize {
        self.idle.count() + self.shared.as_ref().map_or(0, Shared::idle)
    }

    /// Whether the component's code is in memory.
    pub fn is_loaded(&self) -> bool {
        self.code.is_loaded()
    }

    /// Gives up the instances that wait too long at `now`, and the code if nobody asked for it for long. The pool does
    /// so itself as time goes by. False if nothing is left.
    pub fn expire(&self, now: Instant) -> bool {
        let instances = self.expire_part(Part::Instances, now);
        self.expire_part(Part::Code, now) || instances
    }

    fn expire_part(&self, part: Part, now: Instant) -> bool {
        match part {
            Part::Instances => {
                self.ahead.settle();
                let shared = self.shared.as_ref().is_some_and(|shared| shared.expire(now, self.idle.longest()));
                self.idle.expire(now) || shared
            }
            Part::Code => self.code.expire(now),
        }
    }

    /// Gives up instances that wait, and the code, as if nobody had asked for them for long.
    pub(crate) fn rest_now(&self) {
        self.expire(Instant::now() + self.idle.longest() + code::UNUSED_MAX);
    }

    /// When an instance that answered a request is given up, if it may answer another at all.
    pub(crate) fn reuse(&self) -> Option<&Reuse> {
        match &self.grants.isolation {
            Isolation::Fresh => None,
            Isolation::Reuse(reuse) => Some(reuse),
        }
    }

    pub(crate) fn engine(&self) -> &Engine {
        self.code.engine()
    }

    /// Where guests go that compute for long.
    pub(crate) fn heavy(&self) -> &Heavy {
        self.code.engines().heavy()
    }

    /// Where its requests wait for a core that is full.
    pub(crate) fn line(&self) -> &Line {
        self.code.engines().line()
    }

    /// What its guests were like lately.
    pub(crate) fn habit(&self) -> &Arc<Habit> {
        &self.habit
    }

    /// The code, to make an instance of.
    ///
    /// # Errors
    /// [`Fault::Node`] if it can't be loaded again.
    pub(crate) async fn code(self: &Arc<Self>) -> Result<Arc<Pre>, Fault> {
        let (pre, was_loaded) = self.code.get().await?;
        if was_loaded {
            self.begin_sweep(Part::Code);
        }
        Ok(pre)
    }

    /// An instance that waits for a request. Nobody else has it.
    pub(crate) fn take(self: &Arc<Self>) -> Option<Instance> {
        let taken = self.idle.take(Instant::now());
        if self.reuse().is_none() && self.places.has_room() {
            let running = self.grants.limits.concurrent_requests as usize - self.slots.available_permits();
            if self.ahead.ask(running, self.idle.count()) {
                self.make_ahead();
            }
        }
        Some(taken?.instance)
    }

    /// Whether an instance answers several requests at once.
    pub(crate) fn is_shared(&self) -> bool {
        self.shared.is_some()
    }

    /// Gives a request to an instance that answers others too, or to a new one.
    pub(crate) fn share(self: &Arc<Self>, call: Call) {
        if let Some(inbox) = self.shared.as_ref().and_then(|shared| shared.give(call)) {
            self.spawn(guest::shared::run(Arc::downgrade(self), inbox));
        }
    }

    /// A place to wait in for an instance whose linear memories have so many bytes.
    pub(crate) fn place(&self, memory_bytes: u64) -> Option<Place> {
        self.places.take(memory_bytes)
    }

    /// An instance waits. It is given up if that takes long.
    pub(crate) fn has_resting(self: &Arc<Self>) {
        self.begin_sweep(Part::Instances);
    }

    /// A place to wait in for an instance, or the end of it.
    pub(crate) fn rest(&self, instance: Instance) -> Option<Rested> {
        let place = self.places.take(instance.memory_bytes())?;
        Some(Rested { instance, _place: place })
    }

    /// Keeps an instance for its next request.
    pub(crate) fn keep(self: &Arc<Self>, rested: Rested) {
        self.idle.put(rested, Instant::now());
        self.begin_sweep(Part::Instances);
    }

    /// Makes instances with the time that requests leave.
    fn make_ahead(self: &Arc<Self>) {
        let pool = Arc::downgrade(self);
        let made = self.heavy().spawn(async move {
            while let Some(pool) = pool.upgrade() {
                if !pool.ahead.goes_on(|| pool.idle.count()) {
                    return;
                }
                match guest::ahead(&pool).await.and_then(|instance| pool.rest(instance)) {
                    Some(rested) => pool.keep(rested),
                    // It fails, or there is no room: the next request that finds none begins again.
                    None => return pool.ahead.made(),
                }
            }
        });
        if let Some(made) = made {
            self.spawn(async move {
                // It has nothing to say.
                let _ = made.await;
            });
        }
    }

    /// Makes as many instances as `before` needed lately, whose requests come here next.
    pub async fn warm_like(self: &Arc<Self>, before: &Self) {
        let wanted = before.ahead.wanted().max(before.idle.count()).min(self.idle.most()).min(AHEAD_MAX);
        if self.is_shared() || wanted == 0 {
            return;
        }
        self.ahead.expect(wanted);
        let warm = async {
            while self.idle.count() < wanted {
                match guest::ahead(self).await.and_then(|instance| self.rest(instance)) {
                    Some(rested) => self.keep(rested),
                    None => return,
                }
            }
        };
        // What is missing then, requests make themselves.
        let _ = tokio::time::timeout(WARM_MAX, warm).await;
    }

    /// Looks after a part until nothing of it is left, unless somebody does so already.
    fn begin_sweep(self: &Arc<Self>, part: Part) {
        let is_swept = &self.is_swept[part as usize];
        if !is_swept.load(Ordering::SeqCst) && !is_swept.swap(true, Ordering::SeqCst) {
            let every = match part {
                Part::Instances => self.idle.longest(),
                Part::Code => code::UNUSED_MAX / 2,
            };
            self.spawn(sweep(Arc::downgrade(self), part, every));
        }
    }

    fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        let mut tasks = self.tasks.lock().unwrap_or_else(PoisonError::into_inner);
        while tasks.try_join_next().is_some() {}
        tasks.spawn(task);
    }

    /// What a request of this component may use.
    pub fn limits(&self) -> &Limits {
        &self.grants.limits
    }
}

/// What goes when nobody asks for it.
#[derive(Debug, Clone, Copy)]
enum Part {
    Instances,
    Code,
}

/// Gives up what nobody asks for, until nothing is left.
async fn sweep(pool: Weak<Pool>, part: Part, every: Duration) {
    loop {
        tokio::time::sleep(every).await;
        let Some(pool) = pool.upgrade() else { return };
        if pool.expire_part(part, Instant::now()) {
            continue;
        }
        let is_swept = &pool.is_swept[part as usize];
        is_swept.store(false, Ordering::SeqCst);
        // What came just before, from somebody who saw that this one looks after it, would be left alone.
        if !pool.expire_part(part, Instant::now()) || is_swept.swap(true, Ordering::SeqCst) {
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
