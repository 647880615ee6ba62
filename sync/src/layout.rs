//! Rows: how records, the index by origin and the node's own facts lie in one ordered engine.
//!
//! | row | key | value |
//! |---|---|---|
//! | record | `d` store `0` key | all entries of the key |
//! | index | `o` node `0` incarnation seq | the record's key |
//! | vector | `v` node `0` incarnation | how far the origin is complete |
//! | fact | `m` name | incarnation, clock |
//!
//! Catch-up is a range scan of the index. Names hold no zero byte, so the zero ends them unambiguously.

use selvage_config::{NodeName, StoreName};

use crate::entry::{Dot, Key, Origin};

/// The prefix of all rows of the version vector.
pub(crate) const VECTOR: &[u8] = b"v";
/// This node's incarnation.
pub(crate) const INCARNATION: &[u8] = b"mincarnation";
/// The clock's high-water mark.
pub(crate) const CLOCK: &[u8] = b"mclock";

const NUMBER_BYTES: usize = 8;

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

/// The record's row that a row of the index names.
pub(crate) fn index_row(value: &[u8]) -> Option<&[u8]> {
    Some(value)
}

/// The sequence number of a row of the index.
pub(crate) fn index_seq(row: &[u8]) -> Option<u64> {
    number(row.get(row.len().checked_sub(NUMBER_BYTES)?..)?)
}

pub(crate) fn vector(origin: &Origin) -> Vec<u8> {
    origin_row(VECTOR, origin)
}

/// The origin of a row of the version vector.
pub(crate) fn vector_origin(row: &[u8]) -> Option<Origin> {
    let rest = row.strip_prefix(VECTOR)?;
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
    }

    #[test]
    fn the_rows_of_one_name_are_not_a_prefix_of_anothers() {
        let row = |node: &str| indices(&Origin { node: node.parse().unwrap(), incarnation: 1 });
        assert!(!row("fra-10").starts_with(&row("fra-1")));
        let store = |name: &str| records(&name.parse().unwrap());
        assert!(!store("a/b-c").starts_with(&store("a/b")));
    }
}
