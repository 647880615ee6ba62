//! `selvage revoke`: what must never count again. Nodes hear of it with the next signed plan, stop what it hits, and
//! remember it for good.

use std::path::Path;
use std::process::ExitCode;

use miette::Report;
use reqwest::Method;
use selvage_config::snapshot::Revoked;
use selvage_config::{Digest, KeyId};
use selvage_control_plane::answers::Revocation;

use crate::client::{Client, json};
use crate::context::ContextArguments;
use crate::key::public_key;
use crate::output::{Output, table, wrong};

/// `selvage revoke`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage revoke --digest sha256:…           a release's manifest, or a component in any release\n  selvage revoke --key release.pub           whatever this key signed\n  selvage revoke --identity ci@example.com   whatever was signed in this name\n  selvage revoke --list\n\nNothing is given back: sign and deploy again with what still counts."
)]
pub(crate) struct Arguments {
    /// The digest of a manifest, component or file. May be repeated.
    #[arg(long)]
    digest: Vec<Digest>,

    /// A public key's file, or its id (sha256:…). May be repeated.
    #[arg(long, value_name = "FILE|ID")]
    key: Vec<String>,

    /// An identity in signing certificates. May be repeated.
    #[arg(long)]
    identity: Vec<String>,

    /// Show what is revoked.
    #[arg(long, conflicts_with_all = ["digest", "key", "identity"])]
    list: bool,

    #[command(flatten)]
    context: ContextArguments,
}

/// Revokes, or lists.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let key = |text: &String| text.parse::<KeyId>().or_else(|_| Ok(public_key(Path::new(text))?.id()));
    let what = Revoked {
        digests: arguments.digest.into_iter().collect(),
        keys: arguments.key.iter().map(key).collect::<Result<_, Report>>()?,
        identities: arguments.identity.into_iter().collect(),
    };
    if what.is_empty() && !arguments.list {
        return Err(wrong("nothing to revoke", Some("name a --digest, a --key or an --identity, or --list")));
    }
    let client = Client::of(&arguments.context.context)?;
    let path = "/api/v1/revocations";
    if arguments.list {
        let revoked: Revoked = json(client.request(Method::GET, path), "ask what is revoked").await?;
        output.answer(&revoked, shown(&revoked));
        return Ok(ExitCode::SUCCESS);
    }
    let answer: Revocation = json(client.request(Method::POST, path).json(&what), "revoke").await?;
    output.answer(&answer, format_args!("revoked in generation {}\n{}", answer.generation, shown(&answer.revoked)));
    Ok(ExitCode::SUCCESS)
}

fn shown(revoked: &Revoked) -> String {
    let row = |kind: &str, what: String| vec![kind.to_owned(), what];
    let digests = revoked.digests.iter().map(|digest| row("digest", digest.to_string()));
    let keys = revoked.keys.iter().map(|key| row("key", key.to_string()));
    let identities = revoked.identities.iter().map(|identity| row("identity", identity.clone()));
    table(&["KIND", "WHAT"], &digests.chain(keys).chain(identities).collect::<Vec<_>>())
}
