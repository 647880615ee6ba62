mod push;
mod warrants;

use bytes::Bytes;

use self::warrants::{introduction, warrants};
use super::*;
use crate::engine::Memory;
use crate::read::{self, ReadError};
use crate::stamp::FUTURE_MS_MAX;
use crate::trust::Named;
use crate::wire::{LENGTH_BYTES, Part, Reason, Symbols, Versions};

const NOW_MS: u64 = 1_000_000;

/// Small enough that a few writes reach them, and one entry fills a batch.
fn small() -> Limits {
    Limits {
        queue_bytes: 700,
        queue_frames: 64,
        window_bytes: 1,
        batch_bytes: 1,
        batch_entries: 1,
        promise_ticks: 1,
        prove_ticks: 1,
        grace_ms: 1_000,
        epoch_ms: 100,
        ..Limits::default()
    }
}

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

fn roster(nodes: &[(&str, &str)]) -> Event {
    Event::Roster(nodes.iter().map(|(node, region)| (name(node), region.parse().unwrap())).collect())
}

fn set(text: &str) -> Write {
    Write::Set { value: Bytes::copy_from_slice(text.as_bytes()), expires_ms: None }
}

/// What a node signs with and believes, in tests.
fn keyring(node: &str, chance: u8) -> Keyring {
    Keyring { trust: Arc::new(Named(name(node))), chance: [chance; 32] }
}

impl Node {
    fn rows(&self) -> Arc<dyn Engine> {
        Arc::clone(&self.engine) as Arc<dyn Engine>
    }

    fn new(node: &str) -> Self {
        Self::on(node, Arc::default())
    }

    fn on(node: &str, engine: Arc<Memory>) -> Self {
        let rows = Arc::clone(&engine) as Arc<dyn Engine>;
        let replica = Replica::open(rows, name(node), b"here", NOW_MS, keyring(node, 0)).unwrap();
        Self { replica, engine }
    }

    /// Its word on the key that it signs with.
    fn voucher(&self) -> Voucher {
        let origin = self.replica.origin();
        Voucher::give(&Named(origin.node.clone()), origin, self.replica.signer.public(), 1).unwrap()
    }

    fn small(mut self) -> Self {
        self.replica = self.replica.with_limits(small());
        self
    }

    /// Handles an event and applies its commits; returns the rest.
    fn handle_at(&mut self, now_ms: u64, event: Event) -> Vec<Action> {
        let mut rest = Vec::new();
        let handled = self.replica.handle(now_ms, event).unwrap();
        for action in handled.into_iter().chain(self.replica.sign()) {
            match action {
                Action::Commit(batch) => self.engine.apply(batch).unwrap(),
                other => rest.push(other),
            }
        }
        rest.extend(self.replica.push());
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
        let hello = Message::Hello { versions: wire::VERSIONS, node: name(peer), vector, reach: Reach::default() };
        let said = sent(&self.hear(peer, hello));
        self.hear(peer, introduction(&["a", "b", "c", "d", "p"]));
        said
    }

    fn drained(&mut self, peer: &str) -> Vec<Message> {
        sent(&self.handle(Event::Sent { peer: name(peer), session: 1, frames: 64, bytes: 1 << 20 }))
    }

    fn value(&self, at: &str) -> Option<Bytes> {
        read::record(self.engine.as_ref(), &key(at)).unwrap().value(NOW_MS)
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
    Entry {
        key: key(at),
        version: Version { stamp, dot },
        prev: 0,
        expires_ms: None,
        content: Content::Value(Bytes::from_static(b"v")),
    }
}

fn announce(changed: VersionVector) -> Message {
    Message::Announce { changed, reach: Reach::default(), ping: Ping::default(), rows: Vec::new() }
}

fn batch(entries: Vec<Entry>) -> Message {
    let warrants = warrants(&entries);
    Message::Batch { reason: Reason::CatchUp, cut: Stamp::default(), entries, warrants, complete: None }
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
    peer.hear("a", Message::Vouch(vec![node.voucher()]));
    for message in messages {
        peer.hear("a", message);
    }
    assert_eq!(peer.replica.vector(), node.replica.vector());
    assert_eq!(peer.value("k"), None);
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
fn an_entry_from_the_future_is_kept_aside_until_its_time_has_come() {
    let mut node = Node::new("n");
    node.greet("a", VersionVector::default());
    let future = entry("a", 1, Stamp::at_ms(NOW_MS + FUTURE_MS_MAX + 1), "k");
    let origin = future.version.dot.origin.clone();
    let claim = Some(VersionVector::from_iter([(origin.clone(), 1)]));
    let Message::Batch { reason, cut, entries, warrants, .. } = batch(vec![future]) else { unreachable!() };
    let message = Message::Batch { reason, cut, entries, warrants, complete: claim };
    let actions = node.hear("a", message);
    let aside = |action: &Action| matches!(action, Action::Notify(Notice::Future { entries: 1, .. }));
    assert!(actions.iter().any(aside));
    assert_eq!(node.value("k"), None);
    assert_eq!(node.replica.vector().get(&origin), 0);
    node.write("own", set("1"));
    let own = read::record(node.engine.as_ref(), &key("own")).unwrap().newest().unwrap().version.stamp;
    assert_eq!(own.ms(), NOW_MS);

    node.handle_at(NOW_MS, Event::Tick);
    assert_eq!(node.value("k"), None);
    node.handle_at(NOW_MS + 1, Event::Tick);
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
        let message = announce(VersionVector::default());
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
    let hello = |max, node| Message::Hello {
        versions: Versions { min: max, max },
        node: name(node),
        vector: vector(),
        reach: Reach::default(),
    };
    let wrong = [
        hello(wire::VERSIONS.max + 1, "b"),
        hello(wire::VERSIONS.max, "c"),
        announce(vector()),
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
    let actions = node.handle(Event::Connected { peer: name("b"), session: 2 });
    assert!(matches!(actions[..], [Action::Close { session: 1, .. }, ..]), "{actions:?}");
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
    let fresh = Replica::open(engine, name("a"), b"here", NOW_MS, keyring("a", 1)).unwrap();
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
    let increment = node.write("k2", Write::Increment { delta: 1, expires_ms: None });
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
    node.hear("b", announce(vector));
    assert_eq!(node.replica.health()[0].lag, 0);
}

#[test]
fn a_copied_directory_is_a_new_incarnation() {
    let mut node = Node::new("a");
    node.write("k", set("1"));
    let copy = Replica::open(node.rows(), name("a"), b"there", NOW_MS, keyring("a", 0)).unwrap();
    assert!(copy.origin().incarnation > node.replica.origin().incarnation);
    assert_eq!(copy.vector().get(node.replica.origin()), 1);
}

#[test]
fn rows_of_an_older_layout_are_refused_and_say_what_to_do() {
    let node = Node::new("a");
    let mut older = Batch::default();
    older.remove(layout::LAYOUT.to_vec());
    node.engine.apply(older).unwrap();
    let refused = Replica::open(node.rows(), name("a"), b"here", NOW_MS, keyring("a", 0));
    let error = refused.err().unwrap();
    let why = std::error::Error::source(&error).unwrap().to_string();
    assert!(why.contains("layout 1") && why.contains("move the directory away"), "{why}");
}

/// Lets two nodes, a and b, talk until they have nothing to say; `said` begins, by whether a says it. Returns how many
/// bytes that took.
fn talk(a: &mut Node, b: &mut Node, now_ms: u64, said: Vec<(bool, Vec<Action>)>) -> usize {
    let mut bytes = 0;
    let mut waiting = std::collections::VecDeque::from(said);
    while let Some((by_a, actions)) = waiting.pop_front() {
        for message in sent(&actions) {
            bytes += wire::encode(&message).len();
            let (to, from) = if by_a { (&mut *b, "a") } else { (&mut *a, "b") };
            let answer = to.handle_at(now_ms, Event::Received { peer: name(from), session: 1, message });
            assert!(!answer.iter().any(|action| matches!(action, Action::Close { .. })), "{answer:?}");
            waiting.push_back((!by_a, answer));
        }
        for (by_a, node, peer) in [(true, &mut *a, "b"), (false, &mut *b, "a")] {
            let event = Event::Sent { peer: name(peer), session: 1, frames: 99, bytes: 1 << 30 };
            let more = node.handle_at(now_ms, event);
            if !sent(&more).is_empty() {
                waiting.push_back((by_a, more));
            }
        }
    }
    bytes
}

fn link(a: &mut Node, b: &mut Node, now_ms: u64) {
    let said_a = a.handle_at(now_ms, Event::Connected { peer: name("b"), session: 1 });
    let said_b = b.handle_at(now_ms, Event::Connected { peer: name("a"), session: 1 });
    talk(a, b, now_ms, vec![(true, said_a), (false, said_b)]);
}

fn tick(a: &mut Node, b: &mut Node, now_ms: u64) {
    let said_a = a.handle_at(now_ms, Event::Tick);
    let said_b = b.handle_at(now_ms, Event::Tick);
    talk(a, b, now_ms, vec![(true, said_a), (false, said_b)]);
}

#[test]
fn a_tombstone_that_both_have_is_collected_after_the_grace_and_what_is_as_old_is_refused() {
    let (mut a, mut b) = (Node::new("a").small(), Node::new("b").small());
    for node in [&mut a, &mut b] {
        node.handle(roster(&[("a", "r"), ("b", "r")]));
    }
    link(&mut a, &mut b, NOW_MS);
    let said = [set("1"), Write::Delete].map(|write| (true, a.write("k", write)));
    talk(&mut a, &mut b, NOW_MS, said.into());
    let old = entry("c", 1, Stamp::at_ms(NOW_MS), "k");
    for tick in 1..40 {
        self::tick(&mut a, &mut b, NOW_MS + tick * TICK_MS);
    }
    for node in [&mut a, &mut b] {
        assert_eq!(node.engine.scan(layout::RECORDS, layout::RECORDS, 9).unwrap(), [], "collected");
        assert_eq!(node.engine.scan(layout::INDEX, layout::INDEX, 9).unwrap(), []);
        assert_eq!(node.engine.scan(layout::ENDS, layout::ENDS, 9).unwrap(), []);
    }
    let actions = a.hear("b", batch(vec![old]));
    assert!(actions.iter().any(|action| matches!(action, Action::Notify(Notice::Stale { entries: 1, .. }))));
    assert_eq!(a.value("k"), None);
}

#[test]
fn a_proof_repairs_what_is_lacking_though_the_vectors_are_equal_and_scans_no_row() {
    let (mut a, mut b) = (Node::new("a"), Node::new("b"));
    link(&mut a, &mut b, NOW_MS);
    for number in 0..20 {
        let actions = a.write(&format!("k{number}"), set("v"));
        talk(&mut a, &mut b, NOW_MS, vec![(true, actions)]);
    }
    assert_eq!(b.replica.vector().get(a.replica.origin()), 20);
    // Behind the replica's back, b loses one record and its row of the index.
    let dot = Dot { origin: a.replica.origin().clone(), seq: 7 };
    let mut damage = Batch::default();
    damage.remove(layout::record(&key("k6")));
    damage.remove(layout::index(&dot));
    b.engine.apply(damage).unwrap();
    let mut again = Node::on("b", Arc::clone(&b.engine));
    again.handle(Event::Tick);
    assert_eq!(again.value("k6"), None);
    let mut b = again;
    a.handle(Event::Disconnected { peer: name("b"), session: 1 });
    link(&mut a, &mut b, NOW_MS);
    assert_eq!(b.value("k6"), None, "the vectors say that nothing is lacking");
    a.replica = a.replica.with_limits(Limits { prove_ticks: 1, ..Limits::default() });
    let actions = a.handle(Event::Tick);
    talk(&mut a, &mut b, NOW_MS, vec![(true, actions)]);
    assert_eq!(b.value("k6"), Some(Bytes::from_static(b"v")));
    let proved = a.replica.counts().proved;
    let actions = a.handle(Event::Tick);
    talk(&mut a, &mut b, NOW_MS, vec![(true, actions)]);
    assert_eq!(a.replica.counts().proved, proved + 1);
}

#[test]
fn a_record_that_cannot_be_read_is_healed_from_a_peer_and_the_proof_still_agrees() {
    let (mut a, mut b) = (Node::new("a"), Node::new("b"));
    link(&mut a, &mut b, NOW_MS);
    let actions = a.write("k", set("1"));
    talk(&mut a, &mut b, NOW_MS, vec![(true, actions)]);
    let row = layout::record(&key("k"));
    let mut bytes = a.engine.get(&row).unwrap().unwrap().to_vec();
    bytes[20] ^= 1;
    let mut damage = Batch::default();
    damage.put(row, bytes);
    a.engine.apply(damage).unwrap();
    let asks = a.handle(Event::Heal(key("k")));
    talk(&mut a, &mut b, NOW_MS, vec![(true, asks)]);
    assert_eq!(a.value("k"), Some(Bytes::from_static(b"1")));
    a.replica = a.replica.with_limits(Limits { prove_ticks: 1, ..Limits::default() });
    let actions = a.handle(Event::Tick);
    talk(&mut a, &mut b, NOW_MS, vec![(true, actions)]);
    assert_eq!(a.replica.counts().proved, 1);
}

#[test]
fn cells_that_say_nothing_true_change_nothing() {
    let (mut a, mut b) = (Node::new("a"), Node::new("b"));
    link(&mut a, &mut b, NOW_MS);
    a.write("k", set("1"));
    let cell = crate::sketch::Cell { items: 99, checks: 1, count: 1 };
    for part in [Part::Group { number: 0, of: 1 }, Part::Span(crate::sketch::Span::at(1, 0))] {
        a.hear("b", Message::Symbols(vec![Symbols { part, cells: vec![cell; 3] }]));
    }
    a.hear("b", Message::Want { items: vec![1, 2, 3], keys: vec![key("none")] });
    assert_eq!(a.value("k"), Some(Bytes::from_static(b"1")));
}

#[test]
fn a_clock_that_two_peers_call_wrong_takes_no_writes() {
    let mut node = Node::new("a");
    for peer in ["b", "c"] {
        node.greet(peer, VersionVector::default());
        let ping = Ping { sent_ms: NOW_MS + 5_000, echo_ms: NOW_MS - 20, held_ms: 0 };
        let message =
            Message::Announce { changed: VersionVector::default(), reach: Reach::default(), ping, rows: Vec::new() };
        node.hear(peer, message);
    }
    let refused = node.write("k", set("1"));
    assert!(matches!(refused[..], [Action::Done { result: Err(WriteError::ClockUnsafe { .. }), .. }]), "{refused:?}");
    // What others write now is not from the future, though this clock says so.
    node.hear("b", batch(vec![entry("b", 1, Stamp::at_ms(NOW_MS + 4_900), "k")]));
    assert!(node.value("k").is_some());
}

#[test]
fn a_write_that_lost_against_one_that_had_not_seen_it_is_counted() {
    let mut node = Node::new("a");
    node.greet("b", VersionVector::default());
    node.write("k", set("1"));
    node.hear("b", batch(vec![entry("b", 1, Stamp::at_ms(NOW_MS + 1), "k")]));
    assert_eq!(node.replica.counts().conflicts, 1);
    let mut seen = entry("b", 2, Stamp::at_ms(NOW_MS + 9), "k");
    node.write("k", set("2"));
    seen.prev = read::record(node.engine.as_ref(), &key("k")).unwrap().base().unwrap().dot.mark();
    node.hear("b", batch(vec![seen]));
    assert_eq!(node.replica.counts().conflicts, 1);
}
