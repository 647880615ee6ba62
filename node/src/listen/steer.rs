//! Which socket of a port gets a packet of QUIC.
//!
//! Each core has a socket and an endpoint of its own, all bound to one port (SO_REUSEPORT). The kernel would choose among
//! them by the client's address, and lose a client that moves to another one: so a small program, of classic BPF, which
//! needs no privilege, chooses by the connection ID. Its first byte says where the connection lives. There are two halves
//! of sockets: one takes new connections; while a node hands over to its successor, the other keeps those that it has.

use std::hash::{BuildHasher as _, RandomState};
use std::io;
use std::net::UdpSocket;
#[cfg(target_os = "linux")]
use std::os::fd::AsRawFd as _;
use std::time::Duration;

use quinn::{ConnectionId, ConnectionIdGenerator};

/// Endpoints at most. A connection ID's first byte has seven bits for them.
pub(crate) const SHARDS_MAX: u8 = 64;
/// The bits of a connection ID's first byte that name an endpoint. The one above them names the half.
const SHARD_BITS: u8 = 0x7f;
/// Bytes of our connection IDs.
const ID_BYTES: usize = 8;
/// By which an ID is known as ours: its last two bytes are the upper half of what its first four are times this. It tells
/// nobody anything, since both are random, and it is the same in every version: two of them may share a port.
const MARK: u32 = 0x9e37_79b1;

/// One half of the sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Half {
    /// The first ones that were bound.
    #[default]
    First,
    /// The others.
    Second,
}

impl Half {
    /// The other one.
    pub(crate) fn other(self) -> Self {
        match self {
            Self::First => Self::Second,
            Self::Second => Self::First,
        }
    }

    /// 0 or 1.
    pub(super) fn index(self) -> u8 {
        match self {
            Self::First => 0,
            Self::Second => 1,
        }
    }
}

/// How packets are given to sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Steering {
    /// Sockets of each half.
    pub(super) shards: u8,
    /// The half that takes new connections.
    pub(super) active: Half,
    /// Whether connections of the other half live on.
    pub(super) is_handover: bool,
}

/// What a step of a program does (`linux/bpf_common.h`).
mod op {
    pub(super) const LOAD_WORD: u16 = 0x20;
    pub(super) const LOAD_HALF: u16 = 0x28;
    pub(super) const LOAD_BYTE: u16 = 0x30;
    pub(super) const RECALL_X: u16 = 0x61;
    pub(super) const KEEP: u16 = 0x02;
    pub(super) const ADD: u16 = 0x04;
    pub(super) const ADD_X: u16 = 0x0c;
    pub(super) const MULTIPLY: u16 = 0x24;
    pub(super) const AND: u16 = 0x54;
    pub(super) const SHIFT_RIGHT: u16 = 0x74;
    pub(super) const REMAINDER: u16 = 0x94;
    pub(super) const JUMP: u16 = 0x05;
    pub(super) const IF_EQUAL: u16 = 0x15;
    pub(super) const IF_EQUAL_X: u16 = 0x1d;
    pub(super) const IF_SET: u16 = 0x45;
    pub(super) const TO_X: u16 = 0x07;
    pub(super) const FROM_X: u16 = 0x87;
    pub(super) const RETURN: u16 = 0x16;
}

/// A step: what it does, how many steps to leave out if its condition holds and if not, and its number.
type Step = (u16, u8, u8, u32);

impl Steering {
    /// From a datagram's bytes to the number of a socket, which is its place in the order of binding. What is too short
    /// for a step goes to the first.
    fn program(self) -> Vec<Step> {
        let shards = u32::from(self.shards);
        let first = u32::from(self.active.index()) * shards;
        // Where the steps for connection IDs that the client chose begin, and for those that we chose.
        let (clients, ours) = if self.is_handover { (20, 25_u32) } else { (10_u8, 11) };
        let mut steps = vec![
            // RFC 8999 5: a long header, or a short one with our ID after the first byte.
            (op::LOAD_BYTE, 0, 0, 0),
            (op::IF_SET, 2, 0, 0x80),
            (op::LOAD_BYTE, 0, 0, 1),
            (op::JUMP, 0, 0, ours - 4),
            // RFC 9000 17.2: of version 1, Handshake has our ID.
            (op::LOAD_WORD, 0, 0, 1),
            (op::IF_EQUAL, 0, clients - 6, 1),
            (op::LOAD_BYTE, 0, 0, 0),
            (op::IF_SET, 0, 2, 0x20),
            (op::LOAD_BYTE, 0, 0, 6),
            (op::JUMP, 0, 0, ours - 10),
        ];
        if self.is_handover {
            // Initial and 0-RTT have the client's ID first and then ours: in the datagram that ends the handshake, or after
            // Retry. Those belong to whoever began it.
            let ours_marked = [
                (op::LOAD_BYTE, 0, 0, 5),
                (op::IF_EQUAL, 0, 8, 8),
                (op::LOAD_WORD, 0, 0, 6),
                (op::MULTIPLY, 0, 0, MARK),
                (op::SHIFT_RIGHT, 0, 0, 16),
                (op::TO_X, 0, 0, 0),
                (op::LOAD_HALF, 0, 0, 12),
                (op::IF_EQUAL_X, 0, 2, 0),
                (op::LOAD_BYTE, 0, 0, 6),
                (op::JUMP, 0, 0, ours - 20),
            ];
            steps.extend(ours_marked);
        }
        steps.extend([
            (op::LOAD_BYTE, 0, 0, 6),
            // To the active half. An ID of Retry reaches the endpoint that gave it.
            (op::AND, 0, 0, SHARD_BITS.into()),
            (op::REMAINDER, 0, 0, shards),
            (op::ADD, 0, 0, first),
            (op::RETURN, 0, 0, 0),
        ]);
        if self.is_handover {
            steps.extend([
                (op::TO_X, 0, 0, 0),
                (op::AND, 0, 0, SHARD_BITS.into()),
                (op::REMAINDER, 0, 0, shards),
                (op::KEEP, 0, 0, 0),
                (op::FROM_X, 0, 0, 0),
                (op::SHIFT_RIGHT, 0, 0, 7),
                (op::MULTIPLY, 0, 0, shards),
                (op::RECALL_X, 0, 0, 0),
                (op::ADD_X, 0, 0, 0),
                (op::RETURN, 0, 0, 0),
            ]);
        }
        steps
    }

    /// Only Linux can.
    #[cfg(not(target_os = "linux"))]
    pub(super) fn attach(self, _socket: &UdpSocket) -> io::Result<()> {
        let _ = self.program();
        Err(io::ErrorKind::Unsupported.into())
    }

    /// Makes the kernel steer all sockets of the port that `socket` is bound to, from the next packet on.
    #[cfg(target_os = "linux")]
    pub(super) fn attach(self, socket: &UdpSocket) -> io::Result<()> {
        let step = |(code, jt, jf, k)| libc::sock_filter { code, jt, jf, k };
        let mut steps: Vec<libc::sock_filter> = self.program().into_iter().map(step).collect();
        let length = u16::try_from(steps.len()).expect("a program has 35 steps at most");
        let program = libc::sock_fprog { len: length, filter: steps.as_mut_ptr() };
        let size = libc::socklen_t::try_from(size_of_val(&program)).expect("two words");
        #[expect(unsafe_code, reason = "no library has this socket option")]
        // SAFETY: the descriptor is open, and the kernel copies the program, which lives until then.
        let done = unsafe {
            libc::setsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_ATTACH_REUSEPORT_CBPF,
                (&raw const program).cast(),
                size,
            )
        };
        if done == 0 { Ok(()) } else { Err(io::Error::last_os_error()) }
    }
}

/// Names connections so that their packets reach one endpoint.
pub(super) struct Ids {
    half: Half,
    shard: u8,
    shards: u8,
    /// The standard library's hash keys are the one source of randomness that can't fail.
    random: RandomState,
    count: u64,
}

impl Ids {
    pub(super) fn new(half: Half, shard: u8, shards: u8) -> Self {
        Self { half, shard, shards, random: RandomState::new(), count: 0 }
    }
}

impl ConnectionIdGenerator for Ids {
    fn generate_cid(&mut self) -> ConnectionId {
        self.count += 1;
        let mut id: [u8; ID_BYTES] = self.random.hash_one(self.count).to_ne_bytes();
        // Any number that leaves the shard when it is divided: who looks on learns less from it.
        let rounds = (SHARD_BITS + 1) / self.shards;
        id[0] = self.half.index() << 7 | (self.shard + self.shards * (id[0] % rounds));
        let [a, b, c, d, ..] = id;
        let [mark, of, _, _] = u32::from_be_bytes([a, b, c, d]).wrapping_mul(MARK).to_be_bytes();
        (id[6], id[7]) = (mark, of);
        ConnectionId::new(&id)
    }

    fn cid_len(&self) -> usize {
        ID_BYTES
    }

    fn cid_lifetime(&self) -> Option<Duration> {
        None
    }
}

#[cfg(test)]
mod tests {
    use super::super::sockets::UdpGroup;
    use super::*;

    /// A short header with an ID that begins with `byte`.
    fn short(byte: u8) -> Vec<u8> {
        vec![0x40, byte, 2, 3, 4, 5, 6, 7, 8, 9]
    }

    /// A long header of a type and a version.
    fn long(kind: u8, version: u8, byte: u8) -> Vec<u8> {
        vec![0xc0 | kind << 4, 0, 0, 0, version, 8, byte, 1, 2, 3, 4, 5, 6, 7]
    }

    /// Sends each packet from a socket of its own and tells which socket it reached.
    fn reached(group: &UdpGroup, packets: &[Vec<u8>]) -> Vec<usize> {
        let all = group.sockets();
        let address = all[0].local_addr().unwrap();
        let mut buffer = [0; 64];
        let mut take = |packet: &Vec<u8>| {
            let from = UdpSocket::bind("127.0.0.1:0").unwrap();
            from.send_to(packet, address).unwrap();
            loop {
                // Loopback: it is there as soon as it is sent.
                let found = all.iter().position(|socket| socket.recv_from(&mut buffer).is_ok());
                if let Some(found) = found {
                    return found;
                }
            }
        };
        packets.iter().map(&mut take).collect()
    }

    #[test]
    fn packets_reach_the_endpoint_that_their_connection_lives_on() {
        let shards = 3;
        let group = UdpGroup::bind("127.0.0.1:0".parse().unwrap(), shards).unwrap();
        for (active, is_handover) in
            [(Half::First, false), (Half::Second, true), (Half::First, true), (Half::Second, false)]
        {
            Steering { shards, active, is_handover }.attach(&group.sockets()[0]).unwrap();
            for byte in [0_u8, 1, 2, 3, 64, 126, 127] {
                for half in [Half::First, Half::Second] {
                    let byte = byte | half.index() << 7;
                    let shard = usize::from((byte & 0x7f) % shards);
                    let new = shard + usize::from(active.index() * shards);
                    let own = if is_handover { shard + usize::from(half.index() * shards) } else { new };
                    // Short, Handshake; then Initial, 0-RTT, and what another version has.
                    let packets = [short(byte), long(2, 1, byte), long(0, 1, byte), long(1, 1, byte), long(2, 2, byte)];
                    assert_eq!(reached(&group, &packets), [own, own, new, new, new], "{active:?} {is_handover} {byte}");
                }
            }
        }
    }

    #[test]
    fn the_end_of_a_handshake_reaches_whoever_began_it() {
        let shards = 3;
        let group = UdpGroup::bind("127.0.0.1:0".parse().unwrap(), shards).unwrap();
        for active in [Half::First, Half::Second] {
            Steering { shards, active, is_handover: true }.attach(&group.sockets()[0]).unwrap();
            for half in [Half::First, Half::Second] {
                for shard in 0..shards {
                    let id = Ids::new(half, shard, shards).generate_cid();
                    // RFC 9000 17.2.2: an Initial with our ID, as in the datagram that has the client's Finished.
                    let ours = [&[0xc0, 0, 0, 0, 1, 8], &id[..], &[0, 0, 0]].concat();
                    let own = usize::from(shard + half.index() * shards);
                    let mut other = ours.clone();
                    other[13] ^= 1;
                    // The same bytes in an ID of another length are the client's.
                    let mut longer = ours.clone();
                    longer[5] = 9;
                    let new = usize::from(shard + active.index() * shards);
                    assert_eq!(reached(&group, &[ours, other, longer]), [own, new, new], "{active:?} {half:?} {shard}");
                }
            }
        }
    }

    #[test]
    fn ids_name_their_endpoint_and_differ() {
        for (half, shard, shards) in [(Half::First, 0, 1), (Half::Second, 2, 3), (Half::Second, 63, 64)] {
            let mut ids = Ids::new(half, shard, shards);
            let some: Vec<ConnectionId> = (0..1_000).map(|_| ids.generate_cid()).collect();
            for id in &some {
                assert_eq!((id[0] >> 7, id[0] & 0x7f, id.len()), (half.index(), (id[0] & 0x7f), ID_BYTES));
                assert_eq!(id[0] & 0x7f, shard + (id[0] & 0x7f) / shards * shards);
            }
            let different: std::collections::HashSet<&[u8]> = some.iter().map(|id| &id[..]).collect();
            assert_eq!(different.len(), some.len());
        }
    }
}
