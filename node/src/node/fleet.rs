//! Who a node is to its fleet: the mTLS identity, renewed while the node runs.
//!
//! A node's certificate lives for days. The node asks the control plane for another before it ends, and writes that
//! down; or whoever else renews it replaces the files. Every handshake from the next look on shows the new one, and no
//! connection is disturbed. The authorities are read at the start.

use std::path::Path;
use std::sync::Arc;
use std::time::SystemTime;

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
    AuthorityError, ClientAuth, Enrolment, FileError, Identity, IdentityError, mutual_client, mutual_server, peer_role,
    roots_from_pem,
};
use selvage_config::NodeName;
use selvage_config::join::{CERTIFICATE_PATH, CertificateAnswer, CertificateRequest, JOIN_BYTES_MAX};
use selvage_config::node::IdentityFiles;
use selvage_config::plan::NODES_PATH;

use super::{CERTIFICATES_LOOK, StartError};
use crate::release::origin::{Origin, OriginError, chain};

/// The mTLS identity with the authorities of the fleet. Clones show the same one.
#[derive(Clone)]
pub(super) struct Fleet {
    files: IdentityFiles,
    roots: Arc<RootCertStore>,
    shown: Arc<Shown>,
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

impl Fleet {
    pub(super) fn load(files: &IdentityFiles) -> Result<Self, StartError> {
        let identity = Identity::load(&files.certificate, &files.key)?;
        let roots = Arc::new(roots_from_pem(&files.roots)?);
        Ok(Self { files: files.clone(), roots, shown: Arc::new(Shown(ArcSwap::from_pointee(identity))) })
    }

    /// What peers and operators connect to.
    pub(super) fn server(&self) -> Result<Arc<ServerConfig>, StartError> {
        let config = mutual_server(&self.shown.0.load(), &self.roots, ClientAuth::Required)?;
        let mut config = ServerConfig::clone(&config);
        config.cert_resolver = Arc::<Shown>::clone(&self.shown);
        Ok(Arc::new(config))
    }

    /// What connects to peers and the control plane.
    pub(super) fn client(&self) -> Result<Arc<ClientConfig>, StartError> {
        let config = mutual_client(&self.shown.0.load(), &self.roots)?;
        let mut config = ClientConfig::clone(&config);
        config.client_auth_cert_resolver = Arc::<Shown>::clone(&self.shown);
        Ok(Arc::new(config))
    }

    /// Asks the control plane for another certificate if this one is near its end, and writes it down with the
    /// authorities of the fleet as they are now. Whether there was need to.
    pub(super) async fn renew(&self, origin: &Origin, node: &NodeName) -> Result<bool, RenewError> {
        let identity = self.shown.0.load_full();
        if identity.renew_after() > SystemTime::now() {
            return Ok(false);
        }
        let enrolment = Enrolment::again(&identity).map_err(RenewError::Request)?;
        let request = CertificateRequest { request: STANDARD.encode(enrolment.request()) };
        let path = format!("{NODES_PATH}/{node}/{CERTIFICATE_PATH}");
        let answer = origin.post(&path, &request, JOIN_BYTES_MAX as u64).await?;
        let answer: CertificateAnswer = serde_json::from_slice(&answer).map_err(RenewError::Answer)?;
        let chain = CertificateDer::pem_slice_iter(answer.certificate.as_bytes()).collect::<Result<Vec<_>, _>>();
        let renewed = enrolment.finish(chain.map_err(|_| RenewError::Certificate)?).map_err(RenewError::Identity)?;
        // Nothing is written that would not be taken by the next start.
        if renewed.not_after() <= identity.not_after()
            || peer_role(&renewed.chain()[0]).ok() != peer_role(&identity.chain()[0]).ok()
        {
            return Err(RenewError::Certificate);
        }
        let files = self.files.clone();
        let written = tokio::task::spawn_blocking(move || {
            renewed.save(&files.certificate, &files.key)?;
            keep_roots(&files.roots, &answer.roots)
        });
        written.await.map_err(|_| RenewError::Certificate)??;
        Ok(true)
    }

    /// Sees to it that there is a new identity in time, and takes it as it comes. A bad one is told, and the old one
    /// stays.
    pub(super) async fn look_after(self, origin: Option<Origin>, node: NodeName) {
        loop {
            tokio::time::sleep(CERTIFICATES_LOOK).await;
            if let Some(origin) = &origin {
                match self.renew(origin, &node).await {
                    Ok(false) => {}
                    Ok(true) => tracing::info!("the control plane gave another certificate"),
                    Err(error) => tracing::warn!(error = chain(&error), "the certificate is not renewed yet"),
                }
            }
            let looking = self.clone();
            match tokio::task::spawn_blocking(move || looking.look()).await {
                Ok(Ok(false)) => {}
                Ok(Ok(true)) => tracing::info!("new identity"),
                Ok(Err(error)) => tracing::error!(error = chain(&error), "identity can't be used, the old one stays"),
                Err(_) => return,
            }
        }
    }

    /// Reads the files again. Returns whether there was another identity. It blocks on the disk.
    pub(super) fn look(&self) -> Result<bool, FileError> {
        let identity = Identity::load(&self.files.certificate, &self.files.key)?;
        let is_new = identity != **self.shown.0.load();
        if is_new {
            self.shown.0.store(Arc::new(identity));
        }
        Ok(is_new)
    }
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
}

/// Writes the authorities that the fleet has now, if they are others. While one authority follows another there are
/// two; what the node trusts it reads at its start.
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
    }
}
