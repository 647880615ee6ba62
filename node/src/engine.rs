//! The two wasmtime engines of a node: one a generation of WASI.
//!
//! A WASI 0.2 guest runs without the machinery for concurrent calls, which would cost it a third of its time; a
//! WASI 0.3 guest needs it. Both engines allocate from pools, so that a fresh instance for each request is cheap.

pub(crate) mod machine;

use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;
use std::time::Duration;

use selvage_config::app::App;
use wasmtime::component::Linker;
use wasmtime::{
    Config, Enabled, Engine, EngineWeak, InstanceAllocationStrategy, PoolingAllocationConfig, WasmBacktraceDetails,
};

use crate::guest::heavy::Heavy;
use crate::host::{self, State};
use crate::line::Line;
use crate::pool::Places;

/// One step of the epoch: the longest that a guest keeps a worker thread without yielding.
pub const EPOCH_TICK: Duration = Duration::from_millis(2);
/// Memory for each instance when their number is chosen by the machine, bytes. Most have less, a few much more.
const MEMORY_PER_INSTANCE: u64 = 16 * 1024 * 1024;
/// Instances at once on one engine when the machine chooses: each takes 8 GiB of address space, half of that more
/// for one that waits, and of 128 TiB several nodes may share one process.
const INSTANCES_MAX: u32 = 1_000;
const INSTANCES_MIN: u32 = 64;
/// Core instances that a component may have: its own, the preview1 adapter, and the shims between them.
const CORE_INSTANCES_PER_COMPONENT: u32 = 16;
/// Core instances for each component instance, on average.
const CORE_INSTANCES_AVERAGE: u32 = 8;
/// Linear memories that a component may have. Nearly all have one; with a place for each, nobody takes another's. Each
/// place is 4 GiB of address space, so a third one would not fit several nodes into one process.
const MEMORIES_PER_COMPONENT: u32 = 2;
/// Tables for each component instance, on average: its own, the adapter and the shims.
const TABLES_AVERAGE: u32 = 4;
/// Tables that one core module may have.
const TABLES_PER_MODULE: u32 = 4;
/// Entries that one table may have. Compiled C# and JavaScript engines have tens of thousands.
const TABLE_ELEMENTS: usize = 100_000;
/// Most of one linear memory, bytes, whatever the limits of a component: the WebAssembly maximum.
const MEMORY_BYTES: usize = 1 << 32;
/// Heaps for garbage-collected types at once. Hardly a component uses them.
const GC_HEAPS: u32 = 100;
/// Of each memory that stays resident between instances where the kernel tells which pages were touched, bytes.
const RESIDENT_BYTES: usize = 2 * 1024 * 1024;
/// The same where it doesn't, and all of it must be overwritten each time, bytes.
const RESIDENT_BYTES_BLIND: usize = 32 * 1024;
/// Of each table that stays resident, bytes.
const RESIDENT_TABLE_BYTES: usize = 64 * 1024;
/// Wasm stack of a guest, bytes. Beyond it a guest traps.
const WASM_STACK_BYTES: usize = 512 * 1024;
/// Stack of a guest together with what the host needs on it, bytes.
const ASYNC_STACK_BYTES: usize = 2 * 1024 * 1024;

/// What a node's operator may choose about the engines.
#[derive(Debug, Clone)]
pub struct EngineOptions {
    /// Instances that run at once, for each of the two engines. Half as many more may wait for a request.
    pub instances: u32,
    /// Whether fewer will do where the machine lacks the address space.
    pub fewer_will_do: bool,
    /// Memory that all instances may count on, bytes.
    pub memory_bytes: u64,
}

impl EngineOptions {
    /// Options for so many instances on this machine, no fewer.
    pub fn of_instances(instances: u32) -> Self {
        Self { instances, fewer_will_do: false, memory_bytes: machine::memory_bytes().unwrap_or(u64::MAX) }
    }

    /// Options for one app alone: no more instances than its components may have at once. Each has a stack, whose guard
    /// page is a system call at the start.
    pub fn of_app(app: &App) -> Self {
        let may_run = app.components.values().map(|component| component.limits.concurrent_requests);
        let (default, wanted) = (Self::default(), may_run.fold(0, u32::saturating_add));
        Self { instances: default.instances.min(wanted.max(INSTANCES_MIN)), ..default }
    }
}

impl Default for EngineOptions {
    /// As many instances as the machine's memory holds, within [`INSTANCES_MAX`].
    fn default() -> Self {
        let memory_bytes = machine::memory_bytes().unwrap_or(u64::MAX);
        let instances = u32::try_from(memory_bytes / MEMORY_PER_INSTANCE).unwrap_or(u32::MAX);
        Self { instances: instances.clamp(INSTANCES_MIN, INSTANCES_MAX), fewer_will_do: true, memory_bytes }
    }
}

/// The engines don't start.
#[derive(Debug, thiserror::Error)]
pub enum EngineError {
    /// wasmtime refuses the configuration, or the machine lacks what it needs.
    #[error("start engine")]
    Start(#[source] wasmtime::Error),
    /// The machine, or a limit on this process, lacks the address space that was asked for.
    #[error("no address space for {instances} instances at once: set a smaller instances_max, or none")]
    AddressSpace {
        /// How many were asked for.
        instances: u32,
        /// What wasmtime says.
        #[source]
        source: wasmtime::Error,
    },
    /// Two capabilities claim one name.
    #[error("link the host's capabilities")]
    Link(#[source] wasmtime::Error),
    /// No thread for the epoch, or for guests that compute.
    #[error("start threads")]
    Thread(#[source] std::io::Error),
}

/// Which WASI a component was written for, and so which engine runs it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Generation {
    /// WASI 0.2: `wasi:http/incoming-handler@0.2.x`.
    P2,
    /// WASI 0.3: `wasi:http/handler@0.3.x`.
    P3,
}

/// Both engines, and everything that guests may link to. Cheap to clone.
#[derive(Clone)]
pub struct Engines {
    p2: Arc<Side>,
    p3: Arc<Side>,
    heavy: Heavy,
    line: Line,
}

/// One engine and what the host offers on it.
struct Side {
    engine: Engine,
    linker: Linker<State>,
    /// For instances that wait, of all pools together.
    places: Places,
}

impl Engines {
    /// Starts both engines, the thread that advances their epoch, and those for guests that compute.
    ///
    /// # Errors
    /// See [`EngineError`].
    pub fn new(options: &EngineOptions) -> Result<Self, EngineError> {
        machine::take_descriptors();
        // Each protects thousands of stacks and reserves terabytes, which takes milliseconds.
        let (p2, p3) = std::thread::scope(|scope| {
            let p2 = scope.spawn(|| start(options, Generation::P2));
            let p3 = start(options, Generation::P3);
            (p2.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)), p3)
        });
        let ((p2, running_p2), (p3, running_p3)) = (p2?, p3?);
        tick(vec![p2.weak(), p3.weak()])?;
        let places = |running| Places::new(running, options.memory_bytes);
        let linker = host::linker_p2(&p2).map_err(EngineError::Link)?;
        let p2 = Side { linker, engine: p2, places: places(running_p2) };
        let linker = host::linker_p3(&p3).map_err(EngineError::Link)?;
        let p3 = Side { linker, engine: p3, places: places(running_p3) };
        let heavy = Heavy::start().map_err(EngineError::Thread)?;
        Ok(Self { p2: Arc::new(p2), p3: Arc::new(p3), heavy, line: Line::default() })
    }

    /// Differs whenever code compiled by other engines could not run on these: other version, CPU or configuration.
    pub fn fingerprint(&self) -> String {
        let mut out = String::new();
        for side in [&self.p2, &self.p3] {
            // Not for security: the cache authenticates what it reads. A collision would be refused by wasmtime's
            // own check of the artifact.
            let mut hasher = DefaultHasher::new();
            side.engine.precompile_compatibility_hash().hash(&mut hasher);
            out.push_str(&format!("{:016x}", hasher.finish()));
        }
        out
    }

    pub(crate) fn engine(&self, generation: Generation) -> &Engine {
        &self.side(generation).engine
    }

    pub(crate) fn linker(&self, generation: Generation) -> &Linker<State> {
        &self.side(generation).linker
    }

    /// The threads for guests that compute for long.
    pub(crate) fn heavy(&self) -> &Heavy {
        &self.heavy
    }

    /// Where requests wait for a core that is full.
    pub(crate) fn line(&self) -> &Line {
        &self.line
    }

    /// Places for instances that wait.
    pub(crate) fn places(&self, generation: Generation) -> &Places {
        &self.side(generation).places
    }

    fn side(&self, generation: Generation) -> &Side {
        match generation {
            Generation::P2 => &self.p2,
            Generation::P3 => &self.p3,
        }
    }
}

/// An engine that allocates from pools, and how many instances may run on it.
///
/// Where the machine lacks the address space and nobody asked for a number, there are fewer; if not even few fit, each
/// instance is allocated alone, which is slower.
fn start(options: &EngineOptions, generation: Generation) -> Result<(Engine, u32), EngineError> {
    let mut config = config(generation);
    let mut running = options.instances.max(1);
    loop {
        config.allocation_strategy(InstanceAllocationStrategy::Pooling(pools(running)));
        match Engine::new(&config) {
            Ok(engine) => return Ok((engine, running)),
            Err(source) if !options.fewer_will_do => {
                return Err(EngineError::AddressSpace { instances: running, source });
            }
            Err(error) if running > INSTANCES_MIN => {
                let fewer = (running / 2).max(INSTANCES_MIN);
                let error = format!("{error:#}");
                tracing::warn!(error, instances = fewer, "no address space for {running} instances at once");
                running = fewer;
            }
            Err(error) => {
                let error = format!("{error:#}");
                tracing::warn!(error, "no address space for pools: each instance is allocated alone, which is slower");
                config.allocation_strategy(InstanceAllocationStrategy::OnDemand);
                return Ok((Engine::new(&config).map_err(EngineError::Start)?, running));
            }
        }
    }
}

fn config(generation: Generation) -> Config {
    let mut config = Config::new();
    config.epoch_interruption(true);
    config.memory_init_cow(true);
    config.max_wasm_stack(WASM_STACK_BYTES);
    config.async_stack_size(ASYNC_STACK_BYTES);
    // A backtrace for each error would cost more than a whole request. The one that RUST_BACKTRACE asks for is not
    // even compiled in (wasmtime's feature `backtrace` is off); these are the walks through wasm frames.
    config.wasm_backtrace_max_frames(None);
    config.wasm_backtrace_details(WasmBacktraceDetails::Disable);
    match generation {
        Generation::P2 => config.concurrency_support(false),
        Generation::P3 => config.wasm_component_model_async(true),
    };
    config
}

fn pools(running: u32) -> PoolingAllocationConfig {
    let mut pools = PoolingAllocationConfig::new();
    let instances = running.saturating_add(Places::beside(running));
    pools.total_component_instances(instances);
    pools.total_core_instances(instances.saturating_mul(CORE_INSTANCES_AVERAGE));
    pools.total_memories(instances.saturating_mul(MEMORIES_PER_COMPONENT));
    pools.max_memories_per_component(MEMORIES_PER_COMPONENT);
    pools.total_tables(instances.saturating_mul(TABLES_AVERAGE));
    pools.total_stacks(instances);
    pools.total_gc_heaps(GC_HEAPS.min(instances));
    pools.max_core_instances_per_component(CORE_INSTANCES_PER_COMPONENT);
    pools.max_tables_per_module(TABLES_PER_MODULE);
    pools.table_elements(TABLE_ELEMENTS);
    pools.max_memory_size(MEMORY_BYTES);
    // Slots stay warm for the component that used them last; with fewer, many tenants would evict each other.
    pools.max_unused_warm_slots(instances);
    let pagemap = PoolingAllocationConfig::is_pagemap_scan_available();
    pools.pagemap_scan(if pagemap { Enabled::Yes } else { Enabled::No });
    pools.linear_memory_keep_resident(if pagemap { RESIDENT_BYTES } else { RESIDENT_BYTES_BLIND });
    pools.table_keep_resident(RESIDENT_TABLE_BYTES);
    pools
}

/// Advances the epoch of the engines until nobody holds any of them any more.
///
/// A pool keeps its engine, so no guest can outlive the clock that interrupts it.
fn tick(engines: Vec<EngineWeak>) -> Result<(), EngineError> {
    let run = move || {
        loop {
            std::thread::sleep(EPOCH_TICK);
            let alive: Vec<Engine> = engines.iter().filter_map(EngineWeak::upgrade).collect();
            if alive.is_empty() {
                return;
            }
            alive.iter().for_each(Engine::increment_epoch);
        }
    };
    let thread = std::thread::Builder::new().name("selvage-epoch".into());
    thread.spawn(run).map(drop).map_err(EngineError::Thread)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn two_engines_of_one_configuration_have_one_fingerprint() {
        let options = EngineOptions::of_instances(4);
        let (a, b) = (Engines::new(&options).unwrap(), Engines::new(&options).unwrap());
        assert_eq!(a.fingerprint(), b.fingerprint());
        assert_eq!(a.fingerprint().len(), 32);
    }

    #[test]
    fn what_does_not_fit_is_an_error_only_if_it_was_asked_for() {
        // 100,000 times 12 GiB are far beyond the 128 TiB of a process.
        let asked = EngineOptions::of_instances(100_000);
        let error = Engines::new(&asked).err().unwrap();
        assert!(matches!(error, EngineError::AddressSpace { instances: 100_000, .. }), "{error}");
        assert!(error.to_string().contains("instances_max"));
        assert!(Engines::new(&EngineOptions { fewer_will_do: true, ..asked }).is_ok());
    }

    #[test]
    fn one_app_alone_gets_room_for_as_many_instances_as_it_may_have() {
        let digest = selvage_config::Digest::of(b"wasm");
        let mut app = App::of_component("app".parse().unwrap(), "one".parse().unwrap(), digest);
        let mut room = |requests: &[u32]| {
            let component = app.components.values().next().unwrap().clone();
            app.components = (0..)
                .zip(requests)
                .map(|(index, requests)| {
                    let mut component = component.clone();
                    component.limits.concurrent_requests = *requests;
                    (format!("c{index}").parse().unwrap(), component)
                })
                .collect();
            EngineOptions::of_app(&app).instances
        };
        let most = EngineOptions::default().instances;
        assert_eq!(room(&[1]), INSTANCES_MIN);
        assert_eq!(room(&[50, 60]), 110.min(most));
        assert_eq!(room(&[u32::MAX, 60]), most, "the machine has the last word");
    }

    #[test]
    fn the_epoch_thread_ends_with_the_last_engine() {
        let engines = Engines::new(&EngineOptions::of_instances(1)).unwrap();
        let weak = engines.engine(Generation::P2).weak();
        assert!(weak.upgrade().is_some());
        drop(engines);
        // The thread may be holding it for the length of one step.
        let gone = (0..200).any(|_| {
            std::thread::sleep(EPOCH_TICK);
            weak.upgrade().is_none()
        });
        assert!(gone);
    }
}
