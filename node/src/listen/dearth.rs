//! A time in which the system has no descriptor or memory for another connection (accept(2): EMFILE, ENFILE, ENOBUFS,
//! ENOMEM).
//!
//! The connection that could not be taken stays in the queue, so the listener is readable all the time and asking again at
//! once would fail at once. It is asked again after a pause, and served when somebody has let go of what was missing.

use std::io;
use std::time::{Duration, Instant};

use tokio::time::sleep;

/// Pause before the system is asked again.
const PAUSE: Duration = Duration::from_millis(100);
/// How often it is told.
const TOLD: Duration = Duration::from_secs(60);

/// What one listener remembers of it.
#[derive(Debug)]
pub(crate) struct Dearth {
    listener: &'static str,
    told: Option<Instant>,
}

impl Dearth {
    /// There is none yet at this listener.
    pub(crate) fn at(listener: &'static str) -> Self {
        Self { listener, told: None }
    }

    /// The system refused once more: tells it once in a while, and waits.
    pub(crate) async fn pause(&mut self, error: &io::Error) {
        if self.is_news(Instant::now()) {
            tracing::warn!(%error, listener = self.listener, "no connection can be accepted");
        }
        sleep(PAUSE).await;
    }

    fn is_news(&mut self, now: Instant) -> bool {
        let is_news = self.told.is_none_or(|told| now.saturating_duration_since(told) >= TOLD);
        if is_news {
            self.told = Some(now);
        }
        is_news
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lasts_is_told_once_in_a_while() {
        let (mut dearth, start) = (Dearth::at("test"), Instant::now());
        let told = |second| dearth.is_news(start + Duration::from_secs(second));
        assert_eq!((0..=125).map(told).filter(|is_news| *is_news).count(), 3);
    }

    #[tokio::test]
    async fn the_system_is_not_asked_at_once() {
        let start = Instant::now();
        Dearth::at("test").pause(&io::Error::from_raw_os_error(24)).await;
        assert!(start.elapsed() >= PAUSE);
    }
}
