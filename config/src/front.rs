//! What the public listeners take from one client, and whom they believe: the table `[front]` of a node's file.

use std::net::IpAddr;

use ipnet::IpNet;
use serde::Deserialize;

use crate::invalid::Problems;

/// Networks in one list.
const NETWORKS_MAX: usize = 1_000;

/// Bounds of the public listeners, and whom they believe.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct Front {
    /// Connections of one listener at once; more wait in the system's queue. Default 16,384.
    pub connections_max: u32,
    /// Handshakes of TLS and QUIC under way at once, of the whole node; more are reset or refused. Default 4,096.
    pub handshakes_max: u32,
    /// Time for a handshake of TLS or QUIC, milliseconds. Default 10,000.
    pub handshake_ms: u64,
    /// Bytes of a request's head, whichever version; more is 431. Default 16 KiB.
    pub head_bytes_max: u32,
    /// Bytes of a request's path and query; more is 414. Default 8 KiB.
    pub target_bytes_max: u32,
    /// Fields of a request's head; more is 431. Default 100.
    pub fields_max: u32,
    /// Time for a request's head, and for the first bytes of a connection, milliseconds. Default 10,000.
    pub head_ms: u64,
    /// How long a connection may be without a request, milliseconds. Default 60,000.
    pub idle_ms: u64,
    /// How old a connection may become, milliseconds; then its client is asked to make another. Default one hour.
    pub age_ms: u64,
    /// Requests of one HTTP/1.1 connection. Default 1,000.
    pub requests_per_connection_max: u64,
    /// Requests that one connection of HTTP/2 or 3 may have under way. Default 100.
    pub streams_max: u32,
    /// Requests of one HTTP/2 or 3 connection; then its client is asked to make another. Default 10,000.
    pub streams_per_connection_max: u64,
    /// What a client may do on one HTTP/2 or 3 connection that serves nothing (pings, settings, priorities, resets, unknown
    /// frames, streams that break a rule); at three quarters it is asked to leave, then cut off. Every answer that it
    /// takes whole gives one back. Default 1,000.
    pub glitches_max: u32,
    /// How long a client may be silent while its request's body is waited for, milliseconds. Default 30,000.
    pub body_idle_ms: u64,
    /// How long a client may take nothing of an answer, milliseconds. Default 60,000.
    pub write_idle_ms: u64,
    /// Bytes a second of a body or an answer below which those two times run out. Default 1,024.
    pub bytes_per_second_min: u32,
    /// Peers that speak the PROXY protocol, version 1 or 2, and must: load balancers in front of this node. TCP only.
    pub proxy_protocol_from: Vec<IpNet>,
    /// Peers whose `forwarded_field` tells who their client is.
    pub forwarded_from: Vec<IpNet>,
    /// Which field that is. Default `x-forwarded-for`.
    pub forwarded_field: ForwardedField,
    /// What one address may do.
    pub per_address: PerAddress,
}

impl Default for Front {
    fn default() -> Self {
        Self {
            connections_max: 16_384,
            handshakes_max: 4_096,
            handshake_ms: 10_000,
            head_bytes_max: 16 * 1024,
            target_bytes_max: 8 * 1024,
            fields_max: 100,
            head_ms: 10_000,
            idle_ms: 60_000,
            age_ms: 3_600_000,
            requests_per_connection_max: 1_000,
            streams_max: 100,
            streams_per_connection_max: 10_000,
            glitches_max: 1_000,
            body_idle_ms: 30_000,
            write_idle_ms: 60_000,
            bytes_per_second_min: 1_024,
            proxy_protocol_from: Vec::new(),
            forwarded_from: Vec::new(),
            forwarded_field: ForwardedField::default(),
            per_address: PerAddress::default(),
        }
    }
}

/// The field by which a trusted peer tells who its client is. Only one: a peer that sets one of them may pass on what its
/// client wrote into the other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum ForwardedField {
    /// `X-Forwarded-For`, with `X-Forwarded-Proto`.
    #[default]
    XForwardedFor,
    /// `Forwarded` (RFC 7239).
    Forwarded,
}

/// What one address may do: an IPv4 address, or the /64 of an IPv6 one.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct PerAddress {
    /// TCP connections at once. Default 256.
    pub connections_max: u32,
    /// QUIC connections at once. Default 64.
    pub quic_connections_max: u32,
    /// New connections a second, with twice as many at once after a rest. Default 100.
    pub connections_per_second: u32,
    /// Requests a second over all its connections, with twice as many at once after a rest; more are answered 429. The
    /// address is the client's that a peer of `proxy_protocol_from` or `forwarded_from` told. Default 0: no bound, since
    /// many people may share an address.
    pub requests_per_second: u32,
    /// Networks without these bounds. Default loopback. Peers of `proxy_protocol_from` are never bound by them.
    pub exempt: Vec<IpNet>,
}

impl Default for PerAddress {
    fn default() -> Self {
        let loopback = ["127.0.0.0/8", "::1/128"].map(|net| net.parse().expect("a network"));
        Self {
            connections_max: 256,
            quic_connections_max: 64,
            connections_per_second: 100,
            requests_per_second: 0,
            exempt: loopback.into(),
        }
    }
}

impl Front {
    /// Notes what can't be: a bound of nought would let nobody in.
    pub(crate) fn check(&self, problems: &mut Problems) {
        let bounds = [
            ("connections_max", u64::from(self.connections_max)),
            ("handshakes_max", self.handshakes_max.into()),
            ("handshake_ms", self.handshake_ms),
            ("target_bytes_max", self.target_bytes_max.into()),
            ("fields_max", self.fields_max.into()),
            ("head_ms", self.head_ms),
            ("idle_ms", self.idle_ms),
            ("age_ms", self.age_ms),
            ("requests_per_connection_max", self.requests_per_connection_max),
            ("streams_max", self.streams_max.into()),
            ("streams_per_connection_max", self.streams_per_connection_max),
            ("glitches_max", self.glitches_max.into()),
            ("body_idle_ms", self.body_idle_ms),
            ("write_idle_ms", self.write_idle_ms),
            ("bytes_per_second_min", self.bytes_per_second_min.into()),
            ("per_address.connections_max", self.per_address.connections_max.into()),
            ("per_address.quic_connections_max", self.per_address.quic_connections_max.into()),
            ("per_address.connections_per_second", self.per_address.connections_per_second.into()),
        ];
        for (name, _) in bounds.into_iter().filter(|(_, bound)| *bound == 0) {
            problems.add(None, format!("front.{name}"), "is 0, so nobody would be let in", Some("leave it out"));
        }
        if self.head_bytes_max <= self.target_bytes_max {
            let message = "is no more than front.target_bytes_max, which is a part of it";
            problems.add(None, "front.head_bytes_max", message, None);
        }
        for (name, list) in [
            ("proxy_protocol_from", &self.proxy_protocol_from),
            ("forwarded_from", &self.forwarded_from),
            ("per_address.exempt", &self.per_address.exempt),
        ] {
            if list.len() > NETWORKS_MAX {
                problems.add(None, format!("front.{name}"), format!("has more than {NETWORKS_MAX} networks"), None);
            }
        }
    }
}

/// Whether one of these networks has `address`. An IPv4 address that was mapped into IPv6 is the IPv4 one.
pub fn has(networks: &[IpNet], address: IpAddr) -> bool {
    !networks.is_empty() && networks.iter().any(|net| net.contains(&address.to_canonical()))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn problems(text: &str) -> Vec<String> {
        let mut problems = Problems::default();
        toml::from_str::<Front>(text).unwrap().check(&mut problems);
        match problems.settle(std::path::Path::new("node.toml"), text, Some(())) {
            Ok(()) => Vec::new(),
            Err(invalid) => invalid.places().into_iter().map(|place| place.field).collect(),
        }
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let front: Front = toml::from_str("idle_ms = 5\nper_address = { requests_per_second = 7 }").unwrap();
        assert_eq!((front.idle_ms, front.head_bytes_max), (5, 16_384));
        assert_eq!((front.per_address.requests_per_second, front.per_address.connections_max), (7, 256));
        assert_eq!(problems(""), [""; 0]);
    }

    #[test]
    fn a_bound_that_lets_nobody_in_is_told() {
        assert_eq!(problems("fields_max = 0\nper_address.connections_max = 0").len(), 2);
        assert_eq!(problems("head_bytes_max = 8192"), ["front.head_bytes_max"]);
        for bad in ["fields_max = -1", "proxy_protocol_from = ['10.0.0.0/33']", "forwarded_field = 'via'", "colour = 1"]
        {
            assert!(toml::from_str::<Front>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn a_network_has_its_addresses_also_as_mapped_ones() {
        let nets: Vec<IpNet> = ["10.0.0.0/8", "2001:db8::/32"].map(|net| net.parse().unwrap()).into();
        for (address, want) in [
            ("10.1.2.3", true),
            ("::ffff:10.1.2.3", true),
            ("11.1.2.3", false),
            ("2001:db8::7", true),
            ("2001:db9::7", false),
        ] {
            assert_eq!(has(&nets, address.parse().unwrap()), want, "{address}");
        }
        assert!(!has(&[], "10.1.2.3".parse().unwrap()));
    }
}
