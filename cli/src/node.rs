//! `selvage node`: run a node until it is told to stop, then drain; or make one.

mod join;

use std::path::PathBuf;
use std::process::ExitCode;

use miette::Report;
use selvage_config::Invalid;
use selvage_config::node::NodeConfig;
use selvage_node::node::Node;

use crate::output::{Output, failure, wrong};

/// `selvage node`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage node --config /etc/selvage/node.toml\n  selvage node join fra-1 --control-plane cp.example:7400 --token-file token\n\nSIGTERM and Ctrl-C drain: no new requests, those under way may end (drain_ms).\nTo replace the program: start the new one with --take-over, and the old one goes."
)]
#[command(args_conflicts_with_subcommands = true)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: Option<What>,

    /// The configuration.
    #[arg(short, long, env = "SELVAGE_NODE_CONFIG", default_value = "node.toml", value_name = "FILE")]
    config: PathBuf,
    /// Take the sockets of the node that runs with this configuration, which lets its requests end and goes
    ///
    /// It goes on until this one is ready: no connection waits for another's request, and none is refused. If none runs,
    /// this one starts as usual.
    #[arg(long)]
    take_over: bool,
}

#[derive(Debug, clap::Subcommand)]
enum What {
    /// Come into a fleet by a token of `selvage nodes invite`.
    Join(join::Arguments),
}

/// Runs a node, or makes one.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    if let Some(What::Join(arguments)) = arguments.what {
        return join::run(arguments, output).await;
    }
    let config = load(&arguments.config)?;
    let name = config.name.clone();
    let started = if arguments.take_over { Node::take_over(config).await } else { Node::start(config).await };
    let node = started.map_err(|error| failure("start the node", &error, None))?;
    let status = node.status();
    let shown = |address: Option<std::net::SocketAddr>| address.map_or("-".to_owned(), |a| a.to_string());
    let text = format!(
        "node {name} serves; front {}, replication {}, admin {}",
        shown(status.front),
        shown(status.replication),
        shown(status.admin)
    );
    let stopped = stopped();
    output.answer(&status, text);
    // Both branches only wait: dropping the loser loses nothing.
    tokio::select! {
        () = stopped => output.progress("draining"),
        () = node.succeeded() => output.progress("a new process has taken over; draining"),
    }
    node.drain().await;
    Ok(ExitCode::SUCCESS)
}

/// Reads a node's configuration.
pub(crate) fn load(path: &std::path::Path) -> Result<NodeConfig, Report> {
    let hint = "name the configuration with --config";
    let text = std::fs::read_to_string(path)
        .map_err(|error| wrong(format!("read {}: {error}", path.display()), Some(hint)))?;
    Ok(NodeConfig::parse(path, &text).map_err(|error: Invalid| error)?)
}

/// Waits for SIGTERM or Ctrl-C. One that comes between the call and the first poll counts too: whoever says that it serves
/// must have called this before.
pub(crate) fn stopped() -> impl Future<Output = ()> {
    use tokio::signal::unix::{SignalKind, signal};
    let signals = (signal(SignalKind::terminate()), signal(SignalKind::interrupt()));
    async {
        let (Ok(mut terminate), Ok(mut interrupt)) = signals else {
            // Without handlers the signals' default action ends the process.
            return std::future::pending().await;
        };
        // Both branches only wait: dropping the loser loses nothing.
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    }
}

#[cfg(test)]
mod tests {
    #[tokio::test]
    async fn a_signal_counts_from_the_moment_that_somebody_means_to_wait_for_it() {
        let stopped = super::stopped();
        let own = std::process::id().to_string();
        assert!(std::process::Command::new("kill").args(["-TERM", &own]).status().unwrap().success());
        stopped.await;
    }
}
