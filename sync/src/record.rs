//! Records: all that is known of one key.
//!
//! A record is a register (the newest value or tombstone), and on top of it the parts of a counter (of every origin
//! the newest) and siblings. A part or sibling counts while its base is the register. So:
//!
//! - concurrent increments all count, since every origin has its own part;
//! - siblings stand side by side until one is written whose context covers them;
//! - a `set` or `delete` begins anew: what is on an older base is superseded, also what an origin writes that had
//!   not yet seen the new register;
//! - a part or sibling whose base has not arrived waits; one on a tombstone brings that tombstone along;
//! - one whose writer had collected the register says up to when it had, and stands also where that still is.
//!
//! [`Record::merge`] is commutative, associative and idempotent: nodes that received the same entries hold the
//! same records, byte for byte (sync.md invariant K1).

use bytes::{Buf, BufMut, Bytes};

use crate::entry::{Base, Content, Dot, Entry, EntryError, Fields, Origin, Version};
use crate::planted::{self, Bug};
use crate::stamp::Stamp;
use crate::vector::VersionVector;

/// Bytes of a counter's value: a little-endian `i64`, the form in which Spin stores increments.
const COUNTER_BYTES: usize = 8;

/// All entries of one key that are not superseded.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Record {
    register: Option<Entry>,
    /// In the order of origins, one each.
    parts: Vec<Entry>,
    /// In the order of dots.
    siblings: Vec<Entry>,
}

/// What a merge did. Both are empty if the record had the entry already, or what superseded it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Change {
    /// What is in the record now: the entry, and before it the tombstone that it brought along.
    pub added: Vec<Entry>,
    /// What no longer is.
    pub superseded: Vec<Entry>,
}

impl Change {
    /// Whether nothing changed.
    pub fn is_none(&self) -> bool {
        self.added.is_empty()
    }
}

/// The value can't be counted with: it is not [`COUNTER_BYTES`] long, or the sum would overflow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the value is not a counter, or the counter is full")]
pub struct NotCounter;

impl Record {
    /// Takes one entry in, whatever the order.
    pub fn merge(&mut self, entry: Entry) -> Change {
        let mut change = Change::default();
        if let Some(base) = entry.content.base() {
            if self.register.as_ref().is_some_and(|register| is_after(&register.version, base)) {
                return change;
            }
            if let Some(tombstone) = entry.implied() {
                self.merge_one(tombstone, &mut change);
            }
        }
        self.merge_one(entry, &mut change);
        change
    }

    fn merge_one(&mut self, entry: Entry, change: &mut Change) {
        let added = entry.clone();
        let merged = match &entry.content {
            Content::Tombstone | Content::Value(_) => self.merge_register(entry),
            Content::Part { .. } => self.merge_part(entry),
            Content::Sibling { .. } => self.merge_sibling(entry),
        };
        if let Some(superseded) = merged {
            change.added.push(added);
            change.superseded.extend(superseded);
        }
    }

    fn merge_register(&mut self, entry: Entry) -> Option<Vec<Entry>> {
        if !newer(&entry.version, self.base()) {
            return None;
        }
        let mut superseded: Vec<Entry> = self.register.take().into_iter().collect();
        let older = |above: &mut Entry| above.content.base().is_some_and(|base| is_after(&entry.version, base));
        superseded.extend(self.parts.extract_if(.., older));
        superseded.extend(self.siblings.extract_if(.., older));
        self.register = Some(entry);
        Some(superseded)
    }

    fn merge_part(&mut self, mut entry: Entry) -> Option<Vec<Entry>> {
        let place = self.parts.binary_search_by(|part| part.version.dot.origin.cmp(&entry.version.dot.origin));
        match place {
            Ok(at) if entry.version <= self.parts[at].version => None,
            Ok(at) => {
                if let (true, Content::Part { total, .. }, Content::Part { total: old, .. }) =
                    (planted::is(Bug::CounterAdd), &mut entry.content, &self.parts[at].content)
                {
                    *total = total.saturating_add(*old);
                }
                Some(vec![std::mem::replace(&mut self.parts[at], entry)])
            }
            Err(at) => {
                self.parts.insert(at, entry);
                Some(Vec::new())
            }
        }
    }

    fn merge_sibling(&mut self, entry: Entry) -> Option<Vec<Entry>> {
        let dot = &entry.version.dot;
        let covers = |by: &Entry, dot: &Dot| match &by.content {
            Content::Sibling { context, .. } => context.get(&dot.origin) >= dot.seq,
            _ => false,
        };
        let base = |of: &Entry| of.content.base().and_then(Base::version).cloned();
        let same = |other: &Entry| base(other) == base(&entry);
        if self.siblings.iter().any(|other| other.version.dot == *dot || same(other) && covers(other, dot)) {
            return None;
        }
        let gone = |other: &mut Entry| same(other) && covers(&entry, &other.version.dot);
        let superseded: Vec<Entry> = self.siblings.extract_if(.., gone).collect();
        let at = self.siblings.partition_point(|other| other.version.dot < *dot);
        self.siblings.insert(at, entry);
        Some(superseded)
    }

    /// The version of the register.
    pub fn base(&self) -> Option<&Version> {
        self.register.as_ref().map(|register| &register.version)
    }

    /// The value or tombstone.
    pub fn register(&self) -> Option<&Entry> {
        self.register.as_ref()
    }

    /// What a reader sees now: none if the key does not exist. Of siblings it is the one with the newest version.
    pub fn value(&self, now_ms: u64) -> Option<Bytes> {
        if self.counted(now_ms).next().is_some() {
            return self.sum(now_ms).map(|sum| Bytes::copy_from_slice(&sum.to_le_bytes())).ok();
        }
        if let Some((newest, value)) = self.beside(now_ms).max_by(|(a, _), (b, _)| a.version.cmp(&b.version)) {
            tracing::trace!(version = ?newest.version, "newest of the siblings");
            return Some(value.clone());
        }
        self.standing(now_ms).cloned()
    }

    /// When what a reader sees now ends to exist, if it does. Of a counter, whose parts end each by itself, nothing is said.
    pub fn ends_ms(&self, now_ms: u64) -> Option<u64> {
        if self.counted(now_ms).next().is_some() {
            return None;
        }
        match self.beside(now_ms).max_by(|(a, _), (b, _)| a.version.cmp(&b.version)) {
            Some((newest, _)) => newest.expires_ms,
            None => self.register.as_ref().filter(|_| self.standing(now_ms).is_some())?.expires_ms,
        }
    }

    /// All values that stand side by side now, in the order of their dots.
    pub fn siblings(&self, now_ms: u64) -> Vec<Bytes> {
        let values: Vec<Bytes> = self.beside(now_ms).map(|(_, value)| value.clone()).collect();
        if values.is_empty() { self.value(now_ms).into_iter().collect() } else { values }
    }

    /// Whether the key exists now.
    pub fn exists(&self, now_ms: u64) -> bool {
        self.standing(now_ms).is_some() || self.counted(now_ms).next().is_some() || self.beside(now_ms).next().is_some()
    }

    /// The register's value, if it is one that has not expired.
    fn standing(&self, now_ms: u64) -> Option<&Bytes> {
        match self.register.as_ref().filter(|register| !register.expired(now_ms)).map(|register| &register.content) {
            Some(Content::Value(value)) => Some(value),
            _ => None,
        }
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
        self.register.iter().chain(&self.parts).chain(&self.siblings)
    }

    /// Drops entries, and returns them.
    pub(crate) fn drop_if(&mut self, gone: impl Fn(&Entry) -> bool) -> Vec<Entry> {
        let mut dropped: Vec<Entry> = self.register.take_if(|register| gone(register)).into_iter().collect();
        dropped.extend(self.parts.extract_if(.., |part| gone(part)));
        dropped.extend(self.siblings.extract_if(.., |sibling| gone(sibling)));
        dropped
    }

    /// Drops what ended before a floor that every node has passed: parts and siblings each by itself, the register
    /// once nothing stands on it. What is left depends only on the floor and on what was received.
    pub fn collect(&mut self, floor_ms: u64) -> Vec<Entry> {
        let ended = |entry: &Entry| entry.mortal_ms().is_some_and(|mortal| mortal < floor_ms);
        let mut dropped: Vec<Entry> = self.parts.extract_if(.., |part| ended(part)).collect();
        dropped.extend(self.siblings.extract_if(.., |sibling| ended(sibling)));
        let held = self.parts.iter().chain(&self.siblings).any(|above| {
            let base = above.content.base().and_then(Base::version);
            base.is_some() && base == self.base()
        });
        if !held {
            dropped.extend(self.register.take_if(|register| ended(register)));
        }
        dropped
    }

    /// Whether the register has expired: before a part or sibling is written, a tombstone must be.
    pub fn needs_tombstone(&self, now_ms: u64) -> bool {
        self.register.as_ref().is_some_and(|register| register.expired(now_ms))
    }

    /// The newest floor at which something here was written on top of nothing.
    fn bare(&self) -> Option<Stamp> {
        let floors = self.parts.iter().chain(&self.siblings).filter_map(|above| match above.content.base() {
            Some(Base::None { floor }) => Some(*floor),
            _ => None,
        });
        floors.max()
    }

    /// What a part or sibling is written on top of, by a writer who has collected up to `floor`.
    fn standing_base(&self, floor: Stamp) -> Base {
        match &self.register {
            None if self.entries().next().is_none() => Base::None { floor },
            None => Base::None { floor: self.bare().unwrap_or(floor) },
            Some(Entry { version, prev, content: Content::Tombstone, .. }) => {
                Base::Tombstone { version: version.clone(), prev: *prev }
            }
            Some(register) => Base::Value(register.version.clone()),
        }
    }

    /// What `origin` would write to add `delta`, when that would expire if its share already does, and the
    /// counter's value after it.
    pub fn increment(
        &self,
        origin: &Origin,
        delta: i64,
        now_ms: u64,
        floor: Stamp,
    ) -> Result<(Content, Option<u64>, i64), NotCounter> {
        let own = self.counted(now_ms).find(|(part, _)| part.version.dot.origin == *origin);
        let expires_ms = own.and_then(|(part, _)| part.expires_ms);
        let total = own.map_or(0, |(_, total)| total).checked_add(delta).ok_or(NotCounter)?;
        let sum = self.sum(now_ms)?.checked_add(delta).ok_or(NotCounter)?;
        Ok((Content::Part { base: self.standing_base(floor), total }, expires_ms, sum))
    }

    /// What a writer that sees this record would write as a sibling that supersedes those it sees.
    pub fn sibling(&self, value: Bytes, floor: Stamp) -> Content {
        let base = self.standing_base(floor);
        let mut context = VersionVector::default();
        for seen in self.siblings.iter().filter(|seen| seen.content.base().and_then(Base::version) == base.version()) {
            context.lift(&seen.version.dot.origin, seen.version.dot.seq);
            if let Content::Sibling { context: before, .. } = &seen.content {
                for (origin, seq) in before.iter() {
                    context.lift(origin, seq);
                }
            }
        }
        Content::Sibling { base, context, value }
    }

    /// Whether what is on top stands on the register that is here: on that one, or on nothing where its writer had
    /// collected it.
    fn stands(&self, above: &Entry, now_ms: u64) -> bool {
        let stands = match above.content.base() {
            Some(Base::None { floor }) => self.base().is_none_or(|register| register.stamp <= *floor),
            base => base.and_then(Base::version) == self.base(),
        };
        stands && !above.expired(now_ms)
    }

    fn counted(&self, now_ms: u64) -> impl Iterator<Item = (&Entry, i64)> {
        self.parts.iter().filter(move |part| self.stands(part, now_ms)).filter_map(|part| match &part.content {
            Content::Part { total, .. } => Some((part, *total)),
            _ => None,
        })
    }

    fn beside(&self, now_ms: u64) -> impl Iterator<Item = (&Entry, &Bytes)> {
        self.siblings.iter().filter(move |one| self.stands(one, now_ms)).filter_map(|one| match &one.content {
            Content::Sibling { value, .. } => Some((one, value)),
            _ => None,
        })
    }

    /// Register plus parts. Parts may overflow together though none did alone: the sum then stays at the limit.
    fn sum(&self, now_ms: u64) -> Result<i64, NotCounter> {
        let start = match self.standing(now_ms) {
            Some(value) => {
                let bytes: [u8; COUNTER_BYTES] = value.as_ref().try_into().map_err(|_| NotCounter)?;
                i64::from_le_bytes(bytes)
            }
            None => 0,
        };
        let sum = self.counted(now_ms).fold(i128::from(start), |sum, (_, total)| sum + i128::from(total));
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
            let change = record.merge(entry);
            if change.added.len() != 1 || !change.superseded.is_empty() {
                return Err(EntryError::Field("order"));
            }
        }
        Ok(record)
    }
}

/// Whether a register of this version makes what is on `base` void.
fn is_after(register: &Version, base: &Base) -> bool {
    match base {
        Base::None { floor } => register.stamp > *floor,
        Base::Value(version) | Base::Tombstone { version, .. } => register > version,
    }
}

/// Whether a register of this version takes the place of one of that.
fn newer(version: &Version, than: Option<&Version>) -> bool {
    if planted::is(Bug::TieBreak) {
        return than.is_none_or(|than| version.stamp >= than.stamp && version.dot != than.dot);
    }
    Some(version) > than
}

#[cfg(test)]
mod tests;
