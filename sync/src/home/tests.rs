use selvage_config::plan::Former;

use super::*;
use crate::engine::Memory;
use crate::entry::Origin;

const LIFE: u64 = 7;

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn store() -> StoreName {
    "shop/orders".parse().unwrap()
}

fn members(nodes: &[&str]) -> BTreeSet<NodeName> {
    nodes.iter().map(|node| name(node)).collect()
}

fn home(node: &str, term: u64, former: &[(&str, u64)]) -> Home {
    let former = former.iter().map(|(node, term)| Former { node: name(node), term: *term }).collect();
    Home { former, ..Home::first(store(), name(node), term) }
}

fn vector(node: &str, seq: u64) -> VersionVector {
    VersionVector::from_iter([(Origin { node: name(node), incarnation: 1 }, seq)])
}

/// A node with its engine.
struct Node {
    engine: Memory,
    homes: Homes,
    vector: VersionVector,
    life: u64,
}

impl Node {
    fn new(node: &str) -> Self {
        Self { engine: Memory::default(), homes: Homes::none(name(node)), vector: VersionVector::default(), life: LIFE }
    }

    fn told(mut self, home: &Home, nodes: &[&str]) -> Self {
        self.tell(home, nodes);
        self
    }

    fn tell(&mut self, home: &Home, nodes: &[&str]) {
        let batch = self.homes.plan(vec![home.clone()], members(nodes));
        self.engine.apply(batch).unwrap();
    }

    fn restart(&mut self) {
        self.homes = Homes::open(&self.engine, self.homes.own.clone()).unwrap();
    }

    fn place(&self) -> Place {
        self.homes.place(&store(), self.life)
    }

    fn is_here(&self, term: u64) -> bool {
        self.place() == Place::Here { term }
    }

    fn asks(&self) -> Vec<String> {
        match self.place() {
            Place::Coming { waits_for, lost: None, .. } => waits_for.iter().map(NodeName::to_string).collect(),
            other => panic!("{other:?}"),
        }
    }

    /// Whose answers it asks for in one of its lives.
    fn claims(&mut self, life: u64) -> Vec<(NodeName, Claim)> {
        let (batch, claims) = self.homes.claims(life);
        self.engine.apply(batch).unwrap();
        claims
    }

    /// Asks everybody it wants to, and becomes the home if it can.
    fn claim(&mut self, others: &mut [&mut Node]) {
        for (node, claim) in self.claims(self.life) {
            if let Some(other) = others.iter_mut().find(|other| other.homes.own == node) {
                let (batch, answer) = other.homes.release(&self.homes.own, &claim, &other.vector);
                other.engine.apply(batch).unwrap();
                self.homes.claimed(&node, &claim, answer);
            }
        }
        let batch = self.homes.settle(self.life, &self.vector);
        self.engine.apply(batch).unwrap();
    }
}

#[test]
fn the_first_home_decides_once_every_node_was_told_and_all_they_had_is_here() {
    let all = ["a", "b", "c"];
    let first = home("a", 4, &[]);
    let (mut a, mut b, mut c) = (Node::new("a").told(&first, &all), Node::new("b"), Node::new("c"));
    assert_eq!(a.asks(), ["b", "c"]);
    b.tell(&first, &all);
    b.vector = vector("b", 3);
    a.claim(&mut [&mut b, &mut c]);
    assert_eq!(a.asks(), ["c"], "c was not told yet");
    assert_eq!(c.place(), Place::Free);
    c.tell(&first, &all);
    a.claim(&mut [&mut b, &mut c]);
    assert_eq!(a.place(), Place::Coming { term: 4, waits_for: vec![], lost: None }, "what b had is on its way");
    a.vector = vector("b", 3);
    a.claim(&mut []);
    assert!(a.is_here(4));
    assert_eq!(b.place(), Place::At { home: name("a"), term: 4 });
    a.restart();
    assert!(a.is_here(4), "it is so after a restart, before any plan came");
}

#[test]
fn a_home_that_was_told_of_a_newer_one_decides_no_more_even_after_a_restart_with_an_older_plan() {
    let all = ["a", "b"];
    let (first, second) = (home("a", 4, &[]), home("b", 9, &[("a", 4)]));
    let mut b = Node::new("b").told(&first, &all);
    let mut a = Node::new("a").told(&first, &all);
    a.claim(&mut [&mut b]);
    assert!(a.is_here(4));
    a.tell(&second, &all);
    assert_eq!(a.place(), Place::At { home: name("b"), term: 9 });
    a.restart();
    a.tell(&first, &all);
    a.claim(&mut [&mut b]);
    assert_eq!(a.place(), Place::At { home: name("b"), term: 9 });
}

#[test]
fn a_move_waits_for_the_home_before_and_for_nobody_else() {
    let all = ["a", "b", "c"];
    let (first, second) = (home("a", 4, &[]), home("b", 9, &[("a", 4)]));
    let (mut a, mut b, mut c) =
        (Node::new("a").told(&first, &all), Node::new("b").told(&first, &all), Node::new("c").told(&first, &all));
    a.claim(&mut [&mut b, &mut c]);
    b.tell(&second, &all);
    a.vector = vector("a", 5);
    b.claim(&mut [&mut a]);
    assert_eq!(b.asks(), ["a"], "a was not told");
    assert!(a.is_here(4) && !b.is_here(9));
    a.tell(&second, &all);
    b.claim(&mut [&mut a]);
    assert!(!b.is_here(9), "a's last writes are missing");
    b.vector = vector("a", 5);
    b.claim(&mut []);
    assert!(b.is_here(9) && !a.is_here(4));
}

#[test]
fn where_the_home_before_never_decided_those_before_it_are_asked() {
    let all = ["a", "b", "c"];
    let first = home("a", 4, &[]);
    let (mut a, mut b, mut c) =
        (Node::new("a").told(&first, &all), Node::new("b").told(&first, &all), Node::new("c").told(&first, &all));
    a.claim(&mut [&mut b, &mut c]);
    let third = home("c", 12, &[("b", 9), ("a", 4)]);
    b.tell(&third, &all);
    c.tell(&third, &all);
    c.claim(&mut [&mut a, &mut b]);
    assert_eq!(c.asks(), ["a"]);
    a.tell(&third, &all);
    c.claim(&mut [&mut a, &mut b]);
    assert!(c.is_here(12));
}

#[test]
fn a_home_that_the_control_plane_forgot_is_found_by_what_nodes_were_told() {
    let all = ["a", "b", "c"];
    let second = home("b", 9, &[("a", 4)]);
    let (mut a, mut b, mut c) =
        (Node::new("a").told(&home("a", 4, &[]), &all), Node::new("b").told(&second, &all), Node::new("c"));
    a.tell(&second, &all);
    b.claim(&mut [&mut a]);
    assert!(!b.is_here(9), "a never decided, so everybody is asked");
    c.tell(&second, &all);
    b.claim(&mut [&mut a, &mut c]);
    b.claim(&mut [&mut a, &mut c]);
    assert!(b.is_here(9));
    // The state was lost, with it that b was the home; and b is not in the roster.
    let anew = home("c", 20, &[]);
    c.restart();
    c.tell(&anew, &["a", "c"]);
    a.tell(&anew, &["a", "c"]);
    c.claim(&mut [&mut a]);
    assert_eq!(c.asks(), ["b"]);
    b.tell(&anew, &["a", "c"]);
    c.claim(&mut [&mut b]);
    assert!(c.is_here(20) && !b.is_here(9));
}

#[test]
fn a_home_that_lost_its_disk_is_none_until_it_is_given_up() {
    let all = ["a", "b"];
    let first = home("a", 4, &[]);
    let mut b = Node::new("b").told(&first, &all);
    let mut a = Node::new("a").told(&first, &all);
    a.claim(&mut [&mut b]);
    assert!(a.is_here(4));
    // Everything is gone; the node is another life.
    let mut a = Node::new("a").told(&first, &all);
    a.life = LIFE + 1;
    a.claim(&mut [&mut b]);
    a.claim(&mut [&mut b]);
    assert_eq!(a.place(), Place::Coming { term: 4, waits_for: vec![], lost: Some(name("a")) });
    let given_up = first.next(&name("a"), 4, 10).unwrap();
    a.tell(&given_up, &all);
    b.tell(&given_up, &all);
    a.claim(&mut [&mut b]);
    assert!(a.is_here(10));
}

#[test]
fn nobody_follows_a_home_that_lost_its_disk_until_it_is_given_up() {
    let all = ["a", "b", "c"];
    let first = home("a", 4, &[]);
    let (mut b, mut c) = (Node::new("b").told(&first, &all), Node::new("c").told(&first, &all));
    let mut a = Node::new("a").told(&first, &all);
    a.claim(&mut [&mut b, &mut c]);
    assert!(a.is_here(4));
    // It begins from nothing, and hears at once that it is the home no more.
    let second = first.next(&name("b"), 0, 9).unwrap();
    let mut a = Node::new("a").told(&second, &all);
    b.tell(&second, &all);
    c.tell(&second, &all);
    for _ in 0..3 {
        b.claim(&mut [&mut a, &mut c]);
    }
    assert_eq!(b.place(), Place::Coming { term: 9, waits_for: vec![], lost: Some(name("a")) });
    let third = second.next(&name("c"), 0, 12).unwrap();
    [&mut a, &mut b, &mut c].into_iter().for_each(|node| node.tell(&third, &all));
    for _ in 0..4 {
        c.claim(&mut [&mut a, &mut b]);
    }
    assert_eq!(c.place(), Place::Coming { term: 12, waits_for: vec![], lost: Some(name("a")) });
    let given_up = third.next(&name("c"), 4, 15).unwrap();
    [&mut a, &mut b, &mut c].into_iter().for_each(|node| node.tell(&given_up, &all));
    for _ in 0..4 {
        c.claim(&mut [&mut a, &mut b]);
    }
    assert!(c.is_here(15));
}

#[test]
fn a_home_that_was_made_way_for_and_never_decided_is_followed() {
    let all = ["a", "b"];
    let first = home("a", 4, &[]);
    let mut b = Node::new("b").told(&first, &all);
    let mut a = Node::new("a").told(&first, &all);
    for (_, claim) in a.claims(LIFE) {
        // The answer never arrives.
        let (batch, _) = b.homes.release(&name("a"), &claim, &b.vector);
        b.engine.apply(batch).unwrap();
    }
    a.restart();
    let second = first.next(&name("b"), 0, 9).unwrap();
    a.tell(&second, &all);
    b.tell(&second, &all);
    b.claim(&mut [&mut a]);
    b.claim(&mut [&mut a]);
    assert!(b.is_here(9));
}

#[test]
fn another_life_with_the_same_disk_asks_everybody_before_it_goes_on() {
    let all = ["a", "b"];
    let first = home("a", 4, &[]);
    let mut b = Node::new("b").told(&first, &all);
    let mut a = Node::new("a").told(&first, &all);
    a.claim(&mut [&mut b]);
    a.restart();
    a.tell(&first, &all);
    a.life = LIFE + 1;
    assert_eq!(a.asks(), ["b"]);
    b.vector = vector("a", 8);
    a.claim(&mut [&mut b]);
    assert_eq!(a.asks(), [""; 0], "b has writes of it that it has not");
    a.vector = vector("a", 8);
    a.claim(&mut []);
    assert!(a.is_here(4));
}

#[test]
fn a_lost_home_is_waited_for_no_more_and_everybody_else_is() {
    let all = ["a", "b", "c"];
    let first = home("a", 4, &[]);
    let (mut a, mut b, mut c) =
        (Node::new("a").told(&first, &all), Node::new("b").told(&first, &all), Node::new("c").told(&first, &all));
    a.claim(&mut [&mut b, &mut c]);
    let second = first.next(&name("b"), 4, 9).unwrap();
    b.tell(&second, &["b", "c"]);
    assert_eq!(b.asks(), ["c"]);
    c.vector = vector("a", 2);
    c.tell(&second, &["b", "c"]);
    b.claim(&mut [&mut c]);
    assert!(!b.is_here(9), "c has writes of a that b has not");
    b.vector = vector("a", 2);
    b.claim(&mut [&mut c]);
    assert!(b.is_here(9));
}

#[test]
fn only_who_the_plan_names_is_made_way_for() {
    let all = ["a", "b", "c"];
    let mut b = Node::new("b").told(&home("a", 4, &[]), &all);
    let claim = |term| Claim { store: store(), term, incarnation: 1 };
    let mut asked = |from: &str, term| b.homes.release(&name(from), &claim(term), &VersionVector::default()).1;
    assert_eq!(asked("c", 4), Claimed::Elsewhere { home: name("a"), term: 4 });
    assert_eq!(asked("a", 3), Claimed::Elsewhere { home: name("a"), term: 4 });
    assert_eq!(asked("a", 5), Claimed::NotYet);
    assert!(matches!(asked("a", 4), Claimed::Released(_)));
    let other = Claim { store: "shop/stock".parse().unwrap(), ..claim(4) };
    assert_eq!(b.homes.release(&name("a"), &other, &VersionVector::default()).1, Claimed::NotYet);
}

#[test]
fn a_row_that_cannot_be_read_decides_nothing_until_the_plan_says() {
    let mut a = Node::new("a").told(&home("a", 4, &[]), &["a"]);
    a.claim(&mut []);
    assert!(a.is_here(4), "alone it is the home at once");
    let row = layout::home(&store());
    for damaged in [&b""[..], b"\x01", b"\x02abcdef"] {
        let mut batch = Batch::default();
        batch.put(row.clone(), damaged.to_vec());
        a.engine.apply(batch).unwrap();
        a.restart();
        assert_eq!(a.place(), Place::Coming { term: 0, waits_for: vec![], lost: None });
    }
    a.tell(&home("a", 4, &[]), &["a"]);
    a.claim(&mut []);
    assert!(a.is_here(4));
}

proptest::proptest! {
    #[test]
    fn no_row_panics(bytes: Vec<u8>) {
        let _ = Row::decode(bytes.into());
    }

    #[test]
    fn a_row_comes_back(term: u64, before: u64, one: Option<(u64, u64)>, more: [(u64, u64); 3]) {
        let held = |pair: (u64, u64)| Held { term: pair.0, incarnation: pair.1 };
        let (home, before) = (Some(name("a")), Some((before, name("b"))));
        let grants = more.map(|pair| Grant { node: name("c"), held: held(pair) }).to_vec();
        let row = Row { term, home, before, held: one.map(held), claims: more.map(held).to_vec(), grants };
        proptest::prop_assert_eq!(Row::decode(row.encode().into()).unwrap(), row);
    }
}
