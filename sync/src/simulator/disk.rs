//! A disk that forgets what was not flushed.

use std::collections::BTreeMap;
use std::sync::{PoisonError, RwLock};

use bytes::Bytes;
use rand::Rng;
use rand::rngs::StdRng;

use crate::engine::{Batch, Engine, EngineError, Memory, Row};

/// Rows as a process sees them, and as a crash leaves them.
#[derive(Default)]
pub(crate) struct Disk {
    seen: RwLock<Memory>,
    state: RwLock<State>,
}

#[derive(Default)]
struct State {
    durable: BTreeMap<Vec<u8>, Vec<u8>>,
    /// Batches since the last flush: a log, of which a crash keeps a beginning.
    waiting: Vec<Batch>,
}

impl State {
    fn keep(&mut self, count: usize) {
        for batch in self.waiting.drain(..count) {
            for (key, value) in batch.into_changes() {
                match value {
                    Some(value) => self.durable.insert(key, value),
                    None => self.durable.remove(&key),
                };
            }
        }
        self.waiting.clear();
    }

    fn memory(&self) -> Memory {
        let memory = Memory::default();
        let mut all = Batch::default();
        self.durable.iter().for_each(|(key, value)| all.put(key.clone(), value.clone()));
        memory.apply(all).unwrap();
        memory
    }
}

impl Disk {
    /// Power is lost: of what was not flushed a beginning is kept, perhaps nothing.
    pub(crate) fn crash(&self, rng: &mut StdRng) {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let kept = rng.random_range(0..=state.waiting.len());
        state.keep(kept);
        *self.seen.write().unwrap_or_else(PoisonError::into_inner) = state.memory();
    }

    /// A copy of what is durable.
    pub(crate) fn copy(&self) -> Self {
        let state = self.state.read().unwrap_or_else(PoisonError::into_inner);
        let copied = State { durable: state.durable.clone(), waiting: Vec::new() };
        Self { seen: RwLock::new(copied.memory()), state: RwLock::new(copied) }
    }
}

impl Engine for Disk {
    fn get(&self, key: &[u8]) -> Result<Option<Bytes>, EngineError> {
        self.seen.read().unwrap_or_else(PoisonError::into_inner).get(key)
    }

    fn scan(&self, prefix: &[u8], from: &[u8], limit: usize) -> Result<Vec<Row>, EngineError> {
        self.seen.read().unwrap_or_else(PoisonError::into_inner).scan(prefix, from, limit)
    }

    fn apply(&self, batch: Batch) -> Result<(), EngineError> {
        self.state.write().unwrap_or_else(PoisonError::into_inner).waiting.push(batch.clone());
        self.seen.read().unwrap_or_else(PoisonError::into_inner).apply(batch)
    }

    fn flush(&self) -> Result<(), EngineError> {
        let mut state = self.state.write().unwrap_or_else(PoisonError::into_inner);
        let all = state.waiting.len();
        state.keep(all);
        Ok(())
    }
}
