//! What is compared: components, and the servers that run each.
//!
//! None of the components imports anything but WASI: `wasmtime serve` has no `fermyon:spin/variables`, which
//! `examples/hello` reads. The aims stand here, beside the server that they are measured against.

use std::path::{Path, PathBuf};

use crate::figures::{say, tree};
use crate::servers::kinds::{self, CACHED, FRESH_P3, REUSED, TUNED};
use crate::servers::tools::Tools;
use crate::servers::{Ask, Server};

/// A component, and the servers that run it. The first one is Selvage.
pub(crate) struct Group {
    pub(crate) name: &'static str,
    pub(crate) ask: Ask,
    pub(crate) servers: Vec<Server>,
}

/// The text of `examples/plain`, and of whatever stands beside it.
const HELLO: Ask = Ask { path: "/", body: None, answer: "hello" };
/// JSON to parse, to change and to write again.
const BASKET: Ask = Ask {
    path: "/",
    body: Some(
        r#"{"currency":"EUR","items":[{"count":2,"name":"thread","price":350},{"count":1,"name":"needle","price":120},{"count":4,"name":"linen","price":1999}]}"#,
    ),
    answer: r#"{"count":4,"name":"linen","price":1999}],"total":8816}"#,
};
/// What a server that can't be had does to its group.
const LEFT_OUT: &str = "left out";

/// All of them; what can't be had is left out and told.
pub(crate) fn groups(tools: &Tools, dir: &Path) -> anyhow::Result<Vec<Group>> {
    let mut groups = vec![
        written_by_hand(tools, dir)?,
        plain_fresh(tools, dir)?,
        plain_reuse(tools, dir)?,
        gate(tools, dir)?,
        plain_p3_default(tools, dir)?,
        plain_p3_reuse(tools, dir)?,
    ];
    groups.extend(javascript(tools, dir)?);
    groups.extend(json(tools, dir)?);
    Ok(groups)
}

fn example(name: &str) -> PathBuf {
    tree().join(format!("examples/{name}/{name}.wasm"))
}

fn written_by_hand(tools: &Tools, dir: &Path) -> anyhow::Result<Group> {
    let hello = dir.join("hello.wasm");
    std::fs::write(&hello, wat::parse_file(tree().join("node/tests/guests/hello.wat"))?)?;
    let servers = vec![
        tools.fresh(&hello, dir),
        tools.wasmtime("wasmtime serve", &hello, &["-Scli"], dir),
        tools.wasmtime("wasmtime serve, best flags", &hello, &TUNED, dir),
        kinds::bare()?,
    ];
    Ok(Group { name: "hello.wat fresh: WASI 0.2, written by hand", ask: HELLO, servers })
}

fn plain_fresh(tools: &Tools, dir: &Path) -> anyhow::Result<Group> {
    let plain = example("plain");
    let mut servers = vec![
        tools.fresh(&plain, dir),
        tools.wasmtime("wasmtime serve", &plain, &["-Scli"], dir).aim(2.4),
        tools.wasmtime("wasmtime serve, best flags", &plain, &TUNED, dir).aim(1.4),
        kinds::bare()?.aim(0.32).tail_aim(2.0),
    ];
    match tools.nginx(dir) {
        Ok(nginx) => servers.push(nginx),
        Err(missing) => say(format_args!("nginx is {LEFT_OUT}: {missing}")),
    }
    Ok(Group { name: "plain fresh: WASI 0.2, Rust", ask: HELLO, servers })
}

fn plain_reuse(tools: &Tools, dir: &Path) -> anyhow::Result<Group> {
    let plain = example("plain");
    let servers = vec![
        tools.reused(&plain, dir)?,
        tools.wasmtime("wasmtime serve, instances reused", &plain, &REUSED, dir).aim(1.25),
        kinds::bare()?.aim(0.67).tail_aim(2.0),
    ];
    Ok(Group { name: "plain reuse: WASI 0.2, Rust", ask: HELLO, servers })
}

/// Written with Spin's SDK, it reads all fields that the node tells it of, and answers a fixed text.
fn gate(tools: &Tools, dir: &Path) -> anyhow::Result<Group> {
    let gate = example("gate");
    let servers = vec![
        tools.fresh(&gate, dir),
        tools.wasmtime("wasmtime serve", &gate, &["-Scli"], dir),
        tools.wasmtime("wasmtime serve, best flags", &gate, &TUNED, dir),
        kinds::bare()?,
    ];
    let ask = Ask { path: "/public/x", body: None, answer: "" };
    Ok(Group { name: "gate fresh: WASI 0.2, Rust, Spin's SDK", ask, servers })
}

/// The guest reads its head, and each field in it costs it some thousand instructions: the first row sees as many as with
/// `wasmtime serve`, the second what a guest is told if its author says nothing.
fn plain_p3_default(tools: &Tools, dir: &Path) -> anyhow::Result<Group> {
    let plain = example("plain-p3");
    let servers = vec![
        tools.fresh_told_nothing(&plain, dir)?,
        tools.fresh(&plain, dir),
        tools.wasmtime("wasmtime serve (reuses 128 times)", &plain, &["-Scli", "-Sp3"], dir).aim(1.4),
        tools.wasmtime("wasmtime serve, fresh instances", &plain, &FRESH_P3, dir).aim(2.0),
        kinds::bare()?,
    ];
    Ok(Group { name: "plain-p3 as it comes: WASI 0.3, Rust", ask: HELLO, servers })
}

fn plain_p3_reuse(tools: &Tools, dir: &Path) -> anyhow::Result<Group> {
    let plain = example("plain-p3");
    let servers = vec![
        tools.reused_told_nothing(&plain, dir)?,
        tools.reused(&plain, dir)?,
        tools.wasmtime("wasmtime serve (reuses 128 times)", &plain, &["-Scli", "-Sp3"], dir).aim(1.4),
        kinds::bare()?,
    ];
    Ok(Group { name: "plain-p3 reuse: WASI 0.3, Rust", ask: HELLO, servers })
}

fn javascript(tools: &Tools, dir: &Path) -> anyhow::Result<Vec<Group>> {
    let component = match &tools.javascript {
        Ok(component) => component,
        Err(missing) => {
            say(format_args!("JavaScript is {LEFT_OUT}: {missing}"));
            return Ok(Vec::new());
        }
    };
    let cached = |flags: &[&'static str]| [flags, &CACHED].concat();
    let ask = Ask { path: "/", body: None, answer: "" };
    let fresh = vec![
        tools.fresh(component, dir),
        tools.wasmtime("wasmtime serve", component, &cached(&["-Scli"]), dir).aim(2.0),
        tools.wasmtime("wasmtime serve, best flags", component, &cached(&TUNED), dir),
    ];
    let reuse = vec![
        tools.reused(component, dir)?,
        tools.wasmtime("wasmtime serve, instances reused", component, &cached(&REUSED), dir).aim(1.15),
    ];
    Ok(vec![
        Group { name: "js fresh: WASI 0.2, JavaScript", ask, servers: fresh },
        Group { name: "js reuse: WASI 0.2, JavaScript", ask, servers: reuse },
    ])
}

/// A guest against a JavaScript runtime at the same work: parse, add up, write again.
fn json(tools: &Tools, dir: &Path) -> anyhow::Result<Vec<Group>> {
    let basket = example("basket");
    let mut fresh = vec![tools.fresh(&basket, dir), tools.wasmtime("wasmtime serve", &basket, &["-Scli"], dir)];
    let mut reuse =
        vec![tools.reused(&basket, dir)?, tools.wasmtime("wasmtime serve, instances reused", &basket, &REUSED, dir)];
    for (servers, aim) in [(&mut fresh, 2.5), (&mut reuse, 3.0)] {
        match tools.workerd(dir)? {
            Ok(workerd) => servers.push(workerd.aim(aim)),
            Err(missing) => say(format_args!("workerd is {LEFT_OUT}: {missing}")),
        }
    }
    Ok(vec![
        Group { name: "json fresh: WASI 0.2, Rust, a POST", ask: BASKET, servers: fresh },
        Group { name: "json reuse: WASI 0.2, Rust, a POST", ask: BASKET, servers: reuse },
    ])
}
