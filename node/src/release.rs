//! Placeholder.
pub mod activate;
pub mod compile;
pub mod fetch;
pub mod plan;
pub mod verify;
