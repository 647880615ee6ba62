//! Releases: which manifest an app runs, now and before. Functions of the records alone.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_config::oci::Repository;
use selvage_config::plan::{PLAN_BYTES_MAX, Plan};
use selvage_config::release::{Release, ReleaseId};
use selvage_config::{AppName, Digest};

use crate::state::{AppRecord, Records, ReleaseRecord, StateError};

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
    pub(crate) created_by: String,
    pub(crate) created_ms: u64,
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

/// Makes the proposal the current release. True if there is a new one: the same manifest with the same variables as
/// the current release is the current release.
pub(crate) fn release(records: &mut Records, proposal: Proposal) -> Result<(Release, bool), ReleaseError> {
    let app = proposal.app.clone();
    let bytes = proposal.variables.iter().map(|(name, value)| name.len() + value.len()).sum();
    if bytes > VARIABLES_BYTES_MAX {
        return Err(ReleaseError::Variables { bytes });
    }
    let current = records.apps.get(&app).and_then(|record| record.current());
    if let Some(current) = current.map(|record| &record.release)
        && (&current.repository, &current.manifest) == (&proposal.repository, &proposal.manifest)
        && current.variables == proposal.variables
    {
        return Ok((current.clone(), false));
    }
    check_hosts(records, &app, &proposal.hosts)?;
    if !records.apps.contains_key(&app) && records.apps.len() >= APPS_MAX {
        return Err(ReleaseError::Apps);
    }
    let record = Arc::make_mut(records.apps.entry(app.clone()).or_default());
    let number = record.last.checked_add(1).ok_or(ReleaseError::Numbers { app: app.clone() })?;
    let made = Release {
        id: ReleaseId { app, number },
        repository: proposal.repository,
        manifest: proposal.manifest,
        variables: proposal.variables,
        created_ms: proposal.created_ms,
        created_by: proposal.created_by,
    };
    record.releases.insert(number, ReleaseRecord { release: made.clone(), hosts: proposal.hosts });
    record.last = number;
    record.current = Some(number);
    while record.releases.len() > RELEASES_KEPT {
        record.releases.pop_first();
    }
    check_plan(records)?;
    Ok((made, true))
}

/// Makes an earlier release current again: the one before, or the one named.
pub(crate) fn rollback(records: &mut Records, app: &AppName, to: Option<u32>) -> Result<Release, ReleaseError> {
    let no_app = || ReleaseError::NoApp { app: app.clone() };
    let record = records.apps.get(app).ok_or_else(no_app)?;
    let current = record.current.ok_or_else(no_app)?;
    let number = match to {
        Some(number) => number,
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
        let record = records.apps.get_mut(app).ok_or_else(no_app)?;
        Arc::make_mut(record).current = Some(number);
        check_plan(records)?;
    }
    Ok(target.release)
}

/// Takes an app off every plan and forgets its releases, with their variables. Its numbers stay used.
pub(crate) fn remove(records: &mut Records, app: &AppName) -> Result<(), ReleaseError> {
    match records.apps.get_mut(app) {
        Some(record) if record.current.is_some() => {
            *record = Arc::new(AppRecord { last: record.last, ..AppRecord::default() });
            Ok(())
        }
        _ => Err(ReleaseError::NoApp { app: app.clone() }),
    }
}

fn check_hosts(records: &Records, app: &AppName, hosts: &[String]) -> Result<(), ReleaseError> {
    let others = records.current().filter(|other| other.release.id.app != *app);
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
    let plan = Plan {
        node: "any".parse().expect("a valid name"),
        generation: records.generation,
        releases: records.current().map(|record| record.release.clone()).collect(),
        peers: Vec::new(),
        snapshot: None,
    };
    let json = |bytes: Result<Vec<u8>, serde_json::Error>| bytes.map_or(usize::MAX, |bytes| bytes.len());
    let listed = plan.releases.len().saturating_mul(LISTED_BYTES);
    // In an envelope it is a third larger.
    let snapshot = json(serde_json::to_vec(&*records.revoked)).saturating_add(listed).saturating_mul(2);
    let bytes = json(serde_json::to_vec(&plan)).saturating_add(snapshot).saturating_add(PLAN_REST_BYTES);
    if bytes > PLAN_BYTES_MAX { Err(ReleaseError::Plan { bytes }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn proposal(app: &str, content: &str) -> Proposal {
        Proposal {
            app: app.parse().unwrap(),
            repository: "apps/any".parse().unwrap(),
            manifest: Digest::of(content.as_bytes()),
            variables: BTreeMap::new(),
            hosts: Vec::new(),
            created_by: "ops".into(),
            created_ms: 1,
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
        assert_eq!(rollback(&mut records, &app, None).unwrap().id.number, 2);
        assert_eq!(rollback(&mut records, &app, None).unwrap().id.number, 1);
        assert!(matches!(rollback(&mut records, &app, None), Err(ReleaseError::Oldest { .. })));
        assert!(matches!(rollback(&mut records, &app, Some(9)), Err(ReleaseError::NoRelease { .. })));
        assert_eq!(rollback(&mut records, &app, Some(3)).unwrap().id.number, 3);
        assert_eq!(release(&mut records, proposal("hello", "d")).unwrap().0.id.number, 4);

        remove(&mut records, &app).unwrap();
        assert_eq!(current(&records, "hello"), None);
        assert!(matches!(remove(&mut records, &app), Err(ReleaseError::NoApp { .. })));
        assert!(matches!(rollback(&mut records, &app, None), Err(ReleaseError::NoApp { .. })));
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
        let back = rollback(&mut records, &"one".parse().unwrap(), None);
        assert!(matches!(back, Err(ReleaseError::Host { .. })), "{back:?}");
        assert_eq!(current(&records, "one").unwrap(), "one@3");
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
