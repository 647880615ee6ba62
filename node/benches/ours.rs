//! Selvage's side of the engine bench: the public API of the node, as its own steps use it.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use http_body_util::BodyExt;
use selvage_config::app::App;
use selvage_config::app::isolation::{Isolation, Reuse};
use selvage_config::node::Egress as EgressOptions;
use selvage_config::{Digest, Limits};
use selvage_node::engine::{EngineOptions, Engines};
use selvage_node::fault::Fault;
use selvage_node::host::outbound::Egress;
use selvage_node::metrics::Metrics;
use selvage_node::pool::{Grants, Lease, Pool};
use selvage_node::release::compile::{CompileCache, Compiled, compile};
use selvage_node::release::fetch::Fetched;
use selvage_node::release::verify::{Policy, Verified, verify};
use selvage_node::request::{Protocol, Request, Response, empty};
use selvage_node::route::{ActiveApp, Table};
use selvage_node::serve::{Parts, serve};
use selvage_sync::Kv;

use crate::bare::Bare;
use crate::process::resident;
use crate::{Guest, micros};

/// Requests at once; the bench makes one after the other.
const REQUESTS_MAX: u32 = 64;
/// Instances that wait already when it is measured what each takes.
const WARM_INSTANCES: usize = 32;
/// For whoever waits for a lease that doesn't come.
const PATIENCE: Duration = Duration::from_secs(10);

/// One guest on a node's engines.
pub(crate) struct Ours {
    guest: Guest,
    engines: Engines,
    pool: Arc<Pool>,
    reused: Arc<Pool>,
    parts: Arc<Parts>,
    verified: Verified,
    cache: CompileCache,
    kv: Kv,
    egress: Arc<Egress>,
    _state: tempfile::TempDir,
}

impl Ours {
    pub(crate) async fn start(guest: &Guest) -> anyhow::Result<Self> {
        let state = tempfile::tempdir()?;
        let engines = Engines::new(&EngineOptions::default())?;
        let cache = CompileCache::open(&state.path().join("compiled"))?;
        let digest = Digest::of(&guest.bytes);
        let app = App::of_component("bench".parse()?, "guest".parse()?, digest);
        let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, guest.bytes.clone())]));
        let verified = verify(fetched, &Policy::LocalFiles.into())?;
        let options =
            selvage_sync::Options::alone("node".parse()?, "here".parse()?, state.path().join("kv"), Default::default());
        let kv = Kv::open(options, Arc::new(|_| None)).await?;
        let egress = Arc::new(Egress::new(&EgressOptions::default())?);
        let name = "guest".parse()?;
        let compiled = compile(&engines, &cache, &verified.component(&name).context("no such component")?)?;
        let pool = Pool::new(&engines, &compiled, grants(&kv, &egress, Isolation::Fresh)?)?;
        let reuse = Isolation::Reuse(Reuse::default());
        let reused = Pool::new(&engines, &compiled, grants(&kv, &egress, reuse)?)?;
        let parts = Parts::new("node".parse()?, "here".parse()?, REQUESTS_MAX, Metrics::new());
        let pools = BTreeMap::from([(name, Arc::clone(&pool))]);
        let active = ActiveApp::new(app, None, digest, &pools, &BTreeMap::new())?;
        parts.table.store(Arc::new(Table::alone(Arc::new(active))));
        let (guest, parts) = (guest.clone(), Arc::new(parts));
        Ok(Self { guest, engines, pool, reused, parts, verified, cache, kv, egress, _state: state })
    }

    /// Whether code for `bare` is code for this too.
    pub(crate) fn like(&self, bare: &Bare) -> bool {
        self.engines.fingerprint().contains(&bare.fingerprint())
    }

    pub(crate) async fn lease(&self, times: u32) -> anyhow::Result<()> {
        for _ in 0..times {
            drop(lease(&self.pool).await?);
        }
        Ok(())
    }

    pub(crate) async fn call(&self) -> anyhow::Result<()> {
        call(&self.pool, self.guest.path).await
    }

    /// The same, of an instance that answered other requests before.
    pub(crate) async fn call_again(&self) -> anyhow::Result<()> {
        call(&self.reused, self.guest.path).await
    }

    pub(crate) async fn serve(&self) -> anyhow::Result<()> {
        whole(serve(&self.parts, request(self.guest.path)?).await).await
    }

    /// Microseconds to compile the guest and keep its code.
    pub(crate) fn compile(&self) -> anyhow::Result<f64> {
        let dir = tempfile::tempdir()?;
        let cache = CompileCache::open(dir.path())?;
        self.compiled(&cache).map(|(time, _)| time)
    }

    /// Loads the guest from disk, each time as a component of its own, and the microseconds that it took.
    pub(crate) fn load(&self, times: usize) -> anyhow::Result<Vec<(f64, Compiled)>> {
        (0..times).map(|_| self.compiled(&self.cache)).collect()
    }

    fn compiled(&self, cache: &CompileCache) -> anyhow::Result<(f64, Compiled)> {
        let name = "guest".parse()?;
        let component = self.verified.component(&name).context("no such component")?;
        let start = Instant::now();
        let compiled = compile(&self.engines, cache, &component)?;
        Ok((micros(start.elapsed()), compiled))
    }

    /// A pool for each component, and the microseconds that it took.
    pub(crate) fn link(&self, components: impl Iterator<Item = Compiled>) -> anyhow::Result<Vec<(f64, Arc<Pool>)>> {
        let link = |compiled: Compiled| {
            let grants = grants(&self.kv, &self.egress, Isolation::Fresh)?;
            let start = Instant::now();
            let pool = Pool::new(&self.engines, &compiled, grants)?;
            Ok((micros(start.elapsed()), pool))
        };
        components.map(link).collect()
    }

    /// KiB of memory that is no file's, for each of so many instances that have answered a request and wait for the next.
    pub(crate) async fn waiting(&self, instances: usize) -> anyhow::Result<f64> {
        let name = "guest".parse()?;
        let component = self.verified.component(&name).context("no such component")?;
        let compiled = compile(&self.engines, &self.cache, &component)?;
        let pools = |count: usize| {
            let pool = |_| {
                let reuse = Isolation::Reuse(Reuse { idle_ms: 60_000, ..Reuse::default() });
                Ok(Pool::new(&self.engines, &compiled, grants(&self.kv, &self.egress, reuse)?)?)
            };
            (0..count).map(pool).collect::<anyhow::Result<Vec<_>>>()
        };
        // The first ones pay for what all share.
        let (first, all) = (pools(WARM_INSTANCES)?, pools(instances)?);
        self.first_calls(first.iter().cloned()).await?;
        let before = resident()?;
        self.first_calls(all.iter().cloned()).await?;
        while all.iter().any(|pool| pool.idle() == 0) {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        Ok((resident()?.anonymous_kib - before.anonymous_kib) / instances as f64)
    }

    /// Microseconds of the first call of each pool.
    pub(crate) async fn first_calls(&self, pools: impl Iterator<Item = Arc<Pool>>) -> anyhow::Result<Vec<f64>> {
        let mut times = Vec::new();
        for pool in pools {
            let start = Instant::now();
            call(&pool, self.guest.path).await?;
            times.push(micros(start.elapsed()));
        }
        Ok(times)
    }
}

fn grants(kv: &Kv, egress: &Arc<Egress>, isolation: Isolation) -> anyhow::Result<Grants> {
    Ok(Grants {
        app: "bench".parse()?,
        component: "guest".parse()?,
        limits: Limits::default(),
        isolation,
        variables: BTreeMap::new(),
        environment: BTreeMap::new(),
        files: None,
        outbound: Vec::new(),
        stores: Vec::new(),
        kv: kv.clone().into(),
        egress: Arc::clone(egress),
        spent: Arc::default(),
        log_dropped: Metrics::new().log_dropped("bench"),
    })
}

async fn call(pool: &Arc<Pool>, path: &str) -> anyhow::Result<()> {
    let request = request(path)?;
    let response = lease(pool).await?.call(request).await.map_err(|fault| told(&fault))?;
    whole(response).await
}

async fn lease(pool: &Arc<Pool>) -> anyhow::Result<Lease> {
    pool.lease(Instant::now() + PATIENCE).await.map_err(|fault| told(&fault))
}

/// A fault is what a client is told, not an error; here it ends the bench.
fn told(fault: &Fault) -> anyhow::Error {
    anyhow::anyhow!("{fault:?}")
}

async fn whole(response: Response) -> anyhow::Result<()> {
    let outcome = response.headers().get("selvage-outcome");
    ensure!(response.status() == 200, "status {}, outcome {outcome:?}", response.status());
    let body = response.into_body().collect().await?.to_bytes();
    ensure!(!body.is_empty(), "an empty body");
    Ok(())
}

fn request(path: &str) -> anyhow::Result<Request> {
    let http = http::Request::builder().uri(path).header("host", "bench.example").body(empty())?;
    let client = ([192, 0, 2, 1], 4711).into();
    Ok(Request { http, client, protocol: Protocol::H1, secure: false, arrived: Instant::now() })
}
