//! Who may call: the token that a component's rule demands.
//!
//! The verifier is our own because the checks that matter (RFC 8725) are policy: which algorithm, which key, which
//! claims, and that nothing is read twice in two ways. ring does the cryptography. There is no cache of verdicts: one
//! that outlives `exp` or forgets the audience has been a hole in every gateway that had one.

mod fetch;
#[cfg(test)]
pub(crate) mod forge;
mod json;
mod key;
mod resolve;
mod token;

use std::sync::Arc;
use std::time::{Instant, SystemTime};

use http::{HeaderMap, header};
use selvage_config::app::jwt::{self as document, KeySource, Rule};

pub use fetch::KeyFetcher;
pub use key::KeySetError;
pub use token::Claims;

use crate::fault::{Denial, Fault};
use fetch::Source;
use key::KeySet;
use token::Token;

/// The scheme of RFC 6750 2.1.
const SCHEME: &str = "bearer";

/// Why an issuer can't be used.
#[derive(Debug, thiserror::Error)]
pub enum JwtError {
    /// The key set in the app's document.
    #[error("keys of issuer {issuer}")]
    Keys {
        /// Whose.
        issuer: String,
        /// What is wrong with them.
        source: KeySetError,
    },
    /// A URL that keys are not fetched from.
    #[error("key set URL {url:?} {reason}")]
    Url {
        /// The URL.
        url: String,
        /// Why not.
        reason: &'static str,
    },
    /// A certificate that can't be trusted.
    #[error("root certificate for key sets")]
    Root(#[source] rustls::Error),
    /// The HTTP client could not be made.
    #[error("HTTP client for key sets")]
    Client(#[source] reqwest::Error),
}

/// An issuer and its keys.
#[derive(Debug)]
pub struct Issuer {
    document: document::Issuer,
    keys: Keys,
}

#[derive(Debug)]
enum Keys {
    Inline(Arc<KeySet>),
    Fetched(Arc<Source>),
}

impl Issuer {
    /// An issuer as an app names it. Keys in the document are read now; keys from a URL are fetched in the background
    /// from now on, for which this must be called inside of a runtime.
    ///
    /// # Errors
    /// Keys that can't be used, or a URL that is not fetched from.
    pub fn new(document: &document::Issuer, fetcher: &KeyFetcher) -> Result<Self, JwtError> {
        let keys = match &document.keys {
            KeySource::Inline(set) => {
                let unusable = |source| JwtError::Keys { issuer: document.issuer.clone(), source };
                Keys::Inline(Arc::new(KeySet::parse(set.as_bytes()).map_err(unusable)?))
            }
            KeySource::Url(url) => Keys::Fetched(fetcher.source(url)?),
        };
        Ok(Self { document: document.clone(), keys })
    }

    async fn verify(&self, token: &Token<'_>, now: SystemTime, arrived: Instant) -> Result<Claims, Denial> {
        let source = match &self.keys {
            Keys::Inline(keys) => return token.verify(keys, &self.document, now),
            Keys::Fetched(source) => source,
        };
        let keys = source.keys().await.ok_or(Denial::KeysUnavailable)?;
        match token.verify(&keys, &self.document, now) {
            Err(Denial::UnknownKey) => match source.newer_keys(arrived).await {
                Some(newer) => token.verify(&newer, &self.document, now),
                None => Err(Denial::UnknownKey),
            },
            verdict => verdict,
        }
    }
}

/// Holds a request to its component's rule. `None` means that its path needs no token.
///
/// # Errors
/// [`Fault::Denied`].
pub async fn authorize(
    rule: &Rule,
    issuer: &Issuer,
    path: &str,
    fields: &HeaderMap,
    now: SystemTime,
    arrived: Instant,
) -> Result<Option<Claims>, Fault> {
    if is_exempt(rule, path) {
        return Ok(None);
    }
    let believed = async {
        let token = Token::parse(bearer(fields)?, &issuer.document.algorithms)?;
        issuer.verify(&token, now, arrived).await
    };
    believed.await.map(Some).map_err(Fault::Denied)
}

/// Whether a path is free. One that a guest may read as another path never is: `/public/../admin`.
fn is_exempt(rule: &Rule, path: &str) -> bool {
    is_plain(path) && rule.exempt.iter().any(|pattern| pattern.matches(path))
}

/// No empty, `.` or `..` segment, and nothing encoded or backward that could become one or a slash.
fn is_plain(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    let segments = || lower.strip_prefix('/').unwrap_or(&lower).split('/');
    let last = segments().count() - 1;
    let disguised = ["%2e", "%2f", "%5c", "%25", "%00", "\\", ";"].iter().any(|text| lower.contains(text));
    let bad =
        |(index, segment): (usize, &str)| segment == "." || segment == ".." || (segment.is_empty() && index < last);
    !disguised && !segments().enumerate().any(bad)
}

/// RFC 6750 2.1: the one Authorization field, with the scheme in any case. Never the query, which ends up in logs.
fn bearer(fields: &HeaderMap) -> Result<&str, Denial> {
    let mut values = fields.get_all(header::AUTHORIZATION).iter();
    let value = values.next().ok_or(Denial::Missing)?;
    if values.next().is_some() {
        return Err(Denial::Malformed);
    }
    let text = value.to_str().map_err(|_| Denial::Malformed)?;
    match text.split_once(' ') {
        Some((scheme, token)) if scheme.eq_ignore_ascii_case(SCHEME) => Ok(token.trim_start_matches(' ')),
        None if text.eq_ignore_ascii_case(SCHEME) => Err(Denial::Malformed),
        _ => Err(Denial::Missing),
    }
}

#[cfg(test)]
mod tests {
    use http::HeaderValue;

    use super::forge::{Forger, claims, issuer, today};
    use super::*;

    fn fields(values: &[&str]) -> HeaderMap {
        values.iter().map(|value| (header::AUTHORIZATION, HeaderValue::from_str(value).unwrap())).collect()
    }

    async fn ask(forger: &Forger, path: &str, fields: &HeaderMap) -> Result<Option<Claims>, Fault> {
        let fetcher = KeyFetcher::new(&[], false).unwrap();
        let issuer = Issuer::new(&issuer(&forger.jwks()), &fetcher).unwrap();
        let exempt = vec!["/public/...".parse().unwrap(), "/health".parse().unwrap()];
        let rule = Rule { issuer: "main".into(), exempt };
        authorize(&rule, &issuer, path, fields, today(), Instant::now()).await
    }

    #[tokio::test]
    async fn a_good_token_lets_in_and_tells_who() {
        let forger = Forger::p256("a");
        let token = forger.sign(&claims());
        for scheme in ["Bearer", "bearer", "BEARER", "Bearer  "] {
            let claims = ask(&forger, "/", &fields(&[&format!("{scheme} {token}")])).await.unwrap().unwrap();
            assert_eq!(claims.subject(), Some("ada"));
        }
    }

    #[tokio::test]
    async fn there_is_one_authorization_field_or_none() {
        let forger = Forger::p256("a");
        let good = format!("Bearer {}", forger.sign(&claims()));
        for (values, denial) in [
            (vec![], Denial::Missing),
            (vec!["Basic YTpi"], Denial::Missing),
            (vec![""], Denial::Missing),
            (vec!["Bearer"], Denial::Malformed),
            (vec!["Bearer "], Denial::Malformed),
            (vec![good.as_str(), good.as_str()], Denial::Malformed),
            (vec!["Basic YTpi", good.as_str()], Denial::Malformed),
            (vec![good.trim_start_matches("Bearer ")], Denial::Missing),
        ] {
            assert_eq!(ask(&forger, "/", &fields(&values)).await, Err(Fault::Denied(denial)), "{values:?}");
        }
        let mut unreadable = HeaderMap::new();
        unreadable.insert(header::AUTHORIZATION, HeaderValue::from_bytes(b"Bearer \xff").unwrap());
        assert_eq!(ask(&forger, "/", &unreadable).await, Err(Fault::Denied(Denial::Malformed)));
    }

    #[tokio::test]
    async fn a_free_path_needs_no_token_and_a_disguised_one_does() {
        let forger = Forger::p256("a");
        for free in ["/health", "/public", "/public/", "/public/a/b.css", "/public/a%20b"] {
            assert_eq!(ask(&forger, free, &fields(&[])).await, Ok(None), "{free}");
        }
        for held in [
            "/",
            "/healthz",
            "/publicity",
            "/public/../admin",
            "/public/%2e%2e/admin",
            "/public/%2E./admin",
            "/public/./a",
            "/public//admin",
            "//public/a",
            "/public/..%2fadmin",
            "/public/a\\..\\b",
            "/public/%252e%252e/a",
            "/public/..;/admin",
        ] {
            assert_eq!(ask(&forger, held, &fields(&[])).await, Err(Fault::Denied(Denial::Missing)), "{held}");
        }
    }

    #[tokio::test]
    async fn keys_that_can_not_be_used_are_told_at_activation() {
        let fetcher = KeyFetcher::new(&[], false).unwrap();
        let error = Issuer::new(&issuer(r#"{"keys":[]}"#), &fetcher).unwrap_err();
        assert!(matches!(error, JwtError::Keys { source: KeySetError::Unusable, .. }), "{error}");
        let mut plain = issuer("");
        plain.keys = KeySource::Url("http://issuer.example/keys".into());
        assert!(matches!(Issuer::new(&plain, &fetcher), Err(JwtError::Url { .. })));
    }

    #[tokio::test]
    async fn without_keys_nobody_is_let_in() {
        let forger = Forger::p256("a");
        let mut document = issuer("");
        // Port 9 (discard) of loopback: nothing listens there, so the fetch fails at once.
        document.keys = KeySource::Url("http://127.0.0.1:9/keys".into());
        let issuer = Issuer::new(&document, &KeyFetcher::new(&[], true).unwrap()).unwrap();
        let rule = Rule { issuer: "main".into(), exempt: Vec::new() };
        let fields = fields(&[&format!("Bearer {}", forger.sign(&claims()))]);
        let verdict = authorize(&rule, &issuer, "/", &fields, today(), Instant::now()).await;
        assert_eq!(verdict, Err(Fault::Denied(Denial::KeysUnavailable)));
    }
}
