//! Certificates of a public listener that are renewed on disk while it runs.
//!
//! The owner calls [`Reload::reload`] now and then. All files are read and checked before any is used; if one is
//! bad, the table stays as it was, whole.

use std::sync::Arc;

use selvage_config::node::TlsProvider;

use crate::resolver::{Certificates, Resolver, ResolverError};
use crate::{FileError, Identity, PemFiles, TlsError, provider_of};

/// Why the files were not taken.
#[derive(Debug, thiserror::Error)]
pub enum ReloadError {
    /// A file can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The authorities of clients can't be asked for.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The files are good one by one, but make no table.
    #[error(transparent)]
    Resolver(#[from] ResolverError),
}

/// What a reload found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Reloaded {
    /// The files are as they were.
    Unchanged,
    /// There were others; they are in use.
    Changed,
}

/// The files of a listener's certificates and what they held when last read.
#[derive(Debug)]
pub struct Reload {
    named: Vec<PemFiles>,
    default: Option<PemFiles>,
    provider: TlsProvider,
    held: Held,
    resolver: Arc<Resolver>,
}

#[derive(Debug, PartialEq, Eq)]
struct Held {
    named: Vec<Identity>,
    default: Option<Identity>,
}

impl Held {
    fn read(named: &[PemFiles], default: Option<&PemFiles>, provider: TlsProvider) -> Result<Self, FileError> {
        let provider = provider_of(provider);
        let load = |files: &PemFiles| {
            Identity::load(&files.certificate, &files.key)?.signing_with(&provider).map_err(|source| {
                let PemFiles { certificate, key } = files.clone();
                FileError::Identity { certificate, key, source }
            })
        };
        Ok(Self { named: named.iter().map(load).collect::<Result<_, _>>()?, default: default.map(load).transpose()? })
    }

    fn table(&self) -> Result<Certificates, ResolverError> {
        let table = Certificates::of(&self.named)?;
        Ok(match &self.default {
            Some(identity) => table.with_default(identity),
            None => table,
        })
    }
}

impl Reload {
    /// Reads the files for the first time. `named` are found by the names in them; `default` is for every other
    /// name and may be one of `named` too. `provider` makes the signatures.
    pub fn open(named: Vec<PemFiles>, default: Option<PemFiles>, provider: TlsProvider) -> Result<Self, ReloadError> {
        let held = Held::read(&named, default.as_ref(), provider)?;
        let resolver = Arc::new(Resolver::new(held.table()?));
        Ok(Self { named, default, provider, held, resolver })
    }

    /// What the listeners look into.
    pub fn resolver(&self) -> Arc<Resolver> {
        Arc::clone(&self.resolver)
    }

    /// The identities in use, the default last: for telling when they end.
    pub fn identities(&self) -> impl Iterator<Item = &Identity> {
        self.held.named.iter().chain(&self.held.default)
    }

    /// Reads the files again and puts them in place if they changed. It blocks on the disk. On an error the old
    /// certificates stay in use, and the next call tries again.
    pub fn reload(&mut self) -> Result<Reloaded, ReloadError> {
        let held = Held::read(&self.named, self.default.as_ref(), self.provider)?;
        if held == self.held {
            return Ok(Reloaded::Unchanged);
        }
        self.resolver.swap(held.table()?);
        self.held = held;
        Ok(Reloaded::Changed)
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::path::Path;

    use super::*;
    use crate::Authority;

    fn files(directory: &Path, name: &str) -> PemFiles {
        PemFiles { certificate: directory.join(format!("{name}.pem")), key: directory.join(format!("{name}-key.pem")) }
    }

    fn put(files: &PemFiles, name: &str) {
        let authority = Authority::create("test").unwrap();
        let identity = authority.issue_server(&[name.to_owned()], &[]).unwrap();
        identity.save(&files.certificate, &files.key).unwrap();
    }

    fn two(directory: &Path) -> (PemFiles, PemFiles, Reload) {
        let (one, other) = (files(directory, "one"), files(directory, "other"));
        put(&one, "one.test");
        put(&other, "other.test");
        let reload = Reload::open(vec![one.clone(), other.clone()], Some(one.clone()), TlsProvider::default()).unwrap();
        (one, other, reload)
    }

    #[test]
    fn files_that_did_not_change_are_not_swapped() {
        let directory = tempfile::tempdir().unwrap();
        let (_, _, mut reload) = two(directory.path());
        let before = reload.resolver().table();
        assert_eq!(reload.reload().unwrap(), Reloaded::Unchanged);
        assert!(Arc::ptr_eq(&before, &reload.resolver().table()));
        assert_eq!(reload.identities().count(), 3);
    }

    #[test]
    fn renewed_files_are_put_in_place() {
        let directory = tempfile::tempdir().unwrap();
        let (one, _, mut reload) = two(directory.path());
        let resolver = reload.resolver();
        put(&one, "renewed.test");
        assert_eq!(reload.reload().unwrap(), Reloaded::Changed);
        let table = resolver.table();
        assert!(table.knows("renewed.test") && table.knows("other.test") && !table.knows("one.test"));
        assert_eq!(reload.reload().unwrap(), Reloaded::Unchanged);
    }

    /// Does `harm`, and asserts that the table stays and that mending is noticed.
    fn keeps_the_old(harm: impl FnOnce(&PemFiles)) -> ReloadError {
        let directory = tempfile::tempdir().unwrap();
        let (one, other, mut reload) = two(directory.path());
        let before = reload.resolver().table();
        // The first file is good and new: it must not be taken alone.
        put(&one, "renewed.test");
        harm(&other);
        let error = reload.reload().unwrap_err();
        assert!(Arc::ptr_eq(&before, &reload.resolver().table()), "{error:?}");
        put(&other, "mended.test");
        assert_eq!(reload.reload().unwrap(), Reloaded::Changed);
        let table = reload.resolver().table();
        assert!(table.knows("renewed.test") && table.knows("mended.test"));
        error
    }

    #[test]
    fn a_bad_file_keeps_every_old_certificate() {
        let error = keeps_the_old(|files| fs::write(&files.certificate, "nonsense").unwrap());
        assert!(matches!(error, ReloadError::File(FileError::Certificates { .. })), "{error:?}");
        let error = keeps_the_old(|files| fs::remove_file(&files.key).unwrap());
        assert!(matches!(error, ReloadError::File(FileError::Read { .. })), "{error:?}");
        assert!(error.to_string().contains("other-key.pem"), "{error}");
    }

    #[test]
    fn a_key_that_does_not_fit_yet_keeps_every_old_certificate() {
        let error = keeps_the_old(|other| {
            let key = fs::read(&other.key).unwrap();
            put(other, "half.test");
            fs::write(&other.key, key).unwrap();
        });
        assert!(matches!(error, ReloadError::File(FileError::Identity { .. })), "{error:?}");
    }

    #[test]
    fn certificates_that_claim_one_name_keep_every_old_one() {
        let error = keeps_the_old(|other| put(other, "renewed.test"));
        assert!(matches!(error, ReloadError::Resolver(ResolverError::Taken { .. })), "{error:?}");
    }

    #[test]
    fn bad_files_are_refused_at_the_start() {
        let directory = tempfile::tempdir().unwrap();
        let missing = files(directory.path(), "missing");
        assert!(Reload::open(vec![missing.clone()], None, TlsProvider::Ring).is_err());
        assert!(Reload::open(Vec::new(), Some(missing), TlsProvider::Ring).is_err());
    }
}
