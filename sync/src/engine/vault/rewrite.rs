//! The thread that looks after an engine: it writes out what waits too long, and rewrites an engine that has grown far
//! beyond what it holds.
//!
//! A rewrite copies the rows to the next generation while the engine is used. Every batch goes to both; a row that was
//! not copied yet is copied later as it is then. So at every moment the next generation holds, up to where the copy is,
//! what the current one holds.

use std::sync::Arc;
use std::sync::mpsc::{self, RecvTimeoutError, Sender};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use selvage_config::node::KvEngine;

use super::open::rows_in;
use super::{Core, Current, PENDING_AGE_MAX, read, write};
use crate::engine::place::Place;
use crate::engine::{Batch, Corrupt, Engine, EngineError, disk};

/// How often it looks.
const LOOK: Duration = Duration::from_millis(500);

/// How often it asks whether the engine has grown too far.
const GROWTH_LOOK: Duration = Duration::from_secs(60);

/// An engine that takes less than this is never rewritten, bytes.
const REWRITE_BYTES_MIN: u64 = 64 * 1024 * 1024;

/// What a record takes besides its bytes: its row in the index, and what any engine adds.
const RECORD_OVERHEAD_BYTES: u64 = 160;

/// Rows copied at once: so long a writer may wait.
const COPY_ROWS: usize = 256;

/// How long readers of the old generation may take to end before its files are left to the next start.
const READERS_MAX: Duration = Duration::from_secs(10);

/// The thread, until it is dropped.
pub(super) struct Tidying {
    stop: Option<Sender<()>>,
    thread: Option<JoinHandle<()>>,
}

impl Tidying {
    pub(super) fn start(core: Arc<Core>) -> std::io::Result<Self> {
        let (stop, stopped) = mpsc::channel();
        let thread = std::thread::Builder::new().name("selvage-kv-tidy".into());
        let thread = thread.spawn(move || {
            let mut looked = Instant::now();
            let mut last_bytes = 0;
            while stopped.recv_timeout(LOOK) == Err(RecvTimeoutError::Timeout) {
                core.settle();
                if looked.elapsed() >= GROWTH_LOOK {
                    looked = Instant::now();
                    core.rewrite_if_grown(&mut last_bytes, || {
                        stopped.try_recv() == Err(mpsc::TryRecvError::Disconnected)
                    });
                }
            }
        })?;
        Ok(Self { stop: Some(stop), thread: Some(thread) })
    }
}

impl Drop for Tidying {
    fn drop(&mut self) {
        drop(self.stop.take());
        if self.thread.take().is_some_and(|thread| thread.join().is_err()) {
            tracing::error!("the thread that looks after the kv's engine panicked");
        }
    }
}

/// Why a rewrite ended early.
enum Ended {
    Stopped,
    Failed(EngineError),
}

impl From<EngineError> for Ended {
    fn from(error: EngineError) -> Self {
        Self::Failed(error)
    }
}

impl Core {
    fn settle(&self) {
        let mut writing = self.writing();
        if writing.since.is_some_and(|since| since.elapsed() > PENDING_AGE_MAX)
            && let Err(error) = self.write_out(&mut writing, false)
        {
            tracing::error!(error = %error, source = ?error, "the kv's engine takes no writes");
        }
    }

    /// Bytes that a fresh engine would about take.
    fn live_bytes(&self) -> u64 {
        read(&self.usage).values().map(|usage| usage.inline_bytes + usage.rows * RECORD_OVERHEAD_BYTES).sum()
    }

    /// `last_bytes` is what the last rewrite came to: one that could not make it small is not tried again and again.
    fn rewrite_if_grown(&self, last_bytes: &mut u64, stopped: impl Fn() -> bool) {
        let (Some(place), Ok(bytes)) = (&self.place, self.current().rows.disk_bytes()) else { return };
        let grown = bytes > REWRITE_BYTES_MIN && bytes * 2 > self.live_bytes() * 5 && bytes * 2 > *last_bytes * 3;
        if !grown {
            return;
        }
        match disk::free_bytes(place.directory()) {
            Ok(free) if free > bytes.saturating_add(self.settings.disk_free_bytes_min) => {}
            _ => return tracing::warn!(bytes, "the kv's engine can't be rewritten: too little free space"),
        }
        *last_bytes = bytes;
        match self.rewrite(place, self.settings.engine, stopped) {
            Ok(now) => {
                *last_bytes = now;
                tracing::info!(before = bytes, after = now, "the kv's engine was rewritten");
            }
            Err(Ended::Stopped) => {}
            Err(Ended::Failed(error)) => {
                tracing::error!(error = %error, source = ?error, "the kv's engine could not be rewritten");
            }
        }
    }

    /// Rewrites the engine. Says what the new generation takes on disk.
    fn rewrite(&self, place: &Place, engine: KvEngine, stopped: impl Fn() -> bool) -> Result<u64, Ended> {
        let Some(generation) = self.current().generation else { return Err(Ended::Stopped) };
        let next_generation = generation.next(engine);
        let directory = place.of(next_generation);
        let failed = |source| Ended::Failed(EngineError::io("rewrite", source));
        if directory.exists() {
            std::fs::remove_dir_all(&directory).map_err(failed)?;
        }
        let next = rows_in(place, next_generation, self.settings.cache_bytes)?;
        {
            let mut writing = self.writing();
            self.write_out(&mut writing, false)?;
            writing.next = Some(Arc::clone(&next));
        }
        let copied = self.copy_to(next.as_ref(), stopped).and_then(|()| Ok(next.flush()?));
        if let Err(ended) = copied {
            self.writing().next = None;
            drop(next);
            let _swept_at_the_next_start = std::fs::remove_dir_all(&directory);
            return Err(ended);
        }
        let old = {
            let mut writing = self.writing();
            let done = self.write_out(&mut writing, true).and_then(|()| next.flush());
            if writing.next.take().is_none() {
                return Err(Ended::Stopped);
            }
            done?;
            place.set_current(next_generation).map_err(failed)?;
            let current = Current { rows: Arc::clone(&next), generation: Some(next_generation) };
            std::mem::replace(&mut *write(&self.current), current)
        };
        let since = Instant::now();
        while Arc::strong_count(&old.rows) > 1 && since.elapsed() < READERS_MAX {
            std::thread::sleep(Duration::from_millis(1));
        }
        drop(old);
        std::fs::remove_dir_all(place.of(generation)).map_err(failed)?;
        Ok(next.disk_bytes()?)
    }

    fn copy_to(&self, next: &dyn Engine, stopped: impl Fn() -> bool) -> Result<(), Ended> {
        let mut from = Vec::new();
        loop {
            let writing = self.writing();
            if stopped() || writing.next.is_none() {
                return Err(Ended::Stopped);
            }
            let rows = self.current().rows.scan(&[], &from, COPY_ROWS)?;
            let ended = rows.len() < COPY_ROWS;
            if let Some(last) = rows.last() {
                from = [&last.key, &[0][..]].concat();
            }
            next.apply(copied(rows).map_err(|Corrupt| EngineError::corrupt("rewrite", Corrupt))?)?;
            drop(writing);
            if ended {
                return Ok(());
            }
        }
    }
}

fn copied(rows: Vec<crate::engine::Row>) -> Result<Batch, Corrupt> {
    let mut batch = Batch::default();
    for row in rows {
        batch.put(row.key.to_vec(), row.value?.to_vec());
    }
    Ok(batch)
}

impl super::Vault {
    /// Rewrites the engine now, whatever it takes. Says what it takes then.
    pub fn rewrite(&self) -> Result<u64, EngineError> {
        self.rewrite_as(self.core.settings.engine)
    }

    /// The same with another engine, which is to be named when the directory is opened again.
    pub fn rewrite_as(&self, engine: KvEngine) -> Result<u64, EngineError> {
        let Some(place) = &self.core.place else { return Ok(0) };
        match self.core.rewrite(place, engine, || false) {
            Ok(bytes) => Ok(bytes),
            Err(Ended::Failed(error)) => Err(error),
            Err(Ended::Stopped) => {
                Err(EngineError::new("rewrite", std::io::Error::other("the next generation failed")))
            }
        }
    }
}
