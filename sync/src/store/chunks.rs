//! Values too large for one entry: their bytes are entries of their own, and the key's value says which.
//!
//! A chunk's key begins with [`HIDDEN`], names the node that wrote it and the upload, and is written once: so two nodes
//! that set the same key at the same time never mix their chunks, and whichever value wins is whole. All chunks are
//! written, and have numbers, before the value that names them: a peer that has the value has them too, or is about to.
//! What the SHA-256 of all bytes does not confirm is not served.

use bytes::{Buf as _, BufMut as _, Bytes};
use ring::digest::{SHA256, digest};
use selvage_config::{NodeName, StoreName};

use super::{Kv, KvError, terms};
use crate::entry::VALUE_BYTES_MAX;
use crate::replica::Write;

/// Longest value of a key, bytes.
pub const LARGE_BYTES_MAX: usize = 25 * 1024 * 1024;

/// The first character of the keys of chunks. It sorts behind all others and is no character of any text.
pub const HIDDEN: char = '\u{10ffff}';

/// Bytes of a chunk.
const CHUNK_BYTES: usize = 512 * 1024;

/// How the value of a key begins whose bytes are chunks. A value that begins so by itself becomes a chunk too.
const MARK: &[u8] = b"\0selvage-chunks\x01";

const HASH_BYTES: usize = 32;

/// Where a large value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Manifest {
    node: NodeName,
    upload: u64,
    bytes: u64,
    sum: [u8; HASH_BYTES],
}

impl Manifest {
    pub(super) fn encode(&self) -> Bytes {
        let mut out = MARK.to_vec();
        out.put_u64(self.upload);
        out.put_u64(self.bytes);
        out.put_slice(&self.sum);
        out.put_slice(self.node.as_str().as_bytes());
        out.into()
    }

    /// None if `value` is one by itself. Metadata may be in front of either.
    pub(super) fn of(value: &Bytes) -> Option<Self> {
        let (_, value) = terms::parts(value);
        let mut rest = value.strip_prefix(MARK)?;
        let upload = rest.try_get_u64().ok()?;
        let bytes = rest.try_get_u64().ok()?;
        let (sum, node) = rest.split_first_chunk()?;
        let node = std::str::from_utf8(node).ok()?.parse().ok()?;
        Some(Self { node, upload, bytes, sum: *sum })
    }

    /// The length of the whole value.
    pub(super) fn bytes(&self) -> usize {
        usize::try_from(self.bytes).unwrap_or(usize::MAX)
    }

    /// Which upload of its node made it.
    pub(super) fn upload(&self) -> u64 {
        self.upload
    }

    /// Whether this node wrote it.
    pub(super) fn is_of(&self, node: &NodeName) -> bool {
        self.node == *node
    }

    fn keys(&self) -> impl Iterator<Item = String> {
        // A length that no writer makes must not make a reader look for ever.
        let chunks = self.bytes().min(LARGE_BYTES_MAX).div_ceil(CHUNK_BYTES);
        let prefix = own_chunks(&self.node);
        (0..chunks).map(move |number| format!("{prefix}{:016x}/{number:04}", self.upload))
    }
}

/// How the keys of chunks begin that a node wrote.
pub(super) fn own_chunks(node: &NodeName) -> String {
    format!("{HIDDEN}chunk/{node}/")
}

/// The upload that a chunk's key is of.
pub(super) fn upload_of(key: &str) -> Option<u64> {
    let mut fields = key.strip_prefix(HIDDEN)?.split('/').skip(2);
    u64::from_str_radix(fields.next()?, 16).ok()
}

/// Whether a value can't be kept as it is.
pub(super) fn must_be_chunked(value: &Bytes) -> bool {
    value.len() > VALUE_BYTES_MAX || value.starts_with(MARK) || terms::is_marked(value)
}

fn sum(value: &[u8]) -> [u8; HASH_BYTES] {
    let mut sum = [0; HASH_BYTES];
    sum.copy_from_slice(digest(&SHA256, value).as_ref());
    sum
}

impl Kv {
    /// Writes the chunks of a value, which end when it does. Returns what names them.
    pub(super) async fn put_chunks(
        &self,
        store: &StoreName,
        value: Bytes,
        expires_ms: Option<u64>,
    ) -> Result<Manifest, KvError> {
        let manifest = Manifest {
            node: self.shared.node.clone(),
            upload: rand::random(),
            bytes: value.len() as u64,
            sum: sum(&value),
        };
        let mut rest = value;
        for key in manifest.keys() {
            let chunk = rest.split_to(rest.len().min(CHUNK_BYTES));
            let write = Write::Set { value: chunk, expires_ms };
            if let Err(error) = self.write(store, &key, write, None).await {
                self.remove_chunks(store, &manifest).await;
                return Err(error);
            }
        }
        Ok(manifest)
    }

    /// The value that a manifest names.
    pub(super) fn get_chunks(&self, store: &StoreName, key: &str, manifest: &Manifest) -> Result<Bytes, KvError> {
        let mut value = Vec::with_capacity(manifest.bytes().min(LARGE_BYTES_MAX));
        for chunk in manifest.keys() {
            match self.raw(store, &chunk)? {
                Some(bytes) => value.extend_from_slice(&bytes),
                None => return Err(KvError::Incomplete { key: key.to_owned() }),
            }
        }
        if sum(&value) == manifest.sum { Ok(value.into()) } else { Err(KvError::Corrupt { key: key.to_owned() }) }
    }

    /// Deletes the chunks of a value that was replaced. What fails stays and does no harm but take space.
    pub(super) async fn remove_chunks(&self, store: &StoreName, manifest: &Manifest) {
        for key in manifest.keys() {
            if let Err(error) = self.write(store, &key, Write::Delete, None).await {
                return tracing::warn!(%store, %error, "chunks of a replaced value stay");
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_is_read_back_and_nothing_else_is_one() {
        let manifest = Manifest { node: "fra-1".parse().unwrap(), upload: 7, bytes: 1_500_000, sum: [3; 32] };
        let value = manifest.encode();
        assert_eq!(Manifest::of(&value), Some(manifest.clone()));
        assert!(must_be_chunked(&value));
        let keys: Vec<String> = manifest.keys().collect();
        assert_eq!((keys.len(), keys[2].as_str()), (3, "\u{10ffff}chunk/fra-1/0000000000000007/0002"));
        assert_eq!(upload_of(&keys[2]), Some(7));
        assert!(keys[2].starts_with(&own_chunks(&"fra-1".parse().unwrap())));
        for length in 0..value.len() - "fra-1".len() + 1 {
            assert_eq!(Manifest::of(&value.slice(..length)), None, "{length}");
        }
        let endless = Manifest { bytes: u64::MAX, ..manifest };
        assert_eq!(endless.keys().count(), LARGE_BYTES_MAX / CHUNK_BYTES);
        assert!(!must_be_chunked(&Bytes::from_static(b"text")));
    }
}
