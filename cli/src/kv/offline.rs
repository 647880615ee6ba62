//! `selvage kv check | export | import | migrate`: work on the KV directory of a node that does not run.

use std::fmt::Display;
use std::fs::{self, File};
use std::io::{BufReader, BufWriter};
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::{Duration, Instant};

use clap::Subcommand;
use miette::Report;
use selvage_config::node::KvEngine;
use selvage_sync::offline::{self, Carried, OfflineError};
use serde_json::json;

use crate::output::{Output, failed, failure};

/// How often progress is told.
const PROGRESS: Duration = Duration::from_secs(2);

/// What is done without a node.
#[derive(Debug, Subcommand)]
pub(crate) enum Action {
    /// Read and verify every row of a KV directory; exit code 1 if something is damaged.
    #[command(after_help = "Example:\n  selvage kv check --dir /var/lib/selvage/kv")]
    Check {
        /// `kv` below the node's state_dir. No node may have it open.
        #[arg(long)]
        dir: PathBuf,
    },
    /// Change what keeps the rows, in place. Say the same in node.toml then.
    #[command(after_help = "Example:\n  selvage kv migrate --dir /var/lib/selvage/kv --to redb")]
    Migrate {
        /// `kv` below the node's state_dir. No node may have it open.
        #[arg(long)]
        dir: PathBuf,
        /// sled or redb.
        #[arg(long)]
        to: KvEngine,
    },
    /// Write all rows that can be read to a file, also of a directory that a node moved aside.
    #[command(
        after_help = "Examples:\n  selvage kv export --dir /var/lib/selvage/kv kv.snapshot\n  selvage kv export --dir /var/lib/selvage/kv/quarantine-1790000000000 rest.snapshot"
    )]
    Export {
        /// `kv` below the node's state_dir, or a quarantine in it. No node may have it open.
        #[arg(long)]
        dir: PathBuf,
        /// The file, which may not exist yet.
        file: PathBuf,
    },
    /// Fill a new directory from an exported file. Its node begins as a new incarnation.
    #[command(after_help = "Example:\n  selvage kv import --dir /var/lib/selvage/kv --engine redb kv.snapshot")]
    Import {
        /// `kv` below the node's state_dir, which may hold nothing yet.
        #[arg(long)]
        dir: PathBuf,
        /// sled or redb, as node.toml says.
        #[arg(long, default_value_t)]
        engine: KvEngine,
        /// The file.
        file: PathBuf,
    },
}

/// Runs one action.
pub(crate) fn run(action: Action, output: Output) -> Result<ExitCode, Report> {
    match action {
        Action::Check { dir } => {
            let mut all_sound = true;
            for dir in with_placements(&dir)? {
                all_sound &= check(&dir, output)?;
            }
            return Ok(if all_sound { ExitCode::SUCCESS } else { ExitCode::FAILURE });
        }
        Action::Migrate { dir, to } => {
            // The directory itself last: what was not migrated below it is when it is tried again.
            for dir in with_placements(&dir)?.iter().rev() {
                migrate(dir, to, output)?;
            }
        }
        Action::Export { dir, file } => {
            let out = File::create_new(&file);
            let out = out.map_err(|error| failure(&format!("create {}", file.display()), &error, None))?;
            let done = offline::export(&dir, BufWriter::new(&out), progress(output, "exported"));
            let done = done.and_then(|carried| {
                out.sync_all().map_err(offline::SnapshotError::Io)?;
                Ok(carried)
            });
            let carried = done.map_err(|error| {
                // Half a snapshot can't be imported; it only looks like one.
                let _ = fs::remove_file(&file);
                wrong(&format!("export {}", dir.display()), &error)
            })?;
            told(output, &carried, &format!("exported to {}", file.display()));
            for placed in with_placements(&dir)?.iter().skip(1) {
                output.progress(format_args!("not in it: {}, which has an export of its own", placed.display()));
            }
        }
        Action::Import { dir, engine, file } => {
            let input = File::open(&file);
            let input = input.map_err(|error| failure(&format!("open {}", file.display()), &error, None))?;
            let carried = offline::import(&dir, engine, BufReader::new(input), progress(output, "imported"));
            let carried = carried.map_err(|error| wrong(&format!("import {}", file.display()), &error))?;
            told(output, &carried, &format!("imported into {}", dir.display()));
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// A KV directory, and those of the placements below it.
fn with_placements(dir: &Path) -> Result<Vec<PathBuf>, Report> {
    let mut all =
        offline::placements(dir).map_err(|error| failure(&format!("look into {}", dir.display()), &error, None))?;
    all.insert(0, dir.to_owned());
    Ok(all)
}

/// A placement may be kept as asked already, where a migration did not end.
fn migrate(dir: &Path, to: KvEngine, output: Output) -> Result<(), Report> {
    match offline::migrate(dir, to, progress(output, "checked")) {
        Ok(carried) => {
            let what = format!("{} kept by {to} now: set engine = \"{to}\" under [kv] in node.toml", dir.display());
            told(output, &carried, &what);
            Ok(())
        }
        Err(OfflineError::Same(_)) if offline::is_of_placement(dir) => Ok(()),
        Err(error) => Err(wrong(&format!("migrate {}", dir.display()), &error)),
    }
}

/// Whether it is sound.
fn check(dir: &Path, output: Output) -> Result<bool, Report> {
    let report = offline::check(dir, progress(output, "checked"));
    let report = report.map_err(|error| wrong(&format!("check {}", dir.display()), &error))?;
    let generation = report.generation.map_or_else(String::new, |generation| generation.to_string());
    let document = json!({
        "directory": dir.display().to_string(), "generation": generation, "rows": report.rows, "records": report.records, "record_bytes": report.record_bytes,
        "disk_bytes": report.disk_bytes, "corrupt": report.corrupt, "corrupt_keys": report.corrupt_keys,
        "misfits": report.misfits, "recounted": report.recounted, "sound": report.is_sound(),
    });
    let mut text = format!(
        "{}: {generation}: {} rows, {} records of {} bytes, {} bytes on disk\n{} damaged, {} that do not fit",
        dir.display(),
        report.rows,
        report.records,
        report.record_bytes,
        report.disk_bytes,
        report.corrupt,
        report.misfits
    );
    for key in &report.corrupt_keys {
        text.push_str(&format!("\n  damaged: {key}"));
    }
    if report.recounted {
        text.push_str("\nthe counts of the stores were wrong and are right now");
    }
    output.answer(&document, text);
    Ok(report.is_sound())
}

fn told(output: Output, carried: &Carried, what: &str) {
    let Carried { rows, damaged, bytes } = carried;
    let document = json!({ "rows": rows, "damaged": damaged, "bytes": bytes, "done": what });
    output.answer(&document, format!("{rows} rows, {bytes} bytes, {damaged} damaged\n{what}"));
}

fn progress(output: Output, done: &'static str) -> impl FnMut(u64) {
    let start = Instant::now();
    let mut last = start;
    move |rows| {
        if last.elapsed() >= PROGRESS {
            last = Instant::now();
            output.progress(format_args!("{rows} rows {done} in {} s", start.elapsed().as_secs()));
        }
    }
}

fn wrong(tried: &str, error: &OfflineError) -> Report {
    let hint = match error {
        OfflineError::Engine(error) if error.is_corrupt() => {
            Some("the files are damaged: the node would begin anew; `selvage kv export` takes what can still be read")
        }
        OfflineError::Engine(_) => Some("does a node run on this directory? end it first"),
        OfflineError::Snapshot(_) => Some("take another file: nothing of this one is used beyond the damage"),
        _ => None,
    };
    match error {
        OfflineError::Engine(engine) => failure(tried, engine, hint),
        OfflineError::Snapshot(snapshot) => failure(tried, snapshot, hint),
        other => failed(format!("{tried}: {}", other as &dyn Display), hint),
    }
}
