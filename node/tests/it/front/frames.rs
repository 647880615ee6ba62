//! HTTP/2 messages that break a rule, by the rule (RFC 9113), as raw frames; and the client that sends them.

use tokio::net::tcp::{OwnedReadHalf, OwnedWriteHalf};

use super::*;

pub(super) const DATA: u8 = 0;
pub(super) const HEADERS: u8 = 1;
pub(super) const PRIORITY: u8 = 2;
pub(super) const RST_STREAM: u8 = 3;
pub(super) const SETTINGS: u8 = 4;
pub(super) const PING: u8 = 6;
pub(super) const GOAWAY: u8 = 7;
pub(super) const WINDOW_UPDATE: u8 = 8;
pub(super) const CONTINUATION: u8 = 9;
pub(super) const END_STREAM: u8 = 1;
pub(super) const END_HEADERS: u8 = 4;

/// RFC 9113 7.
const PROTOCOL_ERROR: u32 = 1;
const FLOW_CONTROL_ERROR: u32 = 3;
const STREAM_CLOSED: u32 = 5;
const FRAME_SIZE_ERROR: u32 = 6;
const COMPRESSION_ERROR: u32 = 9;

/// A frame with its head.
pub(super) fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// Fields as literals that nobody keeps (RFC 7541 6.2.2), shorter than 127 bytes each.
pub(super) fn fields(list: &[(&str, &str)]) -> Vec<u8> {
    let text = |text: &str| [&[u8::try_from(text.len()).unwrap()], text.as_bytes()].concat();
    list.iter().flat_map(|(name, value)| [vec![0], text(name), text(value)].concat()).collect()
}

/// A good request's pseudo-fields.
pub(super) const GET: [(&str, &str); 4] =
    [(":method", "GET"), (":scheme", "http"), (":authority", HOST), (":path", "/")];

pub(super) fn ask(stream: u32) -> Vec<u8> {
    frame(HEADERS, END_HEADERS | END_STREAM, stream, &fields(&GET))
}

/// A connection of raw frames, past the preface.
pub(super) struct Raw {
    pub(super) read: OwnedReadHalf,
    pub(super) write: OwnedWriteHalf,
}

/// A frame that came.
#[derive(Debug)]
pub(super) struct Came {
    pub(super) kind: u8,
    pub(super) stream: u32,
    pub(super) payload: Vec<u8>,
}

impl Came {
    fn number(&self, at: usize) -> u32 {
        u32::from_be_bytes(self.payload[at..at + 4].try_into().unwrap())
    }
}

/// How the node ended a stream or a connection.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum End {
    /// An answer's status.
    Status(u16),
    /// RST_STREAM with this code.
    Reset(u32),
    /// GOAWAY with this code.
    Goaway(u32),
    /// Nothing more came.
    Closed,
}

impl Raw {
    pub(super) async fn connect(front: &Front, settings: &[u8]) -> Self {
        let tcp = TcpStream::connect(front.http()).await.unwrap();
        tcp.set_nodelay(true).unwrap();
        let (read, mut write) = tcp.into_split();
        write.write_all(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n").await.unwrap();
        write.write_all(&frame(SETTINGS, 0, 0, settings)).await.unwrap();
        Self { read, write }
    }

    pub(super) async fn send(&mut self, bytes: &[u8]) {
        // The node may have closed already.
        let _ = self.write.write_all(bytes).await;
    }

    /// The next frame. None: the node has closed.
    pub(super) async fn next(&mut self) -> Option<Came> {
        let mut head = [0; 9];
        timeout(PATIENCE, self.read.read_exact(&mut head)).await.expect("the node says something").ok()?;
        let length = usize::from(head[0]) << 16 | usize::from(head[1]) << 8 | usize::from(head[2]);
        let mut payload = vec![0; length];
        self.read.read_exact(&mut payload).await.ok()?;
        Some(Came { kind: head[3], stream: u32::from_be_bytes(head[5..].try_into().unwrap()), payload })
    }

    /// How this stream ends, or the connection does before.
    pub(super) async fn end(&mut self, stream: u32) -> End {
        while let Some(came) = self.next().await {
            match came.kind {
                HEADERS if came.stream == stream => return End::Status(status(&came.payload)),
                RST_STREAM if came.stream == stream => return End::Reset(came.number(0)),
                GOAWAY if came.number(4) != 0 => return End::Goaway(came.number(4)),
                _ => {}
            }
        }
        End::Closed
    }
}

/// The status in an answer's fields: indexed (RFC 7541 A), or a literal.
fn status(block: &[u8]) -> u16 {
    match block[0] {
        0x88 => 200,
        0x8c => 400,
        0x8d => 404,
        _ => {
            // The name by index 8 to 14, the value a string, as Huffman code or plain.
            let length = usize::from(block[1] & 0x7f);
            let value = &block[2..2 + length];
            match value {
                [0x68, 0x0d, 0xff] | b"405" => 405,
                [0x68, 0x2d, 0x7f] | b"414" => 414,
                [0x69, 0x90, 0xff] | b"431" => 431,
                _ => 0,
            }
        }
    }
}

#[tokio::test]
async fn the_raw_client_is_understood() {
    let front = Front::start().await;
    let mut raw = Raw::connect(&front, &[]).await;
    raw.send(&ask(1)).await;
    assert_eq!(raw.end(1).await, End::Status(200));
    let post = [&[(":method", "POST")], &GET[1..], &[("content-length", "5")]].concat();
    let head = frame(HEADERS, END_HEADERS, 3, &fields(&post));
    raw.send(&[head, frame(DATA, END_STREAM, 3, b"hello")].concat()).await;
    assert_eq!(raw.end(3).await, End::Status(200));
}

/// A rule, and fields that break it in place of a request's.
type Case = (&'static str, &'static [(&'static str, &'static str)]);

const M: (&str, &str) = (":method", "GET");
const S: (&str, &str) = (":scheme", "http");
const A: (&str, &str) = (":authority", HOST);
const P: (&str, &str) = (":path", "/");

const CASES: &[Case] = &[
    ("8.2.1: a name in upper case", &[M, S, A, P, ("X", "1")]),
    ("8.2.1: a space in a name", &[M, S, A, P, ("x y", "1")]),
    ("8.2.1: a colon in a name", &[M, S, A, P, ("x:y", "1")]),
    ("8.2.1: a control in a name", &[M, S, A, P, ("x\u{1}", "1")]),
    ("8.2.1: an empty name", &[M, S, A, P, ("", "1")]),
    ("8.2.1: NUL in a value", &[M, S, A, P, ("x", "a\0b")]),
    ("8.2.1: a line feed in a value", &[M, S, A, P, ("x", "a\nb: c")]),
    ("8.2.1: a carriage return in a value", &[M, S, A, P, ("x", "a\rb")]),
    ("8.2.1: a value that begins with a space", &[M, S, A, P, ("x", " a")]),
    ("8.2.1: a value that ends with a tab", &[M, S, A, P, ("x", "a\t")]),
    ("8.2.2: connection", &[M, S, A, P, ("connection", "close")]),
    ("8.2.2: keep-alive", &[M, S, A, P, ("keep-alive", "1")]),
    ("8.2.2: proxy-connection", &[M, S, A, P, ("proxy-connection", "close")]),
    ("8.2.2: transfer-encoding", &[M, S, A, P, ("transfer-encoding", "chunked")]),
    ("8.2.2: upgrade", &[M, S, A, P, ("upgrade", "websocket")]),
    ("8.2.2: te other than trailers", &[M, S, A, P, ("te", "gzip")]),
    ("8.3: an unknown pseudo-field", &[M, S, A, P, (":x", "1")]),
    ("8.3: a pseudo-field of answers", &[M, S, A, P, (":status", "200")]),
    ("8.3: a pseudo-field after a field", &[M, S, A, ("x", "1"), P]),
    ("8.3: a pseudo-field twice", &[M, S, A, P, P]),
    ("8.3.1: no method", &[S, A, P]),
    ("8.3.1: no scheme", &[M, A, P]),
    ("8.3.1: no path", &[M, S, A]),
    ("8.3.1: an empty path", &[M, S, A, (":path", "")]),
    ("8.3.1: a path without a slash", &[M, S, A, (":path", "a")]),
    ("8.3.1: an asterisk for GET", &[M, S, A, (":path", "*")]),
    ("8.3.1: no authority and no Host", &[M, S, P]),
    ("8.3.1: an empty authority", &[M, S, (":authority", ""), P]),
    ("8.3.1: user information", &[M, S, (":authority", "a@hello.edge.test"), P]),
    ("8.3.1: a Host that differs", &[M, S, A, P, ("host", "other.edge.test")]),
    ("9110 7.2: two Hosts", &[M, S, A, P, ("host", HOST), ("host", HOST)]),
    ("8.1.1: a length without a body", &[M, S, A, P, ("content-length", "5")]),
    ("8.1.1: two lengths", &[M, S, A, P, ("content-length", "0"), ("content-length", "1")]),
    ("9110 8.6: a length that is no number", &[M, S, A, P, ("content-length", "+0")]),
];

#[tokio::test]
async fn every_rule_of_http_2_messages_is_kept() {
    let front = Front::start().await;
    for (rule, list) in CASES {
        let mut raw = Raw::connect(&front, &[]).await;
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(list))).await;
        // RFC 9113 8.1.1: a stream error, or an answer of the 400s.
        let end = raw.end(1).await;
        if end == End::Goaway(PROTOCOL_ERROR) {
            // RFC 9113 5.4: the parser takes names that can't be for the connection's mistake.
            continue;
        }
        assert!(matches!(end, End::Reset(PROTOCOL_ERROR) | End::Status(400)), "{rule}: {end:?}");
        // Else the mistake is one stream's.
        raw.send(&ask(3)).await;
        assert_eq!(raw.end(3).await, End::Status(200), "{rule}");
    }
    for (method, want) in [("TRACE", 405), ("CONNECT", 405)] {
        let mut raw = Raw::connect(&front, &[]).await;
        let list = if want == 405 && method == "CONNECT" {
            vec![(":method", method), A]
        } else {
            vec![(":method", method), S, A, P]
        };
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&list))).await;
        assert_eq!(raw.end(1).await, End::Status(want), "{method}");
    }
}

#[tokio::test]
async fn a_body_that_is_not_as_long_as_it_says_ends_its_stream() {
    let front = Front::start().await;
    let post = [&[(":method", "POST")], &GET[1..], &[("content-length", "5")]].concat();
    for body in ["hell", "hello!"] {
        let mut raw = Raw::connect(&front, &[]).await;
        let head = frame(HEADERS, END_HEADERS, 1, &fields(&post));
        raw.send(&[head, frame(DATA, END_STREAM, 1, body.as_bytes())].concat()).await;
        // The answer may have been on its way: then the reset comes after it.
        let mut end = raw.end(1).await;
        if matches!(end, End::Status(200)) {
            end = raw.end(1).await;
        }
        assert_eq!(end, End::Reset(PROTOCOL_ERROR), "{body}");
    }
}

#[tokio::test]
async fn a_frame_that_breaks_a_rule_ends_its_connection_with_the_rules_code() {
    let front = Front::start().await;
    let max = 0x7fff_ffff_u32.to_be_bytes();
    for (rule, bytes, code) in [
        ("4.2: a frame that is too long", frame(DATA, 0, 1, &[0; 16_385]), FRAME_SIZE_ERROR),
        (
            "4.3: a block that can't be decoded",
            frame(HEADERS, 5, 1, &[0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            COMPRESSION_ERROR,
        ),
        ("5.1: DATA on an idle stream", frame(DATA, 0, 1, b"x"), PROTOCOL_ERROR),
        ("5.1.1: an even stream", ask(2), PROTOCOL_ERROR),
        ("5.1.1: a stream below the last", [ask(5), ask(3)].concat(), PROTOCOL_ERROR),
        ("6.1: DATA on stream 0", frame(DATA, 0, 0, b"x"), PROTOCOL_ERROR),
        ("6.2: HEADERS on stream 0", frame(HEADERS, 5, 0, &fields(&GET)), PROTOCOL_ERROR),
        ("6.2: padding beyond the frame", frame(HEADERS, 0xd, 1, &[9, 1, 2]), PROTOCOL_ERROR),
        ("6.4: RST_STREAM on stream 0", frame(RST_STREAM, 0, 0, &[0; 4]), PROTOCOL_ERROR),
        ("6.4: RST_STREAM of 3 bytes", frame(RST_STREAM, 0, 1, &[0; 3]), FRAME_SIZE_ERROR),
        ("6.5: SETTINGS on a stream", frame(SETTINGS, 0, 1, &[]), PROTOCOL_ERROR),
        ("6.5: SETTINGS of 5 bytes", frame(SETTINGS, 0, 0, &[0; 5]), FRAME_SIZE_ERROR),
        ("6.5.2: a window beyond numbers", frame(SETTINGS, 0, 0, &[0, 4, 0x80, 0, 0, 0]), FLOW_CONTROL_ERROR),
        ("6.5.2: a frame size that is too small", frame(SETTINGS, 0, 0, &[0, 5, 0, 0, 0, 1]), PROTOCOL_ERROR),
        ("6.6: PUSH_PROMISE of a client", frame(5, 4, 1, &[0, 0, 0, 2]), PROTOCOL_ERROR),
        ("6.7: PING on a stream", frame(PING, 0, 1, &[0; 8]), PROTOCOL_ERROR),
        ("6.7: PING of 7 bytes", frame(PING, 0, 0, &[0; 7]), FRAME_SIZE_ERROR),
        ("6.8: GOAWAY on a stream", frame(GOAWAY, 0, 1, &[0; 8]), PROTOCOL_ERROR),
        ("6.9: a window that grows by nought", frame(WINDOW_UPDATE, 0, 0, &[0; 4]), PROTOCOL_ERROR),
        ("6.9: WINDOW_UPDATE of 3 bytes", frame(WINDOW_UPDATE, 0, 0, &[0; 3]), FRAME_SIZE_ERROR),
        ("6.9.1: a window beyond numbers", frame(WINDOW_UPDATE, 0, 0, &max), FLOW_CONTROL_ERROR),
        ("6.10: CONTINUATION of nothing", frame(CONTINUATION, 4, 1, b""), PROTOCOL_ERROR),
        (
            "6.10: a frame between pieces of a head",
            [frame(HEADERS, 0, 1, &fields(&GET)), frame(PING, 0, 0, &[0; 8])].concat(),
            PROTOCOL_ERROR,
        ),
        ("5.1: HEADERS after the end", [ask(1), ask(1)].concat(), STREAM_CLOSED),
    ] {
        let mut raw = Raw::connect(&front, &[]).await;
        raw.send(&bytes).await;
        // A stream that was closed may also be reset (5.4.2).
        let end = loop {
            match raw.end(1).await {
                End::Status(_) => {}
                end => break end,
            }
        };
        // The parser gives the general code for some mistakes; with STREAM_CLOSED it may end the stream alone.
        let fits = match end {
            End::Goaway(given) => given == code || given == PROTOCOL_ERROR,
            End::Reset(given) => code == STREAM_CLOSED && given == STREAM_CLOSED,
            End::Status(_) | End::Closed => false,
        };
        assert!(fits, "{rule}: {end:?}");
    }
}

#[tokio::test]
async fn a_head_that_is_too_large_is_told_so_over_http_2() {
    let front = Front::start().await;
    let value = "a".repeat(120);
    let many: Vec<(&str, &str)> = GET.into_iter().chain((0..101).map(|_| ("x", "1"))).collect();
    let large: Vec<(&str, &str)> = GET.into_iter().chain((0..120).map(|_| ("x", value.as_str()))).collect();
    for list in [many, large] {
        let mut raw = Raw::connect(&front, &[]).await;
        raw.send(&frame(HEADERS, END_HEADERS | END_STREAM, 1, &fields(&list))).await;
        assert_eq!(raw.end(1).await, End::Status(431), "{} fields", list.len());
        raw.send(&ask(3)).await;
        assert_eq!(raw.end(3).await, End::Status(200));
    }
}

#[tokio::test]
async fn a_connection_of_http_2_ends_after_its_last_request() {
    let front = Front::with(Bounds { streams_per_connection_max: 3, ..Bounds::default() }).await;
    let mut raw = Raw::connect(&front, &[]).await;
    raw.send(&[ask(1), ask(3), ask(5)].concat()).await;
    let (mut left, mut answers) = (false, 0);
    while let Some(came) = raw.next().await {
        answers += u32::from(came.kind == HEADERS);
        left |= came.kind == GOAWAY && came.number(4) == 0;
        if came.kind == PING {
            // The node asks whether its GOAWAY was heard.
            raw.send(&frame(PING, 1, 0, &came.payload)).await;
        }
    }
    assert!(left && answers == 3, "{answers}");
}
