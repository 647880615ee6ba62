//! What is taken of others' writes, and what is proved of them to others.

use super::*;
use crate::engine::Row;
use crate::replica::warrants::KEYS_OF_NODE_MAX;
use crate::warrant::{Run, Tree, leaf};

/// The key of a node's first incarnation.
fn signer(node: &NodeName) -> Signer {
    let mut seed = [7; 32];
    seed.iter_mut().zip(node.as_str().bytes()).for_each(|(at, byte)| *at = byte);
    Signer::of(&seed).unwrap()
}

/// Signs each entry by itself.
pub(super) fn warrants(entries: &[Entry]) -> Vec<Warrant> {
    let warrant = |entry: &Entry| {
        let Dot { origin, seq } = entry.version.dot.clone();
        let run = Run { origin: origin.clone(), first: seq, count: 1 };
        Tree::sign(&signer(&origin.node), run, &[(seq, leaf(entry))].into()).warrant(&[seq]).unwrap()
    };
    entries.iter().map(warrant).collect()
}

/// What makes the keys of these nodes' first incarnations known.
pub(super) fn introduction(nodes: &[&str]) -> Message {
    let voucher = |node: &&str| {
        let origin = Origin { node: name(node), incarnation: 1 };
        Voucher::give(&Named(origin.node.clone()), &origin, signer(&origin.node).public(), 1).unwrap()
    };
    Message::Vouch(nodes.iter().map(voucher).collect())
}

fn forged(node: &Node) -> u64 {
    node.replica.counts().forged
}

fn closes(actions: &[Action]) -> bool {
    actions.iter().any(|action| matches!(action, Action::Close { .. }))
}

/// An entry of a node with another value than it signed.
fn altered(message: Message) -> Message {
    let Message::Batch { reason, cut, mut entries, warrants, complete } = message else { unreachable!() };
    entries[0].content = Content::Value(Bytes::from_static(b"forged"));
    Message::Batch { reason, cut, entries, warrants, complete }
}

fn without_warrants(message: Message) -> Message {
    let Message::Batch { reason, cut, entries, complete, .. } = message else { unreachable!() };
    Message::Batch { reason, cut, entries, warrants: Vec::new(), complete }
}

fn members(node: &mut Node, names: &[&str]) {
    node.handle(roster(&names.iter().map(|node| (*node, "r")).collect::<Vec<_>>()));
}

fn warrant_rows(node: &Node) -> Vec<Row> {
    node.engine.scan(layout::WARRANTS, layout::WARRANTS, usize::MAX).unwrap()
}

#[test]
fn what_a_third_node_signed_is_taken_and_passed_on_with_its_proof() {
    let mut node = Node::new("n");
    node.greet("b", VersionVector::default());
    let entries = (1..=3).map(|seq| entry("c", seq, Stamp::at_ms(NOW_MS), &format!("k{seq}"))).collect();
    assert!(!closes(&node.hear("b", batch(entries))));
    assert_eq!(node.value("k2"), Some(Bytes::from_static(b"v")));

    let messages = node.greet("d", VersionVector::default());
    let Some(Message::Vouch(vouchers)) = messages.first() else { panic!("{messages:?}") };
    assert_eq!(vouchers[0].origin.node, name("c"));
    let mut other = Node::new("d");
    other.greet("n", VersionVector::default());
    for message in messages {
        assert!(!closes(&other.hear("n", message)));
    }
    assert_eq!(other.value("k3"), Some(Bytes::from_static(b"v")));
}

#[test]
fn an_altered_or_unsigned_write_of_a_member_ends_the_link_and_changes_nothing() {
    let message = || batch(vec![entry("c", 1, Stamp::at_ms(NOW_MS), "k"), entry("c", 2, Stamp::at_ms(NOW_MS), "j")]);
    let doubled = {
        // The proof of one entry is none of another one with its number.
        let Message::Batch { reason, cut, mut entries, warrants, complete } = message() else { unreachable!() };
        let mut other = entries[0].clone();
        other.content = Content::Tombstone;
        entries.insert(0, other);
        Message::Batch { reason, cut, entries, warrants, complete }
    };
    for bad in [altered(message()), without_warrants(message()), doubled] {
        let mut node = Node::new("n");
        node.greet("b", VersionVector::default());
        let actions = node.hear("b", bad);
        assert!(closes(&actions), "{actions:?}");
        let told = actions.iter().any(|action| matches!(action, Action::Notify(Notice::Forged { .. })));
        assert!(told && forged(&node) > 0);
        assert_eq!((node.value("k"), node.value("j")), (None, None));
        assert!(!node.replica.vector().covers(&entry("c", 1, Stamp::default(), "k").version.dot));
        assert!(warrant_rows(&node).is_empty());
    }
}

#[test]
fn a_key_that_its_node_did_not_vouch_for_is_nobodys() {
    let mut node = Node::new("n");
    node.handle(Event::Connected { peer: name("b"), session: 1 });
    let hello = Message::Hello {
        versions: wire::VERSIONS,
        node: name("b"),
        vector: VersionVector::default(),
        reach: Reach::default(),
    };
    node.hear("b", hello);
    let Message::Vouch(mut vouchers) = introduction(&["c"]) else { unreachable!() };
    let proof = vouchers[0].proof.clone();
    vouchers[0].proof = Bytes::from_static(b"b says so");
    node.hear("b", Message::Vouch(vouchers.clone()));
    assert!(!node.replica.keys.contains_key(&vouchers[0].origin));
    // Nor does a true one take the place of another that is known.
    vouchers[0].proof = proof;
    node.hear("b", Message::Vouch(vouchers.clone()));
    let other = Voucher::give(&Named(name("c")), &vouchers[0].origin, signer(&name("x")).public(), 9).unwrap();
    node.hear("b", Message::Vouch(vec![other]));
    assert_eq!(node.replica.keys[&vouchers[0].origin], vouchers[0].key);
}

#[test]
fn of_an_origin_that_is_over_and_that_nobody_can_vouch_for_a_member_is_believed() {
    let mut node = Node::new("n");
    members(&mut node, &["n", "b"]);
    node.greet("b", VersionVector::default());
    let unknown = |at: &str| batch(vec![entry("x", 1, Stamp::at_ms(NOW_MS), at)]);
    assert!(!closes(&node.hear("b", without_warrants(unknown("k")))));
    assert_eq!(node.value("k"), Some(Bytes::from_static(b"v")));
    assert_eq!((node.replica.counts().hearsay, forged(&node)), (1, 0));
    // What is signed by a key that is not known proves nothing and harms nothing.
    assert!(!closes(&node.hear("b", unknown("j"))));
    assert!(warrant_rows(&node).is_empty());

    // Once its key is known, an unsigned one is refused; its sender may have it from before.
    let known = without_warrants(batch(vec![entry("c", 1, Stamp::at_ms(NOW_MS), "l")]));
    assert!(!closes(&node.hear("b", known)));
    assert_eq!((node.value("l"), forged(&node)), (None, 1));
    // A member has to sign.
    members(&mut node, &["n", "b", "x"]);
    assert!(closes(&node.hear("b", without_warrants(unknown("m")))));
}

#[test]
fn what_a_crash_left_unsigned_is_signed_at_the_next_start() {
    let mut node = Node::new("a");
    for number in 0..40 {
        let write = Event::Write { ticket: 1, key: key(&format!("k{}", number % 30)), write: set("1") };
        for action in node.replica.handle(NOW_MS, write).unwrap() {
            if let Action::Commit(batch) = action {
                node.engine.apply(batch).unwrap();
            }
        }
    }
    assert!(warrant_rows(&node).is_empty());
    let mut again = Node::on("a", node.engine);
    assert_eq!(again.replica.origin(), node.replica.origin());
    assert!(!warrant_rows(&again).is_empty());
    let messages = again.greet("b", VersionVector::default());
    let mut peer = Node::new("b");
    peer.greet("a", VersionVector::default());
    peer.hear("a", Message::Vouch(vec![again.voucher()]));
    for message in messages {
        assert!(!closes(&peer.hear("a", message)));
    }
    assert_eq!(peer.replica.vector().get(again.replica.origin()), 40);
    assert!((0..30).all(|number| peer.value(&format!("k{number}")).is_some()));
}

#[test]
fn what_is_signed_at_a_start_spans_nothing_that_was_signed_before() {
    let mut node = Node::new("a");
    node.write("gone", Write::Delete);
    node.write("gone", Write::Beside { value: Bytes::from_static(b"1"), expires_ms: None });
    for number in 3..=7 {
        node.write(&format!("k{number}"), set("1"));
    }
    let origin = node.replica.origin().clone();
    let without = |seqs: &[u64]| {
        let mut batch = Batch::default();
        seqs.iter().for_each(|seq| batch.remove(layout::warrant(&origin, *seq)));
        node.engine.apply(batch).unwrap();
    };
    // The first is a tombstone under what stands on it: nobody sends it, and it may have come back without a proof.
    without(&[1, 3, 6, 7]);
    let mut again = Node::on("a", node.engine);
    let runs: Vec<Run> = warrant_rows(&again)
        .into_iter()
        .map(|row| {
            let (origin, last) = layout::warrant_of(&row.key).unwrap();
            Tree::decode(origin, last, row.value.unwrap()).unwrap().run
        })
        .collect();
    assert_eq!(
        runs.iter().map(|run| (run.first, run.count)).collect::<Vec<_>>(),
        [(2, 1), (3, 1), (4, 1), (5, 1), (6, 2)]
    );
    let messages = again.greet("b", VersionVector::default());
    let mut peer = Node::new("b");
    peer.greet("a", VersionVector::default());
    peer.hear("a", Message::Vouch(vec![again.voucher()]));
    for message in messages {
        assert!(!closes(&peer.hear("a", message)));
    }
    assert_eq!((peer.replica.vector().get(&origin), forged(&peer)), (7, 0));
}

#[test]
fn warrants_that_prove_nothing_any_more_are_removed_and_others_stay() {
    let mut node = Node::new("a");
    (0..20).for_each(|_| _ = node.write("k", set("1")));
    node.write("j", set("1"));
    assert_eq!(warrant_rows(&node).len(), 21);
    for _ in 0..3 {
        node.handle(Event::Tick);
    }
    assert_eq!(warrant_rows(&node).len(), 2);
    assert_eq!(names(&node.greet("b", VersionVector::default())), ["k", "j"]);
}

#[test]
fn a_key_that_is_written_all_the_time_leaves_no_heap_of_warrants() {
    let mut node = Node::new("a");
    (0..500).for_each(|number| _ = node.write(&format!("k{number}"), set("1")));
    for _ in 0..100 {
        (0..400).for_each(|_| _ = node.write("hot", set("1")));
        node.handle(Event::Tick);
    }
    // As many again as still prove something, and what came since the last look.
    assert!(warrant_rows(&node).len() < 2 * 500 + 2 * 400, "{}", warrant_rows(&node).len());
}

#[test]
fn a_peer_that_passed_on_a_forged_write_is_asked_for_no_snapshot_for_a_while() {
    let mut node = Node::new("n");
    node.greet("b", VersionVector::default());
    node.hear("b", altered(batch(vec![entry("c", 1, Stamp::at_ms(NOW_MS), "k")])));
    let much = VersionVector::from_iter([(entry("c", 1, Stamp::default(), "k").version.dot.origin, 1 << 40)]);
    let asks = |messages: Vec<Message>| messages.iter().any(|message| matches!(message, Message::Ask { .. }));
    assert!(!asks(node.greet("b", much.clone())));
    assert!(asks(node.greet("d", much)));
}

/// A node's word on keys of incarnations of it.
fn vouch_for(node: &mut Node, of: &str, incarnations: impl Iterator<Item = u64>) {
    let voucher = |incarnation| {
        let origin = Origin { node: name(of), incarnation };
        Voucher::give(&Named(name(of)), &origin, signer(&name(of)).public(), 1).unwrap()
    };
    node.hear("b", Message::Vouch(incarnations.map(voucher).collect()));
}

fn known_of(node: &Node, of: &str) -> Vec<u64> {
    let known: Vec<u64> =
        node.replica.keys.keys().filter(|origin| origin.node == name(of)).map(|origin| origin.incarnation).collect();
    let rows = node.engine.scan(layout::KEYS, layout::KEYS, usize::MAX).unwrap();
    let stored: Vec<Origin> = rows.iter().filter_map(|row| layout::key_origin(&row.key)).collect();
    let stored: Vec<u64> =
        stored.into_iter().filter(|origin| origin.node == name(of)).map(|origin| origin.incarnation).collect();
    assert_eq!(known, stored);
    known
}

#[test]
fn of_a_node_that_vouches_for_ever_more_incarnations_only_the_newest_keys_are_kept() {
    let mut node = Node::new("n");
    node.greet("b", VersionVector::default());
    let max = KEYS_OF_NODE_MAX as u64;
    vouch_for(&mut node, "c", 10..max + 10);
    // The one that was vouched for when b was greeted was one too many.
    assert_eq!(known_of(&node, "c"), (10..max + 10).collect::<Vec<_>>());
    vouch_for(&mut node, "c", [3, 9, max + 20].into_iter());
    assert_eq!(known_of(&node, "c").first(), Some(&11), "older ones take no room of newer ones");
    assert_eq!(known_of(&node, "c").last(), Some(&(max + 20)));
    assert_eq!((known_of(&node, "a"), known_of(&node, "b")), (vec![1], vec![1]));

    // What stands of the oldest is passed on by who still knows its key: nobody forged it.
    let passed_on = batch(vec![entry("c", 1, Stamp::at_ms(NOW_MS), "k")]);
    assert!(!closes(&node.hear("b", passed_on)));
    assert_eq!((node.value("k").is_some(), node.replica.counts().hearsay, forged(&node)), (true, 1, 0));
}

#[test]
fn a_node_keeps_its_own_key_whatever_is_vouched_for_in_its_name() {
    let mut node = Node::new("n");
    node.greet("b", VersionVector::default());
    let own = node.replica.origin().clone();
    let later = own.incarnation + 1;
    vouch_for(&mut node, "n", later..later + 2 * KEYS_OF_NODE_MAX as u64);
    let known = known_of(&node, "n");
    assert_eq!((known.len(), known[0]), (KEYS_OF_NODE_MAX, own.incarnation));
    assert_eq!(node.replica.keys[&own], node.replica.signer.public());
}
