//! A change of the database: rows that are put and rows that go, of both its tables, made whole or not at all.

/// Begins a written change, with the version of its form.
const FORM: &[u8] = b"SC1";
/// Bytes of one written change, or of one baseline.
pub(crate) const CHANGE_BYTES_MAX: usize = 1024 * 1024 * 1024;

/// Which rows.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Table {
    /// Apps, nodes, keys.
    Fleet,
    /// Who has which blobs and manifests.
    Registry,
}

/// One row as it shall be; without a value it goes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Row {
    pub(crate) table: Table,
    pub(crate) key: Vec<u8>,
    pub(crate) value: Option<Vec<u8>>,
}

/// Rows to be written.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Change(Vec<Row>);

impl Change {
    pub(crate) fn put(&mut self, table: Table, key: Vec<u8>, value: Vec<u8>) {
        self.0.push(Row { table, key, value: Some(value) });
    }

    pub(crate) fn remove(&mut self, table: Table, key: Vec<u8>) {
        self.0.push(Row { table, key, value: None });
    }

    pub(crate) fn rows(&self) -> &[Row] {
        &self.0
    }

    /// As it is told to other control planes: each row is its table, whether it stays, and key and value with the length
    /// of each before it, big-endian.
    pub(crate) fn write(&self) -> Vec<u8> {
        let mut bytes = FORM.to_vec();
        for Row { table, key, value } in &self.0 {
            bytes.push(match (table, value.is_some()) {
                (Table::Fleet, false) => 0,
                (Table::Fleet, true) => 1,
                (Table::Registry, false) => 2,
                (Table::Registry, true) => 3,
            });
            for part in std::iter::once(key).chain(value) {
                bytes.extend_from_slice(&(part.len() as u64).to_be_bytes());
                bytes.extend_from_slice(part);
            }
        }
        bytes
    }

    /// Reads what [`Change::write`] wrote. None of anything else.
    pub(crate) fn read(bytes: &[u8]) -> Option<Self> {
        let mut rest = bytes.strip_prefix(FORM)?;
        let mut rows = Vec::new();
        while let Some((kind, after)) = rest.split_first() {
            let (table, stays) = match kind {
                0 => (Table::Fleet, false),
                1 => (Table::Fleet, true),
                2 => (Table::Registry, false),
                3 => (Table::Registry, true),
                _ => return None,
            };
            rest = after;
            let key = part(&mut rest)?;
            let value = if stays { Some(part(&mut rest)?) } else { None };
            rows.push(Row { table, key, value });
        }
        Some(Self(rows))
    }
}

fn part(rest: &mut &[u8]) -> Option<Vec<u8>> {
    let (length, after) = rest.split_first_chunk::<8>()?;
    let length = usize::try_from(u64::from_be_bytes(*length)).ok()?;
    let (part, after) = after.split_at_checked(length)?;
    *rest = after;
    Some(part.to_vec())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn rows() -> impl Strategy<Value = Change> {
        let row = (any::<bool>(), any::<Vec<u8>>(), any::<Option<Vec<u8>>>()).prop_map(|(fleet, key, value)| Row {
            table: if fleet { Table::Fleet } else { Table::Registry },
            key,
            value,
        });
        proptest::collection::vec(row, 0..8).prop_map(Change)
    }

    proptest! {
        #[test]
        fn a_change_is_read_as_it_was_written(change in rows()) {
            prop_assert_eq!(Change::read(&change.write()), Some(change));
        }

        #[test]
        fn no_bytes_panic_and_one_cut_short_is_none(change in rows(), cut in 1..9_usize, any: Vec<u8>) {
            let _ = Change::read(&[FORM, any.as_slice()].concat());
            let bytes = change.write();
            // Cut within its last row, it is no change.
            if let Some(last) = change.0.last() {
                let length = 9 + last.key.len() + last.value.as_ref().map_or(0, |value| 8 + value.len());
                prop_assert_eq!(Change::read(&bytes[..bytes.len() - cut.min(length - 1)]), None);
            }
        }
    }
}
