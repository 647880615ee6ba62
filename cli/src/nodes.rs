//! `selvage nodes`: which nodes there are, and what they serve.

use std::process::ExitCode;

use miette::Report;
use selvage_config::plan::{AppStatus, PlanStatus};

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
        let generation =
            status.plan.as_ref().map_or(status.generation.to_string(), |plan| generation(status.generation, plan));
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

/// The generation, and what is wrong with the signed plan.
fn generation(taken: u64, plan: &PlanStatus) -> String {
    let refused = plan.refused.as_ref().map(|refused| format!("refused a plan: {}", refused.cause));
    let expired = plan.expired.then(|| "plan expired".to_owned());
    let root = plan.root_expired.then(|| "root expired".to_owned());
    let wrong: Vec<String> = [refused, expired, root].into_iter().flatten().collect();
    if wrong.is_empty() { taken.to_string() } else { format!("{taken} ({})", wrong.join(", ")) }
}

fn app(status: &AppStatus) -> String {
    let serving = status.serving.as_ref().map_or(format!("{}:-", status.app), |s| s.release.to_string());
    match &status.refused {
        Some(refusal) => format!("{serving} (refused {}: {})", refusal.release, refusal.cause),
        None => serving,
    }
}
