//! The registry, as OCI clients use it.

mod collect;
mod conformance;
mod lists;
mod manifests;
mod mirror;
mod rate;
mod rules;
mod tokens;
mod uploads;
