//! The registry's records: which repository has which blobs, manifests and tags, and what refers to what.
//!
//! A digest's bytes lie in one file, whichever repositories have it. The catalog counts who has it by one key for
//! each, so that the last to let go is known.

use std::collections::BTreeSet;

use selvage_config::Digest;
use selvage_config::oci::{Descriptor, Repository};
use serde::{Deserialize, Serialize};
use sled::{Batch, Tree};

use super::RegistryError;
use crate::state::KeyValue;

/// Kinds of keys. After the kind comes the repository, a zero byte, and what it has.
const BLOB: u8 = b'b';
const MANIFEST: u8 = b'm';
const REFERRER: u8 = b'r';
const TAG: u8 = b't';
/// After this kind come a digest, the kind that has it, and the repository.
const HOLDER: u8 = b'h';

/// What is known of a manifest without reading it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct ManifestRecord {
    pub(crate) media_type: String,
    pub(crate) size: u64,
    /// Every blob and manifest that it names.
    pub(crate) references: Vec<Digest>,
    /// What it is about, and how the referrers list shows it.
    pub(crate) subject: Option<(Digest, Descriptor)>,
    /// When it was last pushed or asked for by a release, milliseconds since 1970.
    #[serde(default)]
    pub(crate) touched_ms: u64,
}

/// What is known of a blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct BlobRecord {
    pub(crate) size: u64,
    /// When it was last pushed, mounted or asked for, milliseconds since 1970.
    pub(crate) touched_ms: u64,
}

/// The records.
#[derive(Debug)]
pub(crate) struct Catalog(Tree);

/// Whether some repository still has a digest's bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Held {
    Somewhere,
    Nowhere,
}

impl Catalog {
    pub(crate) fn new(tree: Tree) -> Self {
        Self(tree)
    }

    /// The size of a blob that `repository` has.
    pub(crate) fn blob(&self, repository: &Repository, digest: &Digest) -> Result<Option<u64>, RegistryError> {
        Ok(self.blob_record(repository, digest)?.map(|record| record.size))
    }

    /// What is known of a blob that `repository` has.
    pub(crate) fn blob_record(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<BlobRecord>, RegistryError> {
        let bytes = self.0.get(key(BLOB, repository, digest.as_bytes()))?;
        bytes.map(|bytes| read_blob(&bytes)).transpose()
    }

    /// Notes that `repository` has a blob.
    pub(crate) fn add_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        record: BlobRecord,
    ) -> Result<(), RegistryError> {
        let mut batch = Batch::default();
        let value = [record.size.to_be_bytes(), record.touched_ms.to_be_bytes()].concat();
        batch.insert(key(BLOB, repository, digest.as_bytes()), value);
        batch.insert(holder(digest, BLOB, repository), &[]);
        self.commit(batch)
    }

    /// Notes that `repository` no longer has a blob. None if it never had.
    pub(crate) fn remove_blob(&self, repository: &Repository, digest: &Digest) -> Result<Option<Held>, RegistryError> {
        if self.blob(repository, digest)?.is_none() {
            return Ok(None);
        }
        let mut batch = Batch::default();
        batch.remove(key(BLOB, repository, digest.as_bytes()));
        batch.remove(holder(digest, BLOB, repository));
        self.commit(batch)?;
        self.held(digest).map(Some)
    }

    /// A manifest that `repository` has.
    pub(crate) fn manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<ManifestRecord>, RegistryError> {
        let bytes = self.0.get(key(MANIFEST, repository, digest.as_bytes()))?;
        bytes.map(|bytes| read(&bytes, "manifest")).transpose()
    }

    /// Notes a manifest, and the tag that names it.
    pub(crate) fn add_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        record: &ManifestRecord,
        tag: Option<&str>,
    ) -> Result<(), RegistryError> {
        let mut batch = Batch::default();
        batch.insert(key(MANIFEST, repository, digest.as_bytes()), write(record));
        batch.insert(holder(digest, MANIFEST, repository), &[]);
        if let Some(tag) = tag {
            batch.insert(key(TAG, repository, tag.as_bytes()), digest.as_bytes());
        }
        if let Some((subject, descriptor)) = &record.subject {
            batch.insert(referrer(repository, subject, digest), write(descriptor));
        }
        self.commit(batch)
    }

    /// Notes that `repository` no longer has a manifest, nor tags of it. None if it never had.
    pub(crate) fn remove_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<Held>, RegistryError> {
        let Some(record) = self.manifest(repository, digest)? else { return Ok(None) };
        let mut batch = Batch::default();
        batch.remove(key(MANIFEST, repository, digest.as_bytes()));
        batch.remove(holder(digest, MANIFEST, repository));
        if let Some((subject, _)) = &record.subject {
            batch.remove(referrer(repository, subject, digest));
        }
        for entry in self.0.scan_prefix(key(TAG, repository, &[])) {
            let (tag, named) = entry?;
            if named.as_ref() == digest.as_bytes() {
                batch.remove(tag);
            }
        }
        self.commit(batch)?;
        self.held(digest).map(Some)
    }

    /// A manifest of `repository` that names `digest`.
    pub(crate) fn referenced_by(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<Digest>, RegistryError> {
        let prefix = key(MANIFEST, repository, &[]);
        for entry in self.0.scan_prefix(&prefix) {
            let (manifest, bytes) = entry?;
            let record: ManifestRecord = read(&bytes, "manifest")?;
            if record.references.contains(digest) {
                return digest_of(&manifest[prefix.len()..]).map(Some);
            }
        }
        Ok(None)
    }

    /// What a tag names.
    pub(crate) fn tag(&self, repository: &Repository, tag: &str) -> Result<Option<Digest>, RegistryError> {
        let bytes = self.0.get(key(TAG, repository, tag.as_bytes()))?;
        bytes.map(|bytes| digest_of(&bytes)).transpose()
    }

    /// Removes a tag, not what it names. False if there was none.
    pub(crate) fn remove_tag(&self, repository: &Repository, tag: &str) -> Result<bool, RegistryError> {
        let had = self.0.remove(key(TAG, repository, tag.as_bytes()))?.is_some();
        self.0.flush()?;
        Ok(had)
    }

    /// At most `max` tags after `last`, in the order of their bytes, and whether there are more.
    pub(crate) fn tags(
        &self,
        repository: &Repository,
        last: &str,
        max: usize,
    ) -> Result<(Vec<String>, bool), RegistryError> {
        let prefix = key(TAG, repository, &[]);
        let mut tags = Vec::new();
        for entry in self.0.range(key(TAG, repository, last.as_bytes())..) {
            let (found, _) = entry?;
            let Some(tag) = found.strip_prefix(prefix.as_slice()) else { break };
            if tag == last.as_bytes() {
                continue;
            }
            if tags.len() >= max {
                return Ok((tags, true));
            }
            tags.push(String::from_utf8_lossy(tag).into_owned());
        }
        Ok((tags, false))
    }

    /// What refers to `subject`, after the digest `last`, until `take` has enough; and whether there is more.
    pub(crate) fn referrers(
        &self,
        repository: &Repository,
        subject: &Digest,
        last: Option<&Digest>,
        mut take: impl FnMut(Descriptor) -> bool,
    ) -> Result<bool, RegistryError> {
        let prefix = key(REFERRER, repository, subject.as_bytes());
        let start = last.map_or_else(|| prefix.clone(), |last| referrer(repository, subject, last));
        for entry in self.0.range(start..) {
            let (found, bytes) = entry?;
            let Some(digest) = found.strip_prefix(prefix.as_slice()) else { break };
            if last.is_some_and(|last| last.as_bytes() == digest) {
                continue;
            }
            if !take(read(&bytes, "referrer")?) {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Every blob of `repository`.
    pub(crate) fn blobs(&self, repository: &Repository) -> Result<Vec<(Digest, BlobRecord)>, RegistryError> {
        let prefix = key(BLOB, repository, &[]);
        let read = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (found, bytes) = entry?;
            Ok((digest_of(&found[prefix.len()..])?, read_blob(&bytes)?))
        };
        self.0.scan_prefix(&prefix).map(read).collect()
    }

    /// Every manifest of `repository`.
    pub(crate) fn manifests(&self, repository: &Repository) -> Result<Vec<(Digest, ManifestRecord)>, RegistryError> {
        let prefix = key(MANIFEST, repository, &[]);
        let one = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (found, bytes) = entry?;
            Ok((digest_of(&found[prefix.len()..])?, read(&bytes, "manifest")?))
        };
        self.0.scan_prefix(&prefix).map(one).collect()
    }

    /// Every tag of `repository`, and what it names.
    pub(crate) fn tagged(&self, repository: &Repository) -> Result<Vec<(String, Digest)>, RegistryError> {
        let prefix = key(TAG, repository, &[]);
        let one = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (found, bytes) = entry?;
            Ok((String::from_utf8_lossy(&found[prefix.len()..]).into_owned(), digest_of(&bytes)?))
        };
        self.0.scan_prefix(&prefix).map(one).collect()
    }

    /// Bytes of what `repository` has.
    pub(crate) fn usage(&self, repository: &Repository) -> Result<u64, RegistryError> {
        let blobs: u64 = self.blobs(repository)?.iter().map(|(_, record)| record.size).sum();
        let manifests: u64 = self.manifests(repository)?.iter().map(|(_, record)| record.size).sum();
        Ok(blobs.saturating_add(manifests))
    }

    /// Tells each repository after `last`, in the order of their bytes, until `take` has enough. Answers whether there
    /// are more.
    pub(crate) fn repositories(
        &self,
        last: &str,
        mut take: impl FnMut(&Repository) -> bool,
    ) -> Result<bool, RegistryError> {
        let mut last = last.to_owned();
        loop {
            // The next of each kind: past all that `last` has, which ends with a zero byte.
            let mut next: Option<String> = None;
            for kind in [MANIFEST, BLOB] {
                let start = [&[kind], last.as_bytes(), &[u8::from(!last.is_empty())]].concat();
                let Some(entry) = self.0.range(start..).next() else { continue };
                let (found, _) = entry?;
                if found[0] != kind {
                    continue;
                }
                let name = found[1..].split(|byte| *byte == 0).next().unwrap_or_default();
                let name = String::from_utf8_lossy(name).into_owned();
                if next.as_ref().is_none_or(|other| name < *other) {
                    next = Some(name);
                }
            }
            let Some(name) = next else { return Ok(false) };
            let repository = Repository::try_from(name.clone()).map_err(|_| RegistryError::Record("repository"))?;
            if !take(&repository) {
                return Ok(true);
            }
            last = name;
        }
    }

    /// Whether some repository has `digest`.
    pub(crate) fn is_held(&self, digest: &Digest) -> Result<bool, RegistryError> {
        Ok(self.held(digest)? == Held::Somewhere)
    }

    /// Whether anything was ever pushed to `repository` and is still there.
    pub(crate) fn has_repository(&self, repository: &Repository) -> Result<bool, RegistryError> {
        for kind in [MANIFEST, BLOB] {
            if self.0.scan_prefix(key(kind, repository, &[])).next().transpose()?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Every row, for a backup. The registry's lock must be held.
    pub(crate) fn rows(&self) -> Result<Vec<KeyValue>, RegistryError> {
        self.0.iter().map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec())).map_err(Into::into)).collect()
    }

    /// Every digest that some repository has.
    pub(crate) fn digests(&self) -> Result<BTreeSet<Digest>, RegistryError> {
        let one = |row: sled::Result<(sled::IVec, sled::IVec)>| digest_of(row?.0.get(1..33).unwrap_or_default());
        self.0.scan_prefix([HOLDER]).map(one).collect()
    }

    fn held(&self, digest: &Digest) -> Result<Held, RegistryError> {
        let prefix = [&[HOLDER], digest.as_bytes().as_slice()].concat();
        let any = self.0.scan_prefix(prefix).next().transpose()?;
        Ok(if any.is_some() { Held::Somewhere } else { Held::Nowhere })
    }

    fn commit(&self, batch: Batch) -> Result<(), RegistryError> {
        self.0.apply_batch(batch)?;
        self.0.flush()?;
        Ok(())
    }
}

fn key(kind: u8, repository: &Repository, rest: &[u8]) -> Vec<u8> {
    [&[kind], repository.as_str().as_bytes(), &[0], rest].concat()
}

fn holder(digest: &Digest, kind: u8, repository: &Repository) -> Vec<u8> {
    [&[HOLDER], digest.as_bytes().as_slice(), &[kind], repository.as_str().as_bytes()].concat()
}

fn referrer(repository: &Repository, subject: &Digest, digest: &Digest) -> Vec<u8> {
    key(REFERRER, repository, &[subject.as_bytes().as_slice(), digest.as_bytes()].concat())
}

/// Records of before there was a time have the size alone.
fn read_blob(bytes: &[u8]) -> Result<BlobRecord, RegistryError> {
    let number = |bytes: &[u8]| bytes.try_into().map(u64::from_be_bytes).map_err(|_| RegistryError::Record("blob"));
    let (size, touched) = bytes.split_at_checked(8).ok_or(RegistryError::Record("blob"))?;
    Ok(BlobRecord { size: number(size)?, touched_ms: if touched.is_empty() { 0 } else { number(touched)? } })
}

fn digest_of(bytes: &[u8]) -> Result<Digest, RegistryError> {
    Ok(Digest::from_sha256(bytes.try_into().map_err(|_| RegistryError::Record("digest"))?))
}

fn read<T: for<'d> Deserialize<'d>>(bytes: &[u8], what: &'static str) -> Result<T, RegistryError> {
    serde_json::from_slice(bytes).map_err(|_| RegistryError::Record(what))
}

fn write<T: Serialize>(record: &T) -> Vec<u8> {
    serde_json::to_vec(record).expect("a record has only string keys")
}
