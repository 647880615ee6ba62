//! The frames of one request's stream (RFC 9114 4.1 and 7): bytes in, parts of a request out.
//!
//! A frame's header is judged before a byte of it is kept. Of frames only HEADERS are kept until they are whole, and those
//! are bounded; DATA goes through as it comes, and what is unknown is counted and read over.

use bytes::{Buf, Bytes, BytesMut};

use super::code::{Code, Wrong};
use super::integer;

/// Bytes of all frames of unknown types on one stream, each counted with [`FRAME_BYTES`], and so are DATA frames without
/// data.
const IDLE_BYTES_MAX: u64 = 16 * 1024;
/// What an idle frame costs besides its bytes.
const FRAME_BYTES: u64 = 16;

/// RFC 9114 7.2.1.
pub(super) const DATA: u64 = 0x00;
/// RFC 9114 7.2.2.
pub(super) const HEADERS: u64 = 0x01;
/// RFC 9114 7.2.3.
pub(super) const CANCEL_PUSH: u64 = 0x03;
/// RFC 9114 7.2.4.
pub(super) const SETTINGS: u64 = 0x04;
/// RFC 9114 7.2.5.
pub(super) const PUSH_PROMISE: u64 = 0x05;
/// RFC 9114 7.2.6.
pub(super) const GOAWAY: u64 = 0x07;
/// RFC 9114 7.2.7.
pub(super) const MAX_PUSH_ID: u64 = 0x0d;
/// RFC 9218 7.2, of a request and of a push.
pub(super) const PRIORITY_UPDATE: [u64; 2] = [0xf_0700, 0xf_0701];
/// Types of HTTP/2 that must not be used (RFC 9114 7.2.8).
pub(super) const OF_H2: [u64; 4] = [0x02, 0x06, 0x08, 0x09];

/// A part of a request.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Part {
    /// The field section at its start.
    Head(Bytes),
    /// Some of its body.
    Data(Bytes),
    /// The field section at its end.
    Trailers(Bytes),
    /// A field section that is too long to be kept.
    TooLong,
}

/// How far a request has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stage {
    Start,
    Body,
    Over,
}

/// Where in a frame the next byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// In its type and length.
    Header,
    /// In a field section, this far from its end.
    Section(usize),
    /// In data, this far from its end.
    Data(u64),
    /// In what nobody reads, this far from its end.
    Idle(u64),
}

/// Reads one stream.
#[derive(Debug)]
pub(super) struct Frames {
    stage: Stage,
    at: At,
    /// Bytes that have come and were not looked at.
    chunk: Bytes,
    /// A frame's header or a field section of which some has come.
    kept: BytesMut,
    idle_bytes: u64,
    headers_bytes_max: u64,
}

impl Frames {
    /// A stream whose HEADERS frames have so many bytes at most.
    pub(super) fn new(headers_bytes_max: u64) -> Self {
        let (chunk, kept) = (Bytes::new(), BytesMut::new());
        Self { stage: Stage::Start, at: At::Header, chunk, kept, idle_bytes: 0, headers_bytes_max }
    }

    /// Takes what came next. The bytes before must have been read to their end: [`next`](Self::next) gave `None`.
    pub(super) fn feed(&mut self, chunk: Bytes) {
        debug_assert!(self.chunk.is_empty(), "fed before it was hungry");
        self.chunk = chunk;
    }

    /// The next part of what has come.
    pub(super) fn next(&mut self) -> Result<Option<Part>, Wrong> {
        while !self.chunk.is_empty() {
            match self.at {
                At::Header => {
                    if let Some(part) = self.header()? {
                        return Ok(Some(part));
                    }
                }
                At::Section(length) => {
                    let Some(section) = self.section(length) else { return Ok(None) };
                    return Ok(Some(self.part(section)));
                }
                At::Data(left) => {
                    let data = self.chunk.split_to(fit(left, self.chunk.len()));
                    self.at = after(left, data.len(), At::Data);
                    return Ok(Some(Part::Data(data)));
                }
                At::Idle(left) => {
                    let step = fit(left, self.chunk.len());
                    self.chunk.advance(step);
                    self.at = after(left, step, At::Idle);
                }
            }
        }
        Ok(None)
    }

    /// The stream has ended.
    pub(super) fn end(&self) -> Result<(), Wrong> {
        if self.at != At::Header || !self.kept.is_empty() {
            // RFC 9114 7.1: a stream that ends in a frame.
            return Err(Wrong::connection(Code::Frame, "stream ends in the middle of a frame"));
        }
        match self.stage {
            Stage::Start => Err(Wrong::stream(Code::RequestIncomplete, "stream ends without a request")),
            Stage::Body | Stage::Over => Ok(()),
        }
    }

    /// Bytes that are held back until more comes.
    pub(super) fn kept_bytes(&self) -> usize {
        self.kept.len()
    }

    /// Reads a type and a length, and judges them.
    fn header(&mut self) -> Result<Option<Part>, Wrong> {
        let (kind, length) = if let (true, Some((kind, length, used))) = (self.kept.is_empty(), header(&self.chunk)) {
            self.chunk.advance(used);
            (kind, length)
        } else {
            self.kept.extend_from_slice(&self.chunk.split_to(1));
            let Some((kind, length, _)) = header(&self.kept) else { return Ok(None) };
            self.kept.clear();
            (kind, length)
        };
        match (kind, self.stage) {
            (HEADERS, Stage::Over) | (DATA, Stage::Start | Stage::Over) => {
                // RFC 9114 4.1: an invalid sequence of frames.
                Err(Wrong::connection(Code::FrameUnexpected, "frames of a request in a wrong order"))
            }
            (HEADERS, stage) => {
                if length > self.headers_bytes_max {
                    self.stage = Stage::Over;
                    self.at = At::Idle(length);
                    return Ok(Some(Part::TooLong));
                }
                if length == 0 {
                    self.at = At::Header;
                    return Ok(Some(self.part_of(stage, Bytes::new())));
                }
                self.at = At::Section(fit(length, usize::MAX));
                Ok(None)
            }
            (DATA, Stage::Body) => {
                self.at = if length == 0 { At::Header } else { At::Data(length) };
                if length == 0 { self.count_idle(0).map(|()| None) } else { Ok(None) }
            }
            (CANCEL_PUSH | SETTINGS | PUSH_PROMISE | GOAWAY | MAX_PUSH_ID, _) => {
                Err(Wrong::connection(Code::FrameUnexpected, "frame of the control stream on a request's"))
            }
            (kind, _) if PRIORITY_UPDATE.contains(&kind) || OF_H2.contains(&kind) => {
                Err(Wrong::connection(Code::FrameUnexpected, "frame that no request has"))
            }
            _ => {
                self.count_idle(length)?;
                self.at = after(length, 0, At::Idle);
                Ok(None)
            }
        }
    }

    fn count_idle(&mut self, bytes: u64) -> Result<(), Wrong> {
        self.idle_bytes = self.idle_bytes.saturating_add(bytes).saturating_add(FRAME_BYTES);
        if self.idle_bytes > IDLE_BYTES_MAX {
            return Err(Wrong::stream(Code::ExcessiveLoad, "too many frames of no use"));
        }
        Ok(())
    }

    /// The whole section, if all of it has come.
    fn section(&mut self, length: usize) -> Option<Bytes> {
        if self.kept.is_empty() && self.chunk.len() >= length {
            return Some(self.chunk.split_to(length));
        }
        let step = (length - self.kept.len()).min(self.chunk.len());
        self.kept.extend_from_slice(&self.chunk.split_to(step));
        (self.kept.len() == length).then(|| std::mem::take(&mut self.kept).freeze())
    }

    fn part(&mut self, section: Bytes) -> Part {
        self.at = At::Header;
        self.part_of(self.stage, section)
    }

    fn part_of(&mut self, stage: Stage, section: Bytes) -> Part {
        if stage == Stage::Start {
            self.stage = Stage::Body;
            Part::Head(section)
        } else {
            self.stage = Stage::Over;
            Part::Trailers(section)
        }
    }
}

/// Type and length of a frame, and how many bytes they took. `None` if they are not all there.
pub(super) fn header(bytes: &[u8]) -> Option<(u64, u64, usize)> {
    let (kind, used) = integer::read(bytes)?;
    let (length, more) = integer::read(&bytes[used..])?;
    Some((kind, length, used + more))
}

/// As much of `left` as there is.
fn fit(left: u64, there: usize) -> usize {
    usize::try_from(left).unwrap_or(usize::MAX).min(there)
}

/// Where a frame goes on after `step` bytes of `left`.
fn after(left: u64, step: usize, at: fn(u64) -> At) -> At {
    match left - step as u64 {
        0 => At::Header,
        left => at(left),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const HEADERS_BYTES_MAX: u64 = 64 * 1024;

    fn frame(kind: u64, length: u64, payload: usize) -> Vec<u8> {
        let mut bytes = Vec::new();
        integer::write(kind, &mut bytes);
        integer::write(length, &mut bytes);
        bytes.resize(bytes.len() + payload, b'x');
        bytes
    }

    fn whole(kind: u64, length: usize) -> Vec<u8> {
        frame(kind, length as u64, length)
    }

    /// The parts of a stream that comes in pieces, and how it ends. Pieces of data are joined.
    fn read(bytes: &[u8], piece: usize) -> (Vec<Part>, Result<(), Wrong>) {
        let (mut frames, mut parts) = (Frames::new(HEADERS_BYTES_MAX), Vec::new());
        for piece in bytes.chunks(piece.max(1)) {
            frames.feed(Bytes::copy_from_slice(piece));
            loop {
                assert!(frames.kept_bytes() as u64 <= HEADERS_BYTES_MAX);
                match (frames.next(), parts.last_mut()) {
                    (Ok(Some(Part::Data(more))), Some(Part::Data(data))) => *data = [&data[..], &more].concat().into(),
                    (Ok(Some(part)), _) => parts.push(part),
                    (Ok(None), _) => break,
                    (Err(wrong), _) => return (parts, Err(wrong)),
                }
            }
        }
        let end = frames.end();
        (parts, end)
    }

    fn wrong(frames: &[Vec<u8>]) -> Option<(Code, super::super::code::Scope)> {
        read(&frames.concat(), usize::MAX).1.err().map(|wrong| (wrong.code, wrong.scope))
    }

    #[test]
    fn a_request_is_a_head_data_and_trailers() {
        let bytes = [whole(0x21, 5), whole(HEADERS, 3), whole(0x21, 0), whole(DATA, 4), whole(DATA, 0), whole(DATA, 2)];
        let bytes = [bytes.concat(), whole(HEADERS, 1), whole(0x40, 9)].concat();
        let x = |count: usize| Bytes::from("x".repeat(count));
        for piece in [1, 2, 3, 7, 1_000] {
            let (parts, end) = read(&bytes, piece);
            assert_eq!(parts, [Part::Head(x(3)), Part::Data(x(6)), Part::Trailers(x(1))]);
            assert_eq!(end, Ok(()));
        }
    }

    #[test]
    fn each_rule_of_frames_is_held() {
        use super::super::code::Scope::{Connection, Stream};
        let head = whole(HEADERS, 1);
        for (rule, frames, code, scope) in [
            ("DATA first", vec![whole(DATA, 1)], Code::FrameUnexpected, Connection),
            (
                "DATA after trailers",
                vec![head.clone(), head.clone(), whole(DATA, 1)],
                Code::FrameUnexpected,
                Connection,
            ),
            ("HEADERS after trailers", vec![head.clone(); 3], Code::FrameUnexpected, Connection),
            ("SETTINGS", vec![whole(SETTINGS, 0)], Code::FrameUnexpected, Connection),
            ("GOAWAY", vec![head.clone(), whole(GOAWAY, 1)], Code::FrameUnexpected, Connection),
            ("MAX_PUSH_ID", vec![whole(MAX_PUSH_ID, 1)], Code::FrameUnexpected, Connection),
            ("CANCEL_PUSH", vec![whole(CANCEL_PUSH, 1)], Code::FrameUnexpected, Connection),
            ("PUSH_PROMISE", vec![head.clone(), whole(PUSH_PROMISE, 1)], Code::FrameUnexpected, Connection),
            ("PRIORITY_UPDATE", vec![whole(0xf_0700, 1)], Code::FrameUnexpected, Connection),
            ("PRIORITY of HTTP/2", vec![whole(0x02, 5)], Code::FrameUnexpected, Connection),
            ("PING of HTTP/2", vec![whole(0x06, 8)], Code::FrameUnexpected, Connection),
            ("WINDOW_UPDATE of HTTP/2", vec![whole(0x08, 4)], Code::FrameUnexpected, Connection),
            ("CONTINUATION of HTTP/2", vec![head.clone(), whole(0x09, 4)], Code::FrameUnexpected, Connection),
            ("end in a frame", vec![frame(HEADERS, 2, 1)], Code::Frame, Connection),
            ("end in a header", vec![head.clone(), vec![0x40]], Code::Frame, Connection),
            ("end in data", vec![head.clone(), frame(DATA, 2, 1)], Code::Frame, Connection),
            ("end in an unknown frame", vec![head, frame(0x21, 2, 1)], Code::Frame, Connection),
            ("nothing", vec![], Code::RequestIncomplete, Stream),
            ("no head", vec![whole(0x21, 4)], Code::RequestIncomplete, Stream),
            ("a long unknown frame", vec![frame(0x21, 16 * 1024, 0)], Code::ExcessiveLoad, Stream),
            ("a huge unknown frame", vec![frame(0x21, 1 << 30, 0)], Code::ExcessiveLoad, Stream),
            ("many unknown frames", vec![whole(0x21, 1_000); 17], Code::ExcessiveLoad, Stream),
            ("many empty frames", vec![whole(0x21, 0); 1_025], Code::ExcessiveLoad, Stream),
        ] {
            assert_eq!(wrong(&frames), Some((code, scope)), "{rule}");
        }
        let empty = [vec![whole(HEADERS, 1)], vec![whole(DATA, 0); 1_025]].concat();
        assert_eq!(wrong(&empty), Some((Code::ExcessiveLoad, Stream)));
    }

    #[test]
    fn a_long_head_is_known_by_its_header() {
        for length in [HEADERS_BYTES_MAX + 1, 1 << 30, integer::MAX] {
            let mut frames = Frames::new(HEADERS_BYTES_MAX);
            frames.feed(frame(HEADERS, length, 0).into());
            assert_eq!(frames.next(), Ok(Some(Part::TooLong)));
            frames.feed(Bytes::from(vec![0; 10_000]));
            assert_eq!((frames.next(), frames.kept_bytes()), (Ok(None), 0));
        }
        let longest = usize::try_from(HEADERS_BYTES_MAX).unwrap();
        assert!(matches!(read(&whole(HEADERS, longest), 1_000).0[..], [Part::Head(_)]));
    }

    #[test]
    fn data_may_be_long_and_is_not_kept() {
        let mut frames = Frames::new(HEADERS_BYTES_MAX);
        frames.feed([whole(HEADERS, 1), frame(DATA, 1 << 40, 1_000)].concat().into());
        assert!(matches!(frames.next(), Ok(Some(Part::Head(_)))));
        assert!(matches!(frames.next(), Ok(Some(Part::Data(data))) if data.len() == 1_000));
        assert_eq!((frames.next(), frames.kept_bytes()), (Ok(None), 0));
    }

    proptest::proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(
            kinds in proptest::collection::vec((0_u64..3, 0_usize..2_000), 1..8),
            piece in 1_usize..50,
        ) {
            let kind = |kind| [HEADERS, DATA, 0x21][usize::try_from(kind).unwrap()];
            let bytes: Vec<u8> = kinds.iter().flat_map(|(k, length)| whole(kind(*k), *length)).collect();
            proptest::prop_assert_eq!(read(&bytes, usize::MAX), read(&bytes, piece));
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>, piece in 1_usize..50) {
            let _ = read(&bytes, piece);
        }

        #[test]
        fn no_bytes_after_a_head_panic(bytes: Vec<u8>, piece in 1_usize..50) {
            let _ = read(&[whole(HEADERS, 1), bytes].concat(), piece);
        }
    }
}
