//! The front of a node, with an app that has no guest, and every bound on.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use selvage_certs::{Certificates, FrontSecret, FrontTls, Identity, NameRules, Resolver, TlsVersions};
use selvage_config::Digest;
use selvage_config::app::{App, Route, StaticResponse, Target};
use selvage_config::front::Front;
use selvage_config::node::TlsProvider;
use selvage_node::listen::{ListenOptions, Listeners};
use selvage_node::metrics::Metrics;
use selvage_node::route::{ActiveApp, Table};
use selvage_node::serve::Parts;

use super::{LARGE_BYTES, MIB_PATH, SMALL_BYTES, body};

/// Requests under way at once: the default of a node.
const REQUESTS_MAX: u32 = 10_000;
/// Requests of one connection, and connections of an address: a bound that no client of a bench meets, but that is kept.
const NEVER_MET: u32 = 1_000_000_000;

/// Serves until it is killed. The runtime is as the program's.
pub(super) fn run(port: u16, dir: &Path) -> anyhow::Result<()> {
    let runtime = selvage_node::line::runtime()?;
    runtime.block_on(async {
        let identity = Identity::load(dir.join("front.pem"), dir.join("front.key"))?;
        let provider = TlsProvider::default();
        let identity = identity.signing_with(&selvage_certs::provider_of(provider))?;
        let parts = Parts::new("fra-1".parse()?, "fra".parse()?, REQUESTS_MAX, Metrics::new()).with_front(bounds());
        parts.table.store(Arc::new(Table::alone(Arc::new(app()?))));
        let tls = FrontTls {
            resolver: Arc::new(Resolver::new(Certificates::of([&identity])?)),
            provider,
            secret: FrontSecret::random()?,
            versions: TlsVersions::Only13,
            has_challenges: false,
            has_early_data: false,
            rules: Arc::<NameRules>::default(),
        };
        let options = ListenOptions { https: Some(([127, 0, 0, 1], port).into()), http: None, tls: Some(tls) };
        let _listeners = Listeners::bind(&options, Arc::new(parts)).await?;
        std::future::pending().await
    })
}

/// What a node's file may say for one that stands behind nobody and has few, busy clients. Loopback is not let off.
fn bounds() -> Front {
    let mut front = Front {
        connections_max: NEVER_MET,
        requests_per_connection_max: NEVER_MET.into(),
        streams_per_connection_max: NEVER_MET.into(),
        // A client of a bench may hold its connections for as long as it looks at them.
        idle_ms: 600_000,
        ..Front::default()
    };
    let each = &mut front.per_address;
    (each.connections_max, each.quic_connections_max) = (NEVER_MET, NEVER_MET);
    (each.connections_per_second, each.requests_per_second) = (NEVER_MET, NEVER_MET);
    each.exempt.clear();
    front
}

fn app() -> anyhow::Result<ActiveApp> {
    let route = |pattern: &str, bytes: usize| -> anyhow::Result<Route> {
        let answer = StaticResponse { status_code: 200, headers: BTreeMap::new(), body: Some(body(bytes)) };
        Ok(Route { pattern: pattern.parse()?, target: Target::Static(answer) })
    };
    let app = App {
        name: "hello".parse()?,
        version: None,
        hosts: Vec::new(),
        variables: BTreeMap::new(),
        issuers: BTreeMap::new(),
        routes: vec![route("/", SMALL_BYTES)?, route(MIB_PATH, LARGE_BYTES)?],
        components: BTreeMap::new(),
    };
    Ok(ActiveApp::new(app, None, Digest::of(b"manifest"), &BTreeMap::new(), &BTreeMap::new())?)
}
