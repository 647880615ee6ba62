//! Which certificate a public listener shows, by the name the client asks for.
//!
//! There are two tables, of certificates from files and of those that the node got by ACME. Each is immutable and
//! swapped whole: a handshake sees the certificates of before a change or of after it, and nothing waits. An unknown name
//! gets the default certificate if there is one and no handshake otherwise.

use std::borrow::Cow;
use std::collections::HashMap;
use std::fmt;
use std::sync::{Arc, OnceLock};

use arc_swap::ArcSwap;
use rustls::server::{ClientHello, ResolvesServerCert};
use rustls::sign::CertifiedKey;
use rustls::{SignatureAlgorithm, SignatureScheme};
use rustls_pki_types::DnsName;

use crate::Identity;
use crate::challenge::{Challenges, is_challenge};

/// Names in one table.
const NAMES_MAX: usize = 100_000;

/// Why an identity can't be shown by name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ResolverError {
    /// The certificate has no DNS name.
    #[error("certificate has no DNS name to be found by")]
    Nameless,
    /// A name isn't one that a client can ask for.
    #[error("certificate name {name:?} is neither a DNS name nor one label's wildcard")]
    Name {
        /// The name.
        name: String,
    },
    /// Two certificates of one kind of key claim the same name.
    #[error("two certificates with the same kind of key for {name}")]
    Taken {
        /// The name.
        name: String,
    },
    /// There are too many names.
    #[error("more than {NAMES_MAX} names")]
    Full,
}

/// The certificates of one name: one for each kind of key, the preferred first.
type Keys = Vec<Arc<CertifiedKey>>;

/// A table of certificates by name.
#[derive(Clone, Default)]
pub struct Certificates {
    exact: HashMap<String, Keys>,
    /// By what follows `*.`.
    wildcard: HashMap<String, Keys>,
    default: Option<Arc<CertifiedKey>>,
}

impl Certificates {
    /// A table of these identities, each under the DNS names of its certificate.
    pub fn of<'i>(identities: impl IntoIterator<Item = &'i Identity>) -> Result<Self, ResolverError> {
        let mut table = Self::default();
        for identity in identities {
            table.add(identity)?;
        }
        Ok(table)
    }

    /// A table of identities that are each shown for one name, whatever else their certificates say.
    pub fn by_name<'i>(named: impl IntoIterator<Item = (&'i str, &'i Identity)>) -> Result<Self, ResolverError> {
        let mut table = Self::default();
        for (name, identity) in named {
            table.put(name, identity)?;
        }
        Ok(table)
    }

    /// The same table with a certificate for unknown names and for clients that name nothing.
    #[must_use]
    pub fn with_default(mut self, identity: &Identity) -> Self {
        self.default = Some(identity.certified_key());
        self
    }

    /// How many names and wildcards the table knows.
    pub fn len(&self) -> usize {
        self.exact.len() + self.wildcard.len()
    }

    /// Whether no name is known. The default is not counted.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Whether a client that asks for `name` is shown a certificate for it, not the default one.
    pub fn knows(&self, name: &str) -> bool {
        self.named(name).is_some()
    }

    fn add(&mut self, identity: &Identity) -> Result<(), ResolverError> {
        if identity.names().is_empty() {
            return Err(ResolverError::Nameless);
        }
        for name in identity.names() {
            self.put(name, identity)?;
        }
        Ok(())
    }

    fn put(&mut self, name: &str, identity: &Identity) -> Result<(), ResolverError> {
        let (table, host) = match name.strip_prefix("*.") {
            Some(parent) => (&mut self.wildcard, parent),
            None => (&mut self.exact, name),
        };
        if DnsName::try_from_str(host).is_err() || host.ends_with('.') {
            return Err(ResolverError::Name { name: name.to_owned() });
        }
        let keys = table.entry(host.to_owned()).or_default();
        let key = identity.certified_key();
        match keys.iter().find(|other| other.key.algorithm() == key.key.algorithm()) {
            // A certificate may say the same name twice.
            Some(same) if Arc::ptr_eq(same, &key) => {}
            Some(_) => return Err(ResolverError::Taken { name: name.to_owned() }),
            None => {
                keys.push(key);
                // The signature that costs least first: RSA is for clients that know nothing else.
                keys.sort_by_key(|key| key.key.algorithm() == SignatureAlgorithm::RSA);
            }
        }
        if self.len() > NAMES_MAX { Err(ResolverError::Full) } else { Ok(()) }
    }

    /// Exact before wildcard.
    fn named(&self, name: &str) -> Option<&Keys> {
        let name = lower(name);
        self.exact.get(&*name).or_else(|| self.wildcard(&name))
    }

    /// A wildcard stands for one label (RFC 9525 6.3).
    fn wildcard(&self, name: &str) -> Option<&Keys> {
        let (label, parent) = name.split_once('.')?;
        if label.is_empty() { None } else { self.wildcard.get(parent) }
    }
}

/// The first key that makes a signature which the client can verify.
fn fitting(keys: &[Arc<CertifiedKey>], schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
    // Without a cipher suite in common rustls tells of no scheme. With a key it then says so (`handshake_failure`, RFC
    // 8446 4.1.1); without one it would say that the name is not served.
    let fits = |key: &&Arc<CertifiedKey>| schemes.is_empty() || key.key.choose_scheme(schemes).is_some();
    keys.iter().find(fits).cloned()
}

/// rustls lowers names already; the table does not depend on it.
fn lower(name: &str) -> Cow<'_, str> {
    if name.bytes().any(|b| b.is_ascii_uppercase()) {
        Cow::Owned(name.to_ascii_lowercase())
    } else {
        Cow::Borrowed(name)
    }
}

impl fmt::Debug for Certificates {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Certificates")
            .field("names", &self.exact.len())
            .field("wildcards", &self.wildcard.len())
            .field("default", &self.default.is_some())
            .finish()
    }
}

/// Told of names that clients ask for and no certificate is for.
type Unknown = Box<dyn Fn(&str) + Send + Sync>;

/// The tables that listeners look into, which may change under them.
pub struct Resolver {
    files: ArcSwap<Certificates>,
    issued: ArcSwap<Certificates>,
    challenges: Challenges,
    unknown: OnceLock<Unknown>,
}

impl Resolver {
    /// A resolver that begins with this table of files.
    pub fn new(table: Certificates) -> Self {
        Self {
            files: ArcSwap::from_pointee(table),
            issued: ArcSwap::default(),
            challenges: Challenges::default(),
            unknown: OnceLock::new(),
        }
    }

    /// Puts another table of files in place, for every handshake from now on.
    pub fn swap(&self, table: Certificates) {
        self.files.store(Arc::new(table));
    }

    /// Puts another table of certificates in place that the node got by itself. Of two for one name that of a file is
    /// shown.
    pub fn swap_issued(&self, table: Certificates) {
        self.issued.store(Arc::new(table));
    }

    /// The table of files as it is now.
    pub fn table(&self) -> Arc<Certificates> {
        self.files.load_full()
    }

    /// What an ACME authority is answered.
    pub fn challenges(&self) -> &Challenges {
        &self.challenges
    }

    /// Tells `unknown` of each name that a client asks for and no certificate is for. It must not wait. The first call
    /// counts.
    pub fn on_unknown(&self, unknown: impl Fn(&str) + Send + Sync + 'static) {
        // Whoever comes second has no say.
        let _ = self.unknown.set(Box::new(unknown));
    }

    /// Exact names before wildcards, files before what was issued, and the default for all others.
    fn find(&self, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        let (files, issued) = (self.files.load(), self.issued.load());
        let Some(name) = name.map(lower) else { return fitting(files.default.as_slice(), schemes) };
        let exact = files.exact.get(&*name).or_else(|| issued.exact.get(&*name));
        let keys = exact.or_else(|| files.wildcard(&name)).or_else(|| issued.wildcard(&name));
        if let (None, Some(unknown)) = (keys, self.unknown.get()) {
            unknown(&name);
        }
        fitting(keys.map_or(files.default.as_slice(), Vec::as_slice), schemes)
    }
}

impl ResolvesServerCert for Resolver {
    fn resolve(&self, hello: ClientHello<'_>) -> Option<Arc<CertifiedKey>> {
        if is_challenge(&hello) {
            return self.challenges.tls(&lower(hello.server_name()?));
        }
        self.find(hello.server_name(), hello.signature_schemes())
    }
}

impl fmt::Debug for Resolver {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Resolver").field("files", &self.files.load()).field("issued", &self.issued.load()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    const ECDSA: &[SignatureScheme] = &[SignatureScheme::ECDSA_NISTP256_SHA256];

    fn identity(names: &[&str]) -> Identity {
        let names: Vec<_> = names.iter().map(|name| (*name).to_owned()).collect();
        let address = [std::net::IpAddr::from([127, 0, 0, 1])];
        Authority::create("test").unwrap().issue_server(&names, &address).unwrap()
    }

    fn find(table: &Certificates, name: Option<&str>, schemes: &[SignatureScheme]) -> Option<Arc<CertifiedKey>> {
        Resolver::new(table.clone()).find(name, schemes)
    }

    fn shown(table: &Certificates, name: Option<&str>, identity: &Identity) -> bool {
        shows(&Resolver::new(table.clone()), name, identity)
    }

    fn shows(resolver: &Resolver, name: Option<&str>, identity: &Identity) -> bool {
        resolver.find(name, ECDSA).is_some_and(|key| Arc::ptr_eq(&key, &identity.certified_key()))
    }

    #[test]
    fn an_exact_name_goes_before_a_wildcard() {
        let (exact, wildcard) = (identity(&["a.example.test"]), identity(&["*.example.test"]));
        let table = Certificates::of([&wildcard, &exact]).unwrap();
        assert!(shown(&table, Some("a.example.test"), &exact));
        assert!(shown(&table, Some("A.Example.TEST"), &exact));
        assert!(shown(&table, Some("b.example.test"), &wildcard));
        assert!(shown(&table, Some("B.EXAMPLE.test"), &wildcard));
    }

    #[test]
    fn a_wildcard_stands_for_one_label_exactly() {
        let table = Certificates::of([&identity(&["*.example.test"])]).unwrap();
        assert!(table.knows("a.example.test"));
        for name in ["example.test", ".example.test", "a.b.example.test", "aexample.test", "*", "test", ""] {
            assert!(!table.knows(name), "{name:?}");
        }
    }

    #[test]
    fn an_unknown_name_gets_the_default_or_nothing() {
        let (known, default) = (identity(&["known.test"]), identity(&["default.test"]));
        let table = Certificates::of([&known]).unwrap();
        for name in [Some("unknown.test"), Some("default.test"), None] {
            assert!(find(&table, name, ECDSA).is_none(), "{name:?}");
            assert!(shown(&table.clone().with_default(&default), name, &default), "{name:?}");
        }
        assert!(shown(&table.with_default(&default), Some("known.test"), &known));
    }

    #[test]
    fn a_client_that_can_verify_no_key_of_a_name_gets_none() {
        let known = identity(&["known.test"]);
        let table = Certificates::of([&known]).unwrap().with_default(&known);
        assert!(find(&table, Some("known.test"), &[SignatureScheme::RSA_PSS_SHA256]).is_none());
        assert!(shown(&table, None, &known) && find(&table, None, &[]).is_some());
    }

    #[test]
    fn two_certificates_for_one_name_are_refused() {
        for names in [["a.test", "b.test"], ["*.a.test", "*.b.test"]] {
            let error = Certificates::of([&identity(&names), &identity(&names[..1])]).unwrap_err();
            assert_eq!(error, ResolverError::Taken { name: names[0].to_owned() });
        }
        let twice = identity(&["a.test", "a.test"]);
        assert_eq!(Certificates::of([&twice]).unwrap().len(), 1);
    }

    #[test]
    fn a_certificate_without_a_dns_name_is_only_good_as_the_default() {
        let nameless = identity(&[]);
        assert_eq!(Certificates::of([&nameless]).unwrap_err(), ResolverError::Nameless);
        let table = Certificates::default().with_default(&nameless);
        assert!(table.is_empty() && shown(&table, Some("any.test"), &nameless));
    }

    #[test]
    fn a_swap_is_seen_by_the_next_handshake() {
        let resolver = Resolver::new(Certificates::of([&identity(&["old.test"])]).unwrap());
        let before = resolver.table();
        resolver.swap(Certificates::of([&identity(&["new.test"])]).unwrap());
        assert!(before.knows("old.test") && !before.knows("new.test"));
        assert!(!resolver.table().knows("old.test") && resolver.table().knows("new.test"));
    }

    #[test]
    fn what_was_issued_is_shown_where_no_file_says_more() {
        let (file, wildcard) = (identity(&["a.example.test"]), identity(&["*.example.test"]));
        let (one, other) = (identity(&["b.example.test", "more.test"]), identity(&["c.other.test"]));
        let resolver = Resolver::new(Certificates::of([&file, &wildcard]).unwrap());
        assert!(shows(&resolver, Some("b.example.test"), &wildcard));
        let named = [("a.example.test", &one), ("b.example.test", &one), ("*.other.test", &other)];
        resolver.swap_issued(Certificates::by_name(named).unwrap());
        assert!(shows(&resolver, Some("a.example.test"), &file));
        assert!(shows(&resolver, Some("B.example.test"), &one));
        assert!(shows(&resolver, Some("c.example.test"), &wildcard));
        assert!(shows(&resolver, Some("d.other.test"), &other));
        assert!(resolver.find(Some("more.test"), ECDSA).is_none(), "it was not got for that name");
    }

    #[test]
    fn names_that_nobody_has_a_certificate_for_are_told() {
        use std::sync::Mutex;
        let told: Arc<Mutex<Vec<String>>> = Arc::default();
        let known = identity(&["known.test"]);
        let resolver = Resolver::new(Certificates::of([&known]).unwrap().with_default(&known));
        let telling = Arc::clone(&told);
        resolver.on_unknown(move |name| telling.lock().unwrap().push(name.to_owned()));
        resolver.on_unknown(|_| panic!("the first one was there"));
        for name in [Some("known.test"), Some("New.test"), None] {
            assert!(shows(&resolver, name, &known));
        }
        assert_eq!(*told.lock().unwrap(), ["new.test"]);
    }
}
