//! Stores in a bucket of NATS JetStream.
//!
//! The bucket is a stream as NATS' own KV has it, with a subject for each key: `$KV.<bucket>.<app>.<label>.<key>`. The
//! stream's sequence is the version of an entry, and the server compares it in the very step of a write. Reads ask the
//! stream's leader, not a copy that may be behind. What ends says when in a header, which every read looks at; the server
//! takes it away within a second or two.

mod key;
mod list;
mod wire;

use std::error::Error as _;
use std::time::Duration;

use async_nats::HeaderMap;
use async_nats::jetstream::Error as ApiError;
use async_nats::jetstream::ErrorCode;
use async_nats::jetstream::context::{PublishError, PublishErrorKind};
use async_nats::jetstream::message::{PublishMessage, StreamMessage};
use async_nats::jetstream::stream::RawMessageErrorKind;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use bytes::Bytes;
use selvage_config::StoreName;
use selvage_config::node::{KvBackend, KvBackendKind};
use selvage_sync::KvError;
use selvage_sync::store::{Terms, now_ms};
use tokio::sync::Semaphore;

use self::key::Subjects;
use self::wire::{Connection, NatsWire};
use crate::contact::{BackendStatus, Bounds, Contact};
use crate::error::{Failure, OpenError, StoreError, Trouble};
use crate::store::Kept;

/// When an entry ends, milliseconds since the Unix epoch.
const EXPIRES: &str = "Selvage-Expires-Ms";
/// The metadata of an entry, base64.
const METADATA: &str = "Selvage-Metadata";
/// What NATS' own clients mark a deleted key with.
const OPERATION: &str = "KV-Operation";
/// Tries of an increment among others of the same key.
const INCREMENT_TRIES: u32 = 64;
/// The longest pause between two of them.
const INCREMENT_PAUSE_MS: u64 = 20;
/// Lists at once: each makes the server look at every key of its store.
const LISTS_MAX: usize = 4;

/// Stores in a bucket of NATS JetStream.
pub(crate) struct Nats {
    contact: Contact<NatsWire>,
    bucket: String,
    lists: Semaphore,
}

/// What stands at a key.
struct Stands {
    sequence: u64,
    /// None: it was deleted, or has ended.
    entry: Option<Entry>,
}

struct Entry {
    value: Bytes,
    terms: Terms,
}

/// Another write stands there than the one that was expected.
struct Changed;

/// Which write it is: its sequence, and when it ends, so that a condition need not ask whether it has.
struct Version {
    sequence: u64,
    expires_ms: Option<u64>,
}

impl Version {
    fn parse(text: &str) -> Option<Self> {
        let number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?;
        match text.split_once('-') {
            Some((sequence, expires)) => Some(Self { sequence: number(sequence)?, expires_ms: Some(number(expires)?) }),
            None => Some(Self { sequence: number(text)?, expires_ms: None }),
        }
    }
}

impl std::fmt::Display for Version {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self.expires_ms {
            Some(expires_ms) => write!(f, "{}-{expires_ms}", self.sequence),
            None => write!(f, "{}", self.sequence),
        }
    }
}

impl Nats {
    pub(crate) fn open(name: &str, config: &KvBackend) -> Result<Self, OpenError> {
        let wire = NatsWire::new(name, config)?;
        let contact = Contact::start(name, KvBackendKind::Nats, Bounds::of(config), wire);
        Ok(Self { contact, bucket: config.bucket().to_owned(), lists: Semaphore::new(LISTS_MAX) })
    }

    pub(crate) fn check(name: &str, config: &KvBackend) -> Result<(), OpenError> {
        NatsWire::new(name, config).map(drop)
    }

    pub(crate) fn name(&self) -> &str {
        self.contact.name()
    }

    pub(crate) fn status(&self) -> BackendStatus {
        self.contact.status()
    }

    fn subjects(&self, store: &StoreName) -> Subjects {
        Subjects::of(&self.bucket, store)
    }

    pub(crate) async fn get(&self, store: &StoreName, key: &str) -> Result<Option<Kept>, StoreError> {
        let subject = self.subjects(store).of_key(key);
        let stands = self.contact.ask(async |connection| stands(&connection, &subject).await).await?;
        let kept = |Stands { sequence, entry }: Stands| {
            let Entry { value, terms } = entry?;
            let version = Version { sequence, expires_ms: terms.expires_ms }.to_string();
            Some(Kept { value, terms, version })
        };
        Ok(stands.and_then(kept))
    }

    pub(crate) async fn set(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        terms: &Terms,
    ) -> Result<String, StoreError> {
        self.contact.check_value(&value)?;
        let subject = self.subjects(store).of_key(key);
        let written =
            self.contact.ask(async |connection| match put(&connection, &subject, value, terms, None).await? {
                Ok(version) => Ok(version),
                Err(Changed) => Err(Trouble::Contended.into()),
            });
        Ok(written.await?.to_string())
    }

    pub(crate) async fn set_if(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        terms: &Terms,
        seen: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        self.contact.check_value(&value)?;
        let seen = seen.map(|seen| Version::parse(seen).ok_or(StoreError::Version)).transpose()?;
        if seen.as_ref().and_then(|seen| seen.expires_ms).is_some_and(|expires| expires <= now_ms()) {
            return Ok(None);
        }
        let subject = self.subjects(store).of_key(key);
        let expected = seen.as_ref().map_or(0, |seen| seen.sequence);
        let written = self.contact.ask(async |connection| {
            let written = put(&connection, &subject, value.clone(), terms, Some(expected)).await?;
            if written.is_ok() || seen.is_some() {
                return Ok(written.ok());
            }
            // It may be absent and still have a message: one that has ended, or says that it was deleted.
            match stands(&connection, &subject).await? {
                Some(Stands { sequence, entry: None }) => {
                    Ok(put(&connection, &subject, value, terms, Some(sequence)).await?.ok())
                }
                _ => Ok(None),
            }
        });
        Ok(written.await?.map(|version| version.to_string()))
    }

    pub(crate) async fn delete(&self, store: &StoreName, key: &str) -> Result<(), StoreError> {
        let subject = self.subjects(store).of_key(key);
        self.contact
            .ask(async |connection| {
                // Nothing stays of it: a mark that it was deleted would stay for ever.
                let purged = connection.stream.purge().filter(subject).await;
                purged.map(drop).map_err(|error| lost_or_refused(&connection, &error))
            })
            .await
    }

    pub(crate) async fn increment(
        &self,
        store: &StoreName,
        key: &str,
        delta: i64,
        expires_ms: Option<u64>,
    ) -> Result<i64, StoreError> {
        let subject = self.subjects(store).of_key(key);
        let not_counter = || KvError::NotCounter { key: key.to_owned() };
        self.contact
            .ask(async |connection| {
                for tries in 0..INCREMENT_TRIES {
                    let stands = stands(&connection, &subject).await?;
                    let expected = stands.as_ref().map_or(0, |stands| stands.sequence);
                    let (counted, terms) = match stands.and_then(|stands| stands.entry) {
                        None => (0, Terms { expires_ms, metadata: Bytes::new() }),
                        Some(Entry { value, terms }) => {
                            let number = <[u8; 8]>::try_from(&*value).map_err(|_| not_counter())?;
                            if !terms.metadata.is_empty() {
                                return Err(not_counter().into());
                            }
                            (i64::from_le_bytes(number), terms)
                        }
                    };
                    let sum = counted.checked_add(delta).ok_or_else(not_counter)?;
                    let value = Bytes::copy_from_slice(&sum.to_le_bytes());
                    if put(&connection, &subject, value, &terms, Some(expected)).await?.is_ok() {
                        return Ok(sum);
                    }
                    let most = u64::from(tries + 1).min(INCREMENT_PAUSE_MS);
                    tokio::time::sleep(Duration::from_millis(rand::random_range(0..=most))).await;
                }
                Err(Trouble::Contended.into())
            })
            .await
    }
}

/// What stands at a subject, as the stream's leader knows it.
async fn stands(connection: &Connection, subject: &str) -> Result<Option<Stands>, Failure> {
    match connection.stream.get_last_raw_message_by_subject(subject).await {
        Ok(message) => read(message).map(Some),
        Err(error) if matches!(error.kind(), RawMessageErrorKind::NoMessageFound) => Ok(None),
        Err(error) => Err(match error.kind() {
            RawMessageErrorKind::JetStream(error) => refused(&error),
            _ => lost_or_refused(connection, &error),
        }),
    }
}

fn read(message: StreamMessage) -> Result<Stands, Failure> {
    let StreamMessage { sequence, headers, payload, .. } = message;
    let Some(expires_ms) = life(&headers)? else { return Ok(Stands { sequence, entry: None }) };
    let metadata = match headers.get(METADATA) {
        Some(text) => STANDARD.decode(text.as_str()).map_err(|_| Trouble::Foreign)?.into(),
        None => Bytes::new(),
    };
    Ok(Stands { sequence, entry: Some(Entry { value: payload, terms: Terms { expires_ms, metadata } }) })
}

/// When what has these headers ends; none: it is not there any more.
fn life(headers: &HeaderMap) -> Result<Option<Option<u64>>, Failure> {
    if headers.get(OPERATION).is_some_and(|operation| operation.as_str() != "PUT") {
        return Ok(None);
    }
    let Some(expires) = headers.get(EXPIRES) else { return Ok(Some(None)) };
    let expires_ms: u64 = expires.as_str().parse().map_err(|_| Trouble::Foreign)?;
    Ok((expires_ms > now_ms()).then_some(Some(expires_ms)))
}

/// Writes; with `expected` only if that is the sequence of what stands there, 0 for nothing.
async fn put(
    connection: &Connection,
    subject: &str,
    value: Bytes,
    terms: &Terms,
    expected: Option<u64>,
) -> Result<Result<Version, Changed>, Failure> {
    let bytes = value.len();
    let mut message = PublishMessage::build().payload(value).expected_stream(&connection.stream_name);
    if let Some(expires_ms) = terms.expires_ms {
        if !connection.has_ttl {
            let what = "its bucket has no keys that end (allow_msg_ttl, of NATS 2.11)";
            return Err(Trouble::Unable { what }.into());
        }
        // Whole seconds, never shorter than the life itself.
        let seconds = expires_ms.saturating_sub(now_ms()).div_ceil(1_000).max(1);
        message = message.header(EXPIRES, expires_ms.to_string()).ttl(Duration::from_secs(seconds));
    }
    if !terms.metadata.is_empty() {
        message = message.header(METADATA, STANDARD.encode(&terms.metadata));
    }
    if let Some(expected) = expected {
        message = message.expected_last_subject_sequence(expected);
    }
    let published = async { connection.context.send_publish(subject.to_owned(), message).await?.await };
    match published.await {
        Ok(ack) => Ok(Ok(Version { sequence: ack.sequence, expires_ms: terms.expires_ms })),
        Err(error) => unpublished(connection, &error, bytes).map(Err),
    }
}

/// Why a write was not made, or that another one came first.
fn unpublished(connection: &Connection, error: &PublishError, bytes: usize) -> Result<Changed, Failure> {
    match error.kind() {
        PublishErrorKind::WrongLastSequence => Ok(Changed),
        // Servers have several codes for it, and one text.
        PublishErrorKind::Other if error.to_string().contains("wrong last sequence") => Ok(Changed),
        PublishErrorKind::MaxPayloadExceeded => {
            Err(KvError::TooLarge { what: "value", bytes, max: connection.value_bytes_max() }.into())
        }
        PublishErrorKind::StreamNotFound => Err(Trouble::Refused { code: "no bucket".into() }.into()),
        PublishErrorKind::Other => match error.source().and_then(|source| source.downcast_ref::<ApiError>()) {
            Some(error) if error.error_code() == ErrorCode::STREAM_MESSAGE_EXCEEDS_MAXIMUM => {
                Err(KvError::TooLarge { what: "value", bytes, max: connection.value_bytes_max() }.into())
            }
            Some(error) => Err(refused(error)),
            None => Err(Trouble::Lost.into()),
        },
        _ => Err(Trouble::Lost.into()),
    }
}

/// What the server refuses, by its number.
fn refused(error: &ApiError) -> Failure {
    let is_full = [
        ErrorCode::STREAM_STORE_FAILED,
        ErrorCode::STORAGE_RESOURCES_EXCEEDED,
        ErrorCode::MEMORY_RESOURCES_EXCEEDED,
        ErrorCode::ACCOUNT_RESOURCES_EXCEEDED,
        ErrorCode::INSUFFICIENT_RESOURCES,
    ];
    if is_full.contains(&error.error_code()) {
        return Trouble::Full.into();
    }
    Trouble::Refused { code: error.error_code().0.to_string() }.into()
}

/// What a request that has no answer means.
fn lost_or_refused(connection: &Connection, error: &(dyn std::error::Error + 'static)) -> Failure {
    let mut cause = Some(error);
    while let Some(error) = cause {
        if let Some(error) = error.downcast_ref::<ApiError>() {
            return refused(error);
        }
        cause = error.source();
    }
    if !connection.is_connected() {
        return Trouble::Lost.into();
    }
    Trouble::Silent { ms: u64::try_from(connection.patience().as_millis()).unwrap_or(u64::MAX) }.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_version_is_what_a_read_gave_and_nothing_else() {
        for text in ["1", "18446744073709551615", "7-1700000000000"] {
            assert_eq!(Version::parse(text).unwrap().to_string(), text);
        }
        for bad in ["", "-", "1-", "-1", "+1", "1-2-3", "no version", "18446744073709551616", "1 "] {
            assert!(Version::parse(bad).is_none(), "{bad}");
        }
    }

    #[test]
    fn what_has_ended_or_was_deleted_is_not_there() {
        let of = |name: &str, value: &str| {
            let mut headers = HeaderMap::new();
            headers.insert(name, value);
            life(&headers)
        };
        assert_eq!(life(&HeaderMap::new()).unwrap(), Some(None));
        assert_eq!(of(EXPIRES, "18446744073709551615").unwrap(), Some(Some(u64::MAX)));
        assert_eq!(of(EXPIRES, "1").unwrap(), None);
        assert!(of(EXPIRES, "soon").is_err());
        assert_eq!(of(OPERATION, "DEL").unwrap(), None);
        assert_eq!(of(OPERATION, "PURGE").unwrap(), None);
    }
}
