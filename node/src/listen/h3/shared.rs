//! What the tasks of one connection have in common.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::code::{Code, Scope, Wrong};
use super::control::Peer;
use super::glitches::{Glitches, Verdict};
use super::priority::Priority;
use crate::listen::patience::Patience;
use crate::listen::source::{Place, Sources};
use crate::serve::Parts;

/// Bytes of field sections that came in part, on all streams of a connection: so many of the largest that are taken.
const KEPT_HEADS_MAX: usize = 16;
/// Bytes of one HEADERS frame, in parts of what its fields may be: so that a client hears 431 and not a reset.
const HEADERS_PARTS: u64 = 4;
/// Priorities of requests that are kept. The oldest goes first.
const PRIORITIES_MAX: usize = 128;
/// Answers that are looked through for those that have arrived.
const DELIVERING_SWEEP: usize = 256;

/// That the client is who began the handshake, and did so now: until then somebody may send again what another one sent
/// once (RFC 8446 8). Clones are of one connection.
#[derive(Clone)]
pub(in crate::listen) struct Proof(Option<CancellationToken>);

impl Proof {
    /// There from the start.
    pub(in crate::listen) fn at_hand() -> Self {
        Self(None)
    }

    /// With the handshake's end.
    pub(in crate::listen) fn to_come() -> Self {
        Self(Some(CancellationToken::new()))
    }

    /// Here it is.
    pub(in crate::listen) fn give(&self) {
        self.0.iter().for_each(CancellationToken::cancel);
    }

    pub(super) fn is_there(&self) -> bool {
        self.0.as_ref().is_none_or(CancellationToken::is_cancelled)
    }

    /// Waits for it. The connection ends if it does not come.
    pub(super) async fn come(&self) {
        if let Some(given) = &self.0 {
            given.cancelled().await;
        }
    }
}

/// One connection.
pub(super) struct Shared {
    pub(super) quic: quinn::Connection,
    pub(super) parts: Arc<Parts>,
    pub(super) proof: Proof,
    sources: Arc<Sources>,
    place: Place,
    /// What the client opened once.
    pub(super) peer: Mutex<Peer>,
    /// Cancelled when no more requests should be taken.
    pub(super) leave: CancellationToken,
    glitches: Glitches,
    kept_bytes: AtomicUsize,
    priorities: Mutex<BTreeMap<u64, Priority>>,
    /// Counts changes of `priorities`, so that who answers need not look.
    changes: AtomicU64,
    /// Answers that are out and may not all have arrived.
    delivering: Mutex<Vec<quinn::SendStream>>,
}

impl Shared {
    pub(super) fn new(
        quic: quinn::Connection,
        parts: Arc<Parts>,
        (sources, place): (Arc<Sources>, Place),
        proof: Proof,
    ) -> Self {
        Self {
            quic,
            proof,
            glitches: Glitches::new(parts.front.glitches_max),
            parts,
            sources,
            place,
            peer: Mutex::default(),
            leave: CancellationToken::new(),
            kept_bytes: AtomicUsize::new(0),
            priorities: Mutex::default(),
            changes: AtomicU64::new(0),
            delivering: Mutex::default(),
        }
    }

    /// The client did something wrong. If it costs the connection, that is over.
    pub(super) fn wrong(&self, wrong: Wrong) {
        self.parts.metrics.refused_below_http(crate::request::Protocol::H3, wrong.code.as_str());
        match wrong.scope {
            Scope::Connection => self.close(wrong.code, wrong.reason),
            Scope::Stream => {
                tracing::debug!(client = %self.quic.remote_address(), reason = wrong.reason, "request refused");
                self.glitch();
            }
        }
    }

    /// Bytes of a field section.
    pub(super) fn head_bytes_max(&self) -> usize {
        self.parts.front.head_bytes_max as usize
    }

    /// Bytes of a HEADERS frame.
    pub(super) fn headers_bytes_max(&self) -> u64 {
        u64::from(self.parts.front.head_bytes_max) * HEADERS_PARTS
    }

    /// Whether this client may ask for one thing more.
    pub(super) fn may_ask(&self, client: IpAddr) -> bool {
        self.sources.may_ask(&self.place, client)
    }

    /// How long a client may be waited for that sends a body.
    pub(super) fn patience_with_body(&self) -> Patience {
        let front = &self.parts.front;
        Patience::new(Duration::from_millis(front.body_idle_ms), front.bytes_per_second_min)
    }

    /// And one that takes an answer.
    pub(super) fn patience_with_answer(&self) -> Patience {
        let front = &self.parts.front;
        Patience::new(Duration::from_millis(front.write_idle_ms), front.bytes_per_second_min)
    }

    /// Something happened of which there must not be much.
    pub(super) fn glitch(&self) {
        self.glitches(1);
    }

    /// The same, so many times.
    pub(super) fn glitches(&self, count: u32) {
        match self.glitches.note(count) {
            Verdict::Bear => {}
            Verdict::Leave => self.leave.cancel(),
            Verdict::Cut => self.close(Code::ExcessiveLoad, "too many glitches"),
        }
    }

    /// A request was answered.
    pub(super) fn answered(&self) {
        self.glitches.forgive();
    }

    pub(super) fn close(&self, code: Code, reason: &'static str) {
        if self.quic.close_reason().is_none() {
            tracing::debug!(client = %self.quic.remote_address(), ?code, reason, "connection closed");
        }
        // The reason stays here: it would tell an attacker how far it got.
        self.quic.close(code.into(), b"");
    }

    /// A stream keeps `now` bytes where it kept `before`.
    pub(super) fn keep(&self, before: usize, now: usize) -> Result<(), Wrong> {
        if now <= before {
            self.kept_bytes.fetch_sub(before - now, Ordering::Relaxed);
            return Ok(());
        }
        let all = self.kept_bytes.fetch_add(now - before, Ordering::Relaxed) + (now - before);
        if all > KEPT_HEADS_MAX * self.head_bytes_max() {
            return Err(Wrong::stream(Code::ExcessiveLoad, "too many unfinished heads"));
        }
        Ok(())
    }

    /// The client wants the answer on this stream with this priority (RFC 9218 7).
    pub(super) fn set_priority(&self, stream: u64, priority: Priority) {
        let mut priorities = lock(&self.priorities);
        priorities.insert(stream, priority);
        if priorities.len() > PRIORITIES_MAX {
            priorities.pop_first();
        }
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// How often a priority changed.
    pub(super) fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// What the client said in a frame.
    pub(super) fn priority(&self, stream: u64) -> Option<Priority> {
        lock(&self.priorities).get(&stream).copied()
    }

    /// An answer is out. It is watched until it has arrived.
    pub(super) fn deliver(&self, stream: quinn::SendStream) {
        let mut delivering = lock(&self.delivering);
        if delivering.len() >= DELIVERING_SWEEP {
            sweep(&mut delivering);
        }
        delivering.push(stream);
    }

    /// The first answer that is out and has not all arrived.
    pub(super) fn undelivered(&self) -> Option<u64> {
        let mut delivering = lock(&self.delivering);
        sweep(&mut delivering);
        delivering.iter().map(|stream| u64::from(quinn::VarInt::from(stream.id()))).min()
    }
}

/// Takes out what has arrived, or was given up: quinn knows nothing of it any more.
fn sweep(delivering: &mut Vec<quinn::SendStream>) {
    delivering.retain(|stream| stream.priority().is_ok());
}

/// Nothing panics while it holds a lock of this file.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
