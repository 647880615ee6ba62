//! What real processes on real disks must stand: a process killed at any moment, any one flipped bit, and in fleets of
//! processes links that are cut or slow, clocks that jump, directories that are copied or set back, a full disk, and a node
//! that is shut out.
//!
//! `cargo test -p selvage-sync --test faults` does a few of each. By hand, more of one:
//! `cargo test -p selvage-sync --test faults -- kill 50`, `… -- flip 1000`, `… -- fleet partitions`. `SELVAGE_SEED=n`
//! repeats a run of flips.

#![allow(clippy::unwrap_used, clippy::print_stdout, clippy::print_stderr)]

mod disk;
mod fleet;
mod node;
mod proxy;
mod scenes;

use std::path::Path;

use selvage_config::node::KvEngine;

const ENGINES: [KvEngine; 2] = [KvEngine::Sled, KvEngine::Redb];
/// Rounds and flips of each engine when nobody asks for more.
const ROUNDS: u64 = 4;
const FLIPS: u64 = 40;

fn main() {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let words: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let count = |word: &str| word.parse().expect("a number of rounds");
    match words[..] {
        ["write", directory, engine] => disk::write(Path::new(directory), engine.parse().unwrap()),
        ["node", directory, name, region, free_mib] => node::run(Path::new(directory), name, region, free_mib),
        ["kill", rounds] => ENGINES.into_iter().for_each(|engine| disk::kill(engine, count(rounds))),
        ["flip", flips] => ENGINES.into_iter().for_each(|engine| disk::flip(engine, count(flips))),
        ["fleet", scene] => scenes::play(scene),
        _ => {
            for engine in ENGINES {
                disk::kill(engine, ROUNDS);
                disk::flip(engine, FLIPS);
            }
            scenes::play("");
        }
    }
}
