//! TLS between the parts of a fleet: both ends show a certificate of the same authority.
//!
//! TLS 1.3 only. Nothing is resumed: a resumed session would carry an identity past its certificate's end and
//! past a change of roots, and these connections live long enough for a full handshake not to matter.

use std::sync::Arc;

use rustls::server::danger::ClientCertVerifier;
use rustls::server::{NoServerSessionStorage, VerifierBuilderError, WebPkiClientVerifier};
use rustls::sign::SingleCertAndKey;
use rustls::version::TLS13;
use rustls::{ClientConfig, ConfigBuilder, RootCertStore, ServerConfig, WantsVerifier, client::Resumption};
use rustls_pki_types::CertificateDer;
use selvage_config::node::TlsProvider;

use crate::tickets::NoTickets;
use crate::{Identity, provider, provider_of};

/// Why there is no configuration.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// With no root every peer would be refused.
    #[error("no root certificate")]
    NoRoots,
    /// A certificate can't be a root.
    #[error("certificate {position} can't be a root")]
    Root {
        /// Which certificate, from 1.
        position: usize,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// The roots can't verify clients.
    #[error("verifier of client certificates")]
    Verifier(#[source] VerifierBuilderError),
}

/// Whether a client must show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ClientAuth {
    /// None, no handshake.
    Required,
    /// None is let in and must then prove itself otherwise; a bad one is refused all the same.
    Optional,
}

/// Roots from certificates in hand.
pub fn roots_of(certificates: &[CertificateDer<'_>]) -> Result<RootCertStore, TlsError> {
    let mut roots = RootCertStore::empty();
    for (index, certificate) in certificates.iter().enumerate() {
        roots.add(certificate.clone()).map_err(|source| TlsError::Root { position: index + 1, source })?;
    }
    if roots.is_empty() { Err(TlsError::NoRoots) } else { Ok(roots) }
}

/// A client that shows `identity`. The name to verify is [`crate::Role::tls_name`], or the server's address.
pub fn mutual_client(identity: &Identity, roots: &RootCertStore) -> Result<Arc<ClientConfig>, TlsError> {
    if roots.is_empty() {
        return Err(TlsError::NoRoots);
    }
    let shown = Arc::new(SingleCertAndKey::from(identity.certified_key()));
    let mut config = client_builder().with_root_certificates(roots.clone()).with_client_cert_resolver(shown);
    config.resumption = Resumption::disabled();
    Ok(Arc::new(config))
}

/// A client that shows no certificate: an operator's, who has a token.
pub fn client(roots: &RootCertStore) -> ClientConfig {
    let mut config = client_builder().with_root_certificates(roots.clone()).with_no_client_auth();
    config.resumption = Resumption::disabled();
    config
}

/// A server that shows `identity` and verifies its clients. Who they are, [`crate::peer_of`] tells.
pub fn mutual_server(
    identity: &Identity,
    roots: &RootCertStore,
    auth: ClientAuth,
) -> Result<Arc<ServerConfig>, TlsError> {
    let verifier = client_verifier(Arc::new(roots.clone()), auth, TlsProvider::default())?;
    Ok(Arc::new(server_verified_by(identity, verifier)))
}

/// A server that shows `identity`, and whose clients `verifier` judges.
pub(crate) fn server_verified_by(identity: &Identity, verifier: Arc<dyn ClientCertVerifier>) -> ServerConfig {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("both providers have TLS 1.3")
        .with_client_cert_verifier(verifier)
        .with_cert_resolver(Arc::new(SingleCertAndKey::from(identity.certified_key())));
    config.ticketer = Arc::new(NoTickets);
    config.session_storage = Arc::new(NoServerSessionStorage {});
    config.send_tls13_tickets = 0;
    config
}

/// Who verifies the certificates of clients.
pub(crate) fn client_verifier(
    roots: Arc<RootCertStore>,
    auth: ClientAuth,
    provider: TlsProvider,
) -> Result<Arc<dyn ClientCertVerifier>, TlsError> {
    let verifier = WebPkiClientVerifier::builder_with_provider(roots, provider_of(provider));
    let verifier = match auth {
        ClientAuth::Required => verifier,
        ClientAuth::Optional => verifier.allow_unauthenticated(),
    };
    verifier.build().map_err(|error| match error {
        VerifierBuilderError::NoRootAnchors => TlsError::NoRoots,
        other => TlsError::Verifier(other),
    })
}

fn client_builder() -> ConfigBuilder<ClientConfig, WantsVerifier> {
    ClientConfig::builder_with_provider(provider())
        .with_protocol_versions(&[&TLS13])
        .expect("both providers have TLS 1.3")
}
