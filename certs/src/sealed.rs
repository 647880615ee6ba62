//! What the nodes of a place tell each other where others can read and write it: sealed with a key of their secret.
//!
//! Whoever knows the secret can open it, nobody else can read, change or make one. Each message says what it is about, and
//! opens only for that: one put in the place of another is none.

use ring::aead::{AES_256_GCM, Aad, LessSafeKey, NONCE_LEN, Nonce, UnboundKey};
use ring::rand::{SecureRandom, SystemRandom};

use crate::secret::{FrontSecret, RandomError};

/// Bytes of the name of a place, in hexadecimal digits twice as many.
const PLACE_BYTES: usize = 8;
/// Bytes of the key.
const KEY_BYTES: usize = 32;

/// Seals and opens what the nodes of one place tell each other.
pub struct Sealing {
    key: LessSafeKey,
    place: String,
}

impl FrontSecret {
    /// The key for what nodes of the place tell each other.
    pub fn sealing(&self) -> Sealing {
        let key = UnboundKey::new(&AES_256_GCM, &self.key::<KEY_BYTES>(&[b"place sealing"]));
        let place = self.key::<PLACE_BYTES>(&[b"place name"]);
        Sealing {
            key: LessSafeKey::new(key.expect("the key is as long as the algorithm's")),
            place: place.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

impl Sealing {
    /// What nodes with this secret, and no others, call their place. It tells nothing of the secret.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Seals a message about something. The nonce is random, which is safe for four thousand million messages (NIST SP
    /// 800-38D 8.3): a place has a few for each certificate.
    ///
    /// # Errors
    /// [`RandomError`].
    pub fn seal(&self, about: &str, message: &[u8]) -> Result<Vec<u8>, RandomError> {
        let mut nonce = [0; NONCE_LEN];
        SystemRandom::new().fill(&mut nonce).map_err(|_| RandomError)?;
        let mut sealed = message.to_vec();
        let about = Aad::from(about.as_bytes());
        let done = self.key.seal_in_place_append_tag(Nonce::assume_unique_for_key(nonce), about, &mut sealed);
        done.map_err(|_| RandomError)?;
        Ok([&nonce[..], &sealed].concat())
    }

    /// The message, if it was sealed by a node of the place and is about this.
    pub fn open(&self, about: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        let (nonce, rest) = sealed.split_first_chunk::<NONCE_LEN>()?;
        let mut message = rest.to_vec();
        let about = Aad::from(about.as_bytes());
        let length = self.key.open_in_place(Nonce::assume_unique_for_key(*nonce), about, &mut message).ok()?.len();
        message.truncate(length);
        Some(message)
    }
}

impl std::fmt::Debug for Sealing {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Sealing").field("place", &self.place).finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn secret(byte: u8) -> FrontSecret {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), [byte; 32]).unwrap();
        FrontSecret::load(file.path()).unwrap()
    }

    #[test]
    fn what_one_node_seals_another_with_its_secret_opens() {
        let (one, other) = (secret(b'a').sealing(), secret(b'a').sealing());
        let sealed = one.seal("a.test", b"key").unwrap();
        assert_eq!(other.open("a.test", &sealed).as_deref(), Some(&b"key"[..]));
        assert_eq!((one.place(), one.place().len()), (other.place(), PLACE_BYTES * 2));
        assert!(!sealed.windows(3).any(|window| window == b"key"));
        assert_ne!(sealed, one.seal("a.test", b"key").unwrap(), "each has a nonce of its own");
    }

    #[test]
    fn what_is_changed_of_another_place_or_about_something_else_does_not_open() {
        let (one, stranger) = (secret(b'a').sealing(), secret(b'b').sealing());
        let sealed = one.seal("a.test", b"key").unwrap();
        assert_ne!(one.place(), stranger.place());
        assert_eq!(stranger.open("a.test", &sealed), None);
        assert_eq!(one.open("b.test", &sealed), None);
        for at in 0..sealed.len() {
            let mut changed = sealed.clone();
            changed[at] ^= 1;
            assert_eq!(one.open("a.test", &changed), None, "{at}");
        }
        for length in 0..sealed.len() {
            assert_eq!(one.open("a.test", &sealed[..length]), None, "{length}");
        }
    }
}
