//! Compiled code on disk.
//!
//! Native code from a file is run as it is, so an entry counts only with a MAC under a key that only this node has,
//! and the MAC is checked before anything else looks at the bytes. What does not pass is deleted and compiled again.
//!
//! An entry is mapped, not read: of code that nobody runs nothing is in memory. So the file must not change once its
//! MAC was checked. Entries are written under another name and never again; whoever else could write to them could
//! write to the node's key as well, and a directory that others may write to is refused.

use std::fs::{DirBuilder, File, OpenOptions, Permissions};
use std::io::{self, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::{DirBuilderExt, FileExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use ring::digest::{self, SHA256};
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
/// How names of files begin that are being written.
const TEMPORARY: &str = ".new-";
/// One that is older is being written by nobody any more.
const TEMPORARY_AGE_MAX: Duration = Duration::from_secs(3_600);
/// What the MACs are for: a key for one purpose only.
const PURPOSE: &[u8] = b"selvage compiled component 2";
/// Where a process finds its open files by their numbers.
const DESCRIPTORS: &str = if cfg!(target_os = "linux") { "/proc/self/fd" } else { "/dev/fd" };
/// What is read at a time to check a MAC, bytes.
const READ_BYTES: usize = 256 * 1024;

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
    /// Others may write to the directory.
    #[error("compile cache {path} may be written by others: chmod go-w {path}")]
    Writable {
        /// The directory.
        path: PathBuf,
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
        // Whatever the umask: below, what others may write to is refused.
        DirBuilder::new().recursive(true).mode(0o700).create(dir).map_err(failed(dir))?;
        if std::fs::metadata(dir).map_err(failed(dir))?.permissions().mode() & 0o022 != 0 {
            return Err(CacheError::Writable { path: dir.to_owned() });
        }
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
        let path = dir.join(format!("{TEMPORARY}{:016x}", u64::from_be_bytes(name)));
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

/// Compiled code on disk, its MAC checked once. It can be loaded again whatever becomes of its name.
pub(crate) struct OnDisk {
    file: File,
    key: hmac::Key,
}

impl OnDisk {
    /// The component. Its code is mapped from the file.
    ///
    /// # Errors
    /// The file is not what this node wrote, or the engine doesn't take it.
    pub(crate) fn load(&self, engine: &Engine) -> io::Result<Component> {
        self.check()?;
        let path = format!("{DESCRIPTORS}/{}", self.file.as_raw_fd());
        // SAFETY: this file was made by `Component::serialize` in `store` below: the MAC under this node's secret key
        // says so. It is this very file that is mapped, not what may have its name by now, and nobody writes to it
        // after it has got its name.
        #[expect(unsafe_code, reason = "the one place where authenticated code is loaded")]
        let component = unsafe { Component::deserialize_file(engine, path) };
        component.map_err(|error| io::Error::other(format!("{error:#}")))
    }

    /// Compares the MAC at the end of the file with one over the digest of what is before it.
    fn check(&self) -> io::Result<()> {
        let changed = || io::Error::new(io::ErrorKind::InvalidData, "was changed, or is of another node");
        let length = self.file.metadata()?.len().checked_sub(KEY_BYTES as u64).ok_or_else(changed)?;
        let mut digest = digest::Context::new(&SHA256);
        let mut buffer = vec![0; READ_BYTES];
        let mut at = 0;
        while at < length {
            let left = usize::try_from(length - at).unwrap_or(READ_BYTES).min(READ_BYTES);
            self.file.read_exact_at(&mut buffer[..left], at)?;
            digest.update(&buffer[..left]);
            at += left as u64;
        }
        let mut mac = [0; KEY_BYTES];
        self.file.read_exact_at(&mut mac, length)?;
        hmac::verify(&self.key, digest.finish().as_ref(), &mac).map_err(|_| changed())
    }
}

impl Entry<'_> {
    /// The component, if the entry is there and good, and where it lies. A bad one is deleted.
    pub(super) fn load(&self, engine: &Engine) -> Option<(Component, OnDisk)> {
        let file = match File::open(&self.path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return None,
            Err(error) => return self.reject(&error),
        };
        let on_disk = OnDisk { file, key: self.key.clone() };
        match on_disk.load(engine) {
            Ok(component) => Some((component, on_disk)),
            Err(error) => self.reject(&error),
        }
    }

    fn reject(&self, why: &io::Error) -> Option<(Component, OnDisk)> {
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
        new.file.write_all(code)?;
        new.file.write_all(hmac::sign(&self.key, digest::digest(&SHA256, code).as_ref()).as_ref())?;
        new.file.set_permissions(Permissions::from_mode(0o600))?;
        new.file.sync_all()?;
        std::fs::rename(&new.path, &self.path)?;
        File::open(self.dir)?.sync_all()
    }
}

/// Deletes the oldest entries until the rest is within [`CACHE_BYTES_MAX`], and what a crash left half written.
fn sweep(dir: &Path) -> io::Result<()> {
    let mut entries: Vec<(SystemTime, u64, PathBuf)> = Vec::new();
    for entry in std::fs::read_dir(dir)? {
        let entry = entry?;
        let path = entry.path();
        if path.extension().is_some_and(|extension| extension == ENTRY_EXTENSION) {
            let metadata = entry.metadata()?;
            entries.push((metadata.modified()?, metadata.len(), path));
        } else if entry.file_name().to_string_lossy().starts_with(TEMPORARY) {
            let age = entry.metadata()?.modified()?.elapsed().unwrap_or_default();
            if age > TEMPORARY_AGE_MAX {
                std::fs::remove_file(path)?;
            }
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
