//! The files of blobs and manifests, each named by its digest: there whole, or not there.

use std::collections::BTreeSet;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use selvage_config::Digest;

use super::RegistryError;

/// The directory of files.
#[derive(Debug)]
pub(crate) struct Blobs {
    directory: PathBuf,
    bytes: AtomicU64,
    holds: Arc<AtomicUsize>,
}

/// For as long as it lives, no file goes.
#[derive(Debug)]
pub(crate) struct Hold {
    holds: Arc<AtomicUsize>,
    blobs: BTreeSet<Digest>,
}

impl Hold {
    /// What is held: all that there was.
    pub(crate) fn blobs(&self) -> &BTreeSet<Digest> {
        &self.blobs
    }
}

impl Drop for Hold {
    fn drop(&mut self) {
        self.holds.fetch_sub(1, Ordering::SeqCst);
    }
}

impl Blobs {
    /// Opens the directory, and counts what is in it.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        let mut bytes = 0;
        for entry in fs::read_dir(&directory)? {
            bytes += entry?.metadata()?.len();
        }
        Ok(Self { directory, bytes: AtomicU64::new(bytes), holds: Arc::default() })
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Bytes of all files.
    pub(crate) fn bytes(&self) -> u64 {
        self.bytes.load(Ordering::Relaxed)
    }

    /// Where the bytes of `digest` lie, if they are there.
    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.directory.join(digest.hex())
    }

    /// Takes over a file whose bytes were found to have `digest` and are on disk.
    pub(crate) fn adopt(&self, file: &Path, digest: &Digest) -> io::Result<()> {
        let path = self.path(digest);
        let grown = if path.try_exists()? { 0 } else { fs::metadata(file)?.len() };
        fs::rename(file, path)?;
        self.bytes.fetch_add(grown, Ordering::Relaxed);
        // The name must be on disk too, before anybody is told that the blob is there.
        File::open(&self.directory)?.sync_all()
    }

    /// Writes a small file whole. `aside` is where it lies until it is complete.
    pub(crate) fn write(&self, aside: &Path, bytes: &[u8]) -> io::Result<Digest> {
        let digest = Digest::of(bytes);
        let mut file = OpenOptions::new().write(true).create(true).truncate(true).mode(0o600).open(aside)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        self.adopt(aside, &digest)?;
        Ok(digest)
    }

    /// Reads a small file whole, and checks it: what a disk gives back is not believed either.
    pub(crate) fn read(&self, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        let bytes = fs::read(self.path(digest))?;
        if Digest::of(&bytes) == *digest { Ok(bytes) } else { Err(RegistryError::Corrupt(*digest)) }
    }

    /// Lets no file go for as long as the hold lives. The registry's lock must be held, as whenever one goes.
    pub(super) fn hold(&self, blobs: BTreeSet<Digest>) -> Hold {
        self.holds.fetch_add(1, Ordering::SeqCst);
        Hold { holds: Arc::clone(&self.holds), blobs }
    }

    /// Removes the bytes of `digest`, unless there is a hold: then a later collection finds that nobody has them. Readers that have the file open still read it to its end.
    pub(crate) fn remove(&self, digest: &Digest) -> io::Result<()> {
        if self.holds.load(Ordering::SeqCst) > 0 {
            return Ok(());
        }
        let path = self.path(digest);
        let length = fs::metadata(&path).map_or(0, |found| found.len());
        match fs::remove_file(path) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(error),
            Ok(()) => {
                self.bytes.fetch_sub(length, Ordering::Relaxed);
                Ok(())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changed_on_disk_is_not_given_out() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().to_owned()).unwrap();
        let digest = blobs.write(&directory.path().join("aside"), b"content").unwrap();
        assert_eq!(blobs.read(&digest).unwrap(), b"content");
        fs::write(blobs.path(&digest), b"c0ntent").unwrap();
        assert!(matches!(blobs.read(&digest), Err(RegistryError::Corrupt(_))));
        blobs.remove(&digest).unwrap();
        blobs.remove(&digest).unwrap();
        assert!(matches!(blobs.read(&digest), Err(RegistryError::Io(_))));
        assert_eq!(blobs.bytes(), 0);
    }
}
