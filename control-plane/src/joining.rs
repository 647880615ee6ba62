//! How a node comes into the fleet, and stays: a token once, a certificate for some days, and another before it ends.
//!
//! The node makes its key and never tells it. The token says where the node may stand; the request for a certificate
//! says nothing but the key. A token is `sj1.<id>.<secret>.<hash of the authority>`: the hash lets the node know that
//! it talks to its fleet before it has any certificate to check that with.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use ring::rand::{SecureRandom as _, SystemRandom};
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use selvage_certs::{Authority, AuthorityError, LateError, Role, chain_pem, late_role, roots_of};
use selvage_config::join::{Authorities, CertificateAnswer, JoinToken};
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

/// For how long after its end a certificate may still be renewed by the node that has its key. A node that was off for
/// longer joins again.
const GRACE: Duration = Duration::from_secs(7 * 24 * 3_600);
/// How often the authorities are read anew to tell nodes of them.
const AUTHORITIES_LOOK: Duration = Duration::from_secs(2);

/// Issues certificates of nodes.
#[derive(Debug)]
pub(crate) struct Joining {
    /// The authority's directory, read anew for each certificate: another one may have taken its place. None:
    /// certificates are made by hand.
    authority: Option<PathBuf>,
    /// What nodes are told to trust: the file with all authorities of the fleet.
    roots: PathBuf,
    /// What nodes are told of them, and when that was read.
    told: Mutex<Option<(Instant, Authorities)>>,
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
    #[error("use the fleet's authority")]
    Authority(#[source] AuthorityError),
    #[error(transparent)]
    Late(#[from] LateError),
    #[error("only nodes renew certificates that have ended")]
    NotNode,
    #[error("there is no node {0}, or its certificates were revoked")]
    Unregistered(NodeName),
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
    /// With the authority of a directory, which is made if there is none. Answers too which one issues now.
    ///
    /// # Errors
    /// The authority's.
    pub(crate) fn open(authority: Option<PathBuf>, roots: PathBuf) -> Result<(Self, Option<Digest>), AuthorityError> {
        let open = |directory: &PathBuf| Authority::open_or_create(directory);
        let issuing = authority.as_ref().map(open).transpose()?.map(|now| Digest::of(&now.certificate_der()));
        Ok((Self { authority, roots, told: Mutex::default() }, issuing))
    }

    fn authority(&self) -> Result<Authority, JoinError> {
        let directory = self.authority.as_ref().ok_or(JoinError::NoAuthority)?;
        Authority::open(directory).map_err(JoinError::Authority)
    }

    /// What nodes are told of the authorities: whom to believe, and who issues. Waits on the disk. None: certificates are
    /// made by hand, or the files can't be read now.
    pub(crate) fn authorities(&self) -> Option<Authorities> {
        let told = *self.told.lock().unwrap_or_else(PoisonError::into_inner);
        match told {
            Some((at, authorities)) if at.elapsed() < AUTHORITIES_LOOK => Some(authorities),
            _ => self.authorities_now(),
        }
    }

    /// The same, as they are at this moment.
    pub(crate) fn authorities_now(&self) -> Option<Authorities> {
        self.authority.as_ref()?;
        let read = || {
            let (roots, authority) = (self.roots_pem()?, self.authority()?);
            let issuing = Digest::of(&authority.certificate_der());
            Ok::<_, JoinError>(Authorities { believed: Digest::of(roots.as_bytes()), issuing })
        };
        let authorities = read().map_err(|error| tracing::warn!(%error, "the authorities can't be told")).ok()?;
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), authorities));
        Some(authorities)
    }

    /// Another certificate for a node whose own has ended; waits on the disk.
    pub(crate) fn renew_late(
        &self,
        fleet: &Fleet,
        certificate: &str,
        request: &[u8],
    ) -> Result<(NodeName, CertificateAnswer), JoinError> {
        let chain = CertificateDer::pem_slice_iter(certificate.as_bytes()).collect::<Result<Vec<_>, _>>();
        let chain = chain.map_err(|_| JoinError::Late(LateError::Stranger))?;
        let roots = self.roots_pem()?;
        let roots = CertificateDer::pem_slice_iter(roots.as_bytes()).collect::<Result<Vec<_>, _>>();
        let roots = roots.ok().and_then(|roots| roots_of(&roots).ok()).ok_or(JoinError::Late(LateError::Stranger))?;
        match late_role(&roots, &chain, request, (SystemTime::now(), GRACE))? {
            Role::Node { region, node } if fleet.is_registered(&node) => {
                let answer = self.certify(&node, region, request)?;
                Ok((node, answer))
            }
            Role::Node { node, .. } => Err(JoinError::Unregistered(node)),
            Role::ControlPlane | Role::Operator { .. } => Err(JoinError::NotNode),
        }
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
        let authority = self.authority()?;
        let own = authority.certificate_pem();
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
