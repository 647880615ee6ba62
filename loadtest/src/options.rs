//! What a run is asked to do. [`Checked`] is the proof that it can be done as asked.

use std::fmt;
use std::net::SocketAddr;
use std::time::Duration;

use bytes::Bytes;
use http::{HeaderMap, Method};
use rustls_pki_types::{CertificateDer, ServerName};
use serde::{Deserialize, Serialize};

use crate::arrivals::Arrivals;
use crate::error::LoadError;
use crate::status::StatusSet;

/// Requests per second that may be asked for.
pub const RATE_MAX: u32 = 1_000_000;
/// The longest run.
pub const DURATION_MAX: Duration = Duration::from_secs(24 * 60 * 60);
/// Connections over all targets and protocols.
pub const CONNECTIONS_MAX: usize = 20_000;
/// The highest limit of requests in flight.
pub const IN_FLIGHT_MAX: usize = 1_000_000;
/// The longest time a request may be given.
pub const TIMEOUT_MAX: Duration = Duration::from_secs(10 * 60);
/// How late the generator may start its 99th percentile before a run is not valid, unless told otherwise.
pub const LAG_P99_DEFAULT: Duration = Duration::from_millis(1);

/// Everything a run needs to know.
#[derive(Clone, Debug)]
pub struct Options {
    /// Where requests go; each request picks one at random, all alike.
    pub targets: Vec<Target>,
    /// Requests per second over all targets and protocols.
    pub rate: u32,
    /// How long requests are sent. The answers of the last ones are waited for after that.
    pub duration: Duration,
    /// The same seed gives the same requests at the same times.
    pub seed: u64,
    /// How requests are spread over protocols.
    pub mix: Mix,
    /// Connections per target and protocol, opened before the first request.
    pub connections: usize,
    /// How requests are spread over time.
    pub arrivals: Arrivals,
    /// What is requested.
    pub requests: Vec<RequestClass>,
    /// Trusted certificate authorities of https targets.
    pub roots: Vec<CertificateDer<'static>>,
    /// Requests in flight at most; one that is due beyond counts as the error "generator saturated".
    pub in_flight_max: usize,
    /// Time from being due to the last byte of the answer.
    pub timeout: Duration,
    /// How late the generator may start the 99th percentile of its requests; later, the run is not valid.
    pub lag_p99_max: Duration,
}

/// One server, or one address of a server.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Target {
    /// With or without TLS.
    pub scheme: Scheme,
    /// Goes into Host or :authority and, with TLS, into the server name that the certificate must have.
    pub host: String,
    /// Goes into Host or :authority unless it is the scheme's own.
    pub port: u16,
    /// Where connections go. The host is never looked up.
    pub addr: SocketAddr,
}

/// With or without TLS.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scheme {
    /// TLS: h1 and h2 by ALPN, h3 over QUIC.
    Https,
    /// Plain TCP: h1, and h2 by prior knowledge.
    Http,
}

/// A version of HTTP.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Protocol {
    /// HTTP/1.1.
    H1,
    /// HTTP/2.
    H2,
    /// HTTP/3.
    H3,
}

/// Weights of the protocols; 0 leaves one out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mix {
    /// Weight of HTTP/1.1.
    pub h1: u32,
    /// Weight of HTTP/2.
    pub h2: u32,
    /// Weight of HTTP/3.
    pub h3: u32,
}

/// Requests of one kind.
#[derive(Clone, Debug)]
pub struct RequestClass {
    /// Names the class in the report.
    pub name: String,
    /// Its share among the classes; 0 leaves it out.
    pub weight: u32,
    /// The method.
    pub method: Method,
    /// The path and the query.
    pub path: String,
    /// Headers beside those that the protocol itself sets.
    pub headers: HeaderMap,
    /// The body; empty for none.
    pub body: Bytes,
    /// Other statuses are counted as unexpected.
    pub expect: StatusSet,
    /// Replaces the target's Host or :authority, but not its server name in TLS.
    pub host: Option<String>,
}

impl Protocol {
    /// All of them, in order.
    pub const ALL: [Protocol; 3] = [Protocol::H1, Protocol::H2, Protocol::H3];

    pub(crate) fn alpn(self) -> &'static [u8] {
        match self {
            Protocol::H1 => b"http/1.1",
            Protocol::H2 => b"h2",
            Protocol::H3 => b"h3",
        }
    }
}

impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Protocol::H1 => "h1",
            Protocol::H2 => "h2",
            Protocol::H3 => "h3",
        })
    }
}

impl Mix {
    /// The weight of one protocol.
    pub fn weight(&self, protocol: Protocol) -> u32 {
        match protocol {
            Protocol::H1 => self.h1,
            Protocol::H2 => self.h2,
            Protocol::H3 => self.h3,
        }
    }

    pub(crate) fn protocols(&self) -> impl Iterator<Item = Protocol> + '_ {
        Protocol::ALL.into_iter().filter(|protocol| self.weight(*protocol) > 0)
    }
}

impl Target {
    /// The value of Host or :authority.
    pub fn authority(&self) -> String {
        let host = if self.host.contains(':') { format!("[{}]", self.host) } else { self.host.clone() };
        match (self.scheme, self.port) {
            (Scheme::Https, 443) | (Scheme::Http, 80) => host,
            (_, port) => format!("{host}:{port}"),
        }
    }
}

impl Scheme {
    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Scheme::Https => "https",
            Scheme::Http => "http",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}://{} at {}", self.scheme.as_str(), self.authority(), self.addr)
    }
}

/// Options inside of all limits and without contradictions. [`Options::check`] is the only way to get them.
#[derive(Debug)]
pub(crate) struct Checked(Options);

impl std::ops::Deref for Checked {
    type Target = Options;

    fn deref(&self) -> &Options {
        &self.0
    }
}

impl Options {
    pub(crate) fn check(self) -> Result<Checked, LoadError> {
        for (what, empty) in [
            ("target", self.targets.is_empty()),
            ("protocol with a weight above 0", self.mix.protocols().next().is_none()),
            ("request class with a weight above 0", self.requests.iter().all(|class| class.weight == 0)),
        ] {
            if empty {
                return Err(LoadError::Empty { what });
            }
        }
        let lanes = self.targets.len() * self.mix.protocols().count();
        limit("rate", u128::from(self.rate), 1, u128::from(RATE_MAX))?;
        limit("duration in ms", self.duration.as_millis(), 1, DURATION_MAX.as_millis())?;
        limit("connections per target and protocol", self.connections as u128, 1, (CONNECTIONS_MAX / lanes) as u128)?;
        limit("requests in flight", self.in_flight_max as u128, 1, IN_FLIGHT_MAX as u128)?;
        limit("timeout in ms", self.timeout.as_millis(), 1, TIMEOUT_MAX.as_millis())?;
        for target in &self.targets {
            self.check_target(target)?;
        }
        Ok(Checked(self))
    }

    fn check_target(&self, target: &Target) -> Result<(), LoadError> {
        if ServerName::try_from(target.host.as_str()).is_err() {
            return Err(LoadError::Host { host: target.host.clone() });
        }
        match target.scheme {
            Scheme::Http if self.mix.h3 > 0 => Err(LoadError::PlainH3 { target: target.to_string() }),
            Scheme::Https if self.roots.is_empty() => Err(LoadError::NoRoots { target: target.to_string() }),
            Scheme::Http | Scheme::Https => Ok(()),
        }
    }
}

fn limit(what: &'static str, given: u128, min: u128, max: u128) -> Result<(), LoadError> {
    if (min..=max).contains(&given) { Ok(()) } else { Err(LoadError::Limit { what, given, min, max }) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A run that passes all checks; tests change one thing.
    pub(crate) fn sample() -> Options {
        let class = RequestClass {
            name: "home".to_owned(),
            weight: 1,
            method: Method::GET,
            path: "/".to_owned(),
            headers: HeaderMap::new(),
            body: Bytes::new(),
            expect: StatusSet::success(),
            host: None,
        };
        Options {
            targets: vec![Target {
                scheme: Scheme::Http,
                host: "hello.localhost".to_owned(),
                port: 8080,
                addr: SocketAddr::from(([127, 0, 0, 1], 8080)),
            }],
            rate: 100,
            duration: Duration::from_secs(1),
            seed: 1,
            mix: Mix { h1: 1, h2: 1, h3: 0 },
            connections: 1,
            arrivals: Arrivals::Even,
            requests: vec![class],
            roots: Vec::new(),
            in_flight_max: 100,
            timeout: Duration::from_secs(1),
            lag_p99_max: LAG_P99_DEFAULT,
        }
    }

    fn refusal(change: impl FnOnce(&mut Options)) -> String {
        let mut options = sample();
        change(&mut options);
        options.check().unwrap_err().to_string()
    }

    #[test]
    fn what_is_inside_the_limits_passes() {
        assert!(sample().check().is_ok());
    }

    #[test]
    fn what_cannot_be_done_is_refused_with_the_reason() {
        assert_eq!(refusal(|options| options.targets.clear()), "no target given");
        assert_eq!(
            refusal(|options| options.mix = Mix { h1: 0, h2: 0, h3: 0 }),
            "no protocol with a weight above 0 given"
        );
        assert_eq!(refusal(|options| options.requests[0].weight = 0), "no request class with a weight above 0 given");
        assert_eq!(refusal(|options| options.rate = 0), "rate is 0, allowed are 1 to 1000000");
        assert!(refusal(|options| options.rate = RATE_MAX + 1).starts_with("rate is 1000001"));
        assert!(refusal(|options| options.duration = Duration::ZERO).starts_with("duration in ms is 0"));
        assert!(refusal(|options| options.connections = 0).starts_with("connections per target"));
        assert!(refusal(|options| options.connections = CONNECTIONS_MAX).ends_with("allowed are 1 to 10000"));
        assert!(refusal(|options| options.in_flight_max = 0).starts_with("requests in flight is 0"));
        assert!(refusal(|options| options.timeout = Duration::from_secs(601)).starts_with("timeout in ms is 601000"));
        assert_eq!(
            refusal(|options| options.targets[0].host = "a b".to_owned()),
            "host \"a b\" is not a host name or address"
        );
        assert!(refusal(|options| options.mix.h3 = 1).contains("has no h3"));
        assert!(
            refusal(|options| options.targets[0].scheme = Scheme::Https).contains("no trusted certificate authority")
        );
    }

    #[test]
    fn an_authority_leaves_out_the_port_of_its_scheme() {
        let mut target = sample().targets.remove(0);
        assert_eq!(target.authority(), "hello.localhost:8080");
        target.port = 80;
        assert_eq!(target.authority(), "hello.localhost");
        target.scheme = Scheme::Https;
        assert_eq!(target.authority(), "hello.localhost:80");
        target.host = "::1".to_owned();
        assert_eq!(target.authority(), "[::1]:80");
    }
}
