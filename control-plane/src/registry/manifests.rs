//! Reading a manifest that somebody pushes: what it names, and what it is about.

use std::collections::BTreeMap;

use selvage_config::Digest;
use selvage_config::oci::{self, Descriptor, LAYERS_MAX};
use serde::Deserialize;

use super::RegistryError;
use super::catalog::ManifestRecord;

/// Docker's names for an image manifest and an image index, which are of the same shape.
const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_INDEX: &str = "application/vnd.docker.distribution.manifest.list.v2+json";

/// A manifest as its text has it.
#[derive(Debug, Clone)]
pub(crate) struct Outline {
    media_type: String,
    /// Blobs that it names.
    pub(crate) blobs: Vec<Descriptor>,
    /// Manifests that it names.
    pub(crate) manifests: Vec<Descriptor>,
    /// What it is about. That need not exist.
    pub(crate) subject: Option<Digest>,
    artifact_type: Option<String>,
    annotations: BTreeMap<String, String>,
}

/// What both kinds of manifest may say.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "camelCase")]
struct Either {
    schema_version: u32,
    media_type: Option<String>,
    artifact_type: Option<String>,
    subject: Option<Descriptor>,
    annotations: Option<BTreeMap<String, String>>,
    config: Option<Descriptor>,
    layers: Option<Vec<Descriptor>>,
    manifests: Option<Vec<Descriptor>>,
}

impl Outline {
    /// Reads a manifest. `content_type` is what the client calls it, and must be what it calls itself.
    pub(crate) fn read(bytes: &[u8], content_type: Option<&str>) -> Result<Self, RegistryError> {
        let either: Either = serde_json::from_slice(bytes).map_err(|error| match oci::unsupported_digest(bytes) {
            Some((field, error)) => RegistryError::digest_invalid(format!("{field}: {error}")),
            None => RegistryError::manifest_invalid(format!("the manifest can't be read: {error}")),
        })?;
        let called = content_type.map(|text| text.split(';').next().unwrap_or(text).trim().to_owned());
        let media_type = match (called, either.media_type) {
            (Some(called), Some(own)) if called != own => {
                return Err(RegistryError::manifest_invalid(format!("{own:?} was sent as {called:?}")));
            }
            (Some(name), _) | (None, Some(name)) => name,
            (None, None) => return Err(RegistryError::manifest_invalid("the manifest has no media type")),
        };
        if either.schema_version != 2 {
            return Err(RegistryError::manifest_invalid("schemaVersion is not 2"));
        }
        let missing = |field| RegistryError::manifest_invalid(format!("a {media_type} has {field}"));
        let (config_type, blobs, manifests) = match media_type.as_str() {
            oci::MANIFEST | DOCKER_MANIFEST => {
                let config = either.config.ok_or_else(|| missing("a config"))?;
                let config_type = config.media_type.clone();
                // Go writes an empty list as null.
                let layers = either.layers.unwrap_or_default();
                (Some(config_type), std::iter::once(config).chain(layers).collect::<Vec<_>>(), Vec::new())
            }
            oci::INDEX | DOCKER_INDEX => (None, Vec::new(), either.manifests.unwrap_or_default()),
            other => return Err(RegistryError::manifest_invalid(format!("{other:?} is no kind of manifest"))),
        };
        if blobs.len().max(manifests.len()) > LAYERS_MAX + 1 {
            return Err(RegistryError::manifest_invalid(format!("a manifest names at most {LAYERS_MAX} others")));
        }
        Ok(Self {
            media_type,
            blobs,
            manifests,
            subject: either.subject.map(|subject| subject.digest),
            // image-spec 1.1, "Listing Referrers": an image without a type of its own is of its config's type.
            artifact_type: either.artifact_type.filter(|text| !text.is_empty()).or(config_type),
            annotations: either.annotations.unwrap_or_default(),
        })
    }

    /// What the catalog keeps of it.
    pub(crate) fn record(self, digest: Digest, size: u64, touched_ms: u64) -> ManifestRecord {
        let references = self.blobs.iter().chain(&self.manifests).map(|named| named.digest).collect();
        let shown = Descriptor {
            media_type: self.media_type.clone(),
            digest,
            size,
            artifact_type: self.artifact_type,
            annotations: self.annotations,
        };
        let subject = self.subject.map(|subject| (subject, shown));
        ManifestRecord { media_type: self.media_type, size, references, subject, touched_ms }
    }
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    fn manifest() -> Value {
        let blob = json!({ "mediaType": oci::EMPTY, "digest": Digest::of(b"{}"), "size": 2 });
        json!({ "schemaVersion": 2, "mediaType": oci::MANIFEST, "config": blob, "layers": [blob], "subject": blob })
    }

    fn read(value: &Value, content_type: Option<&str>) -> Result<Outline, RegistryError> {
        Outline::read(value.to_string().as_bytes(), content_type)
    }

    #[test]
    fn an_image_without_artifact_type_is_of_its_configs_type() {
        let record = read(&manifest(), None).unwrap().record(Digest::of(b"m"), 9, 0);
        let (subject, shown) = record.subject.unwrap();
        assert_eq!(subject, Digest::of(b"{}"));
        assert_eq!((shown.artifact_type.as_deref(), shown.size), (Some(oci::EMPTY), 9));
        assert_eq!(record.references, [Digest::of(b"{}"); 2]);
    }

    #[test]
    fn a_manifest_is_called_what_it_calls_itself() {
        assert!(read(&manifest(), Some(&format!("{}; charset=utf-8", oci::MANIFEST))).is_ok());
        assert!(read(&manifest(), Some(oci::INDEX)).is_err());
        let mut unnamed = manifest();
        unnamed.as_object_mut().unwrap().remove("mediaType");
        assert!(read(&unnamed, None).is_err());
        assert!(read(&unnamed, Some(oci::MANIFEST)).is_ok());
        assert!(read(&unnamed, Some("text/html")).is_err());
    }

    #[test]
    fn a_manifest_that_is_none_is_refused() {
        let changes: [(&str, Value); 5] = [
            ("schemaVersion", json!(1)),
            ("config", Value::Null),
            ("layers", json!([{ "mediaType": "x", "digest": "sha512:00", "size": 1 }])),
            ("layers", json!(vec![manifest()["config"].clone(); LAYERS_MAX + 1])),
            ("annotations", json!({ "a": 1 })),
        ];
        for (field, value) in changes {
            let mut bad = manifest();
            bad[field] = value;
            assert!(read(&bad, None).is_err(), "{field}");
        }
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = Outline::read(&bytes, Some(oci::MANIFEST));
        }
    }
}
