//! QUIC: handshakes, and what a connection may hold.

use std::io;
use std::net::UdpSocket;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use quinn::crypto::rustls::QuicServerConfig;
use quinn::{
    Connecting, Connection, Endpoint, EndpointConfig, IdleTimeout, Incoming, ServerConfig, TokioRuntime,
    TransportConfig, VarInt,
};
use selvage_certs::FrontSecret;
use selvage_config::front::Front;
use tokio::task::JoinSet;
use tokio::time::{timeout, timeout_at};
use tokio_util::sync::CancellationToken;

use super::h3::Proof;
use super::handshakes::{Handshake, Handshakes};
use super::sockets::UdpGroup;
use super::source::{Full, Place, Sources, Transport};
use super::steer::Ids;
use super::{CONNECTION_WINDOW_BYTES, ListenError, STREAM_WINDOW_BYTES, h3};
use crate::serve::Parts;

/// RFC 9114 8.1: the client asks too much.
const EXCESSIVE_LOAD: VarInt = VarInt::from_u32(0x107);
/// Streams of a client that are not requests: control, QPACK, and what it greases with.
const UNI_STREAMS_MAX: u32 = 8;
/// Bytes of answers that wait for the client's acknowledgement.
const SEND_WINDOW_BYTES: u64 = 2 * 1024 * 1024;
/// How long no packet may come of a connection, milliseconds: whoever is there has said something before.
const SILENT_MS: u32 = 30_000;
/// Handshakes that have begun but not been looked at.
const INCOMING_MAX: usize = 1_024;
/// Bytes that wait for one such handshake, and for all of them.
const INCOMING_BYTES: (u64, u64) = (64 * 1024, 16 * 1024 * 1024);
/// Handshakes under way from which on a client must show that its address is its own (RFC 9000 8.1.2).
const UNPROVEN_MAX: usize = 100;
/// Handshakes that begin in one second from which on it must.
const UNPROVEN_PER_SECOND_MAX: u32 = 1_000;
/// How long handshakes are still taken after the end was announced: of clients that had begun one, or were sent Retry.
const ACCEPT_GRACE: Duration = Duration::from_secs(1);
/// Bytes of a handshake that came out of order. A client's is a few hundred.
const CRYPTO_BYTES_MAX: usize = 8 * 1024;

/// What the endpoints of a listener have in common.
#[derive(Clone)]
pub(super) struct Listening {
    pub(super) parts: Arc<Parts>,
    pub(super) sources: Arc<Sources>,
    pub(super) handshakes: Arc<Handshakes>,
    /// Connections of one endpoint.
    pub(super) connections_max: usize,
    /// Whether requests are taken in front of the handshake's end.
    pub(super) has_early_data: bool,
}

/// QUIC's side of the configuration.
pub(super) fn server_config(
    tls: Arc<rustls::ServerConfig>,
    secret: &FrontSecret,
    front: &Front,
) -> Result<ServerConfig, ListenError> {
    let crypto = QuicServerConfig::try_from(tls).map_err(ListenError::Quic)?;
    let mut transport = TransportConfig::default();
    transport
        .max_concurrent_bidi_streams(front.streams_max.into())
        .max_concurrent_uni_streams(UNI_STREAMS_MAX.into())
        .stream_receive_window(STREAM_WINDOW_BYTES.into())
        .receive_window(CONNECTION_WINDOW_BYTES.into())
        .send_window(SEND_WINDOW_BYTES)
        .crypto_buffer_size(CRYPTO_BYTES_MAX)
        .max_idle_timeout(Some(IdleTimeout::from(VarInt::from_u32(SILENT_MS))))
        .datagram_receive_buffer_size(None);
    let mut config = ServerConfig::new(Arc::new(crypto), Arc::new(secret.quic_token_key()));
    config
        .transport_config(Arc::new(transport))
        .max_incoming(INCOMING_MAX)
        .incoming_buffer_size(INCOMING_BYTES.0)
        .incoming_buffer_size_total(INCOMING_BYTES.1);
    Ok(config)
}

/// An endpoint on each socket of a group that takes new connections.
pub(super) fn endpoints(config: &ServerConfig, secret: &FrontSecret, group: &UdpGroup) -> io::Result<Vec<Endpoint>> {
    let (half, shards) = (group.active(), group.shards());
    let endpoint = |(shard, socket): (u8, &UdpSocket)| {
        let mut of_endpoint = EndpointConfig::new(Arc::new(secret.quic_reset_key()));
        of_endpoint.cid_generator(move || Box::new(Ids::new(half, shard, shards)));
        Endpoint::new(of_endpoint, Some(config.clone()), socket.try_clone()?, Arc::new(TokioRuntime))
    };
    (0..).zip(group.active_sockets()).map(endpoint).collect()
}

/// Accepts until `stop`, then waits for the connections to end.
pub(super) async fn accept(endpoint: Endpoint, listening: Listening, stop: CancellationToken) {
    let mut connections = JoinSet::new();
    let unproven = Arc::new(AtomicUsize::new(0));
    let mut rate = Rate::default();
    // Handshakes that had reached this endpoint when it was told to stop are still taken: a successor never sees them.
    let mut over = std::pin::pin!(async {
        stop.cancelled().await;
        tokio::time::sleep(ACCEPT_GRACE).await;
    });
    loop {
        // Every branch may be dropped: an unaccepted handshake stays in the endpoint.
        tokio::select! {
            () = &mut over => break,
            Some(_) = connections.join_next() => {}
            incoming = endpoint.accept(), if connections.len() < listening.connections_max => {
                let Some(incoming) = incoming else { break };
                let crowded = rate.is_high(Instant::now())
                    || unproven.load(Ordering::Relaxed) >= UNPROVEN_MAX
                    || listening.handshakes.is_crowded();
                if crowded && !incoming.remote_address_validated() {
                    // Fails only for an address that has been validated.
                    let _ = incoming.retry();
                    continue;
                }
                let Some(handshake) = listening.handshakes.begin() else {
                    listening.parts.metrics.connection_refused("handshakes");
                    incoming.refuse();
                    continue;
                };
                let (listening, stop) = (listening.clone(), stop.clone());
                let under_way = (handshake, Unproven::new(&unproven));
                connections.spawn(async move {
                    let client = incoming.remote_address();
                    if let Err(error) = connection(incoming, under_way, listening, stop).await {
                        tracing::debug!(%client, error = format!("{error:#}"), "connection ended");
                    }
                });
            }
        }
    }
    // From here on handshakes are refused.
    endpoint.set_server_config(None);
    while connections.join_next().await.is_some() {}
}

async fn connection(
    incoming: Incoming,
    under_way: (Handshake, Unproven),
    listening: Listening,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let handshake = Duration::from_millis(listening.parts.front.handshake_ms);
    if listening.has_early_data && incoming.remote_address_validated() {
        let connecting = incoming.accept()?;
        return Box::pin(early(connecting, handshake, under_way, listening, stop)).await;
    }
    let quic = timeout(handshake, incoming.accept()?).await??;
    drop(under_way);
    // The handshake has shown that the address is the client's.
    let place = enter(&quic, &listening)?;
    h3::connection(quic, listening.parts, (listening.sources, place), Proof::at_hand(), stop).await
}

/// A connection that is served while its handshake goes on, and has to end it in time all the same.
async fn early(
    mut connecting: Connecting,
    handshake: Duration,
    under_way: (Handshake, Unproven),
    listening: Listening,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let until = tokio::time::Instant::now() + handshake;
    timeout_at(until, connecting.handshake_data()).await??;
    let Ok((quic, is_done)) = connecting.into_0rtt() else { anyhow::bail!("not a server's connection") };
    let place = enter(&quic, &listening)?;
    let proof = Proof::to_come();
    let proven = async {
        // Whether it took early data says nothing here: a server always did. A connection that failed has a reason.
        if timeout_at(until, is_done).await.is_err() || quic.close_reason().is_some() {
            return;
        }
        proof.give();
        drop(under_way);
        std::future::pending().await
    };
    let served = h3::connection(quic.clone(), listening.parts, (listening.sources, place), proof.clone(), stop);
    // Dropping the loser: a connection that is served no more is cut off.
    tokio::select! {
        served = served => served,
        () = proven => anyhow::bail!("the handshake did not end"),
    }
}

fn enter(quic: &Connection, listening: &Listening) -> Result<Place, Full> {
    listening.sources.enter(quic.remote_address().ip(), Transport::Quic).inspect_err(|full| {
        listening.parts.metrics.connection_refused(full.as_str());
        quic.close(EXCESSIVE_LOAD, b"");
    })
}

/// Counts a handshake of one endpoint while it lasts.
struct Unproven(Arc<AtomicUsize>);

impl Unproven {
    fn new(count: &Arc<AtomicUsize>) -> Self {
        count.fetch_add(1, Ordering::Relaxed);
        Self(Arc::clone(count))
    }
}

impl Drop for Unproven {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::Relaxed);
    }
}

/// How many handshakes began in the last second.
#[derive(Debug, Default)]
struct Rate {
    since: Option<Instant>,
    count: u32,
    /// Whether there were too many in the second before: it takes a calm one to trust again.
    was_high: bool,
}

impl Rate {
    /// One more begins now. Whether there are too many.
    fn is_high(&mut self, now: Instant) -> bool {
        let age = self.since.map(|since| now.saturating_duration_since(since));
        if age.is_none_or(|age| age >= Duration::from_secs(1)) {
            self.was_high = self.count > UNPROVEN_PER_SECOND_MAX && age.is_some_and(|age| age < Duration::from_secs(2));
            self.since = Some(now);
            self.count = 0;
        }
        self.count += 1;
        self.was_high || self.count > UNPROVEN_PER_SECOND_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn many_handshakes_in_a_second_are_too_many_until_there_are_fewer() {
        let (start, mut rate) = (Instant::now(), Rate::default());
        let mut high = |second: u64, count: u32| {
            let now = start + Duration::from_secs(second);
            (0..count).filter(|_| rate.is_high(now)).count()
        };
        assert_eq!(high(0, 1_000), 0);
        assert_eq!(high(1, 1_500), 500);
        assert_eq!(high(2, 10), 10);
        assert_eq!(high(3, 10), 0);
    }
}
