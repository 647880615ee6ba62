//! `selvage backup`: all that the control plane remembers, in one file.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Duration;

use futures_util::StreamExt as _;
use miette::Report;
use reqwest::Method;
use selvage_control_plane::backup::{Contents, check};
use time::OffsetDateTime;
use time::format_description::well_known::Rfc3339;

use crate::client::{Client, send};
use crate::context::ContextArguments;
use crate::output::{Output, failed, failure, wrong};

/// Longest time for a whole backup.
const BACKUP_TIMEOUT: Duration = Duration::from_secs(6 * 3_600);

/// What no backup holds.
pub(crate) const NOT_IN_IT: &str = "\
no key is in it: keep the sealing key, the plans' key, the roots, the authority's directory, the control plane's
certificate and its configuration apart from it";

/// `selvage backup`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  selvage backup /backup/selvage-2026-11-22.tar\n\nThe control plane goes on working meanwhile. The file is read again and every sum compared before it has its name;\nexit code 1 if something is wrong with it. It holds apps, releases, nodes, what operators said of them, the registry\nand the audit log. No key is in it: values of variables and secrets are sealed in it by the control plane's sealing\nkey, without which `selvage restore` puts nothing back."
)]
pub(crate) struct Arguments {
    /// Where it is written. A file that is there is not overwritten.
    file: PathBuf,

    #[command(flatten)]
    context: ContextArguments,
}

/// Makes a backup.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let Arguments { file, context } = arguments;
    if file.exists() {
        return Err(wrong(format!("{} is there already", file.display()), Some("name a new file")));
    }
    let client = Client::of(&context.context)?;
    let mut name = file.clone().into_os_string();
    name.push(".partial");
    let aside = PathBuf::from(name);
    let opened = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(&aside);
    let opened = opened.map_err(|error| failure(&format!("write {}", aside.display()), &error, None))?;
    let done = match receive(&client, opened, &aside).await {
        Ok(()) => keep(&aside, &file),
        Err(error) => Err(error),
    };
    let _ = fs::remove_file(&aside);
    let contents = done?;
    let told = serde_json::json!({ "file": file, "contents": contents });
    output.answer(&told, format_args!("{}: {}\n{NOT_IN_IT}", file.display(), described(&contents)));
    Ok(ExitCode::SUCCESS)
}

async fn receive(client: &Client, mut to: File, aside: &Path) -> Result<(), Report> {
    let request = client.request(Method::GET, "/api/v1/backup").timeout(BACKUP_TIMEOUT);
    let mut pieces = send(request, "make a backup").await?.bytes_stream();
    let hint = "the control plane's log says why";
    while let Some(piece) = pieces.next().await {
        let piece = piece.map_err(|error| failure("make a backup: it broke off", &error, Some(hint)))?;
        to.write_all(&piece).map_err(|error| failure(&format!("write {}", aside.display()), &error, None))?;
    }
    to.sync_all().map_err(|error| failure(&format!("write {}", aside.display()), &error, None))
}

/// Gives the file its name if all of it is right.
fn keep(aside: &Path, file: &Path) -> Result<Contents, Report> {
    let contents = check(aside).map_err(|error| failure("check the backup", &error, Some("make it again")))?;
    // A link, unlike a new name, is refused where something has that name.
    fs::hard_link(aside, file).map_err(|error| match error.kind() {
        io::ErrorKind::AlreadyExists => failed(format!("{} is there already", file.display()), None),
        _ => failure(&format!("write {}", file.display()), &error, None),
    })?;
    let parent = file.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let synced = File::open(parent).and_then(|directory| directory.sync_all());
    synced.map_err(|error| failure(&format!("write {}", file.display()), &error, None))?;
    Ok(contents)
}

/// What a backup holds, in a sentence.
pub(crate) fn described(contents: &Contents) -> String {
    let made = OffsetDateTime::from_unix_timestamp_nanos(i128::from(contents.made_ms) * 1_000_000).ok();
    let made = made.and_then(|at| at.format(&Rfc3339).ok()).unwrap_or_default();
    let Contents { generation, apps, nodes, blobs, blobs_bytes, sealing_key, .. } = contents;
    let mib = blobs_bytes / (1024 * 1024);
    format!(
        "made {made}, generation {generation}, {apps} apps, {nodes} nodes, {blobs} blobs of {mib} MiB, \
         sealed with key {sealing_key}; plans name {}",
        if contents.releases.is_empty() { "nothing".to_owned() } else { contents.releases.join(" ") }
    )
}
