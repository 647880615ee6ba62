//! The place of a directory: what tells it from a copy of itself.
//!
//! A file is made once and never touched again. Its inode and the time when that last changed can't be copied, and a
//! disk that was copied as a whole, or set back, is started again before it is read. So a copied or restored directory
//! has another place, and its node begins a new incarnation (sync.md invariant K5).

use std::fs::{self, File};
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

/// The file.
const FILE: &str = "place";

/// What this start of the machine is called.
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// The place of a directory.
pub(crate) fn of(directory: &Path) -> io::Result<Vec<u8>> {
    // Rows that only live in memory leave none.
    fs::create_dir_all(directory)?;
    let path = directory.join(FILE);
    if !path.exists() {
        File::create_new(&path)?.sync_all()?;
    }
    let facts = fs::metadata(&path)?;
    // Where there is no such file the inode must do.
    let boot = fs::read_to_string(BOOT_ID).unwrap_or_default();
    Ok(format!("{} {}.{} {}", facts.ino(), facts.ctime(), facts.ctime_nsec(), boot.trim()).into_bytes())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_directory_has_one_place_and_its_copy_another() {
        let (one, copy) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        let place = of(one.path()).unwrap();
        assert_eq!(of(one.path()).unwrap(), place);
        fs::copy(one.path().join(FILE), copy.path().join(FILE)).unwrap();
        assert_ne!(of(copy.path()).unwrap(), place);
    }
}
