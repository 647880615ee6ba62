//! A connection over TCP from its first byte to its last: when it is asked to end, and when it is cut off.

use std::future::Future;
use std::pin::{Pin, pin};
use std::time::Duration;

use hyper::body::Incoming;
use hyper::server::conn::http2;
use selvage_config::front::Front;
use tokio::time::{Instant, sleep, sleep_until, timeout};
use tokio_util::sync::CancellationToken;

use super::activity::Activity;
use super::body::Outbound;
use super::crowd::Crowd;
use super::tasks::Tasks;

/// How long a client that was asked to go may stay without a request.
const GOODBYE: Duration = Duration::from_secs(5);
/// How long a connection still shakes hands, and one of HTTP/1.1 still takes a request, when it is time to leave. That
/// protocol has no word for it but the one in an answer (RFC 9112 9.6): a client that hears nothing before its connection
/// is closed may just have sent a request, and can't tell what became of it.
pub(super) const GRACE: Duration = Duration::from_secs(1);
/// How long a client that was cut off has to hear of it.
const LAST_WORDS: Duration = Duration::from_millis(250);
/// From when on a connection without a request is at rest. It is seen when its times are looked at.
const REST: Duration = Duration::from_secs(1);
/// Connections of one age don't all end at once: each ends this part of its time earlier, at most.
const AGE_SPREAD: u32 = 10;

/// A connection that can be asked to end.
pub(super) trait Drain: Future<Output = hyper::Result<()>> {
    /// Takes no further request.
    fn drain(self: Pin<&mut Self>);

    /// Gives back what it can while no request is here.
    fn rest(self: Pin<&mut Self>) {}
}

impl<I, S> Drain for http2::Connection<I, S, Tasks>
where
    Self: Future<Output = hyper::Result<()>>,
    I: hyper::rt::Read + hyper::rt::Write + Unpin,
    S: hyper::service::HttpService<Incoming, ResBody = Outbound>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    Tasks: hyper::rt::bounds::Http2ServerConnExec<S::Future, Outbound>,
{
    fn drain(self: Pin<&mut Self>) {
        self.graceful_shutdown();
    }
}

/// The times of one connection.
#[derive(Debug, Clone, Copy)]
pub(super) struct Times {
    /// For the first request's head or preface, and for every head.
    head: Duration,
    /// Without a request.
    idle: Duration,
    /// From its beginning.
    age: Duration,
    /// Bytes that must come in the first of these times; 0 where the first head is what must.
    opening: u64,
    /// For a request after it is time to leave.
    grace: Duration,
}

/// What is to be done about a connection now.
#[derive(Debug, PartialEq, Eq)]
enum Due {
    /// Nothing before so long.
    Later(Duration),
    /// It should end when its requests have.
    Leave,
    /// It takes no more requests.
    Close,
    /// It ends.
    Cut(&'static str),
}

impl Times {
    /// `spread` is a random number: see [`AGE_SPREAD`].
    pub(super) fn new(front: &Front, opening: u64, spread: u32) -> Self {
        let age = Duration::from_millis(front.age_ms);
        let earlier = age / (AGE_SPREAD * 1_000) * (spread % 1_000);
        let (head, idle) = (Duration::from_millis(front.head_ms), Duration::from_millis(front.idle_ms));
        // HTTP/2 says by itself which requests it has taken.
        let grace = if opening == 0 { GRACE } else { Duration::ZERO };
        Self { head, idle, age: age - earlier, opening, grace }
    }

    /// The same where there are so many others.
    fn among(&self, crowd: &Crowd) -> Self {
        Self { idle: crowd.bears(self.idle), ..*self }
    }

    /// What is due. `left` is when the client was asked to leave, as the connection's age.
    fn due(&self, activity: &Activity, left: Option<Duration>) -> Due {
        let (now, rested) = (activity.age(), activity.rested());
        // A head may begin at any time: it is looked at often enough to end it in its time.
        let mut next = self.head;
        let mut over = |deadline: Duration| {
            next = next.min(deadline.saturating_sub(now));
            deadline <= now
        };
        if activity.read_bytes() < self.opening && over(self.head) {
            return Due::Cut("no preface");
        }
        if !activity.is_busy() {
            let begun = activity.head_begun();
            let silent = self.opening == 0 && activity.requests() == 0;
            let head = begun.map(|begun| begun.max(rested)).or(silent.then_some(Duration::ZERO));
            if head.is_some_and(|begun| over(begun + self.head)) {
                return Due::Cut("no head");
            }
            match left.map(|left| left.max(rested) + self.grace) {
                Some(free) if begun.is_none() && over(free + GOODBYE) => return Due::Cut("idle"),
                Some(free) if begun.is_none() && over(free) => return Due::Close,
                None if over(rested + self.idle) => return Due::Leave,
                _ => {}
            }
        } else if left.is_some() && !self.grace.is_zero() {
            // Its time begins when this request ends.
            over(now + self.grace);
        }
        if left.is_none() && over(self.age) { Due::Leave } else { Due::Later(next) }
    }
}

/// Runs a connection to its end. It is asked to end when the listener stops, when its time is over and when its client
/// makes nothing but work, and cut off when it does not heed that.
pub(super) async fn drive(
    mut connection: Pin<&mut impl Drain>,
    activity: &Activity,
    (times, crowd): (&Times, &Crowd),
    stop: CancellationToken,
) -> anyhow::Result<()> {
    let mut look = pin!(sleep(times.head));
    let mut left = None;
    loop {
        // The connection and the clock are polled by reference; the others may be dropped. That it is time to leave is seen
        // before the next request, whose answer has to say so.
        let leave = tokio::select! {
            biased;
            () = stop.cancelled(), if left.is_none() => true,
            ended = connection.as_mut() => return Ok(ended?),
            () = activity.urged() => {
                if activity.is_choked() {
                    connection.as_mut().drain();
                    // It fails when time is over: then the client has not heard of it.
                    let _ = timeout(LAST_WORDS, connection.as_mut()).await;
                    anyhow::bail!("client makes nothing but work");
                }
                true
            }
            () = look.as_mut() => {
                let (leave, next) = match times.among(crowd).due(activity, left) {
                    Due::Later(next) => {
                        if activity.is_at_rest(REST) {
                            connection.as_mut().rest();
                        }
                        (false, next)
                    }
                    Due::Leave => (true, GOODBYE),
                    Due::Close => {
                        connection.as_mut().drain();
                        (false, GOODBYE)
                    }
                    Due::Cut(why) => anyhow::bail!(why),
                };
                look.set(sleep_until(Instant::now() + next));
                leave
            }
        };
        if leave && left.is_none() {
            left = Some(activity.age());
            activity.leave();
            if times.grace.is_zero() {
                connection.as_mut().drain();
                look.set(sleep(GOODBYE));
            } else {
                look.set(sleep(times.grace));
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn times(head: u64, idle: u64, age: u64, opening: u64) -> Times {
        let ms = Duration::from_millis;
        Times { head: ms(head), idle: ms(idle), age: ms(age), opening, grace: Duration::ZERO }
    }

    const LONG: u64 = 3_600_000;
    const LONG_MS: Duration = Duration::from_millis(LONG);

    #[test]
    fn a_connection_that_says_nothing_is_cut_off() {
        let activity = Activity::new();
        assert_eq!(times(0, LONG, LONG, 24).due(&activity, None), Due::Cut("no preface"));
        assert_eq!(times(0, LONG, LONG, 0).due(&activity, None), Due::Cut("no head"));
        assert!(matches!(times(LONG, LONG, LONG, 24).due(&activity, None), Due::Later(_)));
        activity.read(24);
        assert!(matches!(times(0, LONG, LONG, 24).due(&activity, None), Due::Later(_)));
    }

    #[test]
    fn a_head_that_does_not_end_is_cut_off_and_a_request_is_not() {
        let activity = Activity::new();
        let (busy, _) = activity.begin();
        activity.head(true);
        assert!(matches!(times(0, 0, LONG, 0).due(&activity, None), Due::Later(_)));
        drop(busy);
        assert_eq!(times(0, LONG, LONG, 0).due(&activity, None), Due::Cut("no head"));
        activity.head(false);
        assert!(matches!(times(0, LONG, LONG, 0).due(&activity, None), Due::Later(_)));
    }

    #[test]
    fn a_connection_that_rests_or_is_old_is_asked_to_leave_and_then_cut_off() {
        let activity = Activity::new();
        let busy = activity.begin();
        assert_eq!(times(LONG, LONG, 0, 0).due(&activity, None), Due::Leave);
        assert!(matches!(times(LONG, 0, 0, 0).due(&activity, Some(Duration::ZERO)), Due::Later(_)));
        drop(busy);
        assert_eq!(times(LONG, 0, LONG, 0).due(&activity, None), Due::Leave);
        assert!(matches!(times(LONG, 0, 0, 0).due(&activity, Some(LONG_MS)), Due::Later(_)));
    }

    #[test]
    fn a_connection_that_should_go_takes_a_request_for_a_moment_more_and_a_begun_head_to_its_end() {
        let activity = Activity::new();
        let busy = activity.begin();
        drop(busy);
        let now = || Some(activity.age());
        let patient = Times { grace: LONG_MS, ..times(LONG, LONG, LONG, 0) };
        assert!(matches!(patient.due(&activity, now()), Due::Later(_)));
        let hasty = times(LONG, LONG, LONG, 0);
        assert_eq!(hasty.due(&activity, now()), Due::Close);
        activity.head(true);
        assert!(matches!(hasty.due(&activity, now()), Due::Later(_)));
        activity.head(false);
        let _busy = activity.begin();
        assert!(matches!(hasty.due(&activity, now()), Due::Later(_)));
    }

    #[test]
    fn connections_end_at_different_ages() {
        let front = Front { age_ms: 1_000_000, ..Front::default() };
        let age = |spread| Times::new(&front, 0, spread).age.as_secs();
        assert_eq!((age(0), age(1_999)), (1_000, 900));
    }
}
