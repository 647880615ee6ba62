//! One head of HTTP/1.1: the rules of RFC 9112 that the parser behind us is lax about, and where the body ends.

use crate::fault::ClientFault;

/// Digits of a content-length: none that fits 64 bits has more.
const LENGTH_DIGITS_MAX: usize = 19;

/// Bounds of a head.
#[derive(Debug, Clone, Copy)]
pub(in crate::listen) struct Bounds {
    /// Bytes of the whole head.
    pub(in crate::listen) head_bytes_max: usize,
    /// Bytes of the request target.
    pub(in crate::listen) target_bytes_max: usize,
    /// Fields.
    pub(in crate::listen) fields_max: usize,
}

/// Where a message's body ends (RFC 9112 6.3).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Framing {
    /// After so many bytes.
    Length(u64),
    /// Where its chunks say.
    Chunked,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Version {
    V10,
    V11,
}

/// Checks a whole head, of which every line ends with CR LF, the last one being empty.
pub(super) fn framing(head: &[u8], bounds: &Bounds) -> Result<Framing, ClientFault> {
    // RFC 9112 2.2: an empty line before the request line is passed over.
    let head = head.strip_prefix(b"\r\n").unwrap_or(head);
    let mut lines = Lines { rest: head };
    let version = request_line(lines.next().ok_or(ClientFault::Malformed)?, bounds)?;
    let (mut length, mut coding, mut count) = (None, None, 0);
    for line in lines {
        count += 1;
        if count > bounds.fields_max {
            return Err(ClientFault::HeadTooLarge);
        }
        let (name, value) = field(line)?;
        if name.eq_ignore_ascii_case(b"content-length") {
            // RFC 9112 6.3: equal ones might be taken for one; whoever sends two is not worth the doubt.
            if length.replace(digits(value)?).is_some() {
                return Err(ClientFault::Malformed);
            }
        } else if name.eq_ignore_ascii_case(b"transfer-encoding") && coding.replace(value).is_some() {
            return Err(ClientFault::Malformed);
        }
    }
    match (coding, length) {
        (None, length) => Ok(Framing::Length(length.unwrap_or(0))),
        // RFC 9112 6.1: an attack, or a client that must not be trusted with the difference.
        (Some(_), Some(_)) => Err(ClientFault::Malformed),
        (Some(_), None) if version == Version::V10 => Err(ClientFault::Malformed),
        (Some(coding), None) => chunked(coding),
    }
}

/// RFC 9112 3: `method SP request-target SP HTTP-version`, with one space each.
fn request_line(line: &[u8], bounds: &Bounds) -> Result<Version, ClientFault> {
    let (method, rest) = split(line, b' ').ok_or(ClientFault::Malformed)?;
    let (target, version) = split(rest, b' ').ok_or(ClientFault::Malformed)?;
    let version = match version {
        b"HTTP/1.1" => Version::V11,
        b"HTTP/1.0" => Version::V10,
        [b'H', b'T', b'T', b'P', b'/', b'0'..=b'9', b'.', b'0'..=b'9'] => return Err(ClientFault::Version),
        _ => return Err(ClientFault::Malformed),
    };
    if method.is_empty() || !method.iter().all(is_token) || target.is_empty() {
        return Err(ClientFault::Malformed);
    }
    if target.len() > bounds.target_bytes_max {
        return Err(ClientFault::TargetTooLong);
    }
    // RFC 9112 3.2: a target has no fragment, no space and nothing beyond ASCII.
    if !target.iter().all(|byte| matches!(byte, 0x21..=0x7e) && *byte != b'#') {
        return Err(ClientFault::Malformed);
    }
    // A tunnel's bytes are no messages: it ends here, before the parser takes them for a body.
    if method == b"CONNECT" { Err(ClientFault::Method) } else { Ok(version) }
}

/// RFC 9112 5: `field-name ":" OWS field-value OWS`. A name that begins with a space is a folded line (5.2), one that ends
/// with a space an attack (5.1).
fn field(line: &[u8]) -> Result<(&[u8], &[u8]), ClientFault> {
    let (name, value) = split(line, b':').ok_or(ClientFault::Malformed)?;
    if name.is_empty() || !name.iter().all(is_token) || memchr::memchr2(b'\r', 0, value).is_some() {
        return Err(ClientFault::Malformed);
    }
    Ok((name, value))
}

/// RFC 9110 8.6: digits and nothing else.
fn digits(value: &[u8]) -> Result<u64, ClientFault> {
    let value = trim(value);
    if value.is_empty() || value.len() > LENGTH_DIGITS_MAX || !value.iter().all(u8::is_ascii_digit) {
        return Err(ClientFault::Malformed);
    }
    Ok(value.iter().fold(0, |number, digit| number * 10 + u64::from(digit - b'0')))
}

/// The one transfer coding that we undo. RFC 9112 6.1 and 6.3: another one before it is not implemented; without it at the
/// end nobody knows where the body ends.
fn chunked(value: &[u8]) -> Result<Framing, ClientFault> {
    let value = trim(value);
    if value.eq_ignore_ascii_case(b"chunked") {
        return Ok(Framing::Chunked);
    }
    let mut codings = value.rsplit(|byte| *byte == b',').map(trim);
    let is_last = codings.next().is_some_and(|last| last.eq_ignore_ascii_case(b"chunked"));
    let are_others =
        codings.all(|other| !other.is_empty() && other.iter().all(is_token) && !other.eq_ignore_ascii_case(b"chunked"));
    Err(if is_last && are_others { ClientFault::Coding } else { ClientFault::Malformed })
}

/// RFC 9110 5.6.3: OWS is spaces and tabs.
fn trim(mut value: &[u8]) -> &[u8] {
    while let [b' ' | b'\t', rest @ ..] | [rest @ .., b' ' | b'\t'] = value {
        value = rest;
    }
    value
}

/// RFC 9110 5.6.2.
pub(super) fn is_token(byte: &u8) -> bool {
    const TABLE: [bool; 256] = {
        let mut table = [false; 256];
        let (marks, mut index) = (b"!#$%&'*+-.^_`|~", 0);
        while index < marks.len() {
            table[marks[index] as usize] = true;
            index += 1;
        }
        let mut byte = 0;
        while byte < 256 {
            let is_alphanumeric = matches!(byte, 0x30..=0x39 | 0x41..=0x5a | 0x61..=0x7a);
            table[byte] = table[byte] || is_alphanumeric;
            byte += 1;
        }
        table
    };
    TABLE[usize::from(*byte)]
}

fn split(bytes: &[u8], at: u8) -> Option<(&[u8], &[u8])> {
    let index = memchr::memchr(at, bytes)?;
    Some((&bytes[..index], &bytes[index + 1..]))
}

/// Lines up to the empty one, without their CR LF.
struct Lines<'h> {
    rest: &'h [u8],
}

impl<'h> Iterator for Lines<'h> {
    type Item = &'h [u8];

    fn next(&mut self) -> Option<&'h [u8]> {
        let (line, rest) = split(self.rest, b'\n')?;
        self.rest = rest;
        line.strip_suffix(b"\r").filter(|line| !line.is_empty())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { head_bytes_max: 16_384, target_bytes_max: 64, fields_max: 5 };

    fn of(head: &str) -> Result<Framing, ClientFault> {
        framing(format!("{head}\r\n\r\n").as_bytes(), &BOUNDS)
    }

    #[test]
    fn a_request_line_has_three_parts_and_one_space_between_them() {
        use ClientFault::{Malformed, Method, TargetTooLong, Version};
        let long = format!("GET /{} HTTP/1.1", "a".repeat(64));
        for (line, want) in [
            ("GET / HTTP/1.1", None),
            ("PROPFIND /a?b=|{}%20 HTTP/1.0", None),
            ("\r\nGET / HTTP/1.1", None),
            ("GET  / HTTP/1.1", Some(Malformed)),
            ("GET /  HTTP/1.1", Some(Malformed)),
            ("GET / HTTP/1.1 ", Some(Malformed)),
            (" GET / HTTP/1.1", Some(Malformed)),
            ("GET\t/ HTTP/1.1", Some(Malformed)),
            ("GET / a HTTP/1.1", Some(Malformed)),
            ("GET / http/1.1", Some(Malformed)),
            ("GET /", Some(Malformed)),
            ("GET", Some(Malformed)),
            ("GET / HTTP/1.10", Some(Malformed)),
            ("G(T / HTTP/1.1", Some(Malformed)),
            ("GET /#top HTTP/1.1", Some(Malformed)),
            ("GET /ä HTTP/1.1", Some(Malformed)),
            ("GET /\u{1} HTTP/1.1", Some(Malformed)),
            ("\r\n\r\nGET / HTTP/1.1", Some(Malformed)),
            ("GET / HTTP/1.2", Some(Version)),
            ("GET / HTTP/2.0", Some(Version)),
            ("CONNECT a.example:443 HTTP/1.1", Some(Method)),
            (&long, Some(TargetTooLong)),
        ] {
            assert_eq!(of(line).err(), want, "{line:?}");
        }
    }

    #[test]
    fn a_field_line_is_a_name_and_a_value() {
        for (line, fits) in [
            ("a: b", true),
            ("a:b", true),
            ("a:", true),
            ("A!#$%&'*+-.^_`|~9: \tb ", true),
            ("a : b", false),
            (" a: b", false),
            ("\ta: b", false),
            (": b", false),
            ("a", false),
            ("a(b): c", false),
            ("ä: b", false),
            ("a: b\rc: d", false),
            ("a: b\0", false),
        ] {
            assert_eq!(of(&format!("GET / HTTP/1.1\r\n{line}")).is_ok(), fits, "{line:?}");
        }
        let fields = |count| of(&format!("GET / HTTP/1.1{}", "\r\na: b".repeat(count)));
        assert_eq!((fields(5).is_ok(), fields(6)), (true, Err(ClientFault::HeadTooLarge)));
    }

    #[test]
    fn a_body_has_one_end() {
        use ClientFault::{Coding, Malformed};
        use Framing::{Chunked, Length};
        for (fields, want) in [
            ("", Ok(Length(0))),
            ("\r\nContent-Length: 5", Ok(Length(5))),
            ("\r\ncontent-length:\t0 ", Ok(Length(0))),
            ("\r\nTransfer-Encoding: Chunked", Ok(Chunked)),
            ("\r\ncontent-length: 5\r\ncontent-length: 5", Err(Malformed)),
            ("\r\ncontent-length: 5, 5", Err(Malformed)),
            ("\r\ncontent-length: +5", Err(Malformed)),
            ("\r\ncontent-length: -5", Err(Malformed)),
            ("\r\ncontent-length: 0x5", Err(Malformed)),
            ("\r\ncontent-length: ", Err(Malformed)),
            ("\r\ncontent-length: 99999999999999999999", Err(Malformed)),
            ("\r\ncontent-length: 5\r\ntransfer-encoding: chunked", Err(Malformed)),
            ("\r\ntransfer-encoding: chunked\r\ntransfer-encoding: chunked", Err(Malformed)),
            ("\r\ntransfer-encoding: chunked, chunked", Err(Malformed)),
            ("\r\ntransfer-encoding: , chunked", Err(Malformed)),
            ("\r\ntransfer-encoding: identity", Err(Malformed)),
            ("\r\ntransfer-encoding: chunked, gzip", Err(Malformed)),
            ("\r\ntransfer-encoding: xchunked", Err(Malformed)),
            ("\r\ntransfer-encoding: \u{b}chunked", Err(Malformed)),
            ("\r\ntransfer-encoding:", Err(Malformed)),
            ("\r\ntransfer-encoding: gzip, chunked", Err(Coding)),
        ] {
            assert_eq!(of(&format!("POST / HTTP/1.1{fields}")), want, "{fields:?}");
        }
        // RFC 9112 6.1: HTTP/1.0 has no transfer codings.
        assert_eq!(of("POST / HTTP/1.0\r\ntransfer-encoding: chunked"), Err(Malformed));
    }
}
