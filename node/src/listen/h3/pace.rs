//! Whether a client takes what it asked for. One that reads a byte now and then holds the answers of a whole connection in
//! our memory.

use std::time::{Duration, Instant};

/// The pace of one connection.
#[derive(Debug)]
pub(super) struct Pace {
    /// Over how long it is judged.
    window: Duration,
    /// Bytes that must go out within that.
    bytes_min: u64,
    since: Option<Mark>,
}

#[derive(Debug)]
struct Mark {
    at: Instant,
    oldest: u64,
    sent_bytes: u64,
}

impl Pace {
    pub(super) fn new(window: Duration, bytes_per_second_min: u32) -> Self {
        let millis = u64::try_from(window.as_millis()).unwrap_or(u64::MAX);
        let bytes_min = (millis.saturating_mul(bytes_per_second_min.into()) / 1_000).max(1);
        Self { window, bytes_min, since: None }
    }

    /// Whether the client is too slow. `oldest` is the first answer that is out but has not all arrived, `sent_bytes` all
    /// that was ever sent.
    pub(super) fn is_too_slow(&mut self, now: Instant, oldest: Option<u64>, sent_bytes: u64) -> bool {
        let Some(oldest) = oldest else {
            self.since = None;
            return false;
        };
        match &self.since {
            // The first one is still the first one: what matters is how much has gone out meanwhile.
            Some(mark) if mark.oldest == oldest => {
                if now.saturating_duration_since(mark.at) < self.window {
                    return false;
                }
                if sent_bytes.saturating_sub(mark.sent_bytes) < self.bytes_min {
                    return true;
                }
            }
            _ => {}
        }
        self.since = Some(Mark { at: now, oldest, sent_bytes });
        false
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const SECOND: Duration = Duration::from_secs(1);

    /// Looks each second at a connection that sends so many bytes in one. Returns when it was too slow.
    fn slow_after(bytes: u64, oldest: impl Fn(u64) -> Option<u64>) -> Option<u64> {
        let (start, mut pace) = (Instant::now(), Pace::new(SECOND * 60, 1_024));
        (0..600_u64).find(|second| {
            let now = start + SECOND * u32::try_from(*second).unwrap();
            pace.is_too_slow(now, oldest(*second), bytes * second)
        })
    }

    #[test]
    fn who_takes_less_than_a_kibibyte_each_second_is_too_slow() {
        assert_eq!(slow_after(1_000, |_| Some(0)), Some(60));
        assert_eq!(slow_after(0, |_| Some(0)), Some(60));
        assert_eq!(slow_after(1_024, |_| Some(0)), None);
    }

    #[test]
    fn who_waits_for_nothing_or_takes_one_answer_after_the_other_is_not() {
        assert_eq!(slow_after(0, |_| None), None);
        assert_eq!(slow_after(0, |second| Some(second / 59)), None);
        assert_eq!(slow_after(0, |second| (second % 60 != 0).then_some(7)), None);
    }
}
