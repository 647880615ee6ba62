//! What happens in a run, and when.

use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};

/// Virtual time of a run, milliseconds: faults, and then the time in which everything must have converged.
pub(super) const PLAN_MS: u64 = 60_000;

/// Virtual time of writes and faults, milliseconds.
pub(super) const FAULTS_MS: u64 = 24_000;

/// One seed in so many is of a large fleet: so many nodes in so many regions.
const LARGE_EACH: u64 = 40;
const LARGE_NODES: usize = 12;
const LARGE_REGIONS: usize = 4;

/// What many runs must have met together, or they prove little.
pub(super) const MUST_BE_MET: [&str; 18] = [
    "crash",
    "crash between commit and send",
    "cut",
    "split",
    "late copy",
    "wipe",
    "restore",
    "clone",
    "evict",
    "jump",
    "future",
    "stale",
    "collected",
    "bootstrapped",
    "clock unsafe",
    "conflict",
    "forged",
    "passed on",
];

/// One thing that happens.
#[derive(Debug, Clone)]
pub(super) enum Step {
    /// A node writes a key.
    Write { of: usize, key: usize, what: What, then_crash: bool },
    /// A session that wrote at one node reads at another.
    Read { at: usize },
    /// A link is reset.
    Reset { pair: (usize, usize) },
    /// A link is cut for a while.
    Cut { pair: (usize, usize), for_ms: u64 },
    /// The nodes of a set reach no others for a while.
    Split { side: u16, for_ms: u64 },
    /// A node stops at once and starts again.
    Crash { of: usize, for_ms: u64 },
    /// A node stops and starts with an empty disk.
    Wipe { of: usize },
    /// What a node has is copied away.
    Backup { of: usize },
    /// A node stops and starts with its copy.
    Restore { of: usize },
    /// A node stops and starts with a copy of another's disk.
    Clone { of: usize, from: usize },
    /// A node is out of the roster for a while.
    Evict { of: usize, for_ms: u64 },
    /// A node's clock jumps, and is set right later.
    Jump { of: usize, by_ms: i64, for_ms: u64 },
    /// A node says that a third one wrote something.
    Forge { by: usize, to: usize, as_of: usize },
    /// A node alters for a while what others wrote and it passes on.
    Lie { by: usize, for_ms: u64 },
}

/// What is written.
#[derive(Debug, Clone)]
pub(super) enum What {
    Set {
        number: i64,
        long: bool,
        life_ms: Option<u64>,
    },
    Delete,
    Add {
        number: i64,
        life_ms: Option<u64>,
    },
    Beside {
        number: i64,
    },
    /// Adds to the counter that nothing else touches.
    Count,
}

/// A run.
#[derive(Debug, Clone)]
pub(super) struct Plan {
    /// Of every node, where it is.
    pub(super) regions: Vec<u8>,
    /// In the order of time, milliseconds since the start.
    pub(super) steps: Vec<(u64, Step)>,
}

/// The plan of a seed.
pub(super) fn plan(seed: u64) -> Plan {
    let mut rng = StdRng::seed_from_u64(seed);
    let rng = &mut rng;
    let nodes = if seed % LARGE_EACH == LARGE_EACH - 1 { LARGE_NODES } else { rng.random_range(2..=5) };
    let mut steps = Vec::new();
    let mut add = |rng: &mut StdRng, most: usize, make: &mut dyn FnMut(&mut StdRng) -> Step| {
        for _ in 0..rng.random_range(0..=most) {
            let at = rng.random_range(200..FAULTS_MS);
            steps.push((at, make(rng)));
        }
    };
    add(rng, 70, &mut |rng| write(rng, nodes));
    add(rng, 30, &mut |rng| write(rng, nodes));
    add(rng, 8, &mut |rng| Step::Read { at: rng.random_range(0..nodes) });
    add(rng, 6, &mut |rng| Step::Reset { pair: pair(rng, nodes) });
    add(rng, 4, &mut |rng| Step::Cut { pair: pair(rng, nodes), for_ms: rng.random_range(100..9_000) });
    add(rng, 2, &mut |rng| Step::Split { side: rng.random(), for_ms: rng.random_range(100..9_000) });
    add(rng, 4, &mut |rng| Step::Crash { of: rng.random_range(0..nodes), for_ms: rng.random_range(1..6_000) });
    if rng.random_bool(0.3) {
        add(rng, 1, &mut |rng| Step::Wipe { of: rng.random_range(0..nodes) });
    }
    if rng.random_bool(0.4) {
        let of = rng.random_range(0..nodes);
        add(rng, 2, &mut |_| Step::Backup { of });
        add(rng, 2, &mut |_| Step::Restore { of });
    }
    if rng.random_bool(0.2) {
        let (of, from) = pair(rng, nodes);
        add(rng, 1, &mut |_| Step::Clone { of, from });
    }
    if rng.random_bool(0.5) {
        add(rng, 2, &mut |rng| Step::Evict { of: rng.random_range(0..nodes), for_ms: rng.random_range(500..14_000) });
    }
    if rng.random_bool(0.4) {
        let of = rng.random_range(0..nodes);
        add(rng, 2, &mut |rng| {
            let by_ms = if rng.random() { rng.random_range(1..3_000) } else { -rng.random_range(1..3_600_000_i64) };
            Step::Jump { of, by_ms, for_ms: rng.random_range(500..6_000) }
        });
    }
    if nodes > 2 && rng.random_bool(0.2) {
        add(rng, 2, &mut |rng| {
            let (by, to) = pair(rng, nodes);
            let as_of = (0..nodes).find(|other| *other != by && *other != to).unwrap_or(to);
            Step::Forge { by, to, as_of }
        });
    }
    if nodes > 2 && rng.random_bool(0.3) {
        let by = rng.random_range(0..nodes);
        add(rng, 2, &mut |rng| Step::Lie { by, for_ms: rng.random_range(500..8_000) });
    }
    if rng.random_bool(0.2) {
        // Two nodes write at the same instant, while their clocks agree: only who they are tells the writes apart.
        let (at, (one, other)) = (rng.random_range(200..1_000), pair(rng, nodes));
        for (of, number) in [(one, 1), (other, 2)] {
            let what = What::Set { number, long: false, life_ms: None };
            steps.push((at, Step::Write { of, key: 0, what, then_crash: false }));
        }
    }
    steps.sort_by_key(|(at, _)| *at);
    let regions = match nodes {
        LARGE_NODES => (0..LARGE_NODES).map(|of| u8::try_from(of % LARGE_REGIONS).unwrap_or(0)).collect(),
        _ => {
            let regions = rng.random_range(1..=3);
            (0..nodes).map(|_| rng.random_range(0..regions)).collect()
        }
    };
    Plan { regions, steps }
}

fn pair(rng: &mut StdRng, nodes: usize) -> (usize, usize) {
    let one = rng.random_range(0..nodes);
    let other = (one + rng.random_range(1..nodes)) % nodes;
    (one, other)
}

fn write(rng: &mut StdRng, nodes: usize) -> Step {
    let number = rng.random_range(-100..100_i64);
    let life_ms = rng.random_bool(0.25).then(|| rng.random_range(100..9_000));
    let what = match rng.random_range(0..12) {
        0..4 => What::Set { number, long: rng.random_bool(0.15), life_ms },
        4..7 => What::Delete,
        7 | 8 => What::Add { number, life_ms },
        9 => What::Count,
        _ => What::Beside { number },
    };
    Step::Write { of: rng.random_range(0..nodes), key: rng.random_range(0..6), what, then_crash: rng.random_bool(0.04) }
}
