//! `selvage up`: a node that runs one app from this machine.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, OnceLock};
use std::time::Duration;

use bytes::Bytes;
use selvage_config::bundle::Bundle;
use selvage_config::node::{
    CertificateFiles, Egress as EgressConfig, Kv as KeptBy, KvEngine, TlsProvider, TlsSettings,
};
use selvage_config::{Limits, NodeName, Region, StoreLabel, StoreName};
use selvage_sync::{Kv, Options as KvOptions};
use tokio::sync::watch;
use tokio::task::JoinSet;

use super::certificates::{certificates, front_tls, look_at_certificates, own_secret};
use super::{Addresses, COMPILED, Me, Node, StartError, WaysOut, base, start_engines};
use crate::engine::EngineOptions;
use crate::listen::{ListenOptions, Listeners};
use crate::release::activate::{Report, Settings, ready};
use crate::release::fetch::Fetched;
use crate::release::state::State;
use crate::release::verify::Policy;
use crate::route::Table;
use crate::serve::Parts;

/// Requests under way at once.
const REQUESTS_MAX: u32 = 10_000;
/// How long requests may take to end.
const DRAIN: Duration = Duration::from_secs(5);

/// What `selvage up` runs: one app from this machine, without a control plane.
pub struct UpOptions {
    /// The app.
    pub bundle: Bundle,
    /// Where it listens: with TLS if `tls` is set.
    pub listen: SocketAddr,
    /// A certificate.
    pub tls: Option<CertificateFiles>,
    /// Values of variables.
    pub variables: BTreeMap<String, String>,
    /// Environment over the app's own.
    pub environment: BTreeMap<String, String>,
    /// Where KV stays. None: it goes with the node.
    pub state_dir: Option<PathBuf>,
    /// Where compiled code stays. None: with the state.
    pub compiled_dir: Option<PathBuf>,
    /// Whether guests may reach loopback and private addresses, where the app allows the host.
    pub private_networks: bool,
    /// What stands in the app's stores at the start.
    pub values: Vec<(StoreLabel, String, Bytes)>,
}

impl Node {
    /// Runs one app from this machine: no control plane, no peers, no signature.
    ///
    /// # Errors
    /// [`StartError`]; then nothing is left running.
    pub async fn up(options: UpOptions) -> Result<Self, StartError> {
        let engines = start_engines(EngineOptions::of_app(&options.bundle.app));
        let reload = certificates(options.tls.as_slice(), TlsProvider::default(), false)?;
        let tls = TlsSettings::default();
        let tls = reload
            .as_ref()
            .map(|reload| Ok::<_, StartError>(front_tls(reload, &tls, None, (Arc::default(), own_secret()?))))
            .transpose()?;
        let temporary = match options.state_dir {
            Some(_) => None,
            None => Some(tempfile::tempdir().map_err(StartError::Temporary)?),
        };
        let dir = options.state_dir.as_deref().or(temporary.as_ref().map(tempfile::TempDir::path));
        let dir = dir.unwrap_or(Path::new("."));
        let egress = EgressConfig { private_networks: options.private_networks, roots: Vec::new() };
        let ways_out = WaysOut::new(&egress)?;
        let state = State::open(dir)?;
        let (name, region) = local();
        // What goes with the process needs no disk.
        let engine = if temporary.is_some() { KvEngine::Memory } else { KvEngine::default() };
        let kept = KeptBy { engine, ..KeptBy::default() };
        let kv_options = KvOptions::alone(name.clone(), region.clone(), dir.join("kv"), kept);
        let kv = Kv::open(kv_options, Arc::new(|_| None)).await?;
        for (label, key, value) in options.values {
            kv.set(&StoreName::of(&options.bundle.app.name, &label), &key, value).await?;
        }
        let compiled = options.compiled_dir.unwrap_or_else(|| state.dir().join(COMPILED));
        let base =
            base(state, kv.clone(), Policy::LocalFiles.into(), Limits::node_cap(), ways_out, (engines, compiled))
                .await?;

        let Bundle { app, blobs } = options.bundle;
        let settings = Settings { release: None, variables: options.variables, environment: options.environment };
        let metrics = base.metrics.clone();
        let made = tokio::task::spawn_blocking(move || ready(&base, Fetched::of_files(&app, blobs), settings));
        let app = Arc::new(made.await??);

        let parts = Arc::new(Parts::new(name.clone(), region.clone(), REQUESTS_MAX, metrics));
        parts.table.store(Arc::new(Table::alone(Arc::clone(&app))));
        let (https, http) = if reload.is_some() { (Some(options.listen), None) } else { (None, Some(options.listen)) };
        let listening = ListenOptions { https, http, tls };
        let listeners = Listeners::bind(&listening, Arc::clone(&parts)).await?;
        let addresses =
            Addresses { https: listeners.https_addr(), http: listeners.http_addr(), ..Addresses::default() };
        let mut tasks = JoinSet::new();
        if let Some(reload) = reload {
            tasks.spawn(look_at_certificates(reload, listeners.servers(), parts.metrics.clone()));
        }
        Ok(Self {
            me: Arc::new(Me { name, region, labels: BTreeMap::new(), addresses, admin: OnceLock::new(), ledger: None }),
            parts,
            mesh: kv.into(),
            listeners,
            admin: None,
            report: watch::channel(Report::default()).1,
            drain: DRAIN,
            handover: DRAIN,
            offer: None,
            tasks,
            _plans: None,
            _temporary: temporary,
        })
    }
}

/// Who the node of `selvage up` is: nobody else hears of it.
pub(super) fn local() -> (NodeName, Region) {
    ("local".parse().expect("a valid name"), "local".parse().expect("a valid name"))
}
