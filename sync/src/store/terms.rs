//! On which terms a value is kept: until when, and with which metadata.
//!
//! Metadata are a few bytes beside a value, of the same write: who has the one has the other. They lie in front of the
//! value, or of what names its chunks, behind a mark. A value that begins with that mark by itself becomes a chunk, as one
//! that begins as a manifest does, so nobody writes metadata by accident.

use bytes::{Buf as _, BufMut as _, Bytes};
use selvage_config::StoreName;

use super::{Kv, KvError, is_shown};
use crate::commit::now_ms;
use crate::entry::Dot;
use crate::home::wire::{Op, Outcome};
use crate::replica::Written;

/// Longest metadata of a key, bytes.
pub const METADATA_BYTES_MAX: usize = 1024;

/// How a value begins that has metadata: their length and they follow.
const MARK: &[u8] = b"\0selvage-metadata\x01";

/// Bytes in front of metadata.
pub(super) const MARK_BYTES: usize = MARK.len() + 2;

/// On which terms a value is kept.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Terms {
    /// When it ends to exist, milliseconds since the Unix epoch; none: never.
    pub expires_ms: Option<u64>,
    /// What is kept beside it, at most [`METADATA_BYTES_MAX`] bytes.
    pub metadata: Bytes,
}

/// A value, its terms, and which write it is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Kept {
    /// The value.
    pub value: Bytes,
    /// Its terms. A counter has none: each node's share may end at another time.
    pub terms: Terms,
    /// The newest write of the key.
    pub version: Dot,
}

/// Whether a value begins as one with metadata does.
pub(super) fn is_marked(value: &[u8]) -> bool {
    value.starts_with(MARK)
}

/// A value, or what names its chunks, with its metadata.
pub(super) fn put(metadata: &Bytes, value: Bytes) -> Bytes {
    if metadata.is_empty() {
        return value;
    }
    let mut out = Vec::with_capacity(MARK_BYTES + metadata.len() + value.len());
    out.put_slice(MARK);
    out.put_u16(u16::try_from(metadata.len()).unwrap_or(u16::MAX));
    out.put_slice(metadata);
    out.put_slice(&value);
    out.into()
}

/// The metadata of what stands in a record, and what is behind them.
pub(super) fn parts(stored: &Bytes) -> (Bytes, Bytes) {
    let none = || (Bytes::new(), stored.clone());
    if !is_marked(stored) {
        return none();
    }
    let mut rest = stored.slice(MARK.len()..);
    let Ok(length) = rest.try_get_u16().map(usize::from) else { return none() };
    if length > rest.len() {
        return none();
    }
    let metadata = rest.split_to(length);
    (metadata, rest)
}

impl Kv {
    /// Sets a key on terms.
    pub async fn set_on(&self, store: &StoreName, key: &str, value: Bytes, terms: Terms) -> Result<Written, KvError> {
        self.written(store, key, Op::Set { value, terms }).await
    }

    /// As [`Kv::set_on`], if the newest write of the key is `seen` at that moment, or if it does not exist and `seen` is
    /// none; nothing is written otherwise. It compares as [`Kv::swap`] does.
    pub async fn set_if(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        terms: Terms,
        seen: Option<Dot>,
    ) -> Result<Option<Written>, KvError> {
        match self.decide(store, key, Op::SetIf { value, terms, seen }).await? {
            Outcome::Written(written) => Ok(Some(written)),
            Outcome::Changed | Outcome::Found(_) => Ok(None),
        }
    }

    /// The value of a key with its terms, as this node has it.
    pub fn get_kept(&self, store: &StoreName, key: &str) -> Result<Option<Kept>, KvError> {
        is_shown(key)?;
        let mut record = self.record(store, key)?;
        loop {
            let now = now_ms();
            let Some((stored, newest)) = record.value(now).zip(record.newest()) else { return Ok(None) };
            let terms = Terms { expires_ms: record.ends_ms(now), metadata: parts(&stored).0 };
            let version = newest.version.dot.clone();
            match self.whole(store, key, &stored) {
                Ok(value) => return Ok(Some(Kept { value, terms, version })),
                // Its chunks may have gone with it while they were read.
                Err(KvError::Incomplete { key: name }) => {
                    let again = self.record(store, key)?;
                    if again == record {
                        return Err(KvError::Incomplete { key: name });
                    }
                    record = again;
                }
                Err(error) => return Err(error),
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metadata_come_back_and_nothing_else_has_any() {
        let value = Bytes::from_static(b"value");
        let metadata = Bytes::from_static(b"\0meta");
        let stored = put(&metadata, value.clone());
        assert_eq!(parts(&stored), (metadata, value.clone()));
        assert_eq!(put(&Bytes::new(), value.clone()), value);
        assert_eq!(parts(&value), (Bytes::new(), value));
        for length in 0..stored.len() - "value".len() {
            let cut = stored.slice(..length);
            assert_eq!(parts(&cut), (Bytes::new(), cut.clone()), "{length}");
        }
    }
}
