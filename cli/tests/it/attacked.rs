//! A node under attack, as a process of its own: what it holds in memory stays within bounds, and others are served.

use std::io::{ErrorKind, Read as _, Write as _};
use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use crate::program::{Serving, example, finish, selvage, well};

/// Connections of each attack at once.
const CONNECTIONS: usize = 8;
/// Bytes that each of them sends at most.
const SENT_BYTES_MAX: usize = 16 * 1024 * 1024;
/// Bytes that the node may hold more than before after any attack: half of what one sends.
const GROWN_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// For what must happen at some time.
const PATIENCE: Duration = Duration::from_secs(60);
/// How long the system has no descriptor.
const LACKING: Duration = Duration::from_secs(2);
/// What the system says of a connection that the other side has ended.
const ENDED: [ErrorKind; 3] = [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe, ErrorKind::ConnectionAborted];

const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// A frame of HTTP/2 (RFC 9113 4.1).
fn frame(kind: u8, flags: u8, stream: u32, payload: &[u8]) -> Vec<u8> {
    let length = u32::try_from(payload.len()).unwrap().to_be_bytes();
    [&length[1..], &[kind, flags], &stream.to_be_bytes(), payload].concat()
}

/// A head, in the static table's terms but for its host (RFC 7541 A).
fn head() -> Vec<u8> {
    [&[0x82, 0x86, 0x84, 0x41, 9][..], b"localhost"].concat()
}

/// The beginning of an attack, and what it goes on with, by its number.
type Attack = (&'static str, fn() -> Vec<u8>, fn(u32) -> Vec<u8>);

fn h2(more: &[u8]) -> Vec<u8> {
    [PREFACE, more].concat()
}

const ATTACKS: &[Attack] = &[
    ("a head of HTTP/1.1 without end", || b"GET / HTTP/1.1\r\nhost: a\r\n".into(), |_| b"x: y\r\n".repeat(1_000)),
    (
        "a body that nobody wants",
        || b"POST /status/200 HTTP/1.1\r\nhost: a\r\ntransfer-encoding: chunked\r\n\r\n".into(),
        |_| [&b"2000\r\n"[..], &[b'x'; 8_192], b"\r\n"].concat(),
    ),
    ("requests whose answers nobody reads", Vec::new, |_| b"GET / HTTP/1.1\r\nhost: localhost\r\n\r\n".repeat(100)),
    ("rapid reset", || h2(&[]), |n| [frame(1, 5, n * 2 + 1, &head()), frame(3, 0, n * 2 + 1, &[0, 0, 0, 8])].concat()),
    (
        "a head of HTTP/2 without end",
        || h2(&frame(1, 0, 1, &head())),
        |_| frame(9, 0, 1, &b"\0\x01x\x01y".repeat(1_000)),
    ),
    (
        "a bomb of references",
        || h2(&[]),
        |n| {
            // One field of 4,000 bytes is kept, then named 12,000 times (RFC 7541 6.2.1, 6.1).
            let block = [&[0x40, 1, b'x', 0x7f, 0xa1, 0x1e][..], &[b'a'; 4_000], &[0xbe; 12_000]].concat();
            frame(1, 5, n * 2 + 1, &block)
        },
    ),
    (
        "bodies on a hundred streams",
        || h2(&[]),
        |n| {
            let stream = n % 100 * 2 + 1;
            if n < 100 {
                frame(1, 4, stream, &[&[0x83][..], &head()[1..]].concat())
            } else {
                frame(0, 0, stream, &[0; 8_192])
            }
        },
    ),
    ("pings", || h2(&[]), |_| frame(6, 0, 0, &[0; 8]).repeat(100)),
    ("settings", || h2(&[]), |_| frame(4, 0, 0, &[0, 4, 0, 0, 255, 255]).repeat(100)),
    ("unknown frames", || h2(&[]), |_| frame(0x77, 0, 0, &[0; 16_000])),
];

/// Sends one attack over some connections, until the node ends them, takes no more, or all is sent.
fn attack(front: SocketAddr, (_, begin, more): &Attack) -> Vec<TcpStream> {
    let one = || {
        let mut tcp = TcpStream::connect(front).unwrap();
        // What is not taken for so long was refused, in effect.
        tcp.set_write_timeout(Some(Duration::from_secs(1))).unwrap();
        let mut sent = 0;
        let mut alive = tcp.write_all(&begin()).is_ok();
        let mut number = 0;
        while alive && sent < SENT_BYTES_MAX {
            let bytes = more(number);
            alive = tcp.write_all(&bytes).is_ok();
            (sent, number) = (sent + bytes.len(), number + 1);
        }
        tcp
    };
    std::thread::scope(|scope| {
        let all: Vec<_> = (0..CONNECTIONS).map(|_| scope.spawn(one)).collect();
        all.into_iter().map(|one| one.join().unwrap()).collect()
    })
}

fn get(front: SocketAddr) -> String {
    ask(front, "/")
}

fn ask(server: SocketAddr, path: &str) -> String {
    let mut tcp = TcpStream::connect(server).unwrap();
    tcp.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut answer = String::new();
    let _ = tcp.write_all(format!("GET {path} HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").as_bytes());
    let _ = tcp.read_to_string(&mut answer);
    answer
}

fn hello() -> [String; 4] {
    ["up", "--listen", "127.0.0.1:0", "-f"].map(str::to_owned)
}

fn address(serving: &Serving) -> SocketAddr {
    serving.url("").trim_start_matches("http://").trim_end_matches('/').parse().unwrap()
}

#[test]
fn no_attack_by_tcp_makes_a_node_hold_much_memory() {
    let serving = Serving::start(selvage().args(hello()).arg(example("hello")));
    let front = address(&serving);
    // What a node takes once, for its first requests, is not the attacker's.
    for _ in 0..50 {
        assert!(get(front).starts_with("HTTP/1.1 200 "));
    }
    let before = serving.resident_bytes();
    for one in ATTACKS {
        let held = attack(front, one);
        let grown = serving.resident_bytes().saturating_sub(before);
        assert!(grown < GROWN_BYTES_MAX, "{}: {grown} bytes more", one.0);
        assert!(get(front).starts_with("HTTP/1.1 200 "), "{}: somebody else", one.0);
        drop(held);
    }
    assert!(serving.stop(), "it ends well");
}

/// Whether the other side has ended it. It sends nothing by itself.
fn is_ended(mut tcp: &TcpStream) -> bool {
    match tcp.read(&mut [0]) {
        Ok(count) => count == 0,
        Err(error) => ENDED.contains(&error.kind()),
    }
}

#[test]
fn clients_do_not_take_the_last_descriptors() {
    let mut limited = Command::new("sh");
    limited.args(["-c", "ulimit -n 256 && exec \"$0\" \"$@\"", env!("CARGO_BIN_EXE_selvage")]).args(hello());
    let serving = Serving::start(limited.arg(example("hello")).env("SELVAGE_LOG", "error"));
    let front = address(&serving);
    let hold = || {
        let tcp = TcpStream::connect(front).unwrap();
        tcp.set_nonblocking(true).unwrap();
        tcp
    };
    let held: Vec<TcpStream> = (0..400).map(|_| hold()).collect();
    let start = Instant::now();
    // Each that is beyond four fifths of the limit is reset, and the listener goes on.
    while !held.iter().any(is_ended) {
        assert!(start.elapsed() < PATIENCE, "nobody was turned away");
    }
    while held.iter().filter(|tcp| !is_ended(tcp)).count() > 204 {
        assert!(start.elapsed() < PATIENCE, "too many are held");
    }
    // What the apps need is left for them.
    drop(held);
    while !get(front).starts_with("HTTP/1.1 200 ") {
        assert!(start.elapsed() < PATIENCE, "nobody is served afterwards");
    }
    assert!(serving.stop(), "it ends well");
}

/// Runs `selvage node` with nothing but a plain listener and one for its operator, and what it logs in a file.
fn bare_node(dir: &Path) -> Serving {
    let text = "name = \"fra-1\"\nregion = \"fra\"\nstate_dir = \"state\"\n\
                [listen]\nhttp = \"127.0.0.1:0\"\nadmin = \"127.0.0.1:0\"\n";
    std::fs::write(dir.join("node.toml"), text).unwrap();
    let log = std::fs::File::create(dir.join("log")).unwrap();
    Serving::start(selvage().arg("node").current_dir(dir).env("SELVAGE_LOG", "warn").stderr(log))
}

/// Sets how many descriptors it may have, for a moment: the last of its limits stays.
fn limit_descriptors(serving: &Serving, count: usize) {
    let mut prlimit = Command::new("prlimit");
    let done = finish(prlimit.args(["--pid", &serving.id().to_string(), &format!("--nofile={count}:")]));
    well("prlimit", &done);
}

#[test]
fn a_listener_for_which_the_system_has_no_descriptor_waits_and_serves_when_there_is_one() {
    let dir = tempfile::tempdir().unwrap();
    let serving = bare_node(dir.path());
    let front: SocketAddr = serving.told["front"].as_str().unwrap().parse().unwrap();
    let admin: SocketAddr = serving.told["admin"].as_str().unwrap().parse().unwrap();
    assert!(get(front).starts_with("HTTP/1.1 404 "), "no app");
    // As many as it has had before: whatever it lets go of by itself is soon taken.
    limit_descriptors(&serving, serving.descriptors());
    let waiting: Vec<TcpStream> = (0..50).map(|_| TcpStream::connect(front).unwrap()).collect();
    let others: Vec<TcpStream> = (0..10).map(|_| TcpStream::connect(admin).unwrap()).collect();
    let (start, log) = (Instant::now(), dir.path().join("log"));
    let told = || std::fs::read_to_string(&log).unwrap().matches("no connection can be accepted").count();
    while told() < 2 {
        assert!(start.elapsed() < PATIENCE, "the listeners do not say what they lack");
    }
    let (before, start) = (serving.cpu(), Instant::now());
    std::thread::sleep(LACKING);
    let used = serving.cpu() - before;
    assert!(used < start.elapsed() / 4, "it used {used:?} of CPU time while it waited");
    assert_eq!(told(), 2, "each listener says it once: {}", std::fs::read_to_string(&log).unwrap());

    limit_descriptors(&serving, 1_024);
    for mut tcp in waiting {
        tcp.set_read_timeout(Some(PATIENCE)).unwrap();
        tcp.write_all(b"GET / HTTP/1.1\r\nhost: localhost\r\nconnection: close\r\n\r\n").unwrap();
        let mut answer = String::new();
        tcp.read_to_string(&mut answer).unwrap();
        assert!(answer.starts_with("HTTP/1.1 404 "), "{answer}");
    }
    drop(others);
    let metrics = ask(admin, "/metrics");
    assert!(metrics.contains("selvage_connections_refused_total{bound=\"system\"} "), "{metrics}");
    assert!(serving.stop(), "it ends well");
}
