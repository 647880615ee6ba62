//! What one address may do: connections at once, new ones a second, requests a second.
//!
//! A source is an IPv4 address or the /64 of an IPv6 one, since a subscriber has all of that. The table is bounded: a
//! source is forgotten when it has no connection and the table is full. Only addresses that were shown to be their
//! owner's may be entered, or a sender of forged packets fills the table; a TCP handshake shows it, QUIC's may not.

use std::collections::HashMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ipnet::IpNet;
use selvage_config::front::{Front, PerAddress, has};

/// Parts of the table, each with a lock of its own.
const SHARDS: usize = 16;
/// Sources in one part that are kept without a connection.
const SHARD_SOURCES_MAX: usize = 4_096;
/// After a rest a source may do at once what it may do in this time.
const BURST: Duration = Duration::from_secs(2);

/// Where connections come from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Source {
    V4(u32),
    /// The first half: the network.
    V6(u64),
}

impl Source {
    fn of(address: IpAddr) -> Self {
        match address.to_canonical() {
            IpAddr::V4(address) => Self::V4(address.to_bits()),
            IpAddr::V6(address) => {
                let [a, b, c, d, e, f, g, h, ..] = address.octets();
                Self::V6(u64::from_be_bytes([a, b, c, d, e, f, g, h]))
            }
        }
    }

    fn shard(self) -> usize {
        // Neighbours come together, so the low bits tell them apart best.
        let bits = match self {
            Self::V4(bits) => u64::from(bits),
            Self::V6(bits) => bits,
        };
        usize::try_from(bits % SHARDS as u64).unwrap_or(0)
    }
}

/// What carries a connection.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Transport {
    /// HTTP/1.1 and 2.
    Tcp,
    /// HTTP/3.
    Quic,
}

/// Which bound a source met.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub(super) enum Full {
    /// It has as many connections as it may.
    #[error("source has too many connections")]
    Connections,
    /// It makes them too fast.
    #[error("source makes connections too fast")]
    Rate,
}

impl Full {
    /// The label in the metric.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::Connections => "per-address",
            Self::Rate => "per-address-rate",
        }
    }
}

/// The table.
#[derive(Debug)]
pub(super) struct Sources {
    shards: [Mutex<HashMap<Source, Arc<Entry>>>; SHARDS],
    bounds: PerAddress,
    /// Whoever stands before us: what comes from there are many clients.
    unbound: Vec<IpNet>,
    since: Instant,
}

#[derive(Debug, Default)]
struct Entry {
    tcp: AtomicU32,
    quic: AtomicU32,
    connections: Rate,
    requests: Rate,
}

impl Entry {
    fn count(&self, transport: Transport) -> &AtomicU32 {
        match transport {
            Transport::Tcp => &self.tcp,
            Transport::Quic => &self.quic,
        }
    }

    fn is_rested(&self, now: Duration) -> bool {
        self.connections.is_rested(now) && self.requests.is_rested(now)
    }

    fn is_connected(&self) -> bool {
        self.tcp.load(Ordering::Relaxed) > 0 || self.quic.load(Ordering::Relaxed) > 0
    }
}

/// So many a second. It is the time at which all that was taken would have been due (GCRA, ITU-T I.371 A), nanoseconds.
#[derive(Debug, Default)]
struct Rate {
    due: AtomicU64,
}

impl Rate {
    /// Takes one, if it is not too early for it.
    fn take(&self, now: Duration, per_second: u32) -> bool {
        let each = nanos(Duration::from_secs(1)) / u64::from(per_second.max(1));
        let (now, burst) = (nanos(now), nanos(BURST));
        let next = |due: u64| Some(due.max(now) + each).filter(|due| *due <= now + burst);
        self.due.fetch_update(Ordering::Relaxed, Ordering::Relaxed, next).is_ok()
    }

    fn is_rested(&self, now: Duration) -> bool {
        self.due.load(Ordering::Relaxed) <= nanos(now)
    }
}

fn nanos(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX / 2)
}

/// One connection's place in the table. It is free again when this is dropped.
#[derive(Debug)]
pub(super) struct Place {
    /// None: the source has no bounds.
    held: Option<Held>,
}

#[derive(Debug)]
struct Held {
    source: Source,
    entry: Arc<Entry>,
    transport: Transport,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.entry.count(self.transport).fetch_sub(1, Ordering::Relaxed);
    }
}

impl Sources {
    pub(super) fn new(front: &Front) -> Self {
        let bounds = front.per_address.clone();
        let lists = [&bounds.exempt, &front.proxy_protocol_from, &front.forwarded_from];
        let unbound = lists.into_iter().flatten().copied().collect();
        Self { shards: Default::default(), bounds, unbound, since: Instant::now() }
    }

    /// A connection from `address` begins.
    pub(super) fn enter(&self, address: IpAddr, transport: Transport) -> Result<Place, Full> {
        self.enter_at(self.since.elapsed(), address, transport)
    }

    fn enter_at(&self, now: Duration, address: IpAddr, transport: Transport) -> Result<Place, Full> {
        if has(&self.unbound, address) {
            return Ok(Place { held: None });
        }
        let source = Source::of(address);
        let entry = self.entry(now, source);
        if !entry.connections.take(now, self.bounds.connections_per_second) {
            return Err(Full::Rate);
        }
        let max = match transport {
            Transport::Tcp => self.bounds.connections_max,
            Transport::Quic => self.bounds.quic_connections_max,
        };
        // It counts down when it is dropped, also when it is one too many.
        let before = entry.count(transport).fetch_add(1, Ordering::Relaxed);
        let held = Held { source, entry, transport };
        if before >= max { Err(Full::Connections) } else { Ok(Place { held: Some(held) }) }
    }

    /// Whether this client may ask for one thing more. It came by the connection of this place, or somebody who is believed
    /// passed its request on.
    pub(super) fn may_ask(&self, place: &Place, client: IpAddr) -> bool {
        self.bounds.requests_per_second == 0 || self.may_ask_at(self.since.elapsed(), place, client)
    }

    fn may_ask_at(&self, now: Duration, place: &Place, client: IpAddr) -> bool {
        let (source, rate) = (Source::of(client), self.bounds.requests_per_second);
        match &place.held {
            Some(held) if held.source == source => held.entry.requests.take(now, rate),
            _ if has(&self.unbound, client) => true,
            _ => self.entry(now, source).requests.take(now, rate),
        }
    }

    fn entry(&self, now: Duration, source: Source) -> Arc<Entry> {
        // Nothing panics while it holds the lock.
        let mut shard = self.shards[source.shard()].lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(entry) = shard.get(&source) {
            return Arc::clone(entry);
        }
        if shard.len() >= SHARD_SOURCES_MAX {
            shard.retain(|_, entry| entry.is_connected() || !entry.is_rested(now));
        }
        if shard.len() >= SHARD_SOURCES_MAX {
            // Those that are connected are bounded by the listeners.
            shard.retain(|_, entry| entry.is_connected());
        }
        Arc::clone(shard.entry(source).or_default())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const NOW: Duration = Duration::from_secs(100);

    fn sources(change: impl FnOnce(&mut PerAddress)) -> Sources {
        let mut front = Front { proxy_protocol_from: vec!["10.0.0.0/8".parse().unwrap()], ..Front::default() };
        change(&mut front.per_address);
        Sources::new(&front)
    }

    fn enter(sources: &Sources, address: &str) -> Result<Place, Full> {
        sources.enter_at(NOW, address.parse().unwrap(), Transport::Tcp)
    }

    #[test]
    fn a_source_has_so_many_connections_at_once() {
        let sources = sources(|bounds| (bounds.connections_max, bounds.quic_connections_max) = (2, 1));
        let first = enter(&sources, "192.0.2.7").unwrap();
        let _second = enter(&sources, "::ffff:192.0.2.7").unwrap();
        for _ in 0..3 {
            assert_eq!(enter(&sources, "192.0.2.7").unwrap_err(), Full::Connections);
        }
        let quic = |address: &str| sources.enter_at(NOW, address.parse().unwrap(), Transport::Quic);
        let _third = quic("192.0.2.7").unwrap();
        assert_eq!(quic("192.0.2.7").unwrap_err(), Full::Connections);
        assert!(enter(&sources, "192.0.2.8").is_ok());
        drop(first);
        assert!(enter(&sources, "192.0.2.7").is_ok());
    }

    #[test]
    fn the_addresses_of_one_network_are_one_source() {
        let sources = sources(|bounds| bounds.connections_max = 1);
        let _one = enter(&sources, "2001:db8::1").unwrap();
        assert!(enter(&sources, "2001:db8::ffff:ffff:ffff:ffff").is_err());
        assert!(enter(&sources, "2001:db8:0:1::1").is_ok());
    }

    #[test]
    fn new_connections_have_a_rate_and_a_burst() {
        let sources = sources(|bounds| bounds.connections_per_second = 10);
        let at = |seconds: f64| {
            let now = NOW + Duration::from_secs_f64(seconds);
            sources.enter_at(now, "192.0.2.7".parse().unwrap(), Transport::Tcp).map(drop)
        };
        assert_eq!((0..50).filter(|_| at(0.0).is_ok()).count(), 20);
        assert_eq!(at(0.05), Err(Full::Rate));
        assert_eq!((0..50).filter(|_| at(1.0).is_ok()).count(), 10);
        assert_eq!((0..50).filter(|_| at(60.0).is_ok()).count(), 20);
    }

    #[test]
    fn requests_have_a_rate_if_one_is_set() {
        let bound = sources(|bounds| bounds.requests_per_second = 5);
        let of = |address: &str| (enter(&bound, address).unwrap(), address.parse::<IpAddr>().unwrap());
        let all = ["2001:db8::1", "2001:db8::2", "2001:db8:0:1::1"].map(of);
        let asked = |(place, client): &(Place, IpAddr)| bound.may_ask_at(NOW, place, *client);
        // Two of one network, over two connections, have what one may.
        assert_eq!((0..20).filter(|number| asked(&all[number % 2])).count(), 10);
        assert_eq!((0..20).filter(|_| asked(&all[2])).count(), 10);
        let free = sources(|_| ());
        let place = enter(&free, "192.0.2.7").unwrap();
        assert!((0..1_000).all(|_| free.may_ask(&place, "192.0.2.7".parse().unwrap())));
    }

    #[test]
    fn a_client_behind_a_balancer_has_its_rate_over_all_connections_and_the_balancer_has_none() {
        let bound = sources(|bounds| bounds.requests_per_second = 5);
        let balancer = [enter(&bound, "10.0.0.1").unwrap(), enter(&bound, "10.0.0.2").unwrap()];
        let direct = enter(&bound, "192.0.2.7").unwrap();
        let places = [&balancer[0], &balancer[1], &direct];
        let asked = |client: &str| {
            let client = client.parse().unwrap();
            (0..30).filter(|number| bound.may_ask_at(NOW, places[number % 3], client)).count()
        };
        assert_eq!(asked("192.0.2.7"), 10);
        assert_eq!(asked("192.0.2.8"), 10);
        assert_eq!(asked("10.0.0.1"), 30);
    }

    #[test]
    fn whoever_stands_before_us_is_not_bound() {
        let sources = sources(|bounds| bounds.connections_max = 1);
        for address in ["127.0.0.1", "::1", "10.1.2.3"] {
            let all: Vec<_> = (0..500).map(|_| enter(&sources, address).unwrap()).collect();
            assert_eq!(all.len(), 500);
        }
    }

    #[test]
    fn the_table_is_bounded_and_keeps_who_is_connected() {
        let sources = sources(|_| ());
        let kept = enter(&sources, "192.0.2.7").unwrap();
        for number in 0..200_000_u32 {
            let address = IpAddr::from((0x2000_0000 + number).to_be_bytes());
            sources.enter_at(NOW, address, Transport::Tcp).unwrap();
        }
        let count: usize = sources.shards.iter().map(|shard| shard.lock().unwrap().len()).sum();
        assert!(count <= SHARDS * SHARD_SOURCES_MAX, "{count}");
        let source = Source::of("192.0.2.7".parse().unwrap());
        assert!(sources.shards[source.shard()].lock().unwrap()[&source].is_connected());
        drop(kept);
    }
}
