//! The base of WASI, 0.2 and 0.3: clocks, random, stdio, environment, files and HTTP.
//!
//! Sockets are linked because toolchains import them without use, and refuse every address. Of the node's own
//! environment, arguments and files a guest sees nothing.

use std::sync::Arc;

use wasmtime::component::Linker;
use wasmtime_wasi::{FsPerms, WasiCtx, WasiCtxBuilder};

use super::State;
use super::logs::{Log, Stream};
use crate::pool::Grants;

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

/// What one guest sees of the world.
///
/// # Errors
/// The directory of its files can't be opened.
pub(crate) fn context(grants: &Grants, log: &Arc<Log>) -> wasmtime::Result<WasiCtx> {
    let mut builder = WasiCtxBuilder::new();
    builder.stdout(Stream::new(log, "stdout")).stderr(Stream::new(log, "stderr"));
    builder.allow_tcp(false).allow_udp(false).allow_ip_name_lookup(false);
    builder.max_random_size(RANDOM_BYTES_MAX);
    for (name, value) in &grants.environment {
        builder.env(name, value);
    }
    if let Some(files) = &grants.files {
        builder.preopened_dir(files, FILES_AT, FsPerms::ReadOnly)?;
    }
    Ok(builder.build())
}
