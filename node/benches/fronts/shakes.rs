//! A client that only shakes hands.

use std::net::{Ipv4Addr, TcpStream};
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use rustls::client::Resumption;
use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::crypto::CryptoProvider;
use rustls::pki_types::{CertificateDer, ServerName, UnixTime};
use rustls::{ClientConfig, ClientConnection, DigitallySignedStruct, HandshakeKind, NamedGroup, SignatureScheme};
use socket2::SockRef;

use super::HOST;

/// How many shake hands at once.
const LANES: usize = 8;
/// Longest wait for a server.
const ANSWER_MAX: Duration = Duration::from_secs(10);

/// What the keys are exchanged by.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Group {
    Classical,
    Hybrid,
}

impl Group {
    pub(crate) const ALL: [Self; 2] = [Self::Classical, Self::Hybrid];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Classical => "X25519",
            Self::Hybrid => "X25519MLKEM768",
        }
    }

    fn group(self) -> NamedGroup {
        match self {
            Self::Classical => NamedGroup::X25519,
            Self::Hybrid => NamedGroup::X25519MLKEM768,
        }
    }
}

/// A client's configuration that takes any certificate: what it would cost to look at it is the client's.
pub(crate) fn client(provider: &Arc<CryptoProvider>, alpn: &[u8]) -> anyhow::Result<ClientConfig> {
    let verifier = Arc::new(Any(Arc::clone(provider)));
    let config = ClientConfig::builder_with_provider(Arc::clone(provider));
    let config = config.with_protocol_versions(&[&rustls::version::TLS13])?.dangerous();
    let mut config = config.with_custom_certificate_verifier(verifier).with_no_client_auth();
    config.alpn_protocols = vec![alpn.to_vec()];
    Ok(config)
}

/// Takes any certificate, and any signature.
#[derive(Debug)]
struct Any(Arc<CryptoProvider>);

impl ServerCertVerifier for Any {
    fn verify_server_cert(
        &self,
        _: &CertificateDer<'_>,
        _: &[CertificateDer<'_>],
        _: &ServerName<'_>,
        _: &[u8],
        _: UnixTime,
    ) -> Result<ServerCertVerified, rustls::Error> {
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn verify_tls13_signature(
        &self,
        _: &[u8],
        _: &CertificateDer<'_>,
        _: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, rustls::Error> {
        Ok(HandshakeSignatureValid::assertion())
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.0.signature_verification_algorithms.supported_schemes()
    }
}

/// A client of one server, with as many sessions as it needs where it resumes.
pub(crate) struct Client {
    config: Arc<ClientConfig>,
    port: u16,
    is_resumed: bool,
}

impl Client {
    pub(crate) fn new(port: u16, group: Group, is_resumed: bool) -> anyhow::Result<Self> {
        let mut provider = (*selvage_certs::provider()).clone();
        provider.kx_groups.retain(|known| known.name() == group.group());
        ensure!(provider.kx_groups.len() == 1, "the provider has no {}", group.name());
        let mut config = client(&Arc::new(provider), b"http/1.1")?;
        if !is_resumed {
            config.resumption = Resumption::disabled();
        }
        let client = Self { config: Arc::new(config), port, is_resumed };
        if is_resumed {
            // Each session brings at least one that follows it.
            for _ in 0..LANES {
                client.shake()?;
            }
        }
        Ok(client)
    }

    /// Shakes hands for so long. Returns how often.
    pub(crate) fn run(&self, duration: Duration) -> anyhow::Result<f64> {
        let end = Instant::now() + duration;
        let lane = || -> anyhow::Result<f64> {
            let mut count = 0.0;
            while Instant::now() < end {
                let kind = self.shake()?;
                let wanted = if self.is_resumed { HandshakeKind::Resumed } else { HandshakeKind::Full };
                ensure!(kind == wanted, "a handshake was {kind:?}");
                count += 1.0;
            }
            Ok(count)
        };
        std::thread::scope(|scope| {
            let lanes: Vec<_> = (0..LANES).map(|_| scope.spawn(lane)).collect();
            lanes.into_iter().map(|lane| lane.join().expect("no lane panics")).sum()
        })
    }

    /// One handshake, up to the tickets that tell that the server is through with it as well.
    fn shake(&self) -> anyhow::Result<HandshakeKind> {
        let mut tcp = TcpStream::connect((Ipv4Addr::LOCALHOST, self.port))?;
        tcp.set_nodelay(true)?;
        tcp.set_read_timeout(Some(ANSWER_MAX))?;
        // Thousands of them a second would use up the ports if each were remembered.
        SockRef::from(&tcp).set_linger(Some(Duration::ZERO))?;
        let mut tls = ClientConnection::new(Arc::clone(&self.config), ServerName::try_from(HOST)?)?;
        tls.complete_io(&mut tcp)?;
        tls.read_tls(&mut tcp)?;
        tls.process_new_packets()?;
        tls.handshake_kind().context("no handshake")
    }
}
