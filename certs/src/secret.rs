//! The secret that the nodes of a point of presence share, and the keys that come of it.
//!
//! A client that comes back reaches any node there. With one secret every one of them takes the session ticket, the QUIC
//! token and the stateless reset of every other, also after a restart. Each use has a key of its own (HKDF, RFC 5869, with
//! the use as its info), so none of them tells anything of another, or of the secret.

use std::fmt;
use std::path::Path;
use std::sync::Arc;

use ring::hkdf::{HKDF_SHA256, HKDF_SHA512, KeyType, Prk, Salt};
use ring::hmac::{self, HMAC_SHA256};
use ring::rand::{SecureRandom, SystemRandom};
use rustls::server::ProducesTickets;

use crate::files::{self, FileError};
use crate::tickets::Tickets;

/// Bytes that a secret has at least: as strong as the keys that come of it.
const SECRET_BYTES_MIN: usize = 32;
/// Bytes that a secret has at most.
const SECRET_BYTES_MAX: usize = 4 * 1024;
/// What sets our keys apart from those that somebody else derives from the same bytes.
const SALT: &[u8] = b"selvage front 1";

/// The secret of a point of presence. Clones share it.
#[derive(Clone)]
pub struct FrontSecret {
    prk: Prk,
}

/// A key of so many bytes.
struct Bytes(usize);

impl KeyType for Bytes {
    fn len(&self) -> usize {
        self.0
    }
}

/// There were no random bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("no random bytes")]
pub struct RandomError;

impl FrontSecret {
    /// A secret that nobody else has: tickets and tokens end with the process.
    pub fn random() -> Result<Self, RandomError> {
        let mut bytes = [0; SECRET_BYTES_MIN];
        SystemRandom::new().fill(&mut bytes).map_err(|_| RandomError)?;
        Ok(Self::of(&bytes))
    }

    /// Reads the file that the nodes of a point of presence share: 32 bytes or more. White space at its end is not part
    /// of the secret, so `openssl rand -hex 32 > pop.secret` makes one.
    pub fn load(path: &Path) -> Result<Self, FileError> {
        let bytes = files::read(path)?;
        let secret = bytes.trim_ascii_end();
        if !(SECRET_BYTES_MIN..=SECRET_BYTES_MAX).contains(&secret.len()) {
            return Err(FileError::Secret {
                path: path.to_owned(),
                found: secret.len(),
                min: SECRET_BYTES_MIN,
                max: SECRET_BYTES_MAX,
            });
        }
        Ok(Self::of(secret))
    }

    fn of(bytes: &[u8]) -> Self {
        Self { prk: Salt::new(HKDF_SHA256, SALT).extract(bytes) }
    }

    /// What session tickets are sealed with (RFC 8446 4.6.1).
    pub fn tickets(&self) -> Arc<dyn ProducesTickets> {
        Arc::new(Tickets::new(self.clone()))
    }

    /// What QUIC's address validation tokens are sealed with (RFC 9000 8.1.4).
    pub fn quic_token_key(&self) -> Prk {
        Salt::new(HKDF_SHA512, SALT).extract(&self.key::<64>(&[b"quic token"]))
    }

    /// What QUIC's stateless resets are made with (RFC 9000 10.3.2).
    pub fn quic_reset_key(&self) -> hmac::Key {
        hmac::Key::new(HMAC_SHA256, &self.key::<32>(&[b"quic reset"]))
    }

    /// The key of one use. `info` must differ between any two.
    pub(crate) fn key<const N: usize>(&self, info: &[&[u8]]) -> [u8; N] {
        const { assert!(N <= 255 * 32, "RFC 5869 2.3: more than the hash can give") };
        let mut key = [0; N];
        let expanded = self.prk.expand(info, Bytes(N)).and_then(|okm| okm.fill(&mut key));
        expanded.expect("the length is one that the hash can give");
        key
    }
}

impl fmt::Debug for FrontSecret {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("FrontSecret").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(text: &[u8]) -> Result<FrontSecret, FileError> {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("pop.secret");
        std::fs::write(&path, text).unwrap();
        FrontSecret::load(&path)
    }

    fn token(secret: &FrontSecret) -> [u8; 32] {
        let (prk, mut out) = (secret.quic_token_key(), [0; 32]);
        prk.expand(&[b"x"], Bytes(32)).unwrap().fill(&mut out).unwrap();
        out
    }

    fn reset(secret: &FrontSecret) -> Vec<u8> {
        hmac::sign(&secret.quic_reset_key(), b"cid").as_ref().to_vec()
    }

    #[test]
    fn nodes_with_one_secret_have_the_same_keys_and_others_have_not() {
        let one = load(&[b'a'; 32]).unwrap();
        let same = load(&[&[b'a'; 32][..], b"\n"].concat()).unwrap();
        let other = load(&[b'b'; 32]).unwrap();
        assert_eq!((token(&one), reset(&one)), (token(&same), reset(&same)));
        assert_ne!(token(&one), token(&other));
        assert_ne!(reset(&one), reset(&other));
        assert_ne!(reset(&FrontSecret::random().unwrap()), reset(&FrontSecret::random().unwrap()));
    }

    #[test]
    fn every_use_has_a_key_of_its_own() {
        let secret = load(&[b'a'; 32]).unwrap();
        assert_ne!(secret.key::<32>(&[b"quic token"]), secret.key::<32>(&[b"quic reset"]));
        assert_ne!(secret.key::<32>(&[b"a"])[..], secret.key::<32>(&[b"b"])[..]);
    }

    #[test]
    fn a_secret_that_could_be_guessed_is_refused() {
        for text in [&b""[..], b"secret", &[b'a'; 31], &[b' '; 64], &[b'a'; 5_000]] {
            let error = load(text).unwrap_err();
            assert!(matches!(error, FileError::Secret { .. }), "{error:?}");
            assert!(error.to_string().contains("pop.secret"), "{error}");
        }
        assert!(matches!(FrontSecret::load(Path::new("/nowhere/pop.secret")), Err(FileError::Read { .. })));
    }

    #[test]
    fn a_secret_is_not_shown() {
        assert_eq!(format!("{:?}", load(&[b'a'; 32]).unwrap()), "FrontSecret { .. }");
    }
}
