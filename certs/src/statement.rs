//! Statements: what an identity says once, and others believe for as long as they believe its authority.
//!
//! A connection proves who speaks on it and to nobody else. A statement can be passed on: it is signed by the key of a
//! certificate, whose chain comes with it. It says when it was made, and is believed if the certificate was good then:
//! what was said does not become false when the certificate ends.

use std::time::SystemTime;

use rustls_pki_types::CertificateDer;

use crate::identity::parse;
use crate::{Anchors, Identity, Role, peer_role, provider};

/// What every signed text begins with, so that no other signature by the same key is taken for a statement.
const CONTEXT: &[u8] = b"selvage statement 1\0";

/// Certificates in a chain, at most.
const CHAIN_MAX: usize = 4;

/// The schemes that statements are signed by: those of TLS 1.3 (RFC 8446 4.2.3), each of which names its hash.
const SCHEMES: [rustls::SignatureScheme; 5] = [
    rustls::SignatureScheme::ECDSA_NISTP256_SHA256,
    rustls::SignatureScheme::ECDSA_NISTP384_SHA384,
    rustls::SignatureScheme::ED25519,
    rustls::SignatureScheme::RSA_PSS_SHA256,
    rustls::SignatureScheme::RSA_PSS_SHA384,
];

impl Identity {
    /// What proves to others that this identity said `text`: a scheme, a signature and the chain. None if its key signs by
    /// none of TLS 1.3's schemes.
    pub fn state(&self, text: &[u8]) -> Option<Vec<u8>> {
        let signer = self.certified_key().key.choose_scheme(&SCHEMES)?;
        let signature = signer.sign(&[CONTEXT, text].concat()).ok()?;
        let mut proof = u16::from(signer.scheme()).to_be_bytes().to_vec();
        for part in std::iter::once(signature.as_slice()).chain(self.chain().iter().map(AsRef::as_ref)) {
            proof.extend_from_slice(&u16::try_from(part.len()).ok()?.to_be_bytes());
            proof.extend_from_slice(part);
        }
        Some(proof)
    }
}

impl Anchors {
    /// Who said `text` by this proof, if its certificate was good at that time by these authorities.
    pub fn stated_by(&self, text: &[u8], proof: &[u8], at: SystemTime) -> Option<Role> {
        let (scheme, mut rest) = proof.split_first_chunk::<2>()?;
        let scheme = rustls::SignatureScheme::from(u16::from_be_bytes(*scheme));
        let signature = part(&mut rest)?;
        let mut chain = Vec::new();
        while !rest.is_empty() && chain.len() < CHAIN_MAX {
            chain.push(CertificateDer::from(part(&mut rest)?.to_vec()));
        }
        let leaf = chain.first().filter(|_| rest.is_empty() && SCHEMES.contains(&scheme))?;
        if !self.vouch_for_chain(&chain, at) {
            return None;
        }
        let certificate = parse(leaf).ok()?;
        let key = &certificate.public_key().subject_public_key.data;
        let known = provider().signature_verification_algorithms.mapping;
        let (_, algorithms) = known.iter().find(|(known, _)| *known == scheme)?;
        let signed = [CONTEXT, text].concat();
        algorithms.iter().find(|algorithm| algorithm.verify_signature(key, &signed, signature).is_ok())?;
        peer_role(leaf).ok()
    }
}

fn part<'p>(rest: &mut &'p [u8]) -> Option<&'p [u8]> {
    let (length, after) = rest.split_first_chunk::<2>()?;
    let (part, after) = after.split_at_checked(u16::from_be_bytes(*length).into())?;
    *rest = after;
    Some(part)
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::{Authority, roots_of};

    fn role(node: &str) -> Role {
        Role::Node { region: "fra".parse().unwrap(), node: node.parse().unwrap() }
    }

    fn anchors(authority: &Authority) -> Anchors {
        Anchors::new(roots_of(&[authority.certificate_der()]).unwrap()).unwrap()
    }

    #[test]
    fn a_statement_names_who_made_it_also_after_the_certificate_has_ended() {
        let authority = Authority::create("test").unwrap();
        let now = SystemTime::now();
        let proof = authority.issue_identity(&role("a"), &[], &[]).unwrap().state(b"I am here").unwrap();
        assert_eq!(anchors(&authority).stated_by(b"I am here", &proof, now), Some(role("a")));
        // Whenever it is looked at, what counts is when it was said.
        let late = now + Duration::from_secs(30 * 86_400);
        assert_eq!(anchors(&authority).stated_by(b"I am here", &proof, late), None);
    }

    #[test]
    fn what_was_not_said_or_is_of_a_strange_authority_is_believed_of_nobody() {
        let (authority, other) = (Authority::create("test").unwrap(), Authority::create("test").unwrap());
        let now = SystemTime::now();
        let identity = authority.issue_identity(&role("a"), &[], &[]).unwrap();
        let proof = identity.state(b"I am here").unwrap();
        let believed = |anchors: &Anchors, text: &[u8], proof: &[u8]| anchors.stated_by(text, proof, now);
        assert_eq!(believed(&anchors(&authority), b"I am there", &proof), None);
        assert_eq!(believed(&anchors(&other), b"I am here", &proof), None);
        for length in 0..proof.len() {
            assert_eq!(believed(&anchors(&authority), b"I am here", &proof[..length]), None, "{length}");
        }
        for at in 0..proof.len() {
            let mut bad = proof.clone();
            bad[at] ^= 1;
            assert_eq!(believed(&anchors(&authority), b"I am here", &bad), None, "byte {at}");
        }
        // Another's chain behind its signature.
        let stranger = authority.issue_identity(&role("b"), &[], &[]).unwrap();
        let ends = |proof: &[u8]| 4 + usize::from(u16::from_be_bytes([proof[2], proof[3]]));
        let theirs = stranger.state(b"I am here").unwrap();
        let mixed = [&proof[..ends(&proof)], &theirs[ends(&theirs)..]].concat();
        assert_eq!(believed(&anchors(&authority), b"I am here", &mixed), None);
    }
}
