//! Whether a history of one key could have happened at one place, one operation after another.
//!
//! The search of Wing and Gong with the memory of Lowe: of the operations that may come next (none that is still to be
//! ordered had ended before they began) one is tried after the other, and no set of ordered operations with the same
//! state twice. An operation whose outcome nobody heard of may have happened at any time after it began, or never.

use std::collections::HashSet;

/// What was done to the key, and what was heard of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Did {
    /// It was read.
    Read(Option<i64>),
    /// It was set.
    Set(i64),
    /// It was deleted.
    Delete,
    /// It was set to the second if it was the first; whether it was.
    Swap(Option<i64>, i64, bool),
    /// It was counted up; what came of it.
    Add(i64, i64),
}

/// One operation.
#[derive(Debug, Clone)]
pub(super) struct Call {
    pub(super) did: Did,
    pub(super) began: u64,
    /// None: nobody heard of its outcome.
    pub(super) ended: Option<u64>,
}

/// The state after `did`, if it can have had this outcome.
fn step(state: Option<i64>, did: &Did, is_known: bool) -> Option<Option<i64>> {
    match *did {
        Did::Read(seen) => (seen == state).then_some(state),
        Did::Set(value) => Some(Some(value)),
        Did::Delete => Some(None),
        Did::Swap(from, to, _) if !is_known => Some(if from == state { Some(to) } else { state }),
        Did::Swap(from, to, done) => (done == (from == state)).then_some(if done { Some(to) } else { state }),
        Did::Add(delta, sum) => {
            let counted = state.unwrap_or(0) + delta;
            (!is_known || counted == sum).then_some(Some(counted))
        }
    }
}

/// Whether the history is linearizable. Reads that nobody heard of are to be left out by the caller.
pub(super) fn is_linearizable(calls: &[Call]) -> bool {
    assert!(calls.len() <= 128, "too long a history to search");
    let known = calls.iter().filter(|call| call.ended.is_some()).count();
    let mut seen = HashSet::new();
    let mut stack = vec![(0_u128, None, 0)];
    while let Some((ordered, state, done)) = stack.pop() {
        if done == known {
            return true;
        }
        if !seen.insert((ordered, state)) {
            continue;
        }
        let open = || calls.iter().enumerate().filter(|(number, _)| ordered >> number & 1 == 0);
        let first_end = open().filter_map(|(_, call)| call.ended).min().unwrap_or(u64::MAX);
        for (number, call) in open().filter(|(_, call)| call.began <= first_end) {
            if let Some(next) = step(state, &call.did, call.ended.is_some()) {
                stack.push((ordered | 1 << number, next, done + usize::from(call.ended.is_some())));
            }
        }
    }
    false
}

#[cfg(test)]
mod tests {
    use super::*;

    fn call(did: Did, began: u64, ended: u64) -> Call {
        Call { did, began, ended: (ended > 0).then_some(ended) }
    }

    #[test]
    fn what_could_have_been_is_taken_and_what_could_not_is_not() {
        let two_swaps = |other| {
            [
                call(Did::Swap(None, 1, true), 1, 10),
                call(Did::Swap(None, 2, other), 2, 9),
                call(Did::Read(Some(1)), 11, 12),
            ]
        };
        assert!(is_linearizable(&two_swaps(false)));
        assert!(!is_linearizable(&two_swaps(true)), "both may not win");
        let stale = [call(Did::Set(1), 1, 2), call(Did::Set(2), 3, 4), call(Did::Read(Some(1)), 5, 6)];
        assert!(!is_linearizable(&stale));
        let beside = [call(Did::Set(1), 1, 2), call(Did::Set(2), 3, 9), call(Did::Read(Some(1)), 5, 6)];
        assert!(is_linearizable(&beside));
        let twice = [call(Did::Add(1, 1), 1, 5), call(Did::Add(1, 1), 2, 6)];
        assert!(!is_linearizable(&twice), "one increment is lost");
    }

    #[test]
    fn what_nobody_heard_of_may_have_happened_or_not_and_only_after_it_began() {
        let unheard = Call { ended: None, ..call(Did::Set(7), 3, 1) };
        for seen in [Some(7), None] {
            assert!(is_linearizable(&[unheard.clone(), call(Did::Read(seen), 5, 6)]), "{seen:?}");
        }
        assert!(!is_linearizable(&[unheard.clone(), call(Did::Read(Some(7)), 1, 2)]));
        let back = [unheard, call(Did::Read(Some(7)), 5, 6), call(Did::Read(None), 7, 8)];
        assert!(!is_linearizable(&back), "it does not go again");
    }
}
