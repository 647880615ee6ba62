//! How a node and a control plane that have no certificate in common yet come together.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::digest::DigestError;
use crate::{Digest, NodeName, Region};

/// The control plane's path of joining: `POST` with a [`JoinRequest`].
pub const JOIN_PATH: &str = "/api/v1/join";
/// The control plane's path of the fleet's authorities, PEM. Whoever asks has to check them against a token.
pub const AUTHORITIES_PATH: &str = "/api/v1/authorities";
/// Below a node's own path: `POST` with a [`CertificateRequest`] for another certificate.
pub const CERTIFICATE_PATH: &str = "certificate";
/// The control plane's path for a node whose certificate has ended: `POST` with a [`RenewalRequest`].
pub const RENEWAL_PATH: &str = "/api/v1/renewals";
/// The field by which a node tells with its status which [`Authorities`] it knows, and the control plane answers with
/// those of the fleet.
pub const AUTHORITIES_FIELD: &str = "selvage-authorities";
/// Largest request or answer, bytes.
pub const JOIN_BYTES_MAX: usize = 64 * 1024;
/// How a token begins.
const PREFIX: &str = "sj1";

/// Whom somebody believes, and who vouches for it. Written as two digests.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Authorities {
    /// The digest of the file of authorities that is believed.
    pub believed: Digest,
    /// The digest of the authority's certificate that issues, or that issued what is shown.
    pub issuing: Digest,
}

impl fmt::Display for Authorities {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.believed, self.issuing)
    }
}

impl std::str::FromStr for Authorities {
    type Err = DigestError;

    fn from_str(text: &str) -> Result<Self, DigestError> {
        let (believed, issuing) = text.split_once(' ').unwrap_or((text, ""));
        Ok(Self { believed: believed.parse()?, issuing: issuing.parse()? })
    }
}

/// What a node sends whose certificate has ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RenewalRequest {
    /// The certificate that has ended, PEM.
    pub certificate: String,
    /// The request for another one for the same key, PKCS #10 in base64.
    pub request: String,
}

/// A token that lets one node join, once.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct JoinToken {
    /// By what the control plane knows it.
    pub id: String,
    /// What proves it.
    pub secret: String,
    /// The hash of the authority's certificate.
    pub authority: Digest,
}

/// Text that is no join token.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("this is no join token: expected sj1.<id>.<secret>.<hash>")]
pub struct JoinTokenError;

impl JoinToken {
    /// What is remembered of the secret.
    pub fn secret_digest(&self) -> Digest {
        Digest::of(self.secret.as_bytes())
    }
}

impl fmt::Debug for JoinToken {
    /// Without the secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "JoinToken({})", self.id)
    }
}

impl std::str::FromStr for JoinToken {
    type Err = JoinTokenError;
    fn from_str(text: &str) -> Result<Self, JoinTokenError> {
        let parts: Vec<&str> = text.trim().split('.').collect();
        let [PREFIX, id, secret, hash] = parts[..] else { return Err(JoinTokenError) };
        let is_hex = |text: &str| !text.is_empty() && text.len() <= 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
        if !is_hex(id) || !is_hex(secret) {
            return Err(JoinTokenError);
        }
        let authority = format!("sha256:{hash}").parse().map_err(|_| JoinTokenError)?;
        Ok(Self { id: id.to_owned(), secret: secret.to_owned(), authority })
    }
}

impl TryFrom<String> for JoinToken {
    type Error = JoinTokenError;
    fn try_from(text: String) -> Result<Self, JoinTokenError> {
        text.parse()
    }
}

impl From<JoinToken> for String {
    /// The whole token, secret included.
    fn from(token: JoinToken) -> String {
        format!("{PREFIX}.{}.{}.{}", token.id, token.secret, token.authority.hex())
    }
}

/// What a node says that wants to join.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct JoinRequest {
    /// The token.
    pub token: JoinToken,
    /// The name that it wants.
    pub node: NodeName,
    /// A PKCS #10 request for a certificate (RFC 2986), DER in base64. Only its key counts.
    pub request: String,
}

/// What a node says that wants another certificate. The one that it shows says who it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateRequest {
    /// A PKCS #10 request for a certificate (RFC 2986), DER in base64. Only its key counts.
    pub request: String,
}

/// A certificate, and whom to trust from now on.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CertificateAnswer {
    /// The chain, the leaf first, PEM.
    pub certificate: String,
    /// The authorities of the fleet, PEM: two while one follows another.
    pub roots: String,
    /// Where the node stands.
    pub region: Region,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn authorities_are_two_digests() {
        let both = Authorities { believed: Digest::of(b"a"), issuing: Digest::of(b"b") };
        assert_eq!(both.to_string().parse::<Authorities>().unwrap(), both);
        for bad in ["", "x", &both.believed.to_string(), &format!("{both} "), &format!("{both}0")] {
            assert!(bad.parse::<Authorities>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_token_is_read_as_it_is_written_and_does_not_show_its_secret() {
        let token = JoinToken { id: "0a".into(), secret: "beef".into(), authority: Digest::of(b"ca") };
        let text = String::from(token.clone());
        assert_eq!(text.parse::<JoinToken>().unwrap(), token);
        assert!(!format!("{token:?}").contains("beef"));
        for bad in ["", "sj1", "sj1.a.b", &text[1..], &format!("{text}0"), &text.replace("beef", "x y")] {
            assert!(bad.parse::<JoinToken>().is_err(), "{bad}");
        }
    }
}
