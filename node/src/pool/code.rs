//! The code of one component: linked to what it was granted, in memory only while somebody asks for it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use arc_swap::ArcSwapOption;
use tokio::sync::Mutex;
use wasmtime::Engine;
use wasmtime::component::Component;
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p3::bindings::ServicePre;

use super::ActivateError;
use crate::engine::{Engines, Generation};
use crate::fault::Fault;
use crate::host::{self, State};
use crate::release::compile::{Compiled, OnDisk};

/// How long code stays in memory that nobody asks for.
pub(super) const UNUSED_MAX: Duration = Duration::from_secs(60);

/// A component that is linked and ready to be instantiated.
pub(crate) enum Pre {
    P2(ProxyPre<State>),
    P3(ServicePre<State>),
}

/// The code, or the way to it.
pub(super) struct Code {
    engines: Engines,
    generation: Generation,
    loaded: ArcSwapOption<Pre>,
    /// `None` if it could not be kept there; then it stays in memory.
    on_disk: Option<Arc<OnDisk>>,
    /// One loads, the others wait for it.
    loading: Mutex<()>,
    since: Instant,
    /// When it was asked for last, milliseconds after `since`.
    used_ms: AtomicU64,
}

impl Code {
    /// Links a component.
    ///
    /// # Errors
    /// It imports or exports something else than this node can serve.
    pub(super) fn new(engines: &Engines, compiled: &Compiled) -> Result<Self, ActivateError> {
        let generation = compiled.generation();
        let pre = link(engines, generation, compiled.component())?;
        Ok(Self {
            engines: engines.clone(),
            generation,
            loaded: ArcSwapOption::from_pointee(pre),
            on_disk: compiled.on_disk().cloned(),
            loading: Mutex::new(()),
            since: Instant::now(),
            used_ms: AtomicU64::new(0),
        })
    }

    pub(super) fn engine(&self) -> &Engine {
        self.engines.engine(self.generation)
    }

    pub(super) fn engines(&self) -> &Engines {
        &self.engines
    }

    pub(super) fn is_loaded(&self) -> bool {
        self.loaded.load().is_some()
    }

    /// The code, which is loaded first if nobody asked for it for long. True if that was so.
    ///
    /// # Errors
    /// [`Fault::Node`] if the disk does not give it back.
    pub(super) async fn get(&self) -> Result<(Arc<Pre>, bool), Fault> {
        self.used_ms.store(self.age(Instant::now()), Ordering::Relaxed);
        if let Some(pre) = self.loaded.load_full() {
            return Ok((pre, false));
        }
        let _loading = self.loading.lock().await;
        if let Some(pre) = self.loaded.load_full() {
            return Ok((pre, false));
        }
        let gone = |why: String| Fault::Node(format!("load compiled component: {why}"));
        let on_disk = self.on_disk.clone().ok_or_else(|| gone("not on disk".into()))?;
        let (engines, generation) = (self.engines.clone(), self.generation);
        let load = move || {
            let component = on_disk.load(engines.engine(generation)).map_err(|error| error.to_string())?;
            link(&engines, generation, &component).map_err(|error| error.to_string())
        };
        let loaded = tokio::task::spawn_blocking(load).await.map_err(|error| gone(error.to_string()))?;
        let pre = Arc::new(loaded.map_err(gone)?);
        self.loaded.store(Some(Arc::clone(&pre)));
        Ok((pre, true))
    }

    /// Gives it up if nobody has asked for it for long at `now`; instances keep what they run. False if there is
    /// nothing left that could be given up.
    pub(super) fn expire(&self, now: Instant) -> bool {
        if self.on_disk.is_none() || !self.is_loaded() {
            return false;
        }
        let unused = self.age(now).saturating_sub(self.used_ms.load(Ordering::Relaxed));
        let is_unused = Duration::from_millis(unused) >= UNUSED_MAX;
        if is_unused {
            self.loaded.store(None);
        }
        !is_unused
    }

    fn age(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.since).as_millis()).unwrap_or(u64::MAX)
    }
}

fn link(engines: &Engines, generation: Generation, component: &Component) -> Result<Pre, ActivateError> {
    let linker = engines.linker(generation);
    let linked = linker.instantiate_pre(component).map_err(|error| {
        let missing = host::missing(linker, component);
        if missing.is_empty() { ActivateError::Mismatch(error) } else { ActivateError::Imports { missing } }
    })?;
    let pre = match generation {
        Generation::P2 => ProxyPre::new(linked).map(Pre::P2),
        Generation::P3 => ServicePre::new(linked).map(Pre::P3),
    };
    pre.map_err(ActivateError::NotHttp)
}
