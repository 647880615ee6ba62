//! `selvage nodes`: which nodes there are, and what they serve.

use std::process::ExitCode;

use miette::Report;
use selvage_config::plan::AppStatus;

use crate::client::Client;
use crate::context::ContextArguments;
use crate::output::{Output, table};

/// `selvage nodes`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  selvage nodes -o json")]
pub(crate) struct Arguments {
    #[command(flatten)]
    context: ContextArguments,
}

/// Lists nodes.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let nodes = Client::of(&arguments.context.context)?.nodes().await?;
    let rows = nodes.iter().map(|node| {
        let status = &node.status;
        let seen = node.seen_ms_ago.map_or("never".to_owned(), |ms| format!("{:.1} s ago", ms as f64 / 1_000.0));
        let front = status.front.map_or("-".to_owned(), |address| address.to_string());
        let apps: Vec<String> = status.apps.iter().map(app).collect();
        let alive = if node.alive { "alive" } else { "silent" };
        let generation = status.generation.to_string();
        vec![
            status.node.to_string(),
            status.region.to_string(),
            alive.to_owned(),
            seen,
            generation,
            front,
            apps.join(" "),
        ]
    });
    let headings = ["NODE", "REGION", "STATE", "SEEN", "GENERATION", "FRONT", "APPS"];
    output.answer(&nodes, table(&headings, &rows.collect::<Vec<_>>()));
    Ok(ExitCode::SUCCESS)
}

fn app(status: &AppStatus) -> String {
    let serving = status.serving.as_ref().map_or(format!("{}:-", status.app), |s| s.release.to_string());
    match &status.refused {
        Some(refusal) => format!("{serving} (refused {}: {})", refusal.release, refusal.cause),
        None => serving,
    }
}
