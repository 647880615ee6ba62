//! What differs from name to name on the public listener for TLS: `[[tls.names]]`.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::CertificateName;
use crate::invalid::Problems;

/// Names with rules of their own.
const NAMES_MAX: usize = 1_000;

/// The rule of one name.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TlsName {
    name: Spanned<CertificateName>,
    alpn: Option<Spanned<Vec<Alpn>>>,
    /// Whether clients show a certificate. Default none.
    #[serde(default)]
    pub client_certificates: ClientCertificates,
    client_roots: Option<Spanned<PathBuf>>,
}

/// A version of HTTP as TLS calls it (RFC 7301).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum Alpn {
    /// HTTP/1.1.
    #[serde(rename = "http/1.1")]
    H1,
    /// HTTP/2.
    #[serde(rename = "h2")]
    H2,
    /// HTTP/3.
    #[serde(rename = "h3")]
    H3,
}

impl Alpn {
    /// As TLS calls it.
    pub fn as_bytes(self) -> &'static [u8] {
        match self {
            Self::H1 => b"http/1.1",
            Self::H2 => b"h2",
            Self::H3 => b"h3",
        }
    }
}

/// Whether clients show a certificate.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Default)]
#[serde(rename_all = "kebab-case")]
pub enum ClientCertificates {
    /// They are not asked for one.
    #[default]
    None,
    /// They are asked for one and need not have it. A bad one is refused all the same.
    Request,
    /// Who has none is not let in.
    Require,
}

impl TlsName {
    /// The name, or the wildcard.
    pub fn name(&self) -> &CertificateName {
        self.name.get_ref()
    }

    /// What is spoken there, preferred first. A name that asks for certificates has no HTTP/3: a handshake of QUIC asks
    /// before it is known for which name.
    pub fn alpn(&self) -> &[Alpn] {
        match (&self.alpn, self.client_certificates) {
            (Some(alpn), _) => alpn.get_ref(),
            (None, ClientCertificates::None) => &[Alpn::H3, Alpn::H2, Alpn::H1],
            (None, _) => &[Alpn::H2, Alpn::H1],
        }
    }

    /// The file of the authorities that clients' certificates come from.
    pub fn client_roots(&self) -> Option<&Path> {
        self.client_roots.as_ref().map(|roots| roots.get_ref().as_path())
    }

    /// Puts relative paths below `base`.
    pub(super) fn place_below(&mut self, base: &Path) {
        if let Some(roots) = &mut self.client_roots {
            *roots.get_mut() = base.join(roots.get_ref());
        }
    }

    /// Notes what can't be.
    pub(super) fn problems(names: &[Self], problems: &mut Problems) {
        if names.len() > NAMES_MAX {
            problems.add(None, "tls.names", format!("has more than {NAMES_MAX} names"), None);
        }
        let mut seen = BTreeSet::new();
        for rule in names {
            let span = rule.name.span();
            if !seen.insert(rule.name()) {
                problems.add(span.clone(), "tls.names.name", format!("{} is there twice", rule.name()), None);
            }
            let asks = rule.client_certificates != ClientCertificates::None;
            if asks && rule.client_roots.is_none() {
                let hint = "add client_roots = \"clients.pem\"";
                problems.add(span, "tls.names.client_roots", "nobody is named whose certificates count", Some(hint));
            }
            if let (false, Some(roots)) = (asks, &rule.client_roots) {
                let hint = "add client_certificates = \"require\", or \"request\"";
                problems.add(roots.span(), "tls.names.client_roots", "nobody is asked for a certificate", Some(hint));
            }
            let Some(alpn) = &rule.alpn else { continue };
            if !alpn.get_ref().iter().any(|it| matches!(it, Alpn::H1 | Alpn::H2)) {
                let message = "has neither h2 nor http/1.1, by which clients find HTTP/3";
                problems.add(alpn.span(), "tls.names.alpn", message, None);
            }
            if asks && alpn.get_ref().contains(&Alpn::H3) {
                let hint = "remove it: there is no HTTP/3 for names that ask for certificates";
                problems.add(alpn.span(), "tls.names.alpn", "h3 can't ask for a certificate", Some(hint));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct File {
        names: Vec<TlsName>,
    }

    fn wrong(text: &str) -> Vec<(Option<usize>, String)> {
        let mut problems = Problems::default();
        TlsName::problems(&toml::from_str::<File>(text).unwrap().names, &mut problems);
        match problems.settle(Path::new("node.toml"), text, Some(())) {
            Ok(()) => Vec::new(),
            Err(invalid) => invalid.places().into_iter().map(|place| (place.line, place.field)).collect(),
        }
    }

    #[test]
    fn a_name_that_asks_for_certificates_has_no_h3() {
        let text = "[[names]]\nname = 'a.test'\nclient_certificates = 'request'\nclient_roots = 'ca.pem'\n[[names]]\nname = '*.b.test'";
        assert_eq!(wrong(text), []);
        let names = toml::from_str::<File>(text).unwrap().names;
        assert_eq!(names[0].alpn(), [Alpn::H2, Alpn::H1]);
        assert_eq!(names[1].alpn(), [Alpn::H3, Alpn::H2, Alpn::H1]);
    }

    #[test]
    fn a_mistake_is_told_with_its_line_and_field() {
        for (text, line, field) in [
            ("name = 'a'\n[[names]]\nname = 'a'", 4, "tls.names.name"),
            ("name = 'a'\nclient_certificates = 'require'", 2, "tls.names.client_roots"),
            ("name = 'a'\nclient_roots = 'x'", 3, "tls.names.client_roots"),
            ("name = 'a'\nalpn = []", 3, "tls.names.alpn"),
            ("name = 'a'\nalpn = ['h3']", 3, "tls.names.alpn"),
            (
                "name = 'a'\nclient_certificates = 'require'\nclient_roots = 'x'\nalpn = ['h3', 'h2']",
                5,
                "tls.names.alpn",
            ),
        ] {
            assert_eq!(wrong(&format!("[[names]]\n{text}")), [(Some(line), field.to_owned())], "{text}");
        }
        for bad in ["name = 'A'", "name = 'a'\nalpn = ['h1']", "name = 'a'\nclient_certificates = true", "alpn = []"] {
            assert!(toml::from_str::<File>(&format!("[[names]]\n{bad}")).is_err(), "{bad}");
        }
    }
}
