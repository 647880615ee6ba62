//! Stores in a Redis server.
//!
//! An entry is a hash: value `v` or count `n`, metadata `m`, version `r`, when it was written `t`. Redis ends it by itself.
//! Beside the entries each store has an index, a sorted set with a score of 0 for all, which Redis keeps in the order of
//! bytes, and a set of the keys that end, by when. Both are kept by the scripts that write, so a list is a range of the
//! index, and what ended is taken out of it by the writes and lists that come later. All keys of a store have one hash tag.

mod scripts;
mod wire;

use std::time::Duration;

use ::redis::{ErrorKind, FromRedisValue, RedisError, ScriptInvocation};
use bytes::Bytes;
use selvage_config::StoreName;
use selvage_config::node::{KvBackend, KvBackendKind};
use selvage_sync::store::{Terms, now_ms};
use selvage_sync::{KvError, Listed};

use self::scripts::Scripts;
use self::wire::{Connection, RedisWire};
use crate::contact::{BackendStatus, Bounds, Contact};
use crate::error::{Failure, OpenError, StoreError, Trouble};
use crate::store::Kept;

/// How long a list may take: it asks again and again where much has ended that nobody took out of the index.
const LIST_MAX: Duration = Duration::from_secs(10);
/// Tries to make a counter of a value that others write.
const COUNTER_TRIES: u32 = 8;

/// Stores in a Redis server.
pub(crate) struct Redis {
    contact: Contact<RedisWire>,
    scripts: Scripts,
    prefix: String,
}

/// What the script of a read answers: what is the matter (0: nothing), count, value, metadata, version, when it was
/// written, and the milliseconds that are left.
type Read = Option<(u8, Option<i64>, Option<Vec<u8>>, Option<Vec<u8>>, Option<String>, Option<u64>, i64)>;

impl Redis {
    pub(crate) fn open(name: &str, config: &KvBackend) -> Result<Self, OpenError> {
        let wire = RedisWire::new(name, config)?;
        let contact = Contact::start(name, KvBackendKind::Redis, Bounds::of(config), wire);
        Ok(Self { contact, scripts: Scripts::new(), prefix: config.prefix().to_owned() })
    }

    pub(crate) fn check(name: &str, config: &KvBackend) -> Result<(), OpenError> {
        RedisWire::new(name, config).map(drop)
    }

    pub(crate) fn name(&self) -> &str {
        self.contact.name()
    }

    pub(crate) fn status(&self) -> BackendStatus {
        self.contact.status()
    }

    fn keys(&self, store: &StoreName) -> Keys {
        Keys::of(&self.prefix, store)
    }

    pub(crate) async fn get(&self, store: &StoreName, key: &str) -> Result<Option<Kept>, StoreError> {
        let mut script = self.scripts.get.key(self.keys(store).entry(key));
        script.arg(self.contact.bounds().value_bytes_max);
        self.contact
            .ask(async |connection| {
                let read: Read = run(&script, connection).await?;
                self.kept(read)
            })
            .await
    }

    fn kept(&self, read: Read) -> Result<Option<Kept>, Failure> {
        let Some((matter, count, value, metadata, version, _, left_ms)) = read else { return Ok(None) };
        match matter {
            0 => {}
            1 => {
                let (bytes, max) = (value_length(count), self.contact.bounds().value_bytes_max);
                return Err(KvError::TooLarge { what: "value", bytes, max }.into());
            }
            _ => return Err(Trouble::Foreign.into()),
        }
        let value = match (count, value) {
            (Some(count), _) => Bytes::copy_from_slice(&count.to_le_bytes()),
            (None, Some(value)) => value.into(),
            (None, None) => return Err(Trouble::Foreign.into()),
        };
        let expires_ms = u64::try_from(left_ms).ok().map(|left| now_ms().saturating_add(left));
        let terms = Terms { expires_ms, metadata: metadata.unwrap_or_default().into() };
        Ok(Some(Kept { value, terms, version: version.ok_or(Trouble::Foreign)? }))
    }

    pub(crate) async fn exists(&self, store: &StoreName, key: &str) -> Result<bool, StoreError> {
        let mut command = ::redis::cmd("EXISTS");
        command.arg(self.keys(store).entry(key));
        self.contact
            .ask(async |mut connection| {
                command.query_async(&mut connection.line).await.map_err(|error| failure(&error))
            })
            .await
    }

    pub(crate) async fn set(
        &self,
        store: &StoreName,
        key: &str,
        value: &[u8],
        terms: &Terms,
    ) -> Result<String, StoreError> {
        let written = self.write(store, key, value, terms, "").await?;
        // Without a condition nothing can be in its way.
        written.ok_or(StoreError::Version)
    }

    pub(crate) async fn set_if(
        &self,
        store: &StoreName,
        key: &str,
        value: &[u8],
        terms: &Terms,
        seen: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        let condition = match seen {
            None => "absent".to_owned(),
            Some(version) if is_version(version) => format!("={version}"),
            Some(_) => return Err(StoreError::Version),
        };
        self.write(store, key, value, terms, &condition).await
    }

    async fn write(
        &self,
        store: &StoreName,
        key: &str,
        value: &[u8],
        terms: &Terms,
        condition: &str,
    ) -> Result<Option<String>, StoreError> {
        self.contact.check_value(value)?;
        let (keys, version) = (self.keys(store), new_version());
        let mut script = keys.script(&self.scripts.set, key);
        script
            .arg(key)
            .arg(version.as_str())
            .arg(left(terms.expires_ms))
            .arg(value)
            .arg(&*terms.metadata)
            .arg(condition);
        let is_written: bool = self.contact.ask(async |connection| run(&script, connection).await).await?;
        Ok(is_written.then_some(version))
    }

    pub(crate) async fn delete(&self, store: &StoreName, key: &str) -> Result<(), StoreError> {
        let keys = self.keys(store);
        let mut script = keys.script(&self.scripts.delete, key);
        script.arg(key);
        self.contact.ask(async |connection| run(&script, connection).await).await
    }

    pub(crate) async fn increment(
        &self,
        store: &StoreName,
        key: &str,
        delta: i64,
        expires_ms: Option<u64>,
    ) -> Result<i64, StoreError> {
        let keys = self.keys(store);
        self.contact
            .ask(async |connection| {
                // The value that a script found in the counter's place, and which write that was.
                let mut found: Option<(i64, String)> = None;
                for _ in 0..COUNTER_TRIES {
                    let mut script = keys.script(&self.scripts.increment, key);
                    script.arg(key).arg(new_version()).arg(left(expires_ms)).arg(delta);
                    let (base, version) = found.take().unwrap_or_default();
                    script.arg(base).arg(version);
                    let answer: (u8, Vec<u8>, String) = run(&script, connection.clone()).await?;
                    match answer {
                        (0, sum, _) => return number(&sum).ok_or_else(|| Trouble::Foreign.into()),
                        (1, value, version) => {
                            let value = <[u8; 8]>::try_from(value.as_slice()).map_err(|_| not_counter(key))?;
                            found = Some((i64::from_le_bytes(value), version));
                        }
                        _ => return Err(not_counter(key).into()),
                    }
                }
                Err(Trouble::Contended.into())
            })
            .await
    }

    pub(crate) async fn list(
        &self,
        store: &StoreName,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<Listed>, StoreError> {
        let keys = self.keys(store);
        // No key has the byte 0xff: they are UTF-8.
        let end = if prefix.is_empty() { b"+".to_vec() } else { [b"(", prefix.as_bytes(), b"\xff"].concat() };
        let mut from = match after {
            Some(after) if after >= prefix => format!("({after}"),
            _ if prefix.is_empty() => "-".to_owned(),
            _ => format!("[{prefix}"),
        };
        self.contact
            .ask_for(LIST_MAX, async |connection| {
                let mut found: Vec<Listed> = Vec::new();
                loop {
                    let wanted = limit - found.len();
                    let mut script = keys.script(&self.scripts.list, "");
                    script.arg(from.as_str()).arg(end.as_slice()).arg(wanted);
                    let page: (usize, Option<String>, Vec<(String, usize, u64)>) =
                        run(&script, connection.clone()).await?;
                    let (seen, last, entries) = page;
                    let listed = |(name, bytes, stamp_ms)| Listed { name, bytes, stamp_ms, node: None };
                    found.extend(entries.into_iter().map(listed));
                    match last {
                        Some(last) if seen == wanted && found.len() < limit => from = format!("({last}"),
                        _ => return Ok(found),
                    }
                }
            })
            .await
    }
}

/// A length is told in the place of the count.
fn value_length(count: Option<i64>) -> usize {
    count.and_then(|length| usize::try_from(length).ok()).unwrap_or_default()
}

/// The keys of one store in the server.
struct Keys {
    base: String,
}

impl Keys {
    fn of(prefix: &str, store: &StoreName) -> Self {
        Self { base: format!("{prefix}:{{{store}}}") }
    }

    fn entry(&self, key: &str) -> String {
        format!("{}:k:{key}", self.base)
    }

    /// A script about `key`: its entry, the index, the keys that end, and how the names of entries begin.
    fn script<'s>(&self, script: &'s ::redis::Script, key: &str) -> ScriptInvocation<'s> {
        let mut script = script.key(self.entry(key));
        script.key(format!("{}:i", self.base)).key(format!("{}:x", self.base)).key(self.entry(""));
        script
    }
}

/// Milliseconds from now, by which the server counts with its own clock; empty: for ever.
fn left(expires_ms: Option<u64>) -> String {
    expires_ms.map(|expires| expires.saturating_sub(now_ms()).max(1).to_string()).unwrap_or_default()
}

/// 128 bits by chance: no two writes have the same, also where a key was deleted between them.
fn new_version() -> String {
    format!("{:032x}", rand::random::<u128>())
}

fn is_version(text: &str) -> bool {
    text.len() == 32 && text.bytes().all(|byte| byte.is_ascii_hexdigit())
}

fn number(text: &[u8]) -> Option<i64> {
    std::str::from_utf8(text).ok()?.parse().ok()
}

fn not_counter(key: &str) -> KvError {
    KvError::NotCounter { key: key.to_owned() }
}

async fn run<T: FromRedisValue>(script: &ScriptInvocation<'_>, mut connection: Connection) -> Result<T, Failure> {
    script.invoke_async(&mut connection.line).await.map_err(|error| failure(&error))
}

/// What an error means. The server's words stay here but for their first, which names the kind.
fn failure(error: &RedisError) -> Failure {
    let says = |word: &str| error.code() == Some(word) || error.detail().is_some_and(|detail| detail.contains(word));
    let trouble = match error.kind() {
        ErrorKind::IoError => Trouble::Lost,
        _ if says("OOM") => Trouble::Full,
        _ if says("WRONGTYPE") => Trouble::Foreign,
        ErrorKind::ParseError | ErrorKind::TypeError => Trouble::Foreign,
        _ => Trouble::Refused { code: error.code().unwrap_or("ERR").to_owned() },
    };
    trouble.into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_keys_of_a_store_are_in_one_slot() {
        let keys = Keys::of("selvage", &"shop/default".parse().unwrap());
        assert_eq!(keys.entry("a}b"), "selvage:{shop/default}:k:a}b");
        assert_eq!(keys.entry(""), "selvage:{shop/default}:k:");
    }

    #[test]
    fn versions_differ_and_others_are_none() {
        let (one, other) = (new_version(), new_version());
        assert!(is_version(&one) && is_version(&other) && one != other);
        for bad in ["", "no version", &one[1..], &format!("{one}0"), &one.replace(|_| true, "g")] {
            assert!(!is_version(bad), "{bad}");
        }
    }
}
