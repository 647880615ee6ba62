//! A seeded simulator: a few replicas on memory engines in virtual time.
//!
//! It delays, resets and cuts links, delivers entries twice and late, sets clocks wrong, and crashes nodes, also
//! between commit and send. Then it heals everything and demands that all nodes hold the same rows, byte for byte,
//! and that these are what all writes merged in any order give: nothing lost, nothing resurrected. On the way it
//! demands that no version vector covers a write whose effect has not arrived.
//!
//! `SELVAGE_SEED=n` runs one seed; a failure prints its own.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selvage_config::NodeName;

use crate::engine::{Engine, Memory, Row};
use crate::entry::{Dot, Entry, Key};
use crate::layout;
use crate::read;
use crate::record::{Merge, Record};
use crate::replica::{Action, Event, Limits, Replica, TICK_MS, Write};
use crate::wire::{self, Message};

/// Seeds of a test run.
const SEEDS: u64 = 300;
/// Virtual time of writes and faults, milliseconds.
const FAULTS_MS: u64 = 6_000;
/// Virtual time in which everything must have converged after the faults, milliseconds.
const HEAL_MS: u64 = 90_000;
/// Virtual time between two looks at the vectors, milliseconds.
const CHECK_MS: u64 = 250;
/// How wrong one clock may be set, milliseconds: far more than replicas accept.
const SKEW_MS: u64 = 3_000;
/// The first virtual moment, milliseconds.
const EPOCH_MS: u64 = 1_000_000;

const LIMITS: Limits =
    Limits { queue_bytes: 4_000, queue_frames: 12, window_bytes: 700, batch_bytes: 600, batch_entries: 3 };

enum Step {
    Deliver { link: u64, to: usize, frame: Bytes, again: bool },
    Drained { link: u64, of: usize, bytes: usize },
    Tick { of: usize },
    Write,
    Connect { pair: (usize, usize) },
    Reset,
    Cut,
    Mend { pair: (usize, usize) },
    Crash { of: usize },
    Restart { of: usize },
}

struct Node {
    name: NodeName,
    engine: Arc<Memory>,
    replica: Option<Replica>,
    ahead_ms: u64,
}

struct Link {
    id: u64,
    /// When the last frame arrives, by receiver: a stream keeps its order.
    arrival_ms: BTreeMap<usize, u64>,
}

struct World {
    rng: StdRng,
    now_ms: u64,
    nodes: Vec<Node>,
    links: BTreeMap<(usize, usize), Link>,
    cut: BTreeSet<(usize, usize)>,
    steps: BTreeMap<(u64, u64), Step>,
    next: u64,
    written: BTreeMap<Dot, Entry>,
    healing: bool,
    met: BTreeMap<&'static str, u64>,
}

impl World {
    fn new(seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let count = rng.random_range(2..=5);
        let skewed = rng.random_bool(0.2).then(|| rng.random_range(0..count));
        let nodes = (0..count)
            .map(|number| Node {
                name: format!("n{number}").parse().unwrap(),
                engine: Arc::default(),
                replica: None,
                ahead_ms: if skewed == Some(number) { SKEW_MS } else { 0 },
            })
            .collect();
        let mut world = Self {
            rng,
            now_ms: EPOCH_MS,
            nodes,
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            steps: BTreeMap::new(),
            next: 1,
            written: BTreeMap::new(),
            healing: false,
            met: BTreeMap::new(),
        };
        for of in 0..count {
            world.after(0, 50, Step::Restart { of });
        }
        for _ in 0..world.rng.random_range(20..90) {
            world.after(100, FAULTS_MS, Step::Write);
        }
        for _ in 0..world.rng.random_range(0..12) {
            world.after(100, FAULTS_MS, Step::Reset);
        }
        for _ in 0..world.rng.random_range(0..6) {
            world.after(100, FAULTS_MS, Step::Cut);
        }
        for _ in 0..world.rng.random_range(0..5) {
            let of = world.rng.random_range(0..count);
            world.after(100, FAULTS_MS, Step::Crash { of });
        }
        world
    }

    fn met(&mut self, what: &'static str) {
        *self.met.entry(what).or_default() += 1;
    }

    fn after(&mut self, least_ms: u64, most_ms: u64, step: Step) {
        let at = self.now_ms + self.rng.random_range(least_ms..=most_ms);
        self.at(at, step);
    }

    fn at(&mut self, at_ms: u64, step: Step) {
        self.next += 1;
        self.steps.insert((at_ms, self.next), step);
    }

    fn run(&mut self) {
        while self.now_ms < EPOCH_MS + FAULTS_MS {
            self.run_until(self.now_ms + CHECK_MS);
            self.check_vectors();
        }
        self.healing = true;
        for pair in std::mem::take(&mut self.cut) {
            self.after(0, 100, Step::Connect { pair });
        }
        let end = self.now_ms + HEAL_MS;
        while self.now_ms < end && !self.converged() {
            self.run_until(self.now_ms + 1_000);
        }
        self.check_vectors();
        self.check_rows();
    }

    fn run_until(&mut self, end_ms: u64) {
        while let Some(first) = self.steps.first_entry() {
            if first.key().0 > end_ms {
                break;
            }
            let ((at, _), step) = first.remove_entry();
            self.now_ms = at;
            self.step(step);
        }
        self.now_ms = end_ms;
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Deliver { link, to, frame, again } => self.deliver(link, to, frame, again),
            Step::Drained { link, of, bytes } => {
                if let Some(peer) = self.other_end(link, of) {
                    self.handle(of, Event::Sent { peer, session: link, frames: 1, bytes });
                }
            }
            Step::Tick { of } => {
                if self.nodes[of].replica.is_some() {
                    self.handle(of, Event::Tick);
                    self.after(TICK_MS, TICK_MS, Step::Tick { of });
                }
            }
            Step::Write => self.write(),
            Step::Connect { pair } => self.connect(pair),
            Step::Reset => {
                if let Some(pair) = self.any_link() {
                    self.disconnect(pair);
                }
            }
            Step::Cut => {
                if let Some(pair) = self.any_link() {
                    self.cut.insert(pair);
                    self.disconnect(pair);
                    self.after(200, 4_000, Step::Mend { pair });
                }
            }
            Step::Mend { pair } => {
                self.cut.remove(&pair);
                self.after(0, 100, Step::Connect { pair });
            }
            Step::Crash { of } => self.crash(of),
            Step::Restart { of } => self.restart(of),
        }
    }

    fn any_link(&mut self) -> Option<(usize, usize)> {
        let pairs: Vec<_> = self.links.keys().copied().collect();
        (!pairs.is_empty()).then(|| pairs[self.rng.random_range(0..pairs.len())])
    }

    fn pair_of(&self, link: u64) -> Option<(usize, usize)> {
        self.links.iter().find(|(_, known)| known.id == link).map(|(pair, _)| *pair)
    }

    fn other_end(&self, link: u64, of: usize) -> Option<NodeName> {
        let (a, b) = self.pair_of(link)?;
        Some(self.nodes[if a == of { b } else { a }].name.clone())
    }

    fn deliver(&mut self, link: u64, to: usize, frame: Bytes, again: bool) {
        let Some(peer) = self.other_end(link, to) else { return };
        let mut message = wire::decode(frame.slice(wire::LENGTH_BYTES..)).unwrap().unwrap();
        if again {
            // Streams do not repeat, so a claim is never repeated. Entries are, over other peers.
            let Message::Batch { complete, .. } = &mut message else { return };
            *complete = None;
        } else if self.rng.random_bool(0.2) && !self.healing {
            self.after(0, 2_000, Step::Deliver { link, to, frame, again: true });
        }
        self.handle(to, Event::Received { peer, session: link, message });
    }

    fn write(&mut self) {
        let of = self.rng.random_range(0..self.nodes.len());
        let key = Key { store: "app/default".parse().unwrap(), name: format!("k{}", self.rng.random_range(0..6)) };
        let number = self.rng.random_range(-100..100_i64);
        let write = match self.rng.random_range(0..10) {
            0..4 => Write::Set(number.to_le_bytes().to_vec().into()),
            4 => Write::Set(vec![7; 1_500].into()),
            5..7 => Write::Delete,
            _ => Write::Increment(number),
        };
        if self.nodes[of].replica.is_none() {
            return;
        }
        let before = self.seq(of);
        // A crash between commit and send: nobody was told, and the write is there after the restart.
        let mute = self.rng.random_bool(0.05);
        self.handle_unless(of, Event::Write { ticket: 1, key: key.clone(), write }, mute);
        let Some(replica) = &self.nodes[of].replica else { return };
        let dot = Dot { origin: replica.origin().clone(), seq: self.seq(of) };
        if dot.seq > before {
            let record = read::record(self.nodes[of].engine.as_ref(), &key).unwrap();
            let entry = record.entry(&dot).expect("a node's own write is its newest").clone();
            assert_eq!(record.newest().unwrap().version.dot, dot, "an own write lost to an older one");
            assert!(self.written.insert(dot, entry).is_none(), "a dot was used twice");
        }
        if mute {
            self.crash(of);
        }
    }

    fn seq(&self, of: usize) -> u64 {
        self.nodes[of].replica.as_ref().map_or(0, |replica| replica.vector().get(replica.origin()))
    }

    fn handle(&mut self, of: usize, event: Event) {
        self.handle_unless(of, event, false);
    }

    fn handle_unless(&mut self, of: usize, event: Event, mute: bool) {
        let now_ms = self.now_ms + self.nodes[of].ahead_ms;
        let Some(replica) = &mut self.nodes[of].replica else { return };
        let actions = replica.handle(now_ms, event).unwrap();
        for action in actions {
            match action {
                Action::Commit(batch) => self.nodes[of].engine.apply(batch).unwrap(),
                Action::Send { session, frame, .. } if !mute => self.send(of, session, frame),
                Action::Close { why, .. } => panic!("link closed: {why}"),
                Action::Notify(notice) => self.met(match notice {
                    crate::replica::Notice::Refused { .. } => "refused",
                    other => panic!("unexpected {other:?}"),
                }),
                Action::Send { .. } | Action::Done { .. } => {}
            }
        }
    }

    fn send(&mut self, of: usize, session: u64, frame: Bytes) {
        let Some(pair) = self.pair_of(session) else { return };
        let to = if pair.0 == of { pair.1 } else { pair.0 };
        if frame.len() > 1_400 {
            self.met("large");
        }
        let delay = self.rng.random_range(1..150);
        let drained = self.rng.random_range(0..60);
        let link = self.links.get_mut(&pair).expect("just found");
        let last = link.arrival_ms.entry(to).or_default();
        let arrival = (*last).max(self.now_ms + delay);
        *last = arrival;
        self.after(drained, drained, Step::Drained { link: session, of, bytes: frame.len() });
        self.at(arrival, Step::Deliver { link: session, to, frame, again: false });
    }

    fn connect(&mut self, pair: (usize, usize)) {
        let up = |of: usize| self.nodes[of].replica.is_some();
        if self.links.contains_key(&pair) || self.cut.contains(&pair) || !up(pair.0) || !up(pair.1) {
            return;
        }
        self.next += 1;
        let id = self.next;
        self.links.insert(pair, Link { id, arrival_ms: BTreeMap::new() });
        for (of, other) in [pair, (pair.1, pair.0)] {
            let peer = self.nodes[other].name.clone();
            self.handle(of, Event::Connected { peer, session: id });
        }
    }

    fn disconnect(&mut self, pair: (usize, usize)) {
        let Some(link) = self.links.remove(&pair) else { return };
        self.met("disconnected");
        for (of, other) in [pair, (pair.1, pair.0)] {
            let peer = self.nodes[other].name.clone();
            self.handle(of, Event::Disconnected { peer, session: link.id });
        }
        self.after(1, 300, Step::Connect { pair });
    }

    fn crash(&mut self, of: usize) {
        if self.nodes[of].replica.take().is_none() {
            return;
        }
        self.met("crashed");
        let pairs: Vec<_> = self.links.keys().copied().filter(|pair| pair.0 == of || pair.1 == of).collect();
        for pair in pairs {
            self.disconnect(pair);
        }
        self.after(1, 1_000, Step::Restart { of });
    }

    fn restart(&mut self, of: usize) {
        if self.nodes[of].replica.is_some() {
            return;
        }
        if self.nodes[of].ahead_ms != SKEW_MS {
            // The wall clock may have been set back meanwhile.
            self.nodes[of].ahead_ms = self.rng.random_range(0..400);
        }
        let engine: Arc<dyn Engine> = Arc::clone(&self.nodes[of].engine) as Arc<dyn Engine>;
        let salt = self.rng.random();
        let replica = Replica::open(engine, self.nodes[of].name.clone(), self.now_ms, salt).unwrap();
        self.nodes[of].replica = Some(replica.with_limits(LIMITS));
        self.after(0, TICK_MS, Step::Tick { of });
        for other in (0..self.nodes.len()).filter(|other| *other != of) {
            self.after(1, 300, Step::Connect { pair: (of.min(other), of.max(other)) });
        }
    }

    /// sync.md invariant K4: what a vector covers is here, or what superseded it is.
    fn check_vectors(&self) {
        for node in &self.nodes {
            let Some(replica) = &node.replica else { continue };
            for (dot, entry) in &self.written {
                if dot.seq <= replica.vector().get(&dot.origin) {
                    let mut record = read::record(node.engine.as_ref(), &entry.key).unwrap();
                    let merged = record.merge(entry.clone());
                    assert_eq!(merged, Merge::Superseded, "{} covers {dot:?} and lacks it", node.name);
                }
            }
        }
    }

    fn converged(&self) -> bool {
        let complete = |replica: &Replica| self.written.keys().all(|dot| replica.vector().get(&dot.origin) >= dot.seq);
        self.nodes.iter().all(|node| node.replica.as_ref().is_some_and(complete))
    }

    fn check_rows(&self) {
        let mut records: BTreeMap<Key, Record> = BTreeMap::new();
        for entry in self.written.values() {
            records.entry(entry.key.clone()).or_default().merge(entry.clone());
        }
        let row =
            |(key, record): (Key, Record)| Row { key: layout::record(&key).into(), value: Ok(record.encode().into()) };
        let records: Vec<Row> = records.into_iter().map(row).collect();
        let mut index = None;
        for node in &self.nodes {
            let rows = node.engine.scan(b"d", b"d", usize::MAX).unwrap();
            assert_eq!(rows, records, "records of {}", node.name);
            let rows = node.engine.scan(b"o", b"o", usize::MAX).unwrap();
            assert_eq!(*index.get_or_insert(rows.clone()), rows, "index of {}", node.name);
        }
        assert!(self.converged(), "vectors did not converge");
    }
}

fn seeds() -> Vec<u64> {
    match std::env::var("SELVAGE_SEED") {
        Ok(seed) => vec![seed.parse().expect("SELVAGE_SEED is a number")],
        Err(_) => (0..SEEDS).collect(),
    }
}

#[test]
fn whatever_happens_all_nodes_end_with_the_same_rows() {
    let mut met: BTreeMap<&'static str, u64> = BTreeMap::new();
    let seeds = seeds();
    for seed in &seeds {
        let ran = std::panic::catch_unwind(|| {
            let mut world = World::new(*seed);
            world.run();
            world.met
        });
        match ran {
            Ok(counts) => counts.into_iter().for_each(|(what, count)| *met.entry(what).or_default() += count),
            Err(panic) => panic!("SELVAGE_SEED={seed}: {}", message_of(panic.as_ref())),
        }
    }
    if seeds.len() > 1 {
        for what in ["crashed", "disconnected", "large", "refused"] {
            assert!(met.get(what).is_some_and(|count| *count > 10), "{what} was hardly met: {met:?}");
        }
    }
}

fn message_of(panic: &(dyn std::any::Any + Send)) -> &str {
    panic
        .downcast_ref::<String>()
        .map(String::as_str)
        .or_else(|| panic.downcast_ref::<&str>().copied())
        .unwrap_or("panicked")
}
