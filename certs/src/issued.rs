//! Where a node keeps its ACME account and the certificates that it got.
//!
//! A directory for each authority, so that certificates of a trial are not shown when the real one is named. Each
//! certificate is one file, key and chain, replaced in one step; only the node's user can read any of it.

use std::fs::{self, DirBuilder};
use std::io::ErrorKind;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

use ring::digest::{SHA256, digest};
use rustls_pki_types::CertificateDer;
use rustls_pki_types::pem::PemObject;
use selvage_config::node::CertificateName;

use crate::files::{self, FileError, Readers};
use crate::{Enrolment, Identity};

/// Below the state directory.
const DIRECTORY: &str = "acme";
/// The account.
const ACCOUNT: &str = "account.json";
/// What certificates end with.
const PEM: &str = ".pem";
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
        let failed = |source| FileError::Read { path: self.directory.clone(), source };
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
        let text = files::key_pem(identity.key()) + &identity.chain_pem();
        files::write(&self.path(name), &text, Readers::Owner)
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
