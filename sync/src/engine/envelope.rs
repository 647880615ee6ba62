//! The envelope of a row: what it holds and a checksum over key and value.
//!
//! | byte | |
//! |---|---|
//! | 0 | [`INLINE`] or [`FILED`] |
//! | … | the value; or of a filed one its length and the SHA-256 that names its file |
//! | last 8 | the first 8 bytes of SHA-256 over the key's length, the key and all before |
//!
//! The key is in the sum, so a row that ended up under another key is as corrupt as one with a flipped bit.

use bytes::Bytes;
use ring::digest::{Context, SHA256};

use super::Corrupt;

/// The value follows.
const INLINE: u8 = 0;
/// The value is in a file of its own.
const FILED: u8 = 1;

const SUM_BYTES: usize = 8;
const HASH_BYTES: usize = 32;

/// The SHA-256 of a value, which names its file.
pub(super) type Hash = [u8; HASH_BYTES];

/// What a row says of its value.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Sealed {
    /// It is this.
    Inline(Bytes),
    /// It is in the file of this name and has this length.
    Filed { length: u64, hash: Hash },
}

/// The row of `key` with a value.
pub(super) fn inline(key: &[u8], value: &[u8]) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + value.len() + SUM_BYTES);
    out.push(INLINE);
    out.extend_from_slice(value);
    summed(key, out)
}

/// The row of `key` whose value is in a file.
pub(super) fn filed(key: &[u8], length: u64, hash: &Hash) -> Vec<u8> {
    let mut out = Vec::with_capacity(1 + 8 + HASH_BYTES + SUM_BYTES);
    out.push(FILED);
    out.extend_from_slice(&length.to_be_bytes());
    out.extend_from_slice(hash);
    summed(key, out)
}

/// What the row of `key` holds.
pub(super) fn open(key: &[u8], row: &Bytes) -> Result<Sealed, Corrupt> {
    let body = row.len().checked_sub(SUM_BYTES).filter(|length| *length > 0).ok_or(Corrupt)?;
    if sum(key, &row[..body]) != row[body..] {
        return Err(Corrupt);
    }
    let value = row.slice(1..body);
    match row[0] {
        INLINE => Ok(Sealed::Inline(value)),
        FILED => {
            let (length, hash) = value.split_at_checked(8).ok_or(Corrupt)?;
            let length = u64::from_be_bytes(length.try_into().map_err(|_| Corrupt)?);
            Ok(Sealed::Filed { length, hash: hash.try_into().map_err(|_| Corrupt)? })
        }
        _ => Err(Corrupt),
    }
}

/// The SHA-256 of a value.
pub(super) fn hash(value: &[u8]) -> Hash {
    let mut hash = [0; HASH_BYTES];
    hash.copy_from_slice(ring::digest::digest(&SHA256, value).as_ref());
    hash
}

fn summed(key: &[u8], mut out: Vec<u8>) -> Vec<u8> {
    let sum = sum(key, &out);
    out.extend_from_slice(&sum);
    out
}

fn sum(key: &[u8], body: &[u8]) -> [u8; SUM_BYTES] {
    let mut context = Context::new(&SHA256);
    context.update(&(key.len() as u64).to_be_bytes());
    context.update(key);
    context.update(body);
    let mut sum = [0; SUM_BYTES];
    sum.copy_from_slice(&context.finish().as_ref()[..SUM_BYTES]);
    sum
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    proptest! {
        #[test]
        fn what_was_sealed_is_opened(key in ".*", value in prop::collection::vec(any::<u8>(), 0..100)) {
            let row = Bytes::from(inline(key.as_bytes(), &value));
            prop_assert_eq!(open(key.as_bytes(), &row), Ok(Sealed::Inline(value.clone().into())));
            let row = Bytes::from(filed(key.as_bytes(), 7, &hash(&value)));
            prop_assert_eq!(open(key.as_bytes(), &row), Ok(Sealed::Filed { length: 7, hash: hash(&value) }));
        }

        #[test]
        fn a_flipped_bit_another_key_and_a_cut_are_corrupt(
            value in prop::collection::vec(any::<u8>(), 0..60),
            at in any::<prop::sample::Index>(),
            bit in 0_u8..8,
        ) {
            for row in [inline(b"key", &value), filed(b"key", 1, &hash(&value))] {
                let mut flipped = row.clone();
                let at = at.index(row.len());
                flipped[at] ^= 1 << bit;
                prop_assert_eq!(open(b"key", &flipped.into()), Err(Corrupt));
                prop_assert_eq!(open(b"kez", &row.clone().into()), Err(Corrupt));
                prop_assert_eq!(open(b"key", &Bytes::copy_from_slice(&row[..at])), Err(Corrupt));
            }
        }
    }
}
