//! Enrolment: how a node comes by its identity without its key ever leaving it.
//!
//! The node makes a key and sends a request signed by it, with its join token; the control plane decides who that
//! is and answers with a chain ([`crate::Authority::certify`]); [`Enrolment::finish`] puts the two together.

use std::fmt;

use rcgen::{CertificateParams, DistinguishedName, KeyPair};
use rustls_pki_types::{CertificateDer, PrivateKeyDer, PrivatePkcs8KeyDer};

use crate::{AuthorityError, Identity, IdentityError};

/// A new key that waits for its certificate.
pub struct Enrolment {
    key: KeyPair,
    request: Vec<u8>,
}

impl Enrolment {
    /// Makes a new key and the request for it.
    pub fn create() -> Result<Self, AuthorityError> {
        Self::of(KeyPair::generate().map_err(AuthorityError::Make)?)
    }

    fn of(key: KeyPair) -> Result<Self, AuthorityError> {
        // It asks for no name: the authority decides who this is.
        let mut params = CertificateParams::default();
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&key).map_err(AuthorityError::Make)?.der().to_vec();
        Ok(Self { key, request })
    }

    /// Makes a new key and a request for a certificate of `name`, as a public authority wants it: the name in the
    /// request is the one that was ordered (RFC 8555 7.4).
    pub fn of_name(name: &str) -> Result<Self, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Make)?;
        let mut params = CertificateParams::new([name.to_owned()]).map_err(AuthorityError::Make)?;
        params.distinguished_name = DistinguishedName::new();
        let request = params.serialize_request(&key).map_err(AuthorityError::Make)?.der().to_vec();
        Ok(Self { key, request })
    }

    /// A request for another certificate of the key that `identity` has. Then one file changes and not two, so that no
    /// crash leaves a key beside a certificate that it does not fit.
    pub fn again(identity: &Identity) -> Result<Self, AuthorityError> {
        let key = KeyPair::try_from(identity.key()).map_err(AuthorityError::Make)?;
        Self::of(key)
    }

    /// The request in DER (PKCS #10), to be sent to the authority.
    pub fn request(&self) -> &[u8] {
        &self.request
    }

    /// The identity, if the chain is for this key.
    pub fn finish(self, chain: Vec<CertificateDer<'static>>) -> Result<Identity, IdentityError> {
        let key = PrivatePkcs8KeyDer::from(self.key.serialize_der());
        Identity::new(chain, PrivateKeyDer::Pkcs8(key))
    }
}

impl fmt::Debug for Enrolment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Enrolment").finish_non_exhaustive()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authority, Role, peer_role};

    fn node() -> Role {
        Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() }
    }

    #[test]
    fn a_node_is_enrolled_with_a_key_that_it_keeps() {
        let authority = Authority::create("test").unwrap();
        let enrolment = Enrolment::create().unwrap();
        let chain = authority.certify(enrolment.request(), &node(), &[], &[]).unwrap();
        let identity = enrolment.finish(chain).unwrap();
        assert_eq!(peer_role(&identity.chain()[0]).unwrap(), node());
        assert_eq!(identity.names(), ["fra-1.node.selvage.internal"]);
    }

    #[test]
    fn a_certificate_is_renewed_for_the_same_key() {
        let authority = Authority::create("test").unwrap();
        let first = authority.issue_identity(&node(), &[], &[]).unwrap();
        let again = Enrolment::again(&first).unwrap();
        let chain = authority.certify(again.request(), &node(), &[], &[]).unwrap();
        let second = again.finish(chain).unwrap();
        assert_ne!(first.chain(), second.chain());
        assert_eq!(first.key(), second.key());
    }

    #[test]
    fn names_in_the_request_are_not_certified() {
        let authority = Authority::create("test").unwrap();
        let mut params = CertificateParams::new(vec!["evil.test".to_owned()]).unwrap();
        let uri = "spiffe://selvage/control-plane".try_into().unwrap();
        params.subject_alt_names.push(rcgen::SanType::URI(uri));
        let request = params.serialize_request(&KeyPair::generate().unwrap()).unwrap();
        let chain = authority.certify(request.der(), &node(), &[], &[]).unwrap();
        assert_eq!(peer_role(&chain[0]).unwrap(), node());
        assert!(!chain[0].windows(9).any(|bytes| bytes == b"evil.test"));
    }

    #[test]
    fn a_chain_for_another_key_is_refused() {
        let authority = Authority::create("test").unwrap();
        let (mine, other) = (Enrolment::create().unwrap(), Enrolment::create().unwrap());
        let chain = authority.certify(other.request(), &node(), &[], &[]).unwrap();
        assert!(matches!(mine.finish(chain), Err(IdentityError::Key(_))));
    }

    #[test]
    fn a_request_that_its_key_did_not_sign_is_refused() {
        let authority = Authority::create("test").unwrap();
        let enrolment = Enrolment::create().unwrap();
        let mut request = enrolment.request().to_vec();
        // The last byte is the signature's.
        *request.last_mut().unwrap() ^= 1;
        for bad in [request, Vec::new(), vec![0; 100_000]] {
            let error = authority.certify(&bad, &node(), &[], &[]).unwrap_err();
            assert!(matches!(error, AuthorityError::Request), "{error:?}");
        }
    }

    #[test]
    fn debug_shows_no_part_of_the_key() {
        assert_eq!(format!("{:?}", Enrolment::create().unwrap()), "Enrolment { .. }");
    }
}
