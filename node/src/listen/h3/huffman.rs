//! The Huffman code of field names and values (RFC 7541 appendix B, RFC 9204 4.1.2).
//!
//! The code is canonical: the lengths of the codes, in the order of the symbols, are all of it.

use bytes::{BufMut, BytesMut};

/// Bits of the code of each octet, and of the end-of-string symbol.
const BITS: [u8; 257] = [
    13, 23, 28, 28, 28, 28, 28, 28, 28, 24, 30, 28, 28, 30, 28, 28, 28, 28, 28, 28, 28, 28, 30, 28, 28, 28, 28, 28, 28,
    28, 28, 28, 6, 10, 10, 12, 13, 6, 8, 11, 10, 10, 8, 11, 8, 6, 6, 6, 5, 5, 5, 6, 6, 6, 6, 6, 6, 6, 7, 8, 15, 6, 12,
    10, 13, 6, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 7, 8, 7, 8, 13, 19, 13, 14, 6, 15, 5, 6,
    5, 6, 5, 6, 6, 6, 5, 7, 7, 6, 6, 6, 5, 6, 7, 6, 5, 5, 6, 7, 7, 7, 7, 7, 15, 11, 14, 13, 28, 20, 22, 20, 20, 22, 22,
    22, 23, 22, 23, 23, 23, 23, 23, 24, 23, 24, 24, 22, 23, 24, 23, 23, 23, 23, 21, 22, 23, 22, 23, 23, 24, 22, 21, 20,
    22, 22, 23, 23, 21, 23, 22, 22, 24, 21, 22, 23, 23, 21, 21, 22, 21, 23, 22, 23, 23, 20, 22, 22, 22, 23, 22, 22, 23,
    26, 26, 20, 19, 22, 23, 22, 25, 26, 26, 26, 27, 27, 26, 24, 25, 19, 21, 26, 27, 27, 26, 27, 24, 21, 21, 26, 26, 28,
    27, 27, 27, 20, 24, 20, 21, 22, 21, 21, 23, 22, 22, 25, 25, 24, 24, 26, 23, 26, 27, 26, 26, 27, 27, 27, 27, 27, 28,
    27, 27, 27, 27, 27, 26, 30,
];
/// Bits of the longest code.
const BITS_MAX: usize = 30;
/// Bits of the codes that are looked up at once.
const QUICK_BITS: u32 = 9;

/// What decoding needs, made from [`BITS`].
struct Code {
    /// Symbols by length of code, then by value.
    symbols: [u16; 257],
    /// For each length: the first code, how many there are, and where their symbols begin.
    lengths: [(u32, u32, u32); BITS_MAX + 1],
    /// For each first [`QUICK_BITS`] bits: symbol and length of a code that fits in them. Length 0: it is longer.
    quick: [(u8, u8); 1 << QUICK_BITS],
}

static CODE: Code = Code::new();

impl Code {
    // Everything that is narrowed here is below 257.
    #[allow(clippy::cast_possible_truncation)]
    const fn new() -> Self {
        let mut code = Self { symbols: [0; 257], lengths: [(0, 0, 0); BITS_MAX + 1], quick: [(0, 0); 1 << QUICK_BITS] };
        let (mut next, mut placed, mut bits) = (0_u32, 0, 1);
        while bits <= BITS_MAX {
            next <<= 1;
            let (first, begin) = (next, placed);
            let mut symbol = 0;
            while symbol < BITS.len() {
                if BITS[symbol] as usize == bits {
                    code.symbols[placed as usize] = symbol as u16;
                    if bits <= QUICK_BITS as usize {
                        let spare = QUICK_BITS - bits as u32;
                        let mut rest = 0;
                        while rest < 1 << spare {
                            code.quick[((next << spare) | rest) as usize] = (symbol as u8, bits as u8);
                            rest += 1;
                        }
                    }
                    next += 1;
                    placed += 1;
                }
                symbol += 1;
            }
            code.lengths[bits] = (first, placed - begin, begin);
            bits += 1;
        }
        code
    }
}

/// Decodes to the end of `out`. `None` if it is no such code: the end-of-string symbol, or a last octet that is filled with
/// anything but its first bits (RFC 7541 5.2).
pub(super) fn decode(coded: &[u8], out: &mut BytesMut) -> Option<()> {
    // Bits that wait, the next one highest.
    let (mut waiting, mut count) = (0_u64, 0_u32);
    let mut coded = coded.iter();
    loop {
        while count <= 56 {
            let Some(&octet) = coded.next() else { break };
            waiting |= u64::from(octet) << (56 - count);
            count += 8;
        }
        if count == 0 {
            return Some(());
        }
        let Some((symbol, bits)) = symbol(waiting).filter(|(_, bits)| *bits <= count) else {
            // No whole code is left: RFC 7541 5.2 wants less than an octet of ones.
            let filled = count < 8 && waiting >> (64 - count) == (1 << count) - 1;
            return filled.then_some(());
        };
        out.put_u8(u8::try_from(symbol).ok()?);
        waiting <<= bits;
        count -= bits;
    }
}

/// The symbol at the top of `waiting`, and the bits of its code.
fn symbol(waiting: u64) -> Option<(u16, u32)> {
    let (symbol, bits) = CODE.quick[(waiting >> (64 - QUICK_BITS)) as usize & ((1 << QUICK_BITS) - 1)];
    if bits > 0 {
        return Some((u16::from(symbol), u32::from(bits)));
    }
    (QUICK_BITS as usize + 1..=BITS_MAX).find_map(|bits| {
        let (first, codes, begin) = CODE.lengths[bits];
        let code = u32::try_from(waiting >> (64 - bits)).ok()?;
        let place = code.checked_sub(first).filter(|place| *place < codes)?;
        Some((CODE.symbols[(begin + place) as usize], u32::try_from(bits).ok()?))
    })
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    /// Encodes, slowly.
    pub(crate) fn encode(text: &[u8]) -> Vec<u8> {
        let mut bits = Vec::new();
        for octet in text {
            let length = usize::from(BITS[usize::from(*octet)]);
            let (first, _, begin) = CODE.lengths[length];
            let place = CODE.symbols[begin as usize..].iter().position(|s| *s == u16::from(*octet)).unwrap();
            let code = first + u32::try_from(place).unwrap();
            bits.extend((0..length).rev().map(|bit| code >> bit & 1 == 1));
        }
        bits.resize(bits.len().next_multiple_of(8), true);
        bits.chunks(8).map(|octet| octet.iter().fold(0, |octet, bit| octet << 1 | u8::from(*bit))).collect()
    }

    fn decoded(coded: &[u8]) -> Option<Vec<u8>> {
        let mut out = BytesMut::new();
        decode(coded, &mut out).map(|()| out.to_vec())
    }

    #[test]
    fn the_examples_of_the_standard_decode() {
        // RFC 7541 C.4 and C.6.
        for (coded, text) in [
            ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
            ("a8eb10649cbf", "no-cache"),
            ("25a849e95bb8e8b4bf", "custom-value"),
            ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
            ("9d29ad171863c78f0b97c8e9ae82ae43d3", "https://www.example.com"),
        ] {
            let coded = hex(coded);
            assert_eq!(decoded(&coded).as_deref(), Some(text.as_bytes()));
            assert_eq!(encode(text.as_bytes()), coded);
        }
    }

    fn hex(text: &str) -> Vec<u8> {
        (0..text.len()).step_by(2).map(|at| u8::from_str_radix(&text[at..at + 2], 16).unwrap()).collect()
    }

    #[test]
    fn every_octet_has_its_code_of_the_standard() {
        // RFC 7541 B: the first, some in the middle and the last codes.
        for (octet, code) in
            [(0, "ffc7"), (b'\n', "fffffff3"), (0xff, "fffffbbf"), (b'\\', "fffe1f"), (249, "ffffffef")]
        {
            assert_eq!(encode(&[octet])[..], hex(code), "{octet}");
        }
        let all: Vec<u8> = (0..=255).collect();
        assert_eq!(decoded(&encode(&all)), Some(all));
    }

    #[test]
    fn what_is_no_code_is_refused() {
        for bad in [
            // The end of string itself; a whole octet of filling; filling with zeros.
            &[0xff, 0xff, 0xff, 0xff][..],
            &[0x1f, 0xff],
            &[0x18],
            &[0xff],
        ] {
            assert_eq!(decoded(bad), None, "{bad:02x?}");
        }
        assert_eq!(decoded(&[]), Some(Vec::new()));
    }

    proptest::proptest! {
        #[test]
        fn what_is_encoded_decodes(text: Vec<u8>) {
            proptest::prop_assert_eq!(decoded(&encode(&text)), Some(text));
        }

        #[test]
        fn no_bytes_panic_or_grow_more_than_eight_fifths(bytes: Vec<u8>) {
            if let Some(text) = decoded(&bytes) {
                proptest::prop_assert!(text.len() * 5 <= bytes.len() * 8);
            }
        }
    }
}
