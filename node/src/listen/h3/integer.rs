//! Integers: of variable length (RFC 9000 16), and with a prefix (RFC 7541 5.1, RFC 9204 4.1.1).

use bytes::BufMut;

/// Bytes of a variable-length integer at most.
pub(super) const BYTES_MAX: usize = 8;
/// The largest one.
pub(super) const MAX: u64 = (1 << 62) - 1;

/// The value and how many bytes it took. `None` if it is not all there.
pub(super) fn read(bytes: &[u8]) -> Option<(u64, usize)> {
    let length = 1 << (bytes.first()? >> 6);
    let value = bytes.get(..length)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    // The two bits that told the length are no part of the value.
    Some((value & (u64::MAX >> (66 - 8 * length)), length))
}

/// Writes a value of at most [`MAX`] in its shortest form.
#[allow(clippy::cast_possible_truncation)] // Each arm holds what fits.
pub(super) fn write(value: u64, out: &mut impl BufMut) {
    match value {
        0..0x40 => out.put_u8(value as u8),
        0x40..0x4000 => out.put_u16(0x4000 | value as u16),
        0x4000..0x4000_0000 => out.put_u32(0x8000_0000 | value as u32),
        _ => out.put_u64(0xc000_0000_0000_0000 | value),
    }
}

/// Takes an integer with a prefix of `bits` from the front of `bytes`. `None` if it is not all there, or beyond 2^32.
pub(super) fn read_prefixed(bytes: &mut &[u8], bits: u32) -> Option<u64> {
    let (first, mut rest) = bytes.split_first()?;
    let most = (1_u64 << bits) - 1;
    let mut value = u64::from(*first) & most;
    if value == most {
        // RFC 9204 4.1.1 asks for 62 bits; nothing that is taken here is longer than a field section.
        for shift in (0..32).step_by(7) {
            let (&next, after) = rest.split_first()?;
            rest = after;
            value += u64::from(next & 0x7f) << shift;
            if next & 0x80 == 0 {
                *bytes = rest;
                return Some(value);
            }
        }
        return None;
    }
    *bytes = rest;
    Some(value)
}

/// Writes an integer with a prefix of `bits`, above which the first byte has `flags`.
pub(super) fn write_prefixed(value: usize, flags: u8, bits: u32, out: &mut impl BufMut) {
    let most = (1_usize << bits) - 1;
    let small = |value: usize| u8::try_from(value & 0xff).unwrap_or(u8::MAX);
    if value < most {
        out.put_u8(flags | small(value));
        return;
    }
    out.put_u8(flags | small(most));
    let mut left = value - most;
    while left >= 0x80 {
        out.put_u8(small(left & 0x7f) | 0x80);
        left >>= 7;
    }
    out.put_u8(small(left));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn integers_read_as_the_standard_says() {
        // RFC 9000 A.1.
        for (bytes, value) in [
            (&[0xc2, 0x19, 0x7c, 0x5e, 0xff, 0x14, 0xe8, 0x8c][..], 151_288_809_941_952_652),
            (&[0x9d, 0x7f, 0x3e, 0x7d], 494_878_333),
            (&[0x7b, 0xbd], 15_293),
            (&[0x25], 37),
            (&[0x40, 0x25], 37),
        ] {
            assert_eq!(read(bytes), Some((value, bytes.len())));
            assert_eq!(read(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn prefixed_integers_read_as_the_standard_says() {
        // RFC 7541 C.1.
        for (bytes, bits, value) in [(&[0x0a][..], 5, 10), (&[0x1f, 0x9a, 0x0a], 5, 1_337), (&[0x2a], 8, 42)] {
            let mut rest = bytes;
            assert_eq!((read_prefixed(&mut rest, bits), rest.len()), (Some(value), 0));
            let mut written = Vec::new();
            write_prefixed(usize::try_from(value).unwrap(), 0, bits, &mut written);
            assert_eq!(written, bytes);
        }
        assert_eq!(read_prefixed(&mut &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff][..], 5), None);
        assert_eq!(read_prefixed(&mut &[0x1f][..], 5), None);
    }

    proptest::proptest! {
        #[test]
        fn what_is_written_is_read(value in 0..=MAX, bits in 1..=8_u32, small in 0..1_usize << 32) {
            let mut bytes = Vec::new();
            write(value, &mut bytes);
            proptest::prop_assert_eq!(read(&bytes), Some((value, bytes.len())));
            let mut bytes = Vec::new();
            write_prefixed(small, 0, bits, &mut bytes);
            proptest::prop_assert_eq!(read_prefixed(&mut &bytes[..], bits), Some(small as u64));
        }
    }
}
