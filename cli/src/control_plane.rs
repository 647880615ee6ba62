//! `selvage control-plane`: run the control plane until it is told to stop.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use miette::Report;
use selvage_config::control_plane::ControlPlaneConfig;
use selvage_control_plane::ControlPlane;

use crate::node::stopped;
use crate::output::{Output, failure, wrong};

/// `selvage control-plane`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  selvage control-plane --config /etc/selvage/control-plane.toml")]
pub(crate) struct Arguments {
    #[command(flatten)]
    config: ConfigFile,
    /// Make this control plane's authority and key of plans those of the fleet, in place of those that control planes with
    /// one state (table `nats` of the configuration) had before. Stop the others first.
    #[arg(long)]
    new_keys: bool,
}

/// Which configuration of a control plane.
#[derive(Debug, clap::Args)]
pub(crate) struct ConfigFile {
    /// The configuration of the control plane.
    #[arg(
        short,
        long,
        env = "SELVAGE_CONTROL_PLANE_CONFIG",
        default_value = "control-plane.toml",
        value_name = "FILE"
    )]
    pub(crate) config: PathBuf,
}

/// Runs the control plane.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let mut config = load(&arguments.config.config)?;
    match &mut config.nats {
        Some(nats) => nats.new_keys = arguments.new_keys,
        None if arguments.new_keys => {
            return Err(wrong(
                "--new-keys is for control planes with one state",
                Some("add [nats] to the configuration"),
            ));
        }
        None => {}
    }
    let started = ControlPlane::start(config).await;
    let control_plane = started.map_err(|error| failure("start the control plane", &error, None))?;
    let address = control_plane.address();
    let stopped = stopped();
    output.answer(&serde_json::json!({ "address": address }), format_args!("control plane at https://{address}"));
    stopped.await;
    control_plane.stop().await;
    Ok(ExitCode::SUCCESS)
}

/// Reads a control plane's configuration.
pub(crate) fn load(path: &Path) -> Result<ControlPlaneConfig, Report> {
    let hint = "name the configuration with --config";
    let text = std::fs::read_to_string(path)
        .map_err(|error| wrong(format!("read {}: {error}", path.display()), Some(hint)))?;
    Ok(ControlPlaneConfig::parse(path, &text)?)
}
