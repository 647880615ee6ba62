//! Apps of one component each, made ready by the node's own step, and guests to make many different ones of.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use anyhow::{Context, ensure};
use bytes::Bytes;
use selvage_config::app::App;
use selvage_config::app::isolation::Isolation;
use selvage_config::node::Egress as EgressOptions;
use selvage_config::{Digest, Limits};
use selvage_node::engine::{EngineOptions, Engines};
use selvage_node::host::outbound::Egress;
use selvage_node::jwt::KeyFetcher;
use selvage_node::metrics::Metrics;
use selvage_node::release::activate::{Base, Settings, ready};
use selvage_node::release::compile::CompileCache;
use selvage_node::release::fetch::Fetched;
use selvage_node::release::state::State;
use selvage_node::release::verify::Policy;
use selvage_node::route::ActiveApp;
use selvage_node::serve::Parts;
use selvage_sync::Kv;

use crate::figures::tree;

/// The domain of all apps.
pub(crate) const DOMAIN: &str = "bench.example";
/// Requests under way at once.
const REQUESTS_MAX: u32 = 1_000;
/// Numbers have five digits, so that every variant of a guest is as long as the guest.
pub(crate) const NUMBERS: u32 = 100_000;

/// What all apps stand on: state in `dir`, compiled code in `compiled`, engines as a node has them.
pub(crate) async fn base(dir: &Path, compiled: &Path) -> anyhow::Result<Base> {
    let options = selvage_sync::Options::alone("node".parse()?, "here".parse()?, dir.join("kv"), Default::default());
    let kv = Kv::open(options, Arc::new(|_| None)).await?;
    Ok(Base {
        engines: Engines::new(&EngineOptions::default())?,
        cache: CompileCache::open(compiled)?,
        terms: tokio::sync::watch::Sender::new(Arc::new(Policy::LocalFiles.into())),
        limits_cap: Limits::node_cap(),
        kv: kv.into(),
        egress: Arc::new(Egress::new(&EgressOptions::default())?),
        keys: KeyFetcher::new(&[], false)?,
        state: State::open(dir)?,
        metrics: Metrics::new(),
    })
}

/// A node's parts with an empty table.
pub(crate) fn parts() -> anyhow::Result<Arc<Parts>> {
    Ok(Arc::new(Parts::new("node".parse()?, "here".parse()?, REQUESTS_MAX, Metrics::new())))
}

/// The name of an app by its number.
pub(crate) fn name(number: usize) -> String {
    format!("app-{number}")
}

/// The host at which it answers.
pub(crate) fn host(number: usize) -> String {
    format!("{}.{DOMAIN}", name(number))
}

/// Makes an app of one component ready.
pub(crate) fn app(
    base: &Base,
    name: &str,
    code: Bytes,
    limits: &Limits,
    isolation: Isolation,
) -> anyhow::Result<Arc<ActiveApp>> {
    app_at(base, name, Vec::new(), code, limits, isolation)
}

/// The same at more hosts than that of its name.
pub(crate) fn app_at(
    base: &Base,
    name: &str,
    hosts: Vec<String>,
    code: Bytes,
    limits: &Limits,
    isolation: Isolation,
) -> anyhow::Result<Arc<ActiveApp>> {
    let digest = Digest::of(&code);
    let mut app = App::of_component(name.parse()?, "guest".parse()?, digest);
    app.hosts = hosts;
    for component in app.components.values_mut() {
        (component.limits, component.isolation) = (limits.clone(), isolation);
    }
    let fetched = Fetched::of_files(&app, BTreeMap::from([(digest, code)]));
    Ok(Arc::new(ready(base, fetched, Settings::default())?))
}

/// A guest of the tests, by the name of its file.
pub(crate) fn hand_written(file: &str) -> anyhow::Result<Bytes> {
    Ok(wat::parse_file(tree().join("node/tests/guests").join(file))?.into())
}

/// A guest whose text can be exchanged: as many different components as there are numbers.
pub(crate) struct Template {
    code: Bytes,
    /// Where its text stands.
    at: usize,
    /// Around the number.
    text: (&'static str, &'static str),
}

impl Template {
    /// `node/tests/guests/hello.wat`, which answers `hello`: 7 KB.
    pub(crate) fn hello() -> anyhow::Result<Self> {
        Self::of(hand_written("hello.wat")?, b"hello", ("", ""))
    }

    /// `examples/plain`, which answers `hello, world`: 82 KB, with Rust's standard library.
    pub(crate) fn plain() -> anyhow::Result<Self> {
        let path = tree().join("examples/plain/plain.wasm");
        let code = std::fs::read(&path).with_context(|| format!("read {}", path.display()))?;
        Self::of(code.into(), b"hello, world\n", ("hello, ", "\n"))
    }

    fn of(code: Bytes, said: &[u8], text: (&'static str, &'static str)) -> anyhow::Result<Self> {
        let mut places = code.windows(said.len()).enumerate().filter(|(_, window)| *window == said);
        let (at, _) = places.next().context("the guest does not have its text")?;
        ensure!(places.next().is_none(), "the guest has its text twice");
        let template = Self { code, at, text };
        ensure!(template.text(0).len() == said.len(), "another text is not as long as the guest's");
        Ok(template)
    }

    /// The guest that answers with [`Template::text`] of this number.
    pub(crate) fn code(&self, number: u32) -> Bytes {
        let (text, mut code) = (self.text(number), self.code.to_vec());
        code[self.at..self.at + text.len()].copy_from_slice(text.as_bytes());
        code.into()
    }

    /// What it answers.
    pub(crate) fn text(&self, number: u32) -> String {
        let (before, after) = self.text;
        format!("{before}{:05}{after}", number % NUMBERS)
    }

    /// Bytes of each.
    pub(crate) fn len(&self) -> usize {
        self.code.len()
    }
}
