//! Each rule of HTTP/3 and QPACK, broken over a real connection: what it costs, and the code that the standard names.

use super::raw::{DATA, GOOD, HEADERS, Outcome, Raw, frame, get, head, integer, section};
use super::*;

const CREATION: u64 = 0x103;
const CRITICAL: u64 = 0x104;
const UNEXPECTED: u64 = 0x105;
const FRAME: u64 = 0x106;
const LOAD: u64 = 0x107;
const ID: u64 = 0x108;
const SETTINGS: u64 = 0x109;
const MISSING: u64 = 0x10a;
const INCOMPLETE: u64 = 0x10d;
const MESSAGE: u64 = 0x10e;
const DECOMPRESSION: u64 = 0x200;
const ENCODER: u64 = 0x201;
const DECODER: u64 = 0x202;

/// A good head with more fields after it.
fn with(fields: &[(&str, &str)]) -> Vec<u8> {
    head(&[&GOOD[..], fields].concat())
}

/// A good head but for one of its fields.
fn but(name: &str, value: Option<&str>) -> Vec<u8> {
    let changed = |(own, old)| if own == name { Some((own, value?)) } else { Some((own, old)) };
    head(&GOOD.into_iter().filter_map(changed).collect::<Vec<_>>())
}

/// A good head that announces a body, and then these frames.
fn post(length: &str, frames: &[Vec<u8>]) -> Vec<u8> {
    [with(&[("content-length", length)]), frames.concat()].concat()
}

#[tokio::test]
async fn a_malformed_request_costs_its_stream_and_nothing_else() {
    let front = Front::start().await;
    let (raw, _control) = Raw::connect(&front).await;
    let last_first = [&GOOD[1..], &[("accept", "*/*"), GOOD[0]]].concat();
    for (rule, bytes) in [
        // RFC 9114 4.3: pseudo-header fields.
        (":method twice", with(&[(":method", "GET")])),
        (":path twice", with(&[(":path", "/")])),
        (":scheme twice", with(&[(":scheme", "https")])),
        (":authority twice", with(&[(":authority", HOST)])),
        (":status", with(&[(":status", "200")])),
        ("an unknown one", with(&[(":what", "1")])),
        (":protocol that was not offered", with(&[(":protocol", "websocket")])),
        ("one after a regular field", head(&last_first)),
        ("no :method", but(":method", None)),
        ("no :scheme", but(":scheme", None)),
        ("no :path", but(":path", None)),
        ("no host", but(":authority", None)),
        ("empty :path", but(":path", Some(""))),
        (":path that is none", but(":path", Some("hello"))),
        ("empty :authority", but(":authority", Some(""))),
        (":authority with a user", but(":authority", Some("me@hello.edge.test"))),
        ("CONNECT with :path", but(":method", Some("CONNECT"))),
        // RFC 9114 4.2: fields.
        ("upper case", with(&[("Accept", "*/*")])),
        ("a name that is no token", with(&[("a b", "c")])),
        ("a value with a line end", with(&[("a", "b\nc")])),
        ("a value with a zero", with(&[("a", "b\0c")])),
        ("connection", with(&[("connection", "close")])),
        ("keep-alive", with(&[("keep-alive", "1")])),
        ("proxy-connection", with(&[("proxy-connection", "close")])),
        ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
        ("upgrade", with(&[("upgrade", "websocket")])),
        ("te", with(&[("te", "gzip")])),
        // RFC 9114 4.1.2 and 4.3.1, RFC 9110 8.6.
        ("two content-lengths", with(&[("content-length", "0"), ("content-length", "1")])),
        ("content-length that is no number", with(&[("content-length", "0x0")])),
        ("a longer body", post("4", &[frame(DATA, b"hello")])),
        ("a body without length 0", post("0", &[frame(DATA, b"x")])),
        ("a shorter body", post("6", &[frame(DATA, b"hello")])),
        ("no body", post("1", &[])),
        ("two hosts", with(&[("host", HOST), ("host", HOST)])),
        ("another host", with(&[("host", "other.edge.test")])),
        // RFC 9114 4.3: trailers.
        ("pseudo-header field in trailers", [get("/"), head(&[(":path", "/")])].concat()),
        ("connection in trailers", [get("/"), head(&[("connection", "x")])].concat()),
    ] {
        assert_eq!(raw.ask(&bytes).await, Outcome::Reset(MESSAGE), "{rule}");
    }
    assert_eq!(raw.ask(&[]).await, Outcome::Reset(INCOMPLETE), "nothing");
    assert_eq!(raw.ask(&frame(0x21, b"x")).await, Outcome::Reset(INCOMPLETE), "no head");
    // The same connection goes on.
    let body = post("5", &[frame(DATA, b"he"), frame(0x21, b""), frame(DATA, b"llo"), head(&[("x-sum", "1")])]);
    for good in [get("/"), body, with(&[("te", "trailers"), ("host", HOST)])] {
        assert_eq!(raw.ask(&good).await, Outcome::Status(200));
    }
    let connect = head(&[(":method", "CONNECT"), (":authority", HOST)]);
    assert_eq!(raw.ask(&connect).await, Outcome::Status(405));
    let metrics = front.parts.metrics.text();
    assert!(metrics.contains(r#"selvage_front_refused_total{cause="message",protocol="h3"} 37"#), "{metrics}");
}

#[tokio::test]
async fn frames_against_the_rules_cost_the_connection() {
    let front = Front::start().await;
    let good = get("/");
    let after_head = |frame: Vec<u8>| [good.clone(), frame].concat();
    let qpack = |section: &[u8]| frame(HEADERS, section);
    for (rule, bytes, code) in [
        // RFC 9114 4.1: the order of frames.
        ("DATA first", frame(DATA, b"x"), UNEXPECTED),
        ("DATA after trailers", [good.clone(), head(&[("a", "b")]), frame(DATA, b"x")].concat(), UNEXPECTED),
        ("HEADERS after trailers", [good.clone(), head(&[("a", "b")]), head(&[("a", "b")])].concat(), UNEXPECTED),
        // RFC 9114 7.2: frames of other streams, and of HTTP/2.
        ("SETTINGS", frame(0x04, b""), UNEXPECTED),
        ("GOAWAY", frame(0x07, &[0]), UNEXPECTED),
        ("MAX_PUSH_ID", frame(0x0d, &[0]), UNEXPECTED),
        ("CANCEL_PUSH", frame(0x03, &[0]), UNEXPECTED),
        ("PUSH_PROMISE", after_head(frame(0x05, &[0, 0, 0])), UNEXPECTED),
        ("PRIORITY of HTTP/2", after_head(frame(0x02, &[0; 5])), UNEXPECTED),
        ("PING of HTTP/2", frame(0x06, &[0; 8]), UNEXPECTED),
        ("WINDOW_UPDATE of HTTP/2", frame(0x08, &[0; 4]), UNEXPECTED),
        ("CONTINUATION of HTTP/2", after_head(frame(0x09, b"")), UNEXPECTED),
        // RFC 9218 7.2.
        ("PRIORITY_UPDATE", frame(0xf_0700, &[0]), UNEXPECTED),
        // RFC 9114 7.1.
        ("the end in a frame", [integer(HEADERS), integer(100), vec![0; 10]].concat(), FRAME),
        ("the end in data", after_head([integer(DATA), integer(9), vec![0; 8]].concat()), FRAME),
        ("the end in a length", after_head(vec![0x00, 0x40]), FRAME),
        // RFC 9204 2.2, 3.1, 4.5.
        ("a dynamic entry", qpack(&[0, 0, 0x80]), DECOMPRESSION),
        ("an insert count", qpack(&[2, 0, 0xd1]), DECOMPRESSION),
        ("an entry after the base", qpack(&[0, 0, 0x10]), DECOMPRESSION),
        ("an entry that is not there", qpack(&[0, 0, 0xff, 0x24]), DECOMPRESSION),
        ("a section that is cut off", qpack(&[0, 0, 0x51, 0x05, b'/']), DECOMPRESSION),
        ("a string that is no code", qpack(&[0, 0, 0x51, 0x81, 0x00]), DECOMPRESSION),
        ("an empty section", qpack(&[]), DECOMPRESSION),
    ] {
        let (raw, _control) = Raw::connect(&front).await;
        let (mut send, _receive) = raw.quic.open_bi().await.unwrap();
        let _ = send.write_all(&bytes).await;
        let _ = send.finish();
        assert_eq!(raw.closed().await, code, "{rule}");
    }
}

#[tokio::test]
async fn streams_in_one_direction_against_the_rules_cost_the_connection() {
    let front = Front::start().await;
    let numbers = |values: &[u64]| values.iter().flat_map(|value| integer(*value)).collect::<Vec<u8>>();
    let settings = |values: &[u64]| [vec![0], frame(0x04, &numbers(values))].concat();
    let control = |frames: &[Vec<u8>]| [settings(&[]), frames.concat()].concat();
    for (rule, streams, code) in [
        ("no settings", vec![[vec![0], frame(0x07, &[0])].concat()], MISSING),
        ("something before settings", vec![[vec![0], frame(0x21, b"")].concat()], MISSING),
        ("settings twice", vec![control(&[frame(0x04, b"")])], UNEXPECTED),
        ("DATA", vec![control(&[frame(DATA, b"x")])], UNEXPECTED),
        ("HEADERS", vec![control(&[frame(HEADERS, b"x")])], UNEXPECTED),
        ("PING of HTTP/2", vec![control(&[frame(0x06, b"")])], UNEXPECTED),
        ("a setting twice", vec![settings(&[0x06, 1, 0x06, 1])], SETTINGS),
        ("a setting of HTTP/2", vec![settings(&[0x04, 1])], SETTINGS),
        ("extended CONNECT of 2", vec![settings(&[0x08, 2])], SETTINGS),
        ("datagrams of 2", vec![settings(&[0x33, 2])], SETTINGS),
        ("half a setting", vec![settings(&[0x06])], FRAME),
        ("MAX_PUSH_ID that goes down", vec![control(&[frame(0x0d, &[2]), frame(0x0d, &[1])])], ID),
        ("CANCEL_PUSH of what was never promised", vec![control(&[frame(0x03, &[0])])], ID),
        ("GOAWAY that goes up", vec![control(&[frame(0x07, &[0]), frame(0x07, &[4])])], ID),
        ("GOAWAY with more", vec![control(&[frame(0x07, &[0, 0])])], FRAME),
        ("the priority of no request", vec![control(&[frame(0xf_0700, &[2])])], ID),
        ("the priority of a push", vec![control(&[frame(0xf_0701, &[0])])], ID),
        ("a long frame", vec![control(&[frame(0x21, &[0; 5_000])])], LOAD),
        ("a huge frame", vec![control(&[numbers(&[0x21, 1 << 30])])], LOAD),
        ("a push stream", vec![settings(&[]), vec![0x01, 0]], CREATION),
        ("two control streams", vec![settings(&[]), settings(&[])], CREATION),
        ("two encoder streams", vec![vec![0x02], vec![0x02]], CREATION),
        ("two decoder streams", vec![vec![0x03], vec![0x03]], CREATION),
        ("a capacity", vec![vec![0x02, 0x3f, 0x01]], ENCODER),
        ("an insertion", vec![vec![0x02, 0xc0, 0x01, b'x']], ENCODER),
        ("an acknowledgment", vec![vec![0x03, 0x84]], DECODER),
        ("an increment", vec![vec![0x03, 0x01]], DECODER),
    ] {
        let raw = Raw::bare(&front).await;
        let mut open = Vec::new();
        for bytes in streams {
            open.push(raw.uni(&bytes).await);
        }
        assert_eq!(raw.closed().await, code, "{rule}");
    }
    for critical in [settings(&[]), vec![0x02], vec![0x03]] {
        for reset in [false, true] {
            let raw = Raw::bare(&front).await;
            let mut stream = raw.uni(&critical).await;
            if reset {
                // A reset that overtakes the type is nobody's: requests in between let the type arrive.
                for _ in 0..10 {
                    assert_eq!(raw.ask(&get("/")).await, Outcome::Status(200));
                }
                stream.reset(0_u32.into()).unwrap();
            } else {
                stream.finish().unwrap();
            }
            assert_eq!(raw.closed().await, CRITICAL, "{critical:?} {reset}");
        }
    }
}

#[tokio::test]
async fn what_a_client_may_do_is_borne() {
    let front = Front::start().await;
    let (raw, mut control) = Raw::connect(&front).await;
    // Grease (RFC 9114 7.2.8, 6.2.3), a capacity of 0, a cancelled stream, MAX_PUSH_ID, a priority, and a stream that ends
    // before its type.
    control
        .write_all(&[frame(0x21, b"grease"), frame(0x0d, &[7]), frame(0xf_0700, b"\0u=1, i")].concat())
        .await
        .unwrap();
    let _encoder = raw.uni(&[0x02, 0x20]).await;
    let _decoder = raw.uni(&[0x03, 0x40]).await;
    let other = raw.uni(&[0x21, 1, 2, 3]).await;
    assert_eq!(timeout(PATIENCE, other.stopped()).await.unwrap().unwrap(), Some(VarInt::from_u32(0x103)));
    let mut nothing = raw.uni(&[]).await;
    nothing.finish().unwrap();
    let greased = [frame(0x21, b"grease"), get("/"), frame(0x40, b"")].concat();
    assert_eq!(raw.ask(&greased).await, Outcome::Status(200));
    // A head in many pieces is a head all the same.
    let (mut send, receive) = raw.quic.open_bi().await.unwrap();
    for piece in get("/").chunks(3) {
        send.write_all(piece).await.unwrap();
        tokio::task::yield_now().await;
    }
    send.finish().unwrap();
    assert_eq!(raw.outcome(receive).await, Outcome::Status(200));
    assert_eq!(raw.ask(&frame(HEADERS, &section(&[("a", &"b".repeat(10_000)), ("c", &"d".repeat(10_000))]))).await, {
        // 431: the fields are more than the 16 KiB that our settings tell.
        Outcome::Status(431)
    });
}
