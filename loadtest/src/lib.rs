//! Synthetic traffic: an open-loop load generator for HTTP/1.1, HTTP/2 and HTTP/3.
//!
//! [`run`] draws a schedule from a seed, a thread hands each request out at the moment it is due, and the
//! latency of a request counts from that moment. A server that stalls therefore shows up in every request
//! that was due during the stall, not only in those that a busy connection still had room for. How late the
//! generator itself was is measured too, and a run in which it was too late says that it is not valid.
//!
//! A run reads: `options` (what is asked, checked once) → `schedule` (what is due when) → `pacer` (waits) →
//! `engine` (sends) → `record` (counts) → `report` (what people and programs read).
#![cfg_attr(test, allow(clippy::unwrap_used, clippy::cast_possible_truncation))]

mod arrivals;
mod engine;
mod error;
mod options;
mod pacer;
mod record;
mod report;
mod run;
mod schedule;
mod status;

pub use arrivals::Arrivals;
pub use error::{ConnectError, ErrorKind, LoadError};
pub use options::{CONNECTIONS_MAX, DURATION_MAX, IN_FLIGHT_MAX, LAG_P99_DEFAULT, RATE_MAX, TIMEOUT_MAX};
pub use options::{Mix, Options, Protocol, RequestClass, Scheme, Target};
pub use report::{ClassLine, Connections, Line, Percentiles, Report};
pub use run::{Phase, Progress, run, run_until};
pub use status::{StatusSet, StatusSetError};
