//! How another authority takes the place of one, in three steps with time between them.
//!
//! First both are believed and the old one issues ([`Rotation::Begin`]); then the new one issues ([`Rotation::Switch`]);
//! then the old one is forgotten ([`Rotation::Finish`]). `ca.pem` holds all that are believed, and of these the one issues
//! whose key `ca-key.pem` is; so each step is one rename, and a step that was cut short is done again.

use std::fs;
use std::path::Path;

use rustls_pki_types::CertificateDer;

use super::{
    Authority, AuthorityError, CERTIFICATE_FILE, COMMON_NAME_DEFAULT, KEY_FILE, certificate_of, locked, read_key,
};
use crate::files::{self, FileError, Readers};
use rcgen::KeyPair;

/// File of the key of the authority that is to issue next.
const NEXT_KEY_FILE: &str = "ca-next-key.pem";
/// File of the key of the authority that issued before.
const OLD_KEY_FILE: &str = "ca-old-key.pem";

/// A step from one authority to another.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// A new authority is made and believed beside the old one, which goes on issuing.
    Begin,
    /// The new one issues; both are believed.
    Switch,
    /// The old one is believed no more.
    Finish,
}

/// Why a step is not taken.
#[derive(Debug, thiserror::Error)]
pub enum RotationError {
    /// The authority can't be used.
    #[error(transparent)]
    Authority(#[from] AuthorityError),
    /// A file can't be used.
    #[error(transparent)]
    File(#[from] FileError),
    /// The steps come one after the other.
    #[error("{0}")]
    Order(&'static str),
}

impl Authority {
    /// Takes one step in the directory of an authority.
    ///
    /// # Errors
    /// [`RotationError`]. The directory is as before, or the same step can be taken again.
    pub fn rotate(directory: &Path, step: Rotation) -> Result<(), RotationError> {
        let _lock = locked(directory)?;
        let path = |name: &str| directory.join(name);
        let (certificates, key) = (path(CERTIFICATE_FILE), path(KEY_FILE));
        let (next_key, old_key) = (path(NEXT_KEY_FILE), path(OLD_KEY_FILE));
        let all = files::chain(&certificates)?;
        let own = certificate_of(&all, &read_key(&key)?);
        let own = own.ok_or(RotationError::Order("no certificate in ca.pem is that of ca-key.pem"))?.clone();
        match step {
            Rotation::Begin if old_key.exists() => {
                Err(RotationError::Order("the last rotation is not finished: first `finish`"))
            }
            Rotation::Begin => {
                // The key is written first: this is where a step that was cut short is taken up again.
                let next = match next_key.exists() {
                    true => read_key(&next_key)?,
                    false => KeyPair::generate().map_err(AuthorityError::Make)?,
                };
                if certificate_of(&all, &next).is_some() {
                    return Ok(());
                }
                files::write(&next_key, &next.serialize_pem(), Readers::Owner)?;
                let next = Self::with_key(COMMON_NAME_DEFAULT, next)?;
                Ok(files::write(&certificates, &files::chain_pem(&[own, next.certificate]), Readers::Everyone)?)
            }
            Rotation::Switch if !next_key.exists() => {
                Err(RotationError::Order("there is no authority to switch to: first `begin`"))
            }
            Rotation::Switch => {
                let next = read_key(&next_key)?;
                if certificate_of(&all, &next).is_none() {
                    return Err(RotationError::Order("nobody believes the next authority yet: `begin` again"));
                }
                files::write(&old_key, &read_key(&key)?.serialize_pem(), Readers::Owner)?;
                Ok(renamed(&next_key, &key)?)
            }
            Rotation::Finish if next_key.exists() || !old_key.exists() => {
                Err(RotationError::Order("the new authority does not issue yet: first `switch`"))
            }
            Rotation::Finish => {
                let only: [CertificateDer<'_>; 1] = [own];
                files::write(&certificates, &files::chain_pem(&only), Readers::Everyone)?;
                let failed = |source| FileError::Write { path: old_key.clone(), source };
                Ok(fs::remove_file(&old_key).map_err(failed)?)
            }
        }
    }
}

fn renamed(from: &Path, to: &Path) -> Result<(), FileError> {
    let failed = |source| FileError::Write { path: to.to_owned(), source };
    fs::rename(from, to).map_err(failed)?;
    let directory = to.parent().unwrap_or(Path::new("."));
    fs::File::open(directory).and_then(|directory| directory.sync_all()).map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{Anchors, Role, roots_from_pem};

    fn step(directory: &Path, step: Rotation) -> Result<(), RotationError> {
        Authority::rotate(directory, step)
    }

    #[test]
    fn the_new_authority_issues_once_all_believe_it_and_the_old_one_is_forgotten_last() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let old = Authority::open_or_create(at).unwrap();
        let issuing = || Authority::open_or_create(at).unwrap();
        let issue = || issuing().issue_identity(&Role::ControlPlane, &[], &[]).unwrap();
        let believed = |identity: &crate::Identity| {
            let anchors = Anchors::new(roots_from_pem(at.join(CERTIFICATE_FILE)).unwrap()).unwrap();
            anchors.vouch_for(identity, std::time::SystemTime::now())
        };
        let first = issue();
        for early in [Rotation::Switch, Rotation::Finish] {
            assert!(matches!(step(at, early), Err(RotationError::Order(_))), "{early:?}");
        }
        step(at, Rotation::Begin).unwrap();
        assert_eq!(issuing().certificate_der(), old.certificate_der());
        let text = fs::read(at.join(CERTIFICATE_FILE)).unwrap();
        step(at, Rotation::Begin).unwrap();
        assert_eq!(fs::read(at.join(CERTIFICATE_FILE)).unwrap(), text, "a step that was taken is not taken twice");
        assert!(matches!(step(at, Rotation::Finish), Err(RotationError::Order(_))));

        step(at, Rotation::Switch).unwrap();
        let second = issue();
        assert_ne!(issuing().certificate_der(), old.certificate_der());
        assert!(believed(&first) && believed(&second));
        assert!(matches!(step(at, Rotation::Begin), Err(RotationError::Order(_))));

        step(at, Rotation::Finish).unwrap();
        assert!(!believed(&first) && believed(&second));
        assert!(!at.join(OLD_KEY_FILE).exists() && !at.join(NEXT_KEY_FILE).exists());
        step(at, Rotation::Begin).unwrap();
    }

    #[test]
    fn a_step_that_was_cut_short_is_taken_up_again() {
        let directory = tempfile::tempdir().unwrap();
        let at = directory.path();
        let old = Authority::open_or_create(at).unwrap();
        // After the key and before the certificate.
        let key = KeyPair::generate().unwrap().serialize_pem();
        files::write(&at.join(NEXT_KEY_FILE), &key, Readers::Owner).unwrap();
        assert!(matches!(step(at, Rotation::Switch), Err(RotationError::Order(_))));
        step(at, Rotation::Begin).unwrap();
        assert_eq!(fs::read_to_string(at.join(NEXT_KEY_FILE)).unwrap(), key);
        // After the copy of the old key and before the rename.
        fs::copy(at.join(KEY_FILE), at.join(OLD_KEY_FILE)).unwrap();
        step(at, Rotation::Switch).unwrap();
        assert_ne!(Authority::open_or_create(at).unwrap().certificate_der(), old.certificate_der());
        step(at, Rotation::Finish).unwrap();
    }
}
