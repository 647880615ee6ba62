//! `selvage restore`: puts a backup back.

use std::path::PathBuf;
use std::process::ExitCode;

use miette::Report;
use selvage_control_plane::backup::{ADVANCE, BackupError, check, restore};

use crate::backup::described;
use crate::control_plane::{ConfigFile, load};
use crate::output::{Output, failure};

/// `selvage restore`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage restore selvage-2026-11-22.tar --check                  what it holds, and whether every sum is right\n  selvage restore selvage-2026-11-22.tar --config control-plane.toml --sealing-key sealing.key\n\nFor a control plane that does not run: `state_dir` must not be there, or be empty. Then start it. Nodes take the plans of\nthe backup, because their generation is moved on by a million: what was released after the backup goes. With --hold they\nkeep what they run until somebody changes something.\n\nGone, or to be done again: releases, secrets, revocations and audit lines of after the backup, and join tokens. What nodes\nwere told was revoked stays revoked on them."
)]
pub(crate) struct Arguments {
    /// The backup.
    file: PathBuf,

    /// Only read it, compare every sum, and tell what it holds.
    #[arg(long, conflicts_with_all = ["sealing_key", "hold"])]
    check: bool,

    #[command(flatten)]
    config: ConfigFile,

    /// The key that values are sealed with: `sealing.key` of the old `state_dir`. Not needed if the configuration names it.
    #[arg(long, value_name = "FILE")]
    sealing_key: Option<PathBuf>,

    /// Leave the generation as it was: nodes keep what they run until somebody changes something.
    #[arg(long)]
    hold: bool,
}

/// Puts a backup back.
pub(crate) fn run(arguments: &Arguments, output: Output) -> Result<ExitCode, Report> {
    let Arguments { file, config, sealing_key, hold, .. } = arguments;
    if arguments.check {
        let contents = check(file).map_err(|error| told(&error))?;
        output.answer(&contents, format_args!("every sum is right: {}", described(&contents)));
        return Ok(ExitCode::SUCCESS);
    }
    let config = load(&config.config)?;
    let restored = restore(file, &config, sealing_key.as_deref(), *hold).map_err(|error| told(&error))?;
    let nodes = if *hold {
        "nodes keep what they run until somebody changes something".to_owned()
    } else {
        format!("nodes will take its plans: generation {} is {ADVANCE} past the backup's", restored.begins_with)
    };
    let dropped = restored.join_tokens_dropped;
    output.answer(
        &restored,
        format_args!(
            "{} holds what was {}\n{nodes}\n{dropped} join tokens were not put back; what was revoked since must be revoked again",
            restored.state_dir.display(),
            described(&restored.contents)
        ),
    );
    Ok(ExitCode::SUCCESS)
}

fn told(error: &BackupError) -> Report {
    let hint = match error {
        BackupError::Key { .. } | BackupError::NoKey(_) => Some("name the old control plane's key with --sealing-key"),
        BackupError::Occupied(_) => Some("move it away, or name another state_dir in the configuration"),
        BackupError::Cut | BackupError::Sum { .. } | BackupError::Form { .. } | BackupError::Blob(_) => {
            Some("take another backup")
        }
        BackupError::Format { .. } => Some("restore it with the program that made it"),
        _ => None,
    };
    failure("restore", error, hint)
}
