//! Placeholder.
pub mod quic;
pub mod tcp;
