//! Which records changed: the last of them, for whoever watches.

use std::collections::VecDeque;
use std::sync::{Mutex, PoisonError};

use bytes::Bytes;
use tokio::sync::watch;

/// Changes that are kept. Who is further behind is told that it missed some.
const KEPT_MAX: usize = 16 * 1024;

/// The last changes, each with its number.
#[derive(Debug)]
pub struct Changes {
    kept: Mutex<VecDeque<(u64, Bytes)>>,
    last: watch::Sender<u64>,
}

/// What changed behind a number.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Changed {
    /// The rows, in the order of their last change, each once.
    pub rows: Vec<Bytes>,
    /// The number to ask with next.
    pub cursor: u64,
    /// Whether there were changes that are no longer known.
    pub missed: bool,
}

impl Default for Changes {
    fn default() -> Self {
        Self { kept: Mutex::default(), last: watch::Sender::new(0) }
    }
}

impl Changes {
    /// Rows changed.
    pub(super) fn note(&self, rows: impl IntoIterator<Item = Bytes>) {
        let mut kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let before = *self.last.borrow();
        let mut last = before;
        for row in rows {
            last += 1;
            if kept.len() == KEPT_MAX {
                kept.pop_front();
            }
            kept.push_back((last, row));
        }
        if last > before {
            self.last.send_replace(last);
        }
    }

    /// The number of the last change. It begins anew with the process.
    pub fn cursor(&self) -> u64 {
        *self.last.borrow()
    }

    /// What changed behind `cursor` among rows that begin with `prefix`; at most `limit` changes are looked at.
    pub fn behind(&self, cursor: u64, prefix: &[u8], limit: usize) -> Changed {
        let kept = self.kept.lock().unwrap_or_else(PoisonError::into_inner);
        let last = *self.last.borrow();
        let first = kept.front().map_or(last + 1, |(number, _)| *number);
        // A cursor from before a restart may be ahead of this process.
        let (from, missed) = if cursor > last { (first, true) } else { (cursor + 1, cursor + 1 < first) };
        let at = usize::try_from(from.saturating_sub(first)).unwrap_or(usize::MAX).min(kept.len());
        let mut rows: Vec<Bytes> = Vec::new();
        let mut reached = if cursor > last { last } else { cursor };
        for (number, row) in kept.range(at..).take(limit) {
            reached = *number;
            if row.starts_with(prefix) {
                rows.retain(|known| known != row);
                rows.push(row.clone());
            }
        }
        Changed { rows, cursor: if missed { reached.max(first.saturating_sub(1)) } else { reached }, missed }
    }

    /// Returns when something changed behind `cursor`.
    pub async fn wait(&self, cursor: u64) {
        let mut last = self.last.subscribe();
        // The sender is here as long as we are.
        let _ = last.wait_for(|last| *last != cursor).await;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn noted(changes: &Changes, rows: &[&'static str]) {
        changes.note(rows.iter().map(|row| Bytes::from_static(row.as_bytes())));
    }

    #[test]
    fn a_watcher_goes_on_where_it_was() {
        let changes = Changes::default();
        noted(&changes, &["a1", "b1", "a1", "a2"]);
        let first = changes.behind(0, b"a", 100);
        assert_eq!(first, Changed { rows: vec!["a1".into(), "a2".into()], cursor: 4, missed: false });
        assert_eq!(changes.behind(4, b"a", 100).rows, [""; 0]);
        noted(&changes, &["a1"]);
        assert_eq!(changes.behind(4, b"a", 100), Changed { rows: vec!["a1".into()], cursor: 5, missed: false });
        assert_eq!(
            changes.behind(0, b"", 2),
            Changed { rows: vec!["a1".into(), "b1".into()], cursor: 2, missed: false }
        );
    }

    #[test]
    fn who_is_too_far_behind_is_told_and_goes_on() {
        let changes = Changes::default();
        for _ in 0..2 * KEPT_MAX {
            noted(&changes, &["a"]);
        }
        let behind = changes.behind(3, b"", usize::MAX);
        assert!(behind.missed);
        assert_eq!(behind.cursor, 2 * KEPT_MAX as u64);
        assert!(!changes.behind(behind.cursor, b"", 1).missed);
        let from_another_life = changes.behind(u64::MAX, b"", usize::MAX);
        assert!(from_another_life.missed);
        assert_eq!(from_another_life.cursor, 2 * KEPT_MAX as u64);
        assert_eq!(changes.behind(1, b"", 0).cursor, KEPT_MAX as u64);
    }

    #[tokio::test]
    async fn a_wait_ends_with_the_next_change() {
        let changes = Changes::default();
        noted(&changes, &["a"]);
        changes.wait(0).await;
        let (_, ()) = tokio::join!(changes.wait(1), async { noted(&changes, &["b"]) });
    }
}
