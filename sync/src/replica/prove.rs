//! Proofs: two nodes compare sketches, and send each other what differs.
//!
//! Of each pair the one whose name comes first begins. The other answers with cells where digests differ, as many as
//! the estimate asks for; the first decodes them, asks for what it lacks, and at the end sends what only it has and
//! still has by then. Nothing is scanned: sketches are in memory, and an item is found by the index.

use std::collections::BTreeMap;

use selvage_config::NodeName;

use super::warrants::Proved;
use super::{Action, Notice, Replica};
use crate::engine::{Batch, EngineError};
use crate::entry::{Dot, Entry, Key};
use crate::layout;
use crate::read::{self, ReadError};
use crate::sketch::{
    CELLS, Cell, Digest, Item, SHARDS, SPAN_CELLS, Sketch, Span, decode, estimate, item as item_named, item_of, parts,
};
use crate::stamp::Stamp;
use crate::wire::{self, Message, Part, Reason, Symbols};

/// A difference that is older than this is none that is just under way, milliseconds.
const OLD_MS: u64 = 10_000;

/// Spans of which cells are sent in one answer; the next proof finds the others.
const SPANS_AT_ONCE: usize = 64;

/// Cells for each item that is thought to differ, in hundredths, and some more: chance may want more than 1.35.
const CELLS_PERCENT: usize = 150;
const CELLS_MORE: usize = 24;

/// Groups of shards whose cells, `count` in all, are at most [`CELLS`] each.
fn groups(count: usize) -> usize {
    count.div_ceil(CELLS).next_power_of_two().min(SHARDS)
}

impl Replica {
    /// Begins a proof with a peer, now and then.
    pub(super) fn prove(&mut self, name: &NodeName, actions: &mut Vec<Action>) {
        let due = self.ticks.is_multiple_of(self.limits.prove_ticks) && self.sketched.is_none();
        let first = self.origin.node < *name && self.bootstrap.is_none();
        let Some(peer) = self.peers.get_mut(name).filter(|peer| due && first && peer.is_live()) else { return };
        let floor = self.frontier.floor();
        let (digests, spans) = (self.sketches.shards.digests(), self.sketches.span_digests(floor.ms()));
        let frame = wire::encode(&Message::Prove { digests, spans, floor });
        if peer.queued.has_room(&self.limits, frame.len()) {
            actions.push(peer.send(name, frame));
        }
    }

    /// Answers a proof with cells of what differs.
    pub(super) fn compare(
        &mut self,
        name: &NodeName,
        digests: &[Digest],
        spans: &BTreeMap<Span, u64>,
        floor: Stamp,
        actions: &mut Vec<Action>,
    ) {
        if self.sketched.is_some() || self.bootstrap.is_some() {
            return;
        }
        let ours = self.sketches.shards.digests();
        let mut symbols = Vec::new();
        if ours.iter().zip(digests).any(|(ours, theirs)| ours.sum != theirs.sum) {
            let count = estimate(&ours, digests) * CELLS_PERCENT / 100 + CELLS_MORE;
            let of = groups(count);
            let width = SHARDS / of;
            for number in 0..of {
                let shards = number * width..(number + 1) * width;
                if ours[shards.clone()].iter().zip(&digests[shards]).any(|(ours, theirs)| ours.sum != theirs.sum) {
                    symbols.push(self.group(number, of, count.div_ceil(of)));
                }
            }
        }
        let floor_ms = floor.max(self.frontier.floor()).ms();
        let own = self.sketches.span_digests(floor_ms);
        let differs = |span: &&Span| own.get(*span) != spans.get(*span) && span.is_after(floor_ms);
        let mut differing: Vec<Span> = own.keys().chain(spans.keys()).filter(differs).copied().collect();
        differing.sort_unstable();
        differing.dedup();
        symbols.extend(differing.into_iter().take(SPANS_AT_ONCE).map(|span| self.span(span)));
        if symbols.is_empty() {
            self.counts.proved += 1;
        }
        self.say(name, &Message::Symbols(symbols), actions);
    }

    fn group(&self, number: usize, of: usize, count: usize) -> Symbols {
        let byte = |number: usize| u8::try_from(number).unwrap_or(0);
        let cells = self.sketches.shards.group(number, of, count);
        Symbols { part: Part::Group { number: byte(number), of: byte(of) }, cells }
    }

    fn span(&self, span: Span) -> Symbols {
        let empty = Sketch::new(SPAN_CELLS);
        let sketch = self.sketches.spans.get(&span).map_or(&empty, |(sketch, _)| sketch);
        Symbols { part: Part::Span(span), cells: sketch.cells(SPAN_CELLS).to_vec() }
    }

    fn ours(&self, part: Part, count: usize) -> Vec<Cell> {
        match part {
            Part::Group { number, of } => self.sketches.shards.group(number.into(), of.into(), count),
            Part::Span(span) => self.span(span).cells,
        }
    }

    /// Decodes the answer to a proof, and asks for what is lacking.
    pub(super) fn decode(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        symbols: &[Symbols],
        actions: &mut Vec<Action>,
    ) -> Result<(), EngineError> {
        if symbols.is_empty() {
            self.counts.proved += 1;
            return Ok(());
        }
        let (mut lacking, mut ours, mut more) = (Vec::new(), Vec::new(), Vec::new());
        let mut hopeless = false;
        for Symbols { part, cells } in symbols {
            match decode(&self.ours(*part, cells.len()), cells) {
                Some(difference) => {
                    lacking.extend(difference.theirs);
                    ours.extend(difference.ours);
                }
                None if cells.len() >= CELLS || matches!(part, Part::Span(_)) => hopeless = true,
                None => more.push((*part, (cells.len() as u64) * 2)),
            }
        }
        if !more.is_empty() {
            self.say(name, &Message::More(more), actions);
        }
        let mut old = 0;
        for item in &ours {
            let found = self.find_item(*item)?;
            old += found.iter().filter(|entry| entry.version.stamp.ms() + OLD_MS < now_ms).count();
        }
        self.diverged(name, old, actions);
        let Some(peer) = self.peers.get_mut(name) else { return Ok(()) };
        peer.ours.extend(ours);
        // Also if nothing is lacking: its answer is when the others are sent.
        self.say(name, &Message::Want { items: lacking, keys: Vec::new() }, actions);
        if hopeless {
            // More differs than the sketches hold: each says all it has.
            self.say(name, &Message::More(Vec::new()), actions);
            self.offer_all(name);
            self.pump(name, actions)?;
        }
        Ok(())
    }

    /// Sends a peer all there is, whatever it says it has.
    fn offer_all(&mut self, name: &NodeName) {
        if let Some(peer) = self.peers.get_mut(name) {
            peer.catch_up_from(&crate::vector::VersionVector::default());
        }
    }

    /// Sends more cells of what a peer could not decode.
    pub(super) fn more(
        &mut self,
        name: &NodeName,
        more: &[(Part, u64)],
        actions: &mut Vec<Action>,
    ) -> Result<(), EngineError> {
        if more.is_empty() {
            self.offer_all(name);
            return self.pump(name, actions);
        }
        let groups = more.iter().filter_map(|(part, count)| match part {
            Part::Group { number, of } => {
                let count = usize::try_from(*count).unwrap_or(CELLS).min(CELLS);
                Some(self.group((*number).into(), (*of).into(), count))
            }
            Part::Span(_) => None,
        });
        let symbols: Vec<Symbols> = groups.take(SHARDS).collect();
        if !symbols.is_empty() {
            self.say(name, &Message::Symbols(symbols), actions);
        }
        Ok(())
    }

    /// Sends entries that a peer asks for.
    pub(super) fn wanted(
        &mut self,
        name: &NodeName,
        items: &[Item],
        keys: &[Key],
        actions: &mut Vec<Action>,
    ) -> Result<(), EngineError> {
        let mut entries = Vec::new();
        for key in keys {
            match read::record(self.engine.as_ref(), key) {
                Ok(record) => entries.extend(record.entries().cloned()),
                Err(ReadError::Corrupt(_)) => {}
                Err(ReadError::Engine(error)) => return Err(error),
            }
        }
        for item in items {
            entries.extend(self.find_item(*item)?);
        }
        self.repair(name, entries, true, actions)
    }

    /// The answer to what was asked for came: what only we have, if it is still there, follows.
    pub(super) fn answered(&mut self, name: &NodeName, actions: &mut Vec<Action>) -> Result<(), EngineError> {
        let Some(peer) = self.peers.get_mut(name) else { return Ok(()) };
        let items = std::mem::take(&mut peer.ours);
        let mut entries = Vec::new();
        for item in items {
            let found = self.find_item(item)?;
            if found.is_empty() {
                self.forget_lost(item, actions)?;
            }
            entries.extend(found);
        }
        self.repair(name, entries, false, actions)
    }

    /// An item whose entry was lost with a record that could not be read, and was not healed before the next write:
    /// its row of the index and its place in the sketch go too.
    fn forget_lost(&mut self, item: Item, actions: &mut Vec<Action>) -> Result<(), EngineError> {
        let (hash, seq) = parts(item);
        let mut batch = Batch::default();
        for origin in &self.origins {
            let dot = Dot { origin: origin.clone(), seq };
            let index = layout::index(&dot);
            let Some(value) = self.engine.get(&index)?.filter(|_| parts(item_of(&dot, 0)).0 == hash) else { continue };
            let (Some((known, span)), Some(row)) = (layout::index_item(&index, &value), layout::index_row(&value))
            else {
                continue;
            };
            let lost = match read::record_at(self.engine.as_ref(), row) {
                Ok(record) => record.entry(&dot).is_none(),
                Err(ReadError::Corrupt(_)) => false,
                Err(ReadError::Engine(error)) => return Err(error),
            };
            if known == item && lost {
                batch.remove(index);
                self.sketches.toggle(item, span, -1);
            }
        }
        if !batch.is_empty() {
            actions.push(Action::Commit(batch));
        }
        Ok(())
    }

    /// A record can't be read here: whoever has it sends it.
    pub(super) fn heal(&mut self, key: Key) -> Vec<Action> {
        let mut actions = Vec::new();
        let live: Vec<NodeName> =
            self.peers.iter().filter(|(_, peer)| peer.greeted()).map(|(name, _)| name.clone()).collect();
        let want = Message::Want { items: Vec::new(), keys: vec![key] };
        live.iter().for_each(|name| self.say(name, &want, &mut actions));
        actions
    }

    /// The entries of an item: one, or more if two origins have the same hash.
    fn find_item(&self, item: Item) -> Result<Vec<Entry>, EngineError> {
        let (hash, seq) = parts(item);
        let mut found = Vec::new();
        for origin in &self.origins {
            let dot = Dot { origin: origin.clone(), seq };
            if parts(item_of(&dot, 0)).0 != hash {
                continue;
            }
            let Some(value) = self.engine.get(&layout::index(&dot))? else { continue };
            let Some(row) = layout::index_row(&value) else { continue };
            match read::record_at(self.engine.as_ref(), row) {
                Ok(record) => found.extend(record.entry(&dot).filter(|entry| item_named(entry) == item).cloned()),
                Err(ReadError::Corrupt(_)) => {}
                Err(ReadError::Engine(error)) => return Err(error),
            }
        }
        Ok(found)
    }

    /// Sends entries in frames that fit; an answer also if there are none.
    fn repair(
        &mut self,
        name: &NodeName,
        entries: Vec<Entry>,
        answer: bool,
        actions: &mut Vec<Action>,
    ) -> Result<(), EngineError> {
        let cut = self.frontier.cut();
        let mut batches = vec![Vec::new()];
        let mut bytes = 0;
        for entry in entries {
            bytes += super::catch_up::size(&entry);
            batches.last_mut().expect("one at least").push(entry);
            if bytes >= self.limits.batch_bytes {
                batches.push(Vec::new());
                bytes = 0;
            }
        }
        let last = batches.len() - 1;
        for (at, entries) in batches.into_iter().enumerate() {
            if entries.is_empty() && !(answer && at == last) {
                continue;
            }
            let reason = if answer && at == last { Reason::Repair } else { Reason::CatchUp };
            let Proved { entries, warrants, .. } = self.attest(entries)?;
            self.introduce(name, entries.iter().map(|entry| entry.version.dot.origin.clone()), actions)?;
            self.say(name, &Message::Batch { reason, cut, entries, warrants, complete: None }, actions);
        }
        Ok(())
    }

    fn diverged(&mut self, name: &NodeName, entries: usize, actions: &mut Vec<Action>) {
        if entries > 0 {
            self.counts.diverged += entries as u64;
            actions.push(Action::Notify(Notice::Diverged { peer: name.clone(), entries }));
        }
    }

    /// Sends a message if the peer's queue has room; what is lost by that the next proof finds.
    fn say(&mut self, name: &NodeName, message: &Message, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get_mut(name) else { return };
        let frame = wire::encode(message);
        if peer.queued.has_room(&self.limits, frame.len()) {
            actions.push(peer.send(name, frame));
        }
    }
}
