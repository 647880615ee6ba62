//! Records: all that is known of one key.
//!
//! A record is a register (the newest value or tombstone) and the parts of a counter on top of it: of every
//! origin the newest. A part counts while its base is the register. So:
//!
//! - concurrent increments all count, since every origin has its own part;
//! - a `set` or `delete` begins anew: parts on an older base are superseded, also those of an origin that had not
//!   yet seen the new register;
//! - a part whose base has not arrived waits and does not count yet.
//!
//! [`Record::merge`] is commutative, associative and idempotent: nodes that received the same entries hold the
//! same records, byte for byte (sync.md invariant K1).

use bytes::{Buf, BufMut, Bytes};

use crate::entry::{Content, Dot, Entry, EntryError, Fields, Origin, Version};

/// Bytes of a counter's value: a little-endian `i64`, the form in which Spin stores increments.
const COUNTER_BYTES: usize = 8;

/// All entries of one key that are not superseded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    register: Option<Entry>,
    parts: Vec<Entry>,
}

/// What a merge did.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Merge {
    /// The entry is in the record now and these writes no longer are.
    Kept(Vec<Dot>),
    /// The record has the entry already, or what superseded it.
    Superseded,
}

/// The value can't be counted with: it is not [`COUNTER_BYTES`] long, or the sum would overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value is not a counter, or the counter is full")]
pub struct NotCounter;

impl Record {
    /// Takes one entry in, whatever the order.
    pub fn merge(&mut self, entry: Entry) -> Merge {
        match &entry.content {
            Content::Part { base, .. } => {
                if base.as_ref() < self.base() {
                    return Merge::Superseded;
                }
                self.merge_part(entry)
            }
            Content::Tombstone | Content::Value(_) => self.merge_register(entry),
        }
    }

    fn merge_register(&mut self, entry: Entry) -> Merge {
        if Some(&entry.version) <= self.base() {
            return Merge::Superseded;
        }
        let mut superseded: Vec<Dot> = self.register.take().map(|old| old.version.dot).into_iter().collect();
        self.parts.retain(|part| {
            let stays = base_of(part) >= Some(&entry.version);
            if !stays {
                superseded.push(part.version.dot.clone());
            }
            stays
        });
        self.register = Some(entry);
        Merge::Kept(superseded)
    }

    fn merge_part(&mut self, entry: Entry) -> Merge {
        let place = self.parts.binary_search_by(|part| part.version.dot.origin.cmp(&entry.version.dot.origin));
        match place {
            Ok(at) if entry.version <= self.parts[at].version => Merge::Superseded,
            Ok(at) => {
                let old = std::mem::replace(&mut self.parts[at], entry);
                Merge::Kept(vec![old.version.dot])
            }
            Err(at) => {
                self.parts.insert(at, entry);
                Merge::Kept(Vec::new())
            }
        }
    }

    /// The version of the register.
    pub fn base(&self) -> Option<&Version> {
        self.register.as_ref().map(|register| &register.version)
    }

    /// What a reader sees: none if the key does not exist.
    pub fn value(&self) -> Option<Bytes> {
        if self.counted().next().is_some() {
            return self.sum().map(|sum| Bytes::copy_from_slice(&sum.to_le_bytes())).ok();
        }
        match self.register.as_ref().map(|register| &register.content) {
            Some(Content::Value(value)) => Some(value.clone()),
            _ => None,
        }
    }

    /// Whether the key exists.
    pub fn exists(&self) -> bool {
        let value = self.register.as_ref().is_some_and(|register| matches!(register.content, Content::Value(_)));
        value || self.counted().next().is_some()
    }

    /// The newest entry, whatever its kind.
    pub fn newest(&self) -> Option<&Entry> {
        self.entries().max_by(|a, b| a.version.cmp(&b.version))
    }

    /// The entry with this dot, if it is not superseded.
    pub fn entry(&self, dot: &Dot) -> Option<&Entry> {
        self.entries().find(|entry| entry.version.dot == *dot)
    }

    /// All entries.
    pub fn entries(&self) -> impl Iterator<Item = &Entry> {
        self.register.iter().chain(&self.parts)
    }

    /// What `origin` would write to add `delta`, and the counter's value after that.
    pub fn increment(&self, origin: &Origin, delta: i64) -> Result<(Content, i64), NotCounter> {
        let own = self.counted().find(|(part, _)| part.version.dot.origin == *origin).map_or(0, |(_, total)| total);
        let total = own.checked_add(delta).ok_or(NotCounter)?;
        let sum = self.sum()?.checked_add(delta).ok_or(NotCounter)?;
        Ok((Content::Part { base: self.base().cloned(), total }, sum))
    }

    fn counted(&self) -> impl Iterator<Item = (&Entry, i64)> {
        self.parts.iter().filter_map(|part| match &part.content {
            Content::Part { base, total } if base.as_ref() == self.base() => Some((part, *total)),
            _ => None,
        })
    }

    /// Register plus parts. Parts may overflow together though none did alone: the sum then stays at the limit.
    fn sum(&self) -> Result<i64, NotCounter> {
        let start = match self.register.as_ref().map(|register| &register.content) {
            Some(Content::Value(value)) => {
                let bytes: [u8; COUNTER_BYTES] = value.as_ref().try_into().map_err(|_| NotCounter)?;
                i64::from_le_bytes(bytes)
            }
            _ => 0,
        };
        let sum = self.counted().fold(i128::from(start), |sum, (_, total)| sum + i128::from(total));
        Ok(i64::try_from(sum).unwrap_or(if sum < 0 { i64::MIN } else { i64::MAX }))
    }

    /// The record's bytes, for the engine.
    pub fn encode(&self) -> Vec<u8> {
        let mut out = Vec::new();
        for entry in self.entries() {
            let start = out.len();
            out.put_u32(0);
            entry.encode(&mut out);
            let length = u32::try_from(out.len() - start - 4).expect("an entry is about 1 MiB at most");
            out[start..start + 4].copy_from_slice(&length.to_be_bytes());
        }
        out
    }

    /// The record that `bytes` are. Every checksum is verified.
    pub fn decode(mut bytes: Bytes) -> Result<Self, EntryError> {
        let mut record = Self::default();
        while bytes.has_remaining() {
            let mut fields = Fields::of(bytes.clone());
            let length = usize::try_from(fields.u32()?).map_err(|_| EntryError::Short)?;
            let entry = Entry::decode(&fields.take(length)?)?;
            bytes.advance(4 + length);
            // What was encoded merges back as it was; a duplicate or a wrong order means the bytes changed.
            if record.merge(entry) != Merge::Kept(Vec::new()) {
                return Err(EntryError::Field("order"));
            }
        }
        Ok(record)
    }
}

fn base_of(part: &Entry) -> Option<&Version> {
    match &part.content {
        Content::Part { base, .. } => base.as_ref(),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::Key;
    use crate::stamp::Stamp;
    use proptest::prelude::*;

    fn entry(node: &str, stamp: u64, content: Content) -> Entry {
        let origin = Origin { node: node.parse().unwrap(), incarnation: 1 };
        Entry {
            key: Key { store: "app/default".parse().unwrap(), name: "k".into() },
            version: Version { stamp: Stamp(stamp), dot: Dot { origin, seq: stamp } },
            content,
        }
    }

    fn value(text: &'static str) -> Content {
        Content::Value(Bytes::from_static(text.as_bytes()))
    }

    fn add(record: &mut Record, node: &str, stamp: u64, delta: i64) -> i64 {
        let origin = Origin { node: node.parse().unwrap(), incarnation: 1 };
        let (content, sum) = record.increment(&origin, delta).unwrap();
        assert!(matches!(record.merge(entry(node, stamp, content)), Merge::Kept(_)));
        sum
    }

    /// What nodes do, in any order of arrival: three writers that each see a random part of what was written.
    fn histories() -> impl Strategy<Value = Vec<Entry>> {
        prop::collection::vec((0_usize..3, 0_u8..4, any::<u8>(), 0_usize..3), 1..24).prop_map(|steps| {
            let names = ["a", "b", "c"];
            let mut views = [Record::default(), Record::default(), Record::default()];
            let mut written = Vec::new();
            for (stamp, (who, what, byte, reader)) in (1_u64..).zip(steps) {
                let origin = Origin { node: names[who].parse().unwrap(), incarnation: 1 };
                let content = match what {
                    0 => Content::Tombstone,
                    1 => Content::Value(i64::from(byte).to_le_bytes().to_vec().into()),
                    _ => views[who].increment(&origin, i64::from(byte)).unwrap().0,
                };
                let new = entry(names[who], stamp, content);
                views[who].merge(new.clone());
                views[reader].merge(new.clone());
                written.push(new);
            }
            written
        })
    }

    proptest! {
        #[test]
        fn the_order_of_arrival_does_not_matter(
            (history, shuffled) in histories().prop_flat_map(|h| (Just(h.clone()), Just(h).prop_shuffle())),
        ) {
            let (mut one, mut other) = (Record::default(), Record::default());
            for entry in &history {
                one.merge(entry.clone());
            }
            for entry in shuffled.iter().chain(&shuffled) {
                other.merge(entry.clone());
            }
            prop_assert_eq!(one.encode(), other.encode());
            prop_assert_eq!(Record::decode(one.encode().into()).unwrap(), one);
        }

        #[test]
        fn garbage_is_an_error_or_a_record_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
            let _either = Record::decode(bytes.into());
        }
    }

    #[test]
    fn a_tombstone_is_not_undone_by_an_older_value() {
        let mut record = Record::default();
        record.merge(entry("a", 2, Content::Tombstone));
        assert_eq!(record.merge(entry("b", 1, value("old"))), Merge::Superseded);
        assert_eq!(record.value(), None);
        assert!(!record.exists());
    }

    #[test]
    fn equal_stamps_are_decided_by_the_node() {
        let mut record = Record::default();
        record.merge(entry("b", 1, value("b")));
        assert_eq!(record.merge(entry("a", 1, value("a"))), Merge::Superseded);
        assert_eq!(record.value(), Some(Bytes::from_static(b"b")));
    }

    #[test]
    fn concurrent_increments_both_count() {
        let (mut one, mut other) = (Record::default(), Record::default());
        assert_eq!(add(&mut one, "a", 1, 5), 5);
        assert_eq!(add(&mut other, "b", 1, 7), 7);
        for entry in other.clone().entries() {
            one.merge(entry.clone());
        }
        assert_eq!(one.value(), Some(Bytes::copy_from_slice(&12_i64.to_le_bytes())));
        assert_eq!(add(&mut one, "a", 2, -2), 10);
    }

    #[test]
    fn a_set_begins_anew_and_supersedes_parts_that_had_not_seen_it() {
        let mut record = Record::default();
        add(&mut record, "a", 1, 5);
        let unaware = record.clone();
        record.merge(entry("b", 2, Content::Value(100_i64.to_le_bytes().to_vec().into())));
        assert_eq!(record.entries().count(), 1);
        let origin = Origin { node: "a".parse().unwrap(), incarnation: 1 };
        let (late, _) = unaware.increment(&origin, 1).unwrap();
        assert_eq!(record.merge(entry("a", 3, late)), Merge::Superseded);
        assert_eq!(add(&mut record, "a", 4, 1), 101);
    }

    #[test]
    fn text_is_not_a_counter_and_a_full_counter_stays() {
        let mut record = Record::default();
        let origin = Origin { node: "a".parse().unwrap(), incarnation: 1 };
        record.merge(entry("a", 1, value("five")));
        assert_eq!(record.increment(&origin, 1), Err(NotCounter));
        record.merge(entry("a", 2, Content::Value(i64::MAX.to_le_bytes().to_vec().into())));
        assert_eq!(record.increment(&origin, 1), Err(NotCounter));
        assert!(record.increment(&origin, -1).is_ok());
    }
}
