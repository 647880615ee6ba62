//! The behaviour of a node, seen from outside.

#![allow(clippy::unwrap_used, clippy::print_stderr, clippy::print_stdout)]

mod acme;
mod admin;
mod front;
mod guest;
mod release;

/// The examples: those of the tree, or those that `SELVAGE_TEST_EXAMPLES` names.
fn examples() -> std::path::PathBuf {
    let own = || std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../examples");
    std::env::var_os("SELVAGE_TEST_EXAMPLES").map_or_else(own, Into::into)
}
