//! TLS of a node's public listeners.

use std::sync::Arc;

use rustls::compress::CompressionCache;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};
use selvage_config::node::TlsProvider;

use crate::secret::FrontSecret;
use crate::{Resolver, TlsError, provider_of};

/// Compressed certificates that are kept (RFC 8879): to compress one takes longer than a handshake.
const COMPRESSED_MAX: usize = 1_024;

/// Which versions of TLS a listener speaks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum TlsVersions {
    /// 1.3 alone; QUIC knows no other.
    Only13,
    /// 1.2 and 1.3.
    From12,
}

impl TlsVersions {
    fn list(self) -> &'static [&'static SupportedProtocolVersion] {
        static NEWEST_FIRST: [&SupportedProtocolVersion; 2] = [&TLS13, &TLS12];
        match self {
            Self::Only13 => &NEWEST_FIRST[..1],
            Self::From12 => &NEWEST_FIRST,
        }
    }
}

/// What the public listeners of a node have in common.
#[derive(Debug, Clone)]
pub struct FrontTls {
    /// The certificates.
    pub resolver: Arc<Resolver>,
    /// Who computes.
    pub provider: TlsProvider,
    /// What tickets, and QUIC's tokens and resets, are made with.
    pub secret: FrontSecret,
    /// What is spoken over TCP.
    pub versions: TlsVersions,
    /// Whether an ACME authority may look for challenges over TCP (RFC 8737).
    pub has_challenges: bool,
}

/// A public server that shows what the resolver finds and offers `alpn`, preferred first. Clients show nothing.
/// `versions` is that of the transport: QUIC has [`TlsVersions::Only13`], TCP what `tls` says.
pub fn front_server(tls: &FrontTls, alpn: &[&[u8]], versions: TlsVersions) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider_of(tls.provider))
        .with_protocol_versions(versions.list())
        .expect("both providers have TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_cert_resolver(Arc::<Resolver>::clone(&tls.resolver));
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.ticketer = tls.secret.tickets();
    config.cert_compression_cache = Arc::new(CompressionCache::new(COMPRESSED_MAX));
    // A request in early data can be replayed (RFC 8446 8). rustls takes early data only for sessions that it keeps itself,
    // each for one use; ours are in tickets that any node of the place opens, and none knows which another one has seen.
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}
