//! Where a node keeps its ACME account and the certificates that it got.
//!
//! A directory for each authority, so that certificates of a trial are not shown when the real one is named. Each
//! certificate is one file, key and chain, replaced in one step; only the node's user can read any of it.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, digest};
use rustls_pki_types::pem::PemObject;
use rustls_pki_types::{CertificateDer, PrivateKeyDer};
use selvage_config::node::CertificateName;

use crate::files::{self, FileError, Readers};
use crate::{Enrolment, Identity};

/// Below the state directory.
const DIRECTORY: &str = "acme";
/// The account.
const ACCOUNT: &str = "account.json";
/// What certificates end with.
const PEM: &str = ".pem";
/// What notes of records end with.
const RECORD: &str = "record";
/// A wildcard's `*` in a file name: no host name has an underscore.
const WILDCARD: &str = "_";
/// Characters of the authority's host, and bytes of a hash of its address, in the name of its directory.
const HOST_CHARACTERS_MAX: usize = 64;
const HASH_BYTES: usize = 6;

/// The directory of one authority.
#[derive(Debug, Clone)]
pub struct IssuedFiles {
    directory: PathBuf,
}

impl IssuedFiles {
    /// The directory below `state_dir` of the authority whose directory is at `address`. Nothing is made.
    pub fn at(state_dir: &Path, address: &str) -> Self {
        let host = address.split("://").nth(1).unwrap_or(address);
        let is_plain = |c: &char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-');
        let host: String = host.chars().take_while(is_plain).take(HOST_CHARACTERS_MAX).collect();
        let hash = digest(&SHA256, address.as_bytes());
        let hash: String = hash.as_ref()[..HASH_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
        Self { directory: state_dir.join(DIRECTORY).join(format!("{host}-{hash}")) }
    }

    /// Where that is.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Makes the directory if it is not there.
    pub fn make(&self) -> Result<(), FileError> {
        let made = DirBuilder::new().recursive(true).mode(0o700).create(&self.directory);
        made.map_err(|source| FileError::Write { path: self.directory.clone(), source })
    }

    /// The certificate of `name`, if there is one.
    pub fn load(&self, name: &CertificateName) -> Result<Option<Identity>, FileError> {
        let path = self.path(name);
        match Identity::load(&path, &path) {
            Ok(identity) => Ok(Some(identity)),
            Err(FileError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The names that there are files for.
    pub fn names(&self) -> Result<Vec<CertificateName>, FileError> {
        let failed = |source| self.unread(source);
        let mut names = Vec::new();
        let entries = match fs::read_dir(&self.directory) {
            Err(error) if error.kind() == ErrorKind::NotFound => return Ok(names),
            entries => entries.map_err(failed)?,
        };
        for entry in entries {
            let name = entry.map_err(failed)?.file_name();
            let Some(name) = name.to_str().and_then(|name| name.strip_suffix(PEM)) else { continue };
            let name = name.strip_prefix(WILDCARD).map_or_else(|| name.to_owned(), |rest| format!("*{rest}"));
            // Other files are somebody else's.
            names.extend(CertificateName::try_from(name));
        }
        names.sort();
        Ok(names)
    }

    /// Keeps a certificate in place of the one before.
    pub fn save(&self, name: &CertificateName, identity: &Identity) -> Result<(), FileError> {
        files::write(&self.path(name), &identity.to_pem(), Readers::Owner)
    }

    /// Forgets the certificate of `name`.
    pub fn remove(&self, name: &CertificateName) -> Result<(), FileError> {
        remove(&self.path(name))
    }

    /// The account, as it was kept.
    pub fn account(&self) -> Result<Option<Vec<u8>>, FileError> {
        match files::read(&self.directory.join(ACCOUNT)) {
            Ok(account) => Ok(Some(account)),
            Err(FileError::Read { source, .. }) if source.kind() == ErrorKind::NotFound => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// Keeps the account.
    pub fn save_account(&self, text: &str) -> Result<(), FileError> {
        files::write(&self.directory.join(ACCOUNT), text, Readers::Owner)
    }

    /// Forgets the account: the authority does not know it.
    pub fn remove_account(&self) -> Result<(), FileError> {
        remove(&self.directory.join(ACCOUNT))
    }

    /// Notes that a record of this name and value is about to be put, so that it is found if the process ends first.
    pub fn note_record(&self, name: &str, value: &str) -> Result<(), FileError> {
        files::write(&self.record(name, value), &format!("{name}\n{value}\n"), Readers::Owner)
    }

    /// Forgets it: it has been taken away.
    pub fn forget_record(&self, name: &str, value: &str) -> Result<(), FileError> {
        remove(&self.record(name, value))
    }

    /// Names and values of records that were about to be put, and that nobody forgot.
    pub fn records(&self) -> Result<Vec<(String, String)>, FileError> {
        let mut records = Vec::new();
        for entry in fs::read_dir(&self.directory).map_err(|source| self.unread(source))? {
            let path = entry.map_err(|source| self.unread(source))?.path();
            if path.extension().is_some_and(|extension| extension == RECORD) {
                let text = String::from_utf8_lossy(&files::read(&path)?).into_owned();
                // Whatever is not one of ours stays where it is.
                records
                    .extend(text.trim_end().split_once('\n').map(|(name, value)| (name.to_owned(), value.to_owned())));
            }
        }
        records.sort();
        Ok(records)
    }

    fn unread(&self, source: std::io::Error) -> FileError {
        FileError::Read { path: self.directory.clone(), source }
    }

    fn record(&self, name: &str, value: &str) -> PathBuf {
        let hash = digest(&SHA256, format!("{name}\n{value}").as_bytes());
        let hash: String = hash.as_ref()[..HASH_BYTES].iter().map(|byte| format!("{byte:02x}")).collect();
        self.directory.join(format!("{hash}.{RECORD}"))
    }

    fn path(&self, name: &CertificateName) -> PathBuf {
        self.directory.join(format!("{}{PEM}", name.as_str().replacen('*', WILDCARD, 1)))
    }
}

fn remove(path: &Path) -> Result<(), FileError> {
    match fs::remove_file(path) {
        Err(error) if error.kind() != ErrorKind::NotFound => {
            Err(FileError::Write { path: path.to_owned(), source: error })
        }
        _ => Ok(()),
    }
}

impl Identity {
    /// Key and chain in one text: a secret.
    pub fn to_pem(&self) -> String {
        files::key_pem(self.key()) + &self.chain_pem()
    }

    /// What [`Identity::to_pem`] wrote.
    ///
    /// # Errors
    /// What is not such a text, or a key that is not the chain's.
    pub fn of_pem(pem: &[u8]) -> Result<Self, crate::IdentityError> {
        let malformed = |_| crate::IdentityError::Malformed;
        let chain = CertificateDer::pem_slice_iter(pem).take(files::CHAIN_CERTIFICATES_MAX);
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(malformed)?;
        Self::new(chain, PrivateKeyDer::from_pem_slice(pem).map_err(malformed)?)
    }
}

impl Enrolment {
    /// The identity, if `pem` is a chain for this key.
    pub fn finish_pem(self, pem: &str) -> Result<Identity, crate::IdentityError> {
        let chain = CertificateDer::pem_slice_iter(pem.as_bytes()).take(files::CHAIN_CERTIFICATES_MAX);
        let chain = chain.collect::<Result<Vec<_>, _>>().map_err(|_| crate::IdentityError::Malformed)?;
        self.finish(chain)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt;

    use super::*;
    use crate::Authority;

    fn name(text: &str) -> CertificateName {
        text.to_owned().try_into().unwrap()
    }

    fn mode(path: &Path) -> u32 {
        fs::metadata(path).unwrap().permissions().mode() & 0o777
    }

    #[test]
    fn what_is_kept_is_found_again_and_nobody_else_can_read_it() {
        let state = tempfile::tempdir().unwrap();
        let files = IssuedFiles::at(state.path(), "https://ca.test:14000/dir");
        assert_eq!(files.names().unwrap(), []);
        assert!(files.account().unwrap().is_none());
        files.make().unwrap();
        files.make().unwrap();
        let authority = Authority::create("test").unwrap();
        for text in ["a.test", "*.b.test"] {
            let identity = authority.issue_server(&[text.into()], &[]).unwrap();
            files.save(&name(text), &identity).unwrap();
            assert_eq!(files.load(&name(text)).unwrap().unwrap(), identity);
            assert_eq!(Identity::of_pem(identity.to_pem().as_bytes()).unwrap(), identity);
            assert!(Identity::of_pem(identity.chain_pem().as_bytes()).is_err());
        }
        files.save_account("{}").unwrap();
        assert_eq!(files.account().unwrap().unwrap(), b"{}");
        assert_eq!(files.names().unwrap(), [name("*.b.test"), name("a.test")]);
        assert_eq!(mode(files.directory()), 0o700);
        for entry in fs::read_dir(files.directory()).unwrap() {
            assert_eq!(mode(&entry.unwrap().path()), 0o600);
        }
        files.remove(&name("a.test")).unwrap();
        files.remove(&name("a.test")).unwrap();
        assert!(files.load(&name("a.test")).unwrap().is_none());
        files.remove_account().unwrap();
        assert!(files.account().unwrap().is_none());
    }

    #[test]
    fn a_record_is_known_from_before_it_is_put_until_it_was_taken_away() {
        let state = tempfile::tempdir().unwrap();
        let files = IssuedFiles::at(state.path(), "https://ca.test/dir");
        files.make().unwrap();
        for value in ["one", "two", "two"] {
            files.note_record("_acme-challenge.a.test", value).unwrap();
        }
        let record = |value: &str| ("_acme-challenge.a.test".to_owned(), value.to_owned());
        assert_eq!(files.records().unwrap(), [record("one"), record("two")]);
        files.forget_record("_acme-challenge.a.test", "one").unwrap();
        files.forget_record("_acme-challenge.a.test", "one").unwrap();
        assert_eq!(files.records().unwrap(), [record("two")]);
        assert_eq!(files.names().unwrap(), []);
    }

    #[test]
    fn authorities_have_a_directory_each() {
        let state = Path::new("/state");
        let of = |address: &str| IssuedFiles::at(state, address).directory().to_owned();
        assert_ne!(of("https://ca.test/dir"), of("https://ca.test/staging"));
        assert!(of("https://ca.test:14000/dir").to_str().unwrap().starts_with("/state/acme/ca.test-"));
        assert_eq!(of("https://../../x").parent(), Some(Path::new("/state/acme")));
    }

    #[test]
    fn a_damaged_certificate_is_told() {
        let state = tempfile::tempdir().unwrap();
        let files = IssuedFiles::at(state.path(), "https://ca.test/dir");
        files.make().unwrap();
        fs::write(files.directory().join("a.test.pem"), "half").unwrap();
        fs::write(files.directory().join("notes.txt"), "mine").unwrap();
        assert!(files.load(&name("a.test")).is_err());
        assert_eq!(files.names().unwrap(), [name("a.test")]);
    }
}
