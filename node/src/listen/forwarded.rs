//! Who the client is behind a proxy that we trust, by what the proxy says of it.
//!
//! Each proxy adds the address that it heard from at the end. So the list is read from there, for as long as those who
//! wrote are trusted: the first address that is nobody's whom we trust is the client, and what stands before it is what
//! that client claims. From any other peer the fields say nothing, and no guest sees them.

use std::net::{IpAddr, SocketAddr};

use http::{HeaderMap, HeaderValue};
use selvage_config::front::{ForwardedField, Front, has};

use crate::request::Request;

/// Proxies that a request may have come through.
const HOPS_MAX: usize = 32;

const FORWARDED: &str = "forwarded";
const X_FORWARDED_FOR: &str = "x-forwarded-for";
const X_FORWARDED_PROTO: &str = "x-forwarded-proto";

/// Puts the client, and whether TLS carried its request, in the place of the trusted proxy that passed it on.
pub(super) fn believe(front: &Front, request: &mut Request) {
    request.client = plain(request.client);
    if !has(&front.forwarded_from, request.client.ip()) {
        return;
    }
    let fields = request.http.headers();
    let (client, scheme) = match front.forwarded_field {
        ForwardedField::XForwardedFor => {
            let hops = elements(fields, X_FORWARDED_FOR).map(address);
            (client(front, hops), elements(fields, X_FORWARDED_PROTO).next().map(ToOwned::to_owned))
        }
        ForwardedField::Forwarded => {
            let hops = elements(fields, FORWARDED).map(|element| address(&parameter(element, "for")?));
            (client(front, hops), elements(fields, FORWARDED).next().and_then(|last| parameter(last, "proto")))
        }
    };
    match scheme.as_deref() {
        Some(scheme) if scheme.eq_ignore_ascii_case("https") => request.secure = true,
        Some(scheme) if scheme.eq_ignore_ascii_case("http") => request.secure = false,
        _ => {}
    }
    if let Some(client) = client {
        request.client = plain(client);
    }
}

/// An IPv4 client of a socket for both families has the address that everybody knows it by (RFC 4291 2.5.5.2).
fn plain(client: SocketAddr) -> SocketAddr {
    SocketAddr::new(client.ip().to_canonical(), client.port())
}

/// The first hop that nobody whom we trust stands behind.
fn client(front: &Front, hops: impl Iterator<Item = Option<SocketAddr>>) -> Option<SocketAddr> {
    let mut client = None;
    for hop in hops.take(HOPS_MAX) {
        // Whatever a proxy could not name ends what is known.
        let Some(hop) = hop else { break };
        client = Some(hop);
        if !has(&front.forwarded_from, hop.ip()) {
            break;
        }
    }
    client
}

/// The elements of a list, over all of a field's lines, the last one first. A comma in quotes is part of its element.
fn elements<'f>(fields: &'f HeaderMap, name: &str) -> impl Iterator<Item = &'f str> {
    let values: Vec<&HeaderValue> = fields.get_all(name).iter().collect();
    values.into_iter().rev().flat_map(|value| {
        let mut quoted = false;
        let outside = move |mark: char| {
            quoted ^= mark == '"';
            mark == ',' && !quoted
        };
        let mut elements: Vec<&str> = value.to_str().unwrap_or("").split(outside).map(str::trim).collect();
        elements.reverse();
        elements
    })
}

/// A parameter of an element (RFC 7239 4), without its quotes.
fn parameter(element: &str, name: &str) -> Option<String> {
    element.split(';').find_map(|pair| {
        let (key, value) = pair.split_once('=')?;
        let value = value.trim();
        key.trim().eq_ignore_ascii_case(name).then(|| value.trim_matches('"').to_owned())
    })
}

/// An address with or without a port (RFC 7239 6). Obfuscated and unknown ones are none.
fn address(text: &str) -> Option<SocketAddr> {
    let plain = text.strip_prefix('[').and_then(|text| text.strip_suffix(']')).unwrap_or(text);
    let without_port = || plain.parse::<IpAddr>().ok().map(|address| SocketAddr::new(address, 0));
    text.parse().ok().or_else(without_port)
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::request::{Protocol, empty};

    fn believed(field: ForwardedField, peer: &str, lines: &[(&str, &str)]) -> (String, bool) {
        let front = Front {
            forwarded_from: vec!["10.0.0.0/8".parse().unwrap(), "2001:db8::/32".parse().unwrap()],
            forwarded_field: field,
            ..Front::default()
        };
        let mut http = http::Request::builder().uri("/");
        for (name, value) in lines {
            http = http.header(*name, *value);
        }
        let mut request = Request {
            http: http.body(empty()).unwrap(),
            client: SocketAddr::new(peer.parse().unwrap(), 1),
            protocol: Protocol::H1,
            secure: false,
            arrived: Instant::now(),
        };
        believe(&front, &mut request);
        (request.client.to_string(), request.secure)
    }

    #[test]
    fn an_ipv4_client_of_a_socket_for_both_families_is_one() {
        let field = ForwardedField::XForwardedFor;
        assert_eq!(believed(field, "::ffff:192.0.2.7", &[]).0, "192.0.2.7:1");
        let through = [("x-forwarded-for", "::ffff:192.0.2.7")];
        assert_eq!(believed(field, "::ffff:10.0.0.1", &through).0, "192.0.2.7:0");
    }

    #[test]
    fn a_trusted_proxy_tells_who_the_client_is() {
        use ForwardedField::{Forwarded, XForwardedFor};
        for (field, lines, want) in [
            (XForwardedFor, &[("x-forwarded-for", "192.0.2.7")][..], ("192.0.2.7:0", false)),
            (XForwardedFor, &[("x-forwarded-for", "192.0.2.7:99")], ("192.0.2.7:99", false)),
            (XForwardedFor, &[("x-forwarded-for", "6.6.6.6, 192.0.2.7, 10.0.0.9")], ("192.0.2.7:0", false)),
            (
                XForwardedFor,
                &[("x-forwarded-for", "6.6.6.6"), ("x-forwarded-for", "192.0.2.7")],
                ("192.0.2.7:0", false),
            ),
            (XForwardedFor, &[("x-forwarded-for", "10.0.0.8, 10.0.0.9")], ("10.0.0.8:0", false)),
            (XForwardedFor, &[("x-forwarded-for", "6.6.6.6, secret, 10.0.0.9")], ("10.0.0.9:0", false)),
            (XForwardedFor, &[("x-forwarded-for", "")], ("10.0.0.1:1", false)),
            (XForwardedFor, &[("forwarded", "for=6.6.6.6")], ("10.0.0.1:1", false)),
            (
                XForwardedFor,
                &[("x-forwarded-for", "2001:db9::7"), ("x-forwarded-proto", "https")],
                ("[2001:db9::7]:0", true),
            ),
            (XForwardedFor, &[("x-forwarded-proto", "https, http")], ("10.0.0.1:1", false)),
            (XForwardedFor, &[("x-forwarded-proto", "gopher")], ("10.0.0.1:1", false)),
            (Forwarded, &[("forwarded", "for=6.6.6.6, For=192.0.2.7;proto=https")], ("192.0.2.7:0", true)),
            (Forwarded, &[("forwarded", "for=\"[2001:db9::7]:47\"; by=\"a,b\"")], ("[2001:db9::7]:47", false)),
            (Forwarded, &[("forwarded", "for=192.0.2.7, for=_hidden")], ("10.0.0.1:1", false)),
            (Forwarded, &[("x-forwarded-for", "6.6.6.6")], ("10.0.0.1:1", false)),
        ] {
            assert_eq!(believed(field, "10.0.0.1", lines), (want.0.to_owned(), want.1), "{lines:?}");
        }
    }

    #[test]
    fn anybody_else_is_who_it_is() {
        let lines = [("x-forwarded-for", "192.0.2.7"), ("x-forwarded-proto", "https"), ("forwarded", "for=192.0.2.7")];
        for field in [ForwardedField::XForwardedFor, ForwardedField::Forwarded] {
            assert_eq!(believed(field, "6.6.6.6", &lines), ("6.6.6.6:1".to_owned(), false));
        }
    }
}
