//! TLS to backends: their authorities, and the provider that everything of a node computes with.

use rustls::{ClientConfig, RootCertStore};
use selvage_certs::{client, roots_from_pem};
use selvage_config::node::KvBackend;

use crate::error::OpenError;

/// How the servers of a backend are spoken to: those of its `roots`, or of the public authorities.
pub(crate) fn tls_of(name: &str, config: &KvBackend) -> Result<ClientConfig, OpenError> {
    let roots = match &config.roots {
        Some(path) => roots_from_pem(path)
            .map_err(|source| OpenError::Roots { backend: name.to_owned(), source: source.into() })?,
        None => RootCertStore { roots: webpki_roots::TLS_SERVER_ROOTS.to_vec() },
    };
    Ok(client(&roots))
}
