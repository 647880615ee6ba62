//! What must hold for a request's head above what the parsers check, whichever of them read it.

use http::header::{CONTENT_LENGTH, COOKIE, EXPECT, HOST, TE, TRANSFER_ENCODING};
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Uri};
use selvage_config::front::Front;

use crate::fault::{ClientFault, Fault};
use crate::request::{Protocol, Request};
use crate::route::{fields, split};

/// What a head that was checked says to the node alone.
#[derive(Debug)]
pub(crate) struct Checked {
    /// `host[:port]`.
    pub(crate) authority: Authority,
    /// The release that the request names. It is the one field of the node's own names that a client may send, and it goes
    /// no further than here: whether the wish counts is for the split to say.
    pub(crate) wanted: Option<HeaderValue>,
}

/// Checks a request's head and takes out of it what must not go further: fields of the connection, and fields that only
/// the node sets. Afterwards the target has scheme and authority.
///
/// # Errors
/// [`Fault::Client`].
pub(crate) fn check(front: &Front, request: &mut Request) -> Result<Checked, Fault> {
    let (protocol, http) = (request.protocol, &mut request.http);
    if matches!(*http.method(), Method::CONNECT | Method::TRACE) {
        return Err(Fault::Client(ClientFault::Method));
    }
    let target = http.uri().path_and_query().map_or("", |target| target.as_str());
    if target.len() > front.target_bytes_max as usize {
        return Err(Fault::Client(ClientFault::TargetTooLong));
    }
    let authority = authority(protocol, http.uri().authority(), http.headers()).ok_or(ClientFault::Host);
    let authority = authority.map_err(Fault::Client)?;
    if !target.starts_with('/') || !is_framed(protocol, http.headers()) {
        return Err(Fault::Client(ClientFault::Malformed));
    }
    let fields = http.headers_mut();
    join_cookies(fields);
    if fields.len() > front.fields_max as usize {
        return Err(Fault::Client(ClientFault::HeadTooLarge));
    }
    if fields.contains_key(EXPECT) && !is_expected(fields) {
        return Err(Fault::Client(ClientFault::Expectation));
    }
    fields::strip_hop_by_hop(fields);
    let wanted = split::take_wanted(fields);
    fields::strip_ours(fields);
    let scheme = if request.secure { Scheme::HTTPS } else { Scheme::HTTP };
    make_absolute(request.http.uri_mut(), scheme, authority.clone()).ok_or(Fault::Client(ClientFault::Malformed))?;
    Ok(Checked { authority, wanted })
}

/// RFC 9110 10.1.1: there is one expectation.
fn is_expected(fields: &HeaderMap) -> bool {
    fields.get_all(EXPECT).iter().all(|value| value.as_bytes().eq_ignore_ascii_case(b"100-continue"))
}

/// Gives a request's target scheme and authority, whatever form it came in.
pub(crate) fn make_absolute(uri: &mut Uri, scheme: Scheme, authority: Authority) -> Option<()> {
    let mut parts = std::mem::take(uri).into_parts();
    parts.scheme = Some(scheme);
    parts.authority = Some(authority);
    parts.path_and_query.get_or_insert_with(|| PathAndQuery::from_static("/"));
    *uri = Uri::from_parts(parts).ok()?;
    Some(())
}

/// The one host that a request names (RFC 9112 3.2, RFC 9113 8.3.1, RFC 9114 4.3.1).
fn authority(protocol: Protocol, target: Option<&Authority>, fields: &HeaderMap) -> Option<Authority> {
    let mut hosts = fields.get_all(HOST).iter();
    let field = hosts.next();
    // HTTP/1.1 always has the field; the others have it or `:authority`.
    let enough = field.is_some() || (protocol != Protocol::H1 && target.is_some());
    if !enough || hosts.next().is_some() {
        return None;
    }
    let field = match field {
        Some(field) => Some(field.to_str().ok()?),
        None => None,
    };
    let parsed: Authority = target.cloned().or_else(|| field?.parse().ok())?;
    let authority = parsed.as_str();
    // RFC 9112 3.2.2: in HTTP/1.1 the target wins, and what is told of the host from here on is what it says. In HTTP/2 and
    // 3 both must agree, or two readers could route to two apps (RFC 9113 8.3.1).
    if protocol != Protocol::H1 && field.is_some_and(|field| !field.eq_ignore_ascii_case(authority)) {
        return None;
    }
    let host = parsed.host();
    let port_is_number = match authority.strip_prefix(host)? {
        "" => true,
        port => port.strip_prefix(':').is_some_and(|port| port.parse::<u16>().is_ok()),
    };
    (!host.is_empty() && port_is_number).then_some(parsed)
}

/// Whether the fields leave no doubt where the body ends.
fn is_framed(protocol: Protocol, fields: &HeaderMap) -> bool {
    let only = |name: HeaderName, want: &str| {
        let mut values = fields.get_all(name).iter();
        let first = values.next();
        let fits = |value: &HeaderValue| value.as_bytes().eq_ignore_ascii_case(want.as_bytes());
        first.is_none_or(fits) && values.next().is_none()
    };
    let mut lengths = fields.get_all(CONTENT_LENGTH).iter();
    let length_is_one = match lengths.next() {
        None => true,
        Some(length) => content_length(length).is_some() && lengths.all(|other| other == length),
    };
    let chunked_and_long = fields.contains_key(TRANSFER_ENCODING) && fields.contains_key(CONTENT_LENGTH);
    length_is_one
        && !chunked_and_long
        && match protocol {
            // RFC 9112 6.1: the parser takes any list that ends in `chunked`; we take the one coding that we undo.
            Protocol::H1 => only(TRANSFER_ENCODING, "chunked"),
            Protocol::H2 | Protocol::H3 => {
                only(TE, "trailers") && !fields.keys().any(is_of_h1_only) && fields.values().all(is_trimmed)
            }
        }
}

/// RFC 9113 8.2.1, RFC 9114 10.3: a value has no space at its ends. HTTP/1.1's parser takes it away.
fn is_trimmed(value: &HeaderValue) -> bool {
    let is_space = |byte: Option<&u8>| matches!(byte, Some(b' ' | b'\t'));
    !is_space(value.as_bytes().first()) && !is_space(value.as_bytes().last())
}

/// Whether a field has no place in HTTP/2 and 3 (RFC 9113 8.2.2, RFC 9114 4.2).
pub(super) fn is_of_h1_only(name: &HeaderName) -> bool {
    matches!(name.as_str(), "connection" | "keep-alive" | "proxy-connection" | "transfer-encoding" | "upgrade")
}

/// RFC 9110 8.6: digits and nothing else.
pub(crate) fn content_length(value: &HeaderValue) -> Option<u64> {
    let text = value.to_str().ok()?;
    text.bytes().all(|byte| byte.is_ascii_digit()).then(|| text.parse().ok())?
}

/// RFC 9113 8.2.3: what was one field in HTTP/1.1 becomes one again.
fn join_cookies(fields: &mut HeaderMap) {
    if fields.get_all(COOKIE).iter().nth(1).is_none() {
        return;
    }
    let crumbs: Vec<&[u8]> = fields.get_all(COOKIE).iter().map(HeaderValue::as_bytes).collect();
    if let Ok(cookie) = HeaderValue::from_bytes(&crumbs.join(&b"; "[..])) {
        fields.insert(COOKIE, cookie);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use super::*;
    use crate::request::empty;

    fn ask(protocol: Protocol, method: &str, uri: &str, fields: &[(&str, &str)]) -> (Result<String, Fault>, HeaderMap) {
        let mut http = http::Request::builder().method(method).uri(uri);
        for (name, value) in fields {
            http = http.header(*name, *value);
        }
        let mut request = Request {
            http: http.body(empty()).unwrap(),
            client: "192.0.2.7:4711".parse().unwrap(),
            protocol,
            secure: true,
            arrived: Instant::now(),
        };
        let front = Front { fields_max: 30, ..Front::default() };
        let checked = check(&front, &mut request);
        (checked.map(|checked| checked.authority.to_string()), request.http.headers().clone())
    }

    fn host(protocol: Protocol, uri: &str, fields: &[(&str, &str)]) -> Option<String> {
        match ask(protocol, "GET", uri, fields).0 {
            Ok(host) => Some(host),
            Err(fault) => {
                assert_eq!(fault, Fault::Client(ClientFault::Host));
                None
            }
        }
    }

    #[test]
    fn what_release_a_request_wants_is_told_to_the_node_and_to_nobody_else() {
        let wanted = |fields: &[(&str, &str)]| {
            let mut http = http::Request::builder().uri("/").header("host", "a.example");
            for (name, value) in fields {
                http = http.header(*name, *value);
            }
            let mut request = Request {
                http: http.body(empty()).unwrap(),
                client: "192.0.2.7:4711".parse().unwrap(),
                protocol: Protocol::H1,
                secure: true,
                arrived: Instant::now(),
            };
            let checked = check(&Front::default(), &mut request).unwrap();
            assert!(request.http.headers().keys().all(|name| !name.as_str().starts_with("selvage")));
            checked.wanted.map(|value| value.to_str().unwrap().to_owned())
        };
        assert_eq!(wanted(&[("selvage-release", "hello@4"), ("selvage-node", "x")]).as_deref(), Some("hello@4"));
        // Other spellings, a field of the connection, and two wishes say nothing.
        assert_eq!(wanted(&[("selvage_release", "4")]), None);
        assert_eq!(wanted(&[("selvage-release", "4"), ("connection", "selvage-release")]), None);
        assert_eq!(wanted(&[("selvage-release", "4"), ("selvage-release", "3")]), None);
    }

    #[test]
    fn a_request_names_one_host() {
        use Protocol::{H1, H2, H3};
        for (protocol, uri, fields, want) in [
            (H1, "/", &[("host", "a.example")][..], Some("a.example")),
            (H1, "/", &[("host", "A.example:8443")], Some("A.example:8443")),
            (H1, "/", &[("host", "[::1]:443")], Some("[::1]:443")),
            (H1, "http://a.example/", &[("host", "A.EXAMPLE")], Some("a.example")),
            (H2, "https://a.example/", &[], Some("a.example")),
            (H2, "https://a.example/", &[("host", "a.example")], Some("a.example")),
            (H3, "/", &[("host", "a.example")], Some("a.example")),
            (H1, "/", &[], None),
            (H1, "http://a.example/", &[], None),
            (H1, "http://a.example/", &[("host", "b.example")], Some("a.example")),
            (H1, "http://a.example/", &[("host", "b@b.example")], Some("a.example")),
            (H1, "/", &[("host", "a.example"), ("host", "a.example")], None),
            (H1, "/", &[("host", "")], None),
            (H1, "/", &[("host", "a.example, b.example")], None),
            (H1, "/", &[("host", "user@a.example")], None),
            (H1, "/", &[("host", "a.example:x")], None),
            (H1, "/", &[("host", "a.example:99999")], None),
            (H1, "/", &[("host", "a.example/path")], None),
            (H1, "/", &[("host", ":443")], None),
            (H2, "/", &[], None),
            (H2, "https://a.example/", &[("host", "b.example")], None),
            (H3, "https://a.example/", &[("host", "a.example"), ("host", "b.example")], None),
        ] {
            assert_eq!(host(protocol, uri, fields).as_deref(), want, "{protocol:?} {uri} {fields:?}");
        }
    }

    #[test]
    fn connect_and_trace_are_not_taken() {
        for method in ["CONNECT", "TRACE"] {
            let checked = ask(Protocol::H1, method, "/", &[("host", "a")]).0;
            assert_eq!(checked, Err(Fault::Client(ClientFault::Method)));
        }
        for method in ["GET", "PUT", "OPTIONS", "PROPFIND"] {
            assert!(ask(Protocol::H1, method, "/", &[("host", "a")]).0.is_ok());
        }
    }

    #[test]
    fn a_head_that_can_be_read_in_two_ways_is_refused() {
        use Protocol::{H1, H2, H3};
        for (protocol, fields) in [
            (H1, &[("content-length", "1"), ("transfer-encoding", "chunked")][..]),
            (H1, &[("transfer-encoding", "gzip, chunked")]),
            (H1, &[("transfer-encoding", "chunked"), ("transfer-encoding", "chunked")]),
            (H1, &[("transfer-encoding", "identity")]),
            (H1, &[("content-length", "1"), ("content-length", "2")]),
            (H1, &[("content-length", "+1")]),
            (H1, &[("content-length", "1, 1")]),
            (H1, &[("content-length", "")]),
            (H1, &[("content-length", "99999999999999999999")]),
            (H2, &[("connection", "close")]),
            (H3, &[("connection", "close")]),
            (H3, &[("transfer-encoding", "chunked")]),
            (H3, &[("upgrade", "websocket")]),
            (H3, &[("keep-alive", "1")]),
            (H3, &[("te", "gzip")]),
            (H3, &[("content-length", "1"), ("content-length", "2")]),
        ] {
            let fields: Vec<_> = fields.iter().copied().chain([("host", "a")]).collect();
            let checked = ask(protocol, "POST", "/", &fields).0;
            assert_eq!(checked, Err(Fault::Client(ClientFault::Malformed)), "{protocol:?} {fields:?}");
        }
        assert!(ask(H3, "POST", "/", &[("host", "a"), ("te", "trailers"), ("content-length", "0")]).0.is_ok());
        assert!(ask(H1, "POST", "/", &[("host", "a"), ("transfer-encoding", "Chunked")]).0.is_ok());
    }

    #[test]
    fn a_target_is_a_path_of_bounded_length() {
        let ask = |uri: &str| ask(Protocol::H1, "OPTIONS", uri, &[("host", "a")]).0.map(drop);
        assert_eq!(ask("*"), Err(Fault::Client(ClientFault::Malformed)));
        assert_eq!(ask(&format!("/{}", "a".repeat(8 * 1024))), Err(Fault::Client(ClientFault::TargetTooLong)));
        assert_eq!(ask(&format!("/{}", "a".repeat(8 * 1024 - 1))), Ok(()));
    }

    #[test]
    fn a_head_has_so_many_fields_and_cookies_are_one() {
        let with = |name: &'static str, count| {
            let fields: Vec<_> = vec![(name, "y"); count].into_iter().chain([("host", "a")]).collect();
            ask(Protocol::H2, "GET", "/", &fields).0.map(drop)
        };
        assert_eq!((with("x", 29), with("x", 30)), (Ok(()), Err(Fault::Client(ClientFault::HeadTooLarge))));
        assert_eq!(with("cookie", 100), Ok(()));
    }

    #[test]
    fn an_expectation_is_met_or_refused() {
        for (expect, want) in [("100-Continue", true), ("100-continue, x", false), ("200-ok", false), ("", false)] {
            let checked = ask(Protocol::H1, "POST", "/", &[("host", "a"), ("expect", expect)]).0.map(drop);
            let refused = Err(Fault::Client(ClientFault::Expectation));
            assert_eq!(checked, if want { Ok(()) } else { refused }, "{expect}");
        }
    }

    #[test]
    fn forged_and_hop_by_hop_fields_end_here_and_cookies_become_one() {
        let (checked, fields) = ask(
            Protocol::H1,
            "GET",
            "/",
            &[
                ("host", "a"),
                ("spin-client-addr", "1.1.1.1:1"),
                ("connection", "x-drop"),
                ("x-drop", "1"),
                ("cookie", "a=1"),
                ("cookie", "b=2"),
            ],
        );
        assert!(checked.is_ok());
        let left: Vec<_> = fields.iter().map(|(name, value)| (name.as_str(), value.to_str().unwrap())).collect();
        assert_eq!(left, [("host", "a"), ("cookie", "a=1; b=2")]);
    }
}
