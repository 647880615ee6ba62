//! A certificate that has ended, as proof of who asks for the next one.
//!
//! A node that was off, or cut off, for longer than its certificate lasted can make no connection that shows it. What it
//! has still says who it was: an authority signed it, and the request for another one is signed by the same key.

use std::time::{Duration, SystemTime};

use rustls::RootCertStore;
use rustls_pki_types::CertificateDer;
use x509_parser::certification_request::X509CertificationRequest;
use x509_parser::prelude::FromDer as _;

use crate::anchors::was_vouched_for;
use crate::identity::{IdentityError, parse, system_time};
use crate::role::{Role, peer_role};

/// Why it proves nothing.
#[derive(Debug, thiserror::Error)]
pub enum LateError {
    /// It says of nobody who it is.
    #[error("certificate that has ended")]
    Identity(#[from] IdentityError),
    /// No authority of the fleet signed it.
    #[error("no authority of this fleet signed the certificate")]
    Stranger,
    /// It ended too long ago.
    #[error("the certificate ended {ago_s} s ago, it may be renewed for {grace_s} s")]
    TooLate {
        /// How long ago.
        ago_s: u64,
        /// For how long.
        grace_s: u64,
    },
    /// The request is malformed, or for another key.
    #[error("the request is not for the key of the certificate")]
    Key,
}

/// Who asks with `chain` for another certificate by `request` (PKCS #10), which must be for the same key; the chain may
/// have ended up to `grace` before `now`. That the request is signed is seen when it is certified.
///
/// # Errors
/// [`LateError`].
pub fn late_role(
    roots: &RootCertStore,
    chain: &[CertificateDer<'_>],
    request: &[u8],
    (now, grace): (SystemTime, Duration),
) -> Result<Role, LateError> {
    let leaf = chain.first().ok_or(IdentityError::Empty)?;
    let parsed = parse(leaf)?;
    let end = system_time(parsed.validity().not_after);
    let ago = now.duration_since(end).unwrap_or(Duration::ZERO);
    if ago > grace {
        return Err(LateError::TooLate { ago_s: ago.as_secs(), grace_s: grace.as_secs() });
    }
    let last = now.min(end - Duration::from_secs(1));
    if !was_vouched_for(roots, chain, last).unwrap_or(false) {
        return Err(LateError::Stranger);
    }
    let (_, request) = X509CertificationRequest::from_der(request).map_err(|_| LateError::Key)?;
    if request.certification_request_info.subject_pki.raw != parsed.public_key().raw {
        return Err(LateError::Key);
    }
    Ok(peer_role(leaf)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authority, Enrolment, roots_of};

    const GRACE: Duration = Duration::from_secs(1_000);

    #[test]
    fn a_certificate_that_has_ended_proves_who_asks_for_the_same_key_and_not_for_ever() {
        let authority = Authority::create("test").unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        let role = Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() };
        let identity = authority.issue_identity(&role, &[], &[]).unwrap();
        let own = Enrolment::again(&identity).unwrap();
        let asks = |roots: &RootCertStore, request: &[u8], at| late_role(roots, identity.chain(), request, (at, GRACE));
        let end = identity.not_after();
        for at in [SystemTime::now(), end, end + Duration::from_secs(1), end + GRACE] {
            assert_eq!(asks(&roots, own.request(), at).unwrap(), role);
        }
        let late = end + GRACE + Duration::from_secs(1);
        assert!(matches!(asks(&roots, own.request(), late), Err(LateError::TooLate { grace_s: 1_000, .. })));
        let other = roots_of(&[Authority::create("test").unwrap().certificate_der()]).unwrap();
        assert!(matches!(asks(&other, own.request(), end), Err(LateError::Stranger)));
        let thief = Enrolment::create().unwrap();
        for request in [thief.request(), b"", &own.request()[..20]] {
            assert!(matches!(asks(&roots, request, end), Err(LateError::Key)));
        }
        assert!(matches!(late_role(&roots, &[], own.request(), (end, GRACE)), Err(LateError::Identity(_))));
        // Before it began it proves nothing either.
        let early = identity.not_before() - Duration::from_secs(60);
        assert!(matches!(asks(&roots, own.request(), early), Err(LateError::Stranger)));
    }
}
