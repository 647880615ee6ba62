//! The header fields that a guest may believe: those the node sets.
//!
//! A tenant's fields can't be forged: every name that the node sets, or that looks like one of its names, is stripped
//! from what came in before anything else reads it.

use std::ops::Range;

use bytes::Bytes;
use http::header::{CONNECTION, HOST};
use http::uri::Authority;
use http::{HeaderMap, HeaderName, HeaderValue};
use selvage_config::app::Component;
use selvage_config::app::route::{Captures, Pattern};

use crate::jwt::Claims;
use crate::request::Request;

/// Prefixes of the names that only the node sets.
const OURS: [&str; 5] = ["spin-", "x-jwt-", "selvage-", "x-forwarded-", "client-cert"];
/// A name that tells what `x-forwarded-*` tells (RFC 7239).
const FORWARDED: &str = "forwarded";
/// Fields of one connection, not of the message (RFC 9110 7.6.1), besides those that `connection` names.
const HOP_BY_HOP: [&str; 9] = [
    "connection",
    "keep-alive",
    "proxy-connection",
    "http2-settings",
    "proxy-authenticate",
    "proxy-authorization",
    "te",
    "transfer-encoding",
    "upgrade",
];
/// The header field that names a request in logs, here and in the guest.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("selvage-request-id");
/// Fields that [`tell_guest`] sets at most, besides captures: room for them is made once.
const TOLD: usize = 16;

const PATH_INFO: HeaderName = HeaderName::from_static("spin-path-info");
const FULL_URL: HeaderName = HeaderName::from_static("spin-full-url");
const MATCHED_ROUTE: HeaderName = HeaderName::from_static("spin-matched-route");
const BASE_PATH: HeaderName = HeaderName::from_static("spin-base-path");
const RAW_COMPONENT_ROUTE: HeaderName = HeaderName::from_static("spin-raw-component-route");
const COMPONENT_ROUTE: HeaderName = HeaderName::from_static("spin-component-route");
const CLIENT_ADDR: HeaderName = HeaderName::from_static("spin-client-addr");
const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const JWT_SUB: HeaderName = HeaderName::from_static("x-jwt-sub");
const JWT_ISS: HeaderName = HeaderName::from_static("x-jwt-iss");
const JWT_CLAIMS: HeaderName = HeaderName::from_static("x-jwt-claims");

/// What a route tells the guest of itself, the same for every request.
///
/// Each field costs a guest that reads its head some thousand instructions, so nothing is told twice: an author chooses
/// Spin's fields, those that proxies are known for, both or none.
#[derive(Debug, Clone)]
pub struct OfRoute {
    /// What Spin would tell, if the guest is to know.
    spin: Option<OfSpin>,
    /// Whether it is told `x-forwarded-*`.
    is_forwarded: bool,
}

#[derive(Debug, Clone)]
struct OfSpin {
    pattern: Option<HeaderValue>,
    prefix: Option<HeaderValue>,
}

impl OfRoute {
    /// The fields of `pattern` that requests for this component carry; none where a fixed answer stands.
    pub fn new(pattern: &Pattern, component: Option<&Component>) -> Self {
        let value = |text: String| HeaderValue::from_maybe_shared(Bytes::from(text)).ok();
        let spin = || OfSpin { pattern: value(pattern.to_string()), prefix: value(pattern.prefix()) };
        Self {
            spin: component.is_some_and(|component| component.spin_headers).then(spin),
            is_forwarded: component.is_some_and(Component::tells_forwarded),
        }
    }
}

/// Takes out every field that only the node sets.
pub fn strip_ours(fields: &mut HeaderMap) {
    strip(fields, |name| {
        // `_` counts as `-`: guests that map names to environment variables can't tell them apart.
        let starts_with = |prefix: &str| {
            let same = |(a, b): (u8, u8)| a == b || (a == b'_' && b == b'-');
            name.len() >= prefix.len() && name.bytes().zip(prefix.bytes()).all(same)
        };
        name == FORWARDED || OURS.iter().any(|prefix| starts_with(prefix))
    });
}

/// Takes out the fields that belong to the connection. Also used on answers.
pub fn strip_hop_by_hop(fields: &mut HeaderMap) {
    if fields.contains_key(CONNECTION) {
        let named: Vec<HeaderName> = fields
            .get_all(CONNECTION)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .flat_map(|value| value.split(','))
            .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
            .collect();
        for name in named {
            fields.remove(name);
        }
    }
    strip(fields, |name| HOP_BY_HOP.contains(&name));
}

/// Takes out the fields whose names are `unwanted`. Most heads have none, so they are only looked through.
pub fn strip(fields: &mut HeaderMap, unwanted: impl Fn(&str) -> bool) {
    // Once over all names, however many are unwanted: a client chooses them.
    let found: Vec<HeaderName> = fields.keys().filter(|name| unwanted(name.as_str())).cloned().collect();
    for name in found {
        fields.remove(name);
    }
}

/// Tells the guest who asks for what: [`strip_ours`] and [`strip_hop_by_hop`] must have been here before.
///
/// `host` goes: what it says stands in the request's authority, and `wasi:http` keeps the field from guests.
pub fn tell_guest(request: &mut Request, told: &Told<'_>) {
    request.http.headers_mut().remove(HOST);
    if told.of_route.spin.is_some() || told.of_route.is_forwarded {
        tell_of_request(request, told);
    }
    let Some(claims) = told.claims else { return };
    // A subject that a field can't carry as it is stands in the claims alone: an encoded one could be taken for
    // somebody else's plain one.
    let subject = claims.subject().filter(|subject| subject.bytes().all(|byte| byte.is_ascii_graphic()));
    let fields = request.http.headers_mut();
    set(fields, JWT_SUB, subject.and_then(text));
    set(fields, JWT_ISS, text(claims.issuer()));
    set(fields, JWT_CLAIMS, text(claims.payload()));
}

fn tell_of_request(request: &mut Request, told: &Told<'_>) {
    let (url, client) = (FullUrl::of(request, told.authority), request.client);
    let (scheme, captures) = (request.scheme(), told.captures);
    let fields = request.http.headers_mut();
    fields.reserve(TOLD + captures.params.len());
    set(fields, REQUEST_ID, Some(told.id.clone()));
    if told.of_route.is_forwarded {
        set(fields, FORWARDED_HOST, url.authority());
        set(fields, FORWARDED_FOR, whole(client.ip().to_string()));
        set(fields, FORWARDED_PROTO, Some(HeaderValue::from_static(scheme)));
    }
    let Some(spin) = &told.of_route.spin else { return };
    set(fields, PATH_INFO, text(captures.rest.as_deref().unwrap_or_default()));
    set(fields, FULL_URL, url.whole());
    set(fields, MATCHED_ROUTE, spin.pattern.clone());
    set(fields, RAW_COMPONENT_ROUTE, spin.pattern.clone());
    set(fields, COMPONENT_ROUTE, spin.prefix.clone());
    set(fields, BASE_PATH, Some(HeaderValue::from_static("/")));
    set(fields, CLIENT_ADDR, whole(client.to_string()));
    for (name, value) in &captures.params {
        let name = format!("spin-path-match-{}", name.to_ascii_lowercase().replace('_', "-"));
        if let Ok(name) = HeaderName::try_from(name) {
            set(fields, name, text(value));
        }
    }
}

fn set(fields: &mut HeaderMap, name: HeaderName, value: Option<HeaderValue>) {
    if let Some(value) = value {
        fields.insert(name, value);
    }
}

/// What there is to tell of a request.
#[derive(Clone, Copy)]
pub struct Told<'r> {
    /// The host that it is for.
    pub authority: &'r Authority,
    /// Its name in logs.
    pub id: &'r HeaderValue,
    /// What its route says.
    pub of_route: &'r OfRoute,
    /// What the route took out of the path.
    pub captures: &'r Captures,
    /// What its token says.
    pub claims: Option<&'r Claims>,
}

/// `scheme://authority/path?query` in one piece of memory, parts of which are fields of their own.
struct FullUrl {
    bytes: Bytes,
    authority: Range<usize>,
}

impl FullUrl {
    fn of(request: &Request, authority: &Authority) -> Self {
        let (scheme, host) = (request.scheme(), authority.as_str());
        let target = request.http.uri().path_and_query().map_or("/", |target| target.as_str());
        let mut url = String::with_capacity(scheme.len() + "://".len() + host.len() + target.len());
        for part in [scheme, "://", host, target] {
            url.push_str(part);
        }
        let start = url.len() - target.len() - host.len();
        Self { bytes: url.into(), authority: start..start + host.len() }
    }

    fn whole(&self) -> Option<HeaderValue> {
        HeaderValue::from_maybe_shared(self.bytes.clone()).ok()
    }

    fn authority(&self) -> Option<HeaderValue> {
        HeaderValue::from_maybe_shared(self.bytes.slice(self.authority.clone())).ok()
    }
}

/// A field's value, if it can be one. A value from the path may hold bytes beyond ASCII.
fn text(text: &str) -> Option<HeaderValue> {
    HeaderValue::from_bytes(text.as_bytes()).ok()
}

/// The same of text that is nobody else's.
fn whole(text: String) -> Option<HeaderValue> {
    HeaderValue::from_maybe_shared(Bytes::from(text)).ok()
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

    use selvage_config::Digest;
    use serde_json::json;

    use super::*;
    use crate::jwt::forge::{Forger, claims, issuer, today};
    use crate::jwt::{Issuer, KeyFetcher, authorize};
    use crate::request::{Protocol, empty};

    fn request(uri: &str, fields: &[(&str, &str)]) -> Request {
        let mut http = http::Request::builder().uri(uri);
        for (name, value) in fields {
            http = http.header(*name, *value);
        }
        Request {
            http: http.body(empty()).unwrap(),
            client: "192.0.2.7:4711".parse().unwrap(),
            protocol: Protocol::H2,
            secure: true,
            arrived: Instant::now(),
        }
    }

    fn told(request: &Request) -> Vec<(String, String)> {
        let fields = request.http.headers().iter();
        let mut told: Vec<_> = fields.map(|(n, v)| (n.to_string(), v.to_str().unwrap().to_owned())).collect();
        told.sort();
        told
    }

    /// A component whose requests carry these fields.
    fn component(spin_headers: bool, forwarded_headers: Option<bool>) -> Component {
        Component { spin_headers, forwarded_headers, ..Component::granted_nothing(Digest::of(b"wasm")) }
    }

    /// Tells a guest behind `pattern` of a request, which names it as it is named in logs.
    fn tell(request: &mut Request, authority: &str, pattern: &Pattern, component: &Component) {
        let (authority, id) = (authority.parse().unwrap(), HeaderValue::from_static("17"));
        let (of_route, captures) =
            (OfRoute::new(pattern, Some(component)), pattern.captures(request.http.uri().path()));
        let (captures, claims) = (captures.unwrap(), None);
        let told = Told { authority: &authority, id: &id, of_route: &of_route, captures: &captures, claims };
        tell_guest(request, &told);
    }

    #[test]
    fn a_guest_is_told_what_its_author_chose() {
        let pattern: Pattern = "/u/:name/...".parse().unwrap();
        let names = |spin, forwarded| {
            // What a client says of these is taken out all the same, before.
            let mut request = request("/u/ada/x", &[("host", "a.example"), ("accept", "*/*")]);
            tell(&mut request, "a.example", &pattern, &component(spin, forwarded));
            told(&request).into_iter().map(|(name, _)| name).collect::<Vec<_>>()
        };
        let forwarded = ["x-forwarded-for", "x-forwarded-host", "x-forwarded-proto"];
        assert_eq!(names(false, Some(false)), ["accept"], "nothing is told");
        assert_eq!(names(false, None), [&["accept", "selvage-request-id"][..], &forwarded].concat());
        assert_eq!(names(false, Some(true)), names(false, None));
        let (spin, both) = (names(true, None), names(true, Some(true)));
        assert!(spin.contains(&"spin-client-addr".to_owned()) && !spin.iter().any(|name| name.starts_with("x-")));
        assert_eq!(both, [spin, forwarded.map(str::to_owned).to_vec()].concat());
    }

    #[test]
    fn a_guest_learns_what_spin_would_tell() {
        let pattern: Pattern = "/u/:User_Name/...".parse().unwrap();
        let mut request = request("/u/ada/x/y?q=1", &[]);
        tell(&mut request, "a.example:8443", &pattern, &component(true, Some(true)));
        let want = [
            ("selvage-request-id", "17"),
            ("spin-base-path", "/"),
            ("spin-client-addr", "192.0.2.7:4711"),
            ("spin-component-route", "/u/:User_Name"),
            ("spin-full-url", "https://a.example:8443/u/ada/x/y?q=1"),
            ("spin-matched-route", "/u/:User_Name/..."),
            ("spin-path-info", "/x/y"),
            ("spin-path-match-user-name", "ada"),
            ("spin-raw-component-route", "/u/:User_Name/..."),
            ("x-forwarded-for", "192.0.2.7"),
            ("x-forwarded-host", "a.example:8443"),
            ("x-forwarded-proto", "https"),
        ];
        assert_eq!(told(&request), want.map(|(n, v)| (n.to_owned(), v.to_owned())));
    }

    #[test]
    fn the_address_of_a_client_has_no_port_and_no_zone() {
        for (client, want) in
            [("192.0.2.7:4711", "192.0.2.7"), ("[2001:db8::7]:4711", "2001:db8::7"), ("[fe80::1%3]:80", "fe80::1")]
        {
            let mut request = Request { client: client.parse().unwrap(), ..request("/", &[]) };
            tell(&mut request, "a", &Pattern::everything(), &component(false, None));
            assert_eq!(request.http.headers()["x-forwarded-for"], want);
        }
    }

    #[test]
    fn nothing_that_the_node_sets_comes_from_a_client() {
        let forged = [
            ("Spin-Client-Addr", "127.0.0.1:1"),
            ("spin_client_addr", "127.0.0.1:1"),
            ("spin-path-match-user", "root"),
            ("spin-anything", "x"),
            ("x-jwt-sub", "root"),
            ("x_jwt_sub", "root"),
            ("x-jwt-claims", "e30"),
            ("selvage-request-id", "1"),
            ("x-forwarded-for", "127.0.0.1"),
            ("x-forwarded-for", "127.0.0.2"),
            ("x-forwarded_for", "127.0.0.3"),
            ("x-forwarded-prefix", "/admin"),
            ("forwarded", "for=127.0.0.1"),
        ];
        let kept = [("accept", "*/*"), ("cookie", "a=b"), ("spinning", "yes"), ("x-forward", "yes")];
        let all: Vec<_> = forged.iter().chain(&kept).copied().collect();
        let mut request = request("/", &all);
        strip_ours(request.http.headers_mut());
        assert_eq!(told(&request), kept.map(|(n, v)| (n.to_owned(), v.to_owned())));
    }

    #[test]
    fn what_belongs_to_the_connection_stays_there() {
        let mut request = request(
            "/",
            &[
                ("connection", "keep-alive, X-Private"),
                ("connection", "x-other , not a name,"),
                ("keep-alive", "timeout=5"),
                ("x-private", "1"),
                ("x-other", "1"),
                ("te", "trailers"),
                ("upgrade", "websocket"),
                ("transfer-encoding", "chunked"),
                ("proxy-authorization", "Basic eA"),
                ("accept", "*/*"),
            ],
        );
        strip_hop_by_hop(request.http.headers_mut());
        assert_eq!(told(&request), [("accept".to_owned(), "*/*".to_owned())]);
    }

    #[tokio::test]
    async fn a_verified_caller_is_named_and_no_other() {
        let forger = Forger::ed25519("a");
        let issuer = Issuer::new(&issuer(&forger.jwks()), &KeyFetcher::new(&[], false).unwrap()).unwrap();
        let rule = selvage_config::app::jwt::Rule { issuer: "main".into(), exempt: Vec::new() };
        for (subject, want) in
            [("ada", Some("ada")), ("ada l", None), ("ädä", None), ("a\r\nb: c", None), ("", Some(""))]
        {
            let mut said = claims();
            said["sub"] = json!(subject);
            let token = forger.sign(&said);
            let mut fields = HeaderMap::new();
            fields.insert("authorization", format!("Bearer {token}").try_into().unwrap());
            let believed = authorize(&rule, &issuer, "/", &fields, today(), Instant::now()).await.unwrap();
            let mut request = request("/", &[]);
            let of_route = OfRoute::new(&Pattern::everything(), None);
            let (authority, id) = ("a".parse().unwrap(), HeaderValue::from_static("17"));
            let (captures, claims) = (&Captures::default(), believed.as_ref());
            tell_guest(&mut request, &Told { authority: &authority, id: &id, of_route: &of_route, captures, claims });
            let fields = request.http.headers();
            assert_eq!(fields.get("x-jwt-sub").map(|v| v.to_str().unwrap()), want, "{subject}");
            assert_eq!(fields["x-jwt-iss"], "https://issuer.example");
            assert_eq!(fields["x-jwt-claims"], token.split('.').nth(1).unwrap());
        }
    }
}
