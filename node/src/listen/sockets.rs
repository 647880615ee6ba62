//! The sockets that a node's clients reach: bound by it, or taken over from the node that ran before.

use std::io;
use std::net::{SocketAddr, TcpListener, UdpSocket};
use std::thread::available_parallelism;

use socket2::{Domain, Protocol, Socket, Type};

use super::steer::{Half, SHARDS_MAX, Steering};
use super::{ListenError, ListenOptions};

/// How often a port is tried that must be free for TCP and UDP alike.
const PORT_TRIES_MAX: usize = 16;
/// Connections that wait to be accepted. The system may allow fewer.
const BACKLOG: i32 = 4_096;
/// Bytes that wait in a socket of QUIC, each way. The system may allow fewer.
const UDP_BUFFER_BYTES: usize = 4 * 1024 * 1024;

/// Sockets of a node.
#[derive(Debug, Default)]
pub(crate) struct Sockets {
    /// HTTP over TLS.
    pub(crate) https: Option<TcpListener>,
    /// HTTP without TLS.
    pub(crate) http: Option<TcpListener>,
    /// HTTP/3, on the port of `https`.
    pub(crate) quic: Option<UdpGroup>,
}

impl Sockets {
    /// Binds what is asked for and is not there yet.
    pub(crate) fn bind(mut self, options: &ListenOptions) -> Result<Self, ListenError> {
        match options.https {
            Some(address) if !(is_at(self.https.as_ref(), address) && self.quic.is_some()) => {
                // What is held but not as it should be would be in the way.
                (self.https, self.quic) = (None, None);
                let (tcp, udp) = bind_both(address)?;
                (self.https, self.quic) = (Some(tcp), Some(udp));
            }
            Some(_) => {}
            None => (self.https, self.quic) = (None, None),
        }
        match options.http {
            Some(address) if !is_at(self.http.as_ref(), address) => self.http = Some(bind_tcp(address)?),
            Some(_) => {}
            None => self.http = None,
        }
        Ok(self)
    }

    /// The same sockets once more.
    pub(crate) fn try_clone(&self) -> io::Result<Self> {
        let tcp = |socket: &Option<TcpListener>| socket.as_ref().map(TcpListener::try_clone).transpose();
        Ok(Self {
            https: tcp(&self.https)?,
            http: tcp(&self.http)?,
            quic: self.quic.as_ref().map(UdpGroup::try_clone).transpose()?,
        })
    }
}

/// Whether a socket is where the configuration wants one.
fn is_at(socket: Option<&TcpListener>, wanted: SocketAddr) -> bool {
    let local = socket.and_then(|socket| socket.local_addr().ok());
    local.is_some_and(|local| local.ip() == wanted.ip() && (wanted.port() == 0 || local.port() == wanted.port()))
}

/// Sockets of QUIC that share a port: two halves of as many as there are endpoints. Or a single one, where the system can't
/// steer.
#[derive(Debug)]
pub(crate) struct UdpGroup {
    sockets: Vec<UdpSocket>,
    active: Half,
}

impl UdpGroup {
    /// Binds the sockets of both halves.
    pub(super) fn bind(address: SocketAddr, shards: u8) -> io::Result<Self> {
        // Without SO_REUSEPORT it fails where the port is somebody else's; the group alone would just join in.
        let probe = UdpSocket::bind(address)?;
        let local = probe.local_addr()?;
        drop(probe);
        let sockets = (0..2 * shards).map(|_| bind_shared(local)).collect::<io::Result<Vec<_>>>()?;
        let group = Self { sockets, active: Half::First };
        match group.steer(false) {
            Ok(()) => Ok(group),
            Err(error) => {
                tracing::warn!(%error, "the system can't steer packets: QUIC has one socket, and no successor");
                drop(group);
                Ok(Self { sockets: vec![bind_shared(local)?], active: Half::First })
            }
        }
    }

    /// Takes over bound sockets. `active` is the half of whoever had them.
    pub(crate) fn inherit(sockets: Vec<UdpSocket>, active: Half) -> Option<Self> {
        let fits =
            sockets.len() >= 2 && sockets.len().is_multiple_of(2) && sockets.len() / 2 <= usize::from(SHARDS_MAX);
        fits.then_some(Self { sockets, active: active.other() })
    }

    /// Steers new connections to the active half. In a handover those of the other half stay with it.
    pub(crate) fn steer(&self, is_handover: bool) -> io::Result<()> {
        match self.shards() {
            _ if self.sockets.len() < 2 => Ok(()),
            shards => Steering { shards, active: self.active, is_handover }.attach(&self.sockets[0]),
        }
    }

    /// The half that takes new connections.
    pub(crate) fn active(&self) -> Half {
        self.active
    }

    /// Endpoints.
    pub(super) fn shards(&self) -> u8 {
        u8::try_from(self.sockets.len() / 2).unwrap_or(SHARDS_MAX).max(1)
    }

    /// All sockets, in the order of binding.
    pub(crate) fn sockets(&self) -> &[UdpSocket] {
        &self.sockets
    }

    /// The active half.
    pub(super) fn active_sockets(&self) -> &[UdpSocket] {
        let shards = usize::from(self.shards());
        let start = usize::from(self.active.index()) * shards;
        &self.sockets[start..start + shards]
    }

    fn try_clone(&self) -> io::Result<Self> {
        let sockets = self.sockets.iter().map(UdpSocket::try_clone).collect::<io::Result<_>>()?;
        Ok(Self { sockets, active: self.active })
    }
}

fn bind_shared(address: SocketAddr) -> io::Result<UdpSocket> {
    let socket = Socket::new(Domain::for_address(address), Type::DGRAM, Some(Protocol::UDP))?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    // More than the system allows is cut down, not refused.
    let _ = socket.set_recv_buffer_size(UDP_BUFFER_BYTES);
    let _ = socket.set_send_buffer_size(UDP_BUFFER_BYTES);
    socket.bind(&address.into())?;
    Ok(socket.into())
}

fn bind_tcp(address: SocketAddr) -> Result<TcpListener, ListenError> {
    let bound = || {
        let socket = Socket::new(Domain::for_address(address), Type::STREAM, Some(Protocol::TCP))?;
        // So that a node can start again where connections of the one before have not been forgotten.
        socket.set_reuse_address(true)?;
        socket.set_nonblocking(true)?;
        socket.bind(&address.into())?;
        socket.listen(BACKLOG)?;
        Ok(socket.into())
    };
    bound().map_err(|source| ListenError::Bind { address, transport: "TCP", source })
}

/// One port for TCP and UDP. With port 0 the system chooses for TCP, and may choose one that is taken for UDP.
fn bind_both(address: SocketAddr) -> Result<(TcpListener, UdpGroup), ListenError> {
    let shards = available_parallelism().map_or(1, |cores| cores.get().min(usize::from(SHARDS_MAX)));
    let shards = u8::try_from(shards).unwrap_or(SHARDS_MAX);
    let mut tries = if address.port() == 0 { PORT_TRIES_MAX } else { 1 };
    loop {
        let listener = bind_tcp(address)?;
        let local = listener.local_addr().map_err(|source| ListenError::Bind { address, transport: "TCP", source })?;
        tries -= 1;
        match UdpGroup::bind(local, shards) {
            Ok(group) => return Ok((listener, group)),
            Err(source) if tries == 0 => return Err(ListenError::Bind { address: local, transport: "UDP", source }),
            Err(_) => {}
        }
    }
}
