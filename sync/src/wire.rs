//! What peers say to each other: frames of a 4-byte length, a type byte and a body.
//!
//! The first frame of each side is a [`Message::Hello`] with the versions it speaks. Frames of unknown type are
//! skipped, unless their type says that they must be understood. Every decoder checks every length before it
//! reads or allocates, and garbage is an error, never a panic.

pub(crate) mod entries;
mod proof;

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes};
use selvage_config::{NodeName, StoreName};

use self::entries::{bytes, length, number, put_bytes, put_number};
use crate::entry::{
    ENTRY_OVERHEAD_BYTES_MAX, Entry, EntryError, Fields, KEY_BYTES_MAX, Key, VALUE_BYTES_MAX, put_origin,
};
use crate::frontier::{ROWS_MAX, Row};
use crate::offset::Ping;
use crate::sketch::{Cell, Digest, Item, SHARDS, Span};
use crate::stamp::Stamp;
use crate::trust::{VOUCHER_PROOF_BYTES_MAX, Voucher};
use crate::vector::{ORIGINS_MAX, VersionVector};
use crate::warrant::Warrant;

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"selvage-kv/1";

/// The protocol's name on links of one placement: the dialer says which before its hello. Who does not know it refuses the
/// handshake.
pub const PLACED_ALPN: &[u8] = b"selvage-kv-placed/1";

/// The versions this build speaks. Version 1 had no reach, so a collected tombstone could come back by it; version 2 did
/// not say in a [`Row`] how far its node had collected, so what was deleted by a node that came back could. Version 3
/// answers no questions and knows no relays, version 4 knows no placements.
pub const VERSIONS: Versions = Versions { min: 3, max: 5 };

/// The first version that answers questions on streams of their own.
pub(crate) const QUESTIONS_SINCE: u16 = 4;

/// The first version that answers for stores that the asker does not hold.
pub(crate) const PLACEMENTS_SINCE: u16 = 5;

/// The first version that knows [`Reason::Relay`] and [`Reason::Relayed`].
pub(crate) const RELAYS_SINCE: u16 = 4;

/// Longest frame after its length field, bytes.
pub const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes of entries after which a batch is closed. One entry more may pass it.
pub const BATCH_BYTES: usize = 256 * 1024;

/// Bytes of a frame's length field.
pub const LENGTH_BYTES: usize = 4;

/// Keys that are asked for in one frame, at most.
const KEYS_MAX: usize = 1024;

/// Vouchers in one frame, at most.
pub(crate) const VOUCHERS_MAX: usize = 256;

/// Groups of cells in one frame, at most.
const GROUPS_MAX: usize = SHARDS + proof::SPANS_MAX;

/// Longest row key of a snapshot's place, bytes.
const PLACE_BYTES_MAX: usize = 2 * KEY_BYTES_MAX;

// A batch holds no more than this, so whatever we send fits a frame. A warrant takes less than what an entry counts.
const _: () =
    assert!(2 * BATCH_BYTES + VALUE_BYTES_MAX + ENTRY_OVERHEAD_BYTES_MAX + VECTOR_BYTES_MAX < FRAME_BYTES_MAX);
const _: () = assert!(VOUCHERS_MAX * (VOUCHER_PROOF_BYTES_MAX + 256) < FRAME_BYTES_MAX);
const VECTOR_BYTES_MAX: usize = ORIGINS_MAX * (2 + selvage_config::id::NAME_BYTES_MAX + 16) + 8;

const TYPE_HELLO: u8 = 1;
const TYPE_BATCH: u8 = 2;
const TYPE_ANNOUNCE: u8 = 3;
const TYPE_ASK: u8 = 4;
const TYPE_SNAPSHOT: u8 = 5;
const TYPE_PROVE: u8 = 6;
const TYPE_SYMBOLS: u8 = 7;
const TYPE_MORE: u8 = 8;
const TYPE_WANT: u8 = 9;
const TYPE_VOUCH: u8 = 10;
/// Types from here on must be understood: a peer that does not know one closes.
const TYPE_CRITICAL: u8 = 0x80;

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Versions {
    /// The newest version that both speak.
    pub fn agree(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

/// How far the sender has come with what is collected.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Reach {
    /// Every delete up to this was processed.
    pub cut: Stamp,
    /// Mortal entries up to this may have been dropped.
    pub floor: Stamp,
}

/// Why entries are sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reason {
    /// The sender has just written them.
    Push,
    /// So it has, and the receiver shall pass them on to the others of its region.
    Relay,
    /// The sender was told to pass them on.
    Relayed,
    /// The receiver lacks them by its vector.
    CatchUp,
    /// The receiver lacks them by its sketch, or asked for them. The last of these ends the answer.
    Repair,
}

/// Cells of one group of shards, or of one span.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Symbols {
    /// Of what.
    pub part: Part,
    /// The first cells.
    pub cells: Vec<Cell>,
}

/// What a sketch is of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Part {
    /// The `number`-th of `of` groups of shards.
    Group {
        /// Which.
        number: u8,
        /// Of how many: a power of two.
        of: u8,
    },
    /// A span.
    Span(Span),
}

/// One frame's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Who speaks, how, and what it has.
    Hello {
        /// The versions it speaks.
        versions: Versions,
        /// Its name, which must be that of its certificate.
        node: NodeName,
        /// What it has.
        vector: VersionVector,
        /// How far it has come.
        reach: Reach,
    },
    /// Entries.
    Batch {
        /// Why.
        reason: Reason,
        /// The sender's cut when it chose them.
        cut: Stamp,
        /// The entries.
        entries: Vec<Entry>,
        /// What proves that their origins wrote them.
        warrants: Vec<Warrant>,
        /// At the end of a catch-up: with what came before, the receiver now has all of this.
        complete: Option<VersionVector>,
    },
    /// What changed at the sender.
    Announce {
        /// Of which origins it has more, or less, than it said last, and how much.
        changed: VersionVector,
        /// How far it has come.
        reach: Reach,
        /// Its clock.
        ping: Ping,
        /// What it knows of others' promises, and its own.
        rows: Vec<Row>,
    },
    /// Send all you have, in the order of keys.
    Ask {
        /// What follows this place; empty for all.
        after: Bytes,
    },
    /// A part of all that the sender has.
    Snapshot {
        /// How far the sender has come.
        reach: Reach,
        /// What it had when it began.
        vector: VersionVector,
        /// All entries between the last place and this one.
        entries: Vec<Entry>,
        /// What proves that their origins wrote them.
        warrants: Vec<Warrant>,
        /// This place; none at the end.
        upto: Option<Bytes>,
    },
    /// Compare this with yours.
    Prove {
        /// Of every shard.
        digests: Vec<Digest>,
        /// Of every span after the floor.
        spans: BTreeMap<Span, u64>,
        /// The sender's floor.
        floor: Stamp,
    },
    /// The first cells of what differs; nothing if nothing does.
    Symbols(Vec<Symbols>),
    /// More cells of what could not be decoded.
    More(Vec<(Part, u64)>),
    /// Send these entries, and these whole records.
    Want {
        /// By item.
        items: Vec<Item>,
        /// By key.
        keys: Vec<Key>,
    },
    /// Keys of origins whose entries follow.
    Vouch(Vec<Voucher>),
}

/// A frame that is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than any frame may be.
    #[error("frame of {bytes} bytes, the limit is {FRAME_BYTES_MAX}")]
    TooLong {
        /// How long it says it is.
        bytes: usize,
    },
    /// Its type is unknown and must be understood.
    #[error("frame type {0} must be understood and is unknown")]
    Critical(u8),
    /// A vector of too many origins.
    #[error("vector of {0} origins, the limit is {ORIGINS_MAX}")]
    Origins(usize),
    /// A field is cut short or invalid.
    #[error("malformed frame")]
    Malformed(#[from] EntryError),
}

/// The length of the frame that a length field announces.
pub fn frame_length(field: [u8; LENGTH_BYTES]) -> Result<usize, WireError> {
    let bytes = usize::try_from(u32::from_be_bytes(field)).unwrap_or(usize::MAX);
    if bytes > FRAME_BYTES_MAX { Err(WireError::TooLong { bytes }) } else { Ok(bytes) }
}

/// The whole frame, length field included.
pub fn encode(message: &Message) -> Bytes {
    let mut out = vec![0; LENGTH_BYTES];
    match message {
        Message::Hello { versions, node, vector, reach } => {
            out.put_u8(TYPE_HELLO);
            out.put_u16(versions.min);
            out.put_u16(versions.max);
            out.put_u16(u16::try_from(node.as_str().len()).expect("a name is 63 bytes at most"));
            out.put_slice(node.as_str().as_bytes());
            put_vector(&mut out, vector);
            put_reach(&mut out, *reach);
        }
        Message::Batch { reason, cut, entries, warrants, complete } => {
            out.put_u8(TYPE_BATCH);
            out.put_u8(match reason {
                Reason::Push => 0,
                Reason::CatchUp => 1,
                Reason::Repair => 2,
                Reason::Relay => 3,
                Reason::Relayed => 4,
            });
            out.put_u64(cut.0);
            put_option(&mut out, complete.as_ref(), put_vector);
            entries::put(&mut out, entries, warrants);
        }
        Message::Announce { changed, reach, ping, rows } => {
            out.put_u8(TYPE_ANNOUNCE);
            put_vector(&mut out, changed);
            put_reach(&mut out, *reach);
            [ping.sent_ms, ping.echo_ms, ping.held_ms].iter().for_each(|ms| put_number(&mut out, *ms));
            put_rows(&mut out, rows);
        }
        Message::Ask { after } => {
            out.put_u8(TYPE_ASK);
            put_bytes(&mut out, after);
        }
        Message::Snapshot { reach, vector, entries, warrants, upto } => {
            out.put_u8(TYPE_SNAPSHOT);
            put_reach(&mut out, *reach);
            put_vector(&mut out, vector);
            put_option(&mut out, upto.as_ref(), |out, place| put_bytes(out, place));
            entries::put(&mut out, entries, warrants);
        }
        Message::Prove { digests, spans, floor } => {
            out.put_u8(TYPE_PROVE);
            out.put_u64(floor.0);
            proof::put_digests(&mut out, digests);
            proof::put_spans(&mut out, spans);
        }
        Message::Symbols(symbols) => {
            out.put_u8(TYPE_SYMBOLS);
            put_number(&mut out, symbols.len() as u64);
            for Symbols { part, cells } in symbols {
                put_part(&mut out, *part);
                proof::put_cells(&mut out, cells);
            }
        }
        Message::More(more) => {
            out.put_u8(TYPE_MORE);
            put_number(&mut out, more.len() as u64);
            for (part, cells) in more {
                put_part(&mut out, *part);
                put_number(&mut out, *cells);
            }
        }
        Message::Want { items, keys } => {
            out.put_u8(TYPE_WANT);
            proof::put_items(&mut out, items);
            put_number(&mut out, keys.len().min(KEYS_MAX) as u64);
            for key in keys.iter().take(KEYS_MAX) {
                put_bytes(&mut out, key.store.as_str().as_bytes());
                put_bytes(&mut out, key.name.as_bytes());
            }
        }
        Message::Vouch(vouchers) => {
            out.put_u8(TYPE_VOUCH);
            put_number(&mut out, vouchers.len().min(VOUCHERS_MAX) as u64);
            for voucher in vouchers.iter().take(VOUCHERS_MAX) {
                put_origin(&mut out, &voucher.origin);
                voucher.encode(&mut out);
            }
        }
    }
    patch_length(&mut out, 0);
    out.into()
}

/// The message in a frame's `body` (type byte first, without the length field); none if it may be skipped.
pub fn decode(body: Bytes) -> Result<Option<Message>, WireError> {
    if body.len() > FRAME_BYTES_MAX {
        return Err(WireError::TooLong { bytes: body.len() });
    }
    let mut fields = Fields::of(body);
    let kind = fields.u8()?;
    let message = match kind {
        TYPE_HELLO => {
            let versions = Versions { min: fields.u16()?, max: fields.u16()? };
            let node = fields.node()?;
            let vector = vector(&mut fields)?;
            // An older version ends here, and a newer one may append fields.
            let reach = if fields.is_empty() { Reach::default() } else { reach(&mut fields)? };
            return Ok(Some(Message::Hello { versions, node, vector, reach }));
        }
        TYPE_BATCH => {
            let reason = match fields.u8()? {
                0 => Reason::Push,
                1 => Reason::CatchUp,
                2 => Reason::Repair,
                3 => Reason::Relay,
                4 => Reason::Relayed,
                _ => return Err(EntryError::Field("reason").into()),
            };
            let cut = Stamp(fields.u64()?);
            let complete = option(&mut fields, vector)?;
            let (entries, warrants) = entries::get(&mut fields)?;
            Message::Batch { reason, cut, entries, warrants, complete }
        }
        TYPE_ANNOUNCE => {
            let (changed, reach) = (vector(&mut fields)?, reach(&mut fields)?);
            let mut ms = || number(&mut fields);
            let ping = Ping { sent_ms: ms()?, echo_ms: ms()?, held_ms: ms()? };
            Message::Announce { changed, reach, ping, rows: rows(&mut fields)? }
        }
        TYPE_ASK => Message::Ask { after: place(&mut fields)? },
        TYPE_SNAPSHOT => {
            let (reach, vector) = (reach(&mut fields)?, vector(&mut fields)?);
            let upto = option(&mut fields, place)?;
            let (entries, warrants) = entries::get(&mut fields)?;
            Message::Snapshot { reach, vector, entries, warrants, upto }
        }
        TYPE_PROVE => {
            let floor = Stamp(fields.u64()?);
            Message::Prove { floor, digests: proof::digests(&mut fields)?, spans: proof::spans(&mut fields)? }
        }
        TYPE_SYMBOLS => {
            let mut symbols = Vec::new();
            for _ in 0..length(&mut fields, GROUPS_MAX, "groups")? {
                symbols.push(Symbols { part: part(&mut fields)?, cells: proof::cells(&mut fields)? });
            }
            Message::Symbols(symbols)
        }
        TYPE_MORE => {
            let mut more = Vec::new();
            for _ in 0..length(&mut fields, GROUPS_MAX, "groups")? {
                more.push((part(&mut fields)?, number(&mut fields)?));
            }
            Message::More(more)
        }
        TYPE_WANT => {
            let items = proof::items(&mut fields)?;
            let mut keys = Vec::new();
            for _ in 0..length(&mut fields, KEYS_MAX, "keys")? {
                keys.push(key(&mut fields)?);
            }
            Message::Want { items, keys }
        }
        TYPE_VOUCH => {
            let mut vouchers = Vec::new();
            for _ in 0..length(&mut fields, VOUCHERS_MAX, "vouchers")? {
                let origin = fields.origin()?;
                vouchers.push(Voucher::decode(origin, &mut fields)?);
            }
            Message::Vouch(vouchers)
        }
        kind if kind >= TYPE_CRITICAL => return Err(WireError::Critical(kind)),
        _ => return Ok(None),
    };
    fields.end()?;
    Ok(Some(message))
}

fn put_option<T>(out: &mut Vec<u8>, value: Option<&T>, put: impl Fn(&mut Vec<u8>, &T)) {
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn option<T>(fields: &mut Fields, get: impl Fn(&mut Fields) -> Result<T, WireError>) -> Result<Option<T>, WireError> {
    match fields.u8()? {
        0 => Ok(None),
        1 => get(fields).map(Some),
        _ => Err(EntryError::Field("option").into()),
    }
}

fn put_reach(out: &mut Vec<u8>, reach: Reach) {
    out.put_u64(reach.cut.0);
    out.put_u64(reach.floor.0);
}

fn reach(fields: &mut Fields) -> Result<Reach, WireError> {
    Ok(Reach { cut: Stamp(fields.u64()?), floor: Stamp(fields.u64()?) })
}

fn put_rows(out: &mut Vec<u8>, rows: &[Row]) {
    put_number(out, rows.len().min(ROWS_MAX) as u64);
    for row in rows.iter().take(ROWS_MAX) {
        put_origin(out, &row.origin);
        out.put_u64(row.promise.0);
        put_number(out, row.seq);
        out.put_u64(row.cut.0);
        out.put_u64(row.rest);
        out.put_u64(row.floor.0);
    }
}

fn rows(fields: &mut Fields) -> Result<Vec<Row>, WireError> {
    let mut rows = Vec::new();
    for _ in 0..length(fields, ROWS_MAX, "rows")? {
        let origin = fields.origin()?;
        let (promise, seq) = (Stamp(fields.u64()?), number(fields)?);
        let (cut, rest) = (Stamp(fields.u64()?), fields.u64()?);
        rows.push(Row { origin, promise, seq, cut, rest, floor: Stamp(fields.u64()?) });
    }
    Ok(rows)
}

fn place(fields: &mut Fields) -> Result<Bytes, WireError> {
    Ok(bytes(fields, PLACE_BYTES_MAX, "place")?)
}

fn put_part(out: &mut Vec<u8>, part: Part) {
    match part {
        Part::Group { number, of } => out.put_slice(&[of, number]),
        Part::Span(span) => {
            out.put_u8(0);
            put_number(out, span.number());
        }
    }
}

fn part(fields: &mut Fields) -> Result<Part, WireError> {
    let of = fields.u8()?;
    if of == 0 {
        return Ok(Part::Span(Span::from_number(number(fields)?)));
    }
    let number = fields.u8()?;
    let fits = of.is_power_of_two() && usize::from(of) <= SHARDS && number < of;
    if fits { Ok(Part::Group { number, of }) } else { Err(EntryError::Field("group").into()) }
}

fn key(fields: &mut Fields) -> Result<Key, WireError> {
    let mut text = |what| {
        let bytes = bytes(fields, KEY_BYTES_MAX, what)?;
        std::str::from_utf8(&bytes).map(str::to_owned).map_err(|_| EntryError::Field(what))
    };
    let store = StoreName::try_from(text("store")?).map_err(|_| EntryError::Field("store"))?;
    Ok(Key { store, name: text("key")? })
}

fn patch_length(out: &mut [u8], start: usize) {
    let length = out.len() - start - LENGTH_BYTES;
    let length = u32::try_from(length).expect("a frame is 4 MiB at most");
    out[start..start + LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
}

pub(crate) fn put_vector(out: &mut Vec<u8>, vector: &VersionVector) {
    // What does not fit is left out: the receiver then has it sent once more, which is harmless.
    let count = vector.len().min(ORIGINS_MAX);
    out.put_u32(u32::try_from(count).expect("bounded above"));
    for (origin, seq) in vector.iter().take(count) {
        put_origin(out, origin);
        out.put_u64(seq);
    }
}

pub(crate) fn vector(fields: &mut Fields) -> Result<VersionVector, WireError> {
    let count = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
    if count > ORIGINS_MAX {
        return Err(WireError::Origins(count));
    }
    let mut pairs = Vec::new();
    for _ in 0..count {
        pairs.push((fields.origin()?, fields.u64()?));
    }
    Ok(pairs.into_iter().collect())
}

#[cfg(test)]
mod tests;
