//! How far an engine had come, kept outside it: what no damage to its own files can take back with it.
//!
//! sled takes a damaged end of its log for one that a crash cut short, and opens as it was before: whole, readable and
//! old. So every flush counts, the count is a row of the engine and, once the flush is done, also in this file. An engine
//! whose count is below the file's has lost what was acknowledged.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::FileExt as _;
use std::path::Path;

use super::envelope::hash;

const NUMBER_BYTES: usize = 8;
const FILE_BYTES: usize = 2 * NUMBER_BYTES;

/// The file.
#[derive(Debug)]
pub(super) struct Mark {
    file: File,
}

impl Mark {
    pub(super) fn open(path: &Path) -> io::Result<Self> {
        Ok(Self { file: OpenOptions::new().read(true).write(true).create(true).truncate(false).open(path)? })
    }

    /// The count; none if the file is new, or was cut short by a power cut, or damaged.
    pub(super) fn read(&self) -> Option<u64> {
        let mut bytes = [0; FILE_BYTES];
        self.file.read_exact_at(&mut bytes, 0).ok()?;
        let (number, sum) = bytes.split_at(NUMBER_BYTES);
        (hash(number)[..NUMBER_BYTES] == *sum).then(|| u64::from_be_bytes(number.try_into().unwrap_or_default()))
    }

    /// Sets the count. It survives the end of the process; after a power cut it may be an earlier one, which only makes
    /// it less strict.
    pub(super) fn write(&self, count: u64) -> io::Result<()> {
        self.file.write_all_at(&encoded(count), 0)
    }
}

fn encoded(count: u64) -> [u8; FILE_BYTES] {
    let number = count.to_be_bytes();
    let mut bytes = [0; FILE_BYTES];
    bytes[..NUMBER_BYTES].copy_from_slice(&number);
    bytes[NUMBER_BYTES..].copy_from_slice(&hash(&number)[..NUMBER_BYTES]);
    bytes
}

/// A file of more flushes than any test does.
#[cfg(test)]
pub(crate) fn far_mark() -> Vec<u8> {
    encoded(u64::MAX).to_vec()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_count_is_read_as_it_was_written_or_not_at_all() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("FLUSHED");
        let mark = Mark::open(&path).unwrap();
        assert_eq!(mark.read(), None);
        mark.write(7).unwrap();
        mark.write(300).unwrap();
        assert_eq!(Mark::open(&path).unwrap().read(), Some(300));
        let bytes = std::fs::read(&path).unwrap();
        for bit in 0..8 * bytes.len() {
            let mut damaged = bytes.clone();
            damaged[bit / 8] ^= 1 << (bit % 8);
            std::fs::write(&path, damaged).unwrap();
            assert_eq!(Mark::open(&path).unwrap().read(), None);
        }
    }
}
