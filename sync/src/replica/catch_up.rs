//! Catch-up: both sides of giving a peer what it lacks.
//!
//! The sender scans its index by origin, from where the peer is to the end, also beyond its own vector: an entry
//! there may be what superseded one below. At the end it says what the receiver now has. That claim holds since
//! of every write it covers, either the entry was sent, or the one that superseded it was, or the peer had it. So
//! gaps that overwritten entries left in the index do not hold the receiver's vector back, and no vector ever
//! covers a write whose effect has not arrived.

use selvage_config::NodeName;

use super::merge::Draft;
use super::peer::{CatchUp, Stream};
use super::warrants::{Proved, put_key};
use super::{Action, Notice, Replica};
use crate::engine::{Batch, Corrupt, EngineError};
use crate::entry::{Dot, Entry, Origin};
use crate::layout;
use crate::planted::{self, Bug};
use crate::read::{self, ReadError};
use crate::stamp::Stamp;
use crate::trust::{Signer, Voucher};
use crate::vector::VersionVector;
use crate::warrant::Warrant;
use crate::wire::{self, Message, Reason};

/// Rows of the index read at once.
const SCAN_ROWS: usize = 256;

/// What a row of the index led to.
enum Found {
    Entry(Box<Entry>),
    Superseded,
    Unreadable,
}

impl Replica {
    /// Sends the next batches of a running catch-up, as many as the window takes.
    pub(super) fn pump(&mut self, name: &NodeName, actions: &mut Vec<Action>) -> Result<(), EngineError> {
        loop {
            let Some(peer) = self.peers.get_mut(name) else { return Ok(()) };
            if peer.queued.bytes >= self.limits.window_bytes {
                return Ok(());
            }
            if let Stream::Snapshot(_) = &peer.stream {
                return self.pump_snapshot(name, actions);
            }
            let Stream::CatchUp(catch_up) = &mut peer.stream else { return Ok(()) };
            let mut catch_up = std::mem::take(catch_up);
            let (entries, ended) = self.next_batch(&mut catch_up)?;
            let Proved { entries, warrants, lacking } = self.attest(entries)?;
            for Dot { origin, seq } in lacking.iter().map(|entry| entry.version.dot.clone()) {
                let cap = catch_up.caps.entry(origin).or_insert(seq - 1);
                *cap = (*cap).min(seq - 1);
            }
            self.heal_lacking(&lacking, actions);
            let complete = ended.then(|| self.claim_of(&catch_up));
            self.introduce(name, entries.iter().map(|entry| entry.version.dot.origin.clone()), actions)?;
            let peer = self.peers.get_mut(name).expect("looked up above");
            peer.stream = if complete.is_some() { Stream::Live } else { Stream::CatchUp(catch_up) };
            let cut = self.frontier.cut();
            let frame = wire::encode(&Message::Batch { reason: Reason::CatchUp, cut, entries, warrants, complete });
            actions.push(peer.send(name, frame));
        }
    }

    /// The next entries, and whether these are the last.
    fn next_batch(&self, catch_up: &mut CatchUp) -> Result<(Vec<Entry>, bool), EngineError> {
        let mut entries = Vec::new();
        let mut bytes = 0;
        for origin in &self.origins {
            let mut after = catch_up.cursors.get(origin).copied().unwrap_or(0);
            loop {
                let from = layout::index(&Dot { origin: origin.clone(), seq: after.saturating_add(1) });
                let rows = self.engine.scan(&layout::indices(origin), &from, SCAN_ROWS)?;
                let ended = rows.len() < SCAN_ROWS;
                for row in rows {
                    let Some(seq) = layout::index_seq(&row.key) else { continue };
                    let found = match row.value.as_ref().map(|value| layout::index_row(value)) {
                        Ok(Some(record)) => self.find(record, &Dot { origin: origin.clone(), seq })?,
                        Ok(None) | Err(Corrupt) => Found::Unreadable,
                    };
                    match found {
                        Found::Entry(entry) => {
                            bytes += size(&entry);
                            entries.push(*entry);
                        }
                        Found::Superseded => {}
                        Found::Unreadable => {
                            catch_up.caps.entry(origin.clone()).or_insert(seq - 1);
                        }
                    }
                    after = seq;
                    if bytes >= self.limits.batch_bytes || entries.len() >= self.limits.batch_entries {
                        catch_up.cursors.insert(origin.clone(), after);
                        return Ok((entries, false));
                    }
                }
                catch_up.cursors.insert(origin.clone(), after);
                if ended {
                    break;
                }
            }
        }
        Ok((entries, true))
    }

    /// What a peer has at the end of a catch-up.
    fn claim_of(&self, catch_up: &CatchUp) -> VersionVector {
        let mut claim = self.vector.clone();
        for (origin, cap) in &catch_up.caps {
            claim.cap(origin, *cap);
        }
        claim
    }

    fn find(&self, row: &[u8], dot: &Dot) -> Result<Found, EngineError> {
        match read::record_at(self.engine.as_ref(), row) {
            Ok(record) => {
                Ok(record.entry(dot).cloned().map_or(Found::Superseded, |entry| Found::Entry(Box::new(entry))))
            }
            Err(ReadError::Corrupt(_)) => Ok(Found::Unreadable),
            Err(ReadError::Engine(error)) => Err(error),
        }
    }

    /// Takes a peer's message.
    pub(super) fn received(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        message: Message,
    ) -> Result<Vec<Action>, EngineError> {
        let peer = self.peers.get_mut(name).expect("the caller looked it up");
        let mut actions = Vec::new();
        match (message, peer.greeted()) {
            (Message::Hello { versions, node, vector, reach }, false) => {
                let Some(version) = versions.agree(wire::VERSIONS) else {
                    return Ok(self.close(name, "no common version"));
                };
                if node != *name {
                    return Ok(self.close(name, "its hello names another node than its certificate"));
                }
                peer.version = version;
                peer.vector = vector.clone();
                peer.recent = vector.clone();
                peer.settled = vector;
                peer.reach = reach;
                peer.stream = Stream::Held;
                self.check_rewound(now_ms, name, &mut actions);
                self.consider_bootstrap(name, &mut actions);
                self.release(name);
                self.pump(name, &mut actions)?;
            }
            (Message::Announce { changed, reach, ping, rows }, true) => {
                peer.reach = reach;
                peer.ping = Some((ping.sent_ms, now_ms));
                peer.reported(now_ms, &changed, &self.settled);
                self.offsets.heard(name, now_ms, ping);
                rows.into_iter().for_each(|row| self.learn(row));
                self.check_rewound(now_ms, name, &mut actions);
                self.consider_bootstrap(name, &mut actions);
                self.release(name);
                self.pump(name, &mut actions)?;
            }
            (Message::Batch { reason, cut, entries, warrants, complete }, true) => {
                return self.batch(now_ms, name, (reason, cut), (entries, warrants), complete);
            }
            (Message::Vouch(vouchers), true) => return self.vouched(vouchers),
            (Message::Ask { after }, true) => {
                self.asked(name, &after);
                self.pump(name, &mut actions)?;
            }
            (Message::Snapshot { reach, vector, mut entries, warrants, upto }, true) => {
                let Some(proved) = self.proved(name, &mut entries, &warrants, &mut actions)? else {
                    return Ok(actions);
                };
                actions.extend(self.snapshot(now_ms, name, (reach, &vector), (entries, proved), upto)?);
            }
            (Message::Prove { digests, spans, floor }, true) => {
                self.compare(name, &digests, &spans, floor, &mut actions)
            }
            (Message::Symbols(symbols), true) => self.decode(now_ms, name, &symbols, &mut actions)?,
            (Message::More(more), true) => self.more(name, &more, &mut actions)?,
            (Message::Want { items, keys }, true) => self.wanted(name, &items, &keys, &mut actions)?,
            (Message::Hello { .. }, true) | (_, false) => return Ok(self.close(name, "hello out of place")),
        }
        Ok(actions)
    }

    /// Takes in what is said of a node. A row of this node by others says nothing that it does not know better.
    fn learn(&mut self, row: crate::frontier::Row) {
        if row.origin.node != self.origin.node {
            self.frontier.learn(row);
        }
    }

    pub(super) fn close(&mut self, name: &NodeName, why: &'static str) -> Vec<Action> {
        let closed = self.gone(name);
        closed.map(|peer| Action::Close { peer: name.clone(), session: peer.session, why }).into_iter().collect()
    }

    fn batch(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        (reason, cut): (Reason, Stamp),
        (mut entries, warrants): (Vec<Entry>, Vec<Warrant>),
        complete: Option<VersionVector>,
    ) -> Result<Vec<Action>, EngineError> {
        let foreign = |entry: &Entry| entry.version.dot.origin.node != *name;
        let own = matches!(reason, Reason::Push | Reason::Relay);
        if own && entries.iter().any(foreign) && !planted::is(Bug::Forgery) {
            return Ok(self.close(name, "it pushed a write of another node as its own"));
        }
        let mut actions = Vec::new();
        // It came by the other relay already.
        if reason == Reason::Relayed && entries.iter().all(|entry| self.vector.covers(&entry.version.dot)) {
            return Ok(actions);
        }
        let said = entries.len();
        let hearsay = self.counts.hearsay;
        let Some(proved) = self.proved(name, &mut entries, &warrants, &mut actions)? else { return Ok(actions) };
        // What this node would not take, or not by a proof, it does not pass on.
        let certain = entries.len() == said && self.counts.hearsay == hearsay && cut >= self.frontier.floor();
        if certain && (reason == Reason::Relay || (reason == Reason::Relayed && planted::is(Bug::RelayLoop))) {
            self.pass_on(name, cut, (&entries, &warrants), &mut actions)?;
        }
        let written = self.vector.get(&self.origin);
        if entries.iter().map(|entry| &entry.version.dot).any(|dot| dot.origin == self.origin && dot.seq > written) {
            self.renew(now_ms, name, &mut actions);
        }
        let (mut draft, lifted, refused) =
            self.take(now_ms, name, cut, entries, own || reason == Reason::Relayed, Draft::of(proved))?;
        let mut lifted = lifted;
        let peer = self.peers.get_mut(name).expect("the caller looked it up");
        peer.refused |= refused;
        let ended = complete.is_some();
        if let Some(claim) = complete {
            // A claim after refused entries is not true for us. The next catch-up gets another chance.
            if !std::mem::take(&mut peer.refused) {
                lifted.extend(self.claim(&claim));
            }
        }
        draft.notices.sort_by_key(|notice| !matches!(notice, Notice::Corrupt { .. }));
        actions.extend(self.finish(draft, lifted));
        if reason == Reason::Repair {
            self.answered(name, &mut actions)?;
        }
        if ended {
            self.announce(now_ms, name, false, false, &mut actions);
        }
        Ok(actions)
    }

    /// Merges entries of a peer into a draft, but for those that are from the future, and none of a peer that has not
    /// seen all that was collected here. Says of which origins the vector advanced, and whether any entry was refused.
    pub(super) fn take(
        &mut self,
        now_ms: u64,
        name: &NodeName,
        cut: Stamp,
        entries: Vec<Entry>,
        pushed: bool,
        mut draft: Draft,
    ) -> Result<(Draft, Vec<Origin>, bool), EngineError> {
        // sync.md K3: what ended before the floor was collected here, so only who has seen every delete up to there can
        // say what lives. That it sends nothing until then is its part; a frame that was long under way is refused too.
        if cut < self.frontier.floor() && !entries.is_empty() {
            self.counts.stale += entries.len() as u64;
            draft.notices.push(Notice::Stale { peer: name.clone(), entries: entries.len() });
            return Ok((draft, Vec::new(), true));
        }
        let fleet_ms = self.offsets.correct(now_ms);
        let mut dots = Vec::new();
        let mut clock = self.clock.clone();
        let (mut future, mut refused) = (0, false);
        for mut entry in entries {
            let Entry { version, .. } = &entry;
            // A write that came by another way already.
            if pushed && self.vector.covers(&version.dot) {
                continue;
            }
            if clock.observe(fleet_ms, version.stamp).is_err() {
                future += 1;
                let at = (version.stamp, version.dot.clone());
                if self.future.len() < self.limits.future_entries || self.future.contains_key(&at) {
                    self.future.insert(at, entry);
                } else {
                    refused = true;
                }
                continue;
            }
            if let (true, Some(expires)) = (planted::is(Bug::LifeFromArrival), entry.expires_ms) {
                entry.expires_ms = Some(now_ms + expires.saturating_sub(entry.version.stamp.ms()));
            }
            dots.push(entry.version.dot.clone());
            self.merge(&mut draft, entry)?;
        }
        // Nothing fails from here on, so an error above has left the vector as it was.
        self.clock = clock;
        let lifted = self.advance(dots);
        self.counts.future += future as u64;
        if future > 0 {
            draft.notices.push(Notice::Future { peer: name.clone(), entries: future });
        }
        Ok((draft, lifted.into_iter().collect(), refused))
    }

    /// Takes a claim, but for our own origin: of that only we know what there is. Entries from the future that wait
    /// are not here yet.
    pub(super) fn claim(&mut self, claim: &VersionVector) -> Vec<Origin> {
        let mut claim = claim.clone();
        for (_, dot) in self.future.keys() {
            claim.cap(&dot.origin, dot.seq - 1);
        }
        let mut lifted = Vec::new();
        for (origin, seq) in claim.iter().filter(|(origin, _)| **origin != self.origin) {
            if self.vector.lift(origin, seq) {
                lifted.push(origin.clone());
            }
        }
        lifted.iter().for_each(|origin| self.close_gap(origin));
        lifted
    }

    fn check_rewound(&mut self, now_ms: u64, name: &NodeName, actions: &mut Vec<Action>) {
        let Some(peer) = self.peers.get(name) else { return };
        let rewound = peer.vector.get(&self.origin) > self.vector.get(&self.origin);
        if rewound && !planted::is(Bug::Incarnation) {
            self.renew(now_ms, name, actions);
        }
    }

    /// A peer has more of our writes than we have made (this directory is an old copy, and new writes would take numbers
    /// that others have seen), or some of ours were given up. So we become a new incarnation, and take the old one's writes from the
    /// peers from the start. What was written here since the copy was put back stays on this node until it is
    /// written again.
    pub(super) fn renew(&mut self, now_ms: u64, name: &NodeName, actions: &mut Vec<Action>) {
        let old = self.origin.clone();
        actions.extend(self.sign());
        self.vector.cap(&old, 0);
        self.outbox.clear();
        self.fresh.clear();
        self.signed = 0;
        self.recent.cap(&old, 0);
        self.settled.cap(&old, 0);
        self.peers.values_mut().for_each(|peer| peer.refused = true);
        self.origin.incarnation = Stamp::at_ms(now_ms).0.max(old.incarnation.saturating_add(1));
        let incarnation = self.origin.incarnation;
        let mut batch = Batch::default();
        let seed = self.keyring.seed(&self.origin);
        self.signer = Signer::of(&seed).expect("a seed is of any 32 bytes");
        let key = self.signer.public();
        self.keys.insert(self.origin.clone(), key);
        let given = Voucher::give(self.keyring.trust.as_ref(), &self.origin, key, now_ms);
        put_key(&mut batch, given.as_ref().unwrap_or(&Voucher::bare(&self.origin, key)));
        batch.put(layout::SIGNER.to_vec(), seed.to_vec());
        batch.put(layout::INCARNATION.to_vec(), incarnation.to_be_bytes().to_vec());
        batch.put(layout::vector(&old), 0_u64.to_be_bytes().to_vec());
        batch.put(layout::vector(&self.origin), 0_u64.to_be_bytes().to_vec());
        actions.push(Action::Commit(batch));
        actions.push(Action::Notify(Notice::Rewound { peer: name.clone(), incarnation }));
        // Nobody shall know the new incarnation before it is on disk.
        actions.push(Action::Flush);
        self.tell_keys(given.as_slice(), actions);
        let names: Vec<NodeName> = self.peers.keys().cloned().collect();
        for name in names {
            self.announce(now_ms, &name, true, false, actions);
        }
    }
}

pub(super) fn size(entry: &Entry) -> usize {
    // Names, numbers and the checksum of an entry, about; only the order of magnitude matters.
    entry.content.value_bytes() + entry.key.name.len() + 256
}
