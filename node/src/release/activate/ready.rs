//! One app made ready to serve: verified, compiled, granted what it is granted, and warm.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;

use selvage_backend::Stores;
use selvage_config::app::Component;
use selvage_config::app::variables::{TemplateError, Values};
use selvage_config::release::ReleaseId;
use selvage_config::{ComponentName, Digest, Limits};
use tokio::sync::watch;

use crate::engine::Engines;
use crate::host::outbound::Egress;
use crate::jwt::{Issuer, JwtError, KeyFetcher};
use crate::line::Spent;
use crate::metrics::Metrics;
use crate::pool::{ActivateError, Grants, Pool};
use crate::release::compile::{CompileCache, CompileError, compile};
use crate::release::fetch::{FetchError, Fetched};
use crate::release::state::{State, StateError};
use crate::release::verify::{Terms, Verified, VerifyError, verify};
use crate::route::{ActiveApp, RouteError, TableError};

/// What a node brings to every app.
pub struct Base {
    /// The engines.
    pub engines: Engines,
    /// Compiled code.
    pub cache: CompileCache,
    /// What counts here. Whoever changes it wakes the [`Activation`](super::Activation).
    pub terms: watch::Sender<Arc<Terms>>,
    /// The most that any component may use.
    pub limits_cap: Limits,
    /// The stores.
    pub kv: Stores,
    /// The way out.
    pub egress: Arc<Egress>,
    /// Keys of token issuers.
    pub keys: KeyFetcher,
    /// The disk.
    pub state: State,
    /// What is counted.
    pub metrics: Metrics,
}

impl Base {
    /// What counts here now.
    pub fn terms(&self) -> Arc<Terms> {
        Arc::clone(&self.terms.borrow())
    }
}

/// What is said of an app besides what is signed.
#[derive(Default)]
pub struct Settings {
    /// Which release it is, if it is one.
    pub release: Option<ReleaseId>,
    /// Values of variables.
    pub variables: BTreeMap<String, String>,
    /// Environment over the app's own, for every component. Only `selvage up` sets any.
    pub environment: BTreeMap<String, String>,
}

/// Why an app is not ready.
#[derive(Debug, thiserror::Error)]
pub enum ReadyError {
    /// Its bytes did not come.
    #[error("fetch")]
    Fetch(#[from] FetchError),
    /// The signed list of what plans may name does not have it.
    #[error("the signed plan does not list {release} with manifest {manifest}")]
    Unlisted {
        /// The release.
        release: ReleaseId,
        /// Its manifest.
        manifest: Digest,
    },
    /// The process died too often while it was new here.
    #[error("the node died {starts} times while {release} was new: left alone until another release is planned")]
    Quarantined {
        /// The release.
        release: ReleaseId,
        /// How often.
        starts: u32,
    },
    /// It is not what a trusted key signed.
    #[error("verify")]
    Verify(#[from] VerifyError),
    /// A variable without value, or a value without variable.
    #[error("settle variables")]
    Variables(#[from] TemplateError),
    /// A destination is none once its variables are filled in.
    #[error("allowed_outbound_hosts of component {component}: {reason}")]
    Outbound {
        /// Whose.
        component: ComponentName,
        /// What is wrong.
        reason: String,
    },
    /// Code can't be compiled.
    #[error("compile component {component}")]
    Compile {
        /// Which.
        component: ComponentName,
        /// Why not.
        #[source]
        source: CompileError,
    },
    /// Code needs what it is not granted, or does not start.
    #[error("activate component {component}")]
    Pool {
        /// Which.
        component: ComponentName,
        /// Why not.
        #[source]
        source: ActivateError,
    },
    /// An issuer of tokens can't be used.
    #[error("issuer {issuer:?}")]
    Issuer {
        /// Which.
        issuer: String,
        /// Why not.
        #[source]
        source: JwtError,
    },
    /// A route can't be served.
    #[error("routes")]
    Routes(#[from] RouteError),
    /// Another app has one of its hosts.
    #[error("hosts")]
    Table(#[from] TableError),
    /// The disk failed.
    #[error("files")]
    State(#[from] StateError),
    /// The task ended early.
    #[error("task")]
    Ended(#[from] tokio::task::JoinError),
}

impl ReadyError {
    /// The stable word for a [`Refusal`](selvage_config::plan::Refusal).
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Fetch(error) => error.cause(),
            Self::Verify(error) => error.cause(),
            Self::Unlisted { .. } => "unlisted",
            Self::Quarantined { .. } => "quarantined",
            Self::Variables(_) | Self::Outbound { .. } | Self::Routes(_) | Self::Issuer { .. } => "app",
            Self::Compile { .. } => "compile",
            Self::Pool { source: ActivateError::Imports { .. } | ActivateError::Mismatch(_), .. } => "grant",
            Self::Pool { .. } | Self::Table(_) | Self::State(_) | Self::Ended(_) => "activate",
        }
    }

    /// Whether the same release may do better later: the cause is around it, not in it. A signature may be added, a
    /// host become free.
    pub fn may_pass(&self) -> bool {
        !matches!(self.cause(), "app" | "compile" | "grant" | "unlisted" | "revoked" | "quarantined")
    }
}

/// Makes an app ready. It computes for seconds and waits for the disk: a matter for `spawn_blocking`.
///
/// # Errors
/// [`ReadyError`].
pub fn ready(base: &Base, fetched: Fetched, settings: Settings) -> Result<ActiveApp, ReadyError> {
    let verified = verify(fetched, &base.terms())?;
    let app = verified.app();
    let values = Values::settle(&app.variables, &settings.variables)?;
    let mut pools = BTreeMap::new();
    let spent = Arc::default();
    for (name, component, code) in verified.components() {
        let failed = |source| ReadyError::Compile { component: name.clone(), source };
        let compiled = compile(&base.engines, &base.cache, &code).map_err(failed)?;
        let grants = grants(base, &verified, name, &values, &settings.environment, &spent)?;
        let failed = |source| ReadyError::Pool { component: name.clone(), source };
        pools.insert(name.clone(), Pool::new(&base.engines, &compiled, grants).map_err(failed)?);
        tracing::debug!(app = %app.name, component = %name, digest = %component.digest, "component is ready");
    }
    let mut issuers = BTreeMap::new();
    for (name, document) in &app.issuers {
        let failed = |source| ReadyError::Issuer { issuer: name.clone(), source };
        issuers.insert(name.clone(), Arc::new(Issuer::new(document, &base.keys).map_err(failed)?));
    }
    Ok(ActiveApp::new(app.clone(), settings.release, verified.manifest(), &pools, &issuers)?)
}

/// What one component may use here.
fn grants(
    base: &Base,
    verified: &Verified,
    name: &ComponentName,
    values: &Values,
    overrides: &BTreeMap<String, String>,
    spent: &Arc<Spent>,
) -> Result<Grants, ReadyError> {
    let app = verified.app();
    let component = &app.components[name];
    let outbound = component.outbound(values);
    let variables = component.variables.iter().map(|(key, template)| Ok((key.clone(), template.resolve(values)?)));
    let mut environment = component.environment.clone();
    environment.extend(overrides.clone());
    Ok(Grants {
        app: app.name.clone(),
        component: name.clone(),
        limits: component.limits.capped(&base.limits_cap),
        isolation: component.isolation,
        variables: variables.collect::<Result<_, TemplateError>>()?,
        environment,
        files: files(base, verified, name, component)?,
        outbound: outbound.map_err(|reason| ReadyError::Outbound { component: name.clone(), reason })?,
        stores: component.key_value_stores.clone(),
        kv: base.kv.clone(),
        egress: Arc::clone(&base.egress),
        spent: Arc::clone(spent),
        log_dropped: base.metrics.log_dropped(app.name.as_str()),
    })
}

/// Lays out the component's files, if it has any.
fn files(
    base: &Base,
    verified: &Verified,
    name: &ComponentName,
    component: &Component,
) -> Result<Option<PathBuf>, ReadyError> {
    if component.files.is_empty() {
        return Ok(None);
    }
    let files = component.files.iter().filter_map(|(path, digest)| Some((path.as_str(), verified.file(digest)?)));
    Ok(Some(base.state.keep_files(verified.manifest(), name.as_str(), files)?))
}
