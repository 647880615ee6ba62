//! Blobs of a registry that several control planes have: each lies in the object store before anybody is told that it is
//! there. The disk is a cache, and what is brought is compared with its digest.
//!
//! An object has a name that nothing had before, and the catalog's row of it comes with the first who has the digest and
//! goes with the last, in one change of the journal. So an object whose row went is deleted without a look at the time:
//! who pushes the same bytes a moment later finds no row, and puts another object.

use std::collections::BTreeSet;
use std::fs;
use std::io;
use std::path::Path;
use std::sync::PoisonError;

use ring::digest::{Context, SHA256};
use selvage_config::Digest;

use super::{BRINGING, Object, Registry, RegistryError};
use crate::audit::now_ms;
use crate::journal::{Journal, JournalError, random_name};

/// How often a blob is put again because the catalog's last holder of it went meanwhile.
const PUTS: u32 = 4;
/// How old an object without a row must be to go: one that is young may be about to get its row. Milliseconds.
const STRAY_MS: u64 = 24 * 3_600_000;

impl Registry {
    /// Bytes of all blobs, wherever they lie.
    pub(super) fn bytes(&self) -> Result<u64, RegistryError> {
        if self.state.journal().is_some() { self.catalog.object_bytes() } else { Ok(self.blobs.bytes()) }
    }

    /// Makes a change that names `digest`, whose bytes are in `file`: in the object store before that, if there is one.
    pub(super) fn with_object(
        &self,
        digest: &Digest,
        size: u64,
        file: &Path,
        mut change: impl FnMut(Option<&Object>) -> Result<(), RegistryError>,
    ) -> Result<(), RegistryError> {
        let mut object = None;
        for _ in 0..PUTS {
            match self.change(|| change(object.as_ref())) {
                Err(RegistryError::NoObject) => {}
                done => {
                    self.drop_needless(digest, object);
                    return done;
                }
            }
            // Once taken over, the file is a blob of ours.
            let own = self.blobs.path(digest);
            object = Some(self.put_object(size, if file.try_exists()? { file } else { &own })?);
        }
        Err(JournalError::Away("the same blob comes and goes all the time".into()).into())
    }

    fn put_object(&self, size: u64, file: &Path) -> Result<Object, RegistryError> {
        let journal = self.state.journal().ok_or(RegistryError::NoObject)?;
        let object = Object { name: random_name(), size };
        journal.put_blob(&object.name, file)?;
        Ok(object)
    }

    /// What was put and did not get the row goes again.
    fn drop_needless(&self, digest: &Digest, object: Option<Object>) {
        let Some(object) = object else { return };
        match self.catalog.object(digest) {
            Ok(Some(named)) if named == object => {}
            Ok(_) => self.drop_object(Some(object.name)),
            // A later collection looks again.
            Err(_) => {}
        }
    }

    /// Deletes an object that nothing names any more. What is not deleted now is found by a later collection.
    pub(super) fn drop_object(&self, name: Option<String>) {
        if let (Some(journal), Some(name)) = (self.state.journal(), name)
            && let Err(error) = journal.delete_blob(&name)
        {
            tracing::debug!(%error, name, "an object stays until a later collection");
        }
    }

    /// Reads a small blob whole, from wherever it lies.
    pub(super) fn read(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        self.bring(digest)?;
        match self.blobs.read(digest) {
            Err(RegistryError::Corrupt(_)) if self.state.journal().is_some() => {
                tracing::warn!(%digest, "the cached file of a blob was damaged, and is brought again");
                self.blobs.remove(digest)?;
                self.bring(digest)?;
                self.blobs.read(digest)
            }
            read => read,
        }
    }

    /// Brings a blob that the catalog names to this disk, if it is not there. What the catalog does not name is not brought.
    pub(crate) fn bring(&self, digest: &Digest) -> Result<(), RegistryError> {
        let Some(journal) = self.state.journal() else { return Ok(()) };
        let path = self.blobs.path(digest);
        if path.try_exists()? {
            return Ok(());
        }
        let place = usize::from(digest.as_bytes()[0]) % BRINGING;
        let _bringing = self.bringing[place].lock().unwrap_or_else(PoisonError::into_inner);
        if path.try_exists()? {
            return Ok(());
        }
        let Some(object) = self.catalog.object(digest)? else { return Ok(()) };
        let aside = self.uploads.aside()?;
        let brought = journal.get_blob(&object.name, &aside).map_err(RegistryError::from).and_then(|()| {
            if digest_of(&aside)? != *digest {
                return Err(RegistryError::Corrupt(*digest));
            }
            let _changing = self.changing();
            // Whoever let go of it meanwhile has removed the file that was not there yet.
            if self.catalog.object(digest)?.is_some() {
                self.blobs.adopt(&aside, digest)?;
            }
            Ok(())
        });
        match fs::remove_file(&aside) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error.into()),
            _ => brought,
        }
    }

    /// Puts every blob into the object store: the journal is about to begin with this catalog. What an earlier try has put
    /// is not put again.
    pub(crate) fn found(&self, journal: &Journal) -> Result<(), RegistryError> {
        let _changing = self.changing();
        let there: BTreeSet<String> = journal.blobs()?.into_iter().map(|found| found.name).collect();
        if !self.catalog.object_names()?.is_subset(&there) {
            self.catalog.forget_objects()?;
        }
        for digest in self.catalog.digests()? {
            if self.catalog.object(&digest)?.is_none() {
                let path = self.blobs.path(&digest);
                let object = Object { name: random_name(), size: fs::metadata(&path)?.len() };
                journal.put_blob(&object.name, &path)?;
                self.catalog.add_object(&digest, &object)?;
            }
        }
        Ok(())
    }

    /// Objects that no row names, and that are too old to be about to get one.
    pub(super) fn collect_objects(&self) -> Result<(), RegistryError> {
        let Some(journal) = self.state.journal() else { return Ok(()) };
        let found = journal.blobs()?;
        let named = self.catalog.object_names()?;
        let before_s = i64::try_from(now_ms().saturating_sub(STRAY_MS) / 1_000).unwrap_or(0);
        for object in found {
            if object.modified_s < before_s && !named.contains(&object.name) {
                self.drop_object(Some(object.name));
            }
        }
        Ok(())
    }
}

fn digest_of(file: &Path) -> io::Result<Digest> {
    let mut hash = Hash(Context::new(&SHA256));
    io::copy(&mut fs::File::open(file)?, &mut hash)?;
    let bytes = hash.0.finish();
    Ok(Digest::from_sha256(bytes.as_ref().try_into().expect("SHA-256 has 32 bytes")))
}

struct Hash(Context);

impl io::Write for Hash {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
