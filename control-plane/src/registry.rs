//! The component registry: OCI distribution-spec 1.1 over files and a catalog.
//!
//! Nothing that a client says of bytes is believed: every digest is computed here, while the bytes come in. A
//! manifest is taken only when all that it names is there, so whatever can be pulled can be pulled whole.

mod blobs;
mod catalog;
mod collect;
mod error;
mod manifests;
mod serve;
mod shared;
mod target;
mod uploads;
mod upstream;

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use http::StatusCode;
use selvage_config::Digest;
use selvage_config::control_plane::{RegistryConfig, RepositoryRule};
use selvage_config::oci::{MANIFEST_BYTES_MAX, Repository};
use selvage_config::release::ReleaseId;

use blobs::{Blobs, Hold};
use catalog::{BlobRecord, Catalog, Held, ManifestRecord, Object};
use manifests::Outline;
use uploads::{Taken, Uploads};

use crate::audit::now_ms;
use crate::journal::JournalError;
use crate::state::{KeyValue, State, StateError};

pub(crate) use collect::Collected;
pub(crate) use error::RegistryError;
pub(crate) use serve::{challenge, host, serve};
pub(crate) use target::Reference;
pub use upstream::UpstreamError;
pub(crate) use upstream::Upstreams;

/// A blob that was asked for is noted to be young again only after this long: most are asked for often.
const TOUCH_MS: u64 = 600_000;

/// Blobs that are brought from the object store at once; of one there is one.
const BRINGING: usize = 16;

/// Blobs, manifests and tags. Its methods wait on the disk.
#[derive(Debug)]
pub(crate) struct Registry {
    blobs: Blobs,
    catalog: Catalog,
    uploads: Arc<Uploads>,
    config: RegistryConfig,
    /// Held while files and catalog change together: whoever finds that nobody has a file may then remove it.
    changing: Mutex<()>,
    state: Arc<State>,
    /// Each is held by whoever brings what falls to it from the object store.
    bringing: [Mutex<()>; BRINGING],
}

/// A manifest that was pushed.
#[derive(Debug)]
pub(crate) struct Pushed {
    digest: Digest,
    subject: Option<Digest>,
}

impl Registry {
    /// Opens the registry over its directories and its part of the database.
    pub(crate) fn open(
        blobs: PathBuf,
        uploads: &Path,
        state: Arc<State>,
        config: RegistryConfig,
    ) -> std::io::Result<Self> {
        Ok(Self {
            config,
            blobs: Blobs::open(blobs)?,
            catalog: Catalog::new(Arc::clone(&state)),
            uploads: Arc::new(Uploads::open(uploads)?),
            changing: Mutex::new(()),
            state,
            bringing: Default::default(),
        })
    }

    fn changing(&self) -> MutexGuard<'_, ()> {
        let changing = self.changing.lock().unwrap_or_else(PoisonError::into_inner);
        self.catalog.begin();
        changing
    }

    /// Makes a change under the lock. Where the state is shared, what other control planes changed meanwhile comes first,
    /// and it is tried again on that: it is made, or refused, as if all had come one after the other.
    fn change<T>(&self, mut change: impl FnMut() -> Result<T, RegistryError>) -> Result<T, RegistryError> {
        let until = Instant::now() + self.state.contend();
        let _changing = self.changing();
        loop {
            let base = self.catalog.begin();
            match change() {
                Err(RegistryError::State(StateError::Journal(JournalError::Stale))) => {
                    // It may have come in already.
                    if self.state.applied() <= base {
                        self.state.wait_past(base)?;
                    }
                }
                Err(error @ RegistryError::Refused { status: StatusCode::SERVICE_UNAVAILABLE, .. }) => {
                    return Err(error);
                }
                Err(error @ RegistryError::Refused { .. }) => {
                    if self.state.is_current(base)? {
                        return Err(error);
                    }
                }
                other => return other,
            }
            if Instant::now() > until {
                return Err(JournalError::Away("other control planes change too much at once".into()).into());
            }
        }
    }

    fn rule(&self, repository: &Repository) -> Option<&RepositoryRule> {
        self.config.rules.iter().find(|rule| rule.fits(repository))
    }

    fn has_immutable_tags(&self, repository: &Repository) -> bool {
        self.rule(repository).is_some_and(|rule| rule.immutable_tags)
    }

    /// Goes on only if `bytes` more have room: in the registry, and in this repository.
    fn check_room(&self, repository: &Repository, bytes: u64) -> Result<(), RegistryError> {
        let (held, most) = (self.bytes()?, self.config.bytes_max);
        if held.saturating_add(bytes) > most {
            let message = format!("the registry holds {held} of {most} bytes, {bytes} more have no room");
            return Err(RegistryError::over_quota(message));
        }
        let Some(most) = self.rule(repository).and_then(|rule| rule.bytes_max) else { return Ok(()) };
        let held = self.catalog.usage(repository)?;
        if held.saturating_add(bytes) > most {
            let message = format!("{repository} holds {held} of {most} bytes, {bytes} more have no room");
            return Err(RegistryError::over_quota(message));
        }
        Ok(())
    }

    /// Goes on only if clients may push to `repository`.
    fn check_ours(&self, repository: &Repository) -> Result<(), RegistryError> {
        match upstream::of(&self.config.upstreams, repository) {
            Some((upstream, _)) => {
                Err(RegistryError::denied(format!("{repository} mirrors {} and is not pushed to", upstream.url)))
            }
            None => Ok(()),
        }
    }

    /// Begins an upload that a client asked for.
    fn begin(&self, repository: &Repository) -> Result<Taken, RegistryError> {
        self.check_ours(repository)?;
        self.check_room(repository, 0)?;
        self.uploads.begin(repository)
    }

    /// Notes that somebody asked for a blob, and answers its size if it is there.
    fn touch_blob(&self, repository: &Repository, digest: &Digest) -> Result<Option<u64>, RegistryError> {
        let now = now_ms();
        match self.catalog.blob_record(repository, digest)? {
            Some(record) if record.touched_ms.saturating_add(TOUCH_MS) >= now => Ok(Some(record.size)),
            None => Ok(None),
            Some(old) => {
                let touched = self.change(|| {
                    let Some(record) = self.catalog.blob_record(repository, digest)? else { return Ok(None) };
                    self.catalog.add_blob(repository, digest, BlobRecord { touched_ms: now, ..record }, None)?;
                    Ok(Some(record.size))
                });
                match touched {
                    // Whoever only looks is answered while nothing can be changed.
                    Err(error) if error.status() == StatusCode::SERVICE_UNAVAILABLE => Ok(Some(old.size)),
                    touched => touched,
                }
            }
        }
    }

    /// What a tag or digest names, if this repository has it, and a note that a release is about to be made of it.
    pub(crate) fn resolve_for_release(
        &self,
        repository: &Repository,
        reference: &Reference,
    ) -> Result<Digest, RegistryError> {
        self.change(|| {
            let digest = self.resolve(repository, reference)?;
            let record = ManifestRecord { touched_ms: now_ms(), ..self.record(repository, &digest)? };
            self.catalog.add_manifest(repository, &digest, &record, None, None)?;
            Ok(digest)
        })
    }

    /// What a tag or digest names, if this repository has it.
    pub(crate) fn resolve(&self, repository: &Repository, reference: &Reference) -> Result<Digest, RegistryError> {
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no manifest {reference}"));
        let digest = match reference {
            Reference::Digest(digest) => *digest,
            Reference::Tag(tag) => self.catalog.tag(repository, tag)?.ok_or_else(unknown)?,
        };
        self.catalog.manifest(repository, &digest)?.map(|_| digest).ok_or_else(unknown)
    }

    /// A manifest's bytes, as they were pushed.
    pub(crate) fn manifest(&self, repository: &Repository, digest: &Digest) -> Result<Vec<u8>, RegistryError> {
        self.resolve(repository, &Reference::Digest(*digest))?;
        self.read(digest)
    }

    /// The bytes of a blob that is no larger than `max`.
    pub(crate) fn small_blob(
        &self,
        repository: &Repository,
        digest: &Digest,
        max: usize,
    ) -> Result<Vec<u8>, RegistryError> {
        let unknown = || RegistryError::blob_unknown(format!("{repository} has no blob {digest}"));
        let size = self.catalog.blob(repository, digest)?.ok_or_else(unknown)?;
        if size > max as u64 {
            return Err(RegistryError::too_large(format!("{digest} has {size} bytes, the most is {max}")));
        }
        self.read(digest)
    }

    /// Ends an upload. The client's `expected` digest must be that of the bytes.
    fn finish(&self, repository: &Repository, mut upload: Taken, expected: &Digest) -> Result<(), RegistryError> {
        let finished = upload.finish().and_then(|(file, actual, size)| {
            if actual != *expected {
                return Err(RegistryError::digest_invalid(format!("the blob is {actual}, not {expected}")));
            }
            self.with_object(&actual, size, &file, |object| {
                if self.catalog.blob(repository, &actual)?.is_none() {
                    self.check_room(repository, size)?;
                }
                // At another try it has its name already.
                if file.try_exists()? {
                    self.blobs.adopt(&file, &actual)?;
                }
                self.catalog.add_blob(repository, &actual, BlobRecord { size, touched_ms: now_ms() }, object)
            })
        });
        upload.end();
        finished
    }

    /// Gives `repository` a blob that `from` has. False if that has none.
    fn mount(&self, repository: &Repository, from: &Repository, digest: &Digest) -> Result<bool, RegistryError> {
        self.check_ours(repository)?;
        self.change(|| {
            let Some(size) = self.catalog.blob(from, digest)? else { return Ok(false) };
            if self.catalog.blob(repository, digest)?.is_none() {
                // Its bytes are on the disk already; the repository counts them all the same.
                let most = self.rule(repository).and_then(|rule| rule.bytes_max);
                if most.is_some() {
                    self.check_room(repository, size)?;
                }
            }
            let record = BlobRecord { size, touched_ms: now_ms() };
            self.catalog.add_blob(repository, digest, record, None).map(|()| true)
        })
    }

    fn delete_blob(&self, repository: &Repository, digest: &Digest) -> Result<(), RegistryError> {
        self.change(|| {
            if let Some(manifest) = self.catalog.referenced_by(repository, digest)? {
                return Err(RegistryError::in_use(format!("manifest {manifest} needs it")));
            }
            let unknown = || RegistryError::blob_unknown(format!("{repository} has no {digest}"));
            let held = self.catalog.remove_blob(repository, digest)?.ok_or_else(unknown)?;
            self.let_go(digest, held)
        })
    }

    /// Every row of the catalog as it is now, and what `also` says at the same moment. No file goes while the hold lives.
    pub(crate) fn freeze<T>(&self, also: impl FnOnce() -> T) -> Result<(T, Vec<KeyValue>, Hold), RegistryError> {
        let _changing = self.changing();
        let rows = self.catalog.rows()?;
        Ok((also(), rows, self.blobs.hold(self.catalog.digests()?)))
    }

    /// Where the bytes of `digest` lie.
    pub(crate) fn blob_path(&self, digest: &Digest) -> PathBuf {
        self.blobs.path(digest)
    }

    /// A digest that the catalog names and whose bytes are not there, if there is one.
    pub(crate) fn missing(&self) -> Result<Option<Digest>, RegistryError> {
        Ok(self.catalog.digests()?.into_iter().find(|digest| !self.blobs.path(digest).is_file()))
    }

    fn let_go(&self, digest: &Digest, held: Held) -> Result<(), RegistryError> {
        if let Held::Nowhere(object) = held {
            self.blobs.remove(digest)?;
            self.drop_object(object);
        }
        Ok(())
    }

    /// Takes a manifest, if it is one and all that it names is there.
    fn push(
        &self,
        repository: &Repository,
        reference: &Reference,
        content_type: Option<&str>,
        bytes: &[u8],
    ) -> Result<Pushed, RegistryError> {
        if bytes.len() > MANIFEST_BYTES_MAX {
            return Err(RegistryError::too_large(format!("a manifest has at most {MANIFEST_BYTES_MAX} bytes")));
        }
        let digest = Digest::of(bytes);
        let tag = match reference {
            Reference::Digest(expected) if *expected != digest => {
                return Err(RegistryError::digest_invalid(format!("the manifest is {digest}, not {expected}")));
            }
            Reference::Digest(_) => None,
            Reference::Tag(tag) => Some(tag.as_str()),
        };
        let outline = Outline::read(bytes, content_type)?;
        let (aside, size) = (self.uploads.aside()?, bytes.len() as u64);
        std::fs::write(&aside, bytes)?;
        let pushed = self.with_object(&digest, size, &aside, |object| {
            self.check_manifest(repository, &digest, &outline, tag)?;
            if self.catalog.manifest(repository, &digest)?.is_none() {
                self.check_room(repository, size)?;
            }
            self.blobs.write(&self.uploads.aside()?, bytes)?;
            let record = outline.clone().record(digest, size, now_ms());
            self.catalog.add_manifest(repository, &digest, &record, tag, object)
        });
        // Whatever became of it: the registry has a file of its own.
        std::fs::remove_file(&aside)?;
        pushed?;
        Ok(Pushed { digest, subject: outline.subject })
    }

    /// Goes on only if all that a manifest names is there, and its tag may be set.
    fn check_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        outline: &Outline,
        tag: Option<&str>,
    ) -> Result<(), RegistryError> {
        for blob in &outline.blobs {
            match self.catalog.blob(repository, &blob.digest)? {
                Some(size) if size == blob.size => {}
                Some(size) => {
                    let (digest, told) = (blob.digest, blob.size);
                    return Err(RegistryError::manifest_invalid(format!("{digest} has {size} bytes, not {told}")));
                }
                None => return Err(RegistryError::manifest_blob_unknown(format!("push {} first", blob.digest))),
            }
        }
        for manifest in &outline.manifests {
            if self.catalog.manifest(repository, &manifest.digest)?.is_none() {
                return Err(RegistryError::manifest_blob_unknown(format!("push {} first", manifest.digest)));
            }
        }
        if let Some(tag) = tag.filter(|_| self.has_immutable_tags(repository))
            && let Some(named) = self.catalog.tag(repository, tag)?
            && named != *digest
        {
            return Err(RegistryError::immutable(format!("tag {tag} of {repository} is {named} for ever")));
        }
        Ok(())
    }

    /// Deletes a manifest with its tags. `needing` tells, under the lock, which release needs it.
    fn delete_manifest(
        &self,
        repository: &Repository,
        digest: &Digest,
        needing: impl Fn() -> Option<ReleaseId>,
    ) -> Result<(), RegistryError> {
        self.change(|| {
            if let Some(release) = needing() {
                return Err(RegistryError::in_use(format!("release {release} needs it")));
            }
            if self.has_immutable_tags(repository) {
                let tag = self.catalog.tagged(repository)?.into_iter().find(|(_, named)| named == digest);
                if let Some((tag, _)) = tag {
                    return Err(RegistryError::immutable(format!("tag {tag} of {repository} is {digest} for ever")));
                }
            }
            if let Some(index) = self.catalog.referenced_by(repository, digest)? {
                return Err(RegistryError::in_use(format!("index {index} needs it")));
            }
            let unknown = || RegistryError::manifest_unknown(format!("{repository} has no manifest {digest}"));
            let held = self.catalog.remove_manifest(repository, digest)?.ok_or_else(unknown)?;
            self.let_go(digest, held)
        })
    }

    fn delete_tag(&self, repository: &Repository, tag: &str) -> Result<(), RegistryError> {
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no tag {tag}"));
        if self.has_immutable_tags(repository) {
            return Err(RegistryError::immutable(format!("tags of {repository} stay for ever")));
        }
        self.change(|| if self.catalog.remove_tag(repository, tag)? { Ok(()) } else { Err(unknown()) })
    }

    fn record(&self, repository: &Repository, digest: &Digest) -> Result<ManifestRecord, RegistryError> {
        let unknown = || RegistryError::manifest_unknown(format!("{repository} has no manifest {digest}"));
        self.catalog.manifest(repository, digest)?.ok_or_else(unknown)
    }
}
