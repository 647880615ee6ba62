//! Streams in one direction (RFC 9114 6.2): the client's control stream, its QPACK streams, and what else it opens.
//!
//! Bytes in; out comes what the client wants to have told, or what it did wrong. What there may be once of each connection
//! is in [`Peer`].

use super::code::{Code, Wrong};
use super::frames::{
    CANCEL_PUSH, DATA, GOAWAY, HEADERS, MAX_PUSH_ID, OF_H2, PRIORITY_UPDATE, PUSH_PROMISE, SETTINGS, header,
};
use super::integer;
use super::priority::Priority;

/// Bytes of one frame of the control stream.
const FRAME_BYTES_MAX: u64 = 4 * 1024;
/// Bytes of a frame's type and length at most.
const HEADER_BYTES_MAX: usize = 2 * integer::BYTES_MAX;

/// Settings that a client may have. A handful is defined, some grease with a few more.
const SETTINGS_MAX: usize = 64;

/// Types of streams (RFC 9114 6.2, RFC 9204 4.2).
pub(super) const CONTROL: u64 = 0x00;
const PUSH: u64 = 0x01;
const ENCODER: u64 = 0x02;
const DECODER: u64 = 0x03;

/// Settings with a meaning here.
pub(super) const MAX_FIELD_SECTION_SIZE: u64 = 0x06;
/// RFC 9220 3.
const ENABLE_CONNECT_PROTOCOL: u64 = 0x08;
/// RFC 9297 2.1.1.
const H3_DATAGRAM: u64 = 0x33;
/// Settings of HTTP/2 that must not be sent (RFC 9114 7.2.4.1).
const SETTINGS_OF_H2: [u64; 5] = [0x00, 0x02, 0x03, 0x04, 0x05];

/// What a client wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Told {
    /// The answer on this stream has a new priority.
    Priority(u64, Priority),
    /// Something that costs us more than it does it. Too much of it is an attack.
    Idle,
}

/// What a connection may have once, or only in one direction.
#[derive(Debug, Default)]
pub(super) struct Peer {
    has_control: bool,
    has_encoder: bool,
    has_decoder: bool,
    push_id_max: Option<u64>,
    goaway: Option<u64>,
}

/// What a stream turned out to be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Not all of its type has come.
    Unknown,
    Control,
    Encoder,
    /// QPACK's decoder, and whether the next byte goes on with a number.
    Decoder {
        within: bool,
    },
    /// Nobody reads it (RFC 9114 6.2.3, 9).
    Other,
}

/// Reads one stream.
#[derive(Debug)]
pub(super) struct Stream {
    kind: Kind,
    /// A type, a frame's header, or a frame, of which some has come.
    kept: Vec<u8>,
    /// The frame whose payload comes, and its length.
    frame: Option<(u64, usize)>,
    has_settings: bool,
}

impl Stream {
    pub(super) fn new() -> Self {
        Self { kind: Kind::Unknown, kept: Vec::new(), frame: None, has_settings: false }
    }

    /// Whether it turned out to be one that nobody reads.
    pub(super) fn is_of_no_use(&self) -> bool {
        self.kind == Kind::Other
    }

    /// The client ended the stream or reset it.
    pub(super) fn end(&self) -> Result<(), Wrong> {
        match self.kind {
            // RFC 9114 6.2: before the type is known anything may end.
            Kind::Unknown | Kind::Other => Ok(()),
            // RFC 9114 6.2.1, RFC 9204 4.2.
            _ => Err(Wrong::connection(Code::ClosedCriticalStream, "control or QPACK stream ended")),
        }
    }

    /// Takes what came next.
    pub(super) fn read(&mut self, mut bytes: &[u8], peer: &mut Peer, told: &mut Vec<Told>) -> Result<(), Wrong> {
        while let Some((&first, rest)) = bytes.split_first() {
            match self.kind {
                Kind::Unknown => {
                    self.kept.push(first);
                    bytes = rest;
                    if let Some((kind, _)) = integer::read(&self.kept) {
                        self.kept.clear();
                        self.kind = peer.begin(kind)?;
                    }
                }
                Kind::Control => bytes = self.control(bytes, peer, told)?,
                Kind::Encoder => {
                    // RFC 9204 4.3.1: all that a table of capacity 0 can be told is that it stays so.
                    if first != 0x20 {
                        return Err(Wrong::connection(Code::QpackEncoderStream, "encoder fills a table of capacity 0"));
                    }
                    told.push(Told::Idle);
                    bytes = rest;
                }
                Kind::Decoder { within } => {
                    self.kind = Kind::Decoder { within: decoder(first, within, told)? };
                    bytes = rest;
                }
                Kind::Other => return Ok(()),
            }
        }
        Ok(())
    }

    /// Takes one step on the control stream. Returns what is left.
    fn control<'a>(&mut self, bytes: &'a [u8], peer: &mut Peer, told: &mut Vec<Told>) -> Result<&'a [u8], Wrong> {
        let Some((kind, length)) = self.frame else {
            let (byte, rest) = bytes.split_at(1);
            self.kept.extend_from_slice(byte);
            debug_assert!(self.kept.len() <= HEADER_BYTES_MAX, "two integers are whole by then");
            if let Some((kind, length, _)) = header(&self.kept) {
                self.kept.clear();
                let length = self.judge(kind, length)?;
                self.frame = Some((kind, length));
                if length == 0 {
                    self.payload(kind, peer, told)?;
                }
            }
            return Ok(rest);
        };
        let step = (length - self.kept.len()).min(bytes.len());
        let (part, rest) = bytes.split_at(step);
        self.kept.extend_from_slice(part);
        if self.kept.len() == length {
            self.payload(kind, peer, told)?;
        }
        Ok(rest)
    }

    /// Whether a frame may stand here, by its header.
    fn judge(&self, kind: u64, length: u64) -> Result<usize, Wrong> {
        if !self.has_settings && kind != SETTINGS {
            return Err(Wrong::connection(Code::MissingSettings, "control stream begins without settings"));
        }
        let of_requests = matches!(kind, DATA | HEADERS | PUSH_PROMISE) || OF_H2.contains(&kind);
        if of_requests || (self.has_settings && kind == SETTINGS) {
            return Err(Wrong::connection(Code::FrameUnexpected, "frame that has no place on a control stream"));
        }
        match usize::try_from(length) {
            Ok(fits) if length <= FRAME_BYTES_MAX => Ok(fits),
            _ => Err(Wrong::connection(Code::ExcessiveLoad, "frame on the control stream too long")),
        }
    }

    /// A whole frame has come.
    fn payload(&mut self, kind: u64, peer: &mut Peer, told: &mut Vec<Told>) -> Result<(), Wrong> {
        self.frame = None;
        let payload = std::mem::take(&mut self.kept);
        match kind {
            SETTINGS => {
                self.has_settings = true;
                return settings(&payload);
            }
            GOAWAY => peer.goaway(alone(&payload)?)?,
            MAX_PUSH_ID => peer.max_push_id(alone(&payload)?)?,
            CANCEL_PUSH => {
                alone(&payload)?;
                // RFC 9114 7.2.3: none was ever promised.
                return Err(Wrong::connection(Code::Id, "push cancelled that was never promised"));
            }
            _ if PRIORITY_UPDATE.contains(&kind) => {
                told.push(Told::Idle);
                told.push(priority_update(kind, &payload)?);
                return Ok(());
            }
            // RFC 9114 9: unknown ones are read over.
            _ => {}
        }
        told.push(Told::Idle);
        Ok(())
    }
}

impl Peer {
    /// A stream of this type begins.
    fn begin(&mut self, kind: u64) -> Result<Kind, Wrong> {
        let (has, kind) = match kind {
            CONTROL => (&mut self.has_control, Kind::Control),
            ENCODER => (&mut self.has_encoder, Kind::Encoder),
            DECODER => (&mut self.has_decoder, Kind::Decoder { within: false }),
            PUSH => return Err(Wrong::connection(Code::StreamCreation, "client pushes")),
            _ => return Ok(Kind::Other),
        };
        if std::mem::replace(has, true) {
            return Err(Wrong::connection(Code::StreamCreation, "control or QPACK stream opened twice"));
        }
        Ok(kind)
    }

    /// RFC 9114 7.2.7: it never goes down.
    fn max_push_id(&mut self, id: u64) -> Result<(), Wrong> {
        if self.push_id_max.is_some_and(|before| id < before) {
            return Err(Wrong::connection(Code::Id, "MAX_PUSH_ID goes down"));
        }
        self.push_id_max = Some(id);
        Ok(())
    }

    /// RFC 9114 5.2: it never goes up.
    fn goaway(&mut self, id: u64) -> Result<(), Wrong> {
        if self.goaway.is_some_and(|before| id > before) {
            return Err(Wrong::connection(Code::Id, "GOAWAY goes up"));
        }
        self.goaway = Some(id);
        Ok(())
    }
}

/// The one integer that is the whole payload.
fn alone(payload: &[u8]) -> Result<u64, Wrong> {
    match integer::read(payload) {
        Some((value, used)) if used == payload.len() => Ok(value),
        _ => Err(Wrong::connection(Code::Frame, "frame is not one integer")),
    }
}

/// RFC 9114 7.2.4, RFC 9220 3, RFC 9297 2.1.1.
fn settings(mut payload: &[u8]) -> Result<(), Wrong> {
    let mut seen = Vec::new();
    while !payload.is_empty() {
        let Some((id, value, used)) = header(payload) else {
            return Err(Wrong::connection(Code::Frame, "settings end in the middle of one"));
        };
        payload = &payload[used..];
        if SETTINGS_OF_H2.contains(&id) || seen.contains(&id) {
            return Err(Wrong::connection(Code::Settings, "setting that must not be, or twice"));
        }
        if matches!(id, ENABLE_CONNECT_PROTOCOL | H3_DATAGRAM) && value > 1 {
            return Err(Wrong::connection(Code::Settings, "setting that is neither 0 nor 1"));
        }
        seen.push(id);
        if seen.len() > SETTINGS_MAX {
            return Err(Wrong::connection(Code::ExcessiveLoad, "too many settings"));
        }
    }
    Ok(())
}

/// RFC 9218 7.2.
fn priority_update(kind: u64, payload: &[u8]) -> Result<Told, Wrong> {
    let Some((id, used)) = integer::read(payload) else {
        return Err(Wrong::connection(Code::Frame, "PRIORITY_UPDATE without an element"));
    };
    // Requests are on streams that clients open, both ways (RFC 9000 2.1). Pushes there are none.
    if kind != PRIORITY_UPDATE[0] || id % 4 != 0 {
        return Err(Wrong::connection(Code::Id, "PRIORITY_UPDATE of what is no request"));
    }
    Ok(Told::Priority(id, Priority::read(&payload[used..])))
}

/// One byte of QPACK's decoder stream (RFC 9204 4.4). Returns whether the next goes on with the same number.
fn decoder(byte: u8, within: bool, told: &mut Vec<Told>) -> Result<bool, Wrong> {
    if within {
        return Ok(byte & 0x80 != 0);
    }
    // 01: a stream is cancelled. The others acknowledge entries of a table that we never fill.
    if byte >> 6 != 0b01 {
        return Err(Wrong::connection(Code::QpackDecoderStream, "decoder acknowledges what was never sent"));
    }
    told.push(Told::Idle);
    Ok(byte & 0x3f == 0x3f)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        integer::write(kind, &mut bytes);
        integer::write(payload.len() as u64, &mut bytes);
        [bytes, payload.to_vec()].concat()
    }

    fn numbers(values: &[u64]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for value in values {
            integer::write(*value, &mut bytes);
        }
        bytes
    }

    /// A control stream with good settings and then these frames.
    fn control(frames: &[Vec<u8>]) -> Vec<u8> {
        [vec![0], frame(SETTINGS, &numbers(&[1, 0, 0x21, 7])), frames.concat()].concat()
    }

    fn read(streams: &[Vec<u8>], piece: usize) -> Result<Vec<Told>, Code> {
        let (mut peer, mut told) = (Peer::default(), Vec::new());
        for bytes in streams {
            let mut stream = Stream::new();
            for piece in bytes.chunks(piece) {
                stream.read(piece, &mut peer, &mut told).map_err(|wrong| wrong.code)?;
                assert!(stream.kept.len() as u64 <= FRAME_BYTES_MAX);
            }
        }
        Ok(told)
    }

    #[test]
    fn a_good_client_is_understood_however_its_bytes_are_cut() {
        let update = frame(PRIORITY_UPDATE[0], &[&numbers(&[8])[..], b"u=1"].concat());
        let control = control(&[
            frame(MAX_PUSH_ID, &numbers(&[5])),
            frame(MAX_PUSH_ID, &numbers(&[5])),
            update,
            frame(0x21, &[0; 300]),
            frame(0x21, &[]),
            frame(GOAWAY, &numbers(&[9])),
            frame(GOAWAY, &numbers(&[9])),
        ]);
        let streams = [control, vec![2, 0x20], vec![3, 0x44, 0x7f, 0x80, 0x01], vec![0x40, 0x21, 1, 2, 3]];
        for piece in [1, 2, 5, 1_000] {
            let told = read(&streams, piece).unwrap();
            let priority = Told::Priority(8, Priority { urgency: 1, incremental: false });
            assert_eq!(told.iter().filter(|told| **told != Told::Idle).collect::<Vec<_>>(), [&priority]);
            assert_eq!(told.len(), 1 + 7 + 1 + 2);
        }
    }

    #[test]
    fn each_rule_of_streams_in_one_direction_is_held() {
        let settings = |values: &[u64]| vec![[vec![0], frame(SETTINGS, &numbers(values))].concat()];
        let with = |frames: &[Vec<u8>]| vec![control(frames)];
        for (rule, streams, code) in [
            ("no settings", vec![[vec![0], frame(GOAWAY, &[0])].concat()], Code::MissingSettings),
            ("unknown frame before settings", vec![[vec![0], frame(0x21, &[])].concat()], Code::MissingSettings),
            ("DATA before settings", vec![[vec![0], frame(DATA, &[])].concat()], Code::MissingSettings),
            ("settings twice", with(&[frame(SETTINGS, &[])]), Code::FrameUnexpected),
            ("DATA", with(&[frame(DATA, &[0])]), Code::FrameUnexpected),
            ("HEADERS", with(&[frame(HEADERS, &[0])]), Code::FrameUnexpected),
            ("PUSH_PROMISE", with(&[frame(PUSH_PROMISE, &[0])]), Code::FrameUnexpected),
            ("PING of HTTP/2", with(&[frame(0x06, &[0; 8])]), Code::FrameUnexpected),
            ("one setting twice", settings(&[0x21, 1, 0x21, 1]), Code::Settings),
            ("a setting of HTTP/2", settings(&[0x02, 0]), Code::Settings),
            ("a setting of HTTP/2", settings(&[0x03, 100]), Code::Settings),
            ("a setting of HTTP/2", settings(&[0x04, 1]), Code::Settings),
            ("a setting of HTTP/2", settings(&[0x05, 1]), Code::Settings),
            ("extended CONNECT is 2", settings(&[0x08, 2]), Code::Settings),
            ("datagrams are 2", settings(&[0x33, 2]), Code::Settings),
            ("half a setting", settings(&[0x21]), Code::Frame),
            ("MAX_PUSH_ID goes down", with(&[frame(MAX_PUSH_ID, &[5]), frame(MAX_PUSH_ID, &[4])]), Code::Id),
            ("MAX_PUSH_ID is nothing", with(&[frame(MAX_PUSH_ID, &[])]), Code::Frame),
            ("MAX_PUSH_ID and more", with(&[frame(MAX_PUSH_ID, &[1, 1])]), Code::Frame),
            ("CANCEL_PUSH", with(&[frame(CANCEL_PUSH, &[0])]), Code::Id),
            ("GOAWAY goes up", with(&[frame(GOAWAY, &[4]), frame(GOAWAY, &[5])]), Code::Id),
            ("GOAWAY is cut off", with(&[frame(GOAWAY, &[0x40])]), Code::Frame),
            ("priority of our stream", with(&[frame(PRIORITY_UPDATE[0], &[1])]), Code::Id),
            ("priority of a push", with(&[frame(PRIORITY_UPDATE[1], &[0])]), Code::Id),
            ("priority of nothing", with(&[frame(PRIORITY_UPDATE[0], &[])]), Code::Frame),
            ("a long frame", with(&[frame(0x21, &[0; 4_097])]), Code::ExcessiveLoad),
            ("a huge frame", with(&[numbers(&[0x21, 1 << 30])]), Code::ExcessiveLoad),
            ("a push stream", vec![vec![1, 0]], Code::StreamCreation),
            ("two control streams", vec![control(&[]), vec![0]], Code::StreamCreation),
            ("two encoder streams", vec![vec![2], vec![2]], Code::StreamCreation),
            ("two decoder streams", vec![vec![3], vec![3]], Code::StreamCreation),
            ("a capacity", vec![vec![2, 0x21]], Code::QpackEncoderStream),
            ("an insertion by name", vec![vec![2, 0xc0, 0]], Code::QpackEncoderStream),
            ("an insertion", vec![vec![2, 0x40, 0]], Code::QpackEncoderStream),
            ("a duplicate", vec![vec![2, 0x00]], Code::QpackEncoderStream),
            ("an acknowledgment", vec![vec![3, 0x80]], Code::QpackDecoderStream),
            ("an increment", vec![vec![3, 0x01]], Code::QpackDecoderStream),
            ("an increment of 0", vec![vec![3, 0x00]], Code::QpackDecoderStream),
        ] {
            for piece in [1, 1_000] {
                assert_eq!(read(&streams, piece), Err(code), "{rule}");
            }
        }
    }

    #[test]
    fn critical_streams_do_not_end() {
        let end = |bytes: &[u8]| {
            let mut stream = Stream::new();
            stream.read(bytes, &mut Peer::default(), &mut Vec::new()).unwrap();
            stream.end().map_err(|wrong| wrong.code)
        };
        for critical in [&[0][..], &[0, 4, 0], &[2], &[3]] {
            assert_eq!(end(critical), Err(Code::ClosedCriticalStream), "{critical:?}");
        }
        for other in [&[][..], &[0x40], &[0x21, 1]] {
            assert_eq!(end(other), Ok(()), "{other:?}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(kind in 0_u8..4, bytes: Vec<u8>, piece in 1_usize..50) {
            let _ = read(&[[vec![kind], bytes.clone()].concat()], piece);
            let _ = read(&[control(&[bytes])], piece);
        }
    }
}
