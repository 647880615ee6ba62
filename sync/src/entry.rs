//! Entries: one write each.
//!
//! An [`Entry`] names its key, when it was written ([`Stamp`]), by whom ([`Dot`]) and what ([`Content`]). Its
//! bytes carry a checksum that is verified on every read, from the engine and from a peer alike.
//!
//! An entry is mortal if it is a tombstone or expires: once every node of the roster has it and its time is over,
//! it is dropped (sync.md, Collection).

use std::fmt;
use std::str::FromStr;

use bytes::{BufMut, Bytes};
use ring::digest::{SHA256, digest};
use selvage_config::{NodeName, StoreName};

use crate::stamp::Stamp;
use crate::vector::VersionVector;

/// Longest key, bytes of UTF-8.
pub const KEY_BYTES_MAX: usize = 1024;

/// Longest value, bytes.
pub const VALUE_BYTES_MAX: usize = 1024 * 1024;

/// Bytes of an entry besides its value, at most: names, key, numbers, context and checksum.
pub const ENTRY_OVERHEAD_BYTES_MAX: usize = KEY_BYTES_MAX + 1024 + CONTEXT_MAX * 96;

/// Origins in the context of a sibling, at most: a key with more writers takes no more siblings until it is set.
pub const CONTEXT_MAX: usize = 64;

const CHECKSUM_BYTES: usize = 8;

const CONTENT_TOMBSTONE: u8 = 0;
const CONTENT_VALUE: u8 = 1;
const CONTENT_PART: u8 = 2;
const CONTENT_SIBLING: u8 = 3;
/// Set in the content's byte if the entry expires.
const CONTENT_EXPIRES: u8 = 0x80;

const BASE_NONE: u8 = 0;
const BASE_VALUE: u8 = 1;
const BASE_TOMBSTONE: u8 = 2;

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

/// The register that a part or a sibling is written on top of.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Base {
    /// The key had neither value nor tombstone. There may have been some that the writer had collected: a register as
    /// old is none that this was written without having seen.
    None {
        /// Up to when: the writer's floor if it had nothing of this key, else that of what it had.
        floor: Stamp,
    },
    /// A value.
    Value(Version),
    /// A tombstone. With these two it can be made again wherever it was collected or has not arrived, byte for byte.
    Tombstone {
        /// Its version.
        version: Version,
        /// Its [`Entry::prev`].
        prev: u32,
    },
}

impl Base {
    /// The register's version, if there was one.
    pub fn version(&self) -> Option<&Version> {
        match self {
            Self::None { .. } => None,
            Self::Value(version) | Self::Tombstone { version, .. } => Some(version),
        }
    }
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
        /// What this counts on top of.
        base: Base,
        /// The sum of all that the origin added on top of `base`.
        total: i64,
    },
    /// One of several values that stand side by side until somebody who saw them writes again.
    Sibling {
        /// What this was written on top of.
        base: Base,
        /// What its writer saw of this key: siblings with these dots are superseded.
        context: VersionVector,
        /// The value.
        value: Bytes,
    },
}

/// One write.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// Where.
    pub key: Key,
    /// When and by whom.
    pub version: Version,
    /// [`Dot::mark`] of the value or tombstone that its writer overwrote; 0 if there was none, or for a part or
    /// sibling, which overwrite nothing.
    pub prev: u32,
    /// When it ends to exist, milliseconds since the Unix epoch.
    pub expires_ms: Option<u64>,
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

/// Text that is no dot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("not node.incarnation.seq, numbers in base 16")]
pub struct DotError;

impl fmt::Display for Dot {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{:x}.{:x}", self.origin.node, self.origin.incarnation, self.seq)
    }
}

impl FromStr for Dot {
    type Err = DotError;

    fn from_str(text: &str) -> Result<Self, DotError> {
        let mut fields = text.split('.');
        let (Some(node), Some(incarnation), Some(seq), None) =
            (fields.next(), fields.next(), fields.next(), fields.next())
        else {
            return Err(DotError);
        };
        let number = |text| u64::from_str_radix(text, 16).map_err(|_| DotError);
        let node = node.parse::<NodeName>().map_err(|_| DotError)?;
        Ok(Self { origin: Origin { node, incarnation: number(incarnation)? }, seq: number(seq)? })
    }
}

impl Dot {
    /// 32 bits that tell this dot from another one of the same key. Never 0.
    pub fn mark(&self) -> u32 {
        let mut out = Vec::with_capacity(64);
        put_origin(&mut out, &self.origin);
        out.put_u64(self.seq);
        let hash = fold(&out);
        u32::try_from((hash ^ (hash >> 32)) & 0xffff_ffff).unwrap_or(0).max(1)
    }
}

impl Content {
    /// What it was written on top of, for parts and siblings.
    pub fn base(&self) -> Option<&Base> {
        match self {
            Self::Part { base, .. } | Self::Sibling { base, .. } => Some(base),
            Self::Tombstone | Self::Value(_) => None,
        }
    }

    /// Bytes of its value.
    pub fn value_bytes(&self) -> usize {
        match self {
            Self::Value(value) | Self::Sibling { value, .. } => value.len(),
            Self::Tombstone | Self::Part { .. } => 0,
        }
    }
}

impl Entry {
    /// Whether it no longer exists at this time. A tombstone never did.
    pub fn expired(&self, now_ms: u64) -> bool {
        self.expires_ms.is_some_and(|expires| expires <= now_ms)
    }

    /// From when on it means no more than that older entries of its key are void; none if it lives on.
    pub fn mortal_ms(&self) -> Option<u64> {
        match (&self.content, self.expires_ms) {
            (Content::Tombstone, _) => Some(self.version.stamp.ms()),
            (_, Some(expires)) => Some(expires.max(self.version.stamp.ms())),
            (_, None) => None,
        }
    }

    /// The tombstone that its base names, if it names one.
    pub fn implied(&self) -> Option<Self> {
        let Some(Base::Tombstone { version, prev }) = self.content.base() else { return None };
        Some(Self {
            key: self.key.clone(),
            version: version.clone(),
            prev: *prev,
            expires_ms: None,
            content: Content::Tombstone,
        })
    }

    /// A few bits of what was written: two entries of one dot that differ in them are a fault.
    pub fn taste(&self) -> u8 {
        let part = |total: i64| fold(&total.to_be_bytes());
        let hash = match &self.content {
            Content::Tombstone => 1,
            Content::Value(value) => fold(value),
            Content::Part { total, .. } => part(*total),
            Content::Sibling { value, .. } => fold(value).rotate_left(1),
        };
        hash.to_be_bytes()[0]
    }

    /// The bytes of all fields: two entries that differ have different ones.
    pub(crate) fn fields(&self) -> Vec<u8> {
        let mut out = Vec::with_capacity(self.key.name.len() + self.content.value_bytes() + 128);
        self.put_fields(&mut out);
        out
    }

    fn put_fields(&self, out: &mut Vec<u8>) {
        put_text(out, self.key.store.as_str());
        put_text(out, &self.key.name);
        put_version(out, &self.version);
        out.put_u32(self.prev);
        self.put_content(out);
    }

    /// Appends the entry's bytes: fields, then their checksum.
    pub fn encode(&self, out: &mut Vec<u8>) {
        let start = out.len();
        self.put_fields(out);
        let sum = checksum(&out[start..]);
        out.put_slice(&sum);
    }

    fn put_content(&self, out: &mut Vec<u8>) {
        let kind = match &self.content {
            Content::Tombstone => CONTENT_TOMBSTONE,
            Content::Value(_) => CONTENT_VALUE,
            Content::Part { .. } => CONTENT_PART,
            Content::Sibling { .. } => CONTENT_SIBLING,
        };
        match self.expires_ms {
            None => out.put_u8(kind),
            Some(expires_ms) => {
                out.put_u8(kind | CONTENT_EXPIRES);
                out.put_u64(expires_ms);
            }
        }
        match &self.content {
            Content::Tombstone => {}
            Content::Value(value) => out.put_slice(value),
            Content::Part { base, total } => {
                put_base(out, base);
                out.put_i64(*total);
            }
            Content::Sibling { base, context, value } => {
                put_base(out, base);
                out.put_u16(u16::try_from(context.len()).unwrap_or(u16::MAX));
                for (origin, seq) in context.iter() {
                    put_origin(out, origin);
                    out.put_u64(seq);
                }
                out.put_slice(value);
            }
        }
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
        let prev = fields.u32()?;
        let (expires_ms, content) = fields.content()?;
        fields.end()?;
        Ok(Self { key: Key { store, name }, version, prev, expires_ms, content })
    }
}

/// 64 bits of some bytes: quick, even, and no secret. For marks and sketches, never for trust.
pub(crate) fn fold(bytes: &[u8]) -> u64 {
    const MIX: u64 = 0x9e37_79b9_7f4a_7c15;
    let mut hash = MIX ^ u64::try_from(bytes.len()).unwrap_or(0);
    for chunk in bytes.chunks(8) {
        let mut word = [0; 8];
        word[..chunk.len()].copy_from_slice(chunk);
        hash = mix(hash ^ u64::from_le_bytes(word));
    }
    hash
}

/// Spreads a number's bits over all of them (the finaliser of splitmix64).
pub(crate) fn mix(mut number: u64) -> u64 {
    number = number.wrapping_add(0x9e37_79b9_7f4a_7c15);
    number = (number ^ (number >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    number = (number ^ (number >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    number ^ (number >> 31)
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

fn put_base(out: &mut Vec<u8>, base: &Base) {
    match base {
        Base::None { floor } => {
            out.put_u8(BASE_NONE);
            out.put_u64(floor.0);
        }
        Base::Value(version) => {
            out.put_u8(BASE_VALUE);
            put_version(out, version);
        }
        Base::Tombstone { version, prev } => {
            out.put_u8(BASE_TOMBSTONE);
            put_version(out, version);
            out.put_u32(*prev);
        }
    }
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

    fn base(&mut self) -> Result<Base, EntryError> {
        Ok(match self.u8()? {
            BASE_NONE => Base::None { floor: Stamp(self.u64()?) },
            BASE_VALUE => Base::Value(self.version()?),
            BASE_TOMBSTONE => Base::Tombstone { version: self.version()?, prev: self.u32()? },
            _ => return Err(EntryError::Field("base")),
        })
    }

    fn content(&mut self) -> Result<(Option<u64>, Content), EntryError> {
        let kind = self.u8()?;
        let expires_ms = if kind & CONTENT_EXPIRES == 0 { None } else { Some(self.u64()?) };
        let content = match kind & !CONTENT_EXPIRES {
            CONTENT_TOMBSTONE if expires_ms.is_none() => Content::Tombstone,
            CONTENT_VALUE => Content::Value(self.rest(VALUE_BYTES_MAX)?),
            CONTENT_PART => Content::Part { base: self.base()?, total: self.i64()? },
            CONTENT_SIBLING => {
                let base = self.base()?;
                let count = usize::from(self.u16()?);
                if count > CONTEXT_MAX {
                    return Err(EntryError::Field("context"));
                }
                let mut context = Vec::new();
                for _ in 0..count {
                    context.push((self.origin()?, self.u64()?));
                }
                let context = context.into_iter().collect();
                Content::Sibling { base, context, value: self.rest(VALUE_BYTES_MAX)? }
            }
            _ => return Err(EntryError::Field("content")),
        };
        Ok((expires_ms, content))
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

    fn base() -> impl Strategy<Value = Base> {
        prop_oneof![
            (0_u64..50).prop_map(|floor| Base::None { floor: Stamp(floor) }),
            version().prop_map(Base::Value),
            (version(), any::<u32>()).prop_map(|(version, prev)| Base::Tombstone { version, prev }),
        ]
    }

    pub(crate) fn content() -> impl Strategy<Value = Content> {
        let value = || prop::collection::vec(any::<u8>(), 0..64).prop_map(Bytes::from);
        let context = prop::collection::vec(version(), 0..4)
            .prop_map(|seen| seen.into_iter().map(|version| (version.dot.origin, version.dot.seq)).collect());
        prop_oneof![
            Just(Content::Tombstone),
            value().prop_map(Content::Value),
            (base(), any::<i64>()).prop_map(|(base, total)| Content::Part { base, total }),
            (base(), context, value()).prop_map(|(base, context, value)| Content::Sibling { base, context, value }),
        ]
    }

    pub(crate) fn entry() -> impl Strategy<Value = Entry> {
        (version(), content(), "[ -~]{0,32}", any::<u32>(), prop::option::of(any::<u64>())).prop_map(
            |(version, content, name, prev, expires_ms)| Entry {
                key: Key { store: "app/default".parse().unwrap(), name },
                version,
                prev,
                expires_ms: expires_ms.filter(|_| content != Content::Tombstone),
                content,
            },
        )
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
