//! Who asks: a node by its certificate, an operator by certificate or token, or nobody.

mod rights;
mod token;

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
use selvage_config::oci::Repository;
use selvage_config::{AppName, Digest, NodeName, Region};

pub(crate) use rights::Action;
pub(crate) use selvage_config::operator::Act;
pub(crate) use token::{KEY_BYTES, TOKEN_SECONDS, Tokens, scopes};

use crate::Parts;
use crate::audit::now_ms;
use crate::failure::Failure;
use crate::registry::{RegistryError, challenge};
use rights::{Rights, Scope};
use token::Claims;

/// How an operator proved who it is.
const CERTIFICATE: &str = "certificate";
const TOKEN: &str = "token";

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
    rights: Rights,
}

impl OperatorId {
    /// The name, as releases carry it.
    pub(crate) fn name(&self) -> &str {
        &self.name
    }

    /// Whether the operator may do this to `app`.
    pub(crate) fn may(&self, act: Act, app: &AppName) -> bool {
        self.rights.over_app(act, app)
    }

    /// Goes on only if the operator may do this to `app`.
    pub(crate) fn over_app(&self, act: Act, app: &AppName) -> Result<(), Failure> {
        if self.may(act, app) { Ok(()) } else { Err(self.refused(&format!("to app {app}"))) }
    }

    /// Goes on only if the operator may do this to what concerns every app.
    pub(crate) fn over_fleet(&self, act: Act) -> Result<(), Failure> {
        if self.rights.over_fleet(act) { Ok(()) } else { Err(self.refused("to the fleet")) }
    }

    /// Whether the operator may do this to `repository`.
    pub(crate) fn over_repository(&self, action: Action, repository: &Repository) -> bool {
        self.rights.over_repository(action, repository)
    }

    /// Whether the operator may know that there is this repository.
    pub(crate) fn sees(&self, repository: &Repository) -> bool {
        self.rights.sees(repository)
    }

    /// Whether a registry token proved who asks.
    pub(crate) fn is_scoped(&self) -> bool {
        self.rights.is_scoped()
    }

    /// A registry token with those of `wanted` that the operator has a right to.
    pub(crate) fn registry_token(&self, tokens: &Tokens, wanted: Vec<Scope>) -> String {
        let granted = wanted.into_iter().map(|mut scope| {
            scope.actions.retain(|action| self.rights.over_repository(*action, &scope.repository));
            scope
        });
        let ends_ms = now_ms() + TOKEN_SECONDS * 1_000;
        let by_certificate = self.proof == CERTIFICATE;
        tokens.write(&Claims { name: self.name.clone(), by_certificate, ends_ms, scopes: granted.collect() })
    }

    fn refused(&self, whom: &str) -> Failure {
        tracing::warn!(target: "audit", who = %self, whom, "refused");
        Failure::new(StatusCode::FORBIDDEN, format!("{} has no right to do this {whom}", self.name))
            .hint("the role and apps of an operator stand in the control plane's configuration")
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

/// The operators, their tokens as digests.
#[derive(Debug)]
pub(crate) struct Access {
    operators: Vec<Operator>,
    tokens: Tokens,
}

impl Access {
    pub(crate) fn new(operators: Vec<Operator>, tokens: Tokens) -> Self {
        Self { operators, tokens }
    }

    /// Makes registry tokens.
    pub(crate) fn tokens(&self) -> &Tokens {
        &self.tokens
    }

    /// Who asks. A certificate settles it; a token is looked at only without one.
    fn caller(&self, role: Option<&Role>, headers: &HeaderMap, kind: Kind) -> Option<Caller> {
        match role {
            Some(Role::Node { region, node }) => Some(Caller::Node { region: region.clone(), node: node.clone() }),
            Some(Role::Operator { name }) => self.certified(name.as_str()).map(Caller::Operator),
            // The control plane has no business with itself: its key in other hands opens nothing here.
            Some(Role::ControlPlane) => None,
            None => {
                let mut values = headers.get_all(AUTHORIZATION).iter();
                let value = values.next().filter(|_| values.next().is_none())?;
                self.by_token(value, kind).map(Caller::Operator)
            }
        }
    }

    fn named(&self, name: &str) -> Option<&Operator> {
        self.operators.iter().find(|operator| operator.name == name)
    }

    /// Who is named no more has no rights left, however long the certificate lasts.
    fn certified(&self, name: &str) -> Option<OperatorId> {
        let rights = Rights::of(self.named(name)?);
        Some(OperatorId { name: name.to_owned(), proof: CERTIFICATE, rights })
    }

    fn by_token(&self, value: &HeaderValue, kind: Kind) -> Option<OperatorId> {
        let (scheme, credentials) = value.to_str().ok()?.split_once(' ')?;
        let credentials = credentials.trim();
        if scheme.eq_ignore_ascii_case("bearer") {
            let own = self.owner(credentials.as_bytes(), None);
            return own.or_else(|| self.by_registry_token(credentials).filter(|_| kind == Kind::Registry));
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

    fn by_registry_token(&self, text: &str) -> Option<OperatorId> {
        let Claims { name, by_certificate, scopes, .. } = self.tokens.read(text, now_ms())?;
        let whose = if by_certificate {
            self.certified(&name)?
        } else {
            let operator = self.named(&name)?;
            OperatorId { name, proof: TOKEN, rights: Rights::of(operator) }
        };
        Some(OperatorId { rights: whose.rights.scoped(scopes), ..whose })
    }

    /// Whose token it is. Every operator is compared, and the whole of every digest, so the time tells nothing.
    fn owner(&self, token: &[u8], user: Option<&str>) -> Option<OperatorId> {
        let digest = Digest::of(token);
        let mut found = None;
        for operator in &self.operators {
            let Some(own) = &operator.token_digest else { continue };
            let pairs = digest.as_bytes().iter().zip(own.as_bytes());
            let difference = pairs.fold(0, |sum, (a, b)| black_box(sum | (a ^ b)));
            if difference == 0 && user.is_none_or(|user| user == operator.name) {
                found = Some(operator);
            }
        }
        found.map(|operator| OperatorId { name: operator.name.clone(), proof: TOKEN, rights: Rights::of(operator) })
    }
}

/// What is asked for: a registry token opens the registry alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    Registry,
    Api,
}

/// Lets nobody through who has not proved to be somebody.
pub(crate) async fn authenticate(State(parts): State<Arc<Parts>>, mut request: Request, next: Next) -> Response {
    let role = request.extensions().get::<Peer>().and_then(|peer| peer.role.as_ref());
    let kind = if request.uri().path().starts_with("/v2") { Kind::Registry } else { Kind::Api };
    if let Some(caller) = parts.access.caller(role, request.headers(), kind) {
        if let Caller::Node { node, .. } = &caller
            && parts.fleet.records().is_revoked(node)
        {
            tracing::warn!(target: "audit", %node, "refused: its certificates were revoked");
            return Failure::new(StatusCode::FORBIDDEN, format!("the certificates of {node} were revoked"))
                .into_response();
        }
        if let Some(role @ Role::Operator { name }) = role
            && parts.fleet.records().revoked.identities.contains(&role.uri())
        {
            tracing::warn!(target: "audit", operator = %name, "refused: its certificates were revoked");
            return Failure::new(StatusCode::FORBIDDEN, format!("the certificates of operator {name} were revoked"))
                .into_response();
        }
        request.extensions_mut().insert(caller);
        return next.run(request).await;
    }
    let (mut answer, challenge) = match kind {
        Kind::Registry => {
            let challenge = challenge(request.method(), request.uri(), request.headers());
            (RegistryError::unauthorized().into_response(), challenge)
        }
        Kind::Api => {
            let failure = Failure::new(StatusCode::UNAUTHORIZED, "who are you?")
                .hint("show an operator's token as Authorization: Bearer, or the certificate of an operator who stands under [[operators]]");
            (failure.into_response(), HeaderValue::from_static("Bearer realm=\"selvage\""))
        }
    };
    answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
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
    use selvage_config::control_plane::OperatorRole;

    use super::*;

    fn access() -> Access {
        let operator = |name: &str, token: &[u8]| Operator {
            name: name.into(),
            token_digest: Some(Digest::of(token)),
            role: OperatorRole::Admin,
            apps: None,
        };
        Access::new(vec![operator("ada", b"a:1"), operator("bob", b"b2")], Tokens::new(&[1; KEY_BYTES]))
    }

    fn asks(authorization: &str) -> Option<String> {
        let headers = [(AUTHORIZATION, authorization.parse().unwrap())].into_iter().collect();
        match access().caller(None, &headers, Kind::Api)? {
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
        assert_eq!(access().caller(None, &HeaderMap::new(), Kind::Api), None);
    }

    #[test]
    fn a_registry_token_opens_the_registry_alone_and_only_while_its_operator_is_there() {
        let access = access();
        let ada = access.owner(b"a:1", None).unwrap();
        let token = ada.registry_token(access.tokens(), scopes(["repository:a:pull"].into_iter()));
        let headers: HeaderMap = [(AUTHORIZATION, format!("Bearer {token}").parse().unwrap())].into_iter().collect();
        assert_eq!(access.caller(None, &headers, Kind::Api), None);
        let Some(Caller::Operator(scoped)) = access.caller(None, &headers, Kind::Registry) else {
            panic!("no operator")
        };
        assert!(scoped.over_repository(Action::Pull, &"a".parse().unwrap()));
        assert!(!scoped.over_repository(Action::Push, &"a".parse().unwrap()));
        let without = Access::new(Vec::new(), Tokens::new(&[1; KEY_BYTES]));
        assert_eq!(without.caller(None, &headers, Kind::Registry), None);
    }

    #[test]
    fn two_authorizations_are_none() {
        let value = || (AUTHORIZATION, HeaderValue::from_static("Bearer b2"));
        let mut headers: HeaderMap = [value()].into_iter().collect();
        headers.append(AUTHORIZATION, value().1);
        assert_eq!(access().caller(None, &headers, Kind::Api), None);
    }

    #[test]
    fn a_certificate_settles_who_asks() {
        let headers: HeaderMap = [(AUTHORIZATION, HeaderValue::from_static("Bearer b2"))].into_iter().collect();
        let node = Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() };
        assert!(matches!(access().caller(Some(&node), &headers, Kind::Api), Some(Caller::Node { .. })));
        assert_eq!(access().caller(Some(&Role::ControlPlane), &headers, Kind::Api), None);
    }

    #[test]
    fn an_operators_certificate_counts_while_its_name_is_there() {
        let role = |name: &str| Role::Operator { name: name.parse().unwrap() };
        let asks = |access: &Access| access.caller(Some(&role("ada")), &HeaderMap::new(), Kind::Api);
        assert!(matches!(asks(&access()), Some(Caller::Operator(ada)) if ada.name() == "ada"));
        let without = Access::new(Vec::new(), Tokens::new(&[1; KEY_BYTES]));
        assert_eq!(asks(&without), None);
    }
}
