//! A request and an answer, whatever HTTP version carried them.

use std::net::SocketAddr;
use std::time::Instant;

use bytes::Bytes;
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Empty, Full};

/// A streaming body, of a request or an answer.
pub type Body = UnsyncBoxBody<Bytes, BodyError>;

/// An answer.
pub type Response = http::Response<Body>;

/// Why a body ended early.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// More bytes than the limit of the route.
    #[error("body is larger than {max} bytes")]
    TooLarge {
        /// The limit.
        max: u64,
    },
    /// The connection failed or the peer broke the protocol.
    #[error("transport failed")]
    Transport(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The guest trapped or ran into a limit in the middle of its answer.
    #[error("guest ended its answer early: {outcome}")]
    Guest {
        /// The outcome's name, as in the metric.
        outcome: &'static str,
    },
}

/// Which protocol carried a request.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Protocol {
    /// HTTP/1.1 (RFC 9112).
    H1,
    /// HTTP/2 (RFC 9113).
    H2,
    /// HTTP/3 (RFC 9114).
    H3,
}

impl Protocol {
    /// The label in metrics and logs.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::H1 => "h1",
            Self::H2 => "h2",
            Self::H3 => "h3",
        }
    }
}

/// One request.
#[derive(Debug)]
pub struct Request {
    /// Head and body. The head's URI may be in origin or absolute form; [`authority`](Self::authority) reads both.
    pub http: http::Request<Body>,
    /// Who sent it.
    pub client: SocketAddr,
    /// How it came.
    pub protocol: Protocol,
    /// Whether TLS carried it.
    pub secure: bool,
    /// When its head was complete. Every deadline counts from here.
    pub arrived: Instant,
}

impl Request {
    /// `host[:port]` as the client wrote it: the URI's authority (`:authority` in HTTP/2 and 3) or the Host field.
    pub fn authority(&self) -> Option<&str> {
        let field = || self.http.headers().get(http::header::HOST)?.to_str().ok();
        self.http.uri().authority().map(http::uri::Authority::as_str).or_else(field)
    }

    /// `https` or `http`.
    pub fn scheme(&self) -> &'static str {
        if self.secure { "https" } else { "http" }
    }
}

/// A body without a byte.
pub fn empty() -> Body {
    Empty::new().map_err(|never| match never {}).boxed_unsync()
}

/// A body that is there at once.
pub fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}
