//! Every planted bug is caught.

use super::{plan, play, quietly};
use crate::planted::{Bug, plant};

/// Seeds in which a bug must have been caught.
const SEEDS_MAX: u64 = 1_500;

const BUGS: [Bug; 15] = [
    Bug::TieBreak,
    Bug::FrontierOfAlive,
    Bug::VectorGap,
    Bug::Incarnation,
    Bug::WallClock,
    Bug::Flush,
    Bug::Forgery,
    Bug::Unsigned,
    Bug::RelayUnproved,
    Bug::RelayLoop,
    Bug::LifeFromArrival,
    Bug::Token,
    Bug::CounterAdd,
    Bug::Sketch,
    Bug::AckFirst,
];

#[test]
fn every_planted_bug_is_caught() {
    let mut missed = Vec::new();
    for bug in BUGS {
        plant(Some(bug));
        let caught = quietly(|| (0..SEEDS_MAX).find_map(|seed| Some((seed + 1, play(seed, &plan::plan(seed)).err()?))));
        plant(None);
        if let Some((seeds, _)) = &caught {
            assert_eq!(quietly(|| play(seeds - 1, &plan::plan(seeds - 1)).err()), None, "it fails without {bug:?}");
        }
        match caught {
            Some((seeds, why)) => eprintln!("{bug:?}: {seeds} seeds: {}", &why[..why.len().min(90)]),
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught in {SEEDS_MAX} seeds: {missed:?}");
}
