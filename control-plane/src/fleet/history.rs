//! The records of the last generations: what a node has that asks for what changed since.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

use crate::plans::{Changes, Signed, Signer};
use crate::state::Records;

/// Generations that are remembered. A node that is further behind is told its whole plan.
const GENERATIONS_MAX: usize = 64;
/// Changes that are kept for the next node that asks for the same.
const CHANGES_MAX: usize = 16;

/// What was, and what led from there to what is.
#[derive(Debug, Default)]
pub(super) struct History {
    records: Mutex<VecDeque<Arc<Records>>>,
    changes: Mutex<VecDeque<Arc<Changes>>>,
}

impl History {
    /// Notes the records of a new generation.
    pub(super) fn note(&self, records: &Arc<Records>) {
        let mut kept = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        if records.is_behind() {
            // Plans change without a new generation then: what a node has of one can't be told from its number.
            kept.clear();
            return;
        }
        if kept.back().is_some_and(|last| last.generation >= records.generation) {
            return;
        }
        if kept.len() >= GENERATIONS_MAX {
            kept.pop_front();
        }
        kept.push_back(Arc::clone(records));
    }

    /// The records that the newest plans are made of: peers that came since are in those of the next generation.
    pub(super) fn told(&self, now: Arc<Records>) -> Arc<Records> {
        let kept = self.records.lock().unwrap_or_else(PoisonError::into_inner);
        kept.back().filter(|last| last.generation == now.generation).cloned().unwrap_or(now)
    }

    /// What changed since generation `base`, if that is remembered.
    pub(super) fn since(
        &self,
        base: u64,
        now: &Arc<Records>,
        signer: Option<(&Signer, &Signed)>,
    ) -> Option<Arc<Changes>> {
        let signed = signer.map(|(_, signed)| signed);
        // Under the lock: of all that ask for the same at once, one does the work.
        let mut changes = self.changes.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(known) = changes.iter().find(|known| known.is_of(base, now.generation, signed)) {
            return Some(Arc::clone(known));
        }
        let base = {
            let kept = self.records.lock().unwrap_or_else(PoisonError::into_inner);
            Arc::clone(kept.iter().find(|records| records.generation == base)?)
        };
        let made = Arc::new(Changes::between(base, Arc::clone(now), signer));
        if changes.len() >= CHANGES_MAX {
            changes.pop_front();
        }
        changes.push_back(Arc::clone(&made));
        Some(made)
    }
}
