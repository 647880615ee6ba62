//! `selvage collect`: lets the registry's disk have back what nothing needs.

use std::process::ExitCode;

use miette::Report;
use reqwest::Method;
use serde_json::Value;

use crate::client::{Client, json};
use crate::context::ContextArguments;
use crate::output::Output;

/// `selvage collect`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Example:\n  selvage collect --hours 24\n\nWhat a tag, a release or an index leads to stays, with its signatures. The control plane does this by itself every\nhour for what is older than `collect_after_hours`."
)]
pub(crate) struct Arguments {
    /// Only what nobody has touched for this long.
    #[arg(long, default_value_t = 24)]
    hours: u64,

    #[command(flatten)]
    context: ContextArguments,
}

/// Collects.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let path = format!("/api/v1/registry/collect?hours={}", arguments.hours);
    let gone: Value = json(client.request(Method::POST, &path), "collect").await?;
    let text = format!("{} manifests, {} blobs, {} bytes", gone["manifests"], gone["blobs"], gone["bytes"]);
    output.answer(&gone, text);
    Ok(ExitCode::SUCCESS)
}
