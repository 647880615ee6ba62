//! Questions to a peer: each on a stream of its own, beside the one that replicates, with one frame each way.
//!
//! Either side of a link may ask. A question ends with its stream: an asker that stops waiting resets it, and a frame
//! that was cut short is never taken for one.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use quinn::{Connection, RecvStream, SendStream, VarInt};
use selvage_config::NodeName;
use tokio::sync::{OwnedSemaphorePermit, Semaphore, mpsc, oneshot};
use tokio::task::JoinSet;
use tokio::time::{Instant, timeout, timeout_at};

use super::{Context, Ended, FRAME_MS};
use crate::home::wire::{Answer, FRAME_BYTES_MAX, Request};
use crate::wire::{LENGTH_BYTES, Message, Versions};

/// Questions of one peer under way at once; it waits with more.
pub(super) const STREAMS_MAX: u32 = 256;

/// Bytes of questions that are being read or decided, of all peers together. Their streams wait for room.
const QUESTIONS_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Bytes of answers that arrive, of all peers together.
const ANSWERS_BYTES_MAX: usize = 64 * 1024 * 1024;

/// Bytes of a frame that are read before more room is made.
const PIECE_BYTES: usize = 64 * 1024;

/// How long an answer may take to leave, milliseconds.
const ANSWER_MS: u64 = 30_000;

/// A peer's question. It has no answer if `reply` is dropped.
pub(crate) struct Asked {
    pub(crate) peer: NodeName,
    pub(crate) request: Request,
    pub(crate) reply: oneshot::Sender<Answer>,
    pub(crate) _room: OwnedSemaphorePermit,
}

/// Why a question has no answer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Unanswered {
    /// There is no link, or it broke before anything was asked.
    NoLink,
    /// The peer speaks no version of the protocol that has such questions.
    Older,
    /// Nothing was asked in time: too many questions are under way.
    Busy,
    /// It was asked, and the link broke or it took too long. It may have been done.
    Unknown,
}

/// The links that stand, and what may be asked and read by them.
pub(super) struct Standing {
    links: Mutex<BTreeMap<NodeName, Peer>>,
    questions: Arc<Semaphore>,
    answers: Arc<Semaphore>,
    asked: mpsc::Sender<Asked>,
}

struct Peer {
    session: u64,
    connection: Connection,
    versions: Option<Versions>,
}

/// Ends a peer's entry with its link.
pub(super) struct Stands<'c> {
    standing: &'c Standing,
    peer: NodeName,
    session: u64,
}

impl Drop for Stands<'_> {
    fn drop(&mut self) {
        let mut links = self.standing.links.lock().unwrap_or_else(PoisonError::into_inner);
        if links.get(&self.peer).is_some_and(|known| known.session == self.session) {
            links.remove(&self.peer);
        }
    }
}

impl Standing {
    pub(super) fn new(asked: mpsc::Sender<Asked>) -> Self {
        let (questions, answers) = (Semaphore::new(QUESTIONS_BYTES_MAX), Semaphore::new(ANSWERS_BYTES_MAX));
        Self { links: Mutex::default(), questions: Arc::new(questions), answers: Arc::new(answers), asked }
    }

    /// A link stands until what this returns is dropped.
    pub(super) fn stands(&self, peer: &NodeName, session: u64, connection: &Connection) -> Stands<'_> {
        let known = Peer { session, connection: connection.clone(), versions: None };
        self.links.lock().unwrap_or_else(PoisonError::into_inner).insert(peer.clone(), known);
        Stands { standing: self, peer: peer.clone(), session }
    }

    /// Hears what a peer says of itself.
    pub(super) fn heard(&self, peer: &NodeName, session: u64, message: &Message) {
        if let Message::Hello { versions, .. } = message {
            let mut links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(known) = links.get_mut(peer).filter(|known| known.session == session) {
                known.versions = Some(*versions);
            }
        }
    }

    /// How long a packet to a peer and back takes; none without a link.
    pub(super) fn round_trip(&self, peer: &NodeName) -> Option<Duration> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        links.get(peer).map(|known| known.connection.rtt())
    }

    fn connection(&self, peer: &NodeName, since: u16) -> Result<Connection, Unanswered> {
        let links = self.links.lock().unwrap_or_else(PoisonError::into_inner);
        let known = links.get(peer).ok_or(Unanswered::NoLink)?;
        match known.versions {
            Some(versions) if versions.max >= since => Ok(known.connection.clone()),
            Some(_) => Err(Unanswered::Older),
            None => Err(Unanswered::NoLink),
        }
    }

    /// Asks a peer. After `until` nothing is waited for.
    pub(super) async fn ask(&self, peer: &NodeName, question: &Request, until: Instant) -> Result<Bytes, Unanswered> {
        let connection = self.connection(peer, question.since())?;
        let opened = timeout_at(until, connection.open_bi()).await.map_err(|_| Unanswered::Busy)?;
        let (mut send, mut receive) = opened.map_err(|_| Unanswered::NoLink)?;
        let asking = async {
            put(&mut send, question.encode()).await.ok()?;
            frame(&mut receive, &self.answers).await.map(|(answer, _room)| answer)
        };
        match timeout_at(until, asking).await {
            Ok(Some(answer)) => Ok(answer),
            late => {
                // What is left of the question is not sent, so that a part of it is never taken for all.
                let _ended = send.reset(VarInt::from_u32(0));
                tracing::debug!(%peer, late = late.is_err(), "a question has no answer");
                Err(Unanswered::Unknown)
            }
        }
    }
}

/// Takes a peer's questions until the link ends.
pub(super) async fn answer(context: &Context, peer: &NodeName, connection: &Connection) -> Ended {
    let mut streams = JoinSet::new();
    loop {
        // Both wait for one thing and lose nothing if dropped.
        tokio::select! {
            accepted = connection.accept_bi() => match accepted {
                Ok((send, receive)) => {
                    let (standing, peer) = (Arc::clone(&context.standing), peer.clone());
                    streams.spawn(async move { answer_one(&standing, peer, send, receive).await });
                }
                Err(error) => return error.into(),
            },
            Some(_) = streams.join_next() => {}
        }
    }
}

/// Answers one question. Garbage is answered by nothing.
async fn answer_one(standing: &Standing, peer: NodeName, mut send: SendStream, mut receive: RecvStream) {
    let read = timeout(Duration::from_millis(FRAME_MS), frame(&mut receive, &standing.questions)).await;
    let asked = read.ok().flatten().and_then(|(body, room)| Some((Request::decode(body).ok()?, room)));
    let Some((request, _room)) = asked else {
        tracing::debug!(%peer, "a question that is none");
        let _ended = send.reset(VarInt::from_u32(1));
        return;
    };
    let (reply, answer) = oneshot::channel();
    if standing.asked.send(Asked { peer, request, reply, _room }).await.is_err() {
        return;
    }
    let Ok(answer) = answer.await else {
        let _ended = send.reset(VarInt::from_u32(2));
        return;
    };
    let _late_or_gone = timeout(Duration::from_millis(ANSWER_MS), put(&mut send, answer.encode())).await;
}

async fn put(stream: &mut SendStream, frame: Bytes) -> Result<(), quinn::WriteError> {
    let length = u32::try_from(frame.len()).unwrap_or(u32::MAX).to_be_bytes();
    stream.write_all(&length).await?;
    stream.write_chunk(frame).await?;
    // The other side waits for no more than the frame, so an end that is there already does no harm.
    let _ended = stream.finish();
    Ok(())
}

/// Reads one frame: room first, memory second, and no more memory than has arrived.
async fn frame(stream: &mut RecvStream, room: &Arc<Semaphore>) -> Option<(Bytes, OwnedSemaphorePermit)> {
    let mut field = [0; LENGTH_BYTES];
    stream.read_exact(&mut field).await.ok()?;
    let length = usize::try_from(u32::from_be_bytes(field)).ok().filter(|length| *length <= FRAME_BYTES_MAX)?;
    let permits = u32::try_from(length.max(1)).ok()?;
    let room = Arc::clone(room).acquire_many_owned(permits).await.ok()?;
    let mut body = Vec::new();
    while body.len() < length {
        let begun = body.len();
        body.resize((begun + PIECE_BYTES).min(length), 0);
        stream.read_exact(&mut body[begun..]).await.ok()?;
    }
    Some((body.into(), room))
}
