//! Guests under their limits and with what they were granted, fresh or used again.

mod activation;
pub(crate) mod backends;
mod generation3;
mod granted;
mod home;
mod hostile;
mod instructions;
mod limits;
mod placement;
mod reuse;
mod shared;
mod streams;

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::{Arc, LazyLock};
use std::time::{Duration, Instant};

use bytes::Bytes;
use http_body_util::BodyExt;
use selvage_config::app::App;
use selvage_config::app::isolation::Isolation;
use selvage_config::node::Egress as EgressOptions;
use selvage_config::{Digest, Limits};
use selvage_node::engine::{EngineOptions, Engines};
use selvage_node::fault::Fault;
use selvage_node::host::outbound::Egress;
use selvage_node::metrics::Metrics;
use selvage_node::pool::{ActivateError, Grants, Pool};
use selvage_node::release::compile::{CompileCache, CompileError, Compiled, compile};
use selvage_node::release::fetch::Fetched;
use selvage_node::release::verify::{Policy, verify};
use selvage_node::request::{Body, Protocol, Request, Response, empty, full};
use selvage_sync::Kv;

/// Instances at once in all tests together.
const INSTANCES: u32 = 64;
/// Long for any guest here, short for whoever waits for a test that hangs.
const PATIENCE: Duration = Duration::from_secs(120);
/// A wall that no guest comes to which does not wait for it: who computes gets what others leave of a busy core.
const WALL_MS: u64 = 300_000;

/// The engines of all tests, and the code that they compiled. The cache stays: the next run is faster.
static ENGINES: LazyLock<Engines> = LazyLock::new(|| Engines::new(&EngineOptions::of_instances(INSTANCES)).unwrap());
static CACHE: LazyLock<CompileCache> =
    LazyLock::new(|| CompileCache::open(&Path::new(env!("CARGO_TARGET_TMPDIR")).join("guests")).unwrap());

/// The bytes of a guest: text of the test guests by name, or a component of the examples.
fn code(name: &str) -> Bytes {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let guest = root.join("tests/guests").join(name);
    if name.ends_with(".wat") {
        return wat::parse_file(guest).unwrap().into();
    }
    std::fs::read(crate::examples().join(name).join(format!("{name}.wasm"))).unwrap().into()
}

fn compiled(cache: &CompileCache, bytes: Bytes) -> Result<Compiled, CompileError> {
    compiled_for(&ENGINES, cache, bytes)
}

fn compiled_for(engines: &Engines, cache: &CompileCache, bytes: Bytes) -> Result<Compiled, CompileError> {
    let digest = Digest::of(&bytes);
    let name = "guest".parse().unwrap();
    let app = App::of_component("test".parse().unwrap(), "guest".parse().unwrap(), digest);
    let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, bytes)]));
    let verified = verify(fetched, &Policy::LocalFiles.into()).unwrap();
    compile(engines, cache, &verified.component(&name).unwrap())
}

/// A guest about to be activated, with what it gets.
pub(crate) struct Guest {
    code: Bytes,
    grants: Grants,
    _state: tempfile::TempDir,
}

impl Guest {
    pub(crate) async fn new(name: &str) -> Self {
        let state = tempfile::tempdir().unwrap();
        let options = selvage_sync::Options::alone(
            "node".parse().unwrap(),
            "here".parse().unwrap(),
            state.path().join("kv"),
            Default::default(),
        );
        let kv = Kv::open(options, Arc::new(|_| None)).await.unwrap();
        let grants = Grants {
            app: "test".parse().unwrap(),
            component: "guest".parse().unwrap(),
            limits: Limits { wall_ms: WALL_MS, ..Limits::default() },
            isolation: Isolation::Fresh,
            variables: BTreeMap::new(),
            environment: BTreeMap::new(),
            files: None,
            outbound: Vec::new(),
            stores: Vec::new(),
            kv: kv.into(),
            egress: Arc::new(Egress::new(&EgressOptions::default()).unwrap()),
            spent: Arc::default(),
            log_dropped: Metrics::new().log_dropped("test"),
        };
        Self { code: code(name), grants, _state: state }
    }

    fn with(mut self, change: impl FnOnce(&mut Grants)) -> Self {
        change(&mut self.grants);
        self
    }

    fn limits(self, change: impl FnOnce(&mut Limits)) -> Self {
        self.with(|grants| change(&mut grants.limits))
    }

    pub(crate) fn activate(self) -> Result<Active, ActivateError> {
        self.activate_on(&ENGINES)
    }

    fn activate_on(self, engines: &Engines) -> Result<Active, ActivateError> {
        let compiled = compiled_for(engines, &CACHE, self.code).unwrap();
        Ok(Active { pool: Pool::new(engines, &compiled, self.grants)?, _state: self._state })
    }

    /// Activates it and sends one GET.
    async fn get(self, path: &str) -> Result<Response, Fault> {
        self.activate().unwrap().call(request("GET", path, empty())).await
    }
}

/// A guest that answers requests.
pub(crate) struct Active {
    pub(crate) pool: Arc<Pool>,
    _state: tempfile::TempDir,
}

impl Active {
    async fn call(&self, request: Request) -> Result<Response, Fault> {
        let lease = self.pool.lease(Instant::now() + PATIENCE).await?;
        tokio::time::timeout(PATIENCE, lease.call(request)).await.expect("the guest's own limits are shorter")
    }

    async fn get(&self, path: &str) -> Result<Response, Fault> {
        self.call(request("GET", path, empty())).await
    }

    /// Status and text of an answer.
    async fn ask(&self, method: &str, path: &str, body: &'static str) -> (u16, String) {
        told(self.call(request(method, path, full(body))).await.unwrap()).await
    }
}

fn request(method: &str, path: &str, body: Body) -> Request {
    let http = http::Request::builder().method(method).uri(path).header("host", "test.example");
    Request {
        http: http.body(body).unwrap(),
        client: ([192, 0, 2, 1], 4711).into(),
        protocol: Protocol::H1,
        secure: true,
        arrived: Instant::now(),
    }
}

async fn told(response: Response) -> (u16, String) {
    let status = response.status().as_u16();
    let body = response.into_body().collect().await.unwrap().to_bytes();
    (status, String::from_utf8(body.to_vec()).unwrap())
}
