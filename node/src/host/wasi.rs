//! The base of WASI, 0.2 and 0.3: clocks, random, stdio, environment, files and HTTP.
//!
//! Sockets are linked because toolchains import them without use, and refuse every address. Of the node's own
//! environment, arguments and files a guest sees nothing.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use wasmtime::component::Linker;
use wasmtime_wasi::filesystem::WasiFilesystemCtx;
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder};

use super::State;
use super::logs::{Log, Name, Stream};

/// Where the files of a component appear to it.
const FILES_AT: &str = "/";
/// Most random bytes of one call.
const RANDOM_BYTES_MAX: u64 = 1024 * 1024;

/// WASI 0.2 and `wasi:http` 0.2.
pub(super) fn link_p2(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    wasmtime_wasi::p2::add_to_linker_async(linker)?;
    wasmtime_wasi_http::p2::add_only_http_to_linker_async(linker)
}

/// WASI 0.3 and `wasi:http` 0.3.
pub(super) fn link_p3(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    wasmtime_wasi::p3::add_to_linker(linker)?;
    wasmtime_wasi_http::p3::add_to_linker(linker)
}

/// The files of a component, opened once: no request waits for the disk to begin.
///
/// # Errors
/// The directory can't be opened.
pub(crate) fn files(directory: Option<&Path>) -> wasmtime::Result<WasiFilesystemCtx> {
    let Some(directory) = directory else { return Ok(WasiFilesystemCtx::default()) };
    let mut builder = WasiCtxBuilder::new();
    builder.preopened_dir(directory, FILES_AT, FsPerms::ReadOnly)?;
    Ok(std::mem::take(builder.build().filesystem()))
}

/// What one guest sees of the world.
pub(crate) fn context(files: &WasiFilesystemCtx, environment: &BTreeMap<String, String>, log: &Arc<Log>) -> WasiCtx {
    let mut builder = WasiCtxBuilder::new();
    builder.stdout(Stream::new(log, Name::Stdout)).stderr(Stream::new(log, Name::Stderr));
    builder.allow_tcp(false).allow_udp(false).allow_ip_name_lookup(false);
    builder.max_random_size(RANDOM_BYTES_MAX);
    for (name, value) in environment {
        builder.env(name, value);
    }
    let mut context = builder.build();
    *context.filesystem() = files.clone();
    context
}

#[cfg(test)]
mod tests {
    use wasmtime::component::Resource;
    use wasmtime_wasi::filesystem::WasiFilesystemView;
    use wasmtime_wasi::p2::bindings::filesystem::preopens::Host as _;
    use wasmtime_wasi::p2::bindings::filesystem::types::{DescriptorFlags, HostDescriptor, OpenFlags, PathFlags};

    use super::*;
    use crate::host::tests::state;

    /// Opens `path` below the only directory that the guest sees; what it reads there, if it may.
    async fn open(state: &mut State, path: &str, how: OpenFlags, access: DescriptorFlags) -> Option<Vec<u8>> {
        let mut files = state.filesystem();
        let (root, at) = files.get_directories().unwrap().remove(0);
        assert_eq!(at, FILES_AT);
        let root = Resource::new_own(root.rep());
        let file = files.open_at(root, PathFlags::empty(), path.into(), how, access).await.ok()?;
        files.read(file, 100, 0).await.ok().map(|(bytes, _)| bytes)
    }

    #[tokio::test]
    async fn files_are_read_and_never_written() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::create_dir(dir.path().join("files")).unwrap();
        std::fs::write(dir.path().join("files/page.html"), "text").unwrap();
        std::fs::write(dir.path().join("secret"), "secret").unwrap();
        let (mut state, _kv) = state(&[]).await;
        let log = Arc::clone(&state.log);
        let files = files(Some(&dir.path().join("files"))).unwrap();
        state.wasi = context(&files, &BTreeMap::new(), &log);
        let (none, read) = (OpenFlags::empty(), DescriptorFlags::READ);
        assert_eq!(open(&mut state, "page.html", none, read).await, Some(b"text".to_vec()));
        assert_eq!(open(&mut state, "../secret", none, read).await, None);
        assert_eq!(open(&mut state, "page.html", none, read | DescriptorFlags::WRITE).await, None);
        assert_eq!(open(&mut state, "new", OpenFlags::CREATE, read).await, None);
        assert_eq!(open(&mut state, "page.html", OpenFlags::TRUNCATE, read).await, None);
        assert_eq!(std::fs::read(dir.path().join("files/page.html")).unwrap(), b"text");
    }

    #[tokio::test]
    async fn nothing_of_the_nodes_own_is_seen() {
        use wasmtime_wasi::cli::WasiCliView;
        use wasmtime_wasi::p2::bindings::cli::environment::Host as _;
        let (mut state, _kv) = state(&[]).await;
        assert_eq!(state.filesystem().get_directories().unwrap().len(), 0);
        assert_eq!(state.cli().get_environment().unwrap(), []);
        assert_eq!(state.cli().get_arguments().unwrap(), Vec::<String>::new());
    }
}
