//! `selvage nodes`: which nodes there are, what they serve, and what is said of them.

use std::collections::BTreeMap;
use std::process::ExitCode;

use clap::Subcommand;
use miette::Report;
use reqwest::Method;
use selvage_config::plan::{AppStatus, PlanStatus};
use selvage_config::rollout::is_label_text;
use selvage_config::{NodeName, Region};
use selvage_control_plane::answers::{JoinTokenAnswer, JoinTokenRequest, JoinTokenState, NodeAnswer, NodeRequest};

use crate::client::{Client, json, send};
use crate::context::ContextArguments;
use crate::output::{Output, table};

/// `selvage nodes`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage nodes -o json\n  selvage nodes invite --region fra --label tier=canary\n  selvage nodes drain fra-1            load balancers are told to send nothing more\n  selvage nodes revoke fra-1           its certificates are worth nothing any more"
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,

    #[command(flatten)]
    context: ContextArguments,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Make a token that lets one node join, once: `selvage node join` takes it.
    Invite {
        /// Where the node stands.
        #[arg(long)]
        region: Region,
        /// The only name that it may take. Needed for one that was there before.
        #[arg(long)]
        node: Option<NodeName>,
        /// A label, as NAME=VALUE. May be repeated.
        #[arg(long = "label", value_parser = label, value_name = "NAME=VALUE")]
        labels: Vec<(String, String)>,
        /// For how long it is good, seconds; at most a week.
        #[arg(long, default_value_t = 3_600, value_name = "SECONDS")]
        ttl: u64,
    },
    /// List join tokens that nobody has used.
    Invitations,
    /// Take a join token back.
    Uninvite {
        /// Its id.
        id: String,
    },
    /// Let a node keep the releases that it has: rollouts pass it by.
    Cordon {
        /// The node.
        node: NodeName,
    },
    /// Let it take part again.
    Uncordon {
        /// The node.
        node: NodeName,
    },
    /// Have load balancers send a node no more requests.
    Drain {
        /// The node.
        node: NodeName,
    },
    /// Have them send it requests again.
    Undrain {
        /// The node.
        node: NodeName,
    },
    /// Make a node's certificates worth nothing.
    Revoke {
        /// The node.
        node: NodeName,
    },
    /// Set a node's labels, all of them.
    Label {
        /// The node.
        node: NodeName,
        /// A label, as NAME=VALUE. None takes all away.
        #[arg(value_parser = label, value_name = "NAME=VALUE")]
        labels: Vec<(String, String)>,
    },
    /// Forget a node that is gone.
    Forget {
        /// The node.
        node: NodeName,
    },
}

/// NAME=VALUE.
fn label(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    if !is_label_text(name) || !is_label_text(value) {
        return Err("use letters, digits, '-', '_', '.' and '/'".to_owned());
    }
    Ok((name.to_owned(), value.to_owned()))
}

/// Lists nodes, or says something of one.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let (node, said, told) = match arguments.what {
        None => {
            let nodes = client.nodes().await?;
            output.answer(&nodes, listed(&nodes));
            return Ok(ExitCode::SUCCESS);
        }
        Some(What::Invite { region, node, labels, ttl }) => {
            let labels = labels.into_iter().collect();
            let request = JoinTokenRequest { region, node, labels, ttl_seconds: Some(ttl) };
            return invite(&client, &request, output).await;
        }
        Some(What::Invitations) => return invitations(&client, output).await,
        Some(What::Uninvite { id }) => {
            return delete(&client, &format!("/api/v1/join-tokens/{id}"), "was taken back", output).await;
        }
        Some(What::Forget { node }) => {
            return delete(&client, &format!("/api/v1/nodes/{node}"), "is forgotten", output).await;
        }
        Some(What::Cordon { node }) => (node, NodeRequest::Cordon, "is cordoned"),
        Some(What::Uncordon { node }) => (node, NodeRequest::Uncordon, "takes part in rollouts"),
        Some(What::Drain { node }) => (node, NodeRequest::Drain, "is drained"),
        Some(What::Undrain { node }) => (node, NodeRequest::Undrain, "takes requests"),
        Some(What::Revoke { node }) => (node, NodeRequest::Revoke, "is revoked"),
        Some(What::Label { node, labels }) => {
            (node, NodeRequest::Labels(labels.into_iter().collect()), "has these labels now")
        }
    };
    let post = client.request(Method::POST, &format!("/api/v1/nodes/{node}")).json(&said);
    send(post, &format!("change {node}")).await?;
    output.answer(&serde_json::json!({ "node": node, "now": said }), format_args!("{node} {told}"));
    Ok(ExitCode::SUCCESS)
}

async fn invite(client: &Client, request: &JoinTokenRequest, output: Output) -> Result<ExitCode, Report> {
    let post = client.request(Method::POST, "/api/v1/join-tokens").json(request);
    let answer: JoinTokenAnswer = json(post, "make a join token").await?;
    output.progress("the token is shown this once:");
    output.answer(&answer, &answer.token);
    Ok(ExitCode::SUCCESS)
}

async fn invitations(client: &Client, output: Output) -> Result<ExitCode, Report> {
    let tokens: Vec<JoinTokenState> = json(client.request(Method::GET, "/api/v1/join-tokens"), "list tokens").await?;
    let rows = tokens.iter().map(|token| {
        let node = token.node.as_ref().map_or("any", |node| node.as_str());
        let (id, region) = (token.id.clone(), token.region.to_string());
        vec![id, region, node.to_owned(), labels(&token.labels), token.created_by.clone()]
    });
    let rows = rows.collect::<Vec<_>>();
    output.answer(&tokens, table(&["ID", "REGION", "NODE", "LABELS", "BY"], &rows));
    Ok(ExitCode::SUCCESS)
}

async fn delete(client: &Client, path: &str, told: &str, output: Output) -> Result<ExitCode, Report> {
    let what = path.rsplit('/').next().unwrap_or_default();
    send(client.request(Method::DELETE, path), &format!("delete {what}")).await?;
    output.answer(&serde_json::json!({ "gone": what }), format_args!("{what} {told}"));
    Ok(ExitCode::SUCCESS)
}

fn listed(nodes: &[NodeAnswer]) -> String {
    let rows = nodes.iter().map(|node| {
        let status = &node.status;
        let seen = node.seen_ms_ago.map_or("never".to_owned(), |ms| format!("{:.1} s ago", ms as f64 / 1_000.0));
        let front = status.front.map_or("-".to_owned(), |address| address.to_string());
        let apps: Vec<String> = status.apps.iter().map(app).collect();
        vec![
            status.node.to_string(),
            status.region.to_string(),
            state(node),
            seen,
            status.plan.as_ref().map_or(status.generation.to_string(), |plan| generation(status.generation, plan)),
            front,
            labels(&node.labels),
            apps.join(" "),
        ]
    });
    let headings = ["NODE", "REGION", "STATE", "SEEN", "GENERATION", "FRONT", "LABELS", "APPS"];
    table(&headings, &rows.collect::<Vec<_>>())
}

/// The generation, and what is wrong with the signed plan.
fn generation(taken: u64, plan: &PlanStatus) -> String {
    let refused = plan.refused.as_ref().map(|refused| format!("refused a plan: {}", refused.cause));
    let expired = plan.expired.then(|| "plan expired".to_owned());
    let root = plan.root_expired.then(|| "root expired".to_owned());
    let wrong: Vec<String> = [refused, expired, root].into_iter().flatten().collect();
    if wrong.is_empty() { taken.to_string() } else { format!("{taken} ({})", wrong.join(", ")) }
}

fn state(node: &NodeAnswer) -> String {
    let alive = if node.alive { "alive" } else { "silent" };
    let said = [
        (node.cordoned, "cordoned"),
        (node.draining, "draining"),
        (node.revoked, "revoked"),
        (node.believes_authorities == Some(false), "old authorities"),
        (node.certificate_is_current == Some(false), "old certificate"),
    ];
    let said = said.into_iter().filter(|(is, _)| *is).map(|(_, word)| word);
    std::iter::once(alive).chain(said).collect::<Vec<_>>().join(",")
}

fn labels(labels: &BTreeMap<String, String>) -> String {
    let labels: Vec<String> = labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    if labels.is_empty() { "-".to_owned() } else { labels.join(",") }
}

fn app(status: &AppStatus) -> String {
    let serving = status.serving.as_ref().map_or(format!("{}:-", status.app), |s| s.release.to_string());
    let beside = status.candidate.as_ref().map(|s| format!("+{}", s.release)).unwrap_or_default();
    match &status.refused {
        Some(refusal) => format!("{serving}{beside} (refused {}: {})", refusal.release, refusal.cause),
        None => format!("{serving}{beside}"),
    }
}
