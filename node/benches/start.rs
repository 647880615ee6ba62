//! From the start of a process to its first answer, with the component's code compiled before.

use std::process::Command;

use anyhow::ensure;

use crate::aim::Aim;
use crate::figures::{Figure, say, tree, without_backtraces};
use crate::servers::tools::{self, wasmtime};
use crate::servers::{Ask, Server, kinds};

/// Starts of each server.
const STARTS: usize = 9;
const FIRST_ANSWER_MS: Aim = Aim::AtMost(15.0);

pub(crate) fn measure() -> anyhow::Result<()> {
    let program = match tools::selvage() {
        Ok(program) => program,
        Err(missing) => {
            say(format_args!("start to first answer: skipped: {missing}"));
            return Ok(());
        }
    };
    let dir = tempfile::tempdir()?;
    let plain = tree().join("examples/plain/plain.wasm");
    let mut servers = vec![kinds::selvage(&program, "selvage up, code in its cache", &plain, dir.path())];
    match wasmtime() {
        Ok(program) => {
            let code = dir.path().join("plain.cwasm");
            let mut compile = Command::new(&program);
            let done = without_backtraces(&mut compile).arg("compile").arg(&plain).arg("-o").arg(&code).status()?;
            ensure!(done.success(), "wasmtime compile: {done}");
            let flags = ["-Scli", "--allow-precompiled"];
            servers.push(kinds::wasmtime(&program, "wasmtime serve, precompiled", &code, &flags, dir.path()));
        }
        Err(missing) => say(format_args!("wasmtime is left out: {missing}")),
    }
    let ask = Ask { path: "/", body: None, answer: "hello, world\n" };
    say(format_args!("start of the process (with taskset) to its first answer, examples/plain, {STARTS} starts"));
    let mut times = vec![Figure::default(); servers.len()];
    for server in &servers {
        // Fills the cache, and brings the program into memory.
        server.start(&ask)?;
    }
    for _ in 0..STARTS {
        for (server, times) in servers.iter().zip(&mut times) {
            times.push(server.start(&ask)?.started_in.as_secs_f64() * 1e3);
        }
    }
    tell(&servers, &times);
    Ok(())
}

fn tell(servers: &[Server], times: &[Figure]) {
    for (index, (server, times)) in servers.iter().zip(times).enumerate() {
        let (name, median, doubt) = (&server.name, times.median(), times.doubt());
        let aim = if index == 0 { format!("  {}", FIRST_ANSWER_MS.judge(median, " ms")) } else { String::new() };
        say(format_args!("  {name:<36} {median:>6.1} ms  ({:.1} to {:.1}){aim}{doubt}", times.min(), times.max()));
    }
}
