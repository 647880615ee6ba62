//! The files of blobs and manifests, each named by its digest: there whole, or not there.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use selvage_config::Digest;

use super::RegistryError;

/// The directory of files.
#[derive(Debug)]
pub(crate) struct Blobs(PathBuf);

impl Blobs {
    pub(crate) fn new(directory: PathBuf) -> Self {
        Self(directory)
    }

    /// Where the bytes of `digest` lie, if they are there.
    pub(crate) fn path(&self, digest: &Digest) -> PathBuf {
        self.0.join(digest.hex())
    }

    /// Takes over a file whose bytes were found to have `digest` and are on disk.
    pub(crate) fn adopt(&self, file: &Path, digest: &Digest) -> io::Result<()> {
        fs::rename(file, self.path(digest))?;
        // The name must be on disk too, before anybody is told that the blob is there.
        File::open(&self.0)?.sync_all()
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

    /// Removes the bytes of `digest`. Readers that have the file open still read it to its end.
    pub(crate) fn remove(&self, digest: &Digest) -> io::Result<()> {
        match fs::remove_file(self.path(digest)) {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            other => other,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_changed_on_disk_is_not_given_out() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::new(directory.path().to_owned());
        let digest = blobs.write(&directory.path().join("aside"), b"content").unwrap();
        assert_eq!(blobs.read(&digest).unwrap(), b"content");
        fs::write(blobs.path(&digest), b"c0ntent").unwrap();
        assert!(matches!(blobs.read(&digest), Err(RegistryError::Corrupt(_))));
        blobs.remove(&digest).unwrap();
        blobs.remove(&digest).unwrap();
        assert!(matches!(blobs.read(&digest), Err(RegistryError::Io(_))));
    }
}
