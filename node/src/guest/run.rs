//! One call of a guest, from its instance to the end of its work.

use std::sync::{Arc, Mutex, PoisonError};

use http::header::HOST;
use http::uri::{Authority, Scheme};
use tokio::sync::{OwnedSemaphorePermit, oneshot};
use wasmtime::Store;
use wasmtime_wasi_http::p2::bindings::Proxy;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme as Scheme2;
use wasmtime_wasi_http::p3::Request as Request3;
use wasmtime_wasi_http::p3::bindings::Service;
use wasmtime_wasi_http::{WasiBody, WasiHttpView};

use super::instance::{self, Exports, Instance};
use super::meter::Work;
use super::outcome::Outcome;
use crate::fault::{ClientFault, Fault, GuestFault};
use crate::host::State;
use crate::listen::head;
use crate::pool::Pool;

/// What a guest answers: the head and the way to the body, or its error code as text.
pub(super) type Head = Result<http::Response<WasiBody>, String>;

/// A request as guests of both generations take it: the URI has scheme and authority.
pub(super) type Asked = http::Request<WasiBody>;

/// Prepares a call. The head comes through `head` as soon as the guest sets it; the work goes on after that.
///
/// The permit goes when the instance has gone, wherever that is: a guest that was given up may still wait for a thread to
/// end on, and counts among those of its component until then.
pub(super) fn work(
    pool: &Arc<Pool>,
    permit: OwnedSemaphorePermit,
    asked: Asked,
    outcome: &Arc<Outcome>,
    head: oneshot::Sender<Head>,
) -> Work {
    let (pool, outcome) = (Arc::clone(pool), Arc::clone(outcome));
    Box::pin(async move {
        // The first to be there is the last to go.
        let _permit = permit;
        let instance = match pool.take() {
            Some(rested) => Ok(rested.again(&outcome)),
            None => Instance::fresh(&pool, &outcome).await,
        };
        let mut instance = match instance {
            Ok(instance) => instance,
            Err(fault) => {
                outcome.settle(Err(fault));
                return None;
            }
        };
        let store = &mut instance.store;
        let done = match &instance.exports {
            Exports::P2(proxy) => answer_p2(store, proxy, asked, head).await,
            Exports::P3(service) => answer_p3(store, service, asked, head).await,
        };
        match done {
            Ok(()) => {
                outcome.settle(Ok(()));
                instance.rested(pool.reuse()?, &outcome)
            }
            Err(error) => {
                instance::tell(&pool.grants, &error);
                // Only then may the store go: what waits for the body's end asks the outcome.
                outcome.settle(Err(outcome.fault(&error)));
                None
            }
        }
    })
}

async fn answer_p2(
    store: &mut Store<State>,
    proxy: &Proxy,
    asked: Asked,
    head: oneshot::Sender<Head>,
) -> wasmtime::Result<()> {
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
    service: &Service,
    asked: Asked,
    head: oneshot::Sender<Head>,
) -> wasmtime::Result<()> {
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
pub(super) fn asked(mut request: http::Request<WasiBody>, secure: bool) -> Result<Asked, Fault> {
    let uri = request.uri();
    if uri.scheme().is_none() || uri.authority().is_none() {
        let host = || Fault::Client(ClientFault::Host);
        let scheme = if secure { Scheme::HTTPS } else { Scheme::HTTP };
        let field = || Authority::try_from(request.headers().get(HOST)?.as_bytes()).ok();
        let authority = uri.authority().cloned().or_else(field).ok_or_else(host)?;
        head::make_absolute(request.uri_mut(), scheme, authority).ok_or_else(host)?;
    }
    Ok(request)
}

/// The fault of a guest that answered nothing.
pub(super) fn silent(outcome: &Outcome) -> Fault {
    match outcome.end() {
        Some(Err(fault)) => fault.clone(),
        _ => Fault::Guest(GuestFault::NoResponse),
    }
}
