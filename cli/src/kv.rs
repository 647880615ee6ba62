//! `selvage kv`: read, write and watch a node's KV, see how far its peers are behind, and work on its directory.

mod offline;

use std::io::Read;
use std::path::PathBuf;
use std::process::ExitCode;

use bytes::Bytes;
use clap::Subcommand;
use miette::Report;
use reqwest::{Method, StatusCode};
use selvage_config::{NodeName, StoreName};

use crate::client::{Client, accepted, json, send};
use crate::context::ContextArguments;
use crate::output::{Output, failed, failure, table, wrong};

/// The field of a node's answer to a write, and of a read, that says what a session has seen.
const TOKEN: &str = "selvage-kv-token";

/// `selvage kv`.
#[derive(Debug, clap::Args)]
#[command(
    after_help = "Examples:\n  selvage kv --node fra-1 set counter/default greeting hello\n  selvage kv --node sin-1 get counter/default greeting\n  selvage kv --node sin-1 watch counter/default\n  selvage kv --node iad-1 lag\n  selvage kv --node iad-1 homes\n  selvage kv check --dir /var/lib/selvage/kv"
)]
pub(crate) struct Arguments {
    /// Which node. The commands with --dir need none.
    #[arg(long, global = true)]
    node: Option<NodeName>,

    #[command(flatten)]
    context: ContextArguments,

    #[command(subcommand)]
    action: Action,
}

#[derive(Debug, Subcommand)]
enum Action {
    /// Print a value, byte for byte.
    #[command(after_help = "Example:\n  selvage kv --node fra-1 get counter/default greeting")]
    Get {
        /// app/label.
        store: StoreName,
        /// The key.
        key: String,
        /// Wait until the node has what this session wrote elsewhere: what `set --token` printed.
        #[arg(long)]
        token: Option<String>,
        /// Read it at the store's home, if it has one.
        #[arg(long)]
        latest: bool,
    },
    /// Write a value.
    #[command(
        after_help = "Example:\n  selvage kv --node fra-1 set counter/default greeting hello\n  selvage kv --node fra-1 set shop/images logo --file logo.png"
    )]
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
        /// The key ends to exist after so many milliseconds, at the same instant on every node.
        #[arg(long)]
        ttl_ms: Option<std::num::NonZeroU64>,
        /// Print a token, with which `get` at another node waits for this write.
        #[arg(long)]
        token: bool,
        /// Write only if there is no such key yet: at the store's home, or as far as the node knows where there is none.
        #[arg(long)]
        if_absent: bool,
    },
    /// Delete a key.
    #[command(after_help = "Example:\n  selvage kv --node fra-1 delete counter/default greeting")]
    Delete {
        /// app/label.
        store: StoreName,
        /// The key.
        key: String,
    },
    /// List keys in order.
    #[command(after_help = "Example:\n  selvage kv --node fra-1 list counter/default --prefix session/ --limit 20")]
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
    /// Show every key that changes, as it changes, until interrupted.
    #[command(after_help = "Example:\n  selvage kv --node fra-1 watch counter/default --prefix session/")]
    Watch {
        /// app/label.
        store: StoreName,
        /// Only keys that start with this.
        #[arg(long, default_value = "")]
        prefix: String,
        /// End after so many changes.
        #[arg(long)]
        count: Option<u64>,
    },
    /// Show the peers and how far each is behind.
    #[command(visible_alias = "peers", after_help = "Example:\n  selvage kv --node iad-1 lag")]
    Lag,
    /// Show which node decides the writes of each store that has a home, as the node knows it.
    #[command(after_help = "Example:\n  selvage kv --node iad-1 homes")]
    Homes,
    /// Show which regions hold the stores that not every node holds, as the node knows it.
    #[command(after_help = "Example:\n  selvage kv --node iad-1 placements")]
    Placements,
    #[command(flatten)]
    Offline(offline::Action),
}

/// Runs one action.
pub(crate) async fn run(arguments: Arguments, output: Output) -> Result<ExitCode, Report> {
    let action = match arguments.action {
        Action::Offline(action) => return tokio::task::block_in_place(|| offline::run(action, output)),
        action => action,
    };
    let Some(node) = arguments.node else {
        return Err(wrong("which node? --node is missing", Some("selvage nodes lists them")));
    };
    let client = Client::of(&arguments.context.context)?;
    let address = client.admin_address(&node).await?;
    let value =
        |method, store: &StoreName, key: &str| client.admin(method, address, &format!("/kv/{store}/{}", escaped(key)));
    match action {
        Action::Get { store, key, token, latest } => {
            let mut request = value(Method::GET, &store, &key);
            if latest {
                // A query without a value, as the node reads it.
                request = client.admin(Method::GET, address, &format!("/kv/{store}/{}?latest", escaped(&key)));
            }
            if let Some(token) = token {
                request = request.header(TOKEN, token);
            }
            let response = request.send().await;
            let response = response.map_err(|error| failure("read the key", &error, None))?;
            if response.status() == StatusCode::NOT_FOUND {
                return Err(failed(format!("{store} has no key {key:?} on {node}"), None));
            }
            let response = accepted(response, "read the key").await?;
            output.bytes(&response.bytes().await.map_err(|error| failure("read the value", &error, None))?);
        }
        Action::Set { store, key, value: text, file, ttl_ms, token, if_absent } => {
            let body = content(text, file)?;
            let mut request = value(Method::PUT, &store, &key).body(body);
            if let Some(ttl_ms) = ttl_ms {
                request = request.query(&[("ttl_ms", ttl_ms)]);
            }
            if if_absent {
                request = request.header("if-none-match", "*");
            }
            let response = send(request, "write the key").await?;
            let seen = response.headers().get(TOKEN).and_then(|token| token.to_str().ok());
            if let Some(seen) = seen.filter(|_| token) {
                output.answer(&serde_json::json!({ "token": seen }), seen);
            }
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
        Action::Watch { store, prefix, count } => {
            watch(&client, address, &store, &prefix, count, output).await?;
        }
        Action::Lag => peers(&client, address, output).await?,
        Action::Homes => homes(&client, address, &node, output).await?,
        Action::Placements => placements(&client, address, output).await?,
        Action::Offline(_) => {}
    }
    Ok(ExitCode::SUCCESS)
}

/// Asks for what is new again and again: each answer comes with the first change, or after a while.
async fn watch(
    client: &Client,
    address: std::net::SocketAddr,
    store: &StoreName,
    prefix: &str,
    count: Option<u64>,
    output: Output,
) -> Result<(), Report> {
    let mut cursor = "now".to_owned();
    let mut left = count.unwrap_or(u64::MAX);
    while left > 0 {
        let query = [("watch", cursor.as_str()), ("prefix", prefix)];
        let request = client.admin(Method::GET, address, &format!("/kv/{store}")).query(&query);
        let answer: serde_json::Value = json(request, "watch the store").await?;
        if answer["missed"] == true {
            output.progress("some changes were missed: list the store to see them");
        }
        for change in answer["changes"].as_array().into_iter().flatten() {
            let what = if change["exists"] == true { "set" } else { "deleted" };
            let facts = ["key", "bytes", "node", "stamp_ms"].map(|name| cell(change, name));
            let [key, bytes, node, at] = facts;
            output.answer(change, format!("{what:<8} {key}  {bytes} bytes  by {node} at {at}"));
            left -= 1;
            if left == 0 {
                return Ok(());
            }
        }
        cursor = cell(&answer, "cursor");
    }
    Ok(())
}

async fn peers(client: &Client, address: std::net::SocketAddr, output: Output) -> Result<(), Report> {
    let answer: serde_json::Value = json(client.admin(Method::GET, address, "/peers"), "ask for the peers").await?;
    let peers = answer.as_array().cloned().unwrap_or_default();
    let columns =
        ["node", "region", "connected", "lag", "queued_bytes", "heard_ms", "ahead_ms", "apart_since_ms", "placement"];
    let rows: Vec<Vec<String>> = peers.iter().map(|peer| columns.map(|c| cell(peer, c)).to_vec()).collect();
    output.answer(
        &answer,
        table(
            &[
                "NODE",
                "REGION",
                "CONNECTED",
                "LAG",
                "QUEUED BYTES",
                "HEARD (MS SINCE 1970)",
                "CLOCK AHEAD (MS)",
                "APART SINCE (MS SINCE 1970)",
                "PLACEMENT",
            ],
            &rows,
        ),
    );
    Ok(())
}

async fn homes(client: &Client, address: std::net::SocketAddr, node: &NodeName, output: Output) -> Result<(), Report> {
    let answer: serde_json::Value =
        json(client.admin(Method::GET, address, "/homes"), "ask for the homes of stores").await?;
    let homes = answer.as_array().cloned().unwrap_or_default();
    let row = |home: &serde_json::Value| {
        let at = home["home"].as_str().unwrap_or(node.as_str()).to_owned();
        let waits_for = home["waits_for"].as_array().into_iter().flatten().filter_map(|node| node.as_str());
        let waits_for = waits_for.collect::<Vec<_>>().join(" ");
        vec![cell(home, "store"), at, cell(home, "state"), cell(home, "term"), waits_for]
    };
    let rows: Vec<Vec<String>> = homes.iter().map(row).collect();
    output.answer(&answer, table(&["STORE", "HOME", "STATE", "TERM", "WAITS FOR"], &rows));
    Ok(())
}

async fn placements(client: &Client, address: std::net::SocketAddr, output: Output) -> Result<(), Report> {
    let request = client.admin(Method::GET, address, "/placements");
    let answer: serde_json::Value = json(request, "ask for the placements").await?;
    let listed = |of: &serde_json::Value| {
        let names = of.as_array().into_iter().flatten().filter_map(|name| name.as_str());
        names.collect::<Vec<_>>().join(" ")
    };
    let mut rows = Vec::new();
    for placement in answer.as_array().into_iter().flatten() {
        for store in placement["stores"].as_array().into_iter().flatten() {
            let here = match (placement["here"] == true, store["waiting"] == true) {
                (true, true) => "waiting",
                (true, false) => "yes",
                (false, _) => "no",
            };
            let (regions, holders) = (listed(&placement["regions"]), listed(&placement["holders"]));
            let name = cell(placement, "placement");
            rows.push(vec![cell(store, "store"), name, regions, here.into(), holders, cell(store, "cache_ms")]);
        }
    }
    output.answer(&answer, table(&["STORE", "PLACEMENT", "REGIONS", "HERE", "ALSO AT", "CACHE (MS)"], &rows));
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
