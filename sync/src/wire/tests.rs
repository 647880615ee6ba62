use super::*;
use crate::entry::{Origin, tests::entry};
use crate::trust::{PublicKey, SIGNATURE_BYTES};
use crate::warrant::{RUN_MAX, Run};
use proptest::prelude::*;

fn vectors() -> impl Strategy<Value = VersionVector> {
    prop::collection::vec(("[a-z]{1,8}", any::<u64>(), any::<u64>()), 0..6).prop_map(|pairs| {
        pairs
            .into_iter()
            .map(|(node, incarnation, seq)| (Origin { node: node.parse().unwrap(), incarnation }, seq))
            .collect()
    })
}

fn reaches() -> impl Strategy<Value = Reach> {
    (any::<u64>(), any::<u64>()).prop_map(|(cut, floor)| Reach { cut: Stamp(cut), floor: Stamp(floor) })
}

fn announcements() -> impl Strategy<Value = Message> {
    let row = ("[a-z]{1,8}", any::<[u64; 6]>()).prop_map(|(node, [incarnation, promise, seq, cut, rest, floor])| Row {
        origin: Origin { node: node.parse().unwrap(), incarnation },
        promise: Stamp(promise),
        seq,
        cut: Stamp(cut),
        rest,
        floor: Stamp(floor),
    });
    (vectors(), reaches(), any::<[u64; 3]>(), prop::collection::vec(row, 0..3)).prop_map(
        |(changed, reach, [sent_ms, echo_ms, held_ms], rows)| Message::Announce {
            changed,
            reach,
            ping: Ping { sent_ms, echo_ms, held_ms },
            rows,
        },
    )
}

fn parts() -> impl Strategy<Value = Part> {
    prop_oneof![
        (0_u32..7, any::<u8>()).prop_map(|(of, number)| Part::Group { number: number & ((1 << of) - 1), of: 1 << of }),
        (any::<u32>(), any::<u16>()).prop_map(|(end, life)| Part::Span(Span::at(end.into(), life.into()))),
    ]
}

fn proofs() -> impl Strategy<Value = Message> {
    let cell = (any::<u64>(), any::<u32>(), any::<i32>()).prop_map(|(items, checks, count)| Cell {
        items: items & 0xff_00ff,
        checks,
        count,
    });
    let cells = prop::collection::vec(cell, 0..40);
    let symbols = (parts(), cells).prop_map(|(part, cells)| Symbols { part, cells });
    let digest = (any::<u64>(), any::<u16>(), any::<[i16; 3]>()).prop_map(|(sum, count, probes)| Digest {
        sum,
        count: count.into(),
        probes: probes.map(i32::from),
    });
    prop_oneof![
        (prop::collection::vec(digest, SHARDS), any::<u32>(), any::<u64>()).prop_map(|(digests, end, floor)| {
            let spans = BTreeMap::from([(Span::at(end.into(), 0), floor)]);
            Message::Prove { digests, spans, floor: Stamp(floor) }
        }),
        prop::collection::vec(symbols, 0..4).prop_map(Message::Symbols),
        prop::collection::vec((parts(), any::<u64>()), 0..4).prop_map(Message::More),
    ]
}

/// Entries with warrants of their origins.
fn proved() -> impl Strategy<Value = (Vec<Entry>, Vec<Warrant>)> {
    let hash = || prop::array::uniform16(any::<u8>());
    let warrant = (1..1_000_000_u64, 1..=RUN_MAX, prop::collection::vec(hash(), 0..5), any::<u8>());
    (prop::collection::vec(entry(), 0..4), prop::collection::vec(warrant, 0..4)).prop_map(|(entries, warrants)| {
        let origins = entries.iter().map(|entry| &entry.version.dot.origin).cycle();
        let warrants = origins.zip(warrants).map(|(origin, (first, count, hashes, byte))| Warrant {
            run: Run { origin: origin.clone(), first, count },
            signature: [byte; SIGNATURE_BYTES],
            hashes,
        });
        let warrants = warrants.collect();
        (entries, warrants)
    })
}

fn vouchers() -> impl Strategy<Value = Message> {
    let voucher = (entry(), any::<[u8; 32]>(), any::<u64>(), prop::collection::vec(any::<u8>(), 0..40));
    prop::collection::vec(voucher, 0..4).prop_map(|given| {
        let voucher = |(entry, key, at_ms, proof): (Entry, _, _, Vec<u8>)| Voucher {
            origin: entry.version.dot.origin,
            key: PublicKey(key),
            at_ms,
            proof: proof.into(),
        };
        Message::Vouch(given.into_iter().map(voucher).collect())
    })
}

fn messages() -> impl Strategy<Value = Message> {
    let reason = prop::sample::select(vec![Reason::Push, Reason::CatchUp, Reason::Repair]);
    let places = || prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from);
    prop_oneof![
        (any::<u16>(), any::<u16>(), vectors(), reaches()).prop_map(|(min, max, vector, reach)| Message::Hello {
            versions: Versions { min, max },
            node: "fra-1".parse().unwrap(),
            vector,
            reach,
        }),
        (reason, any::<u64>(), proved(), prop::option::of(vectors())).prop_map(
            |(reason, cut, (entries, warrants), complete)| Message::Batch {
                reason,
                cut: Stamp(cut),
                entries,
                warrants,
                complete
            }
        ),
        announcements(),
        places().prop_map(|after| Message::Ask { after }),
        (reaches(), vectors(), proved(), prop::option::of(places())).prop_map(
            |(reach, vector, (entries, warrants), upto)| Message::Snapshot { reach, vector, entries, warrants, upto }
        ),
        proofs(),
        vouchers(),
        (prop::collection::btree_set(any::<u64>(), 0..9), prop::collection::vec(entry(), 0..3)).prop_map(
            |(items, entries)| {
                let mut items: Vec<Item> = items.into_iter().collect();
                items.sort_unstable_by_key(|item| {
                    item & 0xffff << 48 | (item & 0xff_ffff_ffff) << 8 | item >> 40 & 0xff
                });
                Message::Want { items, keys: entries.into_iter().map(|entry| entry.key).collect() }
            }
        ),
    ]
}

proptest! {
    #[test]
    fn what_was_encoded_is_decoded(message in messages()) {
        let frame = encode(&message);
        let field: [u8; LENGTH_BYTES] = frame[..LENGTH_BYTES].try_into().unwrap();
        prop_assert_eq!(frame_length(field).unwrap(), frame.len() - LENGTH_BYTES);
        prop_assert_eq!(decode(frame.slice(LENGTH_BYTES..)), Ok(Some(message)));
    }

    #[test]
    fn garbage_never_panics(kind in 0_u8..12, body in prop::collection::vec(any::<u8>(), 0..512)) {
        let mut bytes = vec![kind];
        bytes.extend_from_slice(&body);
        let _either = decode(bytes.into());
    }

    #[test]
    fn a_damaged_frame_never_panics(message in messages(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut bytes = encode(&message)[LENGTH_BYTES..].to_vec();
        let at = at.index(bytes.len());
        bytes[at] = byte;
        let _either = decode(bytes.clone().into());
        bytes.truncate(at);
        let _either = decode(bytes.into());
    }
}

#[test]
fn limits_are_refused_before_anything_is_allocated() {
    assert_eq!(frame_length([0xff; 4]), Err(WireError::TooLong { bytes: 0xffff_ffff }));
    assert!(frame_length(u32::try_from(FRAME_BYTES_MAX).unwrap().to_be_bytes()).is_ok());
    let announce = [&[TYPE_ANNOUNCE][..], &u32::MAX.to_be_bytes()].concat();
    assert_eq!(decode(announce.into()), Err(WireError::Origins(0xffff_ffff)));
    assert!(decode(Bytes::new()).is_err());
}

#[test]
fn unknown_types_are_skipped_unless_critical() {
    assert_eq!(decode(Bytes::from_static(&[0x7f, 1, 2])), Ok(None));
    assert_eq!(decode(Bytes::from_static(&[0x80, 1, 2])), Err(WireError::Critical(0x80)));
}

#[test]
fn versions_agree_on_the_newest_that_both_speak() {
    let range = |min, max| Versions { min, max };
    assert_eq!(range(1, 3).agree(range(2, 5)), Some(3));
    assert_eq!(range(1, 1).agree(range(2, 3)), None);
    assert_eq!(range(4, 6).agree(range(2, 4)), Some(4));
}

/// What version 3 is, byte by byte, and what version 4 adds: a change here is a new version.
#[test]
fn the_bytes_of_versions_3_and_4_are_these() {
    let origin = Origin { node: "a".parse().unwrap(), incarnation: 2 };
    let vector = VersionVector::from_iter([(origin.clone(), 3)]);
    let reach = Reach { cut: Stamp(7), floor: Stamp(5) };
    let entry = |stamp, seq, prev, expires_ms, content| Entry {
        key: Key { store: "app/s".parse().unwrap(), name: "k".into() },
        version: crate::entry::Version { stamp: Stamp(stamp), dot: crate::entry::Dot { origin: origin.clone(), seq } },
        prev,
        expires_ms,
        content,
    };
    let entries = vec![
        entry(1 << 16, 1, 0, Some(9), crate::entry::Content::Value(Bytes::from_static(b"v"))),
        entry(2 << 16, 2, 0xa, None, crate::entry::Content::Tombstone),
    ];
    let warrants = vec![Warrant {
        run: Run { origin: origin.clone(), first: 1, count: 3 },
        signature: [0xcc; SIGNATURE_BYTES],
        hashes: vec![[0xdd; 16]],
    }];
    let proof = Bytes::from_static(b"p");
    let voucher = Voucher { origin: origin.clone(), key: PublicKey([0xee; 32]), at_ms: 5, proof };
    let fresh =
        |reason| Message::Batch { reason, cut: Stamp(7), entries: Vec::new(), warrants: Vec::new(), complete: None };
    let golden = [
        (
            Message::Vouch(vec![voucher]),
            "0a010001610000000000000002eeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeeee\
             0000000000000005000170",
        ),
        (
            Message::Hello {
                versions: Versions { min: 3, max: 3 },
                node: origin.node.clone(),
                vector: vector.clone(),
                reach,
            },
            "01000300030001610000000100016100000000000000020000000000000003\
             00000000000000070000000000000005",
        ),
        (
            Message::Batch {
                reason: Reason::CatchUp,
                cut: Stamp(7),
                entries,
                warrants,
                complete: Some(vector.clone()),
            },
            "0201000000000000000701000000010001610000000000000002000000000000000301056170702f730100016100\
             0000000000000202210\
             0016b00028080081001761000016b00028080080000000a\
             0100020301dddddddddddddddddddddddddddddddd\
             cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc\
             cccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccccc",
        ),
        (
            Message::Announce {
                changed: vector,
                reach,
                ping: Ping { sent_ms: 300, echo_ms: 1, held_ms: 0 },
                rows: vec![Row { origin, promise: Stamp(9), seq: 3, cut: Stamp(8), rest: 1, floor: Stamp(6) }],
            },
            "03000000010001610000000000000002000000000000000300000000000000070000000000000005ac0201000100016100\
             0000000000000200000000000000090300000000000000080000000000000001\
             0000000000000006",
        ),
        (Message::Ask { after: Bytes::from_static(b"d") }, "040164"),
        (fresh(Reason::Push), "020000000000000000070000000000"),
        (fresh(Reason::Relay), "020300000000000000070000000000"),
        (fresh(Reason::Relayed), "020400000000000000070000000000"),
    ];
    for (message, expected) in golden {
        let frame = encode(&message);
        let hex: String = frame[LENGTH_BYTES..].iter().map(|byte| format!("{byte:02x}")).collect();
        assert_eq!(hex, expected, "{message:?}");
    }
}

#[test]
fn an_entry_takes_16_bytes_besides_its_key_and_value() {
    let origins = ["fra-1", "iad-1"].map(|node| Origin { node: node.parse().unwrap(), incarnation: 1 << 60 });
    let entries: Vec<Entry> = (0..10_000_u64)
        .map(|number| Entry {
            key: Key { store: "app/default".parse().unwrap(), name: format!("key-{number:06}") },
            version: crate::entry::Version {
                stamp: Stamp::at_ms(1_700_000_000_000 + number * 3),
                dot: crate::entry::Dot { origin: origins[usize::from(number % 2 == 0)].clone(), seq: 1 + number / 2 },
            },
            prev: u32::MAX,
            expires_ms: None,
            content: crate::entry::Content::Value(Bytes::from_static(&[7; 100])),
        })
        .collect();
    let signature = [7; SIGNATURE_BYTES];
    let warrants = |entries: &[Entry], run: usize| -> Vec<Warrant> {
        let of = |origin: &Origin| {
            let seqs = entries.iter().map(|entry| &entry.version.dot).filter(|dot| dot.origin == *origin);
            let firsts = seqs.map(|dot| dot.seq).step_by(run).collect::<Vec<_>>();
            let origin = origin.clone();
            firsts.into_iter().map(move |first| Run { origin: origin.clone(), first, count: run })
        };
        origins.iter().flat_map(of).map(|run| Warrant { run, signature, hashes: Vec::new() }).collect()
    };
    // As many writers at a time as share a flush, and one.
    for (run, most) in [(RUN_MAX, 16.0), (1, 82.0)] {
        let batch = |entries: &[Entry]| Message::Batch {
            reason: Reason::CatchUp,
            cut: Stamp(7),
            entries: entries.to_vec(),
            warrants: warrants(entries, run),
            complete: None,
        };
        let bytes: usize = entries.chunks(512).map(|entries| encode(&batch(entries)).len()).sum();
        let each = (bytes - entries.len() * 110) as f64 / entries.len() as f64;
        eprintln!("{each:.1} bytes for each entry besides key and value, {run} signed together");
        assert!(each <= most, "{each}");
    }
}
