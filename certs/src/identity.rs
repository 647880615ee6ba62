//! An identity: a certificate chain with the private key of its leaf.
//!
//! It is checked once, when it is made: the leaf parses, and the key is the leaf's. What a peer makes of it is
//! decided elsewhere ([`crate::Role`], the verifiers of [`crate::mutual_server`]).

use std::fmt;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use rustls::crypto::CryptoProvider;
use rustls::sign::CertifiedKey;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use x509_parser::certificate::X509Certificate;
use x509_parser::extensions::GeneralName;
use x509_parser::prelude::FromDer;
use x509_parser::time::ASN1Time;

use crate::files::{self, FileError, Readers};
use crate::provider;

/// Why a certificate, or a certificate with a key, tells nobody's identity.
#[derive(Debug, thiserror::Error)]
pub enum IdentityError {
    /// There is no certificate.
    #[error("no certificate")]
    Empty,
    /// The certificate isn't one certificate in DER.
    #[error("malformed certificate")]
    Malformed,
    /// The key can't be used, or belongs to another certificate.
    #[error("key does not fit the certificate")]
    Key(#[source] rustls::Error),
    /// The certificate is an authority's, which stands for nobody.
    #[error("certificate of an authority, not of a peer")]
    Authority,
    /// A role needs exactly one URI name.
    #[error("certificate has {found} URI names, not 1")]
    UriNames {
        /// URI names in it.
        found: usize,
    },
    /// The URI name is none of ours.
    #[error("{uri:?} names no role")]
    Role {
        /// The URI name, shortened.
        uri: String,
    },
}

/// A certificate chain with the private key of its leaf, which fit each other.
#[derive(Clone)]
pub struct Identity {
    chain: Arc<[CertificateDer<'static>]>,
    key: Arc<PrivateKeyDer<'static>>,
    certified: Arc<CertifiedKey>,
    names: Arc<[String]>,
    not_before: SystemTime,
    not_after: SystemTime,
}

impl Identity {
    /// An identity from its parts, leaf first.
    pub fn new(chain: Vec<CertificateDer<'static>>, key: PrivateKeyDer<'static>) -> Result<Self, IdentityError> {
        let leaf = parse(chain.first().ok_or(IdentityError::Empty)?)?;
        let names = dns_names(&leaf)?;
        let (not_before, not_after) = (system_time(leaf.validity().not_before), system_time(leaf.validity().not_after));
        let certified =
            CertifiedKey::from_der(chain.clone(), key.clone_key(), &provider()).map_err(IdentityError::Key)?;
        Ok(Self {
            chain: chain.into(),
            key: Arc::new(key),
            certified: Arc::new(certified),
            names: names.into(),
            not_before,
            not_after,
        })
    }

    /// The same identity, whose signatures `provider` makes. A new one signs with the default provider.
    pub fn signing_with(mut self, provider: &CryptoProvider) -> Result<Self, IdentityError> {
        let certified = CertifiedKey::from_der(self.chain.to_vec(), self.key.clone_key(), provider);
        self.certified = Arc::new(certified.map_err(IdentityError::Key)?);
        Ok(self)
    }

    /// Reads an identity from the file of its chain and the file of its key.
    pub fn load(certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<Self, FileError> {
        let (certificate, key) = (certificate.as_ref(), key.as_ref());
        Self::new(files::chain(certificate)?, files::key(key)?).map_err(|source| FileError::Identity {
            certificate: certificate.to_owned(),
            key: key.to_owned(),
            source,
        })
    }

    /// Writes both files, each whole; the key for its owner alone. Two files can't be replaced in one step: a
    /// reader between them finds a key that does not fit, is refused, and reads again.
    pub fn save(&self, certificate: impl AsRef<Path>, key: impl AsRef<Path>) -> Result<(), FileError> {
        files::write(key.as_ref(), &files::key_pem(&self.key), Readers::Owner)?;
        files::write(certificate.as_ref(), &self.chain_pem(), Readers::Everyone)
    }

    /// The private key of the leaf.
    pub(crate) fn key(&self) -> &PrivateKeyDer<'static> {
        &self.key
    }

    /// The chain, leaf first.
    pub fn chain(&self) -> &[CertificateDer<'static>] {
        &self.chain
    }

    /// The chain as PEM, leaf first.
    pub fn chain_pem(&self) -> String {
        files::chain_pem(&self.chain)
    }

    /// The identity as rustls signs with it.
    pub fn certified_key(&self) -> Arc<CertifiedKey> {
        Arc::clone(&self.certified)
    }

    /// The DNS names of the leaf, lower case, wildcards included.
    pub fn names(&self) -> &[String] {
        &self.names
    }

    /// When the leaf begins.
    pub fn not_before(&self) -> SystemTime {
        self.not_before
    }

    /// When the leaf ends.
    pub fn not_after(&self) -> SystemTime {
        self.not_after
    }

    /// When to replace it: a third of its life is left, so two attempts out of three may fail.
    pub fn renew_after(&self) -> SystemTime {
        let life = self.not_after.duration_since(self.not_before).unwrap_or(Duration::ZERO);
        self.not_before + life / 3 * 2
    }
}

/// The same chain and the same key.
impl PartialEq for Identity {
    fn eq(&self, other: &Self) -> bool {
        self.chain == other.chain && self.key.secret_der() == other.key.secret_der()
    }
}

impl Eq for Identity {}

impl fmt::Debug for Identity {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Identity")
            .field("names", &self.names)
            .field("certificates", &self.chain.len())
            .field("not_after", &self.not_after)
            .finish_non_exhaustive()
    }
}

/// One certificate and nothing behind it.
pub(crate) fn parse(der: &[u8]) -> Result<X509Certificate<'_>, IdentityError> {
    match X509Certificate::from_der(der) {
        Ok(([], certificate)) => Ok(certificate),
        _ => Err(IdentityError::Malformed),
    }
}

/// The alternative names of a certificate; none that can't be read, and the extension at most once.
pub(crate) fn alternative_names<'c>(
    certificate: &'c X509Certificate<'_>,
) -> Result<&'c [GeneralName<'c>], IdentityError> {
    let extension = certificate.subject_alternative_name().map_err(|_| IdentityError::Malformed)?;
    let names = extension.map_or(&[][..], |extension| extension.value.general_names.as_slice());
    if names.iter().any(|name| matches!(name, GeneralName::Invalid(..))) {
        return Err(IdentityError::Malformed);
    }
    Ok(names)
}

fn dns_names(certificate: &X509Certificate<'_>) -> Result<Vec<String>, IdentityError> {
    let dns = |name: &GeneralName<'_>| match name {
        GeneralName::DNSName(name) => Some(name.to_ascii_lowercase()),
        _ => None,
    };
    Ok(alternative_names(certificate)?.iter().filter_map(dns).collect())
}

/// Times before 1970 count as 1970: a certificate that ended then has ended.
pub(crate) fn system_time(time: ASN1Time) -> SystemTime {
    SystemTime::UNIX_EPOCH + Duration::from_secs(u64::try_from(time.timestamp()).unwrap_or(0))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Authority, Role};

    fn authority() -> Authority {
        Authority::create("test").unwrap()
    }

    fn server(authority: &Authority, name: &str) -> Identity {
        authority.issue_server(&[name.to_owned()], &[]).unwrap()
    }

    #[test]
    fn an_identity_is_read_as_it_was_saved() {
        let directory = tempfile::tempdir().unwrap();
        let (certificate, key) = (directory.path().join("c.pem"), directory.path().join("k.pem"));
        let saved = authority().issue_identity(&Role::ControlPlane, &[], &[]).unwrap();
        saved.save(&certificate, &key).unwrap();
        let loaded = Identity::load(&certificate, &key).unwrap();
        assert_eq!(loaded, saved);
        assert_eq!(loaded.names(), ["control-plane.selvage.internal"]);
    }

    #[test]
    fn a_saved_key_has_mode_0600() {
        use std::os::unix::fs::PermissionsExt;
        let directory = tempfile::tempdir().unwrap();
        let key = directory.path().join("k.pem");
        server(&authority(), "a.test").save(directory.path().join("c.pem"), &key).unwrap();
        assert_eq!(std::fs::metadata(key).unwrap().permissions().mode() & 0o777, 0o600);
    }

    #[test]
    fn the_key_of_another_certificate_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let authority = authority();
        server(&authority, "a.test").save(path("a.pem"), path("a-key.pem")).unwrap();
        server(&authority, "b.test").save(path("b.pem"), path("b-key.pem")).unwrap();
        let error = Identity::load(path("a.pem"), path("b-key.pem")).unwrap_err();
        assert!(matches!(error, FileError::Identity { source: IdentityError::Key(_), .. }), "{error:?}");
        let text = error.to_string();
        assert!(text.contains("a.pem") && text.contains("b-key.pem"), "{text}");
    }

    #[test]
    fn debug_shows_no_part_of_the_key() {
        let identity = server(&authority(), "a.test");
        let shown = format!("{identity:?} {identity:#?}");
        let pem = files::key_pem(&identity.key);
        let body: Vec<_> = pem.lines().filter(|line| !line.starts_with("-----")).collect();
        assert!(body.iter().all(|line| !shown.contains(line)));
        let hex: String = identity.key.secret_der()[36..44].iter().map(|b| format!("{b:02x}")).collect();
        let list = format!("{:?}", &identity.key.secret_der()[36..44]);
        assert!(!shown.contains(&hex) && !shown.contains(list.trim_matches(['[', ']'])), "{shown}");
        assert!(shown.contains("a.test"), "{shown}");
    }

    #[test]
    fn renewal_begins_when_a_third_of_the_life_is_left() {
        let identity = server(&authority(), "a.test");
        let left = identity.not_after().duration_since(identity.renew_after()).unwrap();
        let life = identity.not_after().duration_since(identity.not_before).unwrap();
        assert_eq!(left.as_secs(), life.as_secs() / 3);
    }

    #[test]
    fn bytes_after_a_certificate_are_refused() {
        let identity = server(&authority(), "a.test");
        let mut bytes = identity.chain()[0].to_vec();
        assert!(parse(&bytes).is_ok());
        bytes.push(0);
        assert!(matches!(parse(&bytes), Err(IdentityError::Malformed)));
        let error = Identity::new(vec![bytes.into()], identity.key.clone_key()).unwrap_err();
        assert!(matches!(error, IdentityError::Malformed));
        assert!(matches!(Identity::new(Vec::new(), identity.key.clone_key()), Err(IdentityError::Empty)));
    }
}
