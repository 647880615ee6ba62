//! A release's bytes, from this disk or else from the control plane's registry (OCI distribution-spec 1.1).
//!
//! First the manifest and its signatures, which are small; the rest only once a trusted key turns out to have signed.
//! Every digest is computed here, whatever a header says, and no more bytes are read than the manifest names.

use std::cmp::Reverse;
use std::collections::BTreeMap;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{StreamExt as _, TryStreamExt as _};
use selvage_config::app::App;
use selvage_config::oci::{self, Descriptor, Index, Manifest, Repository};
use selvage_config::release::Release;
use selvage_config::signature::{BUNDLE_BYTES_MAX, PREDICATE_SIGN, SIGNATURES_MAX};
use selvage_config::{AppName, Digest};

use super::neighbours::Sources;
use super::origin::{Origin, OriginError};
use super::state::{State, StateError};
use super::verify::{Judge, Terms, Trusted, VerifyError, trust};

/// Pages of a list of referrers that are read.
const PAGES_MAX: usize = 32;
/// Blobs of one release under way at once.
const BLOBS_AT_ONCE: usize = 4;
/// Longest search for signatures among what refers to a manifest. Everything that is listed is looked at until the policy
/// is met: whoever may push can lengthen the search, not end it, short of [`PAGES_MAX`] pages of them.
const SEARCH_MAX: Duration = Duration::from_secs(300);
/// When an artifact was made, in an index (OCI image-spec 1.1, annotations).
const CREATED: &str = "org.opencontainers.image.created";
/// What a bundle says, in an index (cosign 3, BUNDLE_SPEC.md).
const PREDICATE_TYPE: &str = "dev.sigstore.bundle.predicateType";
/// How the media type of a bundle begins, whatever its version: all are looked at, one version is taken.
const BUNDLE_PREFIX: &str = "application/vnd.dev.sigstore.bundle";
/// Largest manifest or index, bytes.
const MANIFEST_BYTES_MAX: u64 = oci::MANIFEST_BYTES_MAX as u64;

/// A release as it came. Nothing of it has been believed; [`verify`](super::verify::verify) does that.
#[derive(Debug, Clone)]
pub struct Fetched {
    /// The app that the release says to be of.
    pub app: AppName,
    /// The manifest and who may have signed it.
    pub head: Head,
    /// The app document and the layers.
    pub blobs: BTreeMap<Digest, Bytes>,
}

/// A manifest and what may be signatures of it.
#[derive(Debug, Clone)]
pub struct Head {
    /// What the manifest's digest must be.
    pub expected: Digest,
    /// The repository that it lies in. Empty: none.
    pub repository: String,
    /// The manifest as it came.
    pub manifest: Bytes,
    /// What may be signatures.
    pub candidates: Vec<Candidate>,
}

/// What may be a signature: a layer of an artifact that refers to the manifest.
#[derive(Debug, Clone)]
pub struct Candidate {
    /// How its manifest describes it.
    pub layer: Descriptor,
    /// Its bytes.
    pub bytes: Bytes,
}

impl Candidate {
    /// Whether it is of cosign 2's form.
    pub fn is_legacy(&self) -> bool {
        self.layer.media_type == oci::SIMPLE_SIGNING
    }
}

impl Fetched {
    /// A release out of files on this machine, without a signature.
    pub fn of_files(app: &App, files: BTreeMap<Digest, Bytes>) -> Self {
        let document = Bytes::from(app.to_json());
        let config = Descriptor::of(oci::APP_CONFIG, &document);
        let layer = |media_type: &str, digest: Digest| {
            let size = files.get(&digest).map_or(0, |bytes| bytes.len() as u64);
            let media_type = media_type.to_owned();
            Descriptor { media_type, digest, size, artifact_type: None, annotations: BTreeMap::new() }
        };
        let components = app.components.values();
        let layers = components.flat_map(|component| {
            let code = std::iter::once(layer(oci::WASM, component.digest));
            code.chain(component.files.values().map(|digest| layer(oci::APP_FILE, *digest))).collect::<Vec<_>>()
        });
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(oci::MANIFEST.into()),
            artifact_type: Some(oci::APP_CONFIG.into()),
            layers: layers.collect(),
            config,
            subject: None,
            annotations: BTreeMap::new(),
        };
        let manifest = Bytes::from(serde_json::to_vec(&manifest).expect("a manifest has only string keys"));
        let head =
            Head { expected: Digest::of(&manifest), repository: String::new(), manifest, candidates: Vec::new() };
        let mut blobs = files;
        blobs.insert(Digest::of(&document), document);
        Self { app: app.name.clone(), head, blobs }
    }
}

/// Why a release's bytes did not come.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The registry failed.
    #[error("fetch from registry")]
    Origin(#[from] OriginError),
    /// The registry does not have it.
    #[error("{0} is not in the registry")]
    Absent(Digest),
    /// It is not on this disk, and there is no control plane to ask.
    #[error("{0} is not on disk, and no control plane is to be asked")]
    Offline(Digest),
    /// What came is not to be taken.
    #[error("verify")]
    Verify(#[from] VerifyError),
    /// This disk failed.
    #[error("keep on disk")]
    State(#[from] StateError),
    /// The task ended early.
    #[error("disk task")]
    Ended(#[source] tokio::task::JoinError),
}

impl FetchError {
    /// The stable word for a [`Refusal`](selvage_config::plan::Refusal).
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Verify(error) => error.cause(),
            _ => "fetch",
        }
    }
}

/// Brings a release here: what is on disk from there, the rest from `sources`.
///
/// # Errors
/// [`FetchError`]. What came whole stays on disk for the next attempt.
pub async fn fetch(release: &Release, sources: &Sources, state: &State, terms: &Terms) -> Result<Fetched, FetchError> {
    let (head, trusted) = fetch_head(release, sources, state, terms).await?;
    let origin = sources.origin.as_ref();
    let registry = origin.map(|origin| Registry { origin, repository: &release.repository });
    let mut wanted: BTreeMap<Digest, u64> = BTreeMap::new();
    wanted.extend(trusted.needed().map(|descriptor| (descriptor.digest, descriptor.size)));
    let bring = |(digest, size)| {
        let registry = &registry;
        async move {
            if let Some(bytes) = on_disk(state, digest).await? {
                return Ok::<_, FetchError>((digest, bytes));
            }
            let bytes = match near(sources, digest, size).await {
                Some(bytes) => bytes,
                None => registry.as_ref().ok_or(FetchError::Offline(digest))?.blob(digest, size).await?,
            };
            let kept = bytes.clone();
            disk(state, move |state| state.keep_blob(&kept)).await?;
            Ok((digest, bytes))
        }
    };
    let blobs = futures_util::stream::iter(wanted).map(bring).buffer_unordered(BLOBS_AT_ONCE).try_collect().await?;
    Ok(Fetched { app: release.id.app.clone(), head, blobs })
}

/// Brings a release's manifest and its signatures here, and whether they suffice: all that decides whether it may run.
///
/// # Errors
/// [`FetchError`].
pub(crate) async fn fetch_head(
    release: &Release,
    sources: &Sources,
    state: &State,
    terms: &Terms,
) -> Result<(Head, Trusted), FetchError> {
    let digest = release.manifest;
    let registry = sources.origin.as_ref().map(|origin| Registry { origin, repository: &release.repository });
    let (app, repository) = (&release.id.app, release.repository.to_string());
    let mut judge = Judge::new(terms, app, &repository, digest)?;
    let mut head =
        Head { expected: digest, repository: repository.clone(), manifest: Bytes::new(), candidates: vec![] };
    head.manifest = match on_disk(state, digest).await? {
        Some(bytes) => bytes,
        None => match near(sources, digest, MANIFEST_BYTES_MAX).await {
            Some(bytes) => bytes,
            None => registry.as_ref().ok_or(FetchError::Offline(digest))?.manifest(digest).await?,
        },
    };
    for candidate in disk(state, move |state| candidates_on_disk(state, digest)).await? {
        judge.offer(&candidate);
    }
    if !judge.is_met() {
        for candidate in candidates_near(sources, digest).await {
            judge.offer(&candidate);
        }
    }
    if let (false, Some(registry)) = (judge.is_met(), &registry) {
        // What is on disk does not suffice; the registry may know a signature that came later.
        let searched = tokio::time::timeout(SEARCH_MAX, registry.search(digest, &mut judge)).await;
        searched.unwrap_or_else(|_| Err(OriginError::Slow(format!("signatures of {digest}")).into()))?;
    }
    head.candidates = judge.kept().to_vec();
    judge.verdict()?;
    let trusted = trust(&head, app, terms)?;
    keep_head(state, &head).await?;
    Ok((head, trusted))
}

/// Keeps what proves that a release may run, so that the next start needs nobody for it.
async fn keep_head(state: &State, head: &Head) -> Result<(), FetchError> {
    let head = head.clone();
    disk(state, move |state| {
        state.keep_blob(&head.manifest)?;
        head.candidates.iter().try_for_each(|candidate| state.keep_blob(&candidate.bytes))?;
        let layers: Vec<Descriptor> = head.candidates.into_iter().map(|candidate| candidate.layer).collect();
        state.keep_signatures(head.expected, &layers)
    })
    .await
}

fn candidates_on_disk(state: &State, manifest: Digest) -> Result<Vec<Candidate>, StateError> {
    // An unreadable list is an empty one here: if it can't be had anew, the release counts as unsigned.
    let layers = state.signatures(manifest).unwrap_or_else(|error| {
        tracing::warn!(error = super::origin::chain(&error), "list of signatures on disk is damaged");
        Vec::new()
    });
    let candidate = |layer: Descriptor| {
        let bytes = state.blob(layer.digest).transpose()?;
        Some(bytes.map(|bytes| Candidate { layer, bytes }))
    };
    layers.into_iter().take(SIGNATURES_MAX).filter_map(candidate).collect()
}

/// What a neighbour has with this digest.
async fn near(sources: &Sources, digest: Digest, size: u64) -> Option<Bytes> {
    sources.neighbours.as_ref()?.blob(digest, size).await
}

/// What neighbours take for signatures of a manifest. The judge believes none of it for that.
async fn candidates_near(sources: &Sources, manifest: Digest) -> Vec<Candidate> {
    let Some(neighbours) = &sources.neighbours else { return Vec::new() };
    let mut found = Vec::new();
    for layer in neighbours.signatures(manifest).await {
        if layer.size <= BUNDLE_BYTES_MAX as u64
            && let Some(bytes) = neighbours.blob(layer.digest, layer.size).await
        {
            found.push(Candidate { layer, bytes });
        }
    }
    found
}

async fn on_disk(state: &State, digest: Digest) -> Result<Option<Bytes>, FetchError> {
    disk(state, move |state| state.blob(digest)).await
}

/// Does what blocks where it may.
async fn disk<T: Send + 'static>(
    state: &State,
    act: impl FnOnce(&State) -> Result<T, StateError> + Send + 'static,
) -> Result<T, FetchError> {
    let state = state.clone();
    let done = tokio::task::spawn_blocking(move || act(&state)).await.map_err(FetchError::Ended)?;
    Ok(done?)
}

/// One repository of the control plane's registry.
struct Registry<'a> {
    origin: &'a Origin,
    repository: &'a Repository,
}

impl Registry<'_> {
    /// The manifest with a digest.
    async fn manifest(&self, digest: Digest) -> Result<Bytes, FetchError> {
        let bytes = self.by_reference(&digest.to_string(), oci::MANIFEST).await?;
        expect(digest, bytes.ok_or(FetchError::Absent(digest))?)
    }

    async fn by_reference(&self, reference: &str, accept: &str) -> Result<Option<Bytes>, FetchError> {
        let path = format!("/v2/{}/manifests/{reference}", self.repository);
        Ok(self.origin.get(&path, accept, MANIFEST_BYTES_MAX).await?)
    }

    /// The blob with a digest, of which not more than `size` bytes are read.
    async fn blob(&self, digest: Digest, size: u64) -> Result<Bytes, FetchError> {
        let path = format!("/v2/{}/blobs/{digest}", self.repository);
        let bytes = self.origin.get_blob(&path, size).await?;
        expect(digest, bytes.ok_or(FetchError::Absent(digest))?)
    }

    /// Offers what may be a signature of the manifest until the policy is met. Something broken among it is left out: it
    /// must not stand in the way of a good one.
    async fn search(&self, manifest: Digest, judge: &mut Judge<'_>) -> Result<(), FetchError> {
        let mut listed = self.listed(&format!("/v2/{}/referrers/{manifest}", self.repository)).await?;
        if listed.is_empty() {
            // A registry without that endpoint: the list lies under a tag (distribution-spec 1.1, "Referrers Tag
            // Schema").
            let tag = format!("sha256-{}", manifest.hex());
            listed = self.listed(&format!("/v2/{}/manifests/{tag}", self.repository)).await?;
        }
        // What the list says of each is a hint where to look first, and no more: clients write there whatever they like.
        let is_signature = |d: &Descriptor| d.annotations.get(PREDICATE_TYPE).is_some_and(|t| t == PREDICATE_SIGN);
        listed.sort_by_cached_key(|d| (!is_signature(d), Reverse(d.annotations.get(CREATED).cloned())));
        let opened = listed.into_iter().map(|referrer| self.bundle_of(referrer));
        let opened = futures_util::stream::iter(opened).buffered(BLOBS_AT_ONCE);
        let mut opened = std::pin::pin!(opened);
        while let Some(candidate) = opened.next().await {
            if candidate?.is_some_and(|candidate| judge.offer(&candidate)) {
                return Ok(());
            }
        }
        if judge.wants_legacy() {
            for candidate in self.legacy(manifest).await? {
                judge.offer(&candidate);
            }
        }
        Ok(())
    }

    /// The manifests of an index, which may come in pages: [`PAGES_MAX`] of them are read.
    async fn listed(&self, path: &str) -> Result<Vec<Descriptor>, FetchError> {
        let (mut listed, mut path) = (Vec::new(), path.to_owned());
        for _ in 0..PAGES_MAX {
            let Some(page) = self.origin.get_page(&path, oci::INDEX, MANIFEST_BYTES_MAX).await? else { break };
            listed
                .extend(serde_json::from_slice::<Index>(&page.bytes).map(|index| index.manifests).unwrap_or_default());
            let Some(next) = page.next else { return Ok(listed) };
            path = next;
        }
        if !listed.is_empty() {
            tracing::warn!(path, listed = listed.len(), "there is more in this list than is read");
        }
        Ok(listed)
    }

    /// The bundle in an artifact, if it holds one. What the index says of the artifact's type is not believed: clients
    /// write there whatever they like.
    async fn bundle_of(&self, referrer: Descriptor) -> Result<Option<Candidate>, FetchError> {
        let bytes = match self.manifest(referrer.digest).await {
            Ok(bytes) => bytes,
            Err(FetchError::Absent(_) | FetchError::Verify(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let Ok(Manifest { layers, .. }) = serde_json::from_slice(&bytes) else { return Ok(None) };
        match <[Descriptor; 1]>::try_from(layers) {
            Ok([layer]) if layer.media_type.starts_with(BUNDLE_PREFIX) => self.candidate(layer).await,
            _ => Ok(None),
        }
    }

    /// cosign 2's signatures: the layers of an image under a tag.
    async fn legacy(&self, manifest: Digest) -> Result<Vec<Candidate>, FetchError> {
        let tag = format!("sha256-{}.sig", manifest.hex());
        let Some(bytes) = self.by_reference(&tag, oci::MANIFEST).await? else { return Ok(Vec::new()) };
        let layers = serde_json::from_slice::<Manifest>(&bytes).map(|image| image.layers).unwrap_or_default();
        let mut found = Vec::new();
        for layer in layers.into_iter().filter(|l| l.media_type == oci::SIMPLE_SIGNING).take(SIGNATURES_MAX) {
            found.extend(self.candidate(layer).await?);
        }
        Ok(found)
    }

    async fn candidate(&self, layer: Descriptor) -> Result<Option<Candidate>, FetchError> {
        if layer.size > BUNDLE_BYTES_MAX as u64 {
            return Ok(None);
        }
        match self.blob(layer.digest, layer.size).await {
            Ok(bytes) => Ok(Some(Candidate { layer, bytes })),
            Err(FetchError::Absent(_) | FetchError::Verify(_) | FetchError::Origin(OriginError::Large { .. })) => {
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

/// `bytes`, if they have the digest.
fn expect(expected: Digest, bytes: Bytes) -> Result<Bytes, FetchError> {
    let actual = Digest::of(&bytes);
    if actual == expected { Ok(bytes) } else { Err(VerifyError::Digest { expected, actual }.into()) }
}
