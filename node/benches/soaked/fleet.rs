//! The apps of the soak, and what each may answer at the moment.

use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use bytes::Bytes;
use selvage_config::Limits;
use selvage_config::app::isolation::{Isolation, Reuse};
use selvage_node::release::activate::Base;
use selvage_node::route::{ActiveApp, Table};
use selvage_node::serve::Parts;

use crate::apps::{self, DOMAIN, NUMBERS, Template};

/// Healthy apps.
const HEALTHY: u32 = 150;
/// Apps of each hostile guest. With the healthy ones 200 in all.
const HOSTILE_EACH: usize = 5;
/// Guests that burn, hoard, trap, never answer or never end (`node/tests/guests`).
const HOSTILE: [&str; 10] = [
    "burn.wat",
    "burn_start.wat",
    "hog.wat",
    "table_hog.wat",
    "handle_leak.wat",
    "trap.wat",
    "trap_mid_body.wat",
    "slow.wat",
    "silent.wat",
    "endless_body.wat",
];

/// All apps on one node.
pub(crate) struct Fleet {
    base: Base,
    parts: Arc<Parts>,
    template: Template,
    releases: Vec<Release>,
    /// By number: the healthy ones first.
    active: Mutex<Vec<Arc<ActiveApp>>>,
    next_number: AtomicU32,
}

/// What a healthy app says, by the number of its text.
struct Release {
    /// The release that has been taken over for certain.
    settled: AtomicU32,
    /// The one that is being taken over, or the same.
    coming: AtomicU32,
}

impl Fleet {
    /// Makes all apps ready and puts them into the table. Compiles, so it blocks for a while.
    pub(crate) fn deploy(base: Base, parts: Arc<Parts>) -> anyhow::Result<Self> {
        let template = Template::hello()?;
        let release = |number| Release { settled: AtomicU32::new(number), coming: AtomicU32::new(number) };
        let releases: Vec<Release> = (0..HEALTHY).map(release).collect();
        let mut active = Vec::new();
        for (number, release) in releases.iter().enumerate() {
            let code = template.code(release.settled.load(Ordering::Relaxed));
            active.push(apps::app(&base, &apps::name(number), code, &Limits::default(), isolation(number))?);
        }
        for file in HOSTILE {
            let code = apps::hand_written(file)?;
            for _ in 0..HOSTILE_EACH {
                let number = active.len();
                active.push(apps::app(&base, &apps::name(number), Bytes::clone(&code), &tight(), isolation(number))?);
            }
        }
        parts.table.store(Arc::new(Table::new(active.clone(), DOMAIN)?));
        let next_number = AtomicU32::new(HEALTHY);
        Ok(Self { base, parts, template, releases, active: Mutex::new(active), next_number })
    }

    /// Another release of another healthy app, in place of the one before. Compiles, so it blocks.
    pub(crate) fn deploy_next(&self) -> anyhow::Result<()> {
        let number = self.next_number.fetch_add(1, Ordering::Relaxed) % NUMBERS;
        let app = (number % HEALTHY) as usize;
        let code = self.template.code(number);
        let ready = apps::app(&self.base, &apps::name(app), code, &Limits::default(), isolation(app))?;

        let release = &self.releases[app];
        release.coming.store(number, Ordering::SeqCst);
        let mut active = self.active.lock().unwrap_or_else(PoisonError::into_inner);
        active[app] = ready;
        self.parts.table.store(Arc::new(Table::new(active.clone(), DOMAIN)?));
        release.settled.store(number, Ordering::SeqCst);
        Ok(())
    }

    /// How many healthy apps there are. Their numbers begin with 0.
    pub(crate) fn healthy(&self) -> usize {
        self.releases.len()
    }

    /// How many hostile apps there are. Their numbers follow those of the healthy ones.
    pub(crate) fn hostile(&self) -> usize {
        HOSTILE.len() * HOSTILE_EACH
    }

    /// The guest of a hostile app, by its place among the hostile ones.
    pub(crate) fn hostile_guest(&self, place: usize) -> &'static str {
        HOSTILE[place / HOSTILE_EACH % HOSTILE.len()]
    }

    /// The release that answers for certain, or an older one than which none may. Look before a request.
    pub(crate) fn settled(&self, app: usize) -> u32 {
        self.releases[app].settled.load(Ordering::SeqCst)
    }

    /// Whether `body` is what the app may have answered to a request before which `settled` was seen. A request takes
    /// less time than an app has from one deploy to its next, so no release came and went in between.
    pub(crate) fn may_answer(&self, app: usize, settled: u32, body: &[u8]) -> bool {
        let coming = self.releases[app].coming.load(Ordering::SeqCst);
        [settled, coming].iter().any(|number| self.template.text(*number).as_bytes() == body)
    }
}

/// Every other app uses its instances again.
fn isolation(number: usize) -> Isolation {
    if number % 2 == 1 { Isolation::Reuse(Reuse::default()) } else { Isolation::Fresh }
}

/// What ends a hostile guest soon.
fn tight() -> Limits {
    Limits { cpu_ms: 50, wall_ms: 500, memory_bytes: 16 * 1024 * 1024, ..Limits::default() }
}
