//! Releases: which manifest an app runs, now and before. Functions of the records alone.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use selvage_config::app::variables::is_variable_name;
use selvage_config::oci::Repository;
use selvage_config::plan::{PLAN_BYTES_MAX, Plan};
use selvage_config::release::{Release, ReleaseId};
use selvage_config::rollout::{Gate, Selection, WAVES_MAX, Wave};
use selvage_config::{AppName, Digest};

use crate::answers::Share;
use crate::state::{AppRecord, Records, ReleaseRecord, RolloutRecord, SplitRecord, Stage, StateError};

/// Releases of one app that are kept to go back to; the oldest goes first.
pub(crate) const RELEASES_KEPT: usize = 50;
/// Apps, removed ones included.
pub(crate) const APPS_MAX: usize = 10_000;
/// Names and values of one release's variables, bytes.
pub(crate) const VARIABLES_BYTES_MAX: usize = 64 * 1024;
/// What a plan may say besides its releases, mostly peers, bytes.
const PLAN_REST_BYTES: usize = 2 * 1024 * 1024;

/// What the signed list says of one release, bytes at most.
const LISTED_BYTES: usize = 160;

/// What is to become a release. That the manifest exists and is this app's was checked.
#[derive(Debug, Clone)]
pub(crate) struct Proposal {
    pub(crate) app: AppName,
    pub(crate) repository: Repository,
    pub(crate) manifest: Digest,
    pub(crate) variables: BTreeMap<String, String>,
    pub(crate) hosts: Vec<String>,
    pub(crate) declared: BTreeSet<String>,
    pub(crate) created_by: String,
    pub(crate) created_ms: u64,
    pub(crate) how: How,
}

/// How a release comes into use.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum How {
    /// On every node, for every request, now.
    AtOnce,
    /// On every node, for a part of the visitors, until somebody says more.
    Split(Share),
    /// On some nodes, then on more, as long as it does well.
    Waves { waves: Vec<Wave>, gate: Gate },
}

/// Why the current release of an app did not change.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ReleaseError {
    #[error("app {app} and app {other} both claim host {host:?}")]
    Host { app: AppName, other: AppName, host: String },
    #[error("there is no app {app}")]
    NoApp { app: AppName },
    #[error("there is no release {id}")]
    NoRelease { id: ReleaseId },
    #[error("{id} is the oldest release that is kept")]
    Oldest { id: ReleaseId },
    #[error("app {app} has no release beside which another could serve")]
    Alone { app: AppName },
    #[error("{percent} is no percentage")]
    Percent { percent: u8 },
    #[error("a rollout has 1 to {WAVES_MAX} waves")]
    Waves,
    #[error("a rollout of {id} is under way")]
    Moving { id: ReleaseId },
    #[error("{id} is the current release")]
    Current { id: ReleaseId },
    #[error("app {app} has no split")]
    NoSplit { app: AppName },
    #[error("{name:?} is no name of a variable")]
    Secret { name: String },
    #[error("there are {APPS_MAX} apps")]
    Apps,
    #[error("app {app} has used up its release numbers")]
    Numbers { app: AppName },
    #[error("variables have {bytes} bytes, the most is {VARIABLES_BYTES_MAX}")]
    Variables { bytes: usize },
    #[error("the plan would have {bytes} bytes, the most is {PLAN_BYTES_MAX}")]
    Plan { bytes: usize },
    #[error(transparent)]
    State(#[from] StateError),
}

/// Makes a release of the proposal and begins to use it. True if there is a new one: the same manifest with the same
/// variables as the current release, or as the one that is being rolled out, is that release.
pub(crate) fn release(records: &mut Records, proposal: Proposal) -> Result<(Release, bool), ReleaseError> {
    let app = proposal.app.clone();
    check_variables(&proposal.variables)?;
    if let Some(known) = records.apps.get(&app).and_then(|record| same(record, &proposal)) {
        return Ok((known, false));
    }
    check_hosts(records, &app, &proposal.hosts)?;
    if !records.apps.contains_key(&app) && records.apps.len() >= APPS_MAX {
        return Err(ReleaseError::Apps);
    }
    let record = Arc::make_mut(records.apps.entry(app.clone()).or_default());
    let number = record.last.checked_add(1).ok_or(ReleaseError::Numbers { app: app.clone() })?;
    let (now_ms, how) = (proposal.created_ms, proposal.how);
    let made = Release {
        id: ReleaseId { app, number },
        repository: proposal.repository,
        manifest: proposal.manifest,
        variables: proposal.variables,
        created_ms: proposal.created_ms,
        created_by: proposal.created_by,
    };
    let kept = ReleaseRecord { release: made.clone(), hosts: proposal.hosts, declared: proposal.declared };
    record.releases.insert(number, kept);
    record.last = number;
    use_release(record, &made.id, how, now_ms)?;
    let in_plans = record.in_plans();
    while record.releases.len() > RELEASES_KEPT {
        let Some(oldest) = record.releases.keys().copied().find(|number| !in_plans.contains(number)) else { break };
        record.releases.remove(&oldest);
    }
    check_plan(records)?;
    Ok((made, true))
}

/// The release that the proposal is already, if it is one that is in use or comes into use.
fn same(record: &AppRecord, proposal: &Proposal) -> Option<Release> {
    let coming = record.running().map(|rollout| rollout.to);
    let known = coming.or(record.current).and_then(|number| record.releases.get(&number))?;
    let is_same = (&known.release.repository, &known.release.manifest) == (&proposal.repository, &proposal.manifest)
        && known.release.variables == proposal.variables;
    is_same.then(|| known.release.clone())
}

/// Begins to use a release that is there. What was under way before it ends.
pub(crate) fn use_release(record: &mut AppRecord, id: &ReleaseId, how: How, now_ms: u64) -> Result<(), ReleaseError> {
    match how {
        How::AtOnce => {
            (record.current, record.split, record.rollout) = (Some(id.number), None, None);
        }
        How::Split(Share { percent, key, named }) => {
            if percent > 100 {
                return Err(ReleaseError::Percent { percent });
            }
            if let Some(rollout) = record.running() {
                return Err(ReleaseError::Moving { id: ReleaseId { number: rollout.to, ..id.clone() } });
            }
            match record.current {
                None => return Err(ReleaseError::Alone { app: id.app.clone() }),
                Some(current) if current == id.number => return Err(ReleaseError::Current { id: id.clone() }),
                Some(_) => record.split = Some(SplitRecord { release: id.number, percent, key, named }),
            }
        }
        How::Waves { mut waves, gate } => {
            if waves.is_empty() || waves.len() > WAVES_MAX {
                return Err(ReleaseError::Waves);
            }
            // The last wave takes everybody who is there, so that a rollout that is done is done.
            if waves.last().is_some_and(|wave| wave.nodes != Selection::Percent(100)) {
                waves.push(Wave { nodes: Selection::Percent(100), bake_ms: 0 });
            }
            record.split = None;
            record.rollout = Some(RolloutRecord {
                to: id.number,
                waves,
                gate,
                wave: 0,
                since_ms: now_ms,
                serving_ms: None,
                taken: BTreeSet::new(),
                state: Stage::Running,
            });
        }
    }
    Ok(())
}

/// Takes back the last move: a rollout under way or a split ends, or else an earlier release is current again: the one
/// before, or the one named.
pub(crate) fn rollback(
    records: &mut Records,
    app: &AppName,
    to: Option<u32>,
    reason: &str,
) -> Result<Release, ReleaseError> {
    let no_app = || ReleaseError::NoApp { app: app.clone() };
    let record = records.apps.get(app).ok_or_else(no_app)?;
    let Some(current) = record.current else {
        // A first release on its way: going back is to nothing.
        let coming = record.running().and_then(|rollout| record.releases.get(&rollout.to));
        let coming = coming.map(|record| record.release.clone()).ok_or_else(no_app)?;
        halt(Arc::make_mut(records.apps.get_mut(app).ok_or_else(no_app)?), reason);
        return Ok(coming);
    };
    let is_moving = record.running().is_some() || record.split.is_some();
    let number = match to {
        Some(number) => number,
        None if is_moving => current,
        None => record
            .releases
            .range(..current)
            .next_back()
            .map(|(number, _)| *number)
            .ok_or_else(|| ReleaseError::Oldest { id: ReleaseId { app: app.clone(), number: current } })?,
    };
    let target = record
        .releases
        .get(&number)
        .cloned()
        .ok_or_else(|| ReleaseError::NoRelease { id: ReleaseId { app: app.clone(), number } })?;
    if number != current {
        // Another app may have taken a host since this release was current.
        check_hosts(records, app, &target.hosts)?;
    }
    let record = Arc::make_mut(records.apps.get_mut(app).ok_or_else(no_app)?);
    record.current = Some(number);
    record.split = None;
    halt(record, reason);
    check_plan(records)?;
    Ok(target.release)
}

fn halt(record: &mut AppRecord, reason: &str) {
    if let Some(rollout) = record.rollout.as_mut().filter(|rollout| rollout.state == Stage::Running) {
        rollout.state = Stage::Halted { reason: reason.to_owned() };
    }
}

/// Lets a release that is there serve a part of the visitors beside the current one, or no longer.
pub(crate) fn split(records: &mut Records, id: &ReleaseId, share: Option<Share>) -> Result<Release, ReleaseError> {
    let no_app = || ReleaseError::NoApp { app: id.app.clone() };
    let no_release = || ReleaseError::NoRelease { id: id.clone() };
    let record = records.apps.get(&id.app).ok_or_else(no_app)?;
    let target = record.releases.get(&id.number).cloned().ok_or_else(no_release)?;
    if share.is_some() {
        check_hosts(records, &id.app, &target.hosts)?;
    }
    let record = Arc::make_mut(records.apps.get_mut(&id.app).ok_or_else(no_app)?);
    match share {
        Some(share) => use_release(record, id, How::Split(share), 0)?,
        None if record.split.as_ref().is_some_and(|split| split.release == id.number) => record.split = None,
        None => return Err(ReleaseError::NoSplit { app: id.app.clone() }),
    }
    check_plan(records)?;
    Ok(target.release)
}

/// Sets the value of a variable that releases do not carry, or takes it away.
pub(crate) fn secret(
    records: &mut Records,
    app: &AppName,
    name: &str,
    value: Option<String>,
) -> Result<(), ReleaseError> {
    if !is_variable_name(name) {
        return Err(ReleaseError::Secret { name: name.chars().take(80).collect() });
    }
    if !records.apps.contains_key(app) && records.apps.len() >= APPS_MAX {
        return Err(ReleaseError::Apps);
    }
    let record = Arc::make_mut(records.apps.entry(app.clone()).or_default());
    match value {
        Some(value) => drop(record.secrets.insert(name.to_owned(), value)),
        None => drop(record.secrets.remove(name)),
    }
    check_variables(&record.secrets)?;
    check_plan(records)
}

/// Takes an app off every plan and forgets its releases, with their variables and secrets. Its numbers stay used.
pub(crate) fn remove(records: &mut Records, app: &AppName) -> Result<(), ReleaseError> {
    match records.apps.get_mut(app) {
        Some(record) if !record.releases.is_empty() => {
            *record = Arc::new(AppRecord { last: record.last, ..AppRecord::default() });
            Ok(())
        }
        _ => Err(ReleaseError::NoApp { app: app.clone() }),
    }
}

fn check_variables(variables: &BTreeMap<String, String>) -> Result<(), ReleaseError> {
    let bytes = variables.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > VARIABLES_BYTES_MAX { Err(ReleaseError::Variables { bytes }) } else { Ok(()) }
}

fn check_hosts(records: &Records, app: &AppName, hosts: &[String]) -> Result<(), ReleaseError> {
    let others = records.planned().filter(|other| other.release.id.app != *app);
    for other in others {
        if let Some(host) = hosts.iter().find(|host| other.hosts.contains(host)) {
            let other = other.release.id.app.clone();
            return Err(ReleaseError::Host { app: app.clone(), other, host: host.clone() });
        }
    }
    Ok(())
}

/// A plan that no node would read is refused here, where somebody can do something about it.
fn check_plan(records: &Records) -> Result<(), ReleaseError> {
    // More than any one node gets: every release that some plan may name.
    let releases = records.apps.values().flat_map(|app| {
        let planned = app.in_plans().into_iter().filter_map(|number| app.releases.get(&number));
        planned.map(|record| app.delivered(record))
    });
    let plan = Plan::new("any".parse().expect("a valid name"), records.generation, releases.collect(), Vec::new());
    let json = |bytes: Result<Vec<u8>, serde_json::Error>| bytes.map_or(usize::MAX, |bytes| bytes.len());
    let listed = records.nameable().count().saturating_mul(LISTED_BYTES);
    // In an envelope it is a third larger.
    let snapshot = json(serde_json::to_vec(&*records.revoked)).saturating_add(listed).saturating_mul(2);
    let bytes = json(serde_json::to_vec(&plan)).saturating_add(snapshot).saturating_add(PLAN_REST_BYTES);
    if bytes > PLAN_BYTES_MAX { Err(ReleaseError::Plan { bytes }) } else { Ok(()) }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    pub(crate) fn proposal(app: &str, content: &str) -> Proposal {
        Proposal {
            app: app.parse().unwrap(),
            repository: "apps/any".parse().unwrap(),
            manifest: Digest::of(content.as_bytes()),
            variables: BTreeMap::new(),
            hosts: Vec::new(),
            declared: BTreeSet::new(),
            created_by: "ops".into(),
            created_ms: 1,
            how: How::AtOnce,
        }
    }

    fn current(records: &Records, app: &str) -> Option<String> {
        records.apps[&app.parse().unwrap()].current().map(|record| record.release.id.to_string())
    }

    #[test]
    fn a_rollback_goes_back_one_by_one_and_numbers_only_grow() {
        let mut records = Records::default();
        let app = "hello".parse().unwrap();
        for content in ["a", "b", "c"] {
            release(&mut records, proposal("hello", content)).unwrap();
        }
        assert_eq!(rollback(&mut records, &app, None, "x").unwrap().id.number, 2);
        assert_eq!(rollback(&mut records, &app, None, "x").unwrap().id.number, 1);
        assert!(matches!(rollback(&mut records, &app, None, "x"), Err(ReleaseError::Oldest { .. })));
        assert!(matches!(rollback(&mut records, &app, Some(9), "x"), Err(ReleaseError::NoRelease { .. })));
        assert_eq!(rollback(&mut records, &app, Some(3), "x").unwrap().id.number, 3);
        assert_eq!(release(&mut records, proposal("hello", "d")).unwrap().0.id.number, 4);

        remove(&mut records, &app).unwrap();
        assert_eq!(current(&records, "hello"), None);
        assert!(matches!(remove(&mut records, &app), Err(ReleaseError::NoApp { .. })));
        assert!(matches!(rollback(&mut records, &app, None, "x"), Err(ReleaseError::NoApp { .. })));
        assert_eq!(release(&mut records, proposal("hello", "e")).unwrap().0.id.number, 5);
    }

    #[test]
    fn the_same_release_again_is_the_same_release() {
        let mut records = Records::default();
        assert!(release(&mut records, proposal("hello", "a")).unwrap().1);
        let (again, new) = release(&mut records, proposal("hello", "a")).unwrap();
        assert_eq!((again.id.number, new), (1, false));
        let mut other = proposal("hello", "a");
        other.variables.insert("k".into(), "v".into());
        assert_eq!(release(&mut records, other).unwrap().0.id.number, 2);
    }

    #[test]
    fn two_apps_cannot_have_one_host() {
        let mut records = Records::default();
        let with_host = |app, content| Proposal { hosts: vec!["a.test".into()], ..proposal(app, content) };
        release(&mut records, with_host("one", "a")).unwrap();
        release(&mut records, with_host("one", "b")).unwrap();
        let error = release(&mut records, with_host("two", "a")).unwrap_err().to_string();
        assert!(error.contains("one") && error.contains("two") && error.contains("a.test"), "{error}");

        // The host is free once its app lets go of it, and then not to be had back by a rollback.
        release(&mut records, proposal("one", "c")).unwrap();
        release(&mut records, with_host("two", "a")).unwrap();
        let back = rollback(&mut records, &"one".parse().unwrap(), None, "x");
        assert!(matches!(back, Err(ReleaseError::Host { .. })), "{back:?}");
        assert_eq!(current(&records, "one").unwrap(), "one@3");
    }

    fn in_waves(app: &str, content: &str) -> Proposal {
        let waves = vec!["1%".parse().unwrap()];
        Proposal { how: How::Waves { waves, gate: Gate::default() }, ..proposal(app, content) }
    }

    #[test]
    fn a_rollout_leaves_the_old_release_current_and_going_back_ends_it() {
        let mut records = Records::default();
        let app: AppName = "hello".parse().unwrap();
        release(&mut records, in_waves("hello", "a")).unwrap();
        assert_eq!(current(&records, "hello"), None);
        // The same again is what is on its way.
        assert!(!release(&mut records, in_waves("hello", "a")).unwrap().1);
        assert_eq!(rollback(&mut records, &app, None, "x").unwrap().id.number, 1);
        assert!(records.apps[&app].running().is_none());
        release(&mut records, proposal("hello", "b")).unwrap();
        release(&mut records, in_waves("hello", "c")).unwrap();
        assert_eq!(current(&records, "hello").unwrap(), "hello@2");
        let split = Proposal {
            how: How::Split(Share { percent: 5, key: selvage_config::rollout::SplitKey::Client, named: false }),
            ..proposal("hello", "d")
        };
        assert!(matches!(release(&mut records, split), Err(ReleaseError::Moving { .. })));
        assert_eq!(rollback(&mut records, &app, None, "x").unwrap().id.number, 2);
        let rollout = records.apps[&app].rollout.clone().unwrap();
        assert_eq!((rollout.to, rollout.state), (3, Stage::Halted { reason: "x".into() }));
    }

    #[test]
    fn a_host_is_claimed_by_what_is_on_its_way_too() {
        let mut records = Records::default();
        release(&mut records, Proposal { hosts: vec!["a.test".into()], ..in_waves("one", "a") }).unwrap();
        let other = release(&mut records, Proposal { hosts: vec!["a.test".into()], ..proposal("two", "a") });
        assert!(matches!(other, Err(ReleaseError::Host { .. })), "{other:?}");
    }

    #[test]
    fn old_releases_are_let_go() {
        let mut records = Records::default();
        for number in 0..RELEASES_KEPT + 2 {
            release(&mut records, proposal("hello", &number.to_string())).unwrap();
        }
        let kept = &records.apps[&"hello".parse().unwrap()].releases;
        assert_eq!((kept.len(), kept.keys().next()), (RELEASES_KEPT, Some(&3)));
    }

    #[test]
    fn what_no_node_could_read_is_refused() {
        let mut records = Records::default();
        let large = |app: &str, bytes: usize| Proposal {
            variables: [("k".to_owned(), "v".repeat(bytes))].into(),
            ..proposal(app, "a")
        };
        let refused = release(&mut records, large("one", VARIABLES_BYTES_MAX)).unwrap_err();
        assert!(matches!(refused, ReleaseError::Variables { .. }), "{refused:?}");
        release(&mut records, large("one", 60_000)).unwrap();
        let one = Arc::clone(&records.apps[&"one".parse().unwrap()]);
        for number in 0..PLAN_BYTES_MAX / 60_000 {
            records.apps.insert(format!("app-{number}").parse().unwrap(), Arc::clone(&one));
        }
        let refused = release(&mut records, proposal("two", "a")).unwrap_err();
        assert!(matches!(refused, ReleaseError::Plan { .. }), "{refused:?}");
    }
}
