//! Clients of the model: what they ask for, and what they hear.

use bytes::Bytes;
use rand::Rng as _;

use super::super::Place;
use super::super::linear::{Call, Did};
use super::{World, store};
use crate::entry::Key;
use crate::planted::{self, Bug};
use crate::read;
use crate::replica::{Event, Write};

/// Calls of one key, at most: the search must end.
const CALLS_MAX: usize = 60;

/// Keys: one that is set and compared, one that is counted.
const KEYS: [&str; 2] = ["register", "counter"];

/// What nodes say to each other for clients.
#[derive(Debug, Clone)]
pub(in super::super) enum Message {
    /// Do this, as the home of at least this term.
    Do { key: usize, call: usize, from: usize, term: u64 },
    /// It was done so.
    Done { key: usize, call: usize, did: Did },
    /// It was not done.
    Refused { key: usize, call: usize },
}

/// All calls, by key.
#[derive(Default)]
pub(in super::super) struct Client {
    calls: [Vec<Heard>; KEYS.len()],
    /// What a client saw last of a key.
    seen: [Option<i64>; KEYS.len()],
    moment: u64,
}

struct Heard {
    call: Call,
    /// It surely was not done.
    refused: bool,
}

impl Client {
    fn moment(&mut self) -> u64 {
        self.moment += 1;
        self.moment
    }

    /// What was done, and what may have been. A read that nobody heard of says nothing.
    pub(in super::super) fn histories(self) -> Vec<Vec<Call>> {
        let says = |heard: &Heard| {
            let unheard = heard.call.ended.is_none() && matches!(heard.call.did, Did::Read(_));
            !heard.refused && !unheard
        };
        let history = |calls: Vec<Heard>| calls.into_iter().filter(says).map(|heard| heard.call).collect();
        self.calls.into_iter().map(history).collect()
    }
}

impl World {
    /// A client of a node asks for something.
    pub(super) fn call(&mut self, at: usize) {
        if self.nodes[at].replica.is_none() {
            return;
        }
        let key = self.rng.random_range(0..KEYS.len());
        if self.clients.calls[key].len() >= CALLS_MAX {
            return;
        }
        let place = self.nodes[at].homes.place(&store(), self.incarnation(at));
        let (home, term) = match place {
            Place::Here { term } => (at, term),
            Place::At { home, term } => {
                let home = self.nodes.iter().position(|node| node.name == home).unwrap();
                (home, term)
            }
            Place::Free | Place::Coming { .. } => return,
        };
        let link = self.link(at, home);
        if home != at && link.is_none() {
            return;
        }
        let did = self.wish(key);
        let (began, call) = (self.clients.moment(), self.clients.calls[key].len());
        let ask = Message::Do { key, call, from: at, term };
        let is_read = matches!(did, Did::Read(_));
        self.clients.calls[key].push(Heard { call: Call { did, began, ended: None }, refused: false });
        if planted::is(Bug::HomeStale) && is_read {
            let did = Did::Read(self.value(at, key));
            return self.answer(at, None, at, Message::Done { key, call, did });
        }
        self.send_said(link, home, ask);
    }

    /// What a client wants of a key.
    fn wish(&mut self, key: usize) -> Did {
        let value = self.rng.random_range(0..4);
        if KEYS[key] == "counter" {
            return if self.rng.random_bool(0.3) { Did::Read(None) } else { Did::Add(1, 0) };
        }
        match self.rng.random_range(0..8) {
            0 | 1 => Did::Read(None),
            2 => Did::Set(value),
            3 => Did::Delete,
            _ => Did::Swap(self.clients.seen[key], value, false),
        }
    }

    pub(super) fn said(&mut self, link: Option<u64>, to: usize, said: Message) {
        match said {
            Message::Do { key, call, from, term } => self.decide(link, to, (key, call, from, term)),
            Message::Done { key, call, did } => {
                self.clients.seen[key] = match did {
                    Did::Read(seen) => seen,
                    Did::Set(value) | Did::Swap(_, value, true) => Some(value),
                    _ => self.clients.seen[key],
                };
                let ended = self.clients.moment();
                let heard = &mut self.clients.calls[key][call];
                (heard.call.did, heard.call.ended) = (did, Some(ended));
            }
            Message::Refused { key, call } => self.clients.calls[key][call].refused = true,
        }
    }

    /// What a node does that is asked as the home.
    fn decide(&mut self, link: Option<u64>, of: usize, (key, call, from, term): (usize, usize, usize, u64)) {
        let is_home = matches!(
            self.nodes[of].homes.place(&store(), self.incarnation(of)),
            Place::Here { term: own } if own >= term
        );
        if !is_home {
            return self.send_said(link, from, Message::Refused { key, call });
        }
        let now = self.value(of, key);
        let set = |value: i64| Write::Set { value: Bytes::copy_from_slice(&value.to_le_bytes()), expires_ms: None };
        let wished = self.clients.calls[key][call].call.did.clone();
        let (did, write) = match wished {
            Did::Read(_) => (Did::Read(now), None),
            Did::Set(value) => (Did::Set(value), Some(set(value))),
            Did::Delete => (Did::Delete, Some(Write::Delete)),
            Did::Swap(seen, value, _) if seen == now => (Did::Swap(seen, value, true), Some(set(value))),
            Did::Swap(seen, value, _) => (Did::Swap(seen, value, false), None),
            Did::Add(delta, _) => (Did::Add(delta, 0), Some(Write::Increment { delta, expires_ms: None })),
        };
        let mut did = did;
        let is_write = write.is_some();
        if let Some(write) = write {
            let key_of = Key { store: store(), name: KEYS[key].into() };
            self.handle(of, Event::Write { ticket: 1, key: key_of, write });
            let Some(written) = self.nodes[of].written.take() else {
                return self.send_said(link, from, Message::Refused { key, call });
            };
            if let (Did::Add(_, sum), Some(counted)) = (&mut did, written.counted) {
                *sum = counted;
            }
        }
        let done = Message::Done { key, call, did };
        if planted::is(Bug::HomeDirty) && !is_write {
            return self.send_said(link, from, done);
        }
        self.answer(of, link, from, done);
    }

    /// The value of a key as a node has it.
    fn value(&self, of: usize, key: usize) -> Option<i64> {
        let key = Key { store: store(), name: KEYS[key].into() };
        let record = read::record(self.nodes[of].disk.as_ref(), &key).unwrap();
        let value = record.value(u64::MAX / 2)?;
        Some(i64::from_le_bytes(value.as_ref().try_into().unwrap()))
    }
}
