//! The `selvage` program.

fn main() {}
