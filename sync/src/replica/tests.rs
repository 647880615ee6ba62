use super::*;
use crate::engine::Memory;
use crate::stamp::FUTURE_MS_MAX;
use crate::wire::{LENGTH_BYTES, Versions};

const NOW_MS: u64 = 1_000_000;

/// Small enough that a few writes reach them, and one entry fills a batch.
const SMALL: Limits = Limits { queue_bytes: 700, queue_frames: 64, window_bytes: 1, batch_bytes: 1, batch_entries: 1 };

struct Node {
    replica: Replica,
    engine: Arc<Memory>,
}

fn key(name: &str) -> Key {
    Key { store: "app/default".parse().unwrap(), name: name.into() }
}

fn name(node: &str) -> NodeName {
    node.parse().unwrap()
}

fn set(text: &str) -> Write {
    Write::Set(Bytes::copy_from_slice(text.as_bytes()))
}

impl Node {
    fn new(node: &str) -> Self {
        Self::on(node, Arc::default())
    }

    fn on(node: &str, engine: Arc<Memory>) -> Self {
        let replica = Replica::open(Arc::clone(&engine) as Arc<dyn Engine>, name(node), NOW_MS, 0).unwrap();
        Self { replica, engine }
    }

    fn small(mut self) -> Self {
        self.replica = self.replica.with_limits(SMALL);
        self
    }

    /// Handles an event and applies its commits; returns the rest.
    fn handle_at(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut rest = Vec::new();
        for action in self.replica.handle(now_ms, event).unwrap() {
            match action {
                Action::Commit(batch) => self.engine.apply(batch).unwrap(),
                other => rest.push(other),
            }
        }
        rest
    }

    fn handle(&mut self, event: Event) -> Vec<Action> {
        self.handle_at(NOW_MS, event)
    }

    fn write(&mut self, at: &str, write: Write) -> Vec<Action> {
        self.handle(Event::Write { ticket: 1, key: key(at), write })
    }

    fn hear(&mut self, peer: &str, message: Message) -> Vec<Action> {
        self.handle(Event::Received { peer: name(peer), session: 1, message })
    }

    /// Connects a peer that has `vector` and returns what it is sent.
    fn greet(&mut self, peer: &str, vector: VersionVector) -> Vec<Message> {
        self.handle(Event::Connected { peer: name(peer), session: 1 });
        sent(&self.hear(peer, Message::Hello { versions: wire::VERSIONS, node: name(peer), vector }))
    }

    fn drained(&mut self, peer: &str) -> Vec<Message> {
        sent(&self.handle(Event::Sent { peer: name(peer), session: 1, frames: 64, bytes: 1 << 20 }))
    }

    fn value(&self, at: &str) -> Option<Bytes> {
        read::record(self.engine.as_ref(), &key(at)).unwrap().value()
    }
}

fn sent(actions: &[Action]) -> Vec<Message> {
    let message = |action: &Action| match action {
        Action::Send { frame, .. } => wire::decode(frame.slice(LENGTH_BYTES..)).unwrap(),
        _ => None,
    };
    actions.iter().filter_map(message).collect()
}

fn names(messages: &[Message]) -> Vec<&str> {
    let entries = messages.iter().flat_map(|message| match message {
        Message::Batch { entries, .. } => entries.as_slice(),
        _ => &[],
    });
    entries.map(|entry| entry.key.name.as_str()).collect()
}

fn claims(messages: &[Message]) -> Vec<VersionVector> {
    let claim = |message: &Message| match message {
        Message::Batch { complete, .. } => complete.clone(),
        _ => None,
    };
    messages.iter().filter_map(claim).collect()
}

fn entry(node: &str, seq: u64, stamp: Stamp, at: &str) -> Entry {
    let dot = Dot { origin: Origin { node: name(node), incarnation: 1 }, seq };
    Entry { key: key(at), version: Version { stamp, dot }, content: Content::Value(Bytes::from_static(b"v")) }
}

fn batch(entries: Vec<Entry>) -> Message {
    Message::Batch { entries, complete: None }
}

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
fn a_catch_up_leaves_out_what_was_superseded_and_still_covers_it() {
    let mut node = Node::new("a");
    for text in ["1", "2", "3"] {
        node.write("k", set(text));
    }
    node.write("k", Write::Delete);
    let messages = node.greet("b", VersionVector::default());
    assert_eq!(names(&messages), ["k"]);
    assert_eq!(claims(&messages)[0].get(node.replica.origin()), 4);

    let mut peer = Node::new("b");
    peer.greet("a", VersionVector::default());
    for message in messages {
        peer.hear("a", message);
    }
    assert_eq!(peer.replica.vector(), node.replica.vector());
    assert_eq!(peer.value("k"), None);
}

#[test]
fn a_full_queue_is_fed_no_more_and_the_peer_catches_up_when_it_drained() {
    let mut node = Node::new("a").small();
    node.greet("b", VersionVector::default());
    node.drained("b");
    let mut pushed = 0;
    for number in 0..20 {
        pushed += sent(&node.write(&format!("k{number:02}"), set("v"))).len();
        assert!(node.replica.health()[0].queued_bytes <= SMALL.queue_bytes);
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
fn what_arrives_behind_a_running_catch_up_is_sent_before_the_claim() {
    let mut node = Node::new("n").small();
    node.greet("a", VersionVector::default());
    // The first write of `a` is missing; the second was applied beyond the gap.
    node.hear("a", batch(vec![entry("a", 2, Stamp::at_ms(NOW_MS), "k2"), entry("b", 1, Stamp::at_ms(NOW_MS), "k3")]));
    node.greet("p", VersionVector::default());
    let mut messages = node.drained("p");
    assert_eq!(names(&messages), ["k2"]);
    node.hear("a", batch(vec![entry("a", 1, Stamp::at_ms(NOW_MS), "k1")]));
    for _ in 0..100 {
        messages.extend(node.drained("p"));
    }
    assert_eq!(claims(&messages).len(), 1);
    assert!(names(&messages).contains(&"k1"), "{:?}", names(&messages));
    let mut all = names(&messages);
    all.sort_unstable();
    all.dedup();
    assert_eq!(all, ["k1", "k2", "k3"]);
}

#[test]
fn an_entry_from_the_future_is_refused_until_its_time_has_come() {
    let mut node = Node::new("n");
    node.greet("a", VersionVector::default());
    let future = entry("a", 1, Stamp::at_ms(NOW_MS + FUTURE_MS_MAX + 1), "k");
    let origin = future.version.dot.origin.clone();
    let claim = Some(VersionVector::from_iter([(origin.clone(), 1)]));
    let message = Message::Batch { entries: vec![future], complete: claim };
    let actions = node.hear("a", message.clone());
    let refused = |action: &Action| matches!(action, Action::Notify(Notice::Refused { entries: 1, .. }));
    assert!(actions.iter().any(refused));
    assert_eq!(node.value("k"), None);
    assert_eq!(node.replica.vector().get(&origin), 0);
    node.write("own", set("1"));
    let own = read::record(node.engine.as_ref(), &key("own")).unwrap().newest().unwrap().version.stamp;
    assert_eq!(own.ms(), NOW_MS);

    node.handle_at(NOW_MS + 1, Event::Received { peer: name("a"), session: 1, message });
    assert!(node.value("k").is_some());
    assert_eq!(node.replica.vector().get(&origin), 1);
}

#[test]
fn a_peer_that_stays_behind_is_offered_the_same_ever_less_often() {
    let mut node = Node::new("a");
    node.greet("b", VersionVector::default());
    node.write("k", set("1"));
    let mut offers = 0;
    for tick in 0..240 {
        let now_ms = NOW_MS + tick * TICK_MS;
        node.handle_at(now_ms, Event::Tick);
        node.handle_at(now_ms, Event::Sent { peer: name("b"), session: 1, frames: 64, bytes: 1 << 20 });
        let message = Message::Announce { vector: VersionVector::default() };
        let event = Event::Received { peer: name("b"), session: 1, message };
        offers += claims(&sent(&node.handle_at(now_ms, event))).len();
        node.handle_at(now_ms, Event::Sent { peer: name("b"), session: 1, frames: 64, bytes: 1 << 20 });
    }
    // A minute at 1, 2, 4, 8, 16, 30 seconds.
    assert!((4..=7).contains(&offers), "{offers}");
}

#[test]
fn a_link_that_begins_wrongly_is_closed() {
    let vector = VersionVector::default;
    let hello = |max, node| Message::Hello { versions: Versions { min: max, max }, node: name(node), vector: vector() };
    let wrong = [
        hello(wire::VERSIONS.max + 1, "b"),
        hello(wire::VERSIONS.max, "c"),
        Message::Announce { vector: vector() },
        batch(vec![entry("b", 1, Stamp::at_ms(NOW_MS), "k")]),
    ];
    for message in wrong {
        let mut node = Node::new("a");
        node.handle(Event::Connected { peer: name("b"), session: 1 });
        let actions = node.hear("b", message);
        assert!(matches!(actions[..], [Action::Close { session: 1, .. }]), "{actions:?}");
        assert_eq!(node.value("k"), None);
    }
    let mut node = Node::new("a");
    node.greet("b", vector());
    assert!(matches!(node.hear("b", hello(wire::VERSIONS.max, "b"))[..], [Action::Close { .. }]));
}

#[test]
fn what_an_older_link_says_is_ignored() {
    let mut node = Node::new("a");
    node.greet("b", VersionVector::default());
    node.handle(Event::Connected { peer: name("b"), session: 2 });
    assert!(node.hear("b", batch(vec![entry("b", 1, Stamp::at_ms(NOW_MS), "k")])).is_empty());
    assert_eq!(node.value("k"), None);
    node.handle(Event::Disconnected { peer: name("b"), session: 1 });
    assert_eq!(node.replica.health().len(), 1);
    node.handle(Event::Disconnected { peer: name("b"), session: 2 });
    assert_eq!(node.replica.health().len(), 0);
}

#[test]
fn a_restart_goes_on_where_it_was_and_a_new_directory_is_a_new_incarnation() {
    let mut node = Node::new("a");
    node.write("k", set("1"));
    let again = Node::on("a", Arc::clone(&node.engine));
    assert_eq!(again.replica.origin(), node.replica.origin());
    assert_eq!(again.replica.vector(), node.replica.vector());
    let engine: Arc<Memory> = Arc::default();
    let fresh = Replica::open(engine, name("a"), NOW_MS, 1).unwrap();
    assert_ne!(fresh.origin(), node.replica.origin());
}

#[test]
fn a_node_on_an_old_copy_of_its_directory_goes_on_as_a_new_incarnation() {
    let mut node = Node::new("a");
    node.write("k", set("1"));
    let old = node.replica.origin().clone();
    let seen = VersionVector::from_iter([(old.clone(), 2)]);
    node.greet("b", seen);
    assert!(node.replica.origin().incarnation > old.incarnation);
    // It takes its own old writes as any other's.
    assert_eq!(node.replica.vector().get(&old), 0);
    node.write("k", set("2"));
    assert_eq!(node.replica.vector().get(node.replica.origin()), 1);
    let again = Node::on("a", Arc::clone(&node.engine));
    assert_eq!(again.replica.origin(), node.replica.origin());
}

#[test]
fn a_corrupt_record_is_not_served_not_counted_with_and_not_claimed() {
    let mut node = Node::new("a");
    node.write("k1", set("1"));
    node.write("k2", set("2"));
    node.write("k3", set("3"));
    let row = layout::record(&key("k2"));
    let mut bytes = node.engine.get(&row).unwrap().unwrap().to_vec();
    bytes[20] ^= 1;
    let mut damage = Batch::default();
    damage.put(row, bytes);
    node.engine.apply(damage).unwrap();
    assert!(matches!(read::record(node.engine.as_ref(), &key("k2")), Err(ReadError::Corrupt(_))));
    let increment = node.write("k2", Write::Increment(1));
    assert!(matches!(increment[..], [Action::Done { result: Err(WriteError::Corrupt), .. }]));

    let messages = node.greet("b", VersionVector::default());
    assert_eq!(names(&messages), ["k1", "k3"]);
    assert_eq!(claims(&messages)[0].get(node.replica.origin()), 1);

    let healed = node.write("k2", set("new"));
    assert!(healed.iter().any(|action| matches!(action, Action::Notify(Notice::Corrupt { .. }))));
    assert_eq!(node.value("k2"), Some(Bytes::from_static(b"new")));
}

#[test]
fn a_node_that_cannot_read_how_far_it_has_written_goes_on_as_a_new_incarnation() {
    for lost in [true, false] {
        let mut node = Node::new("a");
        node.write("k", set("1"));
        let origin = node.replica.origin().clone();
        let mut damage = Batch::default();
        match lost {
            true => damage.remove(layout::vector(&origin)),
            false => damage.put(layout::vector(&origin), 0_u64.to_be_bytes().to_vec()),
        }
        node.engine.apply(damage).unwrap();
        let again = Node::on("a", Arc::clone(&node.engine));
        assert_ne!(again.replica.origin(), &origin, "lost: {lost}");
    }
}

#[test]
fn lag_is_what_the_peer_has_not_acknowledged() {
    let mut node = Node::new("a");
    node.greet("b", VersionVector::default());
    node.write("k", set("1"));
    node.write("k", set("2"));
    assert_eq!(node.replica.health()[0].lag, 2);
    let vector = node.replica.vector().clone();
    node.hear("b", Message::Announce { vector });
    assert_eq!(node.replica.health()[0].lag, 0);
}
