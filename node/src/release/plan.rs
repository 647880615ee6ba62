//! What shall run here, as the control plane says: watched, verified, kept on disk before it is acted on, never taken
//! back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use selvage_config::plan::{NODES_PATH, PLAN_BYTES_MAX, PLAN_PATH, POLL_MS_MAX, Plan, STATUS_MS, Status, WATCHED_MS};
use selvage_config::root::{ROOT_BYTES_MAX, ROOTS_PATH};
use selvage_config::signature::Envelope;
use selvage_config::snapshot::{SNAPSHOT_PATH, SnapshotError};
use selvage_config::{AppName, NodeName};
use tokio::sync::watch;

use super::ledger::{Ledger, LedgerError};
use super::origin::{Backoff, Origin, OriginError, chain, jittered};
use super::state::State;
use super::verify::Terms;
use crate::metrics::Metrics;

/// How long the control plane is asked to hold a question open.
const POLL: Duration = Duration::from_millis(POLL_MS_MAX * 2 / 3);
/// First and longest pause after a failure. The longest is what a fleet takes to come back to a control plane.
const RETRY: (Duration, Duration) = (Duration::from_millis(250), Duration::from_secs(15));
/// Roots that are read at once.
const ROOTS_AT_ONCE: usize = 16;
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
    /// It is not signed as it must be, or not new.
    #[error("verify plan")]
    Snapshot(#[from] SnapshotError),
    /// The roots that should say who signed it can't be followed.
    #[error("follow roots")]
    Roots(#[from] LedgerError),
}

/// Where plans go: the disk, the ledger that knows how far this node was, and those who act on them.
pub struct Course {
    /// Whose plans.
    pub node: NodeName,
    /// The disk.
    pub state: State,
    /// What was signed so far. None: plans need no signature.
    pub ledger: Option<Ledger>,
    /// Whose word counts; what a plan revokes does not any more.
    pub terms: watch::Sender<Arc<Terms>>,
    /// What is counted.
    pub metrics: Metrics,
    /// Who acts.
    pub plans: watch::Sender<Option<Arc<Plan>>>,
}

/// Milliseconds since 1970, by this machine's clock.
pub fn now_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
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
    let mut seconds = BTreeSet::new();
    if let Some(twice) = plan.candidates.iter().find(|second| !seconds.insert(&second.release.id.app)) {
        return Err(PlanError::Twice(twice.release.id.app.clone()));
    }
    let mut apps = BTreeSet::new();
    match plan.releases.iter().find(|release| !apps.insert(&release.id.app)) {
        Some(twice) => Err(PlanError::Twice(twice.id.app.clone())),
        None => Ok(plan),
    }
}

/// The next plan, or none for now.
async fn ask(origin: &Origin, course: &Course) -> Result<Option<Plan>, PlanError> {
    let (node, taken) = (&course.node, course.taken());
    let path = format!("{PLAN_PATH}/{node}?after={taken}&wait_ms={}", POLL.as_millis());
    let answer = origin.get_once(&path, "application/json", PLAN_BYTES_MAX as u64, POLL).await?;
    let Some(plan) = answer.map(|bytes| accept(&bytes, node, taken)).transpose()? else { return Ok(None) };
    if let Some(ledger) = &course.ledger {
        let accepted = ledger.accept(&plan, now_ms());
        if matches!(accepted, Err(SnapshotError::Untrusted { .. })) && follow(origin, ledger).await? {
            ledger.accept(&plan, now_ms())?;
        } else {
            accepted?;
        }
    }
    Ok(Some(plan))
}

/// Follows the roots that came after this node's.
async fn follow(origin: &Origin, ledger: &Ledger) -> Result<bool, PlanError> {
    let path = format!("{ROOTS_PATH}?after={}", ledger.root());
    let bytes_max = (ROOT_BYTES_MAX * ROOTS_AT_ONCE) as u64;
    let Some(bytes) = origin.get_once(&path, "application/json", bytes_max, Duration::ZERO).await? else {
        return Ok(false);
    };
    let roots: Vec<Envelope> = serde_json::from_slice(&bytes).map_err(PlanError::Json)?;
    let ledger = ledger.clone();
    let followed = tokio::task::spawn_blocking(move || ledger.follow(&roots)).await;
    Ok(followed.unwrap_or(Ok(false))?)
}

/// Asks for a younger signature once half of the time of this node's is over, and for new roots with it.
async fn refresh(origin: &Origin, course: &Course) -> Result<(), PlanError> {
    let Some(ledger) = course.ledger.as_ref().filter(|ledger| ledger.is_old(now_ms())) else { return Ok(()) };
    follow(origin, ledger).await?;
    let answer = origin.get_once(SNAPSHOT_PATH, "application/json", PLAN_BYTES_MAX as u64, Duration::ZERO).await?;
    let Some(bytes) = answer else { return Ok(()) };
    let envelope: Envelope = serde_json::from_slice(&bytes).map_err(PlanError::Json)?;
    if !ledger.refresh(&envelope, now_ms())? {
        course.keep_ledger().await;
    }
    Ok(())
}

/// Watches the plan for as long as somebody listens. Each new one is on disk before it is told.
pub async fn watch(origin: Origin, course: Course) {
    let mut backoff = Backoff::new(RETRY.0, RETRY.1);
    let mut is_reached = true;
    let mut told = String::new();
    while !course.plans.is_closed() {
        let asked = Instant::now();
        let answer = match ask(&origin, &course).await {
            Ok(None) => refresh(&origin, &course).await.map(|()| None),
            other => other,
        };
        course.look();
        match answer {
            Ok(plan) => {
                if !is_reached {
                    tracing::info!("control plane is back");
                }
                is_reached = true;
                match plan {
                    Some(plan) => {
                        told.clear();
                        backoff.reset();
                        course.tell(plan).await;
                    }
                    None if asked.elapsed() >= POLL / 2 => backoff.reset(),
                    // A control plane that does not wait, or knows no such node, must not be asked in a loop.
                    None => tokio::time::sleep(backoff.pause()).await,
                }
            }
            Err(error) => {
                if let PlanError::Snapshot(refused) = &error {
                    course.metrics.plan_refused(refused.cause());
                }
                // Told once: what runs goes on, and the next lines would all be the same.
                let text = chain(&error);
                if matches!(error, PlanError::Origin(_)) && is_reached || text != told {
                    tracing::warn!(error = text, "no plan, the last one stays in force");
                }
                is_reached = !matches!(error, PlanError::Origin(_));
                told = text;
                tokio::time::sleep(backoff.pause()).await;
            }
        }
    }
}

impl Course {
    /// The generation that is in force. With all new keys it is 0 again.
    fn taken(&self) -> u64 {
        let planned = self.plans.borrow().as_ref().map_or(0, |plan| plan.generation);
        self.ledger.as_ref().map_or(planned, |ledger| planned.min(ledger.floor()))
    }

    async fn tell(&self, plan: Plan) {
        let plan = Arc::new(plan);
        self.keep_ledger().await;
        let (state, kept) = (self.state.clone(), Arc::clone(&plan));
        let kept = tokio::task::spawn_blocking(move || state.keep_plan(&kept)).await;
        // With a broken disk it is better to follow the fleet until the next start than to stand still.
        match kept {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(error = chain(&error), "plan is not on disk"),
            Err(error) => tracing::error!(error = chain(&error), "plan is not on disk"),
        }
        tracing::info!(generation = plan.generation, apps = plan.releases.len(), "plan");
        self.plans.send_replace(Some(plan));
    }

    /// Writes down how far this node is; then what is revoked counts no more.
    async fn keep_ledger(&self) {
        let Some(ledger) = &self.ledger else { return };
        let keeping = ledger.clone();
        match tokio::task::spawn_blocking(move || keeping.keep()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(error = chain(&error), "ledger is not on disk"),
            Err(error) => tracing::error!(error = chain(&error), "ledger is not on disk"),
        }
        let revoked = ledger.revoked();
        self.terms.send_if_modified(|terms| {
            let is_new = terms.revoked != revoked;
            if is_new {
                *terms = Arc::new(Terms::new(terms.policy.clone(), revoked));
            }
            is_new
        });
    }

    /// Tells when the snapshot ends, and when there is a younger one again.
    fn look(&self) {
        let Some(ledger) = &self.ledger else { return };
        let now = now_ms();
        let status = ledger.status(now);
        self.metrics.snapshot(status.version, status.expires_ms / 1_000, status.expired);
        match ledger.expired_now(now) {
            Some(true) => tracing::error!(
                version = status.version,
                "the signed plan is past its end: the control plane is gone, or somebody keeps news from this node; it serves on"
            ),
            Some(false) => tracing::info!(version = status.version, "the signed plan is young again"),
            None => {}
        }
    }
}

/// Tells the control plane what this node runs, at every change and every [`STATUS_MS`], or [`WATCHED_MS`] while it
/// looks at how something does.
pub async fn report<T>(origin: Origin, mut changes: watch::Receiver<T>, status: impl Fn(&T) -> Status) {
    let mut is_heard = true;
    loop {
        let document = status(&changes.borrow_and_update());
        let path = format!("{NODES_PATH}/{}", document.node);
        let pause = Duration::from_millis(if document.load.is_empty() { STATUS_MS } else { WATCHED_MS });
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
            () = tokio::time::sleep(jittered(pause)) => {}
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
        Plan::new("fra-1".parse().unwrap(), generation, apps.iter().map(release).collect(), Vec::new())
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
