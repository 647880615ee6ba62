//! Making a backup while the control plane runs.
//!
//! Records are immutable once published, and the registry's are copied under the lock that every change of it takes:
//! so both are of one moment. Blobs never change; that none goes while it is still to be copied is seen to by a hold.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::{self, Read, Write};
use std::time::Duration;

use bytes::Bytes;
use ring::digest::{Context, SHA256};
use selvage_config::Digest;
use tar::{Builder, Header};
use tokio::runtime::Handle;
use tokio::sync::mpsc;

use super::{AUDIT, BLOBS, BackupError, CONTENTS, Contents, FLEET, FORMAT, REGISTRY, Row, SUMS};
use crate::Parts;
use crate::audit::now_ms;
use crate::state::KeyValue;

/// Bytes that are sent at once.
const PIECE_BYTES: usize = 256 * 1024;
/// A client that takes nothing for this long is given up.
const IDLE: Duration = Duration::from_secs(60);

/// The way to a client: what is written comes out of the other end in pieces.
pub(crate) struct Pipe {
    to: mpsc::Sender<io::Result<Bytes>>,
    runtime: Handle,
    piece: Vec<u8>,
}

impl Pipe {
    pub(crate) fn new(to: mpsc::Sender<io::Result<Bytes>>, runtime: Handle) -> Self {
        Self { to, runtime, piece: Vec::with_capacity(PIECE_BYTES) }
    }

    fn send(&mut self, piece: io::Result<Bytes>) -> io::Result<()> {
        let sent = self.runtime.block_on(async { tokio::time::timeout(IDLE, self.to.send(piece)).await });
        match sent {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(io::ErrorKind::BrokenPipe.into()),
            Err(_) => Err(io::ErrorKind::TimedOut.into()),
        }
    }

    /// Tells the other end that nothing good comes any more.
    pub(crate) fn fail(mut self) {
        let _ = self.send(Err(io::Error::other("the backup could not be made")));
    }
}

impl Write for Pipe {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let fits = bytes.len().min(PIECE_BYTES - self.piece.len());
        self.piece.extend_from_slice(&bytes[..fits]);
        if self.piece.len() == PIECE_BYTES {
            self.flush()?;
        }
        Ok(fits)
    }

    fn flush(&mut self) -> io::Result<()> {
        if self.piece.is_empty() {
            return Ok(());
        }
        let piece = std::mem::replace(&mut self.piece, Vec::with_capacity(PIECE_BYTES));
        self.send(Ok(piece.into()))
    }
}

/// Writes a backup. Waits on the disk, and on whoever reads it.
pub(crate) fn write(parts: &Parts, to: &mut impl Write) -> Result<Contents, BackupError> {
    let (records, rows, hold) = parts.registry.freeze(|| parts.fleet.records())?;
    let fleet = lines(parts.fleet.rows(&records)?);
    let (registry, blobs) = (lines(rows), hold.blobs().clone());
    for digest in &blobs {
        parts.registry.bring(digest)?;
    }
    let audit = parts.audit.files().map_err(BackupError::Read)?;
    let contents = Contents {
        format: FORMAT,
        version: env!("CARGO_PKG_VERSION").to_owned(),
        made_ms: now_ms(),
        generation: records.generation,
        apps: records.apps.len(),
        nodes: records.nodes.len(),
        releases: records.planned().map(|record| record.release.id.to_string()).collect(),
        blobs: blobs.len(),
        blobs_bytes: sizes(parts, &blobs)?,
        sealing_key: parts.fleet.sealing_key().to_owned(),
    };
    let told = serde_json::to_vec_pretty(&contents).expect("it has only strings and numbers");
    let mut archive = Archive { tar: Builder::new(to), sums: String::new(), at_s: contents.made_ms / 1_000 };
    let failed = |name: &str| {
        let path = name.into();
        |source| BackupError::File { path, source }
    };
    archive.add(CONTENTS, told.len() as u64, told.as_slice()).map_err(failed(CONTENTS))?;
    archive.add(FLEET, fleet.len() as u64, fleet.as_slice()).map_err(failed(FLEET))?;
    archive.add(REGISTRY, registry.len() as u64, registry.as_slice()).map_err(failed(REGISTRY))?;
    for (name, found) in AUDIT.iter().zip(audit) {
        let Some((file, bytes)) = found else { continue };
        archive.add(name, bytes, file).map_err(failed(name))?;
    }
    for digest in &blobs {
        let path = parts.registry.blob_path(digest);
        let file = File::open(&path).map_err(|source| BackupError::File { path: path.clone(), source })?;
        let bytes = file.metadata().map_err(|source| BackupError::File { path, source })?.len();
        let name = format!("{BLOBS}{}", digest.hex());
        if archive.add(&name, bytes, file).map_err(failed(&name))? != *digest {
            return Err(BackupError::Blob(*digest));
        }
    }
    drop(hold);
    archive.end().map_err(failed(SUMS))?;
    Ok(contents)
}

fn sizes(parts: &Parts, blobs: &BTreeSet<Digest>) -> Result<u64, BackupError> {
    let mut sum: u64 = 0;
    for digest in blobs {
        let found = std::fs::metadata(parts.registry.blob_path(digest));
        sum += found.map_err(|_| BackupError::Blob(*digest))?.len();
    }
    Ok(sum)
}

fn lines(rows: Vec<KeyValue>) -> Vec<u8> {
    let mut text = Vec::new();
    for (key, value) in rows {
        serde_json::to_writer(&mut text, &Row(key, value)).expect("memory takes all, and it has only strings");
        text.push(b'\n');
    }
    text
}

/// A tar file that grows, and the sums of what it holds.
struct Archive<W: Write> {
    tar: Builder<W>,
    sums: String,
    at_s: u64,
}

impl<W: Write> Archive<W> {
    /// Adds exactly `bytes` bytes, and answers their digest.
    fn add(&mut self, name: &str, bytes: u64, from: impl Read) -> io::Result<Digest> {
        let mut header = Header::new_gnu();
        header.set_size(bytes);
        header.set_mode(0o600);
        header.set_mtime(self.at_s);
        let mut from = Hashing { from: from.take(bytes), hash: Context::new(&SHA256), bytes: 0 };
        self.tar.append_data(&mut header, name, &mut from)?;
        if from.bytes != bytes {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        let digest = digest(from.hash);
        self.sums.push_str(&format!("{}  {name}\n", digest.hex()));
        Ok(digest)
    }

    fn end(mut self) -> io::Result<()> {
        let sums = std::mem::take(&mut self.sums);
        self.add(SUMS, sums.len() as u64, sums.as_bytes())?;
        self.tar.into_inner()?.flush()
    }
}

/// What is read through it is hashed.
pub(super) struct Hashing<R> {
    pub(super) from: R,
    pub(super) hash: Context,
    pub(super) bytes: u64,
}

impl<R: Read> Read for Hashing<R> {
    fn read(&mut self, to: &mut [u8]) -> io::Result<usize> {
        let count = self.from.read(to)?;
        self.hash.update(&to[..count]);
        self.bytes += count as u64;
        Ok(count)
    }
}

/// The digest of what was hashed.
pub(super) fn digest(hash: Context) -> Digest {
    let bytes = hash.finish();
    Digest::from_sha256(bytes.as_ref().try_into().expect("SHA-256 has 32 bytes"))
}
