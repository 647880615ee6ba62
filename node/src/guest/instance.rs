//! One instance of a component with its store: made for a request, and kept for the next one if its author chose that.

use std::sync::Arc;

use selvage_config::app::isolation::Reuse;
use wasmtime::component::ResourceTable;
use wasmtime::{Store, UpdateDeadline};
use wasmtime_wasi::filesystem::Descriptor;
use wasmtime_wasi::p2::{DynInputStream, DynOutputStream, DynPollable};
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::types::HostIncomingRequest;
use wasmtime_wasi_http::p3::bindings::Service;
use wasmtime_wasi_http::{FieldMap, WasiHttpCtx};

use super::bounds::Memory;
use super::outcome::Outcome;
use crate::fault::Fault;
use crate::host::logs::Log;
use crate::host::outbound::Hooks;
use crate::host::stores::Store as KeyValueStore;
use crate::host::{State, wasi};
use crate::pool::{Grants, Pool, Pre};

/// Bytes that a guest may hand to the host in one call, beyond which it traps.
const HOSTCALL_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Handles of a guest: bodies, streams, stores.
const HANDLES_MAX: usize = 1_000;
/// Handles of a guest that has files: each open file is a descriptor of the node.
const HANDLES_WITH_FILES_MAX: usize = 256;
/// Handles with which an instance may wait for its next request. Beyond it, one leaks them, and would trap one day.
const HANDLES_LEFT_MAX: usize = 64;
/// Handles of an instance that answers several requests at once, beyond which it takes no more of them.
const HANDLES_SHARED_MAX: usize = HANDLES_MAX / 2;
/// Fields of one head, bytes as the host keeps them.
const FIELDS_BYTES_MAX: usize = 128 * 1024;

/// An instance.
pub(crate) struct Instance {
    pub(super) store: Store<State>,
    pub(super) exports: Exports,
    /// Requests that it has answered.
    answered: u32,
}

/// How it is called.
pub(super) enum Exports {
    P2(Proxy),
    P3(Service),
}

impl Instance {
    /// One that nobody used before.
    ///
    /// # Errors
    /// The guest fails already while it is instantiated, or there is no room for it.
    pub(super) async fn fresh(pool: &Arc<Pool>, outcome: &Arc<Outcome>) -> Result<Self, Fault> {
        let pre = pool.code().await?;
        let mut store = store(pool, outcome);
        let exports = match &*pre {
            Pre::P2(pre) => pre.instantiate_async(&mut store).await.map(Exports::P2),
            Pre::P3(pre) => pre.instantiate_async(&mut store).await.map(Exports::P3),
        };
        let exports = exports.map_err(|error| {
            tell(&pool.grants, &error);
            outcome.fault(&error)
        })?;
        Ok(Self { store, exports, answered: 0 })
    }

    /// What its linear memories have together, bytes.
    pub(crate) fn memory_bytes(&self) -> u64 {
        self.store.data().memory.used()
    }

    /// One that waited, for the request of `outcome`.
    pub(super) fn again(mut self, outcome: &Arc<Outcome>) -> Self {
        self.store.data_mut().memory.answer_to(Arc::clone(outcome));
        self.store.set_epoch_deadline(1);
        self
    }

    /// This instance after a request that ended well, if it may answer another. Its memory is the guest's affair; what
    /// the host held for the request is gone.
    pub(super) fn rested(mut self, reuse: &Reuse, outcome: &Outcome) -> Option<Self> {
        self.answered += 1;
        let state = self.store.data_mut();
        let is_spent = self.answered >= reuse.requests_max;
        if is_spent || outcome.is_excess() || outcome.holds_body() || !may_wait(state, reuse) {
            return None;
        }
        renew(state);
        Some(self)
    }
}

/// What the host counts for each request, from the beginning again.
pub(super) fn renew(state: &mut State) {
    state.log.renew(state.grants.limits.log_bytes);
    state.outbound = Hooks::new(Arc::clone(&state.grants));
}

/// Whether an instance may wait for another request with what it holds.
pub(super) fn may_wait(state: &mut State, reuse: &Reuse) -> bool {
    state.memory.used() <= reuse.memory_bytes_max && may_stay(&mut state.table)
}

/// Whether an instance may take another request while it answers some.
pub(super) fn may_go_on(state: &mut State, reuse: &Reuse) -> bool {
    state.memory.used() <= reuse.memory_bytes_max && state.table.iter_mut().count() <= HANDLES_SHARED_MAX
}

/// Whether what a guest still holds after a request may wait with it for the next one.
fn may_stay(table: &mut ResourceTable) -> bool {
    let mut held = 0;
    table.iter_mut().all(|entry| {
        held += 1;
        held <= HANDLES_LEFT_MAX && outlives_requests(entry)
    })
}

/// Whether a handle is of the component, or a head: guests with a garbage collector keep the heads of past requests until
/// it comes round. A stream of a body counts only together with its body, and that is not among these; what is not
/// known here belongs to the request.
fn outlives_requests(entry: &dyn std::any::Any) -> bool {
    entry.is::<DynInputStream>()
        || entry.is::<DynOutputStream>()
        || entry.is::<DynPollable>()
        || entry.is::<Descriptor>()
        || entry.is::<KeyValueStore>()
        || entry.is::<HostIncomingRequest>()
        || entry.is::<FieldMap>()
}

/// A store with nothing in it but what the grants say.
fn store(pool: &Pool, outcome: &Arc<Outcome>) -> Store<State> {
    let grants: &Arc<Grants> = &pool.grants;
    let log =
        Log::new(grants.app.clone(), grants.component.clone(), grants.limits.log_bytes, grants.log_dropped.clone());
    let mut http = WasiHttpCtx::new();
    http.set_field_size_limit(FIELDS_BYTES_MAX);
    let mut table = ResourceTable::new();
    let handles = if grants.files.is_some() { HANDLES_WITH_FILES_MAX } else { HANDLES_MAX };
    table.set_max_capacity(handles);
    let state = State {
        wasi: wasi::context(&pool.files, &grants.environment, &log),
        http,
        table,
        outbound: Hooks::new(Arc::clone(grants)),
        log,
        memory: Memory::new(grants.limits.memory_bytes, Arc::clone(outcome)),
        grants: Arc::clone(grants),
    };
    let mut store = Store::new(pool.engine(), state);
    store.limiter(|state| &mut state.memory);
    store.set_hostcall_fuel(HOSTCALL_BYTES_MAX);
    store.set_max_component_handles(HANDLES_MAX);
    store.set_epoch_deadline(1);
    // At each tick the guest steps back behind all other work of its thread. It never traps here: whoever polls it
    // looks at its time and drops it.
    store.epoch_deadline_callback(|_| Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))));
    store
}

/// What the engine says of a guest that failed, for the app's author.
pub(super) fn tell(grants: &Grants, error: &wasmtime::Error) {
    let (app, component) = (&grants.app, &grants.component);
    tracing::info!(target: "guest", %app, %component, error = format!("{error:#}"), "guest ended with an error");
}

#[cfg(test)]
mod tests {
    use wasmtime_wasi::cli::WasiCliView;
    use wasmtime_wasi::filesystem::WasiFilesystemView;
    use wasmtime_wasi::p2::bindings::cli::stdout::Host as _;
    use wasmtime_wasi::p2::bindings::filesystem::preopens::Host as _;
    use wasmtime_wasi_http::WasiHttpView;
    use wasmtime_wasi_http::p2::bindings::http::types::{HostFields, Scheme};

    use super::*;
    use crate::host::tests::state;

    #[tokio::test]
    async fn what_toolchains_keep_for_ever_may_stay() {
        let (mut state, dir) = state(&[]).await;
        let files = wasi::files(Some(dir.path())).unwrap();
        state.wasi = wasi::context(&files, &state.grants.environment, &state.log);
        state.cli().get_stdout().unwrap();
        assert_eq!(state.filesystem().get_directories().unwrap().len(), 1);
        assert!(!state.table.is_empty() && may_stay(&mut state.table));
    }

    #[tokio::test]
    async fn heads_that_a_collector_has_not_come_to_may_stay_up_to_a_bound() {
        let (mut state, _dir) = state(&[]).await;
        for _ in 0..HANDLES_LEFT_MAX {
            assert!(may_stay(&mut state.table));
            HostFields::new(&mut state.http()).unwrap();
        }
        assert!(may_stay(&mut state.table));
        let request = http::Request::builder().uri("http://test.example/");
        let request = request.body(http_body_util::Empty::<bytes::Bytes>::new()).unwrap();
        state.http().new_incoming_request(Scheme::Http, request).unwrap();
        assert!(!may_stay(&mut state.table), "it leaks them");
    }

    #[tokio::test]
    async fn what_belongs_to_a_request_may_not_stay() {
        let (mut state, _dir) = state(&[]).await;
        state.http().new_response_outparam_from_callback(|_| ()).unwrap();
        assert!(!may_stay(&mut state.table));
    }
}
