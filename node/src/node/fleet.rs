//! Who a node is to its fleet: the mTLS identity, renewed while the node runs.
//!
//! A node's certificate lives for days. Whoever renews it replaces the files; every handshake from the next look on
//! shows the new one, and no connection is disturbed. The authorities are read once.

use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::client::ResolvesClientCert;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{ClientConfig, RootCertStore, ServerConfig, SignatureScheme};
use selvage_certs::{ClientAuth, FileError, Identity, mutual_client, mutual_server, roots_from_pem};
use selvage_config::node::IdentityFiles;

use super::StartError;

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
