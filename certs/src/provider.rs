//! The one set of cryptographic algorithms everything here is built with.

use std::sync::{Arc, LazyLock};

use rustls::crypto::CryptoProvider;

static PROVIDER: LazyLock<Arc<CryptoProvider>> = LazyLock::new(|| Arc::new(rustls::crypto::ring::default_provider()));

/// The provider of every configuration made here. It is always named, never the process default: a default is
/// whatever crate came first.
pub fn provider() -> Arc<CryptoProvider> {
    Arc::clone(&PROVIDER)
}
