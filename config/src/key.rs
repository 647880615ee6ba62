//! Keys that sign: the public ones as documents name them, the private ones as programs hold them.

use std::fmt;

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use ring::rand::SystemRandom;
use ring::signature::{
    ECDSA_P256_SHA256_ASN1, ECDSA_P256_SHA256_ASN1_SIGNING, ED25519, EcdsaKeyPair, KeyPair as _, UnparsedPublicKey,
};
use rustls_pki_types::pem::{self, PemObject as _};
use rustls_pki_types::{PrivatePkcs8KeyDer, SubjectPublicKeyInfoDer};
use serde::{Deserialize, Serialize};

use crate::Digest;

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

/// Which key: the SHA-256 of its SubjectPublicKeyInfo, written as a digest.
pub type KeyId = Digest;

/// A public key: ECDSA with P-256 and SHA-256, what `cosign generate-key-pair` makes, or Ed25519.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
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
    /// Not base64.
    #[error("key is not base64")]
    Base64,
    /// A private key that is none, or of another kind.
    #[error("no PKCS #8 private key of ECDSA P-256")]
    Private,
    /// The system gave no random bytes.
    #[error("no random bytes")]
    Random,
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
    pub fn accepts(&self, message: &[u8], signature: &[u8]) -> bool {
        let accepted = match self.algorithm {
            Algorithm::EcdsaP256 => {
                UnparsedPublicKey::new(&ECDSA_P256_SHA256_ASN1, &self.key).verify(message, signature)
            }
            Algorithm::Ed25519 => UnparsedPublicKey::new(&ED25519, &self.key).verify(message, signature),
        };
        accepted.is_ok()
    }

    /// The key in PEM, as a `cosign.pub` has it.
    pub fn to_pem(&self) -> String {
        pem("PUBLIC KEY", &self.spki)
    }

    /// The key in DER.
    pub fn spki(&self) -> &[u8] {
        &self.spki
    }

    /// Which key it is.
    pub fn id(&self) -> KeyId {
        Digest::of(&self.spki)
    }

    /// Whether it is an ECDSA P-256 key: the kind that a transparency log takes.
    pub fn is_p256(&self) -> bool {
        self.algorithm == Algorithm::EcdsaP256
    }
}

/// As documents hold it: base64 of the SubjectPublicKeyInfo.
impl TryFrom<String> for PublicKey {
    type Error = KeyError;
    fn try_from(text: String) -> Result<Self, KeyError> {
        Self::from_spki(&STANDARD.decode(text).map_err(|_| KeyError::Base64)?)
    }
}

impl From<PublicKey> for String {
    fn from(key: PublicKey) -> String {
        STANDARD.encode(key.spki)
    }
}

/// Shown by its hash, as cosign's hints name it.
impl fmt::Debug for PublicKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PublicKey({:?} {})", self.algorithm, Digest::of(&self.spki).short())
    }
}

/// A private key of ECDSA P-256.
pub struct PrivateKey {
    pair: EcdsaKeyPair,
    pkcs8: Vec<u8>,
}

impl PrivateKey {
    /// A new key.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn generate() -> Result<Self, KeyError> {
        let document = EcdsaKeyPair::generate_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, &SystemRandom::new());
        Self::from_pkcs8(document.map_err(|_| KeyError::Random)?.as_ref())
    }

    /// Reads PKCS #8 in DER.
    ///
    /// # Errors
    /// [`KeyError::Private`].
    pub fn from_pkcs8(pkcs8: &[u8]) -> Result<Self, KeyError> {
        let pair = EcdsaKeyPair::from_pkcs8(&ECDSA_P256_SHA256_ASN1_SIGNING, pkcs8, &SystemRandom::new());
        Ok(Self { pair: pair.map_err(|_| KeyError::Private)?, pkcs8: pkcs8.to_vec() })
    }

    /// Reads a PEM section `PRIVATE KEY`: a key without a password, for a program that signs by itself.
    ///
    /// # Errors
    /// [`KeyError`].
    pub fn from_pem(text: &[u8]) -> Result<Self, KeyError> {
        let key = PrivatePkcs8KeyDer::from_pem_slice(text).map_err(KeyError::Pem)?;
        Self::from_pkcs8(key.secret_pkcs8_der())
    }

    /// Signs `message`: ECDSA over its SHA-256, in ASN.1.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn sign(&self, message: &[u8]) -> Result<Vec<u8>, KeyError> {
        let signature = self.pair.sign(&SystemRandom::new(), message).map_err(|_| KeyError::Random)?;
        Ok(signature.as_ref().to_vec())
    }

    /// The public half.
    pub fn public(&self) -> PublicKey {
        let key = self.pair.public_key().as_ref();
        let mut spki = P256_PREFIX[..P256_PREFIX.len() - 1].to_vec();
        spki.extend_from_slice(key);
        PublicKey { algorithm: Algorithm::EcdsaP256, key: key.to_vec(), spki }
    }

    /// PKCS #8 in DER: a secret.
    pub fn pkcs8(&self) -> &[u8] {
        &self.pkcs8
    }

    /// The same in PEM, without a password: a secret.
    pub fn to_pem(&self) -> String {
        pem("PRIVATE KEY", &self.pkcs8)
    }
}

/// PEM (RFC 7468 2) with lines of 64 characters.
pub fn pem(label: &str, bytes: &[u8]) -> String {
    let encoded = STANDARD.encode(bytes);
    let lines: Vec<&str> = encoded.as_bytes().chunks(64).filter_map(|line| std::str::from_utf8(line).ok()).collect();
    format!("-----BEGIN {label}-----\n{}\n-----END {label}-----\n", lines.join("\n"))
}

/// Shown by its public half.
impl fmt::Debug for PrivateKey {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "PrivateKey(of {:?})", self.public())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_signature_is_accepted_by_the_public_half_alone() {
        let (key, other) = (PrivateKey::generate().unwrap(), PrivateKey::generate().unwrap());
        let signature = key.sign(b"message").unwrap();
        assert!(key.public().accepts(b"message", &signature));
        assert!(!key.public().accepts(b"massage", &signature));
        assert!(!other.public().accepts(b"message", &signature));
    }

    #[test]
    fn a_key_is_read_as_it_was_written() {
        let key = PrivateKey::generate().unwrap();
        let public = key.public();
        let json = serde_json::to_string(&public).unwrap();
        assert_eq!(serde_json::from_str::<PublicKey>(&json).unwrap(), public);
        assert_eq!(PublicKey::from_spki(public.spki()).unwrap(), public);
        assert_eq!(PrivateKey::from_pkcs8(key.pkcs8()).unwrap().public(), public);
        assert_eq!(PrivateKey::from_pem(key.to_pem().as_bytes()).unwrap().public(), public);
        assert_eq!(PublicKey::from_pem(public.to_pem().as_bytes()).unwrap(), public);
        for bad in ["\"\"", "\"AAAA\"", "\"!\""] {
            assert!(serde_json::from_str::<PublicKey>(bad).is_err(), "{bad}");
        }
    }

    #[test]
    fn debug_shows_no_secret() {
        let key = PrivateKey::generate().unwrap();
        let shown = format!("{key:?}");
        assert!(!shown.contains(&hex::encode(&key.pkcs8()[40..48])) && shown.len() < 80, "{shown}");
    }
}
