//! The door: the sockets of a node, for the links of all its placements and of all that is not placed.
//!
//! A link of a placement is a connection of its own. It has another protocol name in the handshake, so that a node that
//! knows no placements refuses it there, and the dialer's first bytes name the placement. From then on it is a link as
//! any other, between two nodes of the placement's roster.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use quinn::crypto::rustls::{HandshakeData, QuicClientConfig, QuicServerConfig};
use quinn::{Connecting, Connection, Endpoint, RecvStream, SendStream, TransportConfig, VarInt};
use rustls::pki_types::CertificateDer;
use selvage_config::id::NAME_BYTES_MAX;
use selvage_config::{NodeName, PlacementName};
use tokio::sync::mpsc;
use tokio::time::timeout;

use super::ask::STREAMS_MAX;
use super::{CLOSE_MS, Ended, HANDSHAKES_MAX, LinkError};
use crate::store::{Identify, Tls};
use crate::wire;

/// A link on which nothing arrives this long is dead, milliseconds.
const IDLE_MS: u32 = 3_000;

/// How often something is sent on an idle link, milliseconds.
const KEEP_ALIVE_MS: u64 = 600;

/// The sockets of one node.
pub(crate) struct Door {
    endpoint: Endpoint,
    address: SocketAddr,
    /// How links of placements are begun.
    placed: quinn::ClientConfig,
    identify: Identify,
    /// Where links go that came in for a placement.
    held: Mutex<BTreeMap<PlacementName, mpsc::Sender<Greeted>>>,
}

/// A link that came in, of a node that is who it says.
pub(super) struct Greeted {
    pub(super) node: NodeName,
    pub(super) connection: Connection,
    pub(super) send: SendStream,
    pub(super) receive: RecvStream,
}

/// Who wants in.
pub(super) enum Arrival {
    Stranger(Box<quinn::Incoming>),
    Greeted(Greeted),
}

impl Door {
    /// Binds the socket.
    pub(super) fn open(address: SocketAddr, tls: Tls, identify: Identify) -> Result<Self, LinkError> {
        let Tls { server, client, trust: _ } = tls;
        let bind = |source| LinkError::Bind { address, source };
        let mut endpoint = Endpoint::server(server_config(&server)?, address).map_err(bind)?;
        endpoint.set_default_client_config(client_config(&client, wire::ALPN)?);
        let address = endpoint.local_addr().map_err(bind)?;
        let placed = client_config(&client, wire::PLACED_ALPN)?;
        Ok(Self { endpoint, address, placed, identify, held: Mutex::default() })
    }

    pub(super) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(super) fn identify(&self, certificate: &CertificateDer<'_>) -> Option<NodeName> {
        (self.identify)(certificate)
    }

    /// Lets links of a placement in until what this returns is dropped, or another has it.
    pub(super) fn hold(&self, placement: PlacementName) -> mpsc::Receiver<Greeted> {
        let (pass, passed) = mpsc::channel(HANDSHAKES_MAX);
        self.held.lock().unwrap_or_else(PoisonError::into_inner).insert(placement, pass);
        passed
    }

    /// Passes a link on to whoever has the placement's.
    pub(super) fn pass(&self, placement: &PlacementName, greeted: Greeted) -> Result<(), Ended> {
        let held = self.held.lock().unwrap_or_else(PoisonError::into_inner);
        let refused = match held.get(placement) {
            Some(pass) => pass.try_send(greeted).map_err(mpsc::error::TrySendError::into_inner).err(),
            None => Some(greeted),
        };
        let Some(greeted) = refused else { return Ok(()) };
        greeted.connection.close(VarInt::from_u32(1), b"not held here");
        Err(Ended::NotHeld)
    }

    /// Who comes next: to the sockets, or passed on from there. None: nobody will any more. Dropping it loses nothing.
    pub(super) async fn arrival(&self, passed: &mut Option<mpsc::Receiver<Greeted>>) -> Option<Arrival> {
        match passed {
            Some(passed) => passed.recv().await.map(Arrival::Greeted),
            None => self.endpoint.accept().await.map(|incoming| Arrival::Stranger(Box::new(incoming))),
        }
    }

    /// Begins a link.
    pub(super) fn connect(
        &self,
        address: SocketAddr,
        name: &str,
        placement: Option<&PlacementName>,
    ) -> Result<Connecting, quinn::ConnectError> {
        match placement {
            Some(_) => self.endpoint.connect_with(self.placed.clone(), address, name),
            None => self.endpoint.connect(address, name),
        }
    }

    pub(super) async fn close(&self) {
        self.endpoint.close(VarInt::from_u32(0), b"closing");
        let _late = timeout(Duration::from_millis(CLOSE_MS), self.endpoint.wait_idle()).await;
    }
}

/// Whether a connection was begun as a link of a placement.
pub(super) fn is_of_placement(connection: &Connection) -> bool {
    let data = connection.handshake_data().and_then(|data| data.downcast::<HandshakeData>().ok());
    data.is_some_and(|data| data.protocol.as_deref() == Some(wire::PLACED_ALPN))
}

/// Says which placement a link is of: the length of its name, and that.
pub(super) async fn name(send: &mut SendStream, placement: &PlacementName) -> Result<(), quinn::WriteError> {
    let name = placement.as_str().as_bytes();
    send.write_all(&[&[u8::try_from(name.len()).unwrap_or(u8::MAX)], name].concat()).await
}

/// Reads what [`name`] wrote.
pub(super) async fn named(receive: &mut RecvStream) -> Result<PlacementName, Ended> {
    let mut length = [0];
    receive.read_exact(&mut length).await?;
    let length = usize::from(length[0]);
    if length > NAME_BYTES_MAX {
        return Err(wire::WireError::TooLong { bytes: length }.into());
    }
    let mut name = [0; NAME_BYTES_MAX];
    let name = &mut name[..length];
    receive.read_exact(name).await?;
    std::str::from_utf8(name).ok().and_then(|name| name.parse().ok()).ok_or(Ended::NotHeld)
}

fn server_config(tls: &rustls::ServerConfig) -> Result<quinn::ServerConfig, LinkError> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![wire::ALPN.to_vec(), wire::PLACED_ALPN.to_vec()];
    let crypto = QuicServerConfig::try_from(tls).map_err(LinkError::Tls)?;
    let mut config = quinn::ServerConfig::with_crypto(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

fn client_config(tls: &rustls::ClientConfig, protocol: &[u8]) -> Result<quinn::ClientConfig, LinkError> {
    let mut tls = tls.clone();
    tls.alpn_protocols = vec![protocol.to_vec()];
    let crypto = QuicClientConfig::try_from(tls).map_err(LinkError::Tls)?;
    let mut config = quinn::ClientConfig::new(Arc::new(crypto));
    config.transport_config(Arc::new(transport()));
    Ok(config)
}

fn transport() -> TransportConfig {
    let mut transport = TransportConfig::default();
    transport
        .max_idle_timeout(Some(VarInt::from_u32(IDLE_MS).into()))
        .keep_alive_interval(Some(Duration::from_millis(KEEP_ALIVE_MS)))
        .max_concurrent_bidi_streams(VarInt::from_u32(1 + STREAMS_MAX))
        .max_concurrent_uni_streams(VarInt::from_u32(0))
        .datagram_receive_buffer_size(None);
    transport
}
