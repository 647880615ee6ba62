//! Compiled code on disk.
//!
//! Native code from a file is run as it is, so an entry counts only with a MAC under a key that only this node has,
//! and the MAC is checked before anything else looks at the bytes. What does not pass is deleted and compiled again.

use std::fs::{File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use ring::hmac;
use ring::rand::{SecureRandom, SystemRandom};
use selvage_config::Digest;
use wasmtime::Engine;
use wasmtime::component::Component;

/// Bytes of the node's key, and of a MAC.
const KEY_BYTES: usize = 32;
/// Name of the key's file.
const KEY_FILE: &str = "cache.key";
/// How names of entries end.
const ENTRY_EXTENSION: &str = "cwasm";
/// Most bytes of all entries together. Beyond it the oldest go.
const CACHE_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// What the MACs are for: a key for one purpose only.
const PURPOSE: &[u8] = b"selvage compiled component 1";

/// A directory of compiled components.
#[derive(Clone)]
pub struct CompileCache {
    dir: PathBuf,
    key: hmac::Key,
}

/// The cache can't be opened.
#[derive(Debug, thiserror::Error)]
pub enum CacheError {
    /// The directory or the key can't be read or made.
    #[error("open compile cache at {path}")]
    Io {
        /// What could not be opened.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The key is not of the form, or others may read it.
    #[error("key {path} {problem}")]
    Key {
        /// Its file.
        path: PathBuf,
        /// What is wrong with it.
        problem: &'static str,
    },
    /// The system gives no random bytes.
    #[error("no random bytes for the key of the compile cache")]
    Random,
}

impl CompileCache {
    /// Opens the cache in `dir`; makes it, and its key, if there is none.
    ///
    /// # Errors
    /// See [`CacheError`].
    pub fn open(dir: &Path) -> Result<Self, CacheError> {
        let failed = |path: &Path| {
            let path = path.to_owned();
            move |source| CacheError::Io { path, source }
        };
        std::fs::create_dir_all(dir).map_err(failed(dir))?;
        let path = dir.join(KEY_FILE);
        if !path.exists() {
            make_key(dir, &path)?.map_err(failed(&path))?;
        }
        let problem = |problem| CacheError::Key { path: path.clone(), problem };
        let permissions = std::fs::metadata(&path).map_err(failed(&path))?.permissions();
        if permissions.mode() & 0o077 != 0 {
            return Err(problem("may be read by others"));
        }
        let key = std::fs::read(&path).map_err(failed(&path))?;
        if key.len() != KEY_BYTES {
            return Err(problem("is not 32 bytes long"));
        }
        Ok(Self { dir: dir.to_owned(), key: hmac::Key::new(hmac::HMAC_SHA256, &key) })
    }

    /// The place of what `component` compiles to on engines of this fingerprint.
    pub(super) fn entry(&self, component: Digest, fingerprint: &str) -> Entry<'_> {
        let name = format!("{}-{fingerprint}.{ENTRY_EXTENSION}", component.hex());
        // A key of its own for each place: an entry can't be passed off as another.
        let mut place = hmac::Context::with_key(&self.key);
        place.update(PURPOSE);
        place.update(component.as_bytes());
        place.update(fingerprint.as_bytes());
        let key = hmac::Key::new(hmac::HMAC_SHA256, place.sign().as_ref());
        Entry { dir: &self.dir, path: self.dir.join(name), key }
    }
}

/// Makes the key, unless another process was faster: then theirs counts.
fn make_key(dir: &Path, path: &Path) -> Result<io::Result<()>, CacheError> {
    let mut key = [0; KEY_BYTES];
    SystemRandom::new().fill(&mut key).map_err(|_| CacheError::Random)?;
    let make = || {
        let mut file = Temporary::create(dir)?;
        file.file.write_all(&key)?;
        file.file.sync_all()?;
        match std::fs::hard_link(&file.path, path) {
            Err(error) if error.kind() != io::ErrorKind::AlreadyExists => Err(error),
            _ => Ok(()),
        }
    };
    Ok(make())
}

/// A file that is deleted unless it is renamed.
struct Temporary {
    path: PathBuf,
    file: File,
}

impl Temporary {
    fn create(dir: &Path) -> io::Result<Self> {
        let mut name = [0; 8];
        SystemRandom::new().fill(&mut name).map_err(|_| io::Error::other("no random bytes"))?;
        let path = dir.join(format!(".new-{:016x}", u64::from_be_bytes(name)));
        let file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&path)?;
        Ok(Self { path, file })
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

/// The place of one compiled component.
pub(super) struct Entry<'a> {
    dir: &'a Path,
    path: PathBuf,
    key: hmac::Key,
}

impl Entry<'_> {
    /// The component, if the entry is there and good. A bad one is deleted.
    pub(super) fn load(&self, engine: &Engine) -> Option<Component> {
        let bytes = match std::fs::read(&self.path) {
            Ok(bytes) => bytes,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => return self.reject(&error),
        };
        let Some((mac, code)) = bytes.split_at_checked(KEY_BYTES) else { return self.reject(&"too short") };
        if hmac::verify(&self.key, code, mac).is_err() {
            return self.reject(&"was changed, or is of another node");
        }
        // SAFETY: these bytes were made by `Component::serialize` in `store` below: the MAC under this node's secret
        // key says so, and it covers all of them as they are in memory now. The file is not looked at again.
        #[expect(unsafe_code, reason = "the one place where authenticated code is loaded")]
        let component = unsafe { Component::deserialize(engine, code) };
        component.map_or_else(|error| self.reject(&format!("{error:#}")), Some)
    }

    fn reject(&self, why: &dyn std::fmt::Display) -> Option<Component> {
        tracing::warn!(entry = %self.path.display(), %why, "compiled component is not taken");
        let _ = std::fs::remove_file(&self.path);
        None
    }

    /// Keeps a component for the next start. Failure costs time only.
    pub(super) fn store(&self, component: &Component) {
        let written = component.serialize().map_err(|error| io::Error::other(format!("{error:#}")));
        if let Err(error) = written.and_then(|code| self.write(&code)) {
            tracing::warn!(entry = %self.path.display(), %error, "compiled component is not kept");
        }
        if let Err(error) = sweep(self.dir) {
            tracing::warn!(dir = %self.dir.display(), %error, "compile cache is not swept");
        }
    }

    fn write(&self, code: &[u8]) -> io::Result<()> {
        let mut new = Temporary::create(self.dir)?;
        new.file.write_all(hmac::sign(&self.key, code).as_ref())?;
        new.file.write_all(code)?;
        new.file.set_permissions(Permissions::from_mode(0o600))?;
        new.file.sync_all()?;
        std::fs::rename(&new.path, &self.path)?;
        File::open(self.dir)?.sync_all()
    }
}

/// Deletes the oldest entries until the rest is within [`CACHE_BYTES_MAX`].
fn sweep(dir: &Path) -> io::Result<()> {
    let mut entries: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == ENTRY_EXTENSION) {
            let metadata = entry.metadata()?;
            entries.push((metadata.modified()?, metadata.len(), path));
        }
    }
    entries.sort();
    let mut total: u64 = entries.iter().map(|(_, length, _)| length).sum();
    for (_, length, path) in entries {
        if total <= CACHE_BYTES_MAX {
            break;
        }
        std::fs::remove_file(path)?;
        total -= length;
    }
    Ok(())
}
