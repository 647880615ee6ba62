//! Two replicas in one thread: what they send each other is counted, how long it is under way is not.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng, SeedableRng};
use selvage_config::NodeName;
use selvage_config::node::{Kv as Kept, KvEngine};
use selvage_sync::engine::{Batch, Engine, Settings, Vault};
use selvage_sync::replica::{TICK_MS, Write};
use selvage_sync::trust::{Keyring, Trust};
use selvage_sync::wire::{self, LENGTH_BYTES, Message};
use selvage_sync::{Action, Event, Key, Replica};

use super::{KEY_BYTES, VALUE_BYTES, key};

/// Keys of a large store.
const KEYS: usize = 1_000_000;

/// Writes that a node misses, or takes.
const UPDATES: usize = 10_000;
const APPLIED: usize = 200_000;

/// Ticks within which any of this is over.
const TICKS_MAX: usize = 2_000;

struct Side {
    replica: Replica,
    engine: Arc<dyn Engine>,
    name: &'static str,
    _directory: tempfile::TempDir,
}

/// A frame under way, and how many one after another led to it.
struct Frame {
    to: usize,
    bytes: Bytes,
    depth: usize,
}

/// What was sent.
#[derive(Default)]
struct Sent {
    bytes: usize,
    /// Bytes of keys and values in it.
    payload: usize,
    depth: usize,
}

struct Pair {
    sides: [Side; 2],
    now_ms: u64,
    under_way: VecDeque<Frame>,
    sent: Sent,
    session: u64,
    /// Whether what nodes say all the time is counted.
    all: bool,
    /// Seconds of CPU that signing took.
    signing: f64,
}

fn side(name: &'static str, kind: KvEngine) -> Side {
    let directory = tempfile::tempdir().unwrap();
    let settings = Settings::from(&Kept { engine: kind, ..Kept::default() });
    let engine: Arc<dyn Engine> = Arc::new(Vault::open(directory.path(), settings).unwrap());
    open(name, engine, directory)
}

fn open(name: &'static str, engine: Arc<dyn Engine>, directory: tempfile::TempDir) -> Side {
    let keyring = Keyring { trust: Arc::new(Named(name.parse().unwrap())), chance: [1; 32] };
    let replica = Replica::open(Arc::clone(&engine), name.parse().unwrap(), b"bench", START_MS, keyring).unwrap();
    Side { replica, engine, name, _directory: directory }
}

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

/// Seconds of CPU that this process has had.
fn cpu() -> f64 {
    cpu_time::ProcessTime::now().as_duration().as_secs_f64()
}

/// Writes of a busy node that share a flush.
const GROUP: usize = 64;

/// The first moment, milliseconds.
const START_MS: u64 = 1_700_000_000_000;

fn named(number: usize) -> Key {
    Key { store: "bench/default".parse().unwrap(), name: key(number) }
}

impl Pair {
    fn of(sides: [Side; 2]) -> Self {
        let mut pair = Self {
            sides,
            now_ms: START_MS + 1,
            under_way: VecDeque::new(),
            sent: Sent::default(),
            session: 0,
            all: true,
            signing: 0.0,
        };
        let members = ["a", "b"].map(|name| (name.parse().unwrap(), "here".parse().unwrap()));
        (0..2).for_each(|of| pair.handle(of, Event::Roster(members.clone().into()), 0));
        pair
    }

    fn connect(&mut self) {
        self.session += 1;
        for of in 0..2 {
            let peer = self.sides[1 - of].name.parse().unwrap();
            self.handle(of, Event::Connected { peer, session: self.session }, 0);
        }
        self.carry();
    }

    fn disconnect(&mut self) {
        for of in 0..2 {
            let peer = self.sides[1 - of].name.parse().unwrap();
            self.handle(of, Event::Disconnected { peer, session: self.session }, 0);
        }
    }

    fn handle(&mut self, of: usize, event: Event, depth: usize) {
        let actions = self.sides[of].replica.handle(self.now_ms, event).unwrap();
        self.carry_out(of, actions, depth);
        self.end_group(of, depth);
    }

    /// What the committer does after a group of events.
    fn end_group(&mut self, of: usize, depth: usize) {
        let start = cpu();
        let mut actions = self.sides[of].replica.sign();
        self.signing += cpu() - start;
        actions.extend(self.sides[of].replica.push());
        self.carry_out(of, actions, depth);
    }

    fn carry_out(&mut self, of: usize, actions: Vec<Action>, depth: usize) {
        let side = &mut self.sides[of];
        for action in actions {
            match action {
                Action::Commit(batch) => side.engine.apply(batch).unwrap(),
                Action::Send { frame, .. } => self.under_way.push_back(Frame { to: 1 - of, bytes: frame, depth }),
                Action::Close { why, .. } => panic!("link closed: {why}"),
                Action::Done { result, .. } => drop(result.unwrap()),
                Action::Flush | Action::Notify(_) => {}
            }
        }
    }

    /// Delivers what is under way, and what that leads to.
    fn carry(&mut self) {
        while let Some(Frame { to, bytes, depth }) = self.under_way.pop_front() {
            let message = wire::decode(bytes.slice(LENGTH_BYTES..)).unwrap().unwrap();
            self.count(&message, bytes.len(), depth);
            let peer = |of: usize| self.sides[of].name.parse().unwrap();
            let sent = Event::Sent { peer: peer(to), session: self.session, frames: 1, bytes: bytes.len() };
            let received = Event::Received { peer: peer(1 - to), session: self.session, message };
            self.handle(1 - to, sent, depth);
            self.handle(to, received, depth + 1);
        }
    }

    fn count(&mut self, message: &Message, bytes: usize, depth: usize) {
        let entries = match message {
            Message::Batch { entries, .. } | Message::Snapshot { entries, .. } => entries.len(),
            Message::Announce { .. } if !self.all => return,
            _ => 0,
        };
        self.sent.bytes += bytes;
        self.sent.payload += entries * (KEY_BYTES + VALUE_BYTES);
        self.sent.depth = self.sent.depth.max(depth + 1);
    }

    fn tick(&mut self) {
        self.now_ms += TICK_MS;
        (0..2).for_each(|of| self.handle(of, Event::Tick, 0));
        self.carry();
    }

    fn until(&mut self, what: &str, done: impl Fn(&Self) -> bool) -> usize {
        for ticks in 0..TICKS_MAX {
            if done(self) {
                return ticks;
            }
            self.tick();
        }
        panic!("not within {TICKS_MAX} ticks: {what}");
    }

    /// Writes at the first side, so many to a flush: they share a signature and a frame, as at the committer.
    fn write(&mut self, numbers: impl Iterator<Item = usize>, group: usize) {
        let mut rng = StdRng::seed_from_u64(1);
        for (at, number) in numbers.enumerate() {
            let value: Vec<u8> = (0..VALUE_BYTES).map(|_| rng.random()).collect();
            let write = Write::Set { value: value.into(), expires_ms: None };
            self.now_ms += u64::from(at % 100 == 0);
            let event = Event::Write { ticket: 0, key: named(number), write };
            let actions = self.sides[0].replica.handle(self.now_ms, event).unwrap();
            self.carry_out(0, actions, 0);
            if at % group == group - 1 {
                self.end_group(0, 0);
            }
        }
        self.end_group(0, 0);
    }
}

fn same(pair: &Pair) -> bool {
    let [a, b] = &pair.sides;
    !a.replica.vector().lacks(b.replica.vector()) && !b.replica.vector().lacks(a.replica.vector())
}

pub(super) fn catch_up() {
    [1, GROUP].into_iter().for_each(catch_up_of);
}

fn catch_up_of(group: usize) {
    let mut pair = Pair::of([side("a", KvEngine::Memory), side("b", KvEngine::Memory)]);
    pair.write(0..UPDATES, group);
    pair.connect();
    pair.until("both have the same", same);
    pair.disconnect();
    pair.write((0..UPDATES).rev(), group);
    pair.sent = Sent::default();
    pair.connect();
    assert!(same(&pair), "one round trip is enough");
    let Sent { bytes, payload, depth } = pair.sent;
    println!(
        "catch-up of {UPDATES} updates, {group} to a flush: {:.1} bytes each besides key and value, {depth} messages one after another",
        (bytes - payload) as f64 / UPDATES as f64
    );
}

pub(super) fn apply() {
    for (kind, group) in [(KvEngine::Sled, GROUP), (KvEngine::Memory, GROUP), (KvEngine::Memory, 1)] {
        let mut writer = Pair::of([side("a", KvEngine::Memory), side("b", kind)]);
        writer.write(0..APPLIED, group);
        println!("signing, {group} to a flush: {:.2} µs of CPU for each write", writer.signing * 1e6 / APPLIED as f64);
        let start = cpu();
        writer.connect();
        writer.until("both have the same", same);
        writer.sides[1].engine.flush().unwrap();
        let seconds = cpu() - start;
        println!(
            "apply, {kind}, {group} to a flush: {:.0} replicated entries of {VALUE_BYTES} bytes for each second of CPU, of which the sender \
             has its part",
            APPLIED as f64 / seconds
        );
    }
}

/// Two nodes that have the same large store.
fn large() -> Pair {
    let mut pair = Pair::of([side("a", KvEngine::Memory), side("b", KvEngine::Memory)]);
    pair.write(0..KEYS, GROUP);
    pair
}

pub(super) fn bootstrap() {
    let mut pair = large();
    let start = cpu();
    pair.sent = Sent::default();
    pair.connect();
    let ticks = pair.until("the new node has everything", same);
    let Sent { bytes, payload, .. } = pair.sent;
    println!(
        "bootstrap of {KEYS} keys: {:.1} s of CPU for both nodes, {:.1} s at the limit of 64 MiB/s, {:.1} bytes for each key \
         besides key and value",
        cpu() - start,
        ticks as f64 * TICK_MS as f64 / 1000.0,
        (bytes - payload) as f64 / KEYS as f64
    );
}

pub(super) fn repair() {
    let mut pair = large();
    pair.connect();
    pair.until("the new node has everything", same);
    for differing in [100, 10_000] {
        pair.disconnect();
        let Pair { sides: [a, b], now_ms, .. } = pair;
        lose(b.engine.as_ref(), differing);
        let again = |side: Side| open(side.name, side.engine, side._directory);
        pair = Pair::of([again(a), again(b)]);
        pair.now_ms = now_ms;
        // Both read their index into their sketches again.
        (0..KEYS / 16_384 + 2).for_each(|_| pair.tick());
        pair.connect();
        (pair.sent, pair.all) = (Sent::default(), false);
        let counts = |pair: &Pair| pair.sides[0].replica.counts();
        let (diverged, start) = (counts(&pair).diverged, cpu());
        pair.until("a proof", |pair| counts(pair).diverged > diverged);
        let Sent { bytes, payload, depth } = std::mem::take(&mut pair.sent);
        println!(
            "deep repair of {KEYS} keys, {differing} lost: {} bytes besides key and value ({:.1} for each), {depth} messages \
             one after another, {:.0} ms of CPU with the ticks until then",
            bytes - payload,
            (bytes - payload) as f64 / differing as f64,
            (cpu() - start) * 1000.0
        );
        assert_eq!(
            payload,
            differing * (KEY_BYTES + VALUE_BYTES),
            "what was lost is there again, and nothing else was sent"
        );
    }
}

/// Takes records and their rows of the index away behind the replica's back, as a fault would.
fn lose(engine: &dyn Engine, count: usize) {
    let rows = engine.scan(b"o", b"o", usize::MAX).unwrap();
    let mut batch = Batch::default();
    for row in rows.iter().step_by(rows.len() / count).take(count) {
        // A row of the index: what a sketch needs (9 bytes), then the row of the record.
        batch.remove(row.value.as_ref().unwrap()[9..].to_vec());
        batch.remove(row.key.to_vec());
    }
    engine.apply(batch).unwrap();
}
