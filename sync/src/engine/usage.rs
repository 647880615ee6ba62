//! What stores take: counted with every batch, and kept as rows beside what is counted.

use bytes::BufMut as _;

/// What rows take.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Usage {
    /// How many.
    pub rows: u64,
    /// Bytes of their keys and values.
    pub bytes: u64,
    /// How many of these bytes lie in the engine itself and not in files of their own.
    pub inline_bytes: u64,
}

/// What one row takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Weight {
    pub(super) bytes: u64,
    pub(super) inline_bytes: u64,
}

const BYTES: usize = 24;

impl Usage {
    pub(super) fn add(&mut self, weight: Weight) {
        self.rows += 1;
        self.bytes += weight.bytes;
        self.inline_bytes += weight.inline_bytes;
    }

    /// Never below zero: after damage what is counted may be less than what is removed.
    pub(super) fn remove(&mut self, weight: Weight) {
        self.rows = self.rows.saturating_sub(1);
        self.bytes = self.bytes.saturating_sub(weight.bytes);
        self.inline_bytes = self.inline_bytes.saturating_sub(weight.inline_bytes);
    }

    pub(super) fn encode(self) -> Vec<u8> {
        let mut out = Vec::with_capacity(BYTES);
        for number in [self.rows, self.bytes, self.inline_bytes] {
            out.put_u64(number);
        }
        out
    }

    pub(super) fn decode(bytes: &[u8]) -> Option<Self> {
        let (numbers, rest) = bytes.as_chunks::<8>();
        match (numbers, rest) {
            ([rows, bytes, inline], []) => {
                let [rows, bytes, inline_bytes] = [rows, bytes, inline].map(|number| u64::from_be_bytes(*number));
                Some(Self { rows, bytes, inline_bytes })
            }
            _ => None,
        }
    }
}

impl std::ops::AddAssign for Usage {
    fn add_assign(&mut self, other: Self) {
        self.rows += other.rows;
        self.bytes += other.bytes;
        self.inline_bytes += other.inline_bytes;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_usage_is_what_was_added_and_not_removed() {
        let mut usage = Usage::default();
        let weight = Weight { bytes: 10, inline_bytes: 4 };
        usage.add(weight);
        usage.add(weight);
        usage.remove(weight);
        assert_eq!(usage, Usage { rows: 1, bytes: 10, inline_bytes: 4 });
        assert_eq!(Usage::decode(&usage.encode()), Some(usage));
        usage.remove(weight);
        usage.remove(weight);
        assert_eq!(usage, Usage::default());
        assert_eq!(Usage::decode(b"short"), None);
        assert_eq!(Usage::decode(&[0; 32]), None);
    }
}
