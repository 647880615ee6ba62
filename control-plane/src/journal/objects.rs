//! What is too large for a message: blobs, baselines, and changes of many rows, in a bucket of the object store. No name is
//! ever used twice, so what was put is never another thing.

use std::path::Path;
use std::time::Duration;

use async_nats::jetstream::object_store::{GetErrorKind, ObjectMetadata, ObjectStore};
use futures_util::TryStreamExt as _;
use tokio::io::{AsyncRead, AsyncReadExt as _, AsyncWriteExt as _};
use tokio::time::{sleep, timeout};

use super::JournalError;

/// Bytes of one message of an object.
const CHUNK_BYTES: usize = 256 * 1024;
/// Longest time for one object to go or come.
const OBJECT: Duration = Duration::from_secs(300);
/// How often one that is not there yet is asked for: a server that is behind may not know it for a moment.
const TRIES: u32 = 5;
/// Pause between two tries.
const PAUSE: Duration = Duration::from_millis(200);
/// Bytes read at once.
const PIECE_BYTES: usize = 64 * 1024;

/// A bucket.
#[derive(Clone)]
pub(super) struct Objects(ObjectStore);

/// An object, by its name and age.
pub(crate) struct Found {
    pub(crate) name: String,
    pub(crate) modified_s: i64,
}

impl Objects {
    pub(super) fn new(store: ObjectStore) -> Self {
        Self(store)
    }

    pub(super) async fn put(&self, name: &str, mut from: impl AsyncRead + Unpin + Send) -> Result<(), JournalError> {
        let meta = ObjectMetadata { name: name.to_owned(), chunk_size: Some(CHUNK_BYTES), ..ObjectMetadata::default() };
        match timeout(OBJECT, self.0.put(meta, &mut from)).await {
            Ok(Ok(_)) => Ok(()),
            Ok(Err(error)) => Err(JournalError::Away(format!("put an object: {error}"))),
            Err(_) => Err(JournalError::Away("an object was not taken in time".into())),
        }
    }

    /// Writes an object into a new file. The server's digest over it was compared on the way.
    pub(super) async fn get_file(&self, name: &str, to: &Path) -> Result<(), JournalError> {
        let whole = async {
            let mut object = self.object(name).await?;
            let mut file = tokio::fs::File::create(to).await.map_err(JournalError::Disk)?;
            let mut piece = vec![0; PIECE_BYTES];
            loop {
                let count = object.read(&mut piece).await.map_err(broken)?;
                if count == 0 {
                    break;
                }
                file.write_all(&piece[..count]).await.map_err(JournalError::Disk)?;
            }
            file.sync_all().await.map_err(JournalError::Disk)
        };
        timeout(OBJECT, whole).await.map_err(|_| late())?
    }

    /// A whole object of at most `max` bytes.
    pub(super) async fn get(&self, name: &str, max: usize) -> Result<Vec<u8>, JournalError> {
        let whole = async {
            let mut bytes = Vec::new();
            let object = self.object(name).await?;
            object.take(max as u64 + 1).read_to_end(&mut bytes).await.map_err(broken)?;
            if bytes.len() > max { Err(JournalError::Malformed(name.to_owned())) } else { Ok(bytes) }
        };
        timeout(OBJECT, whole).await.map_err(|_| late())?
    }

    async fn object(&self, name: &str) -> Result<async_nats::jetstream::object_store::Object, JournalError> {
        let mut tries = 1;
        loop {
            match self.0.get(name).await {
                Ok(object) => return Ok(object),
                Err(error) if error.kind() == GetErrorKind::NotFound && tries >= TRIES => {
                    return Err(JournalError::Missing(name.to_owned()));
                }
                Err(error) if error.kind() == GetErrorKind::NotFound => {
                    tries += 1;
                    sleep(PAUSE).await;
                }
                Err(error) => return Err(JournalError::Away(format!("get an object: {error}"))),
            }
        }
    }

    /// Deletes an object. One that is not there is no error.
    pub(super) async fn delete(&self, name: &str) -> Result<(), JournalError> {
        match self.0.delete(name).await {
            Ok(()) => Ok(()),
            Err(error) if error.to_string().contains("not found") => Ok(()),
            Err(error) => Err(JournalError::Away(format!("delete an object: {error}"))),
        }
    }

    /// Every object whose name begins so.
    pub(super) async fn list(&self, prefix: &str) -> Result<Vec<Found>, JournalError> {
        let failed = |error: String| JournalError::Away(format!("list objects: {error}"));
        let all = async {
            let list = self.0.list().await.map_err(|error| failed(error.to_string()))?;
            let infos: Vec<_> = list.try_collect().await.map_err(|error| failed(error.to_string()))?;
            let fits = infos.into_iter().filter(|info| info.name.starts_with(prefix));
            let found = fits.map(|info| Found {
                modified_s: info.modified.map_or(i64::MAX, |at| at.unix_timestamp()),
                name: info.name,
            });
            Ok(found.collect())
        };
        timeout(OBJECT, all).await.map_err(|_| late())?
    }
}

fn late() -> JournalError {
    JournalError::Away("an object did not come in time".into())
}

#[expect(clippy::needless_pass_by_value, reason = "it ends here")]
fn broken(error: std::io::Error) -> JournalError {
    JournalError::Away(format!("read an object: {error}"))
}
