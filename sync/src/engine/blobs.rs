//! Large values as files, each named by the SHA-256 of what it holds.
//!
//! A file is written whole under another name, so one with a right name was written to its end; what a crash cut
//! short has a name that nothing refers to, and goes at the next start. It is on disk before the row that names it.

use std::fs::{self, File};
use std::io::{self, ErrorKind, Write as _};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;

use super::envelope::{Hash, hash};
use super::{Corrupt, disk};

/// Suffix of files that are being written.
const UNFINISHED: &str = ".part";

/// The directory of the files.
#[derive(Debug)]
pub(super) struct Blobs {
    directory: PathBuf,
    written: AtomicU64,
}

/// What a look-up found.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Value(Bytes),
    /// No such file: it went with its last row, or it is lost.
    Gone,
    Damaged(Corrupt),
}

impl Blobs {
    pub(super) fn open(directory: PathBuf) -> io::Result<Self> {
        fs::create_dir_all(&directory)?;
        Ok(Self { directory, written: AtomicU64::new(0) })
    }

    fn path(&self, hash: &Hash) -> PathBuf {
        let name = hex(hash);
        self.directory.join(&name[..2]).join(&name[2..])
    }

    /// Writes a value, durable at once. One that is there is not written again.
    pub(super) fn put(&self, value: &[u8]) -> io::Result<Hash> {
        let hash = hash(value);
        let path = self.path(&hash);
        if fs::metadata(&path).is_ok_and(|facts| facts.len() == value.len() as u64) {
            return Ok(hash);
        }
        let parent = path.parent().unwrap_or(&self.directory);
        let is_new = !parent.exists();
        fs::create_dir_all(parent)?;
        if is_new {
            disk::sync_directory(&self.directory)?;
        }
        let number = self.written.fetch_add(1, Ordering::Relaxed);
        let unfinished = path.with_extension(format!("{number}{UNFINISHED}"));
        let written = File::create(&unfinished).and_then(|mut file| {
            file.write_all(value)?;
            file.sync_all()
        });
        if let Err(error) = written.and_then(|()| fs::rename(&unfinished, &path)) {
            let _left_for_the_sweep = fs::remove_file(&unfinished);
            return Err(error);
        }
        disk::sync_directory(parent)?;
        Ok(hash)
    }

    /// The value of a file. Its bytes are verified against its name.
    pub(super) fn get(&self, name: &Hash, length: u64) -> io::Result<Found> {
        let path = self.path(name);
        match fs::metadata(&path) {
            Ok(facts) if facts.len() != length => return Ok(Found::Damaged(Corrupt)),
            Ok(_) => {}
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Found::Gone),
            Err(error) => return Err(error),
        }
        match fs::read(&path) {
            Ok(bytes) if hash(&bytes) == *name => Ok(Found::Value(bytes.into())),
            Ok(_) => Ok(Found::Damaged(Corrupt)),
            Err(error) if error.kind() == ErrorKind::NotFound => Ok(Found::Gone),
            Err(error) => Err(error),
        }
    }

    /// Removes a file. One that is not there is no error.
    pub(super) fn remove(&self, hash: &Hash) -> io::Result<()> {
        match fs::remove_file(self.path(hash)) {
            Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
            _ => Ok(()),
        }
    }

    /// Removes every file that `is_named` says no row names. Says how many.
    pub(super) fn sweep<E: From<io::Error>>(
        &self,
        mut is_named: impl FnMut(&Hash) -> Result<bool, E>,
    ) -> Result<usize, E> {
        let mut removed = 0;
        for parent in entries(&self.directory)? {
            if !parent.is_dir() {
                continue;
            }
            for file in entries(&parent)? {
                let keeps = match named(&parent, &file) {
                    Some(hash) => is_named(&hash)?,
                    None => false,
                };
                if !keeps {
                    fs::remove_file(&file)?;
                    removed += 1;
                }
            }
        }
        Ok(removed)
    }
}

fn entries(directory: &Path) -> io::Result<Vec<PathBuf>> {
    fs::read_dir(directory)?.map(|entry| entry.map(|entry| entry.path())).collect()
}

fn named(parent: &Path, file: &Path) -> Option<Hash> {
    let text = format!("{}{}", parent.file_name()?.to_str()?, file.file_name()?.to_str()?);
    let mut hash = Hash::default();
    if text.len() != 2 * hash.len() || !text.is_ascii() {
        return None;
    }
    for (at, byte) in hash.iter_mut().enumerate() {
        *byte = u8::from_str_radix(&text[2 * at..2 * at + 2], 16).ok()?;
    }
    Some(hash)
}

fn hex(hash: &Hash) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_value_is_found_by_its_hash_and_damage_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().join("blobs")).unwrap();
        let value = vec![7; 100_000];
        let hash = blobs.put(&value).unwrap();
        assert_eq!(blobs.put(&value).unwrap(), hash);
        assert_eq!(blobs.get(&hash, 100_000).unwrap(), Found::Value(value.clone().into()));
        let mut damaged = value;
        damaged[50_000] ^= 1;
        fs::write(blobs.path(&hash), &damaged).unwrap();
        assert_eq!(blobs.get(&hash, 100_000).unwrap(), Found::Damaged(Corrupt));
        fs::write(blobs.path(&hash), &damaged[1..]).unwrap();
        assert_eq!(blobs.get(&hash, 100_000).unwrap(), Found::Damaged(Corrupt));
        blobs.remove(&hash).unwrap();
        blobs.remove(&hash).unwrap();
        assert_eq!(blobs.get(&hash, 100_000).unwrap(), Found::Gone);
    }

    #[test]
    fn what_nothing_names_is_swept() {
        let directory = tempfile::tempdir().unwrap();
        let blobs = Blobs::open(directory.path().join("blobs")).unwrap();
        let kept = blobs.put(b"kept").unwrap();
        let loose = blobs.put(b"loose").unwrap();
        fs::write(blobs.path(&kept).with_extension("3.part"), b"ke").unwrap();
        let removed = blobs.sweep(|hash| Ok::<_, io::Error>(*hash == kept)).unwrap();
        assert_eq!(removed, 2);
        assert_eq!(blobs.get(&kept, 4).unwrap(), Found::Value(Bytes::from_static(b"kept")));
        assert_eq!(blobs.get(&loose, 5).unwrap(), Found::Gone);
    }
}
