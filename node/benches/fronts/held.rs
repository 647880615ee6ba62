//! Connections that do nothing: what a server keeps for each.

use std::io::{Read as _, Write as _};
use std::net::{Ipv4Addr, SocketAddrV4, TcpStream};
use std::sync::Arc;
use std::time::Duration;

use anyhow::ensure;
use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use rustls::pki_types::ServerName;
use rustls::{ClientConnection, StreamOwned};
use socket2::{Domain, Socket, Type};

use super::load::Version;
use super::{HOST, Running, SMALL_BYTES, shakes};

/// How many there should be.
pub(crate) const CONNECTIONS: u32 = 20_000;
/// Of a process's descriptors, in a hundred, those that a node lets its clients have.
const PERCENT: u64 = 80;
/// Descriptors that both sides have besides.
const OTHERS: u64 = 200;
/// Connections from one address.
const OF_ADDRESS: u32 = 2_000;
/// After this a connection is at rest for the node, whose bounds on heads are looked at every ten seconds.
pub(crate) const REST: Duration = Duration::from_secs(25);
/// Longest wait for an answer.
const ANSWER_MAX: Duration = Duration::from_secs(10);
/// HTTP/2's preface, no settings, and a GET of `/` (RFC 9113 3.4, RFC 7541 A).
const PREFACE: &[u8] = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n\0\0\0\x04\0\0\0\0\0";

/// What was found.
pub(crate) struct Held {
    pub(crate) count: u32,
    /// Just after their answers.
    pub(crate) kib_fresh: f64,
    /// After a rest.
    pub(crate) kib_rested: f64,
    pub(crate) descriptors: u64,
}

/// Raises how many descriptors this process, and those that it starts, may have.
pub(crate) fn raise_descriptors() -> u64 {
    let limit = getrlimit(Resource::Nofile);
    // It fails for nobody: the first may be as high as the second.
    let _ = setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum });
    getrlimit(Resource::Nofile).current.unwrap_or(u64::MAX)
}

/// Opens so many connections, each of which has had one answer, and looks what the server holds for them.
pub(crate) fn hold(server: &Running, version: Version, wanted: u32) -> anyhow::Result<Held> {
    let descriptors = raise_descriptors();
    let possible = u32::try_from((descriptors / 100 * PERCENT).saturating_sub(OTHERS)).unwrap_or(u32::MAX);
    let count = wanted.min(possible);
    let alpn: &[u8] = if version == Version::H2 { b"h2" } else { b"http/1.1" };
    let config = Arc::new(shakes::client(&selvage_certs::provider(), alpn)?);
    let open = |number: u32| -> anyhow::Result<StreamOwned<ClientConnection, TcpStream>> {
        let socket = Socket::new(Domain::IPV4, Type::STREAM, None)?;
        let [.., last] = (number / OF_ADDRESS + 1).to_be_bytes();
        socket.bind(&SocketAddrV4::new(Ipv4Addr::new(127, 0, 0, last), 0).into())?;
        socket.connect(&SocketAddrV4::new(Ipv4Addr::LOCALHOST, server.port).into())?;
        let tcp = TcpStream::from(socket);
        tcp.set_read_timeout(Some(ANSWER_MAX))?;
        let tls = ClientConnection::new(Arc::clone(&config), ServerName::try_from(HOST)?)?;
        let mut stream = StreamOwned::new(tls, tcp);
        stream.write_all(&ask(version))?;
        let (mut got, mut space) = (0, [0; 4_096]);
        while got < SMALL_BYTES {
            let read = stream.read(&mut space)?;
            ensure!(read > 0, "a connection ended");
            got += read;
        }
        Ok(stream)
    };
    // What the server takes once is nobody's.
    let first: Vec<_> = (0..50).map(open).collect::<Result<_, _>>()?;
    drop(first);
    let before = server.resident_kib()?;
    let held: Vec<_> = (0..count).map(open).collect::<Result<_, _>>()?;
    let kib_each = || anyhow::Ok((server.resident_kib()? - before) / f64::from(count));
    let kib_fresh = kib_each()?;
    std::thread::sleep(REST);
    let kib_rested = kib_each()?;
    drop(held);
    Ok(Held { count, kib_fresh, kib_rested, descriptors })
}

fn ask(version: Version) -> Vec<u8> {
    if version != Version::H2 {
        return format!("GET / HTTP/1.1\r\nhost: {HOST}\r\n\r\n").into_bytes();
    }
    let length = u8::try_from(HOST.len()).expect("a short name");
    let block = [&[0x82, 0x87, 0x84, 0x41, length][..], HOST.as_bytes()].concat();
    let head = [0, 0, u8::try_from(block.len()).expect("a short head"), 1, 5, 0, 0, 0, 1];
    [PREFACE, &head, &block].concat()
}
