//! Content addresses: `sha256:` and 64 lower-case hexadecimal digits, as OCI writes them.

use std::fmt;

use serde::{Deserialize, Serialize};

/// SHA-256 of some bytes (OCI image-spec 1.1, descriptor.md, "Digests").
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Digest([u8; 32]);

/// Text that is no `sha256:` digest.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DigestError {
    /// It is none.
    #[error("{0:?} is no digest: expected sha256: and 64 lower-case hexadecimal digits")]
    Malformed(String),
    /// It may be one of an algorithm that OCI registers or somebody made up.
    #[error("{0:?} is a digest by {1}, which is not supported: only sha256 is")]
    Algorithm(String, String),
}

impl Digest {
    /// Hashes `bytes`. The only way to learn a digest from content: never believe a header.
    pub fn of(bytes: &[u8]) -> Self {
        let hash = ring::digest::digest(&ring::digest::SHA256, bytes);
        let mut out = [0; 32];
        out.copy_from_slice(hash.as_ref());
        Self(out)
    }

    /// A digest from a hash that was computed piecewise with [`ring::digest::SHA256`].
    pub const fn from_sha256(hash: [u8; 32]) -> Self {
        Self(hash)
    }

    /// The 64 hexadecimal digits, without the algorithm: the form for file names and tags.
    pub fn hex(&self) -> String {
        hex::encode(self.0)
    }

    /// The first 12 digits, for people.
    pub fn short(&self) -> String {
        hex::encode(&self.0[..6])
    }

    /// The hash itself.
    pub fn as_bytes(&self) -> &[u8; 32] {
        &self.0
    }
}

impl std::str::FromStr for Digest {
    type Err = DigestError;
    fn from_str(text: &str) -> Result<Self, DigestError> {
        let shown = || text.chars().take(80).collect();
        let error = || DigestError::Malformed(shown());
        // OCI image-spec 1.1, descriptor.md: algorithm, ':', encoded.
        let digits = match text.split_once(':') {
            Some(("sha256", digits)) => digits,
            Some((algorithm, encoded)) if is_algorithm(algorithm) && !encoded.is_empty() => {
                return Err(DigestError::Algorithm(shown(), algorithm.to_owned()));
            }
            _ => return Err(error()),
        };
        if digits.len() != 64 || digits.bytes().any(|b| b.is_ascii_uppercase()) {
            return Err(error());
        }
        let mut out = [0; 32];
        hex::decode_to_slice(digits, &mut out).map_err(|_| error())?;
        Ok(Self(out))
    }
}

/// Whether it could name an algorithm.
fn is_algorithm(text: &str) -> bool {
    (1..=32).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b"+._-".contains(&b))
}

impl TryFrom<String> for Digest {
    type Error = DigestError;
    fn try_from(text: String) -> Result<Self, DigestError> {
        text.parse()
    }
}

impl From<Digest> for String {
    fn from(digest: Digest) -> String {
        digest.to_string()
    }
}

impl fmt::Display for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sha256:{}", self.hex())
    }
}

impl fmt::Debug for Digest {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const EMPTY: &str = "sha256:e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855";

    #[test]
    fn a_digest_is_the_hash_of_the_bytes() {
        assert_eq!(Digest::of(b"").to_string(), EMPTY);
        assert_eq!(EMPTY.parse(), Ok(Digest::of(b"")));
    }

    #[test]
    fn another_algorithm_is_named() {
        let text = format!("sha512:{}", "0".repeat(128));
        let error = text.parse::<Digest>().unwrap_err();
        assert!(matches!(&error, DigestError::Algorithm(_, algorithm) if algorithm == "sha512"), "{error}");
        assert!(error.to_string().contains("sha512, which is not supported"), "{error}");
        for bad in ["sha512:", ":00", "SHA512:00", "a b:00", "00"] {
            assert!(matches!(bad.parse::<Digest>(), Err(DigestError::Malformed(_))), "{bad}");
        }
    }

    #[test]
    fn other_spellings_are_refused() {
        for bad in ["", "sha256:", &EMPTY.to_uppercase(), &EMPTY[7..], &EMPTY[..70], "sha512:00", &format!("{EMPTY}0")]
        {
            assert!(bad.parse::<Digest>().is_err(), "{bad}");
        }
    }
}
