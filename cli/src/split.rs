//! `selvage split`: two releases of an app side by side.

use std::process::ExitCode;

use miette::Report;
use reqwest::Method;
use selvage_config::release::ReleaseId;
use selvage_config::rollout::SplitKey;
use selvage_control_plane::answers::{Released, Share};

use crate::client::{Client, json};
use crate::context::ContextArguments;
use crate::output::Output;

/// `selvage split`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage split hello@4 --percent 20 --key-by cookie:sid\n  selvage split hello@4 --end\n\nRaising the percentage moves visitors to the release, and none back. `selvage deploy` gives it to everybody."
)]
pub(crate) struct Arguments {
    /// A release that is there: `selvage releases` lists them.
    release: ReleaseId,

    /// How many of a hundred visitors it serves. With 0 only requests with the field `selvage-release` meet it.
    #[arg(long, value_name = "0-100", value_parser = clap::value_parser!(u8).range(0..=100))]
    #[arg(required_unless_present = "end", conflicts_with = "end")]
    percent: Option<u8>,

    /// What keeps a visitor at one release: client, header:NAME or cookie:NAME.
    #[arg(long, default_value_t, value_name = "KEY")]
    key_by: SplitKey,

    /// Let requests choose their release by the field `selvage-release`, whatever the percentage.
    #[arg(long, conflicts_with = "end")]
    named: bool,

    /// Everybody is served by the current release again.
    #[arg(long)]
    end: bool,

    #[command(flatten)]
    context: ContextArguments,
}

/// Changes a split.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let id = &arguments.release;
    let path = format!("/api/v1/apps/{}/splits/{}", id.app, id.number);
    let (request, text) = match arguments.percent {
        Some(percent) => {
            let share = Share { percent, key: arguments.key_by, named: arguments.named };
            let text = format!("{id} serves {percent} of 100 visitors, by {}", share.key);
            (client.request(Method::PUT, &path).json(&share), text)
        }
        None => (client.request(Method::DELETE, &path), format!("{id} serves nobody")),
    };
    let released: Released = json(request, &format!("split {}", id.app)).await?;
    output.answer(&released, format_args!("{text} (generation {})", released.generation));
    Ok(ExitCode::SUCCESS)
}
