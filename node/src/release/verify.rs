//! Who may say what runs: a release is taken only if a trusted key signed its manifest and every byte matches it.
//!
//! The signature covers the manifest's digest; the manifest names the app document and every blob by digest; the app
//! document holds routes, grants and token rules. So nothing of a release is outside the signature but the values of
//! its variables. [`verify`] is the only way to a [`Verified`], and `compile` takes nothing else.

mod judge;
mod keyless;
mod policy;
mod signature;

#[cfg(test)]
pub(crate) mod tests;

use std::collections::BTreeMap;
use std::fmt;
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use selvage_config::app::{App, AppError, Component};
use selvage_config::digest::DigestError;
use selvage_config::oci::{self, Descriptor, Manifest};
use selvage_config::snapshot::Revoked;
use selvage_config::{AppName, ComponentName, Digest};

pub use judge::{Judge, Proof, Verdict};
pub use policy::{Policy, PolicyError, Rule};
pub use selvage_config::key::{KeyError, PublicKey};
pub use signature::SignatureError;

use super::fetch::{Fetched, Head};

/// Most bytes of all blobs of one release together: they are in memory while it is activated.
pub const RELEASE_BYTES_MAX: u64 = 512 * 1024 * 1024;
/// Verdicts that are remembered; at the next one all are found anew.
const VERDICTS_MAX: usize = 16_384;
/// How a component begins (component model, "Binary Format"), and how a core module does (core spec 5.5.16).
const PREAMBLES: [&[u8; 8]; 2] = [b"\0asm\x0d\0\x01\0", b"\0asm\x01\0\0\0"];

/// What counts here now: the policy, what was taken back from it, and what was found by both.
#[derive(Debug)]
pub struct Terms {
    /// Whose word counts.
    pub policy: Policy,
    /// What does not run and whose word does not count, whatever the policy says.
    pub revoked: Revoked,
    /// Verdicts that stand, as long as these terms do. Other terms begin without any.
    verdicts: Mutex<BTreeMap<(Digest, AppName, String), Arc<Verdict>>>,
}

impl Terms {
    /// Terms under which nothing was verified yet.
    pub fn new(policy: Policy, revoked: Revoked) -> Self {
        Self { policy, revoked, verdicts: Mutex::default() }
    }

    /// A verdict that was found before.
    fn remembered(&self, key: &(Digest, AppName, String)) -> Option<Arc<Verdict>> {
        self.verdicts.lock().unwrap_or_else(PoisonError::into_inner).get(key).cloned()
    }

    fn remember(&self, key: (Digest, AppName, String), verdict: Arc<Verdict>) {
        let mut verdicts = self.verdicts.lock().unwrap_or_else(PoisonError::into_inner);
        if verdicts.len() >= VERDICTS_MAX {
            verdicts.clear();
        }
        verdicts.insert(key, verdict);
    }
}

impl From<Policy> for Terms {
    fn from(policy: Policy) -> Self {
        Self::new(policy, Revoked::default())
    }
}

/// A release whose signature the policy accepted and whose every byte matched.
pub struct Verified {
    app: App,
    manifest: Digest,
    blobs: BTreeMap<Digest, Bytes>,
}

/// Code of a component out of a [`Verified`].
#[derive(Clone, Copy)]
pub struct VerifiedComponent<'a> {
    digest: Digest,
    bytes: &'a Bytes,
}

/// A manifest whose signature the policy accepted: what it names may be fetched.
#[derive(Debug)]
pub(crate) struct Trusted(Manifest);

/// Why a release was not taken.
#[derive(Debug, thiserror::Error)]
pub enum VerifyError {
    /// Nobody signed it.
    #[error("no signature")]
    Unsigned,
    /// Somebody signed it, or something pretends to be a signature.
    #[error("none of {found} signatures is by a trusted key")]
    Untrusted {
        /// How many were looked at.
        found: usize,
        /// Why each was not taken.
        #[source]
        why: Rejections,
    },
    /// The policy has no rule for this app, so nobody may sign it.
    #[error("no rule of the policy covers app {app} in repository {repository:?}")]
    NoRule {
        /// The app.
        app: AppName,
        /// Where it lies.
        repository: String,
    },
    /// Some of those who must have signed did not.
    #[error("{what}: by {found} of the {needed} signers that the policy demands")]
    Short {
        /// What: `signature`, or the demanded attestation's predicate type.
        what: String,
        /// How many signed.
        found: usize,
        /// How many must.
        needed: usize,
        /// Why what else there is does not count.
        #[source]
        why: Rejections,
    },
    /// It was taken back, or something in it was.
    #[error("{0} is revoked")]
    Revoked(Digest),
    /// Other bytes than named.
    #[error("digest is {actual}, not {expected}")]
    Digest {
        /// What was named.
        expected: Digest,
        /// What came.
        actual: Digest,
    },
    /// Another length than the manifest says.
    #[error("{digest} has {actual} bytes, the manifest says {expected}")]
    Size {
        /// Which blob.
        digest: Digest,
        /// What the manifest says.
        expected: u64,
        /// What came.
        actual: u64,
    },
    /// The manifest is not of the schema.
    #[error("read manifest")]
    Manifest(#[source] serde_json::Error),
    /// It names something by a digest that can't be computed here.
    #[error("read manifest: {field}")]
    Algorithm {
        /// Where it stands.
        field: String,
        /// Which algorithm.
        source: DigestError,
    },
    /// The manifest is none that a node runs.
    #[error("manifest {0}")]
    Form(&'static str),
    /// The app document is not valid.
    #[error("read app")]
    App(#[source] AppError),
    /// The app document is of another app: whoever deploys must not lend one app the stores of another.
    #[error("release is of app {expected}, its document of {actual}")]
    Name {
        /// The release's.
        expected: AppName,
        /// The document's.
        actual: AppName,
    },
    /// The app names a blob that the manifest does not.
    #[error("{digest}, which the app names, is no {media_type} layer of the manifest")]
    Layer {
        /// The blob.
        digest: Digest,
        /// What it should be.
        media_type: &'static str,
    },
    /// A blob did not come along.
    #[error("{0} is missing")]
    Missing(Digest),
    /// The code of a component is not WebAssembly.
    #[error("component {0} is not WebAssembly")]
    NotWasm(ComponentName),
}

/// Why each of some signatures was not taken.
#[derive(Debug)]
pub struct Rejections {
    kept: Vec<(Digest, SignatureError)>,
    /// How many were looked at, those that counted included.
    looked: usize,
}

impl Rejections {
    /// The first of them, with their bundles.
    pub fn iter(&self) -> impl Iterator<Item = (Digest, &SignatureError)> {
        self.kept.iter().map(|(digest, why)| (*digest, why))
    }
}

impl VerifyError {
    /// The stable word for a [`Refusal`](selvage_config::plan::Refusal).
    pub fn cause(&self) -> &'static str {
        match self {
            Self::Unsigned => "unsigned",
            Self::NoRule { .. } => "policy",
            Self::Short { .. } => "untrusted",
            Self::Revoked(_) => "revoked",
            Self::Untrusted { .. } => "untrusted",
            Self::Digest { .. } | Self::Size { .. } => "digest",
            Self::Missing(_) => "fetch",
            Self::Manifest(_)
            | Self::Algorithm { .. }
            | Self::Form(_)
            | Self::App(_)
            | Self::Name { .. }
            | Self::Layer { .. }
            | Self::NotWasm(_) => "app",
        }
    }
}

/// Takes what was fetched only if it is exactly what a trusted key signed.
///
/// # Errors
/// The first thing that is wrong.
pub fn verify(fetched: Fetched, terms: &Terms) -> Result<Verified, VerifyError> {
    let Fetched { app: name, head, blobs } = fetched;
    let trusted = trust(&head, &name, terms)?;
    let app = trusted.app(&name, &blobs)?;
    if app.name != name {
        return Err(VerifyError::Name { expected: name, actual: app.name });
    }
    let mut kept = BTreeMap::new();
    for (component_name, component) in &app.components {
        let bytes = trusted.blob(component.digest, oci::WASM, &blobs)?;
        if !PREAMBLES.iter().any(|preamble| bytes.starts_with(*preamble)) {
            return Err(VerifyError::NotWasm(component_name.clone()));
        }
        kept.insert(component.digest, bytes);
        for file in component.files.values() {
            kept.insert(*file, trusted.blob(*file, oci::APP_FILE, &blobs)?);
        }
    }
    Ok(Verified { app, manifest: head.expected, blobs: kept })
}

/// Takes a manifest only if the policy accepts its signatures. Before anything large is fetched, and again by
/// [`verify`]: the second time it is remembered, for as long as the terms are the same.
pub(crate) fn trust(head: &Head, app: &AppName, terms: &Terms) -> Result<Trusted, VerifyError> {
    let mut judge = Judge::new(terms, app, &head.repository, head.expected)?;
    let key = (head.expected, app.clone(), head.repository.clone());
    if terms.remembered(&key).is_none() {
        // Bundles first, wherever they stand: beside one the old form does not count.
        let (old, new): (Vec<_>, Vec<_>) = head.candidates.iter().partition(|candidate| candidate.is_legacy());
        for candidate in new.into_iter().chain(old) {
            judge.offer(candidate);
        }
        terms.remember(key, Arc::new(judge.verdict()?));
    }
    read(head, terms)
}

/// The manifest of a head whose signatures suffice.
fn read(head: &Head, terms: &Terms) -> Result<Trusted, VerifyError> {
    let actual = Digest::of(&head.manifest);
    if actual != head.expected {
        return Err(VerifyError::Digest { expected: head.expected, actual });
    }
    let trusted = Trusted::new(&head.manifest)?;
    let named = || std::iter::once(&trusted.0.config).chain(&trusted.0.layers).map(|descriptor| descriptor.digest);
    match named().find(|digest| terms.revoked.digests.contains(digest)) {
        Some(revoked) => Err(VerifyError::Revoked(revoked)),
        None => Ok(trusted),
    }
}

impl Trusted {
    /// Reads the manifest and checks that it is of a form that a node runs.
    fn new(bytes: &[u8]) -> Result<Self, VerifyError> {
        if bytes.len() > oci::MANIFEST_BYTES_MAX {
            return Err(VerifyError::Form("is too large"));
        }
        let manifest: Manifest =
            serde_json::from_slice(bytes).map_err(|error| match oci::unsupported_digest(bytes) {
                Some((field, source)) => VerifyError::Algorithm { field, source },
                None => VerifyError::Manifest(error),
            })?;
        let is_image = manifest.media_type.as_deref().is_none_or(|media_type| media_type == oci::MANIFEST);
        if manifest.schema_version != 2 || !is_image {
            return Err(VerifyError::Form("is no image manifest"));
        }
        if manifest.layers.len() > oci::LAYERS_MAX {
            return Err(VerifyError::Form("has too many layers"));
        }
        let sizes = || std::iter::once(&manifest.config).chain(&manifest.layers).map(|d| d.size);
        let sum = sizes().fold(0_u64, u64::saturating_add);
        if sizes().any(|size| size > oci::COMPONENT_BYTES_MAX) || sum > RELEASE_BYTES_MAX {
            return Err(VerifyError::Form("names too many bytes"));
        }
        let known = match manifest.config.media_type.as_str() {
            oci::APP_CONFIG => manifest.layers.iter().all(|l| [oci::WASM, oci::APP_FILE].contains(&&*l.media_type)),
            oci::WASM_CONFIG | oci::EMPTY => matches!(&*manifest.layers, [one] if one.media_type == oci::WASM),
            _ => false,
        };
        if !known {
            return Err(VerifyError::Form("is neither of a Selvage app nor of one WebAssembly component"));
        }
        Ok(Self(manifest))
    }

    /// The blobs that a release needs: the app document, if it has one, first.
    pub(crate) fn needed(&self) -> impl Iterator<Item = &Descriptor> {
        self.document().into_iter().chain(&self.0.layers)
    }

    fn document(&self) -> Option<&Descriptor> {
        Some(&self.0.config).filter(|config| config.media_type == oci::APP_CONFIG)
    }

    /// The app: its document, or what a lone component gets.
    fn app(&self, name: &AppName, blobs: &BTreeMap<Digest, Bytes>) -> Result<App, VerifyError> {
        if let Some(document) = self.document() {
            return App::from_json(&matching(document, blobs)?).map_err(VerifyError::App);
        }
        let [layer] = &*self.0.layers else { return Err(VerifyError::Form("has more than one component")) };
        let component = name.as_str().parse::<ComponentName>().expect("an app's and a component's name have one rule");
        Ok(App::of_component(name.clone(), component, layer.digest))
    }

    /// The blob of a layer that the app names.
    fn blob(
        &self,
        digest: Digest,
        media_type: &'static str,
        blobs: &BTreeMap<Digest, Bytes>,
    ) -> Result<Bytes, VerifyError> {
        let layer = self.0.layers.iter().find(|l| l.digest == digest && l.media_type == media_type);
        matching(layer.ok_or(VerifyError::Layer { digest, media_type })?, blobs)
    }
}

/// The bytes that a descriptor describes, hashed here and now.
fn matching(descriptor: &Descriptor, blobs: &BTreeMap<Digest, Bytes>) -> Result<Bytes, VerifyError> {
    let bytes = blobs.get(&descriptor.digest).ok_or(VerifyError::Missing(descriptor.digest))?;
    let actual = Digest::of(bytes);
    if actual != descriptor.digest {
        return Err(VerifyError::Digest { expected: descriptor.digest, actual });
    }
    let size = bytes.len() as u64;
    if size != descriptor.size {
        return Err(VerifyError::Size { digest: actual, expected: descriptor.size, actual: size });
    }
    Ok(bytes.clone())
}

impl Verified {
    /// The app.
    pub fn app(&self) -> &App {
        &self.app
    }

    /// The manifest's digest: what was signed.
    pub fn manifest(&self) -> Digest {
        self.manifest
    }

    /// The code of one component, if the app has it.
    pub fn component(&self, name: &ComponentName) -> Option<VerifiedComponent<'_>> {
        self.components().find(|(n, ..)| *n == name).map(|(.., code)| code)
    }

    /// Every component with its code.
    pub fn components(&self) -> impl Iterator<Item = (&ComponentName, &Component, VerifiedComponent<'_>)> {
        self.app.components.iter().filter_map(|(name, component)| {
            let digest = component.digest;
            Some((name, component, VerifiedComponent { digest, bytes: self.blobs.get(&digest)? }))
        })
    }

    /// The content of a file of the app.
    pub fn file(&self, digest: &Digest) -> Option<&Bytes> {
        self.blobs.get(digest)
    }
}

impl fmt::Debug for Verified {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Verified({} {})", self.app.name, self.manifest)
    }
}

impl<'a> VerifiedComponent<'a> {
    /// Which bytes.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    /// The bytes.
    pub fn bytes(&self) -> &'a [u8] {
        self.bytes
    }
}

impl fmt::Display for Rejections {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, (digest, why)) in self.kept.iter().enumerate() {
            let separator = if index == 0 { "" } else { "; " };
            write!(f, "{separator}signature {}: {why}", digest.short())?;
        }
        if self.looked > self.kept.len() && !self.kept.is_empty() {
            write!(f, "; {} looked at", self.looked)?;
        }
        Ok(())
    }
}

impl std::error::Error for Rejections {}
