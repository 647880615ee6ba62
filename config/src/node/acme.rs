//! Certificates that a node gets by itself, from an authority that speaks ACME (RFC 8555).

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use toml::Spanned;

use super::{CertificateName, Listen};
use crate::invalid::Problems;

/// Names in the file.
const NAMES_MAX: usize = 1_000;
/// Contacts of the account.
const CONTACTS_MAX: usize = 10;

/// The `[acme]` table of a node's configuration.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Acme {
    /// The address of the authority's directory.
    directory: Spanned<String>,
    /// Whose certificates the directory itself is believed with, a PEM file. Default: the public authorities.
    pub roots: Option<PathBuf>,
    /// Whom the authority may write to, as in `"mailto:ops@example.org"`.
    #[serde(default)]
    contact: Vec<Spanned<String>>,
    /// That the operator agrees to the authority's terms. Without it there is no account.
    #[serde(default)]
    terms_agreed: bool,
    /// An account that the operator has with the authority otherwise, to bind this one to (RFC 8555 7.3.4).
    pub external_account: Option<ExternalAccount>,
    /// Names that there shall be certificates for, one each.
    #[serde(default)]
    names: Vec<Spanned<CertificateName>>,
    /// How the authority is shown that a name leads here. Default `http-01`.
    #[serde(default = "http_01")]
    challenge: Spanned<AcmeChallenge>,
    /// The program, with its arguments, that puts and takes away TXT records for `dns-01`.
    dns_hook: Option<Spanned<Vec<String>>>,
    /// How long that program may take, milliseconds; when it ends, the record must be there to see. Default 120,000.
    #[serde(default = "dns_hook_ms")]
    pub dns_hook_ms: u64,
    /// Whether clients' asking for the host of an app that runs here is enough to get a certificate for it. Default no.
    #[serde(default)]
    pub on_demand: bool,
    /// Whether the nodes with this node's `tls.secret` order one certificate for all of them, and answer for each other's
    /// challenges; what they tell each other stands in the KV, sealed. Default no.
    #[serde(default)]
    pub shared: bool,
    /// Hosts that have certificates in this way, at most. Default 1,000.
    #[serde(default = "on_demand_max")]
    pub on_demand_max: u32,
    /// Pause after the first failure for a name, and at least between two certificates for it, milliseconds. It doubles
    /// with each further failure. Default 120,000.
    #[serde(default = "retry_ms")]
    pub retry_ms: u64,
    /// The longest pause after failures, milliseconds. Default 21,600,000: six hours.
    #[serde(default = "retry_ms_max")]
    pub retry_ms_max: u64,
}

/// An account with an authority that was opened in another way.
#[derive(Debug, Clone, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExternalAccount {
    /// Its name.
    pub id: String,
    /// The file of its MAC key: what the authority gave, in base64url.
    pub key: PathBuf,
}

/// How the authority is shown that a name leads here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum AcmeChallenge {
    /// It asks the plain listener, on port 80 of the name (RFC 8555 8.3).
    #[serde(rename = "http-01")]
    Http01,
    /// It shakes hands with the TLS listener, on port 443 of the name (RFC 8737).
    #[serde(rename = "tls-alpn-01")]
    TlsAlpn01,
    /// It asks for a TXT record of the name (RFC 8555 8.4). The only way for a wildcard.
    #[serde(rename = "dns-01")]
    Dns01,
}

impl AcmeChallenge {
    /// As in the file.
    pub fn as_str(self) -> &'static str {
        match self {
            Self::Http01 => "http-01",
            Self::TlsAlpn01 => "tls-alpn-01",
            Self::Dns01 => "dns-01",
        }
    }
}

fn http_01() -> Spanned<AcmeChallenge> {
    Spanned::new(0..0, AcmeChallenge::Http01)
}

fn dns_hook_ms() -> u64 {
    120_000
}

fn on_demand_max() -> u32 {
    1_000
}

fn retry_ms() -> u64 {
    120_000
}

fn retry_ms_max() -> u64 {
    6 * 3_600_000
}

impl Acme {
    /// The address of the authority's directory.
    pub fn directory(&self) -> &str {
        self.directory.get_ref()
    }

    /// Whom the authority may write to.
    pub fn contact(&self) -> impl Iterator<Item = &str> {
        self.contact.iter().map(|contact| contact.get_ref().as_str())
    }

    /// Names that there shall be certificates for.
    pub fn names(&self) -> impl Iterator<Item = &CertificateName> {
        self.names.iter().map(Spanned::get_ref)
    }

    /// How the authority is shown that a name leads here.
    pub fn challenge(&self) -> AcmeChallenge {
        *self.challenge.get_ref()
    }

    /// The program for `dns-01`, and its arguments.
    pub fn dns_hook(&self) -> Option<(&Path, &[String])> {
        let (program, arguments) = self.dns_hook.as_ref()?.get_ref().split_first()?;
        Some((Path::new(program), arguments))
    }

    /// Puts relative paths below `base`.
    pub(super) fn place_below(&mut self, base: &Path) {
        for path in self.roots.iter_mut().chain(self.external_account.iter_mut().map(|account| &mut account.key)) {
            *path = base.join(&path);
        }
        // A program that is searched for is not surely the one that was meant.
        if let Some(program) = self.dns_hook.as_mut().and_then(|hook| hook.get_mut().first_mut())
            && let Some(absolute) = base.join(&*program).to_str()
        {
            *program = absolute.to_owned();
        }
    }

    /// Notes what can't be.
    pub(super) fn problems(&self, listen: &Listen, has_secret: bool, problems: &mut Problems) {
        if self.shared && !has_secret {
            let hint = "add secret = \"pop.secret\" under [tls], the same file on each of them";
            let message = "what nodes tell each other is sealed with a secret that they share";
            problems.add(self.directory.span(), "acme.shared", message, Some(hint));
        }
        let host = self.directory().strip_prefix("https://").and_then(|rest| rest.split(['/', '?', '#']).next());
        if host.is_none_or(str::is_empty) || self.directory().contains(|c: char| c.is_whitespace() || c.is_control()) {
            let hint = "as in \"https://acme-v02.api.letsencrypt.org/directory\"";
            problems.add(self.directory.span(), "acme.directory", "is no https address", Some(hint));
        }
        if self.contact.len() > CONTACTS_MAX {
            problems.add(None, "acme.contact", format!("has more than {CONTACTS_MAX} contacts"), None);
        }
        for contact in self.contact.iter().filter(|contact| !contact.get_ref().contains(':')) {
            let message = format!("{:?} is no address with a scheme", contact.get_ref());
            problems.add(contact.span(), "acme.contact", message, Some("write \"mailto:ops@example.org\""));
        }
        if !self.terms_agreed {
            let hint = "read them, and add terms_agreed = true";
            problems.add(
                self.directory.span(),
                "acme.terms_agreed",
                "the authority's terms are not agreed to",
                Some(hint),
            );
        }
        if listen.https.is_none() {
            let hint = "add https under [listen]";
            problems.add(self.directory.span(), "acme", "no listener would show the certificates", Some(hint));
        }
        for (field, bound) in [
            ("dns_hook_ms", self.dns_hook_ms),
            ("on_demand_max", self.on_demand_max.into()),
            ("retry_ms", self.retry_ms),
        ] {
            if bound == 0 {
                problems.add(None, format!("acme.{field}"), "is 0", Some("leave it out"));
            }
        }
        if self.retry_ms_max < self.retry_ms {
            problems.add(None, "acme.retry_ms_max", "is less than acme.retry_ms", None);
        }
        self.problems_of_names(problems);
        self.problems_of_challenge(listen, problems);
    }

    fn problems_of_names(&self, problems: &mut Problems) {
        if self.names.is_empty() && !self.on_demand {
            let hint = "add names = [\"www.example.org\"], or on_demand = true";
            problems.add(self.directory.span(), "acme.names", "there is nothing to get a certificate for", Some(hint));
        }
        if self.names.len() > NAMES_MAX {
            problems.add(None, "acme.names", format!("has more than {NAMES_MAX} names"), None);
        }
        let mut seen = BTreeSet::new();
        for name in &self.names {
            if !seen.insert(name.get_ref()) {
                problems.add(name.span(), "acme.names", format!("{} is there twice", name.get_ref()), None);
            }
            if name.get_ref().is_wildcard() && self.challenge() != AcmeChallenge::Dns01 {
                let message = format!("{} can't be shown by {}", name.get_ref(), self.challenge().as_str());
                problems.add(name.span(), "acme.names", message, Some("a wildcard needs challenge = \"dns-01\""));
            }
        }
    }

    fn problems_of_challenge(&self, listen: &Listen, problems: &mut Problems) {
        let span = Some(self.challenge.span()).filter(|span| !span.is_empty());
        if self.challenge() == AcmeChallenge::Http01 && listen.http.is_none() {
            let hint = "add http = \"0.0.0.0:80\" under [listen], or another challenge";
            problems.add(span.clone(), "acme.challenge", "http-01 is answered by the plain listener", Some(hint));
        }
        match (&self.dns_hook, self.challenge()) {
            (None, AcmeChallenge::Dns01) => {
                let hint = "add dns_hook = [\"/path/of/a/program\"]";
                problems.add(span, "acme.dns_hook", "dns-01 needs a program that puts records", Some(hint));
            }
            (Some(hook), AcmeChallenge::Dns01) if hook.get_ref().first().is_none_or(String::is_empty) => {
                problems.add(hook.span(), "acme.dns_hook", "names no program", None);
            }
            (Some(hook), AcmeChallenge::Http01 | AcmeChallenge::TlsAlpn01) => {
                let hint = "remove it, or add challenge = \"dns-01\"";
                problems.add(hook.span(), "acme.dns_hook", "only dns-01 asks it", Some(hint));
            }
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use super::*;

    const GOOD: &str = "directory = \"https://ca.test/directory\"\nterms_agreed = true\nnames = [\"a.test\"]\n";

    fn listen() -> Listen {
        let any: Option<SocketAddr> = Some("127.0.0.1:0".parse().unwrap());
        Listen { https: any, http: any, ..Listen::default() }
    }

    /// Line and field of each mistake.
    fn wrong(text: &str, listen: &Listen) -> Vec<(Option<usize>, String)> {
        let mut problems = Problems::default();
        let acme: Acme = match toml::from_str(text) {
            Ok(acme) => acme,
            Err(error) => {
                let invalid = crate::Invalid::of_toml(Path::new("node.toml"), text, &error);
                return invalid.places().into_iter().map(|place| (place.line, place.message)).collect();
            }
        };
        acme.problems(listen, false, &mut problems);
        match problems.settle(Path::new("node.toml"), text, Some(())) {
            Ok(()) => Vec::new(),
            Err(invalid) => invalid.places().into_iter().map(|place| (place.line, place.field)).collect(),
        }
    }

    #[test]
    fn what_is_left_out_has_its_default() {
        let acme: Acme = toml::from_str(GOOD).unwrap();
        assert_eq!(wrong(GOOD, &listen()), []);
        assert_eq!((acme.challenge(), acme.on_demand, acme.retry_ms), (AcmeChallenge::Http01, false, 120_000));
        assert_eq!(acme.names().map(CertificateName::as_str).collect::<Vec<_>>(), ["a.test"]);
    }

    #[test]
    fn a_mistake_is_told_with_its_line_and_field() {
        let https_only = Listen { http: None, ..listen() };
        let dns = "challenge = \"dns-01\"\n";
        for (text, listen, line, field) in [
            (GOOD.replace("https:", "http:"), &listen(), Some(1), "acme.directory"),
            (GOOD.replace("ca.test", ""), &listen(), Some(1), "acme.directory"),
            (GOOD.replace("true", "false"), &listen(), Some(1), "acme.terms_agreed"),
            (GOOD.replace("\"a.test\"", ""), &listen(), Some(1), "acme.names"),
            (GOOD.replace("\"a.test\"", "\"a.test\", \"a.test\""), &listen(), Some(3), "acme.names"),
            (GOOD.replace("a.test", "*.a.test"), &listen(), Some(3), "acme.names"),
            (format!("{GOOD}contact = [\"ops@a.test\"]"), &listen(), Some(4), "acme.contact"),
            (format!("{GOOD}{dns}"), &listen(), Some(4), "acme.dns_hook"),
            (format!("{GOOD}{dns}dns_hook = []"), &listen(), Some(5), "acme.dns_hook"),
            (format!("{GOOD}dns_hook = [\"x\"]"), &listen(), Some(4), "acme.dns_hook"),
            (GOOD.to_owned(), &https_only, None, "acme.challenge"),
            (GOOD.to_owned(), &Listen { https: None, ..listen() }, Some(1), "acme"),
            (format!("{GOOD}retry_ms = 0"), &listen(), None, "acme.retry_ms"),
            (format!("{GOOD}shared = true"), &listen(), Some(1), "acme.shared"),
            (format!("{GOOD}retry_ms = 5\nretry_ms_max = 4"), &listen(), None, "acme.retry_ms_max"),
        ] {
            assert_eq!(wrong(&text, listen), [(line, field.to_owned())], "{text}");
        }
        assert_eq!(wrong(&format!("{GOOD}challenge = \"tls-alpn-01\""), &https_only), []);
        assert_eq!(wrong(&format!("{GOOD}{dns}dns_hook = [\"x\"]").replace("a.test", "*.a.test"), &https_only), []);
    }

    #[test]
    fn paths_are_relative_to_the_file() {
        let text = format!("{GOOD}roots = \"ca.pem\"\nchallenge = \"dns-01\"\ndns_hook = [\"hook\", \"x\"]");
        let mut acme: Acme = toml::from_str(&text).unwrap();
        acme.place_below(Path::new("/etc/selvage"));
        assert_eq!(acme.roots.as_deref(), Some(Path::new("/etc/selvage/ca.pem")));
        assert_eq!(acme.dns_hook().unwrap(), (Path::new("/etc/selvage/hook"), &["x".to_owned()][..]));
    }
}
