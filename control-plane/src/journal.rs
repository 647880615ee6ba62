//! The journal: the one order of all changes, where several control planes have one state.
//!
//! It is a JetStream stream, and a message in it is one whole change. A change is written with the sequence of the last one
//! that its writer knows, and the server takes it only if that is still the last: whoever was slower applies what came
//! before and computes its change anew. So all control planes make the same changes in the same order, and the database
//! of each is a copy. A change also has an id of its own, so that one whose answer was lost is not made twice.

mod baseline;
mod begin;
mod connect;
mod follow;
mod objects;
mod told;

use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use async_nats::Client;
use async_nats::connection::State as Connection;
use async_nats::jetstream::Context;
use async_nats::jetstream::context::PublishErrorKind;
use async_nats::jetstream::message::PublishMessage;
use async_nats::jetstream::object_store::Config as BucketConfig;
use async_nats::jetstream::stream::{Config as StreamConfig, DiscardPolicy, RetentionPolicy, StorageType, Stream};
use bytes::Bytes;
use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_config::control_plane::NatsConfig;
use tokio::runtime::Handle;
use tokio::time::timeout;

use crate::state::{CHANGE_BYTES_MAX, Change};

pub(crate) use begin::{Keys, join};
pub(crate) use follow::{follow, upkeep};
pub(crate) use objects::Found;
use objects::Objects;
pub(crate) use told::{Told, hear};

/// What a message leaves free of the server's limit, bytes: subject and headers.
const HEAD_BYTES: usize = 4 * 1024;
/// How long nothing is tried after an answer that did not come.
const CLOSED: Duration = Duration::from_secs(1);
/// How often it is looked whether the first connection is there.
const CONNECTED: Duration = Duration::from_millis(10);
/// How often a change is sent again whose answer did not come.
const SENDS: u32 = 2;
/// For how long the server knows the ids of changes: longer than any is sent again.
const DUPLICATES: Duration = Duration::from_secs(300);
/// What a message begins with that names an object in which its change lies.
const ELSEWHERE: &[u8] = b"SO1";
/// The header of a change's id.
const MESSAGE_ID: &str = "Nats-Msg-Id";
/// The oldest server that has what is needed here.
const SERVER: (i64, i64, i64) = (2, 10, 0);

/// Why the journal did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JournalError {
    /// Another change came before it.
    #[error("another control plane's change came first")]
    Stale,
    /// Nothing was changed.
    #[error("the journal is out of reach: {0}")]
    Away(String),
    /// It was sent, and nobody knows what became of it.
    #[error("the journal did not answer: whether the change was made is known when it is back")]
    Unsettled,
    #[error("{0}")]
    Setting(String),
    #[error("object {0} is not in the object store")]
    Missing(String),
    #[error("{0} of the journal can't be read")]
    Malformed(String),
    #[error("use the disk")]
    Disk(#[source] std::io::Error),
}

/// The journal, and the way there. Its methods wait on the network, off the threads that serve requests.
pub(crate) struct Journal {
    client: Client,
    context: Context,
    config: NatsConfig,
    runtime: Handle,
    /// Names this run of the program to the others.
    run: String,
    request: Duration,
    /// Whether what is there was found to be this fleet's.
    is_open: AtomicBool,
    closed_until: Mutex<Option<Instant>>,
}

impl std::fmt::Debug for Journal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Journal({})", self.config.prefix)
    }
}

impl Journal {
    /// Begins to connect.
    pub(crate) async fn connect(config: NatsConfig) -> Result<Self, JournalError> {
        let client = connect::connect(&config).await?;
        let request = Duration::from_millis(config.request_ms);
        let mut context = async_nats::jetstream::new(client.clone());
        context.set_timeout(request);
        if config.replicas == 1 {
            tracing::warn!("nats.replicas is 1: a change lies on one server alone, and is lost with its disk");
        }
        let until = Instant::now() + request;
        while client.connection_state() != Connection::Connected && Instant::now() < until {
            tokio::time::sleep(CONNECTED).await;
        }
        let (runtime, run) = (Handle::current(), random_name());
        let closed_until = Mutex::default();
        Ok(Self { client, context, config, runtime, run, request, is_open: AtomicBool::new(false), closed_until })
    }

    pub(crate) fn config(&self) -> &NatsConfig {
        &self.config
    }

    /// Waits, from a thread that may, for what takes the network.
    fn wait<T>(&self, work: impl Future<Output = T>) -> T {
        self.runtime.block_on(work)
    }

    fn stream_name(&self) -> String {
        format!("{}-journal", self.config.prefix)
    }

    fn subject(&self, name: &str) -> String {
        format!("{}.{name}", self.config.prefix)
    }

    /// Whether it makes sense to ask.
    pub(crate) fn check(&self) -> Result<(), JournalError> {
        let away = |why: &str| Err(JournalError::Away(why.to_owned()));
        if self.client.connection_state() != Connection::Connected {
            return away("there is no connection to a NATS server");
        }
        let closed = *self.closed_until.lock().unwrap_or_else(PoisonError::into_inner);
        if closed.is_some_and(|until| Instant::now() < until) {
            return away("the NATS server did not answer a moment ago");
        }
        if !self.is_open.load(Ordering::SeqCst) {
            return away("what the NATS server has was not checked yet");
        }
        Ok(())
    }

    fn opened(&self, is_open: bool) {
        self.is_open.store(is_open, Ordering::SeqCst);
        *self.closed_until.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    /// Nobody waits for what just now did not come.
    fn close_for_a_moment(&self) {
        let until = Instant::now() + CLOSED;
        *self.closed_until.lock().unwrap_or_else(PoisonError::into_inner) = Some(until);
    }

    /// Writes a change that is to follow the one with sequence `after`. Answers its own.
    pub(crate) fn publish(&self, change: &Change, after: u64) -> Result<u64, JournalError> {
        self.check()?;
        let published = self.wait(async {
            let payload = self.packed(change.write()).await?;
            self.send(self.subject("change"), payload, after).await
        });
        if matches!(published, Err(JournalError::Away(_) | JournalError::Unsettled)) {
            self.close_for_a_moment();
        }
        published
    }

    /// What goes into a message: the change, or where it lies if it is too large for one.
    async fn packed(&self, bytes: Vec<u8>) -> Result<Bytes, JournalError> {
        if bytes.len() > CHANGE_BYTES_MAX {
            return Err(JournalError::Malformed("a change that is too large".into()));
        }
        if bytes.len() + HEAD_BYTES <= self.client.max_payload() {
            return Ok(bytes.into());
        }
        let name = format!("change-{}", random_name());
        self.state_bucket().await?.put(&name, bytes.as_slice()).await?;
        Ok([ELSEWHERE, name.as_bytes()].concat().into())
    }

    /// The change of a message.
    async fn unpacked(&self, payload: &[u8]) -> Result<Change, JournalError> {
        let malformed = || JournalError::Malformed("a change".into());
        let Some(name) = payload.strip_prefix(ELSEWHERE) else { return Change::read(payload).ok_or_else(malformed) };
        let name = std::str::from_utf8(name).map_err(|_| malformed())?;
        let bytes = self.state_bucket().await?.get(name, CHANGE_BYTES_MAX).await?;
        Change::read(&bytes).ok_or_else(malformed)
    }

    async fn send(&self, subject: String, payload: Bytes, after: u64) -> Result<u64, JournalError> {
        let id = random_name();
        let away = |why: String| JournalError::Away(why);
        for sent in 0..SENDS {
            let message = PublishMessage::build()
                .payload(payload.clone())
                .message_id(&id)
                .expected_stream(self.stream_name())
                .expected_last_sequence(after);
            let answer = async { self.context.send_publish(subject.clone(), message).await?.await };
            match timeout(self.request, answer).await {
                Ok(Ok(ack)) => return Ok(ack.sequence),
                // Servers have several codes for it, and one text.
                Ok(Err(error))
                    if error.kind() == PublishErrorKind::WrongLastSequence
                        || error.to_string().contains("wrong last sequence") =>
                {
                    // What came first may be this very change, sent before.
                    return if sent == 0 { Err(JournalError::Stale) } else { self.is_ours(after + 1, &id).await };
                }
                Ok(Err(error)) => match error.kind() {
                    PublishErrorKind::TimedOut => {}
                    PublishErrorKind::Other | PublishErrorKind::MaxAckPending | PublishErrorKind::BrokenPipe
                        if sent == 0 =>
                    {
                        return Err(away(error.to_string()));
                    }
                    PublishErrorKind::StreamNotFound => return Err(away("there is no journal there any more".into())),
                    _ => {}
                },
                Err(_) => {}
            }
            if self.client.connection_state() != Connection::Connected {
                break;
            }
        }
        Err(JournalError::Unsettled)
    }

    /// Whether the message with this sequence is the one with this id.
    async fn is_ours(&self, sequence: u64, id: &str) -> Result<u64, JournalError> {
        let stream = self.stream().await.map_err(|_| JournalError::Unsettled)?;
        let message = stream.get_raw_message(sequence).await.map_err(|_| JournalError::Unsettled)?;
        let is_ours = message.headers.get(MESSAGE_ID).is_some_and(|value| value.as_str() == id);
        if is_ours { Ok(sequence) } else { Err(JournalError::Stale) }
    }

    /// The sequence of the last change there is: its leader says so, no copy that may be behind.
    pub(crate) fn last(&self) -> Result<u64, JournalError> {
        self.check()?;
        let last: Result<u64, JournalError> =
            self.wait(async { Ok(self.stream().await?.cached_info().state.last_sequence) });
        if last.is_err() {
            self.close_for_a_moment();
        }
        last
    }

    /// The stream as it is now.
    async fn stream(&self) -> Result<Stream, JournalError> {
        let asked = timeout(self.request, self.context.get_stream(self.stream_name())).await;
        let failed = |why: String| JournalError::Away(format!("ask for the journal: {why}"));
        asked.map_err(|_| failed("no answer".into()))?.map_err(|error| failed(error.to_string()))
    }

    async fn bucket(&self, name: &str) -> Result<Objects, JournalError> {
        let asked =
            timeout(self.request, self.context.get_object_store(format!("{}-{name}", self.config.prefix))).await;
        let failed = |why: String| JournalError::Away(format!("ask for the object store: {why}"));
        let store = asked.map_err(|_| failed("no answer".into()))?.map_err(|error| failed(error.to_string()))?;
        Ok(Objects::new(store))
    }

    async fn state_bucket(&self) -> Result<Objects, JournalError> {
        self.bucket("state").await
    }

    /// Makes the stream and the buckets where they are missing, and refuses a stream that would lose changes.
    async fn make(&self) -> Result<Stream, JournalError> {
        let info = self.client.server_info();
        if !self.client.is_server_compatible(SERVER.0, SERVER.1, SERVER.2) {
            let found = if info.version.is_empty() { "no server" } else { info.version.as_str() };
            return Err(JournalError::Away(format!("NATS 2.10 or newer is needed, there is {found}")));
        }
        let failed = |what: &str, why: String| JournalError::Away(format!("make {what}: {why}"));
        let wanted = StreamConfig {
            name: self.stream_name(),
            description: Some("changes of selvage's control planes".into()),
            subjects: vec![self.subject("begin"), self.subject("change")],
            retention: RetentionPolicy::Limits,
            discard: DiscardPolicy::New,
            storage: StorageType::File,
            num_replicas: self.config.replicas,
            duplicate_window: DUPLICATES,
            deny_delete: true,
            ..StreamConfig::default()
        };
        let made = timeout(self.request, self.context.get_or_create_stream(wanted)).await;
        let made = made.map_err(|_| failed("the journal", "no answer".into()))?;
        let stream = made.map_err(|error| failed("the journal", error.to_string()))?;
        check_stream(&stream.cached_info().config, self.config.replicas)?;
        for name in ["state", "blobs"] {
            let bucket = format!("{}-{name}", self.config.prefix);
            if timeout(self.request, self.context.get_object_store(&bucket)).await.is_ok_and(|found| found.is_ok()) {
                continue;
            }
            let config =
                BucketConfig { bucket, num_replicas: self.config.replicas, max_bytes: -1, ..BucketConfig::default() };
            let made = timeout(self.request, self.context.create_object_store(config)).await;
            let made = made.map_err(|_| failed("the object store", "no answer".into()))?;
            made.map_err(|error| failed("the object store", error.to_string()))?;
        }
        Ok(stream)
    }

    /// Puts a blob's file into the object store, under a name that nothing had before.
    pub(crate) fn put_blob(&self, name: &str, file: &Path) -> Result<(), JournalError> {
        self.check()?;
        self.wait(async {
            let from = tokio::fs::File::open(file).await.map_err(JournalError::Disk)?;
            self.bucket("blobs").await?.put(name, from).await
        })
    }

    /// Writes a blob of the object store into a file. Whoever asked compares its digest.
    pub(crate) fn get_blob(&self, name: &str, to: &Path) -> Result<(), JournalError> {
        self.check()?;
        self.wait(async { self.bucket("blobs").await?.get_file(name, to).await })
    }

    pub(crate) fn delete_blob(&self, name: &str) -> Result<(), JournalError> {
        self.check()?;
        self.wait(async { self.bucket("blobs").await?.delete(name).await })
    }

    /// Every blob of the object store.
    pub(crate) fn blobs(&self) -> Result<Vec<Found>, JournalError> {
        self.check()?;
        self.wait(async { self.bucket("blobs").await?.list("").await })
    }
}

/// A stream that somebody made otherwise must keep all the same what was acknowledged.
fn check_stream(config: &StreamConfig, replicas: usize) -> Result<(), JournalError> {
    let is_kept = config.retention == RetentionPolicy::Limits
        && config.max_age.is_zero()
        && config.max_messages <= 0
        && config.max_bytes <= 0
        && config.max_messages_per_subject <= 0
        && config.mirror.is_none();
    if !is_kept || config.storage != StorageType::File || config.no_ack {
        let message = format!("stream {} would lose changes: it must keep all, on disk", config.name);
        return Err(JournalError::Setting(message));
    }
    if config.num_replicas < replicas {
        tracing::warn!(
            found = config.num_replicas,
            replicas,
            "the journal lies on fewer servers than nats.replicas says"
        );
    }
    Ok(())
}

/// A name that nobody had before, hexadecimal.
pub(crate) fn random_name() -> String {
    let mut bytes = [0_u8; 16];
    SystemRandom::new().fill(&mut bytes).expect("the system has random bytes, or nothing of ours would have begun");
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// From 0 to 1, by chance.
fn chance() -> f64 {
    let mut bytes = [0_u8; 4];
    // Without it pauses are merely equal.
    let _ = SystemRandom::new().fill(&mut bytes);
    f64::from(u32::from_be_bytes(bytes)) / f64::from(u32::MAX)
}
