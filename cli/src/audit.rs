//! `selvage audit`: who changed what, and whether the log of it is whole.

use std::fs::File;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Subcommand;
use miette::Report;
use reqwest::Method;
use selvage_config::Digest;
use selvage_control_plane::audit::{Line, Verified, verify};

use crate::client::{Client, send};
use crate::context::ContextArguments;
use crate::output::{Output, failed, failure, table};

/// Lines asked for at once.
const PAGE: u64 = 1_000;

/// `selvage audit`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage audit list --last 20\n  selvage audit verify\n  selvage audit verify --file /var/lib/selvage/audit.jsonl --head sha256:…\n\nEvery line holds the hash of the one before. Note down the head that `verify` prints where the control plane can't\nwrite: who can rewrite the whole log can rewrite every hash, but not that one."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,

    #[command(flatten)]
    context: ContextArguments,
}

#[derive(Debug, Subcommand)]
enum What {
    /// List changes, the latest last.
    List {
        /// Only the last so many.
        #[arg(long, default_value_t = 50)]
        last: usize,
    },
    /// Check that no line was changed, left out or put in.
    Verify {
        /// A copy of the log. Default: the control plane's own.
        #[arg(long)]
        file: Option<PathBuf>,
        /// The hash of a line that must be among them: the head of an earlier check.
        #[arg(long)]
        head: Option<Digest>,
    },
}

/// Lists or checks.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    match arguments.what {
        What::List { last } => {
            let log = fetch(&Client::of(&arguments.context.context)?).await?;
            let lines: Vec<Line> = log.lines().filter_map(|line| serde_json::from_str(line).ok()).collect();
            let shown = &lines[lines.len().saturating_sub(last)..];
            let rows: Vec<Vec<String>> = shown.iter().map(row).collect();
            output.answer(&shown, table(&["N", "AT", "WHO", "WHAT", "SUBJECT", "BEFORE", "AFTER"], &rows));
        }
        What::Verify { file, head } => {
            let (text, verified) = match file {
                Some(path) => {
                    let read =
                        |error: &dyn std::error::Error| failure(&format!("read {}", path.display()), error, None);
                    let verified = verify(File::open(&path).map_err(|error| read(&error))?);
                    (std::fs::read_to_string(&path).map_err(|error| read(&error))?, verified)
                }
                None => {
                    let log = fetch(&Client::of(&arguments.context.context)?).await?;
                    let verified = verify(log.as_bytes());
                    (log, verified)
                }
            };
            let verified = verified.map_err(|error| failure("check the audit log", &error, None))?;
            if let Some(head) = head
                && !text.lines().any(|line| Digest::of(line.as_bytes()) == head)
            {
                return Err(failed(format!("no line has the hash {head}: the log was rewritten"), None));
            }
            output.answer(&verified, told(&verified));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn told(verified: &Verified) -> String {
    let head = verified.head.map_or("nothing".to_owned(), |head| head.to_string());
    format!("{} lines from number {}, head {head}", verified.lines, verified.first.unwrap_or(0))
}

fn row(line: &Line) -> Vec<String> {
    let at = i64::try_from(line.at_ms / 1_000).ok().and_then(|at| time::OffsetDateTime::from_unix_timestamp(at).ok());
    let at = at.and_then(|at| at.format(&time::format_description::well_known::Rfc3339).ok()).unwrap_or_default();
    let short = |text: &str| text.chars().take(60).collect::<String>();
    let words = [&line.who, &line.what, &line.subject, &line.before, &line.after].map(|text| short(text));
    [line.number.to_string(), at].into_iter().chain(words).collect()
}

/// The whole log, page by page.
async fn fetch(client: &Client) -> Result<String, Report> {
    let (mut log, mut from) = (String::new(), 0);
    loop {
        let path = format!("/api/v1/audit?from={from}&max={PAGE}");
        let answer = send(client.request(Method::GET, &path), "read the audit log").await?;
        let page = answer.text().await.map_err(|error| failure("read the audit log", &error, None))?;
        let last = page.lines().last().and_then(|line| serde_json::from_str::<Line>(line).ok());
        let Some(last) = last else { return Ok(log) };
        from = last.number + 1;
        log.push_str(&page);
    }
}
