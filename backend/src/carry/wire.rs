//! What goes over the socket: a number of bytes, the number of these that are a JSON document, the document, and then the
//! values that it speaks of, as they are.
//!
//! The two sides are two versions of this program, so fields that one of them does not know are left out by it.

use std::io;

use bytes::{BufMut as _, Bytes, BytesMut};
use selvage_config::StoreName;
use selvage_sync::store::{LARGE_BYTES_MAX, LIST_MAX, METADATA_BYTES_MAX};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt as _};

use crate::store::KEY_BYTES_MAX;

/// Bytes in front of a frame: how long it is.
const LENGTH_BYTES: usize = 4;
/// How much longer JSON may make a string: each byte of it a `\u0000`.
const ESCAPED: usize = 6;
/// Longest document, bytes: a list of the longest keys.
const DOCUMENT_BYTES_MAX: usize = (LIST_MAX + 1) * (KEY_BYTES_MAX * ESCAPED + 4);
/// Longest frame, bytes: a value, the one that it shall replace, and metadata.
const FRAME_BYTES_MAX: usize = 2 * LARGE_BYTES_MAX + METADATA_BYTES_MAX + DOCUMENT_BYTES_MAX;

/// One call.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Question {
    pub(super) id: u64,
    pub(super) store: StoreName,
    #[serde(flatten)]
    pub(super) call: Call,
}

/// What is called. The values are beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "call", rename_all = "kebab-case")]
pub(super) enum Call {
    Get {
        key: String,
    },
    Latest {
        key: String,
    },
    Exists {
        key: String,
    },
    /// With the value and its metadata.
    Set {
        key: String,
        expires_ms: Option<u64>,
    },
    /// With the value and its metadata.
    SetIf {
        key: String,
        expires_ms: Option<u64>,
        seen: Option<String>,
    },
    /// With the value, and the one that was seen, if one was.
    Swap {
        key: String,
    },
    Delete {
        key: String,
    },
    Increment {
        key: String,
        delta: i64,
        expires_ms: Option<u64>,
    },
    List {
        prefix: String,
        after: Option<String>,
        limit: usize,
    },
}

/// What became of a call.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Reply {
    pub(super) id: u64,
    #[serde(flatten)]
    pub(super) answer: Answer,
}

/// The values are beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "answer", rename_all = "kebab-case")]
pub(super) enum Answer {
    /// With the value, if there is one.
    Value,
    /// With the value and its metadata.
    Kept {
        expires_ms: Option<u64>,
        version: String,
    },
    Nothing,
    Whether {
        is: bool,
    },
    Written {
        version: String,
    },
    Sum {
        sum: i64,
    },
    Keys {
        keys: Vec<String>,
    },
    /// A version that no read gave.
    UnknownVersion,
    /// Why not, as guests read it.
    Failed {
        why: String,
    },
}

/// A document with its values.
#[derive(Debug)]
pub(super) struct Frame<T> {
    pub(super) document: T,
    pub(super) values: Vec<Bytes>,
}

#[derive(Serialize, Deserialize)]
struct Framed<T> {
    #[serde(flatten)]
    document: T,
    /// How long each value is, bytes.
    #[serde(default)]
    values: Vec<usize>,
}

impl<T: Serialize> Frame<T> {
    pub(super) fn encode(self) -> io::Result<Bytes> {
        let lengths: Vec<usize> = self.values.iter().map(Bytes::len).collect();
        let in_values: usize = lengths.iter().sum();
        let document = serde_json::to_vec(&Framed { document: self.document, values: lengths })?;
        let bytes = LENGTH_BYTES + document.len() + in_values;
        let too_long = || io::Error::from(io::ErrorKind::FileTooLarge);
        let length = u32::try_from(bytes).ok().filter(|_| bytes <= FRAME_BYTES_MAX).ok_or_else(too_long)?;
        let mut frame = BytesMut::with_capacity(LENGTH_BYTES + bytes);
        frame.put_u32(length);
        frame.put_u32(u32::try_from(document.len()).map_err(|_| too_long())?);
        frame.put_slice(&document);
        self.values.iter().for_each(|value| frame.put_slice(value));
        Ok(frame.freeze())
    }
}

impl<T: DeserializeOwned> Frame<T> {
    /// The next one. None: the other side is done.
    pub(super) async fn read(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Self>> {
        let length = match stream.read_u32().await {
            Ok(length) => usize::try_from(length).unwrap_or(usize::MAX),
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof => return Ok(None),
            Err(error) => return Err(error),
        };
        let malformed = || io::Error::from(io::ErrorKind::InvalidData);
        if !(LENGTH_BYTES..=FRAME_BYTES_MAX).contains(&length) {
            return Err(malformed());
        }
        let mut bytes = vec![0; length];
        stream.read_exact(&mut bytes).await?;
        let mut bytes = Bytes::from(bytes);
        let document = bytes.split_to(LENGTH_BYTES);
        let document: [u8; LENGTH_BYTES] = document[..].try_into().map_err(|_| malformed())?;
        let document = usize::try_from(u32::from_be_bytes(document)).map_err(|_| malformed())?;
        if document > bytes.len() {
            return Err(malformed());
        }
        let Framed { document, values } = serde_json::from_slice(&bytes.split_to(document))?;
        let mut found = Vec::new();
        for value in values {
            if value > bytes.len() {
                return Err(malformed());
            }
            found.push(bytes.split_to(value));
        }
        if bytes.is_empty() { Ok(Some(Self { document, values: found })) } else { Err(malformed()) }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn question(call: Call, values: &[&'static [u8]]) -> Frame<Question> {
        let document = Question { id: 7, store: "app/label".parse().unwrap(), call };
        Frame { document, values: values.iter().map(|value| Bytes::from_static(value)).collect() }
    }

    #[tokio::test]
    async fn frames_come_back_as_they_went() {
        let calls = [
            (Call::Get { key: "k\0\"\u{10ffff}".into() }, &[][..]),
            (Call::Set { key: "k".into(), expires_ms: Some(u64::MAX) }, &[&b"\0value"[..], b""]),
            (Call::SetIf { key: String::new(), expires_ms: None, seen: Some("v".into()) }, &[b"", b"meta"]),
            (Call::Swap { key: "k".into() }, &[b"new", b"old"]),
            (Call::Increment { key: "k".into(), delta: i64::MIN, expires_ms: None }, &[]),
            (Call::List { prefix: "p".into(), after: None, limit: 3 }, &[]),
        ];
        let mut stream = Vec::new();
        for (call, values) in calls.clone() {
            stream.extend_from_slice(&question(call, values).encode().unwrap());
        }
        let mut stream = &stream[..];
        for (call, values) in calls {
            let read = Frame::<Question>::read(&mut stream).await.unwrap().unwrap();
            assert_eq!((read.document.id, read.document.store.as_str()), (7, "app/label"));
            assert_eq!((read.document.call, read.values), (call, values.iter().copied().map(Bytes::from).collect()));
        }
        assert!(Frame::<Question>::read(&mut stream).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_frame_is_refused() {
        let good = question(Call::Swap { key: "k".into() }, &[b"new", b"old"]).encode().unwrap();
        let with = |at: usize, byte: u8| {
            let mut bytes = good.to_vec();
            bytes[at] = byte;
            bytes
        };
        let refused = [
            good[..good.len() - 1].to_vec(),
            // Too long, too short, a document beyond the frame, a value too few.
            with(0, 0xff),
            with(3, 3),
            with(4, 0xff),
            with(3, good[3] - 1),
        ];
        for bytes in refused {
            assert!(Frame::<Question>::read(&mut &bytes[..]).await.is_err(), "{bytes:?}");
        }
        let long = Frame { document: (), values: vec![Bytes::from(vec![0; FRAME_BYTES_MAX])] };
        assert!(long.encode().is_err());
    }
}
