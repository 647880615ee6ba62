//! When to renew a certificate, and how long to wait after it failed.
//!
//! Pure: time and chance are parameters. `chance` is between 0 and 1, so that nodes that began together do not ask an
//! authority together.

use std::time::{Duration, SystemTime};

use crate::Identity;

/// A renewal by age comes this part of the certificate's life earlier at most, by chance.
const EARLIER: f64 = 1.0 / 20.0;
/// How often an authority may want to be asked for its window (RFC 9773 4.3.2).
const LOOK: (Duration, Duration) = (Duration::from_secs(60), Duration::from_secs(86_400));

/// When an authority wants a certificate to be renewed (RFC 9773 4.2).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Window {
    /// From then on.
    pub start: SystemTime,
    /// Until then.
    pub end: SystemTime,
}

impl Window {
    /// A moment in it.
    pub fn choose(self, chance: f64) -> SystemTime {
        let length = self.end.duration_since(self.start).unwrap_or(Duration::ZERO);
        self.start + length.mul_f64(chance.clamp(0.0, 1.0))
    }

    /// How long to wait until the authority is asked for the window again, which said `asked`.
    pub fn look_after(asked: Duration) -> Duration {
        asked.clamp(LOOK.0, LOOK.1)
    }
}

impl Identity {
    /// When to replace a certificate whose authority does not say: when two thirds of its life are over, or a little
    /// before.
    pub fn renew_by_age(&self, chance: f64) -> SystemTime {
        let life = self.not_after().duration_since(self.not_before()).unwrap_or(Duration::ZERO);
        self.renew_after() - life.mul_f64(EARLIER * chance.clamp(0.0, 1.0))
    }
}

/// Pauses between attempts that fail: each up to twice as long as the one before.
#[derive(Debug, Clone, Copy)]
pub struct Backoff {
    /// The first one.
    pub first: Duration,
    /// The longest.
    pub most: Duration,
}

impl Backoff {
    /// The pause after so many failures: between half of the bound and all of it.
    pub fn pause(self, failures: u32, chance: f64) -> Duration {
        let doubled = self.first.saturating_mul(2_u32.saturating_pow(failures.saturating_sub(1)));
        doubled.min(self.most).mul_f64(0.5 + chance.clamp(0.0, 1.0) / 2.0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Authority;

    #[test]
    fn an_age_renews_between_37_and_40_sixtieths_of_a_life() {
        let identity = Authority::create("test").unwrap().issue_server(&["a.test".into()], &[]).unwrap();
        let life = identity.not_after().duration_since(identity.not_before()).unwrap().as_secs();
        for (chance, sixtieths) in [(0.0, 40), (1.0, 37), (2.0, 37), (-1.0, 40)] {
            let age = identity.renew_by_age(chance).duration_since(identity.not_before()).unwrap();
            assert_eq!(age.as_secs() * 60 / life, sixtieths, "{chance}");
        }
    }

    #[test]
    fn a_window_is_used_all_over() {
        let start = SystemTime::UNIX_EPOCH + Duration::from_secs(1_000);
        let window = Window { start, end: start + Duration::from_secs(100) };
        for (chance, seconds) in [(0.0, 1_000), (0.5, 1_050), (1.0, 1_100)] {
            assert_eq!(window.choose(chance), SystemTime::UNIX_EPOCH + Duration::from_secs(seconds));
        }
        // One that ends before it begins is its beginning.
        assert_eq!(Window { start, end: SystemTime::UNIX_EPOCH }.choose(0.7), start);
    }

    #[test]
    fn an_authority_is_not_asked_for_its_window_all_the_time_nor_never() {
        for (asked, want) in [(0, 60), (59, 60), (21_600, 21_600), (1_000_000, 86_400)] {
            assert_eq!(Window::look_after(Duration::from_secs(asked)), Duration::from_secs(want));
        }
    }

    #[test]
    fn pauses_grow_to_a_bound_and_are_never_short() {
        let backoff = Backoff { first: Duration::from_secs(60), most: Duration::from_secs(3_600) };
        for (failures, most) in
            [(0, 60), (1, 60), (2, 120), (3, 240), (6, 1_920), (7, 3_600), (40, 3_600), (u32::MAX, 3_600)]
        {
            assert_eq!(backoff.pause(failures, 1.0), Duration::from_secs(most), "{failures}");
            assert_eq!(backoff.pause(failures, 0.0), Duration::from_secs(most) / 2, "{failures}");
        }
    }
}
