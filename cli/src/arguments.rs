//! Every command and flag.

use std::process::ExitCode;

use clap::{Parser, Subcommand};
use miette::Report;

use crate::output::{Format, Output};
use crate::{
    audit, backup, certs, check, collect, control_plane, demo, deploy, import, key, kv, loadtest, node, nodes, push,
    restore, revoke, root, secret, sign, split, token, up, verify,
};

/// An edge CDN worker: signed WebAssembly components behind HTTP/1.1, HTTP/2 and HTTP/3, with replicated KV.
#[derive(Debug, Parser)]
#[command(name = "selvage", version, max_term_width = 110, after_help = EXAMPLES)]
pub(crate) struct Arguments {
    /// How answers are written.
    #[arg(short, long, global = true, value_enum, default_value_t, env = "SELVAGE_OUTPUT")]
    pub(crate) output: Format,

    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

const EXAMPLES: &str = "\
Start here:
  selvage demo                      a whole fleet on this machine, with curl lines to try
  selvage up -f spin.toml           one app alone, at http://127.0.0.1:3000

Exit codes: 0 done; 1 it did not work; 2 the arguments or a document are wrong and nothing was started.
SELVAGE_LOG=debug shows more of what goes on.";

/// What to do.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Serve one app alone, without a control plane.
    Up(up::Arguments),
    /// Run a whole fleet on this machine: control plane, three nodes, four signed apps.
    Demo(demo::Arguments),
    /// Run a node.
    Node(node::Arguments),
    /// Run the control plane.
    ControlPlane(control_plane::Arguments),
    /// Make the fleet's certificates.
    Certs(certs::Arguments),
    /// Make a key pair to sign with, as cosign does.
    Key(key::Arguments),
    /// Make, sign and replace the root that says who signs plans.
    Root(root::Arguments),
    /// Push an app to the control plane's registry.
    Push(push::Arguments),
    /// Make an app that `spin registry push` pushed one of ours.
    Import(import::Arguments),
    /// Let the registry go of what nothing refers to.
    Collect(collect::Arguments),
    /// List who changed what, and check that list.
    Audit(audit::Arguments),
    /// Write all that the control plane remembers into one file.
    Backup(backup::Arguments),
    /// Put a backup back, into a state directory that is not there yet.
    Restore(restore::Arguments),
    /// Sign a pushed app, as cosign does.
    Sign(sign::Arguments),
    /// Tell whether a policy accepts an artifact's signatures, as a node does; offline, if its bundles are at hand.
    Verify(verify::Arguments),
    /// Make a pushed app the current release, and wait until nodes serve it.
    Deploy(deploy::Arguments),
    /// Go back to an earlier release.
    Rollback(deploy::RollbackArguments),
    /// Make sure that a release, a key or an identity never counts again.
    Revoke(revoke::Arguments),
    /// Let a release serve a part of the visitors beside the current one.
    Split(split::Arguments),
    /// Set or list an app's secrets.
    Secret(secret::Arguments),
    /// List releases.
    Releases(deploy::ReleasesArguments),
    /// List nodes and what they serve; invite, cordon, drain or revoke one.
    Nodes(nodes::Arguments),
    /// Read and write KV on a node.
    Kv(kv::Arguments),
    /// Make a JWT to test with.
    Token(token::Arguments),
    /// Send open-loop load over HTTP/1.1, HTTP/2 and HTTP/3.
    Loadtest(loadtest::Arguments),
    /// Check an app or a configuration without starting anything.
    Check(check::Arguments),
}

impl Command {
    /// Runs the command.
    pub(crate) async fn run(self, output: &Output) -> Result<ExitCode, Report> {
        match self {
            Self::Up(arguments) => up::run(arguments, *output).await,
            Self::Demo(arguments) => demo::run(arguments, *output).await,
            Self::Node(arguments) => node::run(arguments, *output).await,
            Self::ControlPlane(arguments) => control_plane::run(arguments, *output).await,
            Self::Certs(arguments) => certs::run(arguments, *output),
            Self::Key(arguments) => key::run(&arguments, *output),
            Self::Root(arguments) => root::run(arguments, *output),
            Self::Push(arguments) => push::run(arguments, *output).await,
            Self::Sign(arguments) => sign::run(arguments, *output).await,
            Self::Verify(arguments) => verify::run(arguments, *output).await,
            Self::Deploy(arguments) => deploy::run(arguments, *output).await,
            Self::Rollback(arguments) => deploy::rollback(arguments, *output).await,
            Self::Revoke(arguments) => revoke::run(arguments, *output).await,
            Self::Split(arguments) => split::run(arguments, *output).await,
            Self::Secret(arguments) => secret::run(arguments, *output).await,
            Self::Import(arguments) => import::run(arguments, *output).await,
            Self::Collect(arguments) => collect::run(arguments, *output).await,
            Self::Audit(arguments) => audit::run(arguments, *output).await,
            Self::Backup(arguments) => backup::run(arguments, *output).await,
            Self::Restore(arguments) => restore::run(&arguments, *output),
            Self::Releases(arguments) => deploy::releases(arguments, *output).await,
            Self::Nodes(arguments) => nodes::run(arguments, *output).await,
            Self::Kv(arguments) => kv::run(arguments, *output).await,
            Self::Token(arguments) => token::run(&arguments, *output),
            Self::Loadtest(arguments) => loadtest::run(arguments, *output).await,
            Self::Check(arguments) => check::run(arguments, *output).await,
        }
    }
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    #[test]
    fn the_arguments_are_consistent() {
        Arguments::command().debug_assert();
    }

    #[test]
    fn every_command_has_help_with_an_example() {
        for command in Arguments::command().get_subcommands() {
            let help = command.get_after_help().map(ToString::to_string).unwrap_or_default();
            assert!(help.contains(&format!("selvage {}", command.get_name())), "{}", command.get_name());
        }
    }
}
