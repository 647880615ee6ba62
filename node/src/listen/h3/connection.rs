//! One connection: it takes requests until it is time to leave, and then leaves so that no request is lost.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher as _;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Buf as _;
use futures_util::FutureExt as _;
use selvage_config::front::Front;
use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::code::{Code, Scope, Wrong};
use super::control::{self, Told};
use super::exchange::exchange;
use super::pace::Pace;
use super::shared::{Proof, Shared, lock};
use super::{frames, integer};
use crate::listen::source::{Place, Sources};
use crate::request::Protocol;
use crate::serve::Parts;

/// Connections of one age don't all end at once: each ends this part of its time earlier, at most.
const AGE_SPREAD: u32 = 10;
/// How often a connection is looked at, at least. Where its times are shorter, it is more often.
const LOOK: Duration = Duration::from_secs(5);
/// For us to tell a client something on the control stream.
const CONTROL_MAX: Duration = Duration::from_secs(10);
/// Frames of QUIC that serve nothing which a client may send in one second without their being counted: it keeps a
/// connection alive, and looks for another way to us, with less.
const PROBES_PER_SECOND: u32 = 10;
/// Round trips that a client has to hear that the connection is leaving, or that a request was refused: one, and as long as
/// it takes to find that a packet was lost (RFC 9002 6.2).
const TRIPS: u32 = 3;
/// The least time for the former.
const WARNING_MIN: Duration = Duration::from_secs(1);
/// The least and the most for the latter, and for the client to go by itself when its last answer has arrived.
const LINGER_MIN: Duration = Duration::from_millis(200);
const LINGER_MAX: Duration = Duration::from_secs(2);
/// How long a client that goes on asking is told that it is refused.
const REFUSING_MAX: Duration = Duration::from_secs(5);
/// How often it is looked at whether the last answer has arrived.
const LINGER_LOOK: Duration = Duration::from_millis(20);
/// The largest identifier of a request's stream: it promises that nothing is refused yet (RFC 9114 5.2).
const LAST_STREAM: u64 = integer::MAX - 3;
/// Identifiers of the streams of requests are this far apart (RFC 9000 2.1).
const STREAM_STEP: u64 = 4;
/// Bytes that are taken at once from a stream in one direction.
const CHUNK_BYTES_MAX: usize = 4 * 1024;

/// How far a connection is from its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Leaving {
    /// It stays.
    No,
    /// The client has been told that it will; requests that are on their way are taken until then.
    Warned { until: Instant },
    /// The client has been told which requests are taken. It may send all others to somebody else.
    Told { first_refused: u64 },
}

/// Closes a connection whose task is cut off. quinn ends the streams of a dropped request as if they were whole, so
/// the connection must be gone before that.
struct CutOff(quinn::Connection);

impl Drop for CutOff {
    fn drop(&mut self) {
        self.0.close(Code::Internal.into(), b"");
    }
}

/// One connection.
struct Connection {
    shared: Arc<Shared>,
    control: quinn::SendStream,
    requests: JoinSet<()>,
    streams: JoinSet<()>,
    leaving: Leaving,
    /// Requests that came.
    count: u64,
    /// The stream after the last one that was taken.
    next: u64,
    /// When it was last seen with a request.
    busy: Instant,
    pace: Pace,
    /// When it was last looked at, and how many frames of QUIC that serve nothing had come by then.
    probed: (Instant, u64),
}

/// Serves a connection to its end.
pub(in crate::listen) async fn connection(
    quic: quinn::Connection,
    parts: Arc<Parts>,
    (sources, place): (Arc<Sources>, Place),
    proof: Proof,
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let _open = parts.metrics.connection(Protocol::H3);
    let cut_off = CutOff(quic.clone());
    let front = Arc::clone(&parts.front);
    let control = timeout(CONTROL_MAX, greet(&quic, front.head_bytes_max)).await??;
    let mut connection = Connection {
        shared: Arc::new(Shared::new(quic.clone(), parts, (sources, place), proof)),
        control,
        requests: JoinSet::new(),
        streams: JoinSet::new(),
        leaving: Leaving::No,
        count: 0,
        next: 0,
        busy: Instant::now(),
        pace: Pace::new(Duration::from_millis(front.write_idle_ms), front.bytes_per_second_min),
        probed: (Instant::now(), 0),
    };
    connection.run(&stop).await?;
    connection.linger().await;
    quic.close(Code::NoError.into(), b"");
    drop(cut_off);
    Ok(())
}

/// Opens our control stream (RFC 9114 6.2.1). QPACK needs no streams: what is not said of its table is 0.
async fn greet(quic: &quinn::Connection, head_bytes_max: u32) -> anyhow::Result<quinn::SendStream> {
    let mut control = quic.open_uni().await?;
    let (mut settings, mut greeting) = (Vec::new(), Vec::new());
    integer::write(control::MAX_FIELD_SECTION_SIZE, &mut settings);
    integer::write(head_bytes_max.into(), &mut settings);
    integer::write(control::CONTROL, &mut greeting);
    integer::write(frames::SETTINGS, &mut greeting);
    integer::write(settings.len() as u64, &mut greeting);
    greeting.extend_from_slice(&settings);
    control.write_all(&greeting).await?;
    Ok(control)
}

impl Connection {
    /// Takes requests until there are no more to come.
    async fn run(&mut self, stop: &CancellationToken) -> anyhow::Result<()> {
        let front = Arc::clone(&self.shared.parts.front);
        let streams_max = front.streams_max as usize;
        let oldest = Instant::now() + age_max(&front);
        let mut look = interval(look_every(&front));
        look.set_missed_tick_behavior(MissedTickBehavior::Delay);
        let (quic, leave) = (self.shared.quic.clone(), self.shared.leave.clone());
        loop {
            let until = match self.leaving {
                Leaving::Warned { until } => Some(until),
                Leaving::Told { .. } if self.requests.is_empty() => return Ok(()),
                _ => None,
            };
            let stays = self.leaving == Leaving::No;
            let full = self.requests.len() >= streams_max;
            // Each branch may be dropped: what it waits for stays where it is.
            tokio::select! {
                accepted = quic.accept_bi(), if !full => {
                    let Ok((send, receive)) = accepted else { return Ok(()) };
                    self.take(send, receive).await?;
                    while self.requests.len() < streams_max
                        && let Some(Ok((send, receive))) = quic.accept_bi().now_or_never()
                    {
                        self.take(send, receive).await?;
                    }
                }
                accepted = quic.accept_uni() => {
                    let Ok(receive) = accepted else { return Ok(()) };
                    while self.streams.try_join_next().is_some() {}
                    self.streams.spawn(listen(Arc::clone(&self.shared), receive));
                }
                Some(_) = self.requests.join_next(), if full || !stays => {}
                () = stop.cancelled(), if stays => self.warn().await?,
                () = leave.cancelled(), if stays => self.warn().await?,
                () = sleep_until(until.unwrap_or(oldest).into()), if until.is_some() => self.tell().await?,
                _ = look.tick() => self.look(oldest).await?,
            }
        }
    }

    /// A request's stream was opened.
    async fn take(&mut self, send: quinn::SendStream, receive: quinn::RecvStream) -> anyhow::Result<()> {
        let id = u64::from(quinn::VarInt::from(send.id()));
        self.count += 1;
        if let Leaving::Told { first_refused } = self.leaving
            && id >= first_refused
        {
            reject(send, receive);
            return Ok(());
        }
        self.next = id + STREAM_STEP;
        self.busy = Instant::now();
        while self.requests.try_join_next().is_some() {}
        // In a box of its own, so that what is made, moved and read of the task itself is small.
        self.requests.spawn(Box::pin(exchange(Arc::clone(&self.shared), send, receive)));
        let front = &self.shared.parts.front;
        let (requests_max, streams_max) = (front.streams_per_connection_max, front.streams_max);
        match self.leaving {
            Leaving::No if self.count >= requests_max => self.warn().await,
            // As many as can have been on their way.
            Leaving::Warned { .. } if self.count >= requests_max + u64::from(streams_max) => self.tell().await,
            _ => Ok(()),
        }
    }

    /// It is time to leave: the client shall begin nothing new, and is told so before anything is refused.
    async fn warn(&mut self) -> anyhow::Result<()> {
        let trips = (self.shared.quic.rtt() * TRIPS).clamp(WARNING_MIN, CONTROL_MAX);
        self.leaving = Leaving::Warned { until: Instant::now() + trips };
        self.goaway(LAST_STREAM).await
    }

    /// What has not come by now is refused.
    async fn tell(&mut self) -> anyhow::Result<()> {
        self.leaving = Leaving::Told { first_refused: self.next };
        self.goaway(self.next).await
    }

    /// RFC 9114 7.2.6.
    async fn goaway(&mut self, first_refused: u64) -> anyhow::Result<()> {
        let (mut id, mut frame) = (Vec::new(), Vec::new());
        integer::write(first_refused, &mut id);
        integer::write(frames::GOAWAY, &mut frame);
        integer::write(id.len() as u64, &mut frame);
        frame.extend_from_slice(&id);
        timeout(CONTROL_MAX, self.control.write_all(&frame)).await??;
        Ok(())
    }

    /// Looks at how the connection is used.
    async fn look(&mut self, oldest: Instant) -> anyhow::Result<()> {
        let now = Instant::now();
        while self.requests.try_join_next().is_some() {}
        let undelivered = self.shared.undelivered();
        let idle_max = Duration::from_millis(self.shared.parts.front.idle_ms);
        self.count_probes(now);
        if !self.requests.is_empty() || undelivered.is_some() {
            self.busy = now;
        }
        let sent_bytes = self.shared.quic.stats().udp_tx.bytes;
        if self.pace.is_too_slow(now, undelivered, sent_bytes) {
            self.shared.wrong(Wrong {
                scope: Scope::Connection,
                code: Code::ExcessiveLoad,
                reason: "client takes nothing",
            });
        }
        if self.leaving == Leaving::No && (now >= oldest || now.saturating_duration_since(self.busy) >= idle_max) {
            self.warn().await?;
        }
        Ok(())
    }

    /// QUIC answers pings and the like by itself: what is beyond a client's needs is counted afterwards.
    fn count_probes(&mut self, now: Instant) {
        let (before, seen) = self.probed;
        let came = self.shared.quic.stats().frame_rx;
        let all = came.ping + came.path_challenge + came.new_connection_id + came.retire_connection_id;
        let seconds = now.saturating_duration_since(before).as_secs_f64();
        // Truncated: a part of one is none.
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
        let free = (seconds * f64::from(PROBES_PER_SECOND)) as u64 + u64::from(PROBES_PER_SECOND);
        self.probed = (now, all);
        let beyond = (all - seen).saturating_sub(free);
        self.shared.glitches(u32::try_from(beyond).unwrap_or(u32::MAX));
    }

    /// Waits until the last answer has arrived, and a moment longer for the client to go by itself. What it asks for
    /// meanwhile is refused in so many words: a closed connection would leave it in doubt.
    async fn linger(&mut self) {
        while self.requests.join_next().await.is_some() {}
        let quic = self.shared.quic.clone();
        let enough = (quic.rtt() * TRIPS).clamp(LINGER_MIN, LINGER_MAX);
        let (mut arrived, mut refused) = (Instant::now(), Instant::now());
        loop {
            let now = Instant::now();
            match self.shared.undelivered() {
                Some(oldest) if self.pace.is_too_slow(now, Some(oldest), quic.stats().udp_tx.bytes) => return,
                Some(_) => (arrived, refused) = (now, now),
                None if now.saturating_duration_since(refused) >= enough => return,
                None if now.saturating_duration_since(arrived) >= REFUSING_MAX => return,
                None => {}
            }
            // Either may be dropped: a stream that is not accepted stays in the connection.
            match timeout(LINGER_LOOK, quic.accept_bi()).await {
                Ok(Ok((send, receive))) => {
                    reject(send, receive);
                    // It has to hear of that too, and may have asked for more.
                    refused = Instant::now();
                }
                Ok(Err(_)) => return,
                Err(_) => {}
            }
        }
    }
}

/// RFC 9114 5.2: not begun, so that the client may send it to somebody else. Fails only if that gave up.
fn reject(mut send: quinn::SendStream, mut receive: quinn::RecvStream) {
    let _ = send.reset(Code::RequestRejected.into());
    let _ = receive.stop(Code::RequestRejected.into());
}

/// How old a connection may get: not all that came at once should go at once.
fn age_max(front: &Front) -> Duration {
    // The standard library's hash keys are the one source of randomness that can't fail.
    let part = u32::try_from(RandomState::new().hash_one(0) % 1_000).unwrap_or_default();
    let age = Duration::from_millis(front.age_ms);
    age - age / (AGE_SPREAD * 1_000) * part
}

/// Often enough to end what is idle or too slow in its time, nearly.
fn look_every(front: &Front) -> Duration {
    let shortest = Duration::from_millis(front.idle_ms.min(front.write_idle_ms)) / 2;
    LOOK.min(shortest).max(LINGER_LOOK)
}

/// Reads one stream in one direction to its end.
async fn listen(shared: Arc<Shared>, mut receive: quinn::RecvStream) {
    let mut stream = control::Stream::new();
    let mut told = Vec::new();
    loop {
        let chunk = receive.read_chunk(CHUNK_BYTES_MAX, true).await;
        let read = match &chunk {
            Ok(Some(chunk)) => stream.read(chunk.bytes.chunk(), &mut lock(&shared.peer), &mut told),
            Ok(None) | Err(quinn::ReadError::Reset(_)) => stream.end(),
            Err(_) => return,
        };
        for told in told.drain(..) {
            match told {
                Told::Priority(id, priority) => shared.set_priority(id, priority),
                Told::Idle => shared.glitch(),
            }
        }
        if let Err(wrong) = read {
            return shared.wrong(wrong);
        }
        if stream.is_of_no_use() {
            shared.glitch();
            // Fails only where it has ended (RFC 9114 6.2).
            let _ = receive.stop(Code::StreamCreation.into());
            return;
        }
        if !matches!(chunk, Ok(Some(_))) {
            return;
        }
    }
}
