//! What a node keeps on its disk, so that it comes up again with the control plane gone.
//!
//! Every file is written under another name, synced and renamed: a reader sees the old one or the new one. Blobs are
//! hashed again whenever they are read, and a release is verified again from here at every start: the disk is trusted
//! with keeping, not with truth. Files are for their owner only; those that hold values of variables, some of them secret,
//! are sealed by a key that may lie elsewhere.
//!
//! ```text
//! plan.json               the last plan, sealed
//! ledger.json             the highest version of plans that was ever taken, and what was ever revoked
//! trials.json             the releases that have not behaved for long enough yet, sealed
//! roots/<version>.json    the roots that followed the configured one
//! serving.json            the last good release of each app, sealed
//! sealing.key             what they are sealed by, unless the configuration names another file
//! blobs/sha256/<hex>      manifests, app documents, components, files, signatures
//! signatures/<hex>.json   which blobs may be signatures of the manifest <hex>
//! files/<hex>/<component> what guests of the manifest <hex> see as their files
//! ```

use std::collections::{BTreeMap, BTreeSet};
use std::fs::{self, DirBuilder, File, OpenOptions};
use std::io::{self, Read as _, Write as _};
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_certs::Seal;
use selvage_config::oci::{self, Descriptor, Manifest};
use selvage_config::plan::{PLAN_BYTES_MAX, Plan};
use selvage_config::release::Release;
use selvage_config::signature::Envelope;
use selvage_config::{AppName, Digest};
use serde::Serialize;
use serde::de::DeserializeOwned;

use super::ledger::Kept;
use super::trial::Trial;

/// Largest document besides blobs, bytes.
const DOCUMENT_BYTES_MAX: u64 = 2 * PLAN_BYTES_MAX as u64;
/// How the name of a file begins that is being written.
const PARTIAL_PREFIX: &str = ".partial-";
/// Random bytes in such a name.
const PARTIAL_NAME_BYTES: usize = 8;

/// The sealing key, where the configuration names no other file.
const SEALING_KEY: &str = "sealing.key";

/// A node's directory. Every call blocks.
///
/// What holds values of variables lies there sealed: plans, and releases with what was said of them.
#[derive(Debug, Clone)]
pub struct State {
    dir: PathBuf,
    seal: Arc<Seal>,
}

/// A file or directory that can't be used.
#[derive(Debug, thiserror::Error)]
#[error("{action} {}", path.display())]
pub struct StateError {
    action: &'static str,
    path: PathBuf,
    source: io::Error,
}

fn failed(action: &'static str, path: &Path) -> impl FnOnce(io::Error) -> StateError {
    let path = path.to_owned();
    move |source| StateError { action, path, source }
}

impl State {
    /// Opens the directory, or makes it.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open(dir: &Path) -> Result<Self, StateError> {
        Self::open_with(dir, None)
    }

    /// The same with a sealing key that may lie elsewhere; it is made where there is none.
    ///
    /// # Errors
    /// [`StateError`].
    pub fn open_with(dir: &Path, sealing_key: Option<&Path>) -> Result<Self, StateError> {
        make_dir(dir)?;
        let sealing_key = sealing_key.map_or_else(|| dir.join(SEALING_KEY), Path::to_owned);
        let seal = Seal::open(&sealing_key).map_err(failed("use the sealing key", &sealing_key))?;
        let state = Self { dir: dir.to_owned(), seal: Arc::new(seal) };
        for dir in [state.blobs(), state.dir.join("signatures"), state.dir.join("files"), state.dir.join("roots")] {
            make_dir(&dir)?;
        }
        Ok(state)
    }

    /// The directory.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    fn blobs(&self) -> PathBuf {
        self.dir.join("blobs").join("sha256")
    }

    fn signatures_of(&self, manifest: Digest) -> PathBuf {
        self.dir.join("signatures").join(format!("{}.json", manifest.hex()))
    }

    /// A document that lies sealed. One of before there was a seal is taken as it is, and sealed when it is kept again.
    fn sealed<T: DeserializeOwned>(&self, name: &str) -> Result<Option<T>, StateError> {
        let path = self.dir.join(name);
        let Some(bytes) = read(&path, DOCUMENT_BYTES_MAX)? else { return Ok(None) };
        let foreign = || failed("open", &path)(io::Error::other("it was sealed with another key, or for another file"));
        let bytes = self.seal.open_record(name.as_bytes(), &bytes).ok_or_else(foreign)?;
        serde_json::from_slice(&bytes).map(Some).map_err(|error| failed("read", &path)(error.into()))
    }

    fn keep_sealed<T: Serialize + ?Sized>(&self, name: &str, document: &T) -> Result<(), StateError> {
        let path = self.dir.join(name);
        let bytes = serde_json::to_vec(document).map_err(|error| failed("write", &path)(error.into()))?;
        // A restart says again what stands there already; to write it down costs milliseconds for each of thousands.
        let is_same = |found: Vec<u8>| {
            !found.starts_with(b"{")
                && self.seal.open_record(name.as_bytes(), &found).is_some_and(|found| found == bytes)
        };
        if fs::read(&path).is_ok_and(is_same) {
            return Ok(());
        }
        write(&path, &self.seal.seal(name.as_bytes(), bytes).map_err(failed("seal", &path))?)
    }

    /// A blob, if it is here and whole. A damaged one counts as absent, so that it is fetched anew.
    ///
    /// # Errors
    /// The disk's.
    pub fn blob(&self, digest: Digest) -> Result<Option<Bytes>, StateError> {
        let path = self.blobs().join(digest.hex());
        let Some(bytes) = read(&path, oci::COMPONENT_BYTES_MAX)? else { return Ok(None) };
        if Digest::of(&bytes) == digest {
            return Ok(Some(bytes.into()));
        }
        tracing::warn!(%digest, "blob on disk is damaged, dropped");
        fs::remove_file(&path).map_err(failed("remove", &path))?;
        Ok(None)
    }

    /// Keeps a blob.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_blob(&self, bytes: &[u8]) -> Result<(), StateError> {
        let path = self.blobs().join(Digest::of(bytes).hex());
        if path.exists() { Ok(()) } else { write(&path, bytes) }
    }

    /// The last plan.
    ///
    /// # Errors
    /// The disk's, or a file that is no plan.
    pub fn plan(&self) -> Result<Option<Plan>, StateError> {
        self.sealed("plan.json")
    }

    /// Keeps a plan.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_plan(&self, plan: &Plan) -> Result<(), StateError> {
        self.keep_sealed("plan.json", plan)
    }

    /// What was taken and revoked.
    ///
    /// # Errors
    /// The disk's, or a file that is no ledger.
    pub fn ledger(&self) -> Result<Option<Kept>, StateError> {
        document(&self.dir.join("ledger.json"))
    }

    /// Keeps what was taken and revoked.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_ledger(&self, kept: &Kept) -> Result<(), StateError> {
        keep_document(&self.dir.join("ledger.json"), kept)
    }

    /// The releases on trial.
    ///
    /// # Errors
    /// The disk's, or a file that is no such list.
    pub fn trials(&self) -> Result<BTreeMap<Digest, Trial>, StateError> {
        Ok(self.sealed("trials.json")?.unwrap_or_default())
    }

    /// Keeps the releases on trial.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_trials(&self, trials: &BTreeMap<Digest, Trial>) -> Result<(), StateError> {
        self.keep_sealed("trials.json", trials)
    }

    /// A root that followed the configured one.
    ///
    /// # Errors
    /// The disk's, or a file that is no envelope.
    pub fn root(&self, version: u64) -> Result<Option<Envelope>, StateError> {
        document(&self.dir.join("roots").join(format!("{version}.json")))
    }

    /// Keeps a root.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_root(&self, version: u64, envelope: &Envelope) -> Result<(), StateError> {
        keep_document(&self.dir.join("roots").join(format!("{version}.json")), envelope)
    }

    /// The last good release of each app.
    ///
    /// # Errors
    /// The disk's, or a file that is none.
    pub fn serving(&self) -> Result<BTreeMap<AppName, Release>, StateError> {
        Ok(self.sealed("serving.json")?.unwrap_or_default())
    }

    /// Keeps the last good release of each app.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_serving(&self, serving: &BTreeMap<AppName, Release>) -> Result<(), StateError> {
        self.keep_sealed("serving.json", serving)
    }

    /// Which blobs may be signatures of a manifest.
    ///
    /// # Errors
    /// The disk's, or a file that is no such list.
    pub fn signatures(&self, manifest: Digest) -> Result<Vec<Descriptor>, StateError> {
        Ok(document(&self.signatures_of(manifest))?.unwrap_or_default())
    }

    /// Keeps which blobs may be signatures of a manifest.
    ///
    /// # Errors
    /// The disk's.
    pub fn keep_signatures(&self, manifest: Digest, layers: &[Descriptor]) -> Result<(), StateError> {
        keep_document(&self.signatures_of(manifest), layers)
    }

    /// Makes the directory that a component's guests see as their files.
    ///
    /// # Errors
    /// The disk's; a file that is also a directory.
    pub fn keep_files<'a>(
        &self,
        manifest: Digest,
        component: &str,
        files: impl Iterator<Item = (&'a str, &'a Bytes)>,
    ) -> Result<PathBuf, StateError> {
        let dir = self.dir.join("files").join(manifest.hex()).join(component);
        make_dir(&dir)?;
        for (path, bytes) in files {
            let path = dir.join(path);
            // What a former run left is as good as new if it has the same bytes; then nobody is disturbed.
            let is_there = fs::read(&path).is_ok_and(|found| found == *bytes);
            if !is_there {
                make_dir(path.parent().unwrap_or(&dir))?;
                write(&path, bytes)?;
            }
        }
        Ok(dir)
    }

    /// Drops what no manifest of `manifests` needs. Returns how many files and directories went.
    ///
    /// # Errors
    /// The disk's. Then some is dropped and some is not, and nothing that is needed is lost.
    pub fn sweep(&self, manifests: &BTreeSet<Digest>) -> Result<usize, StateError> {
        let mut needed = BTreeSet::new();
        for manifest in manifests {
            needed.insert(manifest.hex());
            needed.extend(self.signatures(*manifest)?.iter().map(|layer| layer.digest.hex()));
            let Some(bytes) = self.blob(*manifest)? else { continue };
            if let Ok(Manifest { config, layers, .. }) = serde_json::from_slice(&bytes) {
                needed.extend(std::iter::once(&config).chain(&layers).map(|layer| layer.digest.hex()));
            }
        }
        let roots: BTreeSet<String> = manifests.iter().map(Digest::hex).collect();
        let blobs = drop_others(&self.blobs(), |name| needed.contains(name))?;
        let is_root = |name: &str| roots.contains(name.strip_suffix(".json").unwrap_or(name));
        let signatures = drop_others(&self.dir.join("signatures"), is_root)?;
        Ok(blobs + signatures + drop_others(&self.dir.join("files"), is_root)?)
    }
}

fn make_dir(path: &Path) -> Result<(), StateError> {
    DirBuilder::new().recursive(true).mode(0o700).create(path).map_err(failed("make directory", path))
}

fn read(path: &Path, bytes_max: u64) -> Result<Option<Vec<u8>>, StateError> {
    let file = match File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed("open", path)(error)),
    };
    let mut bytes = Vec::new();
    file.take(bytes_max + 1).read_to_end(&mut bytes).map_err(failed("read", path))?;
    if bytes.len() as u64 > bytes_max {
        return Err(failed("read", path)(io::ErrorKind::FileTooLarge.into()));
    }
    Ok(Some(bytes))
}

/// Writes a file whole: it is there after a crash, or the one before it.
fn write(path: &Path, bytes: &[u8]) -> Result<(), StateError> {
    let mut random = [0; PARTIAL_NAME_BYTES];
    let unavailable = |_| failed("name", path)(io::Error::other("no random bytes"));
    SystemRandom::new().fill(&mut random).map_err(unavailable)?;
    let dir = path.parent().unwrap_or(Path::new("."));
    let partial = dir.join(format!("{PARTIAL_PREFIX}{}", u64::from_le_bytes(random)));
    let written = (|| {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&partial)?;
        file.write_all(bytes)?;
        file.sync_all()?;
        fs::rename(&partial, path)?;
        File::open(dir)?.sync_all()
    })();
    written.map_err(|error| {
        // What is left of it would only take room; that it can't be removed changes nothing.
        let _ = fs::remove_file(&partial);
        failed("write", path)(error)
    })
}

fn document<T: DeserializeOwned>(path: &Path) -> Result<Option<T>, StateError> {
    let Some(bytes) = read(path, DOCUMENT_BYTES_MAX)? else { return Ok(None) };
    serde_json::from_slice(&bytes).map(Some).map_err(|error| failed("read", path)(error.into()))
}

fn keep_document<T: Serialize + ?Sized>(path: &Path, document: &T) -> Result<(), StateError> {
    let bytes = serde_json::to_vec(document).map_err(|error| failed("write", path)(error.into()))?;
    // A restart says again what stands there already; to write it down costs milliseconds for each of thousands.
    if fs::read(path).is_ok_and(|found| found == bytes) { Ok(()) } else { write(path, &bytes) }
}

fn drop_others(dir: &Path, keep: impl Fn(&str) -> bool) -> Result<usize, StateError> {
    let mut dropped = 0;
    for entry in fs::read_dir(dir).map_err(failed("list", dir))? {
        let path = entry.map_err(failed("list", dir))?.path();
        let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
        if !keep(name) {
            let removed = if path.is_dir() { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(failed("remove", &path))?;
            dropped += 1;
        }
    }
    Ok(dropped)
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::release::verify::tests::release;

    fn state() -> (tempfile::TempDir, State) {
        let dir = tempfile::tempdir().unwrap();
        let state = State::open(dir.path()).unwrap();
        (dir, state)
    }

    fn plan() -> Plan {
        let variables = [("token".to_owned(), "s3cret".to_owned())].into();
        let release = Release {
            id: "hello@1".parse().unwrap(),
            repository: "acme/hello".parse().unwrap(),
            manifest: Digest::of(b""),
            variables,
            created_ms: 1,
            created_by: "ops".into(),
        };
        Plan::new("fra-1".parse().unwrap(), 3, vec![release], Vec::new())
    }

    #[test]
    fn a_plan_outlives_the_program_and_is_for_its_owner_only() {
        let (dir, state) = state();
        assert_eq!(state.plan().unwrap(), None);
        state.keep_plan(&plan()).unwrap();
        assert_eq!(State::open(dir.path()).unwrap().plan().unwrap(), Some(plan()));
        let mode = fs::metadata(dir.path().join("plan.json")).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
    }

    #[test]
    fn no_value_of_a_variable_lies_on_the_disk_as_it_is() {
        let (dir, state) = state();
        let release = plan().releases.remove(0);
        state.keep_plan(&plan()).unwrap();
        state.keep_serving(&[("hello".parse().unwrap(), release)].into()).unwrap();
        for name in ["plan.json", "serving.json"] {
            let bytes = fs::read(dir.path().join(name)).unwrap();
            assert!(!bytes.windows(6).any(|window| window == b"s3cret"), "{name}");
        }
        let kept = fs::read(dir.path().join("plan.json")).unwrap();
        state.keep_plan(&plan()).unwrap();
        assert_eq!(fs::read(dir.path().join("plan.json")).unwrap(), kept, "what stands there is not written again");
        // It can't be put in another's place, and opens with no other key.
        fs::copy(dir.path().join("serving.json"), dir.path().join("plan.json")).unwrap();
        assert!(state.plan().is_err());
        let other = dir.path().join("other.key");
        assert!(State::open_with(dir.path(), Some(&other)).unwrap().serving().is_err());
        assert_eq!(State::open(dir.path()).unwrap().serving().unwrap().len(), 1);
    }

    #[test]
    fn a_plan_of_before_there_was_a_seal_is_read_and_sealed_when_it_is_kept() {
        let (dir, state) = state();
        let path = dir.path().join("plan.json");
        fs::write(&path, serde_json::to_vec(&plan()).unwrap()).unwrap();
        assert_eq!(state.plan().unwrap(), Some(plan()));
        state.keep_plan(&plan()).unwrap();
        assert!(!fs::read(&path).unwrap().windows(6).any(|window| window == b"s3cret"));
        assert_eq!(state.plan().unwrap(), Some(plan()));
    }

    #[test]
    fn a_damaged_document_is_an_error_and_not_an_empty_one() {
        let (dir, state) = state();
        fs::write(dir.path().join("plan.json"), b"{\"generation\":").unwrap();
        assert!(state.plan().is_err());
    }

    #[test]
    fn a_damaged_blob_counts_as_absent() {
        let (dir, state) = state();
        let digest = Digest::of(b"content");
        state.keep_blob(b"content").unwrap();
        assert_eq!(state.blob(digest).unwrap().unwrap(), "content");
        fs::write(dir.path().join("blobs/sha256").join(digest.hex()), b"c0ntent").unwrap();
        assert_eq!(state.blob(digest).unwrap(), None);
        state.keep_blob(b"content").unwrap();
        assert!(state.blob(digest).unwrap().is_some());
    }

    #[test]
    fn what_no_kept_release_needs_is_dropped() {
        let (_dir, state) = state();
        let fetched = release();
        let (manifest, signature) = (fetched.head.expected, Descriptor::of(oci::BUNDLE, b"signature"));
        state.keep_blob(&fetched.head.manifest).unwrap();
        fetched.blobs.values().for_each(|bytes| state.keep_blob(bytes).unwrap());
        state.keep_blob(b"signature").unwrap();
        state.keep_signatures(manifest, &[signature]).unwrap();
        state.keep_blob(b"stale").unwrap();
        state.keep_signatures(Digest::of(b"stale"), &[]).unwrap();
        let old = state.keep_files(Digest::of(b"stale"), "web", std::iter::empty()).unwrap();

        assert_eq!(state.sweep(&[manifest].into()).unwrap(), 3);
        assert!(!old.exists());
        let kept = [manifest, Digest::of(b"signature")].into_iter().chain(fetched.blobs.into_keys());
        for digest in kept {
            assert!(state.blob(digest).unwrap().is_some(), "{digest}");
        }
    }

    #[test]
    fn files_are_laid_out_as_the_app_names_them() {
        let (_dir, state) = state();
        let bytes = Bytes::from_static(b"text");
        let files = || [("a/b.txt", &bytes), ("c", &bytes)].into_iter();
        let dir = state.keep_files(Digest::of(b"m"), "web", files()).unwrap();
        fs::write(dir.join("c"), b"changed").unwrap();
        state.keep_files(Digest::of(b"m"), "web", files()).unwrap();
        for path in ["a/b.txt", "c"] {
            assert_eq!(fs::read(dir.join(path)).unwrap(), b"text");
        }
        let both = [("c", &bytes), ("c/d", &bytes)].into_iter();
        assert!(state.keep_files(Digest::of(b"m"), "web", both).is_err());
    }
}
