//! Releases that this node has not seen behave yet: how often the process began with one and did not end well.
//!
//! A start is counted on the disk before the release is activated, and taken back when the node ends in order or the
//! release has served for [`HEALTHY`]. So what remains is how often the process died while the release was new. At
//! [`STARTS_MAX`] the node leaves it alone, says so, and runs what was good before. Releases that once behaved are not on
//! trial again: a crash has many possible causes, and the newest is the likeliest.

use std::collections::{BTreeMap, BTreeSet};
use std::time::{Duration, Instant};

use selvage_config::release::Release;
use selvage_config::{AppName, Digest};
use serde::{Deserialize, Serialize};

use super::origin::chain;
use super::state::State;

/// For how long a release serves before it is no longer on trial.
const HEALTHY: Duration = Duration::from_secs(60);
/// How often the process may die with a new release before it is left alone.
pub const STARTS_MAX: u32 = 3;

/// A release on trial.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Trial {
    /// Whose.
    app: AppName,
    /// This program's version: another one may do better.
    program: String,
    /// Starts that did not end well, so far as is known.
    starts: u32,
    /// What was good before it.
    before: Option<Release>,
}

/// The releases on trial, by manifest.
#[derive(Debug)]
pub struct Trials {
    state: State,
    all: BTreeMap<Digest, Trial>,
    /// Begun by this process, and when.
    begun: BTreeMap<Digest, Instant>,
}

impl Trials {
    /// What the disk says.
    pub fn open(state: State) -> Self {
        let mut all = state.trials().unwrap_or_else(|error| {
            tracing::warn!(error = chain(&error), "list of releases on trial is damaged, begun anew");
            BTreeMap::new()
        });
        all.retain(|_, trial| trial.program == env!("CARGO_PKG_VERSION"));
        Self { state, all, begun: BTreeMap::new() }
    }

    /// With how many starts a release is left alone, if it is.
    pub fn quarantined(&self, manifest: Digest) -> Option<u32> {
        let starts = self.all.get(&manifest)?.starts;
        (!self.begun.contains_key(&manifest) && starts >= STARTS_MAX).then_some(starts)
    }

    /// What was good before a release that is left alone.
    pub fn before(&self, manifest: Digest) -> Option<Release> {
        self.quarantined(manifest)?;
        self.all.get(&manifest)?.before.clone()
    }

    /// Whether a release is on trial.
    pub fn has(&self, manifest: Digest) -> bool {
        self.all.contains_key(&manifest)
    }

    /// Counts a start. Whether that is to be kept before the release is activated.
    pub fn begin(&mut self, release: &Release, before: Option<&Release>) -> bool {
        if self.begun.contains_key(&release.manifest) {
            return false;
        }
        let new = || Trial {
            app: release.id.app.clone(),
            program: env!("CARGO_PKG_VERSION").to_owned(),
            starts: 0,
            before: before.filter(|before| before.manifest != release.manifest).cloned(),
        };
        let trial = self.all.entry(release.manifest).or_insert_with(new);
        trial.starts = trial.starts.saturating_add(1);
        self.begun.insert(release.manifest, Instant::now());
        true
    }

    /// The process before, which had the same on trial, has ended in order: its starts were none that crashed it, and it
    /// has written down so. Whether there is anything to write down for this one.
    pub fn go_on(&mut self) -> bool {
        let Ok(before) = self.state.trials() else { return true };
        for digest in self.begun.keys() {
            if let Some(trial) = self.all.get_mut(digest) {
                trial.starts = before.get(digest).map_or(0, |trial| trial.starts).saturating_add(1);
            }
        }
        !self.begun.is_empty()
    }

    /// When the next release will have behaved for long enough.
    pub fn due(&self) -> Option<Instant> {
        self.begun.values().min().map(|begun| *begun + HEALTHY)
    }

    /// Ends the trials of those that have. Whether there was one.
    pub fn pass(&mut self, now: Instant) -> bool {
        let healthy: Vec<Digest> =
            self.begun.iter().filter(|(_, begun)| now >= **begun + HEALTHY).map(|(digest, _)| *digest).collect();
        for digest in &healthy {
            self.begun.remove(digest);
            self.all.remove(digest);
        }
        !healthy.is_empty()
    }

    /// Forgets what is neither planned nor good. Whether there was anything.
    pub fn retain(&mut self, manifests: &BTreeSet<Digest>) -> bool {
        let before = self.all.len();
        self.all.retain(|digest, _| manifests.contains(digest));
        self.begun.retain(|digest, _| manifests.contains(digest));
        self.all.len() != before
    }

    /// The manifests of what was good before: they may be needed.
    pub fn needed(&self) -> impl Iterator<Item = Digest> {
        self.all.values().filter_map(|trial| Some(trial.before.as_ref()?.manifest))
    }

    /// Writes down how it stands.
    pub async fn keep(&self) {
        let (state, all) = (self.state.clone(), self.all.clone());
        match tokio::task::spawn_blocking(move || state.keep_trials(&all)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(error = chain(&error), "releases on trial are not on disk"),
            Err(error) => tracing::error!(error = chain(&error), "releases on trial are not on disk"),
        }
    }
}

/// The node ends in order: the starts of this process were none that crashed it.
impl Drop for Trials {
    fn drop(&mut self) {
        for digest in self.begun.keys() {
            if let Some(trial) = self.all.get_mut(digest) {
                trial.starts = trial.starts.saturating_sub(1);
            }
        }
        self.all.retain(|_, trial| trial.starts > 0);
        if !self.begun.is_empty()
            && let Err(error) = self.state.keep_trials(&self.all)
        {
            tracing::error!(error = chain(&error), "releases on trial are not on disk");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn release(number: u32) -> Release {
        Release {
            id: format!("hello@{number}").parse().unwrap(),
            repository: "acme/hello".parse().unwrap(),
            manifest: Digest::of(&number.to_be_bytes()),
            variables: [].into(),
            created_ms: 1,
            created_by: "ops".into(),
        }
    }

    fn open(dir: &tempfile::TempDir) -> Trials {
        Trials::open(State::open(dir.path()).unwrap())
    }

    #[tokio::test]
    async fn a_release_that_was_new_at_three_crashes_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let (good, bad) = (release(1), release(2));
        for start in 1..=STARTS_MAX {
            let mut trials = open(&dir);
            assert_eq!(trials.quarantined(bad.manifest), None, "start {start}");
            assert!(trials.begin(&bad, Some(&good)));
            trials.keep().await;
            // The process dies: nothing is dropped in order.
            std::mem::forget(trials);
        }
        let trials = open(&dir);
        assert_eq!(trials.quarantined(bad.manifest), Some(STARTS_MAX));
        assert_eq!(trials.before(bad.manifest), Some(good));
    }

    #[tokio::test]
    async fn a_start_that_ends_in_order_does_not_count() {
        let dir = tempfile::tempdir().unwrap();
        for _ in 0..10 {
            let mut trials = open(&dir);
            assert!(trials.begin(&release(2), None));
            trials.keep().await;
            drop(trials);
        }
        assert!(!open(&dir).has(release(2).manifest));
    }

    #[tokio::test]
    async fn a_release_that_behaved_is_no_longer_on_trial() {
        let dir = tempfile::tempdir().unwrap();
        let mut trials = open(&dir);
        assert!(trials.begin(&release(2), None));
        let due = trials.due().unwrap();
        assert!(!trials.pass(due.checked_sub(Duration::from_millis(1)).unwrap()));
        assert!(trials.has(release(2).manifest) && trials.pass(due));
        trials.keep().await;
        assert!(!trials.has(release(2).manifest) && trials.due().is_none());
        std::mem::forget(trials);
        assert!(!open(&dir).has(release(2).manifest));
    }

    #[tokio::test]
    async fn what_is_no_longer_planned_is_forgotten_and_so_is_another_programs_trial() {
        let dir = tempfile::tempdir().unwrap();
        let mut trials = open(&dir);
        assert!(trials.begin(&release(2), Some(&release(1))));
        assert_eq!(trials.needed().collect::<Vec<_>>(), [release(1).manifest]);
        assert!(trials.retain(&BTreeSet::new()));
        assert!(!trials.has(release(2).manifest));
        assert!(trials.begin(&release(3), None));
        trials.keep().await;
        std::mem::forget(trials);
        let path = dir.path().join("trials.json");
        let kept = State::open(dir.path()).unwrap().trials().unwrap();
        let text = serde_json::to_string(&kept).unwrap().replace(env!("CARGO_PKG_VERSION"), "0.0.0-other");
        std::fs::write(&path, text).unwrap();
        assert!(!open(&dir).has(release(3).manifest));
    }
}
