//! Entries: one write each.
//!
//! An [`Entry`] names its key, when it was written ([`Stamp`]), by whom ([`Dot`]) and what ([`Content`]). Its
//! bytes carry a checksum that is verified on every read, from the engine and from a peer alike.
//!
//! Tombstones are kept for good: collecting them safely needs a frontier over the whole roster, which is not built.

use bytes::{BufMut, Bytes};
use ring::digest::{SHA256, digest};
use selvage_config::{NodeName, StoreName};

use crate::stamp::Stamp;

/// Longest key, bytes of UTF-8.
pub const KEY_BYTES_MAX: usize = 1024;

/// Longest value, bytes.
pub const VALUE_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of an entry besides its value, at most: names, key, numbers and checksum.
pub const ENTRY_OVERHEAD_BYTES_MAX: usize = KEY_BYTES_MAX + 1024;

const CHECKSUM_BYTES: usize = 8;

const CONTENT_TOMBSTONE: u8 = 0;
const CONTENT_VALUE: u8 = 1;
const CONTENT_PART: u8 = 2;
const CONTENT_PART_BASED: u8 = 3;

/// A key in a store.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Key {
    /// The store.
    pub store: StoreName,
    /// The key within it, at most [`KEY_BYTES_MAX`] bytes.
    pub name: String,
}

/// Who writes: a node and one life of its data directory. A lost directory means a new incarnation, so a number
/// is never given to two writes.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Origin {
    /// The node.
    pub node: NodeName,
    /// Which life of its data directory.
    pub incarnation: u64,
}

/// One write in the fleet: the `seq`-th of its origin, from 1.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dot {
    /// Who wrote.
    pub origin: Origin,
    /// Its how manieth write.
    pub seq: u64,
}

/// What orders writes to a key: stamp, then node, incarnation and sequence number. No two writes are equal.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Version {
    /// When.
    pub stamp: Stamp,
    /// By whom.
    pub dot: Dot,
}

/// What was written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Content {
    /// The key was deleted.
    Tombstone,
    /// The key has this value.
    Value(Bytes),
    /// The origin's share of a counter.
    Part {
        /// The value or tombstone that this counts on top of; none if the key had neither.
        base: Option<Version>,
        /// The sum of all that the origin added on top of `base`.
        total: i64,
    },
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub key: Key,
    /// When and by whom.
    pub version: Version,
    /// What.
    pub content: Content,
}

/// Bytes that are not an entry.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum EntryError {
    /// They end too early.
    #[error("entry is cut short")]
    Short,
    /// Their checksum is another.
    #[error("entry's checksum is wrong")]
    Checksum,
    /// A field holds what it can't.
    #[error("entry's {0} is invalid")]
    Field(&'static str),
}

impl Entry {
    /// Appends the entry's bytes: fields, then their checksum.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        put_text(out, self.key.store.as_str());
        put_text(out, &self.key.name);
        put_version(out, &self.version);
        match &self.content {
            Content::Tombstone => out.put_u8(CONTENT_TOMBSTONE),
            Content::Value(value) => {
                out.put_u8(CONTENT_VALUE);
                out.put_slice(value);
            }
            Content::Part { base: None, total } => {
                out.put_u8(CONTENT_PART);
                out.put_i64(*total);
            }
            Content::Part { base: Some(base), total } => {
                out.put_u8(CONTENT_PART_BASED);
                out.put_i64(*total);
                put_version(out, base);
            }
        }
        let sum = checksum(&out[start..]);
        out.put_slice(&sum);
    }

    /// The entry that `bytes` are, exactly.
    pub fn decode(bytes: &Bytes) -> Result<Self, EntryError> {
        let length = bytes.len().checked_sub(CHECKSUM_BYTES).ok_or(EntryError::Short)?;
        if checksum(&bytes[..length]) != bytes[length..] {
            return Err(EntryError::Checksum);
        }
        let mut fields = Fields::of(bytes.slice(..length));
        let store = StoreName::try_from(fields.text(KEY_BYTES_MAX)?).map_err(|_| EntryError::Field("store"))?;
        let name = fields.text(KEY_BYTES_MAX)?;
        let version = fields.version()?;
        let content = match fields.u8()? {
            CONTENT_TOMBSTONE => Content::Tombstone,
            CONTENT_VALUE => Content::Value(fields.rest(VALUE_BYTES_MAX)?),
            CONTENT_PART => Content::Part { base: None, total: fields.i64()? },
            CONTENT_PART_BASED => {
                let total = fields.i64()?;
                Content::Part { base: Some(fields.version()?), total }
            }
            _ => return Err(EntryError::Field("content")),
        };
        fields.end()?;
        Ok(Self { key: Key { store, name }, version, content })
    }
}

fn checksum(bytes: &[u8]) -> [u8; CHECKSUM_BYTES] {
    let mut sum = [0; CHECKSUM_BYTES];
    sum.copy_from_slice(&digest(&SHA256, bytes).as_ref()[..CHECKSUM_BYTES]);
    sum
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    // Names and keys are far below 64 KiB; a longer one would fail its reader's bound, not wrap.
    out.put_u16(u16::try_from(text.len()).unwrap_or(u16::MAX));
    out.put_slice(text.as_bytes());
}

pub(crate) fn put_origin(out: &mut Vec<u8>, origin: &Origin) {
    put_text(out, origin.node.as_str());
    out.put_u64(origin.incarnation);
}

fn put_version(out: &mut Vec<u8>, version: &Version) {
    out.put_u64(version.stamp.0);
    put_origin(out, &version.dot.origin);
    out.put_u64(version.dot.seq);
}

/// Reads fields from the front of bytes. Every read checks that they are there.
pub(crate) struct Fields(Bytes);

impl Fields {
    pub(crate) fn of(bytes: Bytes) -> Self {
        Self(bytes)
    }

    pub(crate) fn take(&mut self, length: usize) -> Result<Bytes, EntryError> {
        if self.0.len() < length { Err(EntryError::Short) } else { Ok(self.0.split_to(length)) }
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], EntryError> {
        let mut array = [0; N];
        array.copy_from_slice(&self.take(N)?);
        Ok(array)
    }

    pub(crate) fn u8(&mut self) -> Result<u8, EntryError> {
        Ok(self.array::<1>()?[0])
    }

    pub(crate) fn u16(&mut self) -> Result<u16, EntryError> {
        Ok(u16::from_be_bytes(self.array()?))
    }

    pub(crate) fn u32(&mut self) -> Result<u32, EntryError> {
        Ok(u32::from_be_bytes(self.array()?))
    }

    pub(crate) fn u64(&mut self) -> Result<u64, EntryError> {
        Ok(u64::from_be_bytes(self.array()?))
    }

    fn i64(&mut self) -> Result<i64, EntryError> {
        Ok(i64::from_be_bytes(self.array()?))
    }

    fn text(&mut self, bytes_max: usize) -> Result<String, EntryError> {
        let length = usize::from(self.u16()?);
        if length > bytes_max {
            return Err(EntryError::Field("text"));
        }
        let bytes = self.take(length)?;
        std::str::from_utf8(&bytes).map(str::to_owned).map_err(|_| EntryError::Field("text"))
    }

    pub(crate) fn node(&mut self) -> Result<NodeName, EntryError> {
        NodeName::try_from(self.text(KEY_BYTES_MAX)?).map_err(|_| EntryError::Field("node"))
    }

    pub(crate) fn origin(&mut self) -> Result<Origin, EntryError> {
        Ok(Origin { node: self.node()?, incarnation: self.u64()? })
    }

    fn version(&mut self) -> Result<Version, EntryError> {
        let stamp = Stamp(self.u64()?);
        let origin = self.origin()?;
        let seq = self.u64()?;
        if seq == 0 {
            return Err(EntryError::Field("seq"));
        }
        Ok(Version { stamp, dot: Dot { origin, seq } })
    }

    fn rest(&mut self, bytes_max: usize) -> Result<Bytes, EntryError> {
        if self.0.len() > bytes_max {
            return Err(EntryError::Field("value"));
        }
        self.take(self.0.len())
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    pub(crate) fn end(&self) -> Result<(), EntryError> {
        if self.is_empty() { Ok(()) } else { Err(EntryError::Field("end")) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use proptest::prelude::*;

    pub(crate) fn version() -> impl Strategy<Value = Version> {
        (1_u64..50, prop::sample::select(vec!["a", "b", "c"]), 1_u64..3, 1_u64..50).prop_map(
            |(stamp, node, incarnation, seq)| Version {
                stamp: Stamp(stamp),
                dot: Dot { origin: Origin { node: node.parse().unwrap(), incarnation }, seq },
            },
        )
    }

    pub(crate) fn content() -> impl Strategy<Value = Content> {
        prop_oneof![
            Just(Content::Tombstone),
            prop::collection::vec(any::<u8>(), 0..64).prop_map(|value| Content::Value(value.into())),
            (prop::option::of(version()), any::<i64>()).prop_map(|(base, total)| Content::Part { base, total }),
        ]
    }

    pub(crate) fn entry() -> impl Strategy<Value = Entry> {
        (version(), content(), "[ -~]{0,32}").prop_map(|(version, content, name)| Entry {
            key: Key { store: "app/default".parse().unwrap(), name },
            version,
            content,
        })
    }

    proptest! {
        #[test]
        fn what_was_encoded_is_decoded(entry in entry()) {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            prop_assert!(bytes.len() <= ENTRY_OVERHEAD_BYTES_MAX + 64);
            prop_assert_eq!(Entry::decode(&bytes.into()), Ok(entry));
        }

        #[test]
        fn a_flipped_bit_is_an_error(entry in entry(), at in any::<prop::sample::Index>(), bit in 0_u8..8) {
            let mut bytes = Vec::new();
            entry.encode(&mut bytes);
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
            prop_assert!(Entry::decode(&bytes.into()).is_err());
        }

        #[test]
        fn garbage_with_a_right_checksum_never_panics(mut bytes in prop::collection::vec(any::<u8>(), 0..256)) {
            let sum = checksum(&bytes);
            bytes.extend_from_slice(&sum);
            let _either = Entry::decode(&bytes.into());
        }
    }
}
