//! How one upstream is asked: over TLS, with the token that it demands, and to no host but its own and those named.

use std::collections::HashMap;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant};

use http::StatusCode;
use http::header::{ACCEPT, AUTHORIZATION, WWW_AUTHENTICATE};
use reqwest::redirect::{Attempt, Policy};
use reqwest::{Client, Response, Url};
use rustls::RootCertStore;
use selvage_certs::roots_from_pem;
use selvage_config::control_plane::Upstream;
use selvage_config::oci::Repository;
use serde::Deserialize;
use tokio::time::timeout;

use super::UpstreamError;
use crate::registry::RegistryError;

/// Longest wait for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Longest wait for the head of an answer.
const HEAD: Duration = Duration::from_secs(30);
/// Redirects that are followed.
const REDIRECTS_MAX: usize = 4;
/// How long a token is used, where the upstream does not say or says longer.
const TOKEN_LIFE: Duration = Duration::from_secs(60);
/// Tokens that are remembered.
const TOKENS_MAX: usize = 1_000;
/// Bytes of the answer that a token is in.
const TOKEN_BYTES_MAX: usize = 64 * 1024;

/// One upstream.
#[derive(Debug)]
pub(super) struct One {
    config: Upstream,
    client: Client,
    password: Option<String>,
    /// `Authorization` by repository, and until when it is used.
    tokens: Mutex<HashMap<Repository, (String, Instant)>>,
}

/// What an upstream said.
pub(super) enum Answered {
    Found(Response),
    Missing,
}

#[derive(Debug, Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
}

impl One {
    pub(super) fn open(config: &Upstream) -> Result<Self, UpstreamError> {
        let password = match &config.password_file {
            None => None,
            Some(path) => {
                let read = std::fs::read_to_string(path);
                let text = read.map_err(|source| UpstreamError::File { path: path.clone(), source })?;
                Some(text.trim().to_owned())
            }
        };
        let roots = match &config.roots {
            Some(path) => roots_from_pem(path)
                .map_err(|source| UpstreamError::Roots { url: config.url.clone(), source: Box::new(source) })?,
            None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
        };
        let allowed = config.clone();
        let client = Client::builder()
            .use_preconfigured_tls(selvage_certs::client(&roots))
            .https_only(true)
            .no_proxy()
            .connect_timeout(CONNECT)
            .redirect(Policy::custom(move |attempt| follow(&allowed, attempt)))
            .build()
            .map_err(|source| UpstreamError::Client { url: config.url.clone(), source })?;
        Ok(Self { config: config.clone(), client, password, tokens: Mutex::default() })
    }

    pub(super) fn config(&self) -> &Upstream {
        &self.config
    }

    /// Asks for a path, with a token if one is demanded.
    pub(super) async fn get(
        &self,
        repository: &Repository,
        path: &str,
        accept: &str,
    ) -> Result<Answered, RegistryError> {
        let remembered = self.remembered(repository);
        let mut answer = self.send(path, accept, remembered.as_deref()).await?;
        if answer.status() == StatusCode::UNAUTHORIZED {
            let challenge = answer.headers().get(WWW_AUTHENTICATE).and_then(|value| value.to_str().ok());
            let authorization = self.authorization(repository, challenge.unwrap_or_default()).await?;
            answer = self.send(path, accept, Some(&authorization)).await?;
            if answer.status().is_success() {
                self.remember(repository.clone(), authorization);
            }
        }
        match answer.status() {
            StatusCode::OK => Ok(Answered::Found(answer)),
            StatusCode::NOT_FOUND => Ok(Answered::Missing),
            status => Err(self.failed(&format!("answers {status} to {path}"))),
        }
    }

    async fn send(&self, path: &str, accept: &str, authorization: Option<&str>) -> Result<Response, RegistryError> {
        let mut request = self.client.get(format!("{}{path}", self.config.url)).header(ACCEPT, accept);
        if let Some(value) = authorization {
            request = request.header(AUTHORIZATION, value);
        }
        self.answered(request).await
    }

    async fn answered(&self, request: reqwest::RequestBuilder) -> Result<Response, RegistryError> {
        match timeout(HEAD, request.send()).await {
            Ok(Ok(answer)) => Ok(answer),
            Ok(Err(error)) => {
                tracing::debug!(url = self.config.url, %error, "upstream");
                Err(self.failed("is not reached"))
            }
            Err(_) => Err(self.failed("does not answer in time")),
        }
    }

    /// What to show after this challenge.
    async fn authorization(&self, repository: &Repository, challenge: &str) -> Result<String, RegistryError> {
        let (scheme, parameters) = challenge.split_once(' ').unwrap_or((challenge, ""));
        let basic = self.config.username.as_ref().zip(self.password.as_ref());
        if scheme.eq_ignore_ascii_case("basic") {
            let (user, password) = basic.ok_or_else(|| self.failed("demands a name and password"))?;
            let pair = base64::Engine::encode(&base64::engine::general_purpose::STANDARD, format!("{user}:{password}"));
            return Ok(format!("Basic {pair}"));
        }
        let realm = parameter(parameters, "realm").filter(|_| scheme.eq_ignore_ascii_case("bearer"));
        let realm = realm.and_then(|realm| Url::parse(realm).ok()).filter(|url| is_allowed(&self.config, url));
        let mut url = realm.ok_or_else(|| self.failed("wants a token from where we do not ask"))?;
        if let Some(service) = parameter(parameters, "service") {
            url.query_pairs_mut().append_pair("service", service);
        }
        url.query_pairs_mut().append_pair("scope", &format!("repository:{repository}:pull"));
        let mut request = self.client.get(url);
        if let Some((user, password)) = basic {
            request = request.basic_auth(user, Some(password));
        }
        let answer = self.answered(request).await?;
        if !answer.status().is_success() {
            return Err(self.failed(&format!("gives no token: {}", answer.status())));
        }
        let body = axum::body::Body::from_stream(answer.bytes_stream());
        let bytes = crate::body::whole(body, TOKEN_BYTES_MAX).await?;
        let answer: TokenAnswer = serde_json::from_slice(&bytes).map_err(|_| self.failed("gives no token"))?;
        let token = answer.token.or(answer.access_token).ok_or_else(|| self.failed("gives no token"))?;
        Ok(format!("Bearer {token}"))
    }

    fn remembered(&self, repository: &Repository) -> Option<String> {
        let tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        tokens.get(repository).filter(|(_, until)| *until > Instant::now()).map(|(value, _)| value.clone())
    }

    fn remember(&self, repository: Repository, authorization: String) {
        let mut tokens = self.tokens.lock().unwrap_or_else(PoisonError::into_inner);
        if tokens.len() >= TOKENS_MAX {
            tokens.clear();
        }
        tokens.insert(repository, (authorization, Instant::now() + TOKEN_LIFE));
    }

    fn failed(&self, what: &str) -> RegistryError {
        RegistryError::upstream(format!("{} {what}", self.config.url))
    }
}

fn follow(config: &Upstream, attempt: Attempt<'_>) -> reqwest::redirect::Action {
    if attempt.previous().len() > REDIRECTS_MAX || !is_allowed(config, attempt.url()) {
        return attempt.error("it leads to a host that is not named");
    }
    attempt.follow()
}

/// Whether the upstream may send us there.
fn is_allowed(config: &Upstream, url: &Url) -> bool {
    let (Some(host), Ok(own)) = (url.host_str(), Url::parse(&config.url)) else { return false };
    if url.scheme() != "https" {
        return false;
    }
    let is_own = own.host_str() == Some(host) && own.port_or_known_default() == url.port_or_known_default();
    is_own
        || config.hosts.iter().any(|named| match named.strip_prefix("*.") {
            Some(domain) => host.strip_suffix(domain).is_some_and(|rest| rest.ends_with('.')),
            None => host == named,
        })
}

/// A parameter of a challenge (RFC 9110 11.2); quoted, as registries write them.
fn parameter<'c>(parameters: &'c str, name: &str) -> Option<&'c str> {
    parameters.split(',').find_map(|part| {
        let (found, value) = part.trim().split_once('=')?;
        found.eq_ignore_ascii_case(name).then(|| value.trim_matches('"'))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_upstream_sends_us_to_its_own_host_and_those_named() {
        let text = "prefix = 'x'\nurl = 'https://reg.test'\nhosts = ['auth.test', '*.cdn.test']";
        let config: Upstream = toml::from_str(text).unwrap();
        let may = |url: &str| is_allowed(&config, &Url::parse(url).unwrap());
        for url in ["https://reg.test/a", "https://reg.test:443/", "https://auth.test/token", "https://a.b.cdn.test/"] {
            assert!(may(url), "{url}");
        }
        for url in [
            "http://reg.test/",
            "https://reg.test:8443/",
            "https://cdn.test/",
            "https://xcdn.test/",
            "https://127.0.0.1/",
        ] {
            assert!(!may(url), "{url}");
        }
    }

    #[test]
    fn a_challenge_is_read() {
        let text = "realm=\"https://auth.test/token\", service=\"reg.test\",scope=\"repository:a:pull\"";
        assert_eq!(parameter(text, "realm"), Some("https://auth.test/token"));
        assert_eq!(parameter(text, "Service"), Some("reg.test"));
        assert_eq!(parameter(text, "nothing"), None);
    }
}
