//! Calls of the mesh that are carried from a process to the one that took over from it, which has the KV now.
//!
//! Each side is given its end of one stream. [`Carrier`] asks, [`serve`] answers; both bound how much is under way, and
//! what they can't do is an error that a guest sees as one of its store.

mod wire;

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use selvage_config::StoreName;
use selvage_sync::KvError;
use selvage_sync::store::{LARGE_BYTES_MAX, LIST_MAX, METADATA_BYTES_MAX, Terms};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt as _, split};
use tokio::sync::{Semaphore, mpsc, oneshot};
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::timeout;

use crate::error::{Moving, StoreError};
use crate::mesh::Mesh;
use crate::store::{Kept, Store, check, check_key};
use wire::{Answer, Call, Frame, Question, Reply};

/// Calls under way at once; more wait in the socket.
const CALLS_MAX: usize = 256;
/// Frames that wait to be written.
const FRAMES_MAX: usize = 64;
/// Bytes of values that are on their way; a call beyond is refused as overload.
const VALUES_BYTES_MAX: usize = 64 * 1024 * 1024;
/// What a call counts besides its values, bytes.
const CALL_BYTES: usize = 8 * 1024;
/// How long an answer may take, milliseconds. It is longer than a store's home may take.
const ANSWER_MS_MAX: u64 = 15_000;

/// Asks the process that has the KV. Clones share the stream, and the last one closes it.
#[derive(Clone)]
pub struct Carrier(Arc<Asking>);

struct Asking {
    frames: mpsc::Sender<Bytes>,
    waiting: Arc<Waiting>,
    room: Semaphore,
    next: AtomicU64,
    failed: AtomicU64,
    task: JoinHandle<()>,
}

/// Who waits for which answer.
#[derive(Default)]
struct Waiting(Mutex<HashMap<u64, oneshot::Sender<Frame<Reply>>>>);

impl Waiting {
    fn all(&self) -> std::sync::MutexGuard<'_, HashMap<u64, oneshot::Sender<Frame<Reply>>>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// One who waits. It is forgotten when it gives up.
struct Waits<'a> {
    waiting: &'a Waiting,
    id: u64,
}

impl Drop for Waits<'_> {
    fn drop(&mut self) {
        self.waiting.all().remove(&self.id);
    }
}

impl Drop for Asking {
    fn drop(&mut self) {
        self.task.abort();
    }
}

impl Carrier {
    /// Over this stream, from within a runtime.
    pub fn over(stream: impl AsyncRead + AsyncWrite + Send + 'static) -> Self {
        let (frames, out) = mpsc::channel(FRAMES_MAX);
        let waiting = Arc::<Waiting>::default();
        let task = tokio::spawn(ask(stream, out, Arc::clone(&waiting)));
        let (room, next) = (Semaphore::new(VALUES_BYTES_MAX), AtomicU64::new(0));
        Self(Arc::new(Asking { frames, waiting, room, next, failed: AtomicU64::new(0), task }))
    }

    /// How many calls were carried, and how many of these came to nothing on the way.
    pub fn counts(&self) -> (u64, u64) {
        (self.0.next.load(Ordering::Relaxed), self.0.failed.load(Ordering::Relaxed))
    }

    async fn ask(&self, store: &StoreName, call: Call, values: Vec<Bytes>) -> Result<Frame<Reply>, StoreError> {
        let asked = self.exchange(store, call, values).await;
        if asked.is_err() {
            self.0.failed.fetch_add(1, Ordering::Relaxed);
        }
        let reply = asked?;
        match reply.document.answer {
            Answer::UnknownVersion => Err(StoreError::Version),
            Answer::Failed { why } => Err(StoreError::Moving(Moving::Refused { why })),
            _ => Ok(reply),
        }
    }

    async fn exchange(&self, store: &StoreName, call: Call, values: Vec<Bytes>) -> Result<Frame<Reply>, StoreError> {
        let Asking { frames, waiting, room, next, .. } = &*self.0;
        let bytes = CALL_BYTES + values.iter().map(Bytes::len).sum::<usize>();
        let room = u32::try_from(bytes).ok().and_then(|bytes| room.try_acquire_many(bytes).ok());
        let _room = room.ok_or(KvError::Overloaded)?;
        let id = next.fetch_add(1, Ordering::Relaxed);
        let document = Question { id, store: store.clone(), call };
        let lost = |_| StoreError::Moving(Moving::Lost);
        let frame = Frame { document, values }.encode().map_err(|_| StoreError::Moving(Moving::Lost))?;
        let (reply, answered) = oneshot::channel();
        waiting.all().insert(id, reply);
        let _waits = Waits { waiting, id };
        let exchanged = async {
            frames.send(frame).await.map_err(|_| StoreError::Moving(Moving::Lost))?;
            answered.await.map_err(lost)
        };
        let silent = StoreError::Moving(Moving::Silent { ms: ANSWER_MS_MAX });
        timeout(Duration::from_millis(ANSWER_MS_MAX), exchanged).await.map_err(|_| silent)?
    }

    pub(crate) async fn get(&self, store: &StoreName, key: &str) -> Result<Option<Bytes>, StoreError> {
        check_key(key)?;
        let mut reply = self.ask(store, Call::Get { key: key.to_owned() }, Vec::new()).await?;
        match reply.document.answer {
            Answer::Value => Ok(reply.values.pop()),
            _ => Err(unasked()),
        }
    }

    pub(crate) async fn latest(&self, store: &StoreName, key: &str) -> Result<Option<Kept>, StoreError> {
        check_key(key)?;
        let reply = self.ask(store, Call::Latest { key: key.to_owned() }, Vec::new()).await?;
        match (reply.document.answer, two(reply.values)) {
            (Answer::Nothing, None) => Ok(None),
            (Answer::Kept { expires_ms, version }, Some((value, metadata))) => {
                Ok(Some(Kept { value, terms: Terms { expires_ms, metadata }, version }))
            }
            _ => Err(unasked()),
        }
    }

    pub(crate) async fn exists(&self, store: &StoreName, key: &str) -> Result<bool, StoreError> {
        check_key(key)?;
        self.whether(store, Call::Exists { key: key.to_owned() }, Vec::new()).await
    }

    pub(crate) async fn set_on(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        terms: Terms,
    ) -> Result<String, StoreError> {
        check_write(key, &value, &terms)?;
        let call = Call::Set { key: key.to_owned(), expires_ms: terms.expires_ms };
        self.written(store, call, vec![value, terms.metadata]).await?.ok_or_else(unasked)
    }

    pub(crate) async fn set_if(
        &self,
        store: &StoreName,
        key: &str,
        value: Bytes,
        terms: Terms,
        seen: Option<&str>,
    ) -> Result<Option<String>, StoreError> {
        check_write(key, &value, &terms)?;
        let seen = seen.map(str::to_owned);
        let call = Call::SetIf { key: key.to_owned(), expires_ms: terms.expires_ms, seen };
        self.written(store, call, vec![value, terms.metadata]).await
    }

    pub(crate) async fn swap(
        &self,
        store: &StoreName,
        key: &str,
        seen: Option<&[u8]>,
        value: Bytes,
    ) -> Result<bool, StoreError> {
        check_write(key, &value, &Terms::default())?;
        if seen.is_some_and(|seen| seen.len() > LARGE_BYTES_MAX) {
            // No value is that long.
            return Ok(false);
        }
        let values = [value].into_iter().chain(seen.map(Bytes::copy_from_slice)).collect();
        self.whether(store, Call::Swap { key: key.to_owned() }, values).await
    }

    pub(crate) async fn delete(&self, store: &StoreName, key: &str) -> Result<(), StoreError> {
        check_key(key)?;
        let reply = self.ask(store, Call::Delete { key: key.to_owned() }, Vec::new()).await?;
        if reply.document.answer == Answer::Nothing { Ok(()) } else { Err(unasked()) }
    }

    pub(crate) async fn increment(
        &self,
        store: &StoreName,
        key: &str,
        delta: i64,
        expires_ms: Option<u64>,
    ) -> Result<i64, StoreError> {
        check_key(key)?;
        let call = Call::Increment { key: key.to_owned(), delta, expires_ms };
        match self.ask(store, call, Vec::new()).await?.document.answer {
            Answer::Sum { sum } => Ok(sum),
            _ => Err(unasked()),
        }
    }

    pub(crate) async fn list(
        &self,
        store: &StoreName,
        prefix: &str,
        after: Option<&str>,
        limit: usize,
    ) -> Result<Vec<String>, StoreError> {
        for key in [Some(prefix), after].into_iter().flatten() {
            check("key", key.len(), crate::store::KEY_BYTES_MAX)?;
        }
        let (prefix, after) = (prefix.to_owned(), after.map(str::to_owned));
        let call = Call::List { prefix, after, limit: limit.min(LIST_MAX) };
        match self.ask(store, call, Vec::new()).await?.document.answer {
            Answer::Keys { keys } => Ok(keys),
            _ => Err(unasked()),
        }
    }

    async fn whether(&self, store: &StoreName, call: Call, values: Vec<Bytes>) -> Result<bool, StoreError> {
        match self.ask(store, call, values).await?.document.answer {
            Answer::Whether { is } => Ok(is),
            _ => Err(unasked()),
        }
    }

    async fn written(&self, store: &StoreName, call: Call, values: Vec<Bytes>) -> Result<Option<String>, StoreError> {
        match self.ask(store, call, values).await?.document.answer {
            Answer::Written { version } => Ok(Some(version)),
            Answer::Nothing => Ok(None),
            _ => Err(unasked()),
        }
    }
}

/// Writes what is asked and reads what is answered, until the other side is gone. Then nobody waits any longer.
async fn ask(stream: impl AsyncRead + AsyncWrite, mut out: mpsc::Receiver<Bytes>, waiting: Arc<Waiting>) {
    let stream = std::pin::pin!(stream);
    let (mut read, mut write) = split(stream);
    let writing = async {
        while let Some(frame) = out.recv().await {
            write.write_all(&frame).await?;
        }
        Ok(())
    };
    let reading = async {
        while let Some(frame) = Frame::<Reply>::read(&mut read).await? {
            // Who asked may have given up.
            if let Some(reply) = waiting.all().remove(&frame.document.id) {
                let _ = reply.send(frame);
            }
        }
        Ok::<_, std::io::Error>(())
    };
    // With either of them the stream is over: what the other one had half done is lost with it.
    let ended = tokio::select! { ended = writing => ended, ended = reading => ended };
    if let Err(error) = ended {
        tracing::warn!(%error, "kv calls are carried no more");
    }
    // In this order: who asks later is told by the closed channel.
    drop(out);
    waiting.all().clear();
}

/// Answers the calls of the process before, until it is gone. `on_call` hears of each.
///
/// # Errors
/// The stream's.
pub async fn serve(stream: impl AsyncRead + AsyncWrite, mesh: Mesh, on_call: impl Fn()) -> std::io::Result<()> {
    let stream = std::pin::pin!(stream);
    let (mut read, mut write) = split(stream);
    let (replies, mut out) = mpsc::channel::<Bytes>(FRAMES_MAX);
    let writing = async {
        while let Some(frame) = out.recv().await {
            write.write_all(&frame).await?;
        }
        Ok(())
    };
    let answering = async {
        let mut calls = JoinSet::new();
        while let Some(Frame { document, values }) = Frame::<Question>::read(&mut read).await? {
            while calls.len() >= CALLS_MAX {
                calls.join_next().await;
            }
            while calls.try_join_next().is_some() {}
            on_call();
            let (store, replies) = (Store::in_mesh(mesh.clone(), document.store), replies.clone());
            let (id, call) = (document.id, document.call);
            calls.spawn(async move {
                let (answer, values) = done(answer(&store, call, values).await);
                let frame = Frame { document: Reply { id, answer }, values }.encode();
                let too_long = || Answer::Failed { why: "answer is too long".to_owned() };
                let frame = frame
                    .or_else(|_| Frame { document: Reply { id, answer: too_long() }, values: Vec::new() }.encode());
                if let Ok(frame) = frame {
                    // The other side may be gone.
                    let _ = replies.send(frame).await;
                }
            });
        }
        Ok(())
    };
    // The writing ends by itself only for an error; dropping it loses what nobody is there to read.
    tokio::select! { ended = answering => ended, ended = writing => ended }
}

/// What is answered, with its values.
type Answered = (Answer, Vec<Bytes>);

fn done(answered: Result<Answered, StoreError>) -> Answered {
    match answered {
        Ok(answered) => answered,
        Err(StoreError::Version) => (Answer::UnknownVersion, Vec::new()),
        Err(error) => (Answer::Failed { why: error.to_string() }, Vec::new()),
    }
}

async fn answer(store: &Store, call: Call, values: Vec<Bytes>) -> Result<Answered, StoreError> {
    let alone = |answer| (answer, Vec::new());
    let written =
        |version: Option<String>| alone(version.map_or(Answer::Nothing, |version| Answer::Written { version }));
    let terms = |metadata, expires_ms| Terms { expires_ms, metadata };
    Ok(match call {
        Call::Get { key } => (Answer::Value, store.get(&key).await?.into_iter().collect()),
        Call::Latest { key } => match store.latest(&key).await? {
            None => alone(Answer::Nothing),
            Some(Kept { value, terms, version }) => {
                (Answer::Kept { expires_ms: terms.expires_ms, version }, vec![value, terms.metadata])
            }
        },
        Call::Exists { key } => alone(Answer::Whether { is: store.exists(&key).await? }),
        Call::Set { key, expires_ms } => {
            let (value, metadata) = two(values).ok_or_else(unasked)?;
            written(Some(store.set_on(&key, value, terms(metadata, expires_ms)).await?))
        }
        Call::SetIf { key, expires_ms, seen } => {
            let (value, metadata) = two(values).ok_or_else(unasked)?;
            written(store.set_if(&key, value, terms(metadata, expires_ms), seen.as_deref()).await?)
        }
        Call::Swap { key } => {
            let mut values = values.into_iter();
            let (value, seen) = (values.next().ok_or_else(unasked)?, values.next());
            alone(Answer::Whether { is: store.swap(&key, seen.as_deref(), value).await? })
        }
        Call::Delete { key } => {
            store.delete(&key).await?;
            alone(Answer::Nothing)
        }
        Call::Increment { key, delta, expires_ms } => {
            alone(Answer::Sum { sum: store.increment(&key, delta, expires_ms).await? })
        }
        Call::List { prefix, after, limit } => {
            alone(Answer::Keys { keys: store.list(&prefix, after.as_deref(), limit).await? })
        }
    })
}

fn two(values: Vec<Bytes>) -> Option<(Bytes, Bytes)> {
    let [first, second] = values.try_into().ok()?;
    Some((first, second))
}

/// An answer to something else than was asked for, or a call without its values.
fn unasked() -> StoreError {
    StoreError::Moving(Moving::Lost)
}

/// Before it is carried, so that a frame has a bound.
fn check_write(key: &str, value: &Bytes, terms: &Terms) -> Result<(), StoreError> {
    check_key(key)?;
    check("value", value.len(), LARGE_BYTES_MAX)?;
    check("metadata", terms.metadata.len(), METADATA_BYTES_MAX)
}
