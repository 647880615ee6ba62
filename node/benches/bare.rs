//! The floor of the engine bench: wasmtime and its `wasi:http`, configured as `node/src/engine.rs` does, and no more.
//!
//! No limits but the epoch's check in the code, no log, no routes, no grants: what is above this is Selvage's.

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Mutex;
use std::time::Instant;

use anyhow::{Context, ensure};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use tokio::sync::oneshot;
use wasmtime::component::{Accessor, Component, Linker, ResourceTable};
use wasmtime::{Config, Enabled, Engine, InstanceAllocationStrategy, PoolingAllocationConfig, Store};
use wasmtime_wasi::{WasiCtx, WasiCtxBuilder, WasiCtxView, WasiView};
use wasmtime_wasi_http::p2::bindings::ProxyPre;
use wasmtime_wasi_http::p2::bindings::http::types::Scheme;
use wasmtime_wasi_http::p3::Request as Request3;
use wasmtime_wasi_http::p3::bindings::ServicePre;
use wasmtime_wasi_http::{Error, RequestOptions, WasiBody, WasiHttpCtx, WasiHttpCtxView, WasiHttpHooks, WasiHttpView};

use crate::{Guest, micros};

/// What an operation of the guest's generation is made of.
#[derive(Clone)]
enum Pre {
    P2(ProxyPre<State>),
    P3(ServicePre<State>),
}

/// One guest on an engine of its own.
pub(crate) struct Bare {
    guest: Guest,
    engine: Engine,
    linker: Linker<State>,
    pre: Pre,
    code: Vec<u8>,
    compile_micros: f64,
}

/// What a guest has that was granted nothing.
struct State {
    wasi: WasiCtx,
    http: WasiHttpCtx,
    table: ResourceTable,
    hooks: Nowhere,
}

/// No way out.
struct Nowhere;

impl WasiHttpHooks for Nowhere {
    fn send_request(
        &mut self,
        _: http::Request<WasiBody>,
        _: Option<RequestOptions>,
        _: Box<dyn Future<Output = Result<(), Error>> + Send>,
    ) -> Box<dyn Future<Output = Result<(http::Response<WasiBody>, Transmitted), Error>> + Send> {
        Box::new(async { Err(Error::HttpRequestDenied) })
    }
}

/// How the sending of a request ended.
type Transmitted = Box<dyn Future<Output = Result<(), Error>> + Send>;

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.hooks, table: &mut self.table, ctx: &mut self.http }
    }
}

impl Bare {
    pub(crate) fn start(guest: &Guest) -> anyhow::Result<Self> {
        let third = guest.name.ends_with("p3");
        let engine = Engine::new(&config(third))?;
        let mut linker = Linker::new(&engine);
        wasmtime_wasi::p2::add_to_linker_async(&mut linker)?;
        wasmtime_wasi_http::p2::add_only_http_to_linker_async(&mut linker)?;
        if third {
            wasmtime_wasi::p3::add_to_linker(&mut linker)?;
            wasmtime_wasi_http::p3::add_to_linker(&mut linker)?;
        }
        let start = Instant::now();
        let component = Component::from_binary(&engine, &guest.bytes)?;
        let compile_micros = micros(start.elapsed());
        let (pre, code) = (link(&linker, &component)?, component.serialize()?);
        Ok(Self { guest: guest.clone(), engine, linker, pre, code, compile_micros })
    }

    /// As `Engines::fingerprint` makes it, of this one engine.
    pub(crate) fn fingerprint(&self) -> String {
        let mut hasher = DefaultHasher::new();
        self.engine.precompile_compatibility_hash().hash(&mut hasher);
        format!("{:016x}", hasher.finish())
    }

    pub(crate) fn compile_micros(&self) -> f64 {
        self.compile_micros
    }

    pub(crate) async fn call(&self) -> anyhow::Result<()> {
        self.call_of(&self.pre).await
    }

    pub(crate) async fn instantiate(&self) -> anyhow::Result<()> {
        self.instance_of(&self.pre).await
    }

    /// Loads the guest's code, each time as a component of its own, and the microseconds that it took.
    pub(crate) fn load(&self, times: usize) -> anyhow::Result<(Vec<f64>, Vec<Component>)> {
        let load = |_| {
            let start = Instant::now();
            // SAFETY: `code` is what `Component::serialize` gave in `start`, in memory since.
            #[expect(unsafe_code, reason = "the floor of loading compiled code")]
            let component = unsafe { Component::deserialize(&self.engine, &self.code) }?;
            Ok((micros(start.elapsed()), component))
        };
        (0..times).map(load).collect()
    }

    /// Microseconds of the first call of each component.
    pub(crate) async fn first_calls(&self, components: &[Component]) -> anyhow::Result<Vec<f64>> {
        let mut times = Vec::new();
        for component in components {
            let pre = link(&self.linker, component)?;
            let start = Instant::now();
            self.call_of(&pre).await?;
            times.push(micros(start.elapsed()));
        }
        Ok(times)
    }

    /// Microseconds of the first instance of each component.
    pub(crate) async fn first_instances(&self, components: &[Component]) -> anyhow::Result<Vec<f64>> {
        let mut times = Vec::new();
        for component in components {
            let pre = link(&self.linker, component)?;
            let start = Instant::now();
            self.instance_of(&pre).await?;
            times.push(micros(start.elapsed()));
        }
        Ok(times)
    }

    async fn instance_of(&self, pre: &Pre) -> anyhow::Result<()> {
        let mut store = self.store();
        match pre {
            Pre::P2(pre) => pre.instantiate_async(&mut store).await.map(|_| ())?,
            Pre::P3(pre) => pre.instantiate_async(&mut store).await.map(|_| ())?,
        }
        Ok(())
    }

    async fn call_of(&self, pre: &Pre) -> anyhow::Result<()> {
        let body = Empty::new().map_err(|never| match never {}).boxed_unsync();
        let uri = format!("http://bench.example{}", self.guest.path);
        let request = http::Request::builder().uri(uri).header("host", "bench.example").body(body)?;
        let (status, body) = match pre {
            Pre::P2(pre) => self.call_p2(pre, request).await?,
            Pre::P3(pre) => self.call_p3(pre, request).await?,
        };
        ensure!(status == 200 && !body.is_empty(), "status {status}, {} bytes", body.len());
        Ok(())
    }

    async fn call_p2(
        &self,
        pre: &ProxyPre<State>,
        request: http::Request<WasiBody>,
    ) -> anyhow::Result<(http::StatusCode, Bytes)> {
        let mut store = self.store();
        let proxy = pre.instantiate_async(&mut store).await?;
        let request = store.data_mut().http().new_incoming_request(Scheme::Http, request)?;
        let (sender, head) = oneshot::channel();
        let sender = Mutex::new(Some(sender));
        let out = store.data_mut().http().new_response_outparam_from_callback(move |answer| {
            if let Some(sender) = sender.lock().ok().and_then(|mut sender| sender.take()) {
                let _ = sender.send(answer.map_err(|code| format!("{code:?}")));
            }
        })?;
        let answer = async {
            let (head, body) = head.await?.map_err(anyhow::Error::msg)?.into_parts();
            let body = body.collect().await.context("read body")?.to_bytes();
            anyhow::Ok((head.status, body))
        };
        let handler = proxy.wasi_http_incoming_handler();
        let (called, answer) = futures_util::future::join(handler.call_handle(&mut store, request, out), answer).await;
        called?;
        answer
    }

    async fn call_p3(
        &self,
        pre: &ServicePre<State>,
        request: http::Request<WasiBody>,
    ) -> anyhow::Result<(http::StatusCode, Bytes)> {
        let mut store = self.store();
        let service = pre.instantiate_async(&mut store).await?;
        let (request, read) = Request3::from_http(store.data_mut().http().hooks, request);
        let run = async |accessor: &Accessor<State>| -> anyhow::Result<(http::StatusCode, Bytes)> {
            let response = service.handle(accessor, request).await?.map_err(|code| anyhow::anyhow!("{code:?}"))?;
            let response = accessor.with(|access| response.into_http(access, read))?;
            let (head, body) = response.into_parts();
            let body = body.collect().await.context("read body")?.to_bytes();
            Ok((head.status, body))
        };
        store.run_concurrent(run).await?
    }

    fn store(&self) -> Store<State> {
        let (http, table, wasi) = (WasiHttpCtx::new(), ResourceTable::new(), WasiCtxBuilder::new().build());
        let mut store = Store::new(&self.engine, State { wasi, http, table, hooks: Nowhere });
        // Nobody advances this engine's epoch.
        store.set_epoch_deadline(1);
        store
    }
}

fn link(linker: &Linker<State>, component: &Component) -> anyhow::Result<Pre> {
    let linked = linker.instantiate_pre(component)?;
    let handler = |name: &str| name.starts_with("wasi:http/handler@");
    let third = component.component_type().exports(component.engine()).any(|(name, _)| handler(name));
    Ok(if third { Pre::P3(ServicePre::new(linked)?) } else { Pre::P2(ProxyPre::new(linked)?) })
}

/// As `node/src/engine.rs`, whose reasons hold here too.
fn config(third: bool) -> Config {
    let mut pools = PoolingAllocationConfig::new();
    pools.total_component_instances(1_000).total_stacks(1_000).total_memories(1_000);
    pools.total_core_instances(8_000).total_tables(4_000).total_gc_heaps(100);
    pools.max_core_instances_per_component(16).max_tables_per_module(4).table_elements(100_000);
    pools.max_memory_size(1 << 32).max_unused_warm_slots(1_000);
    let pagemap = PoolingAllocationConfig::is_pagemap_scan_available();
    pools.pagemap_scan(if pagemap { Enabled::Yes } else { Enabled::No });
    pools.linear_memory_keep_resident(if pagemap { 2 << 20 } else { 32 << 10 }).table_keep_resident(64 << 10);
    let mut config = Config::new();
    config.allocation_strategy(InstanceAllocationStrategy::Pooling(pools));
    config.epoch_interruption(true).memory_init_cow(true);
    config.max_wasm_stack(512 << 10).async_stack_size(2 << 20);
    config.wasm_backtrace_max_frames(None);
    if third {
        config.wasm_component_model_async(true);
    } else {
        config.concurrency_support(false);
    }
    config
}
