//! The PROXY protocol, versions 1 and 2: how a load balancer tells whose connection it passes on.
//!
//! It is read only from peers that the node's file names, and those must speak it: anybody else could claim to be anybody.
//! Source: "The PROXY protocol", HAProxy Technologies, revision of 2020-03-05.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use tokio::io::{AsyncRead, AsyncReadExt};

/// What a header of version 2 begins with.
const SIGNATURE: &[u8; 12] = b"\r\n\r\n\0\r\nQUIT\n";
/// Bytes of version 2's addresses and extensions that are read; what extensions say is not.
const REST_BYTES_MAX: usize = 2 * 1024;
/// The longest header of version 1.
const LINE_BYTES_MAX: usize = 107;

/// Why a header was not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum ProxyError {
    /// The connection failed.
    #[error("read PROXY header")]
    Read(#[from] io::Error),
    /// It is not a header.
    #[error("bad PROXY header: {0}")]
    Malformed(&'static str),
}

/// Reads a header and nothing behind it. None: the balancer speaks for itself, as when it looks whether we are there.
pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> Result<Option<SocketAddr>, ProxyError> {
    let mut start = [0; SIGNATURE.len()];
    stream.read_exact(&mut start).await?;
    if start == *SIGNATURE {
        let mut head = [0; 4];
        stream.read_exact(&mut head).await?;
        let [command, family, high, low] = head;
        let length = usize::from(u16::from_be_bytes([high, low]));
        if length > REST_BYTES_MAX {
            return Err(ProxyError::Malformed("too long"));
        }
        let mut rest = [0; REST_BYTES_MAX];
        stream.read_exact(&mut rest[..length]).await?;
        return version_2(command, family, &rest[..length]);
    }
    if !start.starts_with(b"PROXY ") {
        return Err(ProxyError::Malformed("none"));
    }
    let mut line = start.to_vec();
    // One by one: what follows the line is not ours to read here.
    while !line.ends_with(b"\r\n") {
        if line.len() >= LINE_BYTES_MAX {
            return Err(ProxyError::Malformed("line too long"));
        }
        line.push(stream.read_u8().await?);
    }
    version_1(&line)
}

/// Section 2.2.
fn version_2(command: u8, family: u8, rest: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
    match command {
        0x20 => return Ok(None),
        0x21 => {}
        _ => return Err(ProxyError::Malformed("unknown version or command")),
    }
    // Source and destination address, then source and destination port.
    let of = |address: IpAddr, ports: &[u8]| match ports {
        [high, low, ..] => Ok(Some(SocketAddr::new(address, u16::from_be_bytes([*high, *low])))),
        _ => Err(ProxyError::Malformed("too short")),
    };
    match family {
        0x00 => Ok(None),
        0x11 => match rest.split_first_chunk::<4>() {
            Some((source, rest)) if rest.len() >= 8 => of(Ipv4Addr::from(*source).into(), &rest[4..]),
            _ => Err(ProxyError::Malformed("too short")),
        },
        0x21 => match rest.split_first_chunk::<16>() {
            Some((source, rest)) if rest.len() >= 20 => of(Ipv6Addr::from(*source).into(), &rest[16..]),
            _ => Err(ProxyError::Malformed("too short")),
        },
        _ => Err(ProxyError::Malformed("neither TCP over IPv4 nor over IPv6")),
    }
}

/// Section 2.1.
fn version_1(line: &[u8]) -> Result<Option<SocketAddr>, ProxyError> {
    let bad = ProxyError::Malformed("bad line");
    let Some(text) = std::str::from_utf8(line).ok().and_then(|text| text.strip_suffix("\r\n")) else { return Err(bad) };
    let parts: Vec<&str> = text.split(' ').collect();
    let port = |text: &str| {
        let is_plain = text.bytes().all(|byte| byte.is_ascii_digit()) && (text == "0" || !text.starts_with('0'));
        text.parse::<u16>().ok().filter(|_| is_plain)
    };
    let source = match parts.as_slice() {
        ["PROXY", "UNKNOWN", ..] => return Ok(None),
        ["PROXY", "TCP4", source, destination, from, to] => {
            let address = source.parse::<Ipv4Addr>().ok().zip(destination.parse::<Ipv4Addr>().ok());
            address.zip(port(from).zip(port(to))).map(|((source, _), (from, _))| SocketAddr::new(source.into(), from))
        }
        ["PROXY", "TCP6", source, destination, from, to] => {
            let address = source.parse::<Ipv6Addr>().ok().zip(destination.parse::<Ipv6Addr>().ok());
            address.zip(port(from).zip(port(to))).map(|((source, _), (from, _))| SocketAddr::new(source.into(), from))
        }
        _ => None,
    };
    source.map(Some).ok_or(bad)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What a header says, and what is left behind it.
    fn take(bytes: &[u8]) -> Result<(Option<SocketAddr>, Vec<u8>), ProxyError> {
        let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
        runtime.block_on(async {
            let mut rest = bytes;
            Ok((read(&mut rest).await?, rest.to_vec()))
        })
    }

    fn two(command: u8, family: u8, rest: &[u8]) -> Vec<u8> {
        let length = u16::try_from(rest.len()).unwrap().to_be_bytes();
        [SIGNATURE, &[command, family][..], &length, rest].concat()
    }

    #[test]
    fn a_header_tells_the_client_and_nothing_more_is_read() {
        let four = [192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 0x01, 0xbb];
        let mut six = [0_u8; 36];
        (six[0], six[1], six[15], six[32], six[33]) = (0x20, 0x01, 7, 0x12, 0x67);
        let with_extension = [&four[..], &[3, 0, 1, 9]].concat();
        for (header, want) in [
            (two(0x21, 0x11, &four), Some("192.0.2.7:4711")),
            (two(0x21, 0x11, &with_extension), Some("192.0.2.7:4711")),
            (two(0x21, 0x21, &six), Some("[2001::7]:4711")),
            (two(0x20, 0x00, &[]), None),
            (two(0x20, 0x11, &four), None),
            (two(0x21, 0x00, &[1, 2]), None),
            (b"PROXY TCP4 192.0.2.7 192.0.2.1 4711 443\r\n".to_vec(), Some("192.0.2.7:4711")),
            (b"PROXY TCP6 2001::7 ::1 4711 443\r\n".to_vec(), Some("[2001::7]:4711")),
            (b"PROXY UNKNOWN\r\n".to_vec(), None),
            (b"PROXY UNKNOWN a b c\r\n".to_vec(), None),
        ] {
            let (client, rest) = take(&[header.as_slice(), b"GET /"].concat()).unwrap();
            assert_eq!(client, want.map(|address| address.parse().unwrap()), "{header:?}");
            assert_eq!(rest, b"GET /", "{header:?}");
        }
    }

    #[test]
    fn what_is_no_header_is_refused() {
        let four = [192, 0, 2, 7, 192, 0, 2, 1, 0x12, 0x67, 0x01, 0xbb];
        for header in [
            b"GET / HTTP/1.1\r\nhost: a\r\n\r\n".to_vec(),
            two(0x11, 0x11, &four),
            two(0x22, 0x11, &four),
            two(0x21, 0x12, &four),
            two(0x21, 0x31, &[0; 216]),
            two(0x21, 0x11, &four[..11]),
            two(0x21, 0x21, &[0; 35]),
            two(0x21, 0x11, &[0; REST_BYTES_MAX + 1]),
            b"PROXY TCP4 192.0.2.7 192.0.2.1 4711\r\n".to_vec(),
            b"PROXY TCP4 2001::7 ::1 4711 443\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.7 192.0.2.1 04711 443\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.7 192.0.2.1 +1 443\r\n".to_vec(),
            b"PROXY TCP4 192.0.2.7 192.0.2.1 70000 443\r\n".to_vec(),
            b"PROXY TCP4  192.0.2.7 192.0.2.1 4711 443\r\n".to_vec(),
            b"PROXY UDP4 192.0.2.7 192.0.2.1 4711 443\r\n".to_vec(),
            [&b"PROXY TCP4 "[..], &[b'1'; 200]].concat(),
        ] {
            assert!(matches!(take(&header), Err(ProxyError::Malformed(_))), "{header:?}");
        }
        assert!(matches!(take(b"PROXY TCP4 192"), Err(ProxyError::Read(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300), sign in 0..3_usize) {
            let start: &[u8] = [SIGNATURE, &b"PROXY TCP4 "[..], b""][sign];
            let _ = take(&[start, &bytes].concat());
        }
    }
}
