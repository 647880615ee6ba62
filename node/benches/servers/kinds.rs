//! The servers that are compared, each with what it needs to answer.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use anyhow::Context;

use super::tools::Tools;
use super::{Listen, Server, hyper};

/// What makes `wasmtime serve` fastest with a fresh instance for each request, found by trying: the epoch's deadline
/// costs nothing, resident pages with the kernel's map of touched ones give most.
pub(crate) const TUNED: [&str; 9] = [
    "-Scli",
    "-W",
    "timeout=1s",
    "-O",
    "pooling-pagemap-scan=y",
    "-O",
    "pooling-memory-keep-resident=2097152",
    "-O",
    "pooling-table-keep-resident=65536",
];
/// What makes it use an instance again and again.
pub(crate) const REUSED: [&str; 3] = ["-Scli", "--max-instance-reuse-count", "100000"];
/// What makes it start a WASI 0.3 instance for each request, which it does not by itself.
pub(crate) const FRESH_P3: [&str; 6] =
    ["-Scli", "-Sp3", "--max-instance-reuse-count", "1", "--max-instance-concurrent-reuse-count", "1"];
/// What makes it keep what it compiled for the next start, where compiling takes long.
pub(crate) const CACHED: [&str; 2] = ["-C", "cache=y"];

/// `selvage up`: a component or a manifest, limits of memory, CPU and wall time on.
pub(crate) fn selvage(program: &Path, name: &str, app: &Path, dir: &Path) -> Server {
    let arguments = ["up".into(), app.into(), "--cache-dir".into(), dir.join("compiled").into()];
    let mut server = Server::new(name, program, arguments.into(), Listen::Flag("--listen"));
    // Its default, said here because it matters: what guests write is passed on.
    server.environment = vec![("SELVAGE_LOG", "warn,guest=info".into())];
    server
}

/// This very program in another role, which is told where to listen by a port at the end of its arguments.
pub(crate) fn itself(name: &str, arguments: &[OsString]) -> anyhow::Result<Server> {
    Ok(Server::new(name, &std::env::current_exe()?, arguments.to_vec(), Listen::Port))
}

/// `wasmtime serve` with these flags. Those who want its cache find it in `dir`.
pub(crate) fn wasmtime(program: &Path, name: &str, component: &Path, flags: &[&str], dir: &Path) -> Server {
    let flags = std::iter::once(&"serve").chain(flags).map(OsString::from);
    let arguments = flags.chain([component.into()]).collect();
    let mut server = Server::new(name, program, arguments, Listen::Flag("--addr"));
    server.environment = vec![("XDG_CACHE_HOME", dir.join("wasmtime").into())];
    server
}

/// What an author writes to get what `wasmtime serve` is told by [`REUSED`].
const REUSE: &str = "isolation = \"reuse\"\nreuse = { requests_max = 100000 }\n";
/// What an author writes whose guest is to see what `wasmtime serve` lets it see: the client's fields, and no others.
const TOLD_NOTHING: &str = "spin_headers = false\nforwarded_headers = false\n";

/// A manifest for `component` with these rules.
fn manifest(component: &Path, dir: &Path, name: &str, rules: &[&str]) -> anyhow::Result<PathBuf> {
    let stem = component.file_stem().and_then(|stem| stem.to_str()).context("a component without a name")?;
    let dir = dir.join(format!("{stem}-{name}"));
    std::fs::create_dir_all(&dir)?;
    std::fs::copy(component, dir.join("guest.wasm"))?;
    let manifest = dir.join("spin.toml");
    let text = r#"spin_manifest_version = 2
[application]
name = "guest"
[[trigger.http]]
route = "/..."
component = "guest"
[component.guest]
source = "guest.wasm"
[component.guest.tool.selvage]
"#;
    std::fs::write(&manifest, [&[text][..], rules].concat().concat())?;
    Ok(manifest)
}

impl Tools {
    /// `selvage up` with fresh instances.
    pub(crate) fn fresh(&self, component: &Path, dir: &Path) -> Server {
        selvage(&self.selvage, "selvage up", component, dir)
    }

    /// `selvage up` with instances that are used again.
    pub(crate) fn reused(&self, component: &Path, dir: &Path) -> anyhow::Result<Server> {
        let manifest = manifest(component, dir, "reuse", &[REUSE])?;
        Ok(selvage(&self.selvage, "selvage up, isolation = \"reuse\"", &manifest, dir))
    }

    /// `selvage up` whose guest sees no fields but the client's.
    pub(crate) fn fresh_told_nothing(&self, component: &Path, dir: &Path) -> anyhow::Result<Server> {
        let manifest = manifest(component, dir, "told-nothing", &[TOLD_NOTHING])?;
        Ok(selvage(&self.selvage, "selvage up, no fields of its own", &manifest, dir))
    }

    /// The same with instances that are used again.
    pub(crate) fn reused_told_nothing(&self, component: &Path, dir: &Path) -> anyhow::Result<Server> {
        let manifest = manifest(component, dir, "reuse-told-nothing", &[REUSE, TOLD_NOTHING])?;
        Ok(selvage(&self.selvage, "selvage up, reuse, no fields of its own", &manifest, dir))
    }

    /// `wasmtime serve` with these flags.
    pub(crate) fn wasmtime(&self, name: &str, component: &Path, flags: &[&str], dir: &Path) -> Server {
        wasmtime(&self.wasmtime, name, component, flags, dir)
    }

    /// nginx with a text of its own. The error says how to get it.
    pub(crate) fn nginx(&self, dir: &Path) -> Result<Server, String> {
        let program = self.nginx.as_ref().map_err(Clone::clone)?;
        let (text, path) = (include_str!("nginx.conf"), dir.join("nginx.conf"));
        let arguments = vec!["-e".into(), "/dev/null".into(), "-c".into(), path.clone().into()];
        let text = text.replace("{dir}", &dir.display().to_string());
        Ok(Server::new("nginx, return 200", program, arguments, Listen::File { path, text }))
    }

    /// workerd with the script that does what `examples/basket` does. The error says how to get it.
    pub(crate) fn workerd(&self, dir: &Path) -> anyhow::Result<Result<Server, String>> {
        let program = match &self.workerd {
            Ok(program) => program,
            Err(missing) => return Ok(Err(missing.clone())),
        };
        let config = dir.join("workerd.capnp");
        std::fs::write(&config, include_str!("workerd.capnp"))?;
        std::fs::write(dir.join("basket.js"), include_str!("basket.js"))?;
        let arguments = vec!["serve".into(), config.into()];
        Ok(Ok(Server::new("workerd, JavaScript", program, arguments, Listen::Named("--socket-addr", "http="))))
    }
}

/// No guest at all: hyper and a text.
pub(crate) fn bare() -> anyhow::Result<Server> {
    let program = std::env::current_exe()?;
    Ok(Server::new("bare hyper, no guest", &program, vec![hyper::ARGUMENT.into()], Listen::Port))
}
