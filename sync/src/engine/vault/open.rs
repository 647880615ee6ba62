//! Opening: the engine of the current generation, or after damage a new one.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, RwLock};
use std::time::{SystemTime, UNIX_EPOCH};

use selvage_config::node::KvEngine;

use super::rewrite::Tidying;
use super::{Core, Current, OWN_COUNT, OWN_USAGE, Vault, Writing};
use crate::engine::blobs::Blobs;
use crate::engine::changes::Changes;
use crate::engine::envelope::{self, Sealed};
use crate::engine::mark::Mark;
use crate::engine::place::{Generation, Place};
use crate::engine::usage::Usage;
use crate::engine::{Batch, Engine, EngineError, Memory, Redb, Sled, disk};

/// The file that says that the engine failed on damage and shall not be opened again.
const DOUBT: &str = "DAMAGED";

/// Usage rows read at once.
const SCAN_ROWS: usize = 1000;

/// How a vault works.
#[derive(Debug, Clone)]
pub struct Settings {
    /// What keeps the rows.
    pub engine: KvEngine,
    /// Its cache.
    pub cache_bytes: u64,
    /// Free space that the disk must keep.
    pub disk_free_bytes_min: u64,
    /// What is done with files that can't be trusted.
    pub damage: Damage,
    /// The store whose record lies in a row, as the prefix of its rows: these are counted. None for other rows.
    pub class_of: fn(&[u8]) -> Option<&[u8]>,
}

impl From<&selvage_config::node::Kv> for Settings {
    fn from(kept: &selvage_config::node::Kv) -> Self {
        Self {
            engine: kept.engine,
            cache_bytes: u64::from(kept.cache_mib) << 20,
            disk_free_bytes_min: u64::from(kept.disk_free_mib_min) << 20,
            damage: Damage::MoveAside,
            class_of: crate::layout::class_of,
        }
    }
}

/// What is done with files that can't be trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Damage {
    /// They are moved aside, and the node begins anew.
    MoveAside,
    /// They are not opened.
    Refuse,
    /// They are read as far as that goes.
    Accept,
}

/// What keeps the rows in a directory; none if there are none.
///
/// # Errors
/// The directory can't be read.
pub fn engine_in(directory: &Path) -> Result<Option<KvEngine>, EngineError> {
    let found = Place::current_in(directory).map_err(|source| EngineError::io("open", source))?;
    Ok(found.map(|generation| generation.engine))
}

/// The directory holds another engine's rows.
#[derive(Debug, thiserror::Error)]
#[error("the directory holds rows of {found}, the configuration says {wanted}: change them with `selvage kv migrate`")]
struct OtherEngine {
    found: KvEngine,
    wanted: KvEngine,
}

/// It failed on damage before.
#[derive(Debug, thiserror::Error)]
#[error("the engine had failed on damaged files")]
struct Doubted;

impl Vault {
    /// Opens or makes an engine in `directory`, which no other process may have open. What is there and damaged is
    /// moved aside; then [`super::Stats::quarantined`] says where to.
    pub fn open(directory: &Path, settings: Settings) -> Result<Self, EngineError> {
        if settings.engine == KvEngine::Memory {
            let rows = Arc::new(Memory::default());
            let opened = Opened { rows, usage: Some(BTreeMap::new()), mark: None, flushes: 0 };
            return Self::of(None, opened, None, settings, None);
        }
        let place = Place::open(directory)?;
        let failed = |source| EngineError::io("open", source);
        let first = Generation { engine: settings.engine, number: 1 };
        let current = place.current().map_err(failed)?;
        if let Some(found) = current.filter(|found| found.engine != settings.engine) {
            return Err(EngineError::new("open", OtherEngine { found: found.engine, wanted: settings.engine }));
        }
        let mut generation = current.unwrap_or(first);
        let doubted = settings.damage != Damage::Accept && directory.join(DOUBT).exists();
        let opened = match doubted {
            true => Err(EngineError::corrupt("open", Doubted)),
            false => opened_in(&place, generation, &settings),
        };
        let mut quarantined = None;
        let opened = match opened {
            Ok(opened) => opened,
            Err(error) if error.is_corrupt() && settings.damage == Damage::MoveAside => {
                let aside = place.quarantine(now_ms()).map_err(failed)?;
                tracing::error!(
                    error = %error, source = ?error, moved_to = %aside.display(),
                    "the kv's files are damaged: beginning anew, the peers have what was replicated"
                );
                if doubted {
                    std::fs::remove_file(directory.join(DOUBT)).map_err(failed)?;
                }
                quarantined = Some(aside);
                generation = first;
                opened_in(&place, generation, &settings)?
            }
            Err(error) => return Err(error),
        };
        place.set_current(generation).map_err(failed)?;
        place.keep_only(generation).map_err(failed)?;
        let recount = opened.usage.is_none();
        let vault = Self::of(Some(place), opened, Some(generation), settings, quarantined)?;
        if recount {
            vault.check(|_| ())?;
        }
        vault.sweep()?;
        if let Err(error) = vault.writable() {
            tracing::error!(error = %error, source = ?error, "the kv only reads until there is room on the disk");
        }
        *vault.tidying.lock().unwrap_or_else(std::sync::PoisonError::into_inner) =
            Some(Tidying::start(Arc::clone(&vault.core)).map_err(failed)?);
        Ok(vault)
    }

    fn of(
        place: Option<Place>,
        opened: Opened,
        generation: Option<Generation>,
        settings: Settings,
        quarantined: Option<std::path::PathBuf>,
    ) -> Result<Self, EngineError> {
        let blobs = place.as_ref().map(|place| Blobs::open(place.blobs())).transpose();
        let core = Core {
            blobs: blobs.map_err(|source| EngineError::io("open", source))?,
            usage: RwLock::new(opened.usage.unwrap_or_default()),
            place,
            mark: opened.mark,
            settings,
            quarantined,
            current: RwLock::new(Current { rows: opened.rows, generation }),
            pending: RwLock::default(),
            writing: Mutex::new(Writing { flushes: opened.flushes, ..Writing::default() }),
            corrupt: AtomicU64::new(0),
            changes: Changes::default(),
            room: Mutex::default(),
        };
        Ok(Self { core: Arc::new(core), tidying: Mutex::default() })
    }

    /// Removes files of large values that no row names: a crash came between the two.
    fn sweep(&self) -> Result<(), EngineError> {
        let Some(blobs) = &self.core.blobs else { return Ok(()) };
        let swept = blobs.sweep(|hash| self.core.named(hash).map(|names| names > 0).map_err(SweepError::Engine));
        match swept {
            Ok(0) => {}
            Ok(files) => tracing::info!(files, "files of large values that nothing names are removed"),
            Err(SweepError::Engine(error)) => return Err(error),
            Err(SweepError::Io(error)) => tracing::warn!(%error, "files of large values can't be swept"),
        }
        Ok(())
    }
}

enum SweepError {
    Engine(EngineError),
    Io(std::io::Error),
}

impl From<std::io::Error> for SweepError {
    fn from(error: std::io::Error) -> Self {
        Self::Io(error)
    }
}

impl Core {
    /// The engine failed to write. If that is for damage, the next start shall not try it again: it would fail again.
    pub(super) fn doubt(&self, error: &EngineError) {
        self.count(error);
        if let (true, Some(place)) = (error.is_corrupt(), &self.place)
            && let Err(error) = disk::replace(place.directory(), DOUBT, b"see the log\n")
        {
            tracing::error!(%error, "damage can't be noted: the next start will try the same files");
        }
    }
}

/// An engine that can be read.
struct Opened {
    rows: Arc<dyn Engine>,
    /// What stores take; none if the rows that say it can't be read.
    usage: Option<BTreeMap<Vec<u8>, Usage>>,
    mark: Option<Mark>,
    flushes: u64,
}

/// An engine opened as it was before: what it had acknowledged since is lost.
#[derive(Debug, thiserror::Error)]
#[error("the engine is at flush {found}, {acknowledged} were acknowledged")]
struct RolledBack {
    found: u64,
    acknowledged: u64,
}

fn opened_in(place: &Place, generation: Generation, settings: &Settings) -> Result<Opened, EngineError> {
    let existed = place.of(generation).exists();
    let rows = rows_in(place, generation, settings.cache_bytes)?;
    let mark = Mark::open(&place.flushed()).map_err(|source| EngineError::io("open", source))?;
    if !existed {
        let mut first = Batch::default();
        first.put(OWN_COUNT.to_vec(), envelope::inline(OWN_COUNT, &1_u64.to_be_bytes()));
        rows.commit(first)?;
    }
    let count = match rows.get(OWN_COUNT)?.and_then(|row| envelope::open(OWN_COUNT, &row).ok()) {
        Some(Sealed::Inline(count)) => count.as_ref().try_into().map_or(0, u64::from_be_bytes),
        _ => 0,
    };
    let acknowledged = mark.read().unwrap_or(1);
    if count < acknowledged && settings.damage != Damage::Accept {
        return Err(EngineError::corrupt("open", RolledBack { found: count, acknowledged }));
    }
    let usage = stored_usage(rows.as_ref())?;
    Ok(Opened { rows, usage, mark: Some(mark), flushes: count })
}

/// Opens a generation.
pub(super) fn rows_in(place: &Place, generation: Generation, cache_bytes: u64) -> Result<Arc<dyn Engine>, EngineError> {
    let directory = place.of(generation);
    Ok(match generation.engine {
        KvEngine::Sled => Arc::new(Sled::open(&directory, cache_bytes)?),
        KvEngine::Redb => Arc::new(Redb::open(&directory, cache_bytes)?),
        KvEngine::Memory => Arc::new(Memory::default()),
    })
}

/// What stores take, as the rows say; none if one can't be read.
fn stored_usage(rows: &dyn Engine) -> Result<Option<BTreeMap<Vec<u8>, Usage>>, EngineError> {
    let mut all = BTreeMap::new();
    let mut from = OWN_USAGE.to_vec();
    loop {
        let found = rows.scan(OWN_USAGE, &from, SCAN_ROWS)?;
        let ended = found.len() < SCAN_ROWS;
        for row in found {
            let value = row.value.ok().and_then(|value| envelope::open(&row.key, &value).ok());
            let usage = match value {
                Some(Sealed::Inline(value)) => Usage::decode(&value),
                _ => None,
            };
            let Some(usage) = usage else { return Ok(None) };
            all.insert(row.key[OWN_USAGE.len()..].to_vec(), usage);
            from = [&row.key, &[0][..]].concat();
        }
        if ended {
            return Ok(Some(all));
        }
    }
}

fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}
