//! Who is pushed to, and who passes on.

use super::*;

#[test]
fn a_write_is_pushed_at_once_to_a_peer_that_has_all_before() {
    let mut node = Node::new("a");
    node.write("k1", set("1"));
    let messages = node.greet("b", VersionVector::default());
    assert_eq!(names(&messages), ["k1"]);
    assert_eq!(claims(&messages), [node.replica.vector().clone()]);
    assert_eq!(names(&sent(&node.write("k2", set("2")))), ["k2"]);
}

#[test]
fn a_peer_that_did_not_say_hello_is_pushed_nothing() {
    let mut node = Node::new("a");
    node.handle(Event::Connected { peer: name("b"), session: 1 });
    assert_eq!(sent(&node.write("k", set("1"))), []);
}

#[test]
fn a_full_queue_is_fed_no_more_and_the_peer_catches_up_when_it_drained() {
    let mut node = Node::new("a").small();
    node.greet("b", VersionVector::default());
    node.drained("b");
    let mut pushed = 0;
    for number in 0..20 {
        pushed += sent(&node.write(&format!("k{number:02}"), set("v"))).len();
        assert!(node.replica.health()[0].queued_bytes <= small().queue_bytes);
    }
    assert!((1..20).contains(&pushed));
    let mut caught_up = Vec::new();
    for _ in 0..100 {
        caught_up.extend(node.drained("b"));
    }
    assert_eq!(names(&caught_up).len(), 20);
    assert_eq!(claims(&caught_up)[0].get(node.replica.origin()), 20);
    assert_eq!(names(&sent(&node.write("last", set("v")))), ["last"]);
}

#[test]
fn a_push_of_another_nodes_write_ends_the_link_and_changes_nothing() {
    let mut node = Node::new("a");
    node.greet("b", VersionVector::default());
    let entries = vec![entry("c", 1, Stamp::at_ms(NOW_MS), "k")];
    let warrants = warrants(&entries);
    let forged = Message::Batch { reason: Reason::Push, cut: Stamp::default(), entries, warrants, complete: None };
    assert!(matches!(node.hear("b", forged)[..], [Action::Close { .. }]));
    assert_eq!(node.value("k"), None);
}

/// Where a fleet is whose second region is large.
const FLEET: [(&str, &str); 10] = [
    ("a", "r1"),
    ("b", "r1"),
    ("c", "r2"),
    ("d", "r2"),
    ("e", "r2"),
    ("f", "r2"),
    ("n", "r2"),
    ("p", "r3"),
    ("q", "r3"),
    ("s", "r4"),
];

/// A node of that fleet that has links to all others.
fn meshed(node: &str) -> Node {
    let mut known = Node::new(node);
    known.handle(roster(&FLEET));
    for (peer, _) in FLEET.iter().filter(|(peer, _)| *peer != node) {
        known.greet(peer, VersionVector::default());
    }
    known
}

/// Entries that were said as new, by whom they were said to and why.
fn pushed(actions: &[Action]) -> Vec<(String, Reason)> {
    let said = |action: &Action| {
        let Action::Send { peer, frame, .. } = action else { return None };
        match wire::decode(frame.slice(LENGTH_BYTES..)).unwrap() {
            Some(Message::Batch { reason, .. }) => Some((peer.to_string(), reason)),
            _ => None,
        }
    };
    actions.iter().filter_map(said).collect()
}

fn relays(actions: &[Action]) -> Vec<String> {
    pushed(actions).into_iter().filter(|(_, reason)| *reason == Reason::Relay).map(|(peer, _)| peer).collect()
}

fn pushed_as(reason: Reason, entries: Vec<Entry>) -> Message {
    let warrants = warrants(&entries);
    Message::Batch { reason, cut: Stamp::default(), entries, warrants, complete: None }
}

fn of_a(seq: u64) -> Vec<Entry> {
    vec![entry("a", seq, Stamp::at_ms(NOW_MS), &format!("k{seq}"))]
}

#[test]
fn a_region_is_pushed_to_through_two_of_its_peers_and_who_is_alone_there_directly() {
    let mut node = meshed("a");
    let actions = node.write("k", set("1"));
    let direct: Vec<String> =
        pushed(&actions).into_iter().filter(|(_, reason)| *reason == Reason::Push).map(|(peer, _)| peer).collect();
    assert_eq!(direct, ["b", "s"]);
    let relays = relays(&actions);
    assert_eq!(relays.len(), 4);
    // Who is one of two in a region gets it directly, and is a second way to the other.
    assert_eq!(relays[2..], ["p", "q"]);
    assert!(relays[..2].iter().all(|relay| ["c", "d", "e", "f", "n"].contains(&relay.as_str())), "{relays:?}");
    assert_eq!(self::relays(&node.write("k", set("2"))), relays, "the same ones as long as they are there");
}

#[test]
fn another_relay_takes_the_place_of_one_whose_link_ended_or_that_is_behind() {
    let mut node = meshed("a");
    let near = |actions: &[Action]| {
        let relays = relays(actions).into_iter();
        relays.filter(|relay| !["p", "q"].contains(&relay.as_str())).collect::<Vec<_>>()
    };
    let before = near(&node.write("k", set("1")));
    node.handle(Event::Disconnected { peer: name(&before[0]), session: 1 });
    let after = near(&node.write("k", set("2")));
    assert_eq!(after.len(), 2);
    assert!(after.contains(&before[1]) && !after.contains(&before[0]), "{before:?} {after:?}");

    // Nothing leaves the queues any more but those of one peer.
    let limits = Limits { queue_frames: 10, ..Limits::default() };
    let mut node = meshed("a");
    node.replica = node.replica.with_limits(limits);
    let spare = |(peer, region): &&(&str, &str)| *region == "r2" && before.iter().all(|relay| relay != peer);
    let idle = FLEET.iter().rfind(spare).unwrap().0.to_string();
    let mut relayed = Vec::new();
    for number in 0..60 {
        relayed = near(&node.write(&format!("k{number}"), set("1")));
        node.drained(&idle);
    }
    assert_eq!(relayed, [idle], "the others have no room");
}

#[test]
fn nodes_choose_different_relays() {
    let peers = ["c", "d", "e", "f", "n"].map(name);
    let chosen = |origin: usize| {
        let own: NodeName = format!("origin-{origin}").parse().unwrap();
        peers.iter().max_by_key(|peer| crate::replica::push::rank(&own, peer)).unwrap().clone()
    };
    let mut counts: BTreeMap<NodeName, usize> = BTreeMap::new();
    (0..1_000).for_each(|origin| *counts.entry(chosen(origin)).or_default() += 1);
    assert!(peers.iter().all(|peer| (140..260).contains(&counts[peer])), "{counts:?}");
}

#[test]
fn in_a_small_fleet_and_in_one_region_everybody_pushes_to_everybody() {
    let small: Vec<_> = FLEET.into_iter().take(8).collect();
    let single: Vec<_> = FLEET.into_iter().map(|(node, _)| (node, "r1")).collect();
    for members in [small, single] {
        let mut node = meshed("a");
        let others = members.len() - 1;
        node.handle(roster(&members));
        let pushed = pushed(&node.write("k", set("1")));
        assert_eq!(pushed.len(), others);
        assert!(pushed.iter().all(|(_, reason)| *reason == Reason::Push), "{pushed:?}");
    }
}

#[test]
fn a_peer_that_knows_no_relays_is_pushed_to_and_asked_for_nothing() {
    let mut node = Node::new("a");
    node.handle(roster(&FLEET));
    for (peer, _) in &FLEET[1..] {
        node.handle(Event::Connected { peer: name(peer), session: 1 });
        let versions = Versions { min: 3, max: 3 };
        let hello =
            Message::Hello { versions, node: name(peer), vector: VersionVector::default(), reach: Reach::default() };
        node.hear(peer, hello);
    }
    let pushed = pushed(&node.write("k", set("1")));
    assert_eq!(pushed.len(), FLEET.len() - 1);
    assert!(pushed.iter().all(|(_, reason)| *reason == Reason::Push), "{pushed:?}");
}

#[test]
fn a_relay_passes_on_to_its_region_with_the_proof_and_the_origins_cut_and_once() {
    let mut node = meshed("n");
    let cut = Stamp::at_ms(7);
    let Message::Batch { reason, entries, warrants, .. } = pushed_as(Reason::Relay, of_a(1)) else { unreachable!() };
    let message = Message::Batch { reason, cut, entries, warrants, complete: None };
    let actions = node.hear("a", message.clone());
    assert_eq!(node.value("k1"), Some(Bytes::from_static(b"v")));
    let told = pushed(&actions);
    assert_eq!(told, ["c", "d", "e", "f"].map(|peer| (peer.to_owned(), Reason::Relayed)));

    // One of them has never heard of the origin.
    let mut other = Node::new("c");
    other.handle(roster(&FLEET));
    other.handle(Event::Connected { peer: name("n"), session: 1 });
    let (vector, reach) = (VersionVector::default(), Reach::default());
    other.hear("n", Message::Hello { versions: wire::VERSIONS, node: name("n"), vector, reach });
    for message in sent(&actions).into_iter().take(2) {
        let messages = other.hear("n", message);
        assert!(pushed(&messages).is_empty(), "what was passed on is not passed on again");
    }
    assert_eq!(other.value("k1"), Some(Bytes::from_static(b"v")));
    let Some(Message::Batch { cut: said, .. }) = sent(&actions).into_iter().nth(1) else { panic!("{actions:?}") };
    assert_eq!(said, cut);

    assert!(pushed(&node.hear("a", message)).is_empty(), "a frame that comes again goes nowhere");
    assert_eq!(pushed(&node.hear("a", pushed_as(Reason::Relay, of_a(2)))).len(), 4);
    assert!(pushed(&node.hear("a", pushed_as(Reason::Push, of_a(3)))).is_empty(), "nobody asked");
}

#[test]
fn what_is_not_proved_is_passed_on_to_nobody() {
    let unsigned = |reason| {
        let Message::Batch { cut, entries, complete, .. } = pushed_as(reason, of_a(1)) else { unreachable!() };
        Message::Batch { reason, cut, entries, warrants: Vec::new(), complete }
    };
    let foreign = pushed_as(Reason::Relay, vec![entry("b", 1, Stamp::at_ms(NOW_MS), "k1")]);
    for (bad, ends) in [(unsigned(Reason::Relay), true), (unsigned(Reason::Relayed), true), (foreign, true)] {
        let mut node = meshed("n");
        let actions = node.hear("a", bad);
        assert!(pushed(&actions).is_empty(), "{actions:?}");
        assert_eq!(actions.iter().any(|action| matches!(action, Action::Close { .. })), ends);
        assert_eq!(node.value("k1"), None);
    }
}

#[test]
fn what_comes_by_both_relays_is_taken_once_and_what_comes_first_need_not_be_the_origins() {
    let mut node = meshed("n");
    for relay in ["c", "d"] {
        node.hear(relay, pushed_as(Reason::Relayed, of_a(1)));
    }
    let origin = of_a(1).remove(0).version.dot.origin;
    assert_eq!(node.replica.vector().get(&origin), 1);
    assert_eq!(node.replica.counts(), Counts::default());
    // It is a relay of the origin itself, and the other one was faster: others may still lack it.
    assert_eq!(pushed(&node.hear("a", pushed_as(Reason::Relay, of_a(1)))).len(), 4);
    // A gap is none that the vector passes over.
    node.hear("c", pushed_as(Reason::Relayed, of_a(3)));
    assert_eq!(node.replica.vector().get(&origin), 1);
    node.hear("d", pushed_as(Reason::Relayed, of_a(2)));
    assert_eq!(node.replica.vector().get(&origin), 3);
}
