//! Signatures as cosign writes them: a DSSE envelope around an in-toto statement, in a Sigstore bundle.
//!
//! Only documents and their exact bytes. Who is trusted is the node's business, who signs is the CLI's.

use std::collections::{BTreeMap, BTreeSet};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use serde::{Deserialize, Serialize};

use crate::Digest;
use crate::key::{KeyError, KeyId, PrivateKey, PublicKey};
use crate::oci;

/// Largest bundle, bytes.
pub const BUNDLE_BYTES_MAX: usize = 1024 * 1024;
/// Most signatures that are looked at for one artifact.
pub const SIGNATURES_MAX: usize = 64;
/// Most signatures that are tried for one key of an envelope of our own.
pub const ENVELOPE_SIGNATURES_MAX: usize = 8;
/// Most subjects of a statement.
pub const SUBJECTS_MAX: usize = 1_024;
/// The payload type of an in-toto statement (in-toto attestation framework 1.0).
pub const PAYLOAD_TYPE: &str = "application/vnd.in-toto+json";
/// The statement type.
pub const STATEMENT_TYPE: &str = "https://in-toto.io/Statement/v1";
/// The predicate of a cosign signature, as opposed to an attestation of something else.
pub const PREDICATE_SIGN: &str = "https://sigstore.dev/cosign/sign/v1";
/// `critical.type` of a legacy payload.
pub const SIMPLE_SIGNING_TYPE: &str = "cosign container image signature";

/// A Sigstore bundle 0.3 (sigstore/protobuf-specs, `sigstore_bundle.proto`): what is needed of one for a key pair.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Bundle {
    /// [`oci::BUNDLE`].
    pub media_type: String,
    /// Key hint, certificate, log entries.
    pub verification_material: VerificationMaterial,
    /// The signed content. Absent in bundles of another form.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub dsse_envelope: Option<Envelope>,
}

/// Who says to have signed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
#[serde(rename_all = "camelCase")]
pub struct VerificationMaterial {
    /// A key pair: which key.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub public_key: Option<KeyHint>,
    /// Keyless: a certificate. Its content is not read here.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub certificate: Option<serde_json::Value>,
    /// Keyless, older form: a chain.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub x509_certificate_chain: Option<serde_json::Value>,
    /// Transparency log entries.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub tlog_entries: Vec<serde_json::Value>,
}

/// Which key: base64 of the SHA-256 of its SubjectPublicKeyInfo.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize, Default)]
pub struct KeyHint {
    /// The hint.
    #[serde(default)]
    pub hint: String,
}

/// A DSSE envelope (secure-systems-lab/dsse, `envelope.md`).
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Envelope {
    /// The signed bytes, base64.
    #[serde(with = "base64_bytes")]
    pub payload: Vec<u8>,
    /// [`PAYLOAD_TYPE`].
    pub payload_type: String,
    /// The signatures.
    pub signatures: Vec<EnvelopeSignature>,
}

/// One signature of an envelope.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct EnvelopeSignature {
    /// The signature over [`pre_authentication_encoding`], base64.
    #[serde(with = "base64_bytes")]
    pub sig: Vec<u8>,
    /// A hint; often empty.
    #[serde(default, skip_serializing_if = "String::is_empty")]
    pub keyid: String,
}

/// An in-toto statement.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "camelCase")]
pub struct Statement {
    /// [`STATEMENT_TYPE`].
    #[serde(rename = "_type")]
    pub kind: String,
    /// What is signed.
    pub subject: Vec<Subject>,
    /// What is said of it: [`PREDICATE_SIGN`] for a signature.
    pub predicate_type: String,
    /// Details.
    #[serde(default)]
    pub predicate: serde_json::Value,
}

/// One signed artifact.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Subject {
    /// Algorithm → hexadecimal hash.
    pub digest: BTreeMap<String, String>,
    /// Remarks under the signature.
    #[serde(default)]
    pub annotations: BTreeMap<String, String>,
}

/// The legacy payload of cosign 2 ("simple signing").
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SimpleSigning {
    /// What is signed.
    pub critical: Critical,
    /// Remarks.
    #[serde(default)]
    pub optional: Option<serde_json::Value>,
}

/// The part of a legacy payload that binds it to an image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Critical {
    /// A name; not checked: anyone may have pulled the image from elsewhere.
    #[serde(default)]
    pub identity: serde_json::Value,
    /// The image.
    pub image: CriticalImage,
    /// [`SIMPLE_SIGNING_TYPE`].
    #[serde(rename = "type")]
    pub kind: String,
}

/// The image of a legacy payload.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct CriticalImage {
    /// Its manifest's digest.
    #[serde(rename = "docker-manifest-digest")]
    pub digest: Digest,
}

/// What a DSSE signature covers (secure-systems-lab/dsse, `protocol.md`, PAE).
pub fn pre_authentication_encoding(payload_type: &str, payload: &[u8]) -> Vec<u8> {
    let mut out = format!("DSSEv1 {} {payload_type} {} ", payload_type.len(), payload.len()).into_bytes();
    out.extend_from_slice(payload);
    out
}

impl Envelope {
    /// `payload` without a signature.
    pub fn new(payload_type: &str, payload: Vec<u8>) -> Self {
        Self { payload, payload_type: payload_type.to_owned(), signatures: Vec::new() }
    }

    /// Adds a signature by `key`, in place of an earlier one.
    ///
    /// # Errors
    /// [`KeyError::Random`].
    pub fn sign(&mut self, key: &PrivateKey) -> Result<(), KeyError> {
        let keyid = key.public().id().hex();
        let sig = key.sign(&pre_authentication_encoding(&self.payload_type, &self.payload))?;
        self.signatures.retain(|signature| signature.keyid != keyid);
        self.signatures.push(EnvelopeSignature { sig, keyid });
        Ok(())
    }

    /// Which of `keys` signed. Each counts once, however many signatures there are; a signature is tried with the key
    /// that it names, so the work is bounded by [`ENVELOPE_SIGNATURES_MAX`].
    pub fn signers<'k>(&self, keys: impl IntoIterator<Item = &'k PublicKey>) -> BTreeSet<KeyId> {
        let covered = pre_authentication_encoding(&self.payload_type, &self.payload);
        let signed = |key: &&PublicKey| {
            let id = key.id().hex();
            let named = self.signatures.iter().filter(|signature| signature.keyid == id);
            named.take(ENVELOPE_SIGNATURES_MAX).any(|signature| key.accepts(&covered, &signature.sig))
        };
        keys.into_iter().filter(signed).map(PublicKey::id).collect()
    }
}

/// The hint for a public key, given its SubjectPublicKeyInfo in DER.
pub fn key_hint(spki: &[u8]) -> String {
    STANDARD.encode(Digest::of(spki).as_bytes())
}

impl Statement {
    /// The statement of a signature over the artifact whose manifest has `digest`.
    pub fn signature_of(digest: Digest) -> Self {
        let subject = Subject { digest: [("sha256".to_owned(), digest.hex())].into(), annotations: BTreeMap::new() };
        Self {
            kind: STATEMENT_TYPE.into(),
            subject: vec![subject],
            predicate_type: PREDICATE_SIGN.into(),
            predicate: serde_json::json!({}),
        }
    }

    /// Whether one of the subjects is the artifact with `digest`.
    pub fn is_about(&self, digest: Digest) -> bool {
        let hex = digest.hex();
        self.subject.len() <= SUBJECTS_MAX && self.subject.iter().any(|s| s.digest.get("sha256") == Some(&hex))
    }
}

impl Bundle {
    /// A bundle for a key pair, without a log.
    pub fn of_key(spki: &[u8], envelope: Envelope) -> Self {
        let public_key = Some(KeyHint { hint: key_hint(spki) });
        Self {
            media_type: oci::BUNDLE.into(),
            verification_material: VerificationMaterial { public_key, ..VerificationMaterial::default() },
            dsse_envelope: Some(envelope),
        }
    }
}

mod base64_bytes {
    use base64::Engine as _;
    use serde::{Deserialize as _, Deserializer, Serializer, de::Error as _};

    use super::STANDARD;

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        STANDARD.decode(String::deserialize(deserializer)?).map_err(D::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_encoding_is_that_of_the_specification() {
        // The example of protocol.md.
        let encoded = pre_authentication_encoding("http://example.com/HelloWorld", b"hello world");
        assert_eq!(encoded, b"DSSEv1 29 http://example.com/HelloWorld 11 hello world");
    }

    #[test]
    fn a_statement_is_about_its_subject_only() {
        let statement = Statement::signature_of(Digest::of(b"a"));
        assert!(statement.is_about(Digest::of(b"a")));
        assert!(!statement.is_about(Digest::of(b"b")));
    }

    #[test]
    fn a_bundle_survives_its_document() {
        let signature = EnvelopeSignature { sig: vec![1, 2], keyid: String::new() };
        let payload = serde_json::to_vec(&Statement::signature_of(Digest::of(b"a"))).unwrap();
        let envelope = Envelope { payload, payload_type: PAYLOAD_TYPE.into(), signatures: vec![signature] };
        let bundle = Bundle::of_key(b"spki", envelope);
        let json = serde_json::to_string(&bundle).unwrap();
        assert!(json.contains("dsseEnvelope") && json.contains("verificationMaterial") && json.contains("payloadType"));
        assert_eq!(serde_json::from_str::<Bundle>(&json).unwrap(), bundle);
    }

    proptest::proptest! {
        #[test]
        fn no_text_panics(text in ".*") {
            let _ = serde_json::from_str::<Bundle>(&text);
            let _ = serde_json::from_str::<SimpleSigning>(&text);
        }
    }
}
