//! What a guest may use: one file a capability, each with its link function.
//!
//! Everything here is linked for every guest; what an app was granted is asked at each call, and a refusal is a value
//! that the guest sees. A name that is not linked fails at activation, by [`missing`].

pub(crate) mod keyvalue;
pub(crate) mod logs;
pub mod outbound;
pub(crate) mod selvage_keyvalue;
pub(crate) mod spin_key_value;
pub(crate) mod stores;
pub(crate) mod variables;
pub(crate) mod wasi;

use std::sync::Arc;

use wasmtime::Engine;
use wasmtime::component::types::ComponentItem;
use wasmtime::component::{Component, Linker, ResourceTable};
use wasmtime_wasi::{WasiCtx, WasiCtxView, WasiView};
use wasmtime_wasi_http::{WasiHttpCtx, WasiHttpCtxView, WasiHttpView};

use crate::guest::bounds::Memory;
use crate::pool::Grants;

/// Everything that one guest has while it answers one request. It ends with the request, or is set back after it
/// (`guest/instance.rs`).
pub(crate) struct State {
    pub(crate) wasi: WasiCtx,
    pub(crate) http: WasiHttpCtx,
    pub(crate) table: ResourceTable,
    pub(crate) outbound: outbound::Hooks,
    pub(crate) log: Arc<logs::Log>,
    pub(crate) memory: Memory,
    pub(crate) grants: Arc<Grants>,
}

impl WasiView for State {
    fn ctx(&mut self) -> WasiCtxView<'_> {
        WasiCtxView { ctx: &mut self.wasi, table: &mut self.table }
    }
}

impl WasiHttpView for State {
    fn http(&mut self) -> WasiHttpCtxView<'_> {
        WasiHttpCtxView { hooks: &mut self.outbound, table: &mut self.table, ctx: &mut self.http }
    }
}

/// What WASI 0.2 guests may link to.
pub(crate) fn linker_p2(engine: &Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    link_p2(&mut linker)?;
    Ok(linker)
}

/// What WASI 0.3 guests may link to: all of 0.2 too, because their toolchains still use it below.
pub(crate) fn linker_p3(engine: &Engine) -> wasmtime::Result<Linker<State>> {
    let mut linker = Linker::new(engine);
    link_p2(&mut linker)?;
    wasi::link_p3(&mut linker)?;
    spin_key_value::link_p3(&mut linker)?;
    variables::link_p3(&mut linker)?;
    Ok(linker)
}

fn link_p2(linker: &mut Linker<State>) -> wasmtime::Result<()> {
    wasi::link_p2(linker)?;
    keyvalue::link(linker)?;
    selvage_keyvalue::link(linker)?;
    spin_key_value::link_p2(linker)?;
    variables::link_p2(linker)
}

/// The imports of `component` that nothing in `linker` satisfies, all of them.
pub(crate) fn missing(linker: &Linker<State>, component: &Component) -> Vec<String> {
    let engine = component.engine();
    let ty = component.component_type();
    let absent = |(name, item): &(&str, wasmtime::component::types::ComponentExtern<'_>)| match item.ty {
        ComponentItem::ComponentInstance(_) => !offers(linker, name),
        // The host offers interfaces only, never a bare function or type.
        _ => true,
    };
    ty.imports(engine).filter(absent).map(|(name, _)| name.to_owned()).collect()
}

/// Whether `linker` has an interface `name`, or one that is compatible by version.
///
/// A linker can't be asked, so this tries to link a component that imports the name as a function: that fails in one
/// way if there is nothing, in another if there is an interface. Rare: only after a component failed to link.
fn offers(linker: &Linker<State>, name: &str) -> bool {
    // A longer name would need a longer LEB128 below; no interface of ours has one.
    let Some(length) = u8::try_from(name.len()).ok().filter(|length| *length < 0x70) else { return false };
    let mut probe = b"\0asm\x0d\0\x01\0".to_vec();
    // Type section: one function type without parameters and result.
    probe.extend([7, 5, 1, 0x40, 0, 1, 0]);
    // Import section: one plain name, a function of type 0.
    probe.extend([10, length + 5, 1, 0, length]);
    probe.extend(name.as_bytes());
    probe.extend([1, 0]);
    let linked = Component::from_binary(linker.engine(), &probe).and_then(|probe| linker.instantiate_pre(&probe));
    linked.err().is_some_and(|error| format!("{error:#}").contains(FOUND_INSTEAD))
}

/// What wasmtime says of an interface where a function should be.
const FOUND_INSTEAD: &str = "expected function found instance";

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use selvage_config::Limits;
    use selvage_config::app::isolation::Isolation;
    use selvage_config::node::Egress as EgressOptions;

    use super::*;
    use crate::engine::{EngineOptions, Engines, Generation};
    use crate::guest::outcome::Outcome;
    use crate::metrics::Metrics;

    /// These stores and the variable `greeting`.
    pub(crate) async fn grants(stores: &[&str]) -> (Grants, tempfile::TempDir) {
        let dir = tempfile::tempdir().unwrap();
        let options = selvage_sync::Options::alone(
            "node".parse().unwrap(),
            "here".parse().unwrap(),
            dir.path().join("kv"),
            Default::default(),
        );
        let grants = Grants {
            app: "test".parse().unwrap(),
            component: "guest".parse().unwrap(),
            limits: Limits::default(),
            isolation: Isolation::Fresh,
            variables: BTreeMap::from([("greeting".to_owned(), "Moin".to_owned())]),
            environment: BTreeMap::new(),
            files: None,
            outbound: Vec::new(),
            stores: stores.iter().map(|label| label.parse().unwrap()).collect(),
            kv: selvage_sync::Kv::open(options, Arc::new(|_| None)).await.unwrap().into(),
            egress: Arc::new(outbound::Egress::new(&EgressOptions::default()).unwrap()),
            spent: Arc::default(),
            log_dropped: Metrics::new().log_dropped("test"),
        };
        (grants, dir)
    }

    /// What a guest has that was granted these stores and the variable `greeting`.
    pub(crate) async fn state(stores: &[&str]) -> (State, tempfile::TempDir) {
        let (grants, dir) = grants(stores).await;
        let grants = Arc::new(grants);
        let log = logs::Log::new(grants.app.clone(), grants.component.clone(), 0, grants.log_dropped.clone());
        let state = State {
            wasi: wasi::context(&Default::default(), &grants.environment, &log),
            http: WasiHttpCtx::new(),
            table: ResourceTable::new(),
            outbound: outbound::Hooks::new(Arc::clone(&grants)),
            log,
            memory: Memory::new(0, Arc::new(Outcome::default())),
            grants,
        };
        (state, dir)
    }

    #[test]
    fn each_generation_offers_what_the_design_lists() {
        let engines = Engines::new(&EngineOptions::of_instances(1)).unwrap();
        let both = [
            "wasi:http/types@0.2.0",
            "wasi:http/outgoing-handler@0.2.12",
            "wasi:cli/environment@0.2.6",
            "wasi:filesystem/preopens@0.2.3",
            "wasi:keyvalue/store@0.2.0-draft",
            "wasi:keyvalue/atomics@0.2.0-draft",
            "wasi:keyvalue/batch@0.2.0-draft",
            "wasi:keyvalue/store@0.2.0-draft2",
            "wasi:keyvalue/atomics@0.2.0-draft2",
            "wasi:keyvalue/batch@0.2.0-draft2",
            "selvage:keyvalue/store@0.1.0",
            "wasi:config/store@0.2.0-rc.1",
            "wasi:config/store@0.2.0-draft-2024-09-27",
            "fermyon:spin/key-value@2.0.0",
            "fermyon:spin/variables@2.0.0",
        ];
        let p3 = [
            "wasi:http/types@0.3.0",
            "wasi:http/client@0.3.0",
            "wasi:cli/stdout@0.3.0",
            "wasi:clocks/monotonic-clock@0.3.0",
            "spin:key-value/key-value@3.0.0",
            "spin:variables/variables@3.0.0",
        ];
        for name in both {
            assert!(offers(engines.linker(Generation::P2), name), "{name}");
            assert!(offers(engines.linker(Generation::P3), name), "{name}");
        }
        for name in p3 {
            assert!(!offers(engines.linker(Generation::P2), name), "{name}");
            assert!(offers(engines.linker(Generation::P3), name), "{name}");
        }
        for name in ["acme:unknown/thing@1.0.0", "wasi:keyvalue/watcher@0.2.0-draft2", "fermyon:spin/llm@2.0.0"] {
            assert!(!offers(engines.linker(Generation::P3), name), "{name}");
        }
    }
}
