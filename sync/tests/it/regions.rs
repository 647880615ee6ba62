//! Fleets in many regions, in virtual time: when a write is seen where, and what that takes.
//!
//! The replicas are the ones that ship; the network is a model: light in fibre that goes half as far again as the crow
//! flies, streams that keep their order, and frames that are lost and sent again after a probe timeout (RFC 9002 6.2).
//! `SELVAGE_REGIONS=n SELVAGE_REGION_NODES=n SELVAGE_LOSS=percent SELVAGE_WRITES=n cargo test -p selvage-sync --test it
//! near_the_one_way_bound -- --nocapture` prints the figures of another fleet.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use hdrhistogram::Histogram;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selvage_config::{NodeName, Region};
use selvage_sync::engine::{Engine, Memory};
use selvage_sync::replica::{TICK_MS, Write};
use selvage_sync::trust::{Keyring, Trust};
use selvage_sync::wire::{self, LENGTH_BYTES, Message, Reason};
use selvage_sync::{Action, Event, Key, Replica};

/// Where edge regions are: latitude and longitude.
const CITIES: [(f64, f64); 40] = [
    (50.1, 8.7),
    (39.0, -77.5),
    (1.4, 103.8),
    (-23.5, -46.6),
    (35.7, 139.7),
    (51.5, -0.1),
    (-33.9, 151.2),
    (19.1, 72.9),
    (37.4, -122.0),
    (-26.2, 28.0),
    (52.4, 4.9),
    (48.9, 2.4),
    (40.4, -3.7),
    (59.3, 18.1),
    (52.2, 21.0),
    (45.5, 9.2),
    (41.9, -87.6),
    (32.8, -96.8),
    (25.8, -80.2),
    (33.9, -118.2),
    (47.6, -122.3),
    (43.7, -79.4),
    (45.5, -73.6),
    (33.7, -84.4),
    (40.7, -74.0),
    (39.7, -105.0),
    (19.4, -99.1),
    (4.7, -74.1),
    (-33.4, -70.7),
    (-34.6, -58.4),
    (22.3, 114.2),
    (37.6, 127.0),
    (34.7, 135.5),
    (28.6, 77.2),
    (13.1, 80.3),
    (25.2, 55.3),
    (32.1, 34.8),
    (-1.3, 36.8),
    (6.5, 3.4),
    (-36.8, 174.8),
];

/// From one node of a region to another, microseconds.
const NEAR_US: u64 = 500;

/// How long a receiver may hold an acknowledgement back (RFC 9000 18.2), microseconds.
const ACK_DELAY_US: u64 = 25_000;

/// The first moment, milliseconds since the Unix epoch.
const START_MS: u64 = 1_700_000_000_000;

/// Between two writes, microseconds.
const PAUSE_US: u64 = 20_000;

/// In which the last frame has arrived, microseconds.
const AFTER_US: u64 = 5_000_000;

/// A node of a fleet without an authority, where everybody is who it says.
struct Named(NodeName);

impl Trust for Named {
    fn prove(&self, _statement: &[u8]) -> Option<Vec<u8>> {
        Some(self.0.as_str().as_bytes().to_vec())
    }

    fn mark(&self) -> u64 {
        0
    }

    fn is_proved(&self, node: &NodeName, _statement: &[u8], _at_ms: u64, proof: &[u8]) -> bool {
        node.as_str().as_bytes() == proof
    }
}

struct Node {
    name: NodeName,
    region: usize,
    replica: Replica,
    engine: Arc<Memory>,
}

enum Due {
    Write { of: usize },
    Arrive { from: usize, to: usize, frame: Bytes },
    Tick,
}

/// What a write has come to.
struct Written {
    of: usize,
    at_us: u64,
    seen_us: BTreeMap<usize, u64>,
}

struct Fleet {
    rng: StdRng,
    now_us: u64,
    nodes: Vec<Node>,
    /// When the last frame of a stream arrives.
    streams: BTreeMap<(usize, usize), u64>,
    due: BTreeMap<(u64, u64), Due>,
    next: u64,
    /// Frames that are lost, of a hundred.
    loss: f64,
    /// Nodes that neither hear nor say anything, which nobody has noticed.
    dead: BTreeSet<usize>,
    written: BTreeMap<String, Written>,
    /// Frames of fresh writes: why, from where to where.
    pushed: Vec<(Reason, usize, usize)>,
}

impl Fleet {
    /// A fleet of so many regions of so many nodes. Of each region the first node has links to all, and the others to those
    /// and to each other: only the first ones write. Each node is told that it stands in `told` of its region.
    fn new(regions: usize, nodes: usize, loss: f64, told: impl Fn(usize) -> String) -> Self {
        let node = |number: usize| {
            let name: NodeName = format!("n{}-{}", number % regions, number / regions).parse().unwrap();
            let keyring = Keyring { trust: Arc::new(Named(name.clone())), chance: [7; 32] };
            let engine: Arc<Memory> = Arc::default();
            let rows = Arc::clone(&engine) as Arc<dyn Engine>;
            let replica = Replica::open(rows, name.clone(), b"here", START_MS, keyring).unwrap();
            Node { name, region: number % regions, replica, engine }
        };
        let mut fleet = Self {
            rng: StdRng::seed_from_u64(7),
            now_us: 0,
            nodes: (0..regions * nodes).map(node).collect(),
            streams: BTreeMap::new(),
            due: BTreeMap::new(),
            next: 0,
            loss: 0.0,
            dead: BTreeSet::new(),
            written: BTreeMap::new(),
            pushed: Vec::new(),
        };
        let members: BTreeMap<NodeName, Region> =
            fleet.nodes.iter().map(|node| (node.name.clone(), told(node.region).parse().unwrap())).collect();
        for of in 0..fleet.nodes.len() {
            fleet.handle(of, Event::Roster(members.clone()));
        }
        for a in 0..fleet.nodes.len() {
            for b in a + 1..fleet.nodes.len() {
                if a < regions || fleet.nodes[a].region == fleet.nodes[b].region {
                    fleet.link(a, b);
                }
            }
        }
        fleet.run(AFTER_US);
        fleet.loss = loss;
        fleet
    }

    fn link(&mut self, a: usize, b: usize) {
        let session = (a * self.nodes.len() + b) as u64;
        for (of, other) in [(a, b), (b, a)] {
            let peer = self.nodes[other].name.clone();
            self.streams.insert((of, other), 0);
            self.handle(of, Event::Connected { peer, session });
        }
    }

    fn session(&self, a: usize, b: usize) -> u64 {
        (a.min(b) * self.nodes.len() + a.max(b)) as u64
    }

    /// Who is at the other end.
    fn other_end(&self, session: u64, of: usize) -> usize {
        let session = usize::try_from(session).expect("made of two usize");
        let (a, b) = (session / self.nodes.len(), session % self.nodes.len());
        if a == of { b } else { a }
    }

    fn at(&mut self, at_us: u64, due: Due) {
        self.next += 1;
        self.due.insert((at_us, self.next), due);
    }

    /// How long a frame is under way if nothing is lost, microseconds.
    #[allow(clippy::cast_possible_truncation, reason = "half around the world takes 150 ms")]
    fn one_way_us(&self, from: usize, to: usize) -> u64 {
        let (from, to) = (self.nodes[from].region, self.nodes[to].region);
        if from == to {
            return NEAR_US;
        }
        let [(lat_a, long_a), (lat_b, long_b)] =
            [CITIES[from], CITIES[to]].map(|(a, b)| (a.to_radians(), b.to_radians()));
        let (lat, long) = (((lat_b - lat_a) / 2.0).sin(), ((long_b - long_a) / 2.0).sin());
        let km = 2.0 * 6371.0 * (lat * lat + lat_a.cos() * lat_b.cos() * long * long).sqrt().asin();
        // Light goes 200 km of fibre in a millisecond.
        (km * 1.5 / 200.0 * 1000.0) as u64 + NEAR_US
    }

    fn run(&mut self, for_us: u64) {
        let end = self.now_us + for_us;
        while let Some(first) = self.due.first_entry().filter(|first| first.key().0 <= end) {
            let ((at, _), due) = first.remove_entry();
            self.now_us = at;
            match due {
                Due::Write { of } => self.write(of),
                Due::Arrive { from, to, frame } => self.arrive(from, to, &frame),
                Due::Tick => {
                    for of in (0..self.nodes.len()).filter(|of| !self.dead.contains(of)).collect::<Vec<_>>() {
                        self.handle(of, Event::Tick);
                    }
                    self.at(at + TICK_MS * 1000, Due::Tick);
                }
            }
        }
        self.now_us = end;
    }

    fn write(&mut self, of: usize) {
        let name = format!("key-{}", self.written.len());
        let written = Written { of, at_us: self.now_us, seen_us: BTreeMap::new() };
        self.written.insert(name.clone(), written);
        let key = Key { store: "app/default".parse().unwrap(), name };
        let write = Write::Set { value: Bytes::from_static(b"value"), expires_ms: None };
        self.handle(of, Event::Write { ticket: 0, key, write });
    }

    fn arrive(&mut self, from: usize, to: usize, frame: &Bytes) {
        if self.dead.contains(&to) {
            return;
        }
        let (session, now_us) = (self.session(from, to), self.now_us);
        let (sender, receiver) = (self.nodes[from].name.clone(), self.nodes[to].name.clone());
        self.handle(from, Event::Sent { peer: receiver, session, frames: 1, bytes: frame.len() });
        let message = wire::decode(frame.slice(LENGTH_BYTES..)).unwrap().unwrap();
        let keys: Vec<String> = match &message {
            Message::Batch { reason, entries, .. } => {
                if !matches!(reason, Reason::CatchUp | Reason::Repair) {
                    self.pushed.push((*reason, from, to));
                }
                entries.iter().map(|entry| entry.key.name.clone()).collect()
            }
            _ => Vec::new(),
        };
        self.handle(to, Event::Received { peer: sender, session, message });
        for key in keys {
            if self.has(to, &key) {
                self.written.get_mut(&key).unwrap().seen_us.entry(to).or_insert(now_us);
            }
        }
    }

    fn has(&self, of: usize, key: &str) -> bool {
        self.nodes[of].engine.get(format!("dapp/default\0{key}").as_bytes()).unwrap().is_some()
    }

    fn handle(&mut self, of: usize, event: Event) {
        let node = &mut self.nodes[of];
        let mut actions = node.replica.handle(START_MS + self.now_us / 1000, event).unwrap();
        actions.extend(node.replica.sign());
        actions.extend(node.replica.push());
        for action in actions {
            match action {
                Action::Commit(batch) => self.nodes[of].engine.apply(batch).unwrap(),
                Action::Send { session, frame, .. } => self.send(of, session, frame),
                Action::Close { why, .. } => panic!("link closed: {why}"),
                Action::Done { result, .. } => drop(result.unwrap()),
                Action::Flush | Action::Notify(_) => {}
            }
        }
    }

    fn send(&mut self, from: usize, session: u64, frame: Bytes) {
        let to = self.other_end(session, from);
        let one_way_us = self.one_way_us(from, to);
        let mut arrival = self.now_us + one_way_us;
        let mut probe_us = 2 * one_way_us + ACK_DELAY_US;
        while self.rng.random_bool(self.loss / 100.0) {
            arrival += probe_us;
            probe_us *= 2;
        }
        let last = self.streams.get_mut(&(from, to)).unwrap();
        arrival = arrival.max(*last);
        *last = arrival;
        self.at(arrival, Due::Arrive { from, to, frame });
    }

    /// One node after another writes.
    fn write_all(&mut self, writes: usize, regions: usize) {
        self.pushed.clear();
        for number in 0..writes {
            self.at(self.now_us + number as u64 * PAUSE_US, Due::Write { of: number % regions });
        }
        self.run(writes as u64 * PAUSE_US + AFTER_US);
    }

    /// What one write took.
    fn figures(&self) -> Figures {
        let new = || Histogram::<u64>::new(3).unwrap();
        let mut figures = Figures { bound: new(), seen: new(), frames: 0.0, far: 0.0, by_origin: 0.0 };
        for written in self.written.values() {
            for to in (0..self.nodes.len()).filter(|to| *to != written.of) {
                figures.bound.record(self.one_way_us(written.of, to)).unwrap();
                figures.seen.record(written.seen_us[&to] - written.at_us).unwrap();
            }
        }
        let each = |wanted: &dyn Fn(&(Reason, usize, usize)) -> bool| {
            self.pushed.iter().filter(|pushed| wanted(pushed)).count() as f64 / self.written.len() as f64
        };
        figures.frames = each(&|_| true);
        figures.far = each(&|(_, from, to)| self.nodes[*from].region != self.nodes[*to].region);
        figures.by_origin = each(&|(reason, _, _)| *reason != Reason::Relayed);
        figures
    }
}

struct Figures {
    bound: Histogram<u64>,
    seen: Histogram<u64>,
    /// For each write: all frames, those between regions, and those of its writer.
    frames: f64,
    far: f64,
    by_origin: f64,
}

impl Figures {
    fn shown(&self, what: &str) {
        let at = |times: &Histogram<u64>| {
            [0.5, 0.99, 0.999]
                .map(|quantile| format!("{:.0}", times.value_at_quantile(quantile) as f64 / 1000.0))
                .join("/")
        };
        eprintln!(
            "{what}: seen after {} ms (p50/p99/p99.9), bound {} ms; a write takes {:.0} frames, {:.0} of them between \
             regions, {:.0} of its writer",
            at(&self.seen),
            at(&self.bound),
            self.frames,
            self.far,
            self.by_origin
        );
    }
}

fn number(name: &str, otherwise: usize) -> usize {
    std::env::var(name).map_or(otherwise, |text| text.parse().expect("a number"))
}

#[test]
fn a_write_is_seen_in_all_regions_near_the_one_way_bound_though_frames_are_lost() {
    let (regions, nodes) = (number("SELVAGE_REGIONS", 40), number("SELVAGE_REGION_NODES", 3));
    let (loss, writes) = (number("SELVAGE_LOSS", 1) as f64, number("SELVAGE_WRITES", 80));
    let run = |told: &dyn Fn(usize) -> String| {
        let mut fleet = Fleet::new(regions, nodes, loss, told);
        fleet.write_all(writes, regions);
        fleet.figures()
    };
    let what = format!("{regions} regions of {nodes}, {loss} % lost");
    let relayed = run(&|region| format!("r{region}"));
    relayed.shown(&format!("{what}, by relays"));
    // Who takes all others for its neighbours pushes to each.
    let direct = run(&|_| "one".to_owned());
    direct.shown(&format!("{what}, directly"));

    let count = (regions * nodes) as f64;
    assert!(relayed.frames <= 2.0 * (count - 1.0), "{} frames for a write", relayed.frames);
    let ms = |times: &Histogram<u64>, quantile| times.value_at_quantile(quantile) as f64 / 1000.0;
    assert!(ms(&relayed.seen, 0.5) <= ms(&relayed.bound, 0.5) + 5.0);
    assert!(ms(&relayed.seen, 0.99) <= 200.0 && ms(&relayed.seen, 0.999) <= 350.0);
    if nodes > 2 {
        assert!(relayed.far < direct.far && relayed.by_origin < direct.by_origin);
        assert!(relayed.seen.value_at_quantile(0.999) < direct.seen.value_at_quantile(0.999));
    }
}

#[test]
fn a_dead_relay_costs_nothing_and_when_both_are_dead_another_one_is_chosen_once_that_is_noticed() {
    let regions = 4;
    let mut fleet = Fleet::new(regions, 4, 0.0, |region| format!("r{region}"));
    fleet.write_all(1, regions);
    let asked = |pushed: &(Reason, usize, usize)| pushed.0 == Reason::Relay && pushed.2 % regions == 1;
    let relays: Vec<usize> = fleet.pushed.iter().filter(|pushed| asked(pushed)).map(|pushed| pushed.2).collect();
    assert_eq!(relays.len(), 2);
    let others: Vec<usize> = (0..fleet.nodes.len()).filter(|of| of % regions == 1 && !relays.contains(of)).collect();
    let see = |fleet: &Fleet, key: &str| others.iter().all(|of| fleet.has(*of, key));

    fleet.dead.insert(relays[0]);
    fleet.at(fleet.now_us, Due::Write { of: 0 });
    fleet.run(AFTER_US);
    assert!(see(&fleet, "key-1"), "by the other relay");

    fleet.dead.insert(relays[1]);
    fleet.at(fleet.now_us, Due::Write { of: 0 });
    fleet.run(AFTER_US);
    assert!(!see(&fleet, "key-2"), "nobody knows yet that both are dead");

    for relay in &relays {
        let (peer, session) = (fleet.nodes[*relay].name.clone(), fleet.session(0, *relay));
        fleet.handle(0, Event::Disconnected { peer, session });
    }
    fleet.at(fleet.now_us, Due::Write { of: 0 });
    fleet.run(AFTER_US);
    assert!(see(&fleet, "key-3"));
    // What was missed is found by the vectors that everybody tells.
    fleet.at(fleet.now_us, Due::Tick);
    fleet.run(AFTER_US);
    assert!(see(&fleet, "key-2"));
}
