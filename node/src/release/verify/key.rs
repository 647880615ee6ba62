//! Public keys of cosign key pairs.

use std::fmt;

use ring::signature::{ECDSA_P256_SHA256_ASN1, ED25519, UnparsedPublicKey};
use rustls::pki_types::SubjectPublicKeyInfoDer;
use rustls::pki_types::pem::{self, PemObject as _};
use selvage_config::Digest;

/// A SubjectPublicKeyInfo of P-256 up to the point (RFC 5480 2).
const P256_PREFIX: [u8; 27] = [
    0x30, 0x59, 0x30, 0x13, 0x06, 0x07, 0x2a, 0x86, 0x48, 0xce, 0x3d, 0x02, 0x01, 0x06, 0x08, 0x2a, 0x86, 0x48, 0xce,
    0x3d, 0x03, 0x01, 0x07, 0x03, 0x42, 0x00, 0x04,
];
/// Bytes of the two coordinates.
const P256_COORDINATES_BYTES: usize = 64;
/// A SubjectPublicKeyInfo of Ed25519 up to the key (RFC 8410 4).
const ED25519_PREFIX: [u8; 12] = [0x30, 0x2a, 0x30, 0x05, 0x06, 0x03, 0x2b, 0x65, 0x70, 0x03, 0x21, 0x00];
/// Bytes of an Ed25519 key.
const ED25519_BYTES: usize = 32;

/// A key that is trusted: ECDSA with P-256 and SHA-256, what `cosign generate-key-pair` makes, or Ed25519.
#[derive(Clone, PartialEq, Eq)]
pub struct PublicKey {
    algorithm: Algorithm,
    /// The key as ring takes it.
    key: Vec<u8>,
    spki: Vec<u8>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Algorithm {
    EcdsaP256,
    Ed25519,
}

/// Text that is no public key.
#[derive(Debug, thiserror::Error)]
pub enum KeyError {
    /// Not PEM, or without a `PUBLIC KEY` section.
    #[error("no PEM section PUBLIC KEY")]
    Pem(#[source] pem::Error),
    /// More than one: which one is meant?
    #[error("more than one public key")]
    Several,
    /// A key of another kind.
    #[error("neither an ECDSA P-256 nor an Ed25519 key")]
    Kind,
}

impl PublicKey {
    /// Reads a `cosign.pub`.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        let mut keys = SubjectPublicKeyInfoDer::pem_slice_iter(text);
        let spki = keys.next().unwrap_or(Err(pem::Error::NoItemsFound)).map_err(KeyError::Pem)?;
        if keys.next().is_some() {
            return Err(KeyError::Several);
        }
        Self::from_spki(&spki)
    }

    /// Reads a SubjectPublicKeyInfo in DER. DER has one spelling of each key, so a prefix tells the kind.
    ///
    /// # Errors
    /// [`KeyError::Kind`].
    pub fn from_spki(spki: &[u8]) -> Result<Self, KeyError> {
        // The point keeps its first byte 4, "uncompressed".
        let p256 = spki.strip_prefix(&P256_PREFIX).filter(|rest| rest.len() == P256_COORDINATES_BYTES);
        let ed25519 = spki.strip_prefix(&ED25519_PREFIX).filter(|rest| rest.len() == ED25519_BYTES);
        let (algorithm, key) = match (p256, ed25519) {
            (Some(_), _) => (Algorithm::EcdsaP256, spki[P256_PREFIX.len() - 1..].to_vec()),
            (_, Some(key)) => (Algorithm::Ed25519, key.to_vec()),
            (None, None) => return Err(KeyError::Kind),
        };
        Ok(Self { algorithm, key, spki: spki.to_vec() })
    }

    /// Whether `signature` is this key's over `message`.
    pub(crate) fn accepts(&self, message: &[u8], signature: &[u8]) -> bool {
        let accepted = match self.algorithm {
            Algorithm::EcdsaP256 => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.key).verify(message, signature)
            }
            Algorithm::Ed25519 => UnparsedPublicKey::new(&ED25519, &self.key).verify(message, signature),
        };
        accepted.is_ok()
    }

    /// The key in DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }
}

/// Shown by its hash, as cosign's hints name it.
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?} {})", self.algorithm, Digest::of(&self.spki).short())
    }
}
