//! The audit log: who changed what, from what to what. One JSON object a line, appended and never rewritten; each line
//! carries the hash of the line before, so that one that is changed, left out or put in is found.

mod chain;

use std::fs::{self, File, OpenOptions};
use std::io::{self, BufRead as _, BufReader, Read as _, Seek as _, SeekFrom, Write as _};
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use selvage_config::Digest;

use crate::disk;

pub use chain::{ChainError, Line, Verified, verify};

/// A file of this size is set aside as `audit.1.jsonl`, in place of the one before, bytes.
const FILE_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// Bytes of one line; what it tells of values is cut to fit.
const LINE_BYTES_MAX: u64 = 64 * 1024;
/// Characters of a value that are kept.
const VALUE_CHARS_MAX: usize = 2_000;
/// Who did what nobody asked for: a rollout that goes on by itself.
pub(crate) const SELF: &str = "control plane";

/// The log.
#[derive(Debug, Clone)]
pub(crate) struct Audit(Arc<Mutex<Open>>);

#[derive(Debug)]
struct Open {
    path: PathBuf,
    file: File,
    bytes: u64,
    /// The number of the next line, and the hash of the last.
    next: u64,
    last: Digest,
}

impl Audit {
    /// Opens the log for appending. A line that a crash cut short was never told to anybody, and is cut off.
    pub(crate) fn open(path: &Path) -> io::Result<Self> {
        let mut file = OpenOptions::new().read(true).append(true).create(true).mode(0o600).open(path)?;
        let mut bytes = file.metadata()?.len();
        let mut tail = last_line(&mut file, bytes)?;
        if let Some((text, false)) = &tail {
            bytes -= text.len() as u64;
            file.set_len(bytes)?;
            tail = last_line(&mut file, bytes)?;
        }
        let before = match tail {
            Some((text, _)) => Some(text),
            // The file is new: the line before its first stands in the one that was set aside.
            None => match File::open(set_aside(path)) {
                Ok(mut old) => {
                    let length = old.metadata()?.len();
                    last_line(&mut old, length)?.map(|(text, _)| text)
                }
                Err(error) if error.kind() == io::ErrorKind::NotFound => None,
                Err(error) => return Err(error),
            },
        };
        let (next, last) = match before {
            None => (0, chain::BEGIN),
            Some(text) => {
                let number = serde_json::from_slice::<Line>(&text).map(|line| line.number);
                (number.map_or(0, |number| number + 1), Digest::of(text.trim_ascii_end()))
            }
        };
        Ok(Self(Arc::new(Mutex::new(Open { path: path.to_owned(), file, bytes, next, last }))))
    }

    /// Notes a change that was made. It is on disk on return; when the disk refuses, the change stands and the
    /// program's log has it.
    pub(crate) async fn note(
        &self,
        who: impl ToString,
        what: &'static str,
        subject: impl ToString,
        after: impl ToString,
    ) {
        self.note_change(who, what, subject, "", after).await;
    }

    /// The same of something that was there before.
    pub(crate) async fn note_change(
        &self,
        who: impl ToString,
        what: &'static str,
        subject: impl ToString,
        before: impl ToString,
        after: impl ToString,
    ) {
        let cut = |text: String| text.chars().take(VALUE_CHARS_MAX).collect::<String>();
        let (who, subject) = (cut(who.to_string()), cut(subject.to_string()));
        let (before, after) = (cut(before.to_string()), cut(after.to_string()));
        tracing::info!(target: "audit", who, what, subject, before, after);
        let log = self.clone();
        disk::wait(move || {
            let mut open = log.0.lock().unwrap_or_else(PoisonError::into_inner);
            let line = Line {
                number: open.next,
                at_ms: now_ms(),
                who,
                what: what.to_owned(),
                subject,
                before,
                after,
                last: open.last,
            };
            if let Err(error) = open.write(&line) {
                tracing::error!(%error, path = %open.path.display(), "can't write the audit log");
            }
        })
        .await;
    }

    /// Notes a restore; waits on the disk.
    pub(crate) fn note_restore(&self, before: String, after: String) -> io::Result<()> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let (who, what, subject) = (SELF.to_owned(), "state.restore".to_owned(), "state".to_owned());
        let line = Line { number: open.next, at_ms: now_ms(), who, what, subject, before, after, last: open.last };
        open.write(&line)
    }

    /// The log's files, the older first, and how many of their bytes are whole lines.
    pub(crate) fn files(&self) -> io::Result<[Option<(File, u64)>; 2]> {
        // Under the lock: no line is half written, and no file changes its name.
        let open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let older = match File::open(set_aside(&open.path)) {
            Ok(file) => Some((file.metadata()?.len(), file)),
            Err(error) if error.kind() == io::ErrorKind::NotFound => None,
            Err(error) => return Err(error),
        };
        let current = File::open(&open.path)?;
        Ok([older.map(|(bytes, file)| (file, bytes)), Some((current, open.bytes))])
    }

    /// Lines from number `from` on, at most `max`, as they stand in the file; waits on the disk.
    pub(crate) fn read(&self, from: u64, max: usize) -> io::Result<Vec<u8>> {
        let path = self.0.lock().unwrap_or_else(PoisonError::into_inner).path.clone();
        let mut found = Vec::new();
        let mut count = 0;
        for path in [set_aside(&path), path] {
            let file = match File::open(path) {
                Ok(file) => file,
                Err(error) if error.kind() == io::ErrorKind::NotFound => continue,
                Err(error) => return Err(error),
            };
            for line in BufReader::new(file).split(b'\n') {
                let line = line?;
                let number = serde_json::from_slice::<Line>(&line).map_or(u64::MAX, |line| line.number);
                if number >= from && count < max {
                    count += 1;
                    found.extend_from_slice(&line);
                    found.push(b'\n');
                }
            }
        }
        Ok(found)
    }
}

fn set_aside(path: &Path) -> PathBuf {
    path.with_extension("1.jsonl")
}

/// The last line of a file of this length with its line end, and whether it has one.
fn last_line(file: &mut File, length: u64) -> io::Result<Option<(Vec<u8>, bool)>> {
    let start = length.saturating_sub(LINE_BYTES_MAX);
    file.seek(SeekFrom::Start(start))?;
    let mut tail = Vec::new();
    file.take(length - start).read_to_end(&mut tail)?;
    let body = tail.strip_suffix(b"\n").unwrap_or(&tail);
    if tail.is_empty() {
        return Ok(None);
    }
    let begin = body.iter().rposition(|byte| *byte == b'\n').map_or(0, |at| at + 1);
    Ok(Some((tail[begin..].to_vec(), tail.ends_with(b"\n"))))
}

impl Open {
    fn write(&mut self, line: &Line) -> io::Result<()> {
        if self.bytes >= FILE_BYTES_MAX {
            fs::rename(&self.path, set_aside(&self.path))?;
            self.file = OpenOptions::new().append(true).create(true).mode(0o600).open(&self.path)?;
            self.bytes = 0;
        }
        let mut text = serde_json::to_vec(line)?;
        let hash = Digest::of(&text);
        text.push(b'\n');
        self.file.write_all(&text)?;
        self.bytes += text.len() as u64;
        self.file.sync_data()?;
        (self.next, self.last) = (line.number + 1, hash);
        Ok(())
    }
}

/// Milliseconds since 1970.
pub(crate) fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or(Duration::ZERO);
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;

    async fn note(audit: &Audit, subject: &str) {
        audit.note_change("ops", "app.test", subject, "old", "new").await;
    }

    #[tokio::test]
    async fn the_chain_goes_on_after_a_restart_and_after_a_line_that_was_cut_short() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let audit = Audit::open(&path).unwrap();
        note(&audit, "one").await;
        note(&audit, "two").await;
        drop(audit);
        let mut text = fs::read(&path).unwrap();
        text.extend_from_slice(b"{\"number\":2,\"who");
        fs::write(&path, &text).unwrap();
        let audit = Audit::open(&path).unwrap();
        note(&audit, "three").await;
        let all = audit.read(0, 10).unwrap();
        let verified = verify(all.as_slice()).unwrap();
        assert_eq!((verified.lines, verified.first), (3, Some(0)));
        assert_eq!(verify(audit.read(1, 1).unwrap().as_slice()).unwrap().first, Some(1));
    }

    #[tokio::test]
    async fn the_chain_goes_on_in_the_next_file() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("audit.jsonl");
        let audit = Audit::open(&path).unwrap();
        note(&audit, "one").await;
        audit.0.lock().unwrap().bytes = FILE_BYTES_MAX;
        note(&audit, "two").await;
        drop(audit);
        fs::rename(&path, set_aside(&path)).unwrap();
        let audit = Audit::open(&path).unwrap();
        note(&audit, "three").await;
        assert_eq!(verify(audit.read(0, 10).unwrap().as_slice()).unwrap().first, Some(1));
    }
}
