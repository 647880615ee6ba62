//! Rows: how records, the index by origin and the node's own facts lie in one ordered engine.
//!
//! | row | key | value |
//! |---|---|---|
//! | record | `d` store `0` key | all entries of the key |
//! | index | `o` node `0` incarnation seq | what a sketch needs, then the record's row |
//! | end | `x` milliseconds node `0` incarnation seq | the record's row |
//! | vector | `v` node `0` incarnation | how far the origin is complete |
//! | warrant | `w` node `0` incarnation last seq | what is known of a signed run of writes |
//! | key | `k` node `0` incarnation | the origin's public key, and what proves it |
//! | home | `h` store | who decides the store's writes |
//! | fact | `m` name | layout, incarnation, signer, place, clock, cut, floor, bootstrap |
//!
//! Catch-up is a range scan of the index, collection one of the ends. Names hold no zero byte, so the zero ends them
//! unambiguously.

use selvage_config::{NodeName, StoreName};

use crate::entry::{Dot, Entry, Key, Origin};
use crate::sketch::{Item, Span, item_of};

/// The version of this layout. Version 1 had neither ends nor sketches, version 2 no warrants.
pub(crate) const VERSION: u64 = 3;

/// The prefix of all rows of the version vector.
pub(crate) const VECTOR: &[u8] = b"v";
/// This node's incarnation.
pub(crate) const INCARNATION: &[u8] = b"mincarnation";
/// The secret half of this incarnation's key.
pub(crate) const SIGNER: &[u8] = b"msigner";
/// Where the directory was when the incarnation began.
pub(crate) const PLACE: &[u8] = b"mplace";
/// The clock's high-water mark.
pub(crate) const CLOCK: &[u8] = b"mclock";
/// The version of the layout.
pub(crate) const LAYOUT: &[u8] = b"mlayout";
/// Every delete up to this was processed.
pub(crate) const CUT: &[u8] = b"mcut";
/// Mortal entries up to this may have been dropped.
pub(crate) const FLOOR: &[u8] = b"mfloor";
/// How far a bootstrap has come.
pub(crate) const BOOTSTRAP: &[u8] = b"mbootstrap";
/// The prefix of all records.
pub(crate) const RECORDS: &[u8] = b"d";
/// The prefix of the whole index.
pub(crate) const INDEX: &[u8] = b"o";
/// The prefix of all warrants.
pub(crate) const WARRANTS: &[u8] = b"w";
/// The prefix of all keys of origins.
pub(crate) const KEYS: &[u8] = b"k";
/// The prefix of all homes.
pub(crate) const HOMES: &[u8] = b"h";
/// The prefix of all ends.
pub(crate) const ENDS: &[u8] = b"x";

const NUMBER_BYTES: usize = 8;

/// The row of a store's home.
pub(crate) fn home(store: &StoreName) -> Vec<u8> {
    [HOMES, store.as_str().as_bytes()].concat()
}

/// The store whose home a row is of.
pub(crate) fn home_store(row: &[u8]) -> Option<StoreName> {
    std::str::from_utf8(row.strip_prefix(HOMES)?).ok()?.parse().ok()
}

pub(crate) fn record(key: &Key) -> Vec<u8> {
    let mut row = records(&key.store);
    row.extend_from_slice(key.name.as_bytes());
    row
}

/// The prefix of all records of a store.
pub(crate) fn records(store: &StoreName) -> Vec<u8> {
    [b"d", store.as_str().as_bytes(), &[0]].concat()
}

/// The prefix of all records of the store whose record this row is; none for other rows.
pub(crate) fn class_of(row: &[u8]) -> Option<&[u8]> {
    let end = row.starts_with(b"d").then(|| row.iter().position(|byte| *byte == 0)).flatten()?;
    row.get(..=end)
}

pub(crate) fn index(dot: &Dot) -> Vec<u8> {
    let mut row = indices(&dot.origin);
    row.extend_from_slice(&dot.seq.to_be_bytes());
    row
}

/// The prefix of the index of an origin.
pub(crate) fn indices(origin: &Origin) -> Vec<u8> {
    origin_row(b"o", origin)
}

/// The value of an entry's row of the index.
pub(crate) fn index_value(entry: &Entry, row: &[u8]) -> Vec<u8> {
    let span = Span::of(entry).map_or(0, |span| span.number() + 1);
    [&[entry.taste()][..], &span.to_be_bytes(), row].concat()
}

/// The record's row that a row of the index names.
pub(crate) fn index_row(value: &[u8]) -> Option<&[u8]> {
    value.get(1 + NUMBER_BYTES..)
}

/// The item of a row of the index, and the span in which it ends.
pub(crate) fn index_item(row: &[u8], value: &[u8]) -> Option<(Item, Option<Span>)> {
    let origin = origin_of(row.get(..row.len().checked_sub(NUMBER_BYTES)?)?, INDEX)?;
    let dot = Dot { origin, seq: index_seq(row)? };
    let span = number(value.get(1..=NUMBER_BYTES)?)?;
    Some((item_of(&dot, *value.first()?), span.checked_sub(1).map(Span::from_number)))
}

/// The row of a mortal entry's end.
pub(crate) fn end(mortal_ms: u64, dot: &Dot) -> Vec<u8> {
    [&end_of(mortal_ms), &index(dot)[1..]].concat()
}

/// The least row of what ends at this time or later.
pub(crate) fn end_of(mortal_ms: u64) -> Vec<u8> {
    [ENDS, &mortal_ms.to_be_bytes()].concat()
}

/// When the entry of a row of ends does.
pub(crate) fn end_ms(row: &[u8]) -> Option<u64> {
    number(row.get(1..=NUMBER_BYTES)?)
}

/// The key of a record's row.
pub(crate) fn key(row: &[u8]) -> Option<Key> {
    let rest = row.strip_prefix(RECORDS)?;
    let zero = rest.iter().position(|byte| *byte == 0)?;
    let text = |bytes: &[u8]| std::str::from_utf8(bytes).ok().map(str::to_owned);
    Some(Key { store: StoreName::try_from(text(&rest[..zero])?).ok()?, name: text(&rest[zero + 1..])? })
}

/// The sequence number of a row of the index.
pub(crate) fn index_seq(row: &[u8]) -> Option<u64> {
    number(row.get(row.len().checked_sub(NUMBER_BYTES)?..)?)
}

/// The row of the warrant whose run ends with this write.
pub(crate) fn warrant(origin: &Origin, last: u64) -> Vec<u8> {
    [warrants(origin).as_slice(), &last.to_be_bytes()].concat()
}

/// The prefix of the warrants of an origin.
pub(crate) fn warrants(origin: &Origin) -> Vec<u8> {
    origin_row(WARRANTS, origin)
}

/// The origin and the last number of a row of warrants.
pub(crate) fn warrant_of(row: &[u8]) -> Option<(Origin, u64)> {
    let origin = origin_of(row.get(..row.len().checked_sub(NUMBER_BYTES)?)?, WARRANTS)?;
    Some((origin, index_seq(row)?))
}

/// The row of an origin's public key.
pub(crate) fn public_key(origin: &Origin) -> Vec<u8> {
    origin_row(KEYS, origin)
}

/// The origin of a row of keys.
pub(crate) fn key_origin(row: &[u8]) -> Option<Origin> {
    origin_of(row, KEYS)
}

pub(crate) fn vector(origin: &Origin) -> Vec<u8> {
    origin_row(VECTOR, origin)
}

/// The origin of a row of the version vector.
pub(crate) fn vector_origin(row: &[u8]) -> Option<Origin> {
    origin_of(row, VECTOR)
}

fn origin_of(row: &[u8], kind: &[u8]) -> Option<Origin> {
    let rest = row.strip_prefix(kind)?;
    let (name, incarnation) = rest.split_at_checked(rest.len().checked_sub(NUMBER_BYTES + 1)?)?;
    let node: NodeName = std::str::from_utf8(name).ok()?.parse().ok()?;
    Some(Origin { node, incarnation: number(incarnation.strip_prefix(&[0])?)? })
}

/// A number as the engine holds it.
pub(crate) fn number(bytes: &[u8]) -> Option<u64> {
    bytes.try_into().ok().map(u64::from_be_bytes)
}

fn origin_row(kind: &[u8], origin: &Origin) -> Vec<u8> {
    [kind, origin.node.as_str().as_bytes(), &[0], &origin.incarnation.to_be_bytes()].concat()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn rows_give_back_what_they_were_made_of() {
        let origin = Origin { node: "fra-1".parse().unwrap(), incarnation: 7 };
        assert_eq!(vector_origin(&vector(&origin)), Some(origin.clone()));
        assert_eq!(index_seq(&index(&Dot { origin: origin.clone(), seq: 300 })), Some(300));
        assert!(index(&Dot { origin: origin.clone(), seq: 300 }) > index(&Dot { origin, seq: 7 }));
        for bad in [&b""[..], b"v", b"vfra", b"mclock", b"vFRA\x0012345678"] {
            assert_eq!(vector_origin(bad), None);
        }
        assert_eq!(index_seq(b"o"), None);
        let at = Origin { node: "fra-1".parse().unwrap(), incarnation: 7 };
        assert_eq!(warrant_of(&warrant(&at, 300)), Some((at.clone(), 300)));
        assert_eq!(key_origin(&public_key(&at)), Some(at));
        assert_eq!(warrant_of(b"w"), None);
        assert!(end_of(7) < end_of(300));
        assert_eq!(
            end_ms(&end(300, &Dot { origin: Origin { node: "a".parse().unwrap(), incarnation: 1 }, seq: 1 })),
            Some(300)
        );
        let at = Key { store: "app/s".parse().unwrap(), name: "a\0b".into() };
        assert_eq!(key(&record(&at)), Some(at));
        assert_eq!(key(b"dapp"), None);
    }

    #[test]
    fn the_rows_of_one_name_are_not_a_prefix_of_anothers() {
        let row = |node: &str| indices(&Origin { node: node.parse().unwrap(), incarnation: 1 });
        assert!(!row("fra-10").starts_with(&row("fra-1")));
        let store = |name: &str| records(&name.parse().unwrap());
        assert!(!store("a/b-c").starts_with(&store("a/b")));
    }
}
