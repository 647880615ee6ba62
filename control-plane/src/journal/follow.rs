//! Following the journal: what other control planes change comes into this one's records as it is made.

use std::sync::Arc;
use std::time::Duration;

use async_nats::jetstream::consumer::pull::OrderedConfig;
use async_nats::jetstream::consumer::{DeliverPolicy, pull};
use async_nats::jetstream::stream::Stream;
use futures_util::StreamExt as _;
use tokio::time::{Instant, sleep, timeout};

use super::baseline::newest;
use super::{Journal, JournalError, chance};
use crate::fleet::Followed;
use crate::state::{State, StateError};
use crate::{Parts, disk};

/// Pauses after a failure: the first, and the longest.
const PAUSE: (Duration, Duration) = (Duration::from_millis(50), Duration::from_secs(2));
/// How long nothing comes before it is looked whether there is nothing.
const LOOK: Duration = Duration::from_millis(500);
/// How often it is looked whether a baseline is due, what is here is put on the disk, and the way to the servers tried.
const UPKEEP: Duration = Duration::from_secs(1);

/// Takes in what is in the journal and not here, up to what is its end now. For a start: nobody else looks at the state.
pub(super) fn catch_up(journal: &Journal, state: &State) -> Result<(), StateError> {
    let last = journal.last()?;
    if state.applied() >= last {
        return Ok(());
    }
    let stream = journal.wait(journal.stream())?;
    let mut messages = journal.wait(journal.messages(&stream, state.applied() + 1))?;
    while state.applied() < last {
        let (sequence, payload) = journal.wait(next(&mut messages, journal.request))?;
        let change = if is_change(&payload.subject, journal) {
            journal.wait(journal.unpacked(&payload.payload))?
        } else {
            crate::state::Change::default()
        };
        let order = state.order();
        let applied = state.applied();
        if sequence > applied + 1 {
            let message = format!("the journal goes on with change {sequence} after {applied}: start again");
            return Err(JournalError::Away(message).into());
        }
        if sequence == applied + 1 {
            state.take(&order, sequence, &change)?;
        }
    }
    Ok(())
}

fn is_change(subject: &str, journal: &Journal) -> bool {
    subject == journal.subject("change")
}

/// The next message with its sequence, if it comes in time.
async fn next(messages: &mut pull::Ordered, patience: Duration) -> Result<(u64, async_nats::Message), JournalError> {
    let broken = |why: String| JournalError::Away(format!("follow the journal: {why}"));
    let message = timeout(patience, messages.next()).await.map_err(|_| broken("nothing came".into()))?;
    let message = message.ok_or_else(|| broken("it ended".into()))?.map_err(|error| broken(error.to_string()))?;
    let sequence = message.info().map_err(|error| broken(error.to_string()))?.stream_sequence;
    Ok((sequence, message.message))
}

impl Journal {
    async fn messages(&self, stream: &Stream, from: u64) -> Result<pull::Ordered, JournalError> {
        let failed = |why: String| JournalError::Away(format!("follow the journal: {why}"));
        let config = OrderedConfig {
            deliver_policy: DeliverPolicy::ByStartSequence { start_sequence: from },
            ..OrderedConfig::default()
        };
        let made =
            timeout(self.request, stream.create_consumer(config)).await.map_err(|_| failed("no answer".into()))?;
        let consumer = made.map_err(|error| failed(error.to_string()))?;
        consumer.messages().await.map_err(|error| failed(error.to_string()))
    }
}

/// Follows the journal for as long as the program runs.
pub(crate) async fn follow(journal: Arc<Journal>, parts: Arc<Parts>) {
    let mut failures = 0_u32;
    loop {
        let begun = Instant::now();
        let error = match run(&journal, &parts).await {
            Ok(never) => match never {},
            Err(error) => error,
        };
        if begun.elapsed() > PAUSE.1 {
            failures = 0;
        }
        if matches!(error, StateError::Journal(JournalError::Setting(_))) {
            // It is not this fleet's any more: nothing is written there.
            journal.opened(false);
            tracing::error!(%error, "the journal can't be followed: changes wait");
        } else {
            tracing::warn!(%error, "the journal is not followed for a moment");
        }
        let longest = PAUSE.0.saturating_mul(1 << failures.min(10)).min(PAUSE.1);
        sleep(longest / 2 + longest.mul_f64(chance() / 2.0)).await;
        failures = failures.saturating_add(1);
    }
}

/// What never is.
enum Never {}

async fn run(journal: &Arc<Journal>, parts: &Arc<Parts>) -> Result<Never, StateError> {
    let state = parts.fleet.state();
    // Looked up first: others' changes, and this one's own, may come after the stream has said where it ends.
    let known = state.applied();
    let stream = journal.make().await?;
    let (begin, began) = journal
        .begin(&stream)
        .await?
        .ok_or_else(|| JournalError::Setting("the journal is empty: it was begun anew, or lost".into()))?;
    let id = {
        let at = Arc::clone(state);
        disk::wait(move || at.member()).await?
    }
    .map(|member| member.id);
    if id.as_ref() != Some(&begin.id) {
        return Err(JournalError::Setting(format!("the journal is {}, this state is of another one", begin.id)).into());
    }
    let last = stream.cached_info().state.last_sequence;
    if last < known {
        let message = format!("the journal ends with change {last}, this control plane knows {known}");
        return Err(JournalError::Setting(message).into());
    }
    let mut messages = journal.messages(&stream, state.applied() + 1).await?;
    parts.fleet.hears_again();
    journal.opened(true);
    let broken = |why: String| JournalError::Away(format!("follow the journal: {why}"));
    loop {
        // Dropping either branch is safe: the messages keep what has come, and a pause holds nothing.
        let message = tokio::select! {
            message = messages.next() => message,
            () = sleep(LOOK) => {
                let before = state.applied();
                if journal.stream().await?.cached_info().state.last_sequence <= before {
                    continue;
                }
                // There is more, and nothing says so: a server that was restarted knows nothing of who followed.
                match timeout(LOOK, messages.next()).await {
                    Ok(message) => message,
                    Err(_) if state.applied() > before => continue,
                    Err(_) => return Err(broken("what is there does not come".into()).into()),
                }
            }
        };
        let message = message.ok_or_else(|| broken("it ended".into()))?.map_err(|error| broken(error.to_string()))?;
        let sequence = message.info().map_err(|error| broken(error.to_string()))?.stream_sequence;
        if sequence <= state.applied() {
            continue;
        }
        let change = if is_change(&message.subject, journal) {
            journal.unpacked(&message.payload).await?
        } else {
            crate::state::Change::default()
        };
        let at = Arc::clone(parts);
        let followed = disk::wait(move || at.fleet.follow(sequence, &change)).await?;
        match followed {
            Followed::Known => {}
            Followed::Taken => parts.moves.notify_one(),
            Followed::Gap => {
                let (all, up_to) = newest(journal, &begin, began).await?;
                if up_to <= state.applied() {
                    return Err(broken(format!("change {sequence} follows {}", state.applied())).into());
                }
                let (at, id) = (Arc::clone(parts), begin.id.clone());
                disk::wait(move || at.fleet.refill(&id, &all, up_to)).await?;
                tracing::info!(up_to, "this control plane was far behind, and went on with a baseline");
                messages = journal.messages(&stream, state.applied() + 1).await?;
            }
        }
    }
}

/// Makes baselines when they are due and puts the copy on the disk, from time to time.
pub(crate) async fn upkeep(journal: Arc<Journal>, state: Arc<State>) {
    let mut flushed = 0;
    loop {
        sleep(UPKEEP.mul_f64(0.5 + chance())).await;
        if flushed == state.applied() {
            continue;
        }
        flushed = state.applied();
        let (journal, at) = (Arc::clone(&journal), Arc::clone(&state));
        let done = disk::wait(move || {
            at.flush()?;
            journal.baseline(&at)
        })
        .await;
        match done {
            Ok(()) | Err(StateError::Journal(JournalError::Away(_))) => {}
            Err(error) => tracing::error!(%error, "no baseline of the state was made"),
        }
    }
}
