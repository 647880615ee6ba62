//! What a peer can do wrong, and the code that the standard has for it.

use quinn::VarInt;

/// Codes of RFC 9114 8.1 and RFC 9204 6.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u32)]
pub(in crate::listen) enum Code {
    /// Nothing went wrong.
    NoError = 0x100,
    /// We can't go on.
    Internal = 0x102,
    /// A stream that this peer may not open, or not again.
    StreamCreation = 0x103,
    /// A control or QPACK stream ended.
    ClosedCriticalStream = 0x104,
    /// A frame where it must not stand.
    FrameUnexpected = 0x105,
    /// A frame that is not built as its type wants.
    Frame = 0x106,
    /// More than we bear.
    ExcessiveLoad = 0x107,
    /// An identifier that can't be.
    Id = 0x108,
    /// Settings that can't be.
    Settings = 0x109,
    /// No settings at the start.
    MissingSettings = 0x10a,
    /// A request that was not begun: it may be sent again.
    RequestRejected = 0x10b,
    /// The client went on without its answer.
    RequestCancelled = 0x10c,
    /// A request that ended too early.
    RequestIncomplete = 0x10d,
    /// A request against the rules.
    Message = 0x10e,
    /// A field section that can't be decoded.
    QpackDecompressionFailed = 0x200,
    /// Instructions of an encoder that can't be.
    QpackEncoderStream = 0x201,
    /// Instructions of a decoder that can't be.
    QpackDecoderStream = 0x202,
}

impl Code {
    /// The label in metrics.
    pub(super) fn as_str(self) -> &'static str {
        match self {
            Self::NoError => "no-error",
            Self::Internal => "internal",
            Self::StreamCreation => "stream-creation",
            Self::ClosedCriticalStream => "closed-critical-stream",
            Self::FrameUnexpected => "frame-unexpected",
            Self::Frame => "frame",
            Self::ExcessiveLoad => "excessive-load",
            Self::Id => "id",
            Self::Settings => "settings",
            Self::MissingSettings => "missing-settings",
            Self::RequestRejected => "request-rejected",
            Self::RequestCancelled => "request-cancelled",
            Self::RequestIncomplete => "request-incomplete",
            Self::Message => "message",
            Self::QpackDecompressionFailed => "qpack-decompression-failed",
            Self::QpackEncoderStream => "qpack-encoder-stream",
            Self::QpackDecoderStream => "qpack-decoder-stream",
        }
    }
}

impl From<Code> for VarInt {
    fn from(code: Code) -> Self {
        Self::from_u32(code as u32)
    }
}

/// What is lost by a wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Scope {
    /// The stream that it was on.
    Stream,
    /// The connection.
    Connection,
}

/// Something that a peer did wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{reason}")]
pub(super) struct Wrong {
    /// What is lost by it.
    pub(super) scope: Scope,
    /// What the peer is told.
    pub(super) code: Code,
    /// What the log is told.
    pub(super) reason: &'static str,
}

impl Wrong {
    pub(super) fn stream(code: Code, reason: &'static str) -> Self {
        Self { scope: Scope::Stream, code, reason }
    }

    pub(super) fn connection(code: Code, reason: &'static str) -> Self {
        Self { scope: Scope::Connection, code, reason }
    }

    /// RFC 9114 4.1.2.
    pub(super) fn malformed(reason: &'static str) -> Self {
        Self::stream(Code::Message, reason)
    }
}
