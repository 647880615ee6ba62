//! TLS of a node's public listeners.

use std::sync::Arc;

use rustls::server::ServerSessionMemoryCache;
use rustls::version::{TLS12, TLS13};
use rustls::{ServerConfig, SupportedProtocolVersion};

use crate::{Resolver, TlsError, provider};

/// Sessions kept for resumption, each for one use; the oldest goes first.
const SESSIONS_MAX: usize = 10_000;

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

/// A public server that shows what `resolver` finds and offers `alpn`, preferred first. Clients show nothing.
pub fn front_server(
    resolver: Arc<Resolver>,
    alpn: &[&[u8]],
    versions: TlsVersions,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = ServerConfig::builder_with_provider(provider())
        .with_protocol_versions(versions.list())
        .expect("ring has TLS 1.2 and 1.3")
        .with_no_client_auth()
        .with_cert_resolver(resolver);
    config.alpn_protocols = alpn.iter().map(|name| name.to_vec()).collect();
    config.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
    // A request in early data can be replayed (RFC 8446 8): it waits until the node can tell which ones may be.
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}
