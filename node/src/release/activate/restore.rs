//! What was good before the restart, or in the process that runs: brought up again from the disk.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_config::AppName;
use selvage_config::plan::Plan;
use selvage_config::release::Release;

use super::{Activation, Aim, apps_of};
use crate::release::origin::chain;
use crate::release::verify::Terms;

/// How often what the process before takes in while this one gets ready is followed. What comes later is followed when it
/// has gone.
const RESTORES_MAX: usize = 3;

impl Activation {
    /// Brings up what was good before the restart, from the disk alone. Returns the last plan. What can't be read is
    /// told in the log and is no reason not to start: the control plane will say it again.
    pub async fn restore(&mut self) -> Option<Arc<Plan>> {
        let (plan, good) = self.read().await?;
        self.bring_back(plan.as_ref(), good).await;
        plan.map(Arc::new)
    }

    /// The same beside the process that runs, which may take in a plan meanwhile: what is brought up is the newest.
    pub async fn restore_beside(&mut self) -> Option<Arc<Plan>> {
        let mut restored = None;
        for _ in 0..RESTORES_MAX {
            let before = self.generation().await;
            self.read_ledger().await;
            restored = self.restore().await;
            if self.generation().await == before {
                break;
            }
        }
        restored
    }

    /// The generation of the plan on the disk.
    async fn generation(&self) -> Option<u64> {
        let plan = self.on_disk(|base| base.state.plan()).await;
        plan.ok().flatten().map(|plan| plan.generation)
    }

    /// Goes on where the process before has ended: what it took in since stands on the disk. Returns its last plan, which is
    /// to be followed.
    pub async fn go_on(&mut self) -> Option<Arc<Plan>> {
        self.read_ledger().await;
        if self.trials.go_on() {
            self.trials.keep().await;
        }
        let (plan, _) = self.read().await?;
        if let Some(plan) = &plan {
            self.set_peers(plan);
        }
        plan.map(Arc::new)
    }

    async fn bring_back(&mut self, plan: Option<&Plan>, good: BTreeMap<AppName, Release>) {
        self.good = good;
        if let Some(plan) = plan {
            let planned = apps_of(plan);
            self.good.retain(|app, _| planned.contains(app));
            self.leave(&planned).await;
            self.set_peers(plan);
        }
        for release in self.good.values_mut() {
            // What brought the node down is not what was good.
            if let Some(before) = self.trials.before(release.manifest) {
                *release = before;
            }
        }
        let sources = std::mem::take(&mut self.sources);
        let due = self.good.values().filter(|release| !self.serves(release)).cloned().collect();
        self.bring_up(due, Aim::Good).await;
        self.sources = sources;
    }

    /// The last plan and what was good, as the disk has them.
    async fn read(&self) -> Option<(Option<Plan>, BTreeMap<AppName, Release>)> {
        let (plan, good) = self.on_disk(|base| Ok((base.state.plan(), base.state.serving()))).await.ok()?;
        let plan = plan.unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "last plan on disk is damaged");
            None
        });
        // Of a node that had another name: its generations are not this one's.
        let plan = plan.filter(|plan| plan.node == *self.parts.node());
        // One that is not the newest that was signed: somebody put an old copy there, or the keys changed since.
        let is_known = |plan: &Plan| self.ledger.as_ref().is_none_or(|ledger| ledger.knows(plan));
        if plan.as_ref().is_some_and(|plan| !is_known(plan)) {
            tracing::warn!("last plan on disk is not the newest that was signed, dropped");
        }
        let good = good.unwrap_or_else(|error| {
            tracing::error!(error = chain(&error), "list of good releases on disk is damaged");
            BTreeMap::new()
        });
        Some((plan.filter(is_known), good))
    }

    /// Takes what the ledger on the disk has that this process does not know. What is revoked there counts no more.
    async fn read_ledger(&self) {
        let Some(ledger) = self.ledger.clone() else { return };
        let reading = ledger.clone();
        match tokio::task::spawn_blocking(move || reading.read_again()).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => tracing::error!(error = chain(&error), "ledger on disk can't be read again"),
            Err(error) => tracing::error!(error = chain(&error), "ledger on disk can't be read again"),
        }
        let revoked = ledger.revoked();
        self.base.terms.send_if_modified(|terms| {
            let is_new = terms.revoked != revoked;
            if is_new {
                *terms = Arc::new(Terms::new(terms.policy.clone(), revoked));
            }
            is_new
        });
    }
}
