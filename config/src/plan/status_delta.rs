//! What changed in a node's status since the one that was taken last. A node tells its status every few seconds, and most
//! of the time nothing of it is new; with hundreds of apps it is tens of kilobytes.
//!
//! A delta names what it is on top of and what comes of it, both by digest. So it is taken once, on that status and on no
//! other, or refused, and then the whole is told: nothing of it is lost, and nothing is taken twice.

use std::collections::{BTreeMap, BTreeSet};

use serde::{Deserialize, Serialize};

use super::{AppStatus, ReleaseLoad, Status};
use crate::{AppName, Digest};

/// What changed in a status.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct StatusDelta {
    /// The [digest](Status::digest) of the status that it is on top of.
    pub base: Digest,
    /// The digest of the status that comes of it.
    pub digest: Digest,
    /// All but the apps and the load, where something of it is other than it was.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub about: Option<Box<Status>>,
    /// The apps of which something is new.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub apps: Vec<AppStatus>,
    /// The apps that there are no more.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub gone: Vec<AppName>,
    /// How releases of the apps that are watched do: all of it, for it is in no digest.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub load: Vec<ReleaseLoad>,
}

/// Why a status must be told whole.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum StatusDeltaError {
    /// Another status is known, or none.
    #[error("what changed is on top of status {0}, which is not the one that is known")]
    Base(Digest),
    /// What comes of it is not what it says.
    #[error("what changed makes status {made}, and says that it makes {told}")]
    Made {
        /// The digest of what came of it.
        made: Digest,
        /// The digest that it names.
        told: Digest,
    },
}

impl Status {
    /// The digest of all of it but the load, which is another one each time.
    ///
    /// # Panics
    /// Never: a status is JSON.
    pub fn digest(&self) -> Digest {
        let json = |status: &Self| serde_json::to_vec(status).expect("a status has only string keys");
        Digest::of(&if self.load.is_empty() { json(self) } else { json(&Self { load: Vec::new(), ..self.clone() }) })
    }

    /// All but the apps and the load.
    fn about(&self) -> Self {
        Self {
            node: self.node.clone(),
            region: self.region.clone(),
            version: self.version.clone(),
            generation: self.generation,
            replication: self.replication,
            front: self.front,
            admin: self.admin,
            apps: Vec::new(),
            plan: self.plan.clone(),
            load: Vec::new(),
            labels: self.labels.clone(),
        }
    }

    /// The status that `delta` makes of this one, whose digest `own` is known to the caller.
    ///
    /// # Errors
    /// [`StatusDeltaError`]: it must be told whole.
    pub fn with(&self, delta: StatusDelta, own: Digest) -> Result<Self, StatusDeltaError> {
        if delta.base != own {
            return Err(StatusDeltaError::Base(delta.base));
        }
        let is_same = delta.about.is_none() && delta.apps.is_empty() && delta.gone.is_empty();
        let mut status = delta.about.map_or_else(|| self.about(), |about| *about);
        let gone: BTreeSet<&AppName> = delta.gone.iter().collect();
        let kept = self.apps.iter().filter(|app| !gone.contains(&app.app));
        let mut apps: BTreeMap<&AppName, &AppStatus> = kept.map(|app| (&app.app, app)).collect();
        apps.extend(delta.apps.iter().map(|app| (&app.app, app)));
        status.apps = if is_same { self.apps.clone() } else { apps.into_values().cloned().collect() };
        status.load = Vec::new();
        let made = if is_same { own } else { status.digest() };
        if made != delta.digest {
            return Err(StatusDeltaError::Made { made, told: delta.digest });
        }
        Ok(Self { load: delta.load, ..status })
    }
}

impl StatusDelta {
    /// What leads from `before`, whose digest is `base`, to `after`.
    pub fn between((before, base): (&Status, Digest), after: &Status) -> Self {
        let known: BTreeMap<&AppName, &AppStatus> = before.apps.iter().map(|app| (&app.app, app)).collect();
        let left: BTreeSet<&AppName> = after.apps.iter().map(|app| &app.app).collect();
        let about = after.about();
        let about = (about != before.about()).then(|| Box::new(about));
        let apps: Vec<AppStatus> = after.apps.iter().filter(|app| known.get(&app.app) != Some(app)).cloned().collect();
        let gone: Vec<AppName> = known.into_keys().filter(|app| !left.contains(app)).cloned().collect();
        let is_same = about.is_none() && apps.is_empty() && gone.is_empty();
        let digest = if is_same { base } else { after.digest() };
        Self { base, digest, about, apps, gone, load: after.load.clone() }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::plan::{Refusal, Serving};

    fn app(name: &str, release: u32) -> AppStatus {
        let serving = Serving { release: format!("{name}@{release}").parse().unwrap(), manifest: Digest::of(b"m") };
        AppStatus { app: name.parse().unwrap(), serving: Some(serving), refused: None, candidate: None }
    }

    fn status(generation: u64, apps: Vec<AppStatus>) -> Status {
        Status {
            node: "fra-1".parse().unwrap(),
            region: "fra".parse().unwrap(),
            version: "1".into(),
            generation,
            replication: Some(([192, 0, 2, 7], 7401).into()),
            front: None,
            admin: None,
            apps,
            plan: None,
            load: vec![ReleaseLoad { requests: generation, ..ReleaseLoad::none("b@1".parse().unwrap()) }],
            labels: [("tier".to_owned(), "edge".to_owned())].into(),
        }
    }

    fn between(before: &Status, after: &Status) -> StatusDelta {
        StatusDelta::between((before, before.digest()), after)
    }

    #[test]
    fn a_delta_makes_the_very_status() {
        let refusal =
            Refusal { release: "c@2".parse().unwrap(), cause: "unsigned".into(), reason: "nobody signed".into() };
        let first = status(3, vec![app("a", 1), app("b", 1), app("c", 1)]);
        let refused = AppStatus { refused: Some(refusal), ..app("c", 1) };
        for second in [
            first.clone(),
            status(4, vec![app("a", 1), app("b", 1), app("c", 1)]),
            status(4, vec![app("aa", 1), app("b", 2), refused]),
            status(3, Vec::new()),
            Status { labels: BTreeMap::new(), ..first.clone() },
            Status { load: Vec::new(), ..first.clone() },
        ] {
            let delta = between(&first, &second);
            let delta: StatusDelta = serde_json::from_slice(&serde_json::to_vec(&delta).unwrap()).unwrap();
            assert_eq!(first.with(delta, first.digest()).unwrap(), second);
        }
    }

    #[test]
    #[expect(clippy::print_stderr, reason = "the figures")]
    fn of_500_apps_only_what_is_new_is_told() {
        let apps = |first: u32| (0..500).map(|n| app(&format!("app-{n:03}"), if n == 0 { first } else { 1 })).collect();
        let (before, after) = (status(3, apps(1)), status(4, apps(2)));
        let bytes = |delta: &StatusDelta| serde_json::to_vec(delta).unwrap().len();
        let (one, none) = (bytes(&between(&before, &after)), bytes(&between(&before, &before)));
        let whole = serde_json::to_vec(&before).unwrap().len();
        eprintln!("whole {whole} bytes, one app of 500 {one}, nothing new {none}");
        assert!(whole > 70_000 && one < 800 && none < 300, "{whole} {one} {none}");
    }

    #[test]
    fn what_does_not_fit_is_refused_and_never_taken_twice() {
        let (first, second) = (status(3, vec![app("a", 1), app("b", 1)]), status(4, vec![app("a", 2)]));
        let delta = between(&first, &second);
        let taken = first.with(delta.clone(), first.digest()).unwrap();
        // Once more, and on top of something else.
        for known in [&taken, &status(2, Vec::new())] {
            let error = known.with(delta.clone(), known.digest()).unwrap_err();
            assert_eq!(error, StatusDeltaError::Base(first.digest()));
        }
        type Change = fn(&mut StatusDelta);
        let changes: [Change; 4] = [
            |delta| delta.apps.clear(),
            |delta| delta.gone.clear(),
            |delta| delta.about = None,
            |delta| delta.digest = Digest::of(b"other"),
        ];
        for change in changes {
            let mut changed = delta.clone();
            change(&mut changed);
            assert!(matches!(first.with(changed, first.digest()), Err(StatusDeltaError::Made { .. })));
        }
    }
}
