//! When requests are due: an endless, never falling row of times from a rate and a seed.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

const NANOS_PER_SECOND: u64 = 1_000_000_000;

/// How requests are spread over the time of a run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Arrivals {
    /// As independent clients arrive: gaps are exponential, so there are bursts. The number in a run varies.
    Poisson,
    /// One after another at the same distance.
    Even,
}

/// The times at which requests are due, counted from the start of the run.
#[derive(Debug)]
pub(crate) struct Times {
    arrivals: Arrivals,
    rate: u32,
    count: u64,
    clock_ns: f64,
    rng: StdRng,
}

impl Times {
    /// `rate` is per second and not 0.
    pub(crate) fn new(arrivals: Arrivals, rate: u32, seed: u64) -> Times {
        Times { arrivals, rate: rate.max(1), count: 0, clock_ns: 0.0, rng: StdRng::seed_from_u64(seed) }
    }
}

impl Iterator for Times {
    type Item = Duration;

    fn next(&mut self) -> Option<Duration> {
        let rate = u64::from(self.rate);
        let at = match self.arrivals {
            // From the count, not by adding gaps: rounding must not shift the rate of a long run.
            Arrivals::Even => {
                let (seconds, rest) = (self.count / rate, self.count % rate);
                Duration::from_secs(seconds) + Duration::from_nanos(rest * NANOS_PER_SECOND / rate)
            }
            Arrivals::Poisson => {
                let uniform: f64 = self.rng.random();
                #[allow(clippy::cast_precision_loss)]
                let mean_ns = NANOS_PER_SECOND as f64 / f64::from(self.rate);
                // `uniform` is below 1, so the logarithm is finite.
                self.clock_ns += -(1.0 - uniform).ln() * mean_ns;
                #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss)]
                Duration::from_nanos(self.clock_ns as u64)
            }
        };
        self.count += 1;
        Some(at)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn even_arrivals_keep_their_distance_and_do_not_drift() {
        let times: Vec<_> = Times::new(Arrivals::Even, 3, 0).take(7).collect();
        assert_eq!(times[0], Duration::ZERO);
        assert_eq!(times[1], Duration::from_nanos(333_333_333));
        assert_eq!(times[3], Duration::from_secs(1));
        assert_eq!(times[6], Duration::from_secs(2));
    }

    #[test]
    fn poisson_gaps_follow_the_exponential_law() {
        // Kolmogorov-Smirnov distance of 20,000 gaps to 1 - exp(-x); the limit at 0.1 % is 1.95 / sqrt(n).
        let rate = 1_000;
        let times: Vec<_> = Times::new(Arrivals::Poisson, rate, 7).take(20_001).collect();
        let mut gaps: Vec<f64> =
            times.windows(2).map(|pair| (pair[1] - pair[0]).as_secs_f64() * f64::from(rate)).collect();
        gaps.sort_by(f64::total_cmp);
        let count = gaps.len() as f64;
        let distance = gaps
            .iter()
            .enumerate()
            .map(|(index, gap)| {
                let law = 1.0 - (-gap).exp();
                (law - index as f64 / count).abs().max((law - (index + 1) as f64 / count).abs())
            })
            .fold(0.0, f64::max);
        assert!(distance < 1.95 / count.sqrt(), "{distance}");
    }

    #[test]
    fn poisson_arrivals_are_about_as_many_as_the_rate_says() {
        let minute = Duration::from_secs(60);
        let count = Times::new(Arrivals::Poisson, 500, 11).take_while(|at| *at < minute).count() as f64;
        assert!((count - 30_000.0).abs() < 4.0 * 30_000_f64.sqrt(), "{count}");
    }
}
