//! The component registry: OCI distribution-spec 1.1 over files and a catalog.
//!
//! Nothing that a client says of bytes is believed: every digest is computed here, while the bytes come in. A
//! manifest is taken only when all that it names is there, so whatever can be pulled can be pulled whole.

mod blobs;
mod catalog;
mod error;
mod manifests;
mod serve;
mod target;
mod uploads;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use selvage_config::Digest;
use selvage_config::oci::{MANIFEST_BYTES_MAX, Repository};
use sled::Tree;

use blobs::Blobs;
use catalog::{Catalog, Held, ManifestRecord};
use manifests::Outline;
use uploads::{Taken, Uploads};

pub(crate) use error::RegistryError;
pub(crate) use serve::serve;
pub(crate) use target::Reference;

/// Blobs, manifests and tags. Its methods wait on the disk.
#[derive(Debug)]
pub(crate) struct Registry {
    blobs: Blobs,
    catalog: Catalog,
    uploads: Arc<Uploads>,
    /// Held while files and catalog change together: whoever finds that nobody has a file may then remove it.
    changing: Mutex<()>,
}

/// A manifest that was pushed.
#[derive(Debug)]
pub(crate) struct Pushed {
    digest: Digest,
    subject: Option<Digest>,
}

impl Registry {
    /// Opens the registry over its directories and its part of the database.
    pub(crate) fn open(blobs: PathBuf, uploads: &Path, catalog: Tree) -> std::io::Result<Self> {
        Ok(Self {
            blobs: Blobs::new(blobs),
            catalog: Catalog::new(catalog),
            uploads: Arc::new(Uploads::open(uploads)?),
            changing: Mutex::new(()),
        })
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        self.changing.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a tag or digest names, if this repository has it.
    pub(crate) fn resolve(&self, repository: &Repository, reference: &Reference) -> Result<Digest, RegistryError> {
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no manifest {reference}"));
        let digest = match reference {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => self.catalog.tag(repository, tag)?.ok_or_else(unknown)?,
        };
        self.catalog.manifest(repository, &digest)?.map(|_| digest).ok_or_else(unknown)
    }

    /// A manifest's bytes, as they were pushed.
    pub(crate) fn manifest(&self, repository: &Repository, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        self.resolve(repository, &Reference::Digest(*digest))?;
        self.blobs.read(digest)
    }

    /// The bytes of a blob that is no larger than `max`.
    pub(crate) fn small_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        max: usize,
    ) -> Result<Vec<u8>, RegistryError> {
        let unknown = || RegistryError::blob_unknown(format!("{repository} has no blob {digest}"));
        let size = self.catalog.blob(repository, digest)?.ok_or_else(unknown)?;
        if size > max as u64 {
            return Err(RegistryError::too_large(format!("{digest} has {size} bytes, the most is {max}")));
        }
        self.blobs.read(digest)
    }

    /// Ends an upload. The client's `expected` digest must be that of the bytes.
    fn finish(&self, repository: &Repository, mut upload: Taken, expected: &Digest) -> Result<(), RegistryError> {
        let finished = upload.finish().and_then(|(file, actual, size)| {
            if actual != *expected {
                return Err(RegistryError::digest_invalid(format!("the blob is {actual}, not {expected}")));
            }
            let _changing = self.changing();
            self.blobs.adopt(&file, &actual)?;
            self.catalog.add_blob(repository, &actual, size)
        });
        upload.end();
        finished
    }

    /// Gives `repository` a blob that `from` has. False if that has none.
    fn mount(&self, repository: &Repository, from: &Repository, digest: &Digest) -> Result<bool, RegistryError> {
        let _changing = self.changing();
        match self.catalog.blob(from, digest)? {
            Some(size) => self.catalog.add_blob(repository, digest, size).map(|()| true),
            None => Ok(false),
        }
    }

    fn delete_blob(&self, repository: &Repository, digest: &Digest) -> Result<(), RegistryError> {
        let _changing = self.changing();
        if let Some(manifest) = self.catalog.referenced_by(repository, digest)? {
            return Err(RegistryError::in_use(format!("manifest {manifest} needs it")));
        }
        let held = self.catalog.remove_blob(repository, digest)?;
        self.let_go(digest, held.ok_or_else(|| RegistryError::blob_unknown(format!("{repository} has no {digest}")))?)
    }

    fn let_go(&self, digest: &Digest, held: Held) -> Result<(), RegistryError> {
        if held == Held::Nowhere {
            self.blobs.remove(digest)?;
        }
        Ok(())
    }

    /// Takes a manifest, if it is one and all that it names is there.
    fn push(
        &self,
        repository: &Repository,
        reference: &Reference,
        content_type: Option<&str>,
        bytes: &[u8],
    ) -> Result<Pushed, RegistryError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(RegistryError::too_large(format!("a manifest has at most {MANIFEST_BYTES_MAX} bytes")));
        }
        let digest = Digest::of(bytes);
        let tag = match reference {
            Reference::Digest(expected) if *expected != digest => {
                return Err(RegistryError::digest_invalid(format!("the manifest is {digest}, not {expected}")));
            }
            Reference::Digest(_) => None,
            Reference::Tag(tag) => Some(tag.as_str()),
        };
        let outline = Outline::read(bytes, content_type)?;
        let _changing = self.changing();
        for blob in &outline.blobs {
            match self.catalog.blob(repository, &blob.digest)? {
                Some(size) if size == blob.size => {}
                Some(size) => {
                    let (digest, told) = (blob.digest, blob.size);
                    return Err(RegistryError::manifest_invalid(format!("{digest} has {size} bytes, not {told}")));
                }
                None => return Err(RegistryError::manifest_blob_unknown(format!("push {} first", blob.digest))),
            }
        }
        for manifest in &outline.manifests {
            if self.catalog.manifest(repository, &manifest.digest)?.is_none() {
                return Err(RegistryError::manifest_blob_unknown(format!("push {} first", manifest.digest)));
            }
        }
        let subject = outline.subject;
        self.blobs.write(&self.uploads.aside()?, bytes)?;
        let record = outline.record(digest, bytes.len() as u64);
        self.catalog.add_manifest(repository, &digest, &record, tag)?;
        Ok(Pushed { digest, subject })
    }

    fn delete_manifest(&self, repository: &Repository, digest: &Digest) -> Result<(), RegistryError> {
        let _changing = self.changing();
        if let Some(index) = self.catalog.referenced_by(repository, digest)? {
            return Err(RegistryError::in_use(format!("index {index} needs it")));
        }
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no manifest {digest}"));
        let held = self.catalog.remove_manifest(repository, digest)?.ok_or_else(unknown)?;
        self.let_go(digest, held)
    }

    fn delete_tag(&self, repository: &Repository, tag: &str) -> Result<(), RegistryError> {
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no tag {tag}"));
        if self.catalog.remove_tag(repository, tag)? { Ok(()) } else { Err(unknown()) }
    }

    fn record(&self, repository: &Repository, digest: &Digest) -> Result<ManifestRecord, RegistryError> {
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no manifest {digest}"));
        self.catalog.manifest(repository, digest)?.ok_or_else(unknown)
    }
}
