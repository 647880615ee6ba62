//! Certificates and keys as PEM files.
//!
//! Every error names its file, because the person who reads it has several. A file is written under another
//! name, synced and renamed, so a reader sees the old file or the new one and never half of either.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use ring::rand::{SecureRandom, SystemRandom};
use rustls::RootCertStore;
use rustls_pki_types::pem::{self, PemObject};
use rustls_pki_types::{CertificateDer, PrivateKeyDer};

use crate::IdentityError;

/// Largest PEM file that is read, bytes. A bundle of public roots has some 220 KiB.
const PEM_BYTES_MAX: u64 = 1024 * 1024;
/// Certificates in a chain.
pub(crate) const CHAIN_CERTIFICATES_MAX: usize = 10;
/// Certificates in a file of roots.
const ROOTS_MAX: usize = 1_000;
/// Characters on a line (RFC 7468 2).
const PEM_LINE_CHARACTERS: usize = 64;
/// Random bytes in the name of a file that is being written.
const PARTIAL_NAME_BYTES: usize = 8;

/// Why a certificate or key file was not read or written.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// The file can't be read.
    #[error("read {path}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file can't be written.
    #[error("write {path}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// The file is too large to be a certificate or a key.
    #[error("{path} is larger than {PEM_BYTES_MAX} bytes")]
    TooLarge {
        /// The file.
        path: PathBuf,
    },
    /// The file isn't PEM.
    #[error("{path} is not valid PEM")]
    Pem {
        /// The file.
        path: PathBuf,
        /// Where it breaks the format.
        source: pem::Error,
    },
    /// The file has no certificate, or too many.
    #[error("{path} holds {found} certificates, not 1 to {max}")]
    Certificates {
        /// The file.
        path: PathBuf,
        /// Certificates in it; counted to one above the limit.
        found: usize,
        /// The limit.
        max: usize,
    },
    /// The file has no key, or several.
    #[error("{path} holds {found} unencrypted private keys, not 1")]
    Keys {
        /// The file.
        path: PathBuf,
        /// Keys in it; counted to two.
        found: usize,
    },
    /// The file holds no secret of a useful length.
    #[error("{path} holds a secret of {found} bytes, not {min} to {max}")]
    Secret {
        /// The file.
        path: PathBuf,
        /// Bytes of the secret.
        found: usize,
        /// The fewest.
        min: usize,
        /// The most.
        max: usize,
    },
    /// A certificate in a file of roots can't be one.
    #[error("certificate {position} of {path} can't be a root")]
    Root {
        /// The file.
        path: PathBuf,
        /// Which certificate, from 1.
        position: usize,
        /// What is wrong with it.
        source: rustls::Error,
    },
    /// The two files are readable and still no identity.
    #[error("{certificate} with key {key} can't be used")]
    Identity {
        /// The file of the chain.
        certificate: PathBuf,
        /// The file of the key.
        key: PathBuf,
        /// What is wrong with them.
        source: IdentityError,
    },
}

/// The two files of one identity.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct PemFiles {
    /// The certificate chain, leaf first.
    pub certificate: PathBuf,
    /// The private key of the leaf.
    pub key: PathBuf,
}

/// Reads a file of root certificates. Every certificate in it must be usable: a root that is silently left out
/// is found when a peer is refused.
pub fn roots_from_pem(path: impl AsRef<Path>) -> Result<RootCertStore, FileError> {
    let path = path.as_ref();
    let mut roots = RootCertStore::empty();
    for (index, certificate) in certificates(path, ROOTS_MAX)?.into_iter().enumerate() {
        roots.add(certificate).map_err(|source| FileError::Root {
            path: path.to_owned(),
            position: index + 1,
            source,
        })?;
    }
    Ok(roots)
}

/// Reads a chain, leaf first. Sections that aren't certificates are passed over: people keep both in one file.
pub(crate) fn chain(path: &Path) -> Result<Vec<CertificateDer<'static>>, FileError> {
    certificates(path, CHAIN_CERTIFICATES_MAX)
}

/// Reads the one private key of a file.
pub(crate) fn key(path: &Path) -> Result<PrivateKeyDer<'static>, FileError> {
    let bytes = read(path)?;
    let mut keys = sections::<PrivateKeyDer<'static>>(path, &bytes, 1)?;
    match (keys.pop(), keys.len()) {
        (Some(key), 0) => Ok(key),
        (last, rest) => Err(FileError::Keys { path: path.to_owned(), found: rest + usize::from(last.is_some()) }),
    }
}

fn certificates(path: &Path, max: usize) -> Result<Vec<CertificateDer<'static>>, FileError> {
    let bytes = read(path)?;
    let found = sections::<CertificateDer<'static>>(path, &bytes, max)?;
    if found.is_empty() || found.len() > max {
        return Err(FileError::Certificates { path: path.to_owned(), found: found.len(), max });
    }
    Ok(found)
}

/// Sections of one kind, at most one more than `max`.
fn sections<T: PemObject>(path: &Path, bytes: &[u8], max: usize) -> Result<Vec<T>, FileError> {
    T::pem_slice_iter(bytes)
        .take(max + 1)
        .collect::<Result<Vec<_>, _>>()
        .map_err(|source| FileError::Pem { path: path.to_owned(), source })
}

/// Reads a file of bounded size.
pub(crate) fn read(path: &Path) -> Result<Vec<u8>, FileError> {
    let failed = |source| FileError::Read { path: path.to_owned(), source };
    let mut bytes = Vec::new();
    let read = File::open(path).map_err(failed)?.take(PEM_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(failed)?;
    if read as u64 > PEM_BYTES_MAX {
        return Err(FileError::TooLarge { path: path.to_owned() });
    }
    Ok(bytes)
}

/// Who may read a file that is written here.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Readers {
    /// The owner alone: keys.
    Owner,
    /// Whom the umask lets: certificates.
    Everyone,
}

impl Readers {
    const fn mode(self) -> u32 {
        match self {
            Self::Owner => 0o600,
            Self::Everyone => 0o644,
        }
    }
}

/// Replaces `path` whole.
pub(crate) fn write(path: &Path, text: &str, readers: Readers) -> Result<(), FileError> {
    let failed = |source| FileError::Write { path: path.to_owned(), source };
    let partial = partial_name(path).map_err(failed)?;
    let result = write_new(&partial, text.as_bytes(), readers).and_then(|()| fs::rename(&partial, path));
    if let Err(error) = result {
        // Best effort: the first error is the one to tell, and the partial file has the mode of the whole one.
        let _ = fs::remove_file(&partial);
        return Err(failed(error));
    }
    // A rename is only durable when its directory is.
    File::open(directory_of(path)).and_then(|directory| directory.sync_all()).map_err(failed)
}

fn write_new(path: &Path, bytes: &[u8], readers: Readers) -> io::Result<()> {
    let mut file = OpenOptions::new().write(true).create_new(true).mode(readers.mode()).open(path)?;
    file.write_all(bytes)?;
    file.sync_all()
}

/// A random neighbour of `path`, so that two writers never share one.
fn partial_name(path: &Path) -> io::Result<PathBuf> {
    let name = path.file_name().ok_or(io::ErrorKind::InvalidInput)?;
    let mut random = [0; PARTIAL_NAME_BYTES];
    SystemRandom::new().fill(&mut random).map_err(|_| io::Error::other("no random bytes"))?;
    let mut partial = std::ffi::OsString::from(".");
    partial.push(name);
    partial.push(format!(".{:016x}", u64::from_be_bytes(random)));
    Ok(path.with_file_name(partial))
}

fn directory_of(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent,
        _ => Path::new("."),
    }
}

/// Certificates as PEM, in their order.
pub fn chain_pem(chain: &[CertificateDer<'_>]) -> String {
    chain.iter().map(|certificate| section("CERTIFICATE", certificate)).collect()
}

/// A key as PEM.
pub(crate) fn key_pem(key: &PrivateKeyDer<'_>) -> String {
    let label = match key {
        PrivateKeyDer::Pkcs1(_) => "RSA PRIVATE KEY",
        PrivateKeyDer::Sec1(_) => "EC PRIVATE KEY",
        // PKCS#8, and whatever comes after it: RFC 5958 names its section without an algorithm.
        _ => "PRIVATE KEY",
    };
    section(label, key.secret_der())
}

fn section(label: &str, der: &[u8]) -> String {
    let encoded = STANDARD.encode(der);
    let mut text = format!("-----BEGIN {label}-----\n");
    let mut rest = encoded.as_str();
    while !rest.is_empty() {
        // Base64 is ASCII, so every index is a character's border.
        let (line, after) = rest.split_at(rest.len().min(PEM_LINE_CHARACTERS));
        text.push_str(line);
        text.push('\n');
        rest = after;
    }
    text.push_str(&format!("-----END {label}-----\n"));
    text
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::Authority;

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn a_written_key_is_readable_by_its_owner_alone() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        write(&path, "secret", Readers::Owner).unwrap();
        assert_eq!(mode(&path), 0o600);
    }

    #[test]
    fn a_key_that_replaces_an_open_file_closes_it() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        fs::write(&path, "old").unwrap();
        fs::set_permissions(&path, fs::Permissions::from_mode(0o666)).unwrap();
        write(&path, "new", Readers::Owner).unwrap();
        assert_eq!((mode(&path), fs::read_to_string(&path).unwrap()), (0o600, "new".to_owned()));
    }

    #[test]
    fn a_write_leaves_nothing_beside_its_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("taken");
        fs::create_dir(&path).unwrap();
        let error = write(&path, "text", Readers::Everyone).unwrap_err();
        assert!(error.to_string().contains("taken"), "{error}");
        write(&directory.path().join("free"), "text", Readers::Everyone).unwrap();
        let mut left: Vec<_> =
            fs::read_dir(directory.path()).unwrap().map(|entry| entry.unwrap().file_name()).collect();
        left.sort();
        assert_eq!(left, ["free", "taken"]);
    }

    #[test]
    fn errors_name_the_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("some.pem");
        let missing = chain(&path).unwrap_err();
        assert!(matches!(missing, FileError::Read { .. }));
        let broken = "-----BEGIN CERTIFICATE-----\n%%%%\n-----END CERTIFICATE-----\n";
        fs::write(&path, "").unwrap();
        let empty = chain(&path).unwrap_err();
        assert!(matches!(empty, FileError::Certificates { found: 0, .. }), "{empty:?}");
        assert!(empty.to_string().contains("some.pem"), "{empty}");
        for text in ["-----BEGIN CERTIFICATE-----\nAAAA\n", broken] {
            fs::write(&path, text).unwrap();
            let error = chain(&path).unwrap_err();
            assert!(matches!(error, FileError::Pem { .. }), "{text:?}: {error:?}");
            assert!(error.to_string().contains("some.pem"), "{error}");
        }
    }

    #[test]
    fn a_file_without_exactly_one_plain_key_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("key.pem");
        let one = section("PRIVATE KEY", b"key");
        let encrypted = section("ENCRYPTED PRIVATE KEY", b"key");
        for (text, expected) in [(one.repeat(2), 2), (String::new(), 0), (encrypted, 0)] {
            fs::write(&path, text).unwrap();
            let error = key(&path).unwrap_err();
            assert!(matches!(error, FileError::Keys { found, .. } if found == expected), "{error:?}");
        }
        fs::write(&path, one).unwrap();
        assert_eq!(key(&path).unwrap().secret_der(), b"key");
    }

    #[test]
    fn chains_and_files_have_a_longest_length() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("chain.pem");
        let one = section("CERTIFICATE", b"certificate");
        fs::write(&path, one.repeat(CHAIN_CERTIFICATES_MAX)).unwrap();
        assert_eq!(chain(&path).unwrap().len(), CHAIN_CERTIFICATES_MAX);
        fs::write(&path, one.repeat(CHAIN_CERTIFICATES_MAX + 1)).unwrap();
        assert!(matches!(chain(&path), Err(FileError::Certificates { .. })));
        fs::write(&path, vec![b'\n'; usize::try_from(PEM_BYTES_MAX).unwrap() + 1]).unwrap();
        assert!(matches!(chain(&path), Err(FileError::TooLarge { .. })));
    }

    #[test]
    fn a_section_is_read_as_it_was_written() {
        for length in [0, 1, 47, 48, 49, 1_000] {
            let der = vec![7; length];
            let text = chain_pem(&[CertificateDer::from(der.clone())]);
            assert_eq!(CertificateDer::from_pem_slice(text.as_bytes()).unwrap().as_ref(), der);
            assert!(text.lines().all(|line| line.len() <= PEM_LINE_CHARACTERS));
        }
    }

    #[test]
    fn every_root_of_a_file_must_be_usable() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("roots.pem");
        let good = Authority::create("one").unwrap().certificate_pem().to_owned();
        fs::write(&path, good.repeat(2)).unwrap();
        assert_eq!(roots_from_pem(&path).unwrap().len(), 2);
        fs::write(&path, good + &section("CERTIFICATE", b"certificate")).unwrap();
        let error = roots_from_pem(&path).unwrap_err();
        assert!(matches!(error, FileError::Root { position: 2, .. }), "{error:?}");
    }
}
