//! `selvage deploy`, `rollback` and `releases`: which version of an app the fleet runs.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use miette::Report;
use reqwest::Method;
use selvage_config::AppName;
use selvage_config::bundle::Bundle;
use selvage_config::release::Release;
use selvage_config::rollout::{Gate, Selection, SplitKey, Wave};
use selvage_control_plane::answers::{
    ReleaseRequest, Released, RollbackRequest, Rollout, RolloutRequest, RolloutState, Share, WaveAnswer, WaveStage,
};

use crate::client::{Client, json};
use crate::context::ContextArguments;
use crate::key::{PasswordArguments, SigningKey};
use crate::output::{Output, table, wrong};
use crate::push::push;
use crate::registry::{Reference, resolve};
use crate::sign::sign;

/// How long to wait for nodes, besides what waves bake.
const TIMEOUT: Duration = Duration::from_secs(60);
/// How often the rollout is asked for while waiting.
const POLL: Duration = Duration::from_millis(50);

/// `selvage deploy`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage deploy hello@sha256:… --variable greeting=Hi\n  selvage deploy -f examples/hello/spin.toml --key cosign.key     push, sign and deploy in one go\n  selvage deploy hello:v2 --wave 10%:5m --wave region=fra:30m       a tenth of the nodes, then a region, then all\n  selvage deploy hello:v2 --percent 5 --key-by cookie:sid           beside the current release, for 5 of 100 visitors"
)]
pub(crate) struct Arguments {
    /// A pushed and signed app: repository@digest or repository:tag.
    #[arg(required_unless_present = "from", conflicts_with = "from")]
    reference: Option<Reference>,

    /// Push, sign and deploy this app: a spin.toml, a directory with one, or a .wasm file. Needs --key.
    #[arg(short, long, visible_alias = "file", value_name = "PATH", requires = "key")]
    from: Option<PathBuf>,

    /// The private key to sign with.
    #[arg(long, requires = "from")]
    key: Option<PathBuf>,

    #[command(flatten)]
    password: PasswordArguments,

    /// The app's name. Default: the repository's last part, or the name in the manifest.
    #[arg(long)]
    app: Option<AppName>,

    /// A variable of the app, as NAME=VALUE. May be repeated.
    #[arg(long = "variable", value_parser = pair, value_name = "NAME=VALUE")]
    variables: Vec<(String, String)>,

    #[command(flatten)]
    moves: MoveArguments,

    #[command(flatten)]
    wait: WaitArguments,

    #[command(flatten)]
    context: ContextArguments,
}

/// How the release comes into use.
#[derive(Debug, Clone, clap::Args)]
struct MoveArguments {
    /// A wave of nodes, and how long it bakes: 10%, region=fra:5m or tier=canary:30s. May be repeated; everybody comes
    /// last. A wave that does badly halts the rollout, and the old release is back. Default: one node in a hundred, at
    /// least one, then everybody.
    #[arg(long = "wave", value_name = "WAVE", conflicts_with_all = ["at_once", "percent"])]
    waves: Vec<Wave>,

    /// On every node now, whatever it does there.
    #[arg(long, conflicts_with = "percent")]
    at_once: bool,

    /// On every node, for so many of a hundred visitors, beside the current release. With 0 only requests with the field
    /// `selvage-release` meet it.
    #[arg(long, value_name = "0-100", value_parser = clap::value_parser!(u8).range(0..=100))]
    percent: Option<u8>,

    /// What keeps a visitor at one release: client, header:NAME or cookie:NAME.
    #[arg(long, default_value_t, requires = "percent", value_name = "KEY")]
    key_by: SplitKey,

    /// Let requests choose their release by the field `selvage-release`, whatever the percentage.
    #[arg(long, requires = "percent")]
    named: bool,

    /// A bound of the gates between waves, as NAME=NUMBER: requests_min, errors_permille_more, traps_permille_more,
    /// p99_percent_max, refusals_max, stall_ms. May be repeated.
    #[arg(long = "gate", value_parser = bound, value_name = "NAME=NUMBER")]
    gate: Vec<(String, u64)>,
}

/// NAME=NUMBER.
fn bound(text: &str) -> Result<(String, u64), String> {
    let (name, number) = pair(text)?;
    Ok((name, number.parse().map_err(|_| format!("{number:?} is no whole number"))?))
}

impl MoveArguments {
    fn request(&self) -> Result<RolloutRequest, Report> {
        if let Some(percent) = self.percent {
            return Ok(RolloutRequest::Split(Share { percent, key: self.key_by.clone(), named: self.named }));
        }
        if self.at_once {
            return Ok(RolloutRequest::AtOnce);
        }
        let bounds: serde_json::Map<_, _> = self.gate.iter().map(|(name, n)| (name.clone(), (*n).into())).collect();
        let gate: Gate =
            serde_json::from_value(bounds.into()).map_err(|error| wrong(format!("--gate: {error}"), None))?;
        let mut waves = self.waves.clone();
        if waves.is_empty() {
            waves.push(Wave { nodes: Selection::Percent(1), bake_ms: 0 });
        }
        Ok(RolloutRequest::Waves { waves, gate })
    }

    /// How long the waves bake, together.
    fn bakes(&self) -> Duration {
        Duration::from_millis(self.waves.iter().fold(0, |sum: u64, wave| sum.saturating_add(wave.bake_ms)))
    }
}

/// How long to wait for nodes.
#[derive(Debug, Clone, clap::Args)]
struct WaitArguments {
    /// Return when this many nodes serve the release. Default: all that are alive.
    #[arg(long, value_name = "NODES")]
    wait_for: Option<usize>,

    /// Give up waiting after this long, seconds. 0 does not wait at all. Default 60, and as long as the waves bake. The
    /// rollout goes on all the same.
    #[arg(long, value_name = "SECONDS")]
    timeout: Option<u64>,
}

/// `selvage rollback`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage rollback hello             to the release before the current one\n  selvage rollback hello --to 3"
)]
pub(crate) struct RollbackArguments {
    /// The app.
    app: AppName,

    /// Number of the release to go back to.
    #[arg(long)]
    to: Option<u32>,

    #[command(flatten)]
    wait: WaitArguments,

    #[command(flatten)]
    context: ContextArguments,
}

/// `selvage releases`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Example:\n  selvage releases hello -o json")]
pub(crate) struct ReleasesArguments {
    /// Only this app's.
    app: Option<AppName>,

    #[command(flatten)]
    context: ContextArguments,
}

/// NAME=VALUE.
pub(crate) fn pair(text: &str) -> Result<(String, String), String> {
    let (name, value) = text.split_once('=').ok_or("expected NAME=VALUE")?;
    Ok((name.to_owned(), value.to_owned()))
}

/// Makes an app's version the current one and waits until nodes serve it.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let variables: BTreeMap<String, String> = arguments.variables.into_iter().collect();
    let (app, reference) = match (arguments.reference, &arguments.from, &arguments.key) {
        (Some(reference), ..) => (arguments.app, reference),
        (None, Some(from), Some(key)) => {
            let key = SigningKey::load(key, &arguments.password.password)?;
            let bundle = Bundle::load(from)?;
            let app = arguments.app.unwrap_or_else(|| bundle.app.name.clone());
            (Some(app), publish(&client, &bundle, &key, output).await?)
        }
        _ => return Err(wrong("give a pushed app, or -f and --key", None)),
    };
    let app = match app {
        Some(app) => app,
        None => reference.repository.last().parse().map_err(|e| wrong(format!("{e}"), Some("give --app")))?,
    };
    let moves = arguments.moves.request()?;
    let released = release_as(&client, &app, &reference, variables, moves).await?;
    output.progress(format_args!("{} is released (generation {})", released.release.id, released.generation));
    wait(&client, &released, &arguments.wait, arguments.moves.bakes(), output).await
}

/// Pushes and signs; returns the reference by digest.
pub(crate) async fn publish(
    client: &Client,
    bundle: &Bundle,
    key: &SigningKey,
    output: Output,
) -> Result<Reference, Report> {
    let pushed = push(client, bundle, None, "latest", output).await?;
    let reference = Reference { repository: pushed.repository, reference: pushed.manifest.to_string() };
    let (digest, size) = resolve(client, &reference).await?;
    sign(client, &reference.repository, digest, size, key).await?;
    Ok(reference)
}

/// Tells the control plane that `reference` is the app's current version now.
pub(crate) async fn release(
    client: &Client,
    app: &AppName,
    reference: &Reference,
    variables: BTreeMap<String, String>,
) -> Result<Released, Report> {
    release_as(client, app, reference, variables, RolloutRequest::AtOnce).await
}

/// Tells the control plane that `reference` shall become the app's current version, and how.
async fn release_as(
    client: &Client,
    app: &AppName,
    reference: &Reference,
    variables: BTreeMap<String, String>,
    rollout: RolloutRequest,
) -> Result<Released, Report> {
    let Reference { repository, reference } = reference.clone();
    let request = ReleaseRequest { repository, reference, variables, rollout };
    let post = client.request(Method::POST, &format!("/api/v1/apps/{app}/releases")).json(&request);
    json(post, &format!("release {app}")).await
}

/// Makes an earlier release the current one.
pub(crate) async fn rollback(arguments: RollbackArguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let released = roll_back(&client, &arguments.app, arguments.to).await?;
    output.progress(format_args!("{} is current (generation {})", released.release.id, released.generation));
    wait(&client, &released, &arguments.wait, Duration::ZERO, output).await
}

/// Tells the control plane to go back.
pub(crate) async fn roll_back(client: &Client, app: &AppName, to: Option<u32>) -> Result<Released, Report> {
    let post = client.request(Method::POST, &format!("/api/v1/apps/{app}/rollback")).json(&RollbackRequest { to });
    json(post, &format!("roll {app} back")).await
}

/// Waits until enough nodes serve the release, prints each, and says with the exit code whether they do.
async fn wait(
    client: &Client,
    released: &Released,
    arguments: &WaitArguments,
    bakes: Duration,
    output: Output,
) -> Result<ExitCode, Report> {
    let longest = arguments.timeout.map_or(TIMEOUT + bakes, Duration::from_secs);
    let until = Instant::now() + longest;
    let told = Cell::new(0);
    let settled = |rollout: &Rollout| {
        if let Some(wave) = rollout.wave.as_ref().filter(|wave| wave.number > told.get()) {
            told.set(wave.number);
            output.progress(format_args!("wave {} of {}: {}", wave.number, wave.count, wave.nodes));
        }
        is_settled(rollout, arguments.wait_for)
    };
    let rollout = rollout_until(client, released, until, settled).await?;
    output.answer(&rollout, format_args!("{}{}", verdict(&rollout), rows(&rollout)));
    let enough = arguments.wait_for.unwrap_or(rollout.nodes.len());
    let is_halted = rollout.wave.as_ref().is_some_and(|wave| wave.stage == WaveStage::Halted);
    let done = !is_halted && (longest.is_zero() || (rollout.serving >= enough && rollout.serving > 0));
    Ok(if done { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Why a rollout was taken back.
fn verdict(rollout: &Rollout) -> String {
    match &rollout.wave {
        Some(WaveAnswer { stage: WaveStage::Halted, number, count, nodes, reason, .. }) => {
            let reason = reason.as_deref().unwrap_or("it was halted");
            format!("{} was taken back in wave {number} of {count} ({nodes}): {reason}\n", rollout.release)
        }
        _ => String::new(),
    }
}

/// Whether waiting longer can't change the verdict: the rollout was halted, enough serve, or too many have refused.
fn is_settled(rollout: &Rollout, wait_for: Option<usize>) -> bool {
    let enough = wait_for.unwrap_or(rollout.nodes.len()).max(1);
    let serve = rollout.serving >= enough;
    match rollout.wave.as_ref().map(|wave| wave.stage) {
        Some(WaveStage::Halted) => true,
        Some(WaveStage::Running) => wait_for.is_some() && serve,
        Some(WaveStage::Done) | None => {
            serve || (!rollout.nodes.is_empty() && rollout.serving + rollout.pending < enough)
        }
    }
}

/// The rollout once `enough` says so, or at `until`.
pub(crate) async fn rollout_until(
    client: &Client,
    released: &Released,
    until: Instant,
    enough: impl Fn(&Rollout) -> bool,
) -> Result<Rollout, Report> {
    let id = &released.release.id;
    let path = format!("/api/v1/apps/{}/rollout?release={}", id.app, id.number);
    loop {
        let rollout: Rollout = json(client.request(Method::GET, &path), "ask for the rollout").await?;
        if enough(&rollout) || Instant::now() >= until {
            return Ok(rollout);
        }
        tokio::time::sleep(POLL).await;
    }
}

fn rows(rollout: &Rollout) -> String {
    let rows = rollout.nodes.iter().map(|node| {
        let state = match &node.state {
            RolloutState::Serving => format!("serves {}", rollout.release),
            RolloutState::Pending => "has not answered yet".to_owned(),
            RolloutState::Refused { cause, reason } => format!("refused ({cause}): {reason}"),
        };
        vec![node.node.to_string(), node.region.to_string(), state]
    });
    table(&["NODE", "REGION", "STATE"], &rows.collect::<Vec<_>>())
}

/// Lists releases.
pub(crate) async fn releases(arguments: ReleasesArguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let path = arguments.app.map_or("/api/v1/releases".to_owned(), |app| format!("/api/v1/apps/{app}/releases"));
    let releases: Vec<Release> = json(client.request(Method::GET, &path), "ask for releases").await?;
    let rows: Vec<Vec<String>> = releases
        .iter()
        .map(|r| vec![r.id.to_string(), r.manifest.short(), r.repository.to_string(), r.created_by.clone()])
        .collect();
    output.answer(&releases, table(&["RELEASE", "MANIFEST", "REPOSITORY", "BY"], &rows));
    Ok(ExitCode::SUCCESS)
}
