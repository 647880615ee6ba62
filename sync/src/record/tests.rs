use super::*;
use crate::entry::Key;
use proptest::prelude::*;

fn entry(node: &str, stamp: u64, content: Content) -> Entry {
    let origin = Origin { node: node.parse().unwrap(), incarnation: 1 };
    Entry {
        key: Key { store: "app/default".parse().unwrap(), name: "k".into() },
        version: Version { stamp: Stamp::at_ms(stamp), dot: Dot { origin, seq: stamp } },
        prev: 0,
        expires_ms: None,
        content,
    }
}

fn origin(node: &str) -> Origin {
    Origin { node: node.parse().unwrap(), incarnation: 1 }
}

fn value(text: &'static str) -> Content {
    Content::Value(Bytes::from_static(text.as_bytes()))
}

fn number(number: i64) -> Bytes {
    Bytes::copy_from_slice(&number.to_le_bytes())
}

fn add(record: &mut Record, node: &str, stamp: u64, delta: i64) -> i64 {
    let (content, _, sum) = record.increment(&origin(node), delta, stamp, Stamp::default()).unwrap();
    assert!(!record.merge(entry(node, stamp, content)).is_none());
    sum
}

fn put(record: &mut Record, node: &str, stamp: u64, text: &'static str) -> Entry {
    let new = entry(node, stamp, record.sibling(Bytes::from_static(text.as_bytes()), Stamp::default()));
    record.merge(new.clone());
    new
}

/// What nodes do, in any order of arrival: three writers that each see a random part of what was written.
fn histories() -> impl Strategy<Value = Vec<Entry>> {
    prop::collection::vec((0_usize..3, 0_u8..9, any::<u8>(), 0_usize..3), 1..24).prop_map(|steps| {
        let names = ["a", "b", "c"];
        let mut views = [Record::default(), Record::default(), Record::default()];
        let mut written = Vec::new();
        for (stamp, (who, what, byte, reader)) in (1_u64..).zip(steps) {
            let view = &mut views[who];
            let mut expires_ms = (byte % 4 == 0).then(|| stamp + u64::from(byte % 16));
            if what > 3 && view.needs_tombstone(stamp) {
                let tombstone = entry(names[who], stamp * 2, Content::Tombstone);
                view.merge(tombstone.clone());
                written.push(tombstone);
            }
            let content = match what {
                0 | 1 => Content::Tombstone,
                2 | 3 => Content::Value(number(byte.into())),
                4..7 => match view.increment(&origin(names[who]), i64::from(byte), stamp, Stamp::default()) {
                    Ok((content, expires, _)) => {
                        expires_ms = expires;
                        content
                    }
                    Err(NotCounter) => Content::Tombstone,
                },
                _ => view.sibling(Bytes::copy_from_slice(&[byte]), Stamp::default()),
            };
            let expires_ms = expires_ms.filter(|_| content != Content::Tombstone);
            let new = Entry { expires_ms, ..entry(names[who], stamp * 2 + 1, content) };
            view.merge(new.clone());
            views[reader].merge(new.clone());
            written.push(new);
        }
        written
    })
}

proptest! {
    #[test]
    fn the_order_of_arrival_does_not_matter(
        (history, shuffled) in histories().prop_flat_map(|h| (Just(h.clone()), Just(h).prop_shuffle())),
    ) {
        let (mut one, mut other) = (Record::default(), Record::default());
        for entry in &history {
            one.merge(entry.clone());
        }
        for entry in shuffled.iter().chain(&shuffled) {
            other.merge(entry.clone());
        }
        prop_assert_eq!(one.encode(), other.encode());
        prop_assert_eq!(Record::decode(one.encode().into()).unwrap(), one);
    }

    #[test]
    fn a_part_of_what_arrived_twice_or_in_halves_is_the_same(history in histories(), half in any::<u32>()) {
        let (mut left, mut right, mut all) = (Record::default(), Record::default(), Record::default());
        for (at, entry) in history.iter().enumerate() {
            all.merge(entry.clone());
            if half >> (at % 32) & 1 == 0 { &mut left } else { &mut right }.merge(entry.clone());
        }
        // What a catch-up does: one side's surviving entries are merged into the other.
        for entry in left.entries() {
            right.merge(entry.clone());
        }
        prop_assert_eq!(right.encode(), all.encode());
    }

    #[test]
    fn garbage_is_an_error_or_a_record_but_never_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..512)) {
        let _either = Record::decode(bytes.into());
    }
}

#[test]
fn a_tombstone_is_not_undone_by_an_older_value() {
    let mut record = Record::default();
    record.merge(entry("a", 2, Content::Tombstone));
    assert!(record.merge(entry("b", 1, value("old"))).is_none());
    assert_eq!(record.value(9), None);
    assert!(!record.exists(9));
}

#[test]
fn equal_stamps_are_decided_by_the_node() {
    let mut record = Record::default();
    record.merge(entry("b", 1, value("b")));
    assert!(record.merge(entry("a", 1, value("a"))).is_none());
    assert_eq!(record.value(9), Some(Bytes::from_static(b"b")));
}

#[test]
fn concurrent_increments_both_count() {
    let (mut one, mut other) = (Record::default(), Record::default());
    assert_eq!(add(&mut one, "a", 1, 5), 5);
    assert_eq!(add(&mut other, "b", 1, 7), 7);
    for entry in other.clone().entries() {
        one.merge(entry.clone());
    }
    assert_eq!(one.value(9), Some(number(12)));
    assert_eq!(add(&mut one, "a", 2, -2), 10);
}

#[test]
fn a_set_begins_anew_and_supersedes_parts_that_had_not_seen_it() {
    let mut record = Record::default();
    add(&mut record, "a", 1, 5);
    let unaware = record.clone();
    record.merge(entry("b", 2, Content::Value(number(100))));
    assert_eq!(record.entries().count(), 1);
    let (late, _, _) = unaware.increment(&origin("a"), 1, 3, Stamp::default()).unwrap();
    assert!(record.merge(entry("a", 3, late)).is_none());
    assert_eq!(add(&mut record, "a", 4, 1), 101);
}

#[test]
fn a_part_on_a_tombstone_brings_it_where_it_was_collected() {
    let mut record = Record::default();
    let tombstone = Entry { prev: 7, ..entry("a", 2, Content::Tombstone) };
    record.merge(tombstone);
    add(&mut record, "b", 3, 5);
    assert_eq!(record.clone().collect(u64::MAX), []);
    let part = record.entries().last().unwrap().clone();
    let mut elsewhere = Record::default();
    assert_eq!(elsewhere.merge(part).added.len(), 2);
    assert_eq!(elsewhere.encode(), record.encode());
    assert_eq!(elsewhere.value(9), Some(number(5)));
}

#[test]
fn what_was_written_where_a_tombstone_was_collected_stands_where_it_was_not() {
    let tombstone = entry("a", 2, Content::Tombstone);
    let floor = Stamp::at_ms(3);
    let (late, _, _) = Record::default().increment(&origin("b"), 5, 9, floor).unwrap();
    let late = entry("b", 9, late);
    let mut before = Record::default();
    before.merge(tombstone.clone());
    // One that still had the tombstone wrote at the same time.
    let (beside, _, _) = before.increment(&origin("c"), 7, 9, Stamp::default()).unwrap();
    let beside = entry("c", 9, beside);
    let mut orders = Vec::new();
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1]] {
        let mut record = Record::default();
        for at in order {
            record.merge([&tombstone, &late, &beside][at].clone());
        }
        assert_eq!(record.value(9), Some(number(12)), "{order:?}");
        orders.push(record.encode());
    }
    assert!(orders.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn what_a_tombstone_ended_stays_ended_when_somebody_begins_anew_after_its_collection() {
    // One that had not seen the tombstone wrote after it, and another one when it was collected.
    let tombstone = entry("a", 2, Content::Tombstone);
    let (unaware, _, _) = Record::default().increment(&origin("c"), 7, 4, Stamp::default()).unwrap();
    let (anew, _, _) = Record::default().increment(&origin("b"), 5, 9, Stamp::at_ms(3)).unwrap();
    let all = [tombstone, entry("c", 4, unaware), entry("b", 9, anew)];
    for order in [[0, 1, 2], [2, 1, 0], [1, 0, 2], [1, 2, 0], [2, 0, 1], [0, 2, 1]] {
        let mut record = Record::default();
        for at in order {
            record.merge(all[at].clone());
        }
        assert_eq!(record.value(9), Some(number(5)), "{order:?}");
        assert_eq!(Record::decode(record.encode().into()).unwrap(), record);
        record.collect(3);
        assert_eq!(record.entries().collect::<Vec<_>>(), [&all[2]], "{order:?}");
    }
}

#[test]
fn text_is_not_a_counter_and_a_full_counter_stays() {
    let mut record = Record::default();
    record.merge(entry("a", 1, value("five")));
    assert_eq!(record.increment(&origin("a"), 1, 9, Stamp::default()), Err(NotCounter));
    record.merge(entry("a", 2, Content::Value(number(i64::MAX))));
    assert_eq!(record.increment(&origin("a"), 1, 9, Stamp::default()), Err(NotCounter));
    assert!(record.increment(&origin("a"), -1, 9, Stamp::default()).is_ok());
}

#[test]
fn siblings_stand_until_somebody_who_saw_them_writes() {
    let (mut one, mut other) = (Record::default(), Record::default());
    let first = put(&mut one, "a", 1, "x");
    let second = put(&mut other, "b", 2, "y");
    one.merge(second);
    assert_eq!(one.siblings(9), [Bytes::from_static(b"x"), Bytes::from_static(b"y")]);
    assert_eq!(one.value(9), Some(Bytes::from_static(b"y")));
    let third = put(&mut one, "c", 3, "z");
    assert_eq!(one.siblings(9), [Bytes::from_static(b"z")]);
    // The one that was seen is superseded also where it arrives late, and by what came after the third.
    other.merge(third);
    assert_eq!(other.siblings(9), [Bytes::from_static(b"z")]);
    let fourth = put(&mut other, "b", 4, "w");
    let mut late = Record::default();
    late.merge(fourth);
    assert!(late.merge(first).is_none());
    late.merge(entry("a", 5, Content::Tombstone));
    assert!(late.siblings(9).is_empty());
}

#[test]
fn what_expires_is_gone_at_its_instant_and_counts_as_deleted() {
    let mut record = Record::default();
    record.merge(Entry { expires_ms: Some(10), ..entry("a", 1, Content::Value(number(3))) });
    assert!(record.exists(9) && !record.exists(10));
    assert_eq!(record.value(10), None);
    assert!(record.needs_tombstone(10) && !record.needs_tombstone(9));
    assert_eq!(record.clone().collect(10), []);
    assert_eq!(record.clone().collect(11).len(), 1);
    assert!(record.merge(entry("b", 0, value("old"))).is_none());
    assert_eq!(record.increment(&origin("a"), 1, 10, Stamp::default()).unwrap().2, 1);
}
