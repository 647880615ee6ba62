//! OCI image manifests as Selvage reads and writes them (OCI image-spec 1.1), and its media types.

use std::collections::BTreeMap;

use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::digest::DigestError;

/// Largest manifest or index, bytes (what registries commonly take).
pub const MANIFEST_BYTES_MAX: usize = 4 * 1024 * 1024;
/// Largest component, bytes.
pub const COMPONENT_BYTES_MAX: u64 = 256 * 1024 * 1024;
/// Most layers of an app's manifest.
pub const LAYERS_MAX: usize = 500;

/// An image manifest.
pub const MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
/// An image index.
pub const INDEX: &str = "application/vnd.oci.image.index.v1+json";
/// The empty config, `{}`.
pub const EMPTY: &str = "application/vnd.oci.empty.v1+json";
/// The config of a container image: what the manifest of cosign 2's signatures has.
pub const IMAGE_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// A wasm component, as the CNCF wasm artifact layout names it.
pub const WASM: &str = "application/wasm";
/// The config of a CNCF wasm artifact.
pub const WASM_CONFIG: &str = "application/vnd.wasm.config.v0+json";
/// The config of a Selvage app: an [`App`](crate::app::App).
pub const APP_CONFIG: &str = "application/vnd.selvage.app.v1+json";
/// A file of a Selvage app.
pub const APP_FILE: &str = "application/vnd.selvage.file.v1";
/// The locked app of `spin registry push`.
pub const SPIN_LOCK: &str = "application/vnd.fermyon.spin.application.v1+config";
/// A Sigstore bundle, the layer of a signature's manifest.
pub const BUNDLE: &str = "application/vnd.dev.sigstore.bundle.v0.3+json";
/// The legacy layer of cosign 2: a simple signing payload.
pub const SIMPLE_SIGNING: &str = "application/vnd.dev.cosign.simplesigning.v1+json";
/// The layer annotation with the signature of a [`SIMPLE_SIGNING`] payload, base64.
pub const COSIGN_SIGNATURE: &str = "dev.cosignproject.cosign/signature";
/// The layer annotation with a file name.
pub const TITLE: &str = "org.opencontainers.image.title";

/// What a manifest says of one blob.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Descriptor {
    /// What it is.
    pub media_type: String,
    /// Its content address.
    pub digest: Digest,
    /// Its length, bytes.
    pub size: u64,
    /// What kind of artifact, in an index.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// Remarks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Descriptor {
    /// Describes `bytes`.
    pub fn of(media_type: &str, bytes: &[u8]) -> Self {
        Self {
            media_type: media_type.to_owned(),
            digest: Digest::of(bytes),
            size: bytes.len() as u64,
            artifact_type: None,
            annotations: BTreeMap::new(),
        }
    }
}

/// An image manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Manifest {
    /// Always 2.
    pub schema_version: u32,
    /// [`MANIFEST`], or absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// What kind of artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub artifact_type: Option<String>,
    /// The config blob.
    pub config: Descriptor,
    /// The content.
    pub layers: Vec<Descriptor>,
    /// The manifest that this one is about: a signature's artifact.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub subject: Option<Descriptor>,
    /// Remarks.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub annotations: BTreeMap<String, String>,
}

impl Manifest {
    /// The manifest of an app: its document, and every file that the document names.
    pub fn of_app(document: &[u8], layers: impl IntoIterator<Item = Descriptor>) -> Self {
        Self {
            schema_version: 2,
            media_type: Some(MANIFEST.to_owned()),
            artifact_type: Some(APP_CONFIG.to_owned()),
            config: Descriptor::of(APP_CONFIG, document),
            layers: layers.into_iter().collect(),
            subject: None,
            annotations: BTreeMap::new(),
        }
    }

    /// Whether it is an app as `spin registry push` writes it: its lock file is a layer, or in older ones the config.
    pub fn is_spin(&self) -> bool {
        std::iter::once(&self.config).chain(&self.layers).any(|blob| blob.media_type == SPIN_LOCK)
    }
}

/// An image index: what the referrers API answers (OCI distribution-spec 1.1, end-12a).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Index {
    /// Always 2.
    pub schema_version: u32,
    /// [`INDEX`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub media_type: Option<String>,
    /// What is listed.
    pub manifests: Vec<Descriptor>,
}

/// A repository: lower-case path components with inner separators (OCI distribution-spec 1.1, "Pulling manifests").
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Repository(String);

/// Text that names no repository.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} is no repository name: lower-case letters, digits and inner . _ - in components separated by '/'")]
pub struct RepositoryError(String);

impl Repository {
    /// The name.
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The last path component.
    pub fn last(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or(&self.0)
    }
}

impl TryFrom<String> for Repository {
    type Error = RepositoryError;
    fn try_from(text: String) -> Result<Self, RepositoryError> {
        let alphanumeric = |b: Option<&u8>| b.is_some_and(|b| b.is_ascii_lowercase() || b.is_ascii_digit());
        let is_component = |part: &str| {
            let bytes = part.as_bytes();
            alphanumeric(bytes.first())
                && alphanumeric(bytes.last())
                && bytes.iter().all(|b| alphanumeric(Some(b)) || matches!(b, b'.' | b'_' | b'-'))
                && !part.contains("..")
                && !part.contains("___")
        };
        if text.len() <= 255 && text.split('/').all(is_component) {
            Ok(Self(text))
        } else {
            Err(RepositoryError(text.chars().take(80).collect()))
        }
    }
}

impl std::str::FromStr for Repository {
    type Err = RepositoryError;
    fn from_str(text: &str) -> Result<Self, RepositoryError> {
        Self::try_from(text.to_owned())
    }
}

impl From<Repository> for String {
    fn from(repository: Repository) -> String {
        repository.0
    }
}

impl std::fmt::Display for Repository {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

/// Whether `text` is a tag (OCI distribution-spec 1.1).
pub fn is_tag(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
    let bytes = text.as_bytes();
    bytes.len() <= 128
        && bytes.first().is_some_and(|b| word(*b))
        && bytes.iter().all(|b| word(*b) || matches!(b, b'.' | b'-'))
}

/// The first digest in a document that is not of a supported algorithm: where it stands, and what is wrong. For the error
/// of a manifest that can't be read; serde tells the line and not the field.
pub fn unsupported_digest(document: &[u8]) -> Option<(String, DigestError)> {
    let value: serde_json::Value = serde_json::from_slice(document).ok()?;
    let at = |path: String, descriptor: &serde_json::Value| {
        let error = descriptor.get("digest")?.as_str()?.parse::<Digest>().err()?;
        matches!(error, DigestError::Algorithm(..)).then_some((path, error))
    };
    let one = ["config", "subject"].into_iter().find_map(|name| at(format!("{name}.digest"), value.get(name)?));
    one.or_else(|| {
        ["layers", "manifests"].into_iter().find_map(|name| {
            let list = value.get(name)?.as_array()?.iter().enumerate();
            list.take(LAYERS_MAX).find_map(|(index, item)| at(format!("{name}[{index}].digest"), item))
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_manifest_keeps_the_names_of_the_specification() {
        let config = Descriptor::of(EMPTY, b"{}");
        let manifest = Manifest {
            schema_version: 2,
            media_type: Some(MANIFEST.into()),
            artifact_type: Some(BUNDLE.into()),
            subject: Some(config.clone()),
            config,
            layers: Vec::new(),
            annotations: BTreeMap::new(),
        };
        let json = serde_json::to_value(&manifest).unwrap();
        for key in ["schemaVersion", "mediaType", "artifactType", "config", "layers", "subject"] {
            assert!(json.get(key).is_some(), "{key}");
        }
        assert_eq!(serde_json::from_value::<Manifest>(json).unwrap(), manifest);
    }

    #[test]
    fn a_digest_of_another_algorithm_is_found_with_its_field() {
        let good = "sha256:".to_owned() + &"0".repeat(64);
        let other = "sha512:".to_owned() + &"0".repeat(128);
        let document = |config: &str, layer: &str, subject: &str| {
            let text = serde_json::json!({
                "config": { "digest": config }, "layers": [{ "digest": good }, { "digest": layer }], "subject": { "digest": subject },
            });
            unsupported_digest(text.to_string().as_bytes()).map(|(field, _)| field)
        };
        assert_eq!(document(&good, &good, &good), None);
        assert_eq!(document(&good, &other, &good).as_deref(), Some("layers[1].digest"));
        assert_eq!(document(&other, &other, &good).as_deref(), Some("config.digest"));
        assert_eq!(document(&good, "x", &other).as_deref(), Some("subject.digest"));
        for nothing in ["", "[]", "{\"layers\":{}}", "{\"config\":{\"digest\":7}}"] {
            assert_eq!(unsupported_digest(nothing.as_bytes()), None, "{nothing}");
        }
    }

    #[test]
    fn names_that_registries_refuse_are_refused() {
        for good in ["a", "acme/hello", "a.b/c_d/e-f", "0"] {
            assert!(good.parse::<Repository>().is_ok(), "{good}");
        }
        for bad in ["", "/", "A", "a//b", "../a", "a/..", "a/../b", "-a", "a-", "a b"] {
            assert!(bad.parse::<Repository>().is_err(), "{bad}");
        }
        assert!(is_tag("v1.0") && is_tag("sha256-ab.sig"));
        for bad in ["", ".a", "-a", "a/b", "a b", &"a".repeat(129)] {
            assert!(!is_tag(bad), "{bad}");
        }
    }
}
