//! One bundle or payload: whether it is a statement over this artifact, and who made it.

use selvage_config::Digest;
use selvage_config::oci;
use selvage_config::signature::{
    BUNDLE_BYTES_MAX, Bundle, Envelope, PAYLOAD_TYPE, SIMPLE_SIGNING_TYPE, STATEMENT_TYPE, SimpleSigning, Statement,
    pre_authentication_encoding,
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
    /// Not of the schema, as sigstore's verifier reads it, or against its rules.
    #[error("{0}")]
    Sigstore(String),
    /// A bundle of a message, not of a statement.
    #[error("bundle has no DSSE envelope")]
    NoEnvelope,
    /// The policy is of keys, and this is no key's signature.
    #[error("made with a certificate, and only keys are trusted")]
    OnlyKeys,
    /// The policy is of identities, and this is a key's signature.
    #[error("made with a key, and only identities are trusted")]
    OnlyIdentities,
    /// Neither key nor certificate, or both.
    #[error("bundle does not say whether a key or a certificate made it")]
    NoKey,
    /// The certificate names nobody, or nobody vouches for the name.
    #[error("certificate has no identity with an issuer")]
    NoIdentity,
    /// In the name of somebody who is not trusted.
    #[error("in the name of {identity:?}, for which {issuer:?} vouches: not trusted")]
    Identity {
        /// Who.
        identity: String,
        /// Says who.
        issuer: String,
    },
    /// The certificate proves nothing.
    #[error("certificate: {0}")]
    Certificate(String),
    /// The transparency log proves nothing.
    #[error("transparency log: {0}")]
    Log(String),
    /// Nobody vouches for when it was made.
    #[error("time of signature: {0}")]
    Time(String),
    /// This machine's clock is wrong: it shows a time when nobody could have signed.
    #[error(
        "the clock shows {now} s since 1970, and the first authority of the trusted root is valid from {first} s on"
    )]
    Clock {
        /// What it shows.
        now: i64,
        /// Before that nobody signed.
        first: i64,
    },
    /// None, or several of which any one would do.
    #[error("envelope has {0} signatures, not 1")]
    Signatures(usize),
    /// The envelope holds something else.
    #[error("payload is no in-toto statement")]
    Payload,
    /// It says something else than "I signed this", and nothing that is demanded.
    #[error("an attestation of {0:?}, not a signature")]
    Attestation(String),
    /// It says what is demanded, by somebody whose word on this does not count, or not in these words.
    #[error("{what} says {actual}, not {expected:?}")]
    Says {
        /// Where.
        what: String,
        /// What it says.
        actual: String,
        /// What it must say.
        expected: String,
    },
    /// An annotation is missing, or another one.
    #[error("annotation {0:?} is missing or another one")]
    Annotation(String),
    /// Over something else.
    #[error("made over another artifact")]
    Subject,
    /// By a key that is not trusted, or by none.
    #[error("not by a trusted key")]
    Key,
    /// By somebody whose word was taken back.
    #[error("by {0}, which is revoked")]
    Revoked(String),
    /// Of the old form, which the operator did not allow.
    #[error("of cosign's old .sig form, which does not count here")]
    Legacy,
    /// The old form without a readable signature.
    #[error("no signature beside the payload")]
    NoSignature,
}

impl SignatureError {
    /// A stable word for the cause.
    pub fn cause(&self) -> &'static str {
        match self {
            Self::MediaType | Self::NoEnvelope | Self::Signatures(_) | Self::Payload | Self::NoKey => "form",
            Self::Large => "large",
            Self::Json(_) | Self::Sigstore(_) | Self::NoSignature => "malformed",
            Self::OnlyKeys | Self::OnlyIdentities => "kind",
            Self::NoIdentity | Self::Identity { .. } => "identity",
            Self::Certificate(_) => "certificate",
            Self::Log(_) => "tlog_inconsistent",
            Self::Time(_) => "time",
            Self::Clock { .. } => "clock",
            Self::Attestation(_) => "attestation",
            Self::Says { .. } | Self::Annotation(_) => "content",
            Self::Subject => "subject_mismatch",
            Self::Key => "key",
            Self::Revoked(_) => "revoked",
            Self::Legacy => "legacy",
        }
    }
}

/// What a bundle was made with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Made {
    ByKey,
    ByCertificate,
}

/// A bundle 0.3 with a DSSE envelope around what says to be an in-toto statement (cosign 3, BUNDLE_SPEC.md). Nothing of
/// it has been believed.
pub(super) fn read(bytes: &[u8]) -> Result<(Envelope, Made), SignatureError> {
    let bundle: Bundle = serde_json::from_slice(bytes).map_err(SignatureError::Json)?;
    // An older version would let the sender leave out the log's proof.
    if bundle.media_type != oci::BUNDLE {
        return Err(SignatureError::MediaType);
    }
    let material = &bundle.verification_material;
    let has_certificate = material.certificate.is_some() || material.x509_certificate_chain.is_some();
    // The hint is not read: it is a claim like any other, and there are few keys to try.
    let made = match (material.public_key.is_some(), has_certificate) {
        (true, false) => Made::ByKey,
        (false, true) => Made::ByCertificate,
        _ => return Err(SignatureError::NoKey),
    };
    let envelope = bundle.dsse_envelope.ok_or(SignatureError::NoEnvelope)?;
    if envelope.payload_type != PAYLOAD_TYPE {
        return Err(SignatureError::Payload);
    }
    match envelope.signatures.len() {
        1 => Ok((envelope, made)),
        other => Err(SignatureError::Signatures(other)),
    }
}

/// Whether `key` made the envelope's one signature.
pub(super) fn is_by(envelope: &Envelope, key: &PublicKey) -> bool {
    let covered = pre_authentication_encoding(&envelope.payload_type, &envelope.payload);
    envelope.signatures.iter().any(|signature| key.accepts(&covered, &signature.sig))
}

/// The statement of an envelope whose signature was verified: no unsigned statement is parsed.
pub(super) fn statement(envelope: &Envelope, digest: Digest) -> Result<Statement, SignatureError> {
    let statement: Statement = serde_json::from_slice(&envelope.payload).map_err(SignatureError::Json)?;
    if statement.kind != STATEMENT_TYPE {
        return Err(SignatureError::Payload);
    }
    if statement.is_about(digest) { Ok(statement) } else { Err(SignatureError::Subject) }
}

/// A simple signing payload with its signature in an annotation (cosign 2, SIGNATURE_SPEC.md), by one of `keys`: which,
/// and the remarks under the signature.
pub(super) fn legacy<'k>(
    candidate: &Candidate,
    digest: Digest,
    keys: impl IntoIterator<Item = &'k PublicKey>,
) -> Result<(&'k PublicKey, serde_json::Value), SignatureError> {
    let annotation = candidate.layer.annotations.get(oci::COSIGN_SIGNATURE).ok_or(SignatureError::NoSignature)?;
    let signature = STANDARD.decode(annotation).map_err(|_| SignatureError::NoSignature)?;
    let key = keys.into_iter().find(|key| key.accepts(&candidate.bytes, &signature)).ok_or(SignatureError::Key)?;
    let payload: SimpleSigning = serde_json::from_slice(&candidate.bytes).map_err(SignatureError::Json)?;
    if payload.critical.kind != SIMPLE_SIGNING_TYPE {
        return Err(SignatureError::Payload);
    }
    if payload.critical.image.digest != digest {
        return Err(SignatureError::Subject);
    }
    Ok((key, payload.optional.unwrap_or_default()))
}
