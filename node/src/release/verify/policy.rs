//! Whose word counts here: the policy file with its keys and trust roots read, ready to judge by.

use std::fmt;
use std::io::Read as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use regex_lite::Regex;
use selvage_config::Invalid;
use selvage_config::key::{KeyError, PublicKey};
use selvage_config::policy as document;

use super::keyless::Authorities;

/// Largest file of a key, bytes.
const KEY_BYTES_MAX: u64 = 64 * 1024;
/// Largest `trusted_root.json`, bytes.
const TRUSTED_ROOT_BYTES_MAX: u64 = 4 * 1024 * 1024;

/// Whose word counts. A node makes it from its own configuration; a plan has no say in it.
#[derive(Debug, Clone)]
pub enum Policy {
    /// The first rule that covers an app decides about it. None does: it does not run.
    Rules(Vec<Rule>),
    /// `selvage up`: files that the operator names on the command line. No configuration can produce it.
    LocalFiles,
}

/// Who must have signed some apps.
#[derive(Debug, Clone)]
pub struct Rule {
    pub(super) document: document::Rule,
    pub(super) signers: Vec<Signer>,
    pub(super) demands: Vec<Demand>,
}

/// An attestation that must be there.
#[derive(Debug, Clone)]
pub(super) struct Demand {
    pub(super) document: document::Demand,
    pub(super) signers: Vec<Signer>,
}

/// Somebody whose signature counts.
#[derive(Debug, Clone)]
pub(super) struct Signer {
    /// What verdicts call it.
    pub(super) title: String,
    pub(super) who: Who,
    /// Whether the signature must be in a transparency log.
    pub(super) log: bool,
    /// Whether the certificate must be in a certificate transparency log.
    pub(super) certificate_log: bool,
    pub(super) authorities: Option<Arc<Authorities>>,
}

#[derive(Debug, Clone)]
pub(super) enum Who {
    Key(PublicKey),
    Identity { identity: Name, issuer: Name },
}

/// A name that must be one, or fit whole.
#[derive(Clone)]
pub(super) enum Name {
    Exact(String),
    Pattern(Regex),
}

/// Why a policy can't be used.
#[derive(Debug, thiserror::Error)]
pub enum PolicyError {
    /// A file can't be read.
    #[error("read {path}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The document is wrong.
    #[error("policy")]
    Document(#[from] Invalid),
    /// A trusted key is none.
    #[error("trusted key {path}")]
    Key {
        /// The file.
        path: PathBuf,
        /// Why not.
        source: KeyError,
    },
    /// A `trusted_root.json` is none.
    #[error("trusted root {path}: {reason}")]
    Authorities {
        /// The file.
        path: PathBuf,
        /// Why not.
        reason: String,
    },
    /// A signer that the document's check lets through and that is none.
    #[error("signer {0:?} is neither a key nor an identity with an issuer")]
    Signer(String),
}

impl Policy {
    /// Signatures by any one of these keys, for every app. None: nothing runs. `legacy`: cosign 2's `.sig` tags count
    /// where an artifact has no bundle.
    pub fn keys(keys: Vec<PublicKey>, legacy: bool) -> Self {
        let signer = |key: PublicKey| Signer {
            title: key.id().to_string(),
            who: Who::Key(key),
            log: false,
            certificate_log: false,
            authorities: None,
        };
        let document = document::Rule::of(Vec::new(), legacy);
        Self::Rules(vec![Rule { document, signers: keys.into_iter().map(signer).collect(), demands: Vec::new() }])
    }

    /// Reads the keys of a node's file. It blocks on the disk.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn of_key_files(paths: &[PathBuf], legacy: bool) -> Result<Self, PolicyError> {
        Ok(Self::keys(paths.iter().map(|path| read_key(path)).collect::<Result<_, _>>()?, legacy))
    }

    /// Reads a policy file, its keys and its trust roots. It blocks on the disk.
    ///
    /// # Errors
    /// [`PolicyError`].
    pub fn load(path: &Path) -> Result<Self, PolicyError> {
        let text = String::from_utf8_lossy(&read(path, document::POLICY_BYTES_MAX as u64)?).into_owned();
        let policy = document::Policy::parse(path, &text)?;
        Ok(Self::Rules(policy.rules.into_iter().map(Rule::load).collect::<Result<_, _>>()?))
    }
}

impl Rule {
    fn load(document: document::Rule) -> Result<Self, PolicyError> {
        let signers = document.signers.iter().map(Signer::load).collect::<Result<_, _>>()?;
        let demand = |demand: &document::Demand| {
            let signers = demand.signers.iter().map(Signer::load).collect::<Result<_, PolicyError>>()?;
            Ok(Demand { document: demand.clone(), signers })
        };
        let demands = document.attestations.iter().map(demand).collect::<Result<_, PolicyError>>()?;
        Ok(Self { document, signers, demands })
    }
}

impl Signer {
    fn load(document: &document::Signer) -> Result<Self, PolicyError> {
        let title = document.title();
        let name = |exact: &Option<String>, pattern: Option<&document::Pattern>| match (exact, pattern) {
            (Some(exact), _) => Some(Name::Exact(exact.clone())),
            (None, Some(pattern)) => document::whole(pattern.get_ref()).ok().map(Name::Pattern),
            (None, None) => None,
        };
        let identity = name(&document.identity, document.identity_pattern.as_ref());
        let issuer = name(&document.issuer, document.issuer_pattern.as_ref());
        let who = match (&document.key, identity, issuer) {
            (Some(key), None, None) => Who::Key(read_key(key)?),
            (None, Some(identity), Some(issuer)) => Who::Identity { identity, issuer },
            _ => return Err(PolicyError::Signer(title)),
        };
        let log = document.log.unwrap_or(matches!(who, Who::Identity { .. }));
        let authorities = document.trusted_root.as_deref().map(read_authorities).transpose()?;
        if authorities.is_none() && (log || matches!(who, Who::Identity { .. })) {
            return Err(PolicyError::Signer(title));
        }
        Ok(Self { title, who, log, certificate_log: document.certificate_log.unwrap_or(true), authorities })
    }
}

impl Name {
    /// Whether `text` is this name.
    pub(super) fn fits(&self, text: &str) -> bool {
        match self {
            Self::Exact(exact) => exact == text,
            Self::Pattern(pattern) => pattern.is_match(text),
        }
    }
}

impl fmt::Debug for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Exact(exact) => f.write_str(exact),
            Self::Pattern(pattern) => f.write_str(pattern.as_str()),
        }
    }
}

fn read(path: &Path, bytes_max: u64) -> Result<Vec<u8>, PolicyError> {
    let mut bytes = Vec::new();
    let read = std::fs::File::open(path).and_then(|file| file.take(bytes_max + 1).read_to_end(&mut bytes));
    let read = read.and_then(|_| {
        let fits = bytes.len() as u64 <= bytes_max;
        if fits { Ok(()) } else { Err(std::io::ErrorKind::FileTooLarge.into()) }
    });
    read.map_err(|source| PolicyError::File { path: path.to_owned(), source })?;
    Ok(bytes)
}

fn read_key(path: &Path) -> Result<PublicKey, PolicyError> {
    let pem = read(path, KEY_BYTES_MAX)?;
    PublicKey::from_pem(&pem).map_err(|source| PolicyError::Key { path: path.to_owned(), source })
}

fn read_authorities(path: &Path) -> Result<Arc<Authorities>, PolicyError> {
    let text = String::from_utf8_lossy(&read(path, TRUSTED_ROOT_BYTES_MAX)?).into_owned();
    let read = Authorities::from_json(&text).map(Arc::new);
    read.map_err(|error| PolicyError::Authorities { path: path.to_owned(), reason: error.to_string() })
}
