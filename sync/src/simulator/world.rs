//! The fleet, its network and its time.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::sync::atomic::Ordering;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selvage_config::{NodeName, Region};

use super::disk::Disk;
use super::plan::{FAULTS_MS, PLAN_MS, Plan, Step, What};
use super::{Met, TRACE};
use crate::commit;
use crate::engine::Engine;
use crate::entry::{Dot, Entry, Key, Origin};
use crate::planted::{self, Bug};
use crate::read;
use crate::replica::{Action, Event, Limits, Notice, Replica, TICK_MS, Write, WriteError};
use crate::session::Token;
use crate::stamp::{FUTURE_MS_MAX, Stamp};
use crate::wire::{self, Message, Reason};

/// The first virtual moment, milliseconds.
const EPOCH_MS: u64 = 10_000_000;

/// Virtual time between two looks at what nodes hold, milliseconds.
const CHECK_MS: u64 = 2_000;

/// Virtual time between two looks whether all have the same.
const SETTLE_MS: u64 = 730;

/// How late a copy of a frame may come, milliseconds: long after what it is about may have been collected.
const LATE_MS: u64 = 9_000;

pub(super) const LIMITS: Limits = Limits {
    queue_bytes: 4_000,
    queue_frames: 16,
    window_bytes: 700,
    batch_bytes: 600,
    batch_entries: 3,
    snapshot_bytes: 3_000,
    snapshot_writes: 12,
    future_entries: 4,
    fleet_nodes: 3,
    region_nodes: 1,
    silent_ticks: 8,
    forger_ticks: 12,
    promise_ticks: 2,
    rows_ticks: 4,
    prove_ticks: 12,
    grace_ms: 3_000,
    epoch_ms: 1_000,
};

pub(super) enum Due {
    Step(Step),
    Deliver { link: u64, to: usize, frame: Bytes, again: bool },
    Drained { link: u64, of: usize, bytes: usize },
    Tick { of: usize, life: u64 },
    Connect { pair: (usize, usize) },
    Mend { pair: (usize, usize) },
    Join { side: u16 },
    Start { of: usize },
    Admit { of: usize },
    Roster { of: usize },
    Right { of: usize },
}

pub(super) struct Node {
    pub(super) name: NodeName,
    pub(super) region: Region,
    pub(super) disk: Arc<Disk>,
    pub(super) replica: Option<Replica>,
    /// What tells this disk from its copies.
    pub(super) place: u64,
    pub(super) backup: Option<(Disk, u64)>,
    pub(super) ahead_ms: i64,
    /// Starts so far: a tick of an earlier life is none of this one's.
    pub(super) life: u64,
    /// It was out of the roster or on an old disk, so own writes may be given up.
    pub(super) was_away: bool,
    /// Until when it alters what others wrote and it passes on, and whether it ever did.
    pub(super) lies_until_ms: u64,
    pub(super) has_lied: bool,
    /// It has been in the roster all the time, or has everything again.
    pub(super) veteran: bool,
    pub(super) last_stamp: Option<(Origin, Stamp)>,
}

pub(super) struct Link {
    pub(super) id: u64,
    /// When the last frame arrives, by receiver: a stream keeps its order.
    pub(super) arrival_ms: BTreeMap<usize, u64>,
}

pub(super) struct World {
    pub(super) rng: StdRng,
    pub(super) now_ms: u64,
    pub(super) nodes: Vec<Node>,
    pub(super) links: BTreeMap<(usize, usize), Link>,
    pub(super) cut: BTreeSet<(usize, usize)>,
    pub(super) split: Vec<u16>,
    pub(super) evicted: BTreeSet<usize>,
    pub(super) due: BTreeMap<(u64, u64), Due>,
    pub(super) next: u64,
    /// All that was written and, if a crash had a chance to take it back, whether that was acknowledged.
    pub(super) written: BTreeMap<Dot, Entry>,
    /// Writes that a wiped or replaced disk alone had, or that were given up as they must be.
    pub(super) lost: BTreeSet<Dot>,
    /// Which nodes' disks have had a write: it may be superseded and collected there, and is not lost then.
    pub(super) applied: BTreeMap<Dot, BTreeSet<usize>>,
    /// What arrived ahead of its time, and where.
    aside: BTreeSet<(usize, Dot)>,
    /// What was pushed on which link to whom.
    pub(super) pushed: BTreeSet<(u64, usize, Dot)>,
    pub(super) sessions: Vec<(Token, Entry)>,
    pub(super) counted: (i64, i64),
    pub(super) healing: bool,
    /// When all was mended.
    pub(super) mended_ms: u64,
    pub(super) met: Met,
    /// The key whose fate is printed, and what was printed of each node last.
    traced: Option<(Key, Vec<String>)>,
}

impl World {
    pub(super) fn new(seed: u64, regions: &[u8]) -> Self {
        let nodes = regions.len();
        let node = |number: usize| Node {
            name: format!("n{number}").parse().unwrap(),
            region: format!("r{}", regions[number]).parse().unwrap(),
            disk: Arc::default(),
            replica: None,
            place: number as u64,
            backup: None,
            ahead_ms: 0,
            life: 0,
            was_away: false,
            lies_until_ms: 0,
            has_lied: false,
            veteran: true,
            last_stamp: None,
        };
        let mut world = Self {
            rng: StdRng::seed_from_u64(!seed),
            now_ms: EPOCH_MS,
            nodes: (0..nodes).map(node).collect(),
            links: BTreeMap::new(),
            cut: BTreeSet::new(),
            split: Vec::new(),
            evicted: BTreeSet::new(),
            due: BTreeMap::new(),
            next: 1_000,
            written: BTreeMap::new(),
            lost: BTreeSet::new(),
            applied: BTreeMap::new(),
            aside: BTreeSet::new(),
            pushed: BTreeSet::new(),
            sessions: Vec::new(),
            counted: (0, 0),
            healing: false,
            mended_ms: 0,
            met: Met::new(),
            traced: std::env::var("SELVAGE_TRACE")
                .ok()
                .filter(|_| TRACE.load(Ordering::Relaxed))
                .map(|name| (Key { store: "app/default".parse().unwrap(), name }, vec![String::new(); nodes])),
        };
        (0..nodes).for_each(|of| world.after(0, 50, Due::Start { of }));
        world
    }

    pub(super) fn met(&mut self, what: &'static str) {
        *self.met.entry(what).or_default() += 1;
    }

    pub(super) fn after(&mut self, least_ms: u64, most_ms: u64, due: Due) {
        let at = self.now_ms + self.rng.random_range(least_ms..=most_ms);
        self.at(at, due);
    }

    fn at(&mut self, at_ms: u64, due: Due) {
        self.next += 1;
        self.due.insert((at_ms, self.next), due);
    }

    pub(super) fn run(&mut self, plan: &Plan) {
        for (at_ms, step) in &plan.steps {
            self.at(EPOCH_MS + at_ms, Due::Step(step.clone()));
        }
        while self.now_ms < EPOCH_MS + FAULTS_MS {
            self.run_until(self.now_ms + CHECK_MS);
            self.check_vectors();
            self.note_veterans();
        }
        self.heal();
        while self.now_ms < EPOCH_MS + PLAN_MS && !self.converged() {
            self.run_until(self.now_ms + SETTLE_MS);
            self.check_vectors();
        }
        self.check_end();
    }

    fn heal(&mut self) {
        self.healing = true;
        self.mended_ms = self.now_ms;
        self.split.clear();
        for pair in std::mem::take(&mut self.cut) {
            self.after(0, 100, Due::Connect { pair });
        }
        for of in 0..self.nodes.len() {
            self.nodes[of].ahead_ms = 0;
            self.admit(of);
            self.connect_all(of);
        }
    }

    fn run_until(&mut self, end_ms: u64) {
        while let Some(first) = self.due.first_entry() {
            if first.key().0 > end_ms {
                break;
            }
            let ((at, _), due) = first.remove_entry();
            self.now_ms = at;
            self.happen(due);
        }
        self.now_ms = end_ms;
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Step(step) => self.step(step),
            Due::Deliver { link, to, frame, again } => self.deliver(link, to, frame, again),
            Due::Drained { link, of, bytes } => {
                if let Some(peer) = self.other_end(link, of) {
                    self.handle(of, Event::Sent { peer, session: link, frames: 1, bytes });
                }
            }
            Due::Tick { of, life } => {
                if self.nodes[of].replica.is_some() && self.nodes[of].life == life {
                    self.handle(of, Event::Tick);
                    self.after(TICK_MS, TICK_MS, Due::Tick { of, life });
                }
            }
            Due::Connect { pair } => self.connect(pair),
            Due::Mend { pair } => {
                self.cut.remove(&pair);
                self.after(0, 100, Due::Connect { pair });
            }
            Due::Join { side } => {
                self.split.retain(|known| *known != side);
                (0..self.nodes.len()).for_each(|of| self.connect_all(of));
            }
            Due::Start { of } => self.start(of),
            Due::Admit { of } => self.admit(of),
            Due::Roster { of } => {
                let members = self.members();
                // One that was left out learns nothing.
                if !self.evicted.contains(&of) {
                    self.handle(of, Event::Roster(members));
                }
                self.connect_all(of);
            }
            Due::Right { of } => self.nodes[of].ahead_ms = 0,
        }
    }

    fn step(&mut self, step: Step) {
        match step {
            Step::Write { of, key, what, then_crash } => self.write(of, key, &what, then_crash),
            Step::Read { at } => self.read(at),
            Step::Reset { pair } => self.disconnect(ordered(pair)),
            Step::Cut { pair, for_ms } => {
                let pair = ordered(pair);
                self.met("cut");
                self.cut.insert(pair);
                self.disconnect(pair);
                self.after(for_ms, for_ms, Due::Mend { pair });
            }
            Step::Split { side, for_ms } => {
                self.met("split");
                self.split.push(side);
                let pairs: Vec<_> = self.links.keys().copied().filter(|pair| self.is_cut(*pair)).collect();
                pairs.into_iter().for_each(|pair| self.disconnect(pair));
                self.after(for_ms, for_ms, Due::Join { side });
            }
            Step::Crash { of, for_ms } => self.crash(of, for_ms),
            Step::Wipe { of } => self.replace(of, "wipe", |_| Some(Disk::default())),
            Step::Backup { of } => self.nodes[of].backup = Some((self.nodes[of].disk.copy(), 0)),
            Step::Restore { of } => self.replace(of, "restore", |world| Some(world.nodes[of].backup.take()?.0)),
            Step::Clone { of, from } => self.replace(of, "clone", |world| {
                // It may be down, with writes on its disk that it told nobody of.
                world.maybe_wrote(from);
                Some(world.nodes[from].disk.copy())
            }),
            Step::Evict { of, for_ms } => self.evict(of, for_ms),
            Step::Jump { of, by_ms, for_ms } => {
                self.met("jump");
                self.nodes[of].ahead_ms = by_ms;
                self.after(for_ms, for_ms, Due::Right { of });
            }
            Step::Forge { by, to, as_of } => self.forge(by, to, as_of),
            Step::Lie { by, for_ms } => self.nodes[by].lies_until_ms = self.now_ms + for_ms,
        }
    }

    fn pair_of(&self, link: u64) -> Option<(usize, usize)> {
        self.links.iter().find(|(_, known)| known.id == link).map(|(pair, _)| *pair)
    }

    fn other_end(&self, link: u64, of: usize) -> Option<NodeName> {
        let (a, b) = self.pair_of(link)?;
        Some(self.nodes[if a == of { b } else { a }].name.clone())
    }

    fn is_cut(&self, (a, b): (usize, usize)) -> bool {
        let apart = self.split.iter().any(|side| (side >> a & 1) != (side >> b & 1));
        self.cut.contains(&(a, b)) || apart || self.evicted.contains(&a) || self.evicted.contains(&b)
    }

    fn deliver(&mut self, link: u64, to: usize, frame: Bytes, again: bool) {
        let Some(peer) = self.other_end(link, to) else { return };
        let mut message = wire::decode(frame.slice(wire::LENGTH_BYTES..)).unwrap().unwrap();
        if again {
            // Streams do not repeat, so a claim is never repeated. Entries are, over other peers.
            let Message::Batch { complete, reason, .. } = &mut message else { return };
            if *reason == Reason::Repair {
                return;
            }
            *complete = None;
            self.met("late copy");
        } else if self.rng.random_bool(0.15) && !self.healing {
            self.after(0, LATE_MS, Due::Deliver { link, to, frame, again: true });
        }
        if !again {
            self.check_pushed(link, to, &message);
        }
        self.handle(to, Event::Received { peer, session: link, message });
    }

    pub(super) fn wall_ms(&self, of: usize) -> u64 {
        // Every clock drifts a little, each its own way.
        let drift = (self.now_ms - EPOCH_MS) / 1_000 * (of as u64 % 3) / 4;
        (self.now_ms + drift).saturating_add_signed(self.nodes[of].ahead_ms)
    }

    fn write(&mut self, of: usize, key: usize, what: &What, then_crash: bool) {
        if self.nodes[of].replica.is_none() {
            return;
        }
        let until = |life: Option<u64>| life.map(|life| self.wall_ms(of) + life);
        let bytes = |number: i64| Bytes::copy_from_slice(&number.to_le_bytes());
        let mut name = format!("k{key}");
        let write = match *what {
            What::Set { number, long: false, life_ms } => {
                Write::Set { value: bytes(number), expires_ms: until(life_ms) }
            }
            What::Set { life_ms, .. } => Write::Set { value: vec![7; 1_500].into(), expires_ms: until(life_ms) },
            What::Delete => Write::Delete,
            What::Add { number, life_ms } => Write::Increment { delta: number, expires_ms: until(life_ms) },
            What::Beside { number } => Write::Beside { value: bytes(number), expires_ms: None },
            What::Count => {
                name = "count".into();
                Write::Increment { delta: 1, expires_ms: None }
            }
        };
        let key = Key { store: "app/default".parse().unwrap(), name };
        self.counted.1 += i64::from(key.name == "count");
        self.handle_unless(of, Event::Write { ticket: 1, key, write }, then_crash);
        if then_crash {
            self.met("crash between commit and send");
            self.crash(of, 500);
        }
    }

    /// Notes what a node wrote and acknowledged. sync.md invariants K5 and K6.
    fn wrote(&mut self, of: usize, dot: &Dot) {
        let index = self.nodes[of].disk.get(&crate::layout::index(dot)).unwrap();
        let row = index.and_then(|value| crate::layout::index_row(&value).map(<[u8]>::to_vec));
        let Some(row) = row else {
            assert!(planted::is(Bug::AckFirst), "an acknowledged write is not in the index");
            return;
        };
        let record = read::record_at(self.nodes[of].disk.as_ref(), &row).unwrap();
        let entry = record.entry(dot).expect("a node's own write is in its record").clone();
        assert!(
            record.newest().unwrap().version.dot == *dot,
            "K6: an own write lost to an older one: {entry:?} in {record:?}"
        );
        let stamp = entry.version.stamp;
        let wall_ms = self.wall_ms(of);
        let drift = self.nodes[of].replica.as_ref().map_or(0, |replica| replica.ahead_ms().unsigned_abs());
        assert!(stamp.ms() <= wall_ms + FUTURE_MS_MAX + drift, "K6: stamp {stamp} at {wall_ms}");
        if let Some((origin, last)) = &self.nodes[of].last_stamp {
            assert!(*origin != dot.origin || stamp > *last, "K6: stamps went back");
        }
        self.nodes[of].last_stamp = Some((dot.origin.clone(), stamp));
        if entry.key.name == "count" {
            self.counted.0 += 1;
        }
        let mut token = Token::default();
        token.saw(dot);
        self.sessions.push((token, entry.clone()));
        assert!(self.written.insert(dot.clone(), entry).is_none(), "K5: {dot:?} was used twice");
    }

    /// sync.md invariant K9: a node that says it has a session shows it what it wrote, or what came after.
    fn read(&mut self, at: usize) {
        let Some(replica) = &self.nodes[at].replica else { return };
        let Some((token, entry)) = self.sessions.last() else { return };
        if replica.has(token) && !self.lost.contains(&entry.version.dot) {
            let record = read::record(self.nodes[at].disk.as_ref(), &entry.key).unwrap();
            let floor = replica.reach().floor.ms();
            let mut wanted = self.reference(&entry.key, |known| !self.lost.contains(&known.version.dot));
            wanted.collect(floor);
            let mut record = record;
            let has = record.merge(entry.clone()).is_none();
            let ended = wanted.entry(&entry.version.dot).is_none();
            assert!(has || ended, "K9: {} has the session and not {entry:?}", self.nodes[at].name);
        }
    }

    pub(super) fn handle(&mut self, of: usize, event: Event) {
        self.handle_unless(of, event, false);
    }

    fn handle_unless(&mut self, of: usize, event: Event, mute: bool) {
        let wall_ms = self.wall_ms(of);
        let disk = Arc::clone(&self.nodes[of].disk);
        let mut arrived: Vec<Dot> = match &event {
            Event::Received { message: Message::Batch { entries, .. } | Message::Snapshot { entries, .. }, .. } => {
                entries.iter().map(|entry| entry.version.dot.clone()).collect()
            }
            _ => Vec::new(),
        };
        // What was ahead of its time when it arrived is applied later.
        arrived.extend(self.aside.iter().filter(|(at, _)| *at == of).map(|(_, dot)| dot.clone()));
        let told = self.traced.is_some().then(|| format!("{event:?}"));
        let Some(replica) = &mut self.nodes[of].replica else { return };
        let origin = replica.origin().clone();
        let mut later = Vec::new();
        let actions = replica.handle(wall_ms, event).unwrap();
        commit::apply(disk.as_ref(), actions, &mut later).unwrap();
        commit::apply(disk.as_ref(), replica.sign(), &mut later).unwrap();
        let counts = replica.counts();
        if mute {
            // The crash comes now. Of what was not flushed it may keep anything.
            return;
        }
        commit::flush(disk.as_ref(), &later).unwrap();
        later.extend(replica.push());
        // What was on its way, or waited in memory, when the last disk lost it.
        for dot in arrived {
            if disk.get(&crate::layout::index(&dot)).unwrap().is_some() {
                self.aside.remove(&(of, dot.clone()));
                self.applied.entry(dot).or_default().insert(of);
            } else if self.written.get(&dot).is_some_and(|entry| entry.version.stamp.ms() > wall_ms) {
                self.aside.insert((of, dot));
            }
        }
        self.lost.retain(|dot| disk.get(&crate::layout::index(dot)).unwrap().is_none());
        if let Some(told) = told {
            self.trace(of, &told);
        }
        *self.met.entry("collected").or_default() =
            self.met.get("collected").copied().unwrap_or(0).max(counts.collected);
        *self.met.entry("conflict").or_default() = self.met.get("conflict").copied().unwrap_or(0).max(counts.conflicts);
        let mut commits = Vec::new();
        for action in later {
            match action {
                Action::Commit(batch) => commits.push(batch),
                Action::Flush => {}
                Action::Done { result: Ok(written), .. } => {
                    // A tombstone may go before what was asked for.
                    let before = Dot { seq: written.dot.seq.saturating_sub(1), ..written.dot.clone() };
                    let extra = before.seq > 0 && before.origin == origin && !self.written.contains_key(&before);
                    if extra && disk.get(&crate::layout::index(&before)).unwrap().is_some() {
                        self.maybe_wrote_one(of, &before);
                    }
                    self.wrote(of, &written.dot);
                }
                Action::Done { result: Err(WriteError::ClockUnsafe { .. }), .. } => self.met("clock unsafe"),
                Action::Done { result: Err(_), .. } => {}
                Action::Send { session, frame, .. } => self.send(of, session, frame),
                Action::Close { why, session, .. } => {
                    let lied = self.met.contains_key("forge") && why.contains("out of place");
                    let known = lied
                        || why.contains("not proved")
                        || why.contains("another node")
                        || why.contains("no snapshot")
                        || why.contains("roster")
                        || why.contains("takes its place");
                    assert!(known, "link closed: {why}");
                    if let Some(pair) = self.pair_of(session) {
                        self.disconnect(pair);
                    }
                }
                Action::Notify(notice) => self.notice(of, notice),
            }
        }
        if !commits.is_empty() {
            if self.rng.random_bool(0.05) {
                self.crash(of, 300);
                return;
            }
            commits.into_iter().for_each(|batch| disk.apply(batch).unwrap());
        }
        self.check_queues(of, LIMITS.queue_bytes + LIMITS.window_bytes + 4_000);
    }

    /// Prints what an event did to the traced key, or to how far a node has come.
    fn trace(&mut self, of: usize, event: &str) {
        let Some((key, last)) = &mut self.traced else { return };
        let Some(replica) = &self.nodes[of].replica else { return };
        let record = read::record(self.nodes[of].disk.as_ref(), key);
        let now = format!("{record:?}\n    {:?}", replica.describe());
        if last[of] != now {
            eprintln!("{} {} {event}\n    {now}", self.now_ms, self.nodes[of].name);
            last[of] = now;
        }
    }

    fn notice(&mut self, of: usize, notice: Notice) {
        match notice {
            Notice::Future { .. } => self.met("future"),
            Notice::Stale { .. } => self.met("stale"),
            Notice::Diverged { .. } => self.met("diverged"),
            Notice::Bootstrapped { .. } => self.met("bootstrapped"),
            Notice::Rewound { .. } => {
                assert!(self.nodes[of].was_away, "K5: rewound though it never lost anything");
                self.met("rewound");
            }
            Notice::Discarded { entry } => {
                let away = self.nodes[of].was_away;
                assert!(away, "K2: {} gave up {entry:?} though it never was away", self.nodes[of].name);
                self.met("discarded");
                self.give_up(of, &entry);
            }
            Notice::Apart { .. } => {}
            Notice::Forged { peer, .. } => {
                let lied = self.nodes.iter().any(|node| node.name == peer && node.has_lied);
                assert!(lied, "K13: {} refused what {peer} sent, which never lied", self.nodes[of].name);
                self.met("forged");
            }
            Notice::Corrupt { key } => panic!("K11: corrupt {key:?}"),
        }
    }

    fn send(&mut self, of: usize, session: u64, frame: Bytes) {
        let Some(pair) = self.pair_of(session) else { return };
        let frame = if self.now_ms < self.nodes[of].lies_until_ms { self.lie(of, frame) } else { frame };
        let to = if pair.0 == of { pair.1 } else { pair.0 };
        // A lost packet delays all that follow it on the stream.
        let lost = if self.rng.random_bool(0.02) { 400 } else { 0 };
        let delay = self.rng.random_range(1..150) + lost;
        let drained = self.rng.random_range(0..60);
        let link = self.links.get_mut(&pair).expect("just found");
        let last = link.arrival_ms.entry(to).or_default();
        let arrival = (*last).max(self.now_ms + delay);
        *last = arrival;
        self.after(drained, drained, Due::Drained { link: session, of, bytes: frame.len() });
        self.at(arrival, Due::Deliver { link: session, to, frame, again: false });
    }

    pub(super) fn connect_all(&mut self, of: usize) {
        for other in (0..self.nodes.len()).filter(|other| *other != of) {
            self.after(1, 300, Due::Connect { pair: ordered((of, other)) });
        }
    }

    fn connect(&mut self, pair: (usize, usize)) {
        let up = |of: usize| self.nodes[of].replica.is_some();
        if self.links.contains_key(&pair) || self.is_cut(pair) || !up(pair.0) || !up(pair.1) {
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

    pub(super) fn disconnect(&mut self, pair: (usize, usize)) {
        let Some(link) = self.links.remove(&pair) else { return };
        for (of, other) in [pair, (pair.1, pair.0)] {
            let peer = self.nodes[other].name.clone();
            self.handle(of, Event::Disconnected { peer, session: link.id });
        }
        self.after(1, 300, Due::Connect { pair });
    }
}

pub(super) fn ordered((a, b): (usize, usize)) -> (usize, usize) {
    (a.min(b), a.max(b))
}
