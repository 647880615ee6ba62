//! What is asked of a home, or of a node that holds a store, and what it answers: one frame each way, on a stream of its
//! own.
//!
//! A stream for each question, beside the one that replication has: a large value holds up no other, neither is behind
//! what waits to be replicated, and a question whose asker went away ends with its stream.

mod call;

use bytes::{BufMut as _, Bytes};
use selvage_config::{NodeName, StoreName};

use super::Claimed;
use super::row::{Grant, Held, claims, grants, put_claims, put_grants};
use crate::entry::{Dot, EntryError, Fields, KEY_BYTES_MAX};
use crate::replica::Written;
use crate::store::{Kept, LARGE_BYTES_MAX, Listed, METADATA_BYTES_MAX, Terms};
use crate::vector::VersionVector;
use crate::wire::entries::{bytes, number, put_bytes, put_number, put_signed, signed};
use crate::wire::{PLACEMENTS_SINCE, QUESTIONS_SINCE, WireError, put_vector, vector};

pub(crate) use self::call::Call;

/// Longest question or answer, bytes: the largest value, what is said of it, and for an answer a vector.
pub(crate) const FRAME_BYTES_MAX: usize = LARGE_BYTES_MAX + 2 * 1024 * 1024;

/// Bytes of the hash by which a value is compared.
pub(crate) const HASH_BYTES: usize = 32;

/// Longest reason in an answer, bytes.
const WHY_BYTES_MAX: usize = 1024;

/// To be the home of a store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Claim {
    pub(crate) store: StoreName,
    /// As which home.
    pub(crate) term: u64,
    /// In which life of the claimant.
    pub(crate) incarnation: u64,
}

/// What a node says that makes way for a home.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Released {
    /// As which home it decided last.
    pub(crate) held: Option<u64>,
    /// Which home it was told of before.
    pub(crate) before: Option<(u64, NodeName)>,
    /// As which homes it asked others to make way.
    pub(crate) claims: Vec<Held>,
    /// Whom it made way for before.
    pub(crate) grants: Vec<Grant>,
    /// What it has.
    pub(crate) vector: VersionVector,
}

/// What is asked for of a key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Op {
    /// Its value.
    Read,
    /// To set it.
    Set { value: Bytes, terms: Terms },
    /// To set it if this is the newest write, or it does not exist.
    SetIf { value: Bytes, terms: Terms, seen: Option<Dot> },
    /// To set it if this is the SHA-256 of its value, or it does not exist.
    Swap { value: Bytes, seen: Option<[u8; HASH_BYTES]> },
    /// To delete it.
    Delete,
    /// To count.
    Increment { delta: i64, expires_ms: Option<u64> },
}

impl Op {
    /// Bytes that it carries.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Set { value, terms } | Self::SetIf { value, terms, .. } => value.len() + terms.metadata.len(),
            Self::Swap { value, .. } => value.len(),
            Self::Read | Self::Delete | Self::Increment { .. } => 0,
        }
    }
}

/// A question.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Request {
    /// Make way.
    Claim(Claim),
    /// Do this, as the home of at least this term.
    Do { store: StoreName, term: u64, key: String, op: Op },
    /// Do this, as a node that holds the store, for one that does not.
    Call { store: StoreName, call: Call },
}

/// What became of an operation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It was written.
    Written(Written),
    /// What stands there is not what was expected; nothing was written.
    Changed,
    /// What stands there.
    Found(Option<Kept>),
}

/// An answer.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Answer {
    /// To a claim.
    Claimed(Claimed),
    /// It was decided.
    Done(Outcome),
    /// This node decides no writes of the store; as far as it knows that one does.
    NotHome { home: NodeName, term: u64 },
    /// This node is the home and waits for what those before it had, or its plan is older than the asker's.
    NotYet,
    /// Nothing was written: the home has too much to do.
    Overloaded,
    /// Why it could not be done.
    Failed(String),
    /// This node does not hold the store, as far as it knows.
    NotHeld,
    /// Whether there is such a key.
    Has(bool),
    /// Keys in order.
    Listed(Vec<Listed>),
}

const CLAIM: u8 = 1;
const DO: u8 = 2;
const CALL: u8 = 3;

const READ: u8 = 0;
const SET: u8 = 1;
const SET_IF: u8 = 2;
const SWAP: u8 = 3;
const DELETE: u8 = 4;
const INCREMENT: u8 = 5;

impl Request {
    /// The first version of the protocol that knows it.
    pub(crate) fn since(&self) -> u16 {
        match self {
            Self::Claim(_) | Self::Do { .. } => QUESTIONS_SINCE,
            Self::Call { .. } => PLACEMENTS_SINCE,
        }
    }

    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Vec::new();
        match self {
            Self::Claim(claim) => {
                out.put_u8(CLAIM);
                put_bytes(&mut out, claim.store.as_str().as_bytes());
                out.put_u64(claim.term);
                out.put_u64(claim.incarnation);
            }
            Self::Do { store, term, key, op } => {
                out.put_u8(DO);
                put_bytes(&mut out, store.as_str().as_bytes());
                out.put_u64(*term);
                put_bytes(&mut out, key.as_bytes());
                put_op(&mut out, op);
            }
            Self::Call { store, call } => {
                out.put_u8(CALL);
                put_bytes(&mut out, store.as_str().as_bytes());
                call.encode(&mut out);
            }
        }
        out.into()
    }

    pub(crate) fn decode(body: Bytes) -> Result<Self, WireError> {
        let mut fields = Fields::of(body);
        let kind = fields.u8()?;
        let store = StoreName::try_from(text(&mut fields, KEY_BYTES_MAX, "store")?);
        let store = store.map_err(|_| EntryError::Field("store"))?;
        let fields = &mut fields;
        let request = match kind {
            CLAIM => Self::Claim(Claim { store, term: fields.u64()?, incarnation: fields.u64()? }),
            DO => Self::Do { store, term: fields.u64()?, key: text(fields, KEY_BYTES_MAX, "key")?, op: op(fields)? },
            CALL => Self::Call { store, call: Call::decode(fields)? },
            _ => return Err(EntryError::Field("question").into()),
        };
        fields.end()?;
        Ok(request)
    }
}

fn put_op(out: &mut Vec<u8>, op: &Op) {
    match op {
        Op::Read => out.put_u8(READ),
        Op::Set { value, terms } => {
            out.put_u8(SET);
            put_terms(out, terms);
            put_bytes(out, value);
        }
        Op::SetIf { value, terms, seen } => {
            out.put_u8(SET_IF);
            put_terms(out, terms);
            put_option(out, seen.as_ref(), put_dot);
            put_bytes(out, value);
        }
        Op::Swap { value, seen } => {
            out.put_u8(SWAP);
            put_option(out, seen.as_ref(), |out, seen| out.put_slice(seen));
            put_bytes(out, value);
        }
        Op::Delete => out.put_u8(DELETE),
        Op::Increment { delta, expires_ms } => {
            out.put_u8(INCREMENT);
            put_signed(out, *delta);
            put_option(out, *expires_ms, |out, ms| out.put_u64(ms));
        }
    }
}

fn op(fields: &mut Fields) -> Result<Op, EntryError> {
    let value = |fields: &mut Fields| bytes(fields, LARGE_BYTES_MAX, "value");
    Ok(match fields.u8()? {
        READ => Op::Read,
        SET => Op::Set { terms: terms(fields)?, value: value(fields)? },
        SET_IF => Op::SetIf { terms: terms(fields)?, seen: option(fields, dot)?, value: value(fields)? },
        SWAP => Op::Swap { seen: option(fields, hash)?, value: value(fields)? },
        DELETE => Op::Delete,
        INCREMENT => Op::Increment { delta: signed(fields)?, expires_ms: option(fields, Fields::u64)? },
        _ => return Err(EntryError::Field("operation")),
    })
}

const RELEASED: u8 = 1;
const CLAIM_NOT_YET: u8 = 2;
const ELSEWHERE: u8 = 3;
const WRITTEN: u8 = 4;
const CHANGED: u8 = 5;
const FOUND: u8 = 6;
const NOT_HOME: u8 = 7;
const NOT_YET: u8 = 8;
const OVERLOADED: u8 = 9;
const FAILED: u8 = 10;
const NOT_HELD: u8 = 11;
const HAS: u8 = 12;
const LISTED: u8 = 13;

impl Answer {
    pub(crate) fn encode(&self) -> Bytes {
        let mut out = Vec::new();
        match self {
            Self::Claimed(Claimed::Released(released)) => {
                out.put_u8(RELEASED);
                put_option(&mut out, released.held, |out, held| out.put_u64(held));
                put_option(&mut out, released.before.as_ref(), |out, (term, node)| {
                    out.put_u64(*term);
                    put_name(out, node);
                });
                put_claims(&mut out, &released.claims);
                put_grants(&mut out, &released.grants);
                put_vector(&mut out, &released.vector);
            }
            Self::Claimed(Claimed::NotYet) => out.put_u8(CLAIM_NOT_YET),
            Self::Claimed(Claimed::Elsewhere { home, term }) => put_place(&mut out, ELSEWHERE, home, *term),
            Self::Done(Outcome::Written(written)) => {
                out.put_u8(WRITTEN);
                put_dot(&mut out, &written.dot);
                put_option(&mut out, written.counted, put_signed);
            }
            Self::Done(Outcome::Changed) => out.put_u8(CHANGED),
            Self::Done(Outcome::Found(found)) => {
                out.put_u8(FOUND);
                put_option(&mut out, found.as_ref(), |out, kept| {
                    put_terms(out, &kept.terms);
                    put_dot(out, &kept.version);
                    put_bytes(out, &kept.value);
                });
            }
            Self::NotHome { home, term } => put_place(&mut out, NOT_HOME, home, *term),
            Self::NotYet => out.put_u8(NOT_YET),
            Self::Overloaded => out.put_u8(OVERLOADED),
            Self::Failed(why) => {
                out.put_u8(FAILED);
                put_bytes(&mut out, &why.as_bytes()[..why.floor_char_boundary(WHY_BYTES_MAX)]);
            }
            Self::NotHeld => out.put_u8(NOT_HELD),
            Self::Has(has) => out.put_slice(&[HAS, u8::from(*has)]),
            Self::Listed(listed) => {
                out.put_u8(LISTED);
                call::put_listed(&mut out, listed);
            }
        }
        out.into()
    }

    pub(crate) fn decode(body: Bytes) -> Result<Self, WireError> {
        let mut fields = Fields::of(body);
        let fields = &mut fields;
        let answer = match fields.u8()? {
            RELEASED => {
                let held = option(fields, Fields::u64)?;
                let before = option(fields, |fields| Ok((fields.u64()?, fields.node()?)))?;
                let (claims, grants) = (claims(fields)?, grants(fields)?);
                Self::Claimed(Claimed::Released(Released { held, before, claims, grants, vector: vector(fields)? }))
            }
            CLAIM_NOT_YET => Self::Claimed(Claimed::NotYet),
            ELSEWHERE => Self::Claimed(Claimed::Elsewhere { home: fields.node()?, term: fields.u64()? }),
            WRITTEN => Self::Done(Outcome::Written(Written { dot: dot(fields)?, counted: option(fields, signed)? })),
            CHANGED => Self::Done(Outcome::Changed),
            FOUND => {
                let kept = |fields: &mut Fields| {
                    let (terms, version) = (terms(fields)?, dot(fields)?);
                    Ok(Kept { terms, version, value: bytes(fields, LARGE_BYTES_MAX, "value")? })
                };
                Self::Done(Outcome::Found(option(fields, kept)?))
            }
            NOT_HOME => Self::NotHome { home: fields.node()?, term: fields.u64()? },
            NOT_YET => Self::NotYet,
            OVERLOADED => Self::Overloaded,
            FAILED => Self::Failed(text(fields, WHY_BYTES_MAX, "reason")?),
            NOT_HELD => Self::NotHeld,
            HAS => Self::Has(option(fields, |_| Ok(()))?.is_some()),
            LISTED => Self::Listed(call::listed(fields)?),
            _ => return Err(EntryError::Field("answer").into()),
        };
        fields.end()?;
        Ok(answer)
    }
}

fn put_option<T>(out: &mut Vec<u8>, value: Option<T>, put: impl FnOnce(&mut Vec<u8>, T)) {
    out.put_u8(u8::from(value.is_some()));
    if let Some(value) = value {
        put(out, value);
    }
}

fn option<T>(
    fields: &mut Fields,
    get: impl FnOnce(&mut Fields) -> Result<T, EntryError>,
) -> Result<Option<T>, EntryError> {
    match fields.u8()? {
        0 => Ok(None),
        1 => get(fields).map(Some),
        _ => Err(EntryError::Field("option")),
    }
}

fn put_place(out: &mut Vec<u8>, kind: u8, home: &NodeName, term: u64) {
    out.put_u8(kind);
    put_name(out, home);
    out.put_u64(term);
}

/// As [`Fields::node`] reads it.
fn put_name(out: &mut Vec<u8>, node: &NodeName) {
    out.put_u16(u16::try_from(node.as_str().len()).expect("a name is 63 bytes at most"));
    out.put_slice(node.as_str().as_bytes());
}

fn put_dot(out: &mut Vec<u8>, dot: &Dot) {
    crate::entry::put_origin(out, &dot.origin);
    put_number(out, dot.seq);
}

fn dot(fields: &mut Fields) -> Result<Dot, EntryError> {
    Ok(Dot { origin: fields.origin()?, seq: number(fields)? })
}

fn put_terms(out: &mut Vec<u8>, terms: &Terms) {
    put_option(out, terms.expires_ms, |out, ms| out.put_u64(ms));
    put_bytes(out, &terms.metadata);
}

fn terms(fields: &mut Fields) -> Result<Terms, EntryError> {
    let expires_ms = option(fields, Fields::u64)?;
    Ok(Terms { expires_ms, metadata: bytes(fields, METADATA_BYTES_MAX, "metadata")? })
}

fn hash(fields: &mut Fields) -> Result<[u8; HASH_BYTES], EntryError> {
    let mut hash = [0; HASH_BYTES];
    hash.copy_from_slice(&fields.take(HASH_BYTES)?);
    Ok(hash)
}

fn text(fields: &mut Fields, bytes_max: usize, what: &'static str) -> Result<String, EntryError> {
    let bytes = bytes(fields, bytes_max, what)?;
    std::str::from_utf8(&bytes).map(str::to_owned).map_err(|_| EntryError::Field(what))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::entry::Origin;

    fn dots() -> impl Strategy<Value = Dot> {
        ("[a-z]{1,8}", any::<u64>(), any::<u64>()).prop_map(|(node, incarnation, seq)| Dot {
            origin: Origin { node: node.parse().unwrap(), incarnation },
            seq,
        })
    }

    fn values() -> impl Strategy<Value = Bytes> {
        prop::collection::vec(any::<u8>(), 0..40).prop_map(Bytes::from)
    }

    fn on_terms() -> impl Strategy<Value = Terms> {
        (any::<Option<u64>>(), values()).prop_map(|(expires_ms, metadata)| Terms { expires_ms, metadata })
    }

    fn requests() -> impl Strategy<Value = Request> {
        let ops = prop_oneof![
            Just(Op::Read),
            (values(), on_terms()).prop_map(|(value, terms)| Op::Set { value, terms }),
            (values(), on_terms(), prop::option::of(dots())).prop_map(|(value, terms, seen)| Op::SetIf {
                value,
                terms,
                seen
            }),
            (values(), any::<Option<[u8; HASH_BYTES]>>()).prop_map(|(value, seen)| Op::Swap { value, seen }),
            Just(Op::Delete),
            (any::<i64>(), any::<Option<u64>>()).prop_map(|(delta, expires_ms)| Op::Increment { delta, expires_ms }),
        ];
        let store = || StoreName::try_from("app/default".to_owned()).unwrap();
        prop_oneof![
            (any::<u64>(), any::<u64>()).prop_map(move |(term, incarnation)| Request::Claim(Claim {
                store: store(),
                term,
                incarnation
            })),
            (any::<u64>(), ".{0,20}", ops).prop_map(move |(term, key, op)| Request::Do {
                store: store(),
                term,
                key,
                op
            }),
            calls().prop_map(move |call| Request::Call { store: store(), call }),
        ]
    }

    fn calls() -> impl Strategy<Value = Call> {
        let seen = || {
            prop::option::of(dots()).prop_map(|dot| {
                let mut seen = crate::session::Token::default();
                dot.iter().for_each(|dot| seen.saw(dot));
                seen
            })
        };
        prop_oneof![
            (".{0,20}", seen(), any::<bool>()).prop_map(|(key, seen, must)| Call::Get { key, seen, must }),
            (".{0,20}", seen()).prop_map(|(key, seen)| Call::Has { key, seen }),
            (".{0,9}", prop::option::of(".{0,9}"), any::<u64>(), seen())
                .prop_map(|(prefix, after, limit, seen)| Call::List { prefix, after, limit, seen }),
            (".{0,20}", any::<i64>(), any::<Option<u64>>())
                .prop_map(|(key, delta, expires_ms)| Call::Do { key, op: Op::Increment { delta, expires_ms } }),
        ]
    }

    fn answers() -> impl Strategy<Value = Answer> {
        let place = || ("[a-z]{1,8}", any::<u64>()).prop_map(|(node, term)| (node.parse::<NodeName>().unwrap(), term));
        let helds = || (any::<u64>(), any::<u64>()).prop_map(|(term, incarnation)| Held { term, incarnation });
        let grant = (place(), helds()).prop_map(|((node, _), held)| Grant { node, held });
        let lists = (prop::collection::vec(helds(), 0..4), prop::collection::vec(grant, 0..4));
        let released = (any::<Option<u64>>(), prop::option::of(place()), lists, dots());
        let released = released.prop_map(|(held, before, (claims, grants), dot)| {
            let vector = VersionVector::from_iter([(dot.origin, dot.seq)]);
            Released { held, before: before.map(|(node, term)| (term, node)), claims, grants, vector }
        });
        let listed = (".{0,9}", any::<u32>(), any::<u64>(), prop::option::of("[a-z]{1,8}"));
        let listed = listed.prop_map(|(name, bytes, stamp_ms, node)| Listed {
            name,
            bytes: bytes as usize,
            stamp_ms,
            node: node.map(|node| node.parse().unwrap()),
        });
        let kept = (values(), on_terms(), dots()).prop_map(|(value, terms, version)| Kept { value, terms, version });
        prop_oneof![
            released.prop_map(|released| Answer::Claimed(Claimed::Released(released))),
            prop::sample::select(vec![
                Answer::Claimed(Claimed::NotYet),
                Answer::Done(Outcome::Changed),
                Answer::NotYet,
                Answer::Overloaded,
                Answer::NotHeld,
                Answer::Has(false),
                Answer::Has(true),
            ]),
            prop::collection::vec(listed, 0..4).prop_map(Answer::Listed),
            place().prop_map(|(home, term)| Answer::Claimed(Claimed::Elsewhere { home, term })),
            place().prop_map(|(home, term)| Answer::NotHome { home, term }),
            (dots(), any::<Option<i64>>())
                .prop_map(|(dot, counted)| Answer::Done(Outcome::Written(Written { dot, counted }))),
            prop::option::of(kept).prop_map(|kept| Answer::Done(Outcome::Found(kept))),
            ".{0,40}".prop_map(Answer::Failed),
        ]
    }

    proptest! {
        #[test]
        fn questions_and_answers_come_back(request in requests(), answer in answers()) {
            prop_assert_eq!(Request::decode(request.encode()).unwrap(), request);
            prop_assert_eq!(Answer::decode(answer.encode()).unwrap(), answer);
        }

        #[test]
        fn what_is_cut_short_or_too_long_is_refused(request in requests(), answer in answers(), at: prop::sample::Index) {
            let (question, said) = (request.encode(), answer.encode());
            prop_assert!(Request::decode(question.slice(..at.index(question.len()))).is_err());
            prop_assert!(Answer::decode(said.slice(..at.index(said.len()))).is_err());
            prop_assert!(Request::decode([&question[..], &[0]].concat().into()).is_err());
            prop_assert!(Answer::decode([&said[..], &[0]].concat().into()).is_err());
        }

        #[test]
        fn garbage_never_panics(garbage: Vec<u8>) {
            let _ = Request::decode(garbage.clone().into());
            let _ = Answer::decode(garbage.into());
        }
    }

    fn hex(bytes: &Bytes) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    #[test]
    fn the_wire_is_fixed_byte_by_byte() {
        let store: StoreName = "a/s".parse().unwrap();
        let claim = Claim { store: store.clone(), term: 9, incarnation: 2 };
        let swap = Op::Swap { value: Bytes::from_static(b"v"), seen: None };
        let asked = Request::Do { store, term: 9, key: "k".into(), op: swap };
        assert_eq!(hex(&Request::Claim(claim).encode()), "0103612f7300000000000000090000000000000002");
        assert_eq!(hex(&asked.encode()), "0203612f730000000000000009016b03000176");
        let seen = || "a.2.3".parse().unwrap();
        let call = |call| hex(&Request::Call { store: "a/s".parse().unwrap(), call }.encode());
        let get = Call::Get { key: "k".into(), seen: seen(), must: false };
        assert_eq!(call(get), "0303612f73 00 016b 05612e322e33".replace(' ', ""));
        let list = Call::List { prefix: "k".into(), after: None, limit: 300, seen: Default::default() };
        assert_eq!(call(list), "0303612f73 03 016b 00 ac02 00".replace(' ', ""));
        let delete = Call::Do { key: "k".into(), op: Op::Delete };
        assert_eq!(call(delete), "0303612f73 04 016b 04".replace(' ', ""));
        let listed = Listed { name: "k".into(), bytes: 5, stamp_ms: 7, node: Some("a".parse().unwrap()) };
        assert_eq!(hex(&Answer::Listed(vec![listed]).encode()), "0d 01 016b 05 07 01 000161".replace(' ', ""));
        assert_eq!((hex(&Answer::NotHeld.encode()), hex(&Answer::Has(true).encode())), ("0b".into(), "0c01".into()));
        let dot = Dot { origin: Origin { node: "a".parse().unwrap(), incarnation: 2 }, seq: 3 };
        let vector = VersionVector::from_iter([(dot.origin.clone(), 3)]);
        let grant = Grant { node: "b".parse().unwrap(), held: Held { term: 3, incarnation: 1 } };
        let released = Released { held: Some(4), before: None, claims: Vec::new(), grants: vec![grant], vector };
        assert_eq!(
            hex(&Answer::Claimed(Claimed::Released(released)).encode()),
            "010100000000000000040000 01 0162 0000000000000003 0000000000000001 \
             00000001 000161 0000000000000002 0000000000000003"
                .replace(' ', "")
        );
        let written = Written { dot, counted: Some(-1) };
        assert_eq!(
            hex(&Answer::Done(Outcome::Written(written)).encode()),
            "04000161000000000000000203 01 01".replace(' ', "")
        );
        assert_eq!(hex(&Answer::NotHome { home: "a".parse().unwrap(), term: 9 }.encode()), "070001610000000000000009");
    }

    #[test]
    fn a_long_reason_is_cut_at_a_character() {
        let answer = Answer::Failed("ä".repeat(WHY_BYTES_MAX));
        let Answer::Failed(why) = Answer::decode(answer.encode()).unwrap() else { panic!("another answer") };
        assert_eq!(why.len(), WHY_BYTES_MAX);
    }
}
