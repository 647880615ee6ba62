//! How long a client may keep us waiting.

use std::future::Future;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll};
use std::time::Duration;

use tokio::time::{Instant, Sleep, sleep};

/// Nanoseconds in a second.
const NANOS: u64 = 1_000_000_000;

/// A store of time that waiting uses up and every byte fills again, never above where it began.
///
/// A client that sends nothing ends it after `idle`, and one that sends less than so many bytes a second a little later:
/// whatever it sends in between, it can't hold what waits for it for longer than its bytes are worth.
#[derive(Debug)]
pub(super) struct Patience {
    idle: Duration,
    left: Duration,
    of_byte: Duration,
    waiting: Option<(Instant, Pin<Box<Sleep>>)>,
}

impl Patience {
    pub(super) fn new(idle: Duration, bytes_per_second_min: u32) -> Self {
        let of_byte = Duration::from_nanos(NANOS / u64::from(bytes_per_second_min.max(1)));
        Self { idle, left: idle, of_byte, waiting: None }
    }

    /// So many bytes came or went: nothing is waited for any more.
    pub(super) fn moved(&mut self, bytes: usize) {
        if let Some((since, _)) = self.waiting.take() {
            self.spend(since.elapsed());
        }
        if self.left < self.idle {
            let bytes = u32::try_from(bytes).unwrap_or(u32::MAX);
            self.left = self.left.saturating_add(self.of_byte.saturating_mul(bytes)).min(self.idle);
        }
    }

    fn spend(&mut self, waited: Duration) {
        self.left = self.left.saturating_sub(waited);
    }

    /// The client is waited for. Ready when it was for too long.
    pub(super) fn poll_wait(&mut self, cx: &mut Context<'_>) -> Poll<io::Error> {
        let left = self.left;
        let (_, end) = self.waiting.get_or_insert_with(|| (Instant::now(), Box::pin(sleep(left))));
        end.as_mut().poll(cx).map(|()| io::Error::new(io::ErrorKind::TimedOut, "client is too slow"))
    }
}

#[cfg(test)]
mod tests {
    use std::future::poll_fn;

    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// How many times a client may be waited for so long, when it moves so many bytes each time.
    fn lasts(bytes: usize, each: Duration) -> usize {
        let mut patience = Patience::new(SECOND * 30, 1_024);
        let mut count = 0;
        while count < 10_000 {
            patience.spend(each);
            if patience.left.is_zero() {
                break;
            }
            patience.moved(bytes);
            count += 1;
        }
        count
    }

    #[test]
    fn a_client_that_is_silent_or_too_slow_runs_out_of_time() {
        assert_eq!(lasts(0, SECOND * 30), 0);
        assert_eq!(lasts(1, SECOND), 30);
        assert!((58..=60).contains(&lasts(512, SECOND)), "{}", lasts(512, SECOND));
        assert_eq!(lasts(1_025, SECOND), 10_000);
        assert_eq!(lasts(64 * 1_024, SECOND * 29), 10_000);
    }

    #[tokio::test]
    async fn what_came_fast_buys_no_long_silence() {
        let idle = Duration::from_millis(20);
        let mut patience = Patience::new(idle, 1);
        patience.moved(usize::MAX);
        let start = Instant::now();
        let error = poll_fn(|cx| patience.poll_wait(cx)).await;
        assert_eq!((error.kind(), patience.left), (io::ErrorKind::TimedOut, idle));
        assert!(start.elapsed() >= idle);
        patience.moved(0);
        assert_eq!(patience.left, Duration::ZERO);
    }
}
