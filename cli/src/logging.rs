//! Where log lines go: stderr, at the level that fits the command unless `SELVAGE_LOG` says otherwise.

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

use crate::arguments::Command;

/// Starts logging. `filter` is a `tracing` filter such as `debug` or `selvage_node=debug,guest=off`.
pub(crate) fn start(command: &Command, filter: Option<&str>) {
    let usual = match command {
        Command::Node(_) | Command::ControlPlane(_) => "info",
        Command::Up(arguments) if arguments.quiet => "error",
        Command::Up(_) => "warn,guest=info",
        _ => "error",
    };
    let chosen = filter.and_then(|filter| EnvFilter::try_new(filter).ok());
    let filter = chosen.unwrap_or_else(|| EnvFilter::new(usual));
    let to_stderr = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    let color = std::io::stderr().is_terminal();
    let started = match command {
        // A daemon's log is read by programs.
        Command::Node(_) | Command::ControlPlane(_) if !color => to_stderr.json().try_init(),
        _ => to_stderr.with_ansi(color).compact().try_init(),
    };
    // A second subscriber in one process: only a test could do that, and the first one stays.
    drop(started);
}
