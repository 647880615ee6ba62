//! How a guest's call ended, for whoever waits for it: the call, and the body that outlives the call.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use wasmtime::{PoolConcurrencyLimitError, Trap};

use crate::fault::{ClientFault, Fault, GuestFault};

/// What is known of one guest. Settled once, before its store is dropped: a body that ends because the store is gone
/// must already find out why.
#[derive(Default)]
pub(crate) struct Outcome {
    memory_refused: AtomicBool,
    body_too_large: AtomicBool,
    body_gone: AtomicBool,
    end: OnceLock<Result<(), Fault>>,
}

impl Outcome {
    /// The guest wanted more memory than its limit.
    pub(super) fn refuse_memory(&self) {
        self.memory_refused.store(true, Ordering::Relaxed);
    }

    #[cfg(test)]
    pub(super) fn memory_refused(&self) -> bool {
        self.memory_refused.load(Ordering::Relaxed)
    }

    /// The client sent more than the limit.
    pub(super) fn refuse_body(&self) {
        self.body_too_large.store(true, Ordering::Relaxed);
    }

    /// Why the request can't be answered, if its body was too large: this beats whatever the guest made of it.
    pub(super) fn body_fault(&self) -> Option<Fault> {
        self.body_too_large.load(Ordering::Relaxed).then_some(Fault::Client(ClientFault::BodyTooLarge))
    }

    /// The client's body is over, or nobody can read it any more.
    pub(super) fn end_body(&self) {
        self.body_gone.store(true, Ordering::Relaxed);
    }

    /// Whether somebody still can.
    pub(super) fn holds_body(&self) -> bool {
        !self.body_gone.load(Ordering::Relaxed)
    }

    /// Whether the request met a limit that ends an instance, even if the guest made the best of it.
    pub(super) fn is_excess(&self) -> bool {
        self.memory_refused.load(Ordering::Relaxed) || self.body_too_large.load(Ordering::Relaxed)
    }

    /// Settles how it ended. Only the first word counts.
    pub(super) fn settle(&self, end: Result<(), Fault>) {
        let _ = self.end.set(end);
    }

    /// How it ended, if it has.
    pub(super) fn end(&self) -> Option<&Result<(), Fault>> {
        self.end.get()
    }

    /// The fault that an error of the engine is.
    pub(super) fn fault(&self, error: &wasmtime::Error) -> Fault {
        if error.is::<PoolConcurrencyLimitError>() {
            return Fault::Overload("instances");
        }
        let out_of_memory = matches!(error.downcast_ref::<Trap>(), Some(Trap::AllocationTooLarge));
        if out_of_memory || self.memory_refused.load(Ordering::Relaxed) {
            return Fault::Guest(GuestFault::ExceededMemory);
        }
        Fault::Guest(GuestFault::Trap)
    }
}
