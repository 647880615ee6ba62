//! What the nodes of a place tell each other where others can read and write it: sealed with a key of their secret.
//!
//! Whoever knows the secret can open it, nobody else can read, change or make one. Each message says what it is about, and
//! opens only for that: one put in the place of another is none.

use crate::seal::Seal;
use crate::secret::{FrontSecret, RandomError};

/// Bytes of the name of a place, in hexadecimal digits twice as many.
const PLACE_BYTES: usize = 8;
/// Seals and opens what the nodes of one place tell each other.
pub struct PlaceSeal {
    seal: Seal,
    place: String,
}

impl FrontSecret {
    /// The key for what nodes of the place tell each other.
    pub fn place_seal(&self) -> PlaceSeal {
        let place = self.key::<PLACE_BYTES>(&[b"place name"]);
        PlaceSeal {
            seal: Seal::of(&self.key(&[b"place sealing"])),
            place: place.iter().map(|byte| format!("{byte:02x}")).collect(),
        }
    }
}

impl PlaceSeal {
    /// What nodes with this secret, and no others, call their place. It tells nothing of the secret.
    pub fn place(&self) -> &str {
        &self.place
    }

    /// Seals a message about something.
    ///
    /// # Errors
    /// [`RandomError`].
    pub fn seal(&self, about: &str, message: &[u8]) -> Result<Vec<u8>, RandomError> {
        self.seal.seal(about.as_bytes(), message.to_vec()).map_err(|_| RandomError)
    }

    /// The message, if it was sealed by a node of the place and is about this.
    pub fn open(&self, about: &str, sealed: &[u8]) -> Option<Vec<u8>> {
        self.seal.open_sealed(about.as_bytes(), sealed)
    }
}

impl std::fmt::Debug for PlaceSeal {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PlaceSeal").field("place", &self.place).finish_non_exhaustive()
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
        let (one, other) = (secret(b'a').place_seal(), secret(b'a').place_seal());
        let sealed = one.seal("a.test", b"key").unwrap();
        assert_eq!(other.open("a.test", &sealed).as_deref(), Some(&b"key"[..]));
        assert_eq!((one.place(), one.place().len()), (other.place(), PLACE_BYTES * 2));
        assert!(!sealed.windows(3).any(|window| window == b"key"));
        assert_ne!(sealed, one.seal("a.test", b"key").unwrap(), "each has a nonce of its own");
    }

    #[test]
    fn what_is_changed_of_another_place_or_about_something_else_does_not_open() {
        let (one, stranger) = (secret(b'a').place_seal(), secret(b'b').place_seal());
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
