//! Why a request failed: exactly one [`Fault`], and it alone decides status, metric label and log level.
//!
//! What the client sees is the status and a fixed word; internal text stays in the log.

use http::{HeaderValue, StatusCode, header};

use crate::request::{Response, full};

/// Seconds that a shed client is asked to stay away.
const RETRY_AFTER_SECONDS: u32 = 1;

/// Why a request failed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Fault {
    /// The client's doing.
    Client(ClientFault),
    /// The route's policy says no.
    Denied(Denial),
    /// Too much at once; which bound was met.
    Overload(&'static str),
    /// The guest's doing.
    Guest(GuestFault),
    /// Something that the node asked for the client did not answer.
    Upstream(String),
    /// Our own doing.
    Node(String),
}

/// What the client did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientFault {
    /// No valid host, or two that disagree (RFC 9110 7.2).
    Host,
    /// No app has this host, or no route of the app this path.
    NotFound,
    /// A method that the node doesn't take (CONNECT, TRACE).
    Method,
    /// The body is larger than the route allows.
    BodyTooLarge,
    /// The message breaks a rule of HTTP.
    Malformed,
    /// The head is larger than the node takes (RFC 6585 5).
    HeadTooLarge,
    /// The target is longer than the node takes (RFC 9110 15.5.15).
    TargetTooLong,
    /// A transfer coding that the node does not undo (RFC 9112 6.1).
    Coding,
    /// A version of HTTP/1 that there is not (RFC 9110 15.6.6).
    Version,
    /// An expectation that the node can't meet (RFC 9110 10.1.1).
    Expectation,
    /// More requests than its address may make (RFC 6585 4).
    TooMany,
    /// The body did not come in time.
    Slow,
    /// Its connection was made for another name, under another rule (RFC 9110 15.5.20).
    Misdirected,
}

/// Why a token was not accepted. The name is the log's; the client hears `invalid_token` for all but the first.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Denial {
    /// There is none.
    Missing,
    /// It is not a compact JWS of the allowed size, or its header can't be taken.
    Malformed,
    /// `alg` is not one of the rule's.
    Algorithm,
    /// No key of the issuer has its `kid` and algorithm.
    UnknownKey,
    /// The signature is not by the key.
    Signature,
    /// `iss` is not the rule's.
    Issuer,
    /// `aud` has none of the rule's.
    Audience,
    /// `exp` is past, or missing.
    Expired,
    /// `nbf` is to come.
    NotYetValid,
    /// The issuer's keys can't be had.
    KeysUnavailable,
}

/// What the guest did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum GuestFault {
    /// It trapped.
    Trap,
    /// It ended without an answer.
    NoResponse,
    /// It answered with an error code instead of a response.
    ErrorCode,
    /// More CPU time than its limit.
    ExceededCpu,
    /// Not done in its wall time.
    ExceededWall,
    /// More memory than its limit.
    ExceededMemory,
    /// An answer whose head can't be sent: too large, or forbidden fields.
    BadResponse,
}

impl GuestFault {
    /// The name in metric and log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Trap => "trap",
            Self::NoResponse => "no-response",
            Self::ErrorCode => "error-code",
            Self::ExceededCpu => "exceeded-cpu",
            Self::ExceededWall => "exceeded-wall",
            Self::ExceededMemory => "exceeded-memory",
            Self::BadResponse => "bad-response",
        }
    }
}

impl Denial {
    /// The name in metric and log.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Missing => "token-missing",
            Self::Malformed => "token-malformed",
            Self::Algorithm => "token-algorithm",
            Self::UnknownKey => "token-unknown-key",
            Self::Signature => "token-signature",
            Self::Issuer => "token-issuer",
            Self::Audience => "token-audience",
            Self::Expired => "token-expired",
            Self::NotYetValid => "token-not-yet-valid",
            Self::KeysUnavailable => "token-keys-unavailable",
        }
    }
}

impl Fault {
    /// The class: the metric's label `fault`.
    pub fn class(&self) -> &'static str {
        match self {
            Self::Client(_) => "client",
            Self::Denied(_) => "denied",
            Self::Overload(_) => "overload",
            Self::Guest(_) => "guest",
            Self::Upstream(_) => "upstream",
            Self::Node(_) => "node",
        }
    }

    /// The outcome's name: the metric's label `outcome`, the log's field, and the header `selvage-outcome`.
    pub fn outcome(&self) -> &'static str {
        match self {
            Self::Client(ClientFault::Host) => "bad-host",
            Self::Client(ClientFault::NotFound) => "not-found",
            Self::Client(ClientFault::Method) => "bad-method",
            Self::Client(ClientFault::BodyTooLarge) => "body-too-large",
            Self::Client(ClientFault::Malformed) => "malformed",
            Self::Client(ClientFault::HeadTooLarge) => "head-too-large",
            Self::Client(ClientFault::TargetTooLong) => "target-too-long",
            Self::Client(ClientFault::Coding) => "unknown-coding",
            Self::Client(ClientFault::Version) => "unknown-version",
            Self::Client(ClientFault::Expectation) => "bad-expectation",
            Self::Client(ClientFault::TooMany) => "too-many-requests",
            Self::Client(ClientFault::Slow) => "slow-client",
            Self::Client(ClientFault::Misdirected) => "misdirected",
            Self::Denied(denial) => denial.as_str(),
            Self::Overload(_) => "overload",
            Self::Guest(fault) => fault.as_str(),
            Self::Upstream(_) => "upstream",
            Self::Node(_) => "node",
        }
    }

    /// The status that the client gets.
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Client(ClientFault::NotFound) => StatusCode::NOT_FOUND,
            Self::Client(ClientFault::Method) => StatusCode::METHOD_NOT_ALLOWED,
            Self::Client(ClientFault::BodyTooLarge) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Client(ClientFault::Slow) => StatusCode::REQUEST_TIMEOUT,
            Self::Client(ClientFault::Misdirected) => StatusCode::MISDIRECTED_REQUEST,
            Self::Client(ClientFault::HeadTooLarge) => StatusCode::REQUEST_HEADER_FIELDS_TOO_LARGE,
            Self::Client(ClientFault::TargetTooLong) => StatusCode::URI_TOO_LONG,
            Self::Client(ClientFault::Coding) => StatusCode::NOT_IMPLEMENTED,
            Self::Client(ClientFault::Version) => StatusCode::HTTP_VERSION_NOT_SUPPORTED,
            Self::Client(ClientFault::Expectation) => StatusCode::EXPECTATION_FAILED,
            Self::Client(ClientFault::TooMany) => StatusCode::TOO_MANY_REQUESTS,
            Self::Client(_) => StatusCode::BAD_REQUEST,
            Self::Denied(Denial::KeysUnavailable) | Self::Overload(_) => StatusCode::SERVICE_UNAVAILABLE,
            Self::Denied(_) => StatusCode::UNAUTHORIZED,
            Self::Guest(GuestFault::ExceededWall) => StatusCode::GATEWAY_TIMEOUT,
            Self::Guest(_) | Self::Node(_) => StatusCode::INTERNAL_SERVER_ERROR,
            Self::Upstream(_) => StatusCode::BAD_GATEWAY,
        }
    }

    /// Internal text for the log, if there is more than the outcome.
    pub fn detail(&self) -> Option<&str> {
        match self {
            Self::Overload(bound) => Some(bound),
            Self::Upstream(text) | Self::Node(text) => Some(text),
            _ => None,
        }
    }

    /// The answer that tells the client.
    pub fn response(&self) -> Response {
        let mut response = http::Response::new(full(format!("{}\n", self.outcome())));
        *response.status_mut() = self.status();
        let fields = response.headers_mut();
        fields.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
        fields.insert("selvage-outcome", HeaderValue::from_static(self.outcome()));
        match self {
            Self::Denied(Denial::Missing) => {
                fields.insert(header::WWW_AUTHENTICATE, HeaderValue::from_static("Bearer"));
            }
            // RFC 9110 15.5.6: what the target does support.
            Self::Client(ClientFault::Method) => {
                let taken = HeaderValue::from_static("DELETE, GET, HEAD, OPTIONS, PATCH, POST, PUT");
                fields.insert(header::ALLOW, taken);
            }
            Self::Denied(denial) if *denial != Denial::KeysUnavailable => {
                // RFC 6750 3.1. One word for every cause: the difference would help only a forger.
                let challenge = HeaderValue::from_static("Bearer error=\"invalid_token\"");
                fields.insert(header::WWW_AUTHENTICATE, challenge);
                *response.body_mut() = full("invalid token\n");
                response.headers_mut().insert("selvage-outcome", HeaderValue::from_static("denied"));
            }
            _ => {}
        }
        if matches!(self.status(), StatusCode::SERVICE_UNAVAILABLE | StatusCode::TOO_MANY_REQUESTS) {
            response.headers_mut().insert(header::RETRY_AFTER, HeaderValue::from(RETRY_AFTER_SECONDS));
        }
        response
    }
}
