//! A peer on a slow line, in virtual time: what it is sent of a key that is written all the time.

use std::collections::VecDeque;
use std::sync::Arc;

use bytes::Bytes;
use selvage_config::NodeName;
use selvage_sync::engine::{Engine, Memory};
use selvage_sync::replica::{TICK_MS, Write};
use selvage_sync::trust::{Keyring, Trust};
use selvage_sync::wire::{self, LENGTH_BYTES};
use selvage_sync::{Action, Event, Key, Replica};

/// The first moment, milliseconds since the Unix epoch.
const START_MS: u64 = 1_700_000_000_000;

/// Bytes that QUIC takes from a sender before it makes it wait: a stream's window by quinn's default.
const WINDOW_BYTES: usize = 1_250_000;

/// Milliseconds in which everything must have arrived.
const PATIENCE_MS: u64 = 3_600_000;

struct Anybody(NodeName);

impl Trust for Anybody {
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

struct Side {
    name: NodeName,
    replica: Replica,
    engine: Arc<Memory>,
    /// Frames in the replica's queue, and those that QUIC took: when the last byte of each is there.
    queue: VecDeque<Bytes>,
    under_way: VecDeque<(u64, Bytes)>,
    under_way_bytes: usize,
    free_ms: u64,
    sent_bytes: usize,
}

struct Line {
    sides: [Side; 2],
    now_ms: u64,
    bytes_per_s: u64,
}

impl Line {
    fn new(bytes_per_s: u64) -> Self {
        let side = |name: &str| {
            let name: NodeName = name.parse().unwrap();
            let keyring = Keyring { trust: Arc::new(Anybody(name.clone())), chance: [3; 32] };
            let engine: Arc<Memory> = Arc::default();
            let rows = Arc::clone(&engine) as Arc<dyn Engine>;
            let replica = Replica::open(rows, name.clone(), b"here", START_MS, keyring).unwrap();
            Side {
                name,
                replica,
                engine,
                queue: VecDeque::new(),
                under_way: VecDeque::new(),
                under_way_bytes: 0,
                free_ms: 0,
                sent_bytes: 0,
            }
        };
        let mut line = Self { sides: [side("a"), side("b")], now_ms: START_MS, bytes_per_s };
        let members = ["a", "b"].map(|name| (name.parse().unwrap(), "r".parse().unwrap()));
        for of in 0..2 {
            line.handle(of, Event::Roster(members.clone().into()));
        }
        for of in 0..2 {
            let peer = line.sides[1 - of].name.clone();
            line.handle(of, Event::Connected { peer, session: 1 });
        }
        line.pass(60_000);
        line
    }

    fn handle(&mut self, of: usize, event: Event) {
        let actions = self.sides[of].replica.handle(self.now_ms, event).unwrap();
        self.carry_out(of, actions);
        let mut actions = self.sides[of].replica.sign();
        actions.extend(self.sides[of].replica.push());
        self.carry_out(of, actions);
    }

    fn carry_out(&mut self, of: usize, actions: Vec<Action>) {
        let side = &mut self.sides[of];
        for action in actions {
            match action {
                Action::Commit(batch) => side.engine.apply(batch).unwrap(),
                Action::Send { frame, .. } => side.queue.push_back(frame),
                Action::Close { why, .. } => panic!("link closed: {why}"),
                Action::Done { result, .. } => drop(result.unwrap()),
                Action::Flush | Action::Notify(_) => {}
            }
        }
    }

    /// Lets time pass, a millisecond at a time.
    fn pass(&mut self, ms: u64) {
        for _ in 0..ms {
            self.now_ms += 1;
            for of in 0..2 {
                self.carry(of);
                if self.now_ms.is_multiple_of(TICK_MS) {
                    self.handle(of, Event::Tick);
                }
            }
        }
    }

    fn carry(&mut self, of: usize) {
        let (sender, receiver) = (self.sides[of].name.clone(), self.sides[1 - of].name.clone());
        let (now_ms, bytes_per_s) = (self.now_ms, self.bytes_per_s);
        loop {
            let side = &mut self.sides[of];
            if side.under_way_bytes >= WINDOW_BYTES {
                break;
            }
            let Some(frame) = side.queue.pop_front() else { break };
            let bytes = frame.len();
            side.free_ms = side.free_ms.max(now_ms * 1000) + bytes as u64 * 1_000_000 / bytes_per_s;
            side.under_way_bytes += bytes;
            side.sent_bytes += bytes;
            side.under_way.push_back((side.free_ms / 1000, frame));
            self.handle(of, Event::Sent { peer: receiver.clone(), session: 1, frames: 1, bytes });
        }
        while self.sides[of].under_way.front().is_some_and(|(due_ms, _)| *due_ms <= now_ms) {
            let (_, frame) = self.sides[of].under_way.pop_front().expect("looked at above");
            self.sides[of].under_way_bytes -= frame.len();
            let message = wire::decode(frame.slice(LENGTH_BYTES..)).unwrap().unwrap();
            self.handle(1 - of, Event::Received { peer: sender.clone(), session: 1, message });
        }
    }

    fn write(&mut self, number: u64) {
        let key = Key { store: "app/default".parse().unwrap(), name: "hot".into() };
        let value = Bytes::copy_from_slice(&[&number.to_be_bytes()[..], &[b'.'; 92]].concat());
        self.handle(0, Event::Write { ticket: 0, key, write: Write::Set { value, expires_ms: None } });
    }

    fn value(&self, of: usize) -> Option<Bytes> {
        self.sides[of].engine.get(b"dapp/default\0hot").unwrap()
    }
}

#[test]
fn a_peer_on_a_slow_line_is_not_sent_every_state_of_a_key_that_is_written_all_the_time() {
    const WRITES: u64 = 10_000;
    let mut line = Line::new(10_000);
    let before = line.sides[0].sent_bytes;
    for number in 0..WRITES {
        line.write(number);
        line.pass(1);
    }
    let mut waited_ms = 0;
    while line.value(1).is_none() || line.value(0) != line.value(1) {
        line.pass(100);
        waited_ms += 100;
        assert!(waited_ms < PATIENCE_MS, "not within {PATIENCE_MS} ms");
    }
    let sent = line.sides[0].sent_bytes - before;
    eprintln!(
        "{WRITES} writes of one key in 10 s to a peer at 10 KB/s: {sent} bytes sent, the last state {} s after it was made",
        waited_ms / 1000
    );
    assert!(waited_ms <= 60_000, "{waited_ms} ms, {sent} bytes");
    assert!(line.sides[1].replica.vector().total() >= WRITES, "the vector covers what was left out");
}
