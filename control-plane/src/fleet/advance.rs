//! Moving rollouts on, and telling how far they are.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use selvage_config::plan::{AppStatus, SILENT_MS};
use selvage_config::release::ReleaseId;
use selvage_config::{AppName, NodeName};

use super::{Fleet, is_recent};
use crate::answers::{NodeAnswer, NodeRollout, Rollout, RolloutState, WaveAnswer, WaveStage};
use crate::releases::ReleaseError;
use crate::rollouts::{self, Seen, Step};
use crate::state::{Records, RolloutRecord, Stage, StateError};

/// A step that a rollout made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Moved {
    pub(crate) release: ReleaseId,
    /// Where it stood before, and where it stands now: for the audit log.
    pub(crate) before: String,
    pub(crate) after: String,
}

impl Fleet {
    /// Moves every rollout that can go on one step further; waits on the disk.
    pub(crate) fn advance(&self, now_ms: u64) -> Result<Vec<Moved>, StateError> {
        let records = self.records();
        let mut moved = Vec::new();
        for (app, record) in &records.apps {
            let Some(rollout) = record.running() else { continue };
            let release = ReleaseId { app: app.clone(), number: rollout.to };
            let old = record.current.map(|number| ReleaseId { app: app.clone(), number });
            let compared = self.loads.compared(&release, old.as_ref());
            let step = rollouts::next(rollout, &release, &self.seen(&records, app), &compared, now_ms);
            if step == Step::Wait {
                continue;
            }
            let (changed, _) =
                self.change(|records| Ok::<_, StateError>(apply(records, app, rollout, step.clone(), now_ms)))?;
            let Some(after) = changed else { continue };
            let before = described(rollout);
            tracing::info!(%release, before, after, "rollout");
            moved.push(Moved { release, before, after });
        }
        Ok(moved)
    }

    /// Whether some rollout is under way.
    pub(crate) fn is_moving(&self) -> bool {
        self.records().apps.values().any(|app| app.running().is_some())
    }

    /// The nodes that take part in rollouts.
    fn seen(&self, records: &Records, app: &AppName) -> Vec<Seen> {
        let takes_part =
            |node: &NodeName| records.members.get(node).is_none_or(|member| member.cordon.is_none() && !member.revoked);
        let nodes = records.nodes.iter().filter(|(node, _)| takes_part(node));
        nodes
            .map(|(node, record)| Seen {
                node: node.clone(),
                region: record.status.region.clone(),
                labels: records.labels(node),
                is_alive: self.counts_as_alive(node),
                app: record.status.apps.iter().find(|status| status.app == *app).cloned(),
            })
            .collect()
    }

    /// Just after a start nobody can have been heard of, and nobody is silent. So it is when what nodes tell other control
    /// planes begins to come again.
    fn counts_as_alive(&self, node: &NodeName) -> bool {
        let hears_since = *self.hears_since.lock().unwrap_or_else(PoisonError::into_inner);
        self.seen_ago(node).is_some_and(is_recent) || hears_since.elapsed() < Duration::from_millis(SILENT_MS)
    }

    /// How far a release has come on the nodes that are alive.
    pub(crate) fn rollout(&self, app: &AppName, number: Option<u32>) -> Result<Rollout, ReleaseError> {
        let records = self.records();
        let record = records.apps.get(app).ok_or_else(|| ReleaseError::NoApp { app: app.clone() })?;
        let coming = record.running().map(|rollout| rollout.to);
        let number = number.or(coming).or(record.current).ok_or_else(|| ReleaseError::NoApp { app: app.clone() })?;
        let release = ReleaseId { app: app.clone(), number };
        if !record.releases.contains_key(&number) {
            return Err(ReleaseError::NoRelease { id: release });
        }
        // A cordoned node keeps what it has: nobody waits for it.
        let alive = self.nodes(None).into_iter().filter(|node| node.alive && !node.cordoned && !node.revoked);
        let nodes: Vec<NodeRollout> = alive
            .map(|NodeAnswer { status, .. }| NodeRollout {
                state: rollout_state(&status.apps, &release),
                node: status.node,
                region: status.region,
            })
            .collect();
        let count = |is: fn(&RolloutState) -> bool| nodes.iter().filter(|node| is(&node.state)).count();
        Ok(Rollout {
            serving: count(|state| matches!(state, RolloutState::Serving)),
            pending: count(|state| matches!(state, RolloutState::Pending)),
            refused: count(|state| matches!(state, RolloutState::Refused { .. })),
            wave: record.rollout.as_ref().filter(|rollout| rollout.to == number).map(wave_answer),
            release,
            nodes,
        })
    }
}

/// Makes the step, if the rollout still stands where it was looked at. Answers where it stands then.
fn apply(records: &mut Records, app: &AppName, seen: &RolloutRecord, step: Step, now_ms: u64) -> Option<String> {
    let record = Arc::make_mut(records.apps.get_mut(app)?);
    let rollout = record.rollout.as_mut().filter(|rollout| *rollout == seen)?;
    match step {
        Step::Wait => return None,
        Step::Take(nodes) => {
            rollout.taken.extend(nodes);
            rollout.serving_ms = None;
        }
        Step::Bake => rollout.serving_ms = Some(now_ms),
        Step::Next => {
            rollout.wave += 1;
            (rollout.since_ms, rollout.serving_ms) = (now_ms, None);
        }
        Step::Done => {
            rollout.state = Stage::Done;
            record.current = Some(rollout.to);
        }
        Step::Halt(reason) => rollout.state = Stage::Halted { reason },
    }
    record.rollout.as_ref().map(described)
}

/// Where a rollout stands, for people.
fn described(rollout: &RolloutRecord) -> String {
    let wave = rollout.waves.get(rollout.wave).map(|wave| wave.nodes.to_string()).unwrap_or_default();
    let place = format!("wave {} of {} ({wave}), {} nodes", rollout.wave + 1, rollout.waves.len(), rollout.taken.len());
    match (&rollout.state, rollout.serving_ms) {
        (Stage::Done, _) => "done".to_owned(),
        (Stage::Halted { reason }, _) => format!("halted in {place}: {reason}"),
        (Stage::Running, Some(_)) => format!("{place}, all serve"),
        (Stage::Running, None) => place,
    }
}

fn wave_answer(rollout: &RolloutRecord) -> WaveAnswer {
    let (stage, reason) = match &rollout.state {
        Stage::Running => (WaveStage::Running, None),
        Stage::Done => (WaveStage::Done, None),
        Stage::Halted { reason } => (WaveStage::Halted, Some(reason.clone())),
    };
    WaveAnswer {
        number: rollout.wave + 1,
        count: rollout.waves.len(),
        nodes: rollout.waves.get(rollout.wave).map(|wave| wave.nodes.to_string()).unwrap_or_default(),
        taken: rollout.taken.iter().cloned().collect(),
        stage,
        reason,
    }
}

fn rollout_state(apps: &[AppStatus], release: &ReleaseId) -> RolloutState {
    let Some(app) = apps.iter().find(|status| status.app == release.app) else { return RolloutState::Pending };
    if [&app.serving, &app.candidate].into_iter().flatten().any(|serving| serving.release == *release) {
        return RolloutState::Serving;
    }
    match &app.refused {
        Some(refusal) if refusal.release == *release => {
            RolloutState::Refused { cause: refusal.cause.clone(), reason: refusal.reason.clone() }
        }
        _ => RolloutState::Pending,
    }
}
