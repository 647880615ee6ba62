//! Who a node is to its fleet: the mTLS identity, renewed while the node runs.
//!
//! A node's certificate lives for days. The node asks the control plane for another before it ends, and writes that
//! down; or whoever else renews it replaces the files. It does so by the key of the one that has ended, if that could not
//! be in time. Every handshake from the next look on shows the new one, and is judged by the authorities that the
//! fleet has then; no connection is disturbed.

use std::hash::{DefaultHasher, Hash as _, Hasher as _};
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use arc_swap::ArcSwap;
use base64::Engine as _;
use base64::engine::general_purpose::STANDARD;
use rustls::client::ResolvesClientCert;
use rustls::pki_types::CertificateDer;
use rustls::pki_types::pem::PemObject as _;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme};
use selvage_certs::{
    Anchors, AuthorityError, Enrolment, FileError, Identity, IdentityError, Role, TlsError, chain_pem, peer_role,
    roots_from_pem, roots_of, was_vouched_for,
};
use selvage_config::join::{
    AUTHORITIES_PATH, Authorities, CERTIFICATE_PATH, CertificateAnswer, CertificateRequest, JOIN_BYTES_MAX,
    RENEWAL_PATH, RenewalRequest,
};
use selvage_config::node::{ControlPlaneAddress, IdentityFiles};
use selvage_config::plan::{NODES_PATH, Plan};
use selvage_config::{Digest, NodeName, Region};
use selvage_sync::Trust;
use tokio::sync::watch;

use super::StartError;
use crate::release::neighbours::{Neighbours, Sources};
use crate::release::origin::{Backoff, Origin, OriginError, chain};

/// How often the identity's files are looked at, and whether it is time for other ones.
const IDENTITY_LOOK: Duration = Duration::from_secs(5);
/// First and longest pause after the control plane gave no other certificate.
const RETRY: (Duration, Duration) = (Duration::from_secs(10), Duration::from_secs(300));
const SECOND: Duration = Duration::from_secs(1);

/// The mTLS identity with the authorities of the fleet. Clones show the same one.
#[derive(Clone)]
pub(super) struct Fleet {
    files: IdentityFiles,
    anchors: Anchors,
    shown: Arc<Shown>,
    /// Which authorities the files name.
    known: Arc<watch::Sender<Option<Authorities>>>,
    /// Those of the fleet, as the control plane tells them.
    fleets: watch::Sender<Option<Authorities>>,
}

/// The identity that is shown now.
#[derive(Debug)]
struct Shown(ArcSwap<Identity>);

impl Shown {
    fn key(&self) -> Arc<CertifiedKey> {
        self.0.load().certified_key()
    }
}

impl ResolvesClientCert for Shown {
    fn resolve(&self, _: &[&[u8]], _: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }

    fn has_certs(&self) -> bool {
        true
    }
}

impl ResolvesServerCert for Shown {
    fn resolve(&self, _: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        Some(self.key())
    }
}

/// What a node says of its keys, it says as who it is then; of others it believes what the authorities of now vouch for.
impl Trust for Fleet {
    fn prove(&self, statement: &[u8]) -> Option<Vec<u8>> {
        self.shown.0.load().state(statement)
    }

    fn mark(&self) -> u64 {
        let mut hasher = DefaultHasher::new();
        self.shown.0.load().chain().hash(&mut hasher);
        hasher.finish()
    }

    fn is_proved(&self, node: &NodeName, statement: &[u8], at_ms: u64, proof: &[u8]) -> bool {
        let at = SystemTime::UNIX_EPOCH + Duration::from_millis(at_ms);
        let said = self.anchors.stated_by(statement, proof, at);
        said.is_some_and(|role| matches!(role, Role::Node { node: said, .. } if said == *node))
    }
}

impl Fleet {
    pub(super) fn load(files: &IdentityFiles) -> Result<Self, StartError> {
        let identity = Identity::load(&files.certificate, &files.key)?;
        let anchors = Anchors::new(roots_from_pem(&files.roots)?)?;
        let known = watch::Sender::new(known(files, &identity));
        let shown = Arc::new(Shown(ArcSwap::from_pointee(identity)));
        let fleets = watch::Sender::new(None);
        Ok(Self { files: files.clone(), anchors, shown, known: Arc::new(known), fleets })
    }

    /// What peers and operators connect to.
    pub(super) fn server(&self) -> Arc<ServerConfig> {
        let mut config = self.anchors.server(&self.shown.0.load());
        config.cert_resolver = Arc::<Shown>::clone(&self.shown);
        Arc::new(config)
    }

    /// What connects to peers and the control plane.
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, StartError> {
        let mut config = self.anchors.client(&self.shown.0.load())?;
        config.client_auth_cert_resolver = Arc::<Shown>::clone(&self.shown);
        Ok(Arc::new(config))
    }

    /// Which authorities this node knows, as they change, and where to tell those of the fleet.
    pub(super) fn authorities(&self) -> (watch::Receiver<Option<Authorities>>, watch::Sender<Option<Authorities>>) {
        (self.known.subscribe(), self.fleets.clone())
    }

    /// Where releases come from besides the disk: without an identity no neighbour gives any.
    pub(super) fn sources(
        fleet: Option<&Self>,
        origin: Option<Origin>,
        region: &Region,
        plans: &watch::Receiver<Option<Arc<Plan>>>,
    ) -> Result<Sources, StartError> {
        let client = fleet.map(Self::client).transpose()?;
        let neighbours = client.map(|tls| Neighbours::new(tls, region.clone(), plans.clone()));
        Ok(Sources { origin, neighbours })
    }

    /// Whether to ask for another certificate: this one is near its end, or another authority issues now.
    fn is_due(&self, fleets: Option<Authorities>) -> bool {
        let issued_by = self.known.borrow().map(|known| known.issuing);
        let is_of_another = fleets.is_some_and(|fleets| issued_by.is_some_and(|issued_by| issued_by != fleets.issuing));
        is_of_another || self.shown.0.load().renew_after() <= SystemTime::now()
    }

    /// Asks the control plane for another certificate, and writes it down with the authorities of the fleet as they are
    /// now.
    async fn renew(&self, origin: &Origin, place: &ControlPlaneAddress, node: &NodeName) -> Result<(), RenewError> {
        let identity = self.shown.0.load_full();
        let enrolment = Enrolment::again(&identity).map_err(RenewError::Request)?;
        let request = STANDARD.encode(enrolment.request());
        let bytes_max = JOIN_BYTES_MAX as u64;
        let answer = if identity.not_after() > SystemTime::now() {
            let path = format!("{NODES_PATH}/{node}/{CERTIFICATE_PATH}");
            origin.post(&path, &CertificateRequest { request }, bytes_max).await?
        } else {
            // It can be shown to nobody any more. What it says, and the key, still prove who asks.
            let nameless = Origin::new(&place.address, &self.anchors.nameless_client())?;
            let certificate = chain_pem(identity.chain());
            nameless.post(RENEWAL_PATH, &RenewalRequest { certificate, request }, bytes_max).await?
        };
        let answer: CertificateAnswer = serde_json::from_slice(&answer).map_err(RenewError::Answer)?;
        let chain = CertificateDer::pem_slice_iter(answer.certificate.as_bytes()).collect::<Result<Vec<_>, _>>();
        let renewed = enrolment.finish(chain.map_err(|_| RenewError::Certificate)?).map_err(RenewError::Identity)?;
        // Nothing is written that would not be taken by the next start.
        let roots = Anchors::new(roots_of_text(&answer.roots)?).map_err(RenewError::Tls)?;
        if renewed.not_after() < identity.not_after()
            || peer_role(&renewed.chain()[0]).ok() != peer_role(&identity.chain()[0]).ok()
            || !roots.vouch_for(&renewed, SystemTime::now())
        {
            return Err(RenewError::Certificate);
        }
        let files = self.files.clone();
        let written = tokio::task::spawn_blocking(move || {
            keep_roots(&files.roots, &answer.roots)?;
            Ok(renewed.save(&files.certificate, &files.key)?)
        });
        written.await.map_err(|_| RenewError::Certificate)?
    }

    /// Takes the authorities that the fleet has now. Those that do not vouch for this node's own certificate are not taken:
    /// it would be cut off. Then another certificate comes first.
    async fn adopt(&self, origin: &Origin) -> Result<(), RenewError> {
        let bytes = origin.get(AUTHORITIES_PATH, "*/*", JOIN_BYTES_MAX as u64).await?.unwrap_or_default();
        let text = String::from_utf8(bytes.into()).map_err(|_| RenewError::Authorities)?;
        let fleets = Anchors::new(roots_of_text(&text)?).map_err(RenewError::Tls)?;
        if !fleets.vouch_for(&self.shown.0.load(), SystemTime::now()) {
            return Err(RenewError::CutOff);
        }
        let path = self.files.roots.clone();
        let kept = tokio::task::spawn_blocking(move || keep_roots(&path, &text));
        kept.await.map_err(|_| RenewError::Authorities)?
    }

    /// What the control plane can do for this node now.
    async fn ask(
        &self,
        (origin, place): &(Origin, ControlPlaneAddress),
        node: &NodeName,
        fleets: Option<Authorities>,
    ) -> Result<(), RenewError> {
        if self.is_due(fleets) {
            self.renew(origin, place, node).await?;
            tracing::info!("the control plane gave another certificate");
        }
        let believed = self.known.borrow().map(|known| known.believed);
        if fleets.is_some_and(|fleets| Some(fleets.believed) != believed) {
            self.adopt(origin).await?;
        }
        Ok(())
    }

    /// Sees to it that there is a new identity in time, and takes it as it comes, and the authorities of the fleet as the
    /// control plane tells of them. A bad one is told, and the old one stays.
    pub(super) async fn look_after(self, control_plane: Option<(Origin, ControlPlaneAddress)>, node: NodeName) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut next = Instant::now();
        loop {
            tokio::time::sleep(IDENTITY_LOOK).await;
            let fleets = *self.fleets.borrow();
            if let Some(control_plane) = control_plane.as_ref().filter(|_| Instant::now() >= next) {
                match self.ask(control_plane, &node, fleets).await {
                    Ok(()) => backoff.reset(),
                    Err(error) => {
                        next = Instant::now() + backoff.pause();
                        tracing::warn!(error = chain(&error), "certificate and authorities stay as they are");
                    }
                }
            }
            let looking = self.clone();
            match tokio::task::spawn_blocking(move || looking.look()).await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => tracing::info!("new identity, or other authorities"),
                Ok(Err(error)) => tracing::error!(error = chain(&error), "identity can't be used, the old one stays"),
                Err(_) => return,
            }
        }
    }

    /// Reads the files again. Returns whether there was another identity, or other authorities. It blocks on the disk.
    pub(super) fn look(&self) -> Result<bool, LookError> {
        let identity = Identity::load(&self.files.certificate, &self.files.key)?;
        let others = self.anchors.replace(roots_from_pem(&self.files.roots)?)?;
        let is_new = identity != **self.shown.0.load();
        if is_new || others {
            self.known.send_replace(known(&self.files, &identity));
        }
        if is_new {
            self.shown.0.store(Arc::new(identity));
        }
        Ok(is_new || others)
    }
}

/// The authorities in the file, and which of them vouches for `identity`. None: no single one does, or the file can't be
/// read.
fn known(files: &IdentityFiles, identity: &Identity) -> Option<Authorities> {
    let text = std::fs::read_to_string(&files.roots).ok()?;
    let vouches = |der: &CertificateDer<'_>| {
        let only = roots_of(std::slice::from_ref(der)).ok()?;
        was_vouched_for(&only, identity.chain(), identity.not_after() - SECOND).ok().filter(|was| *was)
    };
    let mut authorities = CertificateDer::pem_slice_iter(text.as_bytes()).filter_map(Result::ok);
    let issuing = authorities.find(|der| vouches(der).is_some())?;
    Some(Authorities { believed: Digest::of(text.as_bytes()), issuing: Digest::of(&issuing) })
}

fn roots_of_text(text: &str) -> Result<RootCertStore, RenewError> {
    let certificates = CertificateDer::pem_slice_iter(text.as_bytes()).collect::<Result<Vec<_>, _>>();
    roots_of(&certificates.map_err(|_| RenewError::Authorities)?).map_err(RenewError::Tls)
}

/// Why the files were not taken.
#[derive(Debug, thiserror::Error)]
pub(super) enum LookError {
    #[error(transparent)]
    File(#[from] FileError),
    #[error("use the authorities")]
    Tls(#[from] TlsError),
}

/// Why a certificate was not renewed.
#[derive(Debug, thiserror::Error)]
pub(super) enum RenewError {
    #[error("make a request for a certificate")]
    Request(#[source] AuthorityError),
    #[error("ask for a certificate")]
    Origin(#[from] OriginError),
    #[error("read the answer")]
    Answer(#[source] serde_json::Error),
    #[error("the certificate is not one that follows this node's own")]
    Certificate,
    #[error("use the certificate")]
    Identity(#[source] IdentityError),
    #[error("write the certificate")]
    File(#[from] FileError),
    #[error("write the authorities")]
    Roots(#[source] std::io::Error),
    #[error("the fleet's authorities can't be read")]
    Authorities,
    #[error("the fleet's authorities do not vouch for this node's certificate; another one comes first")]
    CutOff,
    #[error("use the fleet's authorities")]
    Tls(#[source] TlsError),
}

/// Writes the authorities that the fleet has now, if they are others. While one authority follows another there are
/// two.
fn keep_roots(path: &Path, roots: &str) -> Result<(), RenewError> {
    let is_known = std::fs::read_to_string(path).is_ok_and(|found| found == roots);
    let has_some = CertificateDer::pem_slice_iter(roots.as_bytes()).next().is_some_and(|first| first.is_ok());
    if is_known || !has_some {
        return Ok(());
    }
    let aside = path.with_extension("partial");
    let written = std::fs::write(&aside, roots).and_then(|()| std::fs::File::open(&aside)?.sync_all());
    written.and_then(|()| std::fs::rename(&aside, path)).map_err(RenewError::Roots)
}

#[cfg(test)]
mod tests {
    use selvage_certs::{Authority, Role};

    use super::*;

    #[test]
    fn a_renewed_identity_is_shown_and_a_broken_one_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let path = |name: &str| dir.path().join(name);
        let files = IdentityFiles { certificate: path("node.pem"), key: path("node.key"), roots: path("ca.pem") };
        let authority = Authority::create("test").unwrap();
        std::fs::write(&files.roots, authority.certificate_pem()).unwrap();
        let save = || {
            let identity = authority.issue_identity(&Role::ControlPlane, &[], &[]).unwrap();
            identity.save(&files.certificate, &files.key).unwrap();
            identity.chain()[0].clone()
        };
        let first = save();
        let fleet = Fleet::load(&files).unwrap();
        let client = fleet.client().unwrap();
        let shown = || client.client_auth_cert_resolver.resolve(&[], &[]).unwrap().cert[0].clone();
        assert_eq!(shown(), first);
        assert!(!fleet.look().unwrap());

        let second = save();
        assert!(fleet.look().unwrap());
        assert_eq!(shown(), second);
        std::fs::write(&files.key, "broken").unwrap();
        assert!(fleet.look().is_err());
        assert_eq!(shown(), second);
        // Another authority takes the place of the first: both are believed, and which one issued is known.
        let next = Authority::create("next").unwrap();
        save();
        std::fs::write(&files.roots, format!("{}{}", authority.certificate_pem(), next.certificate_pem())).unwrap();
        let (told, _) = fleet.authorities();
        assert!(fleet.look().unwrap());
        let issuing = |authority: &Authority| Digest::of(&authority.certificate_der());
        let known = (*told.borrow()).unwrap();
        assert_eq!(known.issuing, issuing(&authority));
        assert!(!fleet.is_due(None) && !fleet.is_due(Some(known)));
        assert!(fleet.is_due(Some(Authorities { issuing: issuing(&next), ..known })));
        next.issue_identity(&Role::ControlPlane, &[], &[]).unwrap().save(&files.certificate, &files.key).unwrap();
        assert!(fleet.look().unwrap());
        assert_eq!((*told.borrow()).unwrap().issuing, issuing(&next));
    }
}
