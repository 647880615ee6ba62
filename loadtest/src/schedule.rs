//! What is due when: the whole run as a row of [`Due`]s, decided by the seed alone.

use std::time::Duration;

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

use crate::arrivals::Times;
use crate::options::{Options, Protocol};

/// Sets the stream that picks requests apart from the one that picks times, so that another mix of requests
/// leaves the times as they were.
const PICKS_STREAM: u64 = 0x7069_636b;

/// One request and the moment it is due, counted from the start of the run.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Due {
    pub(crate) at: Duration,
    pub(crate) protocol: Protocol,
    /// Index of the target.
    pub(crate) target: usize,
    /// Index of the request class.
    pub(crate) class: usize,
}

/// The requests of a run, in the order they are due.
#[derive(Debug)]
pub(crate) struct Schedule {
    times: Times,
    duration: Duration,
    picks: StdRng,
    protocols: Weights,
    classes: Weights,
    targets: usize,
}

impl Schedule {
    /// The options must have passed their check.
    pub(crate) fn new(options: &Options) -> Schedule {
        Schedule {
            times: Times::new(options.arrivals, options.rate, options.seed),
            duration: options.duration,
            picks: StdRng::seed_from_u64(options.seed ^ PICKS_STREAM),
            protocols: Weights::new(Protocol::ALL.into_iter().map(|protocol| options.mix.weight(protocol))),
            classes: Weights::new(options.requests.iter().map(|class| class.weight)),
            targets: options.targets.len(),
        }
    }
}

impl Iterator for Schedule {
    type Item = Due;

    fn next(&mut self) -> Option<Due> {
        let at = self.times.next().filter(|at| *at < self.duration)?;
        let protocol = Protocol::ALL[self.protocols.pick(&mut self.picks)];
        let class = self.classes.pick(&mut self.picks);
        let target = self.picks.random_range(0..self.targets);
        Some(Due { at, protocol, target, class })
    }
}

/// Running sums of weights, at least one of which is not 0.
#[derive(Debug)]
struct Weights {
    sums: Vec<u64>,
    total: u64,
}

impl Weights {
    fn new(weights: impl Iterator<Item = u32>) -> Weights {
        let mut total = 0;
        let sums = weights
            .map(|weight| {
                total += u64::from(weight);
                total
            })
            .collect();
        Weights { sums, total }
    }

    fn pick(&self, rng: &mut StdRng) -> usize {
        let point = rng.random_range(0..self.total);
        self.sums.partition_point(|sum| *sum <= point)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::arrivals::Arrivals;
    use crate::options::Mix;
    use crate::options::tests::sample;

    fn options(seed: u64, rate: u32, arrivals: Arrivals, mix: Mix, weights: &[u32]) -> Options {
        let mut options = sample();
        (options.seed, options.rate, options.arrivals, options.mix) = (seed, rate, arrivals, mix);
        let class = options.requests.remove(0);
        options.requests =
            weights.iter().map(|weight| crate::RequestClass { weight: *weight, ..class.clone() }).collect();
        options.targets.push(options.targets[0].clone());
        options
    }

    proptest! {
        #[test]
        fn the_same_seed_gives_the_same_schedule(
            seed: u64, rate in 1_u32..5_000, poisson: bool,
            h1 in 1_u32..5, h2 in 0_u32..5, h3 in 0_u32..5, weights in prop::collection::vec(1_u32..9, 1..4),
        ) {
            let arrivals = if poisson { Arrivals::Poisson } else { Arrivals::Even };
            let options = options(seed, rate, arrivals, Mix { h1, h2, h3 }, &weights);
            let first: Vec<_> = Schedule::new(&options).collect();
            prop_assert_eq!(&first, &Schedule::new(&options).collect::<Vec<_>>());
            prop_assert!(first.windows(2).all(|pair| pair[0].at <= pair[1].at));
            prop_assert!(first.iter().all(|due| due.at < options.duration && due.class < weights.len() && due.target < 2));
            prop_assert!(first.iter().all(|due| options.mix.weight(due.protocol) > 0));
            if !poisson {
                prop_assert_eq!(first.len(), rate as usize);
            }
        }

        #[test]
        fn another_mix_leaves_the_times_as_they_were(seed: u64) {
            let one = options(seed, 500, Arrivals::Poisson, Mix { h1: 1, h2: 0, h3: 0 }, &[1]);
            let other = options(seed, 500, Arrivals::Poisson, Mix { h1: 1, h2: 5, h3: 2 }, &[1, 7]);
            let times = |options: &Options| Schedule::new(options).map(|due| due.at).collect::<Vec<_>>();
            prop_assert_eq!(times(&one), times(&other));
        }
    }

    #[test]
    fn another_seed_gives_another_schedule() {
        let mix = Mix { h1: 1, h2: 1, h3: 1 };
        let schedule = |seed| Schedule::new(&options(seed, 500, Arrivals::Poisson, mix, &[1, 1])).collect::<Vec<_>>();
        assert_ne!(schedule(1), schedule(2));
    }

    #[test]
    fn shares_follow_the_weights_and_weight_0_is_never_picked() {
        let mut options = options(5, 10_000, Arrivals::Even, Mix { h1: 3, h2: 0, h3: 1 }, &[0, 1, 0, 9]);
        options.duration = Duration::from_secs(4);
        let dues: Vec<_> = Schedule::new(&options).collect();
        let share =
            |wanted: &dyn Fn(&Due) -> bool| dues.iter().filter(|due| wanted(due)).count() as f64 / dues.len() as f64;
        assert!((share(&|due| due.protocol == Protocol::H1) - 0.75).abs() < 0.02);
        assert!((share(&|due| due.class == 3) - 0.9).abs() < 0.02);
        assert!((share(&|due| due.target == 1) - 0.5).abs() < 0.02);
        assert!(dues.iter().all(|due| due.protocol != Protocol::H2 && due.class % 2 == 1));
    }
}
