//! A guard between QUIC and the HTTP/3 parser.
//!
//! The parser holds any frame but DATA in memory until all of it is there, whatever length it declares. So every frame
//! header passes here first, and a peer that declares too much loses its connection (H3_EXCESSIVE_LOAD) before a byte
//! of the frame is kept. Everything else is passed on as it is.

use std::sync::Arc;
use std::task::{Context, Poll};

use bytes::Bytes;
use h3::error::Code;
use h3::quic::{self, ConnectionErrorIncoming, SendStream as _, StreamErrorIncoming, StreamId, WriteBuf};
use quinn::VarInt;

/// Bytes of one HEADERS frame. Encoded fields are hardly ever longer than decoded ones, and those are bounded lower,
/// so that a client hears 431.
const HEADERS_BYTES_MAX: u64 = 64 * 1024;
/// Bytes of all frames but DATA on one request's stream.
const REQUEST_FRAMES_BYTES_MAX: u64 = 80 * 1024;
/// Bytes of one frame on the control stream.
const CONTROL_FRAME_BYTES_MAX: u64 = 4 * 1024;
/// Bytes of a frame's type and length at most: two variable-length integers (RFC 9000 16).
const FRAME_HEAD_BYTES_MAX: usize = 16;
/// RFC 9114 7.2.1.
const DATA: u64 = 0x00;
/// RFC 9114 7.2.2.
const HEADERS: u64 = 0x01;
/// Type of the control stream (RFC 9114 6.2.1).
const CONTROL_STREAM: u64 = 0x00;

/// A frame that is too long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("peer declared a frame of {bytes} bytes")]
struct Excess {
    bytes: u64,
}

/// Where in a stream the next byte stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum At {
    /// In the type of a unidirectional stream.
    Kind,
    /// In a frame's type and length.
    Head,
    /// In a frame, this far from its end.
    Payload(u64),
    /// In a stream without frames.
    Free,
}

/// Reads frame headers as they go by.
#[derive(Debug)]
struct Gate {
    at: At,
    head: [u8; FRAME_HEAD_BYTES_MAX],
    filled: usize,
    control: bool,
    spent: u64,
}

impl Gate {
    fn of_request() -> Self {
        Self { at: At::Head, head: [0; FRAME_HEAD_BYTES_MAX], filled: 0, control: false, spent: 0 }
    }

    fn of_unidirectional() -> Self {
        Self { at: At::Kind, ..Self::of_request() }
    }

    fn pass(&mut self, mut bytes: &[u8]) -> Result<(), Excess> {
        while let Some((&first, rest)) = bytes.split_first() {
            match self.at {
                At::Free => return Ok(()),
                At::Payload(left) => {
                    let step = left.min(bytes.len() as u64);
                    // No more than `bytes.len()`.
                    bytes = &bytes[usize::try_from(step).unwrap_or(bytes.len())..];
                    self.at = if left == step { At::Head } else { At::Payload(left - step) };
                }
                At::Kind | At::Head => {
                    self.head[self.filled] = first;
                    self.filled += 1;
                    bytes = rest;
                    self.step()?;
                }
            }
        }
        Ok(())
    }

    fn step(&mut self) -> Result<(), Excess> {
        let read = &self.head[..self.filled];
        let Some((first, used)) = varint(read) else { return Ok(()) };
        if self.at == At::Kind {
            self.control = first == CONTROL_STREAM;
            self.at = if self.control { At::Head } else { At::Free };
            self.filled = 0;
            return Ok(());
        }
        let Some((bytes, _)) = varint(&read[used..]) else { return Ok(()) };
        self.filled = 0;
        if self.control {
            if bytes > CONTROL_FRAME_BYTES_MAX {
                return Err(Excess { bytes });
            }
        } else if first != DATA {
            self.spent = self.spent.saturating_add(bytes);
            let most = if first == HEADERS { HEADERS_BYTES_MAX } else { REQUEST_FRAMES_BYTES_MAX };
            if bytes > most || self.spent > REQUEST_FRAMES_BYTES_MAX {
                return Err(Excess { bytes });
            }
        }
        self.at = if bytes == 0 { At::Head } else { At::Payload(bytes) };
        Ok(())
    }
}

/// RFC 9000 16: the value and how many bytes it took. `None` if it is not all there.
fn varint(bytes: &[u8]) -> Option<(u64, usize)> {
    let length = 1 << (bytes.first()? >> 6);
    let value = bytes.get(..length)?.iter().fold(0, |value, byte| value << 8 | u64::from(*byte));
    // The two bits that told the length are no part of the value.
    Some((value & (u64::MAX >> (66 - 8 * length)), length))
}

/// A QUIC connection for the HTTP/3 parser.
pub(super) struct Connection {
    inner: h3_quinn::Connection,
    quic: quinn::Connection,
}

impl Connection {
    pub(super) fn new(quic: quinn::Connection) -> Self {
        Self { inner: h3_quinn::Connection::new(quic.clone()), quic }
    }
}

impl quic::OpenStreams<Bytes> for Connection {
    type BidiStream = Bidi;
    type SendStream = h3_quinn::SendStream<Bytes>;

    fn poll_open_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bidi, StreamErrorIncoming>> {
        let opened = quic::OpenStreams::<Bytes>::poll_open_bidi(&mut self.inner, cx);
        opened.map_ok(|stream| Bidi::new(stream, &self.quic))
    }

    fn poll_open_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<Self::SendStream, StreamErrorIncoming>> {
        quic::OpenStreams::<Bytes>::poll_open_send(&mut self.inner, cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        quic::OpenStreams::<Bytes>::close(&mut self.inner, code, reason);
    }
}

impl quic::Connection<Bytes> for Connection {
    type OpenStreams = Opener;
    type RecvStream = Receive;

    fn poll_accept_recv(&mut self, cx: &mut Context<'_>) -> Poll<Result<Receive, ConnectionErrorIncoming>> {
        let accepted = quic::Connection::<Bytes>::poll_accept_recv(&mut self.inner, cx);
        accepted.map_ok(|stream| Receive::new(stream, Gate::of_unidirectional(), &self.quic))
    }

    fn poll_accept_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bidi, ConnectionErrorIncoming>> {
        let accepted = quic::Connection::<Bytes>::poll_accept_bidi(&mut self.inner, cx);
        accepted.map_ok(|stream| Bidi::new(stream, &self.quic))
    }

    fn opener(&self) -> Opener {
        Opener { inner: quic::Connection::<Bytes>::opener(&self.inner), quic: self.quic.clone() }
    }
}

/// Opens streams. The parser wants one; a server's never opens a request.
pub(super) struct Opener {
    inner: h3_quinn::OpenStreams,
    quic: quinn::Connection,
}

impl quic::OpenStreams<Bytes> for Opener {
    type BidiStream = Bidi;
    type SendStream = h3_quinn::SendStream<Bytes>;

    fn poll_open_bidi(&mut self, cx: &mut Context<'_>) -> Poll<Result<Bidi, StreamErrorIncoming>> {
        let opened = quic::OpenStreams::<Bytes>::poll_open_bidi(&mut self.inner, cx);
        opened.map_ok(|stream| Bidi::new(stream, &self.quic))
    }

    fn poll_open_send(&mut self, cx: &mut Context<'_>) -> Poll<Result<Self::SendStream, StreamErrorIncoming>> {
        quic::OpenStreams::<Bytes>::poll_open_send(&mut self.inner, cx)
    }

    fn close(&mut self, code: Code, reason: &[u8]) {
        quic::OpenStreams::<Bytes>::close(&mut self.inner, code, reason);
    }
}

/// A request's stream, both ways.
pub(super) struct Bidi {
    inner: h3_quinn::BidiStream<Bytes>,
    gate: Gate,
    quic: quinn::Connection,
}

impl Bidi {
    fn new(inner: h3_quinn::BidiStream<Bytes>, quic: &quinn::Connection) -> Self {
        Self { inner, gate: Gate::of_request(), quic: quic.clone() }
    }
}

impl quic::RecvStream for Bidi {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        self.inner.poll_data(cx).map(|data| guard(&mut self.gate, &self.quic, data))
    }

    fn stop_sending(&mut self, code: u64) {
        self.inner.stop_sending(code);
    }

    fn recv_id(&self) -> StreamId {
        // The same for both directions, and always at hand for this one.
        self.inner.send_id()
    }
}

impl quic::SendStream<Bytes> for Bidi {
    fn poll_ready(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.inner.poll_ready(cx)
    }

    fn send_data<D: Into<WriteBuf<Bytes>>>(&mut self, data: D) -> Result<(), StreamErrorIncoming> {
        self.inner.send_data(data)
    }

    fn poll_finish(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), StreamErrorIncoming>> {
        self.inner.poll_finish(cx)
    }

    fn reset(&mut self, code: u64) {
        self.inner.reset(code);
    }

    fn send_id(&self) -> StreamId {
        self.inner.send_id()
    }
}

impl quic::BidiStream<Bytes> for Bidi {
    type SendStream = h3_quinn::SendStream<Bytes>;
    type RecvStream = Receive;

    fn split(self) -> (Self::SendStream, Receive) {
        let (send, receive) = self.inner.split();
        (send, Receive { inner: receive, gate: self.gate, quic: self.quic, waiting: false })
    }
}

/// A stream's receiving half.
pub(super) struct Receive {
    inner: h3_quinn::RecvStream,
    gate: Gate,
    quic: quinn::Connection,
    /// Whether a read is under way, during which the inner stream must not be touched otherwise.
    waiting: bool,
}

impl Receive {
    fn new(inner: h3_quinn::RecvStream, gate: Gate, quic: &quinn::Connection) -> Self {
        Self { inner, gate, quic: quic.clone(), waiting: false }
    }
}

impl quic::RecvStream for Receive {
    type Buf = Bytes;

    fn poll_data(&mut self, cx: &mut Context<'_>) -> Poll<Result<Option<Bytes>, StreamErrorIncoming>> {
        let read = self.inner.poll_data(cx);
        self.waiting = read.is_pending();
        read.map(|data| guard(&mut self.gate, &self.quic, data))
    }

    fn stop_sending(&mut self, code: u64) {
        // During a read the inner stream would panic. It tells the peer to stop when it is dropped.
        if !self.waiting {
            self.inner.stop_sending(code);
        }
    }

    fn recv_id(&self) -> StreamId {
        self.inner.recv_id()
    }
}

fn guard(
    gate: &mut Gate,
    quic: &quinn::Connection,
    data: Result<Option<Bytes>, StreamErrorIncoming>,
) -> Result<Option<Bytes>, StreamErrorIncoming> {
    let data = data?;
    if let Some(bytes) = &data
        && let Err(excess) = gate.pass(bytes)
    {
        tracing::debug!(client = %quic.remote_address(), bytes = excess.bytes, "HTTP/3 frame too long");
        quic.close(VarInt::from_u64(Code::H3_EXCESSIVE_LOAD.value()).unwrap_or_default(), b"frame too long");
        let connection_error = ConnectionErrorIncoming::Undefined(Arc::new(excess));
        return Err(StreamErrorIncoming::ConnectionErrorIncoming { connection_error });
    }
    Ok(data)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn integer(value: u64) -> Vec<u8> {
        match value {
            0..64 => vec![u8::try_from(value).unwrap()],
            64..16_384 => (0x4000 | u16::try_from(value).unwrap()).to_be_bytes().to_vec(),
            16_384..0x4000_0000 => (0x8000_0000 | u32::try_from(value).unwrap()).to_be_bytes().to_vec(),
            _ => (0xc000_0000_0000_0000 | value).to_be_bytes().to_vec(),
        }
    }

    fn frame(kind: u64, length: u64, payload: usize) -> Vec<u8> {
        [integer(kind), integer(length), vec![0; payload]].concat()
    }

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
            assert_eq!(varint(bytes), Some((value, bytes.len())));
            assert_eq!(varint(&bytes[..bytes.len() - 1]), None);
        }
    }

    #[test]
    fn a_frame_that_declares_too_much_is_stopped_at_its_head() {
        for (kind, bytes) in [(HEADERS, HEADERS_BYTES_MAX + 1), (0x21, REQUEST_FRAMES_BYTES_MAX + 1), (0x5, 1 << 30)] {
            assert_eq!(Gate::of_request().pass(&frame(kind, bytes, 0)), Err(Excess { bytes }), "{kind}");
        }
        let mut control = Gate::of_unidirectional();
        control.pass(&integer(CONTROL_STREAM)).unwrap();
        control.pass(&frame(0x4, CONTROL_FRAME_BYTES_MAX, 4_096)).unwrap();
        assert!(control.pass(&frame(0x4, CONTROL_FRAME_BYTES_MAX + 1, 0)).is_err());
    }

    #[test]
    fn small_frames_add_up() {
        let mut gate = Gate::of_request();
        let one = frame(0x21, 1_024, 1_024);
        for _ in 0..80 {
            gate.pass(&one).unwrap();
        }
        assert!(gate.pass(&one).is_err());
    }

    #[test]
    fn data_may_be_long_and_so_may_streams_without_frames() {
        let mut gate = Gate::of_request();
        gate.pass(&frame(HEADERS, 10, 10)).unwrap();
        gate.pass(&frame(DATA, 1 << 40, 1_000)).unwrap();
        let mut qpack = Gate::of_unidirectional();
        qpack.pass(&integer(0x2)).unwrap();
        qpack.pass(&[0xff; 1_000]).unwrap();
    }

    proptest::proptest! {
        #[test]
        fn it_does_not_matter_how_the_bytes_are_cut(
            frames in proptest::collection::vec((0_u64..40, 0_usize..2_000), 1..8),
            cut in 1_usize..50,
        ) {
            let bytes: Vec<u8> = frames.iter().flat_map(|(kind, len)| frame(*kind, *len as u64, *len)).collect();
            let (mut whole, mut pieces) = (Gate::of_request(), Gate::of_request());
            let at_once = whole.pass(&bytes);
            let in_pieces = bytes.chunks(cut).try_for_each(|piece| pieces.pass(piece));
            proptest::prop_assert_eq!(at_once, in_pieces);
            proptest::prop_assert_eq!(whole.at, pieces.at);
        }

        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = Gate::of_request().pass(&bytes);
            let _ = Gate::of_unidirectional().pass(&bytes);
        }
    }
}
