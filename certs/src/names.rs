//! What differs from name to name on the public listener for TLS: what is spoken, and whether clients show a
//! certificate.
//!
//! A client may use a connection for every name that its certificate covers (RFC 9113 9.1.2), so the rule that a
//! handshake was made under need not be that of a request on it: [`NameRules::may_carry`] tells.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::Arc;

use arc_swap::ArcSwap;
use rustls::RootCertStore;
use selvage_config::node::{Alpn, ClientCertificates, TlsName};

use crate::{ClientAuth, FileError, roots_from_pem};

/// The rule of one name.
#[derive(Debug)]
pub struct NameRule {
    pub(crate) index: usize,
    alpn: Vec<Alpn>,
    clients: Option<Clients>,
}

/// Whose certificates count.
#[derive(Debug)]
pub(crate) struct Clients {
    pub(crate) auth: ClientAuth,
    /// As last read.
    pub(crate) roots: ArcSwap<RootCertStore>,
    /// Where they come from: two names with the same file ask for the same.
    pub(crate) file: PathBuf,
}

impl PartialEq for Clients {
    fn eq(&self, other: &Self) -> bool {
        (self.auth, &self.file) == (other.auth, &other.file)
    }
}

impl NameRule {
    /// Whether this is spoken.
    pub fn speaks(&self, alpn: Alpn) -> bool {
        self.alpn.contains(&alpn)
    }

    /// Whether clients are asked for certificates.
    pub fn asks(&self) -> bool {
        self.clients.is_some()
    }

    pub(crate) fn clients(&self) -> Option<&Clients> {
        self.clients.as_ref()
    }

    /// What is spoken over TCP.
    pub(crate) fn over_tcp(&self) -> impl Iterator<Item = Alpn> {
        self.alpn.iter().copied().filter(|alpn| *alpn != Alpn::H3)
    }
}

/// The rules of all names that have one.
#[derive(Debug, Default)]
pub struct NameRules {
    all: Vec<Arc<NameRule>>,
    exact: HashMap<String, Arc<NameRule>>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Arc<NameRule>>,
}

impl NameRules {
    /// Reads the files of the rules.
    ///
    /// # Errors
    /// A file of roots that can't be used.
    pub fn load(names: &[TlsName]) -> Result<Self, FileError> {
        let mut rules = Self::default();
        for (index, name) in names.iter().enumerate() {
            let auth = match name.client_certificates {
                ClientCertificates::None => None,
                ClientCertificates::Request => Some(ClientAuth::Optional),
                ClientCertificates::Require => Some(ClientAuth::Required),
            };
            let clients = match auth.zip(name.client_roots()) {
                Some((auth, file)) => {
                    Some(Clients { auth, roots: ArcSwap::from_pointee(roots_from_pem(file)?), file: file.to_owned() })
                }
                None => None,
            };
            let rule = Arc::new(NameRule { index, alpn: name.alpn().to_vec(), clients });
            rules.all.push(Arc::clone(&rule));
            let table = if name.name().is_wildcard() { &mut rules.wildcard } else { &mut rules.exact };
            table.insert(name.name().host().to_owned(), rule);
        }
        Ok(rules)
    }

    /// Whether all names are alike.
    pub fn is_empty(&self) -> bool {
        self.all.is_empty()
    }

    pub(crate) fn all(&self) -> &[Arc<NameRule>] {
        &self.all
    }

    /// The rule of a host in lower case: its own before that of a wildcard, which stands for one label.
    pub fn of(&self, host: &str) -> Option<&Arc<NameRule>> {
        let host = host.strip_suffix('.').unwrap_or(host);
        self.exact
            .get(host)
            .or_else(|| self.wildcard.get(host.split_once('.').filter(|(label, _)| !label.is_empty())?.1))
    }

    /// Whether a connection whose handshake was made under the rule `had`, and which speaks `alpn`, may carry a request
    /// for a name with the rule `wanted` (RFC 9110 7.4): it speaks what is spoken there, and clients were asked for the
    /// same certificates.
    pub fn may_carry(had: Option<&NameRule>, alpn: Alpn, wanted: Option<&NameRule>) -> bool {
        wanted.is_none_or(|wanted| wanted.speaks(alpn))
            && had.and_then(NameRule::clients) == wanted.and_then(NameRule::clients)
    }

    /// Whether a request without TLS of ours may be for a name with this rule: where a certificate is required there can
    /// be none.
    pub fn may_be_plain(wanted: Option<&NameRule>) -> bool {
        let clients = wanted.and_then(NameRule::clients);
        clients.is_none_or(|clients| clients.auth == ClientAuth::Optional)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    fn rules(dir: &tempfile::TempDir) -> NameRules {
        let roots = dir.path().join("clients.pem");
        std::fs::write(&roots, Authority::create("clients").unwrap().certificate_pem()).unwrap();
        let other = dir.path().join("other.pem");
        std::fs::write(&other, Authority::create("others").unwrap().certificate_pem()).unwrap();
        let rule = |text: &str| {
            let text = text.replace("ROOTS", roots.to_str().unwrap()).replace("OTHER", other.to_str().unwrap());
            toml::from_str::<TlsName>(&text).unwrap()
        };
        let names = [
            rule("name = 'h1.test'\nalpn = ['http/1.1']"),
            rule("name = '*.safe.test'\nclient_certificates = 'require'\nclient_roots = 'ROOTS'"),
            rule("name = 'same.test'\nclient_certificates = 'require'\nclient_roots = 'ROOTS'"),
            rule("name = 'other.safe.test'\nclient_certificates = 'require'\nclient_roots = 'OTHER'"),
            rule("name = 'ask.test'\nclient_certificates = 'request'\nclient_roots = 'ROOTS'"),
        ];
        NameRules::load(&names).unwrap()
    }

    #[test]
    fn a_connection_carries_no_request_over_a_border() {
        let dir = tempfile::tempdir().unwrap();
        let rules = rules(&dir);
        let carries = |had: &str, alpn: Alpn, wanted: &str| {
            NameRules::may_carry(rules.of(had).map(AsRef::as_ref), alpn, rules.of(wanted).map(AsRef::as_ref))
        };
        for (had, alpn, wanted, want) in [
            ("any.test", Alpn::H2, "more.test", true),
            ("any.test", Alpn::H1, "h1.test", true),
            ("any.test", Alpn::H2, "h1.test", false),
            ("h1.test", Alpn::H1, "any.test", true),
            ("any.test", Alpn::H2, "a.safe.test", false),
            ("a.safe.test", Alpn::H2, "any.test", false),
            ("a.safe.test", Alpn::H2, "b.safe.test", true),
            ("a.safe.test", Alpn::H1, "same.test", true),
            ("a.safe.test", Alpn::H2, "other.safe.test", false),
            ("ask.test", Alpn::H2, "same.test", false),
            ("any.test", Alpn::H3, "ask.test", false),
            ("same.test", Alpn::H2, "same.test.", true),
            ("any.test", Alpn::H2, "deep.a.safe.test", true),
        ] {
            assert_eq!(carries(had, alpn, wanted), want, "{had} {alpn:?} {wanted}");
        }
    }

    #[test]
    fn without_tls_there_is_no_certificate_to_require() {
        let dir = tempfile::tempdir().unwrap();
        let rules = rules(&dir);
        for (wanted, want) in [("any.test", true), ("ask.test", true), ("h1.test", true), ("same.test", false)] {
            assert_eq!(NameRules::may_be_plain(rules.of(wanted).map(AsRef::as_ref)), want, "{wanted}");
        }
    }
}
