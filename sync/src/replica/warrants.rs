//! Warrants: that what is passed on is proved, and what is not proved is not taken (sync.md invariant K13).
//!
//! Every entry has a warrant of its origin, but for two kinds. A tombstone that an entry on top of it implies is not sent:
//! whoever takes that entry makes it. And of a *past* origin (a node that left, an earlier incarnation) whose key nobody
//! can vouch for any more, since its authority is forgotten, a member of the roster is believed.

use std::collections::{BTreeMap, BTreeSet};

use selvage_config::NodeName;

use super::{Action, Notice, Replica};
use crate::engine::{Batch, Engine, EngineError, Row};
use crate::entry::{Content, Dot, Entry, Fields, Origin};
use crate::layout;
use crate::planted::{self, Bug};
use crate::read::{self, ReadError};
use crate::stamp::Stamp;
use crate::trust::{PublicKey, Signer, Voucher};
use crate::warrant::{Hash, RUN_MAX, Run, Tree, Warrant, leaf};
use crate::wire::{self, Message, VOUCHERS_MAX};

/// Writes before the last one among which some may be unsigned after a crash: more than a group makes.
const UNSIGNED_MAX: u64 = 1024;

/// Warrants that are looked at in one tick, whether they still prove anything: these, and twice as many as were stored since
/// the last one, so that a key that is written all the time leaves no heap of them.
const SWEEP_ROWS: usize = 64;
const SWEEP_ROWS_MAX: usize = 8192;

/// Keys of origins read at once at the start.
const KEY_ROWS: usize = 1024;

/// Records whose warrants are missing and that are asked for at once.
const HEALED_MAX: usize = 16;

/// Keys of one node's incarnations that are kept, at most. A node vouches for them itself, so without a bound one could fill
/// the disks of its peers.
pub(super) const KEYS_OF_NODE_MAX: usize = 1024;

/// Why a link ends on which a write came that its origin did not make.
pub(super) const FORGED: &str = "it passed on what is not proved to be of its origin";

/// Entries with what proves them.
#[derive(Default)]
pub(super) struct Proved {
    pub(super) entries: Vec<Entry>,
    pub(super) warrants: Vec<Warrant>,
    /// What should have a warrant and has none that can be read: not sent.
    pub(super) lacking: Vec<Entry>,
}

/// What was found of the entries of a frame.
#[derive(Default)]
pub(super) struct Examined {
    /// Rows of warrants that are new.
    pub(super) batch: Batch,
    /// What is not to be taken, though its sender may be honest.
    pub(super) unproved: BTreeSet<Dot>,
    /// How much is believed of past origins without a proof.
    pub(super) hearsay: u64,
}

/// The keys of origins that are known.
pub(super) fn stored_keys(engine: &dyn Engine) -> Result<BTreeMap<Origin, PublicKey>, EngineError> {
    let (mut keys, mut from) = (BTreeMap::new(), layout::KEYS.to_vec());
    loop {
        let rows = engine.scan(layout::KEYS, &from, KEY_ROWS)?;
        let ended = rows.len() < KEY_ROWS;
        for Row { key, value } in rows {
            from = [&key, &[0][..]].concat();
            // One that can't be read comes again with the next entries of its origin.
            let (Some(origin), Ok(value)) = (layout::key_origin(&key), value) else { continue };
            if let Ok(voucher) = Voucher::decode(origin.clone(), &mut Fields::of(value)) {
                keys.insert(origin, voucher.key);
            }
        }
        if ended {
            return Ok(keys);
        }
    }
}

/// A row with an origin's key. Without a proof it is of use on this node alone.
pub(super) fn put_key(batch: &mut Batch, voucher: &Voucher) {
    let mut value = Vec::new();
    voucher.encode(&mut value);
    batch.put(layout::public_key(&voucher.origin), value);
}

impl Replica {
    /// Signs the local writes since the last time. The caller does this before it makes them durable.
    pub fn sign(&mut self) -> Vec<Action> {
        let fresh = &self.outbox[self.signed..];
        if fresh.is_empty() {
            return Vec::new();
        }
        let mut batch = Batch::default();
        for entries in fresh.chunks(RUN_MAX) {
            let leaves = entries.iter().map(|entry| (entry.version.dot.seq, leaf(entry))).collect();
            let tree = signed(&self.signer, &self.origin, &leaves);
            let seqs: Vec<u64> = leaves.keys().copied().collect();
            self.fresh.extend(tree.warrant(&seqs));
            batch.put(layout::warrant(&self.origin, tree.run.last()), tree.encode());
        }
        self.signed = self.outbox.len();
        self.stored += batch.len();
        vec![Action::Commit(batch)]
    }

    /// Signs what a crash left unsigned: the newest own writes that still stand. What follows one upon another is one run: one
    /// that spans what was signed before would prove nothing of that, and be taken for a forgery beside what does. A
    /// tombstone under what stands on it is left out: it may have been signed long ago, and nobody sends it.
    pub(super) fn sign_rest(&mut self) -> Result<(), EngineError> {
        let mut from = self.vector.get(&self.origin).saturating_sub(UNSIGNED_MAX) + 1;
        let (mut batch, mut leaves) = (Batch::default(), BTreeMap::new());
        let mut put = |leaves: &mut BTreeMap<u64, Hash>| {
            if !leaves.is_empty() {
                let tree = signed(&self.signer, &self.origin, &std::mem::take(leaves));
                batch.put(layout::warrant(&self.origin, tree.run.last()), tree.encode());
            }
        };
        while let Some(row) = self.engine.scan(&layout::indices(&self.origin), &self.own_index(from), 1)?.pop() {
            let Some(seq) = layout::index_seq(&row.key) else { break };
            from = seq.saturating_add(1);
            let dot = Dot { origin: self.origin.clone(), seq };
            let record = row.value.ok().and_then(|value| layout::index_row(&value).map(<[u8]>::to_vec));
            let Some(record) = record.filter(|_| matches!(self.tree(&dot), Ok(None))) else { continue };
            match read::record_at(self.engine.as_ref(), &record) {
                Ok(record) => {
                    let Some(entry) = record.entry(&dot) else { continue };
                    if self.is_implied(entry)? {
                        continue;
                    }
                    if leaves.len() >= RUN_MAX || !leaves.is_empty() && !leaves.contains_key(&(seq - 1)) {
                        put(&mut leaves);
                    }
                    leaves.insert(seq, leaf(entry));
                }
                Err(ReadError::Corrupt(_)) => {}
                Err(ReadError::Engine(error)) => return Err(error),
            }
        }
        put(&mut leaves);
        if batch.is_empty() { Ok(()) } else { self.engine.commit(batch) }
    }

    fn own_index(&self, seq: u64) -> Vec<u8> {
        layout::index(&Dot { origin: self.origin.clone(), seq })
    }

    /// What is known of the run that a write was signed in.
    fn tree(&self, dot: &Dot) -> Result<Option<Tree>, EngineError> {
        let from = layout::warrant(&dot.origin, dot.seq);
        let Some(row) = self.engine.scan(&layout::warrants(&dot.origin), &from, 1)?.pop() else { return Ok(None) };
        let (Some((origin, last)), Ok(value)) = (layout::warrant_of(&row.key), row.value) else { return Ok(None) };
        Ok(Tree::decode(origin, last, value).ok().filter(|tree| tree.run.place(dot.seq).is_some()))
    }

    /// Adds to entries what proves them. What can't be proved is left out; what should be is told.
    pub(super) fn attest(&self, entries: Vec<Entry>) -> Result<Proved, EngineError> {
        let mut trees: BTreeMap<(Origin, u64), (Tree, Vec<u64>)> = BTreeMap::new();
        let mut proved = Proved::default();
        for entry in entries {
            let dot = &entry.version.dot;
            let cached = trees.range_mut((dot.origin.clone(), dot.seq)..).next();
            let cached =
                cached.filter(|((origin, _), (tree, _))| *origin == dot.origin && tree.run.place(dot.seq).is_some());
            if let Some((_, (_, seqs))) = cached.filter(|(_, (tree, _))| tree.has(dot.seq, leaf(&entry))) {
                seqs.push(dot.seq);
                proved.entries.push(entry);
                continue;
            }
            match self.tree(dot)?.filter(|tree| tree.has(dot.seq, leaf(&entry))) {
                Some(tree) => {
                    let at = (dot.origin.clone(), tree.run.last());
                    trees.insert(at, (tree, vec![dot.seq]));
                    proved.entries.push(entry);
                }
                None if !self.keys.contains_key(&dot.origin) => proved.entries.push(entry),
                None if self.is_implied(&entry)? => {}
                None => proved.lacking.push(entry),
            }
        }
        for (tree, seqs) in trees.into_values() {
            // Every hash is known of those leaves that are; of the others, of what stands over them.
            proved.warrants.extend(tree.warrant(&seqs));
        }
        Ok(proved)
    }

    /// Whether an entry is a tombstone that another one of its record stands on.
    fn is_implied(&self, entry: &Entry) -> Result<bool, EngineError> {
        if !matches!(entry.content, Content::Tombstone) {
            return Ok(false);
        }
        match read::record(self.engine.as_ref(), &entry.key) {
            Ok(record) => {
                let implied = |above: &Entry| above.implied().is_some_and(|below| below.version == entry.version);
                Ok(record.entries().any(implied))
            }
            Err(ReadError::Corrupt(_)) => Ok(false),
            Err(ReadError::Engine(error)) => Err(error),
        }
    }

    /// Asks all peers for records whose warrants are missing here.
    pub(super) fn heal_lacking(&mut self, lacking: &[Entry], actions: &mut Vec<Action>) {
        for entry in lacking.iter().take(HEALED_MAX) {
            let healing = self.heal(entry.key.clone());
            actions.extend(healing);
        }
    }

    /// Sends a peer the keys of these entries' origins that it was not sent on this link.
    pub(super) fn introduce(
        &mut self,
        name: &NodeName,
        origins: impl IntoIterator<Item = Origin>,
        actions: &mut Vec<Action>,
    ) -> Result<(), EngineError> {
        let Some(peer) = self.peers.get_mut(name) else { return Ok(()) };
        let mut vouchers = Vec::new();
        for origin in origins {
            if peer.introduced.contains(&origin) {
                continue;
            }
            peer.introduced.insert(origin.clone());
            let row = match self.engine.get(&layout::public_key(&origin)) {
                Err(error) if !error.is_corrupt() => return Err(error),
                row => row.ok().flatten(),
            };
            let voucher = row.and_then(|row| Voucher::decode(origin, &mut Fields::of(row)).ok());
            vouchers.extend(voucher.filter(|voucher| !voucher.proof.is_empty()));
        }
        for some in vouchers.chunks(VOUCHERS_MAX) {
            actions.push(peer.send(name, wire::encode(&Message::Vouch(some.to_vec()))));
        }
        Ok(())
    }

    /// Takes in keys that a peer vouches for or passes on, if they are proved. A key that is known stays.
    pub(super) fn vouched(&mut self, vouchers: Vec<Voucher>) -> Result<Vec<Action>, EngineError> {
        let mut batch = Batch::default();
        for voucher in vouchers {
            let known = self.keys.get(&voucher.origin);
            if known.is_some_and(|known| *known != voucher.key) {
                continue;
            }
            let row = match self.engine.get(&layout::public_key(&voucher.origin)) {
                Err(error) if !error.is_corrupt() => return Err(error),
                row => row.ok().flatten(),
            };
            let before = row.and_then(|row| Voucher::decode(voucher.origin.clone(), &mut Fields::of(row)).ok());
            // The newest one is what others will still believe when an authority has followed another.
            let newer = before.is_none_or(|before| before.at_ms < voucher.at_ms);
            let good = newer && voucher.is_good(self.keyring.trust.as_ref());
            if good && self.has_room_for_key(&voucher.origin, &mut batch) {
                put_key(&mut batch, &voucher);
                self.keys.insert(voucher.origin, voucher.key);
            }
        }
        Ok(if batch.is_empty() { Vec::new() } else { vec![Action::Commit(batch)] })
    }

    /// Whether the key of an origin may be kept. Where it is one too many of its node, that of the oldest incarnation goes,
    /// of which most was superseded; a member is believed what stands of it from then on.
    fn has_room_for_key(&mut self, origin: &Origin, batch: &mut Batch) -> bool {
        if self.keys.contains_key(origin) {
            return true;
        }
        let from = Origin { node: origin.node.clone(), incarnation: 0 };
        let of_node = self.keys.range(from..).map(|(known, _)| known).take_while(|known| known.node == origin.node);
        let known: Vec<&Origin> = of_node.collect();
        let excess = (known.len() + 1).saturating_sub(KEYS_OF_NODE_MAX);
        let oldest = known.into_iter().filter(|known| **known != self.origin).take(excess).cloned();
        let oldest: Vec<Origin> = oldest.collect();
        if oldest.len() < excess || oldest.last().is_some_and(|known| known > origin) {
            return false;
        }
        for known in oldest {
            batch.remove(layout::public_key(&known));
            self.keys.remove(&known);
        }
        true
    }

    /// Vouches for the keys of this node, also of its earlier incarnations, with its identity as it is now.
    pub(super) fn vouch(&mut self, now_ms: u64) -> (Batch, Vec<Voucher>) {
        self.vouched_as = self.keyring.trust.mark();
        let own = self.keys.iter().filter(|(origin, _)| origin.node == self.origin.node);
        let trust = self.keyring.trust.as_ref();
        let given: Vec<Voucher> = own.filter_map(|(origin, key)| Voucher::give(trust, origin, *key, now_ms)).collect();
        let mut batch = Batch::default();
        given.iter().for_each(|voucher| put_key(&mut batch, voucher));
        (batch, given)
    }

    /// Vouches anew if this node has another identity, and tells all peers: nobody may believe the old one's authority soon.
    pub(super) fn vouch_again(&mut self, now_ms: u64, actions: &mut Vec<Action>) {
        if self.keyring.trust.mark() == self.vouched_as {
            return;
        }
        let (batch, given) = self.vouch(now_ms);
        if given.is_empty() {
            return;
        }
        actions.push(Action::Commit(batch));
        self.tell_keys(&given, actions);
    }

    /// Tells all peers of keys of this node.
    pub(super) fn tell_keys(&mut self, given: &[Voucher], actions: &mut Vec<Action>) {
        for (name, peer) in &mut self.peers {
            for some in given.chunks(VOUCHERS_MAX) {
                actions.push(peer.send(name, wire::encode(&Message::Vouch(some.to_vec()))));
            }
        }
    }

    /// Whether an origin is over, so that nobody may be there to vouch for its key any more.
    fn is_past(&self, origin: &Origin) -> bool {
        let later =
            |row: &crate::frontier::Row| row.origin.node == origin.node && row.origin.incarnation > origin.incarnation;
        let own = origin.node == self.origin.node && origin.incarnation < self.origin.incarnation;
        !self.frontier.admits(&origin.node) || own || self.frontier.rows().any(later) || self.is_outnumbered(origin)
    }

    /// Whether an origin's key is not known, but that of a later incarnation is: its node vouched for that one, so this one is
    /// over, and its key may have been one too many.
    fn is_outnumbered(&self, origin: &Origin) -> bool {
        let mut from = self.keys.range(origin..).map(|(known, _)| known);
        from.next().is_some_and(|known| known != origin && known.node == origin.node)
    }

    /// What of these entries is proved by these warrants. None: something is not what its origin signed.
    pub(super) fn examine(&self, entries: &[Entry], warrants: &[Warrant]) -> Result<Option<Examined>, EngineError> {
        let mut examined = Examined::default();
        let mut leaves: BTreeMap<&Origin, BTreeMap<u64, Hash>> = BTreeMap::new();
        for entry in entries {
            let (of, hash) = (leaves.entry(&entry.version.dot.origin).or_default(), leaf(entry));
            // A proved entry is no proof of another one with its number.
            if of.insert(entry.version.dot.seq, hash).is_some_and(|other| other != hash) {
                return Ok(None);
            }
        }
        let mut proved: BTreeSet<(&Origin, u64)> = BTreeSet::new();
        for warrant in warrants {
            let run = &warrant.run;
            let Some(of) = leaves.get(&run.origin) else { continue };
            let some = of.range(run.first..=run.last()).map(|(seq, hash)| (*seq, *hash)).collect();
            let Some(mut tree) = Tree::of(warrant, &some) else { return Ok(None) };
            let known =
                self.tree(&Dot { origin: run.origin.clone(), seq: run.last() })?.filter(|known| known.is(&tree));
            match (&known, self.keys.get(&run.origin)) {
                // The signature was verified when it came first.
                (Some(known), _) => tree.learn(known),
                (None, Some(key)) if !tree.is_signed_by(*key) => return Ok(None),
                (None, Some(_)) => {}
                // Its key is unknown here, so this proves nothing.
                (None, None) => continue,
            }
            proved.extend(some.keys().map(|seq| (&run.origin, *seq)));
            if known.as_ref() != Some(&tree) {
                examined.batch.put(layout::warrant(&run.origin, run.last()), tree.encode());
            }
        }
        for entry in entries {
            let dot = &entry.version.dot;
            if proved.contains(&(&dot.origin, dot.seq)) {
                continue;
            }
            match (self.is_past(&dot.origin), self.keys.contains_key(&dot.origin)) {
                (false, _) => return Ok(None),
                (true, true) => _ = examined.unproved.insert(dot.clone()),
                (true, false) => examined.hearsay += 1,
            }
        }
        Ok(Some(examined))
    }

    /// Examines what a peer sent, and takes out what is not to be taken. None: the link has ended.
    pub(super) fn proved(
        &mut self,
        name: &NodeName,
        entries: &mut Vec<Entry>,
        warrants: &[Warrant],
        actions: &mut Vec<Action>,
    ) -> Result<Option<Batch>, EngineError> {
        if planted::is(Bug::Unsigned) {
            let examined = self.examine(entries, warrants)?.unwrap_or_default();
            return Ok(Some(examined.batch));
        }
        let Some(examined) = self.examine(entries, warrants)? else {
            self.counts.forged += entries.len() as u64;
            self.forgers.insert(name.clone(), self.ticks);
            actions.push(Action::Notify(Notice::Forged { peer: name.clone(), entries: entries.len() }));
            actions.extend(self.close(name, FORGED));
            return Ok(None);
        };
        self.counts.hearsay += examined.hearsay;
        self.stored += examined.batch.len();
        if !examined.unproved.is_empty() {
            let count = examined.unproved.len();
            self.counts.forged += count as u64;
            actions.push(Action::Notify(Notice::Forged { peer: name.clone(), entries: count }));
            entries.retain(|entry| !examined.unproved.contains(&entry.version.dot));
            if let Some(peer) = self.peers.get_mut(name) {
                peer.refused = true;
            }
        }
        Ok(Some(examined.batch))
    }

    /// Removes warrants that no write here needs any more, some in each tick.
    pub(super) fn sweep(&mut self) -> Result<Batch, EngineError> {
        let mut batch = Batch::default();
        let from = if self.swept.is_empty() { layout::WARRANTS.to_vec() } else { [&self.swept[..], &[0]].concat() };
        let count = (SWEEP_ROWS + 2 * std::mem::take(&mut self.stored)).min(SWEEP_ROWS_MAX);
        let rows = self.engine.scan(layout::WARRANTS, &from, count)?;
        for row in &rows {
            let (Some((origin, last)), Ok(value)) = (layout::warrant_of(&row.key), row.value.clone()) else { continue };
            let Ok(tree) = Tree::decode(origin.clone(), last, value) else { continue };
            let first = layout::index(&Dot { origin: origin.clone(), seq: tree.run.first });
            let next = self.engine.scan(&layout::indices(&origin), &first, 1)?.pop();
            let stands = next.and_then(|row| layout::index_seq(&row.key)).is_some_and(|seq| seq <= last);
            let covers = |(_, dot): &&(Stamp, Dot)| dot.origin == origin && tree.run.place(dot.seq).is_some();
            if !stands && self.future.keys().find(covers).is_none() {
                batch.remove(row.key.to_vec());
            }
        }
        self.swept = rows.last().filter(|_| rows.len() == count).map(|row| row.key.to_vec()).unwrap_or_default();
        Ok(batch)
    }
}

/// Signs writes by number: from the first to the last of them.
fn signed(signer: &Signer, origin: &Origin, leaves: &BTreeMap<u64, Hash>) -> Tree {
    let (first, last) = (leaves.keys().next().copied(), leaves.keys().next_back().copied());
    let (first, last) = (first.expect("some are signed"), last.expect("some are signed"));
    let count = usize::try_from(last - first).expect("a run is short") + 1;
    Tree::sign(signer, Run { origin: origin.clone(), first, count }, leaves)
}
