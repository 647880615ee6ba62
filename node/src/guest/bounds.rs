//! The bounds of one guest's store: memory, tables, instances.

use std::sync::Arc;

use wasmtime::ResourceLimiter;

use super::outcome::Outcome;

/// Entries of one table.
const TABLE_ELEMENTS_MAX: usize = 100_000;
/// Core instances, tables and memories of one guest, each.
const ITEMS_MAX: usize = 64;

/// Counts all linear memories of a guest together.
///
/// More than the limit is refused, not trapped: the guest's allocator hears of it. What becomes of the guest then is
/// up to it; if it traps, the outcome is that it ran out of memory.
pub(crate) struct Memory {
    limit: u64,
    used: u64,
    outcome: Arc<Outcome>,
}

impl Memory {
    pub(crate) fn new(limit: u64, outcome: Arc<Outcome>) -> Self {
        Self { limit, used: 0, outcome }
    }

    /// From now on refusals are of another request.
    pub(super) fn answer_to(&mut self, outcome: Arc<Outcome>) {
        self.outcome = outcome;
    }

    /// What the guest has, bytes.
    pub(super) fn used(&self) -> u64 {
        self.used
    }
}

impl ResourceLimiter for Memory {
    fn memory_growing(&mut self, current: usize, desired: usize, maximum: Option<usize>) -> wasmtime::Result<bool> {
        if maximum.is_some_and(|maximum| desired > maximum) {
            return Ok(true); // the memory's own maximum refuses it, and nothing is to be counted
        }
        let grown = (self.used + desired as u64).saturating_sub(current as u64);
        if grown > self.limit {
            self.outcome.refuse_memory();
            return Ok(false);
        }
        self.used = grown;
        Ok(true)
    }

    fn table_growing(&mut self, _: usize, desired: usize, _: Option<usize>) -> wasmtime::Result<bool> {
        Ok(desired <= TABLE_ELEMENTS_MAX)
    }

    fn instances(&self) -> usize {
        ITEMS_MAX
    }

    fn tables(&self) -> usize {
        ITEMS_MAX
    }

    fn memories(&self) -> usize {
        ITEMS_MAX
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_memories_count_together() {
        let outcome = Arc::new(Outcome::default());
        let mut memory = Memory::new(100, Arc::clone(&outcome));
        assert!(memory.memory_growing(0, 60, None).unwrap());
        assert!(memory.memory_growing(0, 40, None).unwrap());
        assert!(!outcome.memory_refused());
        assert!(!memory.memory_growing(40, 41, None).unwrap());
        assert!(outcome.memory_refused());
    }

    #[test]
    fn what_the_memory_itself_refuses_is_not_counted() {
        let mut memory = Memory::new(100, Arc::new(Outcome::default()));
        assert!(memory.memory_growing(10, 60, Some(50)).unwrap());
        assert_eq!(memory.used, 0);
    }
}
