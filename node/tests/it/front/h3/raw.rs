//! A client that says whatever a test wants: frames and field sections are bytes.

use quinn::{RecvStream, SendStream};

use super::*;

/// RFC 9114 7.2.
pub(super) const DATA: u64 = 0x00;
pub(super) const HEADERS: u64 = 0x01;
pub(super) const SETTINGS: u64 = 0x04;
pub(super) const GOAWAY: u64 = 0x07;

/// A head that breaks no rule.
pub(super) const GOOD: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "https"), (":authority", HOST), (":path", "/")];

/// What became of a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Outcome {
    /// An answer with this status, whole.
    Status(u16),
    /// The stream was reset with this code.
    Reset(u64),
    /// The connection was closed with this code.
    Closed(u64),
}

pub(super) fn integer(value: u64) -> Vec<u8> {
    match value {
        0..64 => vec![u8::try_from(value).unwrap()],
        64..16_384 => (0x4000 | u16::try_from(value).unwrap()).to_be_bytes().to_vec(),
        16_384..0x4000_0000 => (0x8000_0000 | u32::try_from(value).unwrap()).to_be_bytes().to_vec(),
        _ => (0xc000_0000_0000_0000 | value).to_be_bytes().to_vec(),
    }
}

pub(super) fn frame(kind: u64, payload: &[u8]) -> Vec<u8> {
    [integer(kind), integer(payload.len() as u64), payload.to_vec()].concat()
}

/// An integer with a prefix (RFC 7541 5.1), for lengths below 16,384.
fn prefixed(value: usize, flags: u8, bits: u32) -> Vec<u8> {
    let most = (1_usize << bits) - 1;
    let byte = |value: usize| u8::try_from(value).unwrap();
    match value.checked_sub(most) {
        None => vec![flags | byte(value)],
        Some(left @ 0..128) => vec![flags | byte(most), byte(left)],
        Some(left) => vec![flags | byte(most), byte(left & 0x7f) | 0x80, byte(left >> 7)],
    }
}

/// A field section of literal names and values (RFC 9204 4.5.6).
pub(super) fn section(fields: &[(&str, &str)]) -> Vec<u8> {
    let mut bytes = vec![0, 0];
    for (name, value) in fields {
        bytes.extend(prefixed(name.len(), 0x20, 3));
        bytes.extend_from_slice(name.as_bytes());
        bytes.extend(prefixed(value.len(), 0, 7));
        bytes.extend_from_slice(value.as_bytes());
    }
    bytes
}

pub(super) fn head(fields: &[(&str, &str)]) -> Vec<u8> {
    frame(HEADERS, &section(fields))
}

/// A head that breaks no rule, for a path.
pub(super) fn get(path: &str) -> Vec<u8> {
    head(&[GOOD[0], GOOD[1], GOOD[2], (":path", path)])
}

/// A connection.
pub(super) struct Raw {
    pub(super) quic: quinn::Connection,
    _endpoint: Endpoint,
}

impl Raw {
    /// Connects, and opens no stream.
    pub(super) async fn bare(front: &Front) -> Self {
        let (endpoint, quic) = quic(front).await;
        Self { quic, _endpoint: endpoint }
    }

    /// A connection that was made elsewhere.
    pub(super) fn over(endpoint: Endpoint, quic: quinn::Connection) -> Self {
        Self { quic, _endpoint: endpoint }
    }

    /// Connects, with an empty SETTINGS on a control stream, which must not end.
    pub(super) async fn connect(front: &Front) -> (Self, SendStream) {
        let raw = Self::bare(front).await;
        let control = raw.uni(&[vec![0], frame(SETTINGS, &[])].concat()).await;
        (raw, control)
    }

    /// Opens a stream in one direction and writes to it.
    pub(super) async fn uni(&self, bytes: &[u8]) -> SendStream {
        let mut stream = self.quic.open_uni().await.unwrap();
        // Whoever is refused in the middle of it sees that by what the connection says.
        let _ = stream.write_all(bytes).await;
        stream
    }

    /// Sends these bytes as a request that ends with them.
    pub(super) async fn ask(&self, bytes: &[u8]) -> Outcome {
        let (mut send, receive) = self.quic.open_bi().await.unwrap();
        let _ = send.write_all(bytes).await;
        let _ = send.finish();
        self.outcome(receive).await
    }

    /// What comes back on a stream.
    pub(super) async fn outcome(&self, mut receive: RecvStream) -> Outcome {
        match timeout(PATIENCE, receive.read_to_end(1 << 20)).await.expect("no answer, no reset") {
            Ok(bytes) => Outcome::Status(status(&bytes)),
            Err(quinn::ReadToEndError::Read(quinn::ReadError::Reset(code))) => Outcome::Reset(code.into_inner()),
            Err(_) => Outcome::Closed(self.closed().await),
        }
    }

    /// Waits until the node closes the connection, and tells with which code.
    pub(super) async fn closed(&self) -> u64 {
        match timeout(PATIENCE, self.quic.closed()).await.expect("not closed") {
            quinn::ConnectionError::ApplicationClosed(close) => close.error_code.into_inner(),
            other => panic!("{other}"),
        }
    }
}

/// The status of an answer: its HEADERS frame has a length of four bytes and begins with `:status`.
fn status(answer: &[u8]) -> u16 {
    assert_eq!((answer[0], answer[1] >> 6), (0x01, 0b10), "{answer:02x?}");
    let field = &answer[5 + 2..];
    match field[0] {
        0xff => [100, 204, 206, 302, 400, 403, 421, 425, 500][usize::from(field[1])],
        indexed @ 0xd8..=0xdc => [103, 200, 304, 404, 503][usize::from(indexed - 0xd8)],
        // A value of its own, of three digits.
        0x5f => std::str::from_utf8(&field[3..6]).unwrap().parse().unwrap(),
        other => panic!("{other:02x}"),
    }
}
