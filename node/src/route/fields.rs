//! The header fields that a guest may believe: those the node sets.
//!
//! A tenant's fields can't be forged: every name that the node sets, or that looks like one of its names, is stripped
//! from what came in before anything else reads it.

use http::header::{CONNECTION, HOST, PROXY_AUTHENTICATE, PROXY_AUTHORIZATION, TE, TRANSFER_ENCODING, UPGRADE};
use http::{HeaderMap, HeaderName, HeaderValue};
use selvage_config::app::route::{Captures, Pattern};

use crate::jwt::Claims;
use crate::request::Request;

/// Prefixes of the names that only the node sets.
const OURS: [&str; 4] = ["spin-", "x-jwt-", "selvage-", "x-forwarded-"];
/// A name that tells what `x-forwarded-*` tells (RFC 7239).
const FORWARDED: &str = "forwarded";
/// Fields of one connection, not of the message (RFC 9110 7.6.1), besides those that `connection` names.
const HOP_BY_HOP: [HeaderName; 9] = [
    CONNECTION,
    HeaderName::from_static("keep-alive"),
    HeaderName::from_static("proxy-connection"),
    HeaderName::from_static("http2-settings"),
    PROXY_AUTHENTICATE,
    PROXY_AUTHORIZATION,
    TE,
    TRANSFER_ENCODING,
    UPGRADE,
];
/// The header field that names a request in logs, here and in the guest.
pub const REQUEST_ID: HeaderName = HeaderName::from_static("selvage-request-id");

/// Takes out every field that only the node sets.
pub fn strip_ours(fields: &mut HeaderMap) {
    // `_` counts as `-`: guests that map names to environment variables can't tell them apart.
    let is_ours = |name: &HeaderName| {
        let name = name.as_str().replace('_', "-");
        name == FORWARDED || OURS.iter().any(|prefix| name.starts_with(prefix))
    };
    let found: Vec<HeaderName> = fields.keys().filter(|name| is_ours(name)).cloned().collect();
    for name in found {
        fields.remove(name);
    }
}

/// Takes out the fields that belong to the connection. Also used on answers.
pub fn strip_hop_by_hop(fields: &mut HeaderMap) {
    let named: Vec<HeaderName> = fields
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .flat_map(|value| value.split(','))
        .filter_map(|name| HeaderName::from_bytes(name.trim().as_bytes()).ok())
        .collect();
    for name in named.iter().chain(&HOP_BY_HOP) {
        fields.remove(name);
    }
}

/// Tells the guest who asks for what: [`strip_ours`] and [`strip_hop_by_hop`] must have been here before.
pub fn tell_guest(request: &mut Request, authority: &str, route: (&Pattern, &Captures), claims: Option<&Claims>) {
    let (pattern, captures) = route;
    let scheme = request.scheme();
    let target = request.http.uri().path_and_query().map_or("/", |target| target.as_str());
    let url = format!("{scheme}://{authority}{target}");
    let client = request.client;
    let fields = request.http.headers_mut();
    let raw = pattern.to_string();
    set(fields, "spin-path-info", captures.rest.as_deref().unwrap_or_default());
    set(fields, "spin-full-url", &url);
    set(fields, "spin-matched-route", &raw);
    set(fields, "spin-base-path", "/");
    set(fields, "spin-raw-component-route", &raw);
    set(fields, "spin-component-route", &pattern.prefix());
    set(fields, "spin-client-addr", &client.to_string());
    for (name, value) in &captures.params {
        set(fields, &format!("spin-path-match-{}", name.to_ascii_lowercase().replace('_', "-")), value);
    }
    set(fields, "x-forwarded-for", &client.ip().to_string());
    set(fields, "x-forwarded-proto", scheme);
    set(fields, "x-forwarded-host", authority);
    set(fields, HOST.as_str(), authority);
    if let Some(claims) = claims {
        // A subject that a field can't carry as it is stands in the claims alone: an encoded one could be taken for
        // somebody else's plain one.
        if let Some(subject) = claims.subject().filter(|subject| subject.bytes().all(|byte| byte.is_ascii_graphic())) {
            set(fields, "x-jwt-sub", subject);
        }
        set(fields, "x-jwt-iss", claims.issuer());
        set(fields, "x-jwt-claims", claims.payload());
    }
}

/// Sets a field if its name and value can be one. A value from the path may hold bytes beyond ASCII.
fn set(fields: &mut HeaderMap, name: &str, value: &str) {
    if let (Ok(name), Ok(value)) = (HeaderName::try_from(name), HeaderValue::from_bytes(value.as_bytes())) {
        fields.insert(name, value);
    }
}

#[cfg(test)]
mod tests {
    use std::time::Instant;

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

    #[test]
    fn a_guest_learns_what_spin_would_tell() {
        let pattern: Pattern = "/u/:User_Name/...".parse().unwrap();
        let mut request = request("/u/ada/x/y?q=1", &[]);
        let captures = pattern.captures("/u/ada/x/y").unwrap();
        tell_guest(&mut request, "a.example:8443", (&pattern, &captures), None);
        let want = [
            ("host", "a.example:8443"),
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
            set(&mut fields, "authorization", &format!("Bearer {token}"));
            let believed = authorize(&rule, &issuer, "/", &fields, today(), Instant::now()).await.unwrap();
            let mut request = request("/", &[]);
            let pattern = Pattern::everything();
            tell_guest(&mut request, "a", (&pattern, &Captures::default()), believed.as_ref());
            let fields = request.http.headers();
            assert_eq!(fields.get("x-jwt-sub").map(|v| v.to_str().unwrap()), want, "{subject}");
            assert_eq!(fields["x-jwt-iss"], "https://issuer.example");
            assert_eq!(fields["x-jwt-claims"], token.split('.').nth(1).unwrap());
        }
    }
}
