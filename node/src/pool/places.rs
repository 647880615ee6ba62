//! Room for instances that wait, of all components of one engine together. It is beside the room of those that run, so
//! that what waits never takes room from what runs.

use std::sync::Arc;

use tokio::sync::{OwnedSemaphorePermit, Semaphore};

/// For so many instances that may run, one may wait.
const RUNNING_PER_WAITING: u32 = 2;
/// Of the machine's memory, one part in so many may be held by what waits.
const MEMORY_SHARE: u64 = 8;
/// The unit in which memory is given out, bytes.
const MEBIBYTE: u64 = 1024 * 1024;

/// The room. Clones share it.
#[derive(Debug, Clone)]
pub(crate) struct Places {
    instances: Arc<Semaphore>,
    mebibytes: Arc<Semaphore>,
}

/// Room for one instance.
pub(crate) struct Place {
    _instance: OwnedSemaphorePermit,
    _mebibytes: OwnedSemaphorePermit,
}

impl Places {
    /// How many may wait beside so many that run.
    pub(crate) fn beside(running: u32) -> u32 {
        running.div_ceil(RUNNING_PER_WAITING)
    }

    /// Room beside so many instances that run, on a machine with so much memory.
    pub(crate) fn new(running: u32, memory_bytes: u64) -> Self {
        let mebibytes = usize::try_from(memory_bytes / MEMORY_SHARE / MEBIBYTE).unwrap_or(usize::MAX);
        Self {
            instances: Arc::new(Semaphore::new(Self::beside(running) as usize)),
            mebibytes: Arc::new(Semaphore::new(mebibytes.min(Semaphore::MAX_PERMITS))),
        }
    }

    /// Whether there is any.
    pub(super) fn has_room(&self) -> bool {
        self.instances.available_permits() > 0 && self.mebibytes.available_permits() > 0
    }

    /// Takes room for an instance whose linear memories have `bytes`, if there is any.
    pub(super) fn take(&self, bytes: u64) -> Option<Place> {
        let mebibytes = u32::try_from(bytes.div_ceil(MEBIBYTE)).ok()?;
        let instance = Arc::clone(&self.instances).try_acquire_owned().ok()?;
        let mebibytes = Arc::clone(&self.mebibytes).try_acquire_many_owned(mebibytes).ok()?;
        Some(Place { _instance: instance, _mebibytes: mebibytes })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_as_many_may_wait_as_may_run() {
        let places = Places::new(4, u64::MAX);
        let taken = (places.take(0).unwrap(), places.take(0).unwrap());
        assert!(places.take(0).is_none() && !places.has_room());
        drop(taken);
        assert!(places.has_room() && places.take(0).is_some());
    }

    #[test]
    fn what_waits_holds_an_eighth_of_the_memory() {
        let places = Places::new(100, 80 * MEBIBYTE);
        let large = places.take(9 * MEBIBYTE + 1);
        assert!(large.is_some(), "ten of ten");
        assert!(places.take(1).is_none());
        drop(large);
        assert!(places.take(11 * MEBIBYTE).is_none());
        assert!(places.take(10 * MEBIBYTE).is_some(), "and a refusal takes nothing");
    }
}
