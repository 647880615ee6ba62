//! How a control plane comes to the journal: the first one begins it with what it has, the others with what is there.
//!
//! The first message tells which fleet the journal is of: an id, and which key seals. It stays for good. What its first
//! control plane had lies in a baseline that it names.

use std::sync::Arc;

use async_nats::jetstream::stream::{LastRawMessageErrorKind, Stream};
use selvage_config::Digest;
use serde::{Deserialize, Serialize};

use super::baseline::newest;
use super::{Journal, JournalError, random_name};
use crate::state::{Member, Standing, State, StateError};

/// The version of the first message.
const FORMAT: u32 = 1;
/// The row that tells which keys all control planes of the fleet have.
const KEYS_ROW: &str = "keys";
/// How often it is looked anew who was first.
const TRIES: u32 = 5;

/// The first message.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Begin {
    format: u32,
    pub(super) id: String,
    /// Which key seals the records: the beginning of a hash, not the key.
    sealing_key: String,
    /// The program that began it.
    version: String,
    /// The object with what there was before the first change.
    pub(super) baseline: String,
}

/// The keys that the files of all control planes must have in common, by their hashes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Keys {
    /// Of the certificate of the authority that lets nodes join.
    pub(crate) authority: Option<Digest>,
    /// Of what signs plans.
    pub(crate) plans: Option<String>,
}

/// Makes the database a copy of the journal, as far as that has come. `found` makes ready what the first control plane
/// has, before it begins the journal with it. Waits on network and disk. While there is no way to the journal a database
/// that was a copy before is taken as it is: it catches up later.
pub(crate) fn join(
    journal: &Arc<Journal>,
    state: &State,
    found: impl Fn() -> Result<(), StateError>,
    keys: &Keys,
) -> Result<(), StateError> {
    let known = state.member()?;
    let stream = match journal.wait(journal.make()) {
        Ok(stream) => stream,
        Err(JournalError::Away(why)) => match known {
            Some(Member { applied, standing: Standing::Joined, .. }) => {
                tracing::warn!(
                    why,
                    "the journal is away: this control plane begins with what it knew, and changes wait"
                );
                state.share(Arc::clone(journal), applied);
                return Ok(());
            }
            _ => return Err(JournalError::Away(why).into()),
        },
        Err(error) => return Err(error.into()),
    };
    for _ in 0..TRIES {
        let applied = match journal.wait(journal.begin(&stream))? {
            Some((begin, sequence)) => Some(enter(journal, state, &stream, &begin, sequence)?),
            None => begin_with(journal, state, &found)?,
        };
        let Some(applied) = applied else { continue };
        state.share(Arc::clone(journal), applied);
        journal.opened(true);
        super::follow::catch_up(journal, state)?;
        check_keys(journal, state, keys)?;
        return state.flush();
    }
    Err(JournalError::Away("others began the journal at the same time".into()).into())
}

impl Journal {
    /// The first message, and its sequence.
    pub(super) async fn begin(&self, stream: &Stream) -> Result<Option<(Begin, u64)>, JournalError> {
        let message = match stream.get_last_raw_message_by_subject(&self.subject("begin")).await {
            Ok(message) => message,
            Err(error) if error.kind() == LastRawMessageErrorKind::NoMessageFound => return Ok(None),
            Err(error) => return Err(JournalError::Away(format!("read how the journal began: {error}"))),
        };
        let begin: Begin = serde_json::from_slice(&message.payload)
            .map_err(|_| JournalError::Setting("stream was not begun by this program, or by a newer one".into()))?;
        if begin.format != FORMAT {
            let message = format!("the journal has format {}, this program reads {FORMAT}", begin.format);
            return Err(JournalError::Setting(message));
        }
        Ok(Some((begin, message.sequence)))
    }
}

/// Begins the journal with what is here. None if somebody else was first.
fn begin_with(
    journal: &Arc<Journal>,
    state: &State,
    found: &impl Fn() -> Result<(), StateError>,
) -> Result<Option<u64>, StateError> {
    let id = match state.member()? {
        Some(Member { id, standing: Standing::Founding, .. }) => id,
        Some(_) if !state.is_empty()? => {
            let message = "the journal is empty, and this state is a copy of another one: were the servers' disks lost? \
                           Restore a backup into an empty state_dir, and begin anew with that";
            return Err(JournalError::Setting(message.into()).into());
        }
        _ => random_name(),
    };
    // Remembered before anybody can know it: after a crash this control plane still knows that it was the first.
    state.set_member(&Member { id: id.clone(), applied: 0, standing: Standing::Founding })?;
    // There may be much to send, and nobody else to ask.
    journal.opened(true);
    found()?;
    let (all, _) = state.all(&state.order())?;
    let begin = Begin {
        format: FORMAT,
        baseline: format!("founding-{}", random_name()),
        sealing_key: state.sealing_key().to_owned(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        id: id.clone(),
    };
    let published = journal.wait(async {
        journal.put_baseline(&begin.baseline, &all, 0).await?;
        let payload = serde_json::to_vec(&begin).expect("it has only strings and numbers");
        journal.send(journal.subject("begin"), payload.into(), 0).await
    });
    match published {
        Ok(applied) => {
            tracing::info!(journal = %id, "this control plane began the journal");
            state.set_member(&Member { id, applied, standing: Standing::Joined })?;
            Ok(Some(applied))
        }
        Err(JournalError::Stale) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Comes to a journal that was begun. Answers how far the database is.
fn enter(journal: &Arc<Journal>, state: &State, stream: &Stream, begin: &Begin, began: u64) -> Result<u64, StateError> {
    if begin.sealing_key != state.sealing_key() {
        let (theirs, ours) = (&begin.sealing_key, state.sealing_key());
        let message = format!(
            "the fleet's records are sealed with key {theirs}, this control plane has key {ours}: give all of them one \
             sealing_key"
        );
        return Err(JournalError::Setting(message).into());
    }
    let last = stream.cached_info().state.last_sequence;
    match state.member()? {
        Some(member) if member.id == begin.id => match member.standing {
            Standing::Joined if member.applied > last => {
                let message = format!(
                    "the journal ends with change {last}, this state knows {}: the servers lost what they had acknowledged",
                    member.applied
                );
                return Err(JournalError::Setting(message).into());
            }
            Standing::Joined => return Ok(member.applied),
            Standing::Founding => {
                state.set_member(&Member { applied: began, standing: Standing::Joined, ..member })?;
                return Ok(began);
            }
            Standing::Filling => {}
        },
        Some(Member { standing: Standing::Filling, .. }) => {}
        _ if state.is_empty()? => {}
        _ => {
            let message = "the fleet's journal and this state_dir both have a state: start this control plane with an \
                           empty state_dir (and the fleet's sealing key), or name another nats.prefix";
            return Err(JournalError::Setting(message.into()).into());
        }
    }
    let (all, sequence) = journal.wait(newest(journal, begin, began))?;
    state.refill(&state.order(), &begin.id, &all, sequence)?;
    tracing::info!(sequence, rows = all.rows().len(), "this control plane begins with a baseline");
    Ok(sequence)
}

/// Goes on only if this control plane has the keys that the others have.
fn check_keys(journal: &Journal, state: &State, keys: &Keys) -> Result<(), StateError> {
    let mut tries = 0;
    loop {
        let row = state.row(KEYS_ROW)?;
        let known = row.as_deref().and_then(|row| serde_json::from_slice::<Keys>(row).ok());
        match known {
            Some(known) if known == *keys => return Ok(()),
            Some(known) if !journal.config().new_keys => {
                let differs = match (known.authority != keys.authority, known.plans != keys.plans) {
                    (true, true) => "another authority and another key of plans",
                    (true, false) => "another authority",
                    _ => "another key of plans",
                };
                let message = format!(
                    "this control plane has {differs} than the fleet: give all of them the same, or, if this is what they \
                     shall have from now on, stop the others and start this one with --new-keys"
                );
                return Err(JournalError::Setting(message).into());
            }
            _ => {}
        }
        let value = serde_json::to_vec(keys).expect("it has only strings");
        match state.put_row(KEYS_ROW, value) {
            Err(StateError::Journal(JournalError::Stale)) if tries < TRIES => {
                tries += 1;
                super::follow::catch_up(journal, state)?;
            }
            other => return other,
        }
    }
}
