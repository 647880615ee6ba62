//! Backups: all that a control plane remembers, in one file that is checked by its own sums.
//!
//! A backup is a tar file, so that it can be looked into with what is everywhere: [`CONTENTS`] first, the records
//! ([`FLEET`], [`REGISTRY`]) as lines of JSON, the audit log, every blob, and [`SUMS`] last, as `sha256sum` writes them:
//! a file that was cut short has none. No key is in it. Values of variables and secrets are sealed in it as they are on
//! the disk, so it is worth nothing without the sealing key, which is kept apart, and opened by no other.

mod read;
mod restore;
mod write;

use std::io;
use std::path::PathBuf;

use selvage_config::Digest;
use serde::{Deserialize, Serialize};

pub use read::check;
pub use restore::{ADVANCE, Restored, restore};
pub(crate) use write::{Pipe, write};

use crate::registry::RegistryError;
use crate::state::StateError;

/// The version of all this.
const FORMAT: u32 = 1;
/// What the backup holds: [`Contents`].
const CONTENTS: &str = "backup.json";
/// Apps, nodes and who may join: lines of a key and a value.
const FLEET: &str = "fleet.jsonl";
/// Who has which blobs and manifests: lines of a key and a value.
const REGISTRY: &str = "registry.jsonl";
/// The audit log, the older file first.
const AUDIT: [&str; 2] = ["audit.1.jsonl", "audit.jsonl"];
/// Before the digest in a blob's name.
const BLOBS: &str = "blobs/";
/// The sums of all that came before.
const SUMS: &str = "SHA256SUMS";

/// What a backup holds.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Contents {
    /// The version of the backup's form.
    pub format: u32,
    /// The program that made it.
    pub version: String,
    /// When, milliseconds since 1970.
    pub made_ms: u64,
    /// The generation of the plans that it says.
    pub generation: u64,
    /// Apps, removed ones included, whose numbers must not be given again.
    pub apps: usize,
    /// Nodes.
    pub nodes: usize,
    /// Releases that plans name: `app@number`.
    pub releases: Vec<String>,
    /// Blobs and manifests.
    pub blobs: usize,
    /// Their bytes.
    pub blobs_bytes: u64,
    /// Which key opens the values in it: the beginning of a hash, not the key.
    pub sealing_key: String,
}

/// One row of the database.
#[derive(Debug, Serialize, Deserialize)]
struct Row(#[serde(with = "base64_text")] Vec<u8>, #[serde(with = "base64_text")] Vec<u8>);

/// A backup that can't be made, read or put back.
#[derive(Debug, thiserror::Error)]
pub enum BackupError {
    /// A file can't be used.
    #[error("use {path}")]
    File {
        /// Which.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// It can't be read, or is no tar file.
    #[error("read the backup")]
    Read(#[source] io::Error),
    /// Its end is missing.
    #[error("the backup was cut short: it has no {SUMS} at its end")]
    Cut,
    /// A newer program made it, or it is none.
    #[error("the backup has format {found}, this program reads {FORMAT}")]
    Format {
        /// Its format.
        found: u32,
    },
    /// Something in it is not what was put there.
    #[error("{name} in the backup is not what was put there")]
    Sum {
        /// Which.
        name: String,
    },
    /// Something is in it that does not belong there, is missing, or stands in the wrong place.
    #[error("{name:?} in the backup {wrong}")]
    Form {
        /// Which.
        name: String,
        /// What is wrong with it.
        wrong: &'static str,
    },
    /// There is a state already.
    #[error("{0} holds something already, and nothing is overwritten")]
    Occupied(PathBuf),
    /// An earlier restore was broken off.
    #[error("{0} was left by a restore that was broken off: remove it first")]
    Left(PathBuf),
    /// The key is another one.
    #[error("the backup was sealed with key {sealed}, {path} is key {given}")]
    Key {
        /// The backup's key.
        sealed: String,
        /// What was given.
        given: String,
        /// Where it lies.
        path: PathBuf,
    },
    /// There is no key.
    #[error("the backup was sealed with key {0}, and no sealing key was given")]
    NoKey(String),
    /// A blob that the records name is not there, or not as it was.
    #[error("blob {0} is missing or damaged")]
    Blob(Digest),
    /// The database can't be read or written.
    #[error("use the database")]
    State(#[source] Box<dyn std::error::Error + Send + Sync>),
}

impl From<StateError> for BackupError {
    fn from(error: StateError) -> Self {
        Self::State(Box::new(error))
    }
}

impl From<RegistryError> for BackupError {
    fn from(error: RegistryError) -> Self {
        Self::State(Box::new(error))
    }
}

impl From<sled::Error> for BackupError {
    fn from(error: sled::Error) -> Self {
        Self::State(Box::new(error))
    }
}

mod base64_text {
    use base64::Engine as _;
    use base64::engine::general_purpose::STANDARD;
    use serde::{Deserialize, Deserializer, Serializer, de};

    pub(super) fn serialize<S: Serializer>(bytes: &[u8], serializer: S) -> Result<S::Ok, S::Error> {
        serializer.serialize_str(&STANDARD.encode(bytes))
    }

    pub(super) fn deserialize<'d, D: Deserializer<'d>>(deserializer: D) -> Result<Vec<u8>, D::Error> {
        let text = String::deserialize(deserializer)?;
        STANDARD.decode(text).map_err(de::Error::custom)
    }
}
