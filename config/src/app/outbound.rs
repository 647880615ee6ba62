//! The grammar of `allowed_outbound_hosts`: `scheme://host[:port]`, by Spin's rules.

use std::net::IpAddr;

/// One allowed destination of outgoing requests.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct AllowedHost {
    scheme: Option<String>,
    host: Host,
    ports: Ports,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Host {
    Any,
    /// `*.domain`: any name below it, not the domain itself.
    Below(String),
    Name(String),
    Network(IpAddr, u8),
    Itself,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Ports {
    Any,
    /// First, and one past the last.
    Range(u16, u32),
}

/// An entry that is not of the grammar.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OutboundError {
    /// The scheme is missing or not alphabetic.
    #[error("{0:?} must start with a scheme, as in https://api.example")]
    Scheme(String),
    /// The host is empty or has a misplaced `*`.
    #[error("{0:?} has no valid host")]
    Host(String),
    /// The port is no number, range or `*`, or missing where the scheme has no default.
    #[error("{0:?} has no valid port")]
    Port(String),
    /// A path makes no sense here.
    #[error("{0:?} has a path: only scheme, host and port are allowed")]
    Path(String),
}

fn default_port(scheme: &str) -> Option<u16> {
    Some(match scheme {
        "http" => 80,
        "https" => 443,
        "redis" => 6379,
        "postgres" => 5432,
        "mysql" => 3306,
        "mqtt" => 1883,
        _ => return None,
    })
}

impl std::str::FromStr for AllowedHost {
    type Err = OutboundError;

    fn from_str(text: &str) -> Result<Self, OutboundError> {
        let wrong = |kind: fn(String) -> OutboundError| kind(text.to_owned());
        let (scheme, rest) = text.split_once("://").ok_or_else(|| wrong(OutboundError::Scheme))?;
        let scheme = match scheme {
            "*" => None,
            s if !s.is_empty() && s.bytes().all(|b| b.is_ascii_alphabetic()) => Some(s.to_ascii_lowercase()),
            _ => return Err(wrong(OutboundError::Scheme)),
        };
        let (authority, network) = split_path(rest).ok_or_else(|| wrong(OutboundError::Path))?;
        let (host, port) = split_port(authority).ok_or_else(|| wrong(OutboundError::Host))?;
        let host = parse_host(&host, network).ok_or_else(|| wrong(OutboundError::Host))?;
        let ports = match (port, &scheme) {
            (Some(port), _) => parse_ports(&port).ok_or_else(|| wrong(OutboundError::Port))?,
            (None, None) => Ports::Any,
            (None, Some(_)) if host == Host::Itself => Ports::Any,
            (None, Some(scheme)) => {
                let port = default_port(scheme).ok_or_else(|| wrong(OutboundError::Port))?;
                Ports::Range(port, u32::from(port) + 1)
            }
        };
        Ok(Self { scheme, host, ports })
    }
}

/// Splits `authority[/prefix-length][:port]` from a path, of which only "/" is allowed.
fn split_path(rest: &str) -> Option<(String, Option<u8>)> {
    let Some((before, after)) = rest.split_once('/') else { return Some((rest.to_owned(), None)) };
    if after.is_empty() {
        return Some((before.to_owned(), None));
    }
    let (bits, port) = after.split_once(':').map_or((after, ""), |(bits, port)| (bits, port));
    let bits: u8 = bits.parse().ok()?;
    let port = if port.is_empty() { String::new() } else { format!(":{port}") };
    Some((format!("{before}{port}"), Some(bits)))
}

fn split_port(authority: String) -> Option<(String, Option<String>)> {
    if let Some(inner) = authority.strip_prefix('[') {
        let (address, tail) = inner.split_once(']')?;
        return match tail.strip_prefix(':') {
            Some(port) => Some((address.to_owned(), Some(port.to_owned()))),
            None if tail.is_empty() => Some((address.to_owned(), None)),
            None => None,
        };
    }
    match authority.split_once(':') {
        Some((host, port)) => Some((host.to_owned(), Some(port.to_owned()))),
        None => Some((authority, None)),
    }
}

fn parse_host(host: &str, network: Option<u8>) -> Option<Host> {
    if let Ok(address) = host.parse::<IpAddr>() {
        let bits = if address.is_ipv4() { 32 } else { 128 };
        let prefix = network.unwrap_or(bits);
        return (prefix <= bits).then_some(Host::Network(address, prefix));
    }
    if network.is_some() {
        return None;
    }
    match host {
        "*" => return Some(Host::Any),
        "self" | "self.alt" => return Some(Host::Itself),
        _ => {}
    }
    let (below, name) = host.strip_prefix("*.").map_or((false, host), |name| (true, name));
    let is_name =
        !name.is_empty() && name.bytes().all(|b| b.is_ascii_alphanumeric() || matches!(b, b'-' | b'.' | b'_'));
    let name = name.to_ascii_lowercase();
    is_name.then_some(if below { Host::Below(name) } else { Host::Name(name) })
}

fn parse_ports(port: &str) -> Option<Ports> {
    if port == "*" {
        return Some(Ports::Any);
    }
    if let Some((from, to)) = port.split_once("..") {
        let (from, to): (u16, u32) = (from.parse().ok()?, to.parse().ok()?);
        return (u32::from(from) < to && to <= 65_536).then_some(Ports::Range(from, to));
    }
    let port: u16 = port.parse().ok()?;
    Some(Ports::Range(port, u32::from(port) + 1))
}

impl AllowedHost {
    /// Whether a request to `scheme://host:port` is allowed by this entry. `host` is a name or an address literal.
    pub fn allows(&self, scheme: &str, host: &str, port: u16) -> bool {
        let scheme_fits = self.scheme.as_deref().is_none_or(|s| s.eq_ignore_ascii_case(scheme));
        let port_fits = match self.ports {
            Ports::Any => true,
            Ports::Range(from, to) => (u32::from(from)..to).contains(&u32::from(port)),
        };
        scheme_fits && port_fits && self.host_fits(&host.trim_matches(['[', ']']).to_ascii_lowercase())
    }

    fn host_fits(&self, host: &str) -> bool {
        match &self.host {
            Host::Any => true,
            Host::Below(domain) => {
                host.strip_suffix(domain.as_str()).is_some_and(|head| head.len() > 1 && head.ends_with('.'))
            }
            Host::Name(name) => host == name,
            Host::Network(network, bits) => host.parse().is_ok_and(|address| in_network(address, *network, *bits)),
            Host::Itself => matches!(host, "self" | "self.alt"),
        }
    }
}

fn in_network(address: IpAddr, network: IpAddr, bits: u8) -> bool {
    match (address, network) {
        (IpAddr::V4(a), IpAddr::V4(n)) => {
            same_prefix(u128::from(a.to_bits()) << 96, u128::from(n.to_bits()) << 96, bits)
        }
        (IpAddr::V6(a), IpAddr::V6(n)) => same_prefix(a.to_bits(), n.to_bits(), bits),
        _ => false,
    }
}

fn same_prefix(a: u128, b: u128, bits: u8) -> bool {
    bits == 0 || (a ^ b) >> (128 - u32::from(bits)) == 0
}

#[cfg(test)]
mod tests {
    use super::*;

    fn allows(entry: &str, scheme: &str, host: &str, port: u16) -> bool {
        entry.parse::<AllowedHost>().unwrap().allows(scheme, host, port)
    }

    #[test]
    fn an_entry_allows_what_it_names_and_nothing_else() {
        for (entry, scheme, host, port, want) in [
            ("https://api.example", "https", "api.example", 443, true),
            ("https://api.example", "https", "API.example", 443, true),
            ("https://api.example/", "https", "api.example", 443, true),
            ("https://api.example", "http", "api.example", 80, false),
            ("https://api.example", "https", "api.example", 8443, false),
            ("https://api.example", "https", "xapi.example", 443, false),
            ("https://*.example", "https", "a.b.example", 443, true),
            ("https://*.example", "https", "example", 443, false),
            ("https://*.example", "https", "evilexample", 443, false),
            ("*://*:*", "redis", "anything", 1, true),
            ("http://10.0.0.0/8:8080", "http", "10.200.3.4", 8080, true),
            ("http://10.0.0.0/8:8080", "http", "11.0.0.1", 8080, false),
            ("http://[fd00::1]:80", "http", "[fd00::1]", 80, true),
            ("http://127.0.0.1:3000..3010", "http", "127.0.0.1", 3009, true),
            ("http://127.0.0.1:3000..3010", "http", "127.0.0.1", 3010, false),
            ("http://self", "http", "self", 3000, true),
        ] {
            assert_eq!(allows(entry, scheme, host, port), want, "{entry} {scheme}://{host}:{port}");
        }
    }

    #[test]
    fn what_is_not_of_the_grammar_is_refused() {
        for bad in [
            "",
            "api.example",
            "https://",
            "https://a/b",
            "h2tp://a",
            "https://a:x",
            "https://a*b",
            "ftp://a",
            "http://a:9..3",
            "http://10.0.0.0/40",
        ] {
            assert!(bad.parse::<AllowedHost>().is_err(), "{bad}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = text.parse::<AllowedHost>();
        }
    }
}
