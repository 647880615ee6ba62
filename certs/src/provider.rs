//! The sets of cryptographic algorithms that TLS is built with.
//!
//! A configuration always names one, never the process default: a default is whatever crate came first.

use std::sync::{Arc, LazyLock};

use rustls::crypto::{CryptoProvider, aws_lc_rs, ring};
use selvage_config::node::TlsProvider;

static AWS_LC_RS: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| {
    use aws_lc_rs::kx_group::{SECP256R1, SECP384R1, X25519, X25519MLKEM768};
    // The hybrid first: what is recorded today stays closed to a quantum computer of tomorrow.
    let kx_groups = vec![X25519MLKEM768, X25519, SECP256R1, SECP384R1];
    Arc::new(CryptoProvider { kx_groups, ..aws_lc_rs::default_provider() })
});

/// It has no ML-KEM: X25519, P-256, P-384.
static RING: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(ring::default_provider()));

/// The provider of every configuration for which none is chosen.
pub fn provider() -> Arc<CryptoProvider> {
    provider_of(TlsProvider::default())
}

/// The provider that an operator chose.
pub fn provider_of(chosen: TlsProvider) -> Arc<CryptoProvider> {
    match chosen {
        TlsProvider::AwsLcRs => Arc::clone(&AWS_LC_RS),
        TlsProvider::Ring => Arc::clone(&RING),
    }
}

#[cfg(test)]
mod tests {
    use rustls::NamedGroup;

    use super::*;

    fn groups(chosen: TlsProvider) -> Vec<NamedGroup> {
        provider_of(chosen).kx_groups.iter().map(|group| group.name()).collect()
    }

    #[test]
    fn the_hybrid_key_exchange_is_preferred_where_there_is_one() {
        use NamedGroup::{X25519, X25519MLKEM768, secp256r1, secp384r1};
        assert_eq!(groups(TlsProvider::AwsLcRs), [X25519MLKEM768, X25519, secp256r1, secp384r1]);
        assert_eq!(groups(TlsProvider::Ring), [X25519, secp256r1, secp384r1]);
    }
}
