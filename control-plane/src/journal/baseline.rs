//! Baselines: what all changes up to one of them have made, so that those need not be kept. One is never overwritten; the
//! older go when two newer ones are there, and changes only when a baseline after them lies in the object store.

use async_nats::jetstream::stream::LastRawMessageErrorKind;

use super::begin::Begin;
use super::{Journal, JournalError};
use crate::state::{CHANGE_BYTES_MAX, Change, State, StateError};

/// How names of baselines begin. The sequence of the last change that is in it follows, in twenty digits.
const PREFIX: &str = "baseline-";
/// How names of changes that are too large for a message begin.
const CHANGES: &str = "change-";
/// Baselines that are kept.
const KEPT: usize = 2;
/// How old an object must be that nothing names any more, to go, seconds.
const STRAY_S: i64 = 24 * 3_600;

impl Journal {
    pub(super) async fn put_baseline(&self, name: &str, all: &Change, sequence: u64) -> Result<(), JournalError> {
        let bytes = [sequence.to_be_bytes().as_slice(), &all.write()].concat();
        if bytes.len() > CHANGE_BYTES_MAX {
            return Err(JournalError::Malformed("a baseline that is too large".into()));
        }
        self.state_bucket().await?.put(name, bytes.as_slice()).await
    }

    /// Makes a baseline if there were enough changes since the last, and lets go of what lies before it. Waits on the
    /// network. A crash between any two steps leaves more than is needed, never less.
    pub(super) fn baseline(&self, state: &State) -> Result<(), StateError> {
        self.check()?;
        let stream = self.wait(self.stream())?;
        let keep = self.config.baseline_after;
        if stream.cached_info().state.messages < keep.saturating_add(keep / 2) {
            return Ok(());
        }
        let (all, sequence) = {
            let order = state.order();
            state.all(&order)?
        };
        let found = self.wait(async { self.state_bucket().await?.list(PREFIX).await })?;
        let newest = found.iter().filter_map(|object| sequence_of(&object.name)).max().unwrap_or(0);
        self.wait(async {
            let up_to = if newest.saturating_add(keep) > sequence {
                // Another control plane has just made one.
                newest
            } else {
                self.put_baseline(&format!("{PREFIX}{sequence:020}"), &all, sequence).await?;
                sequence
            };
            // What is just behind it stays: another control plane may be about to take it in.
            let first = up_to.saturating_sub(keep / 2).max(2);
            stream
                .purge()
                .filter(self.subject("change"))
                .sequence(first)
                .await
                .map_err(|error| JournalError::Away(format!("let go of changes: {error}")))?;
            tracing::info!(up_to, "a baseline has what the journal let go of");
            self.tidy().await
        })?;
        Ok(())
    }

    /// Lets go of baselines that newer ones have made needless, and of large changes whose messages are long gone.
    async fn tidy(&self) -> Result<(), JournalError> {
        let bucket = self.state_bucket().await?;
        let mut baselines: Vec<String> = bucket.list(PREFIX).await?.into_iter().map(|found| found.name).collect();
        baselines.sort();
        let first = self.stream().await?.cached_info().state.first_timestamp.unix_timestamp();
        let now = i64::try_from(crate::audit::now_ms() / 1_000).unwrap_or(i64::MAX);
        let oldest_change = self.oldest_change().await?.unwrap_or(first);
        let changes = bucket.list(CHANGES).await?.into_iter();
        // An object is made before its message: one from before the oldest message there is has none.
        let before = oldest_change.min(now).saturating_sub(STRAY_S);
        let strays = changes.filter(|found| found.modified_s < before).map(|found| found.name);
        let older = baselines.len().saturating_sub(KEPT);
        for name in baselines.into_iter().take(older).chain(strays) {
            bucket.delete(&name).await?;
        }
        Ok(())
    }

    /// When the oldest change was made that is still in the journal.
    async fn oldest_change(&self) -> Result<Option<i64>, JournalError> {
        let stream = self.stream().await?;
        match stream.get_first_raw_message_by_subject(self.subject("change"), 1).await {
            Ok(message) => Ok(Some(message.time.unix_timestamp())),
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => Ok(None),
            Err(error) => Err(JournalError::Away(format!("read the journal: {error}"))),
        }
    }
}

fn sequence_of(name: &str) -> Option<u64> {
    name.strip_prefix(PREFIX)?.parse().ok()
}

/// The newest baseline, and the sequence of the change that follows it less one.
pub(super) async fn newest(journal: &Journal, begin: &Begin, began: u64) -> Result<(Change, u64), JournalError> {
    let bucket = journal.state_bucket().await?;
    let names = bucket.list(PREFIX).await?.into_iter().map(|found| found.name);
    let name = names.filter(|name| sequence_of(name).is_some()).max();
    let founding = name.is_none();
    let name = name.unwrap_or_else(|| begin.baseline.clone());
    let bytes = bucket.get(&name, CHANGE_BYTES_MAX).await?;
    let malformed = || JournalError::Malformed(name.clone());
    let (sequence, rows) = bytes.split_first_chunk::<8>().ok_or_else(malformed)?;
    let all = Change::read(rows).ok_or_else(malformed)?;
    // The first one has what there was before the journal: its first message follows.
    Ok((all, if founding { began } else { u64::from_be_bytes(*sequence) }))
}
