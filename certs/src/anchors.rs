//! The authorities that peers must come from, which may change while connections are made.
//!
//! While one authority follows another both are believed; then the old one is dropped. Every handshake from then on is
//! judged by what [`Anchors::replace`] was given last, and no connection that is open is disturbed.

use std::sync::Arc;
use std::time::SystemTime;

use arc_swap::ArcSwap;
use rustls::client::WebPkiServerVerifier;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::{
    ClientConfig, DigitallySignedStruct, DistinguishedName, Error, RootCertStore, ServerConfig, SignatureScheme,
};
use rustls_pki_types::{CertificateDer, ServerName, UnixTime};
use selvage_config::node::TlsProvider;

use crate::mutual::{client_verifier, server_verified_by};
use crate::{ClientAuth, Identity, TlsError, client, mutual_client, provider};

/// The authorities that peers must come from. Clones are the same ones.
#[derive(Debug, Clone)]
pub struct Anchors(Arc<ArcSwap<Verifiers>>);

/// What judges by one set of authorities.
#[derive(Debug)]
struct Verifiers {
    roots: RootCertStore,
    clients: Arc<dyn ClientCertVerifier>,
    servers: Arc<dyn ServerCertVerifier>,
}

impl Verifiers {
    fn new(roots: RootCertStore) -> Result<Self, TlsError> {
        let shared = Arc::new(roots.clone());
        let clients = client_verifier(Arc::clone(&shared), ClientAuth::Required, TlsProvider::default())?;
        let servers = WebPkiServerVerifier::builder_with_provider(shared, provider()).build();
        Ok(Self { roots, clients, servers: servers.map_err(TlsError::Verifier)? })
    }
}

impl Anchors {
    /// These authorities, for now.
    ///
    /// # Errors
    /// [`TlsError`]: there is none, or they can verify nobody.
    pub fn new(roots: RootCertStore) -> Result<Self, TlsError> {
        Ok(Self(Arc::new(ArcSwap::from_pointee(Verifiers::new(roots)?))))
    }

    /// From now on these. Whether they are others than before.
    ///
    /// # Errors
    /// [`TlsError`]; then nothing changed.
    pub fn replace(&self, roots: RootCertStore) -> Result<bool, TlsError> {
        let is_same = self.0.load().roots.roots == roots.roots;
        if !is_same {
            self.0.store(Arc::new(Verifiers::new(roots)?));
        }
        Ok(!is_same)
    }

    /// Whether a peer that knows these authorities takes `identity` for a client at that time.
    pub fn vouch_for(&self, identity: &Identity, at: SystemTime) -> bool {
        self.vouch_for_chain(identity.chain(), at)
    }

    /// The same of a chain.
    pub(crate) fn vouch_for_chain(&self, chain: &[CertificateDer<'_>], at: SystemTime) -> bool {
        vouched(&*self.0.load().clients, chain, at)
    }

    /// A client that shows `identity`, like [`mutual_client`].
    ///
    /// # Errors
    /// [`TlsError`].
    pub fn client(&self, identity: &Identity) -> Result<ClientConfig, TlsError> {
        let mut config = (*mutual_client(identity, &self.0.load().roots)?).clone();
        config.dangerous().set_certificate_verifier(Arc::new(self.clone()));
        Ok(config)
    }

    /// A client that shows no certificate.
    pub fn nameless_client(&self) -> ClientConfig {
        let mut config = client(&self.0.load().roots);
        config.dangerous().set_certificate_verifier(Arc::new(self.clone()));
        config
    }

    /// A server that shows `identity`, and whose clients must show one too.
    pub fn server(&self, identity: &Identity) -> ServerConfig {
        server_verified_by(identity, Arc::new(self.clone()))
    }
}

/// Whether somebody who believes `roots` took this chain for a client's at that time. It says nothing of now.
///
/// # Errors
/// [`TlsError`]: the roots can verify nobody.
pub fn was_vouched_for(roots: &RootCertStore, chain: &[CertificateDer<'_>], at: SystemTime) -> Result<bool, TlsError> {
    let verifier = client_verifier(Arc::new(roots.clone()), ClientAuth::Required, TlsProvider::default())?;
    Ok(vouched(&*verifier, chain, at))
}

fn vouched(verifier: &dyn ClientCertVerifier, chain: &[CertificateDer<'_>], at: SystemTime) -> bool {
    let Some((leaf, rest)) = chain.split_first() else { return false };
    let Ok(since) = at.duration_since(SystemTime::UNIX_EPOCH) else { return false };
    verifier.verify_client_cert(leaf, rest, UnixTime::since_unix_epoch(since)).is_ok()
}

impl ServerCertVerifier for Anchors {
    fn verify_server_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        name: &ServerName<'_>,
        ocsp: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        self.0.load().servers.verify_server_cert(leaf, rest, name, ocsp, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.load().servers.verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.load().servers.verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.load().servers.supported_verify_schemes()
    }
}

impl ClientCertVerifier for Anchors {
    /// None: a client of the fleet has one certificate, whoever it is asked for by. (RFC 8446 4.2.4: the hint may be
    /// left out.)
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        &[]
    }

    fn verify_client_cert(
        &self,
        leaf: &CertificateDer<'_>,
        rest: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        self.0.load().clients.verify_client_cert(leaf, rest, now)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.load().clients.verify_tls12_signature(message, leaf, signed)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        leaf: &CertificateDer<'_>,
        signed: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.0.load().clients.verify_tls13_signature(message, leaf, signed)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.load().clients.supported_verify_schemes()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use rustls_pki_types::ServerName;
    use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _, DuplexStream};
    use tokio_rustls::{TlsAcceptor, TlsConnector, client, server};

    use super::*;
    use crate::{Authority, Role, roots_of};

    fn node() -> Role {
        Role::Node { region: "fra".parse().unwrap(), node: "fra-1".parse().unwrap() }
    }

    struct Ends {
        client: client::TlsStream<DuplexStream>,
        server: server::TlsStream<DuplexStream>,
    }

    async fn shake(client: ClientConfig, server: ServerConfig) -> Option<Ends> {
        let (near, far) = tokio::io::duplex(64 * 1024);
        let name = ServerName::try_from(node().tls_name()).unwrap();
        let connected = TlsConnector::from(Arc::new(client)).connect(name, near);
        let (client, server) = tokio::join!(connected, TlsAcceptor::from(Arc::new(server)).accept(far));
        Some(Ends { client: client.ok()?, server: server.ok()? })
    }

    #[tokio::test]
    async fn one_authority_follows_another_and_no_connection_ends() {
        let (old, new) = (Authority::create("old").unwrap(), Authority::create("new").unwrap());
        let roots = |of: &[&Authority]| {
            roots_of(&of.iter().map(|authority| authority.certificate_der()).collect::<Vec<_>>()).unwrap()
        };
        let anchors = Anchors::new(roots(&[&old])).unwrap();
        let issue = |authority: &Authority| authority.issue_identity(&node(), &[], &[]).unwrap();
        let (by_old, by_new) = (issue(&old), issue(&new));
        // Made once, as a node makes them at its start.
        let (as_client, as_server) = (anchors.client(&by_old).unwrap(), anchors.server(&by_old));
        let mut open = shake(as_client.clone(), as_server.clone()).await.unwrap();
        assert!(shake(anchors.client(&by_new).unwrap(), as_server.clone()).await.is_none());
        assert!(shake(as_client.clone(), anchors.server(&by_new)).await.is_none());

        assert!(anchors.replace(roots(&[&old, &new])).unwrap());
        assert!(!anchors.replace(roots(&[&old, &new])).unwrap());
        assert!(shake(anchors.client(&by_new).unwrap(), as_server.clone()).await.is_some());
        assert!(shake(as_client.clone(), anchors.server(&by_new)).await.is_some());
        assert!(shake(as_client.clone(), as_server.clone()).await.is_some());

        assert!(anchors.replace(roots(&[&new])).unwrap());
        assert!(shake(as_client.clone(), anchors.server(&by_new)).await.is_none());
        assert!(shake(anchors.client(&by_new).unwrap(), as_server).await.is_none());
        assert!(shake(anchors.client(&by_new).unwrap(), anchors.server(&by_new)).await.is_some());
        open.client.write_all(b"on").await.unwrap();
        let mut read = [0; 2];
        open.server.read_exact(&mut read).await.unwrap();
        assert_eq!(&read, b"on");
    }

    #[test]
    fn nobody_is_believed_by_no_authority_and_a_bad_change_changes_nothing() {
        assert!(matches!(Anchors::new(RootCertStore::empty()), Err(TlsError::NoRoots)));
        let authority = Authority::create("test").unwrap();
        let anchors = Anchors::new(roots_of(&[authority.certificate_der()]).unwrap()).unwrap();
        assert!(anchors.replace(RootCertStore::empty()).is_err());
        let identity = authority.issue_identity(&node(), &[], &[]).unwrap();
        assert!(anchors.vouch_for(&identity, SystemTime::now()));
        assert!(!anchors.vouch_for(&identity, identity.not_after() + Duration::from_secs(1)));
        let stranger = Authority::create("other").unwrap().issue_identity(&node(), &[], &[]).unwrap();
        assert!(!anchors.vouch_for(&stranger, SystemTime::now()));
    }

    #[test]
    fn what_was_vouched_for_is_known_after_its_end() {
        let authority = Authority::create("test").unwrap();
        let roots = roots_of(&[authority.certificate_der()]).unwrap();
        let identity = authority.issue_identity(&node(), &[], &[]).unwrap();
        let was = |roots: &RootCertStore, at| was_vouched_for(roots, identity.chain(), at).unwrap();
        assert!(was(&roots, identity.not_after() - Duration::from_secs(1)));
        assert!(!was(&roots, identity.not_after() + Duration::from_secs(1)));
        let other = roots_of(&[Authority::create("other").unwrap().certificate_der()]).unwrap();
        assert!(!was(&other, SystemTime::now()));
        assert!(!was_vouched_for(&roots, &[], SystemTime::now()).unwrap());
        assert!(was_vouched_for(&RootCertStore::empty(), identity.chain(), SystemTime::now()).is_err());
    }
}
