//! A small fleet with a home, in virtual time, and whether what its clients saw is linearizable (sync.md K10).
//!
//! The replicas, disks and homes are those that ship, and what is done with them is what the committer does: writes wait
//! for a flush before anybody hears of them, and until then readers may see them. Clients on all nodes set, delete,
//! compare-and-set, count and read, while links are cut, nodes crash, restart as another life or with an older plan, and
//! the home moves, and a node loses its disk; plans reach each node at another time. `SELVAGE_SEED=n` runs one seed.

mod client;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use bytes::Bytes;
use rand::rngs::StdRng;
use rand::{Rng as _, SeedableRng as _};
use selvage_config::plan::Home;
use selvage_config::{NodeName, StoreName};

use self::client::{Client, Message as Said};
use super::linear::{Call, is_linearizable};
use super::{Claim, Claimed, Homes};
use crate::commit;
use crate::engine::{Batch, Engine as _};
use crate::planted::{self, Bug};
use crate::replica::{Action, Event, Replica, TICK_MS, Written};
use crate::simulator::disk::Disk;
use crate::trust::{Keyring, Named};
use crate::wire;

/// The first virtual moment, milliseconds.
const EPOCH_MS: u64 = 10_000_000;

/// Virtual time of a run, milliseconds.
const RUN_MS: u64 = 30_000;

/// Nodes.
const NODES: usize = 3;

/// Seeds of a test run.
const SEEDS: u64 = 150;

/// Seeds in which a planted bug must have been caught.
const SEEDS_MAX: u64 = 1_000;

/// What the model does with a fault that is injected.
pub(super) enum Due {
    Tick { of: usize, life: u64 },
    Flush { of: usize, life: u64 },
    Frame { link: u64, to: usize, frame: Bytes },
    Drained { link: u64, of: usize, bytes: usize },
    Connect { pair: (usize, usize) },
    Crash { of: usize, reboots: bool },
    Wipe { of: usize },
    Start { of: usize },
    Plan { of: usize, newest: usize },
    Move,
    Claim { link: u64, from: usize, to: usize, claim: Claim },
    Claimed { link: u64, from: usize, to: usize, claim: Claim, answer: Claimed },
    Call { at: usize },
    Said { link: Option<u64>, to: usize, said: Said },
}

/// What is told once it is durable.
enum Told {
    Claims(Vec<(NodeName, Claim)>),
    Claimed { link: u64, to: usize, claim: Claim, answer: Claimed },
    Answer { link: Option<u64>, to: usize, said: Said },
}

pub(super) struct Node {
    pub(super) name: NodeName,
    pub(super) disk: Arc<Disk>,
    pub(super) replica: Option<Replica>,
    pub(super) homes: Homes,
    place: u64,
    life: u64,
    later: Vec<Action>,
    told: Vec<Told>,
    flushing: bool,
    /// What is made of a write once the replica has made it.
    pub(super) written: Option<Written>,
}

pub(super) struct World {
    pub(super) rng: StdRng,
    now_ms: u64,
    next: u64,
    due: BTreeMap<(u64, u64), Due>,
    pub(super) nodes: Vec<Node>,
    links: BTreeMap<(usize, usize), (u64, BTreeMap<usize, u64>)>,
    plans: Vec<Home>,
    pub(super) clients: Client,
    moves: u64,
}

pub(super) fn store() -> StoreName {
    "shop/orders".parse().unwrap()
}

impl World {
    fn new(seed: u64) -> Self {
        let node = |number| {
            let name: NodeName = format!("n{number}").parse().unwrap();
            Node {
                homes: Homes::none(name.clone()),
                name,
                disk: Arc::default(),
                replica: None,
                place: number as u64,
                life: 0,
                later: Vec::new(),
                told: Vec::new(),
                flushing: false,
                written: None,
            }
        };
        let nodes: Vec<Node> = (0..NODES).map(node).collect();
        let plans = vec![Home::first(store(), nodes[0].name.clone(), 10)];
        Self {
            rng: StdRng::seed_from_u64(seed),
            now_ms: EPOCH_MS,
            next: 1_000,
            due: BTreeMap::new(),
            nodes,
            links: BTreeMap::new(),
            plans,
            clients: Client::default(),
            moves: 0,
        }
    }

    pub(super) fn after(&mut self, least_ms: u64, most_ms: u64, due: Due) {
        let at = self.now_ms + self.rng.random_range(least_ms..=most_ms);
        self.at(at, due);
    }

    fn at(&mut self, at_ms: u64, due: Due) {
        self.next += 1;
        self.due.insert((at_ms, self.next), due);
    }

    /// Plays a run, and says what became of each key.
    fn play(mut self) -> (u64, Vec<Vec<Call>>) {
        for of in 0..NODES {
            self.after(0, 50, Due::Start { of });
        }
        for _ in 0..50 {
            let at_ms = self.now_ms + self.rng.random_range(1_500..RUN_MS - 6_000);
            for _ in 0..2 {
                let (at, later) = (self.rng.random_range(0..NODES), self.rng.random_range(0..50));
                self.at(at_ms + later, Due::Call { at });
            }
        }
        for _ in 0..self.rng.random_range(0..=3) {
            self.after(2_500, RUN_MS - 9_000, Due::Move);
        }
        for _ in 0..self.rng.random_range(0..=8) {
            let (of, reboots) = (self.rng.random_range(0..NODES), self.rng.random_bool(0.3));
            self.after(500, RUN_MS - 9_000, Due::Crash { of, reboots });
        }
        if self.rng.random_bool(0.2) {
            let of = self.rng.random_range(0..NODES);
            self.after(2_500, RUN_MS - 9_000, Due::Wipe { of });
        }
        for _ in 0..self.rng.random_range(0..=4) {
            let pair = self.rng.random_range(0..NODES);
            self.after(500, RUN_MS - 9_000, Due::Connect { pair: (pair, pair) });
        }
        while let Some(first) = self.due.first_entry() {
            let ((at, _), due) = first.remove_entry();
            if at > EPOCH_MS + RUN_MS {
                break;
            }
            self.now_ms = at;
            self.happen(due);
        }
        (self.moves, self.clients.histories())
    }

    fn happen(&mut self, due: Due) {
        match due {
            Due::Tick { of, life } => {
                if self.lives(of, life) {
                    self.handle(of, Event::Tick);
                    self.claim(of);
                    self.after(TICK_MS, TICK_MS, Due::Tick { of, life });
                }
            }
            Due::Flush { of, life } => {
                if self.lives(of, life) {
                    self.flush(of);
                }
            }
            Due::Frame { link, to, frame } => {
                if let Some(peer) = self.other_end(link, to) {
                    let peer = self.nodes[peer].name.clone();
                    let message = wire::decode(frame.slice(wire::LENGTH_BYTES..)).unwrap().unwrap();
                    self.handle(to, Event::Received { peer, session: link, message });
                }
            }
            Due::Drained { link, of, bytes } => {
                if let Some(peer) = self.other_end(link, of) {
                    let peer = self.nodes[peer].name.clone();
                    self.handle(of, Event::Sent { peer, session: link, frames: 1, bytes });
                }
            }
            Due::Connect { pair: (a, b) } if a == b => self.cut(a),
            Due::Connect { pair } => self.connect(pair),
            Due::Crash { of, reboots } => self.crash(of, reboots),
            Due::Wipe { of } => self.wipe(of),
            Due::Start { of } => self.start(of),
            Due::Plan { of, newest } => self.plan(of, newest),
            Due::Move => self.move_home(),
            Due::Claim { link, from, to, claim } => {
                if self.other_end(link, to).is_some() {
                    let (name, vector) = (self.nodes[from].name.clone(), self.vector(to));
                    let (batch, answer) = self.nodes[to].homes.release(&name, &claim, &vector);
                    self.keep(to, batch);
                    self.tell(to, Told::Claimed { link, to: from, claim, answer });
                }
            }
            Due::Claimed { link, from, to, claim, answer } => {
                if self.other_end(link, to).is_some() {
                    let name = self.nodes[from].name.clone();
                    self.nodes[to].homes.claimed(&name, &claim, answer);
                    self.claim(to);
                }
            }
            Due::Call { at } => self.call(at),
            Due::Said { link, to, said } => {
                let arrives = link.is_none_or(|link| self.other_end(link, to).is_some());
                if arrives && self.nodes[to].replica.is_some() {
                    self.said(link, to, said);
                }
            }
        }
    }

    fn lives(&self, of: usize, life: u64) -> bool {
        self.nodes[of].replica.is_some() && self.nodes[of].life == life
    }

    fn vector(&self, of: usize) -> crate::vector::VersionVector {
        self.nodes[of].replica.as_ref().map(|replica| replica.vector().clone()).unwrap_or_default()
    }

    pub(super) fn incarnation(&self, of: usize) -> u64 {
        self.nodes[of].replica.as_ref().map_or(0, |replica| replica.origin().incarnation)
    }

    fn keep(&mut self, of: usize, batch: Batch) {
        self.nodes[of].disk.apply(batch).unwrap();
        self.flush_soon(of);
    }

    fn tell(&mut self, of: usize, told: Told) {
        self.nodes[of].told.push(told);
        self.flush_soon(of);
    }

    /// Has a client told once all that it can have seen is durable.
    pub(super) fn answer(&mut self, of: usize, link: Option<u64>, to: usize, said: Said) {
        self.tell(of, Told::Answer { link, to, said });
    }

    /// Sends to a client of another node what may not be durable.
    pub(super) fn send_said(&mut self, link: Option<u64>, to: usize, said: Said) {
        let most = if link.is_some() { 120 } else { 0 };
        self.after(most.min(1), most, Due::Said { link, to, said });
    }

    /// What the committer does with all that waits, a little later.
    fn flush_soon(&mut self, of: usize) {
        if !std::mem::replace(&mut self.nodes[of].flushing, true) {
            // Now and then a disk is slow, and what readers may see already is not durable for long.
            let (life, most) = (self.nodes[of].life, if self.rng.random_bool(0.1) { 800 } else { 40 });
            self.after(0, most, Due::Flush { of, life });
        }
    }

    /// Takes what the plan says, and becomes the home if nothing is missing.
    fn claim(&mut self, of: usize) {
        let (incarnation, vector) = (self.incarnation(of), self.vector(of));
        let settled = self.nodes[of].homes.settle(incarnation, &vector);
        let (claimed, claims) = self.nodes[of].homes.claims(incarnation);
        self.nodes[of].disk.apply(settled).unwrap();
        self.keep(of, claimed);
        if !claims.is_empty() {
            self.tell(of, Told::Claims(claims));
        }
    }

    pub(super) fn handle(&mut self, of: usize, event: Event) {
        let now_ms = self.now_ms;
        let node = &mut self.nodes[of];
        let Some(replica) = &mut node.replica else { return };
        let mut later = Vec::new();
        let actions = replica.handle(now_ms, event).unwrap();
        commit::apply(node.disk.as_ref(), actions, &mut later).unwrap();
        commit::apply(node.disk.as_ref(), replica.sign(), &mut later).unwrap();
        for action in later {
            match action {
                Action::Done { result, .. } => node.written = result.ok(),
                other => node.later.push(other),
            }
        }
        self.flush_soon(of);
    }

    fn flush(&mut self, of: usize) {
        let node = &mut self.nodes[of];
        node.flushing = false;
        let Some(replica) = &mut node.replica else { return };
        node.disk.flush().unwrap();
        node.later.extend(replica.push());
        let (later, told) = (std::mem::take(&mut node.later), std::mem::take(&mut node.told));
        for action in later {
            match action {
                Action::Send { session, frame, .. } => self.send(of, session, frame),
                Action::Close { session, .. } => self.disconnect(session),
                // A commit that came by the push waits for the next flush.
                Action::Commit(batch) => self.keep(of, batch),
                Action::Flush | Action::Done { .. } | Action::Notify(_) => {}
            }
        }
        for told in told {
            match told {
                Told::Claims(claims) => {
                    for (node, claim) in claims {
                        let to = self.nodes.iter().position(|known| known.name == node).unwrap();
                        if let Some(link) = self.link(of, to) {
                            self.after(1, 80, Due::Claim { link, from: of, to, claim });
                        }
                    }
                }
                Told::Claimed { link, to, claim, answer } => {
                    self.after(1, 80, Due::Claimed { link, from: of, to, claim, answer });
                }
                Told::Answer { link, to, said } => self.send_said(link, to, said),
            }
        }
    }

    fn send(&mut self, of: usize, session: u64, frame: Bytes) {
        let Some(to) = self.other_end(session, of) else { return };
        let (delay, drained) = (self.rng.random_range(1..120), self.rng.random_range(0..60));
        // Now and then replication is far behind what is asked over the same link.
        let delay = if self.rng.random_bool(0.05) { delay + 2_000 } else { delay };
        let at = self.now_ms + delay;
        let Some((_, last)) = self.links.get_mut(&ordered(of, to)) else { return };
        let arrival = last.entry(to).or_default();
        *arrival = (*arrival).max(at);
        let arrival = *arrival;
        self.after(drained, drained, Due::Drained { link: session, of, bytes: frame.len() });
        self.at(arrival, Due::Frame { link: session, to, frame });
    }

    /// The link between two nodes, if it stands.
    pub(super) fn link(&self, of: usize, to: usize) -> Option<u64> {
        self.links.get(&ordered(of, to)).map(|(link, _)| *link)
    }

    fn other_end(&self, link: u64, of: usize) -> Option<usize> {
        let (a, b) = *self.links.iter().find(|(_, (known, _))| *known == link)?.0;
        Some(if a == of { b } else { a })
    }

    fn connect(&mut self, pair: (usize, usize)) {
        let up = |of: usize| self.nodes[of].replica.is_some();
        if self.links.contains_key(&pair) || !up(pair.0) || !up(pair.1) {
            return;
        }
        self.next += 1;
        let session = self.next;
        self.links.insert(pair, (session, BTreeMap::new()));
        for (of, other) in [pair, (pair.1, pair.0)] {
            let peer = self.nodes[other].name.clone();
            self.handle(of, Event::Connected { peer, session });
        }
    }

    fn disconnect(&mut self, session: u64) {
        let Some(pair) = self.links.iter().find(|(_, (known, _))| *known == session).map(|(pair, _)| *pair) else {
            return;
        };
        self.links.remove(&pair);
        for (of, other) in [pair, (pair.1, pair.0)] {
            let peer = self.nodes[other].name.clone();
            self.handle(of, Event::Disconnected { peer, session });
        }
        self.after(20, 400, Due::Connect { pair });
    }

    /// Cuts a node off for a while.
    fn cut(&mut self, of: usize) {
        let for_ms = self.rng.random_range(200..4_000);
        for other in (0..NODES).filter(|other| *other != of) {
            let pair = ordered(of, other);
            if let Some((session, _)) = self.links.remove(&pair) {
                for (of, other) in [pair, (pair.1, pair.0)] {
                    let peer = self.nodes[other].name.clone();
                    self.handle(of, Event::Disconnected { peer, session });
                }
                self.after(for_ms, for_ms, Due::Connect { pair });
            }
        }
    }

    fn crash(&mut self, of: usize, reboots: bool) {
        if self.nodes[of].replica.take().is_none() {
            return;
        }
        let sessions: Vec<u64> =
            self.links.iter().filter(|((a, b), _)| *a == of || *b == of).map(|(_, (session, _))| *session).collect();
        sessions.into_iter().for_each(|session| self.disconnect(session));
        let mut rng = self.rng.clone();
        let node = &mut self.nodes[of];
        node.disk.crash(&mut rng);
        self.rng = rng;
        node.later.clear();
        node.told.clear();
        // Another start of the machine is another place, so it is another life of the node.
        node.place += u64::from(reboots) << 32;
        self.after(50, 3_000, Due::Start { of });
    }

    /// A node loses its disk. It may have acknowledged what nobody else has: then nobody decides any more.
    fn wipe(&mut self, of: usize) {
        self.crash(of, false);
        if self.nodes[of].replica.is_none() {
            self.nodes[of].disk = Arc::default();
        }
    }

    fn start(&mut self, of: usize) {
        let chance = self.rng.random();
        let now_ms = self.now_ms;
        let node = &mut self.nodes[of];
        let keyring = Keyring { trust: Arc::new(Named(node.name.clone())), chance };
        let disk = Arc::clone(&node.disk);
        node.homes = Homes::open(disk.as_ref(), node.name.clone()).unwrap();
        let replica = Replica::open(disk, node.name.clone(), &node.place.to_be_bytes(), now_ms, keyring);
        node.replica = Some(replica.unwrap());
        node.life += 1;
        node.flushing = false;
        let life = node.life;
        let members = self.members().into_iter().map(|node| (node, "here".parse().unwrap()));
        self.handle(of, Event::Roster(members.collect()));
        self.after(0, TICK_MS, Due::Tick { of, life });
        for other in (0..NODES).filter(|other| *other != of) {
            self.after(1, 300, Due::Connect { pair: ordered(of, other) });
        }
        // The plan on its disk may be an old one.
        let known = self.rng.random_range(0..self.plans.len());
        self.plan(of, known);
        let newest = self.plans.len() - 1;
        self.after(100, 3_000, Due::Plan { of, newest });
    }

    fn members(&self) -> BTreeSet<NodeName> {
        self.nodes.iter().map(|node| node.name.clone()).collect()
    }

    fn plan(&mut self, of: usize, number: usize) {
        if self.nodes[of].replica.is_some() {
            let members = self.members();
            let batch = self.nodes[of].homes.plan(vec![self.plans[number].clone()], members);
            self.keep(of, batch);
        }
    }

    fn move_home(&mut self) {
        let to = self.nodes[self.rng.random_range(0..NODES)].name.clone();
        let last = self.plans.last().unwrap();
        if let Some(next) = last.next(&to, 0, last.term + 7) {
            self.moves += 1;
            self.plans.push(next);
            let newest = self.plans.len() - 1;
            for of in 0..NODES {
                self.after(1, 3_000, Due::Plan { of, newest });
            }
        }
    }
}

fn ordered(a: usize, b: usize) -> (usize, usize) {
    (a.min(b), a.max(b))
}

/// Whether all that clients saw of each key in a run is linearizable.
fn holds(seed: u64) -> Result<(usize, u64), String> {
    let (moves, histories) = World::new(seed).play();
    for history in &histories {
        if !is_linearizable(history) {
            let lines: Vec<String> = history.iter().map(|call| format!("{call:?}")).collect();
            return Err(format!("seed {seed}:\n{}", lines.join("\n")));
        }
    }
    Ok((histories.iter().map(Vec::len).sum(), moves))
}

#[test]
fn what_clients_of_a_home_see_is_linearizable_whatever_crashes_and_wherever_it_moves() {
    let one = std::env::var("SELVAGE_SEED").ok().and_then(|seed| seed.parse().ok());
    let seeds = one.map_or(0..SEEDS, |seed| seed..seed + 1);
    let (mut calls, mut moves) = (0_u64, 0);
    for seed in seeds.clone() {
        match holds(seed) {
            Ok((made, moved)) => (calls, moves) = (calls + made as u64, moves + moved),
            Err(history) => panic!("K10: not linearizable, {history}"),
        }
    }
    eprintln!("{calls} calls and {moves} moves in {} seeds", seeds.end - seeds.start);
    if one.is_none() {
        assert!(calls > 30 * SEEDS && moves > SEEDS / 2, "{calls} calls, {moves} moves prove little");
    }
}

#[test]
fn every_planted_bug_of_homes_is_caught() {
    let mut missed = Vec::new();
    for bug in [Bug::HomeFence, Bug::HomeEager, Bug::HomeTaken, Bug::HomeDirty, Bug::HomeStale] {
        planted::plant(Some(bug));
        let caught = (0..SEEDS_MAX).find(|seed| holds(*seed).is_err());
        planted::plant(None);
        match caught {
            Some(seed) => {
                assert!(holds(seed).is_ok(), "it fails without {bug:?}");
                eprintln!("{bug:?}: {} seeds", seed + 1);
            }
            None => missed.push(bug),
        }
    }
    assert!(missed.is_empty(), "not caught in {SEEDS_MAX} seeds: {missed:?}");
}
