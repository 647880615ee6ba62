//! Field sections: QPACK without a dynamic table (RFC 9204 4.5). We tell clients that ours has a capacity of 0, so that
//! whatever refers to one is wrong.

use std::sync::LazyLock;

use bytes::{BufMut, Bytes, BytesMut};
use http::{HeaderMap, HeaderName, HeaderValue, StatusCode};

use super::code::{Code, Wrong};
use super::huffman;
use super::integer::{read_prefixed, write_prefixed};
use super::table::{TABLE, places};

/// What a field costs besides its bytes (RFC 9114 4.2.2).
const FIELD_BYTES: usize = 32;

/// Values of the static table. Names and values of it are cloned without a copy.
static VALUES: LazyLock<Vec<HeaderValue>> =
    LazyLock::new(|| TABLE.iter().map(|(_, value)| HeaderValue::from_static(value)).collect());
/// Names of the static table but those of pseudo-header fields.
static NAMES: LazyLock<Vec<Option<HeaderName>>> = LazyLock::new(|| {
    let name = |(name, _): &(&'static str, &str)| (!name.starts_with(':')).then(|| HeaderName::from_static(name));
    TABLE.iter().map(name).collect()
});

/// The name of a field.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Name {
    /// Of a pseudo-header field, with its colon.
    Pseudo(Bytes),
    /// Of a regular one.
    Regular(HeaderName),
}

/// Why a section is not taken.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Refused {
    /// Its fields are larger than we told that we take (RFC 9114 4.2.2).
    TooLarge,
    /// It is wrong.
    Wrong(Wrong),
}

impl From<Wrong> for Refused {
    fn from(wrong: Wrong) -> Self {
        Self::Wrong(wrong)
    }
}

fn undecodable(reason: &'static str) -> Refused {
    Wrong::connection(Code::QpackDecompressionFailed, reason).into()
}

/// Decodes a section and gives its fields in order to `take`.
pub(super) fn decode(
    section: &Bytes,
    bytes_max: usize,
    mut take: impl FnMut(Name, HeaderValue) -> Result<(), Wrong>,
) -> Result<(), Refused> {
    let mut rest = &section[..];
    let prefix = (read_prefixed(&mut rest, 8), read_prefixed(&mut rest, 7));
    if prefix.0 != Some(0) || prefix.1.is_none() {
        return Err(undecodable("field section refers to a dynamic table"));
    }
    let mut scratch = BytesMut::new();
    let mut size = 0;
    while let Some(&first) = rest.first() {
        let (name, value) = field(section, first, &mut rest, &mut scratch)?;
        let name_length = match &name {
            Text::Static(index) => TABLE[*index].0.len(),
            Text::Own(name) => name.len(),
        };
        let value_length = match &value {
            Text::Static(index) => TABLE[*index].1.len(),
            Text::Own(value) => value.len(),
        };
        size += name_length + value_length + FIELD_BYTES;
        if size > bytes_max {
            return Err(Refused::TooLarge);
        }
        take(name.into_name()?, value.into_value()?)?;
    }
    Ok(())
}

/// A name or a value.
enum Text {
    /// Of this entry of the static table.
    Static(usize),
    /// As it was sent.
    Own(Bytes),
}

impl Text {
    fn into_name(self) -> Result<Name, Wrong> {
        let own = match self {
            Self::Static(index) => match &NAMES[index] {
                Some(name) => return Ok(Name::Regular(name.clone())),
                None => return Ok(Name::Pseudo(Bytes::from_static(TABLE[index].0.as_bytes()))),
            },
            Self::Own(own) => own,
        };
        if own.first() == Some(&b':') {
            return Ok(Name::Pseudo(own));
        }
        // RFC 9114 4.2: upper case is malformed, and so is what is no token.
        HeaderName::from_lowercase(&own).map(Name::Regular).map_err(|_| Wrong::malformed("field name"))
    }

    fn into_value(self) -> Result<HeaderValue, Wrong> {
        let own = match self {
            Self::Static(index) => return Ok(VALUES[index].clone()),
            Self::Own(own) => own,
        };
        // RFC 9110 5.5: white space may stand within a value, not around it.
        let padded = [own.first(), own.last()].into_iter().flatten().any(|end| matches!(end, b' ' | b'\t'));
        match HeaderValue::from_maybe_shared(own) {
            Ok(value) if !padded => Ok(value),
            _ => Err(Wrong::malformed("field value")),
        }
    }
}

/// One field line (RFC 9204 4.5.2, 4.5.4, 4.5.6).
fn field(section: &Bytes, first: u8, rest: &mut &[u8], scratch: &mut BytesMut) -> Result<(Text, Text), Refused> {
    if first & 0x80 != 0 {
        let index = table_index(rest, 6, first & 0x40 != 0)?;
        return Ok((Text::Static(index), Text::Static(index)));
    }
    let name = match first >> 5 {
        // 01NT: with a name of a table.
        0b010 | 0b011 => Text::Static(table_index(rest, 4, first & 0x10 != 0)?),
        // 001NH: with a name of its own.
        0b001 => Text::Own(string(section, rest, 3, scratch)?),
        // 0001 and 0000: after the base, of the dynamic table.
        _ => return Err(undecodable("field refers to a dynamic table")),
    };
    let value = string(section, rest, 7, scratch)?;
    Ok((name, Text::Own(value)))
}

fn table_index(rest: &mut &[u8], bits: u32, is_static: bool) -> Result<usize, Refused> {
    let index = read_prefixed(rest, bits).and_then(|index| usize::try_from(index).ok());
    match index {
        Some(index) if is_static && index < TABLE.len() => Ok(index),
        Some(_) if is_static => Err(undecodable("field refers to nothing")),
        Some(_) => Err(undecodable("field refers to a dynamic table")),
        None => Err(undecodable("field is cut off")),
    }
}

/// A string with a flag for Huffman above the `bits` of its length (RFC 9204 4.1.2).
fn string(section: &Bytes, rest: &mut &[u8], bits: u32, scratch: &mut BytesMut) -> Result<Bytes, Refused> {
    let coded = rest.first().is_some_and(|first| first >> bits & 1 == 1);
    let length = read_prefixed(rest, bits).and_then(|length| usize::try_from(length).ok());
    let text = length.and_then(|length| rest.split_at_checked(length));
    let Some((text, after)) = text else { return Err(undecodable("field is cut off")) };
    *rest = after;
    if !coded {
        return Ok(section.slice_ref(text));
    }
    // Whatever a section holds grows to eight fifths of it at most: each code has 5 bits or more.
    scratch.reserve(text.len() * 8 / 5 + 1);
    huffman::decode(text, scratch).ok_or_else(|| undecodable("string is no Huffman code"))?;
    Ok(scratch.split().freeze())
}

/// Encodes the head of an answer.
pub(super) fn encode_head(status: StatusCode, fields: &HeaderMap, out: &mut BytesMut) {
    out.put_slice(&[0, 0]);
    encode_field(":status", status.as_str().as_bytes(), out);
    encode_fields(fields, out);
}

/// Encodes trailers.
pub(super) fn encode_trailers(fields: &HeaderMap, out: &mut BytesMut) {
    out.put_slice(&[0, 0]);
    encode_fields(fields, out);
}

fn encode_fields(fields: &HeaderMap, out: &mut BytesMut) {
    for (name, value) in fields {
        encode_field(name.as_str(), value.as_bytes(), out);
    }
}

/// Without Huffman: it would make a head a fifth shorter and cost more than all else here.
fn encode_field(name: &str, value: &[u8], out: &mut BytesMut) {
    let places = places(name);
    if let Some(place) = places.iter().find(|place| TABLE[usize::from(**place)].1.as_bytes() == value) {
        write_prefixed(usize::from(*place), 0xc0, 6, out);
        return;
    }
    match places.first() {
        Some(place) => write_prefixed(usize::from(*place), 0x50, 4, out),
        None => {
            write_prefixed(name.len(), 0x20, 3, out);
            out.put_slice(name.as_bytes());
        }
    }
    write_prefixed(value.len(), 0, 7, out);
    out.put_slice(value);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn fields(section: &[u8], bytes_max: usize) -> Result<Vec<(String, String)>, Refused> {
        let mut all = Vec::new();
        decode(&Bytes::copy_from_slice(section), bytes_max, |name, value| {
            let name = match name {
                Name::Pseudo(name) => String::from_utf8(name.to_vec()).unwrap(),
                Name::Regular(name) => name.to_string(),
            };
            all.push((name, value.to_str().unwrap().to_owned()));
            Ok(())
        })?;
        Ok(all)
    }

    fn code(section: &[u8]) -> Option<Code> {
        match fields(section, 1_000) {
            Err(Refused::Wrong(wrong)) => Some(wrong.code),
            _ => None,
        }
    }

    #[test]
    fn every_form_of_a_field_line_is_read() {
        // RFC 9204 B.1 is the first.
        for (section, name, value) in [
            (&b"\x00\x00\x51\x0b/index.html"[..], ":path", "/index.html"),
            (b"\0\0\xd1", ":method", "GET"),
            (b"\0\0\xff\x23", "x-frame-options", "sameorigin"),
            (b"\0\0\x7f\x50\x01x", "user-agent", "x"),
            (b"\0\0\x23abc\x01d", "abc", "d"),
            (b"\0\0\x27\x00abcdefg\x00", "abcdefg", ""),
            (b"\0\0\x2a\x1c\x7f\x01d", "ab", "d"),
            (b"\0\x05\x23abc\x81\x1f", "abc", "a"),
        ] {
            assert_eq!(fields(section, 1_000), Ok(vec![(name.into(), value.into())]), "{section:02x?}");
        }
    }

    #[test]
    fn what_refers_to_a_dynamic_table_or_to_nothing_is_refused() {
        for section in [
            &[][..],
            &[0],
            &[1, 0, 0xd1],
            &[0, 0, 0x80],
            &[0, 0, 0x40, 0],
            &[0, 0, 0x10],
            &[0, 0, 0x00, 0],
            &[0, 0, 0xff, 0x24],
            &[0, 0, 0x5f, 0x54, 0],
            &[0, 0, 0xff],
            &[0, 0, 0x51],
            &[0, 0, 0x51, 5, b'a'],
            &[0, 0, 0x2f, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff],
            &[0, 0, 0x51, 0x81, 0x00],
        ] {
            assert_eq!(code(section), Some(Code::QpackDecompressionFailed), "{section:02x?}");
        }
    }

    #[test]
    fn names_and_values_hold_only_what_they_may() {
        for section in [
            &b"\0\0\x23Abc\x01d"[..],
            b"\0\0\x23a c\x01d",
            b"\0\0\x20\x01d",
            b"\0\0\x23abc\x01\n",
            b"\0\0\x23abc\x01\0",
            b"\0\0\x23abc\x02 d",
            b"\0\0\x23abc\x02d\t",
        ] {
            assert_eq!(code(section), Some(Code::Message), "{section:02x?}");
        }
        assert!(fields(b"\0\0\x23abc\x03a\tb", 1_000).is_ok());
    }

    #[test]
    fn a_section_of_many_short_references_is_too_large() {
        let mut section = vec![0, 0];
        section.resize(25_000, 0xc2);
        assert_eq!(fields(&section, 16 * 1024), Err(Refused::TooLarge));
        section.truncate(2 + 10);
        // age: 0 is 3 + 1 + 32.
        assert_eq!(fields(&section, 360).map(|fields| fields.len()), Ok(10));
        assert_eq!(fields(&section, 359), Err(Refused::TooLarge));
    }

    #[test]
    fn what_is_encoded_decodes() {
        let mut head = HeaderMap::new();
        for (name, value) in [("content-type", "text/css"), ("content-type", "x/y"), ("server", "s"), ("x-own", "1")] {
            head.append(name, HeaderValue::from_static(value));
        }
        let mut out = BytesMut::new();
        encode_head(StatusCode::OK, &head, &mut out);
        // 200 and text/css are one byte each.
        assert_eq!(out[..3], [0, 0, 0xd9]);
        let read = fields(&out, 1_000).unwrap();
        assert_eq!(read[0], (":status".into(), "200".into()));
        assert_eq!(read.len(), 5);
        let mut out = BytesMut::new();
        encode_head(StatusCode::IM_A_TEAPOT, &HeaderMap::new(), &mut out);
        assert_eq!(fields(&out, 1_000), Ok(vec![(":status".into(), "418".into())]));
    }

    proptest::proptest! {
        #[test]
        fn no_section_panics(section: Vec<u8>, many in proptest::bool::ANY) {
            let section = if many { section.repeat(50) } else { section };
            let _ = fields_of_any(&section);
        }

        #[test]
        fn no_section_after_a_good_prefix_panics(mut section: Vec<u8>) {
            section.splice(0..0, [0, 0]);
            let _ = fields_of_any(&section);
        }
    }

    fn fields_of_any(section: &[u8]) -> Result<usize, Refused> {
        let mut size = 0;
        decode(&Bytes::copy_from_slice(section), 16 * 1024, |_, value| {
            size += value.len();
            assert!(size <= 16 * 1024);
            Ok(())
        })?;
        Ok(size)
    }
}
