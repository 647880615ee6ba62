//! `selvage kv`: read and write a node's KV, and see how far its peers are behind.

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use bytes::Bytes;
use clap::Subcommand;
use miette::Report;
use reqwest::{Method, StatusCode};
use selvage_config::{NodeName, StoreName};

use crate::client::{Client, json, send};
use crate::context::ContextArguments;
use crate::output::{Output, failed, failure, table};

/// `selvage kv`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage kv --node fra-1 set counter/default greeting hello\n  selvage kv --node sin-1 get counter/default greeting\n  selvage kv --node iad-1 peers"
)]
pub(crate) struct Arguments {
    /// Which node.
    #[arg(long)]
    node: NodeName,

    #[command(flatten)]
    context: ContextArguments,

    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print a value, byte for byte.
    Get {
        /// app/label.
        store: StoreName,
        /// The key.
        key: String,
    },
    /// Write a value.
    Set {
        /// app/label.
        store: StoreName,
        /// The key.
        key: String,
        /// The value. Without it: standard input, or --file.
        value: Option<String>,
        /// Take the value from a file.
        #[arg(long, conflicts_with = "value")]
        file: Option<PathBuf>,
    },
    /// Delete a key.
    Delete {
        /// app/label.
        store: StoreName,
        /// The key.
        key: String,
    },
    /// List keys in order.
    List {
        /// app/label.
        store: StoreName,
        /// Only keys that start with this.
        #[arg(long, default_value = "")]
        prefix: String,
        /// Only keys after this one.
        #[arg(long)]
        after: Option<String>,
        /// At most this many.
        #[arg(long, default_value_t = 100)]
        limit: usize,
    },
    /// Show the peers and how far each is behind.
    Peers,
}

/// Runs one action.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let client = Client::of(&arguments.context.context)?;
    let address = client.admin_address(&arguments.node).await?;
    let value =
        |method, store: &StoreName, key: &str| client.admin(method, address, &format!("/kv/{store}/{}", escaped(key)));
    match arguments.action {
        Action::Get { store, key } => {
            let response = value(Method::GET, &store, &key).send().await;
            let response = response.map_err(|error| failure("read the key", &error, None))?;
            if response.status() == StatusCode::NOT_FOUND {
                return Err(failed(format!("{store} has no key {key:?} on {}", arguments.node), None));
            }
            let response = response.error_for_status().map_err(|error| failure("read the key", &error, None))?;
            output.bytes(&response.bytes().await.map_err(|error| failure("read the value", &error, None))?);
        }
        Action::Set { store, key, value: text, file } => {
            let body = content(text, file)?;
            send(value(Method::PUT, &store, &key).body(body), "write the key").await?;
        }
        Action::Delete { store, key } => drop(send(value(Method::DELETE, &store, &key), "delete the key").await?),
        Action::List { store, prefix, after, limit } => {
            let mut query = vec![("prefix", prefix), ("limit", limit.to_string())];
            query.extend(after.map(|after| ("after", after)));
            let list = client.admin(Method::GET, address, &format!("/kv/{store}")).query(&query);
            let answer: serde_json::Value = json(list, "list keys").await?;
            let keys = answer["keys"].as_array().cloned().unwrap_or_default();
            let rows: Vec<Vec<String>> = keys
                .iter()
                .map(|key| ["key", "bytes", "node", "stamp_ms"].map(|column| cell(key, column)).to_vec())
                .collect();
            output.answer(&answer, table(&["KEY", "BYTES", "BY", "AT (MS SINCE 1970)"], &rows));
        }
        Action::Peers => peers(&client, address, output).await?,
    }
    Ok(ExitCode::SUCCESS)
}

async fn peers(client: &Client, address: std::net::SocketAddr, output: Output) -> Result<(), Report> {
    let answer: serde_json::Value = json(client.admin(Method::GET, address, "/peers"), "ask for the peers").await?;
    let peers = answer.as_array().cloned().unwrap_or_default();
    let columns = ["node", "region", "connected", "lag", "queued_bytes", "heard_ms"];
    let rows: Vec<Vec<String>> = peers.iter().map(|peer| columns.map(|c| cell(peer, c)).to_vec()).collect();
    output.answer(
        &answer,
        table(&["NODE", "REGION", "CONNECTED", "LAG", "QUEUED BYTES", "HEARD (MS SINCE 1970)"], &rows),
    );
    Ok(())
}

/// One field of a JSON object, for a table.
fn cell(object: &serde_json::Value, name: &str) -> String {
    match &object[name] {
        serde_json::Value::String(text) => text.clone(),
        serde_json::Value::Null => "-".to_owned(),
        other => other.to_string(),
    }
}

fn content(text: Option<String>, file: Option<PathBuf>) -> Result<Bytes, Report> {
    if let Some(text) = text {
        return Ok(text.into());
    }
    if let Some(path) = file {
        let read = std::fs::read(&path);
        return read.map(Bytes::from).map_err(|error| failure(&format!("read {}", path.display()), &error, None));
    }
    let mut bytes = Vec::new();
    let read = std::io::stdin().read_to_end(&mut bytes);
    read.map_err(|error| failure("read standard input", &error, None))?;
    Ok(bytes.into())
}

/// A key as one segment of a path (RFC 3986 2.1).
pub(crate) fn escaped(key: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'_' | b'.' | b'~');
    let escape = |b: u8| if plain(b) { char::from(b).to_string() } else { format!("%{b:02X}") };
    key.bytes().map(escape).collect()
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_key_is_one_segment() {
        assert_eq!(super::escaped("a/b c%é"), "a%2Fb%20c%25%C3%A9");
    }
}
