//! The audit log: who changed what, one JSON object a line, appended and never rewritten.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use crate::access::OperatorId;
use crate::disk;

/// A file of this size is set aside as `audit.1.jsonl`, in place of the one before, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;

/// One change.
#[derive(Debug, Serialize)]
struct Line {
    at_ms: u64,
    who: String,
    what: &'static str,
    /// What was changed: an app, a node, a blob.
    subject: String,
    /// The new value, where there is one.
    value: String,
}

/// The log.
#[derive(Debug, Clone)]
pub(crate) struct Audit(Arc<Mutex<Open>>);

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: File,
    bytes: u64,
}

impl Audit {
    /// Opens the log for appending.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let file = append(path)?;
        let bytes = file.metadata()?.len();
        Ok(Self(Arc::new(Mutex::new(Open { path: path.to_owned(), file, bytes }))))
    }

    /// Notes a change that was made. It is on disk on return; when the disk refuses, the change stands and the
    /// program's log has it.
    pub(crate) async fn note(
        &self,
        who: &OperatorId,
        what: &'static str,
        subject: impl ToString,
        value: impl ToString,
    ) {
        let (who, subject, value) = (who.to_string(), subject.to_string(), value.to_string());
        tracing::info!(target: "audit", who, what, subject, value);
        let line = Line { at_ms: now_ms(), who, what, subject, value };
        let log = self.clone();
        disk::wait(move || {
            let mut open = log.0.lock().unwrap_or_else(PoisonError::into_inner);
            if let Err(error) = open.write(&line) {
                tracing::error!(%error, path = %open.path.display(), "can't write the audit log");
            }
        })
        .await;
    }
}

impl Open {
    fn write(&mut self, line: &Line) -> io::Result<()> {
        if self.bytes >= FILE_BYTES_MAX {
            fs::rename(&self.path, self.path.with_extension("1.jsonl"))?;
            self.file = append(&self.path)?;
            self.bytes = 0;
        }
        let mut text = serde_json::to_vec(line)?;
        text.push(b'\n');
        self.file.write_all(&text)?;
        self.bytes += text.len() as u64;
        self.file.sync_data()
    }
}

fn append(path: &Path) -> io::Result<File> {
    OpenOptions::new().append(true).create(true).mode(0o600).open(path)
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
