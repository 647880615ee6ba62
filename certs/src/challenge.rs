//! What an ACME authority finds when it looks whether a name leads here.
//!
//! An answer stands as long as its [`Answering`] lives, and nobody else's question is answered: a token that is not
//! known here is as unknown as any other path.

use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use rcgen::{CertificateParams, CustomExtension, DistinguishedName, KeyPair};
use rustls::server::ClientHello;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{PrivateKeyDer, PrivatePkcs8KeyDer};
use selvage_config::node::TlsProvider;

use crate::provider_of;

/// What a client that only looks for a challenge says by ALPN (RFC 8737 6.2).
pub const ACME_ALPN: &[u8] = b"acme-tls/1";
/// Where the plain listener is asked (RFC 8555 8.3).
const HTTP_PREFIX: &str = "/.well-known/acme-challenge/";
/// Bytes of a challenge's digest.
pub const DIGEST_BYTES: usize = 32;

/// Whether a client only looks for a challenge: it offers this protocol and no other (RFC 8737 3).
pub(crate) fn is_challenge(hello: &ClientHello<'_>) -> bool {
    let mut alpn = hello.alpn().into_iter().flatten();
    (alpn.next(), alpn.next()) == (Some(ACME_ALPN), None)
}

/// A certificate for a challenge can't be made.
#[derive(Debug, thiserror::Error)]
pub enum ChallengeError {
    /// It can't be made.
    #[error("make the certificate of the challenge for {name}")]
    Make {
        /// The name.
        name: String,
        /// Why not.
        source: rcgen::Error,
    },
    /// Nothing can be signed with it.
    #[error("use the certificate of the challenge for {name}")]
    Use {
        /// The name.
        name: String,
        /// Why not.
        source: rustls::Error,
    },
}

/// What is asked of whoever may know an answer that this node has not: for a host and a token the text over HTTP, for a host
/// alone the digest over TLS.
type Elsewhere = dyn Fn(&str, Option<&str>) -> Option<Vec<u8>> + Send + Sync;

/// The answers that stand now. Clones share them.
#[derive(Clone, Default)]
pub struct Challenges {
    standing: Arc<Mutex<Standing>>,
    elsewhere: Arc<OnceLock<Box<Elsewhere>>>,
}

#[derive(Default)]
struct Standing {
    /// By host and token.
    texts: HashMap<(String, String), String>,
    /// By host.
    keys: HashMap<String, Arc<CertifiedKey>>,
}

/// One answer. It is given until this is dropped.
#[must_use = "the answer goes as soon as this is dropped"]
pub struct Answering {
    challenges: Challenges,
    host: String,
    /// None where TLS answers.
    token: Option<String>,
}

impl Challenges {
    /// Answers for `token` of `host` over HTTP with `text` (RFC 8555 8.3).
    pub fn answer_http(&self, host: &str, token: &str, text: &str) -> Answering {
        let (host, token) = (host.to_owned(), token.to_owned());
        self.lock().texts.insert((host.clone(), token.clone()), text.to_owned());
        Answering { challenges: self.clone(), host, token: Some(token) }
    }

    /// Answers for `host` over TLS with a certificate that has `digest` in it (RFC 8737 3).
    ///
    /// # Errors
    /// [`ChallengeError`].
    pub fn answer_tls(
        &self,
        host: &str,
        digest: &[u8; DIGEST_BYTES],
        provider: TlsProvider,
    ) -> Result<Answering, ChallengeError> {
        let key = certificate(host, digest, provider)?;
        self.lock().keys.insert(host.to_owned(), Arc::new(key));
        Ok(Answering { challenges: self.clone(), host: host.to_owned(), token: None })
    }

    /// What to say to a plain request for `path` at `host`, if that is a challenge of ours. The host is in lower case,
    /// without port.
    pub fn http(&self, host: &str, path: &str) -> Option<String> {
        let token = path.strip_prefix(HTTP_PREFIX)?;
        let own = self.lock().texts.get(&(host.to_owned(), token.to_owned())).cloned();
        own.or_else(|| String::from_utf8(self.elsewhere.get()?(host, Some(token))?).ok())
    }

    /// Whether `path` may be one that [`Challenges::http`] answers. It costs nothing.
    pub fn is_http(path: &str) -> bool {
        path.starts_with(HTTP_PREFIX)
    }

    /// The certificate for a client that looks for the challenge of `host`.
    pub(crate) fn tls(&self, host: &str) -> Option<Arc<CertifiedKey>> {
        let own = self.lock().keys.get(host).cloned();
        own.or_else(|| {
            let digest = self.elsewhere.get()?(host, None)?.try_into().ok()?;
            Some(Arc::new(certificate(host, &digest, TlsProvider::default()).ok()?))
        })
    }

    /// Has `elsewhere` asked for what is not known here. The first one who is named is asked.
    pub fn ask_elsewhere(&self, elsewhere: impl Fn(&str, Option<&str>) -> Option<Vec<u8>> + Send + Sync + 'static) {
        // A second one has no meaning: a node has one place.
        let _ = self.elsewhere.set(Box::new(elsewhere));
    }

    fn lock(&self) -> MutexGuard<'_, Standing> {
        // Every change is one call on a map, whole or not there.
        self.standing.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A certificate for `host` with `digest` in it (RFC 8737 3).
fn certificate(host: &str, digest: &[u8; DIGEST_BYTES], provider: TlsProvider) -> Result<CertifiedKey, ChallengeError> {
    let failed = |source| ChallengeError::Make { name: host.to_owned(), source };
    let key = KeyPair::generate().map_err(failed)?;
    let mut params = CertificateParams::new([host.to_owned()]).map_err(failed)?;
    params.distinguished_name = DistinguishedName::new();
    params.custom_extensions = vec![CustomExtension::new_acme_identifier(digest)];
    let certificate = params.self_signed(&key).map_err(failed)?;
    let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
    let key = provider_of(provider).key_provider.load_private_key(key);
    let key = key.map_err(|source| ChallengeError::Use { name: host.to_owned(), source })?;
    // That it fits is not checked: who would do so knows nothing of the critical extension, and refuses it.
    Ok(CertifiedKey::new(vec![certificate.der().clone()], key))
}

impl fmt::Debug for Challenges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let standing = self.lock();
        let (texts, keys) = (standing.texts.len(), standing.keys.len());
        f.debug_struct("Challenges").field("texts", &texts).field("keys", &keys).finish()
    }
}

impl Drop for Answering {
    fn drop(&mut self) {
        let mut standing = self.challenges.lock();
        match self.token.take() {
            Some(token) => drop(standing.texts.remove(&(std::mem::take(&mut self.host), token))),
            None => drop(standing.keys.remove(&self.host)),
        }
    }
}

impl fmt::Debug for Answering {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Answering").field("host", &self.host).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn an_answer_is_given_for_its_host_and_token_while_it_stands() {
        let challenges = Challenges::default();
        let answering = challenges.answer_http("a.test", "token", "token.thumb");
        let ask = |host: &str, path: &str| challenges.http(host, path);
        assert_eq!(ask("a.test", "/.well-known/acme-challenge/token").as_deref(), Some("token.thumb"));
        for (host, path) in [
            ("b.test", "/.well-known/acme-challenge/token"),
            ("a.test", "/.well-known/acme-challenge/other"),
            ("a.test", "/.well-known/acme-challenge/"),
            ("a.test", "/.well-known/acme-challenge/token/"),
            ("a.test", "/token"),
        ] {
            assert_eq!(ask(host, path), None, "{host}{path}");
        }
        drop(answering);
        assert_eq!(ask("a.test", "/.well-known/acme-challenge/token"), None);
    }

    #[test]
    fn a_certificate_of_a_challenge_has_its_digest_in_a_critical_extension() {
        let challenges = Challenges::default();
        let answering = challenges.answer_tls("a.test", &[7; DIGEST_BYTES], TlsProvider::default()).unwrap();
        let key = challenges.tls("a.test").unwrap();
        let leaf = crate::identity::parse(&key.cert[0]).unwrap();
        let oid = x509_parser::oid_registry::asn1_rs::oid!(1.3.6.1.5.5.7.1.31);
        let extension = leaf.get_extension_unique(&oid).unwrap().unwrap();
        // RFC 8737 3: critical, an octet string of 32 bytes.
        assert!(extension.critical);
        assert_eq!(extension.value, [&[4, 32][..], &[7; 32]].concat());
        assert!(challenges.tls("b.test").is_none());
        drop(answering);
        assert!(challenges.tls("a.test").is_none());
    }

    #[test]
    fn what_is_not_known_here_is_asked_elsewhere() {
        let challenges = Challenges::default();
        challenges.ask_elsewhere(|host, token| match (host, token) {
            ("a.test", Some("token")) => Some(b"token.thumb".to_vec()),
            ("a.test", None) => Some(vec![7; DIGEST_BYTES]),
            ("b.test", _) => Some(vec![0xff; 3]),
            _ => None,
        });
        assert_eq!(challenges.http("a.test", "/.well-known/acme-challenge/token").as_deref(), Some("token.thumb"));
        assert_eq!(challenges.http("a.test", "/.well-known/acme-challenge/other"), None);
        assert!(challenges.tls("a.test").is_some() && challenges.tls("c.test").is_none());
        assert_eq!(challenges.http("b.test", "/.well-known/acme-challenge/token"), None, "that is no text");
        assert!(challenges.tls("b.test").is_none(), "that is no digest");
        let _own = challenges.answer_http("a.test", "token", "own");
        assert_eq!(challenges.http("a.test", "/.well-known/acme-challenge/token").as_deref(), Some("own"));
    }
}
