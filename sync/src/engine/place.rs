//! Where an engine's files lie: generations of one directory, of which one is current.
//!
//! `<dir>/sled-3/` is the third generation, kept by sled; `CURRENT` names it. A rewrite fills the next generation
//! and then replaces `CURRENT` as a whole, so there is always one that is complete. What can't be opened is moved
//! to `quarantine-<ms>/` and kept for whoever wants to look at it.

use std::fmt;
use std::fs::{self, File, TryLockError};
use std::io;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use selvage_config::node::KvEngine;

use super::{EngineError, disk};

/// The file that names the current generation.
const CURRENT: &str = "CURRENT";
/// The file that a process locks while it has the directory open.
const LOCK: &str = "LOCK";
/// The file that says how far the engine had come.
const FLUSHED: &str = "FLUSHED";
/// The directory of large values.
const BLOBS: &str = "blobs";
/// Directories of what could not be opened.
const QUARANTINE: &str = "quarantine-";
/// How many of these are kept.
const QUARANTINES_MAX: usize = 3;
/// The file in which an engine of a build before generations kept its rows.
const BEFORE_GENERATIONS: &str = "db";

/// One generation of an engine's files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Generation {
    /// Which engine made it.
    pub engine: KvEngine,
    /// Its number, from 1.
    pub number: u64,
}

impl Generation {
    pub(super) fn next(self, engine: KvEngine) -> Self {
        Self { engine, number: self.number + 1 }
    }
}

impl fmt::Display for Generation {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}-{}", self.engine, self.number)
    }
}

impl FromStr for Generation {
    type Err = ();
    fn from_str(text: &str) -> Result<Self, ()> {
        let (engine, number) = text.split_once('-').ok_or(())?;
        let engine = [KvEngine::Sled, KvEngine::Redb].into_iter().find(|known| known.to_string() == engine).ok_or(())?;
        Ok(Self { engine, number: number.parse().map_err(|_| ())? })
    }
}

/// Why a directory is not opened.
#[derive(Debug, thiserror::Error)]
enum PlaceError {
    #[error("{0} is open in another process")]
    Open(PathBuf),
    #[error("{0} was made by an earlier build, which kept its rows without checksums: move it away")]
    Earlier(PathBuf),
}

/// A directory that this process has for itself.
#[derive(Debug)]
pub(super) struct Place {
    directory: PathBuf,
    _lock: File,
}

impl Place {
    /// Takes `directory`, which is made if it is not there.
    pub(super) fn open(directory: &Path) -> Result<Self, EngineError> {
        let failed = |source| EngineError::io("open", source);
        fs::create_dir_all(directory).map_err(failed)?;
        let lock = File::create(directory.join(LOCK)).map_err(failed)?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                return Err(EngineError::new("open", PlaceError::Open(directory.to_owned())));
            }
            Err(TryLockError::Error(error)) => return Err(failed(error)),
        }
        if directory.join(BEFORE_GENERATIONS).is_file() {
            return Err(EngineError::new("open", PlaceError::Earlier(directory.to_owned())));
        }
        Ok(Self { directory: directory.to_owned(), _lock: lock })
    }

    pub(super) fn directory(&self) -> &Path {
        &self.directory
    }

    pub(super) fn blobs(&self) -> PathBuf {
        self.directory.join(BLOBS)
    }

    pub(super) fn flushed(&self) -> PathBuf {
        self.directory.join(FLUSHED)
    }

    pub(super) fn of(&self, generation: Generation) -> PathBuf {
        self.directory.join(generation.to_string())
    }

    /// The current generation; none in a new directory. Where `CURRENT` can't be read, the oldest generation is it:
    /// a rewrite that did not end has made the newer one.
    pub(super) fn current(&self) -> io::Result<Option<Generation>> {
        Self::current_in(&self.directory)
    }

    /// The same of a directory that somebody else may have open. One that is not there has none.
    pub(super) fn current_in(directory: &Path) -> io::Result<Option<Generation>> {
        let mut all = match names(directory) {
            Ok(names) => names.iter().filter_map(|name| name.parse::<Generation>().ok()).collect::<Vec<_>>(),
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(error),
        };
        let named = fs::read_to_string(directory.join(CURRENT)).ok();
        let named = named.and_then(|text| text.trim_end().parse::<Generation>().ok());
        if let Some(named) = named.filter(|named| all.contains(named)) {
            return Ok(Some(named));
        }
        all.sort_by_key(|generation| generation.number);
        Ok(all.first().copied())
    }

    pub(super) fn set_current(&self, generation: Generation) -> io::Result<()> {
        disk::replace(&self.directory, CURRENT, format!("{generation}\n").as_bytes())
    }

    /// Removes all generations but this one: what a rewrite left that did not end.
    pub(super) fn keep_only(&self, generation: Generation) -> io::Result<()> {
        for other in self.generations()?.into_iter().filter(|other| *other != generation) {
            fs::remove_dir_all(self.of(other))?;
        }
        Ok(())
    }

    fn generations(&self) -> io::Result<Vec<Generation>> {
        let names = names(&self.directory)?;
        Ok(names.iter().filter_map(|name| name.parse().ok()).collect())
    }

    /// Moves all that is here aside. Says where to.
    pub(super) fn quarantine(&self, now_ms: u64) -> io::Result<PathBuf> {
        let aside = self.directory.join(format!("{QUARANTINE}{now_ms}"));
        fs::create_dir_all(&aside)?;
        for name in names(&self.directory)? {
            if [CURRENT, BLOBS, FLUSHED].contains(&name.as_str()) || name.parse::<Generation>().is_ok() {
                fs::rename(self.directory.join(&name), aside.join(&name))?;
            }
        }
        disk::sync_directory(&self.directory)?;
        let mut earlier: Vec<String> =
            names(&self.directory)?.into_iter().filter(|name| name.starts_with(QUARANTINE)).collect();
        earlier.sort();
        for oldest in earlier.iter().rev().skip(QUARANTINES_MAX) {
            fs::remove_dir_all(self.directory.join(oldest))?;
        }
        Ok(aside)
    }
}

fn names(directory: &Path) -> io::Result<Vec<String>> {
    let mut names = Vec::new();
    for entry in fs::read_dir(directory)? {
        names.extend(entry?.file_name().into_string().ok());
    }
    Ok(names)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn generation(text: &str) -> Generation {
        text.parse().unwrap()
    }

    #[test]
    fn a_directory_is_one_process_own() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::open(directory.path()).unwrap();
        assert!(Place::open(directory.path()).is_err());
        drop(place);
        assert!(Place::open(directory.path()).is_ok());
    }

    #[test]
    fn the_current_generation_is_named_or_else_the_oldest() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::open(directory.path()).unwrap();
        assert_eq!(place.current().unwrap(), None);
        for name in ["sled-1", "redb-2", "surprise", "sled-x"] {
            fs::create_dir(directory.path().join(name)).unwrap();
        }
        place.set_current(generation("redb-2")).unwrap();
        assert_eq!(place.current().unwrap(), Some(generation("redb-2")));
        for damaged in ["redb-9", "rfdb-2", "", "\u{fffd}"] {
            fs::write(directory.path().join(CURRENT), damaged).unwrap();
            assert_eq!(place.current().unwrap(), Some(generation("sled-1")), "{damaged:?}");
        }
        place.keep_only(generation("redb-2")).unwrap();
        assert_eq!(place.current().unwrap(), Some(generation("redb-2")));
        assert!(directory.path().join("surprise").exists());
    }

    #[test]
    fn a_quarantine_takes_everything_and_few_are_kept() {
        let directory = tempfile::tempdir().unwrap();
        let place = Place::open(directory.path()).unwrap();
        for now_ms in 1000..1006 {
            fs::create_dir(place.of(generation("sled-1"))).unwrap();
            fs::create_dir(place.blobs()).unwrap();
            let aside = place.quarantine(now_ms).unwrap();
            assert!(aside.join("sled-1").is_dir() && aside.join(BLOBS).is_dir());
            assert_eq!(place.current().unwrap(), None);
        }
        let kept = names(directory.path()).unwrap().into_iter().filter(|name| name.starts_with(QUARANTINE)).count();
        assert_eq!(kept, QUARANTINES_MAX);
        assert!(directory.path().join("quarantine-1005").exists());
    }

    #[test]
    fn a_directory_of_an_earlier_build_is_named_and_left_alone() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join(BEFORE_GENERATIONS), b"rows").unwrap();
        let error = Place::open(directory.path()).unwrap_err();
        assert!(std::error::Error::source(&error).unwrap().to_string().contains("earlier build"));
    }
}
