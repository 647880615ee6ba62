//! Hybrid logical time.
//!
//! A [`Stamp`] is 48 bits of milliseconds and a 16-bit counter. The [`Clock`] never issues a stamp that is not
//! greater than every stamp it issued or accepted before, also across restarts (a high-water mark is persisted
//! ahead of use) and when the wall clock jumps back. A received stamp from the future is refused, so that one node
//! with a wrong clock can't lift the clocks of the others.

use std::fmt;

use crate::planted::{self, Bug};

/// Bits of the counter below the milliseconds.
const COUNTER_BITS: u32 = 16;

/// How far ahead of this node's wall clock a received stamp may be, milliseconds.
pub const FUTURE_MS_MAX: u64 = 500;

/// How far ahead of use the high-water mark is persisted, milliseconds. A restart skips that far at most, which
/// must stay under [`FUTURE_MS_MAX`] or the peers would refuse the first writes after a restart.
pub const HIGH_WATER_AHEAD_MS: u64 = 250;

/// When an entry was written, in hybrid logical time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Stamp(pub u64);

impl Stamp {
    /// The first stamp of a millisecond.
    pub fn at_ms(ms: u64) -> Self {
        Self(ms.min(u64::MAX >> COUNTER_BITS) << COUNTER_BITS)
    }

    /// The milliseconds since the Unix epoch.
    pub fn ms(self) -> u64 {
        self.0 >> COUNTER_BITS
    }
}

impl fmt::Display for Stamp {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.ms(), self.0 & ((1 << COUNTER_BITS) - 1))
    }
}

/// A received stamp that is too far ahead of this node's wall clock.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("stamp {stamp} is over {FUTURE_MS_MAX} ms ahead of {now_ms} ms")]
pub struct FutureStamp {
    stamp: Stamp,
    now_ms: u64,
}

/// The source of this node's stamps. It is told the time, it never asks.
#[derive(Debug, Clone)]
pub struct Clock {
    last: Stamp,
    high_water: Stamp,
}

impl Clock {
    /// A clock that issues only stamps above `high_water`, what the last run persisted.
    pub fn resume(high_water: Stamp) -> Self {
        Self { last: high_water, high_water }
    }

    /// Whether its stamps would be from the future for everybody else: the wall clock went back, or this node was
    /// ahead before it started again. Nothing is written until time has come up.
    pub fn is_ahead(&self, now_ms: u64) -> bool {
        self.last.ms() > now_ms.saturating_add(FUTURE_MS_MAX)
    }

    /// Whether a received stamp is near enough to now.
    pub fn is_due(&self, now_ms: u64, stamp: Stamp) -> bool {
        stamp.ms() <= now_ms.saturating_add(FUTURE_MS_MAX)
    }

    /// A stamp at or before which this will never issue one again.
    pub fn promise(&mut self, now_ms: u64) -> Stamp {
        self.last = self.last.max(Stamp::at_ms(now_ms));
        self.last
    }

    /// The stamp of a local write.
    pub fn tick(&mut self, now_ms: u64) -> Stamp {
        if planted::is(Bug::WallClock) {
            self.last = Stamp::at_ms(now_ms);
            return self.last;
        }
        self.last = Stamp(self.last.0.saturating_add(1)).max(Stamp::at_ms(now_ms));
        self.last
    }

    /// Takes a received stamp into account, or refuses it and stays as it was.
    pub fn observe(&mut self, now_ms: u64, stamp: Stamp) -> Result<(), FutureStamp> {
        if !self.is_due(now_ms, stamp) {
            return Err(FutureStamp { stamp, now_ms });
        }
        self.last = self.last.max(stamp);
        Ok(())
    }

    /// A new high-water mark, if what was issued or accepted passed the last one. The caller commits it together
    /// with the entry that made it necessary.
    pub fn high_water(&mut self) -> Option<Stamp> {
        if self.last <= self.high_water {
            return None;
        }
        self.high_water = Stamp(self.last.0.saturating_add(HIGH_WATER_AHEAD_MS << COUNTER_BITS));
        Some(self.high_water)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn a_stamp_from_the_future_is_refused_and_lifts_nothing() {
        let mut clock = Clock::resume(Stamp::default());
        let before = clock.tick(1_000);
        assert!(clock.observe(1_000, Stamp::at_ms(1_000 + FUTURE_MS_MAX + 1)).is_err());
        assert_eq!(clock.tick(1_000).0, before.0 + 1);
        assert!(clock.observe(1_000, Stamp::at_ms(1_000 + FUTURE_MS_MAX)).is_ok());
        assert!(clock.tick(1_000) > Stamp::at_ms(1_000 + FUTURE_MS_MAX));
    }

    #[test]
    fn the_counter_carries_into_the_milliseconds() {
        let mut clock = Clock::resume(Stamp::default());
        let first = clock.tick(5);
        let mut last = first;
        for _ in 0..=u16::MAX {
            last = clock.tick(5);
        }
        assert_eq!(first.ms(), 5);
        assert_eq!(last.ms(), 6);
    }

    proptest! {
        #[test]
        fn stamps_only_grow_whatever_the_wall_clock_does(
            steps in proptest::collection::vec((0_u64..10_000_000, 0_u64..10_000_000, any::<bool>(), any::<bool>()), 1..200),
        ) {
            let mut clock = Clock::resume(Stamp::default());
            let mut persisted = Stamp::default();
            let mut last = Stamp::default();
            for (now_ms, seen_ms, observe, restart) in steps {
                if observe {
                    let _refused = clock.observe(now_ms, Stamp::at_ms(seen_ms));
                } else {
                    let stamp = clock.tick(now_ms);
                    prop_assert!(stamp > last);
                    last = stamp;
                }
                persisted = clock.high_water().unwrap_or(persisted);
                prop_assert!(persisted >= last);
                if restart {
                    clock = Clock::resume(persisted);
                }
            }
        }
    }
}
