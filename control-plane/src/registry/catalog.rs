//! The registry's records: which repository has which blobs, manifests and tags, and what refers to what.
//!
//! A digest's bytes lie in one file, whichever repositories have it. The catalog counts who has it by one key for
//! each, so that the last to let go is known.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use selvage_config::Digest;
use selvage_config::oci::{Descriptor, Repository};
use serde::{Deserialize, Serialize};
use sled::Tree;

use super::RegistryError;
use crate::state::{Change, KeyValue, State, Table};

/// Kinds of keys. After the kind comes the repository, a zero byte, and what it has.
const BLOB: u8 = b'b';
const MANIFEST: u8 = b'm';
const REFERRER: u8 = b'r';
const TAG: u8 = b't';
/// After this kind come a digest, the kind that has it, and the repository.
const HOLDER: u8 = b'h';
/// After this kind comes a digest; the value is its size and the name of its object in the object store, where the state is
/// shared. The row comes and goes with the holders, in the same change: whoever has a digest finds its object, and an
/// object without a row is nobody's.
const OBJECT: u8 = b'o';

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
pub(crate) struct Catalog {
    tree: Tree,
    state: Arc<State>,
    /// The last change of the journal that whoever has the registry's lock has looked at.
    base: AtomicU64,
}

/// Whether some repository still has a digest's bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Held {
    Somewhere,
    /// No more, and this was its object.
    Nowhere(Option<String>),
}

/// Bytes in the object store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Object {
    pub(crate) name: String,
    pub(crate) size: u64,
}

impl Catalog {
    pub(crate) fn new(state: Arc<State>) -> Self {
        Self { tree: state.catalog().clone(), state, base: AtomicU64::new(0) }
    }

    /// Whoever has the registry's lock begins to look. Answers the last change that is looked at.
    pub(crate) fn begin(&self) -> u64 {
        let base = self.state.applied();
        self.base.store(base, Ordering::SeqCst);
        base
    }

    /// The object of a digest.
    pub(crate) fn object(&self, digest: &Digest) -> Result<Option<Object>, RegistryError> {
        let bytes = self.tree.get(object_key(digest))?;
        bytes.map(|bytes| read_object(&bytes)).transpose()
    }

    /// Bytes of all objects.
    pub(crate) fn object_bytes(&self) -> Result<u64, RegistryError> {
        let one = |row: sled::Result<(sled::IVec, sled::IVec)>| Ok::<_, RegistryError>(read_object(&row?.1)?.size);
        self.tree.scan_prefix([OBJECT]).map(one).try_fold(0_u64, |sum, size| Ok(sum.saturating_add(size?)))
    }

    /// Names of all objects.
    pub(crate) fn object_names(&self) -> Result<BTreeSet<String>, RegistryError> {
        let one = |row: sled::Result<(sled::IVec, sled::IVec)>| Ok::<_, RegistryError>(read_object(&row?.1)?.name);
        self.tree.scan_prefix([OBJECT]).map(one).collect()
    }

    /// Notes the object of a digest that is there, before the state is shared.
    pub(crate) fn add_object(&self, digest: &Digest, object: &Object) -> Result<(), RegistryError> {
        let mut change = Rows::default();
        change.insert(object_key(digest), write_object(object));
        self.commit(&change)
    }

    /// Forgets all objects: they were in another journal's store.
    pub(crate) fn forget_objects(&self) -> Result<(), RegistryError> {
        let mut change = Rows::default();
        for key in self.tree.scan_prefix([OBJECT]).keys() {
            change.remove(key?.to_vec());
        }
        self.commit(&change)
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
        let bytes = self.tree.get(key(BLOB, repository, digest.as_bytes()))?;
        bytes.map(|bytes| read_blob(&bytes)).transpose()
    }

    /// Notes that `repository` has a blob.
    pub(crate) fn add_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        record: BlobRecord,
        object: Option<&Object>,
    ) -> Result<(), RegistryError> {
        let mut batch = Rows::default();
        self.hold_object(&mut batch, digest, object)?;
        let value = [record.size.to_be_bytes(), record.touched_ms.to_be_bytes()].concat();
        batch.insert(key(BLOB, repository, digest.as_bytes()), value);
        batch.insert(holder(digest, BLOB, repository), Vec::new());
        self.commit(&batch)
    }

    /// Notes that `repository` no longer has a blob. None if it never had.
    pub(crate) fn remove_blob(&self, repository: &Repository, digest: &Digest) -> Result<Option<Held>, RegistryError> {
        if self.blob(repository, digest)?.is_none() {
            return Ok(None);
        }
        let mut batch = Rows::default();
        batch.remove(key(BLOB, repository, digest.as_bytes()));
        batch.remove(holder(digest, BLOB, repository));
        let held = self.held_without(&mut batch, digest, BLOB, repository)?;
        self.commit(&batch)?;
        Ok(Some(held))
    }

    /// A manifest that `repository` has.
    pub(crate) fn manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<ManifestRecord>, RegistryError> {
        let bytes = self.tree.get(key(MANIFEST, repository, digest.as_bytes()))?;
        bytes.map(|bytes| read(&bytes, "manifest")).transpose()
    }

    /// Notes a manifest, and the tag that names it.
    pub(crate) fn add_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        record: &ManifestRecord,
        tag: Option<&str>,
        object: Option<&Object>,
    ) -> Result<(), RegistryError> {
        let mut batch = Rows::default();
        self.hold_object(&mut batch, digest, object)?;
        batch.insert(key(MANIFEST, repository, digest.as_bytes()), write(record));
        batch.insert(holder(digest, MANIFEST, repository), Vec::new());
        if let Some(tag) = tag {
            batch.insert(key(TAG, repository, tag.as_bytes()), digest.as_bytes().to_vec());
        }
        if let Some((subject, descriptor)) = &record.subject {
            batch.insert(referrer(repository, subject, digest), write(descriptor));
        }
        self.commit(&batch)
    }

    /// Notes that `repository` no longer has a manifest, nor tags of it. None if it never had.
    pub(crate) fn remove_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<Held>, RegistryError> {
        let Some(record) = self.manifest(repository, digest)? else { return Ok(None) };
        let mut batch = Rows::default();
        batch.remove(key(MANIFEST, repository, digest.as_bytes()));
        batch.remove(holder(digest, MANIFEST, repository));
        if let Some((subject, _)) = &record.subject {
            batch.remove(referrer(repository, subject, digest));
        }
        for entry in self.tree.scan_prefix(key(TAG, repository, &[])) {
            let (tag, named) = entry?;
            if named.as_ref() == digest.as_bytes() {
                batch.remove(tag.to_vec());
            }
        }
        let held = self.held_without(&mut batch, digest, MANIFEST, repository)?;
        self.commit(&batch)?;
        Ok(Some(held))
    }

    /// A manifest of `repository` that names `digest`.
    pub(crate) fn referenced_by(
        &self,
        repository: &Repository,
        digest: &Digest,
    ) -> Result<Option<Digest>, RegistryError> {
        let prefix = key(MANIFEST, repository, &[]);
        for entry in self.tree.scan_prefix(&prefix) {
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
        let bytes = self.tree.get(key(TAG, repository, tag.as_bytes()))?;
        bytes.map(|bytes| digest_of(&bytes)).transpose()
    }

    /// Removes a tag, not what it names. False if there was none.
    pub(crate) fn remove_tag(&self, repository: &Repository, tag: &str) -> Result<bool, RegistryError> {
        let tag = key(TAG, repository, tag.as_bytes());
        if !self.tree.contains_key(&tag)? {
            return Ok(false);
        }
        let mut batch = Rows::default();
        batch.remove(tag);
        self.commit(&batch).map(|()| true)
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
        for entry in self.tree.range(key(TAG, repository, last.as_bytes())..) {
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
        for entry in self.tree.range(start..) {
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
        self.tree.scan_prefix(&prefix).map(read).collect()
    }

    /// Every manifest of `repository`.
    pub(crate) fn manifests(&self, repository: &Repository) -> Result<Vec<(Digest, ManifestRecord)>, RegistryError> {
        let prefix = key(MANIFEST, repository, &[]);
        let one = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (found, bytes) = entry?;
            Ok((digest_of(&found[prefix.len()..])?, read(&bytes, "manifest")?))
        };
        self.tree.scan_prefix(&prefix).map(one).collect()
    }

    /// Every tag of `repository`, and what it names.
    pub(crate) fn tagged(&self, repository: &Repository) -> Result<Vec<(String, Digest)>, RegistryError> {
        let prefix = key(TAG, repository, &[]);
        let one = |entry: sled::Result<(sled::IVec, sled::IVec)>| {
            let (found, bytes) = entry?;
            Ok((String::from_utf8_lossy(&found[prefix.len()..]).into_owned(), digest_of(&bytes)?))
        };
        self.tree.scan_prefix(&prefix).map(one).collect()
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
                let Some(entry) = self.tree.range(start..).next() else { continue };
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
        let prefix = [&[HOLDER], digest.as_bytes().as_slice()].concat();
        Ok(self.tree.scan_prefix(prefix).next().transpose()?.is_some())
    }

    /// Whether anything was ever pushed to `repository` and is still there.
    pub(crate) fn has_repository(&self, repository: &Repository) -> Result<bool, RegistryError> {
        for kind in [MANIFEST, BLOB] {
            if self.tree.scan_prefix(key(kind, repository, &[])).next().transpose()?.is_some() {
                return Ok(true);
            }
        }
        Ok(false)
    }

    /// Every row, for a backup, which has the bytes and names no objects. The registry's lock must be held.
    pub(crate) fn rows(&self) -> Result<Vec<KeyValue>, RegistryError> {
        let rows = self.tree.iter().filter(|row| !row.as_ref().is_ok_and(|(key, _)| key.first() == Some(&OBJECT)));
        rows.map(|row| row.map(|(key, value)| (key.to_vec(), value.to_vec())).map_err(Into::into)).collect()
    }

    /// Every digest that some repository has.
    pub(crate) fn digests(&self) -> Result<BTreeSet<Digest>, RegistryError> {
        let one = |row: sled::Result<(sled::IVec, sled::IVec)>| digest_of(row?.0.get(1..33).unwrap_or_default());
        self.tree.scan_prefix([HOLDER]).map(one).collect()
    }

    /// Whether somebody has `digest` when `repository` no longer has it as this `kind`. If not, its object goes too.
    fn held_without(
        &self,
        batch: &mut Rows,
        digest: &Digest,
        kind: u8,
        repository: &Repository,
    ) -> Result<Held, RegistryError> {
        let gone = holder(digest, kind, repository);
        for key in self.tree.scan_prefix([&[HOLDER], digest.as_bytes().as_slice()].concat()).keys() {
            if key?.as_ref() != gone.as_slice() {
                return Ok(Held::Somewhere);
            }
        }
        let object = self.object(digest)?;
        if object.is_some() {
            batch.remove(object_key(digest));
        }
        Ok(Held::Nowhere(object.map(|object| object.name)))
    }

    /// Names the object of a digest that gets a holder, if it has none yet. Where the state is shared there must be one.
    fn hold_object(&self, batch: &mut Rows, digest: &Digest, object: Option<&Object>) -> Result<(), RegistryError> {
        if self.state.journal().is_none() || self.object(digest)?.is_some() {
            return Ok(());
        }
        let object = object.ok_or(RegistryError::NoObject)?;
        batch.insert(object_key(digest), write_object(object));
        Ok(())
    }

    fn commit(&self, rows: &Rows) -> Result<(), RegistryError> {
        let base = self.base.load(Ordering::SeqCst);
        self.state.commit(&rows.0, base)?;
        if self.state.journal().is_some() {
            // Ours is the next one, or it would not have been made.
            self.base.store(base + 1, Ordering::SeqCst);
        }
        Ok(())
    }
}

/// Rows of the registry to be written.
#[derive(Default)]
struct Rows(Change);

impl Rows {
    fn insert(&mut self, key: Vec<u8>, value: Vec<u8>) {
        self.0.put(Table::Registry, key, value);
    }

    fn remove(&mut self, key: Vec<u8>) {
        self.0.remove(Table::Registry, key);
    }
}

fn object_key(digest: &Digest) -> Vec<u8> {
    [&[OBJECT], digest.as_bytes().as_slice()].concat()
}

fn write_object(object: &Object) -> Vec<u8> {
    [object.size.to_be_bytes().as_slice(), object.name.as_bytes()].concat()
}

fn read_object(bytes: &[u8]) -> Result<Object, RegistryError> {
    let (size, name) = bytes.split_first_chunk::<8>().ok_or(RegistryError::Record("object"))?;
    let name = String::from_utf8(name.to_vec()).map_err(|_| RegistryError::Record("object"))?;
    Ok(Object { name, size: u64::from_be_bytes(*size) })
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
