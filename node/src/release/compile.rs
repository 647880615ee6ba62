//! Compiling a verified component, or loading what was compiled before.

mod cache;
mod shape;

use std::sync::Arc;

use wasmtime::component::Component;

use self::shape::Shape;
use super::verify::VerifiedComponent;
use crate::engine::{Engines, Generation};

pub(crate) use self::cache::OnDisk;
pub use self::cache::{CacheError, CompileCache};

/// A component as native code, and the generation of `wasi:http` that it exports.
#[derive(Clone)]
pub struct Compiled {
    component: Component,
    generation: Generation,
    /// Where it can be loaded from again.
    on_disk: Option<Arc<OnDisk>>,
}

/// A component can't be compiled.
#[derive(Debug, thiserror::Error)]
pub enum CompileError {
    /// The bytes are no WebAssembly.
    #[error("read component")]
    Read(#[source] wasmparser::BinaryReaderError),
    /// A core module whose imports or exports don't make a component.
    #[error("turn core module into a component: {0}")]
    Adapt(String),
    /// It answers no requests.
    #[error("exports no wasi:http handler that this node calls, but {}", if exports.is_empty() { "nothing".into() } else { exports.join(", ") })]
    NotHttp {
        /// What it exports.
        exports: Vec<String>,
    },
    /// The compiler refuses it: it is not valid, or larger than the engine takes.
    #[error("compile component")]
    Compile(#[source] wasmtime::Error),
}

impl Compiled {
    pub(crate) fn component(&self) -> &Component {
        &self.component
    }

    pub(crate) fn generation(&self) -> Generation {
        self.generation
    }

    pub(crate) fn on_disk(&self) -> Option<&Arc<OnDisk>> {
        self.on_disk.as_ref()
    }
}

/// Compiles `component`, or takes its code from `cache`. Long and CPU-bound: call it where blocking is allowed.
///
/// # Errors
/// See [`CompileError`]. A cache that can't be written is not an error: the code is compiled again next time.
pub fn compile(
    engines: &Engines,
    cache: &CompileCache,
    component: &VerifiedComponent<'_>,
) -> Result<Compiled, CompileError> {
    let adapted;
    let mut bytes: &[u8] = component.bytes();
    let mut shape = Shape::read(bytes)?;
    if let Shape::Module { command } = shape {
        adapted = shape::adapt(bytes, command)?;
        bytes = &adapted;
        shape = Shape::read(bytes)?;
    }
    let exports = shape.exports();
    let Some(generation) = exports.iter().find_map(|name| generation(name)) else {
        return Err(CompileError::NotHttp { exports });
    };
    let engine = engines.engine(generation);
    let entry = cache.entry(component.digest(), &engines.fingerprint());
    let loaded = |(component, on_disk)| Compiled { component, generation, on_disk: Some(Arc::new(on_disk)) };
    if let Some(found) = entry.load(engine) {
        return Ok(loaded(found));
    }
    let component = Component::from_binary(engine, bytes).map_err(CompileError::Compile)?;
    entry.store(&component);
    // From the disk it takes only the memory that is used of it.
    Ok(entry.load(engine).map_or(Compiled { component, generation, on_disk: None }, loaded))
}

/// The generation of an exported interface, if it is a handler that this node calls. Release candidates are other
/// interfaces than what was released, whatever their names look like.
fn generation(export: &str) -> Option<Generation> {
    let (interface, version) = export.split_once('@')?;
    let released = |patch: &str| !patch.is_empty() && patch.bytes().all(|b| b.is_ascii_digit());
    match interface {
        "wasi:http/incoming-handler" if version.strip_prefix("0.2.").is_some_and(released) => Some(Generation::P2),
        "wasi:http/handler" if version.strip_prefix("0.3.").is_some_and(released) => Some(Generation::P3),
        _ => None,
    }
}

#[cfg(test)]
mod tests;
