//! One signature: whether it is one, over this manifest, by a trusted key.

use selvage_config::Digest;
use selvage_config::oci;
use selvage_config::signature::{
    BUNDLE_BYTES_MAX, Bundle, PAYLOAD_TYPE, PREDICATE_SIGN, SIMPLE_SIGNING_TYPE, STATEMENT_TYPE, SimpleSigning,
    Statement, pre_authentication_encoding,
};

use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;

use super::PublicKey;
use crate::release::fetch::Candidate;

/// Why something is no signature that counts.
#[derive(Debug, thiserror::Error)]
pub enum SignatureError {
    /// Not a bundle of the version that cosign writes to registries.
    #[error("media type is not {}", oci::BUNDLE)]
    MediaType,
    /// Too large.
    #[error("more than {BUNDLE_BYTES_MAX} bytes")]
    Large,
    /// Not of the schema.
    #[error("unreadable: {0}")]
    Json(serde_json::Error),
    /// A bundle of a message, not of a statement.
    #[error("bundle has no DSSE envelope")]
    NoEnvelope,
    /// The policy is of keys, and this is no key's signature.
    #[error("made with a certificate, and only keys are trusted")]
    Certificate,
    /// Neither key nor certificate.
    #[error("bundle does not say that a key made it")]
    NoKey,
    /// None, or several of which any one would do.
    #[error("envelope has {0} signatures, not 1")]
    Signatures(usize),
    /// The envelope holds something else.
    #[error("payload is no in-toto statement")]
    Payload,
    /// It says something else than "I signed this".
    #[error("an attestation of {0:?}, not a signature")]
    Attestation(String),
    /// Over something else.
    #[error("made over another artifact")]
    Subject,
    /// By a key that is not trusted, or by none.
    #[error("not by a trusted key")]
    Key,
    /// Of the old form, which the operator did not allow.
    #[error("of cosign's old .sig form, which does not count here")]
    Legacy,
    /// The old form without a readable signature.
    #[error("no signature beside the payload")]
    NoSignature,
}

/// Whether `candidate` is a signature over the artifact `digest` by one of `keys`.
pub(super) fn check(candidate: &Candidate, digest: Digest, keys: &[PublicKey]) -> Result<(), SignatureError> {
    if candidate.bytes.len() > BUNDLE_BYTES_MAX {
        return Err(SignatureError::Large);
    }
    match candidate.layer.media_type.as_str() {
        oci::BUNDLE => check_bundle(&candidate.bytes, digest, keys),
        oci::SIMPLE_SIGNING => check_legacy(candidate, digest, keys),
        _ => Err(SignatureError::MediaType),
    }
}

/// A bundle 0.3 with a DSSE envelope around an in-toto statement (cosign 3, BUNDLE_SPEC.md).
fn check_bundle(bytes: &[u8], digest: Digest, keys: &[PublicKey]) -> Result<(), SignatureError> {
    let bundle: Bundle = serde_json::from_slice(bytes).map_err(SignatureError::Json)?;
    if bundle.media_type != oci::BUNDLE {
        return Err(SignatureError::MediaType);
    }
    let material = &bundle.verification_material;
    if material.certificate.is_some() || material.x509_certificate_chain.is_some() {
        return Err(SignatureError::Certificate);
    }
    // The hint is not read: it is a claim like any other, and there are few keys to try.
    if material.public_key.is_none() {
        return Err(SignatureError::NoKey);
    }
    let envelope = bundle.dsse_envelope.ok_or(SignatureError::NoEnvelope)?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(SignatureError::Payload);
    }
    let [signature] = &*envelope.signatures else {
        return Err(SignatureError::Signatures(envelope.signatures.len()));
    };
    // First the signature, then what it covers: no unsigned statement is parsed.
    let covered = pre_authentication_encoding(&envelope.payload_type, &envelope.payload);
    if !keys.iter().any(|key| key.accepts(&covered, &signature.sig)) {
        return Err(SignatureError::Key);
    }
    let statement: Statement = serde_json::from_slice(&envelope.payload).map_err(SignatureError::Json)?;
    if statement.kind != STATEMENT_TYPE {
        return Err(SignatureError::Payload);
    }
    // cosign itself takes any attestation for a signature; "the scan failed" must not make an artifact run.
    if statement.predicate_type != PREDICATE_SIGN {
        return Err(SignatureError::Attestation(statement.predicate_type.chars().take(100).collect()));
    }
    if statement.is_about(digest) { Ok(()) } else { Err(SignatureError::Subject) }
}

/// A simple signing payload with its signature in an annotation (cosign 2, SIGNATURE_SPEC.md).
fn check_legacy(candidate: &Candidate, digest: Digest, keys: &[PublicKey]) -> Result<(), SignatureError> {
    let annotation = candidate.layer.annotations.get(oci::COSIGN_SIGNATURE).ok_or(SignatureError::NoSignature)?;
    let signature = STANDARD.decode(annotation).map_err(|_| SignatureError::NoSignature)?;
    if !keys.iter().any(|key| key.accepts(&candidate.bytes, &signature)) {
        return Err(SignatureError::Key);
    }
    let payload: SimpleSigning = serde_json::from_slice(&candidate.bytes).map_err(SignatureError::Json)?;
    if payload.critical.kind != SIMPLE_SIGNING_TYPE {
        return Err(SignatureError::Payload);
    }
    if payload.critical.image.digest == digest { Ok(()) } else { Err(SignatureError::Subject) }
}
