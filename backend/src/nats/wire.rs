//! The way to the servers, and the bucket there.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_nats::connection::State;
use async_nats::jetstream::context::GetStreamErrorKind;
use async_nats::jetstream::stream::{Config as StreamConfig, DiscardPolicy, StorageType, Stream};
use async_nats::jetstream::{Context, ErrorCode};
use async_nats::{Client, ConnectErrorKind, ConnectOptions, Event, ServerAddr};
use rustls::ClientConfig;
use selvage_config::node::KvBackend;
use tokio::sync::{mpsc, oneshot};

use crate::contact::Wire;
use crate::error::OpenError;
use crate::secret;
use crate::tls::tls_of;

/// What a message has besides its value, bytes: subject and headers.
const HEAD_BYTES: usize = 8 * 1024;
/// How often the library itself asks whether the connection lives.
const PING: Duration = Duration::from_secs(2);
/// By how much the library is more patient than we are.
const BEYOND: Duration = Duration::from_secs(1);
/// The first server whose messages end by themselves.
const SERVER_WITH_TTL: (i64, i64, i64) = (2, 11, 0);

/// A connection, and the bucket.
#[derive(Clone)]
pub(crate) struct Connection {
    client: Client,
    pub(super) context: Context,
    pub(super) stream: Arc<Stream>,
    pub(super) stream_name: String,
    /// Whether messages of the bucket may end by themselves.
    pub(super) has_ttl: bool,
    value_bytes_max: usize,
    patience: Duration,
}

impl Connection {
    /// How long the library waits for an answer.
    pub(super) fn patience(&self) -> Duration {
        self.patience
    }

    pub(super) fn is_connected(&self) -> bool {
        self.client.connection_state() == State::Connected
    }

    /// What the server takes of a value.
    pub(super) fn value_bytes_max(&self) -> usize {
        self.client.max_payload().saturating_sub(HEAD_BYTES).min(self.value_bytes_max)
    }
}

/// Where the servers are, and who the node is there.
pub(crate) struct NatsWire {
    config: KvBackend,
    servers: Vec<ServerAddr>,
    tls: ClientConfig,
}

impl NatsWire {
    pub(super) fn new(name: &str, config: &KvBackend) -> Result<Self, OpenError> {
        let backend = || name.to_owned();
        let address = |server: &String| server.parse().map_err(|_| OpenError::Address { backend: backend() });
        let servers = config.servers.iter().map(address).collect::<Result<_, _>>()?;
        for (field, path) in secrets(config) {
            let path = path.clone();
            secret::read(&path).map_err(|source| OpenError::Secret { backend: backend(), field, path, source })?;
        }
        Ok(Self { servers, tls: tls_of(name, config)?, config: config.clone() })
    }

    /// How long the library waits: longer than whoever asks, so that it is we who say what became of it.
    fn patience(&self) -> Duration {
        Duration::from_millis(self.config.request_ms) + BEYOND
    }

    async fn options(&self) -> Result<ConnectOptions, String> {
        let config = &self.config;
        let mut options = ConnectOptions::new();
        for (field, path) in secrets(config) {
            let text = secret::read_aside(path).await?;
            options = match (field, &config.user) {
                ("password_file", Some(user)) => options.user_and_password(user.clone(), text),
                ("token_file", _) => options.token(text),
                ("nkey_file", _) => options.nkey(text),
                // The client wants the end of the last line, which is no part of a secret elsewhere.
                ("credentials_file", _) => options
                    .credentials(&format!("{text}\n"))
                    .map_err(|_| format!("{} holds no credentials", path.display()))?,
                _ => options,
            };
        }
        let is_tls = config.roots.is_some() || config.servers.iter().any(|server| server.starts_with("tls://"));
        Ok(options
            .name("selvage node")
            .connection_timeout(Duration::from_millis(config.connect_ms))
            .request_timeout(Some(self.patience()))
            .ping_interval(PING)
            // Whose pool it is, is said in the file; and it is we who connect anew. What the library still holds to send
            // goes with its connection: a write that comes minutes late would undo what others wrote since.
            .ignore_discovered_servers()
            .max_reconnects(self.servers.len())
            .reconnect_delay_callback(|_| Duration::ZERO)
            // Given also where it is not asked for: a server may demand it.
            .tls_client_config(self.tls.clone())
            .require_tls(is_tls))
    }

    /// The bucket, made if it is not there.
    async fn bucket(&self, client: &Client, context: &Context, name: &str) -> Result<Stream, String> {
        match context.get_stream(name).await {
            Ok(stream) => return Ok(stream),
            Err(error) => match error.kind() {
                GetStreamErrorKind::JetStream(error) if error.error_code() == ErrorCode::STREAM_NOT_FOUND => {}
                _ => return Err(format!("ask for bucket {}: {error}", self.config.bucket())),
            },
        }
        let (major, minor, patch) = SERVER_WITH_TTL;
        let config = StreamConfig {
            name: name.to_owned(),
            description: Some("stores of selvage".to_owned()),
            subjects: vec![format!("$KV.{}.>", self.config.bucket())],
            max_messages_per_subject: 1,
            max_bytes: i64::try_from(self.config.bucket_bytes_max()).unwrap_or(i64::MAX),
            // A full bucket refuses: with `Old` it would forget what others wrote.
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: self.config.replicas(),
            allow_rollup: true,
            deny_delete: true,
            // Reads ask the leader. A direct one may be answered by a copy that is behind.
            allow_direct: false,
            allow_message_ttl: client.is_server_compatible(major, minor, patch),
            ..StreamConfig::default()
        };
        let made = context.create_stream(config).await;
        made.map_err(|error| format!("make bucket {}: {error}", self.config.bucket()))
    }
}

/// The files that say who the node is.
fn secrets(config: &KvBackend) -> impl Iterator<Item = (&'static str, &PathBuf)> {
    let files = [
        ("password_file", &config.password_file),
        ("token_file", &config.token_file),
        ("nkey_file", &config.nkey_file),
        ("credentials_file", &config.credentials_file),
    ];
    files.into_iter().filter_map(|(field, path)| Some((field, path.as_ref()?)))
}

/// What of a bucket that somebody else made would lose entries, or keep none.
fn unfit(config: &StreamConfig, subject: &str) -> Option<&'static str> {
    let is_bounded = config.max_bytes > 0 || config.max_messages > 0;
    match () {
        () if !config.subjects.iter().any(|own| own == subject) => Some("it is not a bucket of NATS' KV"),
        () if config.deny_purge => Some("it lets nothing be deleted (deny_purge)"),
        () if !config.max_age.is_zero() => Some("it forgets what is old (max_age)"),
        () if is_bounded && config.discard == DiscardPolicy::Old => {
            Some("it forgets entries when it is full (discard old)")
        }
        () if config.max_messages_per_subject < 1 => Some("it keeps all old values (max_msgs_per_subject)"),
        () => None,
    }
}

impl Wire for NatsWire {
    type Connection = Connection;

    async fn connect(&self) -> Result<(Connection, oneshot::Receiver<String>), String> {
        let (told, mut tells) = mpsc::channel(1);
        let options = self.options().await?.event_callback(move |event| {
            let told = told.clone();
            async move {
                if matches!(event, Event::Disconnected | Event::Closed) {
                    // Once is enough.
                    let _ = told.try_send(());
                }
            }
        });
        let connected = options.connect(self.servers.clone()).await;
        let client = connected.map_err(|error| match error.kind() {
            ConnectErrorKind::Authentication | ConnectErrorKind::AuthorizationViolation => {
                "the server refuses to let this node in".to_owned()
            }
            _ => format!("connect: {error}"),
        })?;
        let mut context = async_nats::jetstream::new(client.clone());
        context.set_timeout(self.patience());
        let name = format!("KV_{}", self.config.bucket());
        let stream = self.bucket(&client, &context, &name).await?;
        let found = &stream.cached_info().config;
        if let Some(why) = unfit(found, &format!("$KV.{}.>", self.config.bucket())) {
            return Err(format!("bucket {} is not fit: {why}", self.config.bucket()));
        }
        let has_ttl = found.allow_message_ttl;
        let (tell, gone) = oneshot::channel();
        tokio::spawn(async move {
            // It ends with the client, too: then nobody is left to tell.
            if tells.recv().await.is_some() {
                let _ = tell.send("the connection is lost".to_owned());
            }
        });
        let value_bytes_max = self.config.value_bytes_max();
        let (stream, patience) = (Arc::new(stream), self.patience());
        Ok((Connection { client, context, stream, stream_name: name, has_ttl, value_bytes_max, patience }, gone))
    }

    async fn ping(&self, connection: &Connection) -> Result<(), String> {
        if !connection.is_connected() {
            return Err("the connection is lost".into());
        }
        // Not the server alone: its bucket may have no leader.
        connection.stream.get_info().await.map(drop).map_err(|error| format!("ask for the bucket: {error}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bucket_that_would_lose_entries_is_not_taken() {
        let fit = || StreamConfig {
            subjects: vec!["$KV.b.>".into()],
            max_messages_per_subject: 1,
            max_bytes: 1,
            discard: DiscardPolicy::New,
            ..StreamConfig::default()
        };
        assert_eq!(unfit(&fit(), "$KV.b.>"), None);
        let unfits = [
            StreamConfig { subjects: vec!["b.>".into()], ..fit() },
            StreamConfig { deny_purge: true, ..fit() },
            StreamConfig { max_age: Duration::from_secs(1), ..fit() },
            StreamConfig { discard: DiscardPolicy::Old, ..fit() },
            StreamConfig { max_messages_per_subject: -1, ..fit() },
        ];
        for (number, config) in unfits.iter().enumerate() {
            assert!(unfit(config, "$KV.b.>").is_some(), "{number}");
        }
    }
}
