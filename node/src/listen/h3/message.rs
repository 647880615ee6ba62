//! What a request must be (RFC 9114 4.2 and 4.3): from a field section to a head, or to what is wrong with it.
//!
//! A request that breaks a rule is malformed: its stream is reset with H3_MESSAGE_ERROR and nothing above sees it, because
//! another reader could take it for another request.

use bytes::Bytes;
use http::header::{CONTENT_LENGTH, HOST, TE};
use http::request::Parts;
use http::uri::{Authority, PathAndQuery, Scheme};
use http::{HeaderMap, HeaderName, HeaderValue, Method, Request, Uri, Version};

use super::code::Wrong;
use super::priority::Priority;
use super::section::{self, Name, Refused};
use crate::listen::head::{content_length, is_of_h1_only};

/// The field of RFC 9218.
const PRIORITY: HeaderName = HeaderName::from_static("priority");

/// The head of a request that breaks no rule.
#[derive(Debug)]
pub(super) struct Head {
    /// Method, target and fields.
    pub(super) parts: Parts,
    /// How long its body says it is.
    pub(super) length: Option<u64>,
    /// How urgent its client says it is.
    pub(super) priority: Option<Priority>,
}

/// Pseudo-header fields of a request.
#[derive(Default)]
struct Pseudo {
    method: Option<HeaderValue>,
    scheme: Option<HeaderValue>,
    authority: Option<HeaderValue>,
    path: Option<HeaderValue>,
}

impl Pseudo {
    /// RFC 9114 4.3: known, and once.
    fn set(&mut self, name: &[u8], value: HeaderValue) -> Result<(), Wrong> {
        let place = match name {
            b":method" => &mut self.method,
            b":scheme" => &mut self.scheme,
            b":authority" => &mut self.authority,
            b":path" => &mut self.path,
            _ => return Err(Wrong::malformed("pseudo-header field that requests do not have")),
        };
        match place.replace(value) {
            None => Ok(()),
            Some(_) => Err(Wrong::malformed("pseudo-header field twice")),
        }
    }
}

/// Reads a request's field section.
pub(super) fn head(section: &Bytes, bytes_max: usize) -> Result<Head, Refused> {
    let mut pseudo = Pseudo::default();
    let mut fields = HeaderMap::new();
    section::decode(section, bytes_max, |name, value| match name {
        Name::Pseudo(name) if fields.is_empty() => pseudo.set(&name, value),
        Name::Pseudo(_) => Err(Wrong::malformed("pseudo-header field after a regular one")),
        Name::Regular(name) => add(&mut fields, name, value),
    })?;
    let length = length(&fields)?;
    check_host(pseudo.authority.as_ref(), &fields)?;
    let (method, uri) = target(pseudo)?;
    let priority = fields.get(PRIORITY).map(Priority::read);
    let (mut parts, ()) = Request::new(()).into_parts();
    parts.method = method;
    parts.uri = uri;
    parts.version = Version::HTTP_3;
    parts.headers = fields;
    Ok(Head { parts, length, priority })
}

/// Checks the field section of a request's trailers. They tell a guest nothing that it could trust, so nothing is kept.
pub(super) fn trailers(section: &Bytes, bytes_max: usize) -> Result<(), Refused> {
    section::decode(section, bytes_max, |name, value| match name {
        Name::Pseudo(_) => Err(Wrong::malformed("pseudo-header field in trailers")),
        Name::Regular(name) => allowed(&name, &value),
    })
}

fn add(fields: &mut HeaderMap, name: HeaderName, value: HeaderValue) -> Result<(), Wrong> {
    allowed(&name, &value)?;
    if matches!(name, CONTENT_LENGTH | HOST) && fields.contains_key(&name) {
        return Err(Wrong::malformed("content-length or host twice"));
    }
    let added = fields.try_append(name, value);
    added.map(|_| ()).map_err(|_| Wrong::malformed("more fields than can be"))
}

/// RFC 9114 4.2: fields of one connection have no place here, but for one that is of the whole way.
fn allowed(name: &HeaderName, value: &HeaderValue) -> Result<(), Wrong> {
    if is_of_h1_only(name) {
        return Err(Wrong::malformed("field of a connection"));
    }
    if *name == TE && !value.as_bytes().eq_ignore_ascii_case(b"trailers") {
        return Err(Wrong::malformed("te that is not trailers"));
    }
    Ok(())
}

fn length(fields: &HeaderMap) -> Result<Option<u64>, Wrong> {
    let Some(value) = fields.get(CONTENT_LENGTH) else { return Ok(None) };
    content_length(value).map(Some).ok_or_else(|| Wrong::malformed("content-length is no number"))
}

/// RFC 9114 4.3.1: one host, told once or twice in the same way.
fn check_host(authority: Option<&HeaderValue>, fields: &HeaderMap) -> Result<(), Wrong> {
    let host = fields.get(HOST);
    let same = match (authority, host) {
        (None, None) => return Err(Wrong::malformed("neither :authority nor host")),
        (Some(authority), Some(host)) => authority.as_bytes().eq_ignore_ascii_case(host.as_bytes()),
        _ => true,
    };
    let whole = authority.into_iter().chain(host).all(|value| !value.is_empty() && !value.as_bytes().contains(&b'@'));
    if same && whole { Ok(()) } else { Err(Wrong::malformed("host")) }
}

fn target(pseudo: Pseudo) -> Result<(Method, Uri), Wrong> {
    let method = pseudo.method.ok_or_else(|| Wrong::malformed("no :method"))?;
    let method = Method::from_bytes(method.as_bytes()).map_err(|_| Wrong::malformed(":method"))?;
    let authority = match pseudo.authority {
        None => None,
        Some(text) => {
            let read = Authority::try_from(text.as_bytes());
            Some(read.map_err(|_| Wrong::malformed(":authority"))?)
        }
    };
    if method == Method::CONNECT {
        // RFC 9114 4.4. The extended form (RFC 9220) was not offered.
        return match (authority, pseudo.scheme, pseudo.path) {
            (Some(authority), None, None) => Ok((method, Uri::from(authority))),
            _ => Err(Wrong::malformed("CONNECT with more than :authority")),
        };
    }
    let (Some(scheme), Some(path)) = (pseudo.scheme, pseudo.path) else {
        return Err(Wrong::malformed("no :scheme or no :path"));
    };
    let scheme = match scheme.as_bytes() {
        text if text.eq_ignore_ascii_case(b"https") => Scheme::HTTPS,
        text if text.eq_ignore_ascii_case(b"http") => Scheme::HTTP,
        _ => return Err(Wrong::malformed(":scheme")),
    };
    let path = path.as_bytes();
    // RFC 9114 4.3.1: a path, or for OPTIONS of the server itself an asterisk. A fragment is never sent.
    let form = path.first() == Some(&b'/') || (path == b"*" && method == Method::OPTIONS);
    if !form || path.contains(&b'#') {
        return Err(Wrong::malformed(":path"));
    }
    let mut parts = http::uri::Parts::default();
    parts.path_and_query = Some(PathAndQuery::try_from(path).map_err(|_| Wrong::malformed(":path"))?);
    if let Some(authority) = authority {
        parts.authority = Some(authority);
        parts.scheme = Some(scheme);
    }
    let uri = Uri::from_parts(parts).map_err(|_| Wrong::malformed(":path"))?;
    Ok((method, uri))
}

#[cfg(test)]
mod tests {
    use bytes::{BufMut, BytesMut};

    use super::super::code::Code;
    use super::super::integer::write_prefixed;
    use super::*;

    const GOOD: [(&str, &str); 4] =
        [(":method", "GET"), (":scheme", "https"), (":authority", "a.example"), (":path", "/x?y")];

    fn section(fields: &[(&str, &str)]) -> Bytes {
        let mut out = BytesMut::from(&[0, 0][..]);
        for (name, value) in fields {
            write_prefixed(name.len(), 0x20, 3, &mut out);
            out.put_slice(name.as_bytes());
            write_prefixed(value.len(), 0, 7, &mut out);
            out.put_slice(value.as_bytes());
        }
        out.freeze()
    }

    fn read(fields: &[(&str, &str)]) -> Result<Head, Refused> {
        head(&section(fields), 16 * 1024)
    }

    /// The good head with some fields after it.
    fn with(fields: &[(&'static str, &'static str)]) -> Vec<(&'static str, &'static str)> {
        GOOD.iter().chain(fields).copied().collect()
    }

    fn without(name: &str) -> Vec<(&'static str, &'static str)> {
        GOOD.into_iter().filter(|(own, _)| *own != name).collect()
    }

    fn changed(name: &str, value: &'static str) -> Vec<(&'static str, &'static str)> {
        GOOD.into_iter().map(|(own, old)| (own, if own == name { value } else { old })).collect()
    }

    #[test]
    fn a_good_head_becomes_a_request() {
        let head = read(&with(&[
            ("te", "trailers"),
            ("content-length", "7"),
            ("host", "A.example"),
            ("priority", "u=1, i"),
            ("cookie", "a=1"),
            ("cookie", "b=2"),
        ]))
        .unwrap();
        assert_eq!((head.parts.method, head.parts.uri.to_string()), (Method::GET, "https://a.example/x?y".into()));
        assert_eq!((head.length, head.parts.headers.len()), (Some(7), 6));
        assert_eq!(head.priority, Some(Priority { urgency: 1, incremental: true }));
        let by_field = [&without(":authority")[..], &[("host", "b.example")]].concat();
        assert_eq!(read(&by_field).unwrap().parts.uri.to_string(), "/x?y");
        let connect = read(&[(":method", "CONNECT"), (":authority", "a.example:443")]).unwrap();
        assert_eq!(connect.parts.method, Method::CONNECT);
        let options = [(":method", "OPTIONS"), (":scheme", "https"), (":authority", "a"), (":path", "*")];
        assert!(read(&options).is_ok());
    }

    #[test]
    fn each_rule_of_a_head_is_held() {
        for (rule, fields) in [
            ("duplicate :method", with(&[(":method", "GET")])),
            ("duplicate :path", with(&[(":path", "/x?y")])),
            ("duplicate :scheme", with(&[(":scheme", "https")])),
            ("duplicate :authority", with(&[(":authority", "a.example")])),
            (":status in a request", with(&[(":status", "200")])),
            ("unknown pseudo-header", with(&[(":unknown", "1")])),
            (":protocol that was not offered", with(&[(":protocol", "websocket")])),
            ("pseudo-header after regular", [&with(&[("a", "1")])[1..], &[GOOD[0]]].concat()),
            ("no :method", without(":method")),
            ("no :scheme", without(":scheme")),
            ("no :path", without(":path")),
            ("no host", without(":authority")),
            ("empty :path", changed(":path", "")),
            (":path that is none", changed(":path", "x")),
            ("* but for OPTIONS", changed(":path", "*")),
            (":path with a fragment", changed(":path", "/a#b")),
            (":path with a space", changed(":path", "/a b")),
            ("empty :authority", changed(":authority", "")),
            (":authority with a user", changed(":authority", "u@a.example")),
            (":authority that is none", changed(":authority", "a/b")),
            ("empty :method", changed(":method", "")),
            (":method that is no token", changed(":method", "G T")),
            (":scheme of something else", changed(":scheme", "ftp")),
            ("upper-case name", with(&[("Accept", "x")])),
            ("name with a space", with(&[("a b", "x")])),
            ("empty name", with(&[("", "x")])),
            ("value with a line end", with(&[("a", "x\r\ny")])),
            ("value with a zero", with(&[("a", "x\0y")])),
            ("value with white space around", with(&[("a", " x")])),
            ("connection", with(&[("connection", "close")])),
            ("keep-alive", with(&[("keep-alive", "1")])),
            ("proxy-connection", with(&[("proxy-connection", "close")])),
            ("transfer-encoding", with(&[("transfer-encoding", "chunked")])),
            ("upgrade", with(&[("upgrade", "h2c")])),
            ("te: gzip", with(&[("te", "gzip")])),
            ("te: trailers, gzip", with(&[("te", "trailers, gzip")])),
            ("two content-lengths", with(&[("content-length", "1"), ("content-length", "2")])),
            ("content-length twice", with(&[("content-length", "1"), ("content-length", "1")])),
            ("content-length: +1", with(&[("content-length", "+1")])),
            ("content-length: 1, 1", with(&[("content-length", "1, 1")])),
            ("empty content-length", with(&[("content-length", "")])),
            ("two hosts", with(&[("host", "a.example"), ("host", "a.example")])),
            ("host against :authority", with(&[("host", "b.example")])),
            ("empty host", with(&[("host", "")])),
            ("CONNECT with :path", changed(":method", "CONNECT")),
            ("CONNECT without :authority", vec![(":method", "CONNECT")]),
        ] {
            match read(&fields) {
                Err(Refused::Wrong(wrong)) => assert_eq!(wrong.code, Code::Message, "{rule}"),
                other => panic!("{rule}: {other:?}"),
            }
        }
    }

    #[test]
    fn trailers_have_no_pseudo_header_fields_and_none_of_a_connection() {
        let read = |fields: &[(&str, &str)]| trailers(&section(fields), 1_000);
        assert_eq!(read(&[("x-sum", "1")]), Ok(()));
        for bad in [(":path", "/"), (":status", "200"), ("connection", "x"), ("X", "1"), ("te", "gzip")] {
            assert!(matches!(read(&[bad]), Err(Refused::Wrong(wrong)) if wrong.code == Code::Message), "{bad:?}");
        }
        assert_eq!(read(&[("x-sum", &"1".repeat(1_000))]), Err(Refused::TooLarge));
    }

    proptest::proptest! {
        #[test]
        fn no_fields_panic(fields: Vec<(String, String)>) {
            let all: Vec<(&str, &str)> = fields.iter().map(|(name, value)| (name.as_str(), value.as_str())).collect();
            let _ = head(&section(&all), 16 * 1024);
            let _ = trailers(&section(&all), 16 * 1024);
        }
    }
}
