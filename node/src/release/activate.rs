//! From a plan to apps that serve: each made ready beside the others and swapped in whole, while the old one drains.
//!
//! One app's failure is its own. What a release refuses to be, its app's last good release goes on being; across a
//! restart too, because which one that is stands on the disk. Nothing here waits for the control plane before it
//! serves what was good.

mod beside;
mod ready;
mod restore;

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Weak};
use std::time::{Duration, Instant};

use futures_util::StreamExt as _;
use selvage_config::plan::{AppStatus, Plan, Refusal, Serving};
use selvage_config::release::Release;
use selvage_config::{AppName, Digest};
use selvage_sync::PeerAddr;
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;

pub use ready::{Base, ReadyError, Settings, ready};

use beside::Beside;

use super::fetch::{fetch, fetch_head};
use super::ledger::Ledger;
use super::neighbours::Sources;
use super::origin::{Backoff, chain};
use super::state::StateError;
use super::trial::Trials;
use super::verify::Terms;
use crate::route::ActiveApp;
use crate::serve::Parts;

/// Apps of one plan under way at once. Most of the time goes into fetching.
const APPS_AT_ONCE: usize = 4;
/// Apps whose code stays in memory when a node starts with all of them. Most of thousands are not asked for soon, and
/// each has some 25 mappings, of which the kernel lets a process have 65,530 (`vm.max_map_count`).
const LOADED_AT_START_MAX: usize = 256;
/// Apps compiled at once: each takes as many cores as there are.
const COMPILES_AT_ONCE: usize = 2;
/// First and longest pause before a release that was refused is tried again.
const RETRY: (Duration, Duration) = (Duration::from_secs(2), Duration::from_secs(60));
/// How often it is looked whether an old app is still in use.
const DRAIN_LOOK: Duration = Duration::from_millis(250);

/// What became of the plan.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Report {
    /// The newest plan of which every app was tried.
    pub generation: u64,
    /// What became of each app.
    pub apps: BTreeMap<AppName, AppStatus>,
    /// The apps whose load is to be told.
    pub watched: Vec<AppName>,
}

/// The apps of a node and what they shall become.
pub struct Activation {
    base: Arc<Base>,
    sources: Sources,
    /// What plans may name. None: anything that the policy takes.
    ledger: Option<Ledger>,
    /// By which terms what runs was verified.
    verified_by: Arc<Terms>,
    /// What has not behaved for long enough yet.
    trials: Trials,
    parts: Arc<Parts>,
    domain: String,
    drain: Duration,
    running: BTreeMap<AppName, Running>,
    refused: BTreeMap<AppName, Refused>,
    /// Second releases, and those that were refused.
    beside: BTreeMap<AppName, Beside>,
    refused_beside: BTreeMap<AppName, Refused>,
    /// The last good release of each app, as it stands on the disk or is about to.
    good: BTreeMap<AppName, Release>,
    /// Whether `good` is on the disk as it is.
    is_kept: bool,
    compiling: Arc<Semaphore>,
    draining: JoinSet<()>,
    leaving: Vec<(Digest, Weak<ActiveApp>)>,
    report: watch::Sender<Report>,
}

struct Running {
    release: Release,
    app: Arc<ActiveApp>,
}

/// A planned release that is not taken.
struct Refused {
    release: Release,
    generation: u64,
    may_pass: bool,
    refusal: Refusal,
}

impl Refused {
    fn new(release: &Release, generation: u64, error: &ReadyError) -> Self {
        let (cause, reason) = (error.cause().to_owned(), chain(error));
        let refusal = Refusal { release: release.id.clone(), cause, reason };
        Self { release: release.clone(), generation, may_pass: error.may_pass(), refusal }
    }
}

/// Why a release is brought up.
#[derive(Clone, Copy)]
enum Aim {
    /// A plan says so: the one of this generation.
    Planned(u64),
    /// It was good before, and its app has nothing else that serves.
    Good,
}

impl Activation {
    /// Nothing runs yet. `domain` and `drain` are the node's.
    pub fn new(
        base: Arc<Base>,
        (sources, ledger): (Sources, Option<Ledger>),
        parts: Arc<Parts>,
        domain: String,
        drain: Duration,
    ) -> Self {
        Self {
            verified_by: base.terms(),
            trials: Trials::open(base.state.clone()),
            base,
            sources,
            ledger,
            parts,
            domain,
            drain,
            running: BTreeMap::new(),
            refused: BTreeMap::new(),
            beside: BTreeMap::new(),
            refused_beside: BTreeMap::new(),
            good: BTreeMap::new(),
            is_kept: true,
            compiling: Arc::new(Semaphore::new(COMPILES_AT_ONCE)),
            draining: JoinSet::new(),
            leaving: Vec::new(),
            report: watch::Sender::new(Report::default()),
        }
    }

    /// What becomes of the plan, from now on.
    pub fn report(&self) -> watch::Receiver<Report> {
        self.report.subscribe()
    }

    /// Follows the plans until their sender is gone.
    pub async fn run(mut self, mut plans: watch::Receiver<Option<Arc<Plan>>>) {
        let mut backoff = Backoff::new(RETRY.0, RETRY.1);
        let mut terms = self.base.terms.subscribe();
        loop {
            let plan = plans.borrow_and_update().clone();
            let mut again = false;
            terms.mark_unchanged();
            self.stop_what_counts_no_more().await;
            if let Some(plan) = plan {
                self.set_peers(&plan);
                // A newer plan overtakes this one. Dropping `apply` is safe: each app is swapped in without a pause
                // in between, and what is being compiled stays in the cache.
                again = tokio::select! {
                    again = self.apply(&plan) => again && !self.sources.is_none(),
                    changed = plans.changed() => {
                        if changed.is_err() {
                            return;
                        }
                        continue;
                    }
                    _ = terms.changed() => continue,
                };
            }
            let due = self.trials.due();
            // Dropping any branch is safe: none holds anything.
            tokio::select! {
                changed = plans.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    backoff.reset();
                }
                _ = terms.changed() => backoff.reset(),
                () = until(due) => {
                    if self.trials.pass(Instant::now()) {
                        self.trials.keep().await;
                    }
                }
                () = tokio::time::sleep(backoff.pause()), if again => {}
            }
        }
    }

    /// Verifies what runs again when the terms are others than before, and stops what they do not cover: a revoked
    /// digest, a key that is trusted no more. It answers no request from then on and is not brought back from the disk.
    async fn stop_what_counts_no_more(&mut self) {
        let terms = self.base.terms();
        if Arc::ptr_eq(&terms, &self.verified_by) {
            return;
        }
        let releases: Vec<Release> = self.running.values().map(|running| running.release.clone()).collect();
        tracing::info!(releases = releases.len(), "what counts here has changed, verifying what runs");
        let mut stopped = Vec::new();
        for release in releases {
            if let Err(error) = fetch_head(&release, &self.sources, &self.base.state, &terms).await {
                let error = ReadyError::from(error);
                tracing::error!(release = %release.id, cause = error.cause(), reason = chain(&error), "stopped: it counts no more");
                stopped.push((release, error));
            }
        }
        self.stop_beside_what_counts_no_more(&terms).await;
        self.verified_by = terms;
        let good_before = self.good.len();
        for (release, error) in &stopped {
            let generation = self.report.borrow().generation;
            self.good.remove(&release.id.app);
            self.refuse(release, Aim::Planned(generation), error);
        }
        // What is good on the disk but does not run is verified before it runs; what is revoked is forgotten at once.
        let revoked = self.verified_by.revoked.digests.clone();
        self.good.retain(|_, release| !revoked.contains(&release.manifest));
        self.take_away(&stopped.into_iter().map(|(release, _)| release.id.app).collect());
        if self.good.len() != good_before {
            self.keep_good().await;
        }
    }

    /// Takes apps out of the table; what they are still answering may end.
    fn take_away(&mut self, apps: &BTreeSet<AppName>) {
        let left: Vec<Running> = apps.iter().filter_map(|app| self.running.remove(app)).collect();
        if !left.is_empty() {
            let apps = self.running.values().map(|running| Arc::clone(&running.app)).collect();
            match self.table(apps) {
                Ok(table) => self.parts.table.store(Arc::new(table)),
                // Fewer apps than before can't claim a host twice.
                Err(error) => tracing::error!(error = chain(&error), "table without the apps that left"),
            }
        }
        for old in left {
            tracing::info!(app = %old.release.id.app, release = %old.release.id, "app left");
            self.tell(&old.release.id.app);
            self.drain(old);
        }
    }

    /// Makes what runs what is planned. Returns whether to try again later.
    async fn apply(&mut self, plan: &Plan) -> bool {
        while self.draining.try_join_next().is_some() {}
        self.leave(&apps_of(plan)).await;
        // What an earlier plan brought up just before this one overtook it.
        if !self.is_kept {
            self.keep_good().await;
        }
        // A plan that goes back to what serves takes back the refusal of what came between.
        for release in &plan.releases {
            if self.serves(release) {
                self.refused.remove(&release.id.app);
                self.tell(&release.id.app);
            }
        }
        let is_hopeless = |release: &Release| {
            self.refused.get(&release.id.app).is_some_and(|refused| {
                refused.release == *release && refused.generation == plan.generation && !refused.may_pass
            })
        };
        let due = plan.releases.iter().filter(|release| !self.serves(release) && !is_hopeless(release));
        let is_listed = |release: &Release| self.ledger.as_ref().is_none_or(|ledger| ledger.lists(release));
        let (due, unlisted): (Vec<Release>, Vec<Release>) = due.cloned().partition(is_listed);
        for release in unlisted {
            let error = ReadyError::Unlisted { release: release.id.clone(), manifest: release.manifest };
            self.refuse(&release, Aim::Planned(plan.generation), &error);
        }
        self.bring_up(due, Aim::Planned(plan.generation)).await;
        // An app whose last good release could not be had from the disk at the start gets it now.
        let silent = self.good.iter().filter(|(app, _)| !self.running.contains_key(*app));
        self.bring_up(silent.map(|(_, release)| release.clone()).collect(), Aim::Good).await;
        let again = self.bring_beside(plan).await;
        self.parts.tell_to_drain(plan.drain);
        self.report.send_if_modified(|report| {
            let is_news = (report.generation, &report.watched) != (plan.generation, &plan.watched);
            (report.generation, report.watched) = (plan.generation, plan.watched.clone());
            is_news
        });
        self.sweep(plan).await;
        again || self.refused.values().any(|refused| refused.may_pass)
    }

    fn serves(&self, release: &Release) -> bool {
        self.running.get(&release.id.app).is_some_and(|running| running.release == *release)
    }

    /// Brings releases up side by side; each serves as soon as it is ready.
    async fn bring_up(&mut self, releases: Vec<Release>, aim: Aim) {
        let (base, sources, compiling) = (Arc::clone(&self.base), self.sources.clone(), Arc::clone(&self.compiling));
        let releases = self.put_on_trial(releases, aim).await;
        let one = |release: Release| {
            let (base, sources, compiling) = (Arc::clone(&base), sources.clone(), Arc::clone(&compiling));
            async move {
                let made = Box::pin(make(base, sources, compiling, &release)).await;
                (release, made)
            }
        };
        let mut made = futures_util::stream::iter(releases).map(one).buffer_unordered(APPS_AT_ONCE);
        let mut together = Vec::new();
        while let Some((release, made)) = made.next().await {
            match (made, aim) {
                // Nobody waits for one of them: a table of thousands is built once, and written down once.
                (Ok(app), Aim::Good) => {
                    if together.len() >= LOADED_AT_START_MAX {
                        app.rest();
                    }
                    together.push((release, Arc::new(app)));
                }
                (Ok(app), Aim::Planned(_)) => {
                    if let Some(old) = self.running.get(&release.id.app) {
                        app.warm_like(&old.app).await;
                    }
                    self.take_up(vec![(release, Arc::new(app))], aim).await;
                }
                (Err(error), _) => self.refuse(&release, aim, &error),
            }
        }
        if !together.is_empty() {
            self.take_up(together, aim).await;
        }
    }

    /// Counts a start of each that is new here, and leaves out what the process died with too often.
    async fn put_on_trial(&mut self, releases: Vec<Release>, aim: Aim) -> Vec<Release> {
        let (mut fit, mut is_new) = (Vec::new(), false);
        for release in releases {
            if let Some(starts) = self.trials.quarantined(release.manifest) {
                let error = ReadyError::Quarantined { release: release.id.clone(), starts };
                self.refuse(&release, aim, &error);
                continue;
            }
            if matches!(aim, Aim::Planned(_)) || self.trials.has(release.manifest) {
                is_new |= self.trials.begin(&release, self.good.get(&release.id.app));
            }
            fit.push(release);
        }
        if is_new {
            self.trials.keep().await;
        }
        fit
    }

    /// Swaps in what is ready: all at once, or, if that can't be, each for itself.
    async fn take_up(&mut self, ready: Vec<(Release, Arc<ActiveApp>)>, aim: Aim) {
        let mut taken = Vec::new();
        if self.swap_in(&ready).is_ok() {
            taken = ready.into_iter().map(|(release, _)| release).collect();
        } else {
            for one in ready {
                match self.swap_in(std::slice::from_ref(&one)) {
                    Ok(()) => taken.push(one.0),
                    Err(error) => self.refuse(&one.0, aim, &error),
                }
            }
        }
        // On the disk before it is told: what a node said that it serves, it serves after it was killed.
        if !taken.is_empty() {
            self.keep_good().await;
        }
        for release in &taken {
            if matches!(aim, Aim::Planned(_)) {
                self.refused.remove(&release.id.app);
            }
            self.tell(&release.id.app);
        }
    }

    /// Puts apps in place of those of the same names. Without a pause: there is always one of each.
    fn swap_in(&mut self, ready: &[(Release, Arc<ActiveApp>)]) -> Result<(), ReadyError> {
        let is_new = |name: &AppName| ready.iter().any(|(release, _)| release.id.app == *name);
        let others = self.running.iter().filter(|(name, _)| !is_new(name)).map(|(_, running)| &running.app);
        let apps = others.chain(ready.iter().map(|(_, app)| app)).map(Arc::clone).collect();
        self.parts.table.store(Arc::new(self.table(apps)?));
        for (release, app) in ready {
            let running = Running { release: release.clone(), app: Arc::clone(app) };
            if let Some(old) = self.running.insert(release.id.app.clone(), running) {
                self.drain(old);
            }
            self.good.insert(release.id.app.clone(), release.clone());
            self.is_kept = false;
            tracing::info!(app = %release.id.app, release = %release.id, manifest = %release.manifest, "serving");
        }
        Ok(())
    }

    fn refuse(&mut self, release: &Release, aim: Aim, error: &ReadyError) {
        let (app, cause, reason) = (&release.id.app, error.cause(), chain(error));
        self.parts.metrics.release_refused(cause);
        let Aim::Planned(generation) = aim else {
            tracing::error!(%app, release = %release.id, cause, reason, "last good release does not come up");
            if cause == "revoked" {
                self.good.remove(app);
            }
            return;
        };
        // Told once for each plan: a retry that ends the same way is no news.
        if self.refused.get(app).is_some_and(|r| r.release == *release && r.generation == generation) {
            tracing::debug!(%app, release = %release.id, cause, reason, "release refused again");
        } else {
            tracing::warn!(%app, release = %release.id, cause, reason, "release refused, the last good one stays");
        }
        self.refused.insert(app.clone(), Refused::new(release, generation, error));
        self.tell(app);
    }

    /// Writes into the report what became of an app.
    fn tell(&self, app: &AppName) {
        let serving = self
            .running
            .get(app)
            .map(|running| Serving { release: running.release.id.clone(), manifest: running.release.manifest });
        let refused = self.refused.get(app).or_else(|| self.refused_beside.get(app));
        let refused = refused.map(|refused| refused.refusal.clone());
        let candidate = self.beside.get(app).map(Beside::serving);
        let status = AppStatus { app: app.clone(), serving, refused, candidate };
        self.report.send_if_modified(|report| {
            let is_same = report.apps.get(app) == Some(&status);
            report.apps.insert(app.clone(), status);
            !is_same
        });
    }

    /// Takes away the apps that are no longer planned.
    async fn leave(&mut self, planned: &BTreeSet<AppName>) {
        let gone: BTreeSet<AppName> = self.running.keys().filter(|app| !planned.contains(*app)).cloned().collect();
        self.refused.retain(|app, _| planned.contains(app));
        let good_before = self.good.len();
        self.good.retain(|app, _| planned.contains(app));
        self.take_away(&gone);
        self.report.send_if_modified(|report| {
            let before = report.apps.len();
            report.apps.retain(|app, _| planned.contains(app));
            report.apps.len() != before
        });
        if self.good.len() != good_before {
            self.keep_good().await;
        }
    }

    /// Lets an old app end its requests, and tells when it has.
    fn drain(&mut self, old: Running) {
        let Running { release: Release { id: release, manifest, .. }, app } = old;
        let (app, longest) = (Arc::downgrade(&app), self.drain);
        self.leaving.push((manifest, Weak::clone(&app)));
        self.draining.spawn(async move {
            let begun = Instant::now();
            let mut is_late = false;
            while app.strong_count() > 0 {
                if !is_late && begun.elapsed() > longest {
                    is_late = true;
                    tracing::warn!(%release, requests = app.strong_count(), "old release still has requests");
                }
                tokio::time::sleep(DRAIN_LOOK).await;
            }
            tracing::info!(%release, ms = begun.elapsed().as_millis(), "old release drained");
        });
    }

    fn set_peers(&self, plan: &Plan) {
        let peers = plan.peers.iter().cloned();
        let address =
            |peer: selvage_config::plan::Peer| PeerAddr { node: peer.node, region: peer.region, addr: peer.address };
        self.base.kv.mesh().set_peers(peers.map(address).collect());
        self.base.kv.mesh().set_placements(plan.placements.clone());
        self.base.kv.mesh().set_homes(plan.homes.clone());
    }

    async fn keep_good(&mut self) {
        let good = self.good.clone();
        if let Err(error) = self.on_disk(move |base| base.state.keep_serving(&good)).await {
            tracing::error!(error = chain(&error), "list of good releases is not on disk");
        }
        self.is_kept = true;
    }

    /// Drops from the disk what neither the plan nor anything that serves needs.
    async fn sweep(&mut self, plan: &Plan) {
        self.leaving.retain(|(_, app)| app.strong_count() > 0);
        let seconds = plan.candidates.iter().map(|candidate| &candidate.release);
        let planned = plan.releases.iter().chain(seconds).chain(self.good.values()).map(|release| release.manifest);
        let mut manifests: BTreeSet<Digest> =
            planned.chain(self.leaving.iter().map(|(manifest, _)| *manifest)).collect();
        if self.trials.retain(&manifests) {
            self.trials.keep().await;
        }
        manifests.extend(self.trials.needed());
        match self.on_disk(move |base| base.state.sweep(&manifests)).await {
            Ok(0) => {}
            Ok(files) => tracing::debug!(files, "dropped what no release needs"),
            Err(error) => tracing::warn!(error = chain(&error), "old files stay on disk"),
        }
    }

    async fn on_disk<T: Send + 'static>(
        &self,
        act: impl FnOnce(&Base) -> Result<T, StateError> + Send + 'static,
    ) -> Result<T, ReadyError> {
        let base = Arc::clone(&self.base);
        Ok(tokio::task::spawn_blocking(move || act(&base)).await??)
    }
}

/// Waits until then, or for ever.
async fn until(due: Option<Instant>) {
    match due {
        Some(due) => tokio::time::sleep_until(due.into()).await,
        None => std::future::pending().await,
    }
}

fn apps_of(plan: &Plan) -> BTreeSet<AppName> {
    plan.releases.iter().map(|release| release.id.app.clone()).collect()
}

/// Fetches a release and makes it ready.
async fn make(
    base: Arc<Base>,
    sources: Sources,
    compiling: Arc<Semaphore>,
    release: &Release,
) -> Result<ActiveApp, ReadyError> {
    let fetched = fetch(release, &sources, &base.state, &base.terms()).await?;
    let variables = release.variables.clone();
    let settings = Settings { release: Some(release.id.clone()), variables, ..Settings::default() };
    let permit = compiling.acquire_owned().await.expect("nobody closes the semaphore");
    let made = tokio::task::spawn_blocking(move || {
        // Held by the work itself: whoever waits for it may go away.
        let _permit = permit;
        ready(&base, fetched, settings)
    });
    made.await?
}
