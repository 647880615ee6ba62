//! Mirrors of other registries: `<prefix>/<name>` here is `<name>` there, fetched when it is first asked for.
//!
//! A manifest is taken as one that is pushed is: whole, with all that it names, every digest computed here. So a mirror
//! serves on when its upstream is gone. Where we ask is what the configuration says and nowhere else: an upstream that
//! sends us to another host is followed only to hosts that are named too, which is also where its tokens come from.

mod ask;

use std::collections::HashMap;
use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use axum::body::Body;
use futures_util::future::BoxFuture;
use selvage_config::Digest;
use selvage_config::control_plane::Upstream;
use selvage_config::oci::{INDEX, Index, MANIFEST, MANIFEST_BYTES_MAX, Repository};

use super::manifests::Outline;
use super::serve::fill;
use super::target::Target;
use super::uploads::BLOB_BYTES_MAX;
use super::{Reference, RegistryError};
use crate::body::{Incoming, whole};
use crate::{Parts, disk};
use ask::{Answered, One};

/// Manifests that one index may name, and referrers that one manifest may have, to be mirrored with it.
const MANIFESTS_MAX: usize = 64;
/// Indexes within indexes.
const DEPTH_MAX: u32 = 2;
/// Fetches at once; of one thing there is one.
const FETCHES: usize = 16;
/// Names of which it is remembered when they were last asked for.
const ASKED_MAX: usize = 10_000;
/// What is asked for.
const ACCEPT: &str = "application/vnd.oci.image.manifest.v1+json, application/vnd.oci.image.index.v1+json, \
                      application/vnd.docker.distribution.manifest.v2+json, \
                      application/vnd.docker.distribution.manifest.list.v2+json";

/// An upstream that can't be used as it is configured.
#[derive(Debug, thiserror::Error)]
pub enum UpstreamError {
    /// A file can't be read.
    #[error("read {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The authorities can't be read.
    #[error("read the authorities of {url}")]
    Roots {
        /// The upstream.
        url: String,
        /// Why not.
        source: Box<selvage_certs::FileError>,
    },
    /// The client can't be made.
    #[error("make a client of {url}")]
    Client {
        /// The upstream.
        url: String,
        /// Why not.
        source: reqwest::Error,
    },
}

/// All upstreams.
#[derive(Debug)]
pub(crate) struct Upstreams {
    each: Vec<One>,
    /// Held by whoever fetches what falls to it.
    fetching: Vec<tokio::sync::Mutex<()>>,
    asked: Mutex<HashMap<String, Instant>>,
}

/// The upstream whose mirror `repository` is, and its name there.
pub(super) fn of<'u>(upstreams: &'u [Upstream], repository: &Repository) -> Option<(&'u Upstream, Repository)> {
    upstreams.iter().find_map(|upstream| {
        let rest = repository.as_str().strip_prefix(upstream.prefix.as_str())?.strip_prefix('/')?;
        Some((upstream, rest.parse().ok()?))
    })
}

impl Upstreams {
    /// Reads what the upstreams need to be asked.
    pub(crate) fn open(config: &[Upstream]) -> Result<Self, UpstreamError> {
        let each = config.iter().map(One::open).collect::<Result<_, _>>()?;
        let fetching = (0..FETCHES).map(|_| tokio::sync::Mutex::default()).collect();
        Ok(Self { each, fetching, asked: Mutex::default() })
    }

    fn of(&self, repository: &Repository) -> Option<(&One, Repository)> {
        self.each.iter().find_map(|one| {
            let (_, there) = of(std::slice::from_ref(one.config()), repository)?;
            Some((one, there))
        })
    }

    /// Whether `name` was asked for less than `seconds` ago.
    fn is_fresh(&self, name: &str, seconds: u64) -> bool {
        let asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        asked.get(name).is_some_and(|at| at.elapsed() < Duration::from_secs(seconds))
    }

    fn note(&self, name: String) {
        let mut asked = self.asked.lock().unwrap_or_else(PoisonError::into_inner);
        if asked.len() >= ASKED_MAX {
            // What is forgotten is merely asked for again.
            asked.clear();
        }
        asked.insert(name, Instant::now());
    }

    async fn alone(&self, name: &str) -> tokio::sync::MutexGuard<'_, ()> {
        let mut hasher = DefaultHasher::new();
        name.hash(&mut hasher);
        let index = usize::try_from(hasher.finish() % FETCHES as u64).unwrap_or_default();
        self.fetching[index].lock().await
    }
}

impl Parts {
    /// Fetches what is asked for, if it is in a mirror and not here. What the upstream does not have is not here
    /// either, and answered so.
    pub(super) async fn mirror(self: &Arc<Self>, target: &Target) -> Result<(), RegistryError> {
        let Some(repository) = target.repository() else { return Ok(()) };
        let Some((one, there)) = self.upstreams.of(repository) else { return Ok(()) };
        let fetch = Fetch { parts: self, one, here: repository, there: &there };
        match target {
            Target::Manifest(_, reference) => fetch.manifest(reference).await,
            Target::Referrers(_, subject) => fetch.referrers(subject).await,
            Target::Blob(_, digest) => {
                let _alone = self.upstreams.alone(&format!("{repository}@{digest}")).await;
                fetch.blob(digest).await.map(|_| ())
            }
            _ => Ok(()),
        }
    }
}

/// One request's way to an upstream.
struct Fetch<'f> {
    parts: &'f Arc<Parts>,
    one: &'f One,
    here: &'f Repository,
    there: &'f Repository,
}

impl Fetch<'_> {
    async fn resolve(&self, reference: &Reference) -> Result<Option<Digest>, RegistryError> {
        let (registry, name, reference) = (Arc::clone(&self.parts.registry), self.here.clone(), reference.clone());
        match disk::wait(move || registry.resolve(&name, &reference)).await {
            Ok(digest) => Ok(Some(digest)),
            Err(RegistryError::Refused { .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    async fn manifest(&self, reference: &Reference) -> Result<(), RegistryError> {
        let name = format!("{}:{reference}", self.here);
        let seconds = self.one.config().tag_seconds;
        let is_settled = |known: Option<Digest>| {
            known.is_some()
                && (matches!(reference, Reference::Digest(_)) || self.parts.upstreams.is_fresh(&name, seconds))
        };
        if is_settled(self.resolve(reference).await?) {
            return Ok(());
        }
        let _alone = self.parts.upstreams.alone(&name).await;
        let known = self.resolve(reference).await?;
        if is_settled(known) {
            return Ok(());
        }
        match self.take(reference.clone(), DEPTH_MAX).await {
            Ok(_) => self.parts.upstreams.note(name),
            // What was mirrored is better than nothing, and an upstream that is gone is asked again soon.
            Err(error) if known.is_some() => tracing::warn!(%name, %error, "upstream not reached, the mirror stays"),
            Err(error) => return Err(error),
        }
        Ok(())
    }

    /// Fetches a manifest and all that it names. False if there is none.
    fn take(&self, reference: Reference, depth: u32) -> BoxFuture<'_, Result<bool, RegistryError>> {
        Box::pin(async move {
            let path = format!("/v2/{}/manifests/{reference}", self.there);
            let Answered::Found(answer) = self.one.get(self.there, &path, ACCEPT).await? else { return Ok(false) };
            let kind = answer.headers().get("content-type").and_then(|value| value.to_str().ok()).map(str::to_owned);
            let bytes = whole(Body::from_stream(answer.bytes_stream()), MANIFEST_BYTES_MAX).await?;
            let digest = Digest::of(&bytes);
            if let Reference::Digest(wanted) = &reference
                && *wanted != digest
            {
                return Err(self.lies(&format!("answers {digest} for {wanted}")));
            }
            if self.resolve(&Reference::Digest(digest)).await?.is_none() {
                let outline = Outline::read(&bytes, kind.as_deref())?;
                if depth == 0 || outline.manifests.len() > MANIFESTS_MAX {
                    return Err(RegistryError::manifest_invalid("the index names too much to be mirrored"));
                }
                for manifest in &outline.manifests {
                    if !self.take(Reference::Digest(manifest.digest), depth - 1).await? {
                        return Err(self.lies(&format!("has no {} of its own index", manifest.digest)));
                    }
                }
                for blob in &outline.blobs {
                    if !self.blob(&blob.digest).await? {
                        return Err(self.lies(&format!("has no {} of its own manifest", blob.digest)));
                    }
                }
            }
            let (registry, name) = (Arc::clone(&self.parts.registry), self.here.clone());
            disk::wait(move || registry.push(&name, &reference, kind.as_deref(), &bytes)).await?;
            Ok(true)
        })
    }

    /// Fetches a blob. False if there is none.
    async fn blob(&self, digest: &Digest) -> Result<bool, RegistryError> {
        let (registry, name, wanted) = (Arc::clone(&self.parts.registry), self.here.clone(), *digest);
        if disk::wait(move || registry.touch_blob(&name, &wanted)).await?.is_some() {
            return Ok(true);
        }
        let path = format!("/v2/{}/blobs/{digest}", self.there);
        let Answered::Found(answer) = self.one.get(self.there, &path, "*/*").await? else { return Ok(false) };
        if answer.content_length().is_some_and(|length| length > BLOB_BYTES_MAX) {
            return Err(RegistryError::too_large(format!("a blob has at most {BLOB_BYTES_MAX} bytes")));
        }
        let (registry, name) = (Arc::clone(&self.parts.registry), self.here.clone());
        let upload = disk::wait(move || registry.uploads.begin(&name)).await?;
        let (upload, filled) = fill(upload, Incoming::new(Body::from_stream(answer.bytes_stream()))).await;
        if let Err(error) = filled {
            upload.end();
            return Err(error);
        }
        let (registry, name, wanted) = (Arc::clone(&self.parts.registry), self.here.clone(), *digest);
        disk::wait(move || registry.finish(&name, upload, &wanted)).await?;
        Ok(true)
    }

    /// Fetches what refers to a manifest: its signatures, mostly.
    async fn referrers(&self, subject: &Digest) -> Result<(), RegistryError> {
        let name = format!("{}/referrers/{subject}", self.here);
        let seconds = self.one.config().tag_seconds;
        if self.parts.upstreams.is_fresh(&name, seconds) {
            return Ok(());
        }
        let _alone = self.parts.upstreams.alone(&name).await;
        if self.parts.upstreams.is_fresh(&name, seconds) {
            return Ok(());
        }
        let listed = match self.list(subject).await {
            Ok(listed) => listed,
            Err(error) => {
                tracing::warn!(%name, %error, "upstream not reached, its referrers are those that were mirrored");
                return Ok(());
            }
        };
        for digest in listed.iter().take(MANIFESTS_MAX) {
            if self.resolve(&Reference::Digest(*digest)).await?.is_none() {
                self.take(Reference::Digest(*digest), 1).await?;
            }
        }
        self.parts.upstreams.note(name);
        Ok(())
    }

    async fn list(&self, subject: &Digest) -> Result<Vec<Digest>, RegistryError> {
        let api = format!("/v2/{}/referrers/{subject}", self.there);
        // distribution-spec 1.1, "Unavailable Referrers API": a tag of the same name as the digest lists them.
        let tag = format!("/v2/{}/manifests/sha256-{}", self.there, subject.hex());
        for path in [api, tag] {
            if let Answered::Found(answer) = self.one.get(self.there, &path, INDEX).await? {
                let bytes = whole(Body::from_stream(answer.bytes_stream()), MANIFEST_BYTES_MAX).await?;
                let index: Index = serde_json::from_slice(&bytes).map_err(|_| self.lies("lists referrers badly"))?;
                let manifests = index.manifests.into_iter().filter(|found| found.media_type == MANIFEST);
                return Ok(manifests.map(|found| found.digest).collect());
            }
        }
        Ok(Vec::new())
    }

    fn lies(&self, what: &str) -> RegistryError {
        RegistryError::upstream(format!("{} {what}", self.one.config().url))
    }
}
