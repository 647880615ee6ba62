//! TLS of a node's public listeners.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::compress::CompressionCache;
use rustls::server::{ClientHello, NoServerSessionStorage, ResolvesServerCert, ServerSessionMemoryCache};
use rustls::sign::CertifiedKey;
use rustls::version::{TLS12, TLS13};
use rustls::{RootCertStore, ServerConfig, SupportedProtocolVersion};
use selvage_config::node::{Alpn, TlsProvider};

use crate::challenge::{ACME_ALPN, is_challenge};
use crate::mutual::client_verifier;
use crate::names::Clients;
use crate::secret::FrontSecret;
use crate::tickets::NoTickets;
use crate::{NameRule, NameRules, ReloadError, Reloaded, Resolver, TlsError, provider_of, roots_from_pem};

/// Compressed certificates that are kept (RFC 8879): to compress one takes longer than a handshake.
const COMPRESSED_MAX: usize = 1_024;

/// Sessions of QUIC that are kept where early data is taken. Some hundred bytes each.
const SESSIONS_MAX: usize = 16_384;

/// Early data over QUIC has no bound of its own: it counts as what follows it (RFC 9001 4.6.1).
const EARLY_DATA_QUIC: u32 = u32::MAX;

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
    /// Whether early data is taken over QUIC (RFC 8446 2.3).
    pub has_early_data: bool,
    /// Names that differ from the others.
    pub rules: Arc<NameRules>,
}

/// What is shown and spoken over TCP, by name.
#[derive(Debug)]
pub struct FrontServers {
    any: Arc<ServerConfig>,
    /// By [`NameRule`].
    named: ArcSwap<Vec<Arc<ServerConfig>>>,
    tls: FrontTls,
}

impl FrontServers {
    /// Servers over TCP. Names without a rule are offered `alpn`, preferred first.
    ///
    /// # Errors
    /// Roots of clients that can't be used.
    pub fn new(tls: &FrontTls, alpn: &[&[u8]]) -> Result<Self, TlsError> {
        let mut all = alpn.to_vec();
        if tls.has_challenges {
            all.push(ACME_ALPN);
        }
        let any = front_server(tls, &all, tls.versions)?;
        let roots = |clients: &Clients| clients.roots.load_full();
        let named =
            tls.rules.all().iter().map(|rule| named_server(tls, &any, rule, roots)).collect::<Result<_, _>>()?;
        Ok(Self { any, named: ArcSwap::from_pointee(named), tls: tls.clone() })
    }

    /// Reads the files of the authorities of clients again, and asks for certificates of those from the next handshake on. It
    /// blocks on the disk. On an error all stays as it is, and the next call tries again.
    ///
    /// # Errors
    /// [`ReloadError`].
    pub fn reload(&self) -> Result<Reloaded, ReloadError> {
        let mut fresh: HashMap<&Path, Arc<RootCertStore>> = HashMap::new();
        let all = || self.tls.rules.all().iter().filter_map(|rule| rule.clients());
        for clients in all() {
            let roots = roots_from_pem(&clients.file)?;
            if roots.roots != clients.roots.load().roots {
                fresh.insert(&clients.file, Arc::new(roots));
            }
        }
        if fresh.is_empty() {
            return Ok(Reloaded::Unchanged);
        }
        let roots =
            |clients: &Clients| fresh.get(clients.file.as_path()).map_or_else(|| clients.roots.load_full(), Arc::clone);
        let named = self.tls.rules.all().iter().map(|rule| named_server(&self.tls, &self.any, rule, roots));
        self.named.store(Arc::new(named.collect::<Result<_, _>>()?));
        for clients in all() {
            clients.roots.store(roots(clients));
        }
        Ok(Reloaded::Changed)
    }

    /// The server for every name, if there is but one.
    pub fn only(&self) -> Option<&Arc<ServerConfig>> {
        self.tls.rules.is_empty().then_some(&self.any)
    }

    /// The server for a client that says this, and the rule of the name that it asks for.
    pub fn choose(&self, hello: &ClientHello<'_>) -> (Arc<ServerConfig>, Option<&Arc<NameRule>>) {
        let rule = hello.server_name().and_then(|name| self.tls.rules.of(&name.to_ascii_lowercase()));
        match rule {
            // An authority has no certificate of ours to show.
            Some(rule) if !is_challenge(hello) => (Arc::clone(&self.named.load()[rule.index]), Some(rule)),
            _ => (Arc::clone(&self.any), rule),
        }
    }
}

/// The server of one name, which differs from that of any other.
fn named_server(
    tls: &FrontTls,
    any: &ServerConfig,
    rule: &NameRule,
    roots: impl Fn(&Clients) -> Arc<RootCertStore>,
) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = match rule.clients() {
        None => any.clone(),
        Some(clients) => {
            let verifier = client_verifier(roots(clients), clients.auth, tls.provider)?;
            let mut config = ServerConfig::builder_with_provider(provider_of(tls.provider))
                .with_protocol_versions(tls.versions.list())
                .expect("both providers have TLS 1.2 and 1.3")
                .with_client_cert_verifier(verifier)
                .with_cert_resolver(Arc::<Resolver>::clone(&tls.resolver));
            // A resumed session would carry an identity past its certificate's end.
            config.ticketer = Arc::new(NoTickets);
            config.session_storage = Arc::new(NoServerSessionStorage {});
            config.send_tls13_tickets = 0;
            config.cert_compression_cache = Arc::clone(&any.cert_compression_cache);
            config
        }
    };
    config.alpn_protocols = rule.over_tcp().map(|alpn| alpn.as_bytes().to_vec()).collect();
    Ok(Arc::new(config))
}

/// Shows nothing for names that have no HTTP/3.
#[derive(Debug)]
struct OverQuic {
    resolver: Arc<Resolver>,
    rules: Arc<NameRules>,
}

impl ResolvesServerCert for OverQuic {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        let rule = hello.server_name().and_then(|name| self.rules.of(&name.to_ascii_lowercase()));
        if rule.is_some_and(|rule| !rule.speaks(Alpn::H3)) { None } else { self.resolver.resolve(hello) }
    }
}

/// A public server for QUIC.
pub fn quic_server(tls: &FrontTls) -> Result<Arc<ServerConfig>, TlsError> {
    let mut config = Arc::unwrap_or_clone(front_server(tls, &[Alpn::H3.as_bytes()], TlsVersions::Only13)?);
    if !tls.rules.is_empty() {
        config.cert_resolver =
            Arc::new(OverQuic { resolver: Arc::clone(&tls.resolver), rules: Arc::clone(&tls.rules) });
    }
    if tls.has_early_data {
        // Each session is resumed once, so that what came in front of its handshake can't come again (RFC 8446 8.1).
        config.ticketer = Arc::new(NoTickets);
        config.session_storage = ServerSessionMemoryCache::new(SESSIONS_MAX);
        config.max_early_data_size = EARLY_DATA_QUIC;
    }
    Ok(Arc::new(config))
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
    // each for one use (see `quic_server`); these are in tickets that any node of the place opens, and none knows which
    // another one has seen.
    config.max_early_data_size = 0;
    Ok(Arc::new(config))
}
