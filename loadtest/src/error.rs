//! Why a run could not start, why a connection could not open, and why a request failed.

use std::fmt;
use std::io;

use serde::{Deserialize, Serialize};

use crate::options::Protocol;

/// A run that could not start. Nothing was sent but, at most, handshakes.
#[derive(Debug, thiserror::Error)]
pub enum LoadError {
    /// A list that must name at least one thing is empty.
    #[error("no {what} given")]
    Empty {
        /// What is missing.
        what: &'static str,
    },
    /// A number is outside of its limits.
    #[error("{what} is {given}, allowed are {min} to {max}")]
    Limit {
        /// The option.
        what: &'static str,
        /// What was asked for.
        given: u128,
        /// The smallest allowed value.
        min: u128,
        /// The largest allowed value.
        max: u128,
    },
    /// HTTP/3 was asked for on a target without TLS, which does not exist.
    #[error("target {target} is plain http, which has no h3: give it https or leave h3 out of the mix")]
    PlainH3 {
        /// The target.
        target: String,
    },
    /// An https target without anything to judge its certificate by.
    #[error("target {target} is https and no trusted certificate authority is given")]
    NoRoots {
        /// The target.
        target: String,
    },
    /// A certificate given as a trusted authority cannot be one.
    #[error("trusted certificate {index} cannot be used")]
    Root {
        /// Its place in the list, from 0.
        index: usize,
        /// What is wrong with it.
        #[source]
        source: rustls::Error,
    },
    /// A host that can be neither a TLS server name nor an authority.
    #[error("host {host:?} is not a host name or address")]
    Host {
        /// The host as given.
        host: String,
    },
    /// A request class that cannot be written as an HTTP request.
    #[error("request class {class:?}: {problem}")]
    Class {
        /// The name of the class.
        class: String,
        /// What is wrong.
        problem: String,
    },
    /// TLS could not be set up on this side.
    #[error("set up tls")]
    Tls(#[source] rustls::Error),
    /// The run was told to stop before its connections were open.
    #[error("stopped before the first request")]
    Stopped,
    /// The pacing thread could not be started.
    #[error("start the pacing thread")]
    Thread(#[source] io::Error),
    /// Not one connection of this protocol could be opened before the run.
    #[error("{target} is not reachable over {protocol}")]
    Unreachable {
        /// The target.
        target: String,
        /// The protocol that was tried.
        protocol: Protocol,
        /// What happened.
        #[source]
        source: ConnectError,
    },
}

/// Why one connection could not be opened.
#[derive(Debug, thiserror::Error)]
pub enum ConnectError {
    /// No TCP connection.
    #[error("tcp connect")]
    Tcp(#[source] io::Error),
    /// No UDP socket for QUIC.
    #[error("udp socket")]
    Udp(#[source] io::Error),
    /// The TLS handshake failed.
    #[error("tls handshake")]
    Tls(#[source] io::Error),
    /// The server chose another protocol, or none.
    #[error("the server did not agree to {wanted}")]
    Alpn {
        /// The protocol that was offered.
        wanted: Protocol,
    },
    /// The HTTP handshake failed.
    #[error("http handshake")]
    Http(#[source] hyper::Error),
    /// The QUIC connection could not be started.
    #[error("quic connect")]
    QuicStart(#[source] quinn::ConnectError),
    /// The QUIC handshake failed.
    #[error("quic handshake")]
    Quic(#[source] quinn::ConnectionError),
    /// The HTTP/3 handshake failed.
    #[error("h3 handshake")]
    H3(#[source] h3::error::ConnectionError),
    /// The handshake took too long.
    #[error("no connection within {ms} ms")]
    Timeout {
        /// The time allowed.
        ms: u128,
    },
    /// The last attempt failed a moment ago, so this one was not made.
    #[error("the last attempt failed less than {ms} ms ago")]
    Pause {
        /// The pause between a failed attempt and the next one.
        ms: u128,
    },
}

/// Why a request has no answer.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ErrorKind {
    /// No connection to send it on.
    Connect,
    /// The connection or the stream ended before the answer was whole.
    Closed,
    /// The server broke the protocol.
    Protocol,
    /// No whole answer within the timeout, counted from the time it was due.
    Timeout,
    /// Generator saturated: as many requests as allowed were in flight, so it was never sent.
    Saturated,
    /// The run was stopped before the answer came.
    Stopped,
}

impl fmt::Display for ErrorKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            ErrorKind::Connect => "connect",
            ErrorKind::Closed => "closed",
            ErrorKind::Protocol => "protocol",
            ErrorKind::Timeout => "timeout",
            ErrorKind::Saturated => "generator saturated",
            ErrorKind::Stopped => "stopped",
        })
    }
}
