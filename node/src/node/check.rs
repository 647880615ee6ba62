//! Whether an app could run here, without a socket: `selvage check`.

use std::path::PathBuf;
use std::sync::Arc;

use selvage_config::Limits;
use selvage_config::bundle::Bundle;
use selvage_config::node::{Egress as EgressConfig, Kv as KeptBy, KvEngine};
use selvage_sync::{Kv, Options as KvOptions};

use super::up::local;
use super::{StartError, WaysOut, base, start_engines};
use crate::engine::EngineOptions;
use crate::release::activate::{Settings, ready};
use crate::release::fetch::Fetched;
use crate::release::state::State;
use crate::release::verify::Policy;

/// What a variable without a default stands for while an app is checked.
const PLACEHOLDER: &str = "value";

/// Compiles every component and grants it what it is granted, as an activation would. Nothing stays behind but
/// compiled code in `compiled_dir`, if one is given.
///
/// # Errors
/// What an activation would refuse.
pub async fn check(bundle: Bundle, compiled_dir: Option<PathBuf>) -> Result<(), StartError> {
    let directory = tempfile::tempdir().map_err(StartError::Temporary)?;
    let engines = start_engines(EngineOptions::of_app(&bundle.app));
    let state = State::open(directory.path())?;
    let (node, region) = local();
    let kept = KeptBy { engine: KvEngine::Memory, ..KeptBy::default() };
    let kv_options = KvOptions::alone(node, region, directory.path().join("kv"), kept);
    let kv = Kv::open(kv_options, Arc::new(|_| None)).await?;
    let compiled = compiled_dir.unwrap_or_else(|| directory.path().join(super::COMPILED));
    let ways_out = WaysOut::new(&EgressConfig::default())?;
    let base =
        base(state, kv.clone(), Policy::LocalFiles.into(), Limits::node_cap(), ways_out, (engines, compiled)).await?;
    let required = bundle.app.variables.iter().filter(|(_, variable)| variable.default.is_none());
    let variables = required.map(|(name, _)| (name.clone(), PLACEHOLDER.to_owned())).collect();
    let settings = Settings { variables, ..Settings::default() };
    let made = tokio::task::spawn_blocking(move || {
        ready(&base, Fetched::of_files(&bundle.app, bundle.blobs), settings).map(drop)
    });
    let made = made.await;
    kv.close().await;
    Ok(made??)
}
