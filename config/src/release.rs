//! A release: one immutable app version.

use std::collections::BTreeMap;
use std::fmt;

use serde::{Deserialize, Serialize};

use crate::oci::Repository;
use crate::{AppName, Digest};

/// A release's name: the app and a number that only grows, written `hello@3`.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ReleaseId {
    /// The app.
    pub app: AppName,
    /// 1 for the first.
    pub number: u32,
}

/// Text that names no release.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0:?} names no release: expected app@number, as in hello@3")]
pub struct ReleaseIdError(String);

impl std::str::FromStr for ReleaseId {
    type Err = ReleaseIdError;
    fn from_str(text: &str) -> Result<Self, ReleaseIdError> {
        let error = || ReleaseIdError(text.to_owned());
        let (app, number) = text.split_once('@').ok_or_else(error)?;
        let number = number.parse().ok().filter(|n| *n > 0).ok_or_else(error)?;
        Ok(Self { app: app.parse().map_err(|_| error())?, number })
    }
}

impl TryFrom<String> for ReleaseId {
    type Error = ReleaseIdError;
    fn try_from(text: String) -> Result<Self, ReleaseIdError> {
        text.parse()
    }
}

impl From<ReleaseId> for String {
    fn from(id: ReleaseId) -> String {
        id.to_string()
    }
}

impl fmt::Display for ReleaseId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}@{}", self.app, self.number)
    }
}

/// A release. What it runs is fixed by the manifest's digest, which is also what is signed: the manifest names the app
/// document and every blob by digest.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Release {
    /// Its name.
    pub id: ReleaseId,
    /// Where the manifest lies in the registry.
    pub repository: Repository,
    /// The manifest.
    pub manifest: Digest,
    /// Values of variables, given at deployment. Not part of what is signed; may be secret.
    #[serde(default)]
    pub variables: BTreeMap<String, String>,
    /// When it was made, milliseconds since 1970.
    pub created_ms: u64,
    /// Who made it.
    pub created_by: String,
}

impl fmt::Debug for Release {
    /// Without the variables' values: one may be a secret.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Release({} {}@{})", self.id, self.repository, self.manifest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_release_is_named_by_app_and_number() {
        let id: ReleaseId = "hello@3".parse().unwrap();
        assert_eq!(id.to_string(), "hello@3");
        for bad in ["hello", "hello@", "hello@0", "hello@x", "@1", "Hello@1"] {
            assert!(bad.parse::<ReleaseId>().is_err(), "{bad}");
        }
    }

    #[test]
    fn debug_shows_no_variable() {
        let release = Release {
            id: "hello@1".parse().unwrap(),
            repository: "acme/hello".parse().unwrap(),
            manifest: Digest::of(b""),
            variables: [("token".to_owned(), "s3cret".to_owned())].into(),
            created_ms: 0,
            created_by: "ops".into(),
        };
        assert!(!format!("{release:?}").contains("s3cret"));
    }
}
