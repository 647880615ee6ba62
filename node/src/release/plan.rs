//! What shall run here, as the control plane says: watched, verified, kept on disk before it is acted on, never taken
//! back.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use reqwest::{Method, StatusCode};
use selvage_config::join::Authorities;
use selvage_config::plan::{
    DeltaError, NODES_PATH, News, PLAN_BYTES_MAX, PLAN_PATH, POLL_MS_MAX, Plan, STATUS_MS, Status, StatusDelta, Told,
    WATCHED_MS,
};
use selvage_config::root::{ROOT_BYTES_MAX, ROOTS_PATH};
use selvage_config::signature::Envelope;
use selvage_config::snapshot::{SNAPSHOT_PATH, SnapshotError};
use selvage_config::{AppName, Digest, NodeName};
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
/// Given for a nonce by who has none.
const NO_NONCE: &str = "none";
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
    /// What changed does not fit what is here: the plan is asked for whole.
    #[error("make a plan of what changed")]
    Delta(#[from] DeltaError),
    /// What changed is told to who has no plan.
    #[error("what changed in a plan was told, and there is none yet")]
    Baseless,
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

/// Reads what was answered to the question for a plan after generation `taken`: the plan, or what changed since `base`.
fn accept(bytes: &[u8], node: &NodeName, taken: u64, base: Option<&Plan>) -> Result<(Plan, String), PlanError> {
    let (nonce, plan) = match serde_json::from_slice(bytes) {
        Ok(News { nonce, plan }) => (nonce, plan),
        // A control plane of before there were deltas answers with the plan alone.
        Err(error) => match serde_json::from_slice(bytes) {
            Ok(plan) => (NO_NONCE.to_owned(), Told::Whole(plan)),
            Err(_) => return Err(PlanError::Json(error)),
        },
    };
    let plan = match (plan, base) {
        (Told::Whole(plan), _) => *plan,
        (Told::Delta(delta), Some(base)) => base.with(*delta)?,
        (Told::Delta(_), None) => return Err(PlanError::Baseless),
    };
    check(plan, node, taken).map(|plan| (plan, nonce))
}

/// Goes on only with a plan that is for this node, new, and says one thing of each app.
fn check(plan: Plan, node: &NodeName, taken: u64) -> Result<Plan, PlanError> {
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

/// The next plan, or none for now. `nonce` names what the control plane remembers of the last one; after anything that
/// went wrong it names nothing, and the plan comes whole.
async fn ask(origin: &Origin, course: &Course, nonce: &mut String) -> Result<Option<Plan>, PlanError> {
    let (node, taken) = (&course.node, course.taken());
    let given = std::mem::replace(nonce, NO_NONCE.to_owned());
    let path = format!("{PLAN_PATH}/{node}?after={taken}&nonce={given}&wait_ms={}", POLL.as_millis());
    let answer = origin.get_once(&path, "application/json", PLAN_BYTES_MAX as u64, POLL).await?;
    let Some(bytes) = answer else {
        *nonce = given;
        return Ok(None);
    };
    let base = course.plans.borrow().clone();
    let (plan, told) = accept(&bytes, node, taken, base.as_deref())?;
    if let Some(ledger) = &course.ledger {
        let accepted = ledger.accept(&plan, now_ms());
        if matches!(accepted, Err(SnapshotError::Untrusted { .. })) && follow(origin, ledger).await? {
            ledger.accept(&plan, now_ms())?;
        } else {
            accepted?;
        }
    }
    *nonce = told;
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
    let mut nonce = NO_NONCE.to_owned();
    while !course.plans.is_closed() {
        let asked = Instant::now();
        let answer = match ask(&origin, &course, &mut nonce).await {
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

/// Tells the control plane what this node runs, as far as it does not know it, at every change and every [`STATUS_MS`], or [`WATCHED_MS`] while it
/// looks at how something does. `authorities` are those that this node knows, and those of the fleet as it is told.
pub async fn report<T>(
    origin: Origin,
    mut changes: watch::Receiver<T>,
    authorities: (watch::Receiver<Option<Authorities>>, watch::Sender<Option<Authorities>>),
    status: impl Fn(&T) -> Status,
) {
    let mut is_heard = true;
    // The last that was taken.
    let mut taken = None;
    loop {
        let document = status(&changes.borrow_and_update());
        let pause = Duration::from_millis(if document.load.is_empty() { STATUS_MS } else { WATCHED_MS });
        let own = *authorities.0.borrow();
        match tell(&origin, document, &mut taken, own).await {
            Ok(fleets) => {
                is_heard = true;
                authorities.1.send_if_modified(|known| {
                    let is_new = fleets.is_some() && *known != fleets;
                    if is_new {
                        *known = fleets;
                    }
                    is_new
                });
            }
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

/// Tells a status: what changed since the last one that was taken, and where that does not fit, all of it. After an answer
/// that did not come nobody knows what was taken; the whole is right whatever that was.
async fn tell(
    origin: &Origin,
    document: Status,
    taken: &mut Option<(Status, Digest)>,
    own: Option<Authorities>,
) -> Result<Option<Authorities>, OriginError> {
    let path = format!("{NODES_PATH}/{}", document.node);
    if let Some((before, base)) = taken.take() {
        let delta = StatusDelta::between((&before, base), &document);
        match origin.tell(Method::PATCH, &path, &delta, own).await {
            Ok(fleets) => {
                *taken = Some((document, delta.digest));
                return Ok(fleets);
            }
            Err(OriginError::Status { status, .. }) if wants_all(status) => {
                tracing::debug!(%status, "the control plane asks for the whole status");
            }
            Err(error) => return Err(error),
        }
    }
    let fleets = origin.tell(Method::PUT, &path, &document, own).await?;
    let digest = document.digest();
    *taken = Some((document, digest));
    Ok(fleets)
}

/// Another status is known there, or none; or the control plane is of before there were deltas.
fn wants_all(status: StatusCode) -> bool {
    matches!(status, StatusCode::PRECONDITION_FAILED | StatusCode::NOT_FOUND | StatusCode::METHOD_NOT_ALLOWED)
}

#[cfg(test)]
mod tests {
    use selvage_config::plan::PlanDelta;
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
        let news = News { nonce: "n".into(), plan: Told::Whole(Box::new(plan.clone())) };
        accept(&serde_json::to_vec(&news).unwrap(), &node.parse().unwrap(), taken, None).map(|(plan, _)| plan)
    }

    #[test]
    fn what_changed_is_taken_on_top_of_the_plan_that_it_is_for() {
        let changed = PlanDelta {
            node: "fra-1".parse().unwrap(),
            base: 3,
            generation: 5,
            releases: plan(5, &["b"]).releases,
            gone: vec!["a".parse().unwrap()],
            peers: Vec::new(),
            left: Vec::new(),
            candidates: Vec::new(),
            watched: Vec::new(),
            drain: true,
            snapshot: None,
            homes: None,
            placements: None,
        };
        let news = News { nonce: "n".into(), plan: Told::Delta(Box::new(changed)) };
        let bytes = serde_json::to_vec(&news).unwrap();
        let accept = |taken, base: Option<&Plan>| accept(&bytes, &"fra-1".parse().unwrap(), taken, base);
        let (made, nonce) = accept(3, Some(&plan(3, &["a"]))).unwrap();
        assert_eq!((made, nonce.as_str()), (Plan { drain: true, ..plan(5, &["b"]) }, "n"));
        assert!(matches!(accept(4, Some(&plan(4, &["a"]))), Err(PlanError::Delta(DeltaError::Base { .. }))));
        assert!(matches!(accept(0, None), Err(PlanError::Baseless)));
        assert!(matches!(accept(5, Some(&plan(3, &["a"]))), Err(PlanError::Back { .. })));
    }

    #[test]
    fn a_newer_plan_is_taken() {
        let plan = plan(3, &["a", "b"]);
        assert_eq!(accepted(&plan, "fra-1", 2).unwrap(), plan);
        let alone = accept(&serde_json::to_vec(&plan).unwrap(), &plan.node, 2, None).unwrap();
        assert_eq!(alone, (plan, NO_NONCE.to_owned()));
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
            let _ = accept(&bytes, &"fra-1".parse().unwrap(), 0, Some(&plan(0, &["a"])));
        }
    }
}
