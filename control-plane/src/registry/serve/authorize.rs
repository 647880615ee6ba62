//! Who may do what to a repository, and how a client learns where to get a token (the distribution project's token
//! specification).

use std::sync::Arc;

use axum::Json;
use axum::response::{IntoResponse, Response};
use http::header::{HOST, WWW_AUTHENTICATE};
use http::{HeaderMap, HeaderValue, Method, Uri};
use selvage_config::oci::Repository;
use serde_json::json;

use super::Asked;
use crate::Parts;
use crate::access::{Action, Caller, OperatorId, TOKEN_SECONDS, scopes};
use crate::registry::RegistryError;
use crate::registry::target::Target;

/// Where tokens are had, below `/v2/`.
pub(super) const TOKEN_PATH: &str = "token";

/// Who this registry is to whoever gives tokens: itself.
const SERVICE: &str = "selvage";

/// What a client that has not proved to be somebody is told to do.
pub(crate) fn challenge(method: &Method, uri: &Uri, headers: &HeaderMap) -> HeaderValue {
    let basic = HeaderValue::from_static("Basic realm=\"selvage\"");
    let path = uri.path().trim_start_matches("/v2").trim_start_matches('/');
    let Some(host) = host(uri, headers).filter(|_| path != TOKEN_PATH) else { return basic };
    let scope = Target::parse(path).ok().and_then(|target| {
        let repository = target.repository()?;
        Some(format!(",scope=\"repository:{repository}:{}\"", actions(method, &target)))
    });
    let scope = scope.unwrap_or_default();
    let text = format!("Bearer realm=\"https://{host}/v2/{TOKEN_PATH}\",service=\"{SERVICE}\"{scope}");
    HeaderValue::from_str(&text).unwrap_or(basic)
}

/// The host that a client asks for, if it is one.
pub(crate) fn host<'r>(uri: &'r Uri, headers: &'r HeaderMap) -> Option<&'r str> {
    let host = uri.authority().map(http::uri::Authority::as_str);
    host.or_else(|| headers.get(HOST)?.to_str().ok()).filter(|host| is_host(host))
}

/// What a client needs a right to, as scopes write it.
fn actions(method: &Method, target: &Target) -> &'static str {
    match (method, target) {
        (&Method::GET | &Method::HEAD, _) => "pull",
        (&Method::DELETE, Target::Manifest(..) | Target::Blob(..)) => "pull,delete",
        _ => "pull,push",
    }
}

fn is_host(text: &str) -> bool {
    let fits = |byte: u8| byte.is_ascii_alphanumeric() || matches!(byte, b'.' | b'-' | b':' | b'[' | b']');
    !text.is_empty() && text.len() <= 300 && text.bytes().all(fits)
}

/// GET of a token: what was asked for as far as the operator has a right to it.
pub(super) fn token(parts: &Arc<Parts>, asked: &Asked) -> Result<Response, RegistryError> {
    let Caller::Operator(operator) = &asked.caller else {
        return Err(RegistryError::denied("a node shows its certificate, and needs no token"));
    };
    let decoded = axum::extract::Query::<Vec<(String, String)>>::try_from_uri(&asked.uri)
        .map(|axum::extract::Query(pairs)| pairs)
        .map_err(|_| RegistryError::query_invalid("the query can't be read"))?;
    let wanted = scopes(decoded.iter().filter(|(name, _)| name == "scope").map(|(_, value)| value.as_str()));
    let token = operator.registry_token(parts.access.tokens(), wanted);
    let body = json!({ "token": token, "access_token": token, "expires_in": TOKEN_SECONDS });
    Ok(Json(body).into_response())
}

impl Asked {
    /// Goes on only if whoever asks may do this. Nodes read, and change nothing.
    pub(super) fn check(&self, action: Action, repository: &Repository) -> Result<(), RegistryError> {
        match &self.caller {
            Caller::Node { .. } if action == Action::Pull => Ok(()),
            Caller::Node { node, .. } => {
                tracing::warn!(target: "audit", %node, method = %self.method, "refused: a node changes no registry");
                Err(RegistryError::denied("a node only reads"))
            }
            Caller::Operator(operator) if operator.over_repository(action, repository) => Ok(()),
            Caller::Operator(operator) => {
                let what = action.as_str();
                tracing::warn!(target: "audit", who = %operator, what, %repository, "refused");
                let message = format!("{} has no right to {what} {repository}", operator.name());
                // A client that came with a token for something else gets another for this.
                Err(if operator.is_scoped() {
                    RegistryError::unauthorized_for(message)
                } else {
                    RegistryError::denied(message)
                })
            }
        }
    }

    /// The operator who asks and may do this.
    pub(super) fn operator(&self, action: Action, repository: &Repository) -> Result<OperatorId, RegistryError> {
        self.check(action, repository)?;
        match &self.caller {
            Caller::Operator(operator) => Ok(operator.clone()),
            Caller::Node { .. } => Err(RegistryError::denied("a node only reads")),
        }
    }

    /// An answer of 401 must say how to do better (RFC 9110 15.5.2).
    pub(super) fn challenged(&self, mut answer: Response) -> Response {
        if answer.status() == http::StatusCode::UNAUTHORIZED {
            let challenge = challenge(&self.method, &self.uri, &self.headers);
            answer.headers_mut().insert(WWW_AUTHENTICATE, challenge);
        }
        answer
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn told(method: &str, uri: &str, host: &str) -> String {
        let headers = [(HOST, host.parse().unwrap())].into_iter().collect();
        let value = challenge(&method.parse().unwrap(), &uri.parse().unwrap(), &headers);
        value.to_str().unwrap().to_owned()
    }

    #[test]
    fn a_challenge_names_what_is_needed() {
        let realm = "Bearer realm=\"https://cp.test:7400/v2/token\",service=\"selvage\"";
        assert_eq!(told("GET", "/v2/", "cp.test:7400"), realm);
        let scoped = |actions: &str| format!("{realm},scope=\"repository:a/b:{actions}\"");
        assert_eq!(told("GET", "/v2/a/b/tags/list", "cp.test:7400"), scoped("pull"));
        assert_eq!(told("POST", "/v2/a/b/blobs/uploads/", "cp.test:7400"), scoped("pull,push"));
        assert_eq!(told("DELETE", "/v2/a/b/manifests/x", "cp.test:7400"), scoped("pull,delete"));
    }

    #[test]
    fn no_host_that_a_client_makes_up_is_repeated() {
        for host in ["a\"b", "a b", "", "a/b", "a@b"] {
            assert_eq!(told("GET", "/v2/", host), "Basic realm=\"selvage\"", "{host}");
        }
        assert_eq!(told("GET", "/v2/token", "cp.test"), "Basic realm=\"selvage\"");
    }
}
