//! HTTP/1.1 as bytes: where each message begins and ends, read strictly, before any parser sees it (RFC 9112).
//!
//! The parser behind takes bare line feeds, two lengths, codings that nobody undoes. Whoever stands before us may read such
//! a message otherwise, and then one client's body is another one's request. So every byte goes through here first: a head
//! goes on when it is whole and by the rules, a body as it comes, and after the first mistake nothing goes on at all.

pub(super) mod connection;
pub(super) mod head;

use crate::fault::ClientFault;

use self::head::{Bounds, Framing, framing, is_token};

/// Hexadecimal digits of a chunk's size.
const SIZE_DIGITS_MAX: u8 = 15;
/// Bytes of all chunk extensions of one message: nobody reads them (RFC 9112 7.1.1).
const EXTENSION_BYTES_MAX: u32 = 4 * 1024;
/// Bytes of a message's trailers.
const TRAILER_BYTES_MAX: u32 = 8 * 1024;

/// Follows the messages of one connection.
#[derive(Debug)]
pub(super) struct Messages {
    state: State,
    bounds: Bounds,
    /// Whole heads so far.
    heads: u64,
    /// Bytes of the head that is not whole yet whose lines have been looked at.
    seen: usize,
}

/// What the next byte belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Head,
    /// A body with so many bytes left.
    Body(u64),
    Chunk(Chunk),
}

/// Where in a chunked body (RFC 9112 7.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Chunk {
    Size { size: u64, digits: u8, extension: u32 },
    Extension { size: u64, extension: u32 },
    SizeLf { size: u64, extension: u32 },
    Data { left: u64, extension: u32 },
    DataCr { extension: u32 },
    DataLf { extension: u32 },
    Trailer { left: u32 },
    TrailerName { left: u32 },
    TrailerValue { left: u32 },
    TrailerLf { left: u32 },
    LastLf,
}

/// How far the bytes may go on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Passed {
    /// All of them.
    All,
    /// So many; the rest is the beginning of a head. It is to be shown again, with more behind it.
    Part(usize),
    /// So many; then comes a head that is refused.
    Refused(usize, ClientFault),
    /// So many; then a body breaks its framing.
    Broken(usize),
}

impl Messages {
    pub(super) fn new(bounds: Bounds) -> Self {
        Self { state: State::Head, bounds, heads: 0, seen: 0 }
    }

    /// How many heads went on.
    pub(super) fn heads(&self) -> u64 {
        self.heads
    }

    /// Whether what went on ends where a message does.
    pub(super) fn is_between(&self) -> bool {
        self.state == State::Head
    }

    /// Looks at bytes that follow those that went on.
    pub(super) fn pass(&mut self, bytes: &[u8]) -> Passed {
        let mut at = 0;
        while at < bytes.len() {
            let rest = &bytes[at..];
            match self.state {
                State::Body(left) => {
                    let taken = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    at += taken;
                    self.state = body(left - taken as u64);
                }
                State::Chunk(Chunk::Data { left, extension }) => {
                    let taken = rest.len().min(usize::try_from(left).unwrap_or(usize::MAX));
                    at += taken;
                    let left = left - taken as u64;
                    let next = if left == 0 { Chunk::DataCr { extension } } else { Chunk::Data { left, extension } };
                    self.state = State::Chunk(next);
                }
                State::Chunk(chunk) => {
                    let Some(next) = chunk.next(rest[0]) else { return Passed::Broken(at) };
                    at += 1;
                    self.state = next;
                }
                State::Head => match self.head(rest) {
                    Ok(Some(length)) => at += length,
                    Ok(None) => return Passed::Part(at),
                    Err(fault) => return Passed::Refused(at, fault),
                },
            }
        }
        Passed::All
    }

    /// The length of the head that stands at the beginning of `rest`, if it is whole.
    fn head(&mut self, rest: &[u8]) -> Result<Option<usize>, ClientFault> {
        while let Some(found) = memchr::memchr(b'\n', &rest[self.seen..]) {
            let line = &rest[self.seen..self.seen + found];
            // RFC 9112 2.2: a line feed alone ends a line for some and not for others.
            let Some(line) = line.strip_suffix(b"\r") else { return Err(ClientFault::Malformed) };
            let is_first = self.seen == 0;
            self.seen += found + 1;
            if self.seen > self.bounds.head_bytes_max {
                return Err(self.too_large(rest));
            }
            if line.is_empty() && !is_first {
                let head = &rest[..self.seen];
                self.state = match framing(head, &self.bounds)? {
                    Framing::Length(length) => body(length),
                    Framing::Chunked => State::Chunk(Chunk::FIRST),
                };
                self.heads += 1;
                self.seen = 0;
                return Ok(Some(head.len()));
            }
        }
        if rest.len() > self.bounds.head_bytes_max { Err(self.too_large(rest)) } else { Ok(None) }
    }

    /// RFC 9110 15.5.15 where it is the target, RFC 6585 5 where it is the fields.
    fn too_large(&self, head: &[u8]) -> ClientFault {
        let line = memchr::memchr(b'\n', head).unwrap_or(head.len());
        if line > self.bounds.target_bytes_max { ClientFault::TargetTooLong } else { ClientFault::HeadTooLarge }
    }
}

/// A body of which so many bytes are left.
fn body(left: u64) -> State {
    if left == 0 { State::Head } else { State::Body(left) }
}

impl Chunk {
    const FIRST: Self = Self::Size { size: 0, digits: 0, extension: EXTENSION_BYTES_MAX };

    /// What follows one byte. None: the framing is broken.
    fn next(self, byte: u8) -> Option<State> {
        let is_text = matches!(byte, b'\t' | b' '..=b'~' | 0x80..);
        let next = match (self, byte) {
            (Self::Size { size, digits, extension }, byte) if byte.is_ascii_hexdigit() => {
                let digit = char::from(byte).to_digit(16)?;
                let digits = Some(digits + 1).filter(|digits| *digits <= SIZE_DIGITS_MAX)?;
                Self::Size { size: size << 4 | u64::from(digit), digits, extension }
            }
            (Self::Size { size, digits: 1.., extension }, b';') => Self::Extension { size, extension },
            (Self::Size { size, digits: 1.., extension }, b'\r') => Self::SizeLf { size, extension },
            (Self::Extension { size, extension }, b'\r') => Self::SizeLf { size, extension },
            (Self::Extension { size, extension }, _) if is_text => {
                Self::Extension { size, extension: extension.checked_sub(1)? }
            }
            (Self::SizeLf { size: 0, .. }, b'\n') => Self::Trailer { left: TRAILER_BYTES_MAX },
            (Self::SizeLf { size, extension }, b'\n') => Self::Data { left: size, extension },
            (Self::DataCr { extension }, b'\r') => Self::DataLf { extension },
            (Self::DataLf { extension }, b'\n') => Self::Size { size: 0, digits: 0, extension },
            (Self::Trailer { .. }, b'\r') => Self::LastLf,
            (Self::Trailer { left } | Self::TrailerName { left }, byte) if is_token(&byte) => {
                Self::TrailerName { left: left.checked_sub(1)? }
            }
            (Self::TrailerName { left }, b':') => Self::TrailerValue { left: left.checked_sub(1)? },
            (Self::TrailerValue { left }, b'\r') => Self::TrailerLf { left },
            (Self::TrailerValue { left }, _) if is_text => Self::TrailerValue { left: left.checked_sub(1)? },
            (Self::TrailerLf { left }, b'\n') => Self::Trailer { left },
            (Self::LastLf, b'\n') => return Some(State::Head),
            _ => return None,
        };
        Some(State::Chunk(next))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const BOUNDS: Bounds = Bounds { head_bytes_max: 256, target_bytes_max: 100, fields_max: 10 };

    fn pass(text: &str) -> Passed {
        Messages::new(BOUNDS).pass(text.as_bytes())
    }

    /// What goes on of `text` if it comes in such pieces, how many heads that is, and the fault.
    fn in_pieces(text: &[u8], size: usize) -> (Vec<u8>, u64, Option<Passed>) {
        let (mut messages, mut held, mut on) = (Messages::new(BOUNDS), Vec::new(), Vec::new());
        for piece in text.chunks(size) {
            held.extend_from_slice(piece);
            let passed = messages.pass(&held);
            let count = match passed {
                Passed::All => held.len(),
                Passed::Part(count) | Passed::Refused(count, _) | Passed::Broken(count) => count,
            };
            on.extend(held.drain(..count));
            if matches!(passed, Passed::Refused(..) | Passed::Broken(_)) {
                return (on, messages.heads(), Some(passed));
            }
        }
        (on, messages.heads(), None)
    }

    #[test]
    fn messages_go_on_whole_one_after_the_other() {
        let text = "GET / HTTP/1.1\r\nhost: a\r\n\r\n\
                    POST /b HTTP/1.1\r\nhost: a\r\ncontent-length: 5\r\n\r\nhello\
                    \r\nPOST /c HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n\
                    5;a=\"b\"\r\nhello\r\n0a\r\n0123456789\r\n0\r\nx: y\r\n\r\n\
                    GET /d HTTP/1.0\r\n\r\n";
        assert_eq!(pass(text), Passed::All);
        for size in 1..text.len() {
            assert_eq!(in_pieces(text.as_bytes(), size), (text.as_bytes().to_vec(), 4, None), "{size}");
        }
    }

    #[test]
    fn nothing_of_a_head_goes_on_before_it_is_whole() {
        let first = "GET / HTTP/1.1\r\n\r\n";
        let text = format!("{first}GET /second HTTP/1.1\r\nhost: a\r\n");
        assert_eq!(pass(&text), Passed::Part(first.len()));
        assert_eq!(pass("\r"), Passed::Part(0));
    }

    #[test]
    fn a_line_feed_alone_is_refused_at_once() {
        for text in [
            "GET / HTTP/1.1\nhost: a\r\n\r\n",
            "GET / HTTP/1.1\r\nhost: a\n",
            "GET / HTTP/1.1\r\nhost: a\r\n\n",
            "\nGET / HTTP/1.1\r\n\r\n",
        ] {
            assert_eq!(pass(text), Passed::Refused(0, ClientFault::Malformed), "{text:?}");
        }
    }

    #[test]
    fn a_head_that_is_too_large_is_refused_before_its_end() {
        let line = |length: usize| format!("GET /{} HTTP/1.1\r\n", "a".repeat(length));
        let fields = |length: usize| format!("GET / HTTP/1.1\r\na: {}", "b".repeat(length));
        for (text, want) in [
            (line(300), ClientFault::TargetTooLong),
            ("a".repeat(300), ClientFault::TargetTooLong),
            (format!("{}\r\n", line(101)), ClientFault::TargetTooLong),
            (fields(300), ClientFault::HeadTooLarge),
            (format!("{}\r\n\r\n", fields(300)), ClientFault::HeadTooLarge),
            (format!("GET / HTTP/1.1\r\n{}\r\n", "a: b\r\n".repeat(11)), ClientFault::HeadTooLarge),
        ] {
            assert_eq!(pass(&text), Passed::Refused(0, want), "{text:?}");
        }
    }

    #[test]
    fn a_chunked_body_that_breaks_its_framing_ends_there() {
        let head = "POST / HTTP/1.1\r\ntransfer-encoding: chunked\r\n\r\n";
        let long = format!("5;{}\r\n", "a".repeat(5_000));
        for (body, good) in [
            ("5\nhello", 1),
            ("5 \r\nhello", 1),
            ("\r\n", 0),
            (";a\r\n", 0),
            ("-5\r\n", 0),
            ("0x5\r\n", 1),
            ("+5\r\n", 0),
            ("1234567890abcdef\r\n", 15),
            ("5\r\nhelloX\r\n", 8),
            ("5\r\nhello\n", 8),
            ("5\r\nhello\rX", 9),
            ("5;a\nb\r\n", 3),
            ("5;a\0\r\n", 3),
            ("0\r\n x: y\r\n", 3),
            ("0\r\nx : y\r\n", 4),
            ("0\r\nx: y\n", 7),
            ("0\r\n: y\r\n", 3),
            (long.as_str(), 2 + 4_096),
        ] {
            assert_eq!(pass(&format!("{head}{body}")), Passed::Broken(head.len() + good), "{body:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn what_goes_on_does_not_depend_on_the_pieces(text in TEXT, size in 1_usize..40) {
            let (whole, pieces) = (in_pieces(text.as_bytes(), text.len().max(1)), in_pieces(text.as_bytes(), size));
            proptest::prop_assert_eq!(whole.0, pieces.0);
            proptest::prop_assert_eq!(whole.1, pieces.1);
        }

        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..600), size in 1_usize..600) {
            let (on, _, _) = in_pieces(&bytes, size);
            proptest::prop_assert!(bytes.starts_with(&on));
        }
    }

    /// Messages, almost messages, and noise.
    const TEXT: &str = "(GET /[a-z]{0,9} HTTP/1\\.[01]\r\n|host: a\r\n|content-length: [0-9]{1,2}\r\n\
                        |transfer-encoding: chunked\r\n|\r\n|\n|[0-9a-f]{1,2}\r\n|[a-z]{0,9}){0,30}";
}
