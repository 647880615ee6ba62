//! The fleet's own certificate authority.
//!
//! It says who is a node, the control plane or an operator, and it serves as a root for trying Selvage out on one
//! machine. Its key signs; it never leaves memory and one file that only its owner reads.
//!
//! Names under [`INTERNAL_DOMAIN`] stand for roles and are given to their role alone. So a client that verified
//! `control-plane.selvage.internal` has reached the control plane, and nothing else need be checked.

mod rotation;

use std::fmt;
use std::fs::{DirBuilder, File};
use std::io;
use std::net::IpAddr;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, SystemTime};

use rcgen::{
    BasicConstraints, CertificateParams, CertificateSigningRequestParams, DistinguishedName, DnType,
    ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose, PublicKeyData, SanType, SerialNumber,
};
use ring::rand::{SecureRandom, SystemRandom};
use rustls_pki_types::{CertificateDer, CertificateSigningRequestDer, DnsName, PrivateKeyDer, PrivatePkcs8KeyDer};
use time::OffsetDateTime;

use crate::files::{self, FileError, Readers};
use crate::identity::{self, Identity, IdentityError};
use crate::role::{INTERNAL_DOMAIN, Role};

pub use rotation::{Rotation, RotationError};

/// File of the certificate, in the authority's directory; while another one takes its place, of both.
const CERTIFICATE_FILE: &str = "ca.pem";
/// File of the key, in the authority's directory.
const KEY_FILE: &str = "ca-key.pem";
/// Name of an authority that is made because its directory was empty.
const COMMON_NAME_DEFAULT: &str = "Selvage authority";

/// Life of an authority: ten years.
const AUTHORITY_LIFE: Duration = Duration::from_secs(3_650 * DAY_SECONDS);
/// Life of a role's certificate: seven days. It is short because nothing revokes it.
const ROLE_LIFE: Duration = Duration::from_secs(7 * DAY_SECONDS);
/// Life of a server's certificate: thirty days.
const SERVER_LIFE: Duration = Duration::from_secs(30 * DAY_SECONDS);
/// How far before now a certificate begins: what a peer's clock may lag.
const CLOCK_LAG: Duration = Duration::from_secs(300);
const DAY_SECONDS: u64 = 86_400;

/// DNS names and addresses in one certificate.
const NAMES_MAX: usize = 100;
/// Bytes of a request for a certificate.
const REQUEST_BYTES_MAX: usize = 16 * 1024;
/// Bytes of a serial number; RFC 5280 4.1.2.2 allows twenty.
const SERIAL_BYTES: usize = 16;

/// Why the authority was not opened, or did not issue.
#[derive(Debug, thiserror::Error)]
pub enum AuthorityError {
    /// A key or certificate could not be made.
    #[error("make key or certificate")]
    Make(#[source] rcgen::Error),
    /// The system gave no random bytes.
    #[error("no random bytes")]
    Random,
    /// A file of the authority can't be read or written.
    #[error(transparent)]
    File(#[from] FileError),
    /// The authority's directory can't be used.
    #[error("open directory {path} of the authority")]
    Directory {
        /// The directory.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// There is a certificate without its key. A new authority would be one that no peer trusts, so none is made.
    #[error("{certificate} exists, its key {key} does not")]
    KeyMissing {
        /// The file of the certificate.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
    /// The key file holds no key that can sign.
    #[error("{path} is not a key that can sign")]
    Key {
        /// The file of the key.
        path: PathBuf,
        /// What is wrong with it.
        source: rcgen::Error,
    },
    /// The key is another's.
    #[error("{key} is not the key of {certificate}")]
    Mismatch {
        /// The file of the certificate.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
    },
    /// The certificate may not sign others.
    #[error("{path} is not the certificate of an authority")]
    NotAuthority {
        /// The file of the certificate.
        path: PathBuf,
    },
    /// The certificate has ended.
    #[error("{path} has expired")]
    Expired {
        /// The file of the certificate.
        path: PathBuf,
    },
    /// A name isn't a DNS name, or may not stand in this certificate.
    #[error("{name:?} can't be certified: {reason}")]
    Name {
        /// The name.
        name: String,
        /// Which rule it breaks.
        reason: &'static str,
    },
    /// A certificate for nobody, or for too many.
    #[error("{found} names and addresses, not 1 to {NAMES_MAX}")]
    Names {
        /// Names and addresses asked for.
        found: usize,
    },
    /// The request is malformed, or not signed by the key it is for.
    #[error("bad certificate request")]
    Request,
    /// What was issued can't be used.
    #[error("issued identity")]
    Issued(#[source] IdentityError),
}

/// The fleet's own certificate authority, with its key.
pub struct Authority {
    issuer: Issuer<'static, KeyPair>,
    certificate: CertificateDer<'static>,
    pem: String,
    not_after: SystemTime,
}

impl Authority {
    /// Makes an authority that lives in memory only.
    pub fn create(common_name: &str) -> Result<Self, AuthorityError> {
        Self::with_key(common_name, KeyPair::generate().map_err(AuthorityError::Make)?)
    }

    /// Opens the authority of a directory. One that is not there now is an error: a new one would be nobody's.
    pub fn open(directory: &Path) -> Result<Self, AuthorityError> {
        let _lock = locked(directory)?;
        Self::read(&directory.join(CERTIFICATE_FILE), &directory.join(KEY_FILE))
    }

    /// Opens the authority of a directory, or makes one there if there is none.
    pub fn open_or_create(directory: &Path) -> Result<Self, AuthorityError> {
        let failed = |source| AuthorityError::Directory { path: directory.to_owned(), source };
        DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(failed)?;
        // Two programs that start at once must not make two authorities.
        let _lock = locked(directory)?;

        let (certificate, key) = (directory.join(CERTIFICATE_FILE), directory.join(KEY_FILE));
        match (certificate.try_exists().map_err(failed)?, key.try_exists().map_err(failed)?) {
            (true, true) => Self::read(&certificate, &key),
            (true, false) => Err(AuthorityError::KeyMissing { certificate, key }),
            // The key is written first: this is where a start that was cut short is taken up again.
            (false, true) => {
                let authority = Self::with_key(COMMON_NAME_DEFAULT, read_key(&key)?)?;
                files::write(&certificate, &authority.pem, Readers::Everyone)?;
                Ok(authority)
            }
            (false, false) => {
                let authority = Self::create(COMMON_NAME_DEFAULT)?;
                files::write(&key, &authority.issuer.key().serialize_pem(), Readers::Owner)?;
                files::write(&certificate, &authority.pem, Readers::Everyone)?;
                Ok(authority)
            }
        }
    }

    fn with_key(common_name: &str, key: KeyPair) -> Result<Self, AuthorityError> {
        let mut params = parameters(common_name, AUTHORITY_LIFE, SystemTime::now())?;
        // It signs leaves and no further authorities.
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
        params.use_authority_key_identifier_extension = false;
        let certificate = params.self_signed(&key).map_err(AuthorityError::Make)?;
        Ok(Self {
            pem: certificate.pem(),
            certificate: certificate.into(),
            not_after: params.not_after.into(),
            issuer: Issuer::new(params, key),
        })
    }

    fn read(certificate_path: &Path, key_path: &Path) -> Result<Self, AuthorityError> {
        let key = read_key(key_path)?;
        let not_authority = || AuthorityError::NotAuthority { path: certificate_path.to_owned() };
        // While one authority follows another there are two; the one issues whose key this is.
        let certificates = files::chain(certificate_path)?;
        for certificate in &certificates {
            if !identity::parse(certificate).is_ok_and(|parsed| parsed.is_ca()) {
                return Err(not_authority());
            }
        }
        let certificate = certificate_of(&certificates, &key).cloned().ok_or_else(|| AuthorityError::Mismatch {
            certificate: certificate_path.to_owned(),
            key: key_path.to_owned(),
        })?;
        let parsed = identity::parse(&certificate).map_err(|_| not_authority())?;
        let not_after = identity::system_time(parsed.validity().not_after);
        if not_after <= SystemTime::now() {
            return Err(AuthorityError::Expired { path: certificate_path.to_owned() });
        }
        Ok(Self {
            issuer: Issuer::from_ca_cert_der(&certificate, key).map_err(AuthorityError::Make)?,
            pem: files::chain_pem(std::slice::from_ref(&certificate)),
            certificate,
            not_after,
        })
    }

    /// The certificate as PEM: what others are told to trust.
    pub fn certificate_pem(&self) -> &str {
        &self.pem
    }

    /// The certificate.
    pub fn certificate_der(&self) -> CertificateDer<'static> {
        self.certificate.clone()
    }

    /// Issues a role's identity with a new key. Next to the role's own name it may carry addresses and further
    /// names that clients connect by.
    pub fn issue_identity(
        &self,
        role: &Role,
        addresses: &[IpAddr],
        names: &[String],
    ) -> Result<Identity, AuthorityError> {
        self.issue(role_parameters(role, addresses, names, SystemTime::now())?)
    }

    /// Certifies a key that was made elsewhere ([`crate::Enrolment`]). Only the key is taken from the request, which
    /// must be signed by it; who it stands for is what the caller knows, not what the request says.
    pub fn certify(
        &self,
        request: &[u8],
        role: &Role,
        addresses: &[IpAddr],
        names: &[String],
    ) -> Result<Vec<CertificateDer<'static>>, AuthorityError> {
        if request.len() > REQUEST_BYTES_MAX {
            return Err(AuthorityError::Request);
        }
        let request = CertificateSigningRequestParams::from_der(&CertificateSigningRequestDer::from(request))
            .map_err(|_| AuthorityError::Request)?;
        let params = role_parameters(role, addresses, names, SystemTime::now())?;
        Ok(vec![self.sign(params, &request.public_key)?])
    }

    /// Issues a server's identity for DNS names (`*.` for any one label) and addresses. It stands for no role.
    pub fn issue_server(&self, names: &[String], addresses: &[IpAddr]) -> Result<Identity, AuthorityError> {
        let mut params = parameters("Selvage server", SERVER_LIFE, SystemTime::now())?;
        params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth];
        for name in names {
            let host = name.strip_prefix("*.").unwrap_or(name);
            params.subject_alt_names.push(dns_name(name, host)?);
        }
        params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
        check_count(params.subject_alt_names.len())?;
        self.issue(params)
    }

    fn issue(&self, params: CertificateParams) -> Result<Identity, AuthorityError> {
        let key = KeyPair::generate().map_err(AuthorityError::Make)?;
        let certificate = self.sign(params, &key)?;
        let key = PrivateKeyDer::Pkcs8(PrivatePkcs8KeyDer::from(key.serialize_der()));
        Identity::new(vec![certificate], key).map_err(AuthorityError::Issued)
    }

    fn sign(
        &self,
        mut params: CertificateParams,
        key: &impl PublicKeyData,
    ) -> Result<CertificateDer<'static>, AuthorityError> {
        // Nothing outlives who vouches for it.
        params.not_after = params.not_after.min(self.not_after.into());
        params.signed_by(key, &self.issuer).map(Into::into).map_err(AuthorityError::Make)
    }
}

impl fmt::Debug for Authority {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Authority").field("not_after", &self.not_after).finish_non_exhaustive()
    }
}

/// Holds an authority's directory until it is dropped.
fn locked(directory: &Path) -> Result<File, AuthorityError> {
    let failed = |source| AuthorityError::Directory { path: directory.to_owned(), source };
    let lock = File::open(directory).map_err(failed)?;
    lock.lock().map_err(failed)?;
    Ok(lock)
}

/// The certificate that is for this key.
fn certificate_of<'c>(
    certificates: &'c [CertificateDer<'static>],
    key: &KeyPair,
) -> Option<&'c CertificateDer<'static>> {
    let own = key.subject_public_key_info();
    let fits = |der: &&CertificateDer<'_>| identity::parse(der).is_ok_and(|parsed| parsed.public_key().raw == own);
    certificates.iter().find(fits)
}

fn read_key(path: &Path) -> Result<KeyPair, AuthorityError> {
    KeyPair::try_from(&files::key(path)?).map_err(|source| AuthorityError::Key { path: path.to_owned(), source })
}

/// What all certificates have in common.
fn parameters(common_name: &str, life: Duration, now: SystemTime) -> Result<CertificateParams, AuthorityError> {
    let mut serial = [0; SERIAL_BYTES];
    SystemRandom::new().fill(&mut serial).map_err(|_| AuthorityError::Random)?;
    // RFC 5280 4.1.2.2: positive, so neither the sign bit nor nought.
    serial[0] = serial[0] & 0x7f | 0x40;

    let mut params = CertificateParams::default();
    params.serial_number = Some(SerialNumber::from_slice(&serial));
    params.not_before = OffsetDateTime::from(now - CLOCK_LAG);
    params.not_after = OffsetDateTime::from(now + life);
    params.distinguished_name = DistinguishedName::new();
    params.distinguished_name.push(DnType::CommonName, common_name);
    params.is_ca = IsCa::ExplicitNoCa;
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.use_authority_key_identifier_extension = true;
    Ok(params)
}

fn role_parameters(
    role: &Role,
    addresses: &[IpAddr],
    names: &[String],
    now: SystemTime,
) -> Result<CertificateParams, AuthorityError> {
    check_count(1 + addresses.len() + names.len())?;
    let mut params = parameters("Selvage identity", ROLE_LIFE, now)?;
    params.extended_key_usages = match role {
        Role::Node { .. } | Role::ControlPlane => {
            vec![ExtendedKeyUsagePurpose::ClientAuth, ExtendedKeyUsagePurpose::ServerAuth]
        }
        // An operator calls and is never called.
        Role::Operator { .. } => vec![ExtendedKeyUsagePurpose::ClientAuth],
    };
    params.subject_alt_names.push(SanType::URI(text(&role.uri())?));
    params.subject_alt_names.push(SanType::DnsName(text(&role.tls_name())?));
    for name in names {
        if *name != role.tls_name() {
            params.subject_alt_names.push(dns_name(name, name)?);
        }
    }
    params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
    Ok(params)
}

/// `name` as an alternative name. `host` is the name without its wildcard label, where one is allowed.
fn dns_name(name: &str, host: &str) -> Result<SanType, AuthorityError> {
    let refuse = |reason| AuthorityError::Name { name: name.to_owned(), reason };
    DnsName::try_from_str(host).map_err(|_| refuse("not a DNS name"))?;
    if host.ends_with('.') {
        // RFC 5280 4.2.1.6 takes the form of RFC 1034 3.5, which has no final dot: no client would match it.
        return Err(refuse("ends with a dot"));
    }
    let lower = name.to_ascii_lowercase();
    if under_internal_domain(&host.to_ascii_lowercase()) {
        return Err(refuse("it stands for a role"));
    }
    Ok(SanType::DnsName(text(&lower)?))
}

fn under_internal_domain(host: &str) -> bool {
    host.strip_suffix(INTERNAL_DOMAIN).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

fn text(value: &str) -> Result<rcgen::string::Ia5String, AuthorityError> {
    value.try_into().map_err(AuthorityError::Make)
}

fn check_count(found: usize) -> Result<(), AuthorityError> {
    if (1..=NAMES_MAX).contains(&found) { Ok(()) } else { Err(AuthorityError::Names { found }) }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::os::unix::fs::PermissionsExt;

    use super::*;

    fn node(name: &str) -> Role {
        Role::Node { region: "fra".parse().unwrap(), node: name.parse().unwrap() }
    }

    fn owned(names: &[&str]) -> Vec<String> {
        names.iter().map(|name| (*name).to_owned()).collect()
    }

    fn write_authority(directory: &Path, authority: &Authority) {
        fs::write(directory.join(CERTIFICATE_FILE), &authority.pem).unwrap();
        fs::write(directory.join(KEY_FILE), authority.issuer.key().serialize_pem()).unwrap();
    }

    #[test]
    fn an_authority_is_the_same_when_opened_again() {
        let parent = tempfile::tempdir().unwrap();
        let directory = parent.path().join("deep/ca");
        let made = Authority::open_or_create(&directory).unwrap();
        let opened = Authority::open_or_create(&directory).unwrap();
        assert_eq!(opened.certificate_der(), made.certificate_der());
        assert_eq!(opened.certificate_pem(), made.certificate_pem());
        assert_eq!(fs::read_to_string(directory.join(CERTIFICATE_FILE)).unwrap(), made.pem);
        let mode = |path: &Path| fs::metadata(path).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode(&directory.join(KEY_FILE)), 0o600);
        assert_eq!(mode(&directory), 0o700);
        assert_eq!(Authority::open(&directory).unwrap().certificate_der(), made.certificate_der());
        assert!(Authority::open(parent.path()).is_err() && Authority::open(&parent.path().join("gone")).is_err());
        assert!(!parent.path().join(KEY_FILE).exists() && !parent.path().join("gone").exists(), "nothing is made");
    }

    #[test]
    fn starts_at_once_make_one_authority() {
        let directory = tempfile::tempdir().unwrap();
        let start = || Authority::open_or_create(directory.path()).unwrap().certificate_der();
        let made: Vec<_> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..4).map(|_| scope.spawn(start)).collect();
            threads.into_iter().map(|thread| thread.join().unwrap()).collect()
        });
        assert!(made.iter().all(|certificate| *certificate == made[0]));
    }

    #[test]
    fn a_start_that_was_cut_short_is_taken_up_again() {
        let directory = tempfile::tempdir().unwrap();
        let first = Authority::open_or_create(directory.path()).unwrap();
        fs::remove_file(directory.path().join(CERTIFICATE_FILE)).unwrap();
        let second = Authority::open_or_create(directory.path()).unwrap();
        assert_eq!(first.issuer.key().subject_public_key_info(), second.issuer.key().subject_public_key_info());
        let third = Authority::open_or_create(directory.path()).unwrap();
        assert_eq!(second.certificate_der(), third.certificate_der());
    }

    #[test]
    fn an_authority_without_its_key_is_not_replaced() {
        let directory = tempfile::tempdir().unwrap();
        let made = Authority::open_or_create(directory.path()).unwrap();
        fs::remove_file(directory.path().join(KEY_FILE)).unwrap();
        let error = Authority::open_or_create(directory.path()).unwrap_err();
        assert!(matches!(error, AuthorityError::KeyMissing { .. }), "{error:?}");
        let kept = fs::read_to_string(directory.path().join(CERTIFICATE_FILE)).unwrap();
        assert_eq!(kept, made.pem);
    }

    #[test]
    fn the_key_of_another_authority_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        write_authority(directory.path(), &Authority::create("one").unwrap());
        let other = Authority::create("two").unwrap();
        fs::write(directory.path().join(CERTIFICATE_FILE), &other.pem).unwrap();
        let error = Authority::open_or_create(directory.path()).unwrap_err();
        assert!(matches!(error, AuthorityError::Mismatch { .. }), "{error:?}");
    }

    #[test]
    fn a_servers_certificate_is_no_authority() {
        let directory = tempfile::tempdir().unwrap();
        let server = Authority::create("one").unwrap().issue_server(&owned(&["a.test"]), &[]).unwrap();
        server.save(directory.path().join(CERTIFICATE_FILE), directory.path().join(KEY_FILE)).unwrap();
        let error = Authority::open_or_create(directory.path()).unwrap_err();
        assert!(matches!(error, AuthorityError::NotAuthority { .. }), "{error:?}");
    }

    #[test]
    fn an_expired_authority_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let key = KeyPair::generate().unwrap();
        let long_ago = SystemTime::now() - 2 * AUTHORITY_LIFE;
        let mut params = parameters("old", AUTHORITY_LIFE, long_ago).unwrap();
        params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
        let certificate = params.self_signed(&key).unwrap();
        fs::write(directory.path().join(CERTIFICATE_FILE), certificate.pem()).unwrap();
        fs::write(directory.path().join(KEY_FILE), key.serialize_pem()).unwrap();
        let error = Authority::open_or_create(directory.path()).unwrap_err();
        assert!(matches!(error, AuthorityError::Expired { .. }), "{error:?}");
    }

    #[test]
    fn a_directory_that_is_a_file_is_refused_by_name() {
        let parent = tempfile::tempdir().unwrap();
        let path = parent.path().join("file");
        fs::write(&path, "").unwrap();
        let error = Authority::open_or_create(&path).unwrap_err();
        assert!(matches!(&error, AuthorityError::Directory { path: named, .. } if *named == path));
    }

    #[test]
    fn a_name_that_stands_for_a_role_is_given_to_it_alone() {
        let authority = Authority::create("test").unwrap();
        for name in [
            "selvage.internal",
            "*.selvage.internal",
            "control-plane.selvage.internal",
            "Control-Plane.SELVAGE.internal",
            "*.node.selvage.internal",
            "b.node.selvage.internal",
        ] {
            let names = owned(&[name]);
            let server = authority.issue_server(&names, &[]).unwrap_err();
            assert!(matches!(server, AuthorityError::Name { .. }), "{name}: {server:?}");
            let identity = authority.issue_identity(&node("a"), &[], &names).unwrap_err();
            assert!(matches!(identity, AuthorityError::Name { .. }), "{name}: {identity:?}");
        }
        let own = authority.issue_identity(&node("a"), &[], &owned(&["a.node.selvage.internal"])).unwrap();
        assert_eq!(own.names(), ["a.node.selvage.internal"]);
        assert!(authority.issue_server(&owned(&["notselvage.internal"]), &[]).is_ok());
    }

    #[test]
    fn what_is_no_dns_name_is_not_certified() {
        let authority = Authority::create("test").unwrap();
        for name in ["", "*", "*.", "a.*.test", "*.*.test", "a*.test", "a b.test", "a.test.", "ä.test", "127.0.0.1"] {
            let error = authority.issue_server(&owned(&[name]), &[]).unwrap_err();
            assert!(matches!(error, AuthorityError::Name { .. }), "{name:?}: {error:?}");
        }
        let wildcard = authority.issue_identity(&node("a"), &[], &owned(&["*.test"])).unwrap_err();
        assert!(matches!(wildcard, AuthorityError::Name { .. }), "{wildcard:?}");
    }

    #[test]
    fn a_certificate_has_at_least_one_name_and_not_too_many() {
        let authority = Authority::create("test").unwrap();
        let many = |count: usize| (0..count).map(|i| format!("n{i}.test")).collect::<Vec<_>>();
        assert!(authority.issue_server(&many(NAMES_MAX), &[]).is_ok());
        for count in [0, NAMES_MAX + 1] {
            let error = authority.issue_server(&many(count), &[]).unwrap_err();
            assert!(matches!(error, AuthorityError::Names { found } if found == count), "{error:?}");
        }
        assert!(authority.issue_identity(&node("a"), &[], &many(NAMES_MAX)).is_err());
    }

    #[test]
    fn lives_are_short_and_serial_numbers_differ() {
        let authority = Authority::create("test").unwrap();
        let issue = || authority.issue_identity(&node("a"), &[], &[]).unwrap();
        let (first, second) = (issue(), issue());
        let left = first.not_after().duration_since(SystemTime::now()).unwrap();
        assert!(left <= ROLE_LIFE && left > ROLE_LIFE - Duration::from_secs(60), "{left:?}");
        let serial = |identity: &Identity| {
            let parsed = identity::parse(&identity.chain()[0]).unwrap();
            parsed.raw_serial().to_vec()
        };
        assert_ne!(serial(&first), serial(&second));
        assert_eq!((serial(&first).len(), serial(&first)[0] & 0x80), (SERIAL_BYTES, 0));
    }

    #[test]
    fn a_role_is_refused_when_its_certificate_has_ended() {
        let authority = Authority::create("test").unwrap();
        let roots = crate::roots_of(&[authority.certificate_der()]).unwrap();
        let verifier = rustls::server::WebPkiClientVerifier::builder_with_provider(roots.into(), crate::provider())
            .build()
            .unwrap();
        let key = KeyPair::generate().unwrap();
        let verify = |age: Duration| {
            let params = role_parameters(&node("a"), &[], &[], SystemTime::now() - age).unwrap();
            let certificate = authority.sign(params, &key).unwrap();
            verifier.verify_client_cert(&certificate, &[], rustls_pki_types::UnixTime::now())
        };
        assert!(verify(ROLE_LIFE - Duration::from_secs(60)).is_ok());
        let error = verify(ROLE_LIFE + Duration::from_secs(60)).unwrap_err();
        assert!(error.to_string().contains("expired"), "{error}");
    }

    #[test]
    fn nothing_outlives_its_authority() {
        let mut authority = Authority::create("test").unwrap();
        let end = SystemTime::UNIX_EPOCH + Duration::from_secs(2_000_000_000);
        authority.not_after = end.min(SystemTime::now() + Duration::from_secs(60));
        let identity = authority.issue_identity(&node("a"), &[], &[]).unwrap();
        assert!(identity.not_after() <= authority.not_after);
    }

    #[test]
    fn debug_shows_no_part_of_the_key() {
        let authority = Authority::create("test").unwrap();
        let shown = format!("{authority:?}");
        assert!(shown.starts_with("Authority { not_after: ") && shown.ends_with(", .. }"), "{shown}");
        assert!(!shown.to_lowercase().contains("key"), "{shown}");
    }
}
