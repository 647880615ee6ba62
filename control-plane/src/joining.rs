//! How a node comes into the fleet, and stays: a token once, a certificate for some days, and another before it ends.
//!
//! The node makes its key and never tells it. The token says where the node may stand; the request for a certificate
//! says nothing but the key. A token is `sj1.<id>.<secret>.<hash of the authority>`: the hash lets the node know that
//! it talks to its fleet before it has any certificate to check that with.

use std::path::PathBuf;

use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_certs::{Authority, AuthorityError, Role, chain_pem};
use selvage_config::join::{CertificateAnswer, JoinToken};
use selvage_config::{Digest, NodeName, Region};

use crate::audit::now_ms;
use crate::fleet::{Fleet, MemberError};
use crate::state::JoinRecord;

/// Bytes of a token's name and of its secret, before they are written in hexadecimal.
const ID_BYTES: usize = 4;
const SECRET_BYTES: usize = 16;
/// How long a token is good, where nobody says, and at most, seconds.
const TTL_SECONDS_DEFAULT: u64 = 3_600;
const TTL_SECONDS_MAX: u64 = 7 * 24 * 3_600;

/// Issues certificates of nodes.
#[derive(Debug)]
pub(crate) struct Joining {
    /// None: certificates are made by hand.
    authority: Option<Authority>,
    /// What nodes are told to trust: the file with all authorities of the fleet.
    roots: PathBuf,
}

/// Why nobody joined.
#[derive(Debug, thiserror::Error)]
pub(crate) enum JoinError {
    #[error("this control plane issues no certificates")]
    NoAuthority,
    #[error("a token is good for 1 second to a week")]
    Ttl,
    #[error("the request for a certificate can't be used")]
    Request(#[source] AuthorityError),
    #[error(transparent)]
    Member(#[from] MemberError),
    #[error("read the authorities of the fleet")]
    Roots(#[source] std::io::Error),
    #[error("no random bytes")]
    Random,
}

/// What a token is for.
pub(crate) struct Invitation {
    pub(crate) region: Region,
    pub(crate) node: Option<NodeName>,
    pub(crate) labels: std::collections::BTreeMap<String, String>,
    pub(crate) ttl_seconds: Option<u64>,
    pub(crate) created_by: String,
}

impl Joining {
    pub(crate) fn new(authority: Option<Authority>, roots: PathBuf) -> Self {
        Self { authority, roots }
    }

    fn authority(&self) -> Result<&Authority, JoinError> {
        self.authority.as_ref().ok_or(JoinError::NoAuthority)
    }

    /// Makes a token; waits on the disk. Answers it with its id and its end.
    pub(crate) fn invite(&self, fleet: &Fleet, invitation: Invitation) -> Result<(JoinToken, u64), JoinError> {
        let authority = Digest::of(&self.authority()?.certificate_der());
        let ttl_seconds = invitation.ttl_seconds.unwrap_or(TTL_SECONDS_DEFAULT);
        if ttl_seconds == 0 || ttl_seconds > TTL_SECONDS_MAX {
            return Err(JoinError::Ttl);
        }
        let token = JoinToken { id: random::<ID_BYTES>()?, secret: random::<SECRET_BYTES>()?, authority };
        let (now_ms, digest) = (now_ms(), token.secret_digest());
        let ends_ms = now_ms + ttl_seconds * 1_000;
        let Invitation { region, node, labels, created_by, .. } = invitation;
        let record = JoinRecord { digest, region, node, labels, ends_ms, created_by };
        fleet.allow_join(&token.id, record, now_ms)?;
        Ok((token, ends_ms))
    }

    /// Lets a node in that shows a token; waits on the disk. The token is used up only if a certificate comes of it.
    pub(crate) fn join(
        &self,
        fleet: &Fleet,
        token: &JoinToken,
        node: &NodeName,
        request: &[u8],
    ) -> Result<CertificateAnswer, JoinError> {
        let (now_ms, secret) = (now_ms(), token.secret_digest());
        let region = fleet.may_join(&token.id, &secret, node, now_ms)?;
        let answer = self.certify(node, region, request)?;
        let labels = fleet.join(&token.id, &secret, node, now_ms)?;
        Ok(CertificateAnswer { labels, ..answer })
    }

    /// Another certificate for a node that has one; waits on the disk.
    pub(crate) fn certify(
        &self,
        node: &NodeName,
        region: Region,
        request: &[u8],
    ) -> Result<CertificateAnswer, JoinError> {
        let role = Role::Node { region: region.clone(), node: node.clone() };
        let chain = self.authority()?.certify(request, &role, &[], &[]).map_err(JoinError::Request)?;
        let labels = std::collections::BTreeMap::new();
        Ok(CertificateAnswer { certificate: chain_pem(&chain), roots: self.roots_pem()?, region, labels })
    }

    /// Every authority of the fleet: while one follows another there are two.
    pub(crate) fn roots_pem(&self) -> Result<String, JoinError> {
        let mut roots = std::fs::read_to_string(&self.roots).map_err(JoinError::Roots)?;
        let own = self.authority()?.certificate_pem();
        if !roots.contains(own.trim()) {
            roots.push_str(own);
        }
        Ok(roots)
    }
}

fn random<const N: usize>() -> Result<String, JoinError> {
    let mut bytes = [0_u8; N];
    SystemRandom::new().fill(&mut bytes).map_err(|_| JoinError::Random)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
