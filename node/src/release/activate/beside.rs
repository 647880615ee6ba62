//! Second releases: each brought up beside the first of its app, for a part of the visitors, and taken away again.

use std::collections::BTreeMap;
use std::sync::Arc;

use selvage_config::AppName;
use selvage_config::plan::{Candidate, Plan, Serving};
use selvage_config::release::Release;

use super::{Activation, ReadyError, Refused, Running, chain, make};
use crate::release::fetch::fetch_head;
use crate::release::verify::Terms;
use crate::route::split::Second;
use crate::route::{ActiveApp, Table, TableError};

/// A second release that serves.
pub(super) struct Beside {
    candidate: Candidate,
    app: Arc<ActiveApp>,
}

impl Beside {
    pub(super) fn release(&self) -> &Release {
        &self.candidate.release
    }

    pub(super) fn serving(&self) -> Serving {
        let Release { id, manifest, .. } = self.release();
        Serving { release: id.clone(), manifest: *manifest }
    }

    fn second(&self) -> Second {
        let Candidate { release, percent, key, named } = &self.candidate;
        Second {
            app: Arc::clone(&self.app),
            release: release.id.clone(),
            percent: *percent,
            key: key.clone(),
            named: *named,
        }
    }
}

impl Activation {
    /// The table of these apps, with the second releases that serve.
    pub(super) fn table(&self, apps: Vec<Arc<ActiveApp>>) -> Result<Table, TableError> {
        Ok(Table::new(apps, &self.domain)?.with_seconds(self.beside.values().map(Beside::second)))
    }

    /// Makes the second releases those of the plan. Whether to try again later.
    pub(super) async fn bring_beside(&mut self, plan: &Plan) -> bool {
        let wanted: BTreeMap<AppName, &Candidate> = plan
            .candidates
            .iter()
            .filter(|candidate| self.running.contains_key(&candidate.release.id.app))
            .map(|candidate| (candidate.release.id.app.clone(), candidate))
            .collect();
        self.refused_beside
            .retain(|app, refused| wanted.get(app).is_some_and(|candidate| candidate.release == refused.release));
        let is_gone = |app: &AppName, beside: &Beside| {
            wanted.get(app).is_none_or(|candidate| candidate.release != *beside.release())
        };
        let gone: Vec<(AppName, Beside)> = self.beside.extract_if(.., |app, beside| is_gone(app, beside)).collect();
        let mut is_changed = !gone.is_empty();
        for (app, candidate) in wanted {
            if let Some(beside) = self.beside.get_mut(&app) {
                is_changed |= beside.candidate != *candidate;
                beside.candidate = candidate.clone();
                continue;
            }
            if self.refused_beside.get(&app).is_some_and(|refused| !refused.may_pass) {
                continue;
            }
            let release = &candidate.release;
            if self.ledger.as_ref().is_some_and(|ledger| !ledger.lists(release)) {
                let error = ReadyError::Unlisted { release: release.id.clone(), manifest: release.manifest };
                self.refuse_beside(release, plan.generation, &error);
                continue;
            }
            let (base, sources, compiling) =
                (Arc::clone(&self.base), self.sources.clone(), Arc::clone(&self.compiling));
            match Box::pin(make(base, sources, compiling, &candidate.release)).await {
                Ok(active) => {
                    tracing::info!(%app, release = %candidate.release.id, percent = candidate.percent, "serving beside");
                    self.refused_beside.remove(&app);
                    self.beside.insert(app, Beside { candidate: candidate.clone(), app: Arc::new(active) });
                    is_changed = true;
                }
                Err(error) => self.refuse_beside(&candidate.release, plan.generation, &error),
            }
        }
        if is_changed {
            self.publish();
            let told: Vec<AppName> = self.beside.keys().chain(gone.iter().map(|(app, _)| app)).cloned().collect();
            told.iter().for_each(|app| self.tell(app));
        }
        for (_, Beside { candidate, app }) in gone {
            self.drain(Running { release: candidate.release, app });
        }
        self.refused_beside.values().any(|refused| refused.may_pass)
    }

    /// Verifies second releases again by new terms, and takes away those that they do not cover.
    pub(super) async fn stop_beside_what_counts_no_more(&mut self, terms: &Terms) {
        let releases: Vec<Release> = self.beside.values().map(|beside| beside.release().clone()).collect();
        for release in releases {
            let verified = fetch_head(&release, &self.sources, &self.base.state, terms).await;
            let Err(error) = verified else { continue };
            let Some(gone) = self.beside.remove(&release.id.app) else { continue };
            let generation = self.report.borrow().generation;
            self.refuse_beside(&release, generation, &ReadyError::from(error));
            self.publish();
            self.drain(Running { release, app: gone.app });
        }
    }

    fn refuse_beside(&mut self, release: &Release, generation: u64, error: &ReadyError) {
        let refused = Refused::new(release, generation, error);
        let (cause, reason) = (&refused.refusal.cause, &refused.refusal.reason);
        tracing::warn!(release = %release.id, cause, reason, "second release refused");
        self.refused_beside.insert(release.id.app.clone(), refused);
        self.tell(&release.id.app);
    }

    /// Swaps in the table of what runs.
    fn publish(&self) {
        let apps = self.running.values().map(|running| Arc::clone(&running.app)).collect();
        match self.table(apps) {
            Ok(table) => self.parts.table.store(Arc::new(table)),
            // The first releases are those that the table has already.
            Err(error) => tracing::error!(error = chain(&error), "table with second releases"),
        }
    }
}
