//! What peers say to each other: frames of a 4-byte length, a type byte and a body.
//!
//! The first frame of each side is a [`Message::Hello`] with the versions it speaks. Frames of unknown type are
//! skipped, unless their type says that they must be understood. Every decoder checks every length before it
//! reads or allocates, and garbage is an error, never a panic.

use bytes::{BufMut, Bytes};
use selvage_config::NodeName;

use crate::entry::{ENTRY_OVERHEAD_BYTES_MAX, Entry, EntryError, Fields, VALUE_BYTES_MAX, put_origin};
use crate::vector::{ORIGINS_MAX, VersionVector};

/// The protocol's name in the TLS handshake.
pub const ALPN: &[u8] = b"selvage-kv/1";

/// The versions this build speaks.
pub const VERSIONS: Versions = Versions { min: 1, max: 1 };

/// Longest frame after its length field, bytes.
pub const FRAME_BYTES_MAX: usize = 4 * 1024 * 1024;

/// Bytes of entries after which a batch is closed. One entry more may pass it.
pub const BATCH_BYTES: usize = 256 * 1024;

/// Bytes of a frame's length field.
pub const LENGTH_BYTES: usize = 4;

// A batch holds no more than this, so whatever we send fits a frame.
const _: () = assert!(BATCH_BYTES + VALUE_BYTES_MAX + ENTRY_OVERHEAD_BYTES_MAX + VECTOR_BYTES_MAX < FRAME_BYTES_MAX);
const VECTOR_BYTES_MAX: usize = ORIGINS_MAX * (2 + selvage_config::id::NAME_BYTES_MAX + 16) + 8;

const TYPE_HELLO: u8 = 1;
const TYPE_BATCH: u8 = 2;
const TYPE_ANNOUNCE: u8 = 3;
/// Types from here on must be understood: a peer that does not know one closes.
const TYPE_CRITICAL: u8 = 0x80;

/// A range of protocol versions, both ends included.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Versions {
    /// The oldest.
    pub min: u16,
    /// The newest.
    pub max: u16,
}

impl Versions {
    /// The newest version that both speak.
    pub fn agree(self, other: Self) -> Option<u16> {
        let newest = self.max.min(other.max);
        (newest >= self.min.max(other.min)).then_some(newest)
    }
}

/// One frame's meaning.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Message {
    /// Who speaks, how, and what it has.
    Hello {
        /// The versions it speaks.
        versions: Versions,
        /// Its name, which must be that of its certificate.
        node: NodeName,
        /// What it has.
        vector: VersionVector,
    },
    /// Entries, either pushed as they were written or read for a catch-up.
    Batch {
        /// The entries.
        entries: Vec<Entry>,
        /// At the end of a catch-up: with what came before, the receiver now has all of this.
        complete: Option<VersionVector>,
    },
    /// What the sender has by now.
    Announce {
        /// What it has.
        vector: VersionVector,
    },
}

/// A frame that is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum WireError {
    /// Longer than any frame may be.
    #[error("frame of {bytes} bytes, the limit is {FRAME_BYTES_MAX}")]
    TooLong {
        /// How long it says it is.
        bytes: usize,
    },
    /// Its type is unknown and must be understood.
    #[error("frame type {0} must be understood and is unknown")]
    Critical(u8),
    /// A vector of too many origins.
    #[error("vector of {0} origins, the limit is {ORIGINS_MAX}")]
    Origins(usize),
    /// A field is cut short or invalid.
    #[error("malformed frame")]
    Malformed(#[from] EntryError),
}

/// The length of the frame that a length field announces.
pub fn frame_length(field: [u8; LENGTH_BYTES]) -> Result<usize, WireError> {
    let bytes = usize::try_from(u32::from_be_bytes(field)).unwrap_or(usize::MAX);
    if bytes > FRAME_BYTES_MAX { Err(WireError::TooLong { bytes }) } else { Ok(bytes) }
}

/// The whole frame, length field included.
pub fn encode(message: &Message) -> Bytes {
    let mut out = vec![0; LENGTH_BYTES];
    match message {
        Message::Hello { versions, node, vector } => {
            out.put_u8(TYPE_HELLO);
            out.put_u16(versions.min);
            out.put_u16(versions.max);
            out.put_u16(u16::try_from(node.as_str().len()).expect("a name is 63 bytes at most"));
            out.put_slice(node.as_str().as_bytes());
            put_vector(&mut out, vector);
        }
        Message::Batch { entries, complete } => {
            out.put_u8(TYPE_BATCH);
            out.put_u8(u8::from(complete.is_some()));
            if let Some(vector) = complete {
                put_vector(&mut out, vector);
            }
            for entry in entries {
                let start = out.len();
                out.put_u32(0);
                entry.encode(&mut out);
                patch_length(&mut out, start);
            }
        }
        Message::Announce { vector } => {
            out.put_u8(TYPE_ANNOUNCE);
            put_vector(&mut out, vector);
        }
    }
    patch_length(&mut out, 0);
    out.into()
}

/// The message in a frame's `body` (type byte first, without the length field); none if it may be skipped.
pub fn decode(body: Bytes) -> Result<Option<Message>, WireError> {
    if body.len() > FRAME_BYTES_MAX {
        return Err(WireError::TooLong { bytes: body.len() });
    }
    let mut fields = Fields::of(body);
    let message = match fields.u8()? {
        TYPE_HELLO => {
            let versions = Versions { min: fields.u16()?, max: fields.u16()? };
            let node = fields.node()?;
            let vector = vector(&mut fields)?;
            // A newer version may append fields.
            return Ok(Some(Message::Hello { versions, node, vector }));
        }
        TYPE_BATCH => {
            let complete = match fields.u8()? {
                0 => None,
                1 => Some(vector(&mut fields)?),
                _ => return Err(EntryError::Field("complete").into()),
            };
            let mut entries = Vec::new();
            while !fields.is_empty() {
                let length = usize::try_from(fields.u32()?).map_err(|_| EntryError::Short)?;
                entries.push(Entry::decode(&fields.take(length)?)?);
            }
            Message::Batch { entries, complete }
        }
        TYPE_ANNOUNCE => Message::Announce { vector: vector(&mut fields)? },
        kind if kind >= TYPE_CRITICAL => return Err(WireError::Critical(kind)),
        _ => return Ok(None),
    };
    fields.end()?;
    Ok(Some(message))
}

fn patch_length(out: &mut [u8], start: usize) {
    let length = out.len() - start - LENGTH_BYTES;
    let length = u32::try_from(length).expect("a frame is 4 MiB at most");
    out[start..start + LENGTH_BYTES].copy_from_slice(&length.to_be_bytes());
}

fn put_vector(out: &mut Vec<u8>, vector: &VersionVector) {
    // What does not fit is left out: the receiver then has it sent once more, which is harmless.
    let count = vector.len().min(ORIGINS_MAX);
    out.put_u32(u32::try_from(count).expect("bounded above"));
    for (origin, seq) in vector.iter().take(count) {
        put_origin(out, origin);
        out.put_u64(seq);
    }
}

fn vector(fields: &mut Fields) -> Result<VersionVector, WireError> {
    let count = usize::try_from(fields.u32()?).unwrap_or(usize::MAX);
    if count > ORIGINS_MAX {
        return Err(WireError::Origins(count));
    }
    let mut pairs = Vec::new();
    for _ in 0..count {
        pairs.push((fields.origin()?, fields.u64()?));
    }
    Ok(pairs.into_iter().collect())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::entry::{Origin, tests::entry};
    use proptest::prelude::*;

    fn vectors() -> impl Strategy<Value = VersionVector> {
        prop::collection::vec(("[a-z]{1,8}", any::<u64>(), any::<u64>()), 0..6).prop_map(|pairs| {
            pairs
                .into_iter()
                .map(|(node, incarnation, seq)| (Origin { node: node.parse().unwrap(), incarnation }, seq))
                .collect()
        })
    }

    fn messages() -> impl Strategy<Value = Message> {
        prop_oneof![
            (any::<u16>(), any::<u16>(), vectors()).prop_map(|(min, max, vector)| Message::Hello {
                versions: Versions { min, max },
                node: "fra-1".parse().unwrap(),
                vector,
            }),
            (prop::collection::vec(entry(), 0..4), prop::option::of(vectors()))
                .prop_map(|(entries, complete)| Message::Batch { entries, complete }),
            vectors().prop_map(|vector| Message::Announce { vector }),
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
        fn garbage_never_panics(kind in 0_u8..6, body in prop::collection::vec(any::<u8>(), 0..512)) {
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

    #[test]
    fn the_bytes_of_an_announcement_are_these() {
        let vector = VersionVector::from_iter([(Origin { node: "a".parse().unwrap(), incarnation: 2 }, 3)]);
        let expected = [0, 0, 0, 24, 3, 0, 0, 0, 1, 0, 1, b'a', 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 3];
        assert_eq!(encode(&Message::Announce { vector }).as_ref(), expected);
    }
}
