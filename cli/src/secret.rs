//! `selvage secret`: values of variables that stand in no release.

use std::io::Read as _;
use std::process::ExitCode;

use clap::Subcommand;
use miette::Report;
use reqwest::Method;
use selvage_config::AppName;
use selvage_control_plane::answers::{Removed, SecretRequest};

use crate::client::{Client, json};
use crate::context::ContextArguments;
use crate::output::{Output, failure, wrong};

/// Largest value, bytes.
const VALUE_BYTES_MAX: u64 = 64 * 1024;

/// `selvage secret`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage secret set hello api_token < token.txt\n  selvage secret list hello\n  selvage secret drop hello api_token\n\nA value is read from standard input, so that it stands in no history and no list of processes. Nodes that run the app\nget it at once, without a release; it is sealed on the control plane's disk and shown to nobody."
)]
pub(crate) struct Arguments {
    #[command(subcommand)]
    what: What,

    #[command(flatten)]
    context: ContextArguments,
}

#[derive(Debug, Subcommand)]
enum What {
    /// Set a secret to what standard input says, without the line end.
    Set {
        /// The app.
        app: AppName,
        /// The variable, as the app declares it.
        name: String,
    },
    /// List the names of an app's secrets.
    List {
        /// The app.
        app: AppName,
    },
    /// Forget a secret.
    Drop {
        /// The app.
        app: AppName,
        /// The variable.
        name: String,
    },
}

/// Changes or lists secrets.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let path = |app: &AppName, name: &str| format!("/api/v1/apps/{app}/secrets/{name}");
    match arguments.what {
        What::List { app } => {
            let names: Vec<String> =
                json(client.request(Method::GET, &format!("/api/v1/apps/{app}/secrets")), "list secrets").await?;
            output.answer(&names, names.join("\n"));
        }
        What::Set { app, name } => {
            let mut value = String::new();
            let read = std::io::stdin().lock().take(VALUE_BYTES_MAX + 1).read_to_string(&mut value);
            read.map_err(|error| failure("read the value", &error, Some("pipe it to standard input")))?;
            if value.len() as u64 > VALUE_BYTES_MAX {
                return Err(wrong(format!("a value has at most {VALUE_BYTES_MAX} bytes"), None));
            }
            let value = value.strip_suffix('\n').unwrap_or(&value).to_owned();
            let put = client.request(Method::PUT, &path(&app, &name)).json(&SecretRequest { value });
            let set: Removed = json(put, "set the secret").await?;
            output.answer(&set, format_args!("{app}/{name} is set (generation {})", set.generation));
        }
        What::Drop { app, name } => {
            let gone: Removed = json(client.request(Method::DELETE, &path(&app, &name)), "drop the secret").await?;
            output.answer(&gone, format_args!("{app}/{name} is gone (generation {})", gone.generation));
        }
    }
    Ok(ExitCode::SUCCESS)
}
