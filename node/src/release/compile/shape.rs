//! What some bytes are: a component and its exports, or a core module that must become one.

use wasi_preview1_component_adapter_provider::{
    WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER, WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER,
};
use wasmparser::{Encoding, Parser, Payload};
use wit_component::ComponentEncoder;

use super::CompileError;

/// The export that makes a core module a command: a program with a `main`.
const COMMAND_START: &str = "_start";

/// The outside of a component or core module.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Shape {
    /// A component, by its exports.
    Component {
        /// Their names.
        exports: Vec<String>,
    },
    /// A core module.
    Module {
        /// Whether it has a `main`.
        command: bool,
    },
}

impl Shape {
    /// Reads the outermost exports. Nothing is validated here: the compiler does that.
    pub(super) fn read(bytes: &[u8]) -> Result<Self, CompileError> {
        let mut depth = 0_usize;
        let mut is_component = false;
        let mut exports = Vec::new();
        for payload in Parser::new(0).parse_all(bytes) {
            match payload.map_err(CompileError::Read)? {
                Payload::Version { encoding, .. } => {
                    depth += 1;
                    is_component |= depth == 1 && encoding == Encoding::Component;
                }
                Payload::End(_) => depth = depth.saturating_sub(1),
                Payload::ComponentExportSection(section) if depth == 1 => {
                    for export in section {
                        exports.push(export.map_err(CompileError::Read)?.name.name.to_owned());
                    }
                }
                Payload::ExportSection(section) if depth == 1 => {
                    for export in section {
                        exports.push(export.map_err(CompileError::Read)?.name.to_owned());
                    }
                }
                _ => {}
            }
        }
        if is_component {
            return Ok(Self::Component { exports });
        }
        Ok(Self::Module { command: exports.iter().any(|name| name == COMMAND_START) })
    }

    /// What a component exports; nothing for a module, which no host can call.
    pub(super) fn exports(self) -> Vec<String> {
        match self {
            Self::Component { exports } => exports,
            Self::Module { .. } => Vec::new(),
        }
    }
}

/// Makes a component of a core module that was built for WASI preview 1.
///
/// Always the full adapter, never the one for proxies: that one traps where a guest reads its environment or files,
/// which ours may.
pub(super) fn adapt(module: &[u8], command: bool) -> Result<Vec<u8>, CompileError> {
    let adapter = if command { WASI_SNAPSHOT_PREVIEW1_COMMAND_ADAPTER } else { WASI_SNAPSHOT_PREVIEW1_REACTOR_ADAPTER };
    let encode = || {
        let encoder = ComponentEncoder::default().module(module)?;
        encoder.adapter(WASI_SNAPSHOT_PREVIEW1_ADAPTER_NAME, adapter)?.encode()
    };
    encode().map_err(|error| CompileError::Adapt(format!("{error:#}")))
}
