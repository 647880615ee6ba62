use proptest::prelude::*;

use super::*;
use crate::entry::{Content, Dot, Key, Version};
use crate::stamp::Stamp;

fn origin() -> Origin {
    Origin { node: "a".parse().unwrap(), incarnation: 3 }
}

fn signer(number: u8) -> Signer {
    Signer::of(&[number; 32]).unwrap()
}

fn entry(seq: u64, value: u8) -> Entry {
    Entry {
        key: Key { store: "app/s".parse().unwrap(), name: format!("k{seq}") },
        version: Version { stamp: Stamp(seq << 16), dot: Dot { origin: origin(), seq } },
        prev: 0,
        expires_ms: None,
        content: Content::Value(Bytes::copy_from_slice(&[value])),
    }
}

fn leaves(seqs: impl IntoIterator<Item = u64>) -> BTreeMap<u64, Hash> {
    seqs.into_iter().map(|seq| (seq, leaf(&entry(seq, 1)))).collect()
}

fn run(count: usize) -> Run {
    Run { origin: origin(), first: 10, count }
}

/// The writes of a run whose bit is set, at least one.
fn some(count: usize, bits: u32) -> Vec<u64> {
    let chosen: Vec<u64> = (0..count as u64).filter(|place| bits >> place & 1 == 1).map(|place| 10 + place).collect();
    if chosen.is_empty() { vec![10] } else { chosen }
}

proptest! {
    #[test]
    fn any_part_of_a_run_is_proved_and_any_part_of_that(count in 1..=RUN_MAX, bits: u32, fewer: u32) {
        let whole = Tree::sign(&signer(1), run(count), &leaves(10..10 + count as u64));
        let part = some(count, bits);
        let warrant = whole.warrant(&part).unwrap();
        prop_assert!(warrant.hashes.len() < RUN_MAX);
        let tree = Tree::of(&warrant, &leaves(part.clone())).unwrap();
        prop_assert!(tree.is_signed_by(signer(1).public()) && !tree.is_signed_by(signer(2).public()));
        prop_assert_eq!(tree.root, whole.root);

        let stored = Tree::decode(origin(), tree.run.last(), tree.encode().into()).unwrap();
        prop_assert_eq!(&stored, &tree);
        let fewer: Vec<u64> = part.iter().copied().filter(|seq| fewer >> (seq - 10) & 1 == 1).collect();
        let again = stored.warrant(&fewer).unwrap();
        let known = Tree::of(&again, &leaves(fewer)).unwrap();
        prop_assert!(known.is(&whole) && known.is_signed_by(signer(1).public()));
    }

    #[test]
    fn what_two_peers_know_of_a_run_adds_up(count in 2..=RUN_MAX, bits: u32, others: u32) {
        let whole = Tree::sign(&signer(1), run(count), &leaves(10..10 + count as u64));
        let of = |seqs: &[u64]| Tree::of(&whole.warrant(seqs).unwrap(), &leaves(seqs.to_vec())).unwrap();
        let (one, other) = (some(count, bits), some(count, others));
        let mut both = of(&one);
        both.learn(&of(&other));
        let mut all = [one, other].concat();
        all.sort_unstable();
        all.dedup();
        let warrant = both.warrant(&all).unwrap();
        prop_assert!(Tree::of(&warrant, &leaves(all)).unwrap().is_signed_by(signer(1).public()));
    }

    #[test]
    fn an_altered_entry_or_warrant_is_proved_by_nothing(count in 1..=RUN_MAX, bits: u32, at: usize) {
        let whole = Tree::sign(&signer(1), run(count), &leaves(10..10 + count as u64));
        let part = some(count, bits);
        let warrant = whole.warrant(&part).unwrap();
        let holds = |warrant: &Warrant, leaves: &BTreeMap<u64, Hash>| {
            Tree::of(warrant, leaves).is_some_and(|tree| tree.is_signed_by(signer(1).public()))
        };
        let mut altered = leaves(part.clone());
        let seq = part[at % part.len()];
        altered.insert(seq, leaf(&entry(seq, 2)));
        prop_assert!(!holds(&warrant, &altered));
        // More entries than it is for, and fewer.
        let mut fewer = leaves(part.clone());
        fewer.remove(&seq);
        prop_assert!(!holds(&warrant, &fewer));
        let mut more = warrant.clone();
        more.hashes.push([0; HASH_BYTES]);
        prop_assert!(!holds(&more, &leaves(part.clone())));
        let mut other = warrant.clone();
        other.signature[at % SIGNATURE_BYTES] ^= 1;
        prop_assert!(!holds(&other, &leaves(part.clone())));
        let mut other = warrant.clone();
        other.run.first += 1;
        prop_assert!(!holds(&other, &leaves(part.clone())));
        let mut other = warrant;
        other.run.origin.incarnation += 1;
        prop_assert!(!holds(&other, &leaves(part)));
    }

    #[test]
    fn bytes_that_are_no_tree_are_refused_or_prove_nothing(bytes: Vec<u8>) {
        if let Ok(tree) = Tree::decode(origin(), 41, bytes.into()) {
            let _whatever = tree.warrant(&[41]);
            prop_assert!(!tree.is_signed_by(signer(1).public()));
        }
    }
}

#[test]
fn of_a_write_that_its_origin_had_no_more_the_others_are_proved() {
    let standing = leaves([10, 12]);
    let tree = Tree::sign(&signer(1), run(3), &standing);
    let warrant = tree.warrant(&[10, 12]).unwrap();
    assert!(Tree::of(&warrant, &standing).unwrap().is_signed_by(signer(1).public()));
    assert!(!tree.has(11, leaf(&entry(11, 1))) && tree.has(12, leaf(&entry(12, 1))));
}

#[test]
fn a_whole_run_takes_two_bytes_an_entry_and_one_of_many_144() {
    let whole = Tree::sign(&signer(1), run(RUN_MAX), &leaves(10..10 + RUN_MAX as u64));
    let all: Vec<u64> = (10..10 + RUN_MAX as u64).collect();
    assert!(whole.warrant(&all).unwrap().hashes.is_empty());
    assert_eq!(whole.warrant(&[17]).unwrap().hashes.len() * HASH_BYTES + SIGNATURE_BYTES, 144);
}

#[test]
fn a_run_is_short_and_begins_at_one() {
    for (first, count) in [(0, 1), (1, 0), (1, RUN_MAX + 1), (u64::MAX - 1, 2)] {
        assert!(Run::checked(origin(), first, count).is_err(), "{first} {count}");
    }
    assert!(Tree::decode(origin(), 2, Bytes::from(vec![3; 100])).is_err());
}
