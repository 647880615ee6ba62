//! Requests written once before the run: sending one is a clone.

use bytes::Bytes;
use http::header::{self, HeaderName, HeaderValue};
use http::uri::{Authority, PathAndQuery};
use http::{Request, Uri};
use http_body_util::Full;

use crate::error::LoadError;
use crate::options::{RequestClass, Target};

/// Headers that belong to the connection or that the protocol sets by itself.
const RESERVED: [HeaderName; 8] = [
    header::CONNECTION,
    header::CONTENT_LENGTH,
    header::HOST,
    header::TE,
    header::TRAILER,
    header::TRANSFER_ENCODING,
    header::UPGRADE,
    HeaderName::from_static("keep-alive"),
];
/// Sent unless the class names another.
const USER_AGENT: HeaderValue = HeaderValue::from_static("selvage-loadtest");

/// One request class as one target gets it.
#[derive(Debug)]
pub(super) struct Template {
    /// With only a path and a Host header, as HTTP/1.1 wants it.
    origin: Request<()>,
    /// With a whole URI, from which HTTP/2 and HTTP/3 take their pseudo headers.
    absolute: Request<()>,
    body: Bytes,
}

impl Template {
    pub(super) fn new(class: &RequestClass, target: &Target) -> Result<Template, LoadError> {
        let wrong = |problem: String| LoadError::Class { class: class.name.clone(), problem };
        if let Some(name) = RESERVED.iter().find(|name| class.headers.contains_key(*name)) {
            return Err(wrong(format!("header {name} is set by the protocol")));
        }
        if !class.path.starts_with('/') {
            return Err(wrong(format!("path {:?} does not start with /", class.path)));
        }
        let path: PathAndQuery =
            class.path.parse().map_err(|error| wrong(format!("path {:?}: {error}", class.path)))?;
        let host = class.host.clone().unwrap_or_else(|| target.authority());
        let authority: Authority = host.parse().map_err(|error| wrong(format!("host {host:?}: {error}")))?;
        let host =
            HeaderValue::from_str(authority.as_str()).map_err(|error| wrong(format!("host {host:?}: {error}")))?;
        let uri = Uri::builder().scheme(target.scheme.as_str()).authority(authority).path_and_query(path.clone());
        let uri = uri.build().map_err(|error| wrong(error.to_string()))?;

        let mut absolute = Request::new(());
        *absolute.method_mut() = class.method.clone();
        *absolute.headers_mut() = class.headers.clone();
        absolute.headers_mut().entry(header::USER_AGENT).or_insert(USER_AGENT);
        if !class.body.is_empty() {
            absolute.headers_mut().insert(header::CONTENT_LENGTH, class.body.len().into());
        }
        let mut origin = absolute.clone();
        *absolute.uri_mut() = uri;
        *origin.uri_mut() = path.into();
        origin.headers_mut().insert(header::HOST, host);
        Ok(Template { origin, absolute, body: class.body.clone() })
    }

    /// Whether it has the same effect twice as once (RFC 9110 9.2.2).
    pub(super) fn is_idempotent(&self) -> bool {
        self.origin.method().is_idempotent()
    }

    pub(super) fn h1(&self) -> Request<Full<Bytes>> {
        self.origin.clone().map(|()| Full::new(self.body.clone()))
    }

    pub(super) fn h2(&self) -> Request<Full<Bytes>> {
        self.absolute.clone().map(|()| Full::new(self.body.clone()))
    }

    /// The head and the body, which HTTP/3 sends one after the other.
    pub(super) fn h3(&self) -> (Request<()>, Bytes) {
        (self.absolute.clone(), self.body.clone())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::options::tests::sample;

    fn class_and_target() -> (RequestClass, Target) {
        let mut options = sample();
        (options.requests.remove(0), options.targets.remove(0))
    }

    #[test]
    fn each_protocol_gets_the_form_of_request_it_wants() {
        let (mut class, target) = class_and_target();
        class.path = "/a?b=c".to_owned();
        class.body = Bytes::from_static(b"hello");
        let template = Template::new(&class, &target).unwrap();
        let (h1, h2) = (template.h1(), template.h2());
        assert_eq!(
            (h1.uri().to_string().as_str(), h1.headers()["host"].to_str().unwrap()),
            ("/a?b=c", "hello.localhost:8080")
        );
        assert_eq!(h2.uri().to_string(), "http://hello.localhost:8080/a?b=c");
        assert!(!h2.headers().contains_key("host"));
        let (head, body) = template.h3();
        assert_eq!((head.headers()["content-length"].to_str().unwrap(), body.as_ref()), ("5", b"hello".as_slice()));
        assert_eq!(head.headers()["user-agent"], "selvage-loadtest");
    }

    #[test]
    fn a_class_may_name_another_host_and_user_agent() {
        let (mut class, target) = class_and_target();
        class.host = Some("other.example".to_owned());
        class.headers.insert("user-agent", HeaderValue::from_static("mine"));
        let template = Template::new(&class, &target).unwrap();
        assert_eq!(template.h1().headers()["host"], "other.example");
        assert_eq!(template.h2().uri().authority().unwrap().as_str(), "other.example");
        assert_eq!(template.h2().headers()["user-agent"], "mine");
    }

    #[test]
    fn what_is_no_request_is_refused_by_class() {
        let refusal = |change: &dyn Fn(&mut RequestClass)| {
            let (mut class, target) = class_and_target();
            change(&mut class);
            Template::new(&class, &target).unwrap_err().to_string()
        };
        assert!(refusal(&|class| class.path = String::new()).ends_with("does not start with /"));
        assert!(refusal(&|class| class.path = "http://x/".to_owned()).ends_with("does not start with /"));
        assert!(refusal(&|class| class.path = "/a b".to_owned()).contains("path \"/a b\""));
        assert!(refusal(&|class| class.host = Some("a b".to_owned())).contains("host \"a b\""));
        for name in RESERVED {
            let text = refusal(&|class| drop(class.headers.insert(name.clone(), HeaderValue::from_static("x"))));
            assert_eq!(text, format!("request class \"home\": header {name} is set by the protocol"));
        }
    }
}
