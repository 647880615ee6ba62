//! What certificates and logs prove: Fulcio's chains, certificate transparency, Rekor's entries, timestamps.
//!
//! All of it is checked by the sigstore project's verifier, against authorities and logs of a `trusted_root.json` and at
//! times that a log or a timestamp authority vouches for, never by this machine's clock. Who may sign is not decided
//! there: the identity that comes out is compared here. One thing the clock does: where it shows a time before any of the
//! authorities was valid it is wrong, so what lies in its future can't be told, and nothing keyless counts until it is set.

use std::time::{SystemTime, UNIX_EPOCH};

use selvage_config::Digest;
use selvage_config::key::PublicKey;
use sigstore_verify::crypto::parse_certificate_info;
use sigstore_verify::trust_root::TrustedRoot;
use sigstore_verify::types::{Artifact, Bundle, DerPublicKey, Sha256Hash, TimeRange};
use sigstore_verify::{Error, PublicKeyVerificationPolicy, VerificationPolicy, VerificationResult, Verifier};

use super::signature::SignatureError;

/// The authorities and logs of one `trusted_root.json`.
pub(super) struct Authorities {
    verifier: Verifier,
    /// When the first certificate authority became valid, and the first transparency log, seconds since 1970. None: it is
    /// not said, or there is none.
    first: (Option<i64>, Option<i64>),
}

/// A bundle as the verifier reads it.
pub(super) struct Material(Bundle);

/// Who a certificate says to be for. A claim until [`Material::verify_certificate`] took it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Claim {
    pub(super) identity: String,
    pub(super) issuer: String,
}

/// What was proved besides the signature.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Proved {
    /// The signature is in a transparency log.
    pub(super) log: bool,
    /// When it was made, as a log or a timestamp authority says.
    pub(super) signed_at: Option<String>,
}

impl Authorities {
    pub(super) fn from_json(text: &str) -> Result<Self, Error> {
        let root = TrustedRoot::from_json(text)?;
        let authorities = root.certificate_authorities.iter().map(|authority| authority.valid_for);
        let logs = root.tlogs.iter().map(|log| log.public_key.valid_for);
        Ok(Self { verifier: Verifier::new(&root)?, first: (first(authorities), first(logs)) })
    }

    /// Goes on only if the clock shows a time when one of them was valid.
    fn check_clock(&self, first: Option<i64>) -> Result<(), SignatureError> {
        let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
        let now = i64::try_from(since.as_secs()).unwrap_or(i64::MAX);
        match first.filter(|first| now < *first) {
            Some(first) => Err(SignatureError::Clock { now, first }),
            None => Ok(()),
        }
    }
}

impl std::fmt::Debug for Authorities {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Authorities")
    }
}

impl Material {
    pub(super) fn read(bytes: &[u8]) -> Result<Self, SignatureError> {
        let text = std::str::from_utf8(bytes).map_err(|_| SignatureError::Sigstore("not UTF-8".to_owned()))?;
        Bundle::from_json(text).map(Self).map_err(|error| SignatureError::Sigstore(error.to_string()))
    }

    /// Whom the certificate names. Cheap: so a stranger's certificate costs no chain, log and time.
    pub(super) fn claim(&self) -> Result<Claim, SignatureError> {
        let certificate = self.0.signing_certificate().ok_or(SignatureError::NoKey)?;
        let info = parse_certificate_info(certificate).map_err(|error| SignatureError::Sigstore(error.to_string()))?;
        let identity = info.identity.ok_or(SignatureError::NoIdentity)?.as_str().to_owned();
        Ok(Claim { identity, issuer: info.issuer.ok_or(SignatureError::NoIdentity)? })
    }

    /// Whether a certificate of `authorities` signed the artifact `digest`, while it was valid.
    pub(super) fn verify_certificate(
        &self,
        authorities: &Authorities,
        digest: Digest,
        (log, certificate_log): (bool, bool),
    ) -> Result<(Claim, Proved), SignatureError> {
        authorities.check_clock(authorities.first.0)?;
        if log {
            authorities.check_clock(authorities.first.1)?;
        }
        let mut policy = VerificationPolicy::any_identity();
        if !log {
            policy = policy.skip_tlog_unsafe();
        }
        if !certificate_log {
            policy = policy.skip_sct();
        }
        let result = authorities.verifier.verify(artifact(digest), &self.0, &policy).map_err(rejected)?;
        let proven = result.certificate_verified()
            && (!log || result.tlog_verified())
            && (!certificate_log || result.sct_verified())
            && !result.verified_timestamps().is_empty();
        if !proven {
            return Err(SignatureError::Certificate("not everything was proved".to_owned()));
        }
        let identity = result.identity().ok_or(SignatureError::NoIdentity)?.as_str().to_owned();
        let issuer = result.issuer().ok_or(SignatureError::NoIdentity)?.to_owned();
        Ok((Claim { identity, issuer }, proved(&result)))
    }

    /// Whether the log has the signature that `key` made over the artifact `digest`.
    pub(super) fn verify_logged_key(
        &self,
        authorities: &Authorities,
        digest: Digest,
        key: &PublicKey,
    ) -> Result<Proved, SignatureError> {
        authorities.check_clock(authorities.first.1)?;
        let policy = PublicKeyVerificationPolicy::new(DerPublicKey::new(key.spki().to_vec()));
        let result = authorities.verifier.verify(artifact(digest), &self.0, &policy).map_err(rejected)?;
        if result.tlog_verified() { Ok(proved(&result)) } else { Err(SignatureError::Log("no entry".to_owned())) }
    }
}

/// When the first of some windows begins. One without a beginning was always there.
fn first(windows: impl Iterator<Item = Option<TimeRange>>) -> Option<i64> {
    windows.map(|window| window.map_or(i64::MIN, |window| window.start.as_second())).min()
}

fn artifact(digest: Digest) -> Artifact<'static> {
    Sha256Hash::new(*digest.as_bytes()).into()
}

fn proved(result: &VerificationResult) -> Proved {
    let times = result.verified_timestamps().iter().copied().chain(result.integrated_time());
    Proved { log: result.tlog_verified(), signed_at: times.min().map(|time| time.to_string()) }
}

/// What the verifier refused, by what it refused it for.
#[expect(clippy::needless_pass_by_value, reason = "what map_err hands over")]
fn rejected(error: Error) -> SignatureError {
    let text = error.to_string();
    match error {
        Error::ArtifactMismatch(_) => SignatureError::Subject,
        Error::SignatureInvalid(_) => SignatureError::Key,
        Error::TransparencyLog(_) => SignatureError::Log(text),
        Error::Timestamp(_) => SignatureError::Time(text),
        Error::Certificate(_) => SignatureError::Certificate(text),
        _ => SignatureError::Sigstore(text),
    }
}
