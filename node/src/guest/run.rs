//! One call of a guest, from a fresh store to the end of its work.

use std::sync::{Arc, Mutex, PoisonError};

use http::uri::{Authority, Scheme};
use tokio::sync::oneshot;
use wasmtime::component::ResourceTable;
use wasmtime::{Store, UpdateDeadline};
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme as Scheme2;
use wasmtime_wasi_http::p3::Request as Request3;
use wasmtime_wasi_http::p3::bindings::ServicePre;
use wasmtime_wasi_http::{WasiBody, WasiHttpCtx, WasiHttpView};

use super::bounds::Memory;
use super::meter::Work;
use super::outcome::Outcome;
use crate::fault::{Fault, GuestFault};
use crate::host::logs::Log;
use crate::host::outbound::Hooks;
use crate::host::{State, wasi};
use crate::pool::{Grants, Pool, Pre};

/// Bytes that a guest may hand to the host in one call, beyond which it traps.
const HOSTCALL_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Handles of a guest: bodies, streams, stores.
const HANDLES_MAX: usize = 10_000;
/// Fields of one head, bytes as the host keeps them.
const FIELDS_BYTES_MAX: usize = 128 * 1024;

/// What a guest answers: the head and the way to the body, or its error code as text.
pub(super) type Head = Result<http::Response<WasiBody>, String>;

/// A request as guests of both generations take it: the URI has scheme and authority.
pub(super) type Asked = http::Request<WasiBody>;

/// Prepares a call. The head comes through `head` as soon as the guest sets it; the work goes on after that.
pub(super) fn work(pool: &Arc<Pool>, asked: Asked, outcome: &Arc<Outcome>, head: oneshot::Sender<Head>) -> Work {
    let (pool, outcome) = (Arc::clone(pool), Arc::clone(outcome));
    Box::pin(async move {
        let grants = &pool.grants;
        let mut store = match store(&pool, &outcome) {
            Ok(store) => store,
            Err(error) => return outcome.settle(Err(Fault::Node(format!("{error:#}")))),
        };
        let done = match &pool.pre {
            Pre::P2(pre) => answer_p2(&mut store, pre, asked, head).await,
            Pre::P3(pre) => answer_p3(&mut store, pre, asked, head).await,
        };
        if let Err(error) = &done {
            let (app, component) = (&grants.app, &grants.component);
            tracing::info!(target: "guest", %app, %component, error = format!("{error:#}"), "guest ended with an error");
        }
        outcome.settle(done.map_err(|error| outcome.fault(&error)));
        // Only now may the store go: what waits for the body's end asks the outcome.
        drop(store);
    })
}

/// A store with nothing in it but what the grants say.
fn store(pool: &Pool, outcome: &Arc<Outcome>) -> wasmtime::Result<Store<State>> {
    let grants: &Arc<Grants> = &pool.grants;
    let log = Log::new(grants.app.clone(), grants.component.clone(), grants.limits.log_bytes);
    let mut http = WasiHttpCtx::new();
    http.set_field_size_limit(FIELDS_BYTES_MAX);
    let mut table = ResourceTable::new();
    table.set_max_capacity(HANDLES_MAX);
    let state = State {
        wasi: wasi::context(grants, &log)?,
        http,
        table,
        outbound: Hooks::new(Arc::clone(grants)),
        memory: Memory::new(grants.limits.memory_bytes, Arc::clone(outcome)),
        grants: Arc::clone(grants),
    };
    let mut store = Store::new(&pool.engine, state);
    store.limiter(|state| &mut state.memory);
    store.set_hostcall_fuel(HOSTCALL_BYTES_MAX);
    store.set_max_component_handles(HANDLES_MAX);
    store.set_epoch_deadline(1);
    // At each tick the guest steps back behind all other work of its thread. It never traps here: whoever polls it
    // looks at its time and drops it.
    store.epoch_deadline_callback(|_| Ok(UpdateDeadline::YieldCustom(1, Box::pin(tokio::task::yield_now()))));
    Ok(store)
}

async fn answer_p2(
    store: &mut Store<State>,
    pre: &ProxyPre<State>,
    asked: Asked,
    head: oneshot::Sender<Head>,
) -> wasmtime::Result<()> {
    let proxy = pre.instantiate_async(&mut *store).await?;
    let scheme = if asked.uri().scheme() == Some(&Scheme::HTTPS) { Scheme2::Https } else { Scheme2::Http };
    let request = store.data_mut().http().new_incoming_request(scheme, asked)?;
    let head = Mutex::new(Some(head));
    let out = store.data_mut().http().new_response_outparam_from_callback(move |answer| {
        if let Some(head) = head.lock().unwrap_or_else(PoisonError::into_inner).take() {
            let _ = head.send(answer.map_err(|code| format!("{code:?}")));
        }
    })?;
    proxy.wasi_http_incoming_handler().call_handle(&mut *store, request, out).await
}

async fn answer_p3(
    store: &mut Store<State>,
    pre: &ServicePre<State>,
    asked: Asked,
    head: oneshot::Sender<Head>,
) -> wasmtime::Result<()> {
    let service = pre.instantiate_async(&mut *store).await?;
    let (request, read) = Request3::from_http(store.data_mut().http().hooks, asked);
    let run = async |accessor: &wasmtime::component::Accessor<State>| -> wasmtime::Result<()> {
        let answer = match service.handle(accessor, request).await? {
            Ok(response) => Ok(accessor.with(|access| response.into_http(access, read))?),
            Err(code) => Err(format!("{code:?}")),
        };
        let _ = head.send(answer);
        // The guest's tasks that still write its body, or finish what it began.
        std::future::poll_fn(|cx| accessor.poll_no_interesting_tasks(cx)).await;
        Ok(())
    };
    store.run_concurrent(run).await?
}

/// The request as guests see it.
///
/// # Errors
/// There is no valid authority.
pub(super) fn asked(request: http::Request<WasiBody>, scheme: &str, authority: Option<&str>) -> Result<Asked, Fault> {
    let host = || Fault::Client(crate::fault::ClientFault::Host);
    let authority: Authority = authority.ok_or_else(host)?.parse().map_err(|_| host())?;
    let (mut head, body) = request.into_parts();
    let mut uri = std::mem::take(&mut head.uri).into_parts();
    uri.scheme = Some(scheme.parse().map_err(|_| host())?);
    uri.authority = Some(authority);
    uri.path_and_query.get_or_insert_with(|| http::uri::PathAndQuery::from_static("/"));
    head.uri = http::Uri::from_parts(uri).map_err(|_| host())?;
    Ok(http::Request::from_parts(head, body))
}

/// The fault of a guest that answered nothing.
pub(super) fn silent(outcome: &Outcome) -> Fault {
    match outcome.end() {
        Some(Err(fault)) => fault.clone(),
        _ => Fault::Guest(GuestFault::NoResponse),
    }
}
