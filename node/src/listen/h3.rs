//! HTTP/3 on a QUIC connection (RFC 9114), with QPACK's static table (RFC 9204) and priorities (RFC 9218).
//!
//! What a client sends is read by parsers that know no sockets: [`control`] for streams in one direction, [`frames`] for a
//! request's stream, [`section`] and [`message`] for its head. They keep little, and say which rule was broken and what that
//! costs. Around them, [`connection`] takes requests and leaves in good order, and [`exchange`] goes from a request to its
//! answer by [`receive`] and [`send`].
//!
//! Absent: QPACK's dynamic table (our capacity is 0), server push, datagrams, extended CONNECT (RFC 9220), answers of 1xx.

mod code;
mod integer;

mod control;
mod frames;

mod huffman;
mod message;
mod priority;
mod section;
mod table;

mod glitches;
mod pace;
mod shared;

mod connection;
mod exchange;
mod receive;
mod send;

pub(super) use code::Code;
pub(super) use connection::connection;
pub(super) use shared::Proof;
