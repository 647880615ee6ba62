//! The registry as its clients use it.

mod lists;
mod manifests;
mod uploads;
