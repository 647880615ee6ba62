//! Uploads: blobs on their way in. Each is a file that grows, and the hash of what it holds.
//!
//! Uploads live no longer than the program: a client whose upload is gone begins again.

use std::collections::HashMap;
use std::fs::{self, File};
use std::io;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use ring::digest::{Context, SHA256};
use ring::rand::{SecureRandom as _, SystemRandom};
use selvage_config::Digest;
use selvage_config::oci::{COMPONENT_BYTES_MAX, Repository};
use tokio::fs::OpenOptions;
use tokio::io::{AsyncSeekExt as _, AsyncWriteExt as _};

use super::RegistryError;
use crate::body::Incoming;

/// Uploads at once.
const UPLOADS_MAX: usize = 256;
/// Bytes of all uploads together.
const UPLOADS_BYTES_MAX: u64 = 4 * 1024 * 1024 * 1024;
/// Bytes of one blob.
pub(crate) const BLOB_BYTES_MAX: u64 = COMPONENT_BYTES_MAX;
/// An upload that nobody has touched for this long is dropped.
const IDLE: Duration = Duration::from_secs(900);
/// Bytes of an upload's name before it is written in hexadecimal.
const ID_BYTES: usize = 16;

/// All uploads.
#[derive(Debug)]
pub(crate) struct Uploads {
    directory: PathBuf,
    slots: Mutex<HashMap<String, Slot>>,
    bytes: AtomicU64,
}

#[derive(Debug)]
struct Slot {
    repository: Repository,
    touched: Instant,
    /// None while a request has it.
    upload: Option<Upload>,
}

#[derive(Debug)]
struct Upload {
    id: String,
    path: PathBuf,
    written: u64,
    hash: Hash,
    /// The file does not hold what was counted: it can only be dropped.
    is_broken: bool,
}

struct Hash(Context);

impl std::fmt::Debug for Hash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Hash")
    }
}

/// An upload in the hands of one request. Dropped, it goes back to wait for the next.
#[derive(Debug)]
pub(crate) struct Taken {
    uploads: Arc<Uploads>,
    upload: Option<Upload>,
}

impl Uploads {
    /// Begins with an empty directory: what an earlier run left there nobody can go on with.
    pub(crate) fn open(directory: &Path) -> io::Result<Self> {
        for entry in fs::read_dir(directory)? {
            fs::remove_file(entry?.path())?;
        }
        Ok(Self { directory: directory.to_owned(), slots: Mutex::default(), bytes: AtomicU64::new(0) })
    }

    /// A path for a file that is not complete yet.
    pub(crate) fn aside(&self) -> Result<PathBuf, RegistryError> {
        Ok(self.directory.join(format!("{}.aside", new_id()?)))
    }

    /// Begins an upload and hands it out.
    pub(crate) fn begin(self: &Arc<Self>, repository: &Repository) -> Result<Taken, RegistryError> {
        let id = new_id()?;
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        self.expire(&mut slots, IDLE);
        if slots.len() >= UPLOADS_MAX {
            return Err(RegistryError::too_many(format!("there are {UPLOADS_MAX} uploads under way")));
        }
        let path = self.directory.join(&id);
        File::create_new(&path)?;
        slots.insert(id.clone(), Slot { repository: repository.clone(), touched: Instant::now(), upload: None });
        let upload = Upload { id, path, written: 0, hash: Hash(Context::new(&SHA256)), is_broken: false };
        Ok(Taken { uploads: Arc::clone(self), upload: Some(upload) })
    }

    /// Takes an upload that waits. Two requests cannot have one upload at once.
    pub(crate) fn take(self: &Arc<Self>, repository: &Repository, id: &str) -> Result<Taken, RegistryError> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let slot = slots.get_mut(id).filter(|slot| slot.repository == *repository);
        let slot = slot.ok_or_else(|| RegistryError::upload_unknown("there is no such upload: begin again"))?;
        let upload = slot.upload.take();
        let upload = upload.ok_or_else(|| RegistryError::upload_busy("another request writes to this upload"))?;
        slot.touched = Instant::now();
        Ok(Taken { uploads: Arc::clone(self), upload: Some(upload) })
    }

    /// Drops what nobody has touched for `idle`. What a request has is in use, however long that takes.
    fn expire(&self, slots: &mut HashMap<String, Slot>, idle: Duration) {
        let gone: Vec<String> = slots
            .iter()
            .filter(|(_, slot)| slot.upload.is_some() && slot.touched.elapsed() > idle)
            .map(|(id, _)| id.clone())
            .collect();
        for id in gone {
            if let Some(upload) = slots.remove(&id).and_then(|slot| slot.upload) {
                self.forget(&upload);
            }
        }
    }

    /// Drops the file, where there still is one, and its share of the bytes.
    fn forget(&self, upload: &Upload) {
        self.bytes.fetch_sub(upload.written, Ordering::Relaxed);
        if let Err(error) = fs::remove_file(&upload.path)
            && error.kind() != io::ErrorKind::NotFound
        {
            tracing::warn!(%error, path = %upload.path.display(), "an upload's file stays");
        }
    }
}

impl Taken {
    fn upload(&mut self) -> &mut Upload {
        self.upload.as_mut().expect("only `end` and `drop` take it, and nothing follows them")
    }

    /// Its name in paths.
    pub(crate) fn id(&mut self) -> String {
        self.upload().id.clone()
    }

    /// Bytes that it holds.
    pub(crate) fn written(&mut self) -> u64 {
        self.upload().written
    }

    /// Appends a body. After an error it holds what came before the error, and can be gone on with from there.
    ///
    /// This must run to its end: a file operation that is left behind would write into what follows.
    pub(crate) async fn append(&mut self, mut body: Incoming) -> Result<(), RegistryError> {
        let uploads = Arc::clone(&self.uploads);
        let upload = self.upload();
        let mut file = OpenOptions::new().write(true).open(&upload.path).await?;
        // What an earlier append wrote and did not count is written over.
        file.set_len(upload.written).await?;
        file.seek(io::SeekFrom::Start(upload.written)).await?;
        let result = loop {
            let piece = match body.next().await {
                None => break Ok(()),
                Some(Ok(piece)) => piece,
                Some(Err(error)) => break Err(error.into()),
            };
            let length = piece.len() as u64;
            if upload.written + length > BLOB_BYTES_MAX {
                break Err(RegistryError::too_large(format!("a blob has at most {BLOB_BYTES_MAX} bytes")));
            }
            if uploads.bytes.fetch_add(length, Ordering::Relaxed) + length > UPLOADS_BYTES_MAX {
                uploads.bytes.fetch_sub(length, Ordering::Relaxed);
                break Err(RegistryError::too_many("uploads under way have too many bytes together"));
            }
            upload.written += length;
            upload.hash.0.update(&piece);
            if let Err(error) = file.write_all(&piece).await {
                break Err(error.into());
            }
        };
        let flushed = file.flush().await;
        // After a failed write nobody knows what the file holds.
        upload.is_broken |= matches!(result, Err(RegistryError::Io(_))) || flushed.is_err();
        flushed?;
        result
    }

    /// Ends the upload: its bytes are on disk, in a file that the caller must take over, and this is their digest.
    pub(crate) fn finish(&mut self) -> Result<(PathBuf, Digest, u64), RegistryError> {
        let upload = self.upload();
        File::open(&upload.path)?.sync_all()?;
        let hash = upload.hash.0.clone().finish();
        let hash = hash.as_ref().try_into().expect("SHA-256 has 32 bytes");
        Ok((upload.path.clone(), Digest::from_sha256(hash), upload.written))
    }

    /// Ends the upload for good, with its file if that was not taken over.
    pub(crate) fn end(mut self) {
        self.give_up();
    }

    fn give_up(&mut self) {
        if let Some(upload) = self.upload.take() {
            self.uploads.slots.lock().unwrap_or_else(PoisonError::into_inner).remove(&upload.id);
            self.uploads.forget(&upload);
        }
    }
}

impl Drop for Taken {
    fn drop(&mut self) {
        let Some(upload) = self.upload.take() else { return };
        if upload.is_broken {
            self.upload = Some(upload);
            return self.give_up();
        }
        let mut slots = self.uploads.slots.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(slot) = slots.get_mut(&upload.id) {
            slot.touched = Instant::now();
            slot.upload = Some(upload);
        }
    }
}

fn new_id() -> Result<String, RegistryError> {
    let mut bytes = [0_u8; ID_BYTES];
    SystemRandom::new().fill(&mut bytes).map_err(|_| io::Error::other("no random bytes"))?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}

#[cfg(test)]
mod tests {
    use axum::body::Body;

    use super::*;

    fn uploads(directory: &tempfile::TempDir) -> Arc<Uploads> {
        Arc::new(Uploads::open(directory.path()).unwrap())
    }

    fn body(text: &'static str) -> Incoming {
        Incoming::new(Body::from(text))
    }

    #[tokio::test]
    async fn an_upload_grows_and_is_hashed_on_the_way() {
        let directory = tempfile::tempdir().unwrap();
        let (uploads, repository) = (uploads(&directory), "a".parse().unwrap());
        let id = uploads.begin(&repository).unwrap().id();
        uploads.take(&repository, &id).unwrap().append(body("hel")).await.unwrap();
        let mut taken = uploads.take(&repository, &id).unwrap();
        assert!(matches!(uploads.take(&repository, &id), Err(RegistryError::Refused { .. })));
        taken.append(body("lo")).await.unwrap();
        let (path, digest, size) = taken.finish().unwrap();
        assert_eq!((fs::read(path).unwrap().as_slice(), digest, size), (b"hello".as_slice(), Digest::of(b"hello"), 5));
        taken.end();
        assert_eq!(uploads.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
        assert!(uploads.take(&repository, &id).is_err());
    }

    #[tokio::test]
    async fn an_upload_that_broke_off_goes_on_where_it_was() {
        let directory = tempfile::tempdir().unwrap();
        let (uploads, repository) = (uploads(&directory), "a".parse().unwrap());
        let mut taken = uploads.begin(&repository).unwrap();
        let pieces = [Ok("hel".into()), Err(io::Error::other("gone"))];
        let broken = Body::from_stream(futures_util::stream::iter(pieces as [io::Result<bytes::Bytes>; 2]));
        assert!(taken.append(Incoming::new(broken)).await.is_err());
        assert_eq!(taken.written(), 3);
        taken.append(body("lo")).await.unwrap();
        assert_eq!(taken.finish().unwrap().1, Digest::of(b"hello"));
    }

    #[tokio::test]
    async fn an_upload_belongs_to_its_repository() {
        let directory = tempfile::tempdir().unwrap();
        let uploads = uploads(&directory);
        let id = uploads.begin(&"a".parse().unwrap()).unwrap().id();
        assert!(uploads.take(&"b".parse().unwrap(), &id).is_err());
        assert!(uploads.take(&"a".parse().unwrap(), "../x").is_err());
    }

    #[test]
    fn uploads_are_bounded_in_number() {
        let directory = tempfile::tempdir().unwrap();
        let (uploads, repository) = (uploads(&directory), "a".parse().unwrap());
        let open: Vec<_> = (0..UPLOADS_MAX).map(|_| uploads.begin(&repository).unwrap()).collect();
        let refused = uploads.begin(&repository).unwrap_err();
        assert_eq!(refused.status(), http::StatusCode::TOO_MANY_REQUESTS);
        for taken in open {
            taken.end();
        }
        assert!(uploads.begin(&repository).is_ok());
    }

    #[tokio::test]
    async fn an_upload_that_nobody_touches_is_dropped_with_its_bytes() {
        let directory = tempfile::tempdir().unwrap();
        let (uploads, repository) = (uploads(&directory), "a".parse().unwrap());
        let mut waits = uploads.begin(&repository).unwrap();
        waits.append(body("hello")).await.unwrap();
        drop(waits);
        let mut used = uploads.begin(&repository).unwrap();
        uploads.expire(&mut uploads.slots.lock().unwrap(), Duration::ZERO);
        assert_eq!(uploads.bytes.load(Ordering::Relaxed), 0);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 1);
        used.append(body("still in use")).await.unwrap();
    }

    #[test]
    fn what_an_earlier_run_left_is_swept_out() {
        let directory = tempfile::tempdir().unwrap();
        fs::write(directory.path().join("left"), b"x").unwrap();
        uploads(&directory);
        assert_eq!(fs::read_dir(&directory).unwrap().count(), 0);
    }
}
