//! Entries on the wire: what many of them share is said once.
//!
//! Stores and origins are numbered at the front; numbers follow as differences from the entry before, in seven bits a
//! byte. An entry takes about 15 bytes besides its key and value. Frames are checked by TLS, so there is no sum.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes};
use selvage_config::StoreName;

use crate::entry::{
    Base, CONTEXT_MAX, Content, Dot, Entry, EntryError, Fields, KEY_BYTES_MAX, Key, Origin, VALUE_BYTES_MAX, Version,
    put_origin,
};
use crate::stamp::Stamp;
use crate::trust::SIGNATURE_BYTES;
use crate::vector::VersionVector;
use crate::warrant::{HASH_BYTES, RUN_MAX, Run, Warrant};

/// Entries in one frame, at most.
const ENTRIES_MAX: usize = 1 << 20;

/// Stores or origins in one frame, at most.
const NAMES_MAX: usize = 1 << 16;

const TOMBSTONE: u8 = 0;
const VALUE: u8 = 1;
const PART: u8 = 2;
const SIBLING: u8 = 3;
const KIND: u8 = 0x0f;
const HAS_PREV: u8 = 0x10;
const HAS_EXPIRY: u8 = 0x20;

/// Names and what they were numbered.
#[derive(Default)]
struct Names<'e> {
    stores: BTreeMap<&'e StoreName, u64>,
    origins: BTreeMap<&'e Origin, u64>,
}

impl<'e> Names<'e> {
    fn of(entries: &'e [Entry]) -> Self {
        let mut names = Self::default();
        for entry in entries {
            names.stores.insert(&entry.key.store, 0);
            names.origins.insert(&entry.version.dot.origin, 0);
            if let Some(version) = entry.content.base().and_then(Base::version) {
                names.origins.insert(&version.dot.origin, 0);
            }
            if let Content::Sibling { context, .. } = &entry.content {
                names.origins.extend(context.iter().map(|(origin, _)| (origin, 0)));
            }
        }
        (0..).zip(names.stores.values_mut()).for_each(|(number, at)| *at = number);
        (0..).zip(names.origins.values_mut()).for_each(|(number, at)| *at = number);
        names
    }
}

/// What differences are taken from.
#[derive(Default)]
struct Last {
    stamp: u64,
    seqs: BTreeMap<u64, u64>,
}

/// Appends a number in seven bits a byte, the lowest first.
pub(crate) fn put_number(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.put_u8(number.to_le_bytes()[0] | 0x80);
        number >>= 7;
    }
    out.put_u8(number.to_le_bytes()[0]);
}

/// Appends a number that may be negative; small ones are short either way.
pub(crate) fn put_signed(out: &mut Vec<u8>, number: i64) {
    put_number(out, (number.cast_unsigned() << 1) ^ (number >> 63).cast_unsigned());
}

/// Reads what [`put_number`] wrote.
pub(crate) fn number(fields: &mut Fields) -> Result<u64, EntryError> {
    let mut number = 0_u64;
    for shift in (0..64).step_by(7) {
        let byte = fields.u8()?;
        let bits = u64::from(byte & 0x7f);
        if shift == 63 && bits > 1 {
            break;
        }
        number |= bits << shift;
        if byte & 0x80 == 0 {
            return Ok(number);
        }
    }
    Err(EntryError::Field("number"))
}

/// Reads what [`put_signed`] wrote.
pub(crate) fn signed(fields: &mut Fields) -> Result<i64, EntryError> {
    let number = number(fields)?;
    Ok((number >> 1).cast_signed() ^ -((number & 1).cast_signed()))
}

/// Reads a length and checks it against its limit before anybody allocates.
pub(crate) fn length(fields: &mut Fields, max: usize, what: &'static str) -> Result<usize, EntryError> {
    usize::try_from(number(fields)?).ok().filter(|length| *length <= max).ok_or(EntryError::Field(what))
}

/// Appends entries, and what proves whose they are.
pub(super) fn put(out: &mut Vec<u8>, entries: &[Entry], warrants: &[Warrant]) {
    let names = Names::of(entries);
    put_number(out, names.stores.len() as u64);
    for store in names.stores.keys() {
        put_bytes(out, store.as_str().as_bytes());
    }
    put_number(out, names.origins.len() as u64);
    names.origins.keys().for_each(|origin| put_origin(out, origin));
    put_number(out, entries.len() as u64);
    let mut last = Last::default();
    for entry in entries {
        put_entry(out, entry, &names, &mut last);
    }
    // A warrant of an origin that no entry is of proves nothing here.
    let known = warrants.iter().filter_map(|warrant| Some((names.origins.get(&warrant.run.origin)?, warrant)));
    put_number(out, known.clone().count() as u64);
    let mut firsts = BTreeMap::new();
    for (origin, warrant) in known {
        put_number(out, *origin);
        let first = firsts.entry(*origin).or_insert(0_u64);
        put_signed(out, warrant.run.first.wrapping_sub(*first).cast_signed());
        *first = warrant.run.first;
        put_number(out, warrant.run.count as u64);
        put_number(out, warrant.hashes.len() as u64);
        warrant.hashes.iter().for_each(|hash| out.put_slice(hash));
        out.put_slice(&warrant.signature);
    }
}

fn put_entry(out: &mut Vec<u8>, entry: &Entry, names: &Names<'_>, last: &mut Last) {
    let kind = match &entry.content {
        Content::Tombstone => TOMBSTONE,
        Content::Value(_) => VALUE,
        Content::Part { .. } => PART,
        Content::Sibling { .. } => SIBLING,
    };
    let prev = if entry.prev == 0 { 0 } else { HAS_PREV };
    let expiry = if entry.expires_ms.is_none() { 0 } else { HAS_EXPIRY };
    out.put_u8(kind | prev | expiry);
    put_number(out, names.stores[&entry.key.store]);
    put_bytes(out, entry.key.name.as_bytes());
    let origin = names.origins[&entry.version.dot.origin];
    put_number(out, origin);
    let seq = last.seqs.entry(origin).or_default();
    put_signed(out, entry.version.dot.seq.wrapping_sub(*seq).cast_signed());
    *seq = entry.version.dot.seq;
    put_signed(out, entry.version.stamp.0.wrapping_sub(last.stamp).cast_signed());
    last.stamp = entry.version.stamp.0;
    if entry.prev != 0 {
        out.put_u32(entry.prev);
    }
    if let Some(expires_ms) = entry.expires_ms {
        put_signed(out, expires_ms.wrapping_sub(entry.version.stamp.ms()).cast_signed());
    }
    match &entry.content {
        Content::Tombstone => {}
        Content::Value(value) => put_bytes(out, value),
        Content::Part { base, total } => {
            put_base(out, base, names);
            put_signed(out, *total);
        }
        Content::Sibling { base, context, value } => {
            put_base(out, base, names);
            put_number(out, context.len() as u64);
            for (origin, seq) in context.iter() {
                put_number(out, names.origins[origin]);
                put_number(out, seq);
            }
            put_bytes(out, value);
        }
    }
}

fn put_base(out: &mut Vec<u8>, base: &Base, names: &Names<'_>) {
    let version = |out: &mut Vec<u8>, version: &Version| {
        put_number(out, names.origins[&version.dot.origin]);
        put_number(out, version.dot.seq);
        out.put_u64(version.stamp.0);
    };
    match base {
        Base::None { floor } => {
            out.put_u8(0);
            put_number(out, floor.0);
        }
        Base::Value(at) => {
            out.put_u8(1);
            version(out, at);
        }
        Base::Tombstone { version: at, prev } => {
            out.put_u8(2);
            version(out, at);
            out.put_u32(*prev);
        }
    }
}

pub(crate) fn put_bytes(out: &mut Vec<u8>, bytes: &[u8]) {
    put_number(out, bytes.len() as u64);
    out.put_slice(bytes);
}

pub(crate) fn bytes(fields: &mut Fields, max: usize, what: &'static str) -> Result<Bytes, EntryError> {
    let length = length(fields, max, what)?;
    fields.take(length)
}

fn text(fields: &mut Fields, max: usize, what: &'static str) -> Result<String, EntryError> {
    let bytes = bytes(fields, max, what)?;
    std::str::from_utf8(&bytes).map(str::to_owned).map_err(|_| EntryError::Field(what))
}

/// Names as they are numbered in a frame.
struct Numbered {
    stores: Vec<StoreName>,
    origins: Vec<Origin>,
}

impl Numbered {
    fn origin(&self, fields: &mut Fields) -> Result<Origin, EntryError> {
        let at = usize::try_from(number(fields)?).unwrap_or(usize::MAX);
        self.origins.get(at).cloned().ok_or(EntryError::Field("origin"))
    }

    fn version(&self, fields: &mut Fields) -> Result<Version, EntryError> {
        let origin = self.origin(fields)?;
        let seq = seq(number(fields)?)?;
        Ok(Version { stamp: Stamp(fields.u64()?), dot: Dot { origin, seq } })
    }

    fn base(&self, fields: &mut Fields) -> Result<Base, EntryError> {
        Ok(match fields.u8()? {
            0 => Base::None { floor: Stamp(number(fields)?) },
            1 => Base::Value(self.version(fields)?),
            2 => Base::Tombstone { version: self.version(fields)?, prev: fields.u32()? },
            _ => return Err(EntryError::Field("base")),
        })
    }

    fn entry(&self, fields: &mut Fields, last: &mut Last) -> Result<Entry, EntryError> {
        let kind = fields.u8()?;
        let at = usize::try_from(number(fields)?).unwrap_or(usize::MAX);
        let store = self.stores.get(at).cloned().ok_or(EntryError::Field("store"))?;
        let name = text(fields, KEY_BYTES_MAX, "key")?;
        let at = number(fields)?;
        let place = usize::try_from(at).unwrap_or(usize::MAX);
        let origin = self.origins.get(place).cloned().ok_or(EntryError::Field("origin"))?;
        let before = last.seqs.entry(at).or_default();
        *before = seq(before.wrapping_add_signed(signed(fields)?))?;
        let dot = Dot { origin, seq: *before };
        last.stamp = last.stamp.wrapping_add_signed(signed(fields)?);
        let stamp = Stamp(last.stamp);
        let prev = if kind & HAS_PREV == 0 { 0 } else { fields.u32()? };
        let expires = |fields: &mut Fields| Ok(stamp.ms().wrapping_add_signed(signed(fields)?));
        let expires_ms = if kind & HAS_EXPIRY == 0 { None } else { Some(expires(fields)?) };
        let content = match kind & KIND {
            TOMBSTONE if expires_ms.is_none() => Content::Tombstone,
            VALUE => Content::Value(bytes(fields, VALUE_BYTES_MAX, "value")?),
            PART => Content::Part { base: self.base(fields)?, total: signed(fields)? },
            SIBLING => {
                let base = self.base(fields)?;
                let mut context = VersionVector::default();
                for _ in 0..length(fields, CONTEXT_MAX, "context")? {
                    let origin = self.origin(fields)?;
                    context.lift(&origin, number(fields)?);
                }
                Content::Sibling { base, context, value: bytes(fields, VALUE_BYTES_MAX, "value")? }
            }
            _ => return Err(EntryError::Field("content")),
        };
        Ok(Entry { key: Key { store, name }, version: Version { stamp, dot }, prev, expires_ms, content })
    }
}

fn seq(number: u64) -> Result<u64, EntryError> {
    if number == 0 { Err(EntryError::Field("seq")) } else { Ok(number) }
}

fn warrants(fields: &mut Fields, names: &Numbered) -> Result<Vec<Warrant>, EntryError> {
    let mut warrants = Vec::new();
    let mut firsts = BTreeMap::new();
    for _ in 0..length(fields, ENTRIES_MAX, "warrants")? {
        let at = number(fields)?;
        let place = usize::try_from(at).unwrap_or(usize::MAX);
        let origin = names.origins.get(place).cloned().ok_or(EntryError::Field("origin"))?;
        let first = firsts.entry(at).or_insert(0_u64);
        *first = first.wrapping_add_signed(signed(fields)?);
        let run = Run::checked(origin, *first, length(fields, RUN_MAX, "run")?)?;
        let mut hashes = Vec::new();
        for _ in 0..length(fields, RUN_MAX, "hashes")? {
            let mut hash = [0; HASH_BYTES];
            hash.copy_from_slice(&fields.take(HASH_BYTES)?);
            hashes.push(hash);
        }
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(&fields.take(SIGNATURE_BYTES)?);
        warrants.push(Warrant { run, signature, hashes });
    }
    Ok(warrants)
}

pub(super) fn get(fields: &mut Fields) -> Result<(Vec<Entry>, Vec<Warrant>), EntryError> {
    let mut names = Numbered { stores: Vec::new(), origins: Vec::new() };
    for _ in 0..length(fields, NAMES_MAX, "stores")? {
        let store = text(fields, KEY_BYTES_MAX, "store")?;
        names.stores.push(StoreName::try_from(store).map_err(|_| EntryError::Field("store"))?);
    }
    for _ in 0..length(fields, NAMES_MAX, "origins")? {
        names.origins.push(fields.origin()?);
    }
    let mut entries = Vec::new();
    let mut last = Last::default();
    for _ in 0..length(fields, ENTRIES_MAX, "entries")? {
        entries.push(names.entry(fields, &mut last)?);
    }
    let warrants = warrants(fields, &names)?;
    Ok((entries, warrants))
}
