//! What a node asks that does not hold a store, of one that does.

use bytes::BufMut as _;

use super::{Op, op, option, put_name, put_op, put_option, text};
use crate::entry::{EntryError, Fields, KEY_BYTES_MAX};
use crate::session::{TOKEN_BYTES_MAX, Token};
use crate::store::{LIST_MAX, Listed};
use crate::wire::entries::{length, number, put_bytes, put_number};

/// What is asked for.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    /// The value of a key, once what a session saw is there; or soon, unless it must be.
    Get { key: String, seen: Token, must: bool },
    /// Whether there is such a key.
    Has { key: String, seen: Token },
    /// Keys in order, with facts on each.
    List { prefix: String, after: Option<String>, limit: u64, seen: Token },
    /// What whoever decides for the store is to decide.
    Do { key: String, op: Op },
}

const GET: u8 = 0;
const GET_SEEN: u8 = 1;
const HAS: u8 = 2;
const LIST: u8 = 3;
const DO: u8 = 4;

impl Call {
    /// Bytes of the value that it carries.
    pub(crate) fn bytes(&self) -> usize {
        match self {
            Self::Do { op, .. } => op.bytes(),
            Self::Get { .. } | Self::Has { .. } | Self::List { .. } => 0,
        }
    }

    /// Whether it changes nothing, so that it may be done twice.
    pub(crate) fn only_reads(&self) -> bool {
        match self {
            Self::Do { op, .. } => matches!(op, Op::Read),
            Self::Get { .. } | Self::Has { .. } | Self::List { .. } => true,
        }
    }

    pub(super) fn encode(&self, out: &mut Vec<u8>) {
        match self {
            Self::Get { key, seen, must } => {
                out.put_u8(if *must { GET_SEEN } else { GET });
                put_text(out, key);
                put_text(out, &seen.to_string());
            }
            Self::Has { key, seen } => {
                out.put_u8(HAS);
                put_text(out, key);
                put_text(out, &seen.to_string());
            }
            Self::List { prefix, after, limit, seen } => {
                out.put_u8(LIST);
                put_text(out, prefix);
                put_option(out, after.as_ref(), |out, after| put_text(out, after));
                put_number(out, *limit);
                put_text(out, &seen.to_string());
            }
            Self::Do { key, op } => {
                out.put_u8(DO);
                put_text(out, key);
                put_op(out, op);
            }
        }
    }

    pub(super) fn decode(fields: &mut Fields) -> Result<Self, EntryError> {
        let kind = fields.u8()?;
        let key = text(fields, KEY_BYTES_MAX, "key")?;
        Ok(match kind {
            GET | GET_SEEN => Self::Get { key, seen: token(fields)?, must: kind == GET_SEEN },
            HAS => Self::Has { key, seen: token(fields)? },
            LIST => Self::List {
                prefix: key,
                after: option(fields, |fields| text(fields, KEY_BYTES_MAX, "key"))?,
                limit: number(fields)?,
                seen: token(fields)?,
            },
            DO => Self::Do { key, op: op(fields)? },
            _ => return Err(EntryError::Field("call")),
        })
    }
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    put_bytes(out, text.as_bytes());
}

fn token(fields: &mut Fields) -> Result<Token, EntryError> {
    text(fields, TOKEN_BYTES_MAX, "token")?.parse().map_err(|_| EntryError::Field("token"))
}

pub(super) fn put_listed(out: &mut Vec<u8>, listed: &[Listed]) {
    put_number(out, listed.len() as u64);
    for Listed { name, bytes, stamp_ms, node } in listed {
        put_text(out, name);
        put_number(out, *bytes as u64);
        put_number(out, *stamp_ms);
        put_option(out, node.as_ref(), put_name);
    }
}

pub(super) fn listed(fields: &mut Fields) -> Result<Vec<Listed>, EntryError> {
    let mut listed = Vec::new();
    for _ in 0..length(fields, LIST_MAX, "keys")? {
        listed.push(Listed {
            name: text(fields, KEY_BYTES_MAX, "key")?,
            bytes: usize::try_from(number(fields)?).map_err(|_| EntryError::Field("length"))?,
            stamp_ms: number(fields)?,
            node: option(fields, Fields::node)?,
        });
    }
    Ok(listed)
}
