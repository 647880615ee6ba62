//! Who asks: a node by its certificate, an operator by certificate or token, or nobody.

use std::fmt;
use std::hint::black_box;
use std::net::SocketAddr;
use std::sync::Arc;

use axum::extract::{FromRequestParts, Request, State};
use axum::middleware::Next;
use axum::response::{IntoResponse, Response};
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use http::header::{AUTHORIZATION, WWW_AUTHENTICATE};
use http::request::Parts as RequestParts;
use http::{HeaderMap, HeaderValue, StatusCode};
use selvage_certs::Role;
use selvage_config::control_plane::Operator;
use selvage_config::{Digest, NodeName, Region};

use crate::Parts;
use crate::failure::Failure;
use crate::registry::RegistryError;

/// The other end of a connection.
#[derive(Debug, Clone)]
pub(crate) struct Peer {
    pub(crate) address: SocketAddr,
    /// Who its certificate says it is, if it showed one.
    pub(crate) role: Option<Role>,
}

/// Who asks. Only [`Access`] makes one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    Node { region: Region, node: NodeName },
    Operator(OperatorId),
}

/// An operator who has proved to be one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct OperatorId {
    name: String,
    proof: &'static str,
}

impl OperatorId {
    /// The name, as releases carry it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Display for OperatorId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "operator {} by {}", self.name, self.proof)
    }
}

impl fmt::Display for Caller {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Node { node, .. } => write!(f, "node {node}"),
            Self::Operator(operator) => operator.fmt(f),
        }
    }
}

/// The operators' tokens, as digests.
#[derive(Debug)]
pub(crate) struct Access(Vec<Operator>);

impl Access {
    pub(crate) fn new(operators: Vec<Operator>) -> Self {
        Self(operators)
    }

    /// Who asks. A certificate settles it; a token is looked at only without one.
    fn caller(&self, role: Option<&Role>, headers: &HeaderMap) -> Option<Caller> {
        let operator = |name: &str, proof| Caller::Operator(OperatorId { name: name.to_owned(), proof });
        match role {
            Some(Role::Node { region, node }) => Some(Caller::Node { region: region.clone(), node: node.clone() }),
            Some(Role::Operator { name }) => Some(operator(name.as_str(), "certificate")),
            // The control plane has no business with itself: its key in other hands opens nothing here.
            Some(Role::ControlPlane) => None,
            None => {
                let mut values = headers.get_all(AUTHORIZATION).iter();
                let value = values.next().filter(|_| values.next().is_none())?;
                self.by_token(value).map(|name| operator(name, "token"))
            }
        }
    }

    fn by_token(&self, value: &HeaderValue) -> Option<&str> {
        let (scheme, credentials) = value.to_str().ok()?.split_once(' ')?;
        let credentials = credentials.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            return self.owner(credentials.as_bytes(), None);
        }
        if scheme.eq_ignore_ascii_case("basic") {
            let decoded = STANDARD.decode(credentials).ok()?;
            // RFC 7617 2: the user name has no colon, the password may.
            let colon = decoded.iter().position(|byte| *byte == b':')?;
            let (user, token) = (std::str::from_utf8(&decoded[..colon]).ok()?, &decoded[colon + 1..]);
            return self.owner(token, Some(user));
        }
        None
    }

    /// Whose token it is. Every operator is compared, and the whole of every digest, so the time tells nothing.
    fn owner(&self, token: &[u8], user: Option<&str>) -> Option<&str> {
        let digest = Digest::of(token);
        let mut found = None;
        for operator in &self.0 {
            let pairs = digest.as_bytes().iter().zip(operator.token_digest.as_bytes());
            let difference = pairs.fold(0, |sum, (a, b)| black_box(sum | (a ^ b)));
            if difference == 0 && user.is_none_or(|user| user == operator.name) {
                found = Some(operator.name.as_str());
            }
        }
        found
    }
}

/// Lets nobody through who has not proved to be somebody.
pub(crate) async fn authenticate(State(parts): State<Arc<Parts>>, mut request: Request, next: Next) -> Response {
    let role = request.extensions().get::<Peer>().and_then(|peer| peer.role.as_ref());
    if let Some(caller) = parts.access.caller(role, request.headers()) {
        request.extensions_mut().insert(caller);
        return next.run(request).await;
    }
    let is_registry = request.uri().path().starts_with("/v2");
    let (mut answer, challenge) = if is_registry {
        (RegistryError::unauthorized().into_response(), "Basic realm=\"selvage\"")
    } else {
        let failure = Failure::new(StatusCode::UNAUTHORIZED, "who are you?")
            .hint("show an operator's token as Authorization: Bearer, or a certificate of the fleet");
        (failure.into_response(), "Bearer realm=\"selvage\"")
    };
    answer.headers_mut().insert(WWW_AUTHENTICATE, HeaderValue::from_static(challenge));
    answer
}

impl<S: Sync> FromRequestParts<S> for Caller {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut RequestParts, _: &S) -> Result<Self, Failure> {
        let caller = parts.extensions.get::<Self>().cloned();
        caller.ok_or_else(|| Failure::new(StatusCode::UNAUTHORIZED, "who are you?"))
    }
}

impl<S: Sync> FromRequestParts<S> for OperatorId {
    type Rejection = Failure;

    async fn from_request_parts(parts: &mut RequestParts, state: &S) -> Result<Self, Failure> {
        match Caller::from_request_parts(parts, state).await? {
            Caller::Operator(operator) => Ok(operator),
            Caller::Node { node, .. } => {
                tracing::warn!(target: "audit", %node, method = %parts.method, path = parts.uri.path(), "refused");
                Err(Failure::new(StatusCode::FORBIDDEN, "this is for operators"))
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn access() -> Access {
        let operator = |name: &str, token: &[u8]| Operator { name: name.into(), token_digest: Digest::of(token) };
        Access::new(vec![operator("ada", b"a:1"), operator("bob", b"b2")])
    }

    fn asks(authorization: &str) -> Option<String> {
        let headers = [(AUTHORIZATION, authorization.parse().unwrap())].into_iter().collect();
        match access().caller(None, &headers)? {
            Caller::Operator(operator) => Some(operator.name),
            Caller::Node { .. } => panic!("a token makes no node"),
        }
    }

    fn basic(pair: &str) -> String {
        format!("Basic {}", STANDARD.encode(pair))
    }

    #[test]
    fn a_token_proves_its_owner() {
        assert_eq!(asks("Bearer a:1").unwrap(), "ada");
        assert_eq!(asks("bearer b2").unwrap(), "bob");
        assert_eq!(asks(&basic("ada:a:1")).unwrap(), "ada");
    }

    #[test]
    fn anything_else_proves_nobody() {
        let digest = format!("Bearer {}", Digest::of(b"b2"));
        let refused =
            ["Bearer", "Bearer ", "Bearer b", "Bearer b22", "Basic b2", "Digest b2", "b2", &digest, "Basic %%%"];
        for bad in refused {
            assert_eq!(asks(bad), None, "{bad}");
        }
        for bad in ["ada:b2", "b2", ":b2", "nobody:b2", "bob:"] {
            assert_eq!(asks(&basic(bad)), None, "{bad}");
        }
        assert_eq!(access().caller(None, &HeaderMap::new()), None);
    }

    #[test]
    fn two_authorizations_are_none() {
        let value = || (AUTHORIZATION, HeaderValue::from_static("Bearer b2"));
        let mut headers: HeaderMap = [value()].into_iter().collect();
        headers.append(AUTHORIZATION, value().1);
        assert_eq!(access().caller(None, &headers), None);
    }

    #[test]
    fn a_certificate_settles_who_asks() {
        let headers: HeaderMap = [(AUTHORIZATION, HeaderValue::from_static("Bearer b2"))].into_iter().collect();
        let node = Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() };
        assert!(matches!(access().caller(Some(&node), &headers), Some(Caller::Node { .. })));
        assert_eq!(access().caller(Some(&Role::ControlPlane), &headers), None);
    }
}
