//! Runs against servers in this process. No assertion depends on how fast the machine is: where time matters
//! the server holds its answers until told, and only lower bounds of times are asserted.
#![allow(clippy::unwrap_used)]

mod breakage;
mod counts;
mod late;
mod refuse;
mod resent;
mod server;
mod stop;
