//! Warrants: an origin's signature over a run of its writes, so that whoever passes one on can prove whose it is.
//!
//! The writes of one flush are signed together, [`RUN_MAX`] at most: the root of a tree of their hashes. Whoever has some of
//! them passes on the hashes in place of the others, which may be superseded by then ([`Warrant`]); who takes them keeps
//! what it learned of the tree ([`Tree`]) and can pass on any part of what it has.
//!
//! A write is proved, not that it is the newest, nor that nothing is kept back.

use std::collections::BTreeMap;

use bytes::{BufMut, Bytes};
use ring::digest::{Context, SHA256, digest};

use crate::entry::{Entry, EntryError, Fields, Origin, put_origin};
use crate::trust::{PublicKey, SIGNATURE_BYTES, Signer};

/// Writes under one signature, at most.
pub const RUN_MAX: usize = 32;

/// Bytes of a hash in the tree. That none can be found for another entry takes half of SHA-256; the signer alone could look
/// for two entries of one hash, and may sign twice anyway.
pub(crate) const HASH_BYTES: usize = 16;

/// The hash of an entry, or of a part of a tree.
pub type Hash = [u8; HASH_BYTES];

/// What stands for a write that its origin itself no longer had.
const NOTHING: Hash = [0; HASH_BYTES];

/// No entry's bytes begin so: the length of a store's name comes first.
const NODE: &[u8] = &[0xff];

fn short(digest: &[u8]) -> Hash {
    let mut hash = NOTHING;
    hash.copy_from_slice(&digest[..HASH_BYTES]);
    hash
}

/// The hash of an entry: of all its fields.
pub(crate) fn leaf(entry: &Entry) -> Hash {
    short(digest(&SHA256, &entry.fields()).as_ref())
}

fn node(left: Hash, right: Hash) -> Hash {
    let mut context = Context::new(&SHA256);
    [NODE, &left, &right].iter().for_each(|part| context.update(part));
    short(context.finish().as_ref())
}

/// Which writes: `count` of an origin from `first` on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Run {
    /// Whose.
    pub origin: Origin,
    /// The first one's number.
    pub first: u64,
    /// How many, from 1 to [`RUN_MAX`].
    pub count: usize,
}

impl Run {
    /// If it can be one.
    pub(crate) fn checked(origin: Origin, first: u64, count: usize) -> Result<Self, EntryError> {
        let fits = first > 0 && (1..=RUN_MAX).contains(&count) && first.checked_add(RUN_MAX as u64).is_some();
        if fits { Ok(Self { origin, first, count }) } else { Err(EntryError::Field("run")) }
    }

    /// The last one's number.
    pub(crate) fn last(&self) -> u64 {
        self.first + self.count as u64 - 1
    }

    /// At which place in the run this write of its origin is.
    pub(crate) fn place(&self, seq: u64) -> Option<usize> {
        let place = usize::try_from(seq.checked_sub(self.first)?).ok()?;
        (place < self.count).then_some(place)
    }

    /// Leaves of its tree: a power of two.
    fn width(&self) -> usize {
        self.count.next_power_of_two()
    }

    fn signed(&self, root: Hash) -> Vec<u8> {
        let mut out = b"selvage-kv warrant 1\0".to_vec();
        put_origin(&mut out, &self.origin);
        out.put_u64(self.first);
        out.put_u64(self.count as u64);
        out.put_slice(&root);
        out
    }
}

/// A signature as it is sent beside some entries of its run: with what their hashes do not give of the tree.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Warrant {
    /// Over what.
    pub run: Run,
    /// By the origin's key.
    pub signature: [u8; SIGNATURE_BYTES],
    /// The hashes of the greatest parts that none of the entries is in, from left to right.
    pub hashes: Vec<Hash>,
}

/// What is known of a run's tree. Nodes are numbered from the root, 1; the children of `n` are `2n` and `2n + 1`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Tree {
    pub(crate) run: Run,
    pub(crate) signature: [u8; SIGNATURE_BYTES],
    pub(crate) root: Hash,
    known: BTreeMap<usize, Hash>,
}

impl Tree {
    /// Signs writes of one origin with consecutive numbers: those that stand with their hashes, by number.
    pub(crate) fn sign(signer: &Signer, run: Run, leaves: &BTreeMap<u64, Hash>) -> Self {
        let width = run.width();
        let leaf_at = |place| leaves.get(&(run.first + place as u64)).copied().unwrap_or(NOTHING);
        let known: BTreeMap<usize, Hash> = (0..run.count).map(|place| (width + place, leaf_at(place))).collect();
        let mut tree = Self { run, signature: [0; SIGNATURE_BYTES], root: NOTHING, known };
        tree.root = tree.hash(1).expect("every leaf is known");
        tree.signature = signer.sign(&tree.run.signed(tree.root));
        tree
    }

    /// The tree that a warrant and the hashes of its entries give, if they fit: by number.
    pub(crate) fn of(warrant: &Warrant, leaves: &BTreeMap<u64, Hash>) -> Option<Self> {
        let Warrant { run, signature, hashes } = warrant;
        let places = leaves.iter().map(|(seq, hash)| Some((run.place(*seq)?, *hash))).collect::<Option<_>>()?;
        let mut tree = Self { run: run.clone(), signature: *signature, root: NOTHING, known: BTreeMap::new() };
        let mut hashes = hashes.iter();
        tree.root = tree.climb(1, &places, &mut hashes)?;
        hashes.next().is_none().then_some(tree)
    }

    /// Whether the origin with this key signed it.
    pub(crate) fn is_signed_by(&self, key: PublicKey) -> bool {
        key.has_signed(&self.run.signed(self.root), &self.signature)
    }

    /// What these writes of the run are proved by, by number; none if too little is known of the others.
    pub(crate) fn warrant(&self, seqs: &[u64]) -> Option<Warrant> {
        let places = seqs.iter().map(|seq| self.run.place(*seq)).collect::<Option<Vec<_>>>()?;
        let mut hashes = Vec::new();
        self.descend(1, &places, &mut hashes)?;
        Some(Warrant { run: self.run.clone(), signature: self.signature, hashes })
    }

    /// Whether this is the hash of that write.
    pub(crate) fn has(&self, seq: u64, hash: Hash) -> bool {
        self.run.place(seq).and_then(|place| self.known.get(&(self.run.width() + place))) == Some(&hash)
    }

    /// Whether another one is of the same signature and root.
    pub(crate) fn is(&self, other: &Self) -> bool {
        self.run == other.run && self.signature == other.signature && self.root == other.root
    }

    /// Takes over what another one of the same signature and root knows.
    pub(crate) fn learn(&mut self, other: &Self) {
        self.known.extend(&other.known);
    }

    /// The places of the run that a node stands over.
    fn under(&self, node: usize) -> std::ops::Range<usize> {
        let span = self.run.width() >> node.ilog2();
        let first = (node << span.ilog2()) - self.run.width();
        first..first + span
    }

    fn is_outside(&self, node: usize) -> bool {
        self.under(node).start >= self.run.count
    }

    /// A node's hash as far as it is known. What is behind the end of the run is nothing.
    fn hash(&self, at: usize) -> Option<Hash> {
        if let Some(known) = self.known.get(&at) {
            return Some(*known);
        }
        if at < self.run.width() {
            return Some(node(self.hash(2 * at)?, self.hash(2 * at + 1)?));
        }
        self.is_outside(at).then_some(NOTHING)
    }

    fn descend(&self, at: usize, places: &[usize], out: &mut Vec<Hash>) -> Option<()> {
        if self.is_outside(at) {
            return Some(());
        }
        if !places.iter().any(|place| self.under(at).contains(place)) {
            out.push(self.hash(at)?);
            return Some(());
        }
        if at < self.run.width() {
            self.descend(2 * at, places, out)?;
            self.descend(2 * at + 1, places, out)?;
        }
        Some(())
    }

    fn climb(
        &mut self,
        at: usize,
        leaves: &BTreeMap<usize, Hash>,
        hashes: &mut std::slice::Iter<'_, Hash>,
    ) -> Option<Hash> {
        if self.is_outside(at) {
            return self.hash(at);
        }
        let under = self.under(at);
        if leaves.range(under.clone()).next().is_none() {
            let hash = *hashes.next()?;
            self.known.insert(at, hash);
            return Some(hash);
        }
        if at < self.run.width() {
            let (left, right) = (self.climb(2 * at, leaves, hashes)?, self.climb(2 * at + 1, leaves, hashes)?);
            return Some(node(left, right));
        }
        let hash = *leaves.get(&under.start)?;
        self.known.insert(at, hash);
        Some(hash)
    }

    /// Its bytes but for the origin and the last number, which its row names.
    pub(crate) fn encode(&self) -> Vec<u8> {
        let mut out = vec![u8::try_from(self.run.count).unwrap_or(0)];
        out.put_slice(&self.signature);
        out.put_slice(&self.root);
        // Of a run of one the root is all there is.
        for (at, hash) in self.known.iter().filter(|(at, _)| **at > 1) {
            out.put_u8(u8::try_from(*at).unwrap_or(0));
            out.put_slice(hash);
        }
        out
    }

    pub(crate) fn decode(origin: Origin, last: u64, bytes: Bytes) -> Result<Self, EntryError> {
        let mut fields = Fields::of(bytes);
        let count = usize::from(fields.u8()?);
        let first = last.checked_sub(count as u64).ok_or(EntryError::Field("run"))? + 1;
        let run = Run::checked(origin, first, count)?;
        let mut signature = [0; SIGNATURE_BYTES];
        signature.copy_from_slice(&fields.take(SIGNATURE_BYTES)?);
        let root = short(&fields.take(HASH_BYTES)?);
        let mut known = BTreeMap::new();
        if count == 1 {
            known.insert(1, root);
        }
        while !fields.is_empty() {
            let at = usize::from(fields.u8()?);
            known.insert(at, short(&fields.take(HASH_BYTES)?));
        }
        Ok(Self { run, signature, root, known })
    }
}

#[cfg(test)]
mod tests;
