//! What shall run here, as the control plane says: watched, kept on disk before it is acted on, never taken back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use selvage_config::plan::{NODES_PATH, PLAN_BYTES_MAX, PLAN_PATH, POLL_MS_MAX, Plan, STATUS_MS, Status};
use selvage_config::{AppName, NodeName};
use tokio::sync::watch;

use super::origin::{Backoff, Origin, OriginError, chain, jittered};
use super::state::State;

/// How long the control plane is asked to hold a question open.
const POLL: Duration = Duration::from_millis(POLL_MS_MAX * 2 / 3);
/// First and longest pause after a failure. The longest is what a fleet takes to come back to a control plane.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Most apps on one node.
const APPS_MAX: usize = 10_000;

/// Why a plan is not taken.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// It can't be had.
    #[error("ask for a plan")]
    Origin(#[from] OriginError),
    /// It is not of the schema.
    #[error("read plan")]
    Json(#[source] serde_json::Error),
    /// It is for another node.
    #[error("plan is for node {0}")]
    Node(NodeName),
    /// It is older than what this node has: the control plane was set back, or somebody replays.
    #[error("plan has generation {offered}, this node has taken {taken}")]
    Back {
        /// Its generation.
        offered: u64,
        /// What the node has.
        taken: u64,
    },
    /// It says two things of one app.
    #[error("plan has two releases of app {0}")]
    Twice(AppName),
    /// Too many apps.
    #[error("plan has {0} apps, the most is {APPS_MAX}")]
    Large(usize),
}

/// Reads a plan that was answered to the question for one after generation `taken`.
fn accept(bytes: &[u8], node: &NodeName, taken: u64) -> Result<Plan, PlanError> {
    let plan: Plan = serde_json::from_slice(bytes).map_err(PlanError::Json)?;
    if plan.node != *node {
        return Err(PlanError::Node(plan.node));
    }
    if plan.generation <= taken {
        return Err(PlanError::Back { offered: plan.generation, taken });
    }
    if plan.releases.len() > APPS_MAX {
        return Err(PlanError::Large(plan.releases.len()));
    }
    let mut apps = BTreeSet::new();
    match plan.releases.iter().find(|release| !apps.insert(&release.id.app)) {
        Some(twice) => Err(PlanError::Twice(twice.id.app.clone())),
        None => Ok(plan),
    }
}

/// The next plan, or none for now.
async fn ask(origin: &Origin, node: &NodeName, taken: u64) -> Result<Option<Plan>, PlanError> {
    let path = format!("{PLAN_PATH}/{node}?after={taken}&wait_ms={}", POLL.as_millis());
    let answer = origin.get_once(&path, "application/json", PLAN_BYTES_MAX as u64, POLL).await?;
    answer.map(|bytes| accept(&bytes, node, taken)).transpose()
}

/// Watches the plan for as long as somebody listens. Each new one is on disk before it is told.
pub async fn watch(origin: Origin, node: NodeName, state: State, plans: watch::Sender<Option<Arc<Plan>>>) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut is_reached = true;
    while !plans.is_closed() {
        let taken = plans.borrow().as_ref().map_or(0, |plan| plan.generation);
        let asked = Instant::now();
        match ask(&origin, &node, taken).await {
            Ok(plan) => {
                if !is_reached {
                    tracing::info!("control plane is back");
                }
                is_reached = true;
                match plan {
                    Some(plan) => {
                        backoff.reset();
                        tell(plan, &state, &plans).await;
                    }
                    None if asked.elapsed() >= POLL / 2 => backoff.reset(),
                    // A control plane that does not wait, or knows no such node, must not be asked in a loop.
                    None => tokio::time::sleep(backoff.pause()).await,
                }
            }
            Err(error) => {
                // Told once: what runs goes on, and the next lines would all be the same.
                if is_reached || !matches!(error, PlanError::Origin(_)) {
                    tracing::warn!(error = chain(&error), "no plan, the last one stays in force");
                }
                is_reached = !matches!(error, PlanError::Origin(_));
                tokio::time::sleep(backoff.pause()).await;
            }
        }
    }
}

async fn tell(plan: Plan, state: &State, plans: &watch::Sender<Option<Arc<Plan>>>) {
    let plan = Arc::new(plan);
    let (state, kept) = (state.clone(), Arc::clone(&plan));
    let kept = tokio::task::spawn_blocking(move || state.keep_plan(&kept)).await;
    // With a broken disk it is better to follow the fleet until the next start than to stand still.
    match kept {
        Ok(Ok(())) => {}
        Ok(Err(error)) => tracing::error!(error = chain(&error), "plan is not on disk"),
        Err(error) => tracing::error!(error = chain(&error), "plan is not on disk"),
    }
    tracing::info!(generation = plan.generation, apps = plan.releases.len(), "plan");
    plans.send_replace(Some(plan));
}

/// Tells the control plane what this node runs, at every change and every [`STATUS_MS`].
pub async fn report<T>(origin: Origin, mut changes: watch::Receiver<T>, status: impl Fn(&T) -> Status) {
    let mut is_heard = true;
    loop {
        let document = status(&changes.borrow_and_update());
        let path = format!("{NODES_PATH}/{}", document.node);
        match origin.put(&path, &document).await {
            Ok(()) => is_heard = true,
            Err(error) => {
                if is_heard {
                    tracing::warn!(error = chain(&error), "status is not told");
                }
                is_heard = false;
            }
        }
        // Dropping either branch is safe: neither holds anything.
        tokio::select! {
            changed = changes.changed() => {
                if changed.is_err() {
                    return;
                }
            }
            () = tokio::time::sleep(jittered(Duration::from_millis(STATUS_MS))) => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use selvage_config::Digest;
    use selvage_config::release::Release;

    use super::*;

    fn plan(generation: u64, apps: &[&str]) -> Plan {
        let release = |app: &&str| Release {
            id: format!("{app}@1").parse().unwrap(),
            repository: "acme/hello".parse().unwrap(),
            manifest: Digest::of(b""),
            variables: [].into(),
            created_ms: 1,
            created_by: "ops".into(),
        };
        Plan {
            node: "fra-1".parse().unwrap(),
            generation,
            releases: apps.iter().map(release).collect(),
            peers: Vec::new(),
        }
    }

    fn accepted(plan: &Plan, node: &str, taken: u64) -> Result<Plan, PlanError> {
        accept(&serde_json::to_vec(plan).unwrap(), &node.parse().unwrap(), taken)
    }

    #[test]
    fn a_newer_plan_is_taken() {
        let plan = plan(3, &["a", "b"]);
        assert_eq!(accepted(&plan, "fra-1", 2).unwrap(), plan);
    }

    #[test]
    fn a_node_never_goes_back() {
        for offered in [0, 1, 2] {
            let error = accepted(&plan(offered, &[]), "fra-1", 2).unwrap_err();
            assert!(matches!(error, PlanError::Back { taken: 2, .. }), "{error:?}");
        }
    }

    #[test]
    fn a_plan_for_another_node_is_refused() {
        assert!(matches!(accepted(&plan(1, &[]), "fra-2", 0), Err(PlanError::Node(_))));
    }

    #[test]
    fn a_plan_that_says_two_things_of_one_app_is_refused() {
        assert!(matches!(accepted(&plan(1, &["a", "a"]), "fra-1", 0), Err(PlanError::Twice(_))));
    }

    proptest::proptest! {
        #[test]
        fn no_bytes_panic(bytes: Vec<u8>) {
            let _ = accept(&bytes, &"fra-1".parse().unwrap(), 0);
        }
    }
}
