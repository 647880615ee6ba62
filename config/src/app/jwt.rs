//! What a route demands of a caller's token.

use serde::{Deserialize, Serialize};

use super::route::Pattern;

/// Signature algorithms that a rule may allow (RFC 7518 3.1, RFC 8037 3.1). There is no `none` and no HMAC: a
/// public key set can't hold a shared secret.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Algorithm {
    /// RSASSA-PKCS1-v1_5 with SHA-256.
    RS256,
    /// ECDSA on P-256 with SHA-256.
    ES256,
    /// Ed25519.
    EdDSA,
}

impl Algorithm {
    /// All of them, the default of a rule.
    pub const ALL: [Self; 3] = [Self::RS256, Self::ES256, Self::EdDSA];

    /// The `alg` value.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::RS256 => "RS256",
            Self::ES256 => "ES256",
            Self::EdDSA => "EdDSA",
        }
    }
}

/// Where an issuer's keys come from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum KeySource {
    /// The JWK set itself, as JSON text (RFC 7517 5), read from `jwks_file` when the app was published.
    Inline(String),
    /// An `https` URL that the node fetches and keeps fresh.
    Url(String),
}

/// An issuer whose tokens an app accepts.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Issuer {
    /// The `iss` claim, exactly (RFC 7519 4.1.1).
    pub issuer: String,
    /// One of these must be in `aud` (RFC 7519 4.1.3). Never empty.
    pub audiences: Vec<String>,
    /// The keys.
    pub keys: KeySource,
    /// What a token may be signed with. Never empty.
    pub algorithms: Vec<Algorithm>,
    /// Clock difference forgiven on `exp` and `nbf`, seconds.
    pub leeway_seconds: u64,
}

/// The rule of a component: which issuer, and which of its paths are free.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Rule {
    /// The name of an [`Issuer`] of the app.
    pub issuer: String,
    /// Paths that need no token.
    #[serde(default)]
    pub exempt: Vec<Pattern>,
}
